"""Checks of arguments: each names the owner, the argument, what it must be and what it got."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import NoReturn

from torch import Tensor

_MAX_NAME = 200
_MAX_TOKEN = 2**32 - 1


def refuse(owner: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{owner}: {name} must be {expected}, got {got!r}")


def check_one_of(owner: str, name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        refuse(owner, name, f"one of {', '.join(allowed)}", value)


def check_name(owner: str, name: str, value: object) -> None:
    """A label that both databases can hold and compare: PostgreSQL's text has no NUL."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME or "\0" in value:
        refuse(owner, name, f"text of 1 to {_MAX_NAME} characters without NUL", value)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        refuse(owner, name, "text without lone surrogates", value)


def check_integer(owner: str, name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
        refuse(owner, name, f"an integer >= {at_least}", value)


def number(
    owner: str,
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """The value as a finite float in the range."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        refuse(owner, name, "a finite number", value)
    value = float(value)
    if not (value > above and at_least <= value <= at_most):
        low = f" > {above}" if above > -math.inf else f" >= {at_least}"
        high = f" and <= {at_most}" if at_most < math.inf else ""
        refuse(owner, name, f"a number{low}{high}", value)
    return value


def token_tuple(owner: str, name: str, value: object) -> tuple[int, ...]:
    """Token ids from a sequence of integers or a 1-d integer tensor."""
    if isinstance(value, Tensor):
        if value.dim() != 1 or value.is_floating_point() or value.is_complex():
            got = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"{owner}: {name} must be integers [T], got {got}")
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        refuse(owner, name, "a sequence of token ids", value)
    ids = tuple(value)
    expected = f"token ids in [0, {_MAX_TOKEN}]"
    try:
        whole = tuple(map(operator.index, ids))  # NumPy's integers too
    except TypeError:
        refuse(owner, name, expected, next(x for x in ids if not hasattr(x, "__index__")))
    for token in whole:
        if not 0 <= token <= _MAX_TOKEN:
            refuse(owner, name, expected, token)
    return whole
