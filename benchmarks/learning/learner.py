"""One run: a policy, a method, and its numbers on the way."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from spo_ext.contests.problems import Problem
from spo_ext.store import TrajectoryStore
from spo_ext.trainer.model import HeadSettings, answer_logprobs

from .clock import Clock
from .feed import Feed
from .judging import Grader
from .method import Method
from .offline import write_solutions
from .sampling import Sampled, Writer, sample_rewards
from .settings import Setting
from .updates import Updater

Progress = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Task:
    """What is learnt, from what, judged by whom.

    earlier: what another run sampled, for methods whose offline data is their "own".
    """

    setting: Setting
    problems: list[Problem]
    grader: Grader
    clock: Clock
    seed: int
    earlier: list[Sampled]


class Learner:
    """policy is trained in place by `run`; reference is that of the loss, origin where it began.

    Everything that is drawn follows from the seed and torch's random state at the start.
    """

    def __init__(self, task: Task, method: Method, reference: Qwen2ForCausalLM) -> None:
        self._task = task
        every = task.setting.sync_every
        self._method = method if every is None else replace(method, sync_every=every)
        self.origin = self.reference = reference
        self.policy: Qwen2ForCausalLM = copy.deepcopy(reference).requires_grad_(True)
        for model in (self.reference, self.policy):
            answer_logprobs(model, HeadSettings())
        self.sampled: list[Sampled] = []
        self._solutions = self._write_solutions()

    def run(self, steps: int, after_step: Progress) -> None:
        """A step is a sampled batch, or one of offline rows, with all its updates.

        after_step is called after each with the number of steps done and what the last update
        logged.
        """
        start = 0 if self._method.family == "sft" else round(self._method.sft_share * steps)
        if start:
            supervised = replace(
                self._method,
                family="sft",
                learning_rate=self._method.sft_learning_rate,
                offline_share=1.0,
                guided_share=0.0,
                updates=1,
            )
            self._stage(supervised, start, 0, after_step)
        if self._method.sharpen != 1:
            with torch.no_grad():
                self.policy.lm_head.weight.div_(self._method.sharpen)
        if self._method.reset_reference and (start or self._method.sharpen != 1):
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        if steps > start:
            self._stage(self._method, steps - start, start, after_step)

    def _stage(self, method: Method, steps: int, done: int, after_step: Progress) -> None:
        task, config = self._task, self._task.setting.config
        with tempfile.TemporaryDirectory() as folder, self._open(folder) as store:
            feed = Feed(
                store,
                method,
                task.problems,
                config.prompts_per_batch,
                config.num_generations,
                None if method.family in ("sft", "expert") else self.reference,
                task.clock,
                task.seed,
            )
            self._add_offline(feed, method)
            updater = Updater(method, self.policy, config, steps, self._reference_rewards(method))
            stream = shuffled_forever(len(task.problems), random.Random(f"{task.seed} prompts"))
            for step in range(1, steps + 1):
                if feed.online_size and (step - 1) % method.sync_every == 0:
                    for batch in range(step - 1, min(step - 1 + method.sync_every, steps)):
                        drawn = [next(stream) for _ in range(config.prompts_per_batch)]
                        self._sample(feed, method, drawn, batch)
                values = self._update(feed, updater, method, step)
                after_step(done + step, values)

    def _update(self, feed: Feed, updater: Updater, method: Method, step: int) -> dict[str, float]:
        clock = self._task.clock
        values: dict[str, float] = {}
        for number in range(method.updates):
            if number == 0:
                rows = feed.next()
            elif method.draws_again:
                rows = feed.next() if method.replay == "uniform" else feed.next_mixed()
            with clock.stage("update"):
                values = updater.update(rows, step)
            clock.updates += 1
        online = rows.rewards[rows.online]
        if len(online):
            values["pass_rate"] = float((online >= 0).float().mean())
        return values

    def _sample(self, feed: Feed, method: Method, drawn: list[int], batch: int) -> None:
        guided = round(method.guided_share * feed.online_size)
        version = batch * self._task.setting.config.num_generations
        writer = replace(
            self._writer(batch), temperature=method.temperature, distinct=method.distinct
        )
        rows = writer.write(self.policy, drawn, feed.online_size - guided, guided, version)
        feed.add_online(rows)
        self.sampled += rows

    def _writer(self, batch: int) -> Writer:
        task = self._task
        rng = random.Random(f"{task.seed} guides {batch}")
        config = task.setting.config
        return Writer(task.problems, self._solutions, task.grader, config, task.clock, rng)

    def _reference_rewards(self, method: Method) -> Tensor | None:
        if not method.estimates_q0:
            return None
        return sample_rewards(
            self.reference, self._writer(-1), self._task.setting.config.reference_samples
        )

    def _write_solutions(self) -> list[list[list[int]]]:
        task, setting = self._task, self._task.setting
        if not self._method.needs_offline or self._method.offline == "own":
            return [[] for _ in task.problems]
        solved = task.problems[: setting.offline_problems]
        known = write_solutions(
            solved,
            self._method.offline,
            setting.offline_solutions,
            setting.config.max_program_tokens,
            seed=0,  # data that exists before a run does not depend on the run's seed
        )
        return known + [[] for _ in task.problems[len(solved) :]]

    def _add_offline(self, feed: Feed, method: Method) -> None:
        if not feed.offline_size and (method.offline == "none" or method.replay == "uniform"):
            return
        if method.offline == "own":
            feed.add_earlier(self._task.earlier)
        else:
            feed.add_solutions(self._solutions)

    @staticmethod
    def _open(folder: str) -> TrajectoryStore:
        return TrajectoryStore(Path(folder) / "trajectories.db")


def shuffled_forever(count: int, rng: random.Random) -> Iterator[int]:
    """Every index once in random order, then all again."""
    while True:
        yield from rng.sample(range(count), count)
