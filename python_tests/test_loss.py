"""The loss of every objective against the reference in float64, its reductions, layouts and
refusals."""

import math

import numpy as np
import pytest
import torch
from conftest import eager, moved, relative_error
from loss_cases import BETA, FORMS, LENGTHS, packed_case, pad, padded

import spo_ext

pytestmark = pytest.mark.usefixtures("device")


def truth_of(logprobs, ref_logprobs, arguments):
    leaf = logprobs.detach().clone().requires_grad_()
    losses = eager.loss(leaf, ref_logprobs, **arguments)
    return losses, torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_matches_reference(form, dtype):
    logprobs, ref_logprobs, arguments = packed_case(form)
    leaf = logprobs.detach().to(dtype).requires_grad_()
    losses = spo_ext.loss(leaf, ref_logprobs.to(dtype), **arguments, reduction="none")
    grad = torch.autograd.grad(losses.sum(), leaf)[0]
    # float32: the truth starts from the same rounded numbers
    rounded = {
        k: v.to(dtype).double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    want, want_grad = truth_of(leaf.double(), ref_logprobs.to(dtype).double(), rounded)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert losses.dtype == grad.dtype == dtype
    assert relative_error(losses, want) <= tolerance
    assert relative_error(grad, want_grad) <= tolerance


@pytest.mark.parametrize("form", FORMS)
def test_padded_equals_packed(form):
    logprobs, ref_logprobs, arguments = packed_case(form)
    losses = spo_ext.loss(logprobs, ref_logprobs, **arguments, reduction="none")
    grad = torch.autograd.grad(losses.sum(), logprobs)[0]
    leaf, ref, rows = padded(logprobs, ref_logprobs, arguments)
    padded_losses = spo_ext.loss(leaf, ref, **rows, reduction="none")
    padded_grad = torch.autograd.grad(padded_losses.sum(), leaf)[0]
    assert torch.equal(padded_losses, losses)
    assert torch.equal(padded_grad, pad(grad, LENGTHS, 0.0))  # and 0 at masked tokens


@pytest.mark.parametrize(
    "form", [f for f in FORMS if "per-token" not in f and "advantage" not in f]
)
def test_summed_reference_equals_per_token_reference(form):
    logprobs, ref_logprobs, arguments = packed_case(form)
    sums = torch.stack([piece.sum() for piece in ref_logprobs.split(LENGTHS)])
    results = []
    for ref in (ref_logprobs, sums):
        losses = spo_ext.loss(logprobs, ref, **arguments, reduction="none")
        results.append((losses, torch.autograd.grad(losses.sum(), logprobs)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "form",
    [
        "squared",
        "cross_entropy",
        "advantage, shared gain",
        "squared, per-token targets and weights",
    ],
)
def test_gradient_of_q0(form):
    """q0 may be learned."""
    logprobs, ref_logprobs, arguments = packed_case(form)
    for function in (spo_ext.loss, eager.loss):
        q0 = arguments["q0"].clone().requires_grad_()
        extra = {"reduction": "none"} if function is spo_ext.loss else {}
        losses = function(logprobs, ref_logprobs, **{**arguments, "q0": q0}, **extra)
        grad = torch.autograd.grad(losses.sum(), q0)[0]
        if function is spo_ext.loss:
            got = grad
    torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-12)


def test_cross_entropy_at_the_clip():
    """Solved (y = 1, Q_T > 0): no gradient. Failed (y = 0, Q_T > 0): still pushed down, at the
    slope of the tangent."""
    logprobs = torch.tensor([2.0, 2.0, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.0, -math.inf, -math.inf, 0.0], dtype=torch.float64)
    losses = spo_ext.loss(
        logprobs[:, None],
        torch.zeros(4, 1, dtype=torch.float64),
        rewards,
        0.0,
        beta=1.0,
        delta=0.2,
        reduction="none",
    )
    grad = torch.autograd.grad(losses.sum(), logprobs)[0]
    tangent = 1 / math.expm1(0.2)
    want_loss = [
        0.0,
        -math.log(-math.expm1(-0.2)) + tangent * 2.2,
        -math.log(-math.expm1(-0.5)),
        3.0,
    ]
    assert losses.tolist() == pytest.approx(want_loss, rel=1e-12)
    assert grad.tolist() == pytest.approx([0.0, tangent, 1 / math.expm1(0.5), -1.0], rel=1e-12)


def test_group_gradient_is_that_of_the_centred_pairs():
    """The group objective equals the mean over all pairs of ((r_i - beta R_i) - (r_j - beta
    R_j))^2 / 2."""
    logprobs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    ref_logprobs, rewards = (
        torch.randn(6, 5, dtype=torch.float64),
        torch.randn(6, dtype=torch.float64),
    )
    mean = spo_ext.loss(
        logprobs,
        ref_logprobs,
        rewards,
        None,
        beta=0.3,
        objective="group",
        groups=torch.zeros(6).int(),
    )
    gain = rewards - 0.3 * (logprobs - ref_logprobs).sum(1)
    pairs = ((gain[:, None] - gain[None, :]) ** 2).mean() / 2
    assert mean.item() == pytest.approx(pairs.item(), rel=1e-12)
    got, want = (torch.autograd.grad(x, logprobs)[0] for x in (mean, pairs))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_reductions():
    logprobs, ref_logprobs, arguments = packed_case("squared")
    call = lambda **kw: spo_ext.loss(logprobs, ref_logprobs, **arguments, **kw)  # noqa: E731
    losses = call(reduction="none")
    assert losses[2] == 0  # the empty sequence
    assert call(reduction="sum").item() == pytest.approx(losses.sum().item())
    assert call(reduction="mean").item() == pytest.approx(
        losses.sum().item() / 5
    )  # five have tokens
    assert call(reduction="sum", denominator=32).item() == pytest.approx(losses.sum().item() / 32)
    by_tensor = call(reduction="sum", denominator=torch.tensor(32.0, dtype=torch.float64))
    assert by_tensor.item() == pytest.approx(losses.sum().item() / 32)


def test_gradient_accumulation_is_exact():
    """Micro-batches with the global sequence count as denominator add up to the whole batch's
    gradient."""
    logprobs = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    ref, rewards, q0 = torch.randn(8, 6).double(), -torch.rand(8).double(), -torch.rand(8).double()
    whole = torch.autograd.grad(spo_ext.loss(logprobs, ref, rewards, q0, beta=1.0), logprobs)[0]
    total = torch.zeros_like(whole)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part = spo_ext.loss(
            logprobs[rows],
            ref[rows],
            rewards[rows],
            q0[rows],
            beta=1.0,
            reduction="sum",
            denominator=8,
        )
        total += torch.autograd.grad(part, logprobs)[0]
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_everything_masked_is_a_differentiable_zero(form):
    logprobs, ref_logprobs, arguments = packed_case(form)
    leaf, ref, rows = padded(logprobs, ref_logprobs, arguments)
    rows["mask"] = torch.zeros_like(rows["mask"])
    total = spo_ext.loss(leaf, ref, **rows)
    total.backward()
    assert total == 0 and (leaf.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batch(shape):
    logprobs = torch.zeros(shape, requires_grad=True)
    total = spo_ext.loss(
        logprobs, torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape[0]), beta=1.0
    )
    total.backward()
    assert total == 0 and logprobs.grad.shape == shape


def test_stats():
    logprobs, ref_logprobs, arguments = packed_case("squared")
    _, stats = spo_ext.loss(logprobs, ref_logprobs, **arguments, return_stats=True)
    log_ratio = torch.stack(
        [
            (logprobs - ref_logprobs)[p].sum()
            for p in eager.sequences(logprobs, arguments["cu_seqlens"])
        ]
    )
    assert stats.num_tokens.tolist() == LENGTHS and not stats.terminal_q.requires_grad
    torch.testing.assert_close(stats.log_ratio, log_ratio)
    torch.testing.assert_close(stats.terminal_q, arguments["q0"] + BETA * log_ratio)
    torch.testing.assert_close(stats.residual, stats.terminal_q - arguments["rewards"])
    means = stats.means()
    assert means["num_tokens"].item() == pytest.approx(sum(LENGTHS) / 5)
    assert means["loss"].item() == pytest.approx(
        spo_ext.loss(logprobs, ref_logprobs, **arguments).item()
    )
    logprobs, ref_logprobs, arguments = packed_case("cross_entropy, token rewards")
    _, other = spo_ext.loss(logprobs, ref_logprobs, **arguments, return_stats=True)
    pieces = arguments["token_rewards"].split(LENGTHS)
    last = torch.stack([p[-1] if len(p) else p.sum() for p in pieces])
    chance = (other.terminal_q / BETA).clamp(max=0).exp()
    target = ((arguments["rewards"] + last) / BETA).exp()
    torch.testing.assert_close(other.residual, chance - target)


def test_long_sums_keep_their_digits():
    """R over 2^20 tokens of equal size: a float32 running sum is off in the fourth digit."""
    logprobs = torch.full((1, 2**20), -0.1)
    q = spo_ext.soft_q(logprobs, torch.zeros_like(logprobs), 0.0, beta=1.0)
    exact = float(logprobs[0, 0].double()) * 2**20
    assert q[0, -1].item() == pytest.approx(exact, rel=1e-7)
    # in float32: what the kernel must not do
    running = float(np.cumsum(logprobs[0].cpu().numpy())[-1])
    assert abs(running / exact - 1) > 1e-5


def test_sixteen_bit_logprobs_are_summed_in_double():
    logprobs = torch.full((1, 4096), -0.1, dtype=torch.bfloat16, requires_grad=True)
    total, stats = spo_ext.loss(
        logprobs,
        torch.zeros_like(logprobs),
        torch.zeros(1),
        0.0,
        beta=0.01,
        objective="squared",
        return_stats=True,
    )
    assert stats.log_ratio.item() == pytest.approx(logprobs[0, 0].item() * 4096, rel=1e-6)
    total.backward()
    assert logprobs.grad.dtype == torch.bfloat16 and total.dtype == torch.float32


REFUSED = [
    ("squared", dict(groups=torch.zeros(6).long()), "groups must be None for objective 'squared'"),
    ("squared", dict(advantages=torch.zeros(6)), "advantages must be None"),
    ("squared", dict(q_weights=torch.zeros(22)), "q_weights must be None"),
    ("squared", dict(leave_one_out=True), "leave_one_out must be False"),
    ("squared", dict(q0=None), "q0 must be given for objective 'squared', got None"),
    ("squared", dict(rewards=None), "rewards must be given"),
    (
        "squared, per-token targets",
        dict(rewards=torch.zeros(6)),
        "rewards must be None for objective 'squared' with q_targets",
    ),
    ("group", dict(q0=torch.zeros(6)), "q0 must be None for objective 'group'"),
    ("group", dict(groups=None), "groups must be given"),
    ("advantage, per token", dict(rewards=torch.zeros(6)), "rewards must be None"),
    ("linear", dict(q0=torch.zeros(6)), "q0 must be None"),
    ("linear", dict(weights=None), "weights must be given"),
    ("squared", dict(objective="sqaured"), "objective must be squared, cross_entropy, advantage"),
    ("squared", dict(reduction="max"), "reduction must be none, mean or sum, got 'max'"),
    ("squared", dict(denominator=3), "denominator must be None unless reduction is sum"),
    ("squared", dict(beta=0.0), "beta must be a finite number > 0, got 0"),
    ("squared", dict(beta=math.nan), "beta must be a finite number > 0"),
    ("cross_entropy", dict(delta=0.0), "delta must be a finite number > 0, got 0"),
    ("squared", dict(rewards=torch.zeros(5)), r"rewards must have shape \[6\], got \[5\]"),
    ("squared", dict(mask=torch.ones(22)), "mask must be bool"),
    ("squared", dict(mask=torch.ones(21).bool()), r"mask must have shape \[22\], got \[21\]"),
    ("squared", dict(cu_seqlens=None), r"logprobs must be padded \[B, T\], or packed \[N\]"),
    ("squared", dict(cu_seqlens=torch.tensor([0.0, 22.0])), "cu_seqlens must be int64 or int32"),
    ("squared", dict(weights=torch.zeros(6, requires_grad=True)), "weights must not require grad"),
    ("squared", dict(delta=0.1), "delta must be left out for objective 'squared', got 0.1"),
    ("cross_entropy", dict(delta=math.inf), "delta must be a finite number > 0, got inf"),
    ("squared", dict(beta=torch.tensor(1.0, requires_grad=True)), "beta must not require grad"),
    ("squared", dict(beta="high"), "beta must be a number, got 'high'"),
    ("squared", dict(beta=torch.ones(2)), r"beta must be a number, got 'a tensor \[2\] on "),
    ("squared", dict(q0=True), "q0 must be a number, got True"),
    ("group", dict(groups=torch.rand(6)), "groups must be integers, got Float"),
    ("group", dict(groups=torch.ones(6).bool()), "groups must be integers, got Bool"),
    ("squared", dict(rewards=torch.zeros(6) * 1j), "rewards must be real, got Complex"),
    ("squared", dict(reduction="sum", denominator=math.inf), "denominator must be a finite number"),
    ("squared", dict(reduction="sum", denominator=0), "denominator must be a finite number > 0"),
    (
        "squared",
        dict(reduction="sum", denominator=torch.ones(1, requires_grad=True)),
        "denominator must not require grad",
    ),
    ("squared", dict(reduction="sum", denominator=torch.ones(6)), "denominator must be one number"),
]
# Without a host synchronisation only the GPU sees values.
REFUSED_VALUES = [
    ("squared", dict(rewards=torch.full((6,), math.nan)), "must be finite, got nan at position 0"),
    ("cross_entropy", dict(rewards=torch.ones(6)), "rewards must be log-optimalities <= 0"),
    ("squared", dict(q0=torch.full((6,), math.inf)), "q0 must be finite, got inf"),
    ("squared", dict(q0=math.nan), "q0 must be finite, got nan"),
    ("squared", dict(rewards=torch.full((6,), 1e300, dtype=torch.float64)), None),
    ("group", dict(rewards=torch.full((6,), -math.inf)), "rewards must be finite, got -inf"),
    ("squared, weights", dict(weights=torch.full((6,), math.inf)), "weights must be finite"),
    ("linear", dict(weights=torch.full((6,), math.nan)), "weights must be finite, got nan"),
    ("advantage, shared gain", dict(rewards=torch.full((6,), math.nan)), "rewards must be finite"),
    (
        "advantage, per token",
        dict(advantages=torch.full((22,), math.nan)),
        "advantages must be fin",
    ),
    ("advantage, per token", dict(advantages=torch.full((6,), math.inf)), "advantages must be fin"),
    (
        "squared, per-token targets",
        dict(q_targets=torch.full((22,), math.nan)),
        "q_targets must be",
    ),
    (
        "cross_entropy, per-token targets",
        dict(q_targets=torch.full((22,), math.nan)),
        r"q_targets must be log-optimalities <= 0 for cross_entropy \(-inf for none\), got nan at",
    ),
    ("cross_entropy, per-token targets", dict(q_targets=torch.full((22,), 0.5)), "q_targets must "),
    (
        "cross_entropy, per-token targets",
        dict(q_weights=torch.full((22,), math.nan)),
        "q_weights must be finite, got nan at position 0",
    ),
    (
        "squared, token rewards",
        dict(token_rewards=torch.full((22,), math.nan)),
        "token_rewards mus",
    ),
    (
        "cross_entropy, token rewards",
        dict(token_rewards=torch.full((22,), -math.inf)),
        "token_rewards must be <= 0 for cross_entropy, and finite before the last token, got -inf",
    ),
    (
        "squared",
        dict(reduction="sum", denominator=torch.tensor(math.nan)),
        "denominator must be a finite number > 0, got nan",
    ),
    ("squared", dict(cu_seqlens=torch.tensor([0, 5, 4, 22])), "must not fall, got 5 then 4"),
    ("squared", dict(cu_seqlens=torch.tensor([1, 22])), "cu_seqlens must start at 0, got 1"),
    ("squared", dict(cu_seqlens=torch.tensor([0, 21])), "must end at the number of tokens 22"),
]
REFUSED += [pytest.param(*c, marks=pytest.mark.cpu_only("values")) for c in REFUSED_VALUES]


@pytest.mark.parametrize("form, change, message", REFUSED)
def test_refuses(form, change, message, device):
    logprobs, ref_logprobs, arguments = packed_case(form)
    change = moved(change, device)
    arguments |= change
    if "cu_seqlens" in change and change["cu_seqlens"] is not None:
        size = len(change["cu_seqlens"]) - 1
        arguments |= dict(rewards=torch.zeros(size), q0=torch.zeros(size))
    if message is None:  # what float64 holds and float32 does not
        spo_ext.loss(logprobs, ref_logprobs, **arguments)
        logprobs, message = logprobs.float(), "must be finite, got inf"
    with pytest.raises((ValueError, TypeError), match=f"^loss: .*{message}"):
        spo_ext.loss(logprobs, ref_logprobs, **arguments)


@pytest.mark.parametrize("name", ["q_targets", "q_weights", "token_rewards", "advantages"])
def test_what_is_masked_is_not_read(name):
    """Nor checked: padding may hold anything."""
    form = (
        "advantage, per token" if name == "advantages" else "squared, per-token targets and weights"
    )
    leaf, ref, rows = padded(*packed_case(form))
    want = spo_ext.loss(leaf, ref, **rows)
    rows[name] = rows[name].masked_fill(~rows["mask"], math.nan)
    assert torch.equal(spo_ext.loss(leaf, ref, **rows), want)


def ambiguous_case():
    """As many tokens as sequences, packed and padded: lengths 0, 1, 2."""
    offsets = torch.tensor([0, 0, 1, 3])
    rows = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]])
    mask = torch.tensor([[False, False], [True, False], [True, True]])
    return (rows[mask], dict(cu_seqlens=offsets)), (rows, dict(mask=mask))


