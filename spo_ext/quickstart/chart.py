"""learning_curve.png: what training did to success, and at what distance from the reference."""

from __future__ import annotations

from matplotlib.axes import Axes

from spo_ext.evaluation.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    new_figure,
    plain,
    png_bytes,
    trailing_mean,
)

from .config import QuickstartConfig
from .runlog import RunLog

_SMOOTHING_STEPS = 10


def draw_learning_curve(config: QuickstartConfig, log: RunLog) -> bytes:
    """The figure as PNG bytes: held-out pass@k, pass rate of the rollouts, KL and entropy."""
    figure = new_figure(12, 3.9, dpi=130)
    held_out, rollouts, divergence = figure.subplots(1, 3)
    _draw_held_out(held_out, config, log)
    _draw_rollouts(rollouts, config, log)
    _draw_divergence(divergence, log)
    for axes in (held_out, rollouts, divergence):
        axes.set_xlabel("SPO step")
        axes.set_xlim(0, max(1, config.steps))
        plain(axes)
    return png_bytes(figure)


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
