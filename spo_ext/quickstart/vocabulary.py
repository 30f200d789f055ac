"""Tokens of prompts and programs: some three hundred, each one lexical unit."""

from __future__ import annotations

from collections.abc import Sequence

from .problems import (
    MAX_EXAMPLE_OUTPUT,
    MIN_EXAMPLE_OUTPUT,
    OPERATIONS,
    REDUCTIONS,
    Problem,
)

# Token -> Python text. Operators carry spaces so that two neighbouring "*" are a syntax error
# and never become "**": a random policy would otherwise spend its time on huge powers.
_PROGRAM_TEXT = {
    **{name: name for name in ("sum(", "len(", "max(", "min(", "sorted(", "list(", "filter(")},
    **{name: name for name in ("map(", "lambda v:", ")", "[", "]", "x", "v", "[::-1]", "[:", ":]")},
    **{name: f" {name} " for name in (">", ">=", "<", "<=", "==", "%", "+", "-", "*")},
    **{str(digit): str(digit) for digit in range(10)},
    ",": ", ", "reverse=True": "reverse=True", "not": "not ",
    "for v in": " for v in ", "if": " if ", "x=": "x = ", ";": "\n    ",
}  # fmt: skip
_SPECIAL = ("<pad>", "<eos>", "<go>", "<in>", "<out>")
_WORDS = sorted(
    {word for operation in OPERATIONS.values() for word in (operation.word, operation.vague)}
    | {word for reduction in REDUCTIONS.values() for word in (reduction.word, reduction.vague)}
)
_NUMBERS = [f"#{value}" for value in range(MIN_EXAMPLE_OUTPUT, MAX_EXAMPLE_OUTPUT + 1)]

PROGRAM_TOKENS = tuple(_PROGRAM_TEXT)
TOKENS = (*_SPECIAL, *PROGRAM_TOKENS, *_WORDS, *_NUMBERS)
TOKEN_IDS = {token: index for index, token in enumerate(TOKENS)}
PAD, EOS, GO = (TOKEN_IDS[token] for token in ("<pad>", "<eos>", "<go>"))


def encode_prompt(problem: Problem) -> list[int]:
    """Words, examples and the token that asks for the program; no padding."""
    tokens = list(problem.words)
    for inputs, output in problem.examples:
        shown = output if isinstance(output, list) else [output]
        tokens += ["<in>", *(f"#{v}" for v in inputs), "<out>", *(f"#{v}" for v in shown)]
    return [TOKEN_IDS[token] for token in (*tokens, "<go>")]


def encode_program(tokens: Sequence[str]) -> list[int]:
    """Ids of a program's tokens, closed by the end token."""
    return [*(TOKEN_IDS[token] for token in tokens), EOS]


def decode_program(ids: Sequence[int]) -> str | None:
    """Python source of a sampled program, or None when it has no end or holds a prompt token."""
    if not ids or ids[-1] != EOS or len(ids) == 1:
        return None
    tokens = [TOKENS[index] for index in ids[:-1]]
    if any(token not in _PROGRAM_TEXT for token in tokens):
        return None
    *statements, result = _split(tokens)
    lines = ["".join(_PROGRAM_TEXT[token] for token in statement) for statement in statements]
    lines.append("return " + "".join(_PROGRAM_TEXT[token] for token in result).strip())
    return "def f(x):\n" + "".join(f"    {line.strip()}\n" for line in lines)


def _split(tokens: Sequence[str]) -> list[list[str]]:
    statements: list[list[str]] = [[]]
    for token in tokens:
        if token == ";":
            statements.append([])
        else:
            statements[-1].append(token)
    return statements
