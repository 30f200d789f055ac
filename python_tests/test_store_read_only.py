"""Stores on file systems that take no write-ahead log, or no writes at all."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sqlite3
import subprocess
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

import evaluation_cases
import warm
from store_cases import add_prompts, policy, start_process, trajectory

from spo_ext.cli import main
from spo_ext.store import SchemaError, TrajectoryStore, database, schema


def without_wal(folder: Path) -> str:
    """A URL of a file that SQLite keeps no write-ahead log for."""
    return f"sqlite:///file:{folder}/store.db?vfs=unix-dotfile&uri=true"


def journal_mode(store: TrajectoryStore) -> tuple[Any, Any]:
    with store.database.read() as connection:
        names = ("journal_mode", "synchronous")
        return tuple(connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)  # type: ignore[return-value]


def no_shared_memory(_: object) -> bool:
    return False


@pytest.mark.parametrize("how", ["no shared memory in its VFS", "none in its folder"])
def test_without_a_write_ahead_log_the_old_journal_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    target = without_wal(tmp_path)
    if how == "none in its folder":
        monkeypatch.setattr(database, "_has_shared_memory", no_shared_memory)
        target = str(tmp_path / "store.db")
    for _ in range(2):
        with TrajectoryStore(target, timeout_s=2) as store:
            assert journal_mode(store) == ("delete", 3)
            (prompt,) = add_prompts(store, 1)
            store.append([trajectory(prompt, 1, policy())])
            assert store.counters()["trajectories"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store.db"]


def test_a_log_that_was_made_elsewhere_is_folded_into_the_file(tmp_path: Path) -> None:
    file = filled(tmp_path / "data")
    with TrajectoryStore(file) as store:
        add_prompts(store, 2)
        (tmp_path / "moved").mkdir()
        for end in ("", "-wal"):
            shutil.copyfile(f"{file}{end}", f"{tmp_path}/moved/store.db{end}")
    with TrajectoryStore(without_wal(tmp_path / "moved"), timeout_s=2) as store:
        assert journal_mode(store) == ("delete", 3)
        add_prompts(store, 7, "dev")
        with TrajectoryStore(without_wal(tmp_path / "moved"), timeout_s=2) as other:
            assert other.counters()["prompts"] == 12
    with TrajectoryStore(tmp_path / "moved" / "store.db") as store:
        assert journal_mode(store) == ("wal", 2) and store.counters()["prompts"] == 12


def test_a_folder_is_tried_for_a_write_ahead_log_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite3.connect(tmp_path / "store.db") as connection:
        assert database._has_shared_memory(connection)
        assert not list(tmp_path.glob(".spo-*"))
        connect = sqlite3.connect

        class Broken(sqlite3.Connection):
            def execute(self, statement: str, *_: Any) -> Any:
                if statement.startswith("CREATE"):
                    raise sqlite3.OperationalError("disk I/O error")
                return super().execute(statement)

        monkeypatch.setattr(sqlite3, "connect", lambda file: connect(file, factory=Broken))
        assert not database._has_shared_memory(connection)
    assert not list(tmp_path.glob(".spo-*"))


def test_two_processes_write_without_a_write_ahead_log(tmp_path: Path) -> None:
    target = without_wal(tmp_path)
    with TrajectoryStore(target) as store:
        add_prompts(store, 4)
    body = """
        with TrajectoryStore(argv[0]) as store:
            for number in range(30):
                store.append([trajectory(1, int(argv[1]) * 100 + number, policy())])
                assert len(list(store.trajectories())) > number
    """
    writers = [start_process(body, target, str(writer)) for writer in (1, 2)]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    with TrajectoryStore(target) as store:
        assert store.counters()["trajectories"] == 60
        assert [row.id for row in store.trajectories()] == list(range(1, 61))


def filled(folder: Path) -> Path:
    folder.mkdir()
    with TrajectoryStore(folder / "store.db") as store:
        prompts = evaluation_cases.fill(store, 3)
        store.append([trajectory(prompts[0], i, policy(), reward=float(i)) for i in range(4)])
    return folder / "store.db"


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and not subprocess.run(command).returncode


def run_where_read_only(path: Path, body: str, *arguments: str) -> str:
    """Python code where `path` is a read-only mount, for root too; what it prints."""
    process = start_where_read_only(path, body, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0
    return said


def start_where_read_only(path: Path, body: str, *arguments: str) -> warm.Process:
    if not can_mount():
        pytest.skip("no user namespaces here, or no unshare")
    code = f"from {__name__} import mount_read_only\nmount_read_only({str(path)!r})\n"
    return start_process(code + textwrap.dedent(body), *arguments)


def mount_read_only(path: str) -> None:
    """For this process alone, as `unshare -rm` would begin it."""
    ids = {"uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    new_user_and_mounts = 0x10000000 | 0x00020000
    assert ctypes.CDLL(None).unshare(new_user_and_mounts) == 0
    for name, words in {"setgroups": "deny", **ids}.items():
        Path(f"/proc/self/{name}").write_text(words)
    for how in (["--bind", path], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *how, path], check=True)


COMMANDS = """
    import sys
    from pathlib import Path
    import evaluation_cases as cases
    from spo_ext.cli import main
    from spo_ext.evaluation import producers
    from spo_ext.store import Prompt, TrajectoryStore

    where, out = argv
    run = Path(out) / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\\n')
    producers.make_generator = lambda *_: cases.Scripted()
    producers.make_reward = lambda _: cases.judge
    model = cases.save_tokenizer(Path(out) / "model")
    evaluate = ["eval", "--store", where, "--model", str(model), "--n", "2", "--k", "1"]
    print(main(["export", f"{out}/rows.jsonl", "--store", where]))
    print(main(["report", str(run), "--store", where, "--run", "run"]))
    print(main([*evaluate, "--out", f"{out}/eval"]))
    print(main([*evaluate, "--out", f"{out}/eval2", "--run", "r", "--policy-version", "1"]))
    (Path(out) / "more.jsonl").write_text('{"prompt": "a new one"}\\n')
    print(main(["import", f"{out}/more.jsonl", "--store", where]))
    with TrajectoryStore(where) as store:
        try:
            store.add_prompt(Prompt("new"))
        except PermissionError as error:
            print(error)
