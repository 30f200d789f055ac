"""Pickles inside data sets: they give plain values or are refused, and do nothing."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import data_cases as cases
import pytest
from data_cases import import_rows, packed, write_rows
from hypothesis import given
from hypothesis import strategies as st

from spo_ext.data.contests import unpickle
from spo_ext.store import TrajectoryStore


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore(tmp_path / "store.db")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_a_bad_row_and_does_nothing(
    store: TrajectoryStore, tmp_path: Path, protocol: int
) -> None:
    trap = tmp_path / "sprung"
    data = pickle.dumps([{"input": Evil(trap)}], protocol)
    row = {
        **cases.LIVECODEBENCH,
        "private_test_cases": base64.b64encode(zlib.compress(data)).decode(),
    }
    _, [problem] = import_rows(store, write_rows(tmp_path / "rows.jsonl", row, {"prompt": "p"}))
    assert problem.row == 1 and "a pickle must not use" in problem.reason
    assert not trap.exists() and store.counters()["prompts"] == 1
    pickle.loads(data)
    assert trap.exists()  # it was a real one


def doubled(times: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"cos\nsystem\n.", "must not use GLOBAL"),
        (b"Pkey\n.", "must not use PERSID"),
        (b"\x82\x01.", "must not use EXT1"),
        (pickle.dumps({1, 2}), "must not use EMPTY_SET"),
        (pickle.dumps(b"bytes"), "must not use SHORT_BINBYTES"),
        (b"Nr\xff\xff\xff\x7f.", "must not keep a value as number 2147483647"),
        (pickle.dumps(doubled(60)), "unfolds to more"),
        (b"]\x94h\x00a.", "unfolds to more"),  # a list in itself
        (pickle.dumps("x" * 1000)[:-3] + b".", "unreadable pickle"),
        (b"", "unreadable pickle"),
        (b"not a pickle", "unreadable pickle"),
    ],
)
def test_pickles_that_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unpickle(data, 10_000)


def test_a_text_that_is_named_many_times_is_refused() -> None:
    text = "x" * 1000
    assert unpickle(pickle.dumps([text] * 10), 10_000) == [text] * 10
    with pytest.raises(ValueError, match="unfolds to more"):
        unpickle(pickle.dumps([text] * 11), 10_000)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_pickles_of_plain_data_are_read(value: Any, protocol: int) -> None:
    try:
        data = pickle.dumps(value, protocol)
    except UnicodeEncodeError:  # a lone surrogate
        return
    got = unpickle(data, 10_000)
    assert got == value and repr(got) == repr(value)


@given(st.binary(max_size=60))
def test_bytes_of_any_kind_raise_nothing_but_value_error(data: bytes) -> None:
    try:
        json.dumps(unpickle(data, 1000))
    except (ValueError, TypeError):  # TypeError: a key that JSON does not have
        pass


def test_a_small_zip_of_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from spo_ext.data import contests
    from spo_ext.data.records import RowError

    monkeypatch.setattr(contests, "_MAX_UNPACKED", 1 << 20)
    row = {**cases.LIVECODEBENCH, "private_test_cases": packed("x" * (1 << 21))}
    with pytest.raises(RowError, match="more than 1 MiB"):
        contests.parse_livecodebench(row, contests.Defaults())
