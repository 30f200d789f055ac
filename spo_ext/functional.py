"""The public functions. Each says what it computes in PyTorch terms; spo_ext.reference has that PyTorch.

Shapes: hidden [.., d], weight [V, d], where [..] is [N] (packed) or [B, T] (padded) for every per-token tensor of a
call. Sequences are the rows of [B, T], or [N] cut at cu_seqlens [S + 1]; per-sequence tensors are [S] (= [B]).
Symbols and equation numbers follow Soft Policy Optimization, arXiv 2503.05453.
"""

from dataclasses import dataclass
from typing import Literal, Optional, Union, overload

import torch
from torch import Tensor

Objective = Literal["squared", "cross_entropy", "advantage", "group", "linear"]
Reduction = Literal["none", "mean", "sum"]

_OPS = torch.ops.spo


def _same_device(op: str, name: str, first: Tensor, **others: Optional[Tensor]) -> None:
    # Here and not only in the kernels: with one tensor on another device, PyTorch may not get as far as a kernel.
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {other} must be on {first.device} like {name}, got {tensor.device}")


@overload
def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Optional[Tensor] = ...,
    temperature: float = ..., logit_scale: float = ..., softcap: Optional[float] = ...,
    ignore_index: int = ..., return_entropy: Literal[False] = ..., max_dropped_mass: float = ...,
    workspace_mib: int = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Optional[Tensor] = ...,
    temperature: float = ..., logit_scale: float = ..., softcap: Optional[float] = ...,
    ignore_index: int = ..., return_entropy: Literal[True], max_dropped_mass: float = ...,
    workspace_mib: int = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Optional[Tensor] = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    max_dropped_mass: float = 0.0,
    workspace_mib: int = 64,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """log softmax(z)[target] of an LM head, z = softcap(logit_scale (hidden weight^T + bias)) / temperature.

    The [N, V] logits never exist: memory beyond the inputs and gradients is `workspace_mib` MiB plus O(N). The logits of
    16-bit inputs are float32. A token's result does not depend, to the last bit, on the other tokens, on their order or on
    the number of threads.

    Args:
        hidden: [.., d], float32, bfloat16, float16 or float64; any strides.
        weight: [V, d], any of these types (float64 exactly when hidden is).
        targets: [..], int64 or int32, in [0, V) or `ignore_index`, whose rows are skipped.
        bias: [V].
        temperature, softcap: > 0; `softcap` c is c tanh(z / c), before the temperature.
        return_entropy: also return the entropy of each softmax, in nats; differentiable.
        max_dropped_mass: in [0, 1): how much probability the backward pass may leave out of each token's gradient. It is
            an upper bound; the kernels of this version leave out nothing.
        workspace_mib: scratch memory of the kernels, in MiB.

    Returns:
        float32 (float64 for float64 inputs) [..] log-probabilities in nats, 0 at ignored targets; with
        `return_entropy`, also the entropies, 0 at ignored targets.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it must be and what it was.
    """
    if not 0 <= max_dropped_mass < 1:
        raise ValueError(f"token_logprobs: max_dropped_mass must be in [0, 1), got {max_dropped_mass}")
    _same_device("token_logprobs", "hidden", hidden, weight=weight, targets=targets, bias=bias)
    logprobs, entropy, _ = _OPS.token_logprobs(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index,
        return_entropy, workspace_mib,
    )
    return (logprobs, entropy) if return_entropy else logprobs


@overload
def logprobs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[False] = ..., inplace_backward: bool = ...,
) -> Tensor: ...


@overload
def logprobs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[True], inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """log softmax(logits / temperature)[target] of logits that already exist, reading them once.

    Args:
        logits: [.., V], float32, bfloat16, float16 or float64; any strides.
        targets: [..], int64 or int32, in [0, V) or `ignore_index`.
        return_entropy: also return the entropy of each softmax, in nats; differentiable.
        inplace_backward: let the backward pass overwrite `logits` with its gradient, so that no second [.., V] tensor
            is made. The logits must not be a leaf and must not be used afterwards; PyTorch's version counter
            catches it if another operation saved them. Under torch.compile the gradient is a new tensor.

    Returns:
        float32 (float64 for float64 logits) [..] in nats, 0 at ignored targets; with `return_entropy`, also the
        entropies.
    """
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "logprobs_from_logits: logits must not be a leaf with inplace_backward=True, "
            "since its values would be lost"
        )
    _same_device("logprobs_from_logits", "logits", logits, targets=targets)
    logprobs, entropy, _ = _OPS.logprobs_from_logits(
        logits, targets, temperature, ignore_index, return_entropy, inplace_backward
    )
    return (logprobs, entropy) if return_entropy else logprobs


