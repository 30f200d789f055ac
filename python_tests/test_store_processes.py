"""Several processes at one store, some of which are killed."""

from __future__ import annotations

import os
import signal
import tracemalloc
from typing import Any

import pytest
from store_cases import add_prompts, policy, start_process, trajectory

from spo_ext.store import TrajectoryStore

_BATCH = 7  # rows that a writer appends at a time

_WRITER = """
    store = TrajectoryStore(argv[0])
    [prompt] = add_prompts(store, 1)
    for batch in range(int(argv[1]), int(argv[2])):
        rows = [trajectory(prompt, 7 * batch + i, policy(batch)) for i in range(7)]
        print(*store.append(rows).ids, flush=True)
"""


def test_two_processes_that_write_lose_nothing(store_target: str) -> None:
    # Both open the new database at once, and batches 20 to 40 are written by both.
    writers = [start_process(_WRITER, store_target, *span) for span in (("0", "40"), ("20", "60"))]
    said = [writer.communicate(timeout=300)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert said[0][20:] == said[1][:20]
    with TrajectoryStore(store_target) as store:
        counters = store.counters()
        assert (counters["trajectories"], counters["duplicates"]) == (60 * _BATCH, 20 * _BATCH)
        rows = list(store.trajectories())
        assert len({row.id for row in rows}) == 60 * _BATCH


@pytest.mark.parametrize("after", [1, 12])
def test_a_killed_writer_loses_no_batch_and_halves_none(store_target: str, after: int) -> None:
    writer = start_process(_WRITER, store_target, "0", "1000000")
    assert writer.stdout is not None
    said = [writer.stdout.readline() for _ in range(after)]
    os.kill(writer.pid, signal.SIGKILL)
    said += writer.stdout.readlines()  # communicate() would lose what readline() has read ahead
    writer.wait(60)
    promised = [int(x) for line in said for x in line.split()]
    with TrajectoryStore(store_target) as store:
        stored = [row.id for row in store.trajectories()]
        assert len(promised) >= after * _BATCH
        assert set(promised) <= set(stored)
        assert len(stored) % _BATCH == 0
        assert len(stored) - len(promised) in (0, _BATCH)  # committed, but not yet said
        [prompt] = add_prompts(store, 1)
        assert store.append([trajectory(prompt, 0, policy(0))]).duplicates == 1


def test_a_forked_process_uses_connections_of_its_own(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.append([trajectory(prompt, i, policy()) for i in range(3)])
            code = 0
        finally:
            os._exit(code)
    for i in range(3, 6):
        store.append([trajectory(prompt, i, policy())])
    assert os.waitpid(child, 0)[1] == 0
    assert store.counters()["trajectories"] == 6


def test_streaming_holds_a_page_in_memory(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    tokens = 1024

    def long_row(number: int) -> Any:
        row = trajectory(prompt, number, policy())
        object.__setattr__(row, "token_ids", (number, *range(tokens)))
        return row

    for start in range(0, 2000, 250):
        store.append([long_row(start + i) for i in range(250)])

    def peak(count: int) -> int:
        stream = store.trajectories()
        tracemalloc.start()
        seen = sum(1 for _, _row in zip(range(count), stream, strict=False))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen == count
        return size

    peak(10)  # what is cached on first use
    small, large = peak(300), peak(2000)
    assert large < 1.2 * small
    assert large < 2000 * tokens * 2 / 2  # half of what all rows are in the database


def test_a_stream_ends_where_the_store_ended(store: TrajectoryStore) -> None:
    [prompt] = add_prompts(store, 1)
    store.append([trajectory(prompt, i, policy(run="old")) for i in range(600)])
    seen = 0
    for row in store.trajectories(prompt_id=prompt):
        assert row.origin.run == "old"
        if seen % 100 == 0:
            store.append([trajectory(prompt, seen, policy(run="new"))])
        seen += 1
    assert seen == 600
    assert sum(1 for _ in store.trajectories(run="new")) == 6
