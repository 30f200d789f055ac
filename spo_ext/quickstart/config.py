"""Every number of the quickstart in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Objective = Literal["group", "squared", "cross_entropy"]
Split = Literal["train", "development", "test"]


@dataclass(frozen=True)
class QuickstartConfig:
    """Settings of one experiment; the defaults finish in under five minutes on two CPU cores.

    They were chosen on development problems only. Raises ValueError for values that cannot work.
    """

    seed: int = 0

    # Problems. 160 problems x 20 samples put the standard error of pass@1 near 0.02.
    train_problems: int = 640
    evaluation_problems: int = 160
    evaluation_split: Split = "test"  # "development" is for choosing settings
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

    # SPO. beta is the price of a nat of KL in units of reward; 0.1 keeps more different correct
    # programs and gains less pass@1.
    objective: Objective = "group"
    beta: float = 0.03
    steps: int = 120
    prompts_per_batch: int = 16
    programs_per_prompt: int = 8
    learning_rate: float = 3e-4
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    max_dropped_mass: float = 0.0  # of the head's gradients; 0 is exact
    sync_every: int = 4  # batches drawn at once; with tapered failures as good as 1, and faster
    reference_samples: int = 16  # per problem, for q0; "group" needs none

    # Evaluation: temperature 1, unbiased pass@k.
    evaluation_samples: int = 20
    evaluation_k: int = 10
    evaluate_every: int = 40
    kl_problems: int = 40  # KL needs a reference pass, so only these problems pay for it

    threads: int = 2
    sandbox_workers: int = 2

    def __post_init__(self) -> None:
        choices = {
            "objective": (self.objective, get_args(Objective)),
            "evaluation_split": (self.evaluation_split, ("development", "test")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self._check_ranges()
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
        if self.evaluation_k > self.evaluation_samples:
            raise ValueError(
                f"evaluation_k must be at most evaluation_samples ({self.evaluation_samples}),"
                f" got {self.evaluation_k}"
            )

    @property
    def evaluation_title(self) -> str:
        """What to call the problems of the evaluation."""
        return "held-out" if self.evaluation_split == "test" else "development"

    def _check_ranges(self) -> None:
        at_least_zero = ("seed", "sft_steps", "steps", "warmup_steps", "kl_problems")
        unit_interval = ("vague_probability", "corruption", "token_noise", "max_dropped_mass")
        for name, value in vars(self).items():
            if isinstance(value, str):
                continue
            if name in unit_interval:
                valid, wanted = 0 <= value <= 1, "in [0, 1]"
            elif name in at_least_zero:
                valid, wanted = value >= 0, "at least 0"
            else:
                valid, wanted = value > 0, "greater than 0"
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {value}")
        if self.objective == "group" and self.programs_per_prompt < 2:
            raise ValueError(
                "programs_per_prompt must be at least 2 for objective 'group' (its q0 is a group"
                f" mean), got {self.programs_per_prompt}"
            )
