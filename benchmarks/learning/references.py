"""Reference policies: trained once for each setting and seed, then read from the disk."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from spo_ext.contests.supervised import make_policy, train_reference
from spo_ext.sandbox import Sandbox

from .evaluation import evaluate
from .judging import Grader
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
    config = asdict(setting.config)
    parts = {name: config[name] for name in _FIELDS}
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
    path = _path(setting, seed, cache)
    if not path.exists():
        make_reference(setting, seed, cache)
    policy = make_policy(setting.config)
    policy.load_state_dict(torch.load(path, weights_only=True))
    return policy.requires_grad_(False)


def make_reference(setting: Setting, seed: int, cache: Path, quiet: bool = True) -> dict[str, Any]:
    """Trains it unless it is there. Returns its evaluation on the development problems."""
    path = _path(setting, seed, cache)
    facts = path.with_suffix(".json")
    if not facts.exists():
        config = replace(setting.config, seed=seed)
        started = time.perf_counter()
        with (
            torch.random.fork_rng(devices=[]),
            tempfile.TemporaryDirectory() as folder,
            Sandbox(workers=config.sandbox_workers) as sandbox,
        ):
            policy = train_reference(config, Path(folder), quiet=quiet).requires_grad_(False)
            problems = setting.problems("development", seed)
            grader = Grader(sandbox)
            found = evaluate(policy, policy, policy, problems, grader, config, 0, None)
        write_whole(path, lambda file: torch.save(policy.state_dict(), file))
        write_text(facts, json.dumps({**found, "seconds": time.perf_counter() - started}))
    answer: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return answer


def write_whole(path: Path, write: Any) -> None:
    """All of the file or none of it, also when several processes write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_text(path: Path, text: str) -> None:
    """As `write_whole` does."""
    write_whole(path, lambda file: file.write(text.encode()))


def _path(setting: Setting, seed: int, cache: Path) -> Path:
    return cache / f"reference-{reference_key(setting, seed)}.pt"
