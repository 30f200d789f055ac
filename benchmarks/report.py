"""Turns the JSON of the benchmarks into Markdown on the standard output, and into plots.

    python benchmarks/report.py bench.json [--plots FOLDER]

Works on results of either device. Plots need matplotlib.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # the extra_info of one measurement
HEAD = "token_logprobs"


def load(path: Path) -> tuple[Row, list[Row]]:
    data = json.loads(path.read_text())
    rows = [b["extra_info"] for b in data["benchmarks"] if "ms" in b["extra_info"]]
    return data.get("spo", {}), rows


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def milliseconds(value: float | None) -> str:
    return number(value, "{:.3f}" if value is not None and value < 1 else "{:.1f}")


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def pick(rows: list[Row], **wanted: str) -> Row:
    found = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return next(found, {})


def about(machine: Row) -> str:
    gpu, build, roof = (machine.get(key) or {} for key in ("gpu", "build", "roof"))
    where = (
        f"{gpu['name']}, driver {gpu.get('driver_version', '?')}, "
        f"SM clock {gpu.get('clocks.sm', '?')} of {gpu.get('clocks.max.sm', '?')}"
        if gpu
        else f"{machine.get('processor', '?')}, {machine.get('threads', '?')} threads"
    )
    lines = [f"commit {machine.get('commit', '?')}, torch {machine.get('torch', '?')}, {where}"]
    if build.get("cuda_archs"):
        lines.append(f"built with CUDA {build['cuda_toolkit']} for {build['cuda_archs']}")
    if roof:
        lines.append(
            f"ceilings measured in the same run: product {roof['gemm_tflops']:.3g} TFLOP/s, "
            f"copy {roof['copy_gb_per_s']:.4g} GB/s"
        )
    return "\n".join(f"- {line}" for line in lines) + "\n"


def head_table(rows: list[Row], shape: str) -> str:
    rows = [row for row in rows if row["shape"] == shape]
    header = ["", "forward ms", "/ product", "fwd+bwd ms", "/ product"]
    header += ["extra MiB fwd", "fwd+bwd", "log-prob error", "grad_hidden", "grad_weight"]
    lines = []
    for name in unique(row["implementation"] for row in rows):
        forward = pick(rows, implementation=name, direction="forward")
        total = pick(rows, implementation=name, direction="forward+backward")
        mark = "" if (forward or total)["per_token"] else " (no gradient per token)"
        cells = [name + mark]
        for row in (forward, total):
            cells += [milliseconds(row.get("ms")), number(row.get("over_gemm"))]
        cells += [number(row.get("extra_mib"), "{:.0f}") for row in (forward, total)]
        cells.append(number(forward.get("logprob_max"), "{:.1e}"))
        cells += [number(total.get(f"grad_{n}"), "{:.1e}") for n in ("hidden", "weight")]
        lines.append(cells)
    row = rows[0]
    title = (
        f"### {HEAD}: {shape}\nN = {row['tokens']}, V = {row['vocabulary']}, d = {row['depth']}, "
        f"{row['dtype']}, states: {row['states']}; bare product {milliseconds(row['gemm_ms'])} ms, "
        f"{product_tflops(row):.3g} TFLOP/s\n\n"
    )
    return title + table(header, lines)


def product_tflops(row: Row) -> float:
    return float(2 * row["tokens"] * row["vocabulary"] * row["depth"] / row["gemm_ms"] / 1e9)


def noise_table(rows: list[Row]) -> str:
    noisy = [row for row in rows if row.get("noise_of_sum")]
    lengths = unique(t for row in noisy for t in row["noise_of_sum"])
    lines = [
        [row["shape"], row["implementation"]]
        + [number(row["noise_of_sum"].get(t), "{:.1e}") for t in lengths]
        for row in noisy
    ]
    title = (
        "### Error of a sum of T log-probabilities (rms over completions): noise of Q_T / beta\n\n"
    )
    return title + table(["shape", "", *(f"T = {t}" for t in lengths)], lines) if noisy else ""


def bandwidth_table(rows: list[Row], op: str) -> str:
    lines = [
        [
            row["shape"],
            row["direction"],
            row["implementation"],
            milliseconds(row["ms"]),
            number(row["gb_per_s"], "{:.0f}"),
            number(row["copy_share"], "{:.0%}"),
            number(row["peer_over_spo_ext"]),
        ]
        for row in rows
        if row["op"] == op
    ]
    header = ["shape", "", "", "ms", "GB/s", "of a copy of as many bytes", "time / spo_ext's"]
    return f"### {op}\n\n" + table(header, lines)


def skipped(machine: Row) -> str:
    reasons = machine.get("skipped") or {}
    lines = "\n".join(f"- `{name}`: {reason}" for name, reason in reasons.items())
    return f"### Not measured\n\n{lines}\n" if reasons else ""


def markdown(machine: Row, rows: list[Row]) -> str:
    head = [row for row in rows if row["op"] == HEAD]
    parts = [about(machine)]
    parts += [head_table(head, shape) for shape in unique(row["shape"] for row in head)]
    parts.append(noise_table(head))
    parts += [bandwidth_table(rows, op) for op in unique(r["op"] for r in rows) if op != HEAD]
    parts.append(skipped(machine))
    return "\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the plots; must exist")
    arguments = parser.parse_args()
    machine, rows = load(arguments.json)
    print(markdown(machine, rows))
    if arguments.plots:
        try:
            import plots
        except ImportError as error:
            sys.exit(f"no plots: {error}")
        drawn: list[Callable[[Row, list[Row], Path], bool]] = [
            plots.roofline,
            plots.times,
            plots.noise,
        ]
        for draw in drawn:
            draw(machine, rows, arguments.plots)


if __name__ == "__main__":
    main()
