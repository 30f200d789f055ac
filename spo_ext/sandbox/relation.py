"""When two results are the same, for each way in which data sets state what they expect."""

import math
from typing import Any

RELATIVE, ABSOLUTE = 1e-5, 1e-8  # of numpy.allclose, by which the grader of APPS compares floats
MAX_NUMBER = 400  # characters: longer texts are no floats, and slow to read


def equal(output: Any, expected: Any) -> bool:
    """Python's `==`, and NaN equal to NaN."""
    return output is expected or bool(output == expected)


def equal_as_json(output: Any, expected: Any) -> bool:
    """Equal as far as JSON can tell, which has lists only and keys of text; floats nearly so."""
    if isinstance(expected, list | tuple) and isinstance(output, list | tuple):
        return len(output) == len(expected) and all(map(equal_as_json, output, expected))
    if isinstance(expected, dict) and isinstance(output, dict):
        ours = {_as_key(key): value for key, value in output.items()}
        theirs = {_as_key(key): value for key, value in expected.items()}
        return ours.keys() == theirs.keys() and all(
            equal_as_json(ours[key], value) for key, value in theirs.items()
        )
    if isinstance(expected, float) and isinstance(output, int | float):
        return equal(output, expected) or near(output, expected)
    return equal(output, expected)


def near(output: float, expected: float) -> bool:
    """Whether a float is as good as another, by the tolerance of `numpy.allclose`."""
    try:
        return math.isfinite(expected) and abs(output - expected) <= ABSOLUTE + RELATIVE * abs(
            expected
        )
    except OverflowError:  # an integer beyond all floats
        return False


def _as_key(key: Any) -> Any:
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return str(key) if isinstance(key, int | float) else key


def equal_lines(output: str, expected: str) -> bool:
    """Printed text: line by line but for blank ones, word by word in a line, numbers by value."""
    ours, theirs = _lines(output), _lines(expected)
    return len(ours) == len(theirs) and all(map(_equal_words, ours, theirs))


def equal_tokens(output: str, expected: str) -> bool:
    """Printed text word by word, wherever lines end."""
    return _equal_words(output.split(), expected.split())


def _lines(text: str) -> list[list[str]]:
    return [words for line in text.split("\n") if (words := line.split())]


def _equal_words(output: list[str], expected: list[str]) -> bool:
    return len(output) == len(expected) and all(map(_equal_word, output, expected))


def _equal_word(output: str, expected: str) -> bool:
    """Whole numbers must be equal; where a float is expected, a number near it is as good."""
    if output == expected:
        return True
    if max(len(output), len(expected)) > MAX_NUMBER or "_" in output:
        return False
    try:
        value = float(expected)
        if expected.lstrip("+-").isdecimal():
            return float(output) == value and _is_whole(output, expected)
        return near(float(output), value)
    except ValueError:
        return False


def _is_whole(output: str, expected: str) -> bool:
    """Floats agree; integers written in full must agree in every digit."""
    digits = output.lstrip("+-").isdecimal()
    return int(output) == int(expected) if digits else abs(int(expected)) <= 2**53
