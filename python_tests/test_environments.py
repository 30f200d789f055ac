"""Environments: their prompts, their turns, their rewards, and what bounds their code."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import alive, eventually

pytest.importorskip("sqlalchemy")
pytest.importorskip("transformers")

from data_cases import save_tokenizer
from rollout_cases import END, Scripted, decode, rollout, save_policy

from spo_ext.cli import main
from spo_ext.contests.recipe import Contest
from spo_ext.data.tokens import Tokenizer
from spo_ext.environments import Environment, fill, load_environment
from spo_ext.environments.gym import ReasoningGym
from spo_ext.environments.worker import MAX_REPLY, CallError, Workers
from spo_ext.rollout import Generation, Rollouts, Sampling
from spo_ext.store import Prompt, TrajectoryStore

ONE_TURN = """
class Lengths:
    def __init__(self, least=1):
        self.least = least

    def prompts(self, split):
        for i in range(4):
            yield {"prompt": f"{split} {i}", "answer": i, "kind": "length"}

    def reward(self, completions, kind, **_):
        assert set(kind) == {"length"}
        return [float(len(text) >= self.least) for text in completions]
"""

# For every wrong guess of a number 0.25, and 1 for the right one, which ends the episode.
GUESS = """
import os, subprocess, sys, time

class Guess:
    max_turns = 3
    step_seconds = 2.0
    max_observation = 40

    def __init__(self, chat=True, failed=None):
        self.chat, self.failed = chat, failed

    def prompts(self, split):
        for i in range(3, 5):
            text = f"{split}: guess {i}"
            content = [{"role": "user", "content": text}] if self.chat else text
            yield {"prompt": content, "answer": i}

    def step(self, row, said, state):
        guess = said[-1]["content"]
        count = (state or 0) + 1
        assert [one["role"] for one in said] == (["assistant", "user"] * count)[:-1]
        if guess == "hang":
            subprocess.Popen(["sleep", "1000"])
            time.sleep(1000)
        if guess == "raise":
            raise RuntimeError("the tool fell over")
        if guess == "exit":
            sys.exit(3)
        if guess == "die":
            os._exit(1)
        if guess == "flood":
            return {"observation": "x" * 1_000_000, "state": count}
        if guess == "flood of bytes":
            return {"observation": "x" * 100_000_000}
        if guess == "print":
            print("x" * 1_000_000, flush=True)
            os.write(1, b"y" * 1_000_000)
        if guess == "nonsense":
            return {"observations": "?"}
        right = guess == str(row["answer"])
        paid = {"reward": 1.0 if right else 0.25, "done": right}
        return {"observation": "right" if right else "no", "state": count, **paid}
