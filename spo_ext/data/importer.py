"""Files into the store: what can be read is stored, what cannot is reported with file and row."""

from __future__ import annotations

import copy
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from spo_ext.checks import check_one_of, number
from spo_ext.data.contamination import NGRAM, Contamination
from spo_ext.data.formats import PARSERS, parse_row
from spo_ext.data.records import (
    MESSAGES,
    Completion,
    Defaults,
    Record,
    RowError,
    is_plain,
    join,
    shown,
    whole_number,
)
from spo_ext.data.tokens import Tokenizer
from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore
from spo_ext.store.loading import Loaded, Ready, load, other_columns
from spo_ext.store.records import Split

Numbered = tuple[int, "dict[str, Any] | RowError"]
_ROWS = 64  # of Parquet at a time: a row may have megabytes of tests
_CHAT = ("prompt", "completion", "messages", "chosen", "rejected")


def read_rows(path: Path) -> Iterator[Numbered]:
    """Line or row numbers from 1 on, each with its row or with why it is none.

    Raises OSError if the file cannot be opened, ValueError if its kind is unknown, ImportError for
    Parquet without pyarrow.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_lines(path)
    elif path.suffix == ".json":
        yield from _read_whole(path)
    else:
        raise ValueError(f"{path}: a file must end in .jsonl, .jsonl.gz, .json or .parquet")


def need_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises ImportError that says how to get them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"Parquet needs pyarrow ({error}): pip install 'spo_ext[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _read_lines(path: Path) -> Iterator[Numbered]:
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):  # noqa: B007
                if line.strip():
                    yield number, _row(line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield number + 1, RowError(f"the file cannot be read from here on: {error}")


def _read_whole(path: Path) -> Iterator[Numbered]:
    """One object, as agents write their logs, or a list of objects."""
    try:
        found = json.loads(path.read_bytes(), parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        yield 1, RowError(f"no JSON: {error}")
        return
    for place, row in enumerate(found if isinstance(found, list) else [found], start=1):
        wrong = RowError(f"a row must be an object, got {shown(row)}")
        yield place, row if isinstance(row, dict) else wrong


def _row(line: bytes) -> dict[str, Any] | RowError:
    try:
        row = json.loads(line, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        return RowError(f"no JSON: {error}")
    return row if isinstance(row, dict) else RowError(f"a row must be an object, got {shown(row)}")


def _read_parquet(path: Path) -> Iterator[Numbered]:
    pyarrow, parquet = need_pyarrow()
    number = 0
    with open(path, "rb") as handle:
        try:
            with parquet.ParquetFile(handle) as file:
                for batch in file.iter_batches(batch_size=_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        row.update({name: _without_none(row.get(name)) for name in _CHAT})
                        yield number, row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            yield number + 1, RowError(f"the file cannot be read from here on: {error}")


def _without_none(messages: Any) -> Any:
    """A column of messages has every key of any of them; None stands where there was none."""
    if not isinstance(messages, list):
        return messages
    return [
        {key: value for key, value in item.items() if value is not None}
        if isinstance(item, dict)
        else item
        for item in messages
    ]


_BATCH_ROWS = 256
_BATCH_BYTES = 32 << 20
# Raised by parsers, and by the store's records for numbers or nesting beyond all measure.
_OF_A_ROW = (ValueError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Settings:
    """How rows are read.

    Args:
        format: a name of PARSERS, or auto to tell it from each row's columns.
        split, origin: of all rows; None takes the row's, else train and who the data set names.
        tokenizer: turns texts into ids where the row has none; without it, a row of TRL's format
            needs ids, and solutions of the other data sets are left out.
        strict: a file with a bad row is not stored at all.
        overlap: report a prompt if another split has this share of its runs of 13 words.
        without_columns: fields of rows that are not kept with the prompt.
    """

    format: str = "auto"
    split: Split | None = None
    origin: Origin | None = None
    tokenizer: Tokenizer | None = None
    strict: bool = False
    overlap: float = 0.5
    without_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("Settings", "format", self.format, ("auto", *PARSERS))
        if self.split is not None:
            check_one_of("Settings", "split", self.split, get_args(Split))
        number("Settings", "overlap", self.overlap, above=0.0, at_most=1.0)


@dataclass(frozen=True)
class Problem:
    """Of one row. bad and contaminated (in another split already) are not stored, note is."""

    kind: str
    file: Path
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.kind}: {self.reason}"


class StrictError(ValueError):
    """A strict import met a bad row; nothing of its file is stored."""


@dataclass
class Summary:
    """Rows read, problems by kind, solutions left out, and what the store took.

    untokenised: without token ids; foreign: in other languages than Python 3. without: rows that
    had each of the columns that the user left out.
    """

    rows: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    untokenised: int = 0
    foreign: int = 0
    loaded: Loaded = field(default_factory=Loaded)
    without: Counter[str] = field(default_factory=Counter)

    @property
    def refused(self) -> int:
        """Rows that are not stored."""
        return self.problems["bad"] + self.problems["contaminated"]

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows: {self.problems['bad']} bad, {self.problems['contaminated']} "
            f"contaminated, {self.problems['note']} notes",
            str(self.loaded),
        ]
        if self.untokenised:
            lines.append(f"{self.untokenised} solutions left out: token ids need a tokenizer")
        if self.foreign:
            lines.append(f"{self.foreign} solutions left out: other languages than Python 3")
        if self.without:
            counts = ", ".join(f"{name} ({count} rows)" for name, count in self.without.items())
            lines.append(f"columns left out: {counts}")
        return "\n".join(lines)


class Importer:
    """Imports files into a store; summary says what became of them.

    Args:
        report: called with each Problem as it is found.

    Importing a file again changes nothing, so an import that was killed is simply repeated.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        settings: Settings,
        report: Callable[[Problem], None] = lambda problem: None,
    ) -> None:
        self._store, self._settings, self._report = store, settings, report
        self._defaults = Defaults(settings.split, settings.origin, settings.without_columns)
        self._contamination = Contamination(store)
        self.summary = Summary(without=Counter(dict.fromkeys(settings.without_columns, 0)))

    def import_file(self, path: str | Path) -> None:
        """A batch of rows in one transaction each.

        Raises OSError or ValueError for a file that cannot be opened, ImportError if a package is
        missing, StrictError for a bad row when strict.
        """
        path = Path(path)
        if self._settings.strict:
            self._rehearse(path)
        batch: list[tuple[int, Ready]] = []
        for numbered in self._ready(path):
            batch.append(numbered)
            if len(batch) >= _BATCH_ROWS or sum(item.size for _, item in batch) >= _BATCH_BYTES:
                self._load(path, batch)
                batch = []
        self._load(path, batch)

    def _load(self, path: Path, numbered: list[tuple[int, Ready]]) -> None:
        batch = [ready for _, ready in numbered]
        for place, names in other_columns(self._store, batch).items():
            reason = (
                f"the same prompt is stored with other columns ({', '.join(names)}), and this is "
                f"another one, in another group: --without-columns {' '.join(names)}"
            )
            self._say("note", path, numbered[place][0], reason)
        self.summary.loaded += load(self._store, batch)
        self._contamination.stored()

    def _rehearse(self, path: Path) -> None:
        """Reads the file without storing; reports all of its bad rows, then raises."""
        rehearsal = copy.copy(self)
        rehearsal.summary = Summary()
        rehearsal._report = self._report_refused
        for _ in rehearsal._ready(path):
            self._contamination.stored()
        if rehearsal.summary.refused:
            self.summary.rows += rehearsal.summary.rows
            self.summary.problems += rehearsal.summary.problems
            raise StrictError(f"{path}: {rehearsal.summary.refused} bad rows; nothing is stored")

    def _report_refused(self, problem: Problem) -> None:
        if problem.kind != "note":
            self._report(problem)

    def _ready(self, path: Path) -> Iterator[tuple[int, Ready]]:
        for number_of_row, row in read_rows(path):
            self.summary.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                record = parse_row(row, self._settings.format, self._defaults)
                prompt, trajectories = self._tokenised(record)
                split = self._contamination.exact(prompt)
                ready = Ready.of(prompt, trajectories)
            except _OF_A_ROW as error:
                self._say("bad", path, number_of_row, str(error))
                continue
            if split is not None:
                reason = f"the prompt is in the split {split} already"
                self._say("contaminated", path, number_of_row, reason)
                continue
            self._note(path, number_of_row, record)
            self.summary.foreign += record.foreign
            self.summary.without.update(record.without)
            self._contamination.add(prompt)
            yield number_of_row, ready

    def _note(self, path: Path, row: int, record: Record) -> None:
        for note in record.notes:
            self._say("note", path, row, note)
        share, split = self._contamination.overlap(record.prompt)
        if share >= self._settings.overlap:
            reason = f"{share:.0%} of its runs of {NGRAM} words are in prompts of the split {split}"
            self._say("note", path, row, reason)

    def _tokenised(self, record: Record) -> tuple[Prompt, list[Trajectory]]:
        prompt, tokenizer = record.prompt, self._settings.tokenizer
        if prompt.token_ids is None and tokenizer is not None:
            ids = tokenizer.prompt_ids(prompt.content, prompt.template)
            prompt = replace(prompt, token_ids=ids)
        trajectories = []
        for item in record.completions:
            trajectory = self._trajectory(prompt, item)
            if trajectory is None:
                self.summary.untokenised += 1
            else:
                trajectories.append(trajectory)
        return prompt, trajectories

    def _trajectory(self, prompt: Prompt, item: Completion) -> Trajectory | None:
        ids, tokenizer = item.token_ids, self._settings.tokenizer
        turns, info = item.turns, item.info
        if ids is None and turns is None and tokenizer is None:
            if item.solution:
                return None
            raise RowError("the completion has no completion_ids, and no tokenizer is given")
        if ids is None and turns is None and not isinstance(item.content, str):
            assert tokenizer is not None and item.content is not None
            turns = tokenizer.turns(
                prompt.content,
                item.content,
                item.finish,
                prompt.token_ids,
                prompt.template,
                item.turn_rewards,
            )
        written: dict[str, Any]
        if turns is not None:
            written = join(prompt.token_ids or (), turns)
        else:
            if ids is None:
                assert tokenizer is not None and isinstance(item.content, str)
                ids = tokenizer.completion_ids(
                    prompt.content, item.content, item.finish, prompt.token_ids
                )
            names = ("completion_mask", "contexts", "token_rewards", "behaviour_logprobs")
            written = {"token_ids": ids, **{name: getattr(item, name) for name in names}}
        if isinstance(item.content, list) and not is_plain(item.content) and not info:
            info = {MESSAGES: item.content}  # which no tokens say in full
        return Trajectory(
            1,  # load puts the prompt's id here
            reward=item.reward,
            origin=item.origin,
            finish=item.finish,
            reason=item.reason,
            temperature=item.temperature,
            top_p=item.top_p,
            draw=item.draw,
            info=info,
            **written,
        )

    def _say(self, kind: str, path: Path, row: int, reason: str) -> None:
        self.summary.problems[kind] += 1
        line = " ".join(reason.split())  # a reason may quote a whole field
        self._report(Problem(kind, path, row, line if len(line) <= 300 else line[:297] + "..."))
