"""ServerGenerator against a server process that speaks vLLM's dialect."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.request import urlopen

import pytest
from data_cases import save_tokenizer
from fake_vllm import MODES, PROBABILITIES
from rollout_cases import (
    END,
    change_server,
    fake_server,
    new_store,
    plain_prompts,
    rollout,
    save_reward,
    wait_for,
    words,
)

from spo_ext.data.tokens import Tokenizer
from spo_ext.rollout import Sampling, ServerError, ServerGenerator, dialects
from spo_ext.rollout.commands import DIALECTS
from spo_ext.rollout.dialects import Dialect, ReplyError, from_text
from spo_ext.store import Prompt, TrajectoryStore

pytest.importorskip("httpx")
SAMPLING = Sampling(n=3, temperature=0.5, top_p=0.9, max_new_tokens=7, seed=3)
WHOLE = replace(SAMPLING, top_p=1.0)  # for log-probabilities


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with fake_server() as found:
        yield found


def asked(url: str, model: str) -> tuple[list[dict[str, Any]], int]:
    with urlopen(f"{url}/log") as response:
        seen = json.load(response)
    return [entry for entry in seen["log"] if entry["model"] == model], seen["most_busy"]


def generator(url: str, model: str, **options: Any) -> ServerGenerator:
    return ServerGenerator(url, model, **{"timeout_s": 10.0, "retries": 3, **options})


def test_token_ids_go_in_and_come_out(url: str) -> None:
    prompts = [Prompt(f"{size}", token_ids=range(size)) for size in (2, 5, 3)]
    with generator(url, "plain", api_key="secret", extra={"stop": ["x"]}) as server:
        groups = server.generate(prompts, SAMPLING)
        again = server.generate(prompts[::-1], SAMPLING)
    assert again[::-1] == groups  # seeds belong to prompts
    seen, _ = asked(url, "plain")
    assert len(seen) == 6
    for prompt, group in zip(prompts, groups, strict=True):
        [first, _] = [entry for entry in seen if entry["prompt"] == list(prompt.token_ids or ())]
        seed = first["seed"]
        assert [each.token_ids for each in group] == [
            (*(len(prompt.token_ids or ()), seed % 251, index), *([END] if index % 2 == 0 else []))
            for index in range(3)
        ]
        assert [each.finish for each in group] == ["eos", "truncated", "eos"]
        assert [each.logprobs for each in group] == [None] * 3
        assert first["path"] == "/v1/completions" and first["key"] == "Bearer secret"
        settings = ("n", "temperature", "top_p", "max_tokens", "stop", "min_p")
        assert [first[name] for name in settings] == [3, 0.5, 0.9, 7, ["x"], 0.0]
        assert "logprobs" not in first and 0 <= seed < 2**31
    assert len({entry["seed"] for entry in seen}) == 3


def test_logprobs_are_stored_when_asked_for(url: str) -> None:
    with generator(url, "logprobs", logprobs=True) as server:
        [group] = server.generate(words(1), WHOLE)
    assert group[0].logprobs == (-0.5, -1.0, -1.5, -2.0)
    assert group[1].logprobs == (-0.5, -1.0, -1.5)
    assert asked(url, "logprobs")[0][0]["logprobs"] == 0
    with (
        generator(url, "short", logprobs=True) as server,
        pytest.raises(ServerError, match="must have a log-probability for each of 4 tokens"),
    ):
        server.generate(words(1), WHOLE)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_logprobs_are_those_of_the_full_softmax_or_refused(
    url: str, mode: Any, temperature: float, top_p: float
) -> None:
    """As embedded rollouts store them, whatever the server's mode is."""
    sampling = Sampling(n=2, temperature=temperature, top_p=top_p, max_new_tokens=50)
    with generator(url, mode, logprobs=True, logprobs_mode=mode) as server:
        wrong = "top_p" if mode == "processed_logprobs" and top_p != 1 else None
        wrong = "temperature" if mode == "raw_logprobs" and temperature != 1 else wrong
        if wrong is not None:
            with pytest.raises(ValueError, match=f"{wrong} must be 1 with {mode}, which are those"):
                server.generate(words(3), sampling)
            return
        groups = server.generate(words(3), sampling)
    scaled = [p ** (1 / temperature) for p in PROBABILITIES]
    drawn = set()
    for each in (each for group in groups for each in group):
        known = [math.log(scaled[token] / sum(scaled)) for token in each.token_ids]
        assert each.logprobs == pytest.approx(known)
        drawn |= set(each.token_ids)
    # Nothing but top-p cuts the tail, though the server's own defaults would.
    assert drawn == ({0, 1} if top_p < 1 else {0, 1, 2, 3})


