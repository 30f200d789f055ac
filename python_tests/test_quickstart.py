"""The quickstart: its problems, its judge, its policy, and a tiny run from end to end."""

import base64
import copy
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import spo_ext  # noqa: E402
from spo_ext.cli import main  # noqa: E402
from spo_ext.evaluation.plot import trailing_mean  # noqa: E402
from spo_ext.quickstart import QuickstartConfig, run  # noqa: E402
from spo_ext.quickstart.bundles import count_passed  # noqa: E402
from spo_ext.quickstart.judging import Grade, Grader, is_python  # noqa: E402
from spo_ext.quickstart.policy import (  # noqa: E402
    IGNORED,
    hidden_states,
    make_batch,
    make_policy,
    sample,
)
from spo_ext.quickstart.problems import (  # noqa: E402
    OPERATIONS,
    REDUCTIONS,
    Problem,
    Specification,
    draw_problems,
)
from spo_ext.quickstart.programs import STYLES, demonstrate, write_program  # noqa: E402
from spo_ext.quickstart.rollouts import Trajectories, score  # noqa: E402
from spo_ext.quickstart.train import update_policy  # noqa: E402
from spo_ext.quickstart.vocabulary import (  # noqa: E402
    EOS,
    PAD,
    TOKEN_IDS,
    decode_program,
    encode_program,
    encode_prompt,
)
from spo_ext.sandbox import Sandbox, SandboxError  # noqa: E402

TINY = QuickstartConfig(
    train_problems=12,
    evaluation_problems=6,
    evaluation_samples=4,
    evaluation_k=2,
    hidden_tests=4,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=2,
    sft_steps=6,
    sft_batch=16,
    steps=4,
    prompts_per_batch=3,
    programs_per_prompt=4,
    sync_every=2,
    reference_samples=4,
    evaluate_every=4,
    kl_problems=3,
    threads=1,
    sandbox_workers=1,
)
SPLITS = ("train", "development", "test")


