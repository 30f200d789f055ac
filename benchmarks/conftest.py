"""What the benchmarks add to pytest-benchmark: a time budget, the machine and the skips in the
JSON, and the ratios as a table at the end."""

import os
import time
import warnings
from typing import Any

import machine
import pytest
import torch
from measure import ON_GPU

START = time.monotonic()
# Tests that would start later are skipped, so that what was measured is written in time.
BUDGET_S = float(os.environ.get("SPO_BENCH_BUDGET_S", "inf"))
SKIPPED: dict[str, str] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - START > BUDGET_S:
        pytest.skip(f"the {BUDGET_S:.0f} s of SPO_BENCH_BUDGET_S are over")


@pytest.fixture(autouse=True)
def _nothing_left_on_the_gpu() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        SKIPPED[report.nodeid.split("::")[-1]] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        SKIPPED[report.nodeid.split("::")[-1]] = "FAILED: " + str(report.longrepr)[-300:]


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    try:
        output_json["spo"] = machine.report()
    except Exception as error:  # a broken context after a failed kernel must not lose the results
        warnings.warn(f"no machine report: {error}", stacklevel=2)
        output_json["spo"] = {"commit": machine.commit(), "error": str(error)}
    output_json["spo"]["skipped"] = SKIPPED
    # the single rounds would make a file of megabytes; medians are in extra_info
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    infos = [b.extra_info for b in session.benchmarks if "ms" in b.extra_info] if session else []
    if infos:
        terminalreporter.section("medians; ratios of rounds that took turns")
    for info in infos:
        against = (
            f"{info['over_gemm']:6.2f} x the product"
            if "over_gemm" in info
            else f"{info['copy_share']:6.0%} of a copy's speed"
        )
        name = f"{info['op']} {info['shape']}, {info['direction']}, {info['implementation']}"
        ratio = f"{info['peer_over_spo_ext']:6.2f} x spo_ext"
        terminalreporter.line(f"{name:75s} {info['ms']:10.3f} ms  {against}  {ratio}")
    for name, reason in SKIPPED.items():
        terminalreporter.line(f"skipped {name}: {reason}")
