"""Small programming problems: a function over a list of integers, in words and two examples.

A problem applies one to three operations (a filter, a map and a list operation, in any order) or
more, then a reduction. Half of the words are vague on purpose ("large" for "above 4"): the examples
narrow their meaning and hidden tests settle it, so a policy that bets on one reading loses pass@k.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "development", "test"]
Step = tuple[str, int]  # operation name, constant (0 where the operation has none)
Output = list[int] | int
Cases = Sequence[tuple[list[int], Output]]  # inputs and what they should give

LARGEST_INPUT = 9
EXAMPLE_LENGTH = 4
MIN_EXAMPLE_OUTPUT, MAX_EXAMPLE_OUTPUT = -60, 159  # one token per number, see vocabulary.py
EXAMPLES = 2
_STEP_WEIGHTS = (0.3, 0.5, 0.2)  # for one, two and three steps; more weigh as much as three
_SPLITS: tuple[Split, ...] = ("test", "development", "train", "train", "train", "train")


@dataclass(frozen=True, slots=True)
class Operation:
    """One list -> list step. `forms` are its spellings in Python, the usual one first.

    Filters and maps spell the expression of one element v; list operations spell the whole
    expression around {x}. {k} is the constant, {above} and {below} its neighbours.
    """

    name: str
    kind: str  # "filter", "map" or "list"
    weight: float
    word: str
    vague: str
    constants: tuple[tuple[int, float], ...]  # (value, weight); empty: the operation has none
    apply: Callable[[list[int], int], list[int]]
    forms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reduction:
    """The last step, list -> int (or the list itself); `forms` spell it around {x}."""

    name: str
    weight: float
    word: str
    vague: str
    apply: Callable[[list[int]], Output]
    forms: tuple[str, ...]


_SMALL = ((1, 5), (2, 3), (3, 2), (5, 1))
_OPERATION_LIST = (
    Operation("gt", "filter", 4, "above", "large", ((4, 5), (3, 3), (5, 2), (2, 1)),
              lambda x, k: [v for v in x if v > k], ("v > {k}", "v >= {above}", "{k} < v")),
    Operation("lt", "filter", 2, "below", "small", ((5, 5), (6, 3), (4, 2), (7, 1)),
              lambda x, k: [v for v in x if v < k], ("v < {k}", "v <= {below}", "{k} > v")),
    Operation("even", "filter", 3, "even", "parity", (),
              lambda x, k: [v for v in x if v % 2 == 0], ("v % 2 == 0", "v % 2 < 1", "not v % 2")),
    Operation("odd", "filter", 1.5, "odd", "parity", (),
              lambda x, k: [v for v in x if v % 2], ("v % 2 == 1", "v % 2", "v % 2 > 0")),
    Operation("add", "map", 4, "add", "shift", _SMALL,
              lambda x, k: [v + k for v in x], ("v + {k}", "{k} + v")),
    Operation("sub", "map", 2, "minus", "shift", _SMALL,
              lambda x, k: [v - k for v in x], ("v - {k}", "- {k} + v")),
    Operation("mul", "map", 4, "times", "scale", ((2, 5), (3, 3), (4, 1)),
              lambda x, k: [v * k for v in x], ("v * {k}", "{k} * v")),
    Operation("square", "map", 2, "square", "scale", (),
              lambda x, k: [v * v for v in x], ("v * v",)),
    Operation("negate", "map", 1, "negate", "negate", (),
              lambda x, k: [-v for v in x], ("- v", "0 - v")),
    Operation("sort", "list", 3, "ascending", "order", (),
              lambda x, k: sorted(x), ("sorted( {x} )",)),
    Operation("descend", "list", 2, "descending", "order", (),
              lambda x, k: sorted(x, reverse=True),
              ("sorted( {x} , reverse=True )", "sorted( {x} ) [::-1]")),
    Operation("reverse", "list", 2, "reverse", "reverse", (),
              lambda x, k: x[::-1], ("{x} [::-1]",)),
    Operation("head", "list", 3, "first", "cut", ((2, 5), (3, 3), (1, 1)),
              lambda x, k: x[:k], ("{x} [: {k} ]",)),
    Operation("tail", "list", 1.5, "skip", "cut", ((1, 3), (2, 1)),
              lambda x, k: x[k:], ("{x} [ {k} :]",)),
)  # fmt: skip
_REDUCTION_LIST = (
    Reduction("sum", 4, "sum", "tally", sum, ("sum( {x} )",)),
    Reduction("len", 2, "count", "tally", len, ("len( {x} )",)),
    Reduction("max", 3, "max", "extreme", max, ("max( {x} )", "sorted( {x} ) [ - 1 ]")),
    Reduction("min", 1.5, "min", "extreme", min, ("min( {x} )", "sorted( {x} ) [ 0 ]")),
    Reduction("none", 4, "list", "list", list, ("{x}",)),
)
OPERATIONS = {operation.name: operation for operation in _OPERATION_LIST}
REDUCTIONS = {reduction.name: reduction for reduction in _REDUCTION_LIST}
_BY_KIND = {
    kind: tuple(operation for operation in _OPERATION_LIST if operation.kind == kind)
    for kind in ("filter", "map", "list")
}
_REDUCTION_WEIGHTS = tuple(reduction.weight for reduction in _REDUCTION_LIST)


@dataclass(frozen=True, slots=True)
class Specification:
    """What a correct program computes. Problems with equal specifications share a split."""

    steps: tuple[Step, ...]
    reduction: str

    def evaluate(self, values: Sequence[int]) -> Output:
        """The output for one input; ValueError for the max or min of an empty list."""
        current = list(values)
        for name, constant in self.steps:
            current = OPERATIONS[name].apply(current, constant)
        return REDUCTIONS[self.reduction].apply(current)

    @property
    def split(self) -> Split:
        """A hash, not a draw: no seed can move a specification from training to testing."""
        return _SPLITS[zlib.crc32(repr((self.steps, self.reduction)).encode()) % len(_SPLITS)]


@dataclass(frozen=True, slots=True, eq=False)  # compared and hashed by identity
class Problem:
    """A prompt (words and examples) with the hidden tests that decide what is correct."""

    specification: Specification
    words: tuple[str, ...]
    examples: tuple[tuple[list[int], Output], ...]
    tests: tuple[tuple[list[int], Output], ...]

    @property
    def description(self) -> str:
        """The prompt for human readers."""
        shown = "; ".join(f"{x} -> {y}" for x, y in self.examples)
        return f"{' '.join(self.words)} | {shown}"


def draw_step(rng: random.Random, kind: str) -> Step:
    """A random operation of one kind with a random constant."""
    operations = _BY_KIND[kind]
    operation = rng.choices(operations, [o.weight for o in operations])[0]
    if not operation.constants:
        return operation.name, 0
    values, weights = zip(*operation.constants, strict=True)
    return operation.name, rng.choices(values, weights)[0]


def draw_reduction(rng: random.Random) -> str:
    """A random reduction."""
    return rng.choices(_REDUCTION_LIST, _REDUCTION_WEIGHTS)[0].name


def draw_specification(rng: random.Random, least: int = 1, most: int = 3) -> Specification:
    """least to most steps in random order, then a reduction.

    Up to three steps are of different kinds, and no two neighbours are of one kind.
    """
    counts = range(least, most + 1)
    weights = [_STEP_WEIGHTS[min(count, len(_STEP_WEIGHTS)) - 1] for count in counts]
    count = rng.choices(counts, weights)[0]
    kinds = rng.sample(sorted(_BY_KIND), min(count, len(_BY_KIND)))
    while len(kinds) < count:
        kinds.append(rng.choice([kind for kind in sorted(_BY_KIND) if kind != kinds[-1]]))
    return Specification(tuple(draw_step(rng, kind) for kind in kinds), draw_reduction(rng))


def draw_problem(
    rng: random.Random,
    split: Split,
    *,
    vague_probability: float,
    hidden_tests: int,
    operations: tuple[int, int] = (1, 3),
) -> Problem:
    """A random problem of one split with so many operations, from the least to the most.

    hidden_tests may be 0 when nothing will be judged.
    """
    while True:
        specification = draw_specification(rng, *operations)
        if specification.split != split:
            continue
        words = _describe(rng, specification, vague_probability)
        examples = _draw_cases(rng, specification, EXAMPLES, (EXAMPLE_LENGTH, EXAMPLE_LENGTH))
        tests = _draw_cases(rng, specification, hidden_tests, (4, 8))
        enough = len(examples) == EXAMPLES and len(tests) == hidden_tests
        if enough and _shows_well(examples) and _tells_programs_apart(tests):
            return Problem(specification, words, examples, tests)


def _describe(
    rng: random.Random, specification: Specification, vague_probability: float
) -> tuple[str, ...]:
    words: list[str] = []
    for name, constant in specification.steps:
        operation = OPERATIONS[name]
        if operation.vague != operation.word and rng.random() < vague_probability:
            words.append(operation.vague)  # the constant is left out as well
        else:
            words.append(operation.word)
            words += [str(constant)] if operation.constants else []
    reduction = REDUCTIONS[specification.reduction]
    words.append(reduction.vague if rng.random() < vague_probability else reduction.word)
    return tuple(words)


def _draw_cases(
    rng: random.Random, specification: Specification, count: int, lengths: tuple[int, int]
) -> tuple[tuple[list[int], Output], ...]:
    cases: list[tuple[list[int], Output]] = []
    for _ in range(8 * count):
        if len(cases) == count:
            break
        inputs = rng.choices(range(LARGEST_INPUT + 1), k=rng.randint(*lengths))
        try:
            cases.append((inputs, specification.evaluate(inputs)))
        except ValueError:  # max or min of nothing: draw another input
            continue
    return tuple(cases)


def _shows_well(examples: Cases) -> bool:
    """Whether each example says something, in numbers that have a token."""
    for _, output in examples:
        shown = output if isinstance(output, list) else [output]
        if not shown or not all(MIN_EXAMPLE_OUTPUT <= v <= MAX_EXAMPLE_OUTPUT for v in shown):
            return False
    return True


def _tells_programs_apart(tests: Cases) -> bool:
    """A constant function must not pass by luck."""
    return not tests or len({repr(output) for _, output in tests}) >= min(3, len(tests))
