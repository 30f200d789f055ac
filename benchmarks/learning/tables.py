"""Records of runs as tables: means, and differences between runs of the same seeds.

    PYTHONPATH=benchmarks python -m learning.tables benchmarks/results/learning/test.jsonl.gz

A record is a line of JSON: what ran (recipe or method, setting, split, reference_seed, seed,
steps), sampled, and the evaluations `before` and `after`; older ones have a `curve` in between.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_ext.evaluation.records import Estimate, estimate

Record = dict[str, Any]


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Raises OSError or ValueError for a file that cannot be read."""
    lines = []
    for path in paths:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        lines += text.decode().splitlines()
    return [json.loads(line) for line in lines]


def columns(runs: Sequence[Record]) -> dict[str, Callable[[Record], float]]:
    """What tables show of each run; pass@10, or of the most that all have samples for."""
    most = min(10, *(len(run["after"]["pass_at"]) for run in runs))
    return {
        "pass@1": lambda run: float(run["after"]["pass_at"][0]),
        f"pass@{most}": lambda run: float(run["after"]["pass_at"][most - 1]),
        "distinct correct": lambda run: float(run["after"]["distinct_correct"]),
        "KL": lambda run: float(run["after"]["kl"]),
        "entropy": lambda run: float(run["after"]["entropy"]),
    }


def name_of(record: Record) -> str:
    """Its recipe and lag; the method, where no recipe made it."""
    name = str(record.get("recipe") or record["method"])
    lags = (("sync", record.get("sync_every", 1)), ("uses", record.get("uses", 1)))
    name += "".join(f" {what} {number}" for what, number in lags if number > 1)
    versions = record.get("versions")
    return name if versions is None else f"{name} of {versions} versions"


def by_name(records: Sequence[Record]) -> dict[str, list[Record]]:
    """In order of appearance; "ppo@120" where runs of a name differ in length."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        found.setdefault((name_of(record), record["steps"]), []).append(record)
    lengths = [name for name, _ in found]
    return {
        name if lengths.count(name) == 1 else f"{name}@{steps}": runs
        for (name, steps), runs in found.items()
    }


def at_step(records: Sequence[Record], step: int) -> list[Record]:
    """Runs as they were after so many of their steps; those not evaluated then are left out."""
    return [
        {**record, "after": point, "sampled": point["sampled"]}
        for record in records
        for point in (
            *record.get("curve", ()),
            {**record, **record["after"], "step": record["steps"]},
        )
        if point["step"] == step
    ]


def difference(
    ours: Sequence[Record], theirs: Sequence[Record], read: Callable[[Record], float]
) -> Estimate | None:
    """Mean of ours - theirs over the pairs of seeds that both have; None if there are none.

    A pair is of one reference: one that was trained on another kind of processor is not quite the
    same for the same seed, which shows in the evaluation before the first step.
    """
    mine, other = _by_pair(ours), _by_pair(theirs)
    shared = sorted(mine.keys() & other.keys())
    return estimate([read(mine[pair]) - read(other[pair]) for pair in shared])


def tables(records: Sequence[Record], control: str) -> str:
    """Means and differences to the control, each with a 95% bootstrap interval over pairs of a
    reference seed and a seed, as Markdown."""
    settings: dict[str, list[Record]] = {}
    for record in records:
        settings.setdefault(f"{record['setting']}, {record['split']} problems", []).append(record)
    parts = []
    for title, found in settings.items():
        groups = by_name(found)
        reads = columns(found)
        rows = [["", "pairs", "sampled", *reads]]
        for name, runs in groups.items():
            values = [shown(estimate(list(map(read, runs)))) for read in reads.values()]
            sampled = sum(run["sampled"] for run in runs) / len(runs)
            rows.append([name, str(len(runs)), f"{sampled:.0f}", *values])
        parts += [f"## {title}", _markdown(rows)]
        known = [name for name in groups if control in (name, name.partition("@")[0])]
        against = max(known, key=lambda name: len(groups[name]), default=None)
        rows = [[f"paired, to {against}", "pairs", *reads]]
        for name, runs in groups.items():
            if against in (name, None):
                continue
            paired = [difference(runs, groups[against], read) for read in reads.values()]
            if paired[0] is not None:
                rows.append([name, str(paired[0].prompts), *(shown(one, "+") for one in paired)])
        parts += [_markdown(rows)] if len(rows) > 1 else []
    return "\n\n".join(parts)


def shown(value: Estimate | None, sign: str = "") -> str:
    """The mean and its interval as text."""
    if value is None:
        return "-"
    known = [x for x in (value.mean, value.low, value.high) if x is not None]
    numbers = [f"{round(x, 3) + 0.0:{sign}.3f}" for x in known]  # never "-0.000"
    return numbers[0] if len(set(numbers)) == 1 else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _by_pair(runs: Sequence[Record]) -> Mapping[tuple[int, int, tuple[float, ...]], Record]:
    return {
        (run["reference_seed"], run["seed"], tuple(run["before"]["pass_at"])): run for run in runs
    }


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in ruled)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m learning.tables", description=__doc__)
    add = parser.add_argument
    add("records", type=Path, nargs="+", help=".jsonl or .jsonl.gz")
    add("--only", nargs="+", help="these recipes or methods")
    add("--settings", nargs="+", help="these settings")
    add("--control", default="ppo", help="what the others are compared with")
    add("--step", type=int, help="as the runs were after this step, where that was evaluated")
    options = parser.parse_args()
    try:
        found = [
            record
            for record in read_records(options.records)
            if not options.settings or record["setting"] in options.settings
            if not options.only or name_of(record) in options.only
        ]
        found = found if options.step is None else at_step(found, options.step)
        print(tables(found, options.control))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
