"""Rows whose completions are judged by an answer: GSM8K, MATH, and those of verl."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from spo_ext.data.contests import question_tests
from spo_ext.data.records import (
    Defaults,
    Record,
    Row,
    RowError,
    as_json,
    optional_text,
    parse_json,
    shown,
    solution,
    text,
)
from spo_ext.data.trl import readable
from spo_ext.rollout.answers import final_answer
from spo_ext.store.records import Prompt


def parse_gsm8k(row: Row, defaults: Defaults) -> Record:
    """The answer is what stands behind the last ####, and all of it a solution. Raises RowError."""
    question, worked = text(row, "question"), text(row, "answer")
    _, marks, answer = worked.rpartition("####")
    if not marks or not answer.strip():
        raise RowError(
            "answer must end in #### and the final answer, as GSM8K's do (other questions and "
            f"answers: columns prompt and answer), got {shown(worked[-40:])}"
        )
    return _record(row, question, answer.strip(), worked, defaults, "gsm8k")


def parse_math(row: Row, defaults: Defaults) -> Record:
    """The answer is in its column, else in the last box of the solution. Raises RowError."""
    problem, worked = text(row, "problem"), optional_text(row, "solution")
    answer = row.get("answer")
    if answer is None:
        answer = _last_box(worked)
    if answer is None or answer == "":
        raise RowError("there is no answer, neither in answer nor in a \\boxed{} of the solution")
    return _record(row, problem, answer, worked, defaults, "math")


def parse_verl(row: Row, defaults: Defaults) -> Record:
    """The ground truth is the answer if a rule judges by it, or tests if it holds such.

    extra_info and what is left of reward_model are columns, as is all else. Raises RowError.
    """
    content, model, extra = row.get("prompt"), row.get("reward_model"), row.get("extra_info")
    if not isinstance(content, str | list):
        raise RowError(f"prompt must be text or messages, got {shown(content)}")
    if not isinstance(model, Mapping):
        raise RowError(f"reward_model must be an object with style, got {shown(model)}")
    if isinstance(extra, Mapping) and (extra.get("need_tools_kwargs") or extra.get("tools_kwargs")):
        raise RowError("extra_info asks for tools, whose tokens would be learned as the policy's")
    columns, answer, tests = dict(model), None, None
    notes: tuple[str, ...] = ()
    truth, style = model.get("ground_truth"), model.get("style")
    if style not in (None, "rule"):
        notes = (f"reward_model has style {shown(style)}: its ground_truth is kept, as no answer",)
    elif truth is None or truth == "":
        raise RowError(f"reward_model must have a ground_truth, got {shown(truth)}")
    elif (given := _inputs_and_outputs(truth)) is not None:
        tests = question_tests(given)
        del columns["ground_truth"]
    elif isinstance(truth, str | int | float):
        answer = columns.pop("ground_truth")
    else:
        notes = ("ground_truth is neither text nor a number: it is kept, as no answer",)
    kept = {"reward_model": columns or None, "extra_info": extra}
    found = {name: as_json(name, value) for name, value in kept.items() if value is not None}
    prompt = Prompt(
        readable("prompt", content),
        answer=answer,
        tests=tests,
        split=defaults.split_of(row),
        columns=found,
    )
    return Record(prompt, notes=notes)


def _inputs_and_outputs(truth: Any) -> Mapping[str, Any] | None:
    """Tests of a program as verl's data sets of code have them; None for anything else."""
    if isinstance(truth, str) and truth.lstrip().startswith("{"):
        with contextlib.suppress(RowError):
            truth = parse_json("ground_truth", truth)
    return truth if isinstance(truth, Mapping) and {"inputs", "outputs"} <= set(truth) else None


def _record(
    row: Row, question: str, answer: Any, worked: str, defaults: Defaults, data_set: str
) -> Record:
    prompt = Prompt(question, answer=answer, split=defaults.split_of(row))
    completions = []
    if worked.strip():
        completions.append(solution(worked, 1.0, defaults.origin_of(data_set)))
    return Record(prompt, tuple(completions))


def _last_box(worked: str) -> str | None:
    """What stands in the last \\boxed{} or \\fbox{}, or behind a \\boxed without braces."""
    start = max(worked.rfind("\\boxed"), worked.rfind("\\fbox"))
    if start < 0:
        return None
    box = worked[start:].replace("\\fbox", "\\boxed", 1)
    inside = box.removeprefix("\\boxed").lstrip()
    if not inside.startswith("{"):
        return inside.partition("$")[0].strip()
    found = final_answer("\\boxed" + inside)
    return None if found == ("\\boxed" + inside).strip() else found
