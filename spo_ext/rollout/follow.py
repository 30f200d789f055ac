"""Policies that a trainer publishes into a directory: what is in it, and how producers read it.

DIR/version-0000012/    what save_pretrained wrote, under this name only when it is complete
DIR/latest              a line: version-0000012
DIR/finished            no version comes after the latest
DIR/run                 the run whose policies they are
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from spo_ext.checks import check_integer
from spo_ext.rollout.generation import derived_seed

LATEST, FINISHED, RUN = "latest", "finished", "run"
VERSION = re.compile(r"version-(\d+)")
_STAMP = re.compile(r"(?:version-)?(\d+)(?:\.\w+)?")


def version_name(version: int) -> str:
    """The name of a version's folder. Raises ValueError unless it is an integer >= 0."""
    check_integer("publish", "version", version, 0)
    return f"version-{version:07d}"


def version_of(stamp: str) -> int | None:
    """The version that a server says it has, by a version's name, with a mark of the publication
    behind a dot or without, or by its number; None for all else."""
    found = _STAMP.fullmatch(stamp)
    return None if found is None else int(found[1])


def check_run(directory: str | Path, run: str) -> None:
    """Raises ValueError if the directory has policies of another run."""
    try:
        owner = (Path(directory) / RUN).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return
    if owner != run:
        raise ValueError(
            f"{Path(directory) / RUN}: must name the run {run!r}, got {owner!r}: every run needs a "
            "folder of its own for its policies"
        )


def latest_policy(directory: str | Path) -> tuple[int, Path] | None:
    """Version and folder of the newest policy; None if none is published yet.

    Raises ValueError if DIR/latest does not name such a folder.
    """
    pointer = Path(directory) / LATEST
    before = None
    while True:
        try:
            name = pointer.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        found = VERSION.fullmatch(name)
        if found is None:
            raise ValueError(f"{pointer}: must hold version-NUMBER, got {name[:100]!r}")
        folder = pointer.parent / name
        if folder.is_dir():
            return int(found[1]), folder
        if name == before:
            raise ValueError(f"{pointer}: must name a folder beside it, got {name!r}")
        before = name  # removed, since a newer one is published by now


def new_policies(
    directory: str | Path,
    *,
    run: str | None = None,
    until_version: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    poll_s: float = 0.5,
) -> Iterator[tuple[int, Path]]:
    """Each version that is the latest when it is asked for; those in between are left out.

    Waits for the next one, which is an earlier one when the trainer goes on from a checkpoint.
    Ends after until_version, after the latest once the directory has a file `finished`, or when
    stop says so.

    Raises ValueError if the policies are those of another run than `run`.
    """
    done = None
    while not stop():
        # In this order: a version published before the end is seen.
        finished = (Path(directory) / FINISHED).exists()
        found = latest_policy(directory)
        if found is not None and found[0] != done:
            if run is not None:
                check_run(directory, run)
            done = found[0]
            yield found
            if until_version is not None and done >= until_version:
                return
        elif finished:
            return
        else:
            time.sleep(poll_s)


def prompt_stream(ids: Sequence[int], seed: int, start: int, count: int) -> list[int]:
    """Items start to start + count of an endless stream: ids, shuffled anew in every epoch."""
    check_integer("prompt_stream", "start", start, 0)
    check_integer("prompt_stream", "count", count, 1)
    if not ids:
        raise ValueError("prompt_stream: ids must hold at least one, got none")
    found: list[int] = []
    while len(found) < count:
        epoch, place = divmod(start + len(found), len(ids))
        generator = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
        order = torch.randperm(len(ids), generator=generator).tolist()
        found += [ids[index] for index in order[place : place + count - len(found)]]
    return found
