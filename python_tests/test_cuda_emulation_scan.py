"""The logic of the CUDA kernels of soft_q, cumulative_loss and logprobs_from_logits, run thread by
thread on the host (cuda_emulation) against the reference, with the threads in both orders."""

import pytest
import torch
from conftest import DTYPES, GRAD_TOLERANCE, LOGPROB_TOLERANCE, logprob_error, relative_error
from cuda_emulation.build import load
from loss_cases import FORMS, packed_case, pad, padded

from spo_ext import eager
from spo_ext._ops import LossArgs

# Average lengths that get one warp, eight and a whole block per sequence.
TEAMS = {"warp": [5, 1, 0, 33, 64, 300], "eight": [700, 1, 0, 1025, 31], "block": [9000, 40]}


@pytest.fixture(scope="module")
def ops():
    return load()


@pytest.fixture(params=["forward", "reverse"], autouse=True)
def order(request, monkeypatch):
    if request.param == "reverse":
        monkeypatch.setenv("SPO_EMULATE_REVERSE", "1")


def run_soft_q(ops, logprobs, ref_logprobs, q0, upstream, cu_seqlens=None, mask=None):
    q = ops.soft_q(logprobs, ref_logprobs, q0, 0.3, cu_seqlens, mask)
    return q, *ops.soft_q_backward(upstream.to(q.dtype), 0.3, cu_seqlens, mask)


def run_loss(ops, logprobs, ref_logprobs, arguments):
    """(loss, terminal_q, log_ratio, used_q0, residual, num_tokens), (grad_logprobs, grad_q0)"""
    given = dict(delta=0.2, leave_one_out=False) | arguments
    given |= dict(logprobs=logprobs.detach(), ref_logprobs=ref_logprobs)
    args = LossArgs(*map(given.get, LossArgs._fields))
    out = ops.cumulative_loss(*args)
    if args.objective == "group":  # as _cumulative_loss_setup does
        slope = -2 * args.beta * out[4] * given.get("weights", 1)
        args = args._replace(objective="linear", rewards=None, weights=slope, groups=None)
    return out, ops.cumulative_loss_backward(torch.ones_like(out[0]), *args)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("team", TEAMS)
def test_soft_q(ops, team, dtype, index):
    lengths = TEAMS[team]
    total, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    logprobs, ref = -torch.rand(total).to(dtype), -torch.rand(2 * total).to(dtype)[::2]
    q0, mask = torch.randn(len(lengths)).to(dtype), torch.rand(total) < 0.7
    truth, start = logprobs.double().requires_grad_(), q0.double().requires_grad_()
    want = eager.soft_q(truth, ref.double(), start, beta=0.3, cu_seqlens=offsets, mask=mask)
    upstream = torch.randn(total, dtype=torch.float64).to(torch.float32)
    got = run_soft_q(ops, logprobs, ref, q0, upstream, offsets.to(index), mask)
    wants = (want, *torch.autograd.grad(want, (truth, start), upstream.double()))
    for a, b in zip(got, wants, strict=True):
        assert relative_error(a, b) <= (1e-12 if dtype == torch.float64 else 1e-6)
    assert (got[1][~mask] == 0).all()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("form", FORMS)
