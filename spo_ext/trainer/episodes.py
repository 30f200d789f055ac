"""When a series of numbers begins to be in trouble, and when it is over."""

from __future__ import annotations

from dataclasses import dataclass

PATIENCE = 3  # numbers in a row that begin or end an episode: one alone may be noise
_CALM = 2 / 3  # of a limit: an episode ends below it, so that hovering around 1 is one episode


@dataclass(slots=True)
class Episode:
    """Counts of numbers in a row beyond the limit and well inside it; open while in trouble."""

    bad: int = 0
    calm: int = 0
    open: bool = False

    def begins(self, severity: float, patience: int = PATIENCE) -> bool:
        """severity: how far a number is on the way to its limit, 1 at it."""
        self.bad = self.bad + 1 if severity >= 1 else 0
        self.calm = self.calm + 1 if severity < _CALM else 0
        if self.calm >= PATIENCE:
            self.open = False
        if self.open or self.bad < patience:
            return False
        self.open = True
        return True


@dataclass(slots=True)
class Mean:
    """Of the numbers so far."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float, least_rate: float = 0.0) -> None:
        """With least_rate a number weighs at least so much: a running mean that forgets."""
        self.count += 1
        self.value += max(least_rate, 1 / self.count) * (value - self.value)
