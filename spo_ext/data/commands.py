"""`spo import` and `spo export`: their arguments, and what they print."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from spo_ext.commands import fail, require_store
from spo_ext.rollout.commands import add_environment, check_environment
from spo_ext.shown import say

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers
    from spo_ext.data.importer import Problem, Settings
    from spo_ext.store import Origin, TrajectoryStore
    from spo_ext.store.records import Split

# Those of formats.PARSERS, which need packages that the other commands do not.
_FORMATS = tuple(
    "auto trl verl gsm8k math code_contests taco apps mbpp mbppplus humaneval humanevalplus "
    "evalplus livecodebench verifiers atif".split()
)
_SPLITS: tuple[Split, ...] = ("train", "dev", "test")
_ORIGINS = "human[:NAME], model:NAME or policy:RUN:VERSION"


def add_import(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "import",
        help="prompts, tests and trajectories from JSONL or Parquet into a store",
        description="Reads .jsonl, .jsonl.gz, .json and .parquet, or the prompts of an "
        "environment. Bad rows go to the standard error and the rest is stored; the exit status is "
        "then 1. To repeat an import changes nothing.",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    add_environment(parser)
    _add_common(parser)
    parser.add_argument("--format", choices=_FORMATS, default="auto", help="default: by columns")
    parser.add_argument(
        "--split", choices=_SPLITS, help="of all rows; default: the row's own, else train"
    )
    parser.add_argument(
        "--origin",
        metavar="WHO",
        help=f"{_ORIGINS}; default: what the row says, human for solutions of a data set, "
        "else model:unknown",
    )
    parser.add_argument(
        "--without-columns",
        nargs="+",
        default=(),
        metavar="NAME",
        help="leave these fields of rows out, such as an id that differs from completion to "
        "completion; others that the format does not use are kept for reward functions",
    )
    parser.add_argument("--strict", action="store_true", help="store no file that has a bad row")
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="report prompts of which another split has this share (default: 0.5)",
    )
    parser.set_defaults(run=_import, error=parser.error)


def add_export(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="trajectories of a store as JSONL or Parquet rows for TRL",
        description="Writes prompt, completion, reward and the rest of what the store knows, so "
        "that spo import of the file gives the same.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help=".jsonl, .jsonl.gz or .parquet")
    _add_common(parser)
    parser.add_argument("--split", choices=_SPLITS, help="only its prompts")
    parser.add_argument("--only-run", metavar="RUN", help="only trajectories of this run")
    parser.add_argument(
        "--min-reward",
        type=float,
        metavar="REWARD",
        help="only trajectories with this reward or more: what to begin with by supervised "
        "training (examples/supervised_start.py)",
    )
    parser.set_defaults(run=_export, error=parser.error)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", required=True, metavar="WHERE", help="a file, or postgresql://user@host/database"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="of transformers: text to token ids, and back"
    )


def _import(options: argparse.Namespace) -> int:
    try:
        # Imported here: they need packages that the other commands do not.
        from spo_ext.data.importer import Importer, StrictError
        from spo_ext.store import TrajectoryStore
    except ImportError as error:
        return fail(error)
    try:
        if bool(options.files) == bool(options.environment):
            raise ValueError("FILE must be given, or --environment, and not both")
        check_environment(options)
        of_files = (
            options.format != "auto",
            options.origin,
            options.without_columns,
            options.strict,
        )
        if options.environment and any(of_files):
            names = "--format, --origin, --without-columns and --strict"
            raise ValueError(f"{names} must be left out with --environment: they are of files")
        settings = _settings(options)
    except ValueError as error:
        options.error(str(error))  # exits with status 2
    except ImportError as error:
        return fail(error)
    status = 0
    try:
        with TrajectoryStore(options.store) as store:
            store.require_writable("import")
            if options.environment:
                return _import_environment(store, options, settings)
            notes = _Notes()
            importer = Importer(store, settings, notes.report)
            for path in options.files:
                try:
                    importer.import_file(path)
                except StrictError as error:
                    status = fail(error)
                    break  # later files would be compared with prompts that are not stored
                except (OSError, ValueError, ImportError) as error:
                    status = fail(error)
            notes.count()
            say(importer.summary)
            return 1 if importer.summary.refused else status
    except KeyboardInterrupt:
        return fail("interrupted; what was stored stays, and may be imported again", status=130)
    except _failures() as error:
        return fail(error)


def _import_environment(
    store: TrajectoryStore, options: argparse.Namespace, settings: Settings
) -> int:
    """The prompts of each split that it has, or of --split."""
    from spo_ext.environments import fill, load_environment

    if settings.tokenizer is None:
        raise ValueError("--tokenizer must be given with --environment, got none")
    environment = load_environment(options.environment, options.environment_args)
    try:
        for split in _SPLITS if options.split is None else (options.split,):
            if options.split is not None or any(True for _ in environment.source.prompts(split)):
                ids = fill(store, environment, split, settings.tokenizer)
                say(f"stored {len(ids)} prompts of {options.environment}, split {split}")
    finally:
        environment.close()
    return 0


class _Notes:
    """Prints problems; of notes that differ in their numbers alone, the first, then how many."""

    def __init__(self) -> None:
        self._first: dict[str, Problem] = {}
        self._rows: Counter[str] = Counter()

    def report(self, problem: Problem) -> None:
        kind = f"{problem.file} {re.sub('[0-9]+', '0', problem.reason)}"
        if problem.kind == "note":
            self._rows[kind] += 1
            if self._first.setdefault(kind, problem) is not problem:
                return
        say(problem, sys.stderr, line=True)

    def count(self) -> None:
        for kind, first in self._first.items():
            more = self._rows[kind] - 1
            if more:
                words = f"{first.file}: note: {more} more rows like row {first.row}"
                say(f"{words}: {first.reason}", sys.stderr, line=True)


def _settings(options: argparse.Namespace) -> Settings:
    from spo_ext.data.importer import Settings
    from spo_ext.data.tokens import Tokenizer

    origin = None if options.origin is None else parse_origin(options.origin)
    tokenizer = None if options.tokenizer is None else Tokenizer(options.tokenizer)
    return Settings(
        options.format,
        options.split,
        origin,
        tokenizer,
        options.strict,
        options.overlap,
        tuple(options.without_columns),
    )


def parse_origin(words: str) -> Origin:
    """Raises ValueError."""
    from spo_ext.store import Origin

    kind, _, name = words.partition(":")
    if kind == "human":
        return Origin("human", run=name or None)
    if kind == "model" and name:
        return Origin("model", model=name)
    run, _, version = name.rpartition(":")
    if kind == "policy" and run and version.isdecimal():
        return Origin("policy", run=run, policy_version=int(version))
    raise ValueError(f"--origin must be {_ORIGINS}, got {words!r}")


def _export(options: argparse.Namespace) -> int:
    try:
        from spo_ext.data.exporter import export_rows
        from spo_ext.data.tokens import Tokenizer
        from spo_ext.store import TrajectoryStore

        require_store(options.store)
        tokenizer = None if options.tokenizer is None else Tokenizer(options.tokenizer)
        with TrajectoryStore(options.store) as store:
            count = export_rows(
                store,
                options.out,
                split=options.split,
                run=options.only_run,
                tokenizer=tokenizer,
                min_reward=options.min_reward,
            )
    except ImportError as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted", status=130)
    except _failures() as error:
        return fail(error)
    say(f"{count} rows in {options.out}")
    return 0


def _failures() -> tuple[type[BaseException], ...]:
    """What a store and a file may raise through no fault of the program."""
    from sqlalchemy.exc import SQLAlchemyError

    return (OSError, ValueError, ImportError, RuntimeError, SQLAlchemyError)
