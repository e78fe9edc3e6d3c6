"""The fewest instructions by which a kernel can do a piece of work, read from its machine code.

A piece of work is named by what it must execute, as {"LDG.E.128": 4, "STG.E": 4}. Of all paths through the kernel that
execute each of these so often or more, the shortest is counted: the path of whole packs, without the branches for tails
and for what is rare. A warp issues an instruction once whether its lanes' predicates let it act or not, so all on the
path count. It is a lower bound of what a warp issues.

    python .ci/sass_paths.py MODULE ARCHITECTURE KERNEL COUNT OPCODE [COUNT OPCODE ...]
"""

from __future__ import annotations

import heapq
import itertools
import re
import sys
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)(.*?);")
EXIT, RETURN = -1, -2  # as successors
LONGEST = 20_000  # instructions of a path, where loops would let a search go on


class Instruction(NamedTuple):
    """One line of the machine code."""

    address: int
    guarded: bool
    opcode: str
    operands: str


class Block(NamedTuple):
    """Instructions that are executed one after the other, and where control may go behind them."""

    opcodes: list[str]
    successors: list[int]
    calls: int | None  # the last instruction's target where it is a call


def instructions(code: str) -> list[Instruction]:
    """The lines of one kernel as cuobjdump prints them."""
    return [
        Instruction(int(address, 16), guard != "", opcode, operands)
        for address, guard, opcode, operands in LINE.findall(code)
    ]


def target(instruction: Instruction) -> int | None:
    """Address that a branch or a call goes to."""
    found = re.search(r"0x([0-9a-f]+)$", instruction.operands.strip())
    return int(found[1], 16) if instruction.opcode.startswith(("BRA", "CALL")) and found else None


def successors(instruction: Instruction, following: int) -> list[int]:
    """Where control may go behind an instruction; a conditional branch has an operand beside its target, or a guard."""
    conditional = instruction.guarded or "," in instruction.operands
    if instruction.opcode.startswith("BRA"):
        to = target(instruction)
        return ([] if to is None else [to]) + ([following] if conditional else [])
    if instruction.opcode == "EXIT":
        return [EXIT, following] if instruction.guarded else [EXIT]
    if instruction.opcode.startswith("RET"):
        return [RETURN]
    return [] if instruction.opcode.startswith("BRX") else [following]


def flow_graph(code: list[Instruction]) -> dict[int, Block]:
    """Blocks of a kernel by their first address. A computed branch may go wherever nothing else leads to."""
    following = {now.address: then.address for now, then in itertools.pairwise(code)}
    ways = {line.address: successors(line, following.get(line.address, EXIT)) for line in code}
    reached = {to for way in ways.values() for to in way} | {code[0].address}
    computed = [line.address for line in code if line.address not in reached and line.opcode != "NOP"]
    for line in code:
        if line.opcode == "BRX":
            ways[line.address] = computed
    starts = {code[0].address} | {to for way in ways.values() if len(way) != 1 for to in way}
    starts |= {to for line in code if (to := target(line)) is not None} | set(computed)
    blocks: dict[int, Block] = {}
    opcodes: list[str] = []
    first = code[0].address
    for line in code:
        opcodes.append(line.opcode)
        way = ways[line.address]
        calls = target(line) if line.opcode.startswith("CALL") else None
        if calls is None and way == [following.get(line.address)] and way[0] not in starts:
            continue
        blocks[first] = Block(opcodes, way, calls)
        opcodes, first = [], following.get(line.address, EXIT)
    return blocks


def shortest(graph: dict[int, Block], start: int, work: dict[str, int], end: int = EXIT) -> int | None:
    """Length of the shortest path from `start` to `end` that executes every opcode of `work` so many times."""
    wanted = tuple(work.values())
    done_in = {first: tuple(block.opcodes.count(opcode) for opcode in work) for first, block in graph.items()}
    if any(most > 0 and not any(done[i] for done in done_in.values()) for i, most in enumerate(wanted)):
        return None
    queue = [(0, start, (0,) * len(wanted))]
    seen = set()
    while queue:
        length, address, done = heapq.heappop(queue)
        if address == end and done == wanted:
            return length
        if address not in graph or (address, done) in seen or length > LONGEST:
            continue
        seen.add((address, done))
        block = graph[address]
        then = tuple(min(a + b, most) for a, b, most in zip(done, done_in[address], wanted, strict=True))
        longer = length + len(block.opcodes)
        if block.calls is not None:
            # One that never comes back is a branch; so is all that a subroutine calls.
            heapq.heappush(queue, (longer, block.calls, then))
            longer += LONGEST if end == RETURN else shortest(graph, block.calls, {}, RETURN) or LONGEST
        for to in block.successors:
            heapq.heappush(queue, (longer, to, then))
    return None


def fewest(code: str, work: dict[str, int]) -> int | None:
    """Instructions of the shortest path through a kernel that does the work; None: there is none."""
    graph = flow_graph(instructions(code))
    return shortest(graph, next(iter(graph)), work)


def each(code: str, work: dict[str, int]) -> float | None:
    """Instructions that a piece of work adds to a path which has already been through it, as a loop's pass does."""
    once, twice = fewest(code, work), fewest(code, {opcode: 2 * count for opcode, count in work.items()})
    return None if once is None or twice is None else twice - once


def main() -> None:
    """Command line entry."""
    from check_sass import machine_code  # which imports this file

    module, architecture, kernel, *words = sys.argv[1:]
    work = {opcode: int(count) for count, opcode in zip(words[::2], words[1::2], strict=True)}
    for name, code in machine_code(module, architecture).items():
        if re.match(kernel, name):
            print(f"{architecture} {name}: {fewest(code, work)} instructions, {each(code, work)} each")


if __name__ == "__main__":
    main()
