"""`spo rollout`: its arguments."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_ext.commands import fail

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers

DIALECTS = ("vllm", "transformers", "openai", "llama.cpp")


def add_rollout(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "rollout",
        help="draw completions of stored prompts, judge them and store them",
        description="Completions of a model in this process, of a server with OpenAI's API, or of "
        "each policy that a trainer publishes. A batch is stored whole or not at all, and with "
        "--min-trajectories a rollout that was killed goes on where it was. Ctrl-C or SIGTERM "
        "ends it after the batch at hand, a second one at once.",
    )
    parser.add_argument(
        "--store", required=True, metavar="WHERE", help="a file, or postgresql://user@host/database"
    )
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--model", type=Path, metavar="FOLDER", help="what save_pretrained wrote")
    policy.add_argument(
        "--follow",
        type=Path,
        metavar="FOLDER",
        help="where policies are published; with --server only to know the version that it has",
    )
    parser.add_argument(
        "--store-retry",
        type=float,
        default=300.0,
        metavar="S",
        help="how long a database that went away is asked again (default: 300)",
    )
    parser.add_argument("--server", metavar="URL", help="such as http://localhost:8000/v1")
    _add_origin(parser)
    _add_sampling(parser)
    _add_reward(parser)
    _add_model(parser)
    _add_server(parser)
    _add_follow(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_rollout, error=parser.error)


def _add_origin(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is stored")
    group.add_argument("--run", dest="run_name", required=True, metavar="NAME")
    group.add_argument(
        "--policy-version", type=int, default=0, metavar="N", help="of --model or --server"
    )
    group.add_argument(
        "--origin-model", metavar="NAME", help="the completions are this other model's"
    )
    group.add_argument("--split", choices=("train", "dev", "test"), default="train")
    group.add_argument(
        "--prompts", type=int, metavar="LIMIT", help="the first so many of the split"
    )
    add_environment(group)
    group.add_argument(
        "--min-trajectories",
        type=int,
        metavar="N",
        help="leave out prompts that have as many of this run, version, temperature and top-p "
        "(default: 0; with --follow, --n)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num-generations",
        "--n",
        dest="n",
        type=int,
        default=8,
        metavar="N",
        help="completions of each prompt (default: 8)",
    )
    group.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    group.add_argument("--top-p", type=float, default=1.0, help="default: 1")
    group.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default: 512")
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts in a batch (default: 8)"
    )


def _add_reward(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reward")
    add_reward_names(group)
    group.add_argument("--reward-passed", type=float, default=1.0, metavar="R", help="default: 1")
    group.add_argument("--reward-failed", type=float, default=0.0, metavar="R", help="default: 0")
    group.add_argument("--sandbox-workers", type=int, metavar="N", help="default: one per CPU")
    group.add_argument(
        "--sandbox-packages",
        nargs="+",
        default=(),
        metavar="NAME",
        help="installed packages that programs may import, such as numpy",
    )
    group.add_argument(
        "--test-seconds",
        type=float,
        metavar="S",
        help="CPU time at least for an input of a script, or for all calls of a function",
    )
    group.add_argument(
        "--q0-beta",
        type=float,
        metavar="BETA",
        help="then estimate Q_0 of these prompts for this softness; for rollouts of the reference",
    )
    group.add_argument("--q0-smoothing", type=float, default=0.5, metavar="S", help="default: 0.5")
    group.add_argument(
        "--q0-range",
        type=float,
        nargs=2,
        metavar=("WORST", "BEST"),
        help="of rewards, for smoothing (default: of the reward if known, else of the samples)",
    )
    group.add_argument(
        "--q0-reference", default="", metavar="NAME", help="fingerprint to store it with"
    )


def add_environment(group: argparse._ActionsContainer) -> None:
    """--environment, which several commands have, and its arguments."""
    group.add_argument(
        "--environment",
        metavar="NAME",
        help="reasoning_gym:DATASET, verifiers:ENVIRONMENT, or path/file.py:name and "
        "package.module:name with prompts, and reward or step; its prompts are stored and drawn "
        "from, and it judges what follows, in place of --reward",
    )
    group.add_argument(
        "--environment-args",
        type=json_object,
        metavar="JSON",
        help='settings of the environment, as {"size": 500}',
    )


def check_environment(options: argparse.Namespace) -> None:
    """Raises ValueError for arguments that do not go with --environment."""
    if options.environment is None:
        if options.environment_args is not None:
            raise ValueError("--environment-args must be given with --environment")
        return
    for name in ("reward", "reward_weights"):
        if getattr(options, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} must not be given with --environment, which judges "
                f"by itself, got {getattr(options, name)}"
            )


def add_reward_names(group: argparse._ActionsContainer) -> None:
    """--reward, which several commands have, and its weights."""
    group.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="tests, answer, or a function of TRL's form as package.module:function or "
        "file.py:function (default: tests); tests and answer leave out prompts without them. Given "
        "several times, the reward is the sum",
    )
    group.add_argument(
        "--reward-weights",
        type=float,
        nargs="+",
        metavar="W",
        help="of each --reward in the sum (default: 1)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and tokenizer")
    group.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="default: that of the model's folder"
    )
    group.add_argument("--device", default="auto", help="default: a GPU if there is one")
    group.add_argument("--dtype", default="auto", help="default: that of the files")
    group.add_argument(
        "--generate-batch",
        type=int,
        default=64,
        metavar="N",
        help="completions generated at once (default: 64)",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--served-model", metavar="NAME", help="as the server knows it")
    group.add_argument(
        "--dialect",
        choices=DIALECTS,
        default="vllm",
        help="vllm (SGLang too): token ids in and out; others: texts (default: vllm)",
    )
    group.add_argument(
        "--api-key-from", metavar="VARIABLE", help="of the environment, holds the server's key"
    )
    group.add_argument(
        "--server-logprobs",
        action="store_true",
        help="store log-probabilities, which must be those of the full softmax at the temperature",
    )
    group.add_argument(
        "--logprobs-mode",
        choices=("processed_logprobs", "raw_logprobs"),
        default="processed_logprobs",
        help="of the vLLM server: processed_logprobs for a top-p of 1, raw_logprobs (vLLM's own "
        "default) for a temperature of 1 (default: processed_logprobs)",
    )
    group.add_argument(
        "--server-extra",
        type=json_object,
        metavar="JSON",
        help='more fields of each request, as {"stop": ["END"]}; null leaves one out. top_k, '
        "min_p and penalties are switched off without it",
    )
    group.add_argument("--concurrency", type=int, default=16, metavar="N", help="default: 16")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="default: 600")
    group.add_argument("--retries", type=int, default=5, metavar="N", help="default: 5")


def json_object(words: str) -> dict[str, Any]:
    """The type of an argument. Raises argparse.ArgumentTypeError unless it is a JSON object."""
    try:
        found = json.loads(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {words!r}: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {words!r}")
    return found


def _add_follow(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("follow")
    group.add_argument(
        "--prompts-per-version",
        type=int,
        default=64,
        metavar="N",
        help="prompts of a version; version v has items v N to v N + N of a stream that goes "
        "through the split again and again, shuffled by --seed (default: 64)",
    )
    group.add_argument(
        "--until-version", type=int, metavar="N", help="end after this version, or a later one"
    )


def _rollout(options: argparse.Namespace) -> int:
    try:
        # Imported here: it needs packages that the other commands do not.
        from spo_ext.rollout.producing import produce
    except ImportError as error:
        return fail(error)
    return produce(options)
