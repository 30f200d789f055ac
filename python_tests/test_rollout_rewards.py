"""Rewards by name: tests in the sandbox, answers, functions of TRL's form."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import ADD, SUBTRACT
from sandbox_cases import FAST

from spo_ext.data.tests import call_tests, stdin_tests
from spo_ext.rollout import Judgement, load_reward
from spo_ext.rollout.answers import AnswerReward, _Verifier, final_answer, plainly_equal
from spo_ext.rollout.programs import TestsReward, program_of
from spo_ext.rollout.rewards import as_reward, judged_by
from spo_ext.sandbox import SandboxError, Submission, Verdict
from spo_ext.store import Prompt

STDIN = Prompt("add", tests=stdin_tests(["1 2\n", "5 5\n"], ["3\n", "10\n"]))
CALLS = Prompt("double", tests=call_tests("double", [[2], ["ab"]], [4, "abab"]))


def judge(reward: Any, *pairs: tuple[Prompt, str]) -> list[Judgement | None]:
    prompts, completions = [prompt for prompt, _ in pairs], [text for _, text in pairs]
    found: list[Judgement | None] = reward(prompts, completions, [[1]] * len(pairs))
    return found


def make_tests_reward(**options: Any) -> TestsReward:
    reward = load_reward(
        "tests", **{"workers": 2, "limits": FAST, "allow_unsandboxed": True, **options}
    )
    assert isinstance(reward, TestsReward)
    return reward


def test_programs_are_judged_by_the_tests_of_their_prompt() -> None:
    reward = make_tests_reward(passed=0.0, failed=-1.0)
    double = "def double(x):\n    return x + x\n"
    try:
        found = judge(
            reward,
            (STDIN, ADD),
            (STDIN, SUBTRACT),
            (STDIN, f"Here it is:\n```python\nwrong\n```\nor\n```python\n{ADD}```\nDone."),
            (CALLS, double),
            (CALLS, "def double(x):\n    return 2 * x + 0\n"),
            (CALLS, "def double(x): while"),
            (Prompt("no tests"), double),
        )
        assert [each and each.reward for each in found] == [0.0, -1.0, 0.0, 0.0, -1.0, -1.0, None]
        reasons = [each.reason for each in found if each is not None]
        assert reasons[0] == "" and reasons[1] == "call 0: wrong output"
        assert "TypeError" in reasons[4] and "SyntaxError" in reasons[5]
        # ADD stands there twice, and is run once; so are all when they come again.
        assert reward.executed == 5
        assert judge(reward, (CALLS, double), (STDIN, ADD)) == [Judgement(0.0), Judgement(0.0)]
        assert reward.executed == 5
        # The same program on other tests is another question.
        other = Prompt("add", tests=stdin_tests(["1 2\n"], ["4\n"]))
        assert judge(reward, (other, ADD)) == [Judgement(-1.0, "call 0: wrong output")]
        assert reward.executed == 6
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1\n", "x = 1\n"),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```py\na\n```", "a\n"),
        ("```Python3\na\n```", "a\n"),
        ("```python\na\n```\n```text\nb\n```\n", "a\n"),
        ("```\na\n```", "a\n"),
        ("```\r\na\r\n```", "a\n"),
        ("```python\na\n```\nwhich prints\n```\n5\n```", "a\n"),
        ("```\na\n```\n```json\n{}\n```", "a\n"),
        ('```python title="a.py"\na\n```', "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("~~~py\na\n~~~", "a\n"),
        ("1. So:\n   ```python\n   a\n     b\n   ```", "a\n  b\n"),
        ("> ```python\n> a\n> ```", "a\n"),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n</think>\nb", "\nb"),
        ("<think>\n```python\na\n```\n", ""),
        ("text\n```python\nunfinished\nb", "unfinished\nb"),
        ("```python\na\n```\nagain\n```python\nunfinished", "a\n"),
        ('```python\nx = "```python"\n```', 'x = "```python"\n'),
        ("", ""),
    ],
)
def test_the_program_is_the_last_block_of_python(completion: str, program: str) -> None:
    assert program_of(completion) == program


def test_a_failing_sandbox_is_tried_again_and_never_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [1]
    calls = []

    def judged(sandbox: object, submissions: Sequence[Submission]) -> list[Verdict]:
        calls.append(sandbox)
        if failures:
            failures.pop()
            raise SandboxError("no worker starts")
        return [Verdict(1, 1, True, "") for _ in submissions]

    monkeypatch.setattr("spo_ext.rollout.programs.judge", judged)
    reward = make_tests_reward()
    assert judge(reward, (STDIN, ADD)) == [Judgement(1.0)]
    assert len(calls) == 2 and calls[0] is not calls[1]  # a new sandbox
    failures += [1, 1]
    with pytest.raises(SandboxError, match="no worker starts"):
        judge(reward, (STDIN, SUBTRACT))
    # Nothing was remembered of it.
    assert judge(reward, (STDIN, SUBTRACT)) == [Judgement(1.0)]
    reward.close()


@pytest.mark.parametrize(
    "text",
    ["```python\n", "> ", "- ", "````\n```\n", "1. a\n   ", "[a]: <", "<pre>\n", "#", " " * 4],
)
def test_a_long_completion_is_read_in_linear_time(text: str) -> None:
    start = time.process_time()
    program_of("```\n```\n" + text * (60_000 // len(text)))
    assert time.process_time() - start < 5


BAD_TESTS = [
    {"kind": "other", "expected": []},
    ["assert f(1) == 2"],
    {"kind": "stdin", "inputs": ["\ud800"], "expected": ["6"]},
    {"kind": "stdin", "inputs": [5], "expected": ["6"]},
    {"kind": "check", "entry_point": "f", "check": "f(", "prefix": 1},
    {"kind": "check", "entry_point": "f", "check": "assert f(object())", "prefix": ""},
    {"kind": "check", "entry_point": "f", "check": "assert missing(f)", "prefix": ""},
]


@pytest.mark.parametrize("tests", BAD_TESTS)
def test_a_prompt_whose_tests_cannot_be_used_is_left_out_by_name(tests: Any) -> None:
    reward = make_tests_reward()
    with pytest.warns(UserWarning, match="the prompt 'odd one' is left out: its tests cannot be"):
        found = judge(reward, (Prompt("odd one", tests=tests), "def f(x): return x"), (STDIN, ADD))
    assert found == [None, Judgement(1.0)]
    assert list(judged_by(reward, [Prompt("odd one", tests=tests), STDIN])) == [STDIN]
    reward.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 6 * 12.\n#### 72", "72"),
        ("#### 5\nno:\n####  1,072.50 \nthat is it", "1,072.50"),
        (r"it is \boxed{7}, no, \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"#### 4 \boxed{5}", "5"),
        (r"unclosed \boxed{5", r"unclosed \boxed{5"),
        ("#### 5" + " " * 200_000 + "x", "5" + " " * 200_000 + "x"),  # in linear time
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("72", "72.00", True),
        ("$1,000,000", "1000000", True),
        ("1,2", "1, 2", True),
        ("1,2", "12", None),
        ("+3.0", "3", True),
        (".5", "0.50", True),
        ("1e3", "1000", True),
        (r"\$18", "18.", True),
        ("-5", "\u22125", True),
        ("  New\n York. ", "new york", True),
        ("\uff14\uff12", "42", True),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        ("1267650600228229401496703205376", "1267650600228229401496703205379", False),
        ("0.1234567", "0.1234568", False),  # math-verify would round them
        ("32,349", "32, 349", None),
        ("89", "8_9", None),
        ("52", "5\u00b2", None),
        ("nan", "nan", True),
        ("1e999999", "1e999999", True),
    ],
)
def test_the_same_text_or_number(one: str, other: str, equal: bool | None) -> None:
    assert plainly_equal(one, other) is equal and plainly_equal(other, one) is equal


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("1/2", r"so \boxed{0.5}", True),
        (r"\{1, 2\}", r"$\{2, 1\}$", True),
        ("(1, 2)", "$(2, 1)$", False),
        ("x^2 + 2x + 1", "$(x + 1)^2$", True),
        ("1234", "It cost 3 and 12. She has $1,234 left.", True),
        ("18", r"It costs \$18", True),
        ("3, 5", r"$\boxed{3}$ and $\boxed{5}$", True),
        ("72", "<think>\\boxed{72}</think> 71", False),
        ("72", "<think>\\boxed{71}</think> The answer is 72.", True),
        ("89", r"\boxed{8_9}", False),
        ("52", "\\boxed{5\u00b2}", False),
        ("9", "10^(10^(10^10))", False),  # never ends
        ("9", "9", True),  # and the next one is judged
    ],
)
def test_mathematics(answer: str, completion: str, right: bool) -> None:
    found = judge(AnswerReward(cpu_seconds=2), (Prompt("a", answer=answer), completion))
    assert found[0].reward == float(right)


def test_without_math_verify_only_text_and_numbers_agree(monkeypatch) -> None:
    monkeypatch.setattr("spo_ext.rollout.answers._VERIFIER", _Verifier())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reward, half = AnswerReward(), Prompt("a", answer="1/2")
    with pytest.warns(UserWarning, match="math-verify is not installed"):
        found = judge(reward, (half, "0.5"), (half, "#### 1 / 2"), (half, "2/4"))
    assert [j.reward for j in found] == [0.0, 1.0, 0.0]


def test_answers_are_compared() -> None:
    reward = load_reward("answer", failed=-2.0)
    gsm, number, truth = (Prompt("a", answer=x) for x in ("6 * 12\n#### 72", 72, True))
    found = judge(
        reward,
        (gsm, r"\boxed{72}"),
        (gsm, "71"),
        (number, "It is\n#### 72.0"),
        (truth, "True"),
        (Prompt("none"), "72"),
    )
    expected = Judgement(-2.0, "answer '71', not '72'")
    assert found == [Judgement(1.0), expected, Judgement(1.0), Judgement(1.0), None]


FUNCTIONS = """
import asyncio