def soft_q(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    q0: Union[Tensor, float],
    *,
    beta: float,
    cu_seqlens: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
) -> Tensor:
    """Q_t = Q_0 + sum_{i<=t} beta (logprobs_i - ref_logprobs_i): the soft-Q value after every token.

    Args:
        logprobs, ref_logprobs: [N] with `cu_seqlens`, or [B, T]; nats.
        q0: [S], the prompt value, in reward units.
        mask: bool like logprobs; a masked position adds nothing and repeats the value before it.

    Returns:
        float32 (float64 for float64 logprobs), shaped like logprobs, summed in double. Differentiable in logprobs and q0.
    """
    _refuse_grad("soft_q", ref_logprobs=ref_logprobs)
    start = _per_sequence(q0, logprobs, cu_seqlens)
    _same_device(
        "soft_q", "logprobs", logprobs, ref_logprobs=ref_logprobs, q0=start, cu_seqlens=cu_seqlens, mask=mask
    )
    return _OPS.soft_q(logprobs, ref_logprobs, start, beta, cu_seqlens, mask)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LossStats:
    """What a loss call saw, detached, one number per sequence [S].

    log_ratio is R = sum_t log pi - log pi_ref in nats. terminal_q is Q_T; for "group" its Q_0 is the group's baseline, and
    without a Q_0 ("linear", "advantage" with targets) it is taken as 0. residual is Q_T minus its target, None where the
    objective has none. loss is before the reduction; num_tokens counts unmasked tokens.
    """

    loss: Tensor
    terminal_q: Tensor
    log_ratio: Tensor
    q0: Tensor
    num_tokens: Tensor
    residual: Optional[Tensor]

    def means(self) -> dict[str, Tensor]:
        """Means over the non-empty sequences as 0-d tensors, for a logger."""
        live = (self.num_tokens > 0).to(self.loss.dtype)
        count = live.sum().clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return (values * live).sum() / count

        out = {
            "loss": mean(self.loss),
            "terminal_q": mean(self.terminal_q),
            "log_ratio": mean(self.log_ratio),
            "q0": mean(self.q0),
            "num_tokens": mean(self.num_tokens.to(self.loss.dtype)),
            "clipped": mean((self.terminal_q > 0).to(self.loss.dtype)),
        }
        if self.residual is not None:
            out["residual"] = mean(self.residual)
            out["residual_abs"] = mean(self.residual.abs())
        return out

# Which arguments an objective needs, and which it may have beside them. Everything else is refused: an argument that
# would be ignored is a mistake.
_NEEDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "squared": (frozenset({"rewards", "q0"}), frozenset({"token_rewards"})),
    "cross_entropy": (frozenset({"rewards", "q0"}), frozenset({"token_rewards"})),
    "q_targets": (frozenset({"q_targets", "q0"}), frozenset({"q_weights", "token_rewards"})),
    "advantage": (frozenset({"rewards", "q0"}), frozenset()),
    "advantages": (frozenset({"advantages"}), frozenset()),
    "group": (frozenset({"rewards", "groups"}), frozenset({"token_rewards"})),
    "linear": (frozenset({"weights"}), frozenset()),
}


def _check_arguments(objective: str, given: dict[str, object]) -> None:
    if objective not in ("squared", "cross_entropy", "advantage", "group", "linear"):
        raise ValueError(
            "loss: objective must be squared, cross_entropy, advantage, group or linear, "
            f"got {objective!r}"
        )
    form = objective
    if objective in ("squared", "cross_entropy") and given["q_targets"] is not None:
        form = "q_targets"
    if objective == "advantage" and given["advantages"] is not None:
        form = "advantages"
    needed, optional = _NEEDS[form]
    described = f"objective {objective!r}" + (f" with {form}" if form != objective else "")
    for name, value in given.items():
        if name in needed and value is None:
            raise ValueError(f"loss: {name} must be given for {described}, got None")
        if value is not None and name not in needed | optional | {"weights"}:
            raise ValueError(f"loss: {name} must be None for {described}, which does not use it")


def _refuse_grad(op: str, **constants: Optional[Tensor]) -> None:
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} must not require grad (it is a constant of the loss); detach it")


def _per_sequence(
    value: Union[Tensor, float], logprobs: Tensor, cu_seqlens: Optional[Tensor]
) -> Tensor:
    """A number becomes [S]; a tensor is left for the op to check."""
    size = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not isinstance(value, Tensor):
        return logprobs.new_full((size,), float(value), dtype=torch.float64)
    return value.expand(size) if value.dim() == 0 else value


def _residual(
    objective: str, beta: float, rewards: Optional[Tensor], terminal_q: Tensor
) -> Optional[Tensor]:
    if rewards is None or objective == "advantage":
        return None
    if objective == "cross_entropy":  # as probabilities: a log-optimality may be -inf
        return (terminal_q / beta).clamp(max=0).exp() - (rewards / beta).exp()
    return terminal_q - rewards


