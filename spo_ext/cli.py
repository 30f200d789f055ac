"""The `spo` command: one function per subcommand adds its parser and says what runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spo_ext.commands import Parser
from spo_ext.contests.quickstart import add_quickstart
from spo_ext.data.commands import add_export, add_import
from spo_ext.evaluation.commands import add_eval, add_report
from spo_ext.rollout.commands import add_rollout
from spo_ext.trainer.commands import add_score, add_train, train

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers


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


_COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    lambda subparsers: add_quickstart(subparsers, main),
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
