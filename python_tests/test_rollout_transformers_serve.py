"""ServerGenerator against a real server process: `transformers serve` with a tiny random model."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
import warm
from processes import free_port
from rollout_cases import END, save_policy, tiny_model

from spo_ext.data.tokens import Tokenizer
from spo_ext.rollout import Sampling, ServerError, ServerGenerator
from spo_ext.store import Prompt

for package in ("httpx", "fastapi", "uvicorn", "openai"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is missing", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = save_policy(tmp_path_factory.mktemp("policy"), end_weight=1.0)
    port = free_port()
    command = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (folder / "log").open("w+")
    process = warm.Process(
        ["-c", "from transformers.cli.transformers import main; main()", *command],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"http://127.0.0.1:{port}/health"):
            log.seek(0)
            assert process.poll() is None and time.monotonic() < deadline, log.read()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.kill()
        process.wait()
        log.close()


def _answers(url: str) -> bool:
    try:
        with urlopen(url) as response:
            return bool(response.status == 200)
    except (URLError, ConnectionError):
        return False


MESSAGES = [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize("content", ["abc", MESSAGES], ids=["text", "messages"])
def test_at_a_temperature_near_0_it_says_what_the_model_finds_likeliest(
    server: tuple[str, Path], content: str | list[dict[str, str]]
) -> None:
    url, folder = server
    tokenizer = Tokenizer(folder)
    prompt = Prompt(content, token_ids=tokenizer.prompt_ids(content))
    sampling = Sampling(n=2, temperature=1e-4, max_new_tokens=6)
    with ServerGenerator(url, str(folder), dialect="transformers", tokenizer=tokenizer) as source:
        [group] = source.generate([prompt], sampling)
    assert prompt.token_ids is not None
    ids = torch.tensor([list(prompt.token_ids)])
    output = tiny_model(end_weight=1.0).generate(ids, max_new_tokens=6, do_sample=False)
    expected = output[0, ids.shape[1] :].tolist()
    finish = "truncated" if len(expected) == 6 else "eos"
    text = tokenizer.completion("", tuple(expected))
    assert isinstance(text, str)
    for each in group:
        assert each.finish == finish and each.logprobs is None
        # The tokens that the text has here, since the server says no others.
        assert list(each.token_ids) == tokenizer.completion_ids("", text, finish)


def test_it_draws(server: tuple[str, Path]) -> None:
    url, folder = server
    prompts = [Prompt(f"q{i}", token_ids=[1]) for i in range(3)]
    options = {"dialect": "transformers", "tokenizer": Tokenizer(folder), "concurrency": 1}
    with ServerGenerator(url, str(folder), **options) as source:  # type: ignore[arg-type]
        groups = source.generate(prompts, Sampling(n=4, max_new_tokens=8))
        again = source.generate(prompts, Sampling(n=4, max_new_tokens=8))
        other = source.generate(prompts, Sampling(n=4, max_new_tokens=8, seed=1))
    assert again == groups != other  # one request at a time, so that the seed decides
    assert all(len(set(group)) > 1 for group in groups)
    every = [each for group in groups for each in group]
    assert {each.finish for each in every} == {"eos", "truncated"}
    for each in every:
        assert (each.token_ids[-1] == END) == (each.finish == "eos")


def test_a_refusal_is_told_in_the_servers_words(server: tuple[str, Path]) -> None:
    url, folder = server
    sampling = Sampling(max_new_tokens=2)
    with (
        ServerGenerator(url, "another", dialect="openai", tokenizer=Tokenizer(folder)) as source,
        pytest.raises(ServerError, match=r"/completions: status 400: Server is pinned to"),
    ):
        source.generate([Prompt("a", token_ids=[1])], sampling)
    with (
        ServerGenerator(url, str(folder)) as source,  # dialect vllm: token ids
        pytest.raises(ServerError, match="status 422: Unexpected fields in the request"),
    ):
        source.generate([Prompt("a", token_ids=[1])], sampling)
