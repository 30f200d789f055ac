"""`spo eval` and `spo report`: their arguments, and what they print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spo_ext.commands import fail

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers
    from spo_ext.evaluation.stored import Plan
    from spo_ext.rollout.generation import Generator

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
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--model", type=Path, metavar="FOLDER", help="of transformers, run here")
    policy.add_argument("--server", metavar="URL", help="of an OpenAI-compatible server")
    add("--served-model", metavar="NAME", help="what the server calls the model")
    add("--tokenizer", type=Path, metavar="FOLDER", help="of transformers (default: --model)")
    add("--n", type=int, default=20, help="completions of each prompt (default: 20)")
    add("--k", type=_integers, default=(1, 10), metavar="K,K", help="of pass@k (default: 1,10)")
    add("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    add("--top-p", type=float, default=1.0, help="of the sampling (default: 1)")
    add("--max-new-tokens", type=int, default=1024, help="then truncated (default: 1024)")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--batch-size", type=int, default=64, help="completions drawn at once (default: 64)")
    add("--reward", required=True, metavar="NAME", help="what judges, as in spo rollout")
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
        from spo_ext.evaluation import producers
        from spo_ext.evaluation.stored import evaluate_stored
        from spo_ext.evaluation.summary import table
        from spo_ext.store import TrajectoryStore
    except ImportError as error:
        return fail(error)
    try:
        plan = _plan(options)
        folder = options.tokenizer or options.model
        tokenizer = Tokenizer(folder)
        reward = producers.load_reward(options.reward)
        require_store(options.store)
    except ValueError as error:
        options.error(str(error))  # exits with status 2
    except (ImportError, OSError) as error:
        return fail(error)

    def generator() -> Generator:
        if options.server is not None:
            return producers.server_generator(options.server, options.served_model)
        return producers.model_generator(options.model, folder, options.batch_size)

    try:
        with TrajectoryStore(options.store) as store, _progress() as progress:
            result = evaluate_stored(
                store, plan, options.out, tokenizer, generator, reward, progress
            )
    except KeyboardInterrupt:
        return fail("interrupted; the same command continues", status=130)
    except _failures() as error:
        return fail(error)
    print(table(result))
    print(f"\nresults: {options.out / 'evaluation.json'}")
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    """Raises ValueError."""
    from spo_ext.evaluation.producers import describe_model
    from spo_ext.evaluation.redact import hide_passwords
    from spo_ext.evaluation.stored import Plan
    from spo_ext.rollout.generation import Sampling

    if (options.server is None) != (options.served_model is None):
        raise ValueError("eval: --served-model must be given with --server, and only with it")
    if options.server is None:
        policy = describe_model(options.model)
    elif options.tokenizer is None:
        raise ValueError("eval: --tokenizer must be given with --server, got None")
    else:
        policy = {"server": hide_passwords(options.server), "model": options.served_model}
    sampling = Sampling(
        options.n, options.temperature, options.top_p, options.max_new_tokens, options.seed
    )
    return Plan(
        split=options.split,
        sampling=sampling,
        ks=options.k,
        success=options.success,
        reward=options.reward,
        policy={**policy, "tokenizer": str(options.tokenizer or options.model)},
        limit=options.prompts,
        batch_size=options.batch_size,
        run=options.run_name,
        policy_version=options.policy_version,
    )


def require_store(where: str) -> None:
    """Raises FileNotFoundError: to read, a new store must not be made."""
    if "://" not in where and not Path(where).is_file():
        raise FileNotFoundError(f"there is no store {where}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on the standard error, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit="prompt", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _failures() -> tuple[type[BaseException], ...]:
    """What stores, models, servers and files may raise through no fault of the program."""
    from sqlalchemy.exc import SQLAlchemyError

    return (OSError, ValueError, ImportError, RuntimeError, SQLAlchemyError)
