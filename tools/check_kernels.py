"""Checks compiled CUDA kernels without a GPU: no register spills, and matrix instructions in use.

    python tools/check_kernels.py build/cuda/report.log

The report is what nvcc -Xptxas=-v said during the build; of a kernel compiled twice the last entry
counts. The installed library is imported, so that a missing symbol shows, and disassembled with
cuobjdump, from Triton's package, which torch brings, or from PATH.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Kernels that take the time: a spill there is traffic to memory in the innermost loop. Each must be
# in the report, lest a new name escape the check.
HOT = (
    "head_gemm",
    "sm90_product",
    "multiply_pairs",
    "add_pairs_to_hidden",
    "make_centres",
    "drop_blocks",
    "logprobs_kernel",
    "logprobs_backward_kernel",
    "soft_q_kernel",
    "soft_q_backward_kernel",
    "cumulative_loss_kernel",
    "cumulative_loss_backward_kernel",
)

# Of these kernels every variant must multiply with the tensor cores of its architecture. A pattern
# is searched in the mangled name.
TENSOR_CORES = (
    ("sm_90a", r"12sm90_productI", "HGMMA"),
    ("sm_80", r"9head_gemmI.*11MmaMultiply", "HMMA"),
    ("sm_80", r"(14multiply_pairs|19add_pairs_to_hidden)I.*11MmaMultiply", "HMMA"),
)


class Kernel(NamedTuple):
    symbol: str
    arch: str


class Usage(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int


def base_name(symbol: str) -> str:
    """The unqualified name: the last <length><identifier> that nests directly under _ZN."""
    position, name = (3 if symbol.startswith("_ZN") else 2), symbol
    while match := re.match(r"(\d+)", symbol[position:]):
        start = position + len(match[1])
        position = start + int(match[1])
        name = symbol[start:position]
    return name


def parse_report(lines: Iterable[str]) -> dict[Kernel, Usage]:
    found: dict[Kernel, Usage] = {}
    kernel, spilled = None, 0
    for line in lines:
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, spilled = Kernel(match[1], match[2]), 0
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled += int(match[1]) + int(match[2])
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[kernel] = Usage(int(match[1]), spilled, int(shared[1]) if shared else 0)
            kernel = None
    return found


def table(usage: dict[Kernel, Usage]) -> str:
    """One line for each kernel and architecture: the largest number of any variant."""
    groups: dict[tuple[str, str], list[Usage]] = {}
    for kernel, used in usage.items():
        groups.setdefault((base_name(kernel.symbol), kernel.arch), []).append(used)
    lines = [f"{'kernel':32} {'arch':8} variants registers  spills  static shared (bytes)"]
    for (name, arch), rows in sorted(groups.items()):
        most = [max(column) for column in zip(*rows, strict=True)]
        lines.append(f"{name:32} {arch:8} {len(rows):8} {most[0]:9} {most[1]:7} {most[2]:7}")
    return "\n".join(lines)


def spill_errors(usage: dict[Kernel, Usage], hot: tuple[str, ...]) -> list[str]:
    present = {base_name(kernel.symbol) for kernel in usage}
    errors = [f"{name}: not in the report" for name in hot if name not in present]
    for kernel, used in usage.items():
        if used.spill_bytes and base_name(kernel.symbol) in hot:
            errors.append(f"{kernel.symbol} for {kernel.arch}: {used.spill_bytes} bytes of spills")
    return errors


def instructions(lines: Iterable[str], wanted: str) -> dict[str, int]:
    """How often each function of a disassembly has the instruction."""
    counts: dict[str, int] = {}
    symbol = ""
    for line in lines:
        if match := re.search(r"Function : (\S+)", line):
            symbol = match[1]
            counts[symbol] = 0
        elif symbol and re.search(rf"\s{wanted}\.", line):
            counts[symbol] += 1
    return counts


def instruction_errors(counts: dict[str, int], pattern: str, arch: str, wanted: str) -> list[str]:
    chosen = {name: count for name, count in counts.items() if re.search(pattern, name)}
    if not chosen:
        return [f"no function of the {arch} code matches {pattern}"]
    return [f"{name} for {arch}: no {wanted}" for name, count in chosen.items() if not count]


def find_cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec else []
    for folder in folders:
        if (folder / "cuobjdump").exists():
            return str(folder / "cuobjdump")
    found = shutil.which("cuobjdump")
    return found or sys.exit("cuobjdump is neither on PATH nor in Triton's package")


def disassemble(library: str, arch: str) -> list[str]:
    command = [find_cuobjdump(), "-sass", "-arch", arch, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def main(report: str) -> None:
    import spo_ext
    from spo_ext import _C

    print(spo_ext.__file__, spo_ext.build_info())
    usage = parse_report(Path(report).read_text().splitlines())
    print(table(usage))
    errors = spill_errors(usage, HOT)
    for arch, pattern, wanted in TENSOR_CORES:
        counts = instructions(disassemble(_C.__file__, arch), wanted)
        found = instruction_errors(counts, pattern, arch, wanted)
        total = sum(count for name, count in counts.items() if re.search(pattern, name))
        print(f"{arch}: {total} {wanted} instructions in {pattern}")
        errors += found
    for error in errors:
        print(f"FAILED {error}")
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
