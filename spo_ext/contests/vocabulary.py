"""Tokens of prompts and programs, some three hundred, each one lexical unit; and the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spo_ext.contests.problems import (
    MAX_EXAMPLE_OUTPUT,
    MIN_EXAMPLE_OUTPUT,
    OPERATIONS,
    REDUCTIONS,
    Problem,
)
from spo_ext.store.records import Prompt, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
_PROMPT_WORDS = sorted(
    {word for operation in OPERATIONS.values() for word in (operation.word, operation.vague)}
    | {word for reduction in REDUCTIONS.values() for word in (reduction.word, reduction.vague)}
)
_NUMBERS = [f"#{value}" for value in range(MIN_EXAMPLE_OUTPUT, MAX_EXAMPLE_OUTPUT + 1)]

PROGRAM_TOKENS = tuple(_PROGRAM_TEXT)
TOKENS = (*_SPECIAL, *PROGRAM_TOKENS, *_PROMPT_WORDS, *_NUMBERS)
TOKEN_IDS = {token: index for index, token in enumerate(TOKENS)}
PAD, EOS, GO = (TOKEN_IDS[token] for token in ("<pad>", "<eos>", "<go>"))


def encode_prompt(problem: Problem) -> list[int]:
    """Words, examples and the token that asks for the program; no padding."""
    tokens = list(problem.words)
    for inputs, output in problem.examples:
        shown = output if isinstance(output, list) else [output]
        tokens += ["<in>", *(f"#{v}" for v in inputs), "<out>", *(f"#{v}" for v in shown)]
    return [TOKEN_IDS[token] for token in (*tokens, "<go>")]


def as_prompts(problems: Sequence[Problem], split: Split) -> list[Prompt]:
    """The problems as the store holds them, with their hidden tests."""
    return [
        Prompt(one.description, encode_prompt(one), tests=one.tests, split=split)
        for one in problems
    ]


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
    *lines, result = "".join(_PROGRAM_TEXT[token] for token in tokens).split("\n")
    lines.append(f"return {result.strip()}")
    return "def f(x):\n" + "".join(f"    {line.strip()}\n" for line in lines)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The vocabulary as a tokenizer of transformers, whose texts of programs are Python.

    Prompts come with their ids, since their words are no text that it would have to split.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {_PROGRAM_TEXT.get(token, token): index for token, index in TOKEN_IDS.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<go>"
    )
