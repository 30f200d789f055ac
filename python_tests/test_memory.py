"""The memory contract: forward and backward stay within the workspace plus O(N), whatever N and
V."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "extra_memory.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "shape",
    [
        (4096, 65536, 256, "float32"),  # logits would take 1 GiB
        (16384, 2048, 768, "bfloat16"),  # the float sums of grad_hidden alone would take 48 MiB
    ],
)
def test_extra_memory_is_within_the_workspace(shape):
    result = subprocess.run(
        [sys.executable, SCRIPT, *map(str, shape)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    extra_mib = float(result.stdout)
    assert 0 < extra_mib <= 64, f"{extra_mib:.1f} MiB beyond inputs and gradients"
