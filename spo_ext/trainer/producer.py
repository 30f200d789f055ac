"""Embedded rollouts: the policy in memory writes the completions it is about to learn from."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from accelerate import Accelerator

from spo_ext.rollout import Generator, Reward, Sampling
from spo_ext.rollout.follow import prompt_stream
from spo_ext.rollout.rewards import judged_by, named_split
from spo_ext.rollout.rollouts import Decode, Rollouts
from spo_ext.store import StoredPrompt, TrajectoryStore
from spo_ext.trainer.config import SPOConfig


class SharedRollouts:
    """Every rank has one, and calls it with the same prompts.

    Args:
        rollouts: n completions of each prompt; they draw from `generator`.
        replicated: the ranks share one model (FSDP2), so all generate everything together and the
            first stores it; else each takes its part of the prompts.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        generator: Generator,
        n: int,
        accelerator: Accelerator,
        *,
        replicated: bool,
    ) -> None:
        self._rollouts, self._generator, self._n = rollouts, generator, n
        self._accelerator, self._replicated = accelerator, replicated
        self.tokens, self.seconds = 0, 0.0  # that this rank has sampled, and spent on it

    def collect(self, wanted: Sequence[StoredPrompt], version: int) -> dict[str, float]:
        """Stores n completions for each time that a prompt is wanted; metrics of this rank's part.

        What the store has of them already is not drawn again.
        """
        accelerator = self._accelerator
        mine = wanted if self._replicated else self._part(wanted)
        missing = self._missing(mine, version)
        accelerator.wait_for_everyone()  # all have read what there is before any adds to it
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        if self._replicated and not accelerator.is_main_process:
            for call in self._rollouts.plan(missing, version):
                self._generator.generate(call.prompts, call.sampling)  # its part of the collectives
        elif missing:
            metrics = self._rollouts.collect(missing, version).metrics()
            self.tokens += int(metrics["rollout/tokens"])
        self.seconds += time.perf_counter() - started
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
        left = {key: count // self._n for key, count in drawn.items()}
        missing = []
        for prompt in wanted:
            if left.get(prompt.id, 0) > 0:
                left[prompt.id] -= 1
            else:
                missing.append(prompt)
        return missing


_MORE_ROUNDS = 8


class Producer:
    """Rolls out prompts of the train split with the weights as they are.

    What it writes follows from the seed, the weights, the policy version and the prompts alone, so
    a run that is resumed where a policy was published writes the same again.

    Args:
        replicated: see SharedRollouts.
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
        self._config = config
        self._prompts = list(judged_by(reward, store.prompts("train")))
        if not self._prompts:
            which = named_split("train", reward)
            raise ValueError(f"SPO: the store must have prompts of split {which}, got none")
        sampling = Sampling(
            n=config.num_generations,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        rollouts = Rollouts(
            store,
            generator,
            reward,
            run=str(config.run),
            sampling=sampling,
            decode=decode,
            prompts_per_batch=config.rollout_batch_size,
        )
        self.shared = SharedRollouts(
            rollouts, generator, sampling.n, accelerator, replicated=replicated
        )
        share = config.sampler_config().fractions.get("online", 0.0)
        rows = share * config.step_batch_size / config.replay_ratio
        self._prompts_a_step = rows / config.num_generations
        self._more = (-1, 0)  # policy version, rounds beside its first

    def round(self, version: int) -> dict[str, float]:
        """What the steps until the next version need; returns metrics of this rank's part.

        What a killed run has stored of it already is not drawn again.
        """
        return self.shared.collect(self._prompts_of(version, 0), version)

    def more(self, version: int) -> bool:
        """Another round, of prompts further on, when too few completions of the first were new.

        The policy that writes is the one of now, up to sync_every - 1 steps newer than the version
        that its completions are stored under.

        Whether there is hope that a further one would help.
        """
        known, rounds = self._more
        rounds = rounds + 1 if known == version else 1
        self._more = (version, rounds)
        if rounds > _MORE_ROUNDS:
            return False
        self.shared.collect(self._prompts_of(version, rounds), version)
        return True

    def _prompts_of(self, version: int, rounds: int) -> list[StoredPrompt]:
        """Those of the version's own round, and of whole ones after it.

        The last version of a run may have fewer steps than sync_every.
        """
        config = self._config
        whole = self._needed(config.sync_every)
        own = self._needed(min(config.sync_every, config.max_steps - version * config.sync_every))
        size = own + whole * rounds
        places = prompt_stream(range(len(self._prompts)), config.seed, version * whole, size)
        return [self._prompts[place] for place in places]

    def _needed(self, steps: int) -> int:
        """Prompts that so many steps learn from."""
        return max(1, math.ceil(self._prompts_a_step * steps))
