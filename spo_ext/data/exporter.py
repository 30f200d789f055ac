"""The store as a file of rows in TRL's conventions."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from spo_ext.data.readers import need_pyarrow
from spo_ext.data.tokens import Tokenizer
from spo_ext.data.trl import json_line, trl_row
from spo_ext.store import TrajectoryStore
from spo_ext.store.checks import number
from spo_ext.store.records import Split, StoredPrompt

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
    min_reward, only those with this reward or more.

    Raises ValueError for an unknown kind of file, a min_reward that is not finite, or for Parquet
    if prompts are partly text and partly messages, or messages hold more than role and content;
    ImportError without pyarrow.
    """
    out = Path(out)
    if min_reward is not None:
        number("export_rows", "min_reward", min_reward)
    rows = _rows(store, split, run, tokenizer, min_reward)
    if out.suffix == ".parquet":
        chat = _prompts_are_messages(store, split)
        with _replaced(out) as path:
            return _write_parquet(rows, path, chat)
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
) -> Iterator[dict[str, Any]]:
    for prompt in store.prompts(split):
        empty = True
        for item in store.trajectories(prompt_id=prompt.id, run=run):
            empty = False
            if min_reward is not None and item.reward < min_reward:
                continue
            ids = tuple(item.token_ids)
            completion = tokenizer.completion(prompt.content, ids) if tokenizer else None
            yield trl_row(prompt, item, completion)
        if empty and run is None and min_reward is None:
            yield trl_row(prompt, None, None)


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


def _prompts_are_messages(store: TrajectoryStore, split: Split | None) -> bool:
    kinds = {_is_plain_chat(prompt) for prompt in store.prompts(split)}
    if len(kinds) > 1:
        raise ValueError(
            "a Parquet column cannot hold prompts that are text and prompts that are messages: "
            "export to JSONL"
        )
    return True in kinds


def _is_plain_chat(prompt: StoredPrompt) -> bool:
    if isinstance(prompt.content, str):
        return False
    for message in prompt.content:
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise ValueError(
                "a Parquet column of messages holds role and content as text, and prompt "
                f"{prompt.id} has something else: export to JSONL"
            )
    return True


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path, chat: bool) -> int:
    pyarrow, parquet = need_pyarrow()
    text = pyarrow.string()
    message = pyarrow.struct([("role", text), ("content", text)])
    words, ids = pyarrow.list_(message) if chat else text, pyarrow.list_(pyarrow.int64())
    columns = [("prompt", words), ("prompt_ids", ids), ("completion", words)]
    columns += [("completion_ids", ids), ("reward", pyarrow.float64())]
    columns += [(name, text) for name in ("tests", "answer", "split", "spo")]
    schema, count = pyarrow.schema(columns), 0
    with parquet.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _ROWS:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                count, batch = count + len(batch), []
        writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
    return count + len(batch)
