"""Environments of verifiers: a trace as a trajectory, and an environment with tools for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("transformers")

import torch
from fake_generate import save_tokenizer
from rollout_cases import rollout

from spo_ext.cli import main
from spo_ext.data.tokens import Tokenizer
from spo_ext.environments.hub import generation_of
from spo_ext.store import TrajectoryStore


def node(parent: int | None, token_ids: list[int], drawn: int = 0) -> Any:
    mask = [False] * (len(token_ids) - drawn) + [True] * drawn
    known = [-0.5] * drawn
    return SimpleNamespace(
        parent=parent, token_ids=token_ids, mask=mask, logprobs=known, sampled=drawn > 0
    )


def trace(*nodes: Any, untrained: tuple[int, ...] = (), **fields: Any) -> Any:
    """untrained: leaves whose branches are not learned from."""
    parents = {one.parent for one in nodes}
    branches = []
    for leaf in (i for i in range(len(nodes)) if i not in parents):
        place: int | None = leaf
        path: list[Any] = []
        while place is not None:
            path.insert(0, nodes[place])
            place = nodes[place].parent
        branches.append(SimpleNamespace(nodes=path, trainable=leaf not in untrained))
    given: dict[str, Any] = {
        "nodes": list(nodes),
        "branches": branches,
        "rewards": {"right": SimpleNamespace(score=0.5), "later": None},
        "reward": 1.0,
        "task": SimpleNamespace(key="k"),
        "stop_condition": "agent_completed",
        "metrics": {"calls": 1.0},
        "ok": True,
        "is_truncated": False,
        "is_timeout": False,
        "last_error": None,
        "calls": [],
    }
    return SimpleNamespace(**{**given, **fields})


# The prompt, a call, the tool's answer, the policy's last word.
TURNS = (node(None, [1, 2]), node(0, [3, 10, 11], 2), node(1, [4, 5]), node(2, [3, 12], 1))


def test_turns_that_extend_what_came_before() -> None:
    made = generation_of(trace(*TURNS), [1, 2, 3], True)
    assert made.token_ids == (10, 11, 4, 5, 3, 12) and made.finish == "eos"
    assert made.logprobs == (-0.5, -0.5, 0, 0, 0, -0.5)
    turns = made.turns
    assert turns is not None and turns.contexts is None
    assert turns.completion_mask == (True, True, False, False, False, True)
    assert turns.judgement is not None
    assert (turns.judgement.reward, turns.judgement.parts) == (1.0, (("right", 0.5),))
    assert turns.info == {"task": "k", "stop": "agent_completed", "metrics": {"calls": 1.0}}
    assert generation_of(trace(*TURNS), [1, 2, 3], False).logprobs is None


def test_turns_that_are_rendered_anew() -> None:
    """As of a template that leaves thinking out; what was tried and not taken is left out too."""
    anew = (node(None, [1, 2]), node(4, [9, 11, 4, 5]), node(5, [3, 12], 1))
    nodes = (*TURNS[:3], node(None, [8, 7, 7], 2), *anew)
    made = generation_of(trace(*nodes, untrained=(3,)), [1, 2, 3], True)
    assert made.token_ids == (10, 11, 12)
    assert made.turns is not None and made.turns.completion_mask == (True,) * 3
    assert made.turns.contexts == {2: [1, 2, 9, 11, 4, 5, 3]}


def test_what_failed_has_no_judgement() -> None:
    error = SimpleNamespace(type="ProviderError", message="dead")
    for given, prompt in (
        (trace(*TURNS, ok=False, last_error=error), [1, 2, 3]),
        (trace(*TURNS), [1, 2]),
        (trace(TURNS[0]), [1, 2, 3]),
    ):
        made = generation_of(given, prompt, True)
        assert made.turns is not None and made.turns.judgement is None
    refused = [SimpleNamespace(error=None), SimpleNamespace(error=error)]
    for cut in (trace(*TURNS, is_truncated=True), trace(*TURNS, calls=refused)):
        made = generation_of(cut, [1, 2, 3], True)
        assert made.finish == "truncated"
        assert made.turns is not None and made.turns.judgement is not None


TOOLS = """
import time
import verifiers.v1 as vf

