"""Contests: problems, programs, the judge, and a tiny quickstart from end to end."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from spo_ext.cli import main
from spo_ext.contests.problems import (
    OPERATIONS,
    REDUCTIONS,
    Problem,
    Specification,
)
from spo_ext.contests.programs import STYLES, demonstrate, write_program
from spo_ext.contests.recipe import Contest
from spo_ext.contests.reward import Judge, count_passed, is_python, passes, source_of
from spo_ext.contests.vocabulary import (
    EOS,
    PAD,
    TOKEN_IDS,
    decode_program,
    encode_program,
    make_tokenizer,
)
from spo_ext.data.tokens import Tokenizer
from spo_ext.sandbox import Sandbox, SandboxError
from spo_ext.store import TrajectoryStore

SPLITS = ("train", "development", "test")


def problems_of(split: str, count: int, seed: int = 0) -> list[Problem]:
    return Contest().draw(split, count, seed)


def plain(problem: Problem) -> tuple:
    return problem.specification, problem.words, problem.examples, problem.tests


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to share: a second thread only waits for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sandbox():
    try:
        with Sandbox(workers=2) as box:
            yield box
    except SandboxError as error:
        pytest.skip(f"no sandbox works here: {error}")


def counts(sandbox: Sandbox, problems: list[Problem], programs: list[list[int]]) -> list[int]:
    pairs = zip(problems, programs, strict=True)
    return Judge(sandbox)([(problem.tests, source_of(ids)) for problem, ids in pairs])


# Problems and programs


def test_problems_repeat_with_the_seed_and_differ_without() -> None:
    first, again, other = (problems_of("train", 30, seed) for seed in (0, 0, 1))
    assert list(map(plain, first)) == list(map(plain, again))
    assert list(map(plain, first)) != list(map(plain, other))


def test_splits_share_no_specification() -> None:
    drawn = {
        split: {
            problem.specification for seed in (0, 1) for problem in problems_of(split, 150, seed)
        }
        for split in SPLITS
    }
    assert all(drawn[split] for split in SPLITS)
    assert not drawn["train"] & drawn["development"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["development"] & drawn["test"]


def test_longer_problems_have_no_two_neighbours_of_a_kind() -> None:
    drawn = Contest(least_operations=2, most_operations=5).draw("train", 60)
    kinds = [[OPERATIONS[name].kind for name, _ in p.specification.steps] for p in drawn]
    assert {len(row) for row in kinds} == {2, 3, 4, 5}
    assert all(a != b for row in kinds for a, b in zip(row, row[1:], strict=False))


def test_the_split_of_a_specification_is_fixed() -> None:
    # A changed hash would silently move test problems into old training sets.
    splits = [Specification((("add", k),), "sum").split for k in (1, 2, 3, 5)]
    assert splits == ["train", "test", "train", "development"]


def test_specification_evaluates_its_steps_in_order() -> None:
    specification = Specification((("gt", 3), ("mul", 2), ("head", 2)), "sum")
    assert specification.evaluate([1, 5, 2, 4, 9]) == 10 + 8
    with pytest.raises(ValueError):
        Specification((("gt", 3),), "max").evaluate([1, 2])


def test_every_spelling_of_every_operation_passes_in_the_sandbox(sandbox) -> None:
    problems, programs = [], []
    rng = random.Random(0)
    for problem in problems_of("train", 60):
        for style in STYLES:
            for _ in range(2):
                problems.append(problem)
                programs.append(encode_program(write_program(rng, problem.specification, style)))
    used = {name for problem in problems for name, _ in problem.specification.steps}
    assert used == set(OPERATIONS)
    assert {problem.specification.reduction for problem in problems} == set(REDUCTIONS)
    assert set(counts(sandbox, problems, programs)) == {10}


def test_wrong_programs_fail_and_count_the_tests_they_pass(sandbox) -> None:
    specification = Specification((("add", 1),), "max")
    tests = (([1, 2], 3), ([5, 4], 6), ([0, 0], 1))
    problem = Problem(specification, ("add", "1", "max"), tests[:2], tests)
    programs = {
        "max( x ) + 1": 3,
        "max( x )": 0,
        "x [ 0 ] + 1": 2,  # right only where the largest comes first
        "x [ 9 ]": 0,  # raises
        "max( x": 0,  # does not parse
        "#5": 0,  # a token of prompts only
    }
    ids = [encode_program(text.replace(" )", ")").replace(")", " )").split()) for text in programs]
    judge = Judge(sandbox)
    pairs = [(problem.tests, source_of(program)) for program in ids]
    assert judge(pairs) == list(programs.values())
    judge._sandbox = SimpleNamespace(run=lambda programs: [None for _ in programs])  # from memory
    assert judge(pairs) == list(programs.values())
    assert passes(ids, [tests] * len(ids)) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_demonstrations_are_mediocre(sandbox) -> None:
    rng = random.Random(0)
    problems = problems_of("train", 150)
    programs = [
        demonstrate(rng, problem.specification, corruption=0.5, token_noise=0.06)
        for problem in problems
    ]
    passed = counts(sandbox, problems, programs)
    assert 0.15 < sum(count == 10 for count in passed) / len(passed) < 0.40
    clean = [
        demonstrate(rng, problem.specification, corruption=0.0, token_noise=0.0)
        for problem in problems
    ]
    assert set(counts(sandbox, problems, clean)) == {10}


def test_decoding_refuses_what_is_no_program() -> None:
    x = TOKEN_IDS["x"]
    assert decode_program([x, EOS]) == "def f(x):\n    return x\n"
    assert decode_program([x]) is None  # never ended
    assert decode_program([EOS]) is None
    assert decode_program([x, PAD, EOS]) is None
    power = decode_program(encode_program(["v", "*", "*", "9"]))
    assert power is not None and not is_python(power)  # two "*" never make a power
    assert not is_python("")


def test_the_tokenizer_writes_python(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    ids = encode_program(["x=", "sorted(", "x", ")", ";", "sum(", "x", ")"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x = sorted(x)\n    sum(x)"
    assert decode_program(ids) == "def f(x):\n    x = sorted(x)\n    return sum(x)\n"
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer(tmp_path)
    assert loaded.eos_token_id == EOS and loaded.completion("", (TOKEN_IDS["not"], EOS)) == "not "


# The quickstart

TINY = ["--steps", "2", "--sft-steps", "3", "--train-problems", "64", "--threads", "1"]
TINY += ["--evaluation-problems", "3", "--evaluation-samples", "4"]


def results(out: Path) -> list[dict]:
    """Before and after."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("eval*/evaluation.json"))]


