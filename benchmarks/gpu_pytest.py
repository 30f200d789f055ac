"""A pytest plugin for machines where a test may hang or lose the GPU: pytest -p gpu_pytest.

Appends a line of JSON to SPO_TEST_LOG when a test begins, when it ends and after all, and leaves
out tests that are in it already. A test over SPO_TEST_LIMIT_S seconds (30) ends the process, and so
does one that leaves the GPU unusable: start pytest again, and it goes on behind that test.
"""

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

LIMIT_S = float(os.environ.get("SPO_TEST_LIMIT_S", "30"))
LOG = open(os.environ["SPO_TEST_LOG"], "a+")  # noqa: SIM115
LOG.seek(0)
BEGUN = {json.loads(line)["test"] for line in LOG}


def write(test: str, outcome: str, **facts: Any) -> None:
    LOG.write(json.dumps({"test": test, "outcome": outcome, **facts}) + "\n")
    LOG.flush()


def context_lost() -> bool:
    """A kernel that faulted makes every later call fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in BEGUN])
    items[:] = [item for item in items if item.nodeid not in BEGUN]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    write(item.nodeid, "hung or crashed")  # unless another line follows
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_sessionfinish() -> None:
    write("all", "finished")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed and report.when != "call":
        return
    said = str(report.longrepr)[-500:] if report.failed else ""
    write(report.nodeid, report.outcome, seconds=round(report.duration, 2), said=said)
    if report.failed and context_lost():
        print(f"{report.longreprtext}\nthe GPU's context is lost", file=sys.stderr, flush=True)
        os._exit(3)
