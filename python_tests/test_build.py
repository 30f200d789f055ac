"""What a builder is told: one clear sentence for each thing that is missing, never a traceback."""

import os
import subprocess
import sys
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
        ([], {"SPO_CUDA": "1"}, "SPO_CUDA=1, but this version has no CUDA kernels"),
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
    present = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.c*")]
    assert sorted(listed) == sorted(present)