def test_a_run_leaves_what_a_user_would_have_and_repeats_with_the_seed(
    sandbox, tmp_path: Path, capsys
) -> None:
    tiny_run = tmp_path / "nested" / "folder"
    words = ["quickstart", "--out", str(tiny_run), *TINY]
    assert main(words) == 0
    for name in ("train.yaml", "store.db", "model/tokenizer.json", "model.safetensors"):
        assert (tiny_run / name).is_file(), name
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 2 and "kl" in lines[0]
    first = results(tiny_run)
    assert [result["completions"] for result in first] == [12, 12]
    report = (tiny_run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', report)  # needs no other file
    with TrajectoryStore(tiny_run / "store.db") as store:
        rows = list(store.trajectories())
        tests = [prompt.tests for prompt in store.prompts("test")]
    assert len(rows) == 2 * 128 and {row.reward for row in rows} <= {0.0, 1.0}  # steps, programs
    assert len(tests) == 3 and all(len(cases) == 10 for cases in tests)
    capsys.readouterr()
    assert main(words) == 0  # over what the first one left
    output = capsys.readouterr().out
    found = re.findall(r"^\$ spo (\w+) ", output, re.MULTILINE)
    assert found == ["eval", "train", "eval", "report"]
    assert "pass@1 " in output.rpartition("1-after")[2]
    assert [one["values"] for one in results(tiny_run)] == [one["values"] for one in first]


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_problems": 0}, "train_problems must be greater than 0, got 0"),
        ({"sft_steps": -1}, "sft_steps must be at least 0, got -1"),
        ({"corruption": 1.5}, r"corruption must be in \[0, 1\], got 1.5"),
        ({"heads": 3}, "hidden_size must be a multiple of 2"),
        ({"least_operations": 4}, r"least_operations must be at most most_operations \(3\), got 4"),
    ],
)
def test_settings_that_cannot_work_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Contest(), **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["quickstart", "--steps", "0"], "steps must be greater than 0, got 0"),
        (["quickstart", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ],
)
def test_the_command_explains_wrong_arguments(arguments: list, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_explains_an_unusable_folder(sandbox, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["quickstart", "--out", str(tmp_path / "file" / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("spo: error:") and "file" in error


def test_programs_that_share_a_run_are_judged_as_if_alone(sandbox) -> None:
    rng = random.Random(5)
    problems = problems_of("train", 8)
    pairs = []
    for problem in 12 * problems:
        program = demonstrate(rng, problem.specification, corruption=0.5, token_noise=0.1)
        pairs.append((problem.tests, source_of(program)))
    together = count_passed(sandbox, pairs)
    assert together == [count_passed(sandbox, [pair])[0] for pair in pairs]
    assert min(together) == 0 and 0.1 < sum(p == 10 for p in together) / len(pairs) < 0.6


@pytest.mark.parametrize(
    "bad",
    [
        "x * 9 * 9 * 9 * 9 * 9 * 9 * 9 * 9 * 9",  # the memory of the run
        "sum( [ sum( [ sum( [ sum( [ 1 for v in x * 9 * 9 ] ) for v in x * 9 * 9 ] )"
        " for v in x * 9 * 9 ] ) for v in x * 9 * 9 ] )",  # its time
        "x * 9 * 9 * 9 * 9 * 9",  # more output than a run may have
        "map( lambda v: v , x )",  # no plain data
    ],
)
def test_a_program_that_spoils_its_run_harms_no_other(sandbox, bad: str) -> None:
    tests = (([1, 2], 2), ([5, 4], 5))
    bad = "def f(x):\n    return " + bad.replace("for v in", " for v in ")
    right = "def f(x):\n    return max(x)"
    one = "def f(x):\n    return max(x) == 2"  # True is not 2
    found = count_passed(sandbox, [(tests, source) for source in (right, bad, one, right)])
    assert found == [2, 0, 0, 2]
