"""One small row of every data set, files of rows, and a tokenizer of bytes."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

from spo_ext.data.importer import Importer, Problem, Settings, Summary
from spo_ext.store import TrajectoryStore

ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
SUBTRACT = ADD.replace("+", "-")

CODE_CONTESTS: dict[str, Any] = {
    "name": "1_A. Sum",
    "description": "Print the sum of two integers.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["5 5\n"], "output": ["10\n"]},
    "generated_tests": {"input": [], "output": []},
    "source": 2,
    "difficulty": 7,
    # 1 is Python 2, 2 is C++, 3 is Python 3.
    "solutions": {"language": [2, 3, 1], "solution": ["int main() {}", ADD, "print 1"]},
    "incorrect_solutions": {"language": [3], "solution": [SUBTRACT]},
    "time_limit": {"seconds": 1, "nanos": 0},
    "input_file": "",
    "output_file": "",
}
TACO: dict[str, Any] = {
    "question": "Add two integers of one line.",
    "solutions": json.dumps([ADD]),
    "starter_code": "",
    "input_output": json.dumps({"inputs": ["1 2\n", ["3 4", ""]], "outputs": ["3\n", "7"]}),
    "difficulty": "EASY",
    "tags": "[]",
}
APPS: dict[str, Any] = {
    "problem_id": 3,
    "question": "Reverse the list.",
    "solutions": json.dumps(["def turn(items):\n    return items[::-1]\n"]),
    "input_output": json.dumps(
        {"fn_name": "turn", "inputs": [[[1, 2]], [[3]]], "outputs": [[[2, 1]], [[3]]]}
    ),
    "starter_code": "def turn(items):\n\t",
}
MBPP: dict[str, Any] = {
    "task_id": 2,
    "text": "Write a function that returns the numbers both tuples have, in order.",
    "code": "def similar(a, b):\r\n  return tuple(sorted(set(a) & set(b)))",
    "test_list": [
        "assert similar((3, 4, 5, 6), (5, 7, 4, 10)) == (4, 5)",
        "assert set(similar((1, 2), (2, 3))) == {2}",
    ],
    "test_setup_code": "",
    "challenge_test_list": ["assert similar((), ()) == ()"],
}
MBPP_SANITIZED: dict[str, Any] = {
    "task_id": 3,
    "prompt": "Write a function that returns the area of a unit circle, rounded down.",
    "code": "def area():\n    return math.floor(math.pi)",
    "test_imports": ["import math"],
    "test_list": ["assert area() == 3"],
}
PLUS = """import numpy as np

def is_floats(x):
    return isinstance(x, float)

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        np.testing.assert_allclose(out, exp, atol=atol)
    else:
        assert exact_match

"""
MBPP_PLUS: dict[str, Any] = {
    "task_id": 3,
    "prompt": "Write a function that returns the area of a circle, rounded down.",
    "code": "def area(r):\n    return math.floor(math.pi * r * r)",
    "test_imports": ["import math"],
    "test_list": ["assert area(1) == 3"],
    "test": PLUS + "inputs = [[2], [0]]\nresults = [12, 0]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(area(*inp), exp, 0)\n",
}
HUMANEVAL: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4, 'two'\n"
    "    assert candidate('ab') == 'abab'\n    assert True\n"
    "    assert abs(candidate(0.1) - 0.2) < 1e-6\n"
    "    for i in range(3):\n        assert candidate(i) == i + i\n",
    "entry_point": "double",
}
HUMANEVAL_PLUS: dict[str, Any] = {
    "task_id": "HumanEval/1",
    "prompt": 'def half(x):\n    """Half of x, whole if it can be."""\n',
    "canonical_solution": "    return x // 2 if x % 2 == 0 else x / 2\n",
    "test": PLUS
    + "def check(candidate):\n    inputs = [[2], [3], [-4]]\n    results = [1, 1.5, -2]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
    "        assertion(candidate(*inp), exp, 0)\n",
    "entry_point": "half",
}
_PUBLIC = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]
_PRIVATE = [{"input": '[]\n"x"', "output": '["x"]', "testtype": "functional"}]


def packed(value: object) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


LIVECODEBENCH: dict[str, Any] = {
    "question_title": "append",
    "question_content": "Return the list with the value at its end.",
    "platform": "leetcode",
    "question_id": "1",
    "starter_code": "class Solution:\n    def append(self, items, value):\n        ",
    "public_test_cases": json.dumps(_PUBLIC),
    "private_test_cases": packed(json.dumps(_PRIVATE)),
    "metadata": json.dumps({"func_name": "append"}),
}
LIVECODEBENCH_STDIN: dict[str, Any] = {
    "question_content": "Read two integers; print what they add up to.",
    "platform": "atcoder",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "2 2", "output": "4", "testtype": "stdin"}]),
    "metadata": "{}",
}


def write_rows(path: Path, *rows: dict[str, Any] | str) -> Path:
    """By the name's end; a str is a line as it is, so a row may be no JSON."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return path
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def import_rows(
    store: TrajectoryStore, path: Path, **settings: Any
) -> tuple[Summary, list[Problem]]:
    problems: list[Problem] = []
    importer = Importer(store, Settings(**settings), problems.append)
    importer.import_file(path)
    return importer.summary, problems


def contents(store: TrajectoryStore) -> list[Any]:
    """All that a store holds, but for ids and times."""
    found = []
    for prompt in store.prompts():
        judged_by = (prompt.tests, prompt.answer)
        found.append((prompt.content, prompt.token_ids, *judged_by, prompt.split, prompt.columns))
        for item in store.trajectories(prompt_id=prompt.id):
            behaviour = item.behaviour_logprobs
            how = (item.finish, item.reason, item.temperature, item.top_p)
            logprobs = None if behaviour is None else behaviour.tolist()
            found.append((item.token_ids, item.reward, item.origin, how, logprobs))
    return found


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path) -> Path:
    """Ids of bytes, then <|end|>, the end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder
