"""`spo rollout --server`: weights that change under its requests, and requests that fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from data_cases import save_tokenizer
from fake_vllm import TROUBLES
from publish_cases import tiny_model
from rollout_cases import (
    change_server,
    fake_server,
    meanwhile,
    new_store,
    rollout,
    save_reward,
    wait_for,
)

from spo_ext.store import Prompt, TrajectoryStore
from spo_ext.trainer.publish import DirectoryPublisher, ServerPublisher

pytest.importorskip("httpx")


@pytest.fixture
def url() -> Iterator[str]:
    with fake_server() as found:
        yield found


class Place:
    """A store, a folder of policies and a server; `spo rollout` on them."""

    def __init__(self, folder: Path, url: str, prompts: list[Prompt]) -> None:
        self.path, self.policies, self.url = (
            new_store(folder / "store.db", prompts),
            folder / "p",
            url,
        )
        self._fixed = ("--store", self.path, "--server", url, "--served-model", "policy", "--n", 2)
        self._fixed += ("--tokenizer", save_tokenizer(folder / "tokenizer"), "--run", "live")
        self._fixed += ("--reward", save_reward(folder), "--max-new-tokens", 5)

    def rollout(self, *options: object) -> int:
        return rollout(*self._fixed, *options)

    def follow(self, *options: object) -> int:
        return self.rollout("--follow", self.policies, "--prompts-per-version", 12, *options)

    def publisher(self) -> ServerPublisher:
        return ServerPublisher(self.url, self.policies, run="live")

    def weights(self) -> Counter[tuple[int, int]]:
        """(version that is stored, version of the weights that wrote it, -1 for the base) of
        rows."""
        with TrajectoryStore(self.path) as store:
            rows = list(store.trajectories(run="live"))
        return Counter((row.origin.policy_version or 0, row.token_ids[3] - 1) for row in rows)

    def held(self) -> int:
        with urlopen(f"{self.url}/log") as response:
            return int(json.load(response)["held"])


def words(count: int, first: int = 5) -> list[Prompt]:
    return [Prompt(f"prompt {i}", token_ids=[first + i, 7]) for i in range(count)]


@pytest.mark.parametrize("says", [True, False], ids=["weight_info", "before 0.32"])
def test_no_completion_is_stored_under_a_version_that_did_not_write_it(
    url: str, tmp_path: Path, says: bool
) -> None:
    place = Place(tmp_path, url, words(12))
    publisher, model = place.publisher(), tiny_model()
    change_server(url, seconds=0.02, versions=says)

    def train() -> None:
        for version in range(8):
            publisher.publish(model, None, version)
            wait_for(lambda version=version: place.weights()[version, version] > 4)

    done = meanwhile(train, publisher)
    assert place.follow("--batch-size", 3, "--concurrency", 3) == 0
    done()
    found = place.weights()
    assert all(stored == wrote for stored, wrote in found), found
    assert {stored for stored, _ in found} == set(range(8))
    assert place.held() > 0, "requests waited while the weights changed"


def test_a_server_that_was_started_anew_is_noticed_and_gets_its_weights_again(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, url, words(12))
    publisher = place.publisher()
    publisher.publish(tiny_model(), None, 0)
    publisher.publish(tiny_model(), None, 2)
    change_server(url, seconds=0.25)  # 3 s for all, so that some are left at the restart

    def train() -> None:
        wait_for(lambda: place.weights()[2, 2] > 0)
        change_server(url, restart=True, away=3, seconds=0.05)
        wait_for(lambda: "waiting for the trainer" in capfd.readouterr().err)
        publisher.restore()
        wait_for(lambda: place.weights()[2, 2] == 24)

    done = meanwhile(train, publisher)
    assert place.follow("--batch-size", 2, "--concurrency", 2, "--retries", 1) == 0
    done()
    assert place.weights() == {(2, 2): 24}
    # When nobody is there to bring them again:
    change_server(url, restart=True)
    assert place.follow("--n", 4) == 1
    words_said = capfd.readouterr().err
    assert "the server says that its weights are 'default', not those of" in words_said
    assert "give --policy-version 2 in place of --follow" in words_said
    assert place.weights() == {(2, 2): 24}


def test_a_version_that_the_server_contradicts_is_refused(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, url, words(2))
    place.publisher().publish(tiny_model(), None, 3)
    assert place.rollout("--policy-version", 1) == 1
    assert "--policy-version must be 3, which the server says" in capfd.readouterr().err
    assert place.rollout("--policy-version", 3) == 0
    assert place.weights() == {(3, 3): 4}
    assert place.rollout("--origin-model", "other") == 0


def test_a_trainer_that_goes_back_to_a_checkpoint_is_followed(url: str, tmp_path: Path) -> None:
    """Its server has an earlier version then."""
    place = Place(tmp_path, url, words(12))
    resumed = place.publisher()
    change_server(url, seconds=0.05)

    def train() -> None:
        place.publisher().publish(tiny_model(), None, 5)
        wait_for(lambda: place.weights()[5, 5] > 0)
        resumed.publish(tiny_model(), None, 4)
        wait_for(lambda: place.weights()[4, 4] == 24)
        resumed.publish(tiny_model(), None, 5)

    done = meanwhile(train, resumed)
    assert place.follow("--batch-size", 1, "--concurrency", 1) == 0
    done()
    assert place.weights() == {(4, 4): 24, (5, 5): 24}


def test_the_policies_of_another_run_are_refused(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, url, words(2))
    DirectoryPublisher(place.policies, run="first").publish(tiny_model(), None, 1)
    with pytest.raises(ValueError, match="run: must name the run 'live', got 'first': every run"):
        place.publisher()
    assert place.follow() == 1
    assert "must name the run 'live', got 'first'" in capfd.readouterr().err


@pytest.mark.parametrize("first", TROUBLES, ids=lambda first: TROUBLES[first].replace(" ", "-"))
def test_one_prompt_that_fails_ends_no_rollout(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], first: int
) -> None:
    bad = Prompt("a word " * 30, token_ids=[first, *range(100)])
    place = Place(tmp_path, url, [*words(2), bad, *words(2, first=50)])
    seconds = 4 if TROUBLES[first] == "hang" else 60
    options = ("--server-logprobs", "--retries", 0, "--timeout", seconds, "--batch-size", 1)
    options += ("--min-trajectories", 2)
    assert place.rollout(*options) == 0
    said, told = capfd.readouterr()
    assert "8 trajectories of 4 prompts" in said and "1 prompts without completions" in said
    name = "prompt 3 ('a word a word a word a word a word a wor...', 101 tokens and up to 5 new"
    assert name in told
    refused = TROUBLES[first] in ("too long", "status 422", "status 413")
    assert ("is left out, now and later" in told) == refused
    assert ("has no completions" in told) == (not refused)
    # Another process does not ask again for one that the server refuses.
    asked = request_count(url)
    assert place.rollout(*options) == (0 if refused else 1)
    assert request_count(url) - asked == (0 if refused else 1)
    assert ("1 left out, which the server refused" in capfd.readouterr().out) == refused


def request_count(url: str) -> int:
    with urlopen(f"{url}/log") as response:
        return len(json.load(response)["log"])


def test_a_prompt_that_is_refused_is_asked_for_again_when_there_is_room(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, url, [*words(1), Prompt("long", token_ids=range(1, 41))])
    change_server(url, room=44)
    options = ("--min-trajectories", 2)
    assert place.rollout(*options) == 0
    assert "2 trajectories of 1 prompts" in capfd.readouterr().out
    assert place.rollout(*options, "--max-new-tokens", 4) == 0  # 40 + 4 fit
    assert "2 trajectories of 1 prompts" in capfd.readouterr().out
    # By its stated context alone, without a request.
    (tmp_path / "other").mkdir()
    place = Place(tmp_path / "other", url, [*words(1), Prompt("long", token_ids=range(1, 51))])
    asked = request_count(url)
    assert place.rollout() == 0
    assert request_count(url) == asked + 1
    assert "the server's context has 44 tokens" in capfd.readouterr().err


@pytest.mark.parametrize("first", [1001, 1002], ids=TROUBLES.get)
def test_a_server_that_answers_nobody_ends_the_rollout(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], first: int
) -> None:
    prompts = [Prompt(f"prompt {i}", token_ids=[first, i + 1]) for i in range(20)]
    place = Place(tmp_path, url, prompts)
    assert place.rollout("--retries", 0, "--batch-size", 2) == 1
    assert "8 prompts in a row had no answer; the last: " in capfd.readouterr().err
    with TrajectoryStore(place.path) as store:
        assert store.counters()["trajectories"] == 0 and store.refusals("live") == {}


def test_what_two_servers_mean_by_log_probabilities_is_asked_before_any_work(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, url, words(1))
    for options, match in [
        (("--server-logprobs", "--top-p", 0.9), "top_p must be 1 with processed_logprobs"),
        (
            ("--server-logprobs", "--logprobs-mode", "raw_logprobs", "--temperature", 0.7),
            "temperature must be 1 with raw_logprobs",
        ),
        (("--server-extra", "[1]"), "must be a JSON object"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            place.rollout(*options)
        assert match in capfd.readouterr().err
    assert place.rollout("--server-extra", '{"temperature": 2}') == 1
    assert "fields that other arguments set, got 'temperature'" in capfd.readouterr().err
    assert request_count(url) == 0
    extra = ("--server-extra", '{"seed": 7, "priority": 1}')
    assert place.rollout("--server-logprobs", *extra) == 0
    with urlopen(f"{url}/log") as response:
        [seen] = json.load(response)["log"]
    assert (seen["seed"], seen["priority"], seen["logprobs"]) == (7, 1, 0)
