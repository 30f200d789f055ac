"""The plots of report.py: the roofline, times over the bare product, and the noise of long sums."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
COLOURS = [*plt.get_cmap("tab10").colors]
MARKERS = {"forward": "o", "forward+backward": "s"}
# Floating-point operations per token of the small ops, counted from their formulas: they only place
# the points on the axis, far to the left of the ridge.
FLOP_PER_TOKEN = {"soft_q": 3, "cumulative_loss": 3, "logprobs_from_logits": 4}


def colour_of(names: list[str], name: str) -> Any:
    """spo_ext is black, so that it is found in every plot."""
    return "black" if name == "spo_ext" else COLOURS[names.index(name) % len(COLOURS)]


def names_in(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["implementation"] for row in rows))


def head_point(row: Row) -> tuple[float, float]:
    """(FLOP per byte, TFLOP/s) of the product that nobody can avoid, and with backward of the two
    for the gradients: an op that computes the logits again does more and gets no credit for it."""
    n, v, d = row["tokens"], row["vocabulary"], row["depth"]
    products = 3 if row["direction"] == "forward+backward" else 1
    flop = 2 * n * v * d * products
    size = {"float32": 4, "float64": 8}.get(row["dtype"], 2)
    moved = size * (n * d + v * d) * (2 if products == 3 else 1) + 4 * n
    return flop / moved, flop / row["ms"] / 1e9


def small_point(row: Row) -> tuple[float, float]:
    elements = row["tokens"]
    if row["op"] == "logprobs_from_logits":  # per logit, of which num_bytes tells the number
        elements = row["num_bytes"] / 4
    flop = FLOP_PER_TOKEN[row["op"]] * elements
    return flop / row["num_bytes"], flop / row["ms"] / 1e9


def roofline(machine: Row, rows: list[Row], folder: Path) -> bool:
    roof = machine.get("roof")
    if not roof or not rows:
        return False
    peak, bandwidth = roof["gemm_tflops"], roof["copy_gb_per_s"] / 1e3  # TFLOP/s, TB/s
    figure, axes = plt.subplots(figsize=(9, 6))
    low, high = 1e-2, 1e5
    ridge = peak / bandwidth
    axes.plot([low, ridge, high], [bandwidth * low, peak, peak], color="grey")
    axes.annotate(f"copy, {bandwidth * 1e3:.4g} GB/s", (low, bandwidth * low * 2))
    axes.annotate(f"product, {peak:.3g} TFLOP/s", (ridge, peak * 1.08))
    names = names_in(rows)
    for row in rows:
        x, y = head_point(row) if row["op"] == "token_logprobs" else small_point(row)
        axes.scatter(
            x,
            y,
            color=colour_of(names, row["implementation"]),
            marker=MARKERS[row["direction"]],
            s=36,
            alpha=0.8,
        )
    for name in names:
        axes.scatter([], [], color=colour_of(names, name), label=name)
    for direction, marker in MARKERS.items():
        axes.scatter([], [], color="white", edgecolor="black", marker=marker, label=direction)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.set_title("Work that must be done, over the time taken, under this machine's ceilings")
    axes.legend(fontsize=8)
    save(figure, folder / "roofline.png")
    return True


def times(machine: Row, rows: list[Row], folder: Path) -> bool:
    names = names_in(rows)
    rows = [row for row in rows if row["op"] == "token_logprobs"]
    if not rows:
        return False
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(12, 0.9 + 0.28 * len(rows) / 2), sharey=True)
    for axes, direction in zip(panels, MARKERS, strict=True):
        labels, place = [], 0
        for shape in shapes:
            for row in rows:
                if (row["shape"], row["direction"]) == (shape, direction):
                    name = row["implementation"]
                    axes.barh(place, row["over_gemm"], color=colour_of(names, name))
                    axes.annotate(
                        f" {row['over_gemm']:.2f}", (row["over_gemm"], place), va="center"
                    )
                    labels.append(f"{shape}: {name}")
                    place += 1
            place += 1
            labels.append("")
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.axvline(1 if direction == "forward" else 3, color="grey", linestyle="--")
        axes.set_title(f"{direction}: time over one bare product")
    panels[0].invert_yaxis()
    save(figure, folder / "times.png")
    return True


def noise(machine: Row, rows: list[Row], folder: Path) -> bool:
    names = names_in(rows)
    rows = [row for row in rows if row.get("noise_of_sum")]
    if not rows:
        return False
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(5 * len(shapes), 4.2), sharey=True, squeeze=False
    )
    for axes, shape in zip(panels[0], shapes, strict=True):
        for row in (row for row in rows if row["shape"] == shape):
            lengths = [int(t) for t in row["noise_of_sum"]]
            axes.plot(
                lengths,
                list(row["noise_of_sum"].values()),
                marker=".",
                color=colour_of(names, row["implementation"]),
                label=row["implementation"],
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens T", title=f"{shape}, {row['dtype']}")
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("error of a sum of T log-probs, nats")
    save(figure, folder / "noise.png")
    return True


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