__all__ = ["Tasks"]

class Data(vf.TaskData):
    answer: str = ""

class Tools(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    def go(self, what: str) -> str:
        "Does something."
        if what == "hang":
            time.sleep(1000)
        if what == "raises":
            raise RuntimeError("the tool fell over")
        return "x" * 200_000 if what == "flood" else "here"

class Work(vf.Task[Data]):
    @classmethod
    def toolsets(cls, config):
        return [Tools(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)

class Tasks(vf.Taskset[Work]):
    def load(self):
        for what in ("plain", "raises", "hang", "flood", "broken", "test"):
            yield Work(Data(prompt=what, answer="done"), self.config.task)

if __name__ == "__main__":
    Tools.run()
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What `spo rollout` gets, but for the model's name."""
    pytest.importorskip("verifiers")
    folder = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "own_tasks.py").write_text(TOOLS)
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "fake_generate.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    arguments = {
        "renderer": {"name": "qwen3"},
        "splits": {"train": "0:5", "test": "5:"},
        "agent": {"harness": {"tool_timeout": 3}},
    }
    url = f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    environment = ["--environment", "verifiers:own_tasks"]
    environment += ["--environment-args", json.dumps(arguments), "--tokenizer", folder]
    try:
        yield ["--store", "s.db", "--run", "r", "--server", url, *environment, "--n", 1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_tools_that_work_and_tools_that_do_not(served: list[Any], tmp_path: Path) -> None:
    more = ["--served-model", "policy", "--max-new-tokens", 100, "--server-logprobs"]
    assert rollout(*served, *more) == 0
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    with TrajectoryStore(tmp_path / "s.db") as store:
        prompts: list[Any] = list(store.prompts("train"))
        by_id = {prompt.id: prompt.content[-1]["content"] for prompt in prompts}
        rows = {by_id[row.prompt_id]: row for row in store.trajectories()}
    assert len(prompts) == 5 and set(prompts[0].columns) >= {"tools", "task"}
    # A call that hangs and a server that breaks off end the episode, which is not stored. What a
    # tool did wrong is said to the policy; an answer that no context holds cuts the episode short.
    assert set(rows) == {"plain", "raises", "flood"}
    assert (rows["raises"].num_turns, rows["raises"].finish) == (2, "eos")
    assert (rows["flood"].num_turns, rows["flood"].finish) == (1, "truncated")
    assert len(rows["flood"].token_ids) < 200
    row = rows["plain"]
    assert (row.reward, row.finish, row.num_turns, row.contexts) == (1.0, "eos", 2, None)
    words = tokenizer._text(row.token_ids)
    assert words.startswith("<tool_call>") and words.endswith(
        "<|im_start|>assistant\ndone<|im_end|>"
    )
    assert "<tool_response>\nhere\n</tool_response>" in words
    own = [
        token for token, mine in zip(row.token_ids, row.completion_mask or (), strict=True) if mine
    ]
    assert "here" not in tokenizer._text(own) and tokenizer._text(own).endswith("done<|im_end|>")
    known = torch.as_tensor(row.behaviour_logprobs)
    assert known.sum() == -0.25 * row.num_policy_tokens


def test_a_server_without_token_ids_is_refused(served: list[Any], capsys: Any) -> None:
    place = served.index("--environment-args") + 1
    served[place] = json.dumps({**json.loads(served[place]), "splits": {"train": "0:1"}})
    assert rollout(*served, "--served-model", "text") == 1
    said = capsys.readouterr().err
    assert "--server must give token ids (POST /inference/v1/generate" in said
    assert "verifiers:own_tasks" in said


@pytest.mark.skipif("SPO_VLLM" not in os.environ, reason="needs vLLM: make vllm")
def test_tools_and_vllm_itself(served: list[Any], tmp_path: Path) -> None:
    """A model that has learned by heart what the fake server says calls the tool; what it wrote is
    learned from, exported and imported again."""
    from test_vllm import Server, policy

    place = served.index("--environment-args") + 1
    two = {**json.loads(served[place]), "splits": {"train": "0:2"}}
    served[place] = json.dumps(two)
    more = ["--served-model", "policy", "--max-new-tokens", 100, "--server-logprobs"]
    assert rollout(*served, *more) == 0
    with TrajectoryStore(tmp_path / "s.db") as store:
        texts = {prompt.id: prompt.token_ids for prompt in store.prompts("train")}
        taught = {texts[row.prompt_id]: row for row in store.trajectories()}
    model = policy(vocab_size=265, max_position_embeddings=2048, num_hidden_layers=3)
    learn_by_heart(model, [(list(start or ()), row) for start, row in taught.items()])
    (tmp_path / "tokenizer").rename(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    server = Server(tmp_path / "model", "--dtype", "float32", "--enable-scale-out")
    server.start()
    try:
        server.wait()
        live = [server.url if word.startswith("http") else word for word in map(str, served)]
        live = [word.replace("/tokenizer", "/model") for word in live]
        live[live.index("s.db")] = "live.db"
        assert rollout(*live, *more, "--temperature", 0.2, "--n", 4) == 0
    finally:
        server.kill()
    with TrajectoryStore(tmp_path / "live.db") as store:
        texts = {prompt.id: prompt.token_ids for prompt in store.prompts("train")}
        rows = list(store.trajectories())
    assert len(rows) == 8
    for row in rows:
        expected = taught[texts[row.prompt_id]]
        assert row.num_turns == 2 and row.token_ids == expected.token_ids
        assert row.completion_mask == expected.completion_mask and row.reward == expected.reward
        known = row.of_policy(torch.as_tensor(row.behaviour_logprobs))
        assert known.max() <= 0 and known.min() > -1  # nearly certain at this temperature
    words = ["--store", "live.db", "--tokenizer", "model"]
    train = [
        "--model",
        "model",
        "--output_dir",
        "run",
        "--mixture",
        "offline",
        "--rollouts",
        "none",
    ]
    train += ["--group_size", "4", "--per_device_train_batch_size", "8", "--temperature", "0.2"]
    train += ["--max_steps", "20", "--use_cpu", "true", "--report_to", "none"]
    assert main(["train", "--store", "live.db", *train]) == 0
    assert main(["export", "out.jsonl", *words]) == 0
    words[1] = "again.db"
    assert main(["import", "out.jsonl", *words]) == 0
    with TrajectoryStore(tmp_path / "again.db") as store:
        again = list(store.trajectories())
    rows, again = (sorted(part, key=lambda r: (r.token_ids, r.draw)) for part in (rows, again))
    for row, same in zip(rows, again, strict=True):
        assert row.token_ids == same.token_ids and row.completion_mask == same.completion_mask
        torch.testing.assert_close(row.behaviour_logprobs, same.behaviour_logprobs)


def learn_by_heart(model: Any, texts: list[tuple[list[int], Any]]) -> None:
    """Until every token that the policy wrote is nearly certain."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(2000):
        losses = []
        for start, row in texts:
            ids = torch.tensor([start + list(row.token_ids)])
            logits = model(ids).logits[0, len(start) - 1 : -1]
            found = logits.log_softmax(-1).gather(1, ids[0, len(start) :, None])[:, 0]
            losses.append(-found[torch.tensor(row.completion_mask)])
        loss = torch.cat(losses)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        if float(loss.max()) < 0.01:
            return
    raise AssertionError(f"it did not learn: {float(loss.max())}")
