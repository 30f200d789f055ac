"""A PostgreSQL server of the tests' own, on loopback, in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import free_port

_USERS = ("postgres", "nobody")  # the server refuses to run as root


def missing() -> str | None:
    """Why there can be no server, or None."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"PostgreSQL's driver is missing ({error}): pip install 'psycopg[binary]'"
    if _binaries() is None:
        return "PostgreSQL is missing: apt-get install postgresql"
    if os.geteuid() == 0 and (_user() is None or shutil.which("setpriv") is None):
        return f"as root, PostgreSQL needs setpriv and one of the users {', '.join(_USERS)}"
    return None


class Server:
    """A server whose files lie in the empty `folder`; url is without a database."""

    def __init__(self, folder: Path) -> None:
        self._binaries, self._folder = _binaries(), folder
        self._prefix: list[str] = []
        user = "postgres"
        account = _user()
        if os.geteuid() == 0 and account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
            self._prefix = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}"]
            self._prefix += ["--clear-groups"]
        self._port = free_port()
        self.url = f"postgresql://{user}@127.0.0.1:{self._port}"
        init = ("-D", "data", "-U", user, "--auth=trust", "--encoding=UTF8", "--no-sync")
        self._run("initdb", *init)

    def start(self) -> None:
        # fsync: the machine does not lose power during a test.
        options = f"-h 127.0.0.1 -p {self._port} -c unix_socket_directories='' -c fsync=off"
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-D", "data", "-m", mode, "stop")

    def _run(self, program: str, *arguments: str) -> None:
        # Its folder may lie below one that the other user cannot enter: so it starts inside.
        assert self._binaries is not None, missing()
        command = [*self._prefix, str(self._binaries / program), *arguments]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True)
        if done.returncode:
            log = self._folder / "log"
            said = log.read_text() if log.exists() else ""
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}{said}")


@contextmanager
def server() -> Iterator[Server]:
    """A server in a temporary folder, not below pytest's: only their owner may enter those, which
    as root the server is not."""
    with tempfile.TemporaryDirectory() as folder:
        made = Server(Path(folder))
        made.start()
        try:
            yield made
        finally:
            made.stop()


def new_schema(url: str) -> str:
    """A URL whose tables are apart from all others, and cheaper than those of a new database."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{url}/postgres?options=-csearch_path%3D{name}"


def _binaries() -> Path | None:
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").exists() and (place / "pg_ctl").exists():
            return place
    return None


def _user() -> pwd.struct_passwd | None:
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return next((known[name] for name in _USERS if name in known), None)
