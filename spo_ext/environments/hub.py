"""Environments of the verifiers package (0.4), played by its own harness against a server.

verifiers renders messages to token ids and asks the server for ids (POST /inference/v1/generate,
which vLLM has with --enable-scale-out), so that a trajectory holds what was drawn: the mask and
log-probabilities of its nodes, the template's and the tools' tokens in between, and a context of
its own wherever what the policy read is not what came before. Its rewards are the end's; the
package has none on the way.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spo_ext.checks import refuse
from spo_ext.data.agents import TOKENS, openai_message, openai_tool, sampled_turns
from spo_ext.rollout.generation import (
    Generation,
    Judgement,
    Sampling,
    completion_seeds,
    derived_seed,
)
from spo_ext.rollout.server import ServerError
from spo_ext.shown import say
from spo_ext.store.records import Finish, Prompt, Split

if TYPE_CHECKING:
    from verifiers.v1 import Trace

_SPLITS = ("train", "dev", "test")
_TASK = "task"  # the column with a task's place in its set
# What the agent may take at most, unless the arguments say otherwise.
_TOOL_S, _SETUP_S, _EPISODE_S, _SCORING_S, _TURNS = 60.0, 300.0, 900.0, 120.0, 20
# What the server's own settings would else apply to the draws.
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_NEUTRAL |= {"frequency_penalty": 0.0, "presence_penalty": 0.0}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Server:
    """Where the policy is served.

    url: up to and including /v1. model: as the server knows it. tokenizer: a folder. key_variable:
    of the environment, with the server's key. logprobs: whether to keep the server's.
    """

    url: str
    model: str
    tokenizer: Path
    key_variable: str | None = None
    logprobs: bool = False
    concurrency: int = 16


class Verifiers:
    """An environment of one agent; its prompts, and a generator of its trajectories.

    Args:
        name: of the task set, an installed package or a module in the current folder.
        server: of the policy.
        splits: places of the tasks of each split, as {"train": "20:", "test": "0:20"}; None: all
            are train.
        renderer: what writes the policy's chat template, as {"name": "qwen3"}; None: by the
            model's name. The default one knows no tools.
        config: the package's own settings, as {"taskset": {...}, "agent": {...}}.

    The agent runs the harness "null" (messages and tools, no shell) as a process here, and its
    limits are 20 turns, 900 s, and 60 s for a call of a tool, unless config says otherwise. What a
    tool answers beyond the server's context ends the episode. An episode that fails is not stored,
    one that reached a limit of length or of turns is truncated.

    Raises ValueError, and ImportError without verifiers.
    """

    def __init__(
        self,
        name: str,
        server: Server,
        *,
        splits: Mapping[str, str] | None = None,
        renderer: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        try:
            import verifiers.v1 as package
        except ImportError as error:
            raise ImportError(
                f"--environment verifiers needs verifiers ({error}): pip install verifiers uv"
            ) from error
        _let_tools_start()
        _read_token_ids()
        self._package, self._name, self._server = package, name, server
        self._splits = {"train": ":"} if splits is None else dict(splits)
        for split in self._splits:
            if split not in _SPLITS:
                refuse("--environment-args", "splits", f"by {', '.join(_SPLITS)}", split)
        try:
            self._config = package.resolve_env_config(_with_limits(name, config))
            self._client = package.TrainClientConfig(
                base_url=server.url,
                renderer=None if renderer is None else dict(renderer),
                renderer_model_name=os.fspath(server.tokenizer),
                api_key_var=server.key_variable or "SPO_NO_KEY",
            )
            env = package.load_environment(self._config)
            if not env.taskset.bounded:
                refuse("--environment", name, "a task set that ends", "one without an end")
            self._tasks = list(env.taskset)
        except (ModuleNotFoundError, AttributeError, TypeError) as error:
            raise ValueError(
                f"--environment: verifiers:{name} cannot be loaded: {error}"
            ) from error

    def prompts(self, split: Split) -> list[Prompt]:
        """Of each task what the policy reads at first, which one episode of a single token tells.

        Raises ValueError for a split that the arguments lack, ServerError if the server gives no
        token ids or a task cannot be opened.
        """
        if split not in self._splits:
            got = f'none of {split}: give splits, as {{"train": "20:", "{split}": "0:20"}}'
            refuse("--environment-args", "splits", f"those of {split} too", got)
        tasks = self._package.SelectConfig(include={"idx": [self._splits[split]]})
        chosen = [task.data.idx for task in self._tasks_of(tasks)]
        found = _run(self._play([(place, Sampling(max_new_tokens=1), 0) for place in chosen], True))
        return [
            self._prompt(place, trace, split) for place, trace in zip(chosen, found, strict=True)
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """n episodes of each prompt; one that failed has no judgement, and so is not stored.

        Raises ServerError if none of them got an answer.
        """
        ids = [tuple(prompt.token_ids or ()) for prompt in prompts]
        seeds = completion_seeds(derived_seed(sampling.seed, self._name), ids, sampling.n)
        asked = [
            (int((prompt.columns or {})[_TASK]), sampling, seed)
            for prompt, own in zip(prompts, seeds, strict=True)
            for seed in own
        ]
        traces = _run(self._play(asked, False))
        failures = [_failure(trace) for trace in traces]
        if all(failures) and not any(node.sampled for trace in traces for node in trace.nodes):
            raise ServerError(f"--server: no episode of {self._name} got an answer: {failures[0]}")
        for failure in list(dict.fromkeys(filter(None, failures)))[:3]:
            say(f"spo: verifiers:{self._name}: {failure}; not stored", sys.stderr, line=True)
        made = iter(traces)
        return [
            [generation_of(next(made), own, self._server.logprobs) for _ in range(sampling.n)]
            for own in ids
        ]

    def _tasks_of(self, select: Any) -> Any:
        return self._package.load_taskset(self._config.taskset).select(select)

    def _prompt(self, place: int, trace: Trace, split: Split) -> Prompt:
        sampled = next((i for i, node in enumerate(trace.nodes) if node.sampled), None)
        read, drawn = ([], []) if sampled is None else _read(trace, sampled)
        if not read or not drawn:
            raise ServerError(
                "--server must give token ids (POST /inference/v1/generate, as vllm serve has it "
                "with --enable-scale-out) for "
                f"verifiers:{self._name}, got {_failure(trace) or 'an answer without any'}"
            )
        assert sampled is not None
        content = [
            openai_message(_plain(trace.nodes[i].message)) for i in _path(trace, sampled)[:-1]
        ]
        tools = [openai_tool(_plain(tool)) for tool in trace.tools]
        columns = {_TASK: place, "key": trace.task.key, **({"tools": tools} if tools else {})}
        answer = getattr(self._tasks[place].data, "answer", None)
        return Prompt(content, read, answer=answer, split=split, columns=columns)

    async def _play(self, asked: Sequence[tuple[int, Sampling, int]], opening: bool) -> list[Trace]:
        """A trace of each."""
        env = self._package.load_environment(self._config)
        gate = asyncio.Semaphore(self._server.concurrency)

        async def play(place: int, sampling: Sampling, seed: int) -> Trace:
            how = self._package.SamplingConfig(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=seed % 2**31,
                **_NEUTRAL,
            )
            context = self._package.ModelContext(
                client=self._client, model=self._server.model, sampling=how
            )
            async with gate:
                episode = await env.run_episode(self._tasks[place], context)
            traces = [trace for trace in episode.traces if trace.agent.trainable]
            if len(traces) != 1:
                errors = [str(error.message) for error in episode.errors]
                refuse("--environment", self._name, "of one agent that learns", errors or traces)
            if not episode.ok and not opening and not traces[0].errors:
                traces[0].errors = list(episode.errors)
            return traces[0]

        async with env.serving():
            return list(await asyncio.gather(*(play(*each) for each in asked)))


def generation_of(trace: Trace, prompt_ids: Sequence[int], logprobs: bool) -> Generation:
    """A trace as it is stored: of every call of the policy, in their order, what it read, as far as
    it is not what came before, and what it drew.

    One that failed, that holds nothing which the policy drew, or that does not begin with the
    prompt has no judgement.
    """
    failure = _failure(trace)
    places = {id(node): place for place, node in enumerate(trace.nodes)}
    nodes = [{name: getattr(node, name) for name in TOKENS} for node in trace.nodes]
    trained = [branch.nodes for branch in trace.branches if branch.trainable]
    paths = [[places[id(node)] for node in path] for path in trained]
    turns = list(sampled_turns(nodes, paths))
    if not logprobs:
        turns = [replace(turn, logprobs=None) for turn in turns]
    start = list(turns[0].context) if turns else list(prompt_ids)
    if start != list(prompt_ids):
        failure = failure or "it began with another prompt than before"
    parts = tuple((name, one.score) for name, one in trace.rewards.items() if one is not None)
    judgement = None if failure or not turns else Judgement(trace.reward, "", parts)
    info = {"task": trace.task.key, "stop": trace.stop_condition, "metrics": dict(trace.metrics)}
    # A call that was refused, as one too long for the server, ends an episode without a failure.
    refused = bool(trace.calls) and trace.calls[-1].error is not None
    cut = failure or refused or trace.is_truncated or trace.is_timeout
    finish: Finish = "truncated" if cut else "eos"
    return Generation.of_turns(start, turns, finish, judgement, info)


def _path(trace: Trace, place: int | None) -> list[int]:
    found: list[int] = []
    while place is not None:
        found.append(place)
        place = trace.nodes[place].parent
    return found[::-1]


def _read(trace: Trace, place: int) -> tuple[list[int], list[int]]:
    """The ids that the policy read for this node, and those that it drew behind them."""
    node = trace.nodes[place]
    whole = [token for i in _path(trace, place) for token in trace.nodes[i].token_ids]
    size = len(node.mask) - node.mask.index(True) if any(node.mask) else 0
    return (whole, []) if not size else (whole[:-size], whole[-size:])


def _failure(trace: Trace) -> str:
    """Why a trace does not count; "" if it does."""
    if trace.ok:
        return ""
    last = trace.last_error
    words = trace.stop_condition or "it did not end"
    return words if last is None else f"{words}: {last.type}: {last.message}"[:500]


def _plain(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = message.model_dump(mode="json", exclude_none=True)
    return found


def _with_limits(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    given = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    taskset, agent = given.setdefault("taskset", {}), given.setdefault("agent", {})
    if "id" in taskset:
        refuse("--environment-args", "taskset.id", f"left out, as it is {name}", taskset["id"])
    taskset["id"] = name
    limits = {"setup": _SETUP_S, "rollout": _EPISODE_S, "scoring": _SCORING_S}
    agent["timeout"] = {**limits, **agent.get("timeout", {})}
    agent.setdefault("runtime", {"type": "subprocess"})
    agent.setdefault("max_turns", _TURNS)
    agent["harness"] = {"id": "null", "tool_timeout": _TOOL_S, **agent.get("harness", {})}
    return given


def _let_tools_start() -> None:
    """Tools are processes of their own, which find modules and uv as this one does."""
    for variable, folder in (
        ("PYTHONPATH", os.getcwd()),
        ("PATH", str(Path(sys.executable).parent)),
    ):
        before = os.environ.get(variable, "")
        if folder not in before.split(os.pathsep):
            os.environ[variable] = folder + (os.pathsep + before if before else "")


def _read_token_ids() -> None:
    """vLLM 0.32 says `"token_id": 7`, and the client of verifiers 0.4 refuses all but
    `"token": "token_id:7"`."""
    from renderers import client

    parse = client.parse_generate_response
    if parse.__module__ == __name__:
        return

    def parsed(raw: bytes) -> dict[str, Any]:
        found: dict[str, Any] = parse(raw)
        for choice in found.get("choices", ()):
            for entry in (choice.get("logprobs") or {}).get("content") or ():
                if "token_id" in entry:
                    entry.setdefault("token", f"token_id:{entry['token_id']}")
        return found

    client.parse_generate_response = parsed


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """In a thread of its own: the caller's may run a loop already, as a notebook's does."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