def test_loss(ops, form, team, layout):
    lengths = TEAMS[team]
    case = packed_case(form, lengths)
    want = eager.loss(case[0], case[1], **case[2])
    want_grad = torch.autograd.grad(want.sum(), case[0])[0]
    if layout == "padded":  # NaN at masked positions
        case, want_grad = padded(*case, lengths), pad(want_grad, lengths, 0.0)
    out, grads = run_loss(ops, *case)
    assert relative_error(out[0], want) <= 1e-12
    assert relative_error(grads[0], want_grad) <= 1e-12
    assert out[5].tolist() == lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_loss_equals_the_cpu_op(ops, form, dtype):
    logprobs, ref, arguments = packed_case(form)
    case = logprobs.detach().to(dtype), ref.to(dtype), arguments
    (out, grads), (on_cpu, cpu_grads) = run_loss(ops, *case), run_loss(torch.ops.spo, *case)
    for got, want in zip((*out, *grads), (*on_cpu, *cpu_grads), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert relative_error(got, want) <= (1e-13 if dtype == torch.float64 else 2e-7)


def test_summed_reference_and_terminal_q(ops):
    lengths = TEAMS["eight"]
    logprobs, ref, arguments = packed_case("cross_entropy", lengths)
    sums = torch.stack([piece.sum() for piece in ref.split(lengths)])
    (out, grads), (summed, summed_grads) = (
        run_loss(ops, logprobs, r, arguments) for r in (ref, sums)
    )
    for a, b in zip((*out, *grads), (*summed, *summed_grads), strict=True):
        assert relative_error(a, b) <= 1e-10
    rows, row_ref, row_arguments = padded(logprobs, ref, arguments, lengths)
    q = ops.soft_q(rows.detach(), row_ref, row_arguments["q0"], 0.4, None, row_arguments["mask"])
    assert torch.equal(q[:, -1], out[1])


def test_a_sequence_has_the_same_bits_in_any_batch(ops):
    """Whatever the number of warps that walk it, and alone or beside others."""
    own = -torch.rand(2, 300)
    results = []
    for before, after in ([0], [0]), ([7] * 40, [33]), ([20000], [500]):
        lengths = [*before, 300, *after]
        noise = [-torch.rand(2, sum(n)) for n in (before, after)]
        logprobs, ref = torch.cat([noise[0], own, noise[1]], 1)
        at, first = len(before), sum(before)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        q0 = torch.full((len(lengths),), 0.5)
        q = run_soft_q(ops, logprobs, ref, q0, logprobs.cos(), offsets)
        arguments = dict(
            objective="squared",
            beta=0.4,
            q0=q0,
            q_targets=torch.sin(logprobs),
            token_rewards=-logprobs.square(),
            cu_seqlens=offsets,
        )
        out, grads = run_loss(ops, logprobs, ref, arguments)
        tokens, sequences = (q[0], q[1], grads[0]), (q[2], *out[:4], out[5], grads[1])
        piece = slice(first, first + 300)
        results.append([*(t[piece] for t in tokens), *(s[at] for s in sequences)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_equal_policies_have_exactly_no_advantage(ops):
    logprobs, _, arguments = packed_case("squared", TEAMS["eight"])
    out, _ = run_loss(ops, logprobs, logprobs.detach().clone(), arguments)
    assert (out[2] == 0).all() and torch.equal(out[1], arguments["q0"])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_tokens(ops, shape):
    empty, q0 = torch.zeros(shape), torch.ones(shape[0])
    assert ops.soft_q(empty, empty, q0, 0.3, None, None).shape == shape
    grads = ops.soft_q_backward(empty, 0.3, None, None)
    assert grads[0].shape == shape and grads[1].tolist() == [0.0] * shape[0]
    for objective in ("squared", "group"):
        arguments = dict(rewards=q0, q0=q0, groups=torch.zeros(shape[0]).long(), beta=0.3)
        out, grads = run_loss(ops, empty, empty, arguments | dict(objective=objective))
        assert out[0].tolist() == [0.0] * shape[0] and grads[0].shape == shape


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cu_seqlens=torch.tensor([1, 3, 6])), "must start at 0"),
        (dict(cu_seqlens=torch.tensor([0, 7, 6])), "cu_seqlens must"),  # one thread says it first
        (dict(cu_seqlens=torch.tensor([0, 3, 5])), "must end at the number of tokens"),
        (dict(rewards=torch.tensor([0.0, float("nan")])), "rewards must be finite"),
        (dict(q0=torch.tensor([0.0, float("inf")])), "q0 must be finite"),
        (dict(q_targets=torch.full((6,), float("nan"))), "q_targets must be finite"),
        (dict(q_targets=torch.ones(6), objective="cross_entropy"), "q_targets must be log-opt"),
        (dict(q_weights=torch.full((6,), float("inf"))), "q_weights must be finite"),
        (dict(token_rewards=torch.full((6,), float("nan"))), "token_rewards must be finite"),
        (
            dict(token_rewards=torch.full((6,), -float("inf")), objective="cross_entropy"),
            "finite before the last token",
        ),
        (dict(advantages=torch.full((2,), float("nan"))), "advantages must be finite"),
        (dict(advantages=torch.full((6,), float("nan"))), "advantages must be finite"),
        (
            dict(cu_seqlens=torch.tensor([0, 0, 1, 2, 3, 4, 6]), rewards=None, q0=None),
            "ref_logprobs and advantages must be .1, N. if they are per token",
        ),
        (dict(delta=float("inf")), "delta must be a finite number > 0"),
        (dict(beta=0.0), "beta must be a finite number > 0"),
    ],
)
def test_values_are_checked_where_the_tensors_are(ops, change, message):
    arguments = dict(
        objective="squared",
        rewards=torch.zeros(2),
        q0=torch.zeros(2),
        beta=0.3,
        cu_seqlens=torch.tensor([0, 2, 6]),
    )
    run_loss(ops, torch.zeros(6), torch.zeros(6), arguments)
    with pytest.raises((RuntimeError, ValueError), match=message):
        run_loss(ops, torch.zeros(6), torch.zeros(6), arguments | change)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 507, 2048, 2049, 50257])
