"""Warnings of the trainer: each failure as a series of numbers, healthy ones, and real runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from spo_ext.trainer.health import Episode, Health, HealthWarning

# As logged at the start of a healthy run with rewards 0 and 1.
HEALTHY = {
    "loss": 0.2,
    "grad_norm": 1.0,
    "entropy": 1.2,
    "store/behaviour_entropy": 1.2,
    "spo/residual_abs": 0.3,
    "spo/log_ratio": 0.0,
    "spo/terminal_q": 0.3,
    "store/reward_std": 0.4,
    "store/online_length": 40.0,
    "store/online_truncated": 0.2,
    "store/online_reward": 0.3,
}


def monitor(objective: str = "group", beta: float = 0.1) -> Health:
    return Health(beta, objective, (0.0, 1.0))


def feed(health: Health, lines: Iterable[Mapping[str, float]]) -> list[tuple[int, HealthWarning]]:
    """The warnings, with the place of the line in the series."""
    return [(i, found) for i, line in enumerate(lines) for found in health.check(line)]


def series(name: str, values: Iterable[float], **others: float) -> list[dict[str, float]]:
    return [HEALTHY | others | {name: value} for value in values]


def names(found: list[tuple[int, HealthWarning]]) -> list[tuple[int, str]]:
    return [(i, warning.name) for i, warning in found]


@pytest.mark.parametrize(
    ("name", "good", "bad", "warning", "words"),
    [
        ("entropy", 1.2, 0.11, "entropy", ["0.11 nats", "1.2 at first", "raise beta"]),
        ("spo/residual_abs", 0.3, 1.3, "residual", ["1.3", "0.3 until now", "sync_every"]),
        ("spo/log_ratio", 2.0, 31.0, "drift", ["31", "it 3.1", "rewards span 1"]),
        ("spo/log_ratio", -2.0, -31.0, "drift", ["-31", "it -3.1", "(taper)"]),
        ("store/online_length", 40.0, 9.0, "length", ["9 tokens, 40 at", "rewards of 0.3 (0.3)"]),
        ("store/online_truncated", 0.5, 0.97, "truncated", ["97%", "max_new_tokens"]),
    ],
)
def test_a_failure_warns_once_with_numbers_and_advice(
    name: str, good: float, bad: float, warning: str, words: list[str]
) -> None:
    health = monitor()
    found = feed(health, series(name, [good] * 6 + [bad] * 20))
    assert names(found) == [(8, warning)]  # the third interval of it
    for part in words:
        assert part in found[0][1].message
    assert health.count == 1


@pytest.mark.parametrize(
    ("name", "good", "close"),
    [
        ("entropy", 1.2, 0.13),
        ("spo/residual_abs", 0.3, 1.15),
        ("spo/log_ratio", 2.0, 29.0),
        ("store/online_length", 40.0, 10.5),
        ("store/online_truncated", 0.5, 0.93),
    ],
)
def test_short_of_the_limit_there_is_no_warning(name: str, good: float, close: float) -> None:
    assert not feed(monitor(), series(name, [good] * 6 + [close] * 4))


def test_one_bad_interval_is_noise_and_three_are_not() -> None:
    values = [1.2] * 6 + [0.01, 0.01, 1.2] * 5
    assert not feed(monitor(), series("entropy", values))
    assert feed(monitor(), series("entropy", [1.2, 0.01, 0.01, 0.01]))
    # From the first steps on: what is in trouble is no part of the start.
    assert names(feed(monitor(), series("entropy", [1.2] + [0.1] * 3))) == [(3, "entropy")]


def test_an_episode_begins_and_ends_after_three() -> None:
    episode = Episode()
    severities = [1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 2.0, 0.5, 0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    begun = [episode.begins(severity) for severity in [*severities, 1.0, 1.0, 1.0]]
    assert [i for i, new in enumerate(begun) if new] == [5, 17]


def test_a_second_episode_warns_again_and_hovering_does_not() -> None:
    collapse, recovered = [0.01] * 5, [1.0] * 3
    values = [1.2] * 6 + collapse + recovered + collapse
    assert names(feed(monitor(), series("entropy", values))) == [(8, "entropy"), (16, "entropy")]
    hovering = [1.2] * 6 + ([0.11] * 3 + [0.13] * 3) * 10
    assert len(feed(monitor(), series("entropy", hovering))) == 1


@pytest.mark.parametrize("name", ["loss", "grad_norm", "spo/log_ratio", "entropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_warns_at_once(name: str, value: float) -> None:
    health = monitor()
    found = feed(health, series(name, [HEALTHY[name]] * 2 + [value] * 4))
    assert names(found) == [(2, "nonfinite")]
    assert name in found[0][1].message and "checkpoint" in found[0][1].message
    json.dumps(health.state_dict(), allow_nan=False)  # nothing of it stays


def test_a_frozen_head_is_watched_by_what_the_policy_wrote() -> None:
    lines = series("store/behaviour_entropy", [1.2] * 6 + [0.05] * 4)
    assert not feed(monitor(), lines)  # where the entropy itself is logged, that counts
    for line in lines:
        del line["entropy"]
    found = feed(monitor(), lines)
    assert names(found) == [(8, "entropy")] and "store/behaviour_entropy" in found[0][1].message
    for line in lines:
        del line["store/behaviour_entropy"]
    assert not feed(monitor(), lines)


def test_fresh_completions_tell_before_the_batches_do() -> None:
    """Both are in trouble in the end, which is one warning; either alone is enough."""
    fresh = {"rollout/entropy": 1.2, "completions/mean_length": 40.0, "reward": 0.3}
    start = [HEALTHY | fresh] * 6
    same = fresh | {"rollout/entropy": 0.01, "completions/mean_length": 2.0}
    late = same | {"entropy": 0.02, "store/online_length": 3.0}
    lines = start + [HEALTHY | same] * 9 + [HEALTHY | late] * 9
    assert names(feed(monitor(), lines)) == [(8, "entropy"), (8, "length")]
    without = [{key: line[key] for key in HEALTHY} for line in lines]
    assert names(feed(monitor(), without)) == [(17, "entropy"), (17, "length")]


def test_residuals_have_the_scale_of_the_rewards() -> None:
    """Rewards of 0 and 100 whose range nobody gave; and a level at which five spans decide."""
    large = series("spo/residual_abs", [30.0] * 6 + [90.0] * 5, **{"store/reward_std": 49.0})
    assert not feed(monitor(), large)
    slow = [0.3 * 1.1**i for i in range(60)]  # the running mean goes along with it
    found = feed(monitor(), series("spo/residual_abs", slow))
    assert [found[0][1].name, len(found)] == ["residual", 1]
    assert slow[found[0][0] - 2] >= 3.0 > slow[found[0][0] - 3]
    # From a level of nearly 0, where all fail, to what the first successes make of it.
    assert not feed(monitor(), series("spo/residual_abs", [1e-4] * 9 + [0.5] * 9))


def test_cross_entropy_has_limits_of_its_own() -> None:
    narrow = {"objective": "cross_entropy", "beta": 1.0, "reward_range": (-0.1, 0.0)}
    probabilities = series("spo/residual_abs", [0.1] * 6 + [0.9] * 6, **{"store/reward_std": 0.04})
    assert not feed(Health(**narrow), probabilities)  # type: ignore[arg-type]
    assert feed(Health(**narrow | {"objective": "group"}), probabilities)  # type: ignore[arg-type]
    failing = series("spo/log_ratio", [-1.0] * 6 + [-400.0] * 6, **{"spo/residual_abs": 0.9})
    assert not feed(monitor("cross_entropy", 1.0), failing)
    rising = series("spo/terminal_q", [-2.0] * 6 + [2.9] * 6 + [3.1] * 3)
    assert names(feed(monitor("cross_entropy", 1.0), rising)) == [(14, "drift")]
    assert not feed(monitor("group", 1.0), rising)


def test_learnt_brevity_is_no_collapse_but_an_empty_answer_is() -> None:
    shorter = series("store/online_length", [40.0] * 6) + series(
        "store/online_length", [6.0] * 6, **{"store/online_reward": 0.6}
    )
    assert not feed(monitor(), shorter)
    empty = series("store/online_length", [1.2] * 6, **{"store/online_reward": 0.6})
    assert names(feed(monitor(), shorter + empty)) == [(14, "length")]
    short = series("store/online_length", [1.0] * 20)  # one token is all that was ever wanted
    assert not feed(monitor(), short)


def test_cut_answers_that_earn_more_are_no_failure() -> None:
    cut = {"store/online_truncated": 1.0}
    assert names(feed(monitor(), [HEALTHY | cut] * 9)) == [(2, "truncated")]
    better = HEALTHY | cut | {"store/online_reward": 0.6}
    assert not feed(monitor(), [HEALTHY] * 5 + [better] * 9)


def natural(steps: int, seed: int) -> list[dict[str, float]]:
    """A run that learns: entropy falls to a quarter, drift and lengths as they should, noise."""
    rng = random.Random(seed)
    noise = lambda share: math.exp(rng.gauss(0.0, share))  # noqa: E731
    lines = []
    for step in range(steps):
        done = step / steps
        reward = -0.9 + 0.5 * done
        lines.append(
            {
                "loss": 0.1 * noise(0.5),
                "grad_norm": noise(0.5),
                "entropy": 0.7 * 0.25**done * noise(0.2),
                "spo/residual_abs": 0.3 * noise(0.3),
                "spo/log_ratio": 8.0 * done + rng.gauss(0.0, 1.0),
                "spo/terminal_q": reward + rng.gauss(0.0, 0.2),
                "store/reward_std": 0.45,
                "store/online_length": (30.0 - 18.0 * done) * noise(0.2),
                "store/online_truncated": 0.3 * rng.random(),
                "store/online_reward": reward + rng.gauss(0.0, 0.1),
            }
        )
    return lines


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("objective", ["group", "squared", "cross_entropy"])
def test_a_healthy_run_has_no_warning(seed: int, objective: str) -> None:
    assert not feed(monitor(objective), natural(400, seed))
    empty: dict[str, float] = {}
    assert not feed(monitor(objective), [empty] * 9)


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_resumed_run_warns_as_it_would_have(cut: int) -> None:
    lines = natural(8, 3) + series("entropy", [0.01] * 9, **{"spo/residual_abs": 7.0})
    lines += natural(8, 4) + series("store/online_length", [2.0] * 5, **{"store/online_reward": -1})
    whole, first, second = monitor(), monitor(), monitor()
    expected = feed(whole, lines)
    found = feed(first, lines[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [(cut + i, warning) for i, warning in feed(second, lines[cut:])]
    assert found == expected and len(expected) == 3
    assert second.state_dict() == whole.state_dict()


# Real runs of SPOTrainer.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from trainer_cases import fill

    from spo_ext.store import TrajectoryStore

    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
    return tmp_path


def learn(
    folder: Path, resume: bool = False, one_answer: bool = False, **changes: Any
) -> list[dict[str, float]]:
    """What a tiny online run logs; a completion that begins with an odd token is right.

    one_answer: what is paid for instead is a token in all places.
    """
    from trainer_cases import make_model, make_tokenizer
    from trainer_process import settings

    from spo_ext.rollout import Judgement
    from spo_ext.trainer import SPOConfig, SPOTrainer

    def reward(prompts: Any, completions: Any, token_ids: Any) -> list[Judgement]:
        if one_answer:
            return [Judgement(ids.count(7) / 8) for ids in token_ids]
        return [Judgement(float(ids[0] % 2)) for ids in token_ids]

    options = settings(folder, samples_per_prompt=8, beta=0.1) | changes
    trainer = SPOTrainer(make_model(), SPOConfig(**options), make_tokenizer(), reward=reward)
    trainer.train(resume_from_checkpoint=resume)
    return [line for line in trainer.state.log_history if "loss" in line]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "spo_ext.trainer.trainer"]


HEALTHY_RUN = {"max_steps": 12, "learning_rate": 2e-3, "per_device_train_batch_size": 16}


def test_a_run_that_learns_is_not_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = learn(folder, **HEALTHY_RUN)
    assert lines[-1]["store/online_reward"] > lines[0]["store/online_reward"]
    assert not warned(caplog) and {line["health/warnings"] for line in lines} == {0.0}


RUINED = {
    "max_steps": 9,
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "mixture": "half-online",
    "max_new_tokens": 8,
}


def test_an_absurd_learning_rate_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = learn(folder, **RUINED)
    found = warned(caplog)
    assert any("leaves its reference" in words and "learning_rate" in words for words in found)
    assert lines[-1]["health/warnings"] == len(found) == len(set(found))
    assert lines[0]["health/warnings"] == 0
    caplog.clear()
    lines = learn(folder, **RUINED, run="quiet", health_checks=False)
    assert not warned(caplog) and "health/warnings" not in lines[-1]


COLLAPSED = {"beta": 1e-3, "learning_rate": 0.01, "max_new_tokens": 8, "max_steps": 16}


def test_a_policy_with_one_answer_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "taper": False,  # it would prevent this
    }
    lines = learn(folder, one_answer=True, **COLLAPSED, **constant)
    assert lines[-1]["rollout/entropy"] < 0.1 < lines[0]["rollout/entropy"] / 10
    [words] = warned(caplog)
    assert "collapse of entropy: rollout/entropy is" in words and "raise beta" in words
    assert lines[-1]["health/warnings"] == 1


def test_a_checkpoint_remembers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stopped in the middle of an episode: it is not new to the run that continues."""
    saved = {"save_strategy": "steps", "save_steps": 6}
    before = learn(folder, **RUINED | {"max_steps": 6}, **saved)[-1]["health/warnings"]
    first = warned(caplog)
    assert before == len(first) > 0
    caplog.clear()
    lines = learn(folder, resume=True, **RUINED, **saved)
    assert len(lines) == 9
    again = warned(caplog)
    assert lines[-1]["health/warnings"] == before + len(again)
    kinds = [{words.split(": ")[1].split(":")[0] for words in part} for part in (first, again)]
    assert not kinds[0] & kinds[1]
