"""Which metrics share a chart, and what it is called."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spo_ext.evaluation.runs import Series

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea580c", "#059669", "#94a3b8"
VIOLET, PINK, INK = "#7c3aed", "#db2777", "#0f172a"
PALETTE = (BLUE, ORANGE, GREEN, VIOLET, PINK, GREY)


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """Inches; a canvas of its own leaves pyplot's global state and backend alone."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """A light grid and no box around it."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def png_bytes(figure: Figure) -> bytes:
    """Without the version in its metadata, so that the same chart gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def trailing_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values (fewer at the start) at every index."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Mean under a Gaussian of this standard deviation, in values, that ends at the first and last.

    It has no lag, unlike a trailing mean, but a value counts what came after it too.
    """
    reach = round(3 * width)
    kernel = numpy.exp(-0.5 * (numpy.arange(-reach, reach + 1) / width) ** 2)
    ones = numpy.convolve(numpy.ones(len(values)), kernel)[reach : reach + len(values)]
    sums = numpy.convolve(numpy.asarray(values, float), kernel)[reach : reach + len(values)]
    return [float(value) for value in sums / ones]


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
