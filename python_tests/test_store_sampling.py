"""What a sampler draws: mixtures, recency, reuse, strata and groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from store_cases import add_prompts, policy, trajectory

from spo_ext.store import (
    Batch,
    Origin,
    Sampler,
    SamplerConfig,
    SampleShortfall,
    Stratum,
    TrajectoryStore,
)


def fill(
    store: TrajectoryStore, origin: Origin, count: int, prompts: int = 4, successes: int = 0
) -> list[int]:
    """`count` trajectories, dealt out to the prompts; the first ones have reward 1, others 0."""
    ids = add_prompts(store, prompts)
    rows = [
        trajectory(ids[i % prompts], i, origin, reward=float(i < successes)) for i in range(count)
    ]
    return list(store.append(rows).ids)


def sampler(store: TrajectoryStore, batch_size: int, **options: Any) -> Sampler:
    return Sampler(store, "learner", SamplerConfig(batch_size, run="run", **options))


def named(store: TrajectoryStore, name: str, **options: Any) -> Sampler:
    return Sampler(store, name, SamplerConfig(**options))


def ids_of(batch: Batch) -> list[int]:
    return [row.id for row in batch.trajectories]


def test_half_online_is_half_of_every_batch(store: TrajectoryStore) -> None:
    fill(store, policy(0), 20)
    fill(store, Origin("human"), 5)
    fill(store, policy(0, run="another run"), 10)
    draw = sampler(store, 6, mixture="half-online")
    for _ in range(6):
        batch = draw.next_batch(policy_version=0)
        assert int(batch.online.sum()) == 3
        assert batch.metrics()["store/offline_share"] == 0.5
        assert batch.shortfall == {}


def test_uneven_fractions_are_met_in_the_long_run(store: TrajectoryStore) -> None:
    fill(store, policy(0), 10)
    fill(store, Origin("human"), 10)
    fill(store, Origin("model", model="m"), 10)
    draw = sampler(store, 4, mixture={"online": 0.85, "human": 0.05, "model:m": 0.1})
    kinds: Counter[str] = Counter()
    for _ in range(100):
        kinds.update(t.origin.kind for t in draw.next_batch(policy_version=0).trajectories)
    assert kinds.total() == 400
    assert abs(kinds["policy"] - 340) <= 2
    assert abs(kinds["human"] - 20) <= 2


def test_an_epoch_draws_everything_once(store: TrajectoryStore) -> None:
    ids = fill(store, Origin("human"), 12)
    draw = sampler(store, 4, mixture="offline")
    epochs = [[x for _ in range(3) for x in ids_of(draw.next_batch())] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(ids)
    assert epochs[0] != epochs[1] != epochs[2]
    assert draw.next_batch().uses.tolist() == [4] * 4


def test_a_batch_holds_nothing_twice_where_epochs_meet(store: TrajectoryStore) -> None:
    ids = fill(store, Origin("human"), 7)
    draw = sampler(store, 5, mixture="offline")
    counts: Counter[int] = Counter()
    for _ in range(14):
        drawn = ids_of(draw.next_batch())
        assert len(set(drawn)) == 5
        counts.update(drawn)
    assert counts == dict.fromkeys(ids, 10)


def test_metrics_tell_age_reuse_and_duplicates(store: TrajectoryStore) -> None:
    fill(store, policy(2), 2)
    fill(store, policy(2), 2)
    fill(store, Origin("human"), 2)
    draw = sampler(store, 4, mixture="half-online")
    draw.next_batch(policy_version=2)
    metrics = draw.next_batch(policy_version=5).metrics()
    assert metrics.pop("store/age_seconds") == pytest.approx(0, abs=60)
    assert metrics == {
        "store/offline_share": 0.5,
        "store/reuse": 2.0,
        "store/duplicates": 0.5,
        "store/shortfall": 0.0,
        "store/age_versions": 3.0,
        "store/age_versions_max": 3.0,
    }


def test_what_is_appended_joins_the_present_epoch(store: TrajectoryStore) -> None:
    old = fill(store, policy(0), 8)
    draw = sampler(store, 4)
    drawn = ids_of(draw.next_batch(policy_version=0))
    new = fill(store, policy(1), 4)
    for _ in range(2):
        drawn += ids_of(draw.next_batch(policy_version=1))
    assert sorted(drawn) == sorted(old + new)


def test_max_offpolicy_steps_draws_from_the_last_versions(store: TrajectoryStore) -> None:
    for version in range(5):
        fill(store, policy(version), 4)
    batch = sampler(store, 8, max_offpolicy_steps=1).next_batch(policy_version=3)
    assert {row.origin.policy_version for row in batch.trajectories} == {2, 3}
    metrics = batch.metrics()
    assert (metrics["store/age_versions"], metrics["store/age_versions_max"]) == (0.5, 1.0)
    # Version 4 is the future of a learner at version 3, the reason for it a crash.
    everything = SamplerConfig(16, run="run")
    whole = Sampler(store, "all", everything).next_batch(policy_version=3)
    assert {row.origin.policy_version for row in whole.trajectories} == {0, 1, 2, 3}


def test_replay_draws_the_last_versions_evenly_and_again(store: TrajectoryStore) -> None:
    """Without it, rows that a new version adds come before those that were drawn."""
    for version in range(6):
        fill(store, policy(version), 20)
    draw = sampler(store, 12, replay_versions=4)
    plain = named(store, "plain", batch_size=12, run="run", max_offpolicy_steps=3)
    seen = [draw.next_batch(policy_version=4) for _ in range(100)]
    ages = Counter(row.origin.policy_version for batch in seen for row in batch.trajectories)
    assert sorted(ages) == [1, 2, 3, 4]
    assert min(ages.values()) > 240  # of 300 expected, with a standard deviation of 12
    assert all(len(set(ids_of(batch))) == 12 for batch in seen)
    drawn = [id for batch in (draw.next_batch(5) for _ in range(4)) for id in ids_of(batch)]
    assert len(set(drawn)) < 48  # some again, though there are rows that never were
    plain.next_batch(policy_version=4)
    once = [id for batch in (plain.next_batch(4) for _ in range(5)) for id in ids_of(batch)]
    assert len(set(once)) == 60


def test_replay_is_in_place_of_a_limit_of_age(store: TrajectoryStore) -> None:
    with pytest.raises(ValueError, match="max_offpolicy_steps must be None with replay_versions"):
        SamplerConfig(4, run="run", replay_versions=2, max_offpolicy_steps=1)


def test_max_uses_ends_with_an_error_that_says_so(store: TrajectoryStore) -> None:
    ids = fill(store, Origin("human"), 6)
    draw = sampler(store, 4, mixture="offline", max_uses=2)
    counts = Counter(x for _ in range(3) for x in ids_of(draw.next_batch()))
    assert counts == dict.fromkeys(ids, 2)
    with pytest.raises(SampleShortfall, match=r"'offline': \(4, 0\).*max_uses 2"):
        draw.next_batch()
    fill(store, Origin("human", run="later"), 4)
    assert draw.next_batch().step == 3


def test_a_pool_that_is_too_small_is_never_hidden(store: TrajectoryStore) -> None:
    fill(store, policy(0), 10)
    fill(store, Origin("human"), 1)
    with pytest.raises(SampleShortfall, match=r"'offline': \(4, 1\)"):
        sampler(store, 8, mixture="half-online").next_batch(policy_version=0)
    filled = Sampler(
        store, "filled", SamplerConfig(8, "half-online", "run", on_shortfall="fill")
    ).next_batch(policy_version=0)
    assert filled.shortfall == {"offline": (4, 1)}
    assert int(filled.online.sum()) == 7
    assert filled.metrics()["store/shortfall"] == 3
    too_many = SamplerConfig(12, "half-online", "run", on_shortfall="fill")
    with pytest.raises(SampleShortfall, match="batch of 12 at step 0"):
        Sampler(store, "more", too_many).next_batch(policy_version=0)
    assert store.counters()["draws"] == 8


def test_strata_get_at_least_their_share(store: TrajectoryStore) -> None:
    fill(store, Origin("human"), 40, successes=3)
    half = Stratum(0.5, low=1.0)
    draw = sampler(store, 4, mixture="offline", strata=[half])
    failures: list[int] = []
    for _ in range(15):
        batch = draw.next_batch()
        assert float(batch.rewards.sum()) >= 2
        failures += [row.id for row in batch.trajectories if row.reward == 0]
    assert len(set(failures)) == len(failures)  # successes come again, failures do not
    large = named(store, "large", batch_size=10, mixture="offline", strata=[half])
    batch = large.next_batch()
    assert float(batch.rewards.sum()) == 3
    assert batch.shortfall == {"offline reward [1.0, inf)": (5, 3)}


def test_groups_are_of_one_prompt_and_prompts_differ(store: TrajectoryStore) -> None:
    fill(store, policy(0), 25, prompts=5)
    draw = sampler(store, 6, group_size=2)
    pairs: Counter[int] = Counter()
    for _ in range(3):
        batch = draw.next_batch(policy_version=0)
        assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2]
        prompts = [row.prompt_id for row in batch.trajectories]
        assert len(set(ids_of(batch))) == 6
        pairs.update(prompts[::2])
    assert sorted(pairs.values()) in ([1, 2, 2, 2, 2], [1, 1, 2, 2, 3])
    for size in (6, 26):
        with pytest.raises(SampleShortfall, match=f"group_size {size}"):
            named(store, str(size), batch_size=size, run="run", group_size=size).next_batch(0)


def test_only_prompts_of_the_split_are_drawn(store: TrajectoryStore) -> None:
    fill(store, Origin("human"), 4)
    [test] = add_prompts(store, 1, split="test")
    [held_out] = store.append([trajectory(test, 1, Origin("human"))]).ids
    drawn = ids_of(sampler(store, 4, mixture="offline").next_batch())
    assert held_out not in drawn
    dev = named(store, "test", batch_size=1, mixture="offline", split="test")
    assert ids_of(dev.next_batch()) == [held_out]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mixture": "mostly"},
            "mixture must be one of online, offline, half-online, got 'mostly'",
        ),
        ({"mixture": {"online": 0.5, "human": 0.4}}, "mixture must be fractions that add up to 1"),
        (
            {"mixture": {"offline": 0.5, "human": 0.5}},
            "mixture must be offline or parts of it, not both",
        ),
        ({"mixture": {"web": 1.0}}, "mixture must be of pools online, offline, human, model:NAME"),
        ({"mixture": {"run:run": 1.0}}, "mixture must be online for the sampler's own run"),
        ({"run": None}, "run must be given for a mixture with online, got None"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"group_size": 3}, "batch_size must be a multiple of group_size 3, got 8"),
        ({"max_offpolicy_steps": -1}, "max_offpolicy_steps must be an integer >= 0, got -1"),
        ({"strata": [Stratum(0.5), Stratum(0.5, low=1.0)]}, "strata must be disjoint"),
        ({"strata": [Stratum(0.5)], "group_size": 2}, "strata must be empty with group_size > 1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="SamplerConfig: " + message.replace("(", r"\(")):
        SamplerConfig(**{"batch_size": 8, "run": "run", **options})


def test_the_policy_version_is_given_where_it_counts(store: TrajectoryStore) -> None:
    with pytest.raises(ValueError, match="next_batch: policy_version must be an integer >= 0"):
        sampler(store, 2).next_batch()
    with pytest.raises(ValueError, match="policy_version must be None for a mixture without"):
        named(store, "b", batch_size=2, mixture="offline").next_batch(3)
