"""Episodes of several turns: the policy writes, the environment answers, until one of them ends.

An object of the user's with `prompts` and

    def step(self, row, said, state):
        return {"observation": "the tool's answer", "reward": 0.1, "done": False, "state": {...}}

row: the prompt as `prompts` gave it, {"prompt": ..., "answer": ..., more columns}.
said: messages since the prompt, the policy's words last, as {"role": "assistant", "content": text}.
state: what the last step of this episode returned as its state; None at first.

All of what it returns may be left out, and is JSON. The observation is a text, which stands in the
template of a chat as words of the user and behind a prompt of text as it is, or a list of messages,
as of tools. A reward on the way is kept with the policy's last token before it; that of the last
step is the reward at the end. The object may have these attributes:

    max_turns = 10          of the policy; then the episode is truncated
    step_seconds = 30.0     of a step; then its process is killed
    max_observation = 20000    characters of an observation; of a longer one the middle is left out
    failed = None           reward of an episode whose step took too long or raised; None: it is
                            not stored

Steps run in processes of their own (`Workers`), two at once: one knows nothing of another but the
state.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from spo_ext.checks import check_integer, number, refuse
from spo_ext.data.records import Turn
from spo_ext.environments.worker import CallError, Workers
from spo_ext.rollout.generation import (
    Generation,
    Generator,
    Judgement,
    Sampling,
    derived_seed,
)
from spo_ext.shown import say
from spo_ext.store.records import Finish, Prompt

if TYPE_CHECKING:
    from spo_ext.data.tokens import Tokenizer
    from spo_ext.environments import Environment

_LIMITS = {"max_turns": 10, "max_observation": 20_000, "step_seconds": 30.0, "failed": None}
_KEYS = ("observation", "reward", "done", "state")


@dataclass
class _Episode:
    """What has been said so far.

    tokens: what the policy reads next; turns: what it has read and written.
    """

    prompt: Prompt
    row: Mapping[str, Any]
    tokens: list[int]
    turns: list[Turn] = field(default_factory=list)
    said: list[Mapping[str, Any]] = field(default_factory=list)
    state: Any = None
    truncated: bool = False
    over: bool = False
    lost: bool = False
    reward: float = 0.0
    failure: str = ""

    def write(self, turn: Generation, text: str) -> None:
        """The policy's next turn."""
        if not turn.token_ids:
            self.over = self.truncated = True
            return
        self.turns.append(Turn(self.tokens, turn.token_ids, turn.logprobs))
        self.tokens = [*self.tokens, *turn.token_ids]
        self.truncated = turn.finish == "truncated"
        self.said = [*self.said, {"role": "assistant", "content": text}]

    def answer(self, step: Mapping[str, Any]) -> None:
        """What the environment made of it."""
        self.state = step.get("state")
        self.over = self.truncated or bool(step.get("done", False))
        reward = float(step.get("reward") or 0.0)
        if self.over:
            self.reward = reward
        elif reward:
            self.turns[-1] = replace(self.turns[-1], reward=reward)

    def finished(self, name: str, failed: float | None) -> Generation:
        """As it is stored."""
        paid = math.fsum(turn.reward for turn in self.turns)
        judgement = None
        if not self.failure:
            judgement = Judgement(self.reward + paid)
        elif failed is not None:
            judgement = Judgement(failed + paid, self.failure)
        info = {"environment": name, "turns": len(self.turns)}
        info |= {"failure": self.failure} if self.failure else {}
        finish: Finish = "truncated" if self.truncated or self.failure else "eos"
        start = self.prompt.token_ids or ()
        return Generation.of_turns(start, self.turns, finish, judgement, info)


