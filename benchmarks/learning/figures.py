"""The charts of the report as PNG bytes.

A line is the mean over pairs of seeds: solid for SPO, dashed for controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from spo_ext.evaluation.panels import GREY, PALETTE, new_figure, plain, png_bytes
from spo_ext.evaluation.records import estimate

from .sensitivity import Sensitivity
from .tables import Series, last, mean_curve, pass_at

_STAGES = ("sampling", "judging", "store", "scoring", "update")
_NAME_WIDTH = 28  # letters
Colour = str | tuple[float, ...]


def learning_curves(methods: Sequence[Series], k: int) -> bytes:
    """pass@1 and pass@k against sampled programs and against updates."""
    figure = new_figure(12, _height(7, methods), dpi=120)
    axes = figure.subplots(2, 2)
    for row, depth in enumerate((1, k)):
        for column, against in enumerate(("sampled", "updates")):
            panel = axes[row][column]
            _lines(panel, methods, against, _reader(depth))
            panel.set_ylabel(f"pass@{depth}")
            panel.set_xlabel({"sampled": "sampled programs", "updates": "updates"}[against])
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    return png_bytes(figure)


def trade_off(methods: Sequence[Series], k: int) -> bytes:
    """pass@k against pass@1 on the way, from the second evaluation on; the last has a large dot."""
    figure = new_figure(8, _height(4.6, methods), dpi=120)
    axes = figure.subplots()
    for series, colour in zip(methods, _colours(len(methods)), strict=True):
        ones = mean_curve(series, "updates", _reader(1))[1:]
        points = mean_curve(series, "updates", _reader(k))[1:]
        xs, ys = [x for _, x in ones], [y for _, y in points]
        axes.plot(xs, ys, "o", ms=3, **_style(series, colour))
        axes.plot(xs[-1:], ys[-1:], "o", color=colour, ms=8)
    axes.set_xlabel("pass@1")
    axes.set_ylabel(f"pass@{k}")
    plain(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return png_bytes(figure)


def pass_curve(methods: Sequence[Series]) -> bytes:
    """pass@k for every k after the last step, with 95% intervals over pairs of seeds."""
    figure = new_figure(8, _height(4.2, methods), dpi=120)
    axes = figure.subplots()
    for series, colour in zip(methods, _colours(len(methods)), strict=True):
        ks = range(1, len(last(series.runs[0])["pass_at"]) + 1)
        _banded(axes, [(k, series, k) for k in ks], colour)
    axes.set_xlabel("k, programs per problem")
    axes.set_ylabel("pass@k")
    axes.set_ylim(bottom=0)
    most = len(last(methods[0].runs[0])["pass_at"])
    axes.set_xticks([1, *range(5, most + 1, 5)])
    plain(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return png_bytes(figure)


def cost_of_gain(methods: Sequence[Series]) -> bytes:
    """What learning does to diversity, entropy, distance and length, against updates."""
    figure = new_figure(12, _height(6.5, methods), dpi=120)
    axes = figure.subplots(2, 2)
    panels = (
        ("distinct_correct", "different correct programs"),
        ("entropy", "entropy, nats per program"),
        ("kl", "KL to the first policy, nats per program"),
        ("mean_tokens", "tokens per program"),
    )
    for panel, (name, title) in zip(axes.flat, panels, strict=True):
        _lines(panel, methods, "updates", _number(name))
        panel.set_ylabel(title)
        panel.set_xlabel("updates")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    return png_bytes(figure)


def calibration(methods: Sequence[Series]) -> bytes | None:
    """Mean reward against mean Q_T in equal shares of the programs; None if no method has Q_T."""
    figure = new_figure(6.5, 4.2, dpi=120)
    axes = figure.subplots()
    drawn = False
    for series, colour in zip(methods, _colours(len(methods)), strict=True):
        found = [last(run)["calibration"] for run in series.runs]
        if any(one is None for one in found):
            continue
        bins = zip(*(one["bins"] for one in found), strict=True)
        points = [[sum(xy[i] for xy in bin_) / len(bin_) for i in (0, 1)] for bin_ in bins]
        axes.plot(*zip(*points, strict=True), "o", ms=4, **_style(series, colour))
        drawn = True
    if not drawn:
        return None
    axes.plot([-1, 0], [-1, 0], color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("mean Q_T")
    axes.set_ylabel("mean reward")
    plain(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return png_bytes(figure)


def sensitivity(found: Sensitivity, k: int) -> bytes:
    """pass@1 and pass@k against what is varied, with 95% intervals over pairs of seeds."""
    figure = new_figure(12, 4.2, dpi=120)
    axes = figure.subplots(1, 2)
    values = sorted({x for curve in found.curves.values() for x, _ in curve})
    for panel, depth in zip(axes, (1, k), strict=True):
        for curve, colour in zip(found.curves.values(), _colours(len(found.curves)), strict=True):
            _banded(panel, [(x, series, depth) for x, series in curve], colour, marker="o")
        panel.set_xscale("log")
        panel.set_xticks(values, [f"{x:g}" for x in values])
        panel.minorticks_off()
        panel.set_xlabel(found.quantity)
        panel.set_ylabel(f"pass@{depth}")
        plain(panel)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
    )
    return png_bytes(figure)


def time_split(methods: Sequence[Series]) -> bytes:
    """Seconds of training by stage, mean over runs; evaluation is left out."""
    figure = new_figure(9, 1.2 + 0.32 * len(methods), dpi=120)
    axes = figure.subplots()
    places = range(len(methods))
    start = [0.0] * len(methods)
    for stage, colour in zip(_STAGES, PALETTE, strict=False):
        width = [
            sum(run["seconds"].get(stage, 0.0) for run in series.runs) / len(series.runs)
            for series in methods
        ]
        axes.barh(places, width, left=start, color=colour, label=stage, height=0.7)
        start = [a + b for a, b in zip(start, width, strict=True)]
    axes.set_yticks(places, [_name(series) for series in methods])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a run, without evaluation")
    plain(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return png_bytes(figure)


def _banded(
    axes: Axes, points: Sequence[tuple[float, Series, int]], colour: Colour, marker: str = ""
) -> None:
    """At each x the final pass@k of the runs, as a line in its interval over pairs of seeds."""
    xs, means, lows, highs = [], [], [], []
    for x, series, k in points:
        value = estimate([pass_at(last(run), k) for run in series.runs])
        assert value is not None, "a series has runs"
        xs.append(x)
        means.append(value.mean)
        lows.append(value.mean if value.low is None else value.low)
        highs.append(value.mean if value.high is None else value.high)
    axes.plot(xs, means, marker=marker, ms=4, **_style(points[0][1], colour))
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.12, linewidth=0)


def _name(series: Series) -> str:
    """A variation names all that it changes, which is too much for one line beside a chart."""
    return "\n".join(wrap(series.method.replace(",", ", ").replace(":", ": "), _NAME_WIDTH))


def _height(least: float, methods: Sequence[Series]) -> float:
    """Inches: enough for a legend of all methods."""
    return max(least, 0.165 * sum(_name(series).count("\n") + 1.25 for series in methods))


def _style(series: Series, colour: Colour) -> dict[str, Any]:
    spo = series.runs[0]["method_settings"]["family"] == "spo"
    return {"ls": "-" if spo else "--", "color": colour, "label": _name(series)}


def _reader(k: int) -> Callable[[dict[str, Any]], float]:
    return lambda point: pass_at(point, k)


def _number(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda point: float(point[name])


def _lines(
    axes: Axes,
    methods: Sequence[Series],
    against: str,
    read: Callable[[dict[str, Any]], float],
) -> None:
    for series, colour in zip(methods, _colours(len(methods)), strict=True):
        points = mean_curve(series, against, read)
        axes.plot(*zip(*points, strict=True), "o", ms=3, **_style(series, colour))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    plain(axes)


def _colours(count: int) -> list[Colour]:
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    shades = colormaps["turbo"]
    return [tuple(shades(0.04 + 0.92 * index / (count - 1))) for index in range(count)]
