"""settings.json and samples.jsonl of an evaluation: what a killed one has drawn is not lost."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_ext.evaluation.files import read_json, read_json_lines, write_json
from spo_ext.evaluation.records import Sample
from spo_ext.rollout.generation import Generation, Judgement
from spo_ext.store.records import StoredPrompt

SETTINGS, SAMPLES = "settings.json", "samples.jsonl"


class Journal:
    """Opens both files in the folder `out`, which is created; keeps other processes out.

    Args:
        settings: everything that decides what is drawn and how it is judged, as JSON.
        n: samples of each prompt.

    Attributes:
        finished: the samples of the first prompts, as an earlier process wrote them. A prompt that
            it did not finish is cut off the file.

    Raises ValueError if `out` holds samples of other settings or a line that cannot be read, and
    OSError if another process writes there.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], n: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._n = n
        self._file = (out / SAMPLES).open("a+b")
        try:
            _lock(self._file.fileno(), out)
            _check_settings(out, settings)
            self.finished, end = _read(out / SAMPLES, n)
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def write(self, prompt: StoredPrompt, samples: Sequence[Sample]) -> None:
        """All samples of the next prompt; they survive the death of this process."""
        lines = [json.dumps(_line(prompt, sample)) + "\n" for sample in samples]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _lock(file: int, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{out}: another process evaluates into this folder") from None


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        if (out / SAMPLES).stat().st_size:
            raise ValueError(f"{out}: samples.jsonl must lie beside its settings.json, got none")
        write_json(path, wanted)
        return
    found = read_json(path)
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        got = ", ".join(f"{name} {wanted.get(name)!r}" for name in names)
        old = ", ".join(f"{name} {found.get(name)!r}" for name in names)
        raise ValueError(f"{out} holds an evaluation with {old}; to continue it got {got}")


def _line(prompt: StoredPrompt, sample: Sample) -> dict[str, Any]:
    judgement, generation = sample.judgement, sample.generation
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.content,
        "completion": sample.text,
        "reward": None if judgement is None else judgement.reward,
        "reason": None if judgement is None else judgement.reason,
        **({"rewards": dict(judgement.parts)} if judgement is not None and judgement.parts else {}),
        "finish": generation.finish,
        "token_ids": generation.token_ids,
        "logprobs": generation.logprobs,
    }


def _read(path: Path, n: int) -> tuple[list[tuple[Sample, ...]], int]:
    """The samples of prompts that have all n, and how many bytes they take."""
    rows: list[Sample] = [_sample(row) for row in read_json_lines(path)]
    rows = rows[: len(rows) - len(rows) % n]
    with path.open("rb") as file:
        end = sum(len(file.readline()) for _ in rows)
    return [tuple(rows[i : i + n]) for i in range(0, len(rows), n)], end


def _sample(row: Mapping[str, Any]) -> Sample:
    logprobs = row["logprobs"]
    generation = Generation(
        tuple(row["token_ids"]), row["finish"], None if logprobs is None else tuple(logprobs)
    )
    judged = row["reward"] is not None
    parts = tuple(row.get("rewards", {}).items())
    return Sample(
        generation,
        row["completion"],
        Judgement(row["reward"], row["reason"], parts) if judged else None,
    )
