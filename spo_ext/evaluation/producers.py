"""What `spo eval` draws from and judges with."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from spo_ext.rollout.generation import Generator, Reward


def model_generator(folder: Path, tokenizer: Path, batch_size: int) -> Generator:
    """A model of transformers in this process, on the GPU if there is one.

    Raises ImportError without transformers and OSError or ValueError if there is no model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spo_ext.rollout.embedded import ModelGenerator

    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    text = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    generator: Generator = ModelGenerator(model, text, batch_size=batch_size)
    return generator


def server_generator(url: str, model: str) -> Generator:
    """A model behind an OpenAI-compatible server."""
    from spo_ext.rollout.server import ServerGenerator

    generator: Generator = ServerGenerator(url, model)
    return generator


def load_reward(name: str) -> Reward:
    """The reward of this name. Raises ValueError if there is none."""
    from spo_ext.rollout.rewards import load_reward as load

    reward: Reward = load(name)
    return reward


def describe_model(folder: Path) -> dict[str, Any]:
    """The folder, and a hash of names, sizes and times of its files.

    A checkpoint that was written over is another policy. Raises ValueError for no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"eval: --model must be an existing folder, got {os.fspath(folder)!r}")
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            about = path.stat()
            state.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return {"model": os.fspath(folder), "model_files": state.hexdigest()}
