"""`loss` and `prompt_value` against their definitions in NumPy, float64, on shapes and values drawn
by hypothesis: empty sequences, as many tokens as sequences, -inf, tiny and huge beta, groups of
one."""

import math
import warnings

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import spo_ext

RUNS = settings(max_examples=60, derandomize=True, database=None)
LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=6)
BETAS = st.sampled_from([1e-3, 0.1, 1.0, 1e3])


def point_loss(q, target, objective, beta, delta=0.2):
    """phi and its slope."""
    if objective == "squared":
        return (q - target) ** 2, 2 * (q - target)
    u, y = q / beta, math.exp(target / beta)
    value = slope = 0.0
    if y > 0 and u < 0:
        value, slope = -y * u, -y
    if y < 1:
        tangent = 1 / math.expm1(delta)
        if u > -delta:
            failure = -math.log(-math.expm1(-delta)) + tangent * (u + delta), tangent
        else:
            failure = -np.log1p(-np.exp(u)), 1 / np.expm1(-u) if u > -700 else 0.0
        value, slope = value + (1 - y) * failure[0], slope + (1 - y) * failure[1]
    return value, slope / beta


def definition(logprobs, ref, case):
    """Losses [S] and their gradients [N], sequence by sequence."""
    ends = np.cumsum([0, *case["lengths"]])
    beta, losses, grads = case["beta"], [], np.zeros(len(logprobs))
    ratios = [(logprobs - ref)[a:b].sum() for a, b in zip(ends, ends[1:], strict=False)]
    gains = [r - beta * ratio for r, ratio in zip(case["rewards"], ratios, strict=True)]
    for s, length in enumerate(case["lengths"]):
        q0 = case["q0"][s]
        if case["objective"] == "group":
            group = [
                t
                for t, n in enumerate(case["lengths"])
                if n and case["groups"][t] == case["groups"][s]
            ]
            peers = (
                [t for t in group if t != s] if case["leave_one_out"] and len(group) > 1 else group
            )
            value = np.mean([gains[t] for t in peers]) - gains[s] if length else 0.0
            value, slope = value**2, 2 * value
        else:
            q = q0 + beta * ratios[s]
            value, slope = point_loss(q, case["rewards"][s], case["objective"], beta)
        losses.append(value if length else 0.0)
        grads[ends[s] : ends[s + 1]] = beta * slope
    return np.array(losses), grads


@st.composite
def loss_cases(draw):
    lengths = draw(LENGTHS)
    if draw(st.booleans()):  # as many tokens as sequences
        lengths = [*lengths, *[0] * (sum(lengths) - len(lengths))]
    size, total = len(lengths), sum(lengths)

    def numbers(n, low, high):
        return draw(st.lists(st.floats(low, high), min_size=n, max_size=n))

    objective = draw(st.sampled_from(["squared", "cross_entropy", "group"]))
    rewards = numbers(size, -5, 5)
    if objective == "cross_entropy":
        rewards = [draw(st.sampled_from([0.0, -math.inf, -abs(r)])) for r in rewards]
    logprobs = numbers(total, -5, 0)
    if objective == "cross_entropy" and total and draw(st.booleans()):
        logprobs[0] = -math.inf
        first = next(s for s, n in enumerate(lengths) if n)
        rewards[first] = -math.inf
    return dict(
        lengths=lengths,
        objective=objective,
        beta=draw(BETAS),
        leave_one_out=objective == "group" and draw(st.booleans()),
        groups=draw(st.lists(st.integers(-1, 2), min_size=size, max_size=size)),
        rewards=rewards,
        q0=numbers(size, -2, 0),
        logprobs=logprobs,
        ref=numbers(total, -5, 0),
        summed=draw(st.booleans()),
        padded=draw(st.booleans()),
    )


