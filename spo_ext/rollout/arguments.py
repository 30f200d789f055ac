"""What the arguments of `spo rollout` stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from spo_ext.commands import api_key
from spo_ext.data.tokens import Tokenizer
from spo_ext.environments import Environment, load_environment
from spo_ext.rollout.commands import check_environment
from spo_ext.rollout.generation import Reward, Sampling
from spo_ext.rollout.rewards import as_reward, load_reward, test_options
from spo_ext.rollout.server import ServerGenerator, check_logprobs_mode


def checked_sampling(options: argparse.Namespace) -> Sampling:
    """Raises ValueError for arguments that do not go together, or are out of range."""
    sampling = Sampling(
        options.n, options.temperature, options.top_p, options.max_new_tokens, options.seed
    )
    check_environment(options)
    if options.server is not None:
        if options.model is not None:
            raise ValueError("--server must not be given with --model")
        for name in ("served_model", "tokenizer"):
            if getattr(options, name) is None:
                raise ValueError(f"--{name.replace('_', '-')} must be given with --server")
    if options.server is None and options.model is None and options.follow is None:
        raise ValueError("one of --model, --server and --follow must be given")
    if options.server_logprobs:
        if options.server is None:
            raise ValueError("--server-logprobs must be given with --server")
        check_logprobs_mode("--server-logprobs", options.logprobs_mode, sampling)
    if options.follow is not None and (options.q0_beta is not None or options.origin_model):
        raise ValueError("--q0-beta and --origin-model must not be given with --follow")
    if options.q0_beta is not None and options.origin_model is not None:
        raise ValueError(
            "--q0-beta must not be given with --origin-model, no reference of this run"
        )
    if options.q0_beta is not None and not 0 < options.q0_beta < math.inf:
        raise ValueError(f"--q0-beta must be > 0, got {options.q0_beta}")
    for name in ("prompts", "batch_size", "generate_batch", "prompts_per_version"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    if options.policy_version < 0:
        raise ValueError(f"--policy-version must be >= 0, got {options.policy_version}")
    if options.min_trajectories is None:
        options.min_trajectories = sampling.n if options.follow is not None else 0
    return sampling


def make_environment(options: argparse.Namespace) -> Environment | None:
    """The environment of --environment.

    Raises ValueError if there is no such one, or if it cannot be played against --server, and what
    its own code raises.
    """
    if options.environment is None:
        return None
    server = None
    if options.server is not None and options.environment.startswith("verifiers:"):
        from spo_ext.environments.hub import Server

        if getattr(options, "follow", None) is not None:
            raise ValueError(
                f"--follow must not be given with {options.environment}, whose episodes do not "
                "know when the server's weights change"
            )
        server = Server(
            options.server,
            options.served_model,
            options.tokenizer,
            options.api_key_from,
            getattr(options, "server_logprobs", False),
            options.concurrency,
        )
    environment = load_environment(options.environment, options.environment_args, server)
    environment.check_dialect(None if options.server is None else options.dialect)
    return environment


def make_reward(options: argparse.Namespace, **given: float) -> Reward:
    """The reward of --reward, or the sum of several; given are options of tests and answer.

    Raises ValueError for a name or an option that there is not.
    """
    of_tests = test_options(options.sandbox_workers, options.test_seconds, options.sandbox_packages)
    how: dict[str, dict[str, Any]] = {"tests": given | of_tests, "answer": given}
    names = options.reward or ["tests"]
    rewards = [load_reward(name, **how.get(name, {})) for name in names]
    return as_reward(rewards, options.reward_weights)


_OF_SERVER = {
    "dialect": "dialect",
    "timeout_s": "timeout",
    "retries": "retries",
    "concurrency": "concurrency",
    "logprobs": "server_logprobs",
    "logprobs_mode": "logprobs_mode",
    "extra": "server_extra",
}


def make_server(
    options: argparse.Namespace,
    tokenizer: Tokenizer,
    published: Callable[[], object] = lambda: None,
) -> ServerGenerator:
    """Raises ValueError if the environment lacks the key, or for a field of --server-extra that
    other arguments set."""
    how = {
        name: getattr(options, given)
        for name, given in _OF_SERVER.items()
        if hasattr(options, given)  # `spo eval` has fewer
    }
    return ServerGenerator(
        options.server,
        options.served_model,
        tokenizer=tokenizer,
        api_key=api_key(options.api_key_from),
        end_ids=tokenizer.end_ids,
        published=published,
        **how,
    )
