"""What the order of the vocabulary changes for max_dropped_mass: work left, errors, time.

    python benchmarks/vocabulary_order.py OUT.json [--rounds 5]    (SPO_HEAD_STATES for real states)

The second half of each set's states is measured; the first half, other text, gives the counts:
    id        as the tokenizer has them; those of a byte-pair encoding are roughly by frequency
    labels    by how often each word is a label of the first half; words that are none, by id
    expected  by the sum of the model's probabilities over the first half: ranks rare words too
    random    a random order
`kept` is the share of (token, block of 256 words) pairs in the backward pass; above 0.9 it takes
all of them, so that kept is 1. Errors are relative, against float64. `time` is that of
forward+backward over that in id order, medians of rounds in which all orders take turns.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from measure import Stopwatch
from states import HeadStates, load_states
from torch import Tensor, nn

import spo_ext

# set of SPO_HEAD_STATES, factor on hidden: 0.37, 0.85, 1.5 and 4 nats of entropy
SETS = [("samp3", 1.0), ("samp2", 1.0), ("samp1.5", 1.0), ("samp2", 0.5)]
EPS = {"2^-8": 2.0**-8, "2^-10": 2.0**-10}


def halves(states: HeadStates, factor: float) -> tuple[HeadStates, HeadStates]:
    middle = len(states.targets) // 2
    first, second = (
        HeadStates(states.source, states.hidden[part] * factor, states.weight, states.targets[part])
        for part in (slice(middle), slice(middle, None))
    )
    return first, second


@torch.no_grad()
def orders(counted: HeadStates) -> dict[str, Tensor]:
    """[V] each, from the half that is not measured."""
    size = len(counted.weight)
    expected = torch.zeros(size, dtype=torch.float64)
    for hidden in counted.hidden.split(256):
        expected += (hidden @ counted.weight.T).softmax(-1).sum(0)
    return {
        "id": torch.arange(size),
        "labels": spo_ext.frequency_order(torch.bincount(counted.targets, minlength=size)),
        "expected": spo_ext.frequency_order(expected),
        "random": torch.randperm(size, generator=torch.Generator().manual_seed(0)),
    }


def make_head(weight: Tensor, order: Tensor) -> spo_ext.OrderedHead:
    linear = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return spo_ext.OrderedHead(linear, order)


def grads_call(
    states: HeadStates, head: spo_ext.OrderedHead, eps: float
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; returns grad_hidden and grad_weight."""
    hidden = states.hidden.clone().requires_grad_()
    upstream = torch.linspace(-1, 1, len(hidden), dtype=hidden.dtype)

    def call() -> tuple[Tensor, ...]:
        rows = head.targets(states.targets)
        logprobs = spo_ext.token_logprobs(hidden, head.weight, rows, max_dropped_mass=eps)
        return torch.autograd.grad(logprobs, (hidden, head.weight), upstream)

    return call


def in_float64(states: HeadStates) -> tuple[Tensor, ...]:
    """The exact gradients, by id."""
    hidden, weight = states.hidden.double(), states.weight.double()
    wide = HeadStates(states.source, hidden, weight, states.targets)
    return grads_call(wide, make_head(weight, torch.arange(len(weight))), 0.0)()


@torch.no_grad()
def kept(states: HeadStates, head: spo_ext.OrderedHead, eps: float) -> float:
    arguments = states.hidden, head.weight, head.targets(states.targets)
    options = (None, 1.0, 1.0, None, -100, False, 64, "dropped", eps)
    dropped = torch.ops.spo.token_logprobs(*arguments, *options)[-1]
    return float((dropped < 0).double().mean())


def measure(name: str, factor: float, rounds: int) -> list[dict[str, object]]:
    counted, states = halves(load_states(name), factor)
    heads = {order: make_head(states.weight, o) for order, o in orders(counted).items()}
    with torch.no_grad():
        entropy = spo_ext.token_logprobs(
            states.hidden, states.weight, states.targets, return_entropy=True
        )[1]
    truth, stopwatch, rows = in_float64(states), Stopwatch(), []
    for label, eps in EPS.items():
        calls = {order: grads_call(states, head, eps) for order, head in heads.items()}
        times: dict[str, list[float]] = {order: [] for order in calls}
        for warm in range(rounds + 1):
            for order, call in calls.items():
                elapsed = stopwatch(call)
                times[order] += [elapsed] if warm else []
        for order, head in heads.items():
            grad_hidden, grad_weight = calls[order]()
            by_id = grad_hidden.double(), grad_weight[head.row_of].double()
            errors = [((g - t).norm() / t.norm()).item() for g, t in zip(by_id, truth, strict=True)]
            row: dict[str, object] = {
                "entropy": entropy.mean().item(),
                "max_dropped_mass": label,
                "order": order,
                "kept": kept(states, head, eps),
                "error_grad_hidden": errors[0],
                "error_grad_weight": errors[1],
                "ms": statistics.median(times[order]),
                "time": statistics.median(times[order]) / statistics.median(times["id"]),
            }
            rows.append({"states": states.source, "factor": factor, **row})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = [row for name, factor in SETS for row in measure(name, factor, arguments.rounds)]
    report = {"rounds": arguments.rounds, "spo": machine.report(), "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
