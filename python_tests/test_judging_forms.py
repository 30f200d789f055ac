"""Programs as the graders of data sets run them: prelude, ends, limits, relations, checks."""

from __future__ import annotations

from typing import Any

import pytest
from data_cases import HUMANEVAL

from spo_ext.data.contests import parse_apps, parse_code_contests
from spo_ext.data.functions import parse_evalplus, parse_humaneval, parse_mbpp
from spo_ext.data.records import Defaults
from spo_ext.data.tests import submission
from spo_ext.sandbox import (
    Check,
    Limits,
    Program,
    Sandbox,
    StdinProgram,
    Submission,
    Verdict,
    judge,
)


def right(sandbox: Sandbox, source: str, expected: object, *arguments: object, **how: Any) -> bool:
    program = Program(source, calls=(arguments,))
    return judge(sandbox, [Submission(program, (expected,), **how)])[0].ok


def prints(sandbox: Sandbox, source: str, output: str, text: str = "", **how: Any) -> bool:
    return judge(sandbox, [Submission(StdinProgram(source, (text,)), (output,), **how)])[0].ok


def checked(sandbox: Sandbox, source: str, check: str, **how: Any) -> Verdict:
    return judge(sandbox, [Submission(Program(source), check=Check(check, **how))])[0]


PRELUDE = [
    "class Solution:\n    def f(self, x: List[int]) -> Optional[int]: return sum(x)",
    "def f(x): return reduce(lambda a, b: a + b, x)",
    "def f(x): return sum(Counter(x).elements()) + math.floor(0.5) + floor(0.5)",
    "def f(x):\n    h = deque(x); heapify(x); return sum(h) + bisect_left(x, x[0])",
    "def f(x): return pow(sum(x), 1, 1000)",  # the built-in one, which takes three
    "def f(x): return sum(list(chain(x))) + sys.getrecursionlimit() - 50000",
    "def f(x): return sum(x) if re.match('a', 'a') and random.random() < 1 else copy.copy(0)",
    "from __future__ import annotations\ndef f(x): return sum(x) + datetime.MINYEAR - 1",
    "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return g(40_000) - 40_000 + sum(x)",
    "@lru_cache(None)\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)\n"
    "def f(x): return g(20_000) - 20_000 + sum(x)",
]


@pytest.mark.parametrize("source", PRELUDE)
def test_the_prelude_of_the_official_graders(sandbox: Sandbox, source: str) -> None:
    assert right(sandbox, source, 6, [1, 2, 3])
    as_script = source.replace("class Solution:", "class S(object):\n    pass\nclass Solution:")
    call = "Solution().f" if "Solution" in source else "f"
    assert prints(sandbox, f"{as_script}\nprint({call}([1, 2, 3]))", "6")


SCRIPTS = [
    "print(input()); exit()\nprint('no')",
    "print(input()); quit()\nprint('no')",
    "print(input()); exit(0)\nprint('no')",
    "print(open('/dev/stdin').read())",
    "print(input())\nif True:\n    return\nprint('no')",
    "a = input()\ndef g():\n    global b\n    b = a\ng()\ntry:\n    print(b)\n    return\n"
    "except:\n    print('no')",
    "from math import *\nfor c in input():\n    print(floor(int(c)))\n    return",
    "import sys, threading\nthreading.stack_size(512 << 20)\n"
    "t = threading.Thread(target=lambda: print(input())); t.start(); t.join()",
    "from multiprocessing import Pool\ndef g(x): return x\n"
    "if __name__ == '__main__':\n    with Pool() as p: print(*p.map(g, [int(input())]))",
    "x = input(); y = 10 ** 6000; assert len(str(y)) == 6001 and int(str(y)) == y; print(x)",
]


@pytest.mark.parametrize("source", SCRIPTS)
def test_scripts_end_and_read_as_under_plain_python(sandbox: Sandbox, source: str) -> None:
    assert prints(sandbox, source, "7", "7\n")


@pytest.mark.parametrize(
    ("relation", "output", "expected", "equal"),
    [
        ("equal", 240, 240.0, True),
        ("equal", 0, False, True),
        ("equal", (1, 2), [1, 2], False),
        ("equal", 0.1 + 0.2, 0.3, False),
        ("json", (1, (2, 3)), [1, [2, 3]], True),
        ("json", {1: "a"}, {"1": "a"}, True),
        ("json", 0.1 + 0.2, 0.3, True),
        ("json", [1 / 3], [0.333333333], True),
        ("json", 0.334, 0.333333333, False),
        ("json", 10**9 + 1, 10**9, False),
        ("json", 10**400, 0.5, False),
        ("json", [1, 2], [1], False),
    ],
)
def test_relations_of_results(
    sandbox: Sandbox, relation: str, output: object, expected: object, equal: bool
) -> None:
    assert right(sandbox, "def f(x): return x", expected, output, relation=relation) == equal


