"""The same batches from the same seed and content, and after a crash."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from store_cases import add_prompts, policy, start_process, trajectory

from spo_ext.store import Batch, Origin, Prompt, Sampler, SamplerConfig, Trajectory, TrajectoryStore

CONFIG = SamplerConfig(6, "half-online", "run", seed=5, max_offpolicy_steps=3)


def produce(store: TrajectoryStore, version: int) -> None:
    """What the policy of this version always writes, of which some is in the store already."""
    ids = add_prompts(store, 3)
    store.append([trajectory(ids[i % 3], i, policy(version)) for i in range(9)])


def human_rows(prompts: list[int]) -> list[Trajectory]:
    return [trajectory(prompts[i % 3], 100 + i, Origin("human")) for i in range(20)]


def content(batch: Batch) -> list[tuple[Any, ...]]:
    """What does not depend on ids."""
    return [(row.token_ids, row.origin) for row in batch.trajectories]


def test_the_order_of_appends_does_not_matter(store: TrajectoryStore, tmp_path: Any) -> None:
    with TrajectoryStore(tmp_path / "other.db") as other:
        batches = []
        for place, seed in ((store, 1), (other, 2)):
            rng = random.Random(seed)
            order = rng.sample(range(3), 3)
            prompts = [Prompt(f"prompt {i}") for i in range(3)]
            for i in order:
                place.add_prompt(prompts[i])
            ids = place.add_prompts(prompts)
            rows = human_rows(ids) + [trajectory(ids[0], i, policy(0)) for i in range(20)]
            for row in rng.sample(rows, len(rows)):
                place.append([row])
            draw = Sampler(place, "learner", CONFIG)
            batches.append([content(draw.next_batch(0)) for _ in range(12)])
            groups = Sampler(place, "groups", SamplerConfig(6, "offline", seed=1, group_size=2))
            batches[-1] += [content(groups.next_batch()) for _ in range(6)]
        assert batches[0] == batches[1]


def test_another_seed_draws_others(store: TrajectoryStore) -> None:
    store.append(human_rows(add_prompts(store, 3)))
    first, second = (
        content(Sampler(store, f"{seed}", SamplerConfig(6, "offline", seed=seed)).next_batch())
        for seed in (0, 1)
    )
    assert first != second


def learn(store: TrajectoryStore, draw: Sampler, start: int, stop: int) -> list[Any]:
    """The batches of a learner whose policy has a new version every second step."""
    batches = []
    for step in range(start, stop):
        if step % 2 == 0:
            produce(store, step // 2)
        batch = draw.next_batch(step // 2)
        batches.append((content(batch), batch.uses.tolist()))
    return batches


def test_a_killed_run_continues_as_if_nothing_had_happened(
    store: TrajectoryStore, tmp_path: Any
) -> None:
    with TrajectoryStore(tmp_path / "uninterrupted.db") as other:
        other.append(human_rows(add_prompts(other, 3)))
        want = learn(other, Sampler(other, "learner", CONFIG), 0, 14)
    store.append(human_rows(add_prompts(store, 3)))
    draw = Sampler(store, "learner", CONFIG)
    learn(store, draw, 0, 4)
    checkpoint = json.loads(json.dumps(draw.state_dict()))
    learn(store, draw, 4, 9)  # and here it dies: these five steps are lost
    produce(store, 4)
    again = Sampler(store, "learner", CONFIG, resume=True)
    again.load_state_dict(checkpoint)
    assert learn(store, again, 4, 14) == want[4:]
    assert store.counters()["draws"] == 14 * 6
    fresh = Sampler(store, "learner", CONFIG, resume=True)  # died before its first checkpoint
    assert learn(store, fresh, 0, 14) == want


def test_replayed_batches_are_said_to_be_and_counted_once(store: TrajectoryStore) -> None:
    store.append(human_rows(add_prompts(store, 3)))
    config = SamplerConfig(20, "offline")
    first = [Sampler(store, "learner", config).next_batch()]
    rank = Sampler(store, "learner", config, resume=True)
    second = [rank.next_batch() for _ in range(2)]
    assert [batch.replayed for batch in first + second] == [False, True, False]
    assert content(first[0]) == content(second[0])
    assert [batch.uses.tolist() for batch in second] == [[1] * 20, [2] * 20]
    assert store.counters()["draws"] == 40


def test_ranks_with_one_name_get_the_same_batches(store_target: str) -> None:
    with TrajectoryStore(store_target) as store:
        store.append(human_rows(add_prompts(store, 3)))
    body = """
        from spo_ext.store import *
        store = TrajectoryStore(argv[0])
        draw = Sampler(store, "learner", SamplerConfig(4, "offline", seed=3))
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(12):
            print([row.id for row in draw.next_batch().trajectories], flush=True)
    """
    ranks = [start_process(body, store_target) for _ in range(2)]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    said = [rank.communicate(timeout=300)[0].splitlines() for rank in ranks]
    assert said[0] == said[1]
    assert len(said[0]) == 12
    with TrajectoryStore(store_target) as store:
        assert store.counters()["draws"] == 48


def test_a_learner_that_is_killed_gets_its_batches_again(store_target: str) -> None:
    with TrajectoryStore(store_target) as store:
        store.append(human_rows(add_prompts(store, 3)))
    body = """
        from spo_ext.store import *
        store = TrajectoryStore(argv[0])
        draw = Sampler(store, "learner", SamplerConfig(4, "offline"), resume="resume" in argv)
        for _ in range(int(argv[1])):
            print([row.id for row in draw.next_batch().trajectories], flush=True)
    """
    killed = start_process(body, store_target, "1000000")
    assert killed.stdout is not None
    said = [killed.stdout.readline().strip() for _ in range(7)]
    killed.kill()
    said += [line.strip() for line in killed.stdout.readlines()]
    killed.wait(60)
    with TrajectoryStore(store_target) as store:
        recorded, rest = divmod(store.counters()["draws"], 4)
    assert rest == 0
    assert recorded - len(said) in (0, 1)  # recorded, but not yet said
    resumed = start_process(body, store_target, str(recorded + 2), "resume")
    again = resumed.communicate(timeout=300)[0].splitlines()
    assert again[: len(said)] == said
    with TrajectoryStore(store_target) as store:
        assert store.counters()["draws"] == 4 * (recorded + 2)


def test_a_name_is_taken_once(store: TrajectoryStore) -> None:
    store.append(human_rows(add_prompts(store, 3)))
    config = SamplerConfig(4, "offline")
    draw = Sampler(store, "learner", config)
    Sampler(store, "learner", config)  # has not drawn yet
    draw.next_batch()
    with pytest.raises(ValueError, match="name must be new, or resume True .* got 'learner'"):
        Sampler(store, "learner", config)
    other = SamplerConfig(5, "offline")
    with pytest.raises(ValueError, match=r"config.batch_size must be 4 as when .* got 5"):
        Sampler(store, "learner", other, resume=True)
    store.forget_sampler("learner")
    assert store.counters()["draws"] == 0
    assert not Sampler(store, "learner", other).next_batch().replayed


def test_a_state_of_another_sampler_or_store_is_refused(store: TrajectoryStore) -> None:
    store.append(human_rows(add_prompts(store, 3)))
    draw = Sampler(store, "learner", SamplerConfig(4, "offline"))
    draw.next_batch()
    state = draw.state_dict()
    for change, message in (
        ({"name": "other"}, "name must be 'learner', got 'other'"),
        ({"step": 2}, "step must be at most 1, the batches in this store, got 2"),
        ({"config": {**state["config"], "seed": 1}}, "config.seed must be 1 as when"),
    ):
        with pytest.raises(ValueError, match="Sampler.load_state_dict: " + message):
            draw.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="state must be a mapping with step"):
        draw.load_state_dict({"name": "learner"})


def test_an_error_while_reading_a_batch_does_not_lose_it(
    store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(human_rows(add_prompts(store, 3)))
    draw = Sampler(store, "learner", SamplerConfig(4, "offline"))

    def broken(ids: Any) -> Any:
        raise ConnectionError("gone")

    monkeypatch.setattr(store, "get", broken)
    with pytest.raises(ConnectionError):
        draw.next_batch()
    monkeypatch.undo()
    batch = draw.next_batch()
    assert (batch.step, batch.uses.tolist(), batch.replayed) == (0, [1] * 4, True)
    assert draw.next_batch().step == 1
