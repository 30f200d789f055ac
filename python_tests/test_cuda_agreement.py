"""Every op gives on the GPU what it gives on the CPU: same inputs, same formulas."""

import pytest
import torch
from conftest import GRAD_TOLERANCE, LOGPROB_TOLERANCE, head_inputs, logprob_error, relative_error
from cuda_cases import moved_case, run_head
from loss_cases import FORMS, packed_case, padded

import spo_ext

pytestmark = pytest.mark.cuda
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(strategy="stored"),
        dict(temperature=0.7, softcap=20.0, logit_scale=1.5, workspace_mib=16),
    ],
)
def test_token_logprobs(dtype, options):
    inputs = head_inputs(150, 3001, 200, dtype)
    inputs[2][::7] = -100
    on_cpu = run_head(*inputs, **options)
    on_gpu = run_head(*(t.cuda() for t in inputs), **options)
    for got, want in zip(on_gpu[:2], on_cpu[:2], strict=True):
        assert logprob_error(got, want) <= 3 * LOGPROB_TOLERANCE[dtype]
    for got, want in zip(on_gpu[2:], on_cpu[2:], strict=True):
        assert got.dtype == want.dtype and relative_error(got, want) <= 2 * GRAD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_logprobs_from_logits(dtype, inplace):
    logits = (torch.randn(90, 5003) * 3).to(dtype)
    targets = torch.randint(5003, (90,)).masked_fill(torch.arange(90) % 8 == 0, -100)
    results = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        got = spo_ext.logprobs_from_logits(
            leaf * 1,
            targets.to(device),
            temperature=0.9,
            return_entropy=True,
            inplace_backward=inplace,
        )
        grad = torch.autograd.grad((got[0].cos() + got[1].sin()).sum(), leaf)[0]
        results.append((*got, grad))
    for got, want in zip(results[1][:2], results[0][:2], strict=True):
        assert logprob_error(got, want) <= 3 * LOGPROB_TOLERANCE[dtype]
    assert relative_error(results[1][2], results[0][2]) <= 2 * GRAD_TOLERANCE[dtype]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_stats(form, layout, dtype, tolerance):
    """Sums are taken in double on both, so only the last digit may differ."""
    lengths = [5, 1, 0, 3000, 700, 1025]  # several blocks, one token, none
    case = packed_case(form, lengths)
    if layout == "padded":
        case = padded(*case, lengths)
    results = []
    for device in ("cpu", "cuda"):
        leaf, ref, arguments = moved_case(case, device, dtype)
        losses, stats = spo_ext.loss(leaf, ref, **arguments, reduction="none", return_stats=True)
        grad = torch.autograd.grad(losses.sum(), leaf)[0]
        assert torch.equal(stats.num_tokens.cpu(), torch.tensor(lengths))
        results.append((losses, grad, stats.terminal_q, stats.log_ratio, stats.q0))
    for got, want in zip(results[1], results[0], strict=True):
        assert got.dtype == want.dtype and relative_error(got, want) <= tolerance


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_soft_q(layout, dtype):
    lengths = [4097, 0, 1, 2500]
    case = packed_case("squared", lengths)
    if layout == "padded":
        case = padded(*case, lengths)
    results = []
    for device in ("cpu", "cuda"):
        leaf, ref, arguments = moved_case(case, device, dtype)
        where = {k: arguments.get(k) for k in ("cu_seqlens", "mask")}
        q0 = arguments["q0"].requires_grad_()
        q = spo_ext.soft_q(leaf, ref, q0, beta=0.3, **where)
        results.append((q, *torch.autograd.grad(q.sin().sum(), (leaf, q0))))
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    for got, want in zip(results[1], results[0], strict=True):
        assert got.dtype == want.dtype and relative_error(got, want) <= tolerance


def test_linear_loss():
    hidden, weight, targets = head_inputs(4 * 90, 2000, 128, torch.float32)
    targets = targets.view(4, 90).masked_fill(torch.rand(4, 90) < 0.2, -100)
    ref, rewards, q0 = torch.randn(4, 90) - 9, -torch.rand(4), -torch.rand(4)
    results = []
    for device in ("cpu", "cuda"):
        h, w = (t.detach().to(device).requires_grad_() for t in (hidden, weight))
        given = [t.to(device) for t in (targets, ref, rewards, q0)]
        total = spo_ext.linear_loss(h.view(4, 90, 128), w, *given, beta=0.1, objective="squared")
        results.append((total, *torch.autograd.grad(total, (h, w))))
    for got, want in zip(results[1], results[0], strict=True):
        assert relative_error(got, want) <= 1e-5
