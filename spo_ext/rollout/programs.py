"""The reward of programs: 1 if all tests of the prompt pass, by the sandbox."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Sequence

from markdown_it import MarkdownIt

from spo_ext.checks import number
from spo_ext.data.records import RowError, shown
from spo_ext.data.tests import check_form, packages_of_tests, submission
from spo_ext.rollout.generation import Judgement, Needs
from spo_ext.sandbox import Limits, Sandbox, SandboxError, Submission, Verdict, judge
from spo_ext.sandbox.launch import package_paths
from spo_ext.shown import visible
from spo_ext.store.codec import encode_json
from spo_ext.store.records import Prompt

_PYTHON = re.compile(r"\W{0,3}(?:python|py|pypy)[\d.]{0,8}(?!\w)", re.IGNORECASE)
_THOUGHT, _THINKS = "</think>", "<think>"
_REMEMBERED = 100_000  # verdicts, some 300 bytes each

# Blocks alone, without those that cannot hold or hide a fence.
_MARKDOWN = MarkdownIt("commonmark").disable(["inline", "reference"])


def program_of(completion: str) -> str:
    """The last block of code between fences, as CommonMark has them, else the whole text.

    A block that says Python goes before one that names no language, which may be its output, and a
    closed one before one that is cut off. What stands in `<think>` counts for nothing.
    """
    text = completion.rpartition(_THOUGHT)[2]
    if text.lstrip().startswith(_THINKS):
        return ""
    best, program = -1, text
    if "```" not in text and "~~~" not in text:
        return program
    for token in _MARKDOWN.parse(text):
        if token.type != "fence" or not (_PYTHON.match(token.info) or not token.info.strip()):
            continue
        assert token.map is not None
        lines = token.content.count("\n") + (token.content[-1:] not in ("", "\n"))
        closed = token.map[1] - token.map[0] == lines + 2
        rank = 2 * closed + bool(token.info.strip())
        if rank >= best:
            best, program = rank, token.content
    return program


class TestsReward:
    """Reward of the stored tests, `passed` if all pass and else `failed`.

    Args:
        passed, failed: the two rewards; cross_entropy wants 0 and below.
        workers, allow_unsandboxed, packages: of the Sandbox, which starts with the first judgement
            and ends with `close` or with the thread that it was made in. Packages that the tests
            themselves import are there without being named.
        limits: at least these, for every program; None: those of its tests, else the Sandbox's.

    The reason is the verdict's. A prompt without tests has no judgement; nor has one whose tests
    cannot be used, which a warning names. The verdict of the same tests and program is remembered.
    Raises SandboxError if the sandbox failed twice: that says nothing about a program.
    """

    needs: Needs = "tests"
    __test__ = False  # no test of pytest, whatever its name

    def __init__(
        self,
        *,
        passed: float = 1.0,
        failed: float = 0.0,
        workers: int | None = None,
        limits: Limits | None = None,
        allow_unsandboxed: bool = False,
        packages: Sequence[str] = (),
    ) -> None:
        self._passed = number("TestsReward", "passed", passed)
        self._failed = number("TestsReward", "failed", failed)
        if not failed < passed:
            raise ValueError(f"TestsReward: failed must be below passed, got {failed} and {passed}")
        self._workers, self._limits = workers, limits
        self._allow_unsandboxed = allow_unsandboxed
        self._packages = dict.fromkeys(packages)
        package_paths(tuple(packages))
        self._sandbox: Sandbox | None = None
        self._unusable: dict[bytes, str] = {}
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self.executed = 0

    @property
    def reward_range(self) -> tuple[float, float]:
        return self._failed, self._passed

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        token_ids: Sequence[Sequence[int]],
    ) -> list[Judgement | None]:
        keys: list[bytes | None] = []
        new: dict[bytes, Submission] = {}
        for prompt, completion, _ in zip(prompts, completions, token_ids, strict=True):
            if prompt.tests is None or self.unusable(prompt):
                keys.append(None)
                continue
            program = program_of(completion)
            key = _key(prompt, program)
            keys.append(key)
            if key not in self._verdicts and key not in new:
                new[key] = submission(prompt.tests, program, self._limits)
                self._need(packages_of_tests(prompt.tests))
        # Those of this call apart: remembering many may forget some of them.
        at_hand = {key: self._verdicts[key] for key in keys if key and key in self._verdicts}
        at_hand |= zip(new, self._judge(list(new.values())), strict=True)
        for prompt, of_prompt in zip(prompts, keys, strict=True):
            if of_prompt is not None and at_hand[of_prompt].unusable:
                self._leave_out(prompt, at_hand[of_prompt].unusable)
        for key, verdict in at_hand.items():
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
        while len(self._verdicts) > _REMEMBERED:
            self._verdicts.popitem(last=False)
        return [None if key is None else self._judgement(at_hand[key]) for key in keys]

    def unusable(self, prompt: Prompt) -> str:
        """Why no completion of this prompt can be judged by its tests; "" if one can."""
        key = _key(prompt, "")
        if key not in self._unusable:
            try:
                check_form(prompt.tests)
                self._unusable[key] = ""
            except RowError as error:
                self._leave_out(prompt, str(error))
        return self._unusable[key]

    def _leave_out(self, prompt: Prompt, reason: str) -> None:
        self._unusable[_key(prompt, "")] = reason
        warnings.warn(
            f"the prompt {shown(prompt.content)} is left out: its tests cannot be used: "
            f"{visible(reason, line=True)}",
            stacklevel=2,
        )

    def _need(self, packages: Sequence[str]) -> None:
        """The sandbox starts anew if it lacks a package that tests import."""
        if not self._packages.keys() >= set(packages):
            self._packages |= dict.fromkeys(packages)
            self.close()

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def _judgement(self, verdict: Verdict) -> Judgement | None:
        if verdict.unusable:
            return None
        return Judgement(self._passed if verdict.ok else self._failed, verdict.reason)

    def _judge(self, submissions: list[Submission]) -> list[Verdict]:
        if not submissions:
            return []
        self.executed += len(submissions)
        try:
            return judge(self._ready(), submissions)
        except SandboxError:
            self.close()
            return judge(self._ready(), submissions)

    def _ready(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = Sandbox(
                self._workers,
                self._limits,
                allow_unsandboxed=self._allow_unsandboxed,
                packages=tuple(self._packages),
            )
        return self._sandbox


def _key(prompt: Prompt, program: str) -> bytes:
    data = encode_json([prompt.tests, program])
    return hashlib.blake2b(data.encode(errors="surrogatepass"), digest_size=16).digest()
