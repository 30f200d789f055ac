"""What is decided before nvcc runs, and what is checked after, on machines without either."""

import cuda_build
import pytest

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) echo sm_75; echo sm_80; echo sm_90; echo sm_110; echo sm_103; echo sm_121 ;;
  --dryrun) echo "#$ _HERE_={home}/bin" >&2 ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit that can only say what it is, and an environment that asks for nothing else."""
    for name in ("SPO_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CUTLASS_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(version="13.0", home=home))
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=":")
    return home


@pytest.fixture
def cutlass(tmp_path, monkeypatch):
    folder = tmp_path / "cutlass" / "include" / "cutlass"
    folder.mkdir(parents=True)
    names = {"MAJOR": 4, "MINOR": 2, "PATCH": 1}
    text = "".join(f"#define CUTLASS_{name} {number}\n" for name, number in names.items())
    (folder / "version.h").write_text(text)
    monkeypatch.setenv("CUTLASS_HOME", str(tmp_path / "cutlass"))
    return folder.parent


@pytest.mark.parametrize(
    "environment, torch_cuda, message",
    [
        ({"SPO_CUDA": "2"}, "13.0", "SPO_CUDA must be 0, 1 or unset, got '2'"),
        ({"SPO_CUDA": "1"}, None, "needs a CUDA build of torch, found a CPU build"),
        ({}, "12.8", "the CUDA toolkit is 13.0 but torch was built for CUDA 12.8: install"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 Hopper"}, "13.0", "has 'Hopper'; write numbers of this"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, "13.0", "has '7.5'; write numbers of this toolkit (8.0 "),
        ({"TORCH_CUDA_ARCH_LIST": "native"}, "13.0", "has 'native'"),
        ({"CUTLASS_HOME": "/nowhere"}, "13.0", "CUTLASS_HOME=/nowhere has no include/cutlass/"),
    ],
)
def test_one_clear_sentence(toolkit, monkeypatch, environment, torch_cuda, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cuda_build.BuildError) as caught:
        cuda_build.plan(torch_cuda)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_nvcc_is_named(toolkit):
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho no; exit 0\n")
    with pytest.raises(cuda_build.BuildError, match="does not answer like nvcc; set CUDA_HOME"):
        cuda_build.plan("13.0")


@pytest.mark.parametrize(
    "asked, torch_cuda, built", [("", "13.0", True), ("", None, False), ("0", "13.0", False)]
)
def test_cuda_is_built_where_it_can_be(toolkit, monkeypatch, asked, torch_cuda, built):
    monkeypatch.setenv("SPO_CUDA", asked)
    assert (cuda_build.plan(torch_cuda) is not None) == built


def test_unset_without_nvcc_is_a_cpu_build(toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    assert cuda_build.plan("13.0") is None


def test_the_toolkit_is_where_nvcc_says(toolkit, tmp_path, monkeypatch):
    """An nvcc on PATH may be a script beside no toolkit at all."""
    script = tmp_path / "elsewhere" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    assert cuda_build.plan("13.0").home == toolkit


def test_default_architectures_serve_every_gpu(toolkit, cutlass):
    """Machine code for Ampere, Hopper and the newest; PTX for those between and those to come."""
    plan = cuda_build.plan("13.0")
    flags = [flag for flag in plan.nvcc_flags if flag.startswith("-gencode")]
    assert flags == [
        f"-gencode=arch=compute_{virtual},code={real}"
        for virtual, real in [
            ("80", "sm_80"),
            ("80", "compute_80"),
            ("90a", "sm_90a"),
            ("121", "sm_121"),
            ("121", "compute_121"),
        ]
    ]
    macros = dict(plan.macros)
    assert macros["SPO_CUDA_ARCHS"] == '"8.0+PTX 9.0a 12.1+PTX"'
    assert macros["SPO_CUDA_TOOLKIT"] == '"13.0"'


def test_cutlass_is_used_for_hopper_alone(toolkit, cutlass, monkeypatch):
    plan = cuda_build.plan("13.0")
    assert dict(plan.macros)["SPO_CUTLASS_VERSION"] == '"4.2.1"'
    assert str(cutlass) in plan.includes and plan.summary.endswith("; CUTLASS 4.2.1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    plan = cuda_build.plan("13.0")
    assert "SPO_CUTLASS" not in dict(plan.macros) and str(cutlass) not in plan.includes
    assert "no 9.0a" in plan.summary


def test_without_cutlass_the_build_says_so(toolkit, monkeypatch):
    monkeypatch.setattr(cuda_build, "cutlass_includes", list)
    plan = cuda_build.plan("13.0")
    assert "SPO_CUTLASS" not in dict(plan.macros)
    assert "no CUTLASS headers (pip install nvidia-cutlass" in plan.summary


def test_headers_of_the_wheels_fill_a_small_toolkit(toolkit, tmp_path, monkeypatch):
    wheel = tmp_path / "site" / "nvidia" / "cu13" / "include"
    wheel.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert str(wheel) in cuda_build.plan("13.0").includes
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cublas_v2.h").touch()
    assert str(wheel) not in cuda_build.plan("13.0").includes