"""


@pytest.mark.parametrize("part", ["folder", "file", "old journal"])
def test_what_only_reads_needs_no_write_access(tmp_path: Path, part: str) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    file = filled(tmp_path / "data")
    if part == "old journal":
        with sqlite3.connect(file) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
    (tmp_path / "out").mkdir()
    before = file.read_bytes()
    read_only = file if part == "file" else file.parent
    said = run_where_read_only(read_only, COMMANDS, str(file), str(tmp_path / "out"))
    status = [line for line in said.splitlines() if line in ("0", "1")]
    assert status == ["0", "0", "0", "1", "1"]
    assert "the store must be one that can be written" in said.splitlines()[-1]
    rows = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 6 and json.loads(rows[3])["reward"] == 3.0
    assert "trajectory 4" in (tmp_path / "out" / "run" / "report.html").read_text()
    assert file.read_bytes() == before


def test_a_log_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = filled(tmp_path / "data")
    with TrajectoryStore(file) as store:
        add_prompts(store, 1)
        copy = tmp_path / "copy"
        copy.mkdir()
        for end in ("", "-wal"):
            shutil.copy(f"{file}{end}", copy)
    body = """
        from spo_ext.store import TrajectoryStore
        try:
            TrajectoryStore(argv[0])
        except PermissionError as error:
            print(error)
    """
    said = run_where_read_only(copy, body, str(copy / "store.db"))
    assert "store.db-wal) that cannot be read here: copy both files" in said


def test_reading_beside_a_writer_where_one_may_not_write(tmp_path: Path) -> None:
    """Without a log the file is taken for one that does not change, and a writer is noticed."""
    file = filled(tmp_path / "data")
    body = """
        import sys
        from spo_ext.store import TrajectoryStore
        with TrajectoryStore(argv[0]) as store:
            for _ in range(3):
                print(store.counters()["prompts"], flush=True)
                sys.stdin.readline()
    """
    with start_where_read_only(file.parent, body, str(file)) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == "3\n"
        with TrajectoryStore(file) as store:
            add_prompts(store, 2)
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "5\n"  # in the log, beside a live writer
            add_prompts(store, 4)
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "7\n"
        reader.stdin.write("\n")
        reader.stdin.flush()
    assert reader.returncode == 0


def test_a_url_may_ask_for_reading_only(tmp_path: Path) -> None:
    file = filled(tmp_path / "a b")
    with TrajectoryStore(f"sqlite:///file:{file}?mode=ro&uri=true") as store:
        assert store.counters()["trajectories"] == 4
        with pytest.raises(PermissionError, match="rollout: the store must be one that can be"):
            store.require_writable("rollout")
        with pytest.raises(PermissionError, match="which can only be read"):
            add_prompts(store, 9)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE spo_schema SET version = 2")
    with pytest.raises(SchemaError, match=f"schema version {schema.CURRENT}, got 2; open it"):
        TrajectoryStore(f"sqlite:///file:{file}?mode=ro&uri=true")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write whatever its mode is")
@pytest.mark.parametrize("folder", [0o500, 0o700])
def test_modes_of_files(tmp_path: Path, folder: int) -> None:
    file = filled(tmp_path / "data")
    file.chmod(0o400)
    file.parent.chmod(folder)
    try:
        with TrajectoryStore(file) as store:
            assert store.counters()["trajectories"] == 4
            with pytest.raises(PermissionError):
                add_prompts(store, 9)
    finally:
        file.parent.chmod(0o700)


def test_a_database_that_refuses_to_write_is_read(postgres: str) -> None:
    import postgres_server

    where = postgres_server.new_schema(postgres)
    with TrajectoryStore(where) as store:
        add_prompts(store, 3)
    with TrajectoryStore(f"{where}%20-cdefault_transaction_read_only%3Don") as store:
        assert len(list(store.prompts())) == 3
        with pytest.raises(Exception, match="read-only transaction"):
            add_prompts(store, 4)


def test_an_open_that_waits_has_an_end(tmp_path: Path) -> None:
    """Another process holds the file and never lets go."""
    file = tmp_path / "store.db"
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        failed: list[BaseException] = []
        opening = threading.Thread(
            target=collect, args=(failed, lambda: TrajectoryStore(file, timeout_s=0.5))
        )
        opening.start()
        opening.join(timeout=30)
        assert not opening.is_alive() and "database is locked" in str(failed[0])
        other.execute("ROLLBACK")


def collect(failed: list[BaseException], call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException as error:
        failed.append(error)


def test_a_missing_store_of_a_url_is_not_made(tmp_path: Path, capsys: Any) -> None:
    where = f"sqlite:///{tmp_path}/no.db"
    assert main(["export", f"{tmp_path}/rows.jsonl", "--store", where]) == 1
    assert main(["report", str(tmp_path), "--store", where]) == 1
    assert not (tmp_path / "no.db").exists()
