"""Draws of tokens that depend on the seed and the prompt alone, not on who else is in the batch.

A token is the inverse of the distribution function at one uniform number. The numbers of a
completion come from a generator of its own, so no random state of PyTorch moves, and the CPU and
the GPU see the same ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

# The largest uniform number used: times any sum of weights it stays below that sum.
_BELOW_ONE = 1.0 - 2.0**-32


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) for each list of integers and texts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def completion_seeds(seed: int, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """A seed for each of n completions of each prompt; a prompt that comes twice has others."""
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for ids in map(tuple, prompts):
        seeds.append([derived_seed(seed, ids, seen[ids], k) for k in range(n)])
        seen[ids] += 1
    return seeds


class Draw:
    """Draws tokens, and keeps their log-probabilities.

    Args:
        seeds: [B], one for each row.
        temperature, top_p, length: of the sampling; length is the largest number of tokens.

    `take` is for a loop of one's own. Inside `model.generate` it is a logits processor of greedy
    decoding, which leaves one token possible, the drawn one. Memory is O(B V) for a step and O(B)
    for what it keeps of it.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, length: int) -> None:
        numbers = [
            torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self._uniforms = torch.stack(numbers, 1).clamp(max=_BELOW_ONE)  # [T, B]
        self._temperature = temperature
        self._top_p = top_p
        self._logprobs: list[Tensor] = []

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [B, V] logits."""
        tokens = self.take(scores, torch.arange(len(scores), device=scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def take(self, scores: Tensor, rows: Tensor) -> Tensor:
        """int64 [n]: the next token of each of these rows, from its logits, [n, V]."""
        # On a GPU generate looks for the end late, and may ask for a step too many.
        step = min(len(self._logprobs), len(self._uniforms) - 1)
        logprobs = (scores.float() / self._temperature).log_softmax(-1)
        uniforms = self._uniforms[step].to(scores.device)
        tokens = pick(nucleus(logprobs.exp(), self._top_p), uniforms[rows])
        taken = logprobs.gather(1, tokens[:, None]).squeeze(1)
        self._logprobs.append(taken.new_zeros(len(uniforms)).index_copy_(0, rows, taken))
        return tokens

    def logprobs(self) -> Tensor:
        """float32 [B, T] on the CPU: of each token at the temperature, before top-p."""
        return torch.stack(self._logprobs, 1).cpu()


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[B, V]: 0 but for the fewest likeliest tokens that have at least top_p together."""
    if top_p == 1.0:
        return probabilities
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept[:, 0] = ordered[:, 0]  # whatever rounding did
    return torch.zeros_like(probabilities).scatter_(1, tokens, kept)


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[B] token ids, each with a share of its weight; weights [B, V] >= 0, uniforms [B] in [0, 1).

    In float64: the sum of 150,000 float32 would round away the tail.
    """
    sums = weights.double().cumsum(-1)
    target = uniforms[:, None] * sums[:, -1:]
    # The first sum above the target: never a token without weight, which adds nothing.
    found = torch.searchsorted(sums, target, right=True).squeeze(1)
    return found.clamp(max=weights.shape[1] - 1)  # only NaN gets there, and is refused later
