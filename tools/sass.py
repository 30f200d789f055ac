"""Reads kernels from a disassembly (cuobjdump -sass) and counts what their epilogues cost.

An epilogue is what a warp executes between the last matrix instruction of one tile and the first
of the next. It is counted along the shortest way that does all the work, so many exponentials or
stores: that of a tile without bias, label or edge.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

# Sums that one thread holds of a tile of the Hopper kernel: 128 x 256 among 256 threads.
ELEMENTS = 128
_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


class Instruction(NamedTuple):
    address: int
    conditional: bool
    opcode: str
    operands: str


class Epilogue(NamedTuple):
    """The work of one thread for one tile.

    instructions: per element.
    round_trips: how often it waits for loads from memory that were asked for since the last wait.
    """

    instructions: float
    round_trips: int


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    symbol, body = "", list[Instruction]()
    for line in lines:
        if match := re.search(r"Function : (\S+)", line):
            if symbol:
                yield symbol, body
            symbol, body = match[1], []
        elif match := _LINE.search(line):
            body.append(Instruction(int(match[1], 16), bool(match[2]), match[3], match[4].strip()))
    if symbol:
        yield symbol, body


def count(body: list[Instruction], opcode: str) -> int:
    return sum(instruction.opcode.split(".")[0] == opcode for instruction in body)


def _successors(body: list[Instruction]) -> list[list[int]]:
    place = {instruction.address: i for i, instruction in enumerate(body)}
    out = []
    for i, (_, conditional, opcode, operands) in enumerate(body):
        name = opcode.split(".")[0]
        leaves = name in ("BRA", "EXIT", "RET") and not conditional and "DIV" not in opcode
        # A second condition may stand among the operands: BRA !P1, 0x10 or BRA.DIV UR4, 0x10.
        condition = name == "BRA" and "," in operands
        after = [i + 1] if (not leaves or condition) and i + 1 < len(body) else []
        target = re.search(r"0x([0-9a-f]+)$", operands) if name == "BRA" else None
        out.append([place[int(target[1], 16)], *after] if target else after)
    return out


def _cheapest_path(body: list[Instruction], work: tuple[str, ...], amount: int) -> list[int]:
    """The shortest way from one matrix instruction to the next with `amount` instructions that
    begin as one of `work`; empty if there is none."""
    successors = _successors(body)
    ends = {i for i, instruction in enumerate(body) if instruction.opcode.startswith("HGMMA")}
    starts = [i + 1 for i in ends if i + 1 not in ends]
    # Of every node, how many instructions are left if that much work is.
    left = {i: np.where(np.arange(amount + 1) > 0, np.inf, 0.0) for i in ends}
    open_nodes: set[int] = set()
    for start in starts:
        stack = [(start, False)]
        while stack:
            node, visited = stack.pop()
            if visited:
                onward = [left[n] for n in successors[node] if n in left]
                ahead = np.min(onward, axis=0) if onward else left[next(iter(ends))]
                done = body[node].opcode.startswith(work)
                left[node] = 1 + (np.concatenate([ahead[:1], ahead[:-1]]) if done else ahead)
            elif node not in left and node not in open_nodes:
                open_nodes.add(node)  # a later edge to it closes a loop, and is left out
                stack.append((node, True))
                stack += [(n, False) for n in successors[node]]
    node = min(starts, key=lambda n: left[n][amount], default=None)
    path: list[int] = []
    while node is not None and node not in ends and np.isfinite(left[node][amount]):
        path.append(node)
        amount -= body[node].opcode.startswith(work) and amount > 0
        onward = [n for n in successors[node] if n in left and left[n][amount] < np.inf]
        node = min(onward, key=lambda n: left[n][amount], default=None)
    return path


def _registers(operands: str) -> set[int]:
    found = set()
    for number, wide in _REGISTER.findall(operands):
        found |= {int(number), int(number) + 1} if wide else {int(number)}
    return found


def epilogue(body: list[Instruction], work: tuple[str, ...], amount: int) -> Epilogue:
    pending = set[int]()
    trips = 0
    path = _cheapest_path(body, work, amount)
    for instruction in (body[i] for i in path):
        load = instruction.opcode.startswith("LDG")
        target, _, rest = instruction.operands.partition(",")
        if pending & _registers(instruction.operands):
            trips, pending = trips + 1, set()
        if load:
            first = int(_REGISTER.findall(target)[0][0])
            width = 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1
            pending |= set(range(first, first + width))
    return Epilogue(len(path) / ELEMENTS, trips)
