"""Build step of lowbit_ext: runs CMake on csrc/ and places the native module in the package. Never imports torch.

Environment:
    MAX_JOBS: parallel compile jobs; default: the number of CPUs.
    CMAKE_ARGS: further arguments for CMake.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds with CMake; the build folder is kept per interpreter: a rebuild compiles what changed."""

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        destination = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build_folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_folder.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build_folder}",
            "-GNinja",
            # Passed each time: an isolated build leaves the path of its own, by then deleted, tools in the cache.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
            "-DCMAKE_BUILD_TYPE=Release",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_folder), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("lowbit_ext._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
