"""Rewards of the user's own function, in the form that TRL's trainers take."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spo_ext.rollout.generation import Judgement
from spo_ext.store.records import RESERVED, Prompt

_ARGUMENTS = ("prompts", "completions", "completion_ids", "answer", "tests")


class FunctionReward:
    """Reward of `f(prompts, completions, completion_ids, answer, tests, **columns)`, which returns
    a list of numbers or None.

    The function takes those of the arguments that it names, all of them with **kwargs; each is a
    list with an entry for every completion. Columns are those of the prompts, None where a prompt
    has not got one. It may be async. Where the prompt has messages, so has the completion. None or
    NaN leaves a completion without judgement.

    Raises ValueError if the function asks for a column that no prompt has, or for anything else,
    or returns something else.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function, self._name = function, name
        self.name = str(getattr(function, "__name__", name))  # in metrics
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._named = {p.name for p in named}
        others = [p for p in parameters if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
        self._required = {p.name for p in named if p.default is p.empty} - set(_ARGUMENTS)
        self._refuse([*(p.name for p in others), *sorted(self._required & RESERVED)], "their names")
        self._takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self._seen: set[str] = set()

    def look(self, prompts: Iterable[Prompt]) -> None:
        """At all prompts of a rollout: a column that some have is None for the others."""
        for prompt in prompts:
            self._seen.update(prompt.columns or ())

    def _refuse(self, wrong: Sequence[str], columns: str) -> None:
        if wrong:
            raise ValueError(
                f"reward {self._name}: its arguments must be among {', '.join(_ARGUMENTS)} and "
                f"columns of the prompts ({columns}), got {', '.join(wrong)}"
            )

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        token_ids: Sequence[Sequence[int]],
    ) -> list[Judgement | None]:
        if not prompts:
            return []
        self.look(prompts)
        known = ", ".join(sorted(self._seen)) or "they have none"
        self._refuse(sorted(self._required - self._seen), known)
        every: dict[str, list[Any]] = {
            name: [(prompt.columns or {}).get(name) for prompt in prompts]
            for name in sorted(self._seen)
        }
        every |= {
            "prompts": [prompt.content for prompt in prompts],
            "completions": [
                text
                if isinstance(prompt.content, str)
                else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, completions, strict=True)
            ],
            "completion_ids": [list(ids) for ids in token_ids],
            "answer": [prompt.answer for prompt in prompts],
            "tests": [prompt.tests for prompt in prompts],
        }
        found = self._rewards(
            {name: every[name] for name in every if self._takes_all or name in self._named}
        )
        if len(found) != len(prompts):
            raise ValueError(
                f"reward {self._name}: must return {len(prompts)} rewards, got {len(found)}"
            )
        return [self._judgement(value) for value in found]

    def _rewards(self, arguments: dict[str, list[Any]]) -> list[Any]:
        try:
            rewards = self._function(**arguments)
            if inspect.isawaitable(rewards):
                rewards = _result(rewards)
            if not isinstance(rewards, Iterable):
                raise ValueError(f"reward {self._name}: must return a list, got {rewards!r}")
            return list(rewards)
        except SystemExit as end:  # It would end the command as if all were done.
            raise ValueError(f"reward {self._name}: called sys.exit({end.code!r})") from end

    def _judgement(self, value: Any) -> Judgement | None:
        if value is None:
            return None
        try:
            reward = float(value)
        except (TypeError, ValueError):
            reward = math.inf
        if reward == math.inf:
            raise ValueError(
                f"reward {self._name}: must be finite numbers, -inf or None, got {value!r}"
            )
        return None if math.isnan(reward) else Judgement(reward)


def load_function(name: str) -> Callable[..., Any]:
    """The function of "package.module:function", "package.module.function" or "file.py:function".

    Raises ValueError if there is none, and whatever importing its module raises.
    """
    module, colon, attribute = name.rpartition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    if not module or not attribute:
        raise ValueError(
            "reward must be tests, answer, package.module:function or file.py:function, "
            f"got {name!r}"
        )
    try:
        found = _from_file(Path(module)) if module.endswith(".py") else _import(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, FileNotFoundError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be loaded: {error}") from error
    except SystemExit as end:
        raise ValueError(f"reward {name!r} cannot be loaded: it calls sys.exit") from end
    if not callable(found):
        raise ValueError(f"reward {name!r} must be a function, got {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def _import(module: str) -> Any:
    return importlib.import_module(module)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _result(awaitable: Awaitable[Any]) -> Any:
    """In a thread of its own: the caller's may run a loop already, as a notebook's does."""

    async def wait() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(wait())).result()
