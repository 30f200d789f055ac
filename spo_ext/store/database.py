"""Transactions on SQLite and PostgreSQL that mean the same on both.

Writers wait for one another, so ids are in the order of commits: who has read up to an id never
finds a smaller one later, which the sampler relies on.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlencode
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from spo_ext.checks import number
from spo_ext.shown import SECRET_NAME, hide_passwords, visible

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_WRITE = "spo_write"
_LOCK = 0x73706F5F657874  # PostgreSQL's advisory lock of all writers: "spo_ext"

_FIRST_S = 10.0  # a server that never answered is more likely a wrong address
_LONGEST_PAUSE_S = 5.0
# SQLSTATE: broken connections, shutdown, crash, start, a transaction that was idle; no free slot,
# memory or space on the disk, in a transaction or in the system under the server.
_AWAY = ("08", "57P01", "57P02", "57P03", "25P03", "53", "58030")
# A refused connection has no SQLSTATE, only words of the server or of the system.
_STARTING = ("starting up", "shutting down", "recovery", "not yet accepting", "too many clients")
_FOR_GOOD = ("authentication", "pg_hba", "does not exist", "translate host", "resolve host")
_OF_SQLITE = ("locking protocol", "disk i/o error", "disk is full")
# What SQLite says where it may not write: to the file, or beside it.
_NO_ACCESS = (sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
# libpq's own form, which is no URL and would become the name of a file.
_KEYWORDS = re.compile(r"\b(host|hostaddr|dbname|password|port|service)\s*=")


class Database:
    """Runs transactions; opens an engine anew in a forked process.

    The work of `reading` and `writing` is called again when the database went away in the middle
    of it, for up to retry_s seconds. What it does must be right after an earlier call that was
    committed though its answer was lost.
    """

    def __init__(self, target: str | os.PathLike[str], timeout_s: float, retry_s: float) -> None:
        self.url = _parse(target)
        self.shown = hide_passwords(self.url.render_as_string(hide_password=True))
        self._timeout_s = number("TrajectoryStore", "timeout_s", timeout_s, at_least=0.001)
        self._retry_s = number("TrajectoryStore", "retry_s", retry_s, at_least=0.0)
        self._reader: _Reader | None = None  # of a file of SQLite that cannot be written
        self._wal: bool | None = None  # whether its file system has a write-ahead log
        self._connect()
        self._pid = os.getpid()
        self._reached = False

    def _connect(self) -> None:
        options: dict[str, Any] = {} if self._sqlite else {"pool_pre_ping": True}
        if self._reader is not None:
            options["creator"] = self._reader.connect
        # Apart from the URL, which SQLAlchemy shows without its password only.
        secrets = {name: value for name, value in self.url.query.items() if SECRET_NAME(name)}
        url = self.url.difference_update_query(secrets)
        try:
            self._engine = sa.create_engine(url, connect_args=secrets, **options)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"TrajectoryStore: PostgreSQL needs a driver ({error}): "
                "pip install 'spo_ext[postgresql]'"
            ) from error
        if self._sqlite:
            sa.event.listen(self._engine, "connect", self._set_up_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._writer = self._engine.execution_options(**{_WRITE: True})

    def open(
        self,
        migrate: Callable[[sa.Connection], None],
        check: Callable[[sa.Connection], None],
    ) -> None:
        """Brings the database to the current schema or, where it cannot be written, checks it.

        Raises PermissionError if it can be neither written nor read.
        """
        file = _file_of(self.url) if self._sqlite else ""
        # Of a file with a write-ahead log, SQLite says so with the first change only.
        asked = self.url.query.get("mode") == "ro" or "immutable" in self.url.query
        reason = "its URL says so" if asked else "no access to write to the file"
        if not os.path.isfile(file) or (_may_write(file) and not asked):
            try:
                self.writing(migrate)
                return
            except OperationalError as error:
                code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
                if code not in _NO_ACCESS or not os.path.isfile(file):
                    raise
                reason = str(error.orig)
        self._engine.dispose()
        self._reader = _Reader(self.url, file, self.shown, reason)
        self._connect()
        self.reading(check)

    def require_writable(self, who: str) -> None:
        """Raises PermissionError, in the name of `who`, if nothing can be written."""
        if self._reader is not None:
            raise PermissionError(
                f"{who}: the store must be one that can be written, and so must its folder, got "
                f"{self.shown!r}, which can only be read: {self._reader.reason}"
            )

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
        if self._reader is not None and self._reader.outdated():
            self._engine.dispose()  # whose connections remember pages of before
            self._reader.choose()
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Alone among writers; all or nothing, and durable when it returns."""
        self.require_writable("TrajectoryStore")
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
            except DBAPIError as error:
                if self._reader is not None and self._reader.outdated():
                    continue
                if not isinstance(error, OperationalError | InterfaceError):
                    raise
                now, bound_s = time.monotonic(), self._patience_s(error)
                if bound_s and not away_since:
                    words = visible(hide_passwords(" ".join(str(error.orig).split())))
                    logger.warning(
                        "%s: %s; trying again for up to %g s", self.shown, words, bound_s
                    )
                    away_since = now
                left_s = away_since + bound_s - now
                if left_s <= 0:
                    raise
                time.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                if self._reader is not None and self._reader.outdated():
                    continue  # a writer came meanwhile: what was found may be of two states
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
            patience_s = self._retry_s if self._reached else min(self._retry_s, self._timeout_s)
            return patience_s if any(word in words for word in _OF_SQLITE) else 0.0
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
        if self._reader is not None:
            return
        wal = self._use_wal(connection)
        # A commit survives a power cut too, which costs less than a trajectory. A journal that is
        # deleted is gone for good only when its folder is on the disk, as EXTRA has it.
        connection.execute(f"PRAGMA synchronous = {'FULL' if wal else 'EXTRA'}")

    def _use_wal(self, connection: Any) -> bool:
        """Whether this connection has a write-ahead log, as all have where it is possible.

        Some network mounts have no shared memory. The old journal is as safe there, but readers and
        writers wait for one another.
        """
        deadline = time.monotonic() + self._timeout_s
        try:
            connection.execute("PRAGMA journal_mode").fetchone()
        except sqlite3.OperationalError as error:
            file = _file_of(self.url)
            unread = error.sqlite_errorcode & 0xFF in (
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_IOERR,
            )
            if not unread or not all(map(_may_write, (file, os.path.dirname(file)))):
                raise
            # A file that got its log elsewhere. Alone, which SQLite makes sure of, a process needs
            # no shared memory to fold the log into the file.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA locking_mode = NORMAL")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # Lets go of it.
            self._wal = False
        while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            if self._wal is None:
                self._wal = _has_shared_memory(connection)
                if not self._wal:
                    words = "%s: its file system has no write-ahead log: readers and writers wait"
                    logger.info(words, self.shown)
            if not self._wal:
                return False
            # The switch does not wait for another process that is switching too.
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                self._wal = mode == "wal"
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        return True


