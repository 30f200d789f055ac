"""Where a run writes its numbers and where its time goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

Value = float | int | str


class RunLog:
    """metrics.jsonl and samples.jsonl of a run, and its stopwatch.

    Opens both files anew in `out`, which is created; raises OSError if that is impossible. Every
    metrics line has "kind", "step" and "seconds" (since the start); all else repeats with the seed.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._metrics = (out / "metrics.jsonl").open("w", encoding="utf-8")
        self._samples = (out / "samples.jsonl").open("w", encoding="utf-8")
        self._start = time.perf_counter()
        self.lines: list[dict[str, Value]] = []
        self.samples: list[dict[str, Value]] = []
        self.stage_seconds: dict[str, float] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._metrics.close()
        self._samples.close()

    @property
    def seconds(self) -> float:
        """Wall-clock time since the run began."""
        return time.perf_counter() - self._start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the wall-clock time of the block to a stage; stages must not nest."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + spent

    def write_metrics(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """One line of metrics.jsonl; flushed, so that a run can be watched."""
        line: dict[str, Value] = {"kind": kind, "step": step, **values}
        line["seconds"] = round(self.seconds, 3)
        self.lines.append(line)
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def write_sample(self, values: Mapping[str, Value]) -> None:
        """One line of samples.jsonl."""
        self.samples.append(dict(values))
        self._samples.write(json.dumps(self.samples[-1]) + "\n")

    def of_kind(self, kind: str) -> list[dict[str, Value]]:
        """The metrics lines of one kind so far."""
        return [line for line in self.lines if line["kind"] == kind]

    def series(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one number of one kind of line."""
        lines = self.of_kind(kind)
        return [float(line["step"]) for line in lines], [float(line[name]) for line in lines]
