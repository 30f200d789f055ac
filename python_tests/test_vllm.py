"""Rollouts and publications against vLLM itself: `make vllm`, which names its command in SPO_VLLM.

Every row that a server wrote is looked at again: its log-probabilities must be those of the weights
that the row is stored under.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

VLLM = os.environ.get("SPO_VLLM")
pytestmark = pytest.mark.skipif(VLLM is None, reason="needs vLLM: make vllm")

pytest.importorskip("transformers")
pytest.importorskip("httpx")

import torch
from data_cases import contents, save_tokenizer
from processes import free_port
from rollout_cases import END, meanwhile, new_store, rollout, save_reward, tiny_model, wait_for
from test_bring_your_own import make_clone, run_served
from torch import nn
from transformers import AutoModelForCausalLM

from spo_ext.cli import main
from spo_ext.data.tokens import Tokenizer
from spo_ext.store import Prompt, StoredTrajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.publish import DirectoryPublisher, ServerPublisher

START_S = 600
EXACT = 1e-4  # nats a token, in float32
# What a small machine without a GPU needs.
ON_CPU = ("--max-num-batched-tokens", "32768", "--gpu-memory-utilization", "0.15")
ROUTES = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def policy(seed: int = 0, **changes: Any) -> Any:
    """Heads of 32, the least that vLLM's attention knows on a CPU."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_model(seed, 0.0, **shape, **changes)


class Server:
    """`vllm serve` of a folder on a port of its own."""

    def __init__(self, model: Path, *flags: str) -> None:
        self.port = free_port()
        self.log = model.parent / f"vllm-{self.port}.log"
        self._words = [str(VLLM), "serve", str(model), "--served-model-name", "policy"]
        self._words += ["--host", "127.0.0.1", "--port", str(self.port), *ON_CPU, *flags]
        self._words += ["--logprobs-mode", "processed_logprobs"]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._words,
                stdout=log,
                stderr=log,
                env={**os.environ, **ROUTES},
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not self.answers():
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            with urlopen(self.url.removesuffix("/v1") + "/health") as response:
                return bool(response.status == 200)
        except (URLError, ConnectionError):
            return False

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    model = folder / "model"
    policy().save_pretrained(model)
    save_tokenizer(model)
    server = Server(model, *flags)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("exact"), "--dtype", "float32") as server:
        yield server


class Place:
    """A store, a reward and a folder of policies; `spo rollout` on a server."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.server, self.policies = server, folder / "policies"
        self.model = server.log.parent / "model"
        chat = [[{"role": "user", "content": f"chat {i}"}] for i in range(6)]
        texts = [*chat, *(f"text {i}" for i in range(6))]
        read = Tokenizer(self.model).prompt_ids
        prompts = [Prompt(text, token_ids=read(text)) for text in texts]
        self.store = new_store(folder / "store.db", prompts)
        self.words = ["--store", self.store, "--server", server.url, "--served-model", "policy"]
        self.words += ["--tokenizer", self.model, "--reward", save_reward(folder), "--n", 4]
        self.words += ["--max-new-tokens", 12, "--server-logprobs", "--run", "live"]

    def rollout(self, *options: object) -> None:
        assert rollout(*self.words, *options) == 0

    def rows(self) -> list[StoredTrajectory]:
        with TrajectoryStore(self.store) as store:
            return list(store.trajectories(run="live"))

    def worst(self, rows: list[StoredTrajectory], model: nn.Module) -> float:
        """The largest difference to the model's own log-probabilities, one row at a time."""
        with TrajectoryStore(self.store) as store:
            prompts = {prompt.id: prompt.token_ids for prompt in store.prompts("train")}
        worst = 0.0
        for row in rows:
            start, ids = list(prompts[row.prompt_id] or ()), list(row.token_ids)
            with torch.no_grad():
                logits = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
            found = (logits.float() / (row.temperature or 1.0)).log_softmax(-1)
            ours = found.gather(1, torch.tensor(ids)[:, None])[:, 0]
            worst = max(worst, float((ours - torch.as_tensor(row.behaviour_logprobs)).abs().max()))
        return worst

    def versions(self) -> dict[int, nn.Module]:
        folders = {int(path.name.partition("-")[2]): path for path in self.policies.glob("ver*")}
        return {n: AutoModelForCausalLM.from_pretrained(path) for n, path in folders.items()}