def test_an_end_that_the_server_leaves_out_is_added(url: str) -> None:
    with generator(url, "no-end", logprobs=True, end_ids=[END, 7]) as server:
        [group] = server.generate(words(1), WHOLE)
    assert [each.token_ids[-1] for each in group] == [END, 1, END]
    assert [each.finish for each in group] == ["eos", "truncated", "eos"]
    # There is no log-probability for a token that the server did not show.
    assert [each.logprobs is None for each in group] == [True, False, True]


@pytest.mark.parametrize("dialect", get_args(Dialect))
def test_nothing_but_temperature_and_top_p_shapes_the_draws(dialect: Any) -> None:
    body = dialects.request(dialect, Prompt("a", token_ids=[1]), SAMPLING, False, False)
    where = json.loads(body["generation_config"]) if dialect == "transformers" else body
    assert (where["temperature"], where["top_p"]) == (0.5, 0.9)
    off = {
        "vllm": {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0},
        "transformers": {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "typical_p": 1},
        "openai": {"frequency_penalty": 0, "presence_penalty": 0},
        "llama.cpp": {"top_k": 0, "min_p": 0, "repeat_penalty": 1, "dry_multiplier": 0},
    }[dialect]
    assert {name: where.get(name) for name in off} == off
    if dialect == "llama.cpp":  # top-p of the distribution at the temperature, as elsewhere
        assert where["samplers"] == ["temperature", "top_p"]
    if dialect == "openai":  # whose own server refuses fields that it does not know
        known = {"max_tokens", "temperature", "top_p", "seed", "prompt"}
        assert set(body) == known | set(off)
        body = dialects.request(dialect, Prompt("a"), SAMPLING, False, False, "llamacpp")
        assert (body["top_k"], body["repeat_penalty"]) == (0, 1.0)
    if dialect == "transformers":
        assert not {"frequency_penalty", "presence_penalty"} & set(body), "it refuses them"
    assert DIALECTS == get_args(Dialect)


def test_fields_of_the_user_go_along_or_are_refused(url: str) -> None:
    with generator(url, "extra", extra={"stop": ["x"], "min_p": None, "bias": {"a": 1}}) as server:
        server.generate(words(1), SAMPLING)
    [seen], _ = asked(url, "extra")
    assert (seen["stop"], seen["bias"], "min_p" in seen) == (["x"], {"a": 1}, False)
    for extra, options, match in [
        ({"temperature": 2}, {}, "extra must be without fields that other arguments set, got 'tem"),
        ({"top_k": 5}, {"logprobs": True}, r"extra\['top_k'\] must be left out with processed"),
    ]:
        with pytest.raises(ValueError, match=match):
            generator(url, "extra", extra=extra, **options)


def test_requests_run_at_once_but_not_too_many(url: str) -> None:
    with generator(url, "slow", concurrency=4) as server:
        start = time.monotonic()
        groups = server.generate(words(12), Sampling(n=1))
        seconds = time.monotonic() - start
    assert len(groups) == 12 and seconds >= 0.6
    assert asked(url, "slow")[1] == 4


def test_a_busy_server_is_asked_again(url: str) -> None:
    with generator(url, "flaky") as server:
        [group] = server.generate(words(1), SAMPLING)
    assert len(group) == 3
    assert len(asked(url, "flaky")[0]) == 3  # 429, 503, then the completions


def test_a_server_that_fails_on_is_named_with_its_words(url: str) -> None:
    match = r"the prompt \('prompt 0', 2 tokens and up to 7 new ones\): http://127.0.0.1:\d+/v1/"
    match += r"completions: status 500: no room for broken \(after 2 attempts\)"
    with (
        generator(url, "broken", retries=1) as server,
        pytest.raises(ServerError, match=match),
    ):
        server.generate(words(1), SAMPLING)
    assert len(asked(url, "broken")[0]) == 2


def test_what_would_not_help_is_not_tried_again(url: str) -> None:
    for model, match in [
        ("missing", "status 404: The model `missing` does not exist."),
        ("page", "the reply must be JSON, got '<html>not an API"),
        ("old", "has no token_ids; the dialect vllm needs a server"),
        ("aborted", "finish_reason must be stop or length, got 'abort'"),
    ]:
        with generator(url, model) as server, pytest.raises(ServerError, match=match):
            server.generate(words(1), SAMPLING)
        assert len(asked(url, model)[0]) == 1


