"""The one data format between the two sides: JSON that keeps exact Python types.

Never pickle: decoding must not be able to run code, whatever bytes a hostile program sends.
"""

from collections import Counter
from typing import Any

# A child sends this before any line of the program runs; without it a run says nothing about it.
STARTED = b"started\n"
MAX_DEPTH = 64
MAX_EQUAL_HASHES = 64
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, depth: int = 0) -> Any:
    """Return `value` as data for JSON that keeps its exact type.

    Raises TypeError for anything but plain data (subclasses included), ValueError if too deep.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        # Hexadecimal is linear in the digits; decimal is quadratic and capped by Python.
        return value if -(2**63) <= value < 2**63 else ["int", hex(value)]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is dict:
        pairs = value.items()
        return ["dict", *([encode(k, depth + 1), encode(v, depth + 1)] for k, v in pairs)]
    if SEQUENCES.get(kind.__name__) is kind:
        return [kind.__name__, *(encode(item, depth + 1) for item in value)]
    raise TypeError(f"{kind.__name__} is not plain data")


def decode(data: Any, depth: int = 0) -> Any:
    """Undo `encode`. Raises ValueError, TypeError or LookupError on anything else."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is not list:
        raise TypeError("not an encoded value")
    tag, items = data[0], data[1:]
    if tag == "int":
        return int(items[0], 16)
    if tag == "bytes":
        return bytes.fromhex(items[0])
    if tag == "dict":
        pairs = [(decode(k, depth + 1), decode(v, depth + 1)) for k, v in items]
        _refuse_equal_hashes([key for key, _ in pairs])
        return dict(pairs)
    members = [decode(item, depth + 1) for item in items]
    if tag in ("set", "frozenset"):
        _refuse_equal_hashes(members)
    return SEQUENCES[tag](members)


def _refuse_equal_hashes(keys: list[Any]) -> None:
    """Keys made to collide would turn building a dict or set into quadratic work."""
    if max(Counter(map(hash, keys)).values(), default=0) > MAX_EQUAL_HASHES:
        raise ValueError("too many keys with equal hashes")
