"""Gate over the machine code of the CUDA module: python .ci/check_sass.py MODULE NVCC [--write]

For each of the architectures below: no kernel keeps anything in local memory, the kernels that stream memory load or
store 16 bytes at a time, the convolution is made of the tensor cores' instruction for bits, and registers are those of
the table beside this file, which --write brings up to date; of another compiler than the table's they are not compared.
So are instructions: those of an output of the convolution's epilogue, and those of a thread for 16 bytes of the kernels
that stream memory, with the share of issue slots that they take at full bandwidth (sass_paths.py says what is counted).
Needs cuobjdump and nvdisasm (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) and c++filt.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import sass_paths

ARCHITECTURES = ("sm_80", "sm_90a")
TABLE = Path(__file__).with_name("sass_registers.txt")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")

# What a kernel must hold, said above it: // SASS of KERNEL: INSTRUCTION, ... or, for a single architecture, // SASS on
# ARCHITECTURE of ...; KERNEL is a pattern. Those whose addresses may be aligned to one element only have no such line:
# the launchers take them where the others do not fit.
REQUIREMENT = re.compile(r"// SASS (?:on (sm_\w+) )?of (.+): ([\w.]+(?:, [\w.]+)*)")
# What is counted, said above the kernel too: // Count of KERNEL, WHAT: N INSTRUCTION, ...; and then either the bytes
# that a thread moves by them, or "each of N" where a loop makes so many outputs by them.
COUNTED = "sm_90a"
COUNTS = Path(__file__).with_name("sass_counts.txt")
COUNT = re.compile(r"// Count of (.+), ([\w ]+): (\d+ [\w.]+(?:, \d+ [\w.]+)*); (?:([\d.]+) bytes|each of (\d+))")
# Bytes and instructions a second: 3.0 TB/s; 132 multiprocessors, 4 warps a clock, 32 lanes, 1.75 GHz.
BYTES, ISSUED = 3.0e12, 132 * 4 * 32 * 1.75e9
SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"


def required(architecture: str) -> Iterator[tuple[str, str]]:
    """Patterns of kernels, and the instructions that each of them must hold."""
    for path in sorted(SOURCES.glob("*.cu")):
        for line in path.read_text().splitlines():
            if not line.startswith("// SASS"):
                continue
            match = REQUIREMENT.fullmatch(line) or sys.exit(f"{path}: cannot read {line!r}")
            only, kernel, instructions = match.groups()
            if only in (None, architecture):
                yield from ((kernel, instruction) for instruction in instructions.split(", "))


def run(*command: str) -> str:
    """Output of a tool; its own message where it fails."""
    folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout


def readable(names: list[str]) -> list[str]:
    """Demangled kernels without namespaces and parameters."""
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for line in lines.splitlines():
        name = re.sub(r"lowbit::(cuda::)?(\(anonymous namespace\)::)?", "", line)
        name = re.sub(r"\((FloatType|bool|int)\)", "", name.removeprefix("void "))
        short.append(re.sub(r"\(.*", "", name))
    return short


def machine_code(module: str, architecture: str) -> dict[str, str]:
    """Instructions of each kernel."""
    parts = re.split(r"^\s*Function : (\S+)$", run("cuobjdump", "-arch", architecture, "-sass", module), flags=re.M)
    return dict(zip(readable(parts[1::2]), parts[2::2], strict=True))


def count(line: str, match: re.Match[str], code: dict[str, str]) -> str:
    """A line of the table of counts."""
    kernel, what, opcodes, moved, outputs = match.groups()
    work = {opcode: int(number) for number, opcode in (part.split() for part in opcodes.split(", "))}
    if kernel not in code:
        sys.exit(f"{line}: no such kernel")
    number = sass_paths.fewest(code[kernel], work) if moved else sass_paths.each(code[kernel], work)
    if number is None:
        sys.exit(f"{line}: no path through the kernel has these instructions")
    if not moved:
        return f"{number / int(outputs):6.1f} an output     {kernel}, {what}"
    share = number / float(moved) * BYTES / ISSUED
    return f"{16 * number / float(moved):6.1f} per 16 bytes {share:5.0%} {kernel}, {what}"


def counts(code: dict[str, str]) -> list[str]:
    """The table of counts."""
    lines = []
    for path in sorted(SOURCES.glob("*.cu")):
        for line in path.read_text().splitlines():
            if line.startswith("// Count of"):
                match = COUNT.fullmatch(line) or sys.exit(f"{path}: cannot read {line!r}")
                lines.append(count(line, match, code))
    return lines


def registers(module: str, architecture: str) -> dict[str, int]:
    """Registers of each kernel."""
    found = re.findall(
        r"Function (\S+):\s*\n\s*REG:(\d+)", run("cuobjdump", "-arch", architecture, "-res-usage", module)
    )
    return dict(zip(readable([name for name, _ in found]), (int(count) for _, count in found), strict=True))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("nvcc", help="the compiler it was built with")
    parser.add_argument("--write", action="store_true", help="replace the tables of registers and counts")
    options = parser.parse_args()
    release = re.search(r"V([\d.]+)", run(options.nvcc, "--version"))
    compiler = f"nvcc {release[1] if release else 'of unknown release'}"
    faults, lines, counted = [], [compiler], [compiler]
    for architecture in ARCHITECTURES:
        code = machine_code(options.module, architecture)
        if architecture == COUNTED:
            counted += counts(code)
        for kernel, text in code.items():
            if LOCAL_MEMORY.search(text):
                faults.append(f"{architecture} {kernel}: uses local memory")
        for pattern, instruction in required(architecture):
            matching = {kernel: text for kernel, text in code.items() if re.match(pattern, kernel)}
            if not matching:
                faults.append(f"{architecture}: no kernel {pattern}")
            faults += [
                f"{architecture} {kernel}: no {instruction}"
                for kernel, text in matching.items()
                if instruction not in text
            ]
        of_kernels = registers(options.module, architecture)
        if of_kernels.keys() != code.keys():
            faults.append(f"{architecture}: kernels without code or resource usage: {set(of_kernels) ^ set(code)}")
        lines += [f"{architecture} {number:4} {kernel}" for kernel, number in sorted(of_kernels.items())]
    for table, now in ((TABLE, lines), (COUNTS, counted)):
        known = [] if options.write else table.read_text().splitlines()
        if options.write:
            table.write_text("\n".join(now) + "\n")
        elif known[0] != compiler:
            print(f"{table.name} not compared: it is of {known[0]}, the module of {compiler}")
        elif known != now:
            differing = sorted(set(known) ^ set(now))
            faults.append(f"other than .ci/{table.name} (--write replaces it): " + "; ".join(differing[:6]))
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(lines) - 1} kernels of {', '.join(ARCHITECTURES)}: no local memory, wide moves, bit matrices")


if __name__ == "__main__":
    main()
