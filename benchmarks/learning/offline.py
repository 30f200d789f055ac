"""Offline data: solutions that somebody wrote, before and apart from any policy."""

from __future__ import annotations

import random
from collections.abc import Sequence

from spo_ext.contests.problems import Problem
from spo_ext.contests.programs import STYLE_WEIGHTS, STYLES, write_program
from spo_ext.contests.vocabulary import encode_program

_TRIES = 40  # draws per solution that is wanted: some problems have few different ones


def write_solutions(
    problems: Sequence[Problem], style: str, count: int, max_tokens: int, seed: int
) -> list[list[list[int]]]:
    """At most `count` different correct programs per problem, at least one, as token ids.

    style: "diverse" draws all styles alike, most of which the reference hardly ever writes; "near"
    draws them as often as its demonstrations did. Raises ValueError for another style.
    """
    if style not in ("diverse", "near"):
        raise ValueError(f"style must be diverse or near, got {style!r}")
    weights = STYLE_WEIGHTS if style == "near" else (1.0,) * len(STYLES)
    rng = random.Random(f"{seed} offline {style}")
    return [_solve(problem, rng, weights, count, max_tokens) for problem in problems]


def _solve(
    problem: Problem, rng: random.Random, weights: Sequence[float], count: int, max_tokens: int
) -> list[list[int]]:
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_TRIES * count):
        style = rng.choices(STYLES, weights)[0]
        program = encode_program(write_program(rng, problem.specification, style))
        if len(program) <= max_tokens:
            found[tuple(program)] = None
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            f"max_tokens must leave room for a solution of {problem.description!r}, "
            f"got {max_tokens}"
        )
    return [list(program) for program in found]
