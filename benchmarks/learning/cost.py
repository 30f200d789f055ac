"""Memory and time of an update of SPO, GRPO and PPO on the same rows and the same policy.

    OMP_NUM_THREADS=1 PYTHONPATH=benchmarks:. python -m learning.cost --out FILE      (CPU, Linux)

Memory is that of a process of its own for each: the high-water mark of its resident memory over two
updates, the second with all of the optimiser's state, less what was resident before the policy was
made. Times are of one process in which all take turns; the median of their ratios counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from extra_memory import status_mib

from .cost_cases import CASES, SIZES, held_bytes, make_policy, make_rows, make_updater

_UPDATES = 2
_TARGET = 0.6  # of PPO's memory


def memory(size: str, name: str) -> dict[str, float]:
    """Of a case, in MiB, in this process, which should have done nothing else."""
    _update("least", name)  # libraries and threads are there before the base is read
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    base = status_mib("VmRSS")
    held = _update(size, name)
    return {"peak_mib": status_mib("VmHWM") - base, "held_mib": held / 2**20}


def _update(size: str, name: str) -> int:
    """Bytes held after updates of a new policy."""
    case = CASES[name]
    policy = make_policy(SIZES[size], case.head)
    rows = make_rows(SIZES[size], policy)
    updater = make_updater(case, policy)
    for step in range(1, _UPDATES + 1):
        updater.update(rows, step)
    return held_bytes(updater)


def memory_apart(size: str, name: str) -> dict[str, float]:
    """`memory` in a fresh process, whose allocator gives back what is freed."""
    command = [sys.executable, "-m", "learning.cost", "--sizes", size, "--alone", name]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 17),  # fixed: it would grow with what is freed
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"learning.cost: {name} at size {size} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def times(size: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of an update of every case in each round, after a round that does not count."""
    policies = {head: make_policy(SIZES[size], head) for head in ("fused", "logits")}
    rows = make_rows(SIZES[size], policies["fused"])
    # They train one policy: what an update costs does not depend on where the weights are.
    updaters = {name: make_updater(case, policies[case.head]) for name, case in CASES.items()}
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for step in range(1, rounds + 2):
        for name, updater in updaters.items():
            begin = time.perf_counter()
            updater.update(rows, step)
            found[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in found.items()}


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Of every case: peak_mib and held_mib, seconds by round; and SPO's share of both."""
    found: dict[str, Any] = {name: memory_apart(size, name) for name in CASES}
    for name, seconds in times(size, rounds).items():
        found[name]["seconds"] = seconds
    spo = found["SPO"]
    for row in found.values():
        for kind in ("peak_mib", "held_mib"):
            row[f"spo_share_of_{kind}"] = spo[kind] / row[kind]
        shares = [a / b for a, b in zip(spo["seconds"], row["seconds"], strict=True)]
        row["spo_share_of_seconds"] = statistics.median(shares)
    return {**asdict(SIZES[size]), "cases": found}


def table(name: str, found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{name}: {found['about']} (vocabulary {found['vocabulary']}, hidden {found['hidden']}, "
        f"{found['layers']} layers; {found['rows']} rows of {found['prompt_tokens']} + "
        f"{found['shortest']} to {found['longest']} tokens)",
        "",
        "| update of | peak MiB | weights, gradients, optimiser MiB | s | SPO's share of the peak |"
        " of the weights | of the time |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, row in found["cases"].items():
        lines.append(
            f"| {case} | {row['peak_mib']:.1f} | {row['held_mib']:.1f} | "
            f"{statistics.median(row['seconds']):.3g} | {row['spo_share_of_peak_mib']:.2f} | "
            f"{row['spo_share_of_held_mib']:.2f} | {row['spo_share_of_seconds']:.2f} |"
        )
    return "\n".join(lines)


def _write(out: Path, size: str, found: dict[str, Any]) -> None:
    """Beside the sizes that the file has already, each with what it was measured on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(out.read_text(encoding="utf-8"))["sizes"] if out.exists() else {}
    result = {"target": _TARGET, "sizes": known | {size: {"machine": machine.report(), **found}}}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m learning.cost", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["harness", "medium", "large"])
    parser.add_argument("--rounds", type=int, default=5, help="of the times")
    parser.add_argument("--out", type=Path, help="JSON; a size that it has already is replaced")
    parser.add_argument("--alone", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.alone is not None:
        print(json.dumps(memory(options.sizes[0], options.alone)))
        return 0
    for size in options.sizes:
        found = measure(size, options.rounds)
        print(table(size, found), end="\n\n")
        share = found["cases"]["PPO"]["spo_share_of_peak_mib"]
        print(f"SPO's peak is {share:.2f} of PPO's; the target is at most {_TARGET}.\n", flush=True)
        if options.out is not None:
            _write(options.out, size, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
