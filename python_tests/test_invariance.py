"""Bitwise promises: a token's numbers do not depend on its batch, its place, threads or the run."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import head_inputs

import spo_ext

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16]


def run(hidden, weight, targets, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs, entropy = spo_ext.token_logprobs(
        hidden, weight, targets, return_entropy=True, **options
    )
    (logprobs.cos() + entropy.sin()).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_in_any_batch_order_or_slice(dtype):
    hidden, weight, targets = head_inputs(130, 1000, 300, dtype)
    whole = run(hidden, weight, targets)[:3]
    order = torch.randperm(130)
    permuted = run(hidden[order], weight, targets[order])[:3]
    for together, shuffled in zip(whole, permuted, strict=True):
        assert torch.equal(together[order], shuffled)
    for rows in (slice(0, 1), slice(57, 58), slice(129, 130), slice(13, 29), slice(0, 113)):
        part = run(hidden[rows], weight, targets[rows])[:3]
        for together, alone in zip(whole, part, strict=True):
            assert torch.equal(together[rows], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(dtype):
    hidden, weight, targets = head_inputs(24, 300, 40, dtype)
    packed = run(hidden, weight, targets)
    padded = run(hidden.view(4, 6, 40), weight, targets.view(4, 6))
    for a, b in zip(packed, padded, strict=True):
        assert torch.equal(a, b.view(a.shape))


@pytest.mark.cpu_only("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_workspace_do_not_matter(dtype):
    hidden, weight, targets = head_inputs(300, 2000, 64, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, workspace_mib in ((1, 64), (2, 64), (2, 2), (3, 16)):
            torch.set_num_threads(count)
            results.append(run(hidden, weight, targets, workspace_mib=workspace_mib))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_two_runs_are_equal():
    inputs = head_inputs(200, 1500, 80, torch.float32)
    for a, b in zip(run(*inputs), run(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_advantages_are_exactly_zero_at_equal_weights(dtype):
    """Policy and reference score in different batches, yet A_t = 0 and Q_t = Q_0 to the last
    bit."""
    hidden, weight, targets = head_inputs(64, 500, 48, dtype)
    policy = spo_ext.token_logprobs(hidden.view(8, 8, 48), weight, targets.view(8, 8))
    with torch.no_grad():
        reference = torch.stack(
            [
                spo_ext.token_logprobs(
                    hidden[i * 8 : i * 8 + 8], weight, targets[i * 8 : i * 8 + 8]
                )
                for i in range(8)
            ]
        )
    q0 = torch.randn(8)
    q = spo_ext.soft_q(policy, reference, q0, beta=0.37)
    assert torch.equal(q, q0[:, None].expand(8, 8))


@pytest.mark.cpu_only("on a GPU the two kernels cut the vocabulary differently")
def test_logprobs_from_logits_agrees_bitwise_with_the_head():
    """Both ops share the block statistics: on the same logits they give the same bits."""
    logits = torch.randn(9, 700)
    head = spo_ext.token_logprobs(torch.eye(9), logits.T.contiguous(), torch.arange(9))
    assert torch.equal(spo_ext.logprobs_from_logits(logits, torch.arange(9)), head)


OTHERS = {"generic", "avx2", "avx512"} - {spo_ext.build_info()["cpu_isa"]}
ON_EACH = [
    "test_token_logprobs.py::test_matches_reference",
    "test_token_logprobs.py::test_logit_options_and_bias",
    "test_token_logprobs.py::test_confident_token_keeps_its_gradient",
    "test_invariance.py::test_alone_in_any_batch_order_or_slice",
]


@pytest.mark.cpu_only("instruction sets")
@pytest.mark.parametrize("isa", sorted(OTHERS))
def test_every_instruction_set_is_right(isa):
    """The kernels are compiled once per instruction set. The other tests run on the best one; here
    are the head's on each of the rest that works here."""
    here = os.path.dirname(__file__)
    options = ["-q", "-p", "no:cacheprovider", "-k", "cpu"]
    options += [os.path.join(here, name) for name in ON_EACH]
    code = "import sys, pytest, spo_ext\nprint(spo_ext.build_info()['cpu_isa'], flush=True)\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(pytest.main({options}))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SPO_CPU_ISA": isa},
        cwd=os.path.dirname(here),
    )
    said = done.stdout
    if "SPO_CPU_ISA must be" in said:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0 and said.splitlines()[0] == isa, said[-2000:]
