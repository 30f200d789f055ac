"""`spo rollout` from end to end: tests in the sandbox, a kill, a server, wrong arguments."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from rollout_cases import (
    END,
    new_store,
    plain_prompts,
    rollout,
    rows,
    save_policy,
    save_reward,
    start_rollout,
    total,
    wait_for,
)
from test_rollout_server import asked, url  # noqa: F401

from spo_ext.data.tests import call_tests, stdin_tests
from spo_ext.store import Origin, Prompt, TrajectoryStore


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), end_weight=1.0)


def test_programs_are_drawn_judged_and_valued(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A completion of a comment is a program that does what stands before it.
    ready = "def f(x):\n    return x + 1\n#"
    path = new_store(
        tmp_path / "store.db",
        [
            Prompt("right", tests=call_tests("f", [[1], [2]], [2, 3], prefix=ready)),
            Prompt("wrong", tests=call_tests("f", [[1], [2]], [2, 4], prefix=ready)),
            Prompt("script", tests=stdin_tests(["1\n"], ["2\n"])),
            Prompt("no tests"),
            Prompt("of another split", tests=stdin_tests(["1\n"], ["2\n"]), split="test"),
        ],
    )
    options = ("--store", path, "--model", policy, "--run", "ref", "--n", 4)
    options += ("--max-new-tokens", 3, "--temperature", 0.8, "--seed", 5)
    options += ("--reward-passed", 0, "--reward-failed", -1, "--sandbox-workers", 2)
    assert rollout(*options, "--q0-beta", 0.5) == 0
    said = capsys.readouterr().out
    assert "of 3 prompts" in said and "0 without a reward" in said
    assert "Q_0 of 3 prompts for beta 0.5" in said
    with TrajectoryStore(path) as store:
        ids = {str(prompt.content): prompt.id for prompt in store.prompts()}
        drawn = {name: list(store.trajectories(prompt_id=key)) for name, key in ids.items()}
        assert {t.reward for t in drawn["right"]} == {0.0}
        assert {(t.reward, t.reason) for t in drawn["wrong"]} == {(-1.0, "call 1: wrong output")}
        assert {t.reward for t in drawn["script"]} == {-1.0}
        assert all(t.reason for t in drawn["script"])
        assert drawn["no tests"] == drawn["of another split"] == []
        for each in (*drawn["right"], *drawn["script"]):
            assert each.origin == Origin("policy", run="ref", policy_version=0)
            assert (each.temperature, each.top_p) == (0.8, 1.0)
            assert each.behaviour_logprobs is not None
            assert len(each.behaviour_logprobs) == len(each.token_ids) <= 3
            assert (each.finish == "eos") == (each.token_ids[-1] == END)
        key = {"beta": 0.5, "temperature": 0.8}
        q0 = store.q0([ids["right"], ids["wrong"], ids["no tests"]], **key)
        assert q0[0] is not None and q0[1] is not None and q0[2] is None
        assert q0[0].n == q0[1].n == 4 and -0.5 < q0[0].value < 0 and -1 < q0[1].value < -0.5
    # What is there already is left out; a new prompt is not.
    new_store(path, [Prompt("later", tests=stdin_tests(["1\n"], ["2\n"]))])
    assert rollout(*options, "--min-trajectories", 4) == 0
    assert "of 1 prompts" in (said := capsys.readouterr().out) and "3 prompts had enough" in said


def test_a_killed_rollout_goes_on_where_it_was(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, n = plain_prompts(14), 3
    path = new_store(tmp_path / "killed.db", prompts)
    common = ("--model", policy, "--run", "r", "--policy-version", 2, "--n", n, "--batch-size", 2)
    common += ("--max-new-tokens", 6, "--reward", save_reward(tmp_path), "--min-trajectories", n)
    monkeypatch.setenv("SLOWLY", "0.3")
    process = start_rollout("--store", path, *common)
    with TrajectoryStore(path) as store:
        wait_for(lambda: total(store) >= 2 * n * 2 or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        assert process.communicate()[1] == "" and process.returncode == -signal.SIGKILL
        before = list(store.trajectories())
        drawn = total(store)
        assert 0 < drawn < len(prompts) * n and drawn % (2 * n) == 0  # whole batches
        monkeypatch.delenv("SLOWLY")
        assert rollout("--store", path, *common) == 0
        after = list(store.trajectories())
        assert [t.id for t in after[: len(before)]] == [t.id for t in before]
        assert total(store) == len(prompts) * n
        # And what was drawn is what would have been drawn without the kill.
        whole = new_store(tmp_path / "whole.db", prompts)
        assert rollout("--store", whole, *common) == 0
        with TrajectoryStore(whole) as other:
            assert rows(store) == rows(other)
            assert [t.duplicates for t in after] == [t.duplicates for t in other.trajectories()]
        assert {t.reward for t in after} != {0.0}
        assert rollout("--store", path, *common) == 0
        assert total(store) == len(prompts) * n


def test_a_server_of_another_model(
    policy: Path,
    tmp_path: Path,
    url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = new_store(tmp_path / "store.db", plain_prompts(2))
    monkeypatch.setenv("MY_KEY", "k")
    options = ("--store", path, "--server", url, "--tokenizer", policy, "--run", "r", "--n", 2)
    options += ("--reward", save_reward(tmp_path))
    options += ("--origin-model", "teacher", "--server-logprobs", "--api-key-from", "MY_KEY")
    assert rollout(*options, "--served-model", "from-command") == 0
    entries, _ = asked(url, "from-command")
    assert {entry["key"] for entry in entries} == {"Bearer k"}
    with TrajectoryStore(path) as store:
        found = list(store.trajectories())
        assert {t.origin for t in found} == {Origin("model", run="r", model="teacher")}
        # The server says the length of the prompt first: the chat template was applied here.
        assert {t.token_ids[0] for t in found} == {len(entry["prompt"]) for entry in entries}
        for each in found:
            assert each.behaviour_logprobs is not None
            assert each.behaviour_logprobs.tolist()[:2] == [-0.5, -1.0]
    assert rollout(*options, "--served-model", "missing") == 1
    assert "status 404: The model `missing` does not exist." in capsys.readouterr().err


def test_what_is_wrong_is_said(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = new_store(tmp_path / "store.db", [Prompt("one", answer="1")])
    usual = {"--store": path, "--run": "r", "--model": policy, "--reward": "answer"}
    for changes, match in [
        ({"--store": tmp_path / "none.db"}, "there is no store"),
        ({"--model": tmp_path}, "no tokenizer can be read in"),
        ({"--model": tmp_path, "--tokenizer": policy}, "no model can be read in"),
        ({"--reward": "no.such.function"}, "cannot be loaded: No module named 'no'"),
        ({"--split": "dev"}, "the store must have prompts of split dev with answer, got none"),
        ({"--reward": "tests"}, "the store must have prompts of split train with tests, got none"),
    ]:
        arguments = [str(x) for pair in {**usual, **changes}.items() for x in pair]
        assert rollout(*arguments) == 1
        assert match in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()
    for extra, match in [
        (["--n", "0"], "Sampling: n must be an integer >= 1, got 0"),
        (["--follow", "x"], "not allowed with argument --model"),
        (["--q0-beta", "0"], "--q0-beta must be > 0, got 0.0"),
        (["--q0-beta", "1", "--origin-model", "m"], "--q0-beta must not be given with"),
        (["--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["--policy-version", "-1"], "--policy-version must be >= 0, got -1"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            rollout(*(str(x) for pair in usual.items() for x in pair), *extra)
        assert match in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        rollout("--store", path, "--run", "r", "--server", "http://localhost/v1")
    assert "--served-model must be given with --server" in capsys.readouterr().err


TWO = """
def known(completions, level, **_):
    return [None if each is None else float(each) for each in level]

