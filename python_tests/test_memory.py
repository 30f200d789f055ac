"""The memory contract: forward and backward stay within the workspace plus O(N), whatever N and
V."""

import subprocess
import sys

import pytest

MEASURE = """
import sys
import torch
import spo_ext

def status_mib(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024

tokens, vocabulary, depth, dtype = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]),
getattr(torch, sys.argv[4])
targets = torch.randint(vocabulary, (tokens,))

def run(hidden, weight, labels):
    logprobs = spo_ext.token_logprobs(hidden, weight, labels)
    return torch.autograd.grad(logprobs.sum(), (hidden, weight))

def leaves(n, v, d):
    return (torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v,
    d).to(dtype).requires_grad_())

run(*leaves(300, 600, 64), targets[:300] % 600)  # threads, libraries and the allocator are warm
hidden, weight = leaves(tokens, vocabulary, depth)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again here
before = status_mib("VmRSS")
grads = run(hidden, weight, targets)
gradients = sum(g.numel() * g.element_size() for g in grads) / 2**20
print(status_mib("VmHWM") - before - gradients)
"""


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
        [sys.executable, "-c", MEASURE, *map(str, shape)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    extra_mib = float(result.stdout)
    assert 0 < extra_mib <= 64, f"{extra_mib:.1f} MiB beyond inputs and gradients"
