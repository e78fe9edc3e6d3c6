"""Build step of lowbit_ext: runs CMake on csrc/ and places the native modules in the package. Never imports torch.

Environment:
    MAX_JOBS: parallel compile jobs; default: the number of CPUs.
    LOWBIT_CUDA: `auto` builds the CUDA module where nvcc is found, `on` requires it, `off` leaves it out.
    LOWBIT_CUDA_ARCHS: compute capabilities to build for, such as `80;90a`; default: all that nvcc knows of
        75;80;86;89;90a;100;120.
    CUDACXX, CUDA_HOME: where nvcc is, if not on PATH or in /usr/local/cuda/bin.
    CMAKE_ARGS: further arguments for CMake.
"""

import filecmp
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """Path of nvcc; what the environment names goes before PATH."""
    candidates = [os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    if os.environ.get("CUDA_HOME"):
        candidates.insert(1, os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    return next((path for candidate in candidates if candidate and (path := shutil.which(candidate))), None)


def choose_nvcc() -> str | None:
    """The nvcc to build the CUDA module with; None: without the module."""
    wish = os.environ.get("LOWBIT_CUDA") or "auto"
    if wish not in ("auto", "on", "off"):
        sys.exit(f"lowbit_ext: LOWBIT_CUDA must be auto, on or off, got {wish!r}")
    nvcc = None if wish == "off" else find_nvcc()
    if wish == "on" and nvcc is None:
        sys.exit(
            "lowbit_ext: LOWBIT_CUDA=on needs nvcc: on PATH, in $CUDACXX, $CUDA_HOME/bin or /usr/local/cuda/bin"
        )
    return nvcc


def copy_if_different(source: str, target: str) -> None:
    """Copies a file; one of the same content keeps its time, by which ninja judges what is to be compiled."""
    if not (os.path.exists(target) and filecmp.cmp(source, target, shallow=False)):
        shutil.copyfile(source, target)


NVCC = choose_nvcc()
MODULES = ["_cpu", "_cuda"] if NVCC else ["_cpu"]


class CMakeBuild(build_ext):
    """Configures and builds with CMake; the build folder is kept per interpreter: a rebuild compiles what changed."""

    def build_extensions(self) -> None:
        import pybind11

        if NVCC is None:
            reason = "LOWBIT_CUDA=off" if os.environ.get("LOWBIT_CUDA") == "off" else "no nvcc found"
            print(f"lowbit_ext: without the CUDA module: {reason}", file=sys.stderr, flush=True)
        destination = Path(self.get_ext_fullpath("lowbit_ext._cpu")).resolve().parent
        build_folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # An isolated build has pybind11 in a folder of its own, new every time: a changed include path compiles anew.
        pybind = build_folder / "pybind11"
        shutil.copytree(
            Path(pybind11.__file__).parent, pybind, copy_function=copy_if_different, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build_folder}",
            "-GNinja",
            # Passed each time: an isolated build leaves the path of its own, by then deleted, tools in the cache.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind / 'share' / 'cmake' / 'pybind11'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DLOWBIT_CUDA={'ON' if NVCC else 'OFF'}",
            f"-DLOWBIT_CUDA_ARCHS={os.environ.get('LOWBIT_CUDA_ARCHS', '')}",
            *([f"-DCMAKE_CUDA_COMPILER={NVCC}"] if NVCC else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_folder), "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension(f"lowbit_ext.{module}", sources=[]) for module in MODULES],
    cmdclass={"build_ext": CMakeBuild},
)
