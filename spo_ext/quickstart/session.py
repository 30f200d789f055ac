"""What every stage of a run needs."""

from __future__ import annotations

from dataclasses import dataclass

from .config import QuickstartConfig
from .judging import Grader
from .runlog import RunLog


@dataclass(frozen=True, slots=True)
class Session:
    """The settings of a run, its judge and its log; quiet leaves out progress bars."""

    config: QuickstartConfig
    grader: Grader
    log: RunLog
    quiet: bool
