"""Checks compiled CUDA kernels without a GPU: no register spills, matrix instructions in use, and
epilogues on Hopper that stay as short as they were made.

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

from sass import Instruction, count, epilogue, functions

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


class Limit(NamedTuple):
    """What an epilogue may cost (sass.py), and the instructions that show that its work is done."""

    name: str
    work: tuple[str, ...]
    amount: int
    instructions: float
    round_trips: int
    code_kib: int


# Of one thread: 128 logits or, of a gradient, 64 pairs; those of grad_hidden are two loads and two
# stores each. What was reached, with room for another compiler's choices. A softcap's kernels are
# for few models, and long.
HOPPER = r"12sm90_productI"
LIMITS = (
    Limit("Sm90StatisticsILb0E", ("MUFU.EX2",), 128, 15, 4, 120),
    Limit("Sm90StatisticsILb1E", ("MUFU.EX2",), 256, 65, 4, 230),
    Limit("Sm90GradientI.*ELb0E", ("MUFU.EX2",), 128, 16, 4, 120),
    Limit("Sm90GradientI.*ELb1E", ("MUFU.EX2",), 256, 85, 4, 250),
    Limit("Sm90HiddenGradI", ("LDG", "STG"), 256, 20, 12, 90),
    Limit("Sm90WeightGradI", ("STG",), 64, 4, 2, 30),
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


def epilogue_report(bodies: dict[str, list[Instruction]]) -> tuple[list[str], list[str]]:
    """A table of the Hopper kernels' epilogues, and what is over its limit."""
    lines, errors = [f"{'epilogue':24} instructions/element  round trips  code (KiB)"], []
    for limit in LIMITS:
        pattern = re.compile(rf"{HOPPER}.*{limit.name}")
        found = [body for symbol, body in bodies.items() if pattern.search(symbol)]
        if not found:
            errors.append(f"{limit.name}: no such epilogue in the sm_90a code")
        for body in found:
            cost = epilogue(body, limit.work, limit.amount)
            kib = 16 * len(body) / 1024
            lines.append(
                f"{limit.name:24} {cost.instructions:20.1f} {cost.round_trips:12} {kib:11.0f}"
            )
            if not cost.instructions:
                errors.append(f"{limit.name}: no way through it does {limit.amount} {limit.work}")
            for what, value, most in (
                ("instructions an element", cost.instructions, limit.instructions),
                ("round trips to memory", cost.round_trips, limit.round_trips),
                ("KiB of code", kib, limit.code_kib),
            ):
                if value > most:
                    errors.append(f"{limit.name}: {value:.1f} {what}, at most {most} allowed")
    return lines, errors


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
    code = {arch: dict(functions(disassemble(_C.__file__, arch))) for arch in ("sm_90a", "sm_80")}
    for arch, pattern, wanted in TENSOR_CORES:
        counts = {symbol: count(body, wanted) for symbol, body in code[arch].items()}
        found = instruction_errors(counts, pattern, arch, wanted)
        total = sum(count for name, count in counts.items() if re.search(pattern, name))
        print(f"{arch}: {total} {wanted} instructions in {pattern}")
        errors += found
    lines, found = epilogue_report(code["sm_90a"])
    print("\n".join(lines))
    errors += found
    for error in errors:
        print(f"FAILED {error}")
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
