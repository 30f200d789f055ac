"""The reward of answers: 1 if the completion ends in the answer of the prompt."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from spo_ext.checks import number
from spo_ext.rollout.generation import Judgement, Needs
from spo_ext.store.codec import encode_json
from spo_ext.store.records import Prompt

_SHOWN = 80  # characters of an answer in a reason
_LONGEST = 2000  # characters of a text that is read as mathematics; an answer stands at its end
_NUMBER = re.compile(
    r"([+-]?)(?:\\?[$€£])?([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(\.[0-9]+)?(e[+-]?[0-9]{1,3})?"
    r"(?:\\?[$€£])?",
    re.IGNORECASE,
)
# Full-width forms and the minus sign, as they are typed on other keyboards.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: ord("-")}
_AROUND_SIGNS = re.compile(r" ?([][(){},;:=<>+*/^|-]) ?")


class AnswerReward:
    """Reward `passed` if the final answers agree, else `failed`.

    The final answer of a text is what stands in its last \\boxed{}, else behind its last "####" at
    the start of a line, else all of it; what a completion says before the last "</think>" does not
    count. Answers agree if they are the same text, apart from spaces and case, or the same number
    to the last digit. Everything else is decided by math-verify, where it is installed: fractions,
    sets, intervals, equations, the last expression of a sentence. It runs in a process of its own,
    and answers that it cannot compare in `cpu_seconds` are not equal. A prompt without an answer
    has no judgement.
    """

    needs: Needs = "answer"

    def __init__(
        self, *, passed: float = 1.0, failed: float = 0.0, cpu_seconds: float = 5.0
    ) -> None:
        self._passed = number("AnswerReward", "passed", passed)
        self._failed = number("AnswerReward", "failed", failed)
        if not failed < passed:
            raise ValueError(
                f"AnswerReward: failed must be below passed, got {failed} and {passed}"
            )
        if not cpu_seconds > 0:
            raise ValueError(f"AnswerReward: cpu_seconds must be > 0, got {cpu_seconds}")
        self._cpu_seconds = number("AnswerReward", "cpu_seconds", cpu_seconds)

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
        gold = answer if isinstance(answer, str) else encode_json(answer)
        said = completion.rpartition("</think>")[2]
        wanted, got = final_answer(gold), final_answer(said)
        same = plainly_equal(wanted, got)
        if same is None:
            same = _VERIFIER.equal(gold, said, self._cpu_seconds)
        if same:
            return Judgement(self._passed)
        return Judgement(self._failed, f"answer {_short(got)}, not {_short(wanted)}")


def final_answer(text: str) -> str:
    """See `AnswerReward`."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, first = 0, start + len("\\boxed{")
        for place in range(first, len(text)):
            if text[place] == "}" and depth == 0:
                return text[first:place].strip()
            depth += {"{": 1, "}": -1}.get(text[place], 0)
    for line in reversed(text.splitlines()):
        if line.lstrip().startswith("####"):
            return line.strip().removeprefix("####").strip()
    return text.strip()


def plainly_equal(wanted: str, got: str) -> bool | None:
    """Whether two answers are the same text or number; None if that cannot be said of them."""
    numbers = plain_number(wanted), plain_number(got)
    if None not in numbers:
        return numbers[0] == numbers[1]
    same_text = numbers == (None, None) and normalised(wanted) == normalised(got)
    return True if same_text else None


def normalised(text: str) -> str:
    """The text with case, spaces, minus signs, fractions and a last full stop made alike."""
    text = text.translate(_ASCII).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    words = text.casefold().split()
    return _AROUND_SIGNS.sub(r"\1", " ".join(words).strip("$").removesuffix(".")).strip()


def plain_number(text: str) -> Decimal | None:
    """72, 72.0, +72, $72 and 1,234.5 are numbers; all digits count."""
    found = _NUMBER.fullmatch(text.translate(_ASCII).strip().strip("$").removesuffix("."))
    if found is None:
        return None
    sign, inner, whole, fraction, power = found.groups(default="")
    if not (whole or fraction) or (sign and inner):
        return None
    return Decimal(sign + inner + (whole.replace(",", "") or "0") + fraction + power)


class _Verifier:
    """math-verify in a process of its own, because an answer can make it hang or grow.

    One for all rewards of this process, started when it is first needed; it ends with its input.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # the process that started it: a fork must not share its pipes
        self._missing = False

    def equal(self, gold: str, said: str, cpu_seconds: float) -> bool:
        if self._missing or not self._start():
            return False
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        question = json.dumps([_readable(gold), _readable(said), cpu_seconds])
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            # It ends itself; this is for one that waits without using the processor.
            ready, _, _ = select.select([process.stdout], [], [], 60 * cpu_seconds)
            answer = process.stdout.readline() if ready else ""
        except OSError:  # it died
            answer = ""
        if not answer:
            process.kill()
            process.communicate()
            self._process = None
        return answer == "true\n"

    def _start(self) -> bool:
        if self._process is not None and self._owner == os.getpid():
            return True
        if importlib.util.find_spec("math_verify") is None:
            self._missing = True
            warnings.warn(
                "spo_ext: math-verify is not installed, so that --reward answer accepts only the "
                "same number or text: pip install math-verify",
                stacklevel=2,
            )
            return False
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._owner = os.getpid()
        assert self._process.stdout is not None
        return self._process.stdout.readline() == "ready\n"


_VERIFIER = _Verifier()


def _readable(text: str) -> str:
    """The part that may hold the answer, as mathematics; several boxes stay where they are."""
    text = text.strip().replace("\\$", "")  # of money
    answer, end = final_answer(text), text[-_LONGEST:]
    if answer == text or end.count("\\boxed") > 1:
        return end
    return f"\\boxed{{{answer[:_LONGEST]}}}"


def serve() -> None:
    """Answers [gold, said, cpu_seconds] lines on the standard input by true or false.

    A line that takes longer ends the process: SIGPROF comes when so much processor time is used.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gigabyte = 1 << 30
    resource.setrlimit(resource.RLIMIT_AS, (4 * gigabyte, 4 * gigabyte))
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    read = functools.partial(parse, parsing_timeout=None)
    for line in sys.stdin:
        gold, said, cpu_seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        wanted = read(gold) if re.search(r"\$|\\[(\[]|\\boxed|\\begin", gold) else []
        # LaTeX that is broken over lines is not read as plain text instead.
        broken = re.search(r"(\\\(|\$)[ \t]*\n", said)
        latex, plain = LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()
        found = read(said, [latex] if broken else [latex, plain])
        same = verify(wanted or read(f"${gold}$") + read(gold), found, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(same)), file=answers, flush=True)


def _short(words: str) -> str:
    shown = ascii(words)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
