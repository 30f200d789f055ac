"""The charts of a report as PNG bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from spo_ext.evaluation.panels import (
    PALETTE,
    Line,
    Panel,
    lines_of,
    new_figure,
    plain,
    png_bytes,
    smoothed,
)
from spo_ext.evaluation.records import pass_estimate
from spo_ext.evaluation.runs import Saved, Series
from spo_ext.shown import visible

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