class Episodes:
    """Generator of the trajectories of an environment with `step`.

    Args:
        plain: draws each turn; prompts with token ids are all that it may look at. What it draws
            is token ids, as a model in this process or a server of dialect vllm gives them.
        tokenizer: of the policy.
        room: tokens that the policy can read. An episode that would need more is truncated.

    max_new_tokens of the sampling holds for each turn. A prompt of which an episode gets no further
    turn, since a server does not answer or has other weights by then, has no trajectories.

    Raises ValueError for attributes that the object must not have.
    """

    def __init__(
        self,
        environment: Environment,
        plain: Generator,
        tokenizer: Tokenizer,
        room: int | None = None,
    ) -> None:
        self._name, self._plain, self._tokenizer = environment.name, plain, tokenizer
        self._room = sys.maxsize if room is None else room
        own: dict[str, Any] = {name: getattr(environment.source, name, None) for name in _LIMITS}
        own = {name: _LIMITS[name] if value is None else value for name, value in own.items()}
        owner = "--environment"
        check_integer(owner, "max_turns", own["max_turns"], 1)
        check_integer(owner, "max_observation", own["max_observation"], 1)
        self._max_turns: int = own["max_turns"]
        self._longest: int = own["max_observation"]
        seconds = number(owner, "step_seconds", own["step_seconds"], above=0.0)
        failed = own["failed"]
        self._failed = None if failed is None else number(owner, "failed", failed)
        self._workers = Workers(environment.name, environment.arguments, seconds)
        self._told: set[str] = set()

    def close(self) -> None:
        """Ends the processes of the steps."""
        self._workers.close()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """n episodes of each prompt, or none.

        Raises ValueError if a step does not return what it should, and what the generator raises.
        """
        from spo_ext.environments import row_of

        first = self._plain.generate(prompts, sampling)
        groups = [
            [_Episode(prompt, row_of(prompt), list(prompt.token_ids or ())) for _ in drawn]
            for prompt, drawn in zip(prompts, first, strict=True)
        ]
        everyone = [each for group in groups for each in group]
        turns = [turn for drawn in first for turn in drawn]
        live = everyone
        for number_of_turn in range(1, self._max_turns + 1):
            for episode, turn in zip(live, turns, strict=True):
                episode.write(turn, str(self._tokenizer.completion("", turn.token_ids)))
            self._step([each for each in live if not each.over])
            live = [each for each in live if not each.over]
            if number_of_turn == self._max_turns:
                for each in live:
                    each.over = each.truncated = True
            live = [each for each in live if self._has_room(each, sampling)]
            if not live:
                break
            live, turns = self._next(live, replace(sampling, n=1), number_of_turn)
        lost = [any(each.lost for each in group) for group in groups]
        return [
            [] if gone else [each.finished(self._name, self._failed) for each in group]
            for gone, group in zip(lost, groups, strict=True)
        ]

    def _next(
        self, live: Sequence[_Episode], sampling: Sampling, turn: int
    ) -> tuple[list[_Episode], list[Generation]]:
        """Those that the policy answered, and how."""
        asked = [replace(each.prompt, token_ids=each.tokens) for each in live]
        seeded = replace(sampling, seed=derived_seed(sampling.seed, "turn", turn))
        drawn = self._plain.generate(asked, seeded)
        for each, found in zip(live, drawn, strict=True):
            each.lost = not found
        answered = [each for each in live if not each.lost]
        return answered, [found[0] for found in drawn if found]

    def _has_room(self, episode: _Episode, sampling: Sampling) -> bool:
        if not episode.over and len(episode.tokens) + sampling.max_new_tokens > self._room:
            episode.over = episode.truncated = True
        return not episode.over

    def _step(self, live: Sequence[_Episode]) -> None:
        """Asks the environment, and reads its answers behind what was said."""
        calls = [(each.row, list(each.said), each.state) for each in live]
        for each, found in zip(live, self._workers.map("step", calls), strict=True):
            if isinstance(found, CallError):
                each.failure, each.over = f"a step failed: {found}", True
                self._tell(each.failure)
                continue
            each.answer(self._checked(found))
            if not each.over:
                self._read(each, found.get("observation") or "")

    def _checked(self, step: Any) -> Mapping[str, Any]:
        owner = f"{self._name}.step"
        if not isinstance(step, Mapping) or not set(step) <= set(_KEYS):
            refuse(owner, "its answer", f"an object with some of {', '.join(_KEYS)}", step)
        if step.get("reward") is not None:
            number(owner, "reward", step["reward"])
        said = step.get("observation")
        messages = isinstance(said, list) and all(
            isinstance(one, Mapping) and "role" in one for one in said
        )
        if said is not None and not isinstance(said, str) and not messages:
            refuse(owner, "observation", "text or a list of messages with a role", said)
        return step

    def _read(self, episode: _Episode, said: str | list[dict[str, Any]]) -> None:
        """The next context: what was read and written, and what the environment says, as long as
        the template leaves the former as it is."""
        content = episode.prompt.content
        if isinstance(content, str):
            if not isinstance(said, str):
                refuse(f"{self._name}.step", "observation", "text for a prompt of text", said)
            said = self._cut(said)
            episode.said = [*episode.said, {"role": "user", "content": said}]
            between = self._tokenizer.completion_ids("", said, "truncated", prompt_ids=[])
            episode.tokens = [*episode.tokens, *between]
            return
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        for message in messages:
            if isinstance(message.get("content"), str):
                message["content"] = self._cut(message["content"])
        episode.said = [*episode.said, *messages]
        whole = self._tokenizer.prompt_ids([*content, *episode.said], episode.prompt.template)
        episode.tokens = self._tokenizer.continued(episode.tokens, whole)

    def _cut(self, words: str) -> str:
        left_out = len(words) - self._longest
        if left_out <= 0:
            return words
        half = self._longest // 2
        end = words[len(words) - (self._longest - half) :]
        return f"{words[:half]}\n[... {left_out} characters left out ...]\n{end}"

    def _tell(self, failure: str) -> None:
        """Once for each kind."""
        if failure not in self._told and len(self._told) < 20:
            self._told.add(failure)
            kept = "are not stored" if self._failed is None else f"get the reward {self._failed:g}"
            say(f"spo: {self._name}: {failure}; such episodes {kept}", sys.stderr, line=True)
