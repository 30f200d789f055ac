"""Prints the stored ratios, one line each, after the table of pytest-benchmark."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "peer_over_spo_ext" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("time of the peer / time of spo_ext, rounds interleaved in one run")
    for row in rows:
        info = row.extra_info
        terminalreporter.line(
            f"{row.name:55s} {info['peer_over_spo_ext']:.2f}   (peer {info['peer_ms']:.0f} ms, "
            f"spo_ext {info['spo_ext_ms']:.0f} ms, {info['threads']} threads, {info['states']})"
        )