def problems_of(split: str, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return draw_problems(rng, split, count, vague_probability=0.5, hidden_tests=10)


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


@pytest.fixture(scope="module")
def policy():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_policy(TINY)


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
    rng = random.Random(0)
    drawn = draw_problems(
        rng, "train", 60, vague_probability=0.5, hidden_tests=5, operations=(2, 5)
    )
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
    grades = Grader(sandbox).grade(problems, programs)
    assert [grade.source for grade in grades if not grade.correct] == []


def test_wrong_programs_fail_and_count_the_tests_they_pass(sandbox) -> None:
    specification = Specification((("add", 1),), "max")
    tests = (([1, 2], 3), ([5, 4], 6), ([0, 0], 1))
    problem = Problem(specification, ("add", "1", "max"), tests[:2], tests)
    programs = {
        "max( x ) + 1": (3, 0.0),
        "max( x )": (0, -1.0),
        "x [ 0 ] + 1": (2, -1.0),  # right only where the largest comes first
        "x [ 9 ]": (0, -1.0),  # raises
        "max( x": (0, -1.0),  # does not parse
        "#5": (0, -1.0),  # a token of prompts only
    }
    ids = [encode_program(text.replace(" )", ")").replace(")", " )").split()) for text in programs]
    grader = Grader(sandbox)
    grades = grader.grade([problem] * len(ids), ids)
    assert [(grade.passed, grade.reward) for grade in grades] == list(programs.values())
    assert grader.executed == 4
    grader.grade([problem] * len(ids), ids)
    assert grader.executed == 4  # every verdict came from the cache


def test_demonstrations_are_mediocre(sandbox) -> None:
    rng = random.Random(0)
    problems = problems_of("train", 150)
    programs = [
        demonstrate(rng, problem.specification, corruption=0.5, token_noise=0.06)
        for problem in problems
    ]
    grades = Grader(sandbox).grade(problems, programs)
    rate = sum(grade.correct for grade in grades) / len(grades)
    assert 0.15 < rate < 0.40
    clean = [
        demonstrate(rng, problem.specification, corruption=0.0, token_noise=0.0)
        for problem in problems
    ]
    assert all(grade.correct for grade in Grader(sandbox).grade(problems, clean))


def test_decoding_refuses_what_is_no_program() -> None:
    x = TOKEN_IDS["x"]
    assert decode_program([x, EOS]) == "def f(x):\n    return x\n"
    assert decode_program([x]) is None  # never ended
    assert decode_program([EOS]) is None
    assert decode_program([x, PAD, EOS]) is None
    power = decode_program(encode_program(["v", "*", "*", "9"]))
    assert power is not None and not is_python(power)  # two "*" never make a power
    assert not is_python("")


# Policy


def test_program_rows_hold_only_program_targets() -> None:
    batch = make_batch([[5, 6, 2], [7, 2]], [[8, 9, EOS], [8, EOS]])
    assert batch.input_ids.tolist() == [[5, 6, 2, 8, 9], [7, 2, 8, EOS, PAD]]
    assert batch.targets.tolist() == [
        [IGNORED, IGNORED, 8, 9, EOS],
        [IGNORED, 8, EOS, IGNORED, IGNORED],
    ]


def test_padding_does_not_change_logprobs(policy) -> None:
    """A program scores the same alone, in a padded batch, and while it is sampled."""
    problems = problems_of("train", 8)
    prompts = [encode_prompt(problem) for problem in problems]
    assert len(set(map(len, prompts))) > 1  # else nothing is padded
    torch.manual_seed(0)
    drawn = sample(policy, prompts, per_prompt=3)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    batched = score(policy, repeated, drawn.programs)
    alone = [
        score(policy, [prompt], [program])
        for prompt, program in zip(repeated, drawn.programs, strict=True)
    ]
    torch.testing.assert_close(batched, torch.cat(alone), atol=1e-4, rtol=0)
    torch.testing.assert_close(batched, drawn.logprob_sums, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_say_the_log_probability_of_every_token(temperature: float, policy) -> None:
    prompts = [encode_prompt(problem) for problem in problems_of("train", 3)]
    torch.manual_seed(1)
    drawn = sample(policy, prompts, per_prompt=2, max_tokens=9, temperature=temperature)
    assert (
        drawn.logprobs.shape == (6, max(map(len, drawn.programs))) and drawn.logprobs.shape[1] < 10
    )
    for row, (program, logprobs) in enumerate(zip(drawn.programs, drawn.logprobs, strict=True)):
        prompt = prompts[row // 2]
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([prompt + program])).logits[0]
        ids = torch.tensor(program)[:, None]
        places = slice(len(prompt) - 1, len(prompt) - 1 + len(program))
        expected = (logits / temperature).log_softmax(-1)[places].gather(1, ids)[:, 0]
        torch.testing.assert_close(logprobs[: len(program)], expected, atol=1e-4, rtol=0)
        assert not logprobs[len(program) :].any()


def test_scores_are_those_of_the_full_logits(policy) -> None:
    prompt = encode_prompt(problems_of("train", 1)[0])
    program = encode_program(["sum(", "x", ")"])
    batch = make_batch([prompt], [program])
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + program])).logits[0].double()
        hidden = hidden_states(policy, batch)
    logprobs = logits.log_softmax(-1)
    first = len(prompt) - 1
    expected = sum(float(logprobs[first + i, token]) for i, token in enumerate(program))
    with torch.no_grad():
        actual = spo_ext.token_logprobs(hidden, policy.lm_head.weight, batch.targets).sum()
    assert float(actual) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_policy(temperature: float, policy) -> None:
    """First tokens of many draws occur as often as their probability says."""
    prompt = encode_prompt(problems_of("train", 1)[0])
    torch.manual_seed(0)
    drawn = sample(policy, [prompt], per_prompt=2000, temperature=temperature)
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1]
        expected = (logits / temperature).softmax(-1)
    counts = torch.zeros_like(expected)
    for program in drawn.programs:
        counts[program[0]] += 1
    # Chi-squared over 296 tokens has mean 295 and sd 24: six sd above is a bug, not chance.
    chi_squared = float(((counts - 2000 * expected) ** 2 / (2000 * expected)).sum())
    assert chi_squared < 295 + 6 * 24


# Soft Policy Optimization