def test_integers_of_thousands_of_digits(sandbox: Sandbox) -> None:
    assert right(sandbox, "def f(x): return 10 ** x + 1", 10**5000 + 1, 5000)
    assert not right(sandbox, "def f(x): return 10 ** x + 1", 10**5000, 5000)


@pytest.mark.parametrize(
    ("relation", "output", "expected", "equal"),
    [
        ("lines", "0.30000000000000004", "0.3", True),
        ("lines", "0.3333333333333333\n", "0.333333333", True),
        ("lines", "0.34", "0.333333333", False),
        ("lines", "3.0", "3", True),
        ("lines", "3.1", "3", False),
        ("lines", "1000000001", "1000000000", False),
        ("lines", "9" * 5000, "9" * 4999 + "8", False),
        ("lines", "1_0", "10", False),
        ("lines", "nan", "0.5", False),
        ("lines", "a  b \n\n", "a b", True),
        ("lines", "a\nb", "a b", False),
        ("tokens", "a\nb", "a b", True),
        ("tokens", "a", "a b", False),
    ],
)
def test_relations_of_printed_text(
    sandbox: Sandbox, relation: str, output: str, expected: str, equal: bool
) -> None:
    assert prints(sandbox, f"print({output!r})", expected, relation=relation) == equal


def test_a_result_may_stand_in_a_list_of_one_in_all_tests_or_in_none(sandbox: Sandbox) -> None:
    def judged(source: str) -> bool:
        program = Program(source, calls=((1,), (2,)))
        return judge(sandbox, [Submission(program, ([1], [2]), wrapped=True)])[0].ok

    assert judged("def f(x): return x") and judged("def f(x): return [x]")
    assert not judged("def f(x): return x if x == 1 else [x]")
    assert not judged("def f(x): return [[x]]")


def test_the_limit_of_output_follows_what_is_expected(sandbox: Sandbox) -> None:
    text = "123456789\n" * 150_000
    assert prints(sandbox, "print('123456789\\n' * 150_000)", text)
    assert right(sandbox, "def f(x): return 'x' * x", "x" * 1_500_000, 1_500_000)
    assert not prints(sandbox, "print('123456789\\n' * 150_000)", "123456789\n")


def test_a_large_result_is_read_to_its_end(sandbox: Sandbox) -> None:
    """The time to read it follows what is expected, too."""
    expected = list(range(300_000))
    program = Program("def f(n): return list(range(n))", calls=((len(expected),),))
    assert judge(sandbox, [Submission(program, (expected,))])[0].ok


def test_a_check_sees_plain_data_and_the_program_sees_no_check(sandbox: Sandbox) -> None:
    check = "def check(f):\n    assert abs(f(2) - 4) < 0.1\n    assert f(3) == 9"
    assert checked(sandbox, "def f(x): return x * x + 0.0", check, function=True).ok
    assert "AssertionError" in checked(sandbox, "def f(x): return 4", check, function=True).reason
    assert (
        "nothing"
        in checked(sandbox, "def f(x): raise KeyError('nothing')", check, function=True).reason
    )
    liar = "class L(int):\n    __eq__ = lambda *_: True\ndef f(x): return L(8)"
    assert not checked(sandbox, liar, "assert f(3) == 9").ok
    catches = "try:\n    f(0)\nexcept ValueError as e:\n    assert str(e) == 'zero'\nelse: assert 0"
    assert checked(sandbox, "def f(x): raise ValueError('zero')", catches).ok
    assert checked(sandbox, "def f(a, *, k): return a + k", "assert f(1, k=two()) == 3",
                   prefix="def two(): return 2").ok  # fmt: skip
    look = (
        "import gc\ndef f(x):\n    words = [w for w in gc.get_objects() if 'sesame' in repr(w)]\n"
        "    return len(words)"
    )
    assert checked(sandbox, look, "w = 'sesame'\nassert f(1) <= 3").ok
    kills = "import os, signal\ndef f(x):\n    os.kill(os.getpid() + 1, signal.SIGKILL); return 9"
    assert not checked(sandbox, kills, "assert f(3) == 9").ok


def test_unusable_checks_are_no_verdict_of_the_program(sandbox: Sandbox) -> None:
    for check in ("1 / 0", "x = 1", "assert f(object()) == 1"):
        assert checked(sandbox, "def f(x): return x", check).unusable, check
    assert not checked(sandbox, "def f(x): return x", "assert f(1) + None").unusable


def test_packages_are_there_if_named(sandbox: Sandbox) -> None:
    source = "import numpy as np\ndef f(x): return int(np.array(x).sum())"
    assert not right(sandbox, source, 6, [1, 2, 3])
    pytest.importorskip("numpy")
    with Sandbox(1, packages=("numpy",)) as with_numpy:
        assert right(with_numpy, source, 6, [1, 2, 3])
        assert right(with_numpy, source.replace("int(", "(", 1), 6, [1, 2, 3])  # a numpy.int64
        assert not right(with_numpy, "import torch\ndef f(x): return 1", 1, 1)
    with pytest.raises(ValueError, match="packages must be installed packages, got 'no_such'"):
        Sandbox(1, packages=("no_such",))


