"""The store as a file of rows in TRL's conventions."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from spo_ext.checks import number
from spo_ext.data.importer import need_pyarrow
from spo_ext.data.records import MESSAGES, Content
from spo_ext.data.tokens import Tokenizer
from spo_ext.data.trl import json_line, trl_row
from spo_ext.store import TrajectoryStore
from spo_ext.store.records import Split, StoredPrompt, StoredTrajectory

_ROWS = 256  # in memory, and in a row group of Parquet


def export_rows(
    store: TrajectoryStore,
    out: str | Path,
    *,
    split: Split | None = None,
    run: str | None = None,
    tokenizer: Tokenizer | None = None,
    min_reward: float | None = None,
) -> int:
    """Writes a row per trajectory, and one per prompt without any; returns how many.

    The file appears when it is complete. Without a tokenizer rows have completion_ids but no
    completion. With a run, only its trajectories are written, and no prompts without; with
    min_reward, only those with this reward or more. Columns of prompts are columns of the file; in
    Parquet those whose values are not all text, all numbers of a kind, all true or false, or all
    lists of such, are JSON in text, and `spo` names them.

    Raises ValueError for an unknown kind of file, a min_reward that is not finite, or for Parquet
    if prompts are partly text and partly messages, or messages hold more than role and content;
    ImportError without pyarrow.
    """
    out = Path(out)
    if min_reward is not None:
        number("export_rows", "min_reward", min_reward)
    if out.suffix == ".parquet":
        need_pyarrow()
        table = _Table.of(store.prompts(split))
        rows = _rows(store, split, run, tokenizer, min_reward, table.as_text)
        with _replaced(out) as path:
            return _write_parquet(rows, path, table)
    rows = _rows(store, split, run, tokenizer, min_reward)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{out}: a file must end in .jsonl, .jsonl.gz or .parquet")
    with _replaced(out) as path, _open(path, out.suffix == ".gz") as file:
        count = 0
        for count, row in enumerate(rows, start=1):  # noqa: B007
            file.write(json_line(row))
    return count


def _rows(
    store: TrajectoryStore,
    split: Split | None,
    run: str | None,
    tokenizer: Tokenizer | None,
    min_reward: float | None,
    as_text: frozenset[str] = frozenset(),
) -> Iterator[dict[str, Any]]:
    for prompt in store.prompts(split):
        empty = True
        for item in store.trajectories(prompt_id=prompt.id, run=run):
            empty = False
            if min_reward is not None and item.reward < min_reward:
                continue
            yield trl_row(prompt, item, _completion(tokenizer, prompt, item), as_text)
        if empty and run is None and min_reward is None:
            yield trl_row(prompt, None, None, as_text)


def _completion(
    tokenizer: Tokenizer | None, prompt: StoredPrompt, item: StoredTrajectory
) -> Content | None:
    """Messages as they came; else what the tokens say, unless they are of several turns."""
    if isinstance(item.info, dict) and MESSAGES in item.info:
        given: Content = item.info[MESSAGES]
        return given
    if tokenizer is None or item.completion_mask is not None or item.contexts is not None:
        return None
    before = prompt.token_ids
    if before is None:
        before = tokenizer.prompt_ids(prompt.content, prompt.template)
    return tokenizer.completion(prompt.content, tuple(item.token_ids), before)


def _open(path: Path, packed: bool) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "wb")) if packed else open(path, "wb")


@contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """A file beside `out` that takes its place at the end, or goes away."""
    path = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield path
        os.replace(path, out)
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Table:
    """What the rows of a Parquet file have in common: whether prompts are messages, and the kinds
    of columns (see `_kind`), "" for one that is written as JSON in text."""

    chat: bool
    kinds: dict[str, str]

    @classmethod
    def of(cls, prompts: Iterable[StoredPrompt]) -> _Table:
        """Raises ValueError for prompts that one file cannot hold."""
        chats: set[bool] = set()
        kinds: dict[str, str] = {}
        for prompt in prompts:
            chats.add(_is_plain_chat(prompt))
            for name, value in (prompt.columns or {}).items():
                kinds[name] = _both(kinds.get(name, _kind(value)), _kind(value))
        if len(chats) > 1:
            raise ValueError(
                "a Parquet column cannot hold prompts that are text and prompts that are messages: "
                "export to JSONL"
            )
        return cls(True in chats, kinds)

    @property
    def as_text(self) -> frozenset[str]:
        return frozenset(name for name, kind in self.kinds.items() if kind in ("", "[]"))


_TYPES = {bool: "bool_", int: "int64", float: "float64", str: "string"}


def _kind(value: Any) -> str:
    """The name of a plain type of Parquet, in brackets of a list of it, "[]" of a list of nothing,
    "" of all else."""
    if isinstance(value, list):
        kinds = {_kind(item) for item in value}
        inner = kinds.pop() if kinds else ""
        return "" if kinds or inner.startswith("[") or (value and not inner) else f"[{inner}]"
    if type(value) is int and not -(2**63) <= value < 2**63:
        return ""
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return ""
    return _TYPES.get(type(value), "")


def _is_plain_chat(prompt: StoredPrompt) -> bool:
    if isinstance(prompt.content, str):
        return False
    if not _fits(prompt.content):
        raise ValueError(
            "a Parquet column of messages holds role and content as text, and prompt "
            f"{prompt.id} has something else: export to JSONL"
        )
    return True


def _fits(messages: Sequence[Mapping[str, Any]] | None) -> bool:
    return all(
        set(message) == {"role", "content"} and isinstance(message["content"], str)
        for message in messages or ()
    )


def _both(one: str, other: str) -> str:
    """The kind that values of these two have in common."""
    lists = one.startswith("[") and other.startswith("[")
    if one == other or (lists and other == "[]"):
        return one
    return other if lists and one == "[]" else ""


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path, table: _Table) -> int:
    pyarrow, parquet = need_pyarrow()
    text = pyarrow.string()
    message = pyarrow.struct([("role", text), ("content", text)])
    words, ids = pyarrow.list_(message) if table.chat else text, pyarrow.list_(pyarrow.int64())
    columns = [("prompt", words), ("prompt_ids", ids), ("completion", words)]
    columns += [("completion_ids", ids), ("completion_mask", ids), ("reward", pyarrow.float64())]
    columns += [(name, text) for name in ("tests", "answer", "split", "spo")]
    for name, kind in table.kinds.items():
        plain = getattr(pyarrow, kind.strip("[]") or "string")()
        is_list = kind.startswith("[") and name not in table.as_text
        columns.append((name, pyarrow.list_(plain) if is_list else plain))
    schema, count = pyarrow.schema(columns), 0
    with parquet.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            if table.chat and not _fits(row["completion"]):
                row["completion"] = None  # It stands in `spo`, and its token ids beside it.
            batch.append(row)
            if len(batch) == _ROWS:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                count, batch = count + len(batch), []
        writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
    return count + len(batch)
