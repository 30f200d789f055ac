"""Writes programs for a specification: correct ones in several styles, and spoiled ones.

The spoiled ones train the reference policy, which therefore knows the language and the prompt
format but often solves the wrong problem.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from spo_ext.contests.problems import OPERATIONS, REDUCTIONS, Operation, Specification, draw_step
from spo_ext.contests.vocabulary import PROGRAM_TOKENS, encode_program

MAX_PROGRAM_TOKENS = 36  # with the end token
STYLES = ("comprehension", "functional", "statements")
STYLE_WEIGHTS = (0.80, 0.14, 0.06)  # of demonstrations
_FORM_WEIGHTS = (0.80, 0.13, 0.07)
_FUSE_PROBABILITY = 0.8  # a map right after a filter goes into the same comprehension
_LARGEST_CONSTANT = 8


def write_program(rng: random.Random, specification: Specification, style: str) -> list[str]:
    """Tokens of a correct program in one of STYLES; the spellings are drawn."""
    source, statements = ["x"], []
    pending = [(OPERATIONS[name], constant) for name, constant in specification.steps]
    while pending:
        operation, constant = pending.pop(0)
        fused = None
        if operation.kind == "filter" and pending and pending[0][0].kind == "map":
            if style != "functional" and rng.random() < _FUSE_PROBABILITY:
                fused = pending.pop(0)
        if operation.kind == "list":
            source = _spell(rng, operation.forms, constant, source)
        elif style == "functional":
            source = _call(rng, operation, constant, source)
        else:
            source = _comprehend(rng, operation, constant, fused, source)
        if style == "statements" and pending:
            statements += ["x=", *source, ";"]
            source = ["x"]
    reduction = REDUCTIONS[specification.reduction]
    return statements + _spell(rng, reduction.forms, 0, source)


def demonstrate(
    rng: random.Random,
    specification: Specification,
    *,
    corruption: float,
    token_noise: float,
    max_tokens: int = MAX_PROGRAM_TOKENS,
) -> list[int]:
    """Ids of a supervised target: a program for a corrupted copy of the specification.

    corruption is the chance per operation of another one in its place (or none, or a neighbouring
    constant), token_noise the chance that one token is dropped or replaced. max_tokens counts the
    end token.
    """
    while True:
        corrupted = corrupt(rng, specification, corruption)
        tokens = write_program(rng, corrupted, rng.choices(STYLES, STYLE_WEIGHTS)[0])
        if rng.random() < token_noise:
            tokens = _spoil_one_token(rng, tokens)
        if tokens and len(tokens) < max_tokens:
            return encode_program(tokens)


def corrupt(rng: random.Random, specification: Specification, corruption: float) -> Specification:
    """A similar specification, usually a wrong one."""
    steps = []
    for name, constant in specification.steps:
        if rng.random() < corruption:
            fate = rng.random()
            if fate < 0.25:
                continue
            if fate < 0.65 or not OPERATIONS[name].constants:
                name, constant = draw_step(rng, OPERATIONS[name].kind)
            else:
                constant = max(1, min(_LARGEST_CONSTANT, constant + rng.choice((-1, 1))))
        steps.append((name, constant))
    if len(steps) > 1 and rng.random() < 0.3 * corruption:
        rng.shuffle(steps)
    reduction = specification.reduction
    if rng.random() < 0.8 * corruption:
        reduction = rng.choice(tuple(REDUCTIONS))
    return Specification(tuple(steps), reduction)


def _spell(
    rng: random.Random, forms: Sequence[str], constant: int, source: Sequence[str] = ()
) -> list[str]:
    form = rng.choices(forms, _FORM_WEIGHTS[: len(forms)])[0]
    numbers = {"{k}": constant, "{above}": constant + 1, "{below}": constant - 1}
    tokens: list[str] = []
    for part in form.split():
        if part == "{x}":
            tokens += source
        else:
            tokens.append(str(numbers[part]) if part in numbers else part)
    return tokens


def _call(
    rng: random.Random, operation: Operation, constant: int, source: Sequence[str]
) -> list[str]:
    body = _spell(rng, operation.forms, constant)
    return ["list(", f"{operation.kind}(", "lambda v:", *body, ",", *source, ")", ")"]


def _comprehend(
    rng: random.Random,
    operation: Operation,
    constant: int,
    fused: tuple[Operation, int] | None,
    source: Sequence[str],
) -> list[str]:
    body = _spell(rng, operation.forms, constant)
    if operation.kind == "map":
        return ["[", *body, "for v in", *source, "]"]
    element = _spell(rng, fused[0].forms, fused[1]) if fused else ["v"]
    return ["[", *element, "for v in", *source, "if", *body, "]"]


def _spoil_one_token(rng: random.Random, tokens: list[str]) -> list[str]:
    index = rng.randrange(len(tokens))
    replacement = [] if rng.random() < 0.5 else [rng.choice(PROGRAM_TOKENS)]
    return [*tokens[:index], *replacement, *tokens[index + 1 :]]
