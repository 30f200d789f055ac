"""The `spo` command: one function per subcommand adds its parser and says what runs it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from spo_ext.commands import Parser, fail
from spo_ext.data.commands import add_export, add_import
from spo_ext.evaluation.commands import add_eval, add_report
from spo_ext.quickstart.config import Objective, QuickstartConfig
from spo_ext.rollout.commands import add_rollout
from spo_ext.shown import say
from spo_ext.trainer.commands import add_score, add_train, train

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers

_INTEGERS = {
    "seed": "varies problems, supervised training and SPO alike",
    "sft_steps": "optimiser steps of the supervised stage",
    "steps": "optimiser steps of SPO",
    "prompts_per_batch": "problems in a batch",
    "programs_per_prompt": "programs drawn for each of them",
    "sync_every": "batches drawn at once from a frozen policy",
    "train_problems": "problems that SPO trains on",
    "evaluation_problems": "problems evaluated on",
    "evaluation_samples": "programs drawn for each of them",
    "evaluate_every": "steps between evaluations",
    "threads": "CPU threads of PyTorch",
    "sandbox_workers": "sandbox processes",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; the exit status: 0, 1 if it failed, 2 for wrong arguments."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        return train(words[1:])  # a flag for each of some two hundred settings
    parser = Parser(prog="spo", description="Soft Policy Optimization for language models.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in _COMMANDS:
        add_command(subparsers)
    options = parser.parse_args(words)
    status: int = options.run(options)
    return status


def _add_quickstart(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="train a small policy to write programs that pass tests (minutes, two CPU cores)",
        description="Supervised training to a mediocre reference policy, then SPO against hidden "
        "tests. Writes metrics.jsonl, samples.jsonl, learning_curve.png and report.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = QuickstartConfig()
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder for the results"
    )
    for name, text in _INTEGERS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), metavar="N", help=text)
    parser.add_argument(
        "--objective", choices=get_args(Objective), default=defaults.objective, help="SPO loss"
    )
    parser.add_argument(
        "--beta", type=float, default=defaults.beta, help="softness, reward per nat of KL"
    )
    parser.add_argument(
        "--max-dropped-mass",
        type=float,
        default=defaults.max_dropped_mass,
        help="probability that the SPO gradient of a token may leave out",
    )
    parser.add_argument(
        "--evaluation-split",
        choices=("development", "test"),
        default=defaults.evaluation_split,
        help="problems to evaluate on; choose settings on development",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no final table")
    parser.set_defaults(run=_run_quickstart, error=parser.error)


def _run_quickstart(options: argparse.Namespace) -> int:
    fields = {field.name for field in dataclasses.fields(QuickstartConfig)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    try:
        config = QuickstartConfig(**given)
    except ValueError as error:
        options.error(str(error))  # exits with status 2
    try:
        # Imported here: it needs packages that the library itself does not.
        from spo_ext.quickstart.experiment import run_experiment
        from spo_ext.sandbox import SandboxError
    except ImportError as error:
        return fail(f"{error}. Install its packages: pip install 'spo_ext[quickstart]'")
    try:
        run_experiment(config, options.out, options.quiet)
    except (OSError, SandboxError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted", status=130)
    if not options.quiet:
        say(f"\nreport: {options.out / 'report.html'}")
    return 0


_COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    _add_quickstart,
    add_import,
    add_rollout,
    add_score,
    add_train,
    add_eval,
    add_report,
    add_export,
)

if __name__ == "__main__":
    sys.exit(main())
