"""Transactions on SQLite and PostgreSQL that mean the same on both.

Writers wait for one another, so ids are in the order of commits: who has read up to an id never
finds a smaller one later, which the sampler relies on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from spo_ext.store.checks import number

_WRITE = "spo_write"
_LOCK = 0x73706F5F657874  # PostgreSQL's advisory lock of all writers: "spo_ext"


class Database:
    """An engine, opened anew in a forked process."""

    def __init__(self, target: str | os.PathLike[str], timeout_s: float) -> None:
        self.url = _parse(target)
        self._timeout_s = number("TrajectoryStore", "timeout_s", timeout_s, at_least=0.001)
        try:
            self._engine = sa.create_engine(self.url, pool_pre_ping=not self._sqlite)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"TrajectoryStore: PostgreSQL needs a driver ({error}): "
                "pip install 'spo_ext[postgresql]'"
            ) from error
        if self._sqlite:
            sa.event.listen(self._engine, "connect", self._set_up_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._writer = self._engine.execution_options(**{_WRITE: True})
        self._pid = os.getpid()

    @property
    def _sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One state of the database, whoever writes meanwhile to SQLite; short, please."""
        self._check_process()
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Alone among writers; all or nothing, and durable when it returns."""
        self._check_process()
        with self._writer.begin() as connection:
            if not self._sqlite:
                # The second one frees the lock of a machine that went away while it held it.
                for name in ("lock_timeout", "idle_in_transaction_session_timeout"):
                    wait_ms = str(int(self._timeout_s * 1000))
                    connection.execute(sa.select(sa.func.set_config(name, wait_ms, True)))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def _check_process(self) -> None:
        # A connection must not be shared by two processes; the parent goes on using its own.
        if os.getpid() != self._pid:
            self._engine.dispose(close=False)
            self._pid = os.getpid()

    def _set_up_sqlite(self, connection: Any, _record: object) -> None:
        connection.isolation_level = None  # _begin_sqlite begins, not the driver
        connection.execute(f"PRAGMA busy_timeout = {int(self._timeout_s * 1000)}")
        connection.execute("PRAGMA foreign_keys = ON")
        # FULL: a commit survives a power cut too. A trajectory costs more than one fsync.
        connection.execute("PRAGMA synchronous = FULL")
        deadline = time.monotonic() + self._timeout_s
        while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            # The switch does not wait for another process that is switching too.
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that wants to write later fails at once if another one wrote between.
    write = connection.get_execution_options().get(_WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _parse(target: str | os.PathLike[str]) -> URL:
    text = os.fspath(target)
    if "://" not in text:
        if text in ("", ":memory:"):
            raise ValueError(f"TrajectoryStore: target must be a file or URL, got {text!r}")
        if not os.path.isdir(os.path.dirname(os.path.abspath(text))):
            raise ValueError(f"TrajectoryStore: target must be in an existing folder, got {text!r}")
        return URL.create("sqlite", database=os.path.abspath(text))
    try:
        url = make_url(text)
    except ArgumentError:
        raise ValueError("TrajectoryStore: target must be a file or a valid URL") from None
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        shown = url.render_as_string(hide_password=True)
        raise ValueError(
            "TrajectoryStore: target must be a file, sqlite:///FILE or postgresql://..., "
            f"got {shown!r}"
        )
    return url
