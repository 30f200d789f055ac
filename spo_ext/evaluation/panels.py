"""Which metrics share a chart, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from spo_ext.evaluation.plot import BLUE, GREEN, GREY, INK, ORANGE, PALETTE, PINK, VIOLET
from spo_ext.evaluation.runs import Series


@dataclass(frozen=True)
class Curve:
    """The metrics that a pattern names; an empty label stands for the metric's own name."""

    pattern: str
    label: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """A chart; name is that of its file, the title says what and in which unit.

    share: between 0 and 1. log: a logarithmic axis where values differ by orders of magnitude.
    exact: without noise, so not smoothed.
    """

    name: str
    title: str
    curves: tuple[Curve, ...]
    share: bool = False
    log: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    series: Series


# One colour per idea wherever it appears: the reward blue, the policy's Q orange, Q_0 green, what
# other runs or the reference have to do with it violet, plain bookkeeping in ink.
PANELS = (
    Panel(
        "reward",
        "Reward, mean",
        (
            Curve("reward", "rolled out", BLUE),
            Curve("eval_reward", "held-out", INK),
            Curve("store/reward", "drawn from the store", GREEN),
            Curve("rewards/*/mean", "", PINK),
        ),
    ),
    Panel(
        "pass_rate",
        "Completions that pass, share",
        (
            Curve("pass_rate", "training", BLUE),
            Curve("eval_pass_rate", "held-out", INK),
            Curve("pass@*", "", GREEN),
            Curve("eval_pass@*", "", ORANGE),
        ),
        share=True,
    ),
    Panel(
        "loss",
        "Loss per completion",
        (Curve("loss", "training", INK), Curve("eval_loss", "held-out", ORANGE)),
        log=True,
    ),
    Panel(
        "divergence",
        "Distance from the reference, nats",
        (
            Curve("kl", "KL", VIOLET),
            Curve("log_ratio", "log-ratio of a completion, mean", PINK),
            Curve("log_ratio_p95", "95th percentile", GREY),
        ),
    ),
    Panel("entropy", "Entropy of the policy, nats", (Curve("entropy", "entropy", GREEN),)),
    Panel(
        "calibration",
        "Terminal Q and what it should be, reward units",
        (
            Curve("terminal_q", "terminal Q", ORANGE),
            Curve("reward", "reward", BLUE),
            Curve("q0", "Q at the start", GREEN),
            Curve("calibration*", "", VIOLET),
            Curve("terminal_q_*", "", VIOLET),
        ),
    ),
    Panel(
        "residual",
        "Residual: terminal Q minus its target, reward units",
        (
            Curve("residual_abs", "absolute", ORANGE),
            Curve("residual", "signed", GREY),
        ),
    ),
    Panel(
        "bounds",
        "Sequences at a bound, share",
        (
            Curve("clipped", "terminal Q clipped", ORANGE),
            Curve("clipped_share", "terminal Q clipped", ORANGE),
            Curve("q0_at_floor", "Q at the start on its floor", GREEN),
            Curve("completions/clipped_ratio", "completion truncated", GREY),
        ),
        share=True,
    ),
    Panel(
        "age",
        "Age of the run's own trajectories, policy versions",
        (
            Curve("store/age_versions", "mean", VIOLET),
            Curve("store/age_versions_max", "oldest", GREY),
        ),
    ),
    Panel("reuse", "Draws of a trajectory, mean", (Curve("store/reuse", "draws", VIOLET),)),
    Panel(
        "offline",
        "Trajectories of others in a batch, share",
        (Curve("store/offline_share", "offline", VIOLET),),
        share=True,
    ),
    Panel(
        "lengths",
        "Length of completions, tokens",
        (
            Curve("completions/mean_length", "mean", INK),
            Curve("completions/max_length", "longest", ORANGE),
            Curve("completions/min_length", "shortest", GREY),
            Curve("completions/mean_terminated_length", "mean of those that ended", GREEN),
        ),
    ),
    Panel("grad_norm", "Norm of the gradient", (Curve("grad_norm", "norm", INK),), log=True),
    Panel("learning_rate", "Learning rate", (Curve("learning_rate", "rate", INK),), exact=True),
    Panel(
        "step_time",
        "Time of an optimiser step, seconds",
        (Curve("step_time", "whole step", INK), Curve("step_time/*", "", ORANGE)),
    ),
)


def lines_of(panel: Panel, series: Mapping[str, Series]) -> list[Line]:
    """What of the panel was logged. A colour that is taken gives way to a free one."""
    found: list[Line] = []
    for curve in panel.curves:
        for name in series:
            if _fits(name, curve.pattern):
                used = {line.colour for line in found}
                free = [colour for colour in (curve.colour, *PALETTE) if colour not in used]
                colour = free[0] if free else curve.colour
                found.append(Line(curve.label or name, colour, series[name]))
    return found


def unplaced(series: Mapping[str, Series]) -> list[str]:
    """Names of metrics that no panel shows."""
    patterns = [curve.pattern for panel in PANELS for curve in panel.curves]
    return [name for name in series if not any(_fits(name, pattern) for pattern in patterns)]


def _fits(name: str, pattern: str) -> bool:
    """In trainers of others the metrics of the loss lie under spo/."""
    return fnmatchcase(name.removeprefix("spo/"), pattern)
