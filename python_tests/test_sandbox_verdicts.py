"""Programs in good faith: right ones are paid, wrong ones are not."""

from __future__ import annotations

import math
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from sandbox_cases import (
    SQUARE,
    paid,
    returned,
    run,
)

from spo_ext.sandbox import (
    Limits,
    Program,
    Raised,
    Sandbox,
    StdinProgram,
    Submission,
    agree,
    judge,
)


@pytest.mark.parametrize(
    ("source", "passed", "reason"),
    [
        ("def f(x): return x * x", 2, ""),
        ("def f(x): return x + 6", 1, "call 1: wrong output"),
        ("def f(x): return 0", 0, "call 0: wrong output"),
        ("def f(x): return 9 if x == 3 else 1 // 0", 1, "call 1: ZeroDivisionError"),
        ("def f(x) return x", 0, "SyntaxError"),
        ("def g(x): return x * x", 0, "KeyError: 'f'"),
        ("import nothing_like_this\ndef f(x): return x * x", 0, "ModuleNotFoundError"),
        ("1 / 0", 0, "ZeroDivisionError"),
        ("def f(x):\n    print('noise'); return x * x", 2, ""),
    ],
)
def test_verdict(sandbox: Sandbox, source: str, passed: int, reason: str) -> None:
    verdict = judge(sandbox, [Submission(Program(source, calls=((3,), (-4,))), (9, 16))])[0]
    assert (verdict.passed, verdict.total, verdict.ok) == (passed, 2, passed == 2)
    assert reason in verdict.reason if reason else verdict.reason == ""


VALUES = [
    None, True, 1, 1.0, -0.5, math.inf, "a\u00e9\ud800\0\n", b"\xff", 2**70, -(10**6000), [1, [2]],
    (1, (2,)), {"a": {1: (2,)}}, {1, 2}, frozenset({1}), [], (), {}, "1", [True], [1.0], {True: 1},
    {(1, 2): 1}, {1: True}, 2 + 1j, Fraction(1, 2), Decimal("0.5"), 0.5,
]  # fmt: skip


def test_values_agree_as_python_has_it(sandbox: Sandbox) -> None:
    """True, 1 and 1.0 are equal, a tuple is no list; each also on its way through the sandbox."""
    source = "def f(x): return x"
    pairs = [(value, expected) for value in VALUES for expected in VALUES]
    calls, expected = tuple((value,) for value, _ in pairs), tuple(e for _, e in pairs)
    verdict = judge(sandbox, [Submission(Program(source, calls=calls), expected)])[0]
    equal = [value == expected for value, expected in pairs]
    assert [agree(*pair) for pair in pairs] == equal
    assert (verdict.passed, verdict.total) == (sum(equal), len(pairs))
    assert sum(equal) > len(VALUES)


def test_nan_agrees_with_nan_only(sandbox: Sandbox) -> None:
    assert paid(sandbox, "def f(): return [float('nan')]", [math.nan])
    assert not paid(sandbox, "def f(): return float('nan')", 1.0)
    assert not paid(sandbox, "def f(): return 1.0", math.nan)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("(i for i in range(3))", "generator is not plain data"),
        ("type('I', (), {})()", "I is not plain data"),
        ("range(3)", "range is not plain data"),
        ("[[x := []], x.append(x)] and x", "nested deeper"),
        ("eval('[' * 80 + ']' * 80)", "nested deeper"),
        ("f", "function is not plain data"),
        ("{'a': object()}", "object is not plain data"),
    ],
)
def test_only_plain_data_comes_back(sandbox: Sandbox, expression: str, text: str) -> None:
    output = returned(sandbox, expression)
    assert isinstance(output, Raised) and text in output.text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("Counter('aab')", {"a": 2, "b": 1}),
        ("namedtuple('P', 'x y')(1, 2)", (1, 2)),
        ("defaultdict(list, {1: [2]})", {1: [2]}),
        ("{1: 2}.keys()", {1}),
        ("type('I', (int,), {'__eq__': lambda *_: True, '__hash__': int.__hash__})(7)", 7),
    ],
)
def test_a_subclass_counts_as_its_built_in_type(
    sandbox: Sandbox, expression: str, value: object
) -> None:
    assert returned(sandbox, expression) == value
    assert not paid(sandbox, f"def f(): return {expression}", [value])


