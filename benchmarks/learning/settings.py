"""The settings that recipes are compared in: their problems, solutions and sizes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from spo_ext.contests.problems import Problem, Split
from spo_ext.contests.programs import STYLE_WEIGHTS, STYLES, write_program
from spo_ext.contests.recipe import NUM_GENERATIONS, PROMPTS_PER_BATCH, Contest
from spo_ext.contests.vocabulary import encode_program

_TRIES = 40  # draws per solution that is wanted: some problems have few different ones


@dataclass(frozen=True)
class Setting(Contest):
    """A contest, and the sizes of batches and evaluations.

    offline_solutions: known correct programs of each training problem.
    kl_problems: of an evaluation, those that pay for a pass of the reference.
    """

    name: str = "standard"
    offline_solutions: int = 8
    prompts_per_batch: int = PROMPTS_PER_BATCH
    num_generations: int = NUM_GENERATIONS
    evaluation_samples: int = 20
    kl_problems: int = 40

    def problems(self, split: Split, reference_seed: int) -> list[Problem]:
        """Development and test problems are the same for every seed; training problems are not.

        A specification belongs to one split by its hash, so nothing that is trained on is tested.
        """
        if split == "train":
            return self.draw(split, self.train_problems, reference_seed)
        return self.draw(split, self.evaluation_problems, 0)

    def solutions(self, problems: Sequence[Problem]) -> list[list[list[int]]]:
        """At most `offline_solutions` different correct programs per problem, at least one.

        They are written by nobody whose log-probabilities are known, in the styles of the
        demonstrations. Raises ValueError for a problem without a program that is short enough.
        """
        rng = random.Random("0 offline near")
        return [self._solve(problem, rng) for problem in problems]

    def _solve(self, problem: Problem, rng: random.Random) -> list[list[int]]:
        found: dict[tuple[int, ...], None] = {}
        for _ in range(_TRIES * self.offline_solutions):
            style = rng.choices(STYLES, STYLE_WEIGHTS)[0]
            program = encode_program(write_program(rng, problem.specification, style))
            if len(program) <= self.max_program_tokens:
                found[tuple(program)] = None
            if len(found) == self.offline_solutions:
                break
        if not found:
            raise ValueError(
                f"max_program_tokens must leave room for a solution of {problem.description!r}, "
                f"got {self.max_program_tokens}"
            )
        return [list(program) for program in found]


SETTINGS = {
    "standard": Setting(),
    # For tests: seconds, and nothing that it says about learning is worth reading.
    "tiny": Setting(
        name="tiny",
        offline_solutions=3,
        most_operations=1,
        max_program_tokens=20,
        train_problems=12,
        evaluation_problems=6,
        evaluation_samples=4,
        hidden_tests=3,
        hidden_size=32,
        intermediate_size=48,
        layers=1,
        heads=2,
        sft_steps=8,
        sft_batch=16,
        prompts_per_batch=3,
        num_generations=4,
        kl_problems=4,
    ),
}
