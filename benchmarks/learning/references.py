"""Reference policies: trained once for each setting and seed, then read from the disk."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from spo_ext.contests.supervised import make_policy, train_reference

from .settings import Setting

# Of the settings, only these have a part in the weights.
_FIELDS = (
    "vague_probability", "least_operations", "most_operations", "max_program_tokens",
    "hidden_size", "intermediate_size", "layers", "heads",
    "sft_steps", "sft_batch", "sft_learning_rate", "corruption", "token_noise",
)  # fmt: skip
_SOURCES = ("problems", "programs", "vocabulary", "supervised")


def reference_key(setting: Setting, seed: int) -> str:
    """Names everything that the weights depend on, the code that makes them included."""
    values = asdict(setting)
    parts = {name: values[name] for name in _FIELDS}
    parts |= {"seed": seed, "torch": torch.__version__}
    for name in _SOURCES:
        file = import_module(f"spo_ext.contests.{name}").__file__
        parts[name] = code_only(Path(str(file)).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_only(source: str) -> str:
    """What Python makes of it: another comment, docstring or line break is the same code."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def load_reference(setting: Setting, seed: int, cache: Path) -> Qwen2ForCausalLM:
    """The policy after its supervised stage, frozen; trained now if it is not in the cache."""
    path = cache / f"reference-{reference_key(setting, seed)}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(dir=cache) as folder:
            policy = train_reference(replace(setting, seed=seed), Path(folder), quiet=True)
            whole = Path(folder) / path.name  # all of a file or none, also for several processes
            torch.save(policy.state_dict(), whole)
            os.replace(whole, path)
    policy = make_policy(setting)
    policy.load_state_dict(torch.load(path, weights_only=True))
    return policy.requires_grad_(False)
