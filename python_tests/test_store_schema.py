"""Databases of other versions, other programs and other places."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from store_cases import policy, trajectory

from spo_ext.store import (
    Origin,
    Prompt,
    PromptValue,
    Sampler,
    SamplerConfig,
    SchemaError,
    TrajectoryStore,
    schema,
)

HERE = Path(__file__).parent


def execute(target: str, script: str) -> None:
    """Runs SQL in the database of `target`, as another program would."""
    if "://" not in target:
        with sqlite3.connect(target) as file:
            file.executescript(script)
        file.close()
        return
    import psycopg

    with psycopg.connect(target) as connection:
        connection.execute(script)


# What leads to each version from the one after it.
UNDO = {
    5: "".join(
        f"ALTER TABLE trajectories DROP COLUMN {name};"
        for name in ("completion_mask", "contexts", "token_rewards", "info")
    ),
    4: "ALTER TABLE prompts DROP COLUMN columns;",
    3: "DROP TABLE appends; DROP TABLE refusals;",
    2: "ALTER TABLE trajectories DROP COLUMN draw;",
}


def back_to(version: int, target: str) -> None:
    for number in range(schema.CURRENT - 1, version - 1, -1):
        execute(target, UNDO[number])
    execute(target, f"UPDATE spo_schema SET version = {version};")


def tables(store: TrajectoryStore) -> dict[str, Any]:
    """Columns, keys and indices of every table."""
    with store.database.read() as connection:
        inspect = sa.inspect(connection)
        return {
            name: (
                [(c["name"], c["type"].python_type, c["nullable"]) for c in columns],
                inspect.get_pk_constraint(name)["constrained_columns"],
                sorted((k["constrained_columns"], k["referred_table"]) for k in foreign),
                sorted((i["name"], i["column_names"], i["unique"]) for i in indices),
            )
            for name in inspect.get_table_names()
            for columns in [sorted(inspect.get_columns(name), key=lambda c: str(c["name"]))]
            for foreign in [inspect.get_foreign_keys(name)]
            for indices in [inspect.get_indexes(name)]
        }


@pytest.fixture
def version_1(store_target: str) -> str:
    kind = "postgresql" if "://" in store_target else "sqlite"
    execute(store_target, (HERE / f"store_v1_{kind}.sql").read_text())
    return store_target


def test_a_store_of_version_1_is_migrated_with_its_rows(version_1: str) -> None:
    with TrajectoryStore(version_1) as store:
        question, greeting = store.prompts()
        assert (question.content, question.token_ids, question.answer) == ("2 + 2 =", (17, 4), "4")
        assert greeting.content == [{"role": "user", "content": "hello"}]
        assert (greeting.tests, greeting.split) == ([["a", "b"]], "test")
        first, second, third = store.trajectories()
        assert (first.token_ids, first.reward, first.reason) == ((19, 1), 1.0, "right")
        assert first.origin == Origin("policy", "first", 3)
        assert first.behaviour_logprobs is not None
        assert first.behaviour_logprobs.tolist() == [-0.5, -0.25]
        assert (first.duplicates, first.conflicts, first.draw) == (1, 0, 0)
        assert (second.token_ids, second.finish) == ((70000, 1), "truncated")
        assert third.origin == Origin("human")
        [cached] = store.ref_logprobs([first.id], "frozen")
        assert cached is not None and cached.tolist() == [-0.75, -0.125]
        assert store.q0([1], beta=0.1, temperature=0.75) == [PromptValue(-0.5, 16, 0.1, 0.75)]
        # The hashes of that time are those of today, and what came since works.
        assert store.append([first]).duplicates == 1
        drawn = Sampler(store, "learner", SamplerConfig(2, "offline")).next_batch().trajectories
        assert {row.id for row in drawn} == {first.id, second.id}
        new = store.append([trajectory(question.id, 1, policy())])
        assert new.ids[0] > third.id


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_store_of_a_version_between_is_migrated_with_its_rows(
    store_target: str, version: int
) -> None:
    prompt = Prompt("2 + 2 =", [17, 4], answer="4")
    with TrajectoryStore(store_target) as store:
        key = store.add_prompt(prompt)
        store.append([trajectory(key, 1, policy())])
        whole = tables(store)
    back_to(version, store_target)
    with TrajectoryStore(store_target) as store:
        assert tables(store) == whole
        [stored] = store.prompts()
        assert (stored.id, stored.answer, stored.columns) == (key, "4", None)
        assert store.add_prompt(prompt) == key, "its hash is that of today"
        other = store.add_prompt(replace(prompt, columns={"level": 3}))
        assert other != key and store.get_prompts([other])[0].columns == {"level": 3}
        assert store.append([trajectory(key, 1, policy())]).duplicates == 1
        assert store.append([replace(trajectory(key, 1, policy()), draw=1)]).new == 1


def test_a_migrated_store_is_like_a_new_one(
    version_1: str, postgres_or_none: str | None, tmp_path: Path
) -> None:
    new = postgres_or_none or str(tmp_path / "new.db")
    with TrajectoryStore(version_1) as migrated, TrajectoryStore(new) as created:
        assert tables(migrated) == tables(created)
        with migrated.database.read() as connection:
            assert schema.stored_version(connection) == schema.CURRENT


@pytest.fixture
def postgres_or_none(request: pytest.FixtureRequest, store_target: str) -> str | None:
    """Other empty tables, if this test runs on PostgreSQL."""
    if "://" not in store_target:
        return None
    import postgres_server

    return postgres_server.new_schema(request.getfixturevalue("postgres"))


def test_a_migration_is_done_whole_or_not_at_all(
    version_1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(connection: sa.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE half (id INTEGER)")
        raise RuntimeError("power cut")

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, failing))
    monkeypatch.setattr(schema, "CURRENT", schema.CURRENT + 1)
    with pytest.raises(RuntimeError, match="power cut"):
        TrajectoryStore(version_1)
    monkeypatch.undo()
    with TrajectoryStore(version_1) as store:
        assert "half" not in tables(store)
        assert store.counters()["trajectories"] == 3


def test_a_newer_store_is_refused_and_left_alone(store_target: str) -> None:
    TrajectoryStore(store_target).close()
    execute(store_target, "UPDATE spo_schema SET version = 99")
    with pytest.raises(SchemaError, match="has schema version 99, this spo_ext knows up to"):
        TrajectoryStore(store_target)
    execute(store_target, f"UPDATE spo_schema SET version = {schema.CURRENT}")
    TrajectoryStore(store_target).close()


def test_tables_of_another_program_are_refused(store_target: str) -> None:
    execute(store_target, "CREATE TABLE prompts (id INTEGER)")
    with pytest.raises(SchemaError, match=r"must be empty or a store, got tables \['prompts'\]"):
        TrajectoryStore(store_target)


@pytest.mark.parametrize("target", ["", ":memory:", "sqlite://", "mysql://host/base", "://"])
def test_a_target_that_several_processes_cannot_share_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="TrajectoryStore: target must be a file"):
        TrajectoryStore(target)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target must be in an existing folder, got .*nowhere"):
        TrajectoryStore(tmp_path / "nowhere" / "store.db")
    with pytest.raises(ValueError, match="timeout_s must be a number >= 0.001, got 0"):
        TrajectoryStore(tmp_path / "store.db", timeout_s=0)


def test_the_password_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        TrajectoryStore("mysql://user:secret@host/base")
    assert "secret" not in str(refused.value)


def test_sqlite_is_durable_and_checks_foreign_keys(tmp_path: Path) -> None:
    with TrajectoryStore(tmp_path / "store.db", timeout_s=7) as store:
        with store.database.read() as connection:

            def pragma(name: str) -> Any:
                return connection.exec_driver_sql(f"PRAGMA {name}").scalar()

            names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            assert [pragma(name) for name in names] == ["wal", 2, 1, 7000]


def test_spo_ext_is_imported_without_sqlalchemy_and_says_what_to_install() -> None:
    code = """
import contextlib, sys
import spo_ext
assert "sqlalchemy" not in sys.modules
sys.modules["sqlalchemy"] = None
try:
    spo_ext.store
except ImportError as error:
    print(error)
from spo_ext.cli import main
with contextlib.redirect_stderr(sys.stdout):
    main(["import", "rows.jsonl", "--store", "store.db"])
    main(["export", "rows.jsonl", "--store", "store.db"])
    assert main(["rollout", "--store", "s", "--run", "r", "--model", "m"]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'spo_ext[store]'") == 4


def test_the_example_of_docs_store_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (HERE.parent / "docs/store.md").read_text()
    [example] = [part for part in page.split("```") if "TrajectoryStore(" in part]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.removeprefix("python\n"), names)
    assert names["batch"].trajectories[0].token_ids == (19, 1)
    names["store"].close()