@pytest.mark.parametrize("name", ["ref_logprobs", "advantages"])
def test_one_reading_of_a_shape(name, device):
    (packed, cut), (rows, mask) = ambiguous_case()
    per_sequence, per_token = torch.tensor([9.0, -1.0, -2.0]), torch.tensor([-0.5, -0.25, -3.0])

    def losses(logprobs, value, where):
        ref = value if name == "ref_logprobs" else torch.zeros_like(logprobs)
        terms = dict(advantages=value) if name == "advantages" else {}
        objective = "squared" if name == "ref_logprobs" else "advantage"
        given = (torch.zeros(3), 0.0) if name == "ref_logprobs" else (None, None)
        return spo_ext.loss(
            logprobs, ref, *given, beta=1.0, objective=objective, reduction="none", **terms, **where
        ).tolist()

    want = losses(rows, per_sequence, mask)
    assert losses(rows, per_sequence[:, None], mask) == want
    assert losses(packed, per_sequence[:, None], cut) == want
    padded_tokens = torch.zeros(3, 2).masked_scatter(mask["mask"], per_token)
    assert losses(packed, per_token[None], cut) == losses(rows, padded_tokens, mask) != want
    one_each = dict(cu_seqlens=torch.arange(4))  # either reading is the same
    assert losses(packed, per_token, one_each) == losses(packed, per_token[:, None], one_each)
    if device == "cpu":  # the GPU asserts it
        with pytest.raises(ValueError, match=rf"{name} must be \[1, 3\] if it is per token, or"):
            losses(packed, per_token, cut)


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_alone_in_a_group_there_is_exactly_no_gradient(leave_one_out, length):
    """Q_0 + beta R - r does not cancel in float32 at beta = 1000, nor in float64."""
    logprobs = torch.full((3, length), -1.7, requires_grad=True)
    total = spo_ext.loss(
        logprobs,
        torch.full((3, length), -0.3),
        torch.tensor([0.123, 0.3, 0.7]),
        None,
        beta=1e3,
        objective="group",
        groups=torch.tensor([4, 0, 0]),
        leave_one_out=leave_one_out,
    )
    grad = torch.autograd.grad(total, logprobs)[0]
    assert (grad[0] == 0).all() and (grad[1:] != 0).all()
    # and the residual of the others keeps its digits, though Q_0 is 1e5 and rounded to .008
    half = 1 if leave_one_out else 0.5
    want = 2 * 1e3 * half * (0.7 - 0.3) / 3
    assert grad[1, 0].item() == pytest.approx(want, rel=1e-5)
    assert grad[2, 0].item() == pytest.approx(-want, rel=1e-5)


