"""What a builder is told: one clear sentence for each thing that is missing, never a traceback."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_setup(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "flags, environment, message",
    [
        (["-S"], {}, "building needs PyTorch, setuptools and ninja: pip install torch setuptools"),
        ([], {"SPO_CUDA": "yes"}, "SPO_CUDA must be 0, 1 or unset, got 'yes'"),
        ([], {"SPO_CUDA": "1", "CUDA_HOME": "", "PATH": ""}, "SPO_CUDA=1 needs nvcc: install"),
        ([], {"SPO_CUDA": "1", "CUDA_HOME": "no-such-folder"}, "SPO_CUDA=1 needs nvcc: install"),
        (
            [],
            {"PATH": "", "CXX": "no-such-compiler"},
            "building needs a C++17 compiler: install g++",
        ),
    ],
)
def test_one_clear_sentence(flags, environment, message):
    if flags and "PYTHONPATH" in os.environ:
        environment = {**environment, "PYTHONPATH": ""}
    result = run_setup(*flags, **environment)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith(f"spo_ext: {message}")
    assert "Traceback" not in result.stderr


def test_refusing_cuda_builds_for_cpu():
    result = run_setup(SPO_CUDA="0")
    assert result.returncode == 0 and result.stdout.strip().splitlines()[-1] == "0.1.0"


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
    subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT,
        env={**os.environ, "SPO_CUDA": "0"},
        check=True,
        capture_output=True,
    )
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
