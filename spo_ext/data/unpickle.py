"""Data out of a pickle that may come from an enemy: it builds values and calls nothing."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

# No GLOBAL, REDUCE, BUILD, INST, OBJ, NEWOBJ, EXT or PERSID: what is listed makes text, numbers
# and containers, or keeps them for later use.
_ALLOWED = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST LIST "
    "APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS PUT "
    "BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split()
)
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def unpickle(data: bytes, max_bytes: int) -> Any:
    """Text, numbers, None, lists, tuples and dicts from a pickle.

    Raises ValueError for a pickle that would make anything else, or a value that, written out,
    has more than max_bytes characters or more parts than the pickle has bytes.
    """
    try:
        for operation, argument, position in pickletools.genops(data):
            if operation.name not in _ALLOWED:
                raise ValueError(f"a pickle must not use {operation.name} (at byte {position})")
            # The memo is an array, and the index of an enemy would be its length.
            if operation.name in _PUTS and (argument or 0) > len(data):
                raise ValueError(f"a pickle must not keep a value as number {argument}")
        value = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # pickle promises no list of what it raises on bad bytes
        raise ValueError(f"unreadable pickle: {error}") from None
    _check_size(value, len(data), max_bytes)
    return value


class _Unpickler(pickle.Unpickler):
    """The second lock, should the list above ever hold too much."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle must not name {module}.{name}")

    def persistent_load(self, _key: Any) -> Any:
        raise pickle.UnpicklingError("a pickle must not name persistent objects")


def _check_size(value: Any, max_parts: int, max_bytes: int) -> None:
    """A few bytes can name one list many times over, or put it into itself."""
    waiting, parts, size = [value], 0, 0
    while waiting:
        item = waiting.pop()
        parts += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        if parts + len(waiting) > max_parts or size > max_bytes:
            raise ValueError("unreadable pickle: it unfolds to more than it holds")
