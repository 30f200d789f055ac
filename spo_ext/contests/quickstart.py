"""`spo quickstart`: a store, a model folder and a yaml, then the commands of any other task."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spo_ext.commands import fail, failures
from spo_ext.contests.recipe import SPO_STEPS, Contest, spo_settings

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers

_NUMBERS = {
    "seed": "varies problems, supervised training and SPO alike",
    "sft_steps": "optimiser steps of the supervised stage",
    "train_problems": "problems that SPO trains on",
    "evaluation_problems": "problems evaluated on",
}
_BEFORE, _AFTER = "evaluation-0-before", "evaluation-1-after"


def add_quickstart(subparsers: Subparsers, command: Callable[[Sequence[str]], int]) -> None:
    """command: runs `spo` with these words, and returns its exit status."""
    parser = subparsers.add_parser(
        "quickstart",
        help="train a small policy to write programs that pass tests (minutes, two CPU cores)",
        description="Writes problems with hidden tests into a store, trains a mediocre reference "
        "policy, and then runs spo eval, spo train and spo report on them, as you would on your "
        "own. Each command is printed before it runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    defaults = Contest()
    for name, text in _NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, default=getattr(defaults, name), metavar="N", help=text)
    add("--steps", type=int, default=SPO_STEPS, metavar="N", help="optimiser steps of SPO")
    add("--evaluation-samples", type=int, default=20, metavar="N", help="programs of a problem")
    add("--threads", type=int, default=2, metavar="N", help="CPU threads of PyTorch")
    add("--quiet", action="store_true", help="no progress bars and no output but errors")
    parser.set_defaults(run=lambda options: _run(options, command), error=parser.error)


def _run(options: argparse.Namespace, command: Callable[[Sequence[str]], int]) -> int:
    try:
        contest = Contest(**{name: getattr(options, name) for name in _NUMBERS})
        for name in ("steps", "evaluation_samples", "threads"):
            if getattr(options, name) < 1:
                raise ValueError(f"{name} must be greater than 0, got {getattr(options, name)}")
    except ValueError as error:
        options.error(str(error))  # exits with status 2
    try:
        # Imported here: they need packages that the other commands do not.
        import matplotlib  # noqa: F401
        import torch

        import spo_ext.contests.supervised  # noqa: F401
    except ImportError as error:
        return fail(f"{error}. Install its packages: pip install 'spo_ext[quickstart]'")
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        if options.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            _prepare(contest, options)
        except failures() as error:
            return fail(error)
        except KeyboardInterrupt:
            return fail("interrupted", status=130)
        for words in commands(contest, options.out, options.evaluation_samples):
            print(f"\n$ spo {shlex.join(words)}", flush=True)
            status = command(words)
            if status:
                return status
    return 0


def commands(contest: Contest, out: Path, n: int) -> list[list[str]]:
    """The words of `spo eval`, `spo train` and `spo report`; n: programs of a problem."""
    store = ["--store", str(out / "store.db")]

    def evaluate(model: Path, name: str) -> list[str]:
        reward = ["--reward", "spo_ext.contests.reward:passes", "--k", f"1,{min(10, n)}"]
        shape = ["--n", n, "--max-new-tokens", contest.max_program_tokens, "--batch-size", 32 * n]
        where = ["--split", "test", "--model", str(model), "--out", str(out / name)]
        return ["eval", *store, *where, *reward, *map(str, shape)]

    return [
        evaluate(out / "model", _BEFORE),
        ["train", "--config", str(out / "train.yaml")],
        evaluate(out, _AFTER),
        ["report", str(out), *store],
    ]


def _prepare(contest: Contest, options: argparse.Namespace) -> None:
    """Writes the store, the model folder and the yaml; files of an earlier quickstart go."""
    from spo_ext.contests.supervised import train_reference
    from spo_ext.contests.vocabulary import make_tokenizer
    from spo_ext.store import TrajectoryStore

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for path in (*out.glob("store.db*"), out / "metrics.jsonl"):
        path.unlink(missing_ok=True)
    for name in (_BEFORE, _AFTER):
        shutil.rmtree(out / name, ignore_errors=True)
    with TrajectoryStore(out / "store.db") as store:
        store.add_prompts(contest.prompts("train"))
        store.add_prompts(contest.prompts("test"))
    print(
        f"{out / 'store.db'}: prompts and hidden tests of {contest.train_problems} problems to "
        f"train on and {contest.evaluation_problems} held-out ones"
    )
    policy = train_reference(contest, out / "model", quiet=options.quiet)
    policy.save_pretrained(out / "model")
    make_tokenizer().save_pretrained(out / "model")
    print(f"{out / 'model'}: a policy and tokenizer, trained on programs most of which are wrong")
    settings = {"model": str(out / "model"), **spo_settings(contest, out, max_steps=options.steps)}
    settings |= {"disable_tqdm": options.quiet}
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())
    (out / "train.yaml").write_text(text, encoding="utf-8")
    print(f"{out / 'train.yaml'}: the settings of spo train")
