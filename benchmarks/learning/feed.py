"""What an update learns from: trajectories out of a store, by mixture, recency and reuse."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from spo_ext.contests.problems import Problem
from spo_ext.contests.vocabulary import encode_prompt
from spo_ext.store import (
    Origin,
    Prompt,
    Sampler,
    SamplerConfig,
    StoredTrajectory,
    Trajectory,
    TrajectoryStore,
)
from spo_ext.trainer.batches import TokenBatch, Tokens, collate
from spo_ext.trainer.model import completion_logprobs

from .clock import Clock
from .method import Method
from .outcomes import Outcomes
from .sampling import Sampled

_RUN, _EARLIER, _REFERENCE = "learner", "earlier", "reference"
_ROWS_PER_PASS = 128


@dataclass(frozen=True, slots=True)
class Rows:
    """S trajectories; per token packed [N] at tokens.cu_seqlens, per program [S].

    behaviour_logprobs: of who wrote them, nan where nobody knows. groups: the index of the problem.
    online: written by the policy in this run. shares: of each program in its problem, 1 in all: of
    passed ones together the problem's pass rate so far, of failed ones the rest; only the baseline
    "natural" needs them.
    """

    tokens: TokenBatch
    ref_logprobs: Tensor
    behaviour_logprobs: Tensor
    rewards: Tensor
    groups: Tensor
    online: Tensor
    shares: Tensor | None = None


class Feed:
    """The store of one stage of a run, and its batches of prompts_per_batch groups.

    Args:
        group_size: rows of a problem in a batch; the method says how many of them are offline.
        reference: scores every trajectory once; None if nothing needs it.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        method: Method,
        problems: Sequence[Problem],
        prompts_per_batch: int,
        group_size: int,
        reference: Qwen2ForCausalLM | None,
        clock: Clock,
        seed: int,
    ) -> None:
        self.offline_size = round(method.offline_share * group_size)
        self.online_size = group_size - self.offline_size
        self._store, self._reference, self._clock = store, reference, clock
        self._temperature = method.temperature
        self._rng = random.Random(f"{seed} offline rows")
        self._texts = [encode_prompt(problem) for problem in problems]
        self._prompts = store.add_prompts(
            [
                Prompt(problem.description, token_ids=text)
                for problem, text in zip(problems, self._texts, strict=True)
            ]
        )
        self._index = {prompt: index for index, prompt in enumerate(self._prompts)}
        self._offline: dict[int, list[int]] = {}
        self._known = Outcomes(method, prompts_per_batch, random.Random(f"{seed} mixed groups"))
        self._latest = 0
        # Offline rows join the problems that the sampled ones are of, so that they share a group.
        size = self.online_size or 1
        units = prompts_per_batch if self.online_size else prompts_per_batch * group_size
        # A batch has group_size versions, see `Writer.write`.
        age = None if method.max_age is None else method.max_age * group_size - 1
        self._sampler = Sampler(
            store,
            _RUN,
            SamplerConfig(
                batch_size=units * size,
                mixture="online" if self.online_size else "offline",
                run=_RUN if self.online_size else None,
                seed=seed,
                max_offpolicy_steps=age if self.online_size else None,
                group_size=size,
            ),
        )

    def add_solutions(self, solutions: Sequence[Sequence[Sequence[int]]]) -> None:
        """Correct programs of each problem, written by nobody whose log-probabilities are known."""
        rows = [
            Trajectory(prompt, program, 0.0, Origin("human"), "eos")
            for prompt, programs in zip(self._prompts, solutions, strict=True)
            for program in programs
        ]
        self._add_offline(rows)

    def add_earlier(self, sampled: Sequence[Sampled]) -> None:
        """What an earlier run sampled, its failures too."""
        self._add_offline([self._trajectory(row, _EARLIER) for row in sampled])

    def add_online(self, sampled: Sequence[Sampled]) -> None:
        """What the policy of this run sampled."""
        self._append([self._trajectory(row, _RUN) for row in sampled])
        self._latest = max(self._latest, *(row.version for row in sampled))

    def next(self) -> Rows:
        """The next batch. Raises SampleShortfall if there is too little in the store."""
        with self._clock.stage("store"):
            online = self.online_size > 0
            drawn = self._sampler.next_batch(self._latest if online else None).trajectories
            if online and self.offline_size:
                drawn += self._same_problems(drawn)
            return self._rows(drawn)

    def next_mixed(self) -> Rows:
        """Groups of programs that differ in reward; those of `next` while no problem has any."""
        ids = self._known.draw()
        if not ids:
            return self.next()
        with self._clock.stage("store"):
            return self._rows(self._store.get(ids))

    def _rows(self, drawn: Sequence[StoredTrajectory]) -> Rows:
        references = self._ref_logprobs(drawn)
        return Rows(
            tokens=self._collate(drawn),
            ref_logprobs=torch.cat(references),
            behaviour_logprobs=torch.cat([_behaviour(row) for row in drawn]),
            rewards=torch.tensor([row.reward for row in drawn]),
            groups=torch.tensor([self._index[row.prompt_id] for row in drawn]),
            online=torch.tensor([row.origin.run == _RUN for row in drawn]),
            shares=self._known.shares([(row.prompt_id, row.reward >= 0) for row in drawn]),
        )

    def _same_problems(self, drawn: Sequence[StoredTrajectory]) -> list[StoredTrajectory]:
        ids: list[int] = []
        for prompt in dict.fromkeys(row.prompt_id for row in drawn):
            known = self._offline.get(prompt, [])
            ids += self._rng.sample(known, min(self.offline_size, len(known)))
        return self._store.get(ids)

    def _add_offline(self, rows: Sequence[Trajectory]) -> None:
        for row, key in zip(rows, self._append(rows), strict=True):
            self._offline.setdefault(row.prompt_id, []).append(key)

    def _append(self, rows: Sequence[Trajectory]) -> list[int]:
        with self._clock.stage("store"):
            ids = list(self._store.append(rows).ids)
        for row, key in zip(rows, ids, strict=True):
            self._known.add(row.prompt_id, key, row.reward >= 0, row.origin.run == _RUN)
        if self._reference is not None:
            self._score(self._reference, ids)
        return ids

    @torch.no_grad()
    def _score(self, reference: Qwen2ForCausalLM, ids: Sequence[int]) -> None:
        with self._clock.stage("scoring"):
            rows = sorted(self._store.get(ids), key=lambda row: row.prompt_id)
            for start in range(0, len(rows), _ROWS_PER_PASS):
                part = rows[start : start + _ROWS_PER_PASS]
                tokens = self._collate(part)
                logprobs, _ = completion_logprobs(reference, tokens)
                sizes = tokens.cu_seqlens.diff().tolist()
                found = zip((row.id for row in part), torch.split(logprobs, sizes), strict=True)
                self._store.put_ref_logprobs(_REFERENCE, dict(found))

    def _ref_logprobs(self, rows: Sequence[StoredTrajectory]) -> list[Tensor]:
        if self._reference is None:
            return [torch.zeros(len(row.token_ids)) for row in rows]
        found = self._store.ref_logprobs([row.id for row in rows], _REFERENCE)
        return [logprobs for logprobs in found if logprobs is not None]

    def _collate(self, rows: Sequence[StoredTrajectory]) -> TokenBatch:
        texts = (self._texts[self._index[row.prompt_id]] for row in rows)
        pairs = zip(texts, rows, strict=True)
        return collate([Tokens(text, row.token_ids) for text, row in pairs], "shared")

    def _trajectory(self, row: Sampled, run: str) -> Trajectory:
        return Trajectory(
            self._prompts[row.problem],
            row.program,
            row.reward,
            Origin("policy", run=run, policy_version=row.version),
            "eos" if row.finished else "truncated",
            behaviour_logprobs=row.logprobs,
            temperature=self._temperature,
        )


def _behaviour(row: StoredTrajectory) -> Tensor:
    known = row.behaviour_logprobs
    return torch.full((len(row.token_ids),), torch.nan) if known is None else torch.as_tensor(known)
