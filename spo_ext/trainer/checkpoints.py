"""Checkpoints that are complete or not there.

transformers.Trainer writes the files of `checkpoint-N` in place, so a process killed meanwhile
leaves a torn one that looks like any other. Here a checkpoint counts when it has a mark: the file
spo_state.json, written last, flushed and renamed into place. For one save:

    begin(checkpoint)          # a mark of an earlier run does not vouch for what follows
    ... the Trainer writes ...
    mark_complete(checkpoint, state)
    ... only now may older checkpoints be deleted ...
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_ext.durable import fsync, fsync_tree, write_text

logger = logging.getLogger(__name__)

MARK = "spo_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # as of transformers.Trainer
_TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last


class CheckpointError(ValueError):
    """A checkpoint is torn or was never marked complete; says which file and how."""


def begin(checkpoint: Path) -> None:
    """Removes the mark of a checkpoint that is about to be written over, if there is one."""
    mark = checkpoint / MARK
    if mark.exists():
        mark.unlink()
        fsync(checkpoint)


def mark_complete(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Flushes every file of a checkpoint, then marks it complete.

    Args:
        checkpoint: a folder whose files are all written, by all processes.
        state: for read_state; what JSON can hold (global_step, run, sampler, settings).

    Raises:
        ValueError: if state is not JSON or there is no file to vouch for; nothing is marked then.
    """
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and not path.name.startswith(MARK)
    }
    if not files:
        raise ValueError(f"mark_complete: checkpoint must have files, got {str(checkpoint)!r}")
    try:
        text = json.dumps({"state": dict(state), "files": files}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"mark_complete: state must be JSON: {error}") from None
    fsync_tree(checkpoint)
    write_text(checkpoint / MARK, text)
    fsync(checkpoint.parent)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that a checkpoint was marked with.

    Raises CheckpointError if it has no valid mark, or its files are not those of the mark.
    """
    mark = checkpoint / MARK
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
        state, files = dict(content["state"]), dict(content["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} was not written to its end: no {MARK}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{mark} is not a mark: {error!r}") from None
    for name, size in files.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise CheckpointError(f"{path} is missing")
        if found != size:
            raise CheckpointError(f"{path} must have {size} bytes, got {found}")
    return state


def last_complete(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint-N of a folder, or None."""
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        if _is_complete(checkpoint):
            return checkpoint
    return None


def remove_torn(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Deletes the checkpoints that a killed process left torn, so that the Trainer's rotation and
    get_last_checkpoint do not count them.

    Deleted is what has no valid mark and is newer than last_complete. Without any complete
    checkpoint, what the Trainer wrote to its end and nobody marked stays: it may be another
    program's. Called before training, by one process.

    Returns what was deleted.
    """
    output_dir = Path(output_dir)
    newest = last_complete(output_dir)
    checkpoints = _checkpoints(output_dir)
    if newest is not None:
        torn = checkpoints[checkpoints.index(newest) + 1 :]
    else:
        torn = [
            item
            for item in checkpoints
            if (item / MARK).exists() or not (item / _TRAINER_STATE).is_file()
        ]
    for checkpoint in torn:
        logger.warning("deleted %s, which was not written to its end", checkpoint)
        shutil.rmtree(checkpoint)
    return torn


def _checkpoints(output_dir: Path) -> list[Path]:
    """By step, the newest last."""
    if not output_dir.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    ]
    return [path for _, path in sorted(found)]


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except CheckpointError as error:
        logger.info("passed over: %s", error)
        return False
    return True