"""


class Turns:
    """A generator that writes these words, one of them in each turn; None: it has no answer."""

    def __init__(self, tokenizer: Tokenizer, *words: str | None, finish: Any = "eos") -> None:
        self._tokenizer, self._words, self._finish = tokenizer, words, finish
        self.asked: list[list[tuple[int, ...]]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        words = self._words[min(len(self.asked), len(self._words) - 1)]
        self.asked.append([tuple(prompt.token_ids or ()) for prompt in prompts])
        if words is None:
            return [[] for _ in prompts]
        own = self._tokenizer.completion_ids("", words, "truncated", prompt_ids=[])
        ids = (*own, *([END] if self._finish == "eos" and words else []))
        drawn = Generation(ids, self._finish, (-0.5,) * len(ids))
        return [[drawn] * sampling.n for _ in prompts]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(save_tokenizer(tmp_path / "tokenizer"))


def empty(folder: Path) -> TrajectoryStore:
    return TrajectoryStore(folder / f"{len(list(folder.iterdir()))}-{time.monotonic()}.db")


def source(folder: Path, text: str, name: str) -> str:
    path = folder / "own_environment.py"
    path.write_text(text)
    return f"{path}:{name}"


def played(
    store: TrajectoryStore,
    environment: Environment,
    plain: Any,
    tokenizer: Tokenizer,
    room: int | None = None,
    n: int = 2,
) -> tuple[list[Any], Any]:
    """Trajectories of the first prompt, and the stats."""
    prompts = store.get_prompts(fill(store, environment, "train", tokenizer))
    generator = environment.generator(plain, tokenizer, room)
    rollouts = Rollouts(
        store,
        generator,
        environment.reward,
        run="r",
        sampling=Sampling(n=n, max_new_tokens=32),
        decode=decode,
    )
    try:
        stats = rollouts.collect(prompts[:1], 0)
    finally:
        getattr(generator, "close", lambda: None)()
    return list(store.trajectories()), stats


class Right(Scripted):
    """Writes the stored answer, every second time in tags, and at last something else."""

    def write(self, prompt: Prompt, sampling: Sampling, k: int) -> Generation:
        said = [
            f"{prompt.answer}",
            f"Hm. <answer> {prompt.answer}</answer> it is.",
            "no idea, zyx",
        ][k]
        return Generation((*said.encode(), END), "eos")


DATASETS = ["chain_sum", "word_sorting", "number_filtering"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_right_answer_to_reasoning_gym_gets_1(
    tmp_path: Path, dataset: str, tokenizer: Tokenizer
) -> None:
    pytest.importorskip("reasoning_gym")
    environment = load_environment(f"reasoning_gym:{dataset}", {"size": 3, "eval_size": 2})
    with empty(tmp_path) as store:
        ids = fill(store, environment, "train", tokenizer)
        assert fill(store, environment, "train", tokenizer) == ids and len(ids) == 3
        prompts = store.get_prompts(ids)
        rollouts = Rollouts(
            store, Right(), environment.reward, run="r", sampling=Sampling(n=3), decode=decode
        )
        rollouts.collect(prompts, 0)
        by_prompt = [[t.reward for t in store.trajectories() if t.prompt_id == i] for i in ids]
        assert [row[:2] for row in by_prompt] == [[1.0, 1.0]] * 3
        assert all(row[2] < 0.5 for row in by_prompt)
        # Another process has what the store holds, and nothing else.
        from spo_ext.rollout import load_reward

        again = load_reward("spo_ext.environments.gym:score")
        [judgement] = again(prompts[:1], [str(prompts[0].answer)], [[1]])
        assert judgement is not None and judgement.reward == 1.0
        assert again([Prompt("of another")], ["x"], [[1]]) == [None]


def test_the_last_number_is_an_answer_where_asked_for() -> None:
    pytest.importorskip("reasoning_gym")
    given = {"size": 3, "eval_size": 1, "instruction": ""}
    flexible, strict = (
        ReasoningGym("chain_sum", **given, extract=e) for e in ("flexible", "strict")
    )
    for loose, plain in zip(flexible.prompts("train"), strict.prompts("train"), strict=True):
        assert {**(plain.columns or {}), "extract": "flexible"} == loose.columns
        texts = [f"It is 1 and {loose.answer}.", f"{loose.answer}", f"{loose.answer}, or 0.5"]
        for prompt, right in ((loose, [1.0, 1.0]), (plain, [0.0, 1.0])):
            columns = {name: [value] * 3 for name, value in (prompt.columns or {}).items()}
            found = flexible.reward(completions=texts, answer=[prompt.answer] * 3, **columns)
            assert [1.0 if one == 1 else 0.0 for one in found[:2]] == right
            assert found[2] is not None and found[2] < 1


def test_splits_of_reasoning_gym_have_nothing_in_common(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    package = pytest.importorskip("reasoning_gym")
    from spo_ext.environments.gym import MAX_SEED, STRIDE, seed_of

    # The package's rule, for which splits are taken apart.
    first, second = (package.create_dataset("chain_sum", size=5, seed=s) for s in (7, 8))
    assert [first[i]["question"] for i in range(1, 5)] == [second[i]["question"] for i in range(4)]
    starts = sorted(seed_of(s, seed) for s in ("train", "dev", "test") for seed in range(4))
    assert {b - a for a, b in zip(starts, starts[1:], strict=False)} == {STRIDE}
    assert seed_of("test", MAX_SEED) + STRIDE < 2**32
    # Sums of one digit, of which there are few: none is in two splits, and test has what it has.
    config = {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 1,
        "max_digits": 1,
        "allow_negation": False,
    }
    tiny = {"size": 150, "eval_size": 20, **config}
    environment = load_environment("reasoning_gym:chain_sum", tiny)
    alone = load_environment("reasoning_gym:chain_sum", {**tiny, "size": 1})
    found: dict[str, set[str]] = {}
    with empty(tmp_path) as store:
        for split in ("train", "test", "dev"):
            ids = fill(store, environment, split, tokenizer)  # type: ignore[arg-type]
            found[split] = {json.dumps(p.content, sort_keys=True) for p in store.get_prompts(ids)}
            assert len(found[split]) == len(ids)
    assert not (found["train"] & found["dev"] | found["train"] & found["test"])
    assert not found["dev"] & found["test"]
    assert found["test"] == {json.dumps(p.content, sort_keys=True) for p in alone.prompts("test")}


def test_what_json_cannot_hold_comes_back() -> None:
    from spo_ext.environments.gym import packed, unpacked

    value = {
        "a": (1, [2.5, None]),
        "b": {3: "x", (4, 5): True},
        "py:tuple": 1,
        "c": torch.tensor(2),
    }
    found = unpacked(json.loads(json.dumps(packed(value))))
    assert found == {**value, "c": 2} and type(found["a"]) is tuple


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("chain_sum", {}, "NAME must be one of reasoning_gym:DATASET, .* got 'chain_sum'"),
        ("reasoning_gym:no", {}, "DATASET must be one of .*chain_sum.* got 'no'"),
        (
            "reasoning_gym:chain_sum",
            {"size": 0},
            "--environment-args: size must be an integer >= 1",
        ),
        ("reasoning_gym:chain_sum", {"size": 10**7}, "size must be at most 1000000, how far apart"),
        ("reasoning_gym:chain_sum", {"seed": 10**6}, "seed must be at most 1000"),
        ("reasoning_gym:chain_sum", {"digits": 1}, "chain_sum must know its settings: .*'digits'"),
        ("reasoning_gym:chain_sum", {"chat": "no"}, "chat must be true or false, got 'no'"),
        ("nothing.py:Own", {}, "there is no file nothing.py"),
        ("no_such_module:Own", {}, "'no_such_module:Own' cannot be loaded"),
        ("json:dumps", {}, "json:dumps refuses the arguments"),
        ("json:decoder", {}, "json:decoder must be an object with prompts"),
        ("FILE:Neither", {}, "Neither must be an object with one of reward and step"),
        ("FILE:Own", {"most": 1}, "Own refuses the arguments {'most': 1}"),
    ],
)
def test_what_there_is_not_is_refused(
    tmp_path: Path, name: str, arguments: dict[str, Any], message: str
) -> None:
    if "reasoning_gym" in name:
        pytest.importorskip("reasoning_gym")
    text = "class Own:\n    def prompts(self, split): ...\n    reward = len\n"
    both = "class Neither:\n    def prompts(self, split): ...\n"
    file = source(tmp_path, text + both, "X").removesuffix(":X")
    with pytest.raises(ValueError, match=message):
        load_environment(name.replace("FILE", file), arguments)


def test_one_turn_of_a_file(tmp_path: Path) -> None:
    """By the command, into a new store, again, and in an evaluation."""
    model, store = save_policy(tmp_path / "model"), tmp_path / "store.db"
    name = source(tmp_path, ONE_TURN, "Lengths")
    given = ["--environment", name, "--environment-args", '{"least": 2}', "--store", store]
    policy = ["--model", model, "--n", 4, "--max-new-tokens", 3]
    for _ in range(2):
        assert rollout(*given, *policy, "--run", "r", "--prompts", 3) == 0
    with TrajectoryStore(store) as opened:
        [first, *others] = opened.prompts()
        assert len(others) == 3 and (first.content, first.answer) == ("train 0", 0)
        assert first.token_ids is not None
        assert first.columns == {"kind": "length", "environment": name}
        rows = list(opened.trajectories())
        assert {row.prompt_id for row in rows} == {1, 2, 3} and len(rows) > 12
        assert {row.reward for row in rows} <= {0.0, 1.0}
        assert all(row.completion_mask is None and row.info is None for row in rows)
    out = ["--out", tmp_path / "out", "--k", "1", "--run", "r", "--policy-version", 1]
    assert main([*map(str, ["eval", *given, *policy, *out])]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["settings"]["environment_args"] == {"least": 2}
    assert found["settings"]["prompts"] == 4
    with TrajectoryStore(store) as opened:
        assert [p.content for p in opened.prompts("test")] == [f"test {i}" for i in range(4)]


def test_prompts_are_imported_by_themselves(tmp_path: Path, capsys: Any) -> None:
    """Of all splits that there are, or of one; what is of files is refused."""
    name, tokenizer = source(tmp_path, ONE_TURN, "Lengths"), save_tokenizer(tmp_path / "tokenizer")
    words = ["import", "--environment", name, "--environment-args", '{"least": 2}']
    words += ["--store", str(tmp_path / "store.db"), "--tokenizer", str(tokenizer)]
    for more in (["--split", "test"], [], []):
        assert main([*words, *more]) == 0
        with TrajectoryStore(tmp_path / "store.db") as store:
            found = [(prompt.content, prompt.split, prompt.answer) for prompt in store.prompts()]
        assert len(found) == len(set(found))
        assert {split for _, split, _ in found} == ({"test"} if more else {"train", "dev", "test"})
    assert f"stored 4 prompts of {name}, split test" in capsys.readouterr().out
    for wrong, message in (
        (["--strict"], "must be left out with --environment: they are of files"),
        (["rows.jsonl"], "FILE must be given, or --environment, and not both"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["import", "--store", str(tmp_path / "store.db")])
    assert main(words[:-2]) == 1
    assert "--tokenizer must be given with --environment" in capsys.readouterr().err


def test_flags_that_do_not_go_together(tmp_path: Path, capsys: Any) -> None:
    base = ["--store", tmp_path / "x.db", "--run", "r", "--model", tmp_path]
    for more, message in (
        (["--environment", "a:b", "--reward", "tests"], "--reward must not be given with"),
        (["--environment-args", "{}"], "--environment-args must be given with --environment"),
        (["--environment", "a:b", "--environment-args", "[]"], "must be a JSON object, got '[]'"),
    ):
        with pytest.raises(SystemExit):
            rollout(*base, *more)
        assert message in capsys.readouterr().err
    name = source(tmp_path, GUESS, "Guess")
    served = ["--server", "http://localhost:1/v1", "--served-model", "m", "--tokenizer", tmp_path]
    command = ["--store", tmp_path / "x.db", "--run", "r", "--environment", name, *served]
    assert rollout(*command, "--dialect", "transformers") == 1
    said = capsys.readouterr().err
    assert "--dialect must be vllm for" in said and "got 'transformers'" in said


@pytest.mark.parametrize("chat", [True, False])
def test_turns(tmp_path: Path, tokenizer: Tokenizer, chat: bool) -> None:
    environment = load_environment(source(tmp_path, GUESS, "Guess"), {"chat": chat})
    plain = Turns(tokenizer, "9", "3")
    with empty(tmp_path) as store:
        rows, stats = played(store, environment, plain, tokenizer)
        [prompt, _] = store.prompts()
    assert (stats.appended, stats.mean_reward, stats.mean_length) == (2, 1.25, 4.0)
    row = rows[0]
    ids = tokenizer.prompt_ids(prompt.content)
    assert plain.asked[1][0] == (*ids, *row.token_ids[:-2]), "it read what it wrote, and the answer"
    between = tokenizer._text(row.token_ids[2:-2])
    assert ("no" in between) if chat else (between == "no")
    size = len(row.token_ids) - 4
    assert row.completion_mask == (True,) * 2 + (False,) * size + (True,) * 2
    assert (
        torch.as_tensor(row.behaviour_logprobs).tolist() == [-0.5] * 2 + [0.0] * size + [-0.5] * 2
    )
    assert torch.as_tensor(row.token_rewards).tolist() == [0, 0.25] + [0.0] * (size + 2)
    assert (row.reward, row.total_reward, row.finish, row.contexts) == (1.0, 1.25, "eos", None)
    assert row.info == {"environment": environment.name, "turns": 2}
    if chat:
        turns = [{"role": "assistant", "content": "9"}, {"role": "user", "content": "no"}]
        assert list(plain.asked[1][0]) == tokenizer.prompt_ids([*prompt.content, *turns])


def test_a_template_that_writes_turns_anew_begins_a_context(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    environment = load_environment(source(tmp_path, GUESS, "Guess"))
    plain = Turns(tokenizer, " 9", "3")  # of which the template leaves out the space
    tokenizer._tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|end|>{% endfor %}[a]"
    )
    with empty(tmp_path) as store:
        [row, _], _ = played(store, environment, plain, tokenizer)
    assert tokenizer._text(row.token_ids) == " 9<|end|>3<|end|>" and row.completion_mask is None
    [(start, context)] = row.contexts.items()
    assert start == 3 and context == plain.asked[1][0]
    assert tokenizer._text(context).endswith("[assistant]9<|end|>[user]no<|end|>[a]")


def test_an_episode_that_is_cut_short_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = source(tmp_path, GUESS, "Guess")
    for plain, room, turns, reward in (
        (Turns(tokenizer, "9"), None, 3, 0.75),  # as many turns as it may have
        (Turns(tokenizer, "9"), 80, 1, 0.25),  # no room for another
        (Turns(tokenizer, "9", finish="truncated"), None, 1, 0.25),
        (Turns(tokenizer, "9", ""), None, 1, 0.25),
    ):
        with empty(tmp_path) as store:
            [row, *_], _ = played(store, load_environment(name), plain, tokenizer, room)
        assert (row.finish, row.num_turns, row.total_reward) == ("truncated", turns, reward)
        assert row.completion_mask is None or row.completion_mask[-1]
    with empty(tmp_path) as store:
        rows, stats = played(store, load_environment(name), Turns(tokenizer, "9", None), tokenizer)
    assert (rows, stats.unanswered) == ([], 1), "a half is not stored"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("hang", "it took more than 2 s"),
        ("raise", "RuntimeError: the tool fell over"),
        ("exit", "SystemExit: 3"),
        ("die", "its process died"),
        ("flood of bytes", f"ValueError: it answered 100000.* bytes, more than {MAX_REPLY}"),
    ],
)
def test_a_step_that_fails(
    tmp_path: Path, tokenizer: Tokenizer, capsys: Any, words: str, why: str
) -> None:
    """Is bounded, is not stored or gets the reward that the environment has for it, and leaves the
    next one alone."""
    name = source(tmp_path, GUESS, "Guess")
    started = time.monotonic()
    with empty(tmp_path) as store:
        rows, stats = played(store, load_environment(name), Turns(tokenizer, "9", words), tokenizer)
    assert (rows, stats.unjudged) == ([], 2)
    assert re.search(f"a step failed: {why}", capsys.readouterr().err)
    with empty(tmp_path) as store:
        environment = load_environment(name, {"failed": -1.0})
        rows, _ = played(store, environment, Turns(tokenizer, "9", words), tokenizer)
    assert [(row.finish, row.reward, row.total_reward) for row in rows] == [
        ("truncated", -1.0, -0.75)
    ] * 2
    assert rows[0].reason.startswith("a step failed") and rows[0].info["failure"]
    assert time.monotonic() - started < 120


def test_a_long_observation_is_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = source(tmp_path, GUESS, "Guess")
    for words in ("flood", "print"):
        with empty(tmp_path) as store:
            [row, _], _ = played(
                store, load_environment(name), Turns(tokenizer, words, "3"), tokenizer
            )
        assert row.reward == 1.0
        assert len(row.token_ids) < 200
        if words == "flood":
            said = tokenizer._text(row.token_ids)
            assert "x" * 20 + "\n[... 999960 characters left out ...]\n" + "x" * 20 in said


def test_a_step_that_returns_something_else_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    environment = load_environment(source(tmp_path, GUESS, "Guess"))
    with (
        empty(tmp_path) as store,
        pytest.raises(ValueError, match=r"Guess\.step: its answer must be an object with some of"),
    ):
        played(store, environment, Turns(tokenizer, "nonsense"), tokenizer)


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    text = (
        "import os, subprocess, time\nclass Own:\n    def step(self, path):\n"
        "        child = subprocess.Popen(['sleep', '1000'])\n"
        "        open(path, 'w').write(str(child.pid))\n        time.sleep(1000)\n"
    )
    workers = Workers(source(tmp_path, text, "Own"), {}, 1.0, count=1)
    [failure] = workers.map("step", [[str(tmp_path / "pid")]])
    workers.close()
    assert isinstance(failure, CallError)
    pid = int((tmp_path / "pid").read_text())
    assert eventually(lambda: not alive(pid)), "it lives on"
    assert os.getpid() != pid


def test_several_turns_of_a_model_in_this_process(tmp_path: Path) -> None:
    """By the commands: rollout and eval, which continues."""
    model, store = save_policy(tmp_path / "model", end_weight=1.0), tmp_path / "store.db"
    name = source(tmp_path, GUESS, "Guess")
    given = ["--environment", name, "--environment-args", '{"chat": false}', "--store", store]
    policy = ["--model", model, "--n", 4, "--max-new-tokens", 12]
    assert rollout(*given, *policy, "--run", "r") == 0
    out = ["--out", tmp_path / "out", "--k", "1", "--run", "r", "--policy-version", 1]
    command = [*map(str, ["eval", *given, *policy, *out])]
    assert main(command) == 0
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    (tmp_path / "out" / "samples.jsonl").write_text("\n".join(lines[:6]) + "\n")
    assert main(command) == 0
    again = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert again[:4] == lines[:4] and len(again) == 8
    with TrajectoryStore(store) as opened:
        for run in ("r", "r/eval"):
            rows = list(opened.trajectories(run=run))
            assert max(row.num_turns for row in rows) > 1
            assert {row.finish for row in rows} == {"truncated"}
            assert all(row.total_reward == 0.25 * row.num_turns for row in rows)


def test_contests_are_an_environment(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = {"train_problems": 3, "evaluation_problems": 2}
    environment = load_environment("spo_ext.contests.recipe:Contest", given)
    with empty(tmp_path) as store:
        assert len(fill(store, environment, "train", tokenizer)) == 3
        assert [len(fill(store, environment, s, tokenizer)) for s in ("dev", "test")] == [2, 2]  # type: ignore[arg-type]
        [prompt, *_] = store.prompts("train")
    assert prompt.content == Contest(**given).draw("train", 3)[0].description
    assert not environment.several_turns
