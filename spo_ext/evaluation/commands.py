"""`spo eval` and `spo report`: their arguments, and what they print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spo_ext.commands import fail, failures, require_store
from spo_ext.rollout.commands import (
    DIALECTS,
    add_environment,
    add_reward_names,
    check_environment,
    json_object,
)
from spo_ext.shown import say

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers
    from spo_ext.evaluation.stored import Plan

_T = TypeVar("_T")
_SPLITS = ("train", "dev", "test")
_STORE = "a file, or postgresql://user@host/database"


def add_eval(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="pass@k of a model or a server on prompts of a store",
        description="Draws completions of each prompt, judges them and writes evaluation.json and "
        "samples.jsonl. Started again with the same settings it continues.",
    )
    add = parser.add_argument
    add("--store", required=True, metavar="WHERE", help=_STORE)
    add("--split", choices=_SPLITS, default="test", help="whose prompts (default: test)")
    add("--prompts", type=int, metavar="LIMIT", help="only the first so many of them")
    add_environment(parser)
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--model", type=Path, metavar="FOLDER", help="of transformers, run here")
    policy.add_argument("--server", metavar="URL", help="of an OpenAI-compatible server")
    add("--served-model", metavar="NAME", help="what the server calls the model")
    add("--dialect", choices=DIALECTS, default="vllm", help="of the server (default: vllm)")
    add("--api-key-from", metavar="VARIABLE", help="of the environment, with the server's key")
    add("--server-extra", type=json_object, metavar="JSON", help="more fields of each request")
    add("--concurrency", type=int, default=16, metavar="N", help="requests at once (default: 16)")
    add("--tokenizer", type=Path, metavar="FOLDER", help="of transformers (default: --model)")
    add(
        "--num-generations",
        "--n",
        dest="n",
        type=int,
        default=20,
        metavar="N",
        help="completions of each prompt (default: 20)",
    )
    add("--k", type=_integers, default=(1, 10), metavar="K,K", help="of pass@k (default: 1,10)")
    add("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    add("--top-p", type=float, default=1.0, help="of the sampling (default: 1)")
    add("--max-new-tokens", type=int, default=1024, help="then truncated (default: 1024)")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add(
        "--generate-batch",
        "--batch-size",
        dest="batch_size",
        type=int,
        default=64,
        metavar="N",
        help="completions generated at once (default: 64)",
    )
    add_reward_names(parser)
    add("--sandbox-workers", type=int, metavar="N", help="of tests (default: one per CPU)")
    add(
        "--sandbox-packages", nargs="+", default=(), metavar="NAME", help="programs may import them"
    )
    add("--test-seconds", type=float, metavar="S", help="of tests: time for one of them")
    add("--success", type=float, default=1.0, help="a reward that has passed (default: 1)")
    add("--run", dest="run_name", metavar="NAME", help="store samples too, as run NAME/eval")
    add("--policy-version", type=int, metavar="N", help="of the run, needed with --run")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for the results")
    parser.set_defaults(run=_eval, error=parser.error)


def _integers(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers like 1,10, got {words!r}") from None


def _eval(options: argparse.Namespace) -> int:
    try:
        # Imported here: they need packages that the other commands do not.
        from spo_ext.data.tokens import Tokenizer
        from spo_ext.environments import fill
        from spo_ext.evaluation import producers
        from spo_ext.evaluation.records import table
        from spo_ext.evaluation.stored import evaluate_stored
        from spo_ext.store import TrajectoryStore
    except ImportError as error:
        return fail(error)
    with ExitStack() as stack:
        try:
            check_environment(options)
            plan = _plan(options)
            tokenizer = Tokenizer(options.tokenizer or options.model)
            environment = producers.make_environment(options)
            given = environment.reward if environment else producers.make_reward(options)
            reward = _closed_by(stack, given)
        except ValueError as error:
            options.error(str(error))  # exits with status 2
        except failures() as error:
            return fail(error)
        try:
            if environment is None:
                require_store(options.store)
            store = stack.enter_context(TrajectoryStore(options.store))
            result = evaluate_stored(
                store,
                plan,
                options.out,
                tokenizer,
                lambda: _closed_by(
                    stack, producers.make_generator(options, tokenizer, environment)
                ),
                reward,
                stack.enter_context(_progress()),
                fill(store, environment, options.split, tokenizer) if environment else None,
            )
        except KeyboardInterrupt:
            return fail("interrupted; the same command continues", status=130)
        except failures() as error:
            return fail(error)
    say(table(result))
    say(f"\nresults: {options.out / 'evaluation.json'}")
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    """Raises ValueError."""
    from spo_ext.evaluation.producers import describe_policy
    from spo_ext.evaluation.stored import Plan
    from spo_ext.rollout.generation import Sampling

    sampling = Sampling(
        options.n, options.temperature, options.top_p, options.max_new_tokens, options.seed
    )
    return Plan(
        split=options.split,
        sampling=sampling,
        ks=options.k,
        success=options.success,
        reward=_described_reward(options),
        policy=describe_policy(options),
        limit=options.prompts,
        batch_size=options.batch_size,
        run=options.run_name,
        policy_version=options.policy_version,
    )


def _described_reward(options: argparse.Namespace) -> dict[str, Any]:
    """What the plan says of the rewards; what is left out is as in evaluations of before."""
    if options.environment is not None:
        return {
            "environment": options.environment,
            "environment_args": options.environment_args or {},
        }
    names = options.reward or ["tests"]
    return {
        "reward": names if len(names) > 1 else names[0],
        "test_seconds": options.test_seconds,
        "reward_weights": options.reward_weights or None,
        "sandbox_packages": sorted(set(options.sandbox_packages)) or None,
    }


def _closed_by(stack: ExitStack, thing: _T) -> _T:
    """Rewards and generators may hold processes and connections."""
    stack.callback(getattr(thing, "close", lambda: None))
    return thing


def add_report(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="curves, evaluations and samples of a run as one HTML file",
        description="Reads the folder that a Trainer wrote: trainer_state.json or those of its "
        "checkpoints, metrics.jsonl, spo_config.json and evaluation*/. Curves are also written as "
        "PNG files beside the page.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN_DIR", help="output_dir of the run")
    add("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    add("--store", metavar="WHERE", help=f"show its newest trajectories of the run; {_STORE}")
    add("--run", dest="run_name", metavar="NAME", help="of the run in the store")
    add("--tokenizer", type=Path, metavar="FOLDER", help="default: of the last checkpoint")
    parser.set_defaults(run=_report, error=parser.error)


def _report(options: argparse.Namespace) -> int:
    try:
        # Imported here: they need packages that the other commands do not.
        from spo_ext.evaluation.records import compared
        from spo_ext.evaluation.report import newest_trajectories, write_report
        from spo_ext.evaluation.runs import read_run
    except ImportError as error:
        return fail(f"spo report needs matplotlib ({error}): pip install matplotlib")
    out = options.out or options.folder / "report.html"
    try:
        run = read_run(options.folder)
        stored = []
        if options.store is not None:
            require_store(options.store)
            decode = _decoder(options.tokenizer or run.checkpoint, options.tokenizer is not None)
            stored = newest_trajectories(options.store, options.run_name or run.name, decode)
        curves = write_report(run, out, stored)
    except failures() as error:
        return fail(error)
    if run.evaluations:
        values = {one.name: one.result.get("values", {}) for one in run.evaluations}
        say(compared({n.removeprefix("evaluation-"): found for n, found in values.items()}))
    say(f"{out}, and {len(curves)} charts in {out.with_name(out.stem + '_curves')}")
    return 0


def _decoder(folder: Path | None, required: bool) -> Callable[[Sequence[int]], str] | None:
    """None if a checkpoint has no tokenizer. Raises ValueError if a required folder has none."""
    from spo_ext.data.tokens import Tokenizer

    if folder is None or not (required or (folder / "tokenizer_config.json").is_file()):
        return None
    tokenizer = Tokenizer(folder)
    return lambda ids: str(tokenizer.completion("", tuple(ids)))


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on the standard error, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit="prompt", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
