"""A policy behind a server, whose requests may fail one by one, and whose weights may change."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spo_ext.rollout.follow import FINISHED, latest_policy, version_of
from spo_ext.rollout.generation import Generation, Sampling
from spo_ext.rollout.server import (
    PromptError,
    ServerError,
    ServerGenerator,
    WeightsChanged,
    described,
)
from spo_ext.shown import say
from spo_ext.store import StoredPrompt, TrajectoryStore
from spo_ext.store.records import Prompt

_POLL_S = 0.5
_SERVER_S = 600.0  # that a server may take to start again
_IN_A_ROW = 8  # prompts without an answer, after which it is the server's fault
_TOO_LONG = re.compile(
    r"context|too long|too many tokens|max_model_len|maximum.*(length|tokens)", re.I
)


class ServedPolicy:
    """Generator of one version of a policy after the other, for `Rollouts`.

    A prompt gets all its completions from one version, or none. It gets none, and the rollout
    goes on, when

    - the server refuses it (status 400, 413 or 422), as one that is too long. The store remembers
      it for the run, and `possible` leaves it out from then on unless there is more room;
    - no reply can be used: none within the time, a status of 408, 425, 429 or 5xx or a broken
      connection however often it was asked, no JSON, or fields that lack or do not fit together;
    - the weights changed before the reply came, which ends the version.

    Of the first two each is said. `failed` counts the second kind in this version, `changed` is the
    third. ServerError ends the rollout when so many prompts in a row had no answer, or were refused
    for another reason than their length, that it is not their fault. Before that, a server of
    published versions is waited for once.
    """

    def __init__(self, server: ServerGenerator, store: TrajectoryStore, run: str) -> None:
        self._server, self._store, self._run = server, store, run
        self._refused = store.refusals(run)
        self._doubtful: dict[int, tuple[int, str]] = {}  # refused since the last answer
        self._stamp: object = None
        self._answered = False
        self._in_a_row = 0
        self._last = ""
        self._following = self._patient = False  # whether to wait for a server that answers nobody
        self.changed, self.failed = False, 0

    def begin(self, version: int | None) -> None:
        """Takes the server's weights as they are for this version; None: of another model.

        Raises ServerError if the server says that they are of another version.
        """
        stamp = self._server.stamp()
        held = version_of(stamp[0] or "")
        if None not in (held, version) and held != version:
            raise ServerError(
                f"--policy-version must be {held}, which the server says its weights are "
                f"({stamp[0]!r}), got {version}"
            )
        self._stamp, self.changed, self.failed = stamp, False, 0

    def await_version(self, directory: Path, version: int, stop: Callable[[], bool]) -> bool:
        """Waits until the server has the version that was published last; whether it has.

        It has not when another one is published first, or when stop says so. A server that does
        not say what it has (no /weight_info) is believed to have what was published.

        A server that is not there, as during a restart, is waited for, 600 s at most.

        Raises ServerError if nobody will bring the version to the server any more.
        """
        if not self._following:
            self._following = self._patient = True
        until, answers = 0.0, 0
        while True:
            newest = latest_policy(directory)
            if stop() or newest is None or newest[0] != version:
                return False
            finished = (directory / FINISHED).exists()
            try:
                stamp = self._server.stamp()
            except PromptError as error:
                now = time.monotonic()
                if not until:
                    _say(f"{error}; waiting up to {_SERVER_S:g} s for the server")
                until = until or now + _SERVER_S
                if now > until:
                    raise
                time.sleep(_POLL_S)
                continue
            if stamp[0] is None or version_of(stamp[0]) == version:
                self._stamp, self.changed, self.failed = stamp, False, 0
                return True
            words = f"the server says that its weights are {stamp[0]!r}, not those of {newest[1]}"
            if finished:
                raise ServerError(
                    f"{words}, and no trainer will bring them ({directory / FINISHED} exists): "
                    f"serve that folder, and give --policy-version {version} in place of --follow"
                )
            answers += 1
            if answers == 2:  # not between two steps of a publication
                _say(f"{words}, as after a restart: waiting for the trainer to publish them again")
            time.sleep(_POLL_S)

    def possible(self, prompts: Sequence[StoredPrompt], sampling: Sampling) -> list[StoredPrompt]:
        """Those that the server has not refused before, and that its context has room for."""
        room = self._server.context()
        found = []
        for prompt in prompts:
            size = len(prompt.token_ids or ())
            least = self._refused[prompt.id][0] if prompt.id in self._refused else None
            refused = least is not None and size + sampling.max_new_tokens >= least
            if room is not None and size >= room:
                if prompt.id not in self._refused:
                    words = f"the server's context has {room} tokens"
                    self._refuse(prompt, sampling, words, certain=True)
            elif not refused or (room is not None and size + sampling.max_new_tokens <= room):
                found.append(prompt)
        return found

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """n completions of each prompt, or none; see the class."""
        if self.changed:
            return [[] for _ in prompts]
        found = self._server.attempt(prompts, sampling, self._stamp)
        groups: list[list[Generation]] = []
        for prompt, outcome in zip(prompts, found, strict=True):
            if isinstance(outcome, list):
                self._has_answered()
            elif isinstance(outcome, WeightsChanged):
                if not self.changed:
                    _say(f"{outcome}; what it drew meanwhile is left out")
                self.changed = True
            else:
                self._without_answer(prompt, sampling, outcome)
            groups.append(outcome if isinstance(outcome, list) else [])
        if self._in_a_row >= _IN_A_ROW:
            if not self._patient:
                words = f"{self._in_a_row} prompts in a row had no answer; the last: {self._last}"
                raise ServerError(words)
            self._patient, self.changed = False, True  # see what it has when it is there again
        return groups

    def check_answered(self) -> None:
        """Raises ServerError if no prompt at all was answered though some were asked."""
        if not self._answered and self._last:
            raise ServerError(f"the server answered no prompt; the last: {self._last}")

    def _has_answered(self) -> None:
        self._answered, self._in_a_row = True, 0
        self._patient = self._following
        self._remember()

    def _remember(self) -> None:
        if self._doubtful:
            self._store.put_refusals(self._run, self._doubtful)
            self._doubtful = {}

    def _without_answer(self, prompt: Prompt, sampling: Sampling, error: ServerError) -> None:
        if isinstance(error, PromptError) and error.refused:
            certain = _TOO_LONG.search(str(error)) is not None
            self._refuse(prompt, sampling, str(error), certain)
            self._in_a_row += not certain
            return
        self._last = str(error)
        _say(f"{described(prompt, sampling)} has no completions: {self._last}")
        self.failed += 1
        self._in_a_row += 1

    def _refuse(self, prompt: Prompt, sampling: Sampling, reason: str, certain: bool) -> None:
        _say(f"{described(prompt, sampling)} is left out, now and later: {reason}")
        self._last = reason
        if isinstance(prompt, StoredPrompt):
            row = (len(prompt.token_ids or ()) + sampling.max_new_tokens, reason)
            self._refused[prompt.id] = self._doubtful[prompt.id] = row
            if self._answered and certain:
                self._remember()


def _say(words: str) -> None:
    say(f"spo: {words}", sys.stderr, line=True)
