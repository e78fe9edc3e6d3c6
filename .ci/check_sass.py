"""Gate over the machine code of the CUDA module: python .ci/check_sass.py MODULE NVCC [--write]

For each of the architectures below: no kernel keeps anything in local memory, the kernels that stream memory load or
store 16 bytes at a time, the convolution is made of the tensor cores' instruction for bits, and registers are those of
the table beside this file, which --write brings up to date; of another compiler than the table's they are not compared.
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

ARCHITECTURES = ("sm_80", "sm_90a")
TABLE = Path(__file__).with_name("sass_registers.txt")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")

# What a kernel must hold, said above it: // SASS of KERNEL: INSTRUCTION, ... or, for a single architecture, // SASS on
# ARCHITECTURE of ...; KERNEL is a pattern. Those whose addresses may be aligned to one element only have no such line:
# the launchers take them where the others do not fit.
REQUIREMENT = re.compile(r"// SASS (?:on (sm_\w+) )?of (.+): ([\w.]+(?:, [\w.]+)*)")
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
    parser.add_argument("--write", action="store_true", help="replace the table of registers")
    options = parser.parse_args()
    release = re.search(r"V([\d.]+)", run(options.nvcc, "--version"))
    compiler = f"nvcc {release[1] if release else 'of unknown release'}"
    faults, lines = [], [compiler]
    for architecture in ARCHITECTURES:
        code = machine_code(options.module, architecture)
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
        counts = registers(options.module, architecture)
        if counts.keys() != code.keys():
            faults.append(f"{architecture}: kernels without code or resource usage: {set(counts) ^ set(code)}")
        lines += [f"{architecture} {count:4} {kernel}" for kernel, count in sorted(counts.items())]
    known = [] if options.write else TABLE.read_text().splitlines()
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    elif known[0] != compiler:
        print(f"registers not compared: the table is of {known[0]}, the module of {compiler}")
    elif known != lines:
        differing = sorted(set(known) ^ set(lines))
        faults.append("registers differ from .ci/sass_registers.txt (--write replaces it): " + "; ".join(differing[:6]))
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(lines) - 1} kernels of {', '.join(ARCHITECTURES)}: no local memory, wide moves, bit matrices")


if __name__ == "__main__":
    main()
