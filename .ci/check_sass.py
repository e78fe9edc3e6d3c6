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
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90a")
TABLE = Path(__file__).with_name("sass_registers.txt")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")

# Kernels by name, and what each of them must hold. Those whose addresses may be aligned to one element only are not
# listed: the launchers take them where the listed ones do not fit.
REQUIRED = [
    (r"binarize_channels_last_kernel<.*, true>", r"LDG\.E\.128"),
    (r"binarize_planar_kernel<.*, true>", r"LDG\.E\.128"),
    (r"binary_conv2d_kernel<MmaEngine>", r"LDGSTS\.E\.BYPASS\.128"),
    (r"binary_conv2d_kernel<MmaEngine>", r"BMMA\.168256\.AND\.POPC"),
    (r"^popcount_peak_kernel", r"BMMA\.168256\.AND\.POPC"),
    (r"unpack_kernel<.*, [48]>", r"STG\.E\.128"),
    (r"quantized_activation_kernel", r"LDG\.E\.128"),
    (r"quantized_activation_kernel", r"STG\.E\.128"),
    (r"masked_gradient_kernel", r"LDG\.E\.128"),
    (r"masked_gradient_kernel", r"STG\.E\.128"),
    (r"batch_norm_relu_quantize_kernel", r"LDG\.E\.128"),
    (r"batch_norm_relu_quantize_kernel", r"STG\.E\.128"),
    (r"batch_norm_relu_backward_kernel", r"LDG\.E\.128"),
    (r"batch_norm_relu_backward_kernel", r"STG\.E\.128"),
    (r"sum_(pixels|rows)_kernel", r"LDG\.E\.128"),
    (r"channel_dequantize_kernel", r"STG\.E\.128"),
    (r"group_quantize_kernel", r"LDG\.E\.128"),
    (r"group_dequantize_kernel", r"STG\.E\.128"),
]
# The same of single architectures.
REQUIRED_ON = {
    "sm_90a": [
        (r"binary_conv2d_kernel<WgmmaEngine>", r"LDGSTS\.E\.BYPASS\.128"),
        (r"binary_conv2d_kernel<WgmmaEngine>", r"BGMMA\.64x144x256\.AND\.POPC"),
        (r"warpgroup_popcount_peak_kernel", r"BGMMA\.64x144x256\.AND\.POPC"),
    ],
}


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
        for pattern, instruction in [*REQUIRED, *REQUIRED_ON.get(architecture, [])]:
            matching = {kernel: text for kernel, text in code.items() if re.search(pattern, kernel)}
            if not matching:
                faults.append(f"{architecture}: no kernel {pattern}")
            faults += [
                f"{architecture} {kernel}: no {instruction}"
                for kernel, text in matching.items()
                if not re.search(instruction, text)
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
