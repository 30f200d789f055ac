"""The one data format between the two sides: JSON that keeps Python's types.

Never pickle: decoding must not be able to run code, whatever bytes a hostile program sends.
"""

from typing import Any

# A child sends this before any line of the program runs; without it a run says nothing about it.
STARTED = b"started\n"
MAX_DEPTH = 64
MAX_TEXT = 300  # characters of a reason
TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
}
SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
# One object, since Python calls a list equal to another that holds the same NaN.
NAN = float("nan")


def encode(value: Any, depth: int = 0) -> Any:
    """Return `value` as data for JSON that keeps what Python's `==` looks at.

    A subclass of a built-in type counts as that type (a Counter as a dict, a named tuple as a
    tuple), a view of a dict as a set, a number or an array of numpy as what its `tolist` says.
    Raises TypeError for anything else but plain data, ValueError if too deep.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if value is None:
        return None
    kind: Any = type(value)
    if kind in (bool, str, float):
        return value
    if kind is int:
        # Hexadecimal is linear in the digits; decimal is quadratic and capped by Python.
        return value if -(2**63) <= value < 2**63 else ["int", hex(value)]
    if kind is dict:
        pairs = value.items()
        return ["dict", *([encode(k, depth + 1), encode(v, depth + 1)] for k, v in pairs)]
    if kind in SEQUENCES.values():
        return [kind.__name__, *(encode(item, depth + 1) for item in value)]
    if kind in (bytes, bytearray):
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if (kind.__module__, kind.__name__) == ("fractions", "Fraction"):
        return ["Fraction", hex(value.numerator), hex(value.denominator)]
    if (kind.__module__, kind.__name__) == ("decimal", "Decimal"):
        return ["Decimal", str(value)]
    if kind is type and value in TYPES.values():
        return ["type", value.__name__]
    return encode(_as_builtin(value), depth)


def _as_builtin(value: Any) -> Any:
    kind = type(value)
    if kind in (type({}.keys()), type({}.items())):
        return set(value)
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        plain = value.tolist()
        if type(plain) is not kind:
            return plain
    for base in TYPES.values():
        if isinstance(value, base):
            return base(value)
    raise TypeError(f"{kind.__name__} is not plain data")


def decode(data: Any, depth: int = 0) -> Any:
    """Undo `encode`. Raises ValueError, TypeError or LookupError on anything else.

    Keys that were made to collide take quadratic time, so what a program wrote is decoded under a
    limit of CPU time first, by the examiner.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if data is None or type(data) in (bool, int, float, str):
        return data if data == data else NAN
    if type(data) is not list:
        raise TypeError("not an encoded value")
    tag, items = data[0], data[1:]
    if tag == "int":
        return int(items[0], 16)
    if tag == "bytes":
        return bytes.fromhex(items[0])
    if tag == "type":
        return TYPES[items[0]]
    if tag in ("complex", "Fraction", "Decimal"):
        return _number(tag, items)
    if tag == "dict":
        return {decode(k, depth + 1): decode(v, depth + 1) for k, v in items}
    return SEQUENCES[tag](decode(item, depth + 1) for item in items)


def _number(tag: str, items: list[Any]) -> Any:
    if tag == "complex":
        return complex(*map(float, items))
    if tag == "Decimal":
        from decimal import Decimal

        return Decimal(str(items[0]))
    from fractions import Fraction

    return Fraction(int(items[0], 16), int(items[1], 16) or 1)


def describe(error: BaseException) -> str:
    """Name and text of an exception, whose __str__ may itself raise."""
    try:
        return f"{type(error).__name__}: {error}"[:MAX_TEXT]
    except BaseException:
        return type(error).__name__
