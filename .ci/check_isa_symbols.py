"""Gate on the compiled objects: no code of a higher instruction set can reach an older CPU.

The linker keeps one copy of an inline function that several objects hold. Were it the copy of an AVX-512 object, an
older CPU would die of an illegal instruction in code that has nothing to do with AVX-512. So, in a CMake build folder:

* an object of a level holds no weak symbol, makes only lowbit::<level>::<op> visible, and calls nothing but memory
  functions and the entries of lower levels;
* no object uses registers or instructions of a level above its own; dispatch, launchers and binding count as scalar.

Usage: check_isa_symbols.py BUILD_FOLDER
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LEVELS = ("scalar", "avx2", "avx512", "amx")

# In CMake's object folders <target>.dir: the level whose instructions a target may use.
LEVEL_OF_TARGET = {
    "lowbit_scalar": "scalar",
    "lowbit_avx2": "avx2",
    "lowbit_avx512": "avx512",
    "lowbit_amx": "amx",
    "lowbit_glue": "scalar",
    "_cpu": "scalar",  # the binding
}
GLUE_TARGETS = {"lowbit_glue", "_cpu"}

# What a kernel may call: the compiler puts memory functions in place of loops, libgcc's count in place of POPCNT, and
# the C library's fused multiply-add, exact on every CPU, in place of VFMADD.
ALLOWED_CALLS = {"_GLOBAL_OFFSET_TABLE_", "__popcountdi2", "fmaf", "memcmp", "memcpy", "memmove", "memset"}

# What the step from a level to the next brings, in objdump's spelling. Every mnemonic that starts with v is AVX or
# later, but for a few system instructions. TZCNT is absent: its encoding runs, as BSF, on every x86-64.
BROUGHT_BY_NEXT_LEVEL = {
    "scalar": (
        r"%ymm\d",
        r"^(?:\{\w+\} )?v(?!err|erw|mcall|mmcall)\w+",
        r"^(?:andn|bextr|blsi|blsmsk|blsr|bzhi|lzcnt|mulx|pdep|pext|popcnt|rorx|sarx|shlx|shrx)[lqw]?\b",
    ),
    "avx2": (r"%zmm\d", r"%k[0-7]\b", r"%[xy]mm(?:1[6-9]|2\d|3[01])\b"),
    "avx512": (r"%tmm\d",),
    "amx": (),
}


def forbidden_at(level: str) -> re.Pattern[str]:
    """Matches an instruction that is above a level."""
    patterns = [pattern for at in LEVELS[LEVELS.index(level) :] for pattern in BROUGHT_BY_NEXT_LEVEL[at]]
    return re.compile("|".join(patterns) or r"(?!)")


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbol_errors(path: Path, level: str) -> Iterator[str]:
    """What is wrong with the symbols of an object of one level."""
    callable_levels = "|".join(LEVELS[: LEVELS.index(level)]) or "none"
    for line in output_of("nm", "-C", path).splitlines():
        match = re.fullmatch(r"[0-9a-f ]{16} (\S) (.+)", line)
        if match is None:
            yield f"cannot read nm's line {line!r}"
            continue
        kind, name = match.groups()
        if kind in "uvVwW":
            yield f"weak symbol {name}"
        elif kind == "U":
            if name not in ALLOWED_CALLS and not re.match(rf"lowbit::({callable_levels})::\w+\(", name):
                yield f"call of {name}"
        elif kind.isupper() and not re.match(rf"lowbit::{level}::\w+\(", name):
            yield f"visible symbol {name}"


def instruction_errors(path: Path, level: str) -> Iterator[str]:
    """The first instruction in each function of an object that is above its level."""
    forbidden = forbidden_at(level)
    function, reported = "?", False
    for line in output_of("objdump", "-d", "-C", "--no-show-raw-insn", path).splitlines():
        if line.endswith(">:"):
            function, reported = line[line.index("<") + 1 : -2], False
            continue
        _, tab, instruction = line.partition("\t")
        if tab and not reported and forbidden.search(instruction):
            reported = True
            yield f"{instruction.strip()!r} in {function}"


def objects(build: Path) -> dict[str, list[Path]]:
    """The objects of each target in a build folder."""
    return {target: sorted(build.glob(f"CMakeFiles/{target}.dir/**/*.o")) for target in LEVEL_OF_TARGET}


def main() -> int:
    parser = argparse.ArgumentParser(description="No code of a higher instruction set can reach an older CPU.")
    parser.add_argument("build", type=Path, help="CMake build folder of the Python module")
    by_target = objects(parser.parse_args().build)

    errors = [f"no objects of {target}: not a build of the module?" for target, paths in by_target.items() if not paths]
    for target, paths in by_target.items():
        level = LEVEL_OF_TARGET[target]
        for path in paths:
            found = list(instruction_errors(path, level))
            if target not in GLUE_TARGETS:
                found += symbol_errors(path, level)
            errors += [f"{target} {path.parent.name}/{path.name}: {error}" for error in found]
    for error in errors:
        print(error)
    print(f"{sum(map(len, by_target.values()))} objects, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