class _Reader:
    """Connections to a file of SQLite that cannot be written.

    A file with a write-ahead log can be read as usual where the log and its index are, or can be
    made, beside it. On a read-only file system without a log the file is taken as one that does
    not change; `outdated` says if it did.
    """

    def __init__(self, url: URL, file: str, shown: str, reason: str) -> None:
        self._file, self._shown, self.reason = file, shown, reason
        self._given = {
            name: url.query[name] for name in ("vfs", "nolock", "immutable") if name in url.query
        }
        self.choose()

    def choose(self) -> None:
        """Raises PermissionError if the file cannot be read either."""
        self._seen: tuple[int, ...] | None = None
        state = self._state()
        self._options: dict[str, Any] = {**self._given, "mode": "ro"}
        try:
            self._try()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _NO_ACCESS:
                raise
        if state[-1]:
            raise PermissionError(
                f"TrajectoryStore: {self._shown!r} has a write-ahead log ({self._file}-wal) that "
                "cannot be read here: copy both files to a folder that can be written"
            )
        self._options["immutable"] = "1"
        self._try()
        self._seen = state

    def _try(self) -> None:
        with closing(self.connect()) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def connect(self) -> sqlite3.Connection:
        uri = f"file:{quote(self._file)}?{urlencode(self._options)}"
        return sqlite3.connect(uri, uri=True, check_same_thread=False)

    def outdated(self) -> bool:
        return self._seen is not None and self._state() != self._seen

    def _state(self) -> tuple[int, ...]:
        about = os.stat(self._file)
        log = 0
        with suppress(FileNotFoundError):
            log = os.stat(f"{self._file}-wal").st_size
        return about.st_ino, about.st_mtime_ns, about.st_size, log


def _may_write(path: str) -> bool:
    return os.access(path, os.W_OK)


def _file_of(url: URL) -> str:
    """The path of a file of SQLite, whose URL may hold one of SQLite's own."""
    name = url.database or ""
    path = name.removeprefix("file:")
    return path if path == name or os.path.isfile(path) else unquote(path)


def _has_shared_memory(connection: Any) -> bool:
    """Whether a write-ahead log works in the folder of this database, tried on a file of its own.

    The switch itself would mark the database as one with a log even where that cannot be opened.
    """
    file = next(row[2] for row in connection.execute("PRAGMA database_list") if row[1] == "main")
    trial = os.path.join(os.path.dirname(file), f".spo-{uuid4().hex}")
    try:
        with closing(sqlite3.connect(trial)) as other:
            other.execute("PRAGMA journal_mode = WAL")
            other.execute("CREATE TABLE trial (x)")
        return True
    except sqlite3.OperationalError:
        return False
    finally:
        for end in ("", "-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                os.unlink(trial + end)


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that wants to write later fails at once if another one wrote between.
    write = connection.get_execution_options().get(_WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _parse(target: str | os.PathLike[str]) -> URL:
    text = os.fspath(target)
    if "://" not in text:
        if text in ("", ":memory:") or _KEYWORDS.search(text):
            raise ValueError(
                f"TrajectoryStore: target must be a file or URL, got {hide_passwords(text)!r}"
            )
        if not os.path.isdir(os.path.dirname(os.path.abspath(text))):
            raise ValueError(f"TrajectoryStore: target must be in an existing folder, got {text!r}")
        return URL.create("sqlite", database=os.path.abspath(text))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        raise ValueError("TrajectoryStore: target must be a file or a valid URL") from None
    if url.get_backend_name() == "postgresql":
        # What follows an @ would be looked for as a host, and named in the error.
        if "@" in (url.host or "") or re.search(":.*@", url.database or ""):
            raise ValueError(
                "TrajectoryStore: user and password of a URL must be percent-encoded (@ as %40, "
                f"/ as %2F), got {hide_passwords(text)!r}"
            )
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        raise ValueError(
            "TrajectoryStore: target must be a file, sqlite:///FILE or postgresql://..., "
            f"got {hide_passwords(url.render_as_string(hide_password=True))!r}"
        )
    return url