def one_pass_one_failure(policy) -> Trajectories:
    """Two programs for one prompt, scored by the policy itself."""
    prompts = [encode_prompt(problems_of("train", 1)[0])] * 2
    programs = [encode_program(["sum(", "x", ")"]), encode_program(["len(", "x", ")"])]
    sums = score(policy, prompts, programs)
    grades = [Grade("sum", 1, 1), Grade("len", 0, 1)]
    rewards = torch.tensor([grade.reward for grade in grades])
    return Trajectories(prompts, programs, grades, torch.zeros(2).long(), rewards, sums, sums)


@pytest.mark.parametrize("objective", ["group", "squared"])
def test_training_fits_the_log_ratios_to_the_rewards(objective: str, policy) -> None:
    """At the optimum beta (R_pass - R_fail) = r_pass - r_fail, and Q_0 + beta R = r."""
    trained = copy.deepcopy(policy)
    rows = one_pass_one_failure(policy)
    config = replace(TINY, objective=objective, beta=0.5, steps=200, warmup_steps=0, sync_every=1)
    q0 = None if objective == "group" else torch.full((2,), -0.25)
    optimizer = torch.optim.Adam(trained.parameters())
    for _ in range(200):
        update_policy(trained, optimizer, rows, q0, replace(config, learning_rate=1e-3), 1)
    log_ratios = score(trained, rows.prompts, rows.programs) - rows.ref_logprobs
    assert float(log_ratios[0] - log_ratios[1]) == pytest.approx(1 / 0.5, abs=0.02)
    if objective == "squared":
        assert log_ratios.tolist() == pytest.approx([0.25 / 0.5, -0.75 / 0.5], abs=0.02)


def test_the_first_gradient_does_not_depend_on_beta(policy) -> None:
    rows = one_pass_one_failure(policy)
    norms = []
    for beta in (0.03, 0.3):
        copied = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(copied.parameters())
        config = replace(TINY, beta=beta, sync_every=1)
        norms.append(update_policy(copied, optimizer, rows, None, config, 1)["grad_norm"])
    assert norms[0] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_only_stale_failures_are_tapered(policy) -> None:
    rows = one_pass_one_failure(policy)
    weights = {}
    for sync_every, lag in ((1, 3.0), (2, 0.0), (2, 3.0)):
        stale = replace(rows, behaviour_logprobs=rows.behaviour_logprobs + lag)
        copied = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(copied.parameters())
        config = replace(TINY, sync_every=sync_every)
        logged = update_policy(copied, optimizer, stale, None, config, 1)
        weights[sync_every, lag] = logged["mean_weight"]
    assert weights[1, 3.0] == 1.0
    assert weights[2, 0.0] == pytest.approx(1.0, abs=1e-4)
    assert weights[2, 3.0] == pytest.approx((1 + math.exp(-3)) / 2, abs=1e-4)


# The whole experiment


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(lines: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in lines
        if line["kind"] != "stage_seconds"
    ]


