"""Does max_dropped_mass change what a language model learns? Same data, seeds, Adam; eps differs.

    OMP_NUM_THREADS=1 python benchmarks/train_dropped_mass.py OUT.json OUT.png [--steps 1400]

A word that no token kept a block of gets no gradient, so the words that are rare or never occur are
reported by themselves. How far two seeds differ at eps = 0 says which differences are noise.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import machine
import torch
from small_model import DEPTH, LENGTH, VOCABULARY, Model, Setting, settings
from torch import Tensor

import spo_ext

BATCH, LEARNING_RATE, EVALUATE_EVERY = 4, 5e-3, 100
EPS = {"0": 0.0, "2^-10": 2.0**-10, "2^-6": 2.0**-6}
RUNS = [(name, seed) for seed in (0, 1) for name in ("tables", "sorted", "code")]
Row = dict[str, Any]


@torch.no_grad()
def evaluate(model: Model, eps: float, setting: Setting, test: Tensor) -> Row:
    """On held-out pieces; eager, since the mass of a set of words needs the whole softmax."""
    losses, masses = [], []
    for pieces in test.split(BATCH):
        logprobs = (model(pieces[:, :-1]) @ model.head.T).log_softmax(-1)
        losses.append(-logprobs.gather(-1, pieces[:, 1:, None])[..., 0])
        p = logprobs.exp()
        masses.append(torch.stack([p[..., s].sum(-1) for s in (setting.never, setting.rare)]))
    loss, (never, rare) = torch.cat(losses), torch.cat(masses, 1)
    labels = test[:, 1:]
    row = {
        "loss": loss.mean().item(),
        "loss_of_rare": loss[setting.rare[labels]].mean().item(),
        "mass_of_never": never.mean().item(),
        "mass_of_rare": rare.mean().item(),
        "kept": 1.0,
    }
    if eps:
        options = (None, 1.0, 1.0, None, -100, False, 64, "dropped", eps)
        inputs = test[:BATCH]
        call = (model(inputs[:, :-1]), model.head, inputs[:, 1:].contiguous())
        dropped = torch.ops.spo.token_logprobs(*call, *options)[-1]
        row["kept"] = (dropped < 0).double().mean().item()
    return row


def error_of_head(model: Model, eps: float, setting: Setting, pieces: Tensor) -> Row:
    """Of grad_weight against the exact one, |difference| / |exact| over the rows of some words."""
    hidden, labels = model(pieces[:, :-1]).detach(), pieces[:, 1:].contiguous()

    def gradient(bound: float) -> Tensor:
        logprobs = spo_ext.token_logprobs(hidden, model.head, labels, max_dropped_mass=bound)
        return torch.autograd.grad(-logprobs.mean(), model.head)[0]

    exact, cut = gradient(0.0), gradient(eps)
    label = torch.bincount(labels.flatten(), minlength=VOCABULARY) > 0
    sets = {"all": label | ~label, "no_label": ~label, "rare_no_label": setting.rare & ~label}
    sets["never"] = setting.never
    row: Row = {k: ((cut - exact)[s].norm() / exact[s].norm()).item() for k, s in sets.items()}
    row["rows_without_gradient"] = {
        k: (cut[s] == 0).all(-1).double().mean().item() for k, s in sets.items()
    }
    return row


def train(eps: float, seed: int, steps: int, setting: Setting) -> Row:
    torch.manual_seed(seed)
    model = Model()
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
    )
    curve, losses, start = [], [], time.perf_counter()
    for step in range(steps):
        pieces = setting.batch(BATCH)
        hidden, labels = model(pieces[:, :-1]), pieces[:, 1:].contiguous()
        logprobs = spo_ext.token_logprobs(hidden, model.head, labels, max_dropped_mass=eps)
        optimiser.zero_grad()
        loss = -logprobs.mean()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % EVALUATE_EVERY == 0:
            recent = losses[-EVALUATE_EVERY:]
            row = {"step": step + 1, "training_loss": sum(recent) / len(recent)}
            curve.append({**row, **evaluate(model, eps, setting, setting.test[::5])})
    seconds = time.perf_counter() - start
    pieces = setting.batch(BATCH)  # the same for every eps, since no draw depends on it
    errors = {n: error_of_head(model, e, setting, pieces) for n, e in EPS.items() if e}
    final = evaluate(model, eps, setting, setting.test)
    return {
        "seed": seed,
        "curve": curve,
        "final": final,
        "error_of_grad_weight": errors,
        "seconds": seconds,
    }


def plot(runs: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "training_loss": "training loss, nats",
        "difference": "held-out loss minus that of eps = 0",
        "mass_of_never": "mass of words that never occur",
        "kept": "share of (token, block) pairs kept",
    }
    exact = {(r["setting"], r["seed"]): r["curve"] for r in runs if r["eps"] == "0"}
    names = list(dict.fromkeys(run["setting"] for run in runs))
    size = (3.8 * len(panels), 3.2 * len(names))
    figure, grid = plt.subplots(len(names), len(panels), figsize=size, squeeze=False)
    for run in runs:
        first = run["seed"] == 0
        # The second seed at eps = 0 against the first shows the noise.
        of_exact = exact[run["setting"], 0 if run["eps"] == "0" else run["seed"]]
        rows = [
            {**row, "difference": row["loss"] - base["loss"]}
            for row, base in zip(run["curve"], of_exact, strict=True)
        ]
        for axes, key in zip(grid[names.index(run["setting"])], panels, strict=True):
            axes.plot(
                [row["step"] for row in rows],
                [row[key] for row in rows],
                color=f"C{list(EPS).index(run['eps'])}",
                linestyle="-" if first else "--",
                label=f"eps = {run['eps']}, seed {run['seed']}",
            )
            axes.set_title(f"{run['setting']}: {panels[key]}", fontsize=9)
            axes.set(xlabel="step", yscale="log" if key == "mass_of_never" else "linear")
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--steps", type=int, default=1400)
    arguments = parser.parse_args()
    found = settings()
    runs: list[Row] = []
    sizes = {"vocabulary": VOCABULARY, "depth": DEPTH, "tokens_per_step": LENGTH * BATCH}
    report = {
        "commit": machine.commit(),
        "torch": torch.__version__,
        "settings": {**sizes, **{name: setting.describe() for name, setting in found.items()}},
        "runs": runs,
    }
    for name, seed in RUNS:
        for label, eps in EPS.items():
            run = train(eps, seed, arguments.steps, found[name])
            runs.append({"setting": name, "eps": label, **run})
            print(name, label, seed, run["final"], f"{run['seconds']:.0f} s", flush=True)
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        plot(runs, arguments.png)


if __name__ == "__main__":
    main()
