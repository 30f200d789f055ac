"""How the cost of forward and backward grows with N, V, d, entropy and threads, and which strategy
wins.

    python benchmarks/cost.py OUT.json [OUT.png]     (CPU; SPO_HEAD_STATES for real states)

One size changes at a time around N = 2048, V = 24576, d = 256, 0.85 nats. Fewer dimensions than the
states have are a cut, which flattens the softmax: `entropy` and `kept` are in every row. Every
round calls all implementations in turn; medians of the rounds are what is written.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import machine
import torch
from peers import Logprobs, eager
from states import HeadStates, load_states, widened
from torch import Tensor

import spo_ext

ROUNDS = int(os.environ.get("SPO_BENCH_ROUNDS", "5"))
IMPLEMENTATIONS: dict[str, Logprobs] = {
    "eager": eager,
    "recompute": partial(spo_ext.token_logprobs, strategy="recompute"),
    "stored": partial(spo_ext.token_logprobs, strategy="stored"),
    "frozen": partial(spo_ext.token_logprobs, strategy="frozen"),
    "sparse, 2^-10": partial(spo_ext.token_logprobs, max_dropped_mass=2.0**-10),
    "sparse, 2^-24": partial(spo_ext.token_logprobs, max_dropped_mass=2.0**-24),
}
THREADS = torch.get_num_threads()
AXES = {
    "tokens": [128, 512, 2048, 4096],
    "vocabulary": [1536, 6144, 24576],
    "depth": [64, 256, 1024],
    "sharpness": [0.4, 0.6, 0.8, 1.0, 1.5],
    "threads": sorted({1, max(1, THREADS // 2), THREADS}),
}


def inputs(states: HeadStates, **changed: float) -> tuple[Tensor, Tensor, Tensor]:
    """`states` with another number of tokens, entries or dimensions, or times a sharpness."""
    size = {"tokens": 2048, "vocabulary": 24576, "depth": 256, "sharpness": 1.0, **changed}
    n, v, d = (int(size[key]) for key in ("tokens", "vocabulary", "depth"))
    weight = states.weight[:v]  # ids are roughly in order of frequency
    hidden = (states.hidden * size["sharpness"])[:n]
    if d < hidden.shape[1]:
        hidden, weight = hidden[:, :d].contiguous(), weight[:, :d].contiguous()
    elif d > hidden.shape[1]:
        hidden, weight = widened(hidden, weight, d)
    return hidden, weight.contiguous(), states.targets[:n] % v


def call(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], object]:
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(name != "frozen")
    upstream = torch.linspace(-1, 1, len(hidden))
    wanted = [t for t in (hidden, weight) if t.requires_grad]
    function = IMPLEMENTATIONS[name]
    return lambda: torch.autograd.grad(function(hidden, weight, targets), wanted, upstream)


@torch.no_grad()
def described(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, float]:
    _, entropy = spo_ext.token_logprobs(hidden, weight, targets, return_entropy=True)
    options = (None, 1.0, 1.0, None, -100, False, 64, "dropped", 2.0**-10)
    dropped = torch.ops.spo.token_logprobs(hidden, weight, targets, *options)[-1]
    return {"entropy": entropy.mean().item(), "kept": (dropped < 0).double().mean().item()}


def measure(tensors: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    calls = {name: call(name, *tensors) for name in IMPLEMENTATIONS}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for measured in range(ROUNDS + 1):
        for name, run in calls.items():
            start = time.perf_counter()
            run()
            if measured:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def plot(rows: list[dict], path: Path) -> None:  # type: ignore[type-arg]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(3.6 * len(AXES), 4), sharey=True)
    for axes, axis in zip(panels, AXES, strict=True):
        points = [row for row in rows if row["axis"] == axis]
        key = "entropy" if axis == "sharpness" else "value"
        for name in IMPLEMENTATIONS:
            axes.plot([p[key] for p in points], [p["ms"][name] for p in points], ".-", label=name)
        label = "entropy, nats per token" if axis == "sharpness" else axis
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3, which="both", axis="y")
        if axis != "sharpness":
            axes.set_xscale("log")
            axes.set_xticks(AXES[axis], [str(value) for value in AXES[axis]])
            axes.minorticks_off()
    panels[0].set_ylabel("forward + backward, ms")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path, nargs="?")
    arguments = parser.parse_args()
    states, rows = load_states(), []
    for axis, values in AXES.items():
        for value in values:
            tensors = inputs(states, **{axis: value})
            torch.set_num_threads(int(value) if axis == "threads" else THREADS)
            row = {"axis": axis, "value": value, **described(*tensors), "ms": measure(tensors)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    report = {"states": states.source, "rounds": ROUNDS, "spo": machine.report(), "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.png:
        plot(rows, arguments.png)


if __name__ == "__main__":
    main()
