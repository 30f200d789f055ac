"""Where the time of a run goes, and what it has used so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by stage; and counts of sampled programs, judged ones included, and of updates."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.sampled = 0
        self.updates = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the wall-clock time of the block to a stage; stages must not nest."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