@RUNS
@given(loss_cases())
def test_loss(case):
    logprobs, ref = np.array(case["logprobs"]), np.array(case["ref"])
    with np.errstate(invalid="ignore"):
        want, want_grad = definition(logprobs, ref, case)
    assume(np.isfinite(want).all())
    cu_seqlens = torch.tensor([0, *case["lengths"]]).cumsum(0)
    tokens, reference, places = torch.tensor(logprobs), torch.tensor(ref), {}
    rows = list(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True))
    sums = torch.stack([reference[a:b].sum() for a, b in rows])
    where = torch.ones(len(tokens), dtype=torch.bool)
    if case["padded"]:
        mask = (
            torch.arange(max(case["lengths"], default=0)) < torch.tensor(case["lengths"])[:, None]
        )
        where, places = mask, dict(mask=mask)
        blank = torch.full(mask.shape, math.nan).double()
        tokens, reference = (blank.masked_scatter(mask, packed) for packed in (tokens, reference))
    else:
        places = dict(cu_seqlens=cu_seqlens)
        reference = reference[None]
    leaf = tokens.requires_grad_()
    group = case["objective"] == "group"
    losses = spo_ext.loss(
        leaf,
        sums[:, None] if case["summed"] else reference,
        torch.tensor(case["rewards"], dtype=torch.float64),
        None if group else torch.tensor(case["q0"], dtype=torch.float64),
        beta=case["beta"],
        objective=case["objective"],
        groups=torch.tensor(case["groups"]) if group else None,
        leave_one_out=case["leave_one_out"],
        reduction="none",
        **places,
    )
    grad = torch.autograd.grad(losses.sum(), leaf)[0]
    scale = 1e-12 * max(1.0, case["beta"] ** 2)  # of what cancels in Q_T - r
    np.testing.assert_allclose(losses.detach().numpy(), want, rtol=1e-9, atol=scale)
    np.testing.assert_allclose(grad[where].numpy(), want_grad, rtol=1e-9, atol=scale)
    if group:
        live = [g for g, n in zip(case["groups"], case["lengths"], strict=True) if n]
        for s, (a, b) in enumerate(rows):
            if case["lengths"][s] and live.count(case["groups"][s]) == 1:
                own = grad[s] if case["padded"] else grad[a:b]
                assert losses[s] == 0 and (own == 0).all()


def log_mean_exp(x):
    top = max(x)
    return top + math.log(sum(math.exp(v - top) for v in x) / len(x))


@RUNS
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.floats(-20, 20) | st.just(-math.inf)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([1e-5, 1e-3, 0.1, 1.0, 1e6]),
    st.sampled_from(["reference", "group", "leave_one_out", "ema", "smoothed"]),
)
def test_prompt_value(samples, beta, estimator):
    groups, rewards = zip(*samples, strict=True)
    of = [[r for g, r in samples if g == p] for p in range(4)]
    given = dict(beta=beta, groups=torch.tensor(groups), num_prompts=4)
    if estimator == "leave_one_out":
        want = []
        for i, (group, reward) in enumerate(samples):
            others = [r for j, (g, r) in enumerate(samples) if g == group and j != i]
            want.append(sum(others) / len(others) if others else reward)
    elif estimator == "ema":
        given |= dict(previous=torch.arange(4.0), decay=0.75)
        want = [0.75 * p + 0.25 * sum(x) / len(x) if x else p for p, x in enumerate(of)]
    else:
        present = sorted(set(groups))  # every prompt must have a sample
        given |= dict(groups=torch.tensor([present.index(g) for g in groups]), num_prompts=None)
        of = [x for x in of if x]
        if estimator == "group":
            want = [sum(x) / len(x) for x in of]
        else:
            assume(all(max(x) > -math.inf for x in of))
            if estimator == "smoothed":
                assume(min(rewards) < max(rewards))
                given |= dict(smoothing=1.0)
                of = [[*x, min(rewards), max(rewards)] for x in of]
            if beta > 1e3:  # the mean, up to what is of the order of 1 / beta
                assume(min(rewards) > -math.inf)
                want = [sum(x) / len(x) for x in of]
            else:
                want = [beta * log_mean_exp([r / beta for r in x]) for x in of]
    name = "reference" if estimator == "smoothed" else estimator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prompts at the floor
        values = spo_ext.prompt_value(
            torch.tensor(rewards, dtype=torch.float64), estimator=name, **given
        )
    np.testing.assert_allclose(values.numpy(), want, rtol=1e-6, atol=1e-3 if beta > 1e3 else 2e-6)


def test_a_prompt_s_value_depends_on_its_own_samples_to_the_last_bit():
    rewards = torch.randn(40, 7)
    for estimator in ("reference", "group", "leave_one_out"):
        all_of_them = spo_ext.prompt_value(rewards, beta=0.1, estimator=estimator).view(40, -1)
        for row in (0, 3, 39):
            alone = spo_ext.prompt_value(rewards[row], beta=0.1, estimator=estimator)
            assert torch.equal(alone, all_of_them[row])
