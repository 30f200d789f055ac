"""What the subcommands of `spo` share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import unquote

from spo_ext.shown import hide_passwords, say, visible


class Parser(argparse.ArgumentParser):
    """Its errors repeat what was given, which may be the URL of a database."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(hide_passwords(message)))


if TYPE_CHECKING:
    # Private in argparse, but the only name of what add_subparsers returns.
    Subparsers = argparse._SubParsersAction[Parser]


def fail(error: object, status: int = 1) -> int:
    """Says what went wrong on the standard error; returns the exit status.

    Of an error of SQLAlchemy only what the database said, without the statement and its rows.
    """
    say(f"spo: error: {getattr(error, 'orig', None) or error}", sys.stderr)
    return status


def require_store(where: str) -> None:
    """Raises FileNotFoundError: where prompts are read, a new and empty store must not be made."""
    scheme, separator, rest = where.partition("://")
    path = rest.removeprefix("/").partition("?")[0] if separator else where
    if path.startswith("file:"):
        path = unquote(path.removeprefix("file:"))
    if (not separator or scheme.startswith("sqlite")) and not Path(path).is_file():
        raise FileNotFoundError(f"there is no store {where}: spo import makes one")


def import_from_here() -> None:
    """Lets modules of the user, such as reward functions, lie in the current folder.

    The path of a console script begins with the script's own folder instead.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def api_key(name: str | None) -> str | None:
    """Returns what the environment has under the name of --api-key-from. Raises ValueError."""
    if name is not None and name not in os.environ:
        raise ValueError(f"--api-key-from must name a variable of the environment, got {name}")
    return None if name is None else os.environ[name]


def failures() -> tuple[type[BaseException], ...]:
    """What stores, models, servers, rewards and files may raise through no fault of the program."""
    usual = (OSError, ValueError, ImportError, RuntimeError)
    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return usual
    return (*usual, SQLAlchemyError)
