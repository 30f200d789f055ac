"""What goes into the store comes out of it, once, and nothing else gets in."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import add_prompts, policy, trajectory

from spo_ext.store import Origin, Prompt, PromptValue, Trajectory, TrajectoryStore

# The store is meant to hold what earlier examples left in it.
ONE_STORE = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
NAMES = NAMES.filter(lambda name: len(name) <= 200)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text()}),
    min_size=1,
    max_size=3,
)
ORIGINS = st.one_of(
    st.builds(Origin, st.just("policy"), NAMES, st.integers(0, 2**63 - 1), st.none() | NAMES),
    st.builds(lambda run, model: Origin("model", run, None, model), st.none() | NAMES, NAMES),
    st.builds(Origin, st.just("human"), st.none() | NAMES),
)


@ONE_STORE
@given(st.text() | MESSAGES, st.none() | TOKENS, JSON, JSON)
def test_prompts_come_back_as_they_went_in(
    store: TrajectoryStore, content: Any, token_ids: list[int] | None, tests: Any, answer: Any
) -> None:
    key = store.add_prompt(Prompt(content, token_ids, tests, answer))
    assert store.add_prompt(Prompt(content, token_ids, tests, answer)) == key
    [got] = store.get_prompts([key])
    assert got.id == key
    assert (got.content, got.tests, got.answer, got.split) == (content, tests, answer, "train")
    assert got.token_ids == (None if token_ids is None else tuple(token_ids))


@ONE_STORE
@given(st.data())
def test_trajectories_come_back_as_they_went_in(store: TrajectoryStore, data: Any) -> None:
    tokens = data.draw(TOKENS.filter(len))
    floats = st.floats(-1e3, 0.0, width=32)
    logprobs = data.draw(st.none() | st.lists(floats, min_size=len(tokens), max_size=len(tokens)))
    want = Trajectory(
        add_prompts(store, 1)[0],
        tokens,
        data.draw(st.floats(allow_nan=False, allow_infinity=False) | st.just(-math.inf)),
        data.draw(ORIGINS),
        data.draw(st.sampled_from(["eos", "truncated"])),
        reason=data.draw(st.text()),
        behaviour_logprobs=logprobs,
        temperature=data.draw(st.none() | st.floats(0.0, 10.0)),
        top_p=data.draw(st.none() | st.floats(0.01, 1.0)),
    )
    appended = store.append([want])
    [got] = store.get(appended.ids)
    assert got.token_ids == tuple(tokens)
    for name in ("prompt_id", "origin", "finish", "temperature", "top_p"):
        assert getattr(got, name) == getattr(want, name), name
    if appended.new:
        assert (got.reward, got.reason) == (want.reward, want.reason)
        assert (got.behaviour_logprobs is None) == (logprobs is None)
        assert logprobs is None or got.behaviour_logprobs.tolist() == logprobs


def test_equal_completions_of_two_draws_are_two_rows(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    rows = [replace(trajectory(prompt, 1, policy(3)), draw=draw) for draw in (0, 1, 2)]
    assert (store.append(rows).new, store.append(rows[1:]).duplicates) == (3, 2)
    assert [(row.draw, row.duplicates) for row in store.trajectories()] == [(0, 0), (1, 1), (2, 1)]
    with pytest.raises(ValueError, match="Trajectory: draw must be .* got -1"):
        replace(rows[0], draw=-1)


def test_the_same_trajectory_twice_is_one_row(store: TrajectoryStore) -> None:
    first, second = add_prompts(store, 2)
    batch = [trajectory(first, 1, policy(3)), trajectory(first, 2, policy(3))]
    appended = store.append(batch)
    assert (appended.new, appended.duplicates) == (2, 0)
    again = store.append([batch[1], trajectory(first, 3, policy(3)), batch[1], batch[0]])
    assert again.ids[0] == again.ids[2] == appended.ids[1]
    assert again.ids[3] == appended.ids[0]
    assert (again.new, again.duplicates) == (1, 3)
    assert [row.duplicates for row in store.get([*appended.ids, again.ids[1]])] == [1, 2, 0]
    counters = store.counters()
    assert (counters["trajectories"], counters["duplicates"]) == (3, 3)
    # Another prompt, version, run, writer, temperature or end makes it another trajectory.
    others = [
        trajectory(second, 1, policy(3)),
        trajectory(first, 1, policy(4)),
        trajectory(first, 1, policy(3, run="other")),
        trajectory(first, 1, Origin("human")),
        Trajectory(first, batch[0].token_ids, 0.0, policy(3), "truncated"),
        Trajectory(first, batch[0].token_ids, 0.0, policy(3), "eos", temperature=1.0),
        Trajectory(first, batch[0].token_ids, 0.0, policy(3), "eos", top_p=1.0),
    ]
    assert store.append(others).new == len(others)


def test_another_reward_for_a_stored_trajectory_is_counted(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    one, two = (trajectory(prompt, i, policy(), reward=1.0) for i in range(2))
    ids = store.append([one, two]).ids
    flaky = trajectory(prompt, 0, policy(), reward=-math.inf)
    again = store.append([flaky, two, flaky, one])
    assert (again.ids, again.new) == ((ids[0], ids[1], ids[0], ids[0]), 0)
    assert (again.duplicates, again.conflicts) == (4, 2)
    rows = store.get(ids)
    assert [(row.reward, row.duplicates, row.conflicts) for row in rows] == [(1, 3, 2), (1, 1, 0)]
    counters = store.counters()
    assert (counters["duplicates"], counters["conflicts"]) == (4, 2)


def test_new_rows_of_one_batch_keep_its_order(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    batch = [trajectory(prompt, i, policy()) for i in (5, 3, 5, 9, 1)]
    ids = store.append(batch).ids
    assert ids[0] == ids[2] < ids[1] < ids[3] < ids[4]


def test_a_batch_with_a_mistake_stores_nothing(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    with pytest.raises(ValueError, match=r"append: trajectories\[1\].prompt_id must be .* got 99"):
        store.append([trajectory(prompt, 1, policy()), trajectory(99, 2, policy())])
    with pytest.raises(ValueError, match=r"append: trajectories\[1\] must be a Trajectory, got 7"):
        store.append([trajectory(prompt, 1, policy()), 7])  # type: ignore[list-item]
    assert store.counters()["trajectories"] == 0
    assert store.append([]).ids == ()


def test_a_prompt_is_in_one_split(store: TrajectoryStore) -> None:
    store.add_prompt(Prompt("2 + 2", tests=[1], split="test"))
    with pytest.raises(ValueError, match=r"prompts\[1\].split must be 'test', .* got 'train'"):
        store.add_prompts([Prompt("3 + 3"), Prompt("2 + 2", tests=[2], split="train")])
    assert [prompt.content for prompt in store.prompts()] == ["2 + 2"]
    store.add_prompt(Prompt("3 + 3"))
    assert [prompt.content for prompt in store.prompts("train")] == ["3 + 3"]


def test_prompt_values_are_kept_by_what_they_rest_on(store: TrajectoryStore) -> None:
    first, second = add_prompts(store, 2)
    cool = PromptValue(-0.5, n=16, beta=0.1, temperature=0.7, top_p=0.9)
    warm = PromptValue(-0.25, n=8, beta=0.1, temperature=1.0, reference="frozen")
    store.put_q0({first: cool})
    store.put_q0({first: warm})
    assert store.q0([second, first], beta=0.1, temperature=0.7, top_p=0.9) == [None, cool]
    assert store.q0([first], beta=0.1, temperature=1.0, reference="frozen") == [warm]
    assert store.q0([first], beta=0.1, temperature=1.0) == [None]
    better = PromptValue(-0.4, n=64, beta=0.1, temperature=0.7, top_p=0.9)
    store.put_q0({first: better, second: cool})
    assert store.q0([first, second], beta=0.1, temperature=0.7, top_p=0.9) == [better, cool]
    with pytest.raises(ValueError, match="put_q0: values must be keyed by .* got 99"):
        store.put_q0({first: cool, 99: cool})
    assert store.q0([first], beta=0.1, temperature=0.7, top_p=0.9) == [better]


def test_reference_logprobs_are_cached_by_fingerprint(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    one, two, three = store.append([trajectory(prompt, i, policy()) for i in range(3)]).ids
    values = torch.tensor([-0.5, -1.25, -0.125], dtype=torch.float64)
    store.put_ref_logprobs("a", {one: values, three: values * 2})
    store.put_ref_logprobs("b", {one: values * 3})
    store.put_ref_logprobs("a", {one: values * 4})  # the first computation counts
    got = store.ref_logprobs([three, two, one], "a")
    assert got[1] is None
    assert got[0] is not None and got[0].tolist() == [-1.0, -2.5, -0.25]
    assert got[2] is not None and got[2].tolist() == [-0.5, -1.25, -0.125]
    assert got[2].dtype == torch.float32
    assert [row.id for row in store.trajectories(without_reference="a")] == [two]
    for bad in (values[:2], values * math.nan):
        with pytest.raises(ValueError, match=rf"put_ref_logprobs: logprobs\[{two}\] must be"):
            store.put_ref_logprobs("a", {two: bad})
    with pytest.raises(ValueError, match="keyed by ids of stored trajectories, got 99"):
        store.put_ref_logprobs("a", {two: values, 99: values})
    assert store.ref_logprobs([two], "a") == [None]


def test_ids_that_are_not_stored_are_refused(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    with pytest.raises(ValueError, match=r"get_prompts: ids\[1\] must be in prompts, got 5"):
        store.get_prompts([prompt, 5])
    with pytest.raises(ValueError, match=r"get: ids\[0\] must be in trajectories, got 1"):
        store.get([1])


def test_a_pickled_store_opens_the_same_database(store: TrajectoryStore) -> None:
    add_prompts(store, 2)
    with pickle.loads(pickle.dumps(store)) as copy:
        assert copy.counters() == store.counters()
