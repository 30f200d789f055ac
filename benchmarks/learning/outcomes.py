"""What has passed and what has failed so far, for batches of problems that have both."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .method import Method


class Outcomes:
    """Which programs of each problem passed and which failed."""

    def __init__(self, method: Method, prompts_per_batch: int, rng: random.Random) -> None:
        self._method, self._prompts, self._rng = method, prompts_per_batch, rng
        self._ids: dict[int, tuple[list[int], list[int]]] = {}
        self._sampled: dict[int, list[int]] = {}

    def add(self, prompt: int, key: int, passed: bool, sampled: bool) -> None:
        """key: of the trajectory in the store. sampled: by the policy of this run."""
        if sampled:
            self._sampled.setdefault(prompt, [0, 0])[passed] += 1
        ids = self._ids.setdefault(prompt, ([], []))[passed]
        if key not in ids:
            ids.append(key)

    def draw(self) -> list[int]:
        """Groups of half passed and half failed programs, or what is nearest to it."""
        size, drawn = self._method.replay_size, list[int]()
        for prompt in self._choose():
            failed, passed = self._ids[prompt]
            good = max(size // 2, size - len(failed))
            chosen = self._rng.sample(passed, min(good, len(passed)))
            drawn += chosen + self._rng.sample(failed, min(size - len(chosen), len(failed)))
        return drawn

    def shares(self, drawn: Sequence[tuple[int, bool]]) -> Tensor:
        """See `Rows`; drawn: problem and outcome of each row. One pass and one failure are added to
        what was counted, and an outcome that was not drawn leaves all to the other."""
        counts = Counter(drawn)
        found = []
        for prompt, passed in drawn:
            failures, passes = self._sampled.get(prompt, [0, 0])
            rate = (passes + 1) / (failures + passes + 2)
            if not counts[prompt, not passed]:
                rate = float(passed)
            found.append((rate if passed else 1 - rate) / counts[prompt, passed])
        return torch.tensor(found)

    def _choose(self) -> list[int]:
        """Problems with both, without replacement: the largest u^(1 / weight), u uniform."""
        keys = {}
        for prompt, (failed, passed) in self._ids.items():
            if failed and passed:
                rate = len(passed) / (len(passed) + len(failed))
                keys[prompt] = self._rng.random() ** ((1 - rate) ** -self._method.replay_rare)
        return sorted(keys, key=keys.__getitem__, reverse=True)[: self._prompts]
