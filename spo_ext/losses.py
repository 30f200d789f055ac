"""The SPO losses: soft-Q values, the loss of completions, and both from an LM head.

Per-token tensors are [N] (packed, cut at cu_seqlens [S + 1]) or [B, T] (padded, S = B);
per-sequence tensors [S].
Symbols follow Soft Policy Optimization, arXiv 2503.05453.
"""

import math
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from spo_ext._ops import LossArgs, run
from spo_ext.arguments import check_values, number, refuse_grad, same_device
from spo_ext.head import HeadOptions, token_logprobs
from spo_ext.stats import LossStats
from spo_ext.strategy import Strategy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Objective = Literal["squared", "cross_entropy", "advantage", "group", "linear"]
Reduction = Literal["none", "mean", "sum"]

_DELTA = 0.2


def soft_q(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    q0: Tensor | float,
    *,
    beta: float,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Q_t = Q_0 + sum_{i<=t} beta (logprobs_i - ref_logprobs_i): the soft-Q value after every
    token.

    Args:
        logprobs: [N] with `cu_seqlens`, or [B, T]; nats.
        ref_logprobs: like logprobs.
        q0: [S] or a number, the prompt value, in reward units; finite.
        beta: softness, a finite number > 0.
        mask: bool like logprobs; a masked position adds nothing and repeats the value before it.

    Returns:
        float32 (float64 for float64 logprobs), shaped like logprobs, summed in double.
        Differentiable in logprobs and q0.
    """
    refuse_grad("soft_q", ref_logprobs=ref_logprobs)
    beta = number("soft_q", "beta", beta)
    start = _per_sequence("soft_q", q0, logprobs, cu_seqlens)
    same_device(
        "soft_q",
        "logprobs",
        logprobs,
        ref_logprobs=ref_logprobs,
        q0=start,
        cu_seqlens=cu_seqlens,
        mask=mask,
    )
    return run("soft_q", logprobs, ref_logprobs, start, beta, cu_seqlens, mask)  # type: ignore[no-any-return]


# Which arguments an objective needs, and which it may have beside them. Everything else is refused:
# an argument that would be ignored is a mistake.
_NEEDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "squared": (frozenset({"rewards", "q0"}), frozenset({"token_rewards"})),
    "cross_entropy": (frozenset({"rewards", "q0"}), frozenset({"token_rewards"})),
    "q_targets": (frozenset({"q_targets", "q0"}), frozenset({"q_weights", "token_rewards"})),
    "advantage": (frozenset({"rewards", "q0"}), frozenset()),
    "advantages": (frozenset({"advantages"}), frozenset()),
    "group": (frozenset({"rewards", "groups"}), frozenset({"token_rewards"})),
    "linear": (frozenset({"weights"}), frozenset()),
}
_DIFFERENTIABLE = frozenset({"logprobs", "q0"})
_ALWAYS = frozenset({"logprobs", "ref_logprobs", "weights", "cu_seqlens", "mask"})


def _check_arguments(args: LossArgs) -> None:
    objective, tensors = args.objective, args.tensors()
    if objective not in ("squared", "cross_entropy", "advantage", "group", "linear"):
        raise ValueError(
            "loss: objective must be squared, cross_entropy, advantage, group or linear, "
            f"got {objective!r}"
        )
    form = objective
    if objective in ("squared", "cross_entropy") and args.q_targets is not None:
        form = "q_targets"
    if objective == "advantage" and args.advantages is not None:
        form = "advantages"
    needed, optional = _NEEDS[form]
    described = f"objective {objective!r}" + (f" with {form}" if form != objective else "")
    for name, value in tensors.items():
        if name in needed and value is None:
            raise ValueError(f"loss: {name} must be given for {described}, got None")
        if value is not None and name not in needed | optional | _ALWAYS:
            raise ValueError(f"loss: {name} must be None for {described}, which does not use it")
    if args.leave_one_out and objective != "group":
        raise ValueError(f"loss: leave_one_out must be False for objective {objective!r}")
    if args.delta != _DELTA and objective != "cross_entropy":
        raise ValueError(
            f"loss: delta must be left out for objective {objective!r}, got {args.delta}"
        )
    if args.q_weights is not None and args.q_targets is None:
        raise ValueError("loss: q_weights must be None without q_targets")
    constants = {name: tensor for name, tensor in tensors.items() if name not in _DIFFERENTIABLE}
    refuse_grad("loss", **constants)
    same_device("loss", "logprobs", args.logprobs, **tensors)


def _per_sequence(
    op: str, q0: Tensor | float, logprobs: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """A number becomes [S]; a tensor is left for the op to check."""
    size = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not isinstance(q0, Tensor):
        return logprobs.new_full((size,), number(op, "q0", q0), dtype=torch.float64)
    return q0.expand(size) if q0.dim() == 0 else q0


def _reduce(
    losses: Tensor,
    num_tokens: Tensor,
    reduction: str,
    denominator: Tensor | float | None,
) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "mean":
        return total / (num_tokens > 0).sum().clamp(min=1)
    return total if denominator is None else total / denominator


def _check_reduction(reduction: str, denominator: Tensor | float | None) -> Tensor | float | None:
    """The denominator, if the two go together."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"loss: reduction must be none, mean or sum, got {reduction!r}")
    if denominator is not None and reduction != "sum":
        raise ValueError(
            f"loss: denominator must be None unless reduction is sum, got {reduction!r}"
        )
    if isinstance(denominator, Tensor):
        refuse_grad("loss", denominator=denominator)
        if denominator.numel() != 1:
            shape = list(denominator.shape)
            raise ValueError(f"loss: denominator must be one number, got a tensor {shape}")
        allowed = denominator.isfinite() & (denominator > 0)
        check_values("loss", "denominator", denominator, allowed, "a finite number > 0")
        return denominator.reshape(())
    if denominator is not None:
        denominator = number("loss", "denominator", denominator)
        if not 0 < denominator < math.inf:
            raise ValueError(f"loss: denominator must be a finite number > 0, got {denominator}")
    return denominator


class LossOptions(TypedDict, total=False):
    """The optional arguments of `loss`, which `linear_loss` takes as well."""

    objective: Objective
    groups: Tensor | None
    leave_one_out: bool
    advantages: Tensor | None
    q_targets: Tensor | None
    q_weights: Tensor | None
    token_rewards: Tensor | None
    weights: Tensor | None
    delta: float
    cu_seqlens: Tensor | None
    mask: Tensor | None
    reduction: Reduction
    denominator: Tensor | float | None


class LinearLossOptions(LossOptions, HeadOptions, total=False):
    """The optional arguments of `linear_loss`."""


@overload
def loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor | None,
    q0: Tensor | float | None,
    *,
    beta: float,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor | None,
    q0: Tensor | float | None,
    *,
    beta: float,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, LossStats]: ...


def loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor | None,
    q0: Tensor | float | None,
    *,
    beta: float,
    objective: Objective = "cross_entropy",
    groups: Tensor | None = None,
    leave_one_out: bool = False,
    advantages: Tensor | None = None,
    q_targets: Tensor | None = None,
    q_weights: Tensor | None = None,
    token_rewards: Tensor | None = None,
    weights: Tensor | None = None,
    delta: float = _DELTA,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """The SPO loss of completions, from the log-probabilities of their tokens.

    With A_t = beta (logprobs_t - ref_logprobs_t) and Q_t = Q_0 + sum_{i<=t} A_i, the loss of a
    sequence of T tokens is, by `objective`:

    - squared: (Q_T - r)^2.
    - cross_entropy: -y u - (1 - y) log(1 - exp u) with u = Q_T / beta and y = exp(r / beta). r <= 0
      is a log-optimality. The first term stops at u = 0; the second goes on along its tangent from
      u = -delta.
    - group: (Q_T - r)^2, where Q_0 is the mean of r - beta sum_t (log-ratio) over the group,
      detached.
    - advantage: sum_t (A_t - target_t)^2, where target is `advantages`, or (r - Q_0) / T.
    - linear: -weight sum_t (log-ratio).
    - squared or cross_entropy with `q_targets`: sum_t q_weights_t phi(Q_t, q_targets_t), where phi
      is the loss above of Q_T and r.

    Args:
        logprobs: policy, nats, [B, T], or [N] with `cu_seqlens`. Differentiable.
        ref_logprobs: reference, per token like logprobs; or, for an objective of Q_T alone, summed
            per sequence, [S] or [S, 1]. Packed, it may be [1, N] if it is per token. Where there
            are as many tokens as sequences, and not one each, [N] and [S] look alike and are
            refused: give it two dimensions.
        rewards: [S], r. For a success rate y in [0, 1] under cross_entropy pass beta * log(y);
            -inf is allowed there.
        q0: [S] or a number, the prompt value Q_0 (see `prompt_value`), in reward units.
            Differentiable.
        beta: softness > 0, reward units per nat.
        groups: [S] integers, equal for completions of one prompt. A sequence alone in its group has
            exactly no gradient.
        leave_one_out: take a group's Q_0 over the other sequences in it.
        advantages: per sequence or per token, in the shapes of ref_logprobs.
        q_targets: per token, what rewards are: the general cumulative loss.
        q_weights: per token, 1 if left out; they multiply the losses of the `q_targets`.
        token_rewards: per token (process rewards): Q_t loses the rewards before t, Q_T must equal
            r plus the last one. Like rewards, but finite before the last token.
        weights: [S], multiplies each sequence's loss.
        delta: where the failure term of cross_entropy becomes a straight line, > 0. Only there.
        mask: bool like logprobs, False for tokens that do not count: what else holds for them is
            not read.
        reduction: "none" [S]; "sum"; "mean" over the sequences that have a token. A batch without
            a token gives a differentiable 0.
        denominator: with "sum", divides it: the global number of sequences, for gradient
            accumulation and DDP. A number > 0, or a tensor of one.
        return_stats: also return `LossStats`.

    A number may be a CPU tensor without dimensions. It may not require grad, nor be on another
    device, where its value would have to be waited for.

    Raises:
        ValueError, TypeError: for an argument the objective does not use, a missing one, a wrong
            shape, a tensor that requires grad where there is no gradient, or a value that is not
            finite (for cross_entropy: a reward not <= 0). On CUDA a bad value in a tensor stops the
            kernel by a device-side assert instead.
    """
    denominator = _check_reduction(reduction, denominator)
    args = LossArgs(
        logprobs,
        ref_logprobs,
        rewards,
        None if q0 is None else _per_sequence("loss", q0, logprobs, cu_seqlens),
        objective,
        number("loss", "beta", beta),
        number("loss", "delta", delta),
        groups,
        leave_one_out,
        advantages,
        q_targets,
        q_weights,
        token_rewards,
        weights,
        cu_seqlens,
        mask,
    )
    _check_arguments(args)
    losses, terminal_q, log_ratio, used_q0, residual, num_tokens = run("cumulative_loss", *args)
    reduced = _reduce(losses, num_tokens, reduction, denominator)
    if not return_stats:
        return reduced
    return reduced, LossStats(
        loss=losses.detach(),
        terminal_q=terminal_q.detach(),
        log_ratio=log_ratio.detach(),
        q0=used_q0.detach(),
        num_tokens=num_tokens,
        residual=residual.detach() if args.has_residual else None,
    )


