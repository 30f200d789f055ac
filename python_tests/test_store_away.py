"""A database that goes away for a while: everybody goes on by themselves, nothing is lost or done
twice."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import postgres_server
import pytest
import sqlalchemy as sa
from processes import free_port
from rollout_cases import wait_for
from store_cases import add_prompts, policy, start_process, trajectory

from spo_ext.cli import main
from spo_ext.store import Sampler, SamplerConfig, TrajectoryStore


@pytest.fixture(scope="module")
def server() -> Iterator[postgres_server.Server]:
    why_not = postgres_server.missing()
    if why_not is not None:
        pytest.skip(why_not)
    with postgres_server.server() as made:
        yield made


def lose_answers(
    store: TrajectoryStore,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    committed: bool,
    error: sa.exc.OperationalError | None = None,
) -> None:
    """The next `count` transactions fail, before their commit or after it."""
    left = [count]

    def losing(transaction: Any) -> Any:
        @contextmanager
        def lose() -> Iterator[sa.Connection]:
            with transaction() as connection:
                yield connection
                if left[0] and not committed:
                    left[0] -= 1
                    raise lost
            if left[0]:
                left[0] -= 1
                raise lost

        return lose

    cause = Exception("disk I/O error: server closed the connection unexpectedly")
    lost = error or sa.exc.OperationalError("COMMIT", {}, cause, connection_invalidated=True)
    for name in ("read", "write"):
        monkeypatch.setattr(store.database, name, losing(getattr(store.database, name)))


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_an_append_whose_answer_is_lost_counts_once(
    store: TrajectoryStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    count: int,
    committed: bool,
) -> None:
    [prompt] = add_prompts(store, 1)
    store.append([trajectory(prompt, i, policy()) for i in range(3)])
    rows = [trajectory(prompt, i, policy(), reward=float(i > 3)) for i in range(1, 5)]
    lose_answers(store, monkeypatch, count, committed)
    caplog.set_level(logging.WARNING, logger="spo_ext.store.database")
    result = store.append(rows)
    assert (result.new, result.duplicates, result.conflicts) == (2, 2, 0)
    assert [row.token_ids for row in store.get(result.ids)] == [
        tuple(row.token_ids) for row in rows
    ]
    again = store.append(rows)
    assert (again.ids, again.new, again.duplicates) == (result.ids, 0, 4)
    found = store.counters()
    assert (found["trajectories"], found["duplicates"], found["conflicts"]) == (5, 6, 0)
    [line] = [record.getMessage() for record in caplog.records]
    assert "server closed the connection unexpectedly; trying again for up to 300 s" in line


@pytest.mark.parametrize("committed", [False, True])
def test_a_batch_whose_answer_is_lost_is_drawn_once(
    store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    [prompt] = add_prompts(store, 1)
    store.append([trajectory(prompt, i, policy()) for i in range(8)])
    draw = Sampler(store, "learner", SamplerConfig(4, "offline"))
    lose_answers(store, monkeypatch, 2, committed)
    seen = Counter(row.id for _ in range(2) for row in draw.next_batch().trajectories)
    assert set(seen.values()) == {1} and len(seen) == 8
    assert store.counters()["draws"] == 8


def test_a_full_disk_is_waited_for(
    store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection holds, and the transaction does not."""

    class Full(Exception):
        sqlstate = "53100"

    full = Full("database or disk is full")
    [prompt] = add_prompts(store, 1)
    lost = sa.exc.OperationalError("INSERT", {}, full)
    lose_answers(store, monkeypatch, 2, committed=False, error=lost)
    caplog.set_level(logging.WARNING, logger="spo_ext.store.database")
    assert store.append([trajectory(prompt, i, policy()) for i in range(3)]).new == 3
    assert store.counters()["trajectories"] == 3
    [line] = [record.getMessage() for record in caplog.records]
    assert "disk is full; trying again for up to 300 s" in line


def test_waiting_has_an_end(
    store_target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with TrajectoryStore(store_target, retry_s=0.5) as store:
        lose_answers(store, monkeypatch, 10**6, committed=False)
        started = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match="server closed the connection"):
            store.counters()
        assert time.monotonic() - started >= 0.5
    with pytest.raises(ValueError, match="TrajectoryStore: retry_s must be a number >= 0"):
        TrajectoryStore(tmp_path / "store.db", retry_s=-1)