@pytest.fixture(scope="module")
def tiny_run(sandbox, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "nested" / "folder"
    run(TINY, out, quiet=True)
    return out


def test_a_run_writes_metrics_for_every_step(tiny_run: Path) -> None:
    lines = read_lines(tiny_run / "metrics.jsonl")
    steps = {
        kind: [line["step"] for line in lines if line["kind"] == kind]
        for kind in ("supervised", "evaluation", "spo")
    }
    assert steps["supervised"] == [1, 2, 3, 4, 5, 6]
    assert steps["spo"] == [1, 2, 3, 4]
    assert steps["evaluation"] == [0, 4]
    losses = [line["loss"] for line in lines if line["kind"] == "supervised"]
    assert losses[-1] < losses[0]
    before = next(line for line in lines if line["kind"] == "evaluation")
    assert before["kl"] == pytest.approx(0, abs=1e-4)  # the policy starts as the reference


def test_a_run_writes_its_samples_and_report(tiny_run: Path) -> None:
    samples = read_lines(tiny_run / "samples.jsonl")
    per_evaluation = TINY.evaluation_problems * TINY.evaluation_samples
    for step in (0, 4):
        counts = [line["count"] for line in samples if line["step"] == step]
        assert sum(counts) == per_evaluation
    assert all(0 <= line["passed"] <= line["total"] == TINY.hidden_tests for line in samples)
    png = (tiny_run / "learning_curve.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    report = (tiny_run / "report.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', report)
    assert [base64.b64decode(image) for image in embedded] == [png]
    assert not re.search(r'(src|href)="(?!data:)', report)  # needs no other file
    assert "sandbox level" in report


def test_the_same_seed_gives_the_same_numbers(tiny_run: Path, tmp_path: Path) -> None:
    run(TINY, tmp_path, quiet=True)
    first, second = (read_lines(out / "metrics.jsonl") for out in (tiny_run, tmp_path))
    assert without_time(first) == without_time(second)
    assert (tiny_run / "samples.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text()


def test_evaluating_more_often_changes_no_training(tiny_run: Path, tmp_path: Path) -> None:
    run(replace(TINY, evaluate_every=1), tmp_path, quiet=True)
    first, second = (
        [line for line in without_time(read_lines(out / "metrics.jsonl")) if line["kind"] == "spo"]
        for out in (tiny_run, tmp_path)
    )
    assert first == second


@pytest.mark.parametrize("objective", ["squared", "cross_entropy"])
def test_objectives_with_a_prompt_value_run(objective: str, sandbox, tmp_path: Path) -> None:
    run(replace(TINY, objective=objective, sync_every=1), tmp_path, quiet=True)
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "spo"]
    # q0 of a policy without a success lies strictly between the two rewards, so it has a gradient.
    assert all(line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["log_ratio"] < 0  # all programs fail: they are made less likely


def test_a_run_leaves_the_state_of_torch_alone(sandbox, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    run(replace(TINY, steps=0, sft_steps=1, threads=2), tmp_path, quiet=True)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == 1


def test_trailing_mean() -> None:
    assert trailing_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be greater than 0, got 0.0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"corruption": 1.5}, r"corruption must be in \[0, 1\], got 1.5"),
        ({"objective": "ppo"}, "objective must be one of group, squared, cross_entropy"),
        ({"evaluation_split": "train"}, "evaluation_split must be one of development, test"),
        ({"evaluation_k": 30}, "evaluation_k must be at most evaluation_samples"),
        ({"programs_per_prompt": 1}, "programs_per_prompt must be at least 2"),
        ({"heads": 3}, "hidden_size must be a multiple of 2"),
        ({"least_operations": 4}, r"least_operations must be at most most_operations \(3\), got 4"),
    ],
)
def test_settings_that_cannot_work_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["quickstart", "--beta", "0"], "beta must be greater than 0"),
        (["quickstart", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["quickstart", "--objective", "ppo"], "argument --objective: invalid choice"),
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


def test_the_command_passes_its_options_on(monkeypatch, tmp_path: Path) -> None:
    received = {}

    def record(config: QuickstartConfig, out: Path, quiet: bool) -> None:
        received.update(config=config, out=out, quiet=quiet)

    monkeypatch.setattr("spo_ext.quickstart.experiment.run_experiment", record)
    options = ["--seed", "3", "--sync-every", "2", "--evaluation-split", "development", "--quiet"]
    assert main(["quickstart", "--out", str(tmp_path), *options]) == 0
    expected = QuickstartConfig(seed=3, sync_every=2, evaluation_split="development")
    assert received == {"config": expected, "out": tmp_path, "quiet": True}


def test_programs_that_share_a_run_are_judged_as_if_alone(sandbox) -> None:
    rng = random.Random(5)
    problems = problems_of("train", 8)
    pairs = []
    for problem in 12 * problems:
        program = demonstrate(rng, problem.specification, corruption=0.5, token_noise=0.1)
        pairs.append((problem, decode_program(program) or ""))
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
    specification = Specification((), "max")
    tests = (([1, 2], 2), ([5, 4], 5))
    problem = Problem(specification, ("max",), tests, tests)
    bad = "def f(x):\n    return " + bad.replace("for v in", " for v in ")
    right = "def f(x):\n    return max(x)"
    one = "def f(x):\n    return max(x) == 2"  # True is not 2
    found = count_passed(sandbox, [(problem, source) for source in (right, bad, one, right)])
    assert found == [2, 0, 0, 2]