def test_an_impossible_failure_is_solved():
    """log pi = -inf and y = 0: loss and gradient are exactly 0, alone and beside other tokens."""
    logprobs = torch.tensor([[-math.inf, -1.0], [-1.0, -2.0]], requires_grad=True)
    failed = torch.full((2,), -math.inf)
    losses = spo_ext.loss(logprobs, torch.zeros(2, 2), failed, -0.1, beta=0.1, reduction="none")
    grad = torch.autograd.grad(losses.sum(), logprobs)[0]
    assert losses[0] == 0 and (grad[0] == 0).all() and losses[1] > 0 and (grad[1] > 0).all()
    success = spo_ext.loss(
        logprobs, torch.zeros(2, 2), torch.zeros(2), -0.1, beta=0.1, reduction="none"
    )
    assert success[0] == math.inf and success[1].isfinite()
    nan = torch.tensor([[math.nan, -1.0]])
    assert spo_ext.loss(nan, torch.zeros(1, 2), failed[:1], -0.1, beta=0.1).isnan()


def test_refuses_a_reference_that_is_neither_per_token_nor_per_sequence():
    logprobs, ref_logprobs, arguments = packed_case("squared")
    with pytest.raises(ValueError, match=r"ref_logprobs must have shape \[6\], got \[21\]"):
        spo_ext.loss(logprobs, ref_logprobs[:-1], **arguments)
    logprobs, ref_logprobs, arguments = packed_case("advantage, per token")
    with pytest.raises(ValueError, match="ref_logprobs must be per token for this objective"):
        spo_ext.loss(logprobs, torch.zeros(6), **arguments)
    with pytest.raises(ValueError, match="ref_logprobs must not require grad"):
        spo_ext.loss(logprobs, ref_logprobs.clone().requires_grad_(), **arguments)