# Each set of keys takes quadratic time in a dict: by equal hashes, and by the places that integers
# of different hashes try one after another.
FLOODS = (
    "{i * (2**61 - 1): 0 for i in range(1, 40_000)}",
    "dict.fromkeys(orbit())",
)
ORBIT = """
def orbit(bits=17):
    import os
    size, place, keys = 1 << bits, 1, []
    taken = bytearray(size)
    for _ in range(43_690):
        taken[place] = 1
        keys.append(place)
        place = (5 * place + 1) & (size - 1)
    for high in range(1, 4):
        for low in keys[:]:
            key = (high << bits) + low
            perturbed = key >> 5
            if taken[(low * 5 + perturbed + 1) & (size - 1)]: keys.append(key)
            if len(keys) > 80_000: break
    line = '["loaded"]\\n["returned", ["dict",' + ",".join(f"[{k},0]" for k in keys) + "]]\\n"
    while line: line = line[os.write(3, line.encode()):]
"""


@pytest.mark.parametrize("flood", FLOODS)
def test_keys_made_to_collide_do_not_stall_the_judge(sandbox: Sandbox, flood: str) -> None:
    program = Program(f"{ORBIT}\ndef f(x): return {flood}", calls=((1,),))
    start = time.process_time()
    assert not judge(sandbox, [Submission(program, (1,)), SQUARE])[0].ok
    assert time.process_time() - start < 0.5, "the trusted process did the work"


def test_calls_before_a_timeout_count(sandbox: Sandbox) -> None:
    source = "def f(x):\n    while x == 2: pass\n    return x"
    verdict = judge(sandbox, [Submission(Program(source, calls=((1,), (2,), (3,))), (1, 2, 3))])[0]
    assert (verdict.passed, verdict.ok) == (1, False)
    assert "CPU time" in verdict.reason or "longer" in verdict.reason


def test_scripts_read_stdin_and_print(sandbox: Sandbox) -> None:
    twice = StdinProgram("print(2 * int(input()))", ("1\n", "21", "x"))
    outcome = sandbox.run([twice])[0]
    assert outcome.outputs[:2] == ("2\n", "42\n")
    assert outcome.status == "error" and "invalid literal" in outcome.reason
    verdict = judge(sandbox, [Submission(twice, ("2", "41", "2"))])[0]
    assert (verdict.passed, verdict.ok) == (1, False)


@pytest.mark.parametrize(
    "source",
    [
        "import sys; print(sys.stdin.read().upper(), end=''); sys.exit()",
        "import os, sys; os.write(1, os.read(0, 1 << 20).upper()); os._exit(0)",
        "data = open(0).read()\nif __name__ == '__main__': print(data.upper())",
        "import atexit; atexit.register(lambda: print(open(0).read().upper()))",
        "out = open(1, 'w'); out.write(open(0).read().upper())",
        "import threading; threading.Thread(target=lambda: print(input().upper())).start()",
    ],
)
def test_ways_to_write_a_script(sandbox: Sandbox, source: str) -> None:
    text = "word " * 40_000  # More than a pipe holds.
    assert judge(sandbox, [Submission(StdinProgram(source, (text,)), (text.upper(),))])[0].ok


def test_a_failing_script_is_not_paid_for_what_it_printed(sandbox: Sandbox) -> None:
    for ending in ("sys.exit(3)", "raise ValueError", "os._exit(1)", "os.abort()"):
        script = StdinProgram(f"import os, sys; print(7, flush=True); {ending}", ("",))
        assert not judge(sandbox, [Submission(script, ("7",))])[0].ok, ending


def test_order_is_kept(sandbox: Sandbox) -> None:
    source = "import time\ndef f(i, s): time.sleep(s); return i"
    programs = [Program(source, calls=((i, 0.05 * (i % 7 == 0)),)) for i in range(80)]
    assert [outcome.outputs for outcome in sandbox.run(programs)] == [(i,) for i in range(80)]
    assert sandbox.run([]) == []


def test_wrong_use_is_an_error_of_the_caller(sandbox: Sandbox) -> None:
    with pytest.raises(TypeError, match="object is not plain data"):
        run(sandbox, "def f(x): return x", object())
    with pytest.raises(TypeError, match="expected output must be plain data"):
        judge(sandbox, [Submission(SQUARE.program, (9, object()))])
    with pytest.raises(ValueError, match="one output per call"):
        Submission(SQUARE.program, (9,))
    with pytest.raises(ValueError, match="surrogates"):
        sandbox.run([StdinProgram("", ("\ud800",))])
    with pytest.raises(ValueError, match="cpu_seconds must be positive"):
        Limits(cpu_seconds=0)
    with pytest.raises(ValueError, match="workers"):
        Sandbox(workers=0)
    assert judge(sandbox, [SQUARE])[0].ok
