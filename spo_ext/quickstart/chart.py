"""learning_curve.png: what training did to success, and at what distance from the reference."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .config import QuickstartConfig
from .runlog import RunLog

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea580c", "#059669", "#94a3b8"
_SMOOTHING_STEPS = 10


def draw_learning_curve(config: QuickstartConfig, log: RunLog) -> bytes:
    """The figure as PNG bytes: held-out pass@k, pass rate of the rollouts, KL and entropy."""
    # A Figure with its own canvas leaves pyplot's global state and backend alone.
    figure = Figure(figsize=(12, 3.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    held_out, rollouts, divergence = figure.subplots(1, 3)
    _draw_held_out(held_out, config, log)
    _draw_rollouts(rollouts, config, log)
    _draw_divergence(divergence, log)
    for axes in (held_out, rollouts, divergence):
        axes.set_xlabel("SPO step")
        axes.set_xlim(0, max(1, config.steps))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    # Without the version in its metadata the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_held_out(axes: Axes, config: QuickstartConfig, log: RunLog) -> None:
    for name, k, colour in (
        ("pass_at_k", config.evaluation_k, BLUE),
        ("pass_at_1", 1, ORANGE),
    ):
        steps, values = log.series("evaluation", name)
        axes.plot(steps, values, "o-", color=colour, label=f"pass@{k}", clip_on=False)
        for index, place in ((0, (8, -13)), (-1, (-2, 8))):
            axes.annotate(
                f"{values[index]:.2f}",
                (steps[index], values[index]),
                textcoords="offset points",
                xytext=place,
                ha="left" if index == 0 else "right",
                color=colour,
                fontweight="bold",
            )
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of problems")
    axes.set_title(f"{config.evaluation_problems} {config.evaluation_title} problems")
    axes.legend(loc="upper left", frameon=False)


def _draw_rollouts(axes: Axes, config: QuickstartConfig, log: RunLog) -> None:
    steps, values = log.series("spo", "pass_rate")
    if steps:
        axes.plot(steps, values, color=GREY, linewidth=0.9, label="each batch")
        axes.plot(
            steps,
            trailing_mean(values, _SMOOTHING_STEPS),
            color=ORANGE,
            linewidth=2,
            label=f"mean of {_SMOOTHING_STEPS}",
        )
        axes.legend(loc="lower right", frameon=False)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of programs that pass")
    axes.set_title(f"training rollouts ({config.train_problems} problems)")


def _draw_divergence(axes: Axes, log: RunLog) -> None:
    for name, colour, label in (
        ("entropy", GREEN, "entropy"),
        ("kl", BLUE, "KL to the reference"),
    ):
        steps, values = log.series("evaluation", name)
        axes.plot(steps, values, "o-", color=colour, label=label, clip_on=False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats per program")
    axes.set_title("what the gain cost")
    axes.legend(loc="best", frameon=False)


def trailing_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values (fewer at the start) at every index."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