@overload
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor | None,
    q0: Tensor | float | None,
    *,
    beta: float,
    return_stats: Literal[False] = ...,
    **options: Unpack[LinearLossOptions],
) -> Tensor: ...


@overload
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor | None,
    q0: Tensor | float | None,
    *,
    beta: float,
    return_stats: Literal[True],
    **options: Unpack[LinearLossOptions],
) -> tuple[Tensor, LossStats]: ...


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor | None,
    q0: Tensor | float | None,
    *,
    beta: float,
    objective: Objective = "cross_entropy",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    max_dropped_mass: float = 0.0,
    strategy: Strategy = "auto",
    workspace_mib: int | None = None,
    process_group: "ProcessGroup | None" = None,
    mask: Tensor | None = None,
    **loss_arguments: object,
) -> Tensor | tuple[Tensor, LossStats]:
    """`loss` of `token_logprobs`: from the last hidden states and the LM head's weight to the SPO
    loss.

    hidden[i] is the state that predicts targets[i]: shift before the call. Tokens whose target is
    `ignore_index` and tokens outside `mask` are skipped by the head and by the loss.

    Args:
        hidden: [B, T, d], or [N, d] with `cu_seqlens`.
        weight: [V, d].
        targets: [B, T], or [N] with `cu_seqlens`.
        ref_logprobs: as in `loss`, and so is every argument that is not named here.
        rewards: as in `loss`.
        q0: as in `loss`.
        beta: as in `loss`.
        objective: as in `loss`.
        bias: as in `token_logprobs`.
        temperature: as in `token_logprobs`.
        logit_scale: as in `token_logprobs`.
        softcap: as in `token_logprobs`.
        ignore_index: as in `token_logprobs`.
        max_dropped_mass: as in `token_logprobs`.
        strategy: as in `token_logprobs`.
        workspace_mib: as in `token_logprobs`.
        process_group: as in `token_logprobs`.
        mask: bool like targets, False for tokens that do not count.

    Returns:
        What `loss` returns.
    """
    counted = targets != ignore_index
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != targets.shape:
            raise ValueError(
                f"linear_loss: mask must be bool of shape {list(targets.shape)} like targets, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        counted = counted & mask
        targets = targets.masked_fill(~mask, ignore_index)
    logprobs = token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        max_dropped_mass=max_dropped_mass,
        strategy=strategy,
        workspace_mib=workspace_mib,
        process_group=process_group,
    )
    return loss(  # type: ignore[no-any-return, call-overload]
        logprobs,
        ref_logprobs,
        rewards,
        q0,
        beta=beta,
        objective=objective,
        mask=counted,
        **loss_arguments,
    )