def test_contests_have_limits_of_their_own() -> None:
    row = {
        "description": "d",
        "public_tests": {"input": ["1"], "output": ["1"]},
        "time_limit": {"seconds": 2, "nanos": 500_000_000},
        "memory_limit_bytes": 64 << 20,
    }
    tests = parse_code_contests(row, Defaults()).prompt.tests
    own = submission(tests, "x").limits
    assert own is not None and (own.cpu_seconds, own.memory_mib) == (2.5, 64)
    asked = submission(tests, "x", Limits(cpu_seconds=4)).limits
    assert asked is not None and (asked.cpu_seconds, asked.memory_mib) == (4, 256)


def test_starter_code_of_apps_and_both_readings(sandbox: Sandbox) -> None:
    io = {"fn_name": "f", "inputs": [[[1, 2]], [[3]]], "outputs": [[3], [3]]}
    row = {"problem_id": 1, "question": "Find any sum.", "input_output": io, "solutions": []}
    record = parse_apps(row, Defaults())
    assert "several right answers" in record.notes[0]
    for source in ("return sum(x)", "return (sum(x),)"):
        program = f"class Solution:\n    def f(self, x: List[int]): {source}"
        assert judge(sandbox, [submission(record.prompt.tests, program)])[0].ok


FUNCTIONS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"text": "q", "code": "def count(l):\n  return Counter(l)",
         "test_list": ["assert count([10, 10]) == ({10: 2})"]},
        "def count(l): return {10: len(l)}", "def count(l): return {10: 1}",
    ),
    (
        {"text": "q", "code": "def sum(a, b): return a + b",
         "test_list": ["assert math.isclose(sum(1, 2), 3.0001, rel_tol=0.001)"]},
        "def sum(a, b): return b + a", "def sum(a, b): return b",
    ),
    (
        {"text": "q", "test_list": ["assert not odd(2)", "assert set(odd(1)) == {1}"]},
        "def odd(x): return [x] * (x % 2)", "def odd(x): return [2]",
    ),
    (
        {"text": "q", "test_list": [f"assert big(1) == {'9' * 5000}"]},
        "def big(x): return 10 ** 5000 - x", "def big(x): return 10 ** 5000",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "good", "bad"), FUNCTIONS)
def test_mbpp_by_its_own_asserts(
    sandbox: Sandbox, row: dict[str, Any], good: str, bad: str
) -> None:
    record = parse_mbpp(row, Defaults())
    programs = [*(str(item.content) for item in record.completions), good, bad]
    verdicts = judge(sandbox, [submission(record.prompt.tests, program) for program in programs])
    assert [verdict.ok for verdict in verdicts] == [True] * (len(programs) - 1) + [False]


def test_humaneval_by_its_own_check(sandbox: Sandbox) -> None:
    record = parse_humaneval(HUMANEVAL, Defaults())
    whole = HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    off = "    return 2 * x if x != 2.5 else 0"  # only where the check's loop does not look
    for source, ok in (("    return x + x", True), (whole, True), (off, True), ("    0", False)):
        assert judge(sandbox, [submission(record.prompt.tests, source)])[0].ok == ok, source


PLUS_ROW = {
    "prompt": '"""\nThe mean of the pairs, as a list.\nassert mean([(1, 2)]) == [1.5]\n"""\n',
    "entry_point": "mean",
    "canonical_solution": "def mean(pairs):\n    return [sum(p) / len({p: 1}) / 2 for p in pairs]",
    "base_input": [[[[1, 2]]]],
    "plus_input": [[[[1, 3], [0.1, 0.2]]], [[]]],
    "atol": 0,
    "assertion": "assert mean([(1, 2)]) == [1.5]",
}


def test_evalplus_by_its_own_solution_and_tolerance(sandbox: Sandbox) -> None:
    """JSON has lists where the solution needs tuples, as keys: the asserts say so."""
    record = parse_evalplus(PLUS_ROW, Defaults())
    sources = {
        PLUS_ROW["canonical_solution"]: True,
        "def mean(pairs): return [sum(p) * 0.5 + 1e-9 for p in pairs]": True,
        "def mean(pairs): return [sum(p) * 0.5 + 1e-3 for p in pairs]": False,
        "def mean(pairs): return [sum(p) * 0.5 for p in pairs][:1]": False,
        "def mean(pairs): return tuple(sum(p) * 0.5 + 1e-9 for p in pairs)": False,
    }
    subs = [submission(record.prompt.tests, str(source)) for source in sources]
    assert [verdict.ok for verdict in judge(sandbox, subs)] == list(sources.values())
    assert "sum(p)" not in str(record.prompt.content)
