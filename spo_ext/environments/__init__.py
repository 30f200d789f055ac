"""Environments: where prompts come from, and who answers and judges what a policy writes.

    environment = load_environment("reasoning_gym:chain_sum", {"size": 500})
    ids = fill(store, environment, "train", Tokenizer("path/to/model"))

`spo rollout --environment NAME` and `spo eval --environment NAME` do this, then draw, judge and
store what follows. A name is reasoning_gym:DATASET, verifiers:ENVIRONMENT, or path/file.py:name and
package.module:name, which stand for an object, or for a class or function that makes it from
--environment-args, with

    prompts(split)            an iterable of Prompt, or of rows {"prompt": text or messages, ...},
                              whose answer, tests and columns are as in `spo import`
    reward(completions, ...)  of one turn: a function of TRL's form, or a Reward
    step(row, said, state)    of several turns, in place of reward: `spo_ext.environments.episodes`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spo_ext.checks import check_one_of, refuse
from spo_ext.environments import worker
from spo_ext.store.records import Prompt, Split, StoredPrompt

if TYPE_CHECKING:
    from spo_ext.data.tokens import Tokenizer
    from spo_ext.environments.hub import Server
    from spo_ext.rollout.generation import Generator, Judgement, Reward
    from spo_ext.store import TrajectoryStore

COLUMN = "environment"  # of a prompt: the name of the environment that made it
_KINDS = "reasoning_gym:DATASET, verifiers:ENVIRONMENT, path/file.py:name or package.module:name"


@dataclass(frozen=True)
class Environment:
    """An environment by its name; made by `load_environment`.

    Attributes:
        name, arguments: as they were given.
        source: the object with `prompts`, and `reward` or `step`.
    """

    name: str
    arguments: Mapping[str, Any]
    source: Any

    @property
    def several_turns(self) -> bool:
        """Whether it answers the policy, and judges by itself."""
        return not hasattr(self.source, "reward")

    @property
    def reward(self) -> Reward:
        """Of completions of one turn; of several turns, one that is never asked."""
        from spo_ext.rollout.rewards import as_reward

        return _judges_itself if self.several_turns else as_reward(self.source.reward)

    def check_dialect(self, dialect: str | None) -> None:
        """Raises ValueError for a server that gives no token ids, where turns need them; None:
        there is no server."""
        if self.several_turns and dialect not in (None, "vllm"):
            expected = f"vllm for {self.name}, whose turns need the token ids that were drawn"
            refuse("--environment", "--dialect", expected, dialect)

    def prompts(self, split: Split) -> list[Prompt]:
        """All of a split, each with the environment's name in its column `environment`.

        Raises ValueError for rows that are no prompts, and what the environment raises.
        """
        found = [
            _prompt(self.name, index, row, split)
            for index, row in enumerate(self.source.prompts(split))
        ]
        if not found:
            refuse("--environment", f"{self.name}.prompts({split!r})", "at least one prompt", [])
        return found

    def generator(self, plain: Generator, tokenizer: Tokenizer, room: int | None) -> Generator:
        """What draws its trajectories, from what draws completions.

        Args:
            plain: of token ids, as `Episodes` says.
            room: tokens that the policy can read; None: no limit is known.
        """
        if not self.several_turns:
            return plain
        if hasattr(self.source, "generate"):
            own: Generator = self.source
            return own
        from spo_ext.environments.episodes import Episodes

        return Episodes(self, plain, tokenizer, room)

    def close(self) -> None:
        """Ends what it has started."""
        with suppress(AttributeError):
            self.source.close()


def load_environment(
    name: str, arguments: Mapping[str, Any] | None = None, server: Server | None = None
) -> Environment:
    """The environment of a name; see the package. server: of the policy, for verifiers.

    Raises ValueError for a name or arguments that there are not, ImportError without the package
    that it needs, and what its own code raises.
    """
    kind, colon, rest = name.partition(":")
    given = dict(arguments or {})
    if not colon or not rest:
        refuse("--environment", "NAME", f"one of {_KINDS}", name)
    if kind == "reasoning_gym":
        from spo_ext.environments.gym import ReasoningGym

        return Environment(name, given, ReasoningGym(rest, **given))
    if kind == "verifiers":
        from spo_ext.environments.hub import Verifiers

        if server is None:
            refuse("--environment", "--server", f"given for {name}, which plays against one", None)
        return Environment(name, given, Verifiers(rest, server, **given))
    try:
        source = worker.make(name, given)
    except ValueError as error:
        raise ValueError(f"--environment: {error}; NAME is one of {_KINDS}") from error
    if not callable(getattr(source, "prompts", None)):
        refuse("--environment", name, "an object with prompts(split)", source)
    if hasattr(source, "reward") == callable(getattr(source, "step", None)):
        refuse("--environment", name, "an object with one of reward and step", source)
    return Environment(name, given, source)


def fill(
    store: TrajectoryStore, environment: Environment, split: Split, tokenizer: Tokenizer
) -> list[int]:
    """Stores the environment's prompts of a split, with the policy's token ids, those of before
    being the same once more, and returns their ids in order.

    Raises ValueError if one of them is stored in another split, and what the environment raises.
    """
    check_one_of("fill", "split", split, ("train", "dev", "test"))
    prompts = [
        replace(one, token_ids=tokenizer.prompt_ids(one.content, one.template))
        if one.token_ids is None
        else one
        for one in environment.prompts(split)
    ]
    return list(dict.fromkeys(store.add_prompts(prompts)))


def row_of(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a row: prompt, answer and tests if there are any, and its columns."""
    row: dict[str, Any] = {"prompt": prompt.content, **(prompt.columns or {})}
    for name in ("answer", "tests"):
        if getattr(prompt, name) is not None:
            row[name] = getattr(prompt, name)
    return row


def _prompt(name: str, index: int, row: object, split: Split) -> Prompt:
    if isinstance(row, StoredPrompt) or not isinstance(row, Prompt | Mapping):
        refuse("--environment", f"{name}.prompts[{index}]", "a Prompt or a row", row)
    if isinstance(row, Mapping):
        fields = dict(row)
        if "prompt" not in fields:
            refuse("--environment", f"{name}.prompts[{index}]", "a row with a prompt", row)
        given = {key: fields.pop(key, None) for key in ("prompt", "answer", "tests")}
        columns = {key: value for key, value in fields.items() if value is not None}
        row = Prompt(given["prompt"], answer=given["answer"], tests=given["tests"], columns=columns)
    return replace(row, split=split, columns={**(row.columns or {}), COLUMN: name})


def _judges_itself(
    prompts: Sequence[Prompt], completions: Sequence[str], token_ids: Iterable[Sequence[int]]
) -> list[Judgement | None]:
    """The reward of an environment of several turns, whose generations bring theirs."""
    return [None for _ in completions]