def test_what_does_not_pass_is_not_waited_for(server: postgres_server.Server) -> None:
    for where, match in [
        (f"{server.url}/nowhere", 'database "nowhere" does not exist'),
        (server.url.replace("postgres@", "nobody@") + "/postgres", 'role "nobody" does not exist'),
    ]:
        started = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match=match):
            TrajectoryStore(where)
        assert time.monotonic() - started < 100
    url = f"{server.url}/postgres"
    server.stop()
    started = time.monotonic()
    with pytest.raises(sa.exc.OperationalError, match="refused"):
        TrajectoryStore(url, retry_s=1.0)  # never reached: as likely a wrong address
    assert time.monotonic() - started >= 1.0
    server.start()


WRITER = """
    store = TrajectoryStore(argv[0])
    [prompt] = add_prompts(store, 1)
    for batch in range(int(argv[1]), int(argv[2])):
        rows = [trajectory(prompt, 7 * batch + i, policy(batch)) for i in range(7)]
        found = store.append(rows)
        print(found.new, *found.ids, flush=True)
"""


def test_writers_outlive_restarts(server: postgres_server.Server) -> None:
    url = postgres_server.new_schema(server.url)
    writers = [start_process(WRITER, url, *span) for span in (("0", "250"), ("250", "500"))]
    heads = []
    for writer in writers:
        assert writer.stdout is not None
        heads.append([writer.stdout.readline() for _ in range(10)])
    for mode in ("fast", "immediate"):
        server.stop(mode)
        time.sleep(0.3)
        server.start()
        time.sleep(0.3)
    said = []
    for writer, head in zip(writers, heads, strict=True):
        assert writer.stdout is not None
        said += [list(map(int, line.split())) for line in head + writer.stdout.readlines()]
        assert writer.wait(300) == 0
    assert len(said) == 500 and {new for new, *_ in said} == {7}
    with TrajectoryStore(url) as store:
        rows = [row.id for row in store.trajectories()]
        assert sorted(key for _, *ids in said for key in ids) == sorted(rows)
        found = store.counters()
        assert (found["trajectories"], found["duplicates"]) == (3500, 0)


STEPS = 16


def test_a_run_of_two_ranks_and_two_producers_outlives_a_restart(
    server: postgres_server.Server, tmp_path: Path
) -> None:
    """Killed as by a power cut, and away for longer than a batch takes."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from end_to_end_cases import contents, workplace

    url = postgres_server.new_schema(server.url)
    with workplace(tmp_path, url) as place:
        names = ("--store", url, "--tokenizer", str(place.policy))
        assert main(["import", str(place.data_files()[-1]), *names]) == 0
        place.write_config(max_steps=STEPS, per_device_train_batch_size=4, save_steps=8)
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        group |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        running = [
            place.start_trainer(f"rank {rank}", RANK=str(rank), LOCAL_RANK=str(rank), **group)
            for rank in range(2)
        ]
        running += [place.start_producer(f"producer {seed}", "--seed", seed) for seed in range(2)]
        with TrajectoryStore(url) as store:
            wait_for(lambda: place.check_running() and len(place.metrics()) >= 3, 600)
            held = contents(store)
            server.stop("immediate")
            time.sleep(2)
            place.check_running()
            server.start()
            assert [process.wait(600) for process in running] == [0] * 4
            found = contents(store)
            assert held.items() <= found.items(), "a stored trajectory is lost or changed"
            assert store.counters()["draws"] == STEPS * 8, "a step has one batch"
            online = list(store.trajectories(run="learner"))
        said = "".join(path.read_text() for path in tmp_path.glob("*.log"))
        told = re.findall(r"(\d+) trajectories of \d+ prompts \((\d+) drawn before", said)
        drawn = sum(int(count) for pair in told for count in pair)
        assert drawn == sum(1 + row.duplicates for row in online), "each append counts once"
        lines = place.metrics()
        assert sorted(lines) == list(range(1, STEPS + 1))
        assert all(len(line) == 1 for line in lines.values()), "no step was taken twice"
        # Who had nothing to ask meanwhile did not notice.
        assert 1 <= said.count("trying again for up to 300 s") <= 8
        assert "Traceback" not in said
