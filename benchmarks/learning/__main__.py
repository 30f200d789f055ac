"""The command: runs what is asked for, then reports on all of it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from spo_ext.contests.problems import Split

from .methods import METHODS
from .report import read_records, save_records, write_report
from .runs import restore
from .settings import SETTINGS
from .sweep import plan, sweep
from .tables import Record

_SPLITS: dict[str, Split] = {"dev": "development", "test": "test"}
# The controls are always among them, and come first: a budget may end in the middle.
_METHODS = (
    "ppo", "sft", "sft-ppo", "sft-group", "group-0.1", "grpo", "ppo:sharpen=0.8,kl=0.1",
    "group-0.1:offline=near,offline_share=0.5,baseline=online_group,sharpen=0.8",
    "replay-rare:sharpen=0.8@40", "squared", "cross-entropy", "expert",
)  # fmt: skip


def main() -> int:
    options = _parser().parse_args()
    if options.records:
        try:
            records = read_records(options.records)
        except (OSError, ValueError) as error:
            print(f"learning: --records: {error}", file=sys.stderr)
            return 2
        _report(records, options)
        return 0
    try:
        runs = plan(
            options.settings,
            options.methods,
            options.reference_seeds,
            options.seeds,
            options.steps,
            _SPLITS[options.split],
        )
    except ValueError as error:
        print(f"learning: {error}", file=sys.stderr)
        return 2
    results, cache = options.out / "runs", options.out / "references"
    try:
        restore(read_records(options.known), results)
    except (OSError, ValueError) as error:
        print(f"learning: --known: {error}", file=sys.stderr)
        return 2
    outcome = sweep(runs, results, cache, options.workers, options.budget)
    for name, reason in outcome.failed.items():
        print(f"learning: {name} failed: {reason}", file=sys.stderr)
    if outcome.left:
        print(f"learning: {len(outcome.left)} runs were not begun in the budget", file=sys.stderr)
    if outcome.files:
        _report(read_records(outcome.files), options)
    return 1 if outcome.failed or not outcome.files else 0


def _report(records: list[Record], options: argparse.Namespace) -> None:
    if options.save:
        save_records(records, options.save)
    print(write_report(records, options.out, options.control))
    print(f"\nReport: {options.out / 'report.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m learning", description=__doc__)
    add = parser.add_argument
    add("--settings", nargs="+", default=["standard"], help=f"of {', '.join(SETTINGS)}, stale-K")
    add(
        "--methods",
        nargs="+",
        default=list(_METHODS),
        help=f"of {', '.join(METHODS)}; NAME:field=value,... is a variation of one, NAME@40 takes "
        "40 steps",
    )
    add("--reference-seeds", nargs="+", type=int, default=[0, 1])
    add("--seeds", nargs="+", type=int, default=[0, 1], help="of the learning itself")
    add("--steps", type=int, default=120, help="sampled batches")
    add("--split", choices=_SPLITS, default="dev", help="dev to choose, test to report")
    add("--budget", type=float, help="minutes in all; references take one or two first")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread")
    add("--control", default="ppo", help="what every method is compared with")
    add("--records", type=Path, nargs="+", help="report on these files, and run nothing")
    add("--known", type=Path, nargs="+", default=[], help="records of runs that need not run again")
    add("--save", type=Path, help="a .jsonl file for all that is reported")
    add("--out", type=Path, default=Path("build/learning"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