def test_a_hang_ends_at_the_timeout(url: str) -> None:
    start = time.monotonic()
    with (
        generator(url, "hang", timeout_s=0.5, concurrency=1) as server,
        pytest.raises(ServerError, match="no answer within timeout_s=0.5"),
    ):
        server.generate(words(4), SAMPLING)
    assert time.monotonic() - start < 25.0  # the server takes 30
    assert len(asked(url, "hang")[0]) <= 2  # the rest was cancelled, at most one had begun


def test_a_broken_connection_is_tried_again_and_then_named(url: str) -> None:
    with (
        generator(url, "dropped", retries=1) as server,
        pytest.raises(ServerError, match=r"RemoteProtocolError.*\(after 2 attempts\)"),
    ):
        server.generate(words(1), SAMPLING)
    assert len(asked(url, "dropped")[0]) == 2
    with (
        ServerGenerator("http://127.0.0.1:1/v1", "m", retries=0) as server,
        pytest.raises(ServerError, match=r"http://127.0.0.1:1/v1/completions: ConnectError"),
    ):
        server.generate(words(1), SAMPLING)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"url": "localhost:8000"}, "url must be a URL of http or https"),
        ({"dialect": "other"}, "dialect must be one of vllm, transformers, openai"),
        ({"dialect": "openai"}, "tokenizer must be given for dialect openai"),
        ({"chat": True}, "chat must be None or False for dialect vllm"),
        ({"retries": -1}, "retries must be an integer >= 0"),
        ({"timeout_s": 0}, "timeout_s must be a number > 0"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ServerGenerator(**{"url": "http://localhost/v1", "model": "m", **options})


def test_a_prompt_without_token_ids_is_refused(url: str) -> None:
    with (
        generator(url, "plain") as server,
        pytest.raises(ValueError, match=r"prompts\[0\].token_ids must be at least one token id"),
    ):
        server.generate([Prompt("text")], SAMPLING)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "tool_calls"])
def test_a_message_that_the_server_took_apart_is_refused(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer(save_tokenizer(tmp_path))
    prompt = Prompt([{"role": "user", "content": "a"}])
    whole = {"finish_reason": "stop", "message": {"content": "b", name: None}}
    assert from_text(whole, prompt, tokenizer, chat=True).token_ids[-1] == END
    parts = {"finish_reason": "stop", "message": {"content": "b", name: "so"}}
    with pytest.raises(ReplyError, match=f"the server cuts {name} out of the message"):
        from_text(parts, prompt, tokenizer, chat=True)


def test_versions_of_a_server_are_followed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder says which version a server has that does not say it; one that it has no more is
    left at once."""
    change_server(url, versions=False)
    directory, path = tmp_path / "policies", new_store(tmp_path / "store.db", plain_prompts(12))
    monkeypatch.setenv("SLOWLY", "0.2")

    def publish(version: int) -> None:
        folder = directory / f"version-{version:07d}"
        folder.mkdir(parents=True)
        (directory / "pointer").write_text(f"{folder.name}\n")
        (directory / "pointer").rename(directory / "latest")

    def drawn() -> Counter[int | None]:
        with TrajectoryStore(path) as store:
            return Counter(t.origin.policy_version for t in store.trajectories(run="live"))

    def train() -> None:
        wait_for(lambda: drawn()[1] > 0)
        publish(3)
        (directory / "finished").touch()

    publish(1)
    trainer = threading.Thread(target=train)
    trainer.start()
    options = ("--store", path, "--server", url, "--served-model", "plain", "--follow", directory)
    options += ("--tokenizer", save_tokenizer(tmp_path / "tokenizer"), "--run", "live", "--n", 2)
    options += ("--reward", save_reward(tmp_path), "--batch-size", 1, "--prompts-per-version", 12)
    assert rollout(*options) == 0
    trainer.join()
    assert drawn()[3] == 24 and 0 < drawn()[1] < 24
    with pytest.raises(SystemExit, match="2"):
        rollout(*options, "--model", tmp_path)


def test_a_rollout_needs_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ("--store", tmp_path / "store.db", "--run", "r")
    for policy, match in [
        ((), "one of --model, --server and --follow must be given"),
        (("--model", tmp_path, "--server", "u"), "--server must not be given with --model"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            rollout(*store, *policy)
        assert match in capsys.readouterr().err
