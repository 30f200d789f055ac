"""The reward of answers: 1 if the completion ends in the answer of the prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from spo_ext.rollout.generation import Judgement, Needs
from spo_ext.store.checks import number
from spo_ext.store.codec import encode_json
from spo_ext.store.records import Prompt

_HASHES = re.compile(r"^[ \t]*####[ \t]*(.+?)[ \t]*$", re.M)
_SHOWN = 80


class AnswerReward:
    """Reward `passed` if the normalised final answers agree, else `failed`.

    The final answer of a completion, and of prompt.answer, is what stands in its last \\boxed{},
    else behind its last "####" at the start of a line, else all of it. A prompt without an answer
    has no judgement.
    """

    needs: Needs = "answer"

    def __init__(self, *, passed: float = 1.0, failed: float = 0.0) -> None:
        self._passed = number("AnswerReward", "passed", passed)
        self._failed = number("AnswerReward", "failed", failed)
        if not failed < passed:
            raise ValueError(
                f"AnswerReward: failed must be below passed, got {failed} and {passed}"
            )

    @property
    def reward_range(self) -> tuple[float, float]:
        return self._failed, self._passed

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        token_ids: Sequence[Sequence[int]],
    ) -> list[Judgement | None]:
        return [
            None if prompt.answer is None else self._judge(prompt.answer, completion)
            for prompt, completion, _ in zip(prompts, completions, token_ids, strict=True)
        ]

    def _judge(self, answer: Any, completion: str) -> Judgement:
        wanted = normalised(answer if isinstance(answer, str) else encode_json(answer))
        got = normalised(completion)
        if got == wanted:
            return Judgement(self._passed)
        return Judgement(self._failed, f"answer {_short(got)}, not {_short(wanted)}")


def normalised(text: str) -> str:
    """The final answer of a text, with numbers, case, spaces and signs of money made alike."""
    words = unicodedata.normalize("NFKC", final_answer(text)).strip().strip("$").strip()
    words = " ".join(words.removesuffix(".").casefold().split())
    digits = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", words)
    try:
        value = Decimal(digits)
    except InvalidOperation:
        return words
    # 72, 72.0 and +72 are one number; "nan" and the like are words.
    return f"{value.normalize():f}" if value.is_finite() and abs(value.adjusted()) < 100 else words


def final_answer(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, first = 0, start + len("\\boxed{")
        for place in range(first, len(text)):
            if text[place] == "}" and depth == 0:
                return text[first:place]
            depth += {"{": 1, "}": -1}.get(text[place], 0)
    marked = _HASHES.findall(text)
    return str(marked[-1]) if marked else text


def _short(words: str) -> str:
    shown = ascii(words)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