def _reduce(
    losses: Tensor,
    num_tokens: Tensor,
    reduction: str,
    denominator: Union[Tensor, float, None],
) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "mean":
        return total / (num_tokens > 0).sum().clamp(min=1)
    return total if denominator is None else total / denominator


def _check_reduction(reduction: str, denominator: Union[Tensor, float, None]) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"loss: reduction must be none, mean or sum, got {reduction!r}")
    if denominator is not None and reduction != "sum":
        raise ValueError(f"loss: denominator must be None unless reduction is sum, got {reduction!r}")
    if isinstance(denominator, (int, float)) and not denominator > 0:
        raise ValueError(f"loss: denominator must be > 0, got {denominator}")


@overload
def loss(
    logprobs: Tensor, ref_logprobs: Tensor, rewards: Optional[Tensor],
    q0: Union[Tensor, float, None], *, beta: float, objective: Objective = ...,
    groups: Optional[Tensor] = ..., leave_one_out: bool = ..., advantages: Optional[Tensor] = ...,
    q_targets: Optional[Tensor] = ..., q_weights: Optional[Tensor] = ...,
    token_rewards: Optional[Tensor] = ..., weights: Optional[Tensor] = ..., delta: float = ...,
    cu_seqlens: Optional[Tensor] = ..., mask: Optional[Tensor] = ..., reduction: Reduction = ...,
    denominator: Union[Tensor, float, None] = ..., return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def loss(
    logprobs: Tensor, ref_logprobs: Tensor, rewards: Optional[Tensor],
    q0: Union[Tensor, float, None], *, beta: float, objective: Objective = ...,
    groups: Optional[Tensor] = ..., leave_one_out: bool = ..., advantages: Optional[Tensor] = ...,
    q_targets: Optional[Tensor] = ..., q_weights: Optional[Tensor] = ...,
    token_rewards: Optional[Tensor] = ..., weights: Optional[Tensor] = ..., delta: float = ...,
    cu_seqlens: Optional[Tensor] = ..., mask: Optional[Tensor] = ..., reduction: Reduction = ...,
    denominator: Union[Tensor, float, None] = ..., return_stats: Literal[True],
) -> tuple[Tensor, LossStats]: ...


def loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Optional[Tensor],
    q0: Union[Tensor, float, None],
    *,
    beta: float,
    objective: Objective = "cross_entropy",
    groups: Optional[Tensor] = None,
    leave_one_out: bool = False,
    advantages: Optional[Tensor] = None,
    q_targets: Optional[Tensor] = None,
    q_weights: Optional[Tensor] = None,
    token_rewards: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
    delta: float = 0.2,
    cu_seqlens: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    reduction: Reduction = "mean",
    denominator: Union[Tensor, float, None] = None,
    return_stats: bool = False,
) -> Union[Tensor, tuple[Tensor, LossStats]]:
    """The SPO loss of completions, from the log-probabilities of their tokens.

    With A_t = beta (logprobs_t - ref_logprobs_t) and Q_t = Q_0 + sum_{i<=t} A_i, per sequence of T tokens:

    ================  =========================================================================================
    squared           (Q_T - r)^2
    cross_entropy     -y u - (1 - y) log(1 - exp u), u = Q_T / beta, y = exp(r / beta); r <= 0 is a log-optimality. The
                      first term stops at u = 0, the second is continued along its tangent from u = -delta
    group             (Q_T - r)^2 with Q_0 = mean over the group of r - beta sum_t (log-ratio), detached
    advantage         sum_t (A_t - target_t)^2, target `advantages`, or (r - Q_0) / T
    linear            -weight sum_t (log-ratio)
    with q_targets    sum_t q_weights_t phi(Q_t, q_targets_t), phi of `squared` or `cross_entropy`
    ================  =========================================================================================

    Args:
        logprobs: policy, nats, [B, T], or [N] with `cu_seqlens`. Differentiable.
        ref_logprobs: reference, like logprobs; or summed per sequence [S] for a terminal objective.
        rewards: [S], r. For a success rate y in [0, 1] under cross_entropy pass beta * log(y); -inf is allowed there.
        q0: [S] or a number, the prompt value Q_0 (see `prompt_value`), in reward units. Differentiable.
        beta: softness > 0, reward units per nat.
        groups: [S] integers, equal for completions of one prompt.
        leave_one_out: take a group's Q_0 over the other sequences in it. A sequence alone has no gradient.
        advantages: [S], or per token.
        q_targets, q_weights: per token; the general cumulative loss.
        token_rewards: per token (process rewards): Q_t loses the rewards before t, Q_T must equal r plus the last one.
        weights: [S], multiplies each sequence's loss.
        delta: where the failure term of cross_entropy becomes a straight line, > 0.
        mask: bool like logprobs, False for tokens that do not count.
        reduction: "none" [S]; "sum"; "mean" over the sequences that have a token. A batch without a token gives a
            differentiable 0.
        denominator: with "sum", divides it: the global number of sequences, for gradient accumulation and DDP.
        return_stats: also return `LossStats`.

    Raises:
        ValueError: for an argument the objective does not use, a missing one, a wrong shape, or a reward that is not finite
            (for cross_entropy: not <= 0).
    """
    _check_reduction(reduction, denominator)
    _check_arguments(objective, dict(
        rewards=rewards, q0=q0, groups=groups, advantages=advantages, q_targets=q_targets,
        q_weights=q_weights, token_rewards=token_rewards, weights=weights,
    ))
    if leave_one_out and objective != "group":
        raise ValueError(f"loss: leave_one_out must be False for objective {objective!r}")
    if q_weights is not None and q_targets is None:
        raise ValueError("loss: q_weights must be None without q_targets")
    _refuse_grad(
        "loss", ref_logprobs=ref_logprobs, rewards=rewards, advantages=advantages,
        q_targets=q_targets, q_weights=q_weights, token_rewards=token_rewards, weights=weights,
    )
    start = None if q0 is None else _per_sequence(q0, logprobs, cu_seqlens)
    _same_device(
        "loss", "logprobs", logprobs, ref_logprobs=ref_logprobs, rewards=rewards, q0=start, groups=groups,
        advantages=advantages, q_targets=q_targets, q_weights=q_weights, token_rewards=token_rewards,
        weights=weights, cu_seqlens=cu_seqlens, mask=mask,
    )
    losses, terminal_q, log_ratio, used_q0, num_tokens = _OPS.cumulative_loss(
        logprobs, ref_logprobs, rewards, start, objective, beta, delta, groups, leave_one_out,
        advantages, q_targets, q_weights, token_rewards, weights, cu_seqlens, mask,
    )
    reduced = _reduce(losses, num_tokens, reduction, denominator)
    if not return_stats:
        return reduced
    values = (losses.detach(), terminal_q.detach(), log_ratio.detach(), used_q0.detach(), num_tokens)
    residual = _residual(objective, beta, None if token_rewards is not None else rewards, values[1])
    return reduced, LossStats(*values, residual)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logprobs: Tensor,
    rewards: Optional[Tensor],
    q0: Union[Tensor, float, None],
    *,
    beta: float,
    objective: Objective = "cross_entropy",
    bias: Optional[Tensor] = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    ignore_index: int = -100,
    max_dropped_mass: float = 0.0,
    workspace_mib: int = 64,
    mask: Optional[Tensor] = None,
    **loss_arguments: object,
) -> Union[Tensor, tuple[Tensor, LossStats]]:
    """`loss` of `token_logprobs`: from the last hidden states and the LM head's weight to the SPO loss.

    hidden[i] is the state that predicts targets[i]: shift before the call. Tokens whose target is `ignore_index` and tokens
    outside `mask` are skipped by the head and by the loss.

    Args:
        hidden, weight, targets, bias, temperature, logit_scale, softcap, max_dropped_mass, workspace_mib: see
            `token_logprobs`. targets is [B, T], or [N] with `cu_seqlens`.
        ref_logprobs, rewards, q0, beta, objective: see `loss`, as for every other argument.
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
        hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, ignore_index=ignore_index, max_dropped_mass=max_dropped_mass,
        workspace_mib=workspace_mib,
    )
    return loss(  # type: ignore[no-any-return, call-overload]
        logprobs, ref_logprobs, rewards, q0, beta=beta, objective=objective, mask=counted,
        **loss_arguments,
    )


def taper_weights(
    logprob_sums: Tensor, behaviour_logprob_sums: Tensor, rewards: Tensor, *, threshold: float
) -> Tensor:
    """Weights that let a stale failure fade: exp(min(log pi - log mu, 0)) where rewards < threshold, else 1.

    A failing completion that the policy has already moved away from is pushed no further (truncated importance
    weights, applied to failures only). Use as `weights` of `loss` when the behaviour policy mu lags.

    Args:
        logprob_sums, behaviour_logprob_sums: [S], log-probability of each completion under the policy and under the policy
            that sampled it, nats.
        rewards: [S].
        threshold: a reward below it is a failure.

    Returns:
        float32 [S] in (0, 1], detached.
    """
    for name, tensor in (("behaviour_logprob_sums", behaviour_logprob_sums), ("rewards", rewards)):
        if tensor.shape != logprob_sums.shape:
            raise ValueError(
                f"taper_weights: {name} must have shape {list(logprob_sums.shape)} like "
                f"logprob_sums, got {list(tensor.shape)}"
            )
    log_weight = (logprob_sums - behaviour_logprob_sums).detach().float().clamp(max=0)
    return torch.where(rewards < threshold, log_weight.exp(), torch.ones_like(log_weight))