def shaken(version: int) -> Any:
    """Weights of a version, far from those of any other."""
    return policy(seed=100 + version)


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.7)], ids=["plain", "colder"])
def test_log_probabilities_are_the_trainers(
    exact: Server, tmp_path: Path, sampling: tuple[object, ...]
) -> None:
    """Of texts and chats."""
    place = Place(tmp_path, exact)
    place.rollout(*sampling)
    rows = place.rows()
    assert len(rows) == 48 and {row.finish for row in rows} <= {"eos", "truncated"}
    assert all(row.token_ids[-1] == END for row in rows if row.finish == "eos")
    worst = place.worst(rows, AutoModelForCausalLM.from_pretrained(place.model))
    print(f"largest difference: {worst:.1e} nats")
    assert worst < EXACT


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        ("chain_sum", {"max_terms": 2, "extract": "flexible"}),
        ("letter_counting", {"min_words": 2, "max_words": 3, "extract": "flexible"}),
        ("spell_backward", {"max_word_len": 5}),
    ],
)
def test_environments_are_learned_from_and_come_back(
    exact: Server, tmp_path: Path, dataset: str, settings: dict[str, Any]
) -> None:
    """Data sets of reasoning-gym: drawn, learned from for 20 steps, exported and imported again."""
    pytest.importorskip("reasoning_gym")
    place = Place(tmp_path, exact)
    place.store = place.words[1] = tmp_path / "gym.db"
    reward = place.words.index("--reward")
    del place.words[reward : reward + 2]
    given = json.dumps({"size": 8, "eval_size": 1, "instruction": "", **settings})
    place.rollout("--environment", f"reasoning_gym:{dataset}", "--environment-args", given)
    rows = place.rows()
    assert len(rows) == 4 * 8 and all(0 <= row.reward <= 1 for row in rows)
    assert place.worst(rows, AutoModelForCausalLM.from_pretrained(place.model)) < EXACT
    where = ["--store", str(place.store), "--tokenizer", str(place.model)]
    train = ["--model", str(place.model), "--output_dir", str(tmp_path / "run")]
    train += ["--mixture", "offline", "--rollouts", "none", "--max_steps", "20"]
    train += ["--group_size", "4", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
    train += ["--use_cpu", "--save_strategy", "no", "--report_to", "none"]
    assert main(["train", *where, *train]) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert main(["export", str(tmp_path / "all.jsonl"), "--store", str(place.store)]) == 0
    where[1] = str(tmp_path / "again.db")
    assert main(["import", str(tmp_path / "all.jsonl"), *where]) == 0
    with TrajectoryStore(place.store) as ours, TrajectoryStore(where[1]) as theirs:
        assert contents(ours) == contents(theirs)


def test_log_probabilities_after_truncation_are_refused(
    exact: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, exact)
    assert rollout(*place.words, "--top-p", 0.9) != 0
    assert "processed_logprobs" in capfd.readouterr().err and place.rows() == []


def test_rows_are_of_the_version_that_they_are_stored_under(exact: Server, tmp_path: Path) -> None:
    place = Place(tmp_path, exact)
    publisher = ServerPublisher(exact.url, place.policies, run="live", keep=9)

    def train() -> None:
        for version in range(4):
            publisher.publish(shaken(version), None, version)
            wait_for(lambda v=version: _count(place, v) >= 8)

    done = meanwhile(train, publisher)
    place.rollout("--follow", place.policies, "--prompts-per-version", 12, "--batch-size", 4)
    done()
    check_versions(place, 4)


def test_a_server_that_dies_comes_back_with_the_weights(exact: Server, tmp_path: Path) -> None:
    """The trainer looks after it while it waits; the producer goes on when it may."""
    place = Place(tmp_path, exact)
    publisher = ServerPublisher(exact.url, place.policies, run="live", keep=9, retry_s=START_S)

    def train() -> None:
        publisher.publish(shaken(0), None, 0)
        wait_for(lambda: _count(place, 0) >= 4)
        exact.kill()
        exact.start()
        publisher.publish(shaken(1), None, 1)
        wait_for(lambda: _count(place, 1) >= 8)
        exact.kill()
        exact.start()
        exact.wait()
        before = _count(place, 1)
        time.sleep(1)
        publisher.restore()
        wait_for(lambda: _count(place, 1) > before or before == 48)

    done = meanwhile(train, publisher)
    place.rollout(
        "--follow", place.policies, "--prompts-per-version", 12, "--batch-size", 2, "--retries", 60
    )
    done()
    check_versions(place, 2)


def test_bfloat16_is_measured_by_the_trainer(tmp_path: Path) -> None:
    """A server in another precision than the trainer: the mismatch is logged, and bounded."""
    with serving(tmp_path, "--dtype", "bfloat16") as server:
        place = Place(tmp_path, server)
        config = SPOConfig(
            output_dir=str(tmp_path / "live"),
            store=str(place.store),
            rollouts="external",
            publish_to=str(place.policies),
            publish_url=server.url.removesuffix("/v1"),
            max_steps=3,
            max_offpolicy_steps=0,
            per_device_train_batch_size=8,
            importance_sampling_mode="token_truncate",
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SPOTrainer(policy(), config)
        done = meanwhile(trainer.train, DirectoryPublisher(place.policies))
        place.rollout("--follow", place.policies, "--prompts-per-version", 12)
        done()
        logged = [line for line in trainer.state.log_history if "sampling/kl" in line]
    assert len(logged) == 3
    name = "sampling/sampling_logp_difference"
    print([(line[f"{name}/mean"], line[f"{name}/max"]) for line in logged])
    for line in logged:
        # The logits of these random weights are large, and so is what bfloat16 makes of them.
        assert 1e-4 < line[f"{name}/mean"] < 0.2 and line[f"{name}/max"] < 2


def test_adapters_are_loaded_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    flags = ("--dtype", "float32", "--enable-lora", "--max-lora-rank", "8")
    with serving(tmp_path, *flags) as server:
        place = Place(tmp_path, server)
        place.words[place.words.index("policy")] = "adapter"
        given = {"run": "live", "keep": 9, "lora_name": "adapter"}
        publisher = ServerPublisher(server.url, place.policies, **given)
        adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        model = peft.get_peft_model(policy(), adapters)

        def train() -> None:
            for version in range(2):
                torch.manual_seed(version)
                for name, weight in model.named_parameters():
                    if "lora_" in name:
                        nn.init.normal_(weight, std=0.3)
                publisher.publish(model, None, version)
                wait_for(lambda v=version: _count(place, v) >= 8)

        done = meanwhile(train, publisher)
        place.rollout("--follow", place.policies, "--prompts-per-version", 12)
        done()
        rows = place.rows()
        for version in range(2):
            folder = next(publisher.path(version).rglob("adapter_config.json"))
            theirs = peft.PeftModel.from_pretrained(policy(), folder.parent)
            mine = [row for row in rows if row.origin.policy_version == version]
            assert len(mine) >= 8 and place.worst(mine, theirs) < EXACT


def test_the_page_works_with_it(tmp_path: Path) -> None:
    """docs/bring_your_own.md, the block that no other test runs against vLLM."""
    clone = make_clone(tmp_path)
    command = clone / ".venv" / "bin" / "vllm"
    command.unlink()
    command.symlink_to(str(shutil.which(str(VLLM))))
    with TrajectoryStore(run_served(clone) / "store.db") as store:
        rows = list(store.trajectories(run="served"))
    assert {row.origin.policy_version for row in rows} == {0, 1}
    assert all(row.behaviour_logprobs is not None for row in rows)


def _count(place: Place, version: int) -> int:
    return sum(row.origin.policy_version == version for row in place.rows())


def check_versions(place: Place, count: int) -> None:
    rows, models = place.rows(), place.versions()
    assert sorted({row.origin.policy_version for row in rows}) == list(range(count))
    for version, model in models.items():
        mine = [row for row in rows if row.origin.policy_version == version]
        assert place.worst(mine, model) < EXACT, version
        other = models[(version + 1) % count]
        assert place.worst(mine, other) > 100 * EXACT, "the check would see it"
