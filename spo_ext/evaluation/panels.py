"""Which metrics share a chart, what it is called, and the charts as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from spo_ext.evaluation.records import pass_estimate
from spo_ext.evaluation.runs import Saved, Series
from spo_ext.shown import visible

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


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Mean under a Gaussian of this standard deviation, in values, that ends at the first and last.

    It has no lag, but a value counts what came after it too.
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
        "Held-out prompts that are solved in k completions, share",
        (Curve("eval_pass@*", "", ORANGE),),
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
            Curve("calibration", "slope of the reward on it", VIOLET),
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
    Panel(
        "sampling",
        "Trainer against sampler at the version that sampled, nats a token",
        (
            Curve("sampling/sampling_logp_difference/mean", "mean", INK),
            Curve("sampling/sampling_logp_difference/max", "largest", GREY),
            Curve("sampling/kl", "KL divergence", ORANGE),
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
        "Time of an optimiser step and of its parts, seconds",
        (Curve("step_time", "whole step", INK), Curve("time/*", "", ORANGE)),
    ),
    Panel(
        "tokens",
        "Tokens so far, prompts' where they were read",
        (
            Curve("cost/sampled_tokens", "sampled", BLUE),
            Curve("cost/scored_tokens", "scored by the reference", GREEN),
            Curve("cost/learned_tokens", "learned from", ORANGE),
        ),
        exact=True,
    ),
    Panel(
        "seconds",
        "Time so far, seconds of all ranks",
        (
            Curve("cost/sampling_seconds", "sampling and judging", BLUE),
            Curve("cost/scoring_seconds", "scoring by the reference", GREEN),
            Curve("cost/learning_seconds", "learning", ORANGE),
        ),
        exact=True,
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


_MARKED = 12  # as many points, or fewer, are marked one by one
_LOG_RANGE = 50.0
_SMOOTHING = 60  # the width of the mean is this part of the run
SMOOTHING = "Pale: what was logged. Bold: its smoothed mean."


def draw_panel(panel: Panel, series: Mapping[str, Series]) -> bytes | None:
    """None if nothing of it was logged."""
    lines = lines_of(panel, series)
    if not lines:
        return None
    figure, axes = _canvas(panel.title)
    _scale(axes, panel, [value for line in lines for value in line.series.values])
    for line in lines:
        _draw_line(axes, line, panel.exact)
    axes.set_xlabel("optimiser step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(lines) > 1:
        _legend(axes)
    return png_bytes(figure)


def draw_pass_curves(evaluations: Sequence[Saved]) -> bytes | None:
    """pass@k with its interval for every k that some prompt has enough samples for."""
    figure, axes = _canvas("pass@k, share of prompts, with 95% intervals")
    largest = 0
    for saved, colour in zip(evaluations, _colours(len(evaluations)), strict=True):
        counts = saved.counts
        points = [(k, pass_estimate(counts, k)) for k in range(1, _most(counts) + 1)]
        known = [(k, value) for k, value in points if value is not None]
        if not known:
            continue
        ks = [k for k, _ in known]
        largest = max(largest, ks[-1])
        means = [value.mean for _, value in known]
        marker = "o" if len(ks) <= _MARKED else None
        axes.plot(
            ks, means, color=colour, linewidth=2, marker=marker, ms=4, label=_label(saved.name)
        )
        low = [value.mean if value.low is None else value.low for _, value in known]
        high = [value.mean if value.high is None else value.high for _, value in known]
        axes.fill_between(ks, low, high, color=colour, alpha=0.13, linewidth=0)
    if not largest:
        return None
    if largest > 4:
        axes.set_xscale("log")
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k < 0.8 * largest]
        axes.set_xticks([*ticks, largest])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
    else:
        axes.set_xticks(range(1, largest + 1))
    axes.set_ylim(0, min(1.02, axes.get_ylim()[1]))
    axes.set_xlabel("k, completions per prompt", fontsize=9)
    if len(evaluations) > 1:
        _legend(axes)
    return png_bytes(figure)


def _most(counts: Sequence[tuple[int, int]]) -> int:
    return max((n for n, _ in counts), default=0)


def _colours(count: int) -> list[str | tuple[float, ...]]:
    """Of one palette; many evaluations are checkpoints in order, dark to light."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    shades = colormaps["viridis"]
    return [tuple(shades(0.9 * index / (count - 1))) for index in range(count)]


def _canvas(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(5.6, 3.1, dpi=150)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=8)
    axes.tick_params(labelsize=8.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    plain(axes)
    return figure, axes


def _draw_line(axes: Axes, line: Line, exact: bool) -> None:
    """Raw values pale, and over them their mean; few or exact ones as they are."""
    steps, values = line.series.steps, line.series.values
    if exact or len(values) <= 2 * _MARKED:
        marker = "o" if len(values) <= _MARKED else None
        style: dict[str, Any] = {"color": line.colour, "linewidth": 1.9, "marker": marker, "ms": 4}
        axes.plot(steps, values, label=_label(line.label), **style)
        return
    width = len(values) / _SMOOTHING
    if axes.get_yscale() == "log":  # where an arithmetic mean would follow the peaks
        smooth = [math.exp(value) for value in smoothed([math.log(v) for v in values], width)]
    else:
        smooth = smoothed(values, width)
    axes.plot(steps, values, color=line.colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth, color=line.colour, linewidth=1.9, label=_label(line.label))


def _scale(axes: Axes, panel: Panel, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if panel.share:
        axes.set_ylim(0, min(1.02, max(1.15 * high, 0.01)))
    elif panel.log and low > 0 and high > _LOG_RANGE * low:
        axes.set_yscale("log")
    elif low >= 0:
        axes.set_ylim(0, 1.08 * high or 1)
    else:
        axes.margins(y=0.08)
        axes.axhline(0, color="black", linewidth=0.8, alpha=0.5, zorder=1)


def _label(words: str) -> str:
    """Names of metrics and folders: what stands between dollars is no formula."""
    return visible(words, line=True).replace("$", r"\$")


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8.5, loc="best", handlelength=1.4)
