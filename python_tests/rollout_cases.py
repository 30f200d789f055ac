"""What the tests of producers share: a tiny policy, prompts, a scripted generator, a process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import torch
import warm
from data_cases import save_tokenizer

from spo_ext.cli import main
from spo_ext.rollout import Generation, Judgement, Sampling
from spo_ext.store import Prompt, TrajectoryStore

if TYPE_CHECKING:
    from spo_ext.trainer.publish import DirectoryPublisher

END = 256  # of data_cases.save_tokenizer, whose other ids are bytes


def tiny_model(seed: int = 0, end_weight: float = 0.0, **config: Any) -> Any:
    """A random policy; with end_weight it writes the end token more often."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": END,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    with torch.no_grad():
        model.lm_head.weight[END] *= (
            1.0 + end_weight
        )  # certain after some contexts, never after others
    return model.eval()


def save_policy(folder: Path, seed: int = 0, end_weight: float = 0.0) -> Path:
    """Model and tokenizer."""
    tiny_model(seed, end_weight).save_pretrained(folder)
    return save_tokenizer(folder)


def words(count: int, **fields: Any) -> list[Prompt]:
    return [Prompt(f"prompt {i}", token_ids=list(f"p{i}".encode()), **fields) for i in range(count)]


class Scripted:
    """A generator whose completions say what it was asked: prompt, seed and number."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        self.asked.append(([str(prompt.content) for prompt in prompts], sampling))
        return [[self.write(p, sampling, k) for k in range(sampling.n)] for p in prompts]

    def write(self, prompt: Prompt, sampling: Sampling, k: int) -> Generation:
        ids = (*(prompt.token_ids or ()), sampling.seed % 251, k)
        return Generation((*ids, END), "eos") if k % 2 else Generation(ids, "truncated")


def odd_ones(
    prompts: Sequence[Prompt], completions: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> list[Judgement | None]:
    """Reward 1 for those that ended."""
    assert len(prompts) == len(completions) == len(token_ids)
    return [Judgement(float(ids[-1] == END), "ended") for ids in token_ids]


def decode(ids: Sequence[int]) -> str:
    return bytes(token for token in ids if token < END).decode(errors="replace")


def start_rollout(*arguments: object, cwd: Path | None = None) -> warm.Process:
    """`spo rollout` as a process of its own."""
    return warm.Process(
        ["spo", "rollout", "--quiet", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
    )


@contextmanager
def fake_server() -> Iterator[str]:
    """The URL of fake_vllm.py in a process of its own."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "fake_vllm.py")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def change_server(url: str, **how: Any) -> None:
    """See fake_vllm.py."""
    body = json.dumps(how).encode()
    with urlopen(url.removesuffix("/v1") + "/fake", body) as response:
        assert response.status == 200


def rows(store: TrajectoryStore) -> list[tuple[Any, ...]]:
    """All trajectories, but for ids, times and log-probabilities, in an order of their own."""
    return sorted(
        (t.prompt_id, t.token_ids, t.reward, t.finish, t.origin.policy_version or 0)
        for t in store.trajectories()
    )


REWARD = """
import os, time

def ends(prompts, completions, completion_ids):
    time.sleep(float(os.environ.get("SLOWLY", "0")))
    return [float(ids[-1] == 256) - len(text) / 8 for ids, text in zip(completion_ids, completions)]
"""


def save_reward(folder: Path) -> str:
    """A file with a reward function; the name to load it by."""
    path = folder / "my_rewards.py"
    path.write_text(REWARD)
    return f"{path}:ends"


def new_store(path: Path, prompts: list[Prompt]) -> Path:
    with TrajectoryStore(path) as store:
        store.add_prompts(prompts)
    return path


def plain_prompts(count: int) -> list[Prompt]:
    chat: Any = [[{"role": "user", "content": f"chat {i}"}] for i in range(count // 2)]
    return [Prompt(x) for x in (*chat, *(f"text {i}" for i in range(count - count // 2)))]


def rollout(*arguments: object) -> int:
    return main(["rollout", "--quiet", *map(str, arguments)])


def total(store: TrajectoryStore) -> int:
    """Completions drawn; the same one drawn twice is stored once, and counted."""
    counters = store.counters()
    return counters["trajectories"] + counters["duplicates"]


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def meanwhile(work: Callable[[], object], publisher: DirectoryPublisher) -> Callable[[], None]:
    """Starts a trainer's work in a thread; call the result to wait for its end and see its error.

    The trainer finishes at the end, whatever happened, so that nobody follows it for ever.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            publisher.finish()

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> None:
        thread.join()
        if failures:
            raise failures[0]

    return join