def test_logprobs_from_logits(ops, vocabulary, dtype):
    shape = (2, 3) if vocabulary < 10000 else (1, 2)
    logits = (torch.randn(*shape, vocabulary) * 3).to(dtype)
    targets = torch.randint(vocabulary, shape).int()
    targets[0, 1] = -100
    got = ops.logprobs_from_logits(logits, targets, 0.8, -100, True, False)
    truth = logits.double().requires_grad_()
    want = eager.logprobs_from_logits(truth, targets, temperature=0.8)
    for a, b in zip(got, want, strict=False):
        assert logprob_error(a, b) <= LOGPROB_TOLERANCE[dtype]
    upstream = [torch.randn(shape).to(got[0].dtype) for _ in range(2)]
    grad = ops.logprobs_from_logits_backward(*upstream, logits, targets, *got, 0.8, -100)
    want_grad = torch.autograd.grad(want, truth, [u.double() for u in upstream])[0]
    assert relative_error(grad, want_grad) <= GRAD_TOLERANCE[dtype]
    assert (grad[0, 1] == 0).all()
    version = logits._version
    ops.logprobs_from_logits_backward_(*upstream, logits, targets, *got, 0.8, -100)
    assert torch.equal(logits, grad) and logits._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_any_place_and_stride_have_the_same_bits(ops, dtype):
    """Aligned rows are read 16 bytes at a time, others element by element."""
    logits = torch.randn(4, 5001).to(dtype)
    targets = torch.randint(5001, (4,))
    want = ops.logprobs_from_logits(logits, targets, 1.0, -100, True, False)
    upstream = torch.randn(4)
    arguments = targets, *want, 1.0, -100
    want_grad = ops.logprobs_from_logits_backward(upstream, None, logits, *arguments)
    for view in (
        torch.empty(4, 5008, dtype=dtype)[:, :5001],  # every row aligned
        torch.empty(4, 5008, dtype=dtype)[:, 3:5004],
        torch.empty(4, 10002, dtype=dtype)[:, ::2],
        torch.empty(5001, 4, dtype=dtype).T,
    ):
        view.copy_(logits)
        got = ops.logprobs_from_logits(view, targets, 1.0, -100, True, False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        grad = ops.logprobs_from_logits_backward(upstream, None, view, *arguments)
        assert torch.equal(grad, want_grad)
        ops.logprobs_from_logits_backward_(upstream, None, view, *arguments)
        assert torch.equal(view, want_grad)


def test_extreme_logits(ops):
    """As on the CPU: confident tokens keep their digits, -inf adds nothing, NaN stays in a row."""
    logits = torch.randn(6, 600)
    logits[0, 5] = 60.0
    logits[1] = torch.where(torch.arange(600) == 5, 1e4, -1e4)
    logits[2, 300:] = -torch.inf
    logits[3, 100] = torch.nan
    logits[4] = -torch.inf
    logits[4, 5] = 1.0
    targets = torch.full((6,), 5)
    upstream = [torch.randn(6), torch.randn(6)]
    results = []
    for library in (ops, torch.ops.spo):
        out = library.logprobs_from_logits(logits, targets, 1.0, -100, True, False)
        grad = library.logprobs_from_logits_backward(*upstream, logits, targets, *out, 1.0, -100)
        results.append((*out, grad))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=3e-6, atol=1e-6, equal_nan=True)
    assert 0 < -results[0][0][0] < 1e-20


def test_refuses_logits_that_overlap_themselves(ops):
    logits, targets = torch.randn(1, 5).expand(3, 5), torch.zeros(3).long()
    out = ops.logprobs_from_logits(logits, targets, 1.0, -100, False, False)
    with pytest.raises(ValueError, match="must not overlap itself"):
        ops.logprobs_from_logits_backward_(torch.ones(3), None, logits, targets, *out, 1.0, -100)
    with pytest.raises(RuntimeError, match=r"targets must be in \[0, V\)"):
        ops.logprobs_from_logits(logits, targets + 5, 1.0, -100, False, False)
