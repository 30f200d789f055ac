"""What a builder is told: one clear sentence for each thing that is missing, never a traceback."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import warm

from spo_ext import _compiled, build_info

ROOT = Path(__file__).parent.parent


def run_setup(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process that finds its packages anew."""
    return subprocess.run(
        [sys.executable, *flags, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def run_warm_setup(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Its status, standard output and standard error."""
    process = warm.Process(
        ["setup.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    said = process.communicate()
    return process.wait(), *said


def test_without_packages_one_clear_sentence():
    result = run_setup("-S", PYTHONPATH="")
    message = "building needs PyTorch, setuptools and ninja where spo_ext will run, not in"
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"spo_ext: {message}")


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"SPO_CUDA": "yes"}, "SPO_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"SPO_CUDA": "1", "CUDA_HOME": "", "PATH": ""}, "SPO_CUDA=1 needs nvcc: install"),
        ({"SPO_CUDA": "1", "CUDA_HOME": "no-such-folder"}, "SPO_CUDA=1 needs nvcc: install"),
        ({"PATH": "", "CXX": "no-such-compiler"}, "building needs a C++17 compiler: install g++"),
    ],
)
def test_one_clear_sentence(environment, message):
    status, _, said = run_warm_setup("--version", **environment)
    assert status != 0 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith(f"spo_ext: {message}")


@pytest.mark.parametrize(
    "package, text, message",
    [
        (
            "torch",
            "raise OSError('libcudart.so.13: cannot open shared object file')",
            "PyTorch, which is installed but does not import: libcudart.so.13: cannot open",
        ),
        (
            "torch",
            "import a_package_that_torch_needs",
            "PyTorch, which is installed but does not import: No module named 'a_package",
        ),
        (
            "torch",
            "from torch._C import *",
            "PyTorch, which is installed but does not import: No module named 'torch._C'",
        ),
        (
            "torch",
            "from torch import _C",
            "PyTorch, which is installed but does not import: cannot import name '_C'",
        ),
        (
            "torch",
            "__version__ = '2.10.1+cpu'",
            "torch 2.11 or later, found 2.10.1+cpu: install a later one first, then pip install",
        ),
        (
            "setuptools",
            "__version__ = '65.5.0'",
            "setuptools 77 or later, found 65.5.0: pip install 'setuptools>=77', then pip install",
        ),
    ],
)
def test_what_is_installed_but_of_no_use_is_named(package, text, message, tmp_path):
    """Before pip replaces anything by a download."""
    for name in {package, "torch"}:
        (tmp_path / name / "utils").mkdir(parents=True)
        (tmp_path / name / "utils" / "__init__.py").write_text("cpp_extension = None")
        (tmp_path / name / "__init__.py").write_text("__version__ = '2.99.0'")
    (tmp_path / package / "__init__.py").write_text(text)
    result = run_setup(PYTHONPATH=str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"spo_ext: building needs {message}")


def test_importing_the_source_folder_says_what_to_do(tmp_path):
    """It hides an installed spo_ext, since Python looks in the current folder first."""
    source = Path(_compiled.__file__).parent
    shutil.copytree(source, tmp_path / "spo_ext", ignore=shutil.ignore_patterns("_C.*"))
    result = subprocess.run(
        [sys.executable, "-c", "import spo_ext"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: spo_ext: {tmp_path}/spo_ext is the source, without a ")
    assert "start Python in another folder, or build in this one: pip install --no-build-" in last


def test_a_module_for_another_python_is_named(tmp_path):
    (tmp_path / "_C.cpython-37m-x86_64-linux-gnu.so").touch()
    why = _compiled.why_missing(tmp_path)
    assert why.startswith(f"{tmp_path} has a module for another Python (_C.cpython-37m-x86_64")


@pytest.mark.parametrize("running", ["2.99.1+cu130", "3.0.0"])
def test_another_torch_than_built_with_is_named_before_anything_is_loaded(running, monkeypatch):
    monkeypatch.setattr(_compiled.torch, "__version__", running)
    monkeypatch.setattr(importlib, "import_module", None)
    built = build_info()["torch"]
    with pytest.raises(ImportError) as caught:
        _compiled.load()
    assert f"built with torch {built} and does not run with torch {running}: " in str(caught.value)
    assert _compiled.BUILD in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_does_not_load_says_both_versions(monkeypatch):
    def import_module(name):
        raise ImportError("_C.so: undefined symbol: _ZN3c104impl3cowEv")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ImportError) as caught:
        _compiled.load()
    running = _compiled.torch.__version__
    assert f"built with torch {build_info()['torch']} and does not load with" in str(caught.value)
    assert f"torch {running} (_C.so: undefined symbol: " in str(caught.value)


def test_the_version_of_torch_is_that_of_the_build():
    import torch

    assert torch.__version__.split("+")[0].startswith(build_info()["torch"].split("a")[0])


def test_refusing_cuda_builds_for_cpu():
    status, said, _ = run_warm_setup("--version", SPO_CUDA="0")
    assert status == 0 and said.strip().splitlines()[-1] == "0.2.0"


def test_pre_commit_has_the_pinned_versions():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    hooks = re.findall(r'dependencies: \["(.+)"\]', (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3 and set(hooks) <= set(pinned)


def test_every_source_is_listed_once():
    """A kernel file that is not in csrc/sources.txt would be silently left out."""
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    compiled = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")]
    present = [str(path.relative_to(ROOT)) for path in compiled]
    assert sorted(listed) == sorted(present)


def test_source_distribution_has_all_that_a_cuda_build_reads(tmp_path):
    """`make package` then builds it; a header left out would show on a machine with nvcc only."""
    command = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    status, _, said = run_warm_setup(*command, SPO_CUDA="0")
    assert status == 0, said
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed += [
        *(ROOT / "tools").glob("*.py"),
        ROOT / "CMakeLists.txt",
        ROOT / "constraints-cuda.txt",
    ]
    assert any(path.suffix == ".cuh" for path in needed)
    assert {str(path.relative_to(ROOT)) for path in needed} - packed == set()


READS_VARIABLE = re.compile(
    r'(?:environ\b[^\n]*?|getenv\(|VARIABLE = )"(SPO_[A-Z_]+)"|\$\{(SPO_[A-Z_]+)\b'
)


def test_every_environment_variable_is_in_the_table():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Environment variables")[1]
    named = set(re.findall(r"`(SPO_[A-Z_]+)`", table.split("\n## ")[0]))
    folders = [ROOT / name for name in ("spo_ext", "csrc", "tools", "benchmarks", "python_tests")]
    files = [ROOT / "setup.py", *(path for folder in folders for path in folder.rglob("*.*"))]
    endings = (".py", ".cpp", ".h", ".cuh", ".sh")
    texts = [path.read_text() for path in files if path.suffix in endings]
    read = {a or b for text in texts for a, b in READS_VARIABLE.findall(text)}
    read -= {"SPO_TEST_OLD", "SPO_TEST_NEW"}  # a test's own
    assert read == named
