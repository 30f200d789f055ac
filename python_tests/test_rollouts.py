"""Rollouts into the store: what is appended, with which seeds, what a stop and a failure leave."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rollout_cases import END, Scripted, decode, odd_ones, rows, words

from spo_ext.rollout import Generation, Judgement, Rollouts, Sampling
from spo_ext.rollout.rollouts import Tally
from spo_ext.store import Origin, Prompt, StoredPrompt, TrajectoryStore

SAMPLING = Sampling(n=4, temperature=0.5, top_p=0.9, max_new_tokens=9, seed=1)


def stored(store: TrajectoryStore, count: int) -> list[StoredPrompt]:
    store.add_prompts(words(count))
    return list(store.prompts())


def make(
    store: TrajectoryStore, generator: Any, reward: Any = odd_ones, **options: Any
) -> Rollouts:
    settings = {"run": "r", "sampling": SAMPLING, "decode": decode, "prompts_per_batch": 2}
    return Rollouts(store, generator, reward, **{**settings, **options})


def test_completions_are_stored_with_all_that_is_known(store: TrajectoryStore) -> None:
    prompts = stored(store, 3)

    class WithLogprobs(Scripted):
        def write(self, prompt: Prompt, sampling: Sampling, k: int) -> Generation:
            plain = super().write(prompt, sampling, k)
            return Generation(plain.token_ids, plain.finish, (-0.5,) * len(plain.token_ids))

    texts: list[str] = []

    def reward(prompts: Sequence[Prompt], completions: Sequence[str], ids: Any) -> Any:
        texts.extend(completions)
        return odd_ones(prompts, completions, ids)

    progress: list[int] = []
    stats = make(store, WithLogprobs(), reward).collect(prompts, 7, progress.append)
    assert progress == [2, 1]
    found = list(store.trajectories(run="r"))
    assert len(found) == 12 and [t.prompt_id for t in found] == [
        prompt.id for prompt in prompts for _ in range(4)
    ]
    for index, each in enumerate(found):
        assert each.origin == Origin("policy", run="r", policy_version=7)
        assert (each.temperature, each.top_p) == (0.5, 0.9)
        ended = index % 2 == 1
        assert (each.reward, each.finish) == ((1.0, "eos") if ended else (0.0, "truncated"))
        assert each.reason == "ended"
        assert each.behaviour_logprobs is not None
        assert each.behaviour_logprobs.tolist() == [-0.5] * len(each.token_ids)
    assert texts == [decode(each.token_ids) for each in found]
    assert (stats.prompts, stats.appended, stats.duplicates, stats.unjudged) == (3, 12, 0, 0)
    assert (stats.mean_reward, stats.truncated_share, stats.mean_length) == (0.5, 0.5, 4.5)
    assert stats.tokens == 54 and stats.tokens_per_second > 0


def test_another_model_is_stored_as_such(store: TrajectoryStore) -> None:
    make(store, Scripted(), origin_model="teacher").collect(stored(store, 1), 0)
    assert {t.origin for t in store.trajectories()} == {Origin("model", run="r", model="teacher")}


def test_a_rollout_again_draws_more_and_one_that_goes_on_draws_the_same(
    store: TrajectoryStore, tmp_path: Path
) -> None:
    prompts = stored(store, 5)
    one = Scripted()
    make(store, one).collect(prompts, 0)
    first = rows(store)
    seeds = {sampling.seed for _, sampling in one.asked}
    assert len(seeds) == 1  # so that no prompt depends on its batch
    make(store, one).collect(prompts, 0)
    assert len({sampling.seed for _, sampling in one.asked}) == 2
    assert len(rows(store)) == 2 * len(first)
    make(store, one).collect(prompts, 1)
    make(store, one, sampling=Sampling(n=4, seed=2)).collect(prompts, 0)
    assert len({sampling.seed for _, sampling in one.asked}) == 4
    # In another store, in other batches and in two parts.
    with TrajectoryStore(tmp_path / "other.db") as other:
        prompts = stored(other, 5)
        make(other, Scripted(), prompts_per_batch=3).collect(prompts[:2], 0)
        assert make(other, Scripted()).drawn(prompts, 0) == {1: 4, 2: 4}
        make(other, Scripted(), prompts_per_batch=3).collect(prompts[2:], 0)
        assert rows(other) == first
        assert make(other, Scripted()).drawn(prompts, 1) == {}


def test_a_prompt_that_comes_twice_gets_twice_as_many(store: TrajectoryStore) -> None:
    a, b = stored(store, 2)
    stats = make(store, Scripted()).collect([a, a, b, a], 0)
    assert (stats.appended, stats.duplicates) == (16, 0)
    assert make(store, Scripted()).drawn([a, b], 0) == {a.id: 12, b.id: 4}


def test_a_completion_drawn_twice_is_two_trajectories(store: TrajectoryStore) -> None:
    class Monotonous(Scripted):
        def write(self, prompt: Prompt, sampling: Sampling, k: int) -> Generation:
            return Generation((1, END), "eos")

    [prompt] = stored(store, 1)
    stats = make(store, Monotonous()).collect([prompt], 0)
    assert (stats.appended, stats.duplicates) == (4, 0)
    assert make(store, Monotonous()).drawn([prompt], 0) == {prompt.id: 4}
    make(store, Monotonous()).collect([prompt, prompt], 0)
    assert [row.draw for row in store.trajectories()] == list(range(12))


def test_what_has_no_judgement_is_counted_and_not_stored(store: TrajectoryStore) -> None:
    class Silent(Scripted):
        def write(self, prompt: Prompt, sampling: Sampling, k: int) -> Generation:
            return super().write(prompt, sampling, k) if k else Generation((), "truncated")

    def first_none(prompts: Any, completions: Any, ids: Any) -> list[Judgement | None]:
        assert all(ids)  # nothing empty is judged
        return [None, *odd_ones(prompts, completions, ids)[1:]]

    stats = make(store, Silent(), first_none).collect(stored(store, 2), 0)
    assert (stats.appended, stats.unjudged) == (5, 3)
    assert store.counters()["trajectories"] == 5


def test_the_next_batch_is_generated_while_one_is_judged(store: TrajectoryStore) -> None:
    generating = threading.Semaphore(0)
    threads = set()

    class Signals(Scripted):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Any:
            threads.add(threading.current_thread())
            generating.release()
            return super().generate(prompts, sampling)

    waits = []

    def reward(prompts: Any, completions: Any, ids: Any) -> list[Judgement | None]:
        assert threading.current_thread() is threading.main_thread()
        waits.append(generating.acquire(timeout=60))  # of the batch after this one
        return odd_ones(prompts, completions, ids)

    generating.release()  # for the last batch, which has none after it
    assert make(store, Signals(), reward).collect(stored(store, 6), 0).appended == 24
    assert waits == [True] * 3 and generating.acquire(blocking=False)
    assert threading.main_thread() not in threads and len(threads) == 1


def test_a_stop_keeps_what_was_generated(store: TrajectoryStore) -> None:
    prompts = stored(store, 8)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(store.counters()["trajectories"])
        return len(asked) == 3

    stats = make(store, Scripted()).collect(prompts, 0, stop=stop)
    assert stats.appended == store.counters()["trajectories"] == 16
    assert asked == [0, 0, 8]


@pytest.mark.parametrize("culprit", ["generator", "reward"])
def test_a_failure_comes_through_and_earlier_batches_stay(
    store: TrajectoryStore, culprit: str
) -> None:
    calls = []

    def fail_late(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("out of order")

    class Fails(Scripted):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Any:
            if culprit == "generator":
                fail_late()
            return super().generate(prompts, sampling)

    def reward(prompts: Any, completions: Any, ids: Any) -> list[Judgement | None]:
        if culprit == "reward":
            fail_late()
        return odd_ones(prompts, completions, ids)

    with pytest.raises(OSError, match="out of order"):
        make(store, Fails(), reward).collect(stored(store, 8), 0)
    assert store.counters()["trajectories"] == 16


def test_producers_that_miscount_are_refused(store: TrajectoryStore) -> None:
    class Short(Scripted):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Any:
            return [group[:-1] for group in super().generate(prompts, sampling)]

    prompts = stored(store, 1)
    with pytest.raises(ValueError, match="generator must be one that returns 4 for each prompt"):
        make(store, Short()).collect(prompts, 0)
    with pytest.raises(ValueError, match="reward must be one that returns 4 judgements, got 1"):
        make(store, Scripted(), lambda *_: [None]).collect(prompts, 0)
    with pytest.raises(ValueError, match=r"prompts\[0\] must be a StoredPrompt"):
        make(store, Scripted()).collect(words(1), 0)  # type: ignore[arg-type]
    assert store.counters()["trajectories"] == 0


def test_metrics_have_the_names_of_trl() -> None:
    tally = Tally(appended=3)
    long = Generation((1, 2, 3), "truncated")
    short = Generation((1, END), "eos", logprobs=(-0.5, -2.0))
    tally.add_prompt([long, short], [1.0, 4.0])
    tally.add_prompt([short, short], [2.0])
    tally.add_prompt([long, long], [])
    metrics = tally.stats(2.0).metrics()
    std = math.sqrt(((1 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2) / 2)
    expected = {
        "reward": 7 / 3,
        "reward_std": std,
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 2.5,
        "completions/min_length": 2.0,
        "completions/max_length": 3.0,
        "completions/mean_terminated_length": 2.0,
        "completions/clipped_ratio": 0.5,
        "rollout/appended": 3.0,
        "rollout/unjudged": 3.0,
        "rollout/entropy": 1.25,
        "rollout/tokens": 15.0,
        "rollout/tokens_per_second": 7.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert "mean reward 2.333" in str(tally.stats(2.0)) and "50.0% truncated" in str(
        tally.stats(2.0)
    )
    tally.add_prompt([short], [-math.inf])
    assert tally.stats(1.0).mean_reward == -math.inf and tally.stats(1.0).reward_std == math.inf
    assert math.isnan(Tally().stats(0.0).entropy)
    empty = Tally()
    assert str(empty.stats(0.0)) == (
        "0 trajectories of 0 prompts (0 drawn before, 0 without a reward)"
    )
    empty.add_prompt([], [])
    assert str(empty.stats(1.0)).endswith(", 1 prompts without completions")
    empty.add_prompt([long], [])
    assert "nan" not in str(empty.stats(1.0)) and "100.0% truncated" in str(empty.stats(1.0))
    assert math.isnan(Tally().stats(0.0).mean_reward) and Tally().stats(0.0).tokens_per_second == 0


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            [1.0] * 4,
            r"one that returns Judgement or None \(FunctionReward takes numbers\), got 1.0",
        ),
        ([Judgement(math.nan)] * 4, "one that returns finite numbers or -inf, got nan"),
        (
            [None, None, None, Judgement(math.inf)],
            "one that returns finite numbers or -inf, got inf",
        ),
        (None, "one that returns 4 judgements, got None"),
    ],
)
def test_a_reward_that_returns_something_else(
    store: TrajectoryStore, found: Any, words: str
) -> None:
    rollouts = make(store, Scripted(), lambda *_: found)
    with pytest.raises(ValueError, match=f"collect: reward must be {words}"):
        rollouts.collect(stored(store, 1), 0)
    assert not list(store.trajectories())
