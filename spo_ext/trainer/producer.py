"""Embedded rollouts: the policy in memory writes the completions it is about to learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator

from spo_ext.rollout import Generator, Reward, Sampling
from spo_ext.rollout.draws import derived_seed
from spo_ext.rollout.rewards import judged_by, needs_of
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
        self._config, self._generator = config, generator
        self._accelerator, self._replicated = accelerator, replicated
        self._prompts = list(judged_by(reward, store.prompts("train")))
        if not self._prompts:
            needs = needs_of(reward)
            which = f"train{f' with {needs}' if needs else ''}"
            raise ValueError(f"SPO: the store must have prompts of split {which}, got none")
        sampling = Sampling(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        self._rollouts = Rollouts(
            store,
            generator,
            reward,
            run=str(config.run),
            sampling=sampling,
            decode=decode,
            prompts_per_batch=config.rollout_batch_size,
        )
        share = config.sampler_config().fractions.get("online", 0.0)
        rows = share * config.step_batch_size * config.sync_every
        self._round_size = max(1, math.ceil(rows / config.samples_per_prompt))
        self._more = (-1, 0)  # policy version, rounds beside its first

    def round(self, version: int) -> dict[str, float]:
        """What the steps until the next version need; returns metrics of this rank's part.

        What a killed run has stored of it already is not drawn again.
        """
        return self._collect(version, self._prompts_of(version, 0))

    def more(self, version: int) -> bool:
        """Another round, of prompts further on, when too few completions of the first were new.

        Whether there is hope that a further one would help.
        """
        known, rounds = self._more
        rounds = rounds + 1 if known == version else 1
        self._more = (version, rounds)
        if rounds > _MORE_ROUNDS:
            return False
        self._collect(version, self._prompts_of(version, rounds))
        return True

    def _prompts_of(self, version: int, rounds: int) -> list[StoredPrompt]:
        """Those of the version's own round, and of as many after it."""
        start, size = version * self._round_size, self._round_size * (1 + rounds)
        places = _stream(len(self._prompts), start, size, self._config.seed)
        return [self._prompts[place] for place in places]

    def _collect(self, version: int, wanted: Sequence[StoredPrompt]) -> dict[str, float]:
        accelerator = self._accelerator
        mine = wanted if self._replicated else self._part(wanted)
        missing = self._missing(mine, version)
        accelerator.wait_for_everyone()  # all have read what there is before any adds to it
        metrics: dict[str, float] = {}
        if self._replicated and not accelerator.is_main_process:
            for prompts, sampling in self._rollouts.plan(missing, version):
                self._generator.generate(prompts, sampling)  # its part of the collectives
        elif missing:
            metrics = self._rollouts.collect(missing, version).metrics()
        accelerator.wait_for_everyone()
        return metrics

    def _part(self, wanted: Sequence[StoredPrompt]) -> list[StoredPrompt]:
        """Of this rank; a prompt that comes twice stays with one rank."""
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        place = {key: i for i, key in enumerate(dict.fromkeys(prompt.id for prompt in wanted))}
        return [prompt for prompt in wanted if place[prompt.id] % ranks == rank]

    def _missing(self, wanted: Sequence[StoredPrompt], version: int) -> list[StoredPrompt]:
        """Without those whose completions are stored."""
        drawn = self._rollouts.drawn(list({p.id: p for p in wanted}.values()), version)
        left = {key: count // self._config.samples_per_prompt for key, count in drawn.items()}
        missing = []
        for prompt in wanted:
            if left.get(prompt.id, 0) > 0:
                left[prompt.id] -= 1
            else:
                missing.append(prompt)
        return missing


def _stream(size: int, start: int, count: int, seed: int) -> Iterator[int]:
    """count places of an endless stream that goes through range(size) in a new order each time."""
    epoch, order = -1, torch.empty(0)
    for place in range(start, start + count):
        if place // size != epoch:
            epoch = place // size
            rng = torch.Generator().manual_seed(derived_seed(seed, epoch))
            order = torch.randperm(size, generator=rng)
        yield int(order[place % size])
