"""What `spo eval` draws from and judges with, by its arguments."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

from spo_ext.commands import api_key, import_from_here
from spo_ext.data.tokens import Tokenizer
from spo_ext.environments import Environment
from spo_ext.rollout.generation import Generator, Reward
from spo_ext.shown import hide_passwords


def make_generator(
    options: argparse.Namespace, tokenizer: Tokenizer, environment: Environment | None = None
) -> Generator:
    """A model in this process, on the GPU if there is one, or one behind a server; with an
    environment, what plays it.

    Raises ImportError without transformers, ValueError if there is no model.
    """
    plain: Generator
    room: int | None
    if options.server is None:
        from spo_ext.integrations.heads import longest
        from spo_ext.models import load_model
        from spo_ext.rollout.embedded import ModelGenerator

        model = load_model(options.model)
        plain = ModelGenerator(model, tokenizer, batch_size=options.batch_size)
        room = longest(model)
    else:
        from spo_ext.rollout import arguments

        plain = server = arguments.make_server(options, tokenizer)
        room = server.context() if environment is not None else None
    return plain if environment is None else environment.generator(plain, tokenizer, room)


def make_environment(options: argparse.Namespace) -> Environment | None:
    """That of --environment, of the user's files in the current folder too. Raises ValueError."""
    from spo_ext.rollout import arguments

    import_from_here()
    return arguments.make_environment(options)


def make_reward(options: argparse.Namespace) -> Reward:
    """That of --reward, of functions of the user in the current folder too. Raises ValueError."""
    from spo_ext.rollout import arguments

    import_from_here()
    return arguments.make_reward(options)


def describe_policy(options: argparse.Namespace) -> dict[str, Any]:
    """What tells this policy from another, as JSON.

    Of a model the folder, and a hash of names, sizes and times of its files: a checkpoint that was
    written over is another policy. Raises ValueError if arguments lack.
    """
    if (options.server is None) != (options.served_model is None):
        raise ValueError("eval: --served-model must be given with --server, and only with it")
    tokenizer = {"tokenizer": os.fspath(options.tokenizer or options.model or "")}
    if options.server is not None:
        if options.tokenizer is None:
            raise ValueError("eval: --tokenizer must be given with --server, got None")
        api_key(options.api_key_from)
        where = hide_passwords(options.server)
        extra = {} if options.server_extra is None else {"server_extra": options.server_extra}
        return {"server": where, "model": options.served_model} | extra | tokenizer
    folder: Path = options.model
    if not folder.is_dir():
        raise ValueError(f"eval: --model must be an existing folder, got {os.fspath(folder)!r}")
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            about = path.stat()
            state.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return {"model": os.fspath(folder), "model_files": state.hexdigest()} | tokenizer
