"""The reward of programs: 1 if all tests of the prompt pass, by the sandbox."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence

from spo_ext.data.tests import submission
from spo_ext.rollout.generation import Judgement, Needs
from spo_ext.sandbox import Limits, Sandbox, SandboxError, Submission, Verdict, judge
from spo_ext.store.checks import number
from spo_ext.store.codec import encode_json
from spo_ext.store.records import Prompt

_CLOSED = re.compile(r"^[ \t]*```(?:python|py)3?[ \t]*\n(.*?)^[ \t]*```", re.M | re.S | re.I)
_OPEN = re.compile(r"^[ \t]*```(?:python|py)3?[ \t]*\n(.*)\Z", re.M | re.S | re.I)
_REMEMBERED = 100_000  # verdicts, some 300 bytes each


def program_of(completion: str) -> str:
    """The last fenced block of Python, else what follows an unclosed fence, else the whole text."""
    closed = _CLOSED.findall(completion)
    if closed:
        return str(closed[-1])
    opened = _OPEN.search(completion)
    return opened.group(1) if opened else completion


class TestsReward:
    """Reward of the stored tests, `passed` if all pass and else `failed`.

    Args:
        passed, failed: the two rewards; cross_entropy wants 0 and below.
        workers, limits, allow_unsandboxed: of the Sandbox, which starts with the first judgement
            and ends with `close` or with the thread that it was made in.

    The reason is the verdict's. A prompt without tests has no judgement. The verdict of the same
    tests and program is remembered. Raises ValueError for tests of an unknown form, and
    SandboxError if the sandbox failed twice: that says nothing about a program.
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
    ) -> None:
        self._passed = number("TestsReward", "passed", passed)
        self._failed = number("TestsReward", "failed", failed)
        if not failed < passed:
            raise ValueError(f"TestsReward: failed must be below passed, got {failed} and {passed}")
        self._workers, self._limits = workers, limits
        self._allow_unsandboxed = allow_unsandboxed
        self._sandbox: Sandbox | None = None
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
            if prompt.tests is None:
                keys.append(None)
                continue
            program = program_of(completion)
            key = _key(prompt, program)
            keys.append(key)
            if key not in self._verdicts and key not in new:
                new[key] = submission(prompt.tests, program)
        # Those of this call apart: remembering many may forget some of them.
        at_hand = {key: self._verdicts[key] for key in keys if key and key in self._verdicts}
        at_hand |= zip(new, self._judge(list(new.values())), strict=True)
        for key, verdict in at_hand.items():
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
        while len(self._verdicts) > _REMEMBERED:
            self._verdicts.popitem(last=False)
        return [None if key is None else self._judgement(at_hand[key]) for key in keys]

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def _judgement(self, verdict: Verdict) -> Judgement:
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
                self._workers, self._limits, allow_unsandboxed=self._allow_unsandboxed
            )
        return self._sandbox


def _key(prompt: Prompt, program: str) -> bytes:
    data = encode_json([prompt.tests, program])
    return hashlib.blake2b(data.encode(errors="surrogatepass"), digest_size=16).digest()
