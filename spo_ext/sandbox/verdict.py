"""Says how many of a program's outputs are those that were expected."""

from __future__ import annotations

from collections.abc import Sequence

from spo_ext.sandbox.codec import decode, encode
from spo_ext.sandbox.jobs import Judged, Unusable, judging_jobs
from spo_ext.sandbox.records import Outcome, Raised, Submission, Verdict
from spo_ext.sandbox.relation import equal, equal_lines, equal_tokens
from spo_ext.sandbox.sandbox import Sandbox


def judge(sandbox: Sandbox, submissions: Sequence[Submission]) -> list[Verdict]:
    """Run all submissions and say which outputs are as expected, in the same order.

    Return values are compared inside the sandbox, as plain data, printed text here. Raises
    SandboxError if the sandbox failed and TypeError if an expected output is not plain data.
    """
    jobs = [judging_jobs(submission, sandbox.limits) for submission in submissions]
    results = sandbox.run_jobs(jobs)
    return [_verdict(*each) for each in zip(submissions, results, strict=True)]


def agree(output: object, expected: object) -> bool:
    """Whether two return values agree as `judge` has it unless told otherwise."""
    return equal(decode(encode(output)), decode(encode(expected)))


def _verdict(submission: Submission, result: Outcome | Unusable) -> Verdict:
    total = max(1, len(submission.expected))
    if isinstance(result, Unusable):
        return Verdict(0, total, False, "the tests cannot be used", unusable=str(result))
    readings = [_complaints(submission, result, unwrapped=False)]
    if submission.wrapped:
        readings.append(_complaints(submission, result, unwrapped=True))
    complaints = min(readings, key=len)
    ok = not complaints and result.status == "ok"
    reason = result.reason or "".join(complaints[:1])
    return Verdict(total - len(complaints), total, ok, reason)


def _complaints(submission: Submission, outcome: Outcome, unwrapped: bool) -> list[str]:
    same = equal_tokens if submission.relation == "tokens" else equal_lines
    complaints = []
    for index, output in enumerate(outcome.outputs):
        if isinstance(output, Raised):
            complaints.append(f"call {index}: {output.text}")
        elif isinstance(output, Judged):
            right = output.unwrapped if unwrapped else output.as_is
            complaints += [] if right else [f"call {index}: wrong output"]
        elif not same(str(output), str(submission.expected[index])):
            complaints.append(f"call {index}: wrong output")
    return complaints
