"""Rollouts that the ranks of one run make together, each completion once."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from spo_ext.rollout import Generator
from spo_ext.rollout.rollouts import Rollouts
from spo_ext.store import StoredPrompt


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

    def collect(self, wanted: Sequence[StoredPrompt], version: int) -> dict[str, float]:
        """Stores n completions for each time that a prompt is wanted; metrics of this rank's part.

        What the store has of them already is not drawn again.
        """
        accelerator = self._accelerator
        mine = wanted if self._replicated else self._part(wanted)
        missing = self._missing(mine, version)
        accelerator.wait_for_everyone()  # all have read what there is before any adds to it
        metrics: dict[str, float] = {}
        if self._replicated and not accelerator.is_main_process:
            for call in self._rollouts.plan(missing, version):
                self._generator.generate(call.prompts, call.sampling)  # its part of the collectives
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
        left = {key: count // self._n for key, count in drawn.items()}
        missing = []
        for prompt in wanted:
            if left.get(prompt.id, 0) > 0:
                left[prompt.id] -= 1
            else:
                missing.append(prompt)
        return missing