def long(completions, **_):
    return [0.5] * len(completions)
"""


def test_the_sum_of_several_rewards_by_name(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.py").write_text(TWO)
    ready = "def f(x):\n    return x + 1\n#"
    tests = call_tests("f", [[1]], [2], prefix=ready)
    prompts = [Prompt("right", tests=tests, columns={"level": 3}), Prompt("no tests")]
    path = new_store(tmp_path / "store.db", prompts)
    given = ("--store", path, "--model", policy, "--run", "r", "--n", 2, "--max-new-tokens", 2)
    given += ("--sandbox-workers", 1, "--reward", "tests", "--reward", f"{tmp_path}/two.py:known")
    given += ("--reward", f"{tmp_path}/two.py:long")
    assert rollout(*given, "--reward-weights", 1, 2) == 1
    assert "reward_weights must be 3, one for each of" in capsys.readouterr().err
    assert rollout(*given, "--reward-weights", 1, 2, 4) == 0
    assert "tests 1, known 3, long 0.5" in capsys.readouterr().out
    with TrajectoryStore(path) as store:
        found = {(t.prompt_id, t.reward, t.reason) for t in store.trajectories()}
    assert found == {(1, 9.0, "tests 1, known 3, long 0.5"), (2, 2.0, "long 0.5")}
