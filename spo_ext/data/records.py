"""What a row of a file says, before it has token ids, and the checked reading of its fields."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from spo_ext.store.records import Finish, Origin, Prompt, Split

Row = Mapping[str, Any]
Content = str | Sequence[Mapping[str, Any]]


class RowError(ValueError):
    """Why a row cannot be imported."""


@dataclass(frozen=True)
class Turn:
    """What the policy read, all of it, and what it wrote then.

    token_ids may be empty in a last turn, whose context is what the environment said at the end.
    logprobs: one for each of token_ids. reward: for this turn, besides that of the trajectory. own:
    False if another wrote it in the policy's place, from whom nothing is to be learned.
    """

    context: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float] | None = None
    reward: float = 0.0
    own: bool = True


@dataclass(frozen=True)
class Completion:
    """A trajectory to be; content may be None where token_ids are given.

    A solution comes with a prompt and tests that are worth having without it. turns: how the row
    gives it, in token ids; else content may be messages of several turns, to which turn_rewards
    belong, one for each of the assistant's. draw, completion_mask, contexts, token_rewards, info:
    as in `Trajectory`.
    """

    content: Content | None
    reward: float
    origin: Origin
    finish: Finish = "eos"
    reason: str = ""
    token_ids: Sequence[int] | None = None
    behaviour_logprobs: Sequence[float] | None = None
    temperature: float | None = None
    top_p: float | None = None
    draw: int = 0
    solution: bool = False
    completion_mask: Sequence[bool] | None = None
    contexts: Mapping[int, Sequence[int]] | None = None
    token_rewards: Sequence[float] | None = None
    info: Any = None
    turns: Sequence[Turn] | None = None
    turn_rewards: Sequence[float] | None = None


@dataclass(frozen=True)
class Record:
    """A prompt and what is known of it.

    foreign counts its solutions in other languages than Python 3, which no test of it can judge;
    notes are for whoever imports it; without are the columns that were left out at his word.
    """

    prompt: Prompt
    completions: tuple[Completion, ...] = ()
    foreign: int = 0
    notes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Defaults:
    """What the user said of all rows; None leaves it to the row. without: columns to leave out."""

    split: Split | None = None
    origin: Origin | None = None
    without: tuple[str, ...] = ()

    def origin_of(self, data_set: str) -> Origin:
        """People wrote the solutions of the named data sets."""
        return self.origin or Origin("human", run=data_set)

    def split_of(self, row: Row) -> Split:
        """Checked by the prompt."""
        own = row.get("split")
        return self.split or own or "train"


class Fields(Mapping[str, Any]):
    """A row that knows which of its fields were read, so that the others can be kept.

    A field that is None is one that the row does not have.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = {name: value for name, value in row.items() if value is not None}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def has(self, name: str) -> bool:
        """Without reading it."""
        return name in self._row

    def left(self) -> list[str]:
        """The fields that nobody read."""
        return sorted(self._row.keys() - self._read)

    def json(self, names: Iterable[str]) -> dict[str, Any]:
        """These fields. Raises RowError for what JSON cannot hold."""
        items = [(name, as_json(name, self._row[name])) for name in names]
        return {name: value for name, value in items if value is not None}


def as_json(name: str, value: Any) -> Any:
    """A value of a Parquet file too: times become text, nan is nothing. Raises RowError."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: as_json(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(name, item) for item in value]
    if isinstance(value, datetime.date | datetime.time):  # datetime too
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral() else float(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise RowError(
        f"the column {name} must be JSON to be kept, got {shown(value)}: leave it out with "
        f"--without-columns {name}"
    )


def solution(source: str, reward: float, origin: Origin) -> Completion:
    """What a data set calls a solution, or an incorrect one if the reward is 0."""
    reason = "solution" if reward else "incorrect solution"
    return Completion(source, reward, origin, reason=reason, solution=True)


def text(row: Row, name: str) -> str:
    """A field that must be text with something in it. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} must be text that is not blank, got {shown(value)}")
    return value


def optional_text(row: Row, name: str) -> str:
    """Text, or "" where there is none. Raises RowError."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{name} must be text, got {shown(value)}")
    return value or ""


def strings(row: Row, name: str) -> list[str]:
    """A list of texts, empty where there is none. Raises RowError."""
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RowError(f"{name} must be a list of texts, got {shown(value)}")
    return value


def parsed(row: Row, name: str) -> Any:
    """A field that holds JSON as text, or its value already; None for blank. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str):
        return value
    return parse_json(name, value) if value.strip() else None


def parse_json(name: str, value: str | bytes) -> Any:
    """Raises RowError."""
    try:
        return json.loads(value, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name} must be JSON: {error}") from None


def whole_number(digits: str) -> int:
    """An integer of a JSON text; Python by itself refuses those of more than 4300 digits."""
    return int(digits) if len(digits) <= 4300 else int(Decimal(digits))


def shown(value: object) -> str:
    """Short enough for one line of a report."""
    words = ascii(value)
    return words if len(words) <= 60 else words[:57] + "..."


MESSAGES = "completion"  # in a trajectory's info: the messages that its turns are


def is_plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is one message of the assistant, in words alone."""
    return len(messages) == 1 and set(messages[0]) <= {"role", "content"}


def join(prompt_ids: Sequence[int], turns: Sequence[Turn]) -> dict[str, Any]:
    """The arguments of `Trajectory` that turns decide: token_ids, completion_mask, contexts,
    token_rewards and behaviour_logprobs.

    Where a turn's context begins with all that came before, the rest of it is what the environment
    said; where it does not, a template wrote earlier turns anew, and `contexts` keeps it.

    Raises RowError if the first context does not begin with the prompt, or if logprobs are not one
    for each token.
    """
    ids: list[int] = []
    mask: list[bool] = []
    rewards: list[float] = []
    logprobs: list[float] = []
    contexts: dict[int, list[int]] = {}
    read = list(prompt_ids)
    for turn in turns:
        context = list(turn.context)
        if context[: len(read)] == read:
            said = context[len(read) :]
            ids += said
            mask += [False] * len(said)
            rewards += [0.0] * len(said)
            logprobs += [0.0] * len(said)
        elif not ids:
            raise RowError("the first turn must read the prompt: it has other token ids")
        elif turn.token_ids:
            contexts[len(ids)] = context
        else:
            continue  # nobody answered to it
        if turn.logprobs is not None and len(turn.logprobs) != len(turn.token_ids):
            raise RowError(
                f"logprobs must be one for each of the {len(turn.token_ids)} tokens of a turn, got "
                f"{len(turn.logprobs)}"
            )
        ids += turn.token_ids
        mask += [turn.own] * len(turn.token_ids)
        rewards += [0.0] * len(turn.token_ids)
        logprobs += turn.logprobs or [0.0] * len(turn.token_ids)
        if turn.reward:
            rewards[-1] += turn.reward
        read = [*context, *turn.token_ids]
    known = all(turn.logprobs is not None for turn in turns if turn.own and turn.token_ids)
    return {
        "token_ids": ids,
        "completion_mask": mask,
        "contexts": contexts,
        "token_rewards": rewards,
        "behaviour_logprobs": logprobs if known else None,
    }
