"""What the store holds. Records check themselves when they are made, so nothing bad reaches it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spo_ext.checks import (
    check_integer,
    check_name,
    check_one_of,
    number,
    refuse,
    token_tuple,
)
from spo_ext.store.codec import encode_json

Kind = Literal["policy", "model", "human"]
Finish = Literal["eos", "truncated"]
Split = Literal["train", "dev", "test"]
# What reward functions get and rows of files hold under names of their own; the rest are TRL's.
RESERVED = frozenset(
    "prompt prompts prompt_ids completion completions completion_ids reward tests answer split spo "
    "trainer_state log_extra log_metric environments".split()
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who wrote a trajectory.

    kind "policy" needs the run and policy_version that sampled it; "model", another model, needs
    its name in `model`; "human" needs nothing. `run` of the last two names where they come from.
    """

    kind: Kind
    run: str | None = None
    policy_version: int | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        check_one_of("Origin", "kind", self.kind, get_args(Kind))
        needed = {"policy": ("run", "policy_version"), "model": ("model",), "human": ()}[self.kind]
        unused = {"policy": (), "model": ("policy_version",), "human": ("policy_version", "model")}
        for name in needed:
            if getattr(self, name) is None:
                refuse("Origin", name, f"given for kind {self.kind}", None)
        for name in unused[self.kind]:
            if getattr(self, name) is not None:
                refuse("Origin", name, f"None for kind {self.kind}", getattr(self, name))
        for name in ("run", "model"):
            if getattr(self, name) is not None:
                check_name("Origin", name, getattr(self, name))
        if self.policy_version is not None:
            check_integer("Origin", "policy_version", self.policy_version, 0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and how its completions are judged.

    content is text or chat messages; token_ids what the policy reads, None if not tokenised yet;
    tests and answer any JSON. columns, more fields of its row by name, are JSON too, none of them
    null and none with a name of RESERVED; reward functions get them. All but the split identify it:
    with other tests it is another prompt, because the rewards of its trajectories mean something
    else.
    """

    content: str | Sequence[Mapping[str, Any]]
    token_ids: Sequence[int] | None = None
    tests: Any = None
    answer: Any = None
    split: Split = "train"
    columns: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_one_of("Prompt", "split", self.split, get_args(Split))
        messages = self.content
        if not isinstance(messages, str) and not (
            isinstance(messages, Sequence)
            and messages
            and all(isinstance(message, Mapping) and "role" in message for message in messages)
        ):
            refuse("Prompt", "content", "text or a list of messages with a role", messages)
        if self.columns is not None:
            if not isinstance(self.columns, Mapping):
                refuse("Prompt", "columns", "an object of fields by name, or None", self.columns)
            for name, value in self.columns.items():
                check_name("Prompt", "the name of a column", name)
                if name in RESERVED:
                    refuse("Prompt", "columns", "without names that have another meaning", name)
                if value is None:
                    refuse("Prompt", f"columns[{name!r}]", "given, or left out", None)
            object.__setattr__(self, "columns", dict(self.columns) or None)
        for name in ("content", "tests", "answer", "columns"):
            try:
                encode_json(getattr(self, name))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Prompt: {name} must be JSON, got {error}") from None
        if self.token_ids is not None:
            object.__setattr__(
                self, "token_ids", token_tuple("Prompt", "token_ids", self.token_ids)
            )


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A completion of a stored prompt.

    Args:
        prompt_id: from `add_prompt`.
        token_ids: [T], T >= 1, as they were generated, the end token included if there was one.
        reward: finite or -inf; reason says why (a failed test, a judge's words).
        finish: "eos", or "truncated" at a limit of length.
        behaviour_logprobs: [T] nats, of the policy that sampled it, kept as float32.
        temperature: of the sampling; None if unknown, as for a human's.
        top_p: of the sampling; None if unknown.
        draw: tells equal completions of one origin apart, which would be one row otherwise.
    """

    prompt_id: int
    token_ids: Sequence[int]
    reward: float
    origin: Origin
    finish: Finish
    reason: str = ""
    behaviour_logprobs: Tensor | Sequence[float] | None = None
    temperature: float | None = None
    top_p: float | None = None
    draw: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        check_integer("Trajectory", "prompt_id", self.prompt_id, 1)
        put("token_ids", token_tuple("Trajectory", "token_ids", self.token_ids))
        if not self.token_ids:
            refuse("Trajectory", "token_ids", "at least one token", self.token_ids)
        if self.reward != -math.inf:
            number("Trajectory", "reward (unless it is -inf)", self.reward)
        put("reward", float(self.reward))
        if not isinstance(self.origin, Origin):
            refuse("Trajectory", "origin", "an Origin", self.origin)
        check_one_of("Trajectory", "finish", self.finish, get_args(Finish))
        if not isinstance(self.reason, str):
            refuse("Trajectory", "reason", "text", self.reason)
        if self.behaviour_logprobs is not None:
            name, size = "behaviour_logprobs", len(self.token_ids)
            put(name, logprob_tensor("Trajectory", name, self.behaviour_logprobs, size))
        if self.temperature is not None:
            put("temperature", number("Trajectory", "temperature", self.temperature, at_least=0.0))
        if self.top_p is not None:
            put("top_p", number("Trajectory", "top_p", self.top_p, above=0.0, at_most=1.0))
        check_integer("Trajectory", "draw", self.draw, 0)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredTrajectory(Trajectory):
    """A trajectory out of the store: token_ids a tuple, behaviour_logprobs float32 [T] or None.

    id grows in the order of commits. created_at is in seconds since 1970. duplicates counts how
    often it was appended again, conflicts how often of those with another reward.
    """

    id: int
    created_at: float
    duplicates: int
    conflicts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrompt(Prompt):
    """A prompt out of the store; created_at in seconds since 1970."""

    id: int
    created_at: float


@dataclass(frozen=True, slots=True)
class PromptValue:
    """An estimate of Q_0 in reward units, and what it rests on.

    n samples of the reference at this temperature and top_p, for this softness beta. reference is
    the fingerprint of the reference, "" if there is only one.
    """

    value: float
    n: int
    beta: float
    temperature: float
    top_p: float = 1.0
    reference: str = ""

    def __post_init__(self) -> None:
        def put(name: str, above: float, at_most: float = math.inf) -> None:
            checked = number("PromptValue", name, getattr(self, name), above=above, at_most=at_most)
            object.__setattr__(self, name, checked)

        put("value", -math.inf)
        check_integer("PromptValue", "n", self.n, 0)
        put("beta", 0.0)
        put("temperature", 0.0)
        put("top_p", 0.0, 1.0)
        if self.reference != "":
            check_name("PromptValue", "reference", self.reference)


@dataclass(frozen=True, slots=True)
class Appended:
    """ids in the order of the arguments; how many of them are new and how many were there.

    conflicts counts the duplicates that came with another reward than the stored one.
    """

    ids: tuple[int, ...]
    new: int
    duplicates: int
    conflicts: int


def logprob_tensor(owner: str, name: str, values: object, size: int) -> Tensor:
    """float32 [size], finite."""
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        refuse(owner, name, f"{size} numbers", values)
    if tensor.shape != (size,):
        got = list(tensor.shape)
        raise ValueError(f"{owner}: {name} must be [{size}], one per token, got {got}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{owner}: {name} must be finite, got nan or infinity")
    return tensor