def length(completions, **kwargs):
    assert sorted(kwargs) == ["answer", "completion_ids", "prompts", "tests"]
    return [float(len(x)) for x in completions]

async def right(prompts, completions, answer):
    await asyncio.sleep(0)
    return [None if a is None else float(a in str(c)) for c, a in zip(completions, answer)]

def seen(prompts, completions, completion_ids, tests, answer, scale=1.0):
    global last
    last = (prompts, completions, completion_ids, tests, answer)
    return [float("nan"), -float("inf"), scale]

def graded(completions, ground_truth): return []
def short(completions): return [1.0]
def words(completions): return ["good"] * len(completions)
def number(completions): return 1.0
def best(completions): return [float("inf")] * len(completions)
def fails(completions): raise KeyError("mine")
def ends(completions): raise SystemExit(0)
def ends_late(completions):
    yield 1.0
    raise SystemExit(0)
constant = 3
class Judges:
    @staticmethod
    def one(completions): return [1.0 for _ in completions]
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FUNCTIONS as a module of a package and as a file."""
    (tmp_path / "judging_package").mkdir()
    (tmp_path / "judging_package" / "mine.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("judging_package")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "judging_package" / "mine.py"


def test_functions_of_trls_form(functions: Path) -> None:
    a, b = Prompt("1 + 1", answer="2"), Prompt([{"role": "user", "content": "2 + 2"}])
    pairs = (a, "is 2"), (a, "is 3"), (b, "4")
    ones = [Judgement(1.0)] * 3
    assert judge(load_reward("judging_package.mine:Judges.one"), *pairs) == ones
    lengths = judge(load_reward("judging_package.mine.length"), *pairs)
    assert [each and each.reward for each in lengths] == [4.0, 4.0, 1.0]  # of messages, the number
    found = judge(load_reward(f"{functions}:right"), *pairs)
    assert found == [Judgement(1.0), Judgement(0.0), None]
    found = judge(load_reward("judging_package.mine:seen"), *pairs)
    assert found == [None, Judgement(-math.inf), Judgement(1.0)]
    last = sys.modules["judging_package.mine"].last
    assert last == (
        ["1 + 1", "1 + 1", [{"role": "user", "content": "2 + 2"}]],
        ["is 2", "is 3", [{"role": "assistant", "content": "4"}]],
        [[1], [1], [1]],
        [None, None, None],
        ["2", "2", None],
    )


def by_keyword(completions, **_):
    return [float(len(text)) for text in completions]


def of_columns(completion_ids, answer):
    return [ids[0] + float(answer) for ids, answer in zip(completion_ids, answer, strict=True)]


def by_position(_prompts, texts, ids):
    return [Judgement(len(text) + row[0]) for text, row in zip(texts, ids, strict=True)]


@pytest.mark.parametrize(
    ("given", "reward"), [(by_keyword, 3.0), (of_columns, 5.0), (by_position, 4.0), ("answer", 0.0)]
)
def test_what_a_trainer_is_given_as_reward(given: Any, reward: float) -> None:
    prompt = Prompt("2 + 2 =", answer="4")
    [found] = as_reward(given)([prompt], ["abc"], [[1]])
    assert found is not None and found.reward == reward


def other_column(completions, solution):
    return [0.0] * len(completions)


def of_trl(completions, trainer_state):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "reward_funcs must be at least one, got none"),
        (torch.nn.Linear(1, 1), "reward must not be a model: .* got Linear"),
        (of_trl, "arguments must be among .*, got trainer_state"),
        (lambda text: 1.0, "reward must be a name, .* got <function"),
        (3.0, "reward must be a name, .* got 3.0"),
        (other_column, "reward other_column: its arguments must be among"),
    ],
)
def test_what_is_no_reward_is_refused(given: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        as_reward(given)([Prompt("a")], ["b"], [[1]])


def test_an_async_function_runs_where_a_loop_runs_already(functions: Path) -> None:
    import asyncio

    reward = load_reward("judging_package.mine:right")

    async def notebook() -> list[Judgement | None]:
        return judge(reward, (Prompt("a", answer="2"), "2"))

    assert asyncio.run(notebook()) == [Judgement(1.0)]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("graded", "arguments must be among prompts, .*, got ground_truth"),
        ("short", "must return 2 rewards, got 1"),
        ("words", "must be finite numbers, -inf or None, got 'good'"),
        ("number", "must return a list, got 1.0"),
        ("ends", "ends: called sys.exit"),
        ("ends_late", "ends_late: called sys.exit"),
        ("best", "must be finite numbers, -inf or None, got inf"),
        ("constant", "must be a function, got int"),
        ("missing", "cannot be loaded: module .* has no attribute 'missing'"),
    ],
)
def test_functions_that_do_not_fit_are_refused(functions: Path, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pairs = [(Prompt("a"), "x")] * 2
        judge(load_reward(f"judging_package.mine:{name}"), *pairs)


def test_what_a_function_raises_comes_through(functions: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        judge(load_reward(f"{functions}:fails"), (Prompt("a"), "x"))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("test", {}, "reward must be tests, answer, package.module:function or"),
        ("no_such_package.mine:f", {}, "cannot be loaded: No module named 'no_such_package'"),
        ("/no/such/file.py:f", {}, "cannot be loaded: there is no file /no/such/file.py"),
        ("tests", {"partial": True}, "options of tests: .*partial"),
        ("math:sqrt", {"passed": 0.0}, "options must be none for the function math:sqrt"),
        ("answer", {"passed": 0.0}, "failed must be below passed, got 0.0 and 0.0"),
        ("tests", {"failed": math.nan}, "TestsReward: failed must be a finite number"),
    ],
)
def test_names_and_options_that_there_are_not(
    name: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        load_reward(name, **options)
