"""What the charts have in common: colours, axes, smoothing, and PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
