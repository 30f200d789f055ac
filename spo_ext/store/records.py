"""What the store holds. Records check themselves when they are made, so nothing bad reaches it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

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

    @property
    def template(self) -> dict[str, Any]:
        """Arguments of the chat template besides the messages: the columns tools and
        chat_template_kwargs."""
        columns = self.columns or {}
        tools = {"tools": columns["tools"]} if columns.get("tools") else {}
        return {**columns.get("chat_template_kwargs", {}), **tools}


class Segment(NamedTuple):
    """A context, what follows it, and which of that the policy wrote (None: all)."""

    context: tuple[int, ...]
    token_ids: tuple[int, ...]
    mask: tuple[bool, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """What followed a stored prompt: a completion, or the turns of a policy and its environment.

    Args:
        prompt_id: from `add_prompt`.
        token_ids: [T], T >= 1, as they were generated, the end token included if there was one;
            of several turns all, with what the environment said in between.
        reward: finite or -inf, at the end; reason says why (a failed test, a judge's words).
        finish: "eos", or "truncated" at a limit of length.
        behaviour_logprobs: [T] nats, of the policy that sampled it, kept as float32; 0 where
            another wrote the token.
        temperature: of the sampling; None if unknown, as for a human's.
        top_p: of the sampling; None if unknown.
        draw: tells equal completions of one origin apart, which would be one row otherwise.
        completion_mask: [T] bool, True where the policy wrote the token, False where a tool, a user
            or a template did; None if the policy wrote all. At least one is True.
        contexts: what the policy read where it was not the prompt and all tokens so far: by the
            place in token_ids from which on it holds, the ids that stand there instead of all that
            came before. So are turns kept whose template writes earlier turns anew.
        token_rewards: [T], rewards on the way, besides the one at the end; the return of the
            trajectory is the sum of all. None if there are none. A token of the environment hands
            its reward to the policy's last token before it.
        info: JSON of the writer's own; no part of what tells trajectories apart.
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
    completion_mask: Sequence[bool] | None = None
    contexts: Mapping[int, Sequence[int]] | None = None
    token_rewards: Tensor | Sequence[float] | None = None
    info: Any = None

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
        size = len(self.token_ids)
        mask = _mask(self.completion_mask, size)
        put("completion_mask", mask)
        put("contexts", _contexts(self.contexts, size))
        if self.behaviour_logprobs is not None:
            name, given = "behaviour_logprobs", self.behaviour_logprobs
            put(name, per_token_tensor("Trajectory", name, given, size, mask))
        if self.token_rewards is not None:
            paid = per_token_tensor("Trajectory", "token_rewards", self.token_rewards, size)
            if mask is not None and bool(paid[: mask.index(True)].any()):
                expected = "0 before the policy's first token, which they cannot depend on"
                refuse("Trajectory", "token_rewards", expected, paid.tolist())
            put("token_rewards", paid if bool(paid.any()) else None)
        try:
            encode_json(self.info)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Trajectory: info must be JSON, got {error}") from None
        if self.temperature is not None:
            put("temperature", number("Trajectory", "temperature", self.temperature, at_least=0.0))
        if self.top_p is not None:
            put("top_p", number("Trajectory", "top_p", self.top_p, above=0.0, at_most=1.0))
        check_integer("Trajectory", "draw", self.draw, 0)

    @property
    def num_policy_tokens(self) -> int:
        """How many of token_ids the policy wrote."""
        mask = self.completion_mask
        return len(self.token_ids) if mask is None else sum(mask)

    def of_policy(self, values: Tensor) -> Tensor:
        """Of values [T] those of the tokens that the policy wrote."""
        mask = self.completion_mask
        return values if mask is None else values[torch.tensor(mask)]

    @property
    def num_turns(self) -> int:
        """How often the policy spoke."""
        mask = self.completion_mask or (True,) * len(self.token_ids)
        starts = self.contexts or {}
        return sum(one and (i == 0 or not mask[i - 1] or i in starts) for i, one in enumerate(mask))

    @property
    def total_reward(self) -> float:
        """The return: the reward at the end and those on the way."""
        paid = self.token_rewards
        return self.reward + (0.0 if paid is None else float(torch.as_tensor(paid).double().sum()))

    def segments(self, prompt_ids: Sequence[int]) -> list[Segment]:
        """What the policy read and what followed, once for each context."""
        contexts = self.contexts or {}
        starts = [0, *contexts, len(self.token_ids)]
        return [
            Segment(
                tuple(contexts.get(start, prompt_ids)),
                tuple(self.token_ids[start:end]),
                None if self.completion_mask is None else tuple(self.completion_mask[start:end]),
            )
            for start, end in itertools.pairwise(starts)
        ]


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


def _mask(given: object, size: int) -> tuple[bool, ...] | None:
    """None if all are True."""
    if given is None:
        return None
    values = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(values, Sequence) or not all(one in (True, False) for one in values):
        refuse("Trajectory", "completion_mask", "true or false for each token", given)
    mask = tuple(map(bool, values))
    if len(mask) != size or not any(mask):
        expected = f"[{size}], one for each token, with at least one of the policy's"
        refuse("Trajectory", "completion_mask", expected, given)
    return None if all(mask) else mask


def _contexts(given: object, size: int) -> dict[int, tuple[int, ...]] | None:
    """In the order of their places; None without any."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        refuse("Trajectory", "contexts", "token ids by the place where they begin to hold", given)
    for start in given:
        if type(start) is not int or not 0 < start < size:
            refuse("Trajectory", "contexts", f"by places from 1 to {size - 1}", start)
        if not len(given[start]):
            refuse("Trajectory", f"contexts[{start}]", "at least one token", given[start])
    found = {
        start: token_tuple("Trajectory", f"contexts[{start}]", given[start])
        for start in sorted(given)
    }
    return found or None


def per_token_tensor(
    owner: str, name: str, values: object, size: int, mask: Sequence[bool] | None = None
) -> Tensor:
    """float32 [size], finite, and 0 where the mask is False, whatever stands there."""
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        refuse(owner, name, f"{size} numbers", values)
    if tensor.shape != (size,):
        got = list(tensor.shape)
        raise ValueError(f"{owner}: {name} must be [{size}], one per token, got {got}")
    if mask is not None:
        tensor = tensor.where(torch.tensor(mask), 0.0)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{owner}: {name} must be finite, got nan or infinity")
    return tensor
