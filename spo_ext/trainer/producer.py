"""Embedded rollouts: the policy in memory writes the completions it is about to learn from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator

from spo_ext.rollout import Generator, Reward, Sampling
from spo_ext.rollout.rollouts import Decode, Rollouts
from spo_ext.store import StoredPrompt, TrajectoryStore
from spo_ext.trainer.config import SPOConfig

_MORE_ROUNDS = 8


class Producer:
    """Rolls out prompts of the train split with the weights as they are.

    What it writes follows from the seed, the weights, the policy version and the prompts alone, so
    a run that is resumed where a policy was published writes the same again.

    Args:
        replicated: the ranks share one model (FSDP2), so all generate everything together and the
            first stores it; else each takes its part of the prompts.
    """

    def __init__(
        self,
        config: SPOConfig,
        store: TrajectoryStore,
        generator: Generator,
        reward: Reward,
        decode: Decode,
        accelerator: Accelerator,
        *,
        replicated: bool,
    ) -> None:
        self._config, self._store, self._generator = config, store, generator
        self._reward, self._decode, self._accelerator = reward, decode, accelerator
        self._replicated = replicated
        self._prompts = list(store.prompts("train"))
        if not self._prompts:
            raise ValueError("SPO: the store must have prompts of split train, got none")
        self.sampling = Sampling(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
        )
        share = config.sampler_config().fractions.get("online", 0.0)
        rows = share * config.step_batch_size * config.sync_every
        self._round_size = max(1, math.ceil(rows / config.samples_per_prompt))
        self._more = (-1, 0)  # policy version, rounds beside its first

    def round(self, version: int) -> dict[str, float]:
        """What the steps until the next version need; returns metrics of this rank's part."""
        return self._collect(version, version * self._round_size, self._round_size, 0)

    def more(self, version: int) -> bool:
        """Another round, of prompts further on, when too few of the first were new.

        Whether there is hope that a further one would help.
        """
        known, rounds = self._more
        rounds = rounds + 1 if known == version else 1
        self._more = (version, rounds)
        if rounds > _MORE_ROUNDS:
            return False
        self._collect(version, (version + rounds) * self._round_size, self._round_size, rounds)
        return True

    def _collect(self, version: int, start: int, count: int, salt: int) -> dict[str, float]:
        prompts = [self._prompts[i] for i in _stream(len(self._prompts), start, count, self._seed)]
        size = self._config.rollout_batch_size
        chunks = [prompts[i : i + size] for i in range(0, count, size)]
        totals: dict[str, list[float]] = {}
        for index, chunk in enumerate(chunks):
            sampling = replace(self.sampling, seed=_mix(self._seed, version, salt, index))
            for name, value in self._chunk(index, chunk, sampling, version).items():
                totals.setdefault(name, []).append(value)
        self._accelerator.wait_for_everyone()
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def _chunk(
        self, index: int, chunk: Sequence[StoredPrompt], sampling: Sampling, version: int
    ) -> dict[str, float]:
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        mine = rank == 0 if self._replicated else index % ranks == rank
        if not mine:
            if self._replicated:
                self._generator.generate(chunk, sampling)  # its part of the collectives
            return {}
        rollouts = Rollouts(
            self._store,
            self._generator,
            self._reward,
            run=str(self._config.run),
            sampling=sampling,
            decode=self._decode,
        )
        return rollouts.collect(chunk, version).metrics()

    @property
    def _seed(self) -> int:
        return self._config.seed


def _stream(size: int, start: int, count: int, seed: int) -> Iterator[int]:
    """count places of an endless stream that goes through range(size) in a new order each time."""
    epoch, order = -1, torch.empty(0)
    for place in range(start, start + count):
        if place // size != epoch:
            epoch = place // size
            rng = torch.Generator().manual_seed(_mix(seed, epoch))
            order = torch.randperm(size, generator=rng)
        yield int(order[place % size])


def _mix(*numbers: int) -> int:
    """A seed of its own for each tuple of numbers."""
    words = ":".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=7).digest(), "big")