def taper_weights(
    logprob_sums: Tensor, behaviour_logprob_sums: Tensor, rewards: Tensor, *, threshold: float
) -> Tensor:
    """Weights that let a stale failure fade: exp(min(log pi - log mu, 0)) where rewards <
    threshold, else 1.

    A failing completion that the policy has already moved away from is pushed no further
    (truncated importance weights, applied to failures only). Use as `weights` of `loss` when the
    behaviour policy mu lags.

    Args:
        logprob_sums: [S], log-probability of each completion under the policy, nats; -inf is
            allowed.
        behaviour_logprob_sums: [S], the same under the policy that sampled it, finite.
        rewards: [S].
        threshold: a number; a reward below it is a failure.

    Returns:
        float32 [S] in [0, 1], detached.

    Raises:
        ValueError, TypeError: for another shape, or a value that is NaN or infinite.
    """
    threshold = number("taper_weights", "threshold", threshold)
    if math.isnan(threshold):
        raise ValueError("taper_weights: threshold must be a number, got nan")
    for name, tensor in (("behaviour_logprob_sums", behaviour_logprob_sums), ("rewards", rewards)):
        if tensor.shape != logprob_sums.shape:
            raise ValueError(
                f"taper_weights: {name} must have shape {list(logprob_sums.shape)} like "
                f"logprob_sums, got {list(tensor.shape)}"
            )
    for name, tensor, must in (
        ("logprob_sums", logprob_sums, "finite or -inf"),
        ("behaviour_logprob_sums", behaviour_logprob_sums, "finite"),
        ("rewards", rewards, "finite or -inf"),
    ):
        allowed = tensor.isfinite() | (tensor.isneginf() if must != "finite" else False)
        check_values("taper_weights", name, tensor, allowed, must)
    log_weight = (logprob_sums - behaviour_logprob_sums).detach().float().clamp(max=0)
    return torch.where(rewards < threshold, log_weight.exp(), torch.ones_like(log_weight))
