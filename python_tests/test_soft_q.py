"""soft_q against the reference, in both layouts."""

import pytest
import torch
from conftest import eager, relative_error
from loss_cases import LENGTHS, packed_case, padded

import spo_ext

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_matches_reference(layout, dtype, tolerance):
    logprobs, ref, arguments = packed_case("squared")
    if layout == "padded":
        logprobs, ref, arguments = padded(logprobs, ref, arguments)
    where = {k: arguments.get(k) for k in ("cu_seqlens", "mask")}
    leaf = logprobs.detach().to(dtype).requires_grad_()
    q0 = arguments["q0"].to(dtype).requires_grad_()
    got = spo_ext.soft_q(leaf, ref.to(dtype), q0, beta=0.3, **where)
    truth, truth_q0 = leaf.detach().double().requires_grad_(), q0.detach().double().requires_grad_()
    want = eager.soft_q(truth, ref.to(dtype).double(), truth_q0, beta=0.3, **where)
    assert relative_error(got, want) <= tolerance
    upstream = torch.randn(got.shape, dtype=dtype)
    grads = torch.autograd.grad(got, (leaf, q0), upstream)
    wants = torch.autograd.grad(want, (truth, truth_q0), upstream.double())
    for a, b in zip(grads, wants, strict=True):
        assert a.isfinite().all() and relative_error(a, b) <= tolerance


def test_last_column_of_a_padded_batch_is_the_terminal_q():
    logprobs, ref, arguments = packed_case("squared")
    _, stats = spo_ext.loss(logprobs, ref, **arguments, return_stats=True)
    leaf, ref, rows = padded(logprobs, ref, arguments)
    q = spo_ext.soft_q(leaf, ref, rows["q0"], beta=rows["beta"], mask=rows["mask"])
    assert torch.equal(q[:, -1], stats.terminal_q)


def test_refuses():
    logprobs, ref, arguments = packed_case("squared")
    offsets = arguments["cu_seqlens"]
    with pytest.raises(ValueError, match=r"soft_q: q0 must have shape \[6\], got \[2\]"):
        spo_ext.soft_q(logprobs, ref, torch.zeros(2), beta=1.0, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="soft_q: ref_logprobs must have shape"):
        spo_ext.soft_q(logprobs, ref[:3], 0.0, beta=1.0, cu_seqlens=offsets)
    with pytest.raises(TypeError, match="soft_q: logprobs must be float32"):
        spo_ext.soft_q(logprobs.long(), ref, torch.zeros(6), beta=1.0, cu_seqlens=offsets)
    assert len(LENGTHS) == 6
