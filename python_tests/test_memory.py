"""The memory contract: forward and backward stay within the workspace plus O(N), whatever N and
V."""

import subprocess
import sys
from pathlib import Path

import pytest
import warm

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "extra_memory.py"


def extra_mib(*arguments):
    process = warm.Process([str(SCRIPT), *map(str, arguments)], stdout=subprocess.PIPE)
    said, _ = process.communicate()
    assert process.returncode == 0
    return float(said)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "shape",
    [
        (4096, 65536, 48, "float32"),  # logits would take 1 GiB
        (16384, 800, 768, "bfloat16"),  # the float sums of grad_hidden alone would take 48 MiB
    ],
)
@pytest.mark.parametrize("name", ["spo_ext", "sparse"])
def test_extra_memory_is_within_the_workspace(shape, name):
    extra = extra_mib(*shape, name)
    assert 0 < extra <= 64, f"{extra:.1f} MiB beyond inputs and gradients"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_frozen_head_takes_one_tensor_like_hidden_more():
    like_hidden = 8192 * 512 * 4 / 2**20
    assert 0 < extra_mib(8192, 2048, 512, "float32", "frozen") <= 64 + like_hidden
