"""How a producer is asked to stop, and how it says how far it is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """While it is entered, the first SIGINT or SIGTERM asks for an end and the second interrupts.

    In the main thread only, as signal handlers are.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: list[Any] = []

    def requested(self) -> bool:
        return self._requested

    def __enter__(self) -> Stopping:
        self._before = [signal.signal(number, self._ask) for number in _SIGNALS]
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("spo: stopping after the batch at hand", file=sys.stderr)


@contextmanager
def progress_bar(total: int, name: str, quiet: bool) -> Iterator[Callable[[int], object] | None]:
    """What moves the bar on, None if there is none: when quiet, or without tqdm."""
    if quiet or total == 0:
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=name, unit="prompt", dynamic_ncols=True) as bar:
        yield bar.update
