"""Random inputs of the loss, in both layouts, for every form of every objective."""

from typing import Any

import torch
from torch import Tensor

# name -> arguments the form takes besides logprobs and ref_logprobs
FORMS: dict[str, tuple[str, list[str]]] = {
    "squared": ("squared", ["rewards", "q0"]),
    "squared, weights": ("squared", ["rewards", "q0", "weights"]),
    "squared, token rewards": ("squared", ["rewards", "q0", "token_rewards"]),
    "squared, per-token targets": ("squared", ["q0", "q_targets"]),
    "squared, per-token targets and weights": (
        "squared",
        ["q0", "q_targets", "q_weights", "token_rewards", "weights"],
    ),
    "cross_entropy": ("cross_entropy", ["rewards", "q0"]),
    "cross_entropy, token rewards": (
        "cross_entropy",
        ["rewards", "q0", "token_rewards", "weights"],
    ),
    "cross_entropy, per-token targets": ("cross_entropy", ["q0", "q_targets", "q_weights"]),
    "advantage, shared gain": ("advantage", ["rewards", "q0", "weights"]),
    "advantage, per token": ("advantage", ["advantages"]),
    "advantage, per sequence": ("advantage", ["sequence_advantages"]),
    "group": ("group", ["rewards", "groups"]),
    "group, token rewards": ("group", ["rewards", "groups", "token_rewards", "weights"]),
    "group, leave one out": ("group", ["rewards", "groups", "leave_one_out"]),
    "linear": ("linear", ["weights"]),
}
LENGTHS = [5, 1, 0, 9, 3, 4]  # ragged, one token, empty
BETA = 0.4


def packed_case(form: str, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """logprobs (leaf), ref_logprobs and the arguments of `form`, packed, in float64."""
    objective, names = FORMS[form]
    size, total = len(lengths), sum(lengths)
    logprobs = (-torch.rand(total, dtype=torch.float64) * 2).requires_grad_()
    ref_logprobs = -torch.rand(total, dtype=torch.float64) * 2
    pool = dict(
        rewards=-torch.rand(size, dtype=torch.float64),
        q0=-torch.rand(size, dtype=torch.float64),
        weights=torch.rand(size, dtype=torch.float64),
        groups=torch.tensor([3, 3, 3, 0, 0, 7])[torch.arange(size) % 6],
        leave_one_out=True,
        sequence_advantages=torch.randn(size, dtype=torch.float64),
        advantages=torch.randn(total, dtype=torch.float64),
        q_targets=-torch.rand(total, dtype=torch.float64),
        q_weights=torch.rand(total, dtype=torch.float64),
        token_rewards=-torch.rand(total, dtype=torch.float64) * 0.1,
    )
    arguments: dict[str, Any] = {"rewards": None, "q0": None}
    arguments |= {name: pool[name] for name in names}
    if "sequence_advantages" in arguments:
        arguments["advantages"] = arguments.pop("sequence_advantages")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    arguments |= dict(objective=objective, beta=BETA, cu_seqlens=offsets)
    return logprobs, ref_logprobs, arguments


def pad(packed: Tensor, lengths: list[int], fill: float) -> Tensor:
    """[N] -> [B, T], ragged rows at the left, `fill` in the rest."""
    rows = packed.new_full((len(lengths), max(lengths, default=0)), fill)
    for row, piece in zip(rows, packed.split(lengths), strict=True):
        row[: len(piece)] = piece
    return rows


def padded(
    logprobs: Tensor, ref_logprobs: Tensor, arguments: dict[str, Any], lengths: list[int] = LENGTHS
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The same case as [B, T] with a mask; masked log-probabilities are NaN, which must not
    matter."""
    out = {k: v for k, v in arguments.items() if k != "cu_seqlens"}
    for name in ("advantages", "q_targets", "q_weights", "token_rewards"):
        per_sequence = name == "advantages" and out.get(name, logprobs).shape != logprobs.shape
        if name in out and not per_sequence:
            out[name] = pad(out[name], lengths, 0.0)
    out["mask"] = pad(torch.ones(sum(lengths)), lengths, 0.0).bool()
    leaf = pad(logprobs.detach(), lengths, float("nan")).requires_grad_()
    return leaf, pad(ref_logprobs, lengths, float("nan")), out
