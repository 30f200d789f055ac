"""Prompt values from the store, and the stream of prompts and policies that a producer follows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from store_cases import add_prompts, policy, trajectory

from spo_ext.rollout import estimate_q0, latest_policy
from spo_ext.rollout.follow import new_policies, prompt_stream
from spo_ext.store import Origin, Trajectory, TrajectoryStore

SETTINGS: dict[str, Any] = {"run": "ref", "beta": 0.5, "temperature": 0.8, "top_p": 0.9}


def draw(store: TrajectoryStore, prompt: int, number: int, reward: float, **fields: Any) -> None:
    plain = trajectory(prompt, number, policy(0, "ref"), reward)
    given = {"temperature": 0.8, "top_p": 0.9, **fields}
    names = ("prompt_id", "token_ids", "reward", "origin", "finish")
    store.append([Trajectory(**{**{name: getattr(plain, name) for name in names}, **given})])


def expected(rewards: list[float], worst: float, best: float, smoothing: float = 0.5) -> float:
    total = sum(math.exp(reward / 0.5) for reward in rewards)
    total += smoothing * (math.exp(worst / 0.5) + math.exp(best / 0.5))
    return 0.5 * math.log(total / (len(rewards) + 2 * smoothing))


def test_values_rest_on_every_draw_of_the_reference(store: TrajectoryStore) -> None:
    first, second, third = add_prompts(store, 3)
    prompts = list(store.prompts())
    for number, reward in ((1, 1.0), (2, 0.0), (1, 1.0), (1, 1.0)):  # 1 was drawn three times
        draw(store, first, number, reward)
    draw(store, second, 3, 0.0)
    draw(store, second, 4, 1.0, temperature=1.0)
    draw(store, second, 5, 1.0, top_p=1.0)
    draw(store, second, 6, 1.0, origin=policy(0, "other"))
    draw(store, second, 7, 1.0, origin=Origin("model", run="ref", model="m"))
    draw(store, second, 8, 1.0, origin=policy(1, "ref"))
    assert estimate_q0(store, prompts, **SETTINGS, policy_version=0, reference="f") == 2
    key = {"beta": 0.5, "temperature": 0.8, "top_p": 0.9}
    values = store.q0([first, second, third], **key, reference="f")
    assert values[2] is None and values[0] is not None and values[1] is not None
    assert (values[0].n, values[1].n) == (4, 1)
    assert values[0].value == pytest.approx(expected([1, 1, 1, 0], 0, 1), abs=1e-6)
    assert values[1].value == pytest.approx(expected([0], 0, 1), abs=1e-6)
    # Without a version all of the run's; with a range that was not seen; in place of the old one.
    assert estimate_q0(store, prompts, **SETTINGS, reward_range=(-1.0, 1.0), reference="f") == 2
    [_, value, _] = store.q0([first, second, third], **key, reference="f")
    assert value is not None and value.n == 2
    assert value.value == pytest.approx(expected([0, 1], -1, 1), abs=1e-6)
    assert store.q0([first], **key) == [None]


def test_a_range_that_cannot_be_known_is_asked_for(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    assert estimate_q0(store, list(store.prompts()), **SETTINGS) == 0  # nothing was drawn yet
    draw(store, prompt, 1, 0.0)
    with pytest.raises(ValueError, match="reward_range must be"):
        estimate_q0(store, list(store.prompts()), **SETTINGS)
    assert estimate_q0(store, list(store.prompts()), **SETTINGS, reward_range=(0.0, 1.0)) == 1
    with pytest.raises(ValueError, match="estimate_q0: run must be text"):
        estimate_q0(store, [], **{**SETTINGS, "run": ""})


def test_the_stream_goes_through_all_prompts_in_a_new_order_each_time() -> None:
    ids = [3, 5, 8, 13, 21, 34]
    whole = prompt_stream(ids, 1, 0, 30)
    for epoch in range(5):
        assert sorted(whole[6 * epoch : 6 * epoch + 6]) == ids
    assert len({tuple(whole[6 * epoch : 6 * epoch + 6]) for epoch in range(5)}) == 5
    assert [x for start in range(0, 30, 5) for x in prompt_stream(ids, 1, start, 5)] == whole
    assert prompt_stream(ids, 2, 0, 30) != whole
    firsts = Counter(prompt_stream(ids, seed, 0, 1)[0] for seed in range(600))
    assert min(firsts[key] for key in ids) > 60  # of 100 expected
    with pytest.raises(ValueError, match="ids must hold at least one, got none"):
        prompt_stream([], 0, 0, 1)


def publish(directory: Path, version: int) -> Path:
    folder = directory / f"version-{version:07d}"
    folder.mkdir()
    (directory / "latest").write_text(f"{folder.name}\n")
    return folder


def test_the_latest_policy(tmp_path: Path) -> None:
    assert latest_policy(tmp_path / "missing") is None and latest_policy(tmp_path) is None
    folder = publish(tmp_path, 12)
    assert latest_policy(tmp_path) == (12, folder)
    folder.rmdir()
    with pytest.raises(ValueError, match="must name a folder beside it, got 'version-0000012'"):
        latest_policy(tmp_path)
    for name in ("", "version-", "../version-1", "version-0000013.tmp"):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(ValueError, match="must hold version-NUMBER"):
            latest_policy(tmp_path)


def test_each_new_policy_comes_once_until_the_end(tmp_path: Path) -> None:
    publish(tmp_path, 0)
    seen = []
    for version, folder in new_policies(tmp_path, poll_s=0.001):
        assert folder == tmp_path / f"version-{version:07d}"
        seen.append(version)
        if version == 0:
            publish(tmp_path, 1)
            publish(tmp_path, 2)
        else:
            publish(tmp_path, version + 1)  # the last one, published before the end is told
            (tmp_path / "finished").touch()
            if version == 3:
                break
    assert seen == [0, 2, 3]
    assert [v for v, _ in new_policies(tmp_path, poll_s=0.001)] == [4]
    (tmp_path / "finished").unlink()
    assert [v for v, _ in new_policies(tmp_path, until_version=4)] == [4]
    stops = iter([False, False, False, True])
    assert [v for v, _ in new_policies(tmp_path, stop=lambda: next(stops), poll_s=0.001)] == [4]
