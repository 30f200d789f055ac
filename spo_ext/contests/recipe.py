"""A contest in numbers: its problems, its policy, and the settings of `spo train`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_ext.contests.problems import Problem, Split, draw_problem

if TYPE_CHECKING:  # the command of the quickstart shall start without the store
    from spo_ext.store.records import Prompt
    from spo_ext.store.records import Split as StoredSplit

PROMPTS_PER_BATCH, NUM_GENERATIONS, SPO_STEPS = 16, 8, 160


@dataclass(frozen=True)
class Contest:
    """Problems and the supervised start of a policy; everything follows from the seed.

    It is an environment too: `--environment spo_ext.contests.recipe:Contest`. The defaults were
    chosen on development problems only. Raises ValueError for values that cannot work.
    """

    seed: int = 0

    # 160 problems x 20 samples put the standard error of pass@1 near 0.02.
    train_problems: int = 640
    evaluation_problems: int = 160
    hidden_tests: int = 10
    vague_probability: float = 0.5  # an ambiguous word has several readings, so diversity pays
    least_operations: int = 1  # of a problem, before its reduction
    most_operations: int = 3
    max_program_tokens: int = 36  # with the end token

    # Policy: 0.65 M parameters, the smallest that learns the task in two minutes on two cores.
    hidden_size: int = 128
    intermediate_size: int = 320
    layers: int = 3
    heads: int = 4

    # Supervised stage. Half of the operations are wrong on purpose: the reference has to be
    # mediocre (pass@1 near 0.13), otherwise there is nothing left for the reward to teach.
    sft_steps: int = 360
    sft_batch: int = 128
    sft_learning_rate: float = 2e-3
    corruption: float = 0.5  # probability that an operation of the demonstrated program is altered
    token_noise: float = 0.06  # probability that one token of it is dropped or replaced

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("vague_probability", "corruption", "token_noise"):
                valid, wanted = 0 <= value <= 1, "in [0, 1]"
            elif name in ("seed", "sft_steps"):
                valid, wanted = value >= 0, "at least 0"
            else:
                valid, wanted = not isinstance(value, int | float) or value > 0, "greater than 0"
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {value}")
        if self.least_operations > self.most_operations:
            raise ValueError(
                f"least_operations must be at most most_operations ({self.most_operations}),"
                f" got {self.least_operations}"
            )
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 * heads (rotary positions pair the channels"
                f" of a head), got {self.hidden_size} and {self.heads} heads"
            )

    def prompts(self, split: StoredSplit) -> list[Prompt]:
        """What the store holds of a split, with hidden tests."""
        from spo_ext.contests.vocabulary import as_prompts

        count = self.train_problems if split == "train" else self.evaluation_problems
        return as_prompts(self.draw("development" if split == "dev" else split, count), split)

    @property
    def reward(self) -> Callable[..., list[float]]:
        """1 for a program that passes every hidden test."""
        from spo_ext.contests.reward import passes

        return passes

    def draw(self, split: Split, count: int, seed: int | None = None) -> list[Problem]:
        """Problems of a split with different prompts, of the contest's seed unless one is given."""
        rng = random.Random(f"{self.seed if seed is None else seed} {split}")
        problems: dict[str, Problem] = {}
        while len(problems) < count:
            problem = self.draw_one(rng, split, self.hidden_tests)
            problems.setdefault(problem.description, problem)
        return list(problems.values())

    def draw_one(self, rng: random.Random, split: Split, hidden_tests: int) -> Problem:
        """A problem of a split."""
        operations = (self.least_operations, self.most_operations)
        vague = self.vague_probability
        return draw_problem(
            rng, split, vague_probability=vague, hidden_tests=hidden_tests, operations=operations
        )


def spo_settings(contest: Contest, out: Path, **changes: Any) -> dict[str, Any]:
    """The recipe of the quickstart: fields of `SPOConfig`, with the contest's store in `out`."""
    rate, beta = 3e-4, 0.05  # 0.1 keeps more different correct programs and gains less pass@1
    settings = {
        "store": str(out / "store.db"),
        "output_dir": str(out),
        "reward": "spo_ext.contests.reward:passes",
        "objective": "group",
        "beta": beta,
        "sync_every": 4,  # with tapered failures as good as 1, and faster
        "group_size": NUM_GENERATIONS,
        "num_generations": NUM_GENERATIONS,
        "rollout_batch_size": 2 * PROMPTS_PER_BATCH,
        "max_new_tokens": contest.max_program_tokens,
        "per_device_train_batch_size": PROMPTS_PER_BATCH * NUM_GENERATIONS,
        "max_steps": SPO_STEPS,
        "seed": contest.seed,
        "learning_rate": rate,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"lr_end": rate / 10, "power": 1.0},
        "warmup_steps": 10,
        "adam_beta2": 0.98,
        "max_grad_norm": 2 * beta,  # the gradient of the squared loss has this factor
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
    }
    return settings | changes