def test_taper_weights():
    weights = spo_ext.taper_weights(
        torch.tensor([-5.0, -5.0, -1.0]),
        torch.tensor([-3.0, -3.0, -2.0]),
        torch.tensor([-1.0, 0.0, -1.0]),
        threshold=0.0,
    )
    # the failure the policy has left fades; a success and a failure it now prefers keep their
    # weight
    assert weights.tolist() == pytest.approx([math.exp(-2), 1.0, 1.0])
    gone = spo_ext.taper_weights(
        torch.tensor([-math.inf]), torch.tensor([-3.0]), torch.tensor([-1.0]), threshold=0.0
    )
    assert gone.tolist() == [0.0]
    with pytest.raises(ValueError, match=r"taper_weights: rewards must have shape \[3\]"):
        spo_ext.taper_weights(torch.zeros(3), torch.zeros(3), torch.zeros(2), threshold=0.0)


@pytest.mark.cpu_only("values are asserted on the GPU")
@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(logprob_sums=torch.tensor([math.nan])),
            "logprob_sums must be finite or -inf, got nan",
        ),
        (dict(behaviour=torch.tensor([-math.inf])), "behaviour_logprob_sums must be finite"),
        (dict(rewards=torch.tensor([math.nan])), "rewards must be finite or -inf, got nan"),
        (dict(threshold=math.nan), "threshold must be a number, got nan"),
        (dict(threshold=torch.zeros(1)), "threshold must be a number"),
    ],
)
def test_taper_weights_refuses(change, message):
    given = dict(logprob_sums=torch.zeros(1), behaviour=torch.zeros(1), rewards=torch.zeros(1))
    given |= dict(threshold=0.0) | change
    threshold = given.pop("threshold")
    with pytest.raises((ValueError, TypeError), match=f"^taper_weights: {message}"):
        spo_ext.taper_weights(*given.values(), threshold=threshold)


@pytest.mark.cpu_only("values are asserted on the GPU")
def test_soft_q_refuses_an_infinite_q0():
    with pytest.raises(ValueError, match="^soft_q: q0 must be finite, got inf at position 1"):
        q0 = torch.tensor([0.0, math.inf])
        spo_ext.soft_q(torch.zeros(2, 3), torch.zeros(2, 3), q0, beta=1.0)
