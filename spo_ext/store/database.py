"""Transactions on SQLite and PostgreSQL that mean the same on both.

Writers wait for one another, so ids are in the order of commits: who has read up to an id never
finds a smaller one later, which the sampler relies on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from spo_ext.store.checks import number

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_WRITE = "spo_write"
_LOCK = 0x73706F5F657874  # PostgreSQL's advisory lock of all writers: "spo_ext"

_FIRST_S = 10.0  # a server that never answered is more likely a wrong address
_LONGEST_PAUSE_S = 5.0
# SQLSTATE: broken connections, shutdown, crash, start, a transaction that was idle, no free slot.
_AWAY = ("08", "57P01", "57P02", "57P03", "25P03", "53300")
# A refused connection has no SQLSTATE, only words of the server or of the system.
_STARTING = ("starting up", "shutting down", "recovery", "not yet accepting", "too many clients")
_FOR_GOOD = ("authentication", "pg_hba", "does not exist", "translate host", "resolve host")
_OF_SQLITE = ("locking protocol", "disk i/o error")


class Database:
    """Runs transactions; opens an engine anew in a forked process.

    The work of `reading` and `writing` is called again when the database went away in the middle
    of it, for up to retry_s seconds. What it does must be right after an earlier call that was
    committed though its answer was lost.
    """

    def __init__(self, target: str | os.PathLike[str], timeout_s: float, retry_s: float) -> None:
        self.url = _parse(target)
        self._timeout_s = number("TrajectoryStore", "timeout_s", timeout_s, at_least=0.001)
        self._retry_s = number("TrajectoryStore", "retry_s", retry_s, at_least=0.0)
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
        self._reached = False

    @property
    def _sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def reading(self, work: Callable[[sa.Connection], _T]) -> _T:
        """What `work` finds in a transaction of `read`, tried until the database answers."""
        return self._persist(self.read, work)

    def writing(self, work: Callable[[sa.Connection], _T]) -> _T:
        """What `work` returns in a transaction of `write`, tried until the database answers."""
        return self._persist(self.write, work)

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

    def _persist(
        self,
        transaction: Callable[[], AbstractContextManager[sa.Connection]],
        work: Callable[[sa.Connection], _T],
    ) -> _T:
        away_since, pause_s = 0.0, 0.1
        while True:
            try:
                with transaction() as connection:
                    found = work(connection)
            except (OperationalError, InterfaceError) as error:
                now, bound_s = time.monotonic(), self._patience_s(error)
                if bound_s and not away_since:
                    where = self.url.render_as_string(hide_password=True)
                    words = " ".join(str(error.orig).split())
                    logger.warning("%s: %s; trying again for up to %g s", where, words, bound_s)
                    away_since = now
                left_s = away_since + bound_s - now
                if left_s <= 0:
                    raise
                time.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._reached = True
                if away_since:
                    logger.info("the database is back after %.1f s", time.monotonic() - away_since)
                return found

    def _check_process(self) -> None:
        # A connection must not be shared by two processes; the parent goes on using its own.
        if os.getpid() != self._pid:
            self._engine.dispose(close=False)
            self._pid = os.getpid()

    def _patience_s(self, error: DBAPIError) -> float:
        """How long a transaction is tried again after this; 0 where that would not help."""
        words, state = str(error.orig).lower(), getattr(error.orig, "sqlstate", None)
        if self._sqlite:  # which waits for locks by itself
            return self._retry_s if any(word in words for word in _OF_SQLITE) else 0.0
        if error.connection_invalidated:
            return self._retry_s
        if state is not None:
            return self._retry_s if str(state).startswith(_AWAY) else 0.0
        if self._reached or any(word in words for word in _STARTING):
            return self._retry_s
        return 0.0 if any(word in words for word in _FOR_GOOD) else min(self._retry_s, _FIRST_S)

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
