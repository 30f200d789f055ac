"""The settings that methods are compared in, and their problems."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spo_ext.contests.problems import Problem, Split
from spo_ext.contests.recipe import Contest


@dataclass(frozen=True)
class Config(Contest):
    """A contest, and the sizes of batches and evaluations."""

    prompts_per_batch: int = 16
    num_generations: int = 8
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    reference_samples: int = 16  # per problem, for q0
    evaluation_samples: int = 20
    evaluation_k: int = 10
    kl_problems: int = 40  # KL needs a reference pass, so only these problems pay for it
    threads: int = 1
    sandbox_workers: int = 1


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    config: problems, policy, supervised stage and sizes of a batch.
    offline_solutions: known correct programs per training problem that has any.
    offline_problems: training problems that have, None for all.
    sync_every: batches between two looks at the policy, whatever a method would choose.
    skipped_problems: held-out problems that are left to other settings.
    evaluations: of a run, beside the one before it. Four cost as much as training does.
    """

    name: str
    about: str
    config: Config
    offline_solutions: int = 8
    offline_problems: int | None = None
    sync_every: int | None = None
    skipped_problems: int = 0
    evaluations: int = 4

    def problems(self, split: Split, reference_seed: int) -> list[Problem]:
        """Development and test problems are the same for every seed; training problems are not.

        A specification belongs to one split by its hash, so nothing that is trained on is tested.
        """
        config = self.config
        of_seed = reference_seed if split == "train" else 0
        skipped = 0 if split == "train" else self.skipped_problems
        count = config.train_problems if split == "train" else config.evaluation_problems
        drawn = config.draw(split, skipped + count, of_seed)
        return drawn[skipped:]


_STANDARD = Config()
_SPARSE = replace(_STANDARD, least_operations=4, most_operations=5, max_program_tokens=56)
# For tests: seconds, and nothing that it says about learning is worth reading.
_TINY = replace(
    _STANDARD,
    most_operations=1,
    max_program_tokens=20,
    train_problems=12,
    evaluation_problems=6,
    evaluation_samples=4,
    evaluation_k=2,
    hidden_tests=3,
    hidden_size=32,
    intermediate_size=48,
    layers=1,
    heads=2,
    sft_steps=8,
    sft_batch=16,
    prompts_per_batch=3,
    num_generations=4,
    reference_samples=4,
    kl_problems=4,
)

_STALE = (10, 40, 100)
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("standard", "the problems of spo quickstart", _STANDARD),
        Setting(
            "sparse",
            "four or five operations: the reference hardly ever finds a solution",
            _SPARSE,
            offline_solutions=4,
        ),
        Setting(
            "few",
            "sparse, with solutions known for a tenth of the training problems",
            _SPARSE,
            offline_solutions=4,
            offline_problems=64,
        ),
        *(
            Setting(
                f"stale-{batches}",
                f"standard, with the behaviour policy synced every {batches} batches",
                _STANDARD,
                sync_every=batches,
            )
            for batches in _STALE
        ),
        Setting("tiny", "for tests of the harness", _TINY, offline_solutions=3),
    )
}


def _on_others(known: Setting, name: str, problems: int) -> Setting:
    """Evaluated, before and after a run, on so many problems, none of which `known` has."""
    return replace(
        known,
        name=name,
        about=f"{known.name}, evaluated on {problems} other problems",
        config=replace(known.config, evaluation_problems=problems),
        skipped_problems=known.config.evaluation_problems,
        evaluations=1,
    )


SETTINGS |= {
    "fresh": _on_others(SETTINGS["standard"], "fresh", 960),
    "fresh-few": _on_others(SETTINGS["few"], "fresh-few", 640),
}


def setting_named(name: str) -> Setting:
    """One of SETTINGS, or "stale-K" for any K batches. Raises ValueError for another name."""
    if name in SETTINGS:
        return SETTINGS[name]
    kind, _, batches = name.partition("-")
    if kind == "stale" and batches.isdecimal() and int(batches) > 0:
        return replace(
            SETTINGS["stale-10"],
            name=name,
            about=f"standard, with the behaviour policy synced every {batches} batches",
            sync_every=int(batches),
        )
    raise ValueError(f"setting must be one of {', '.join(SETTINGS)} or stale-K, got {name!r}")
