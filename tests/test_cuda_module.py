"""What _native makes of the CUDA module: its refusals, and the device and stream behind every call."""

import importlib
import os
import subprocess
import sys
import weakref

import pytest
import torch

from lowbit_ext import _native


class Module:
    """Stands in for lowbit_ext._cuda on a machine with one device."""

    def __init__(self, architecture, built="75 80 90a", virtual="90a"):
        self.architecture = lambda index: architecture if index == 0 else -1
        self.architectures, self.virtual_architectures = (lambda: built), (lambda: virtual)
        self.last_error_text = lambda: "invalid device ordinal"
        self.binary_conv2d = self.binary_conv2d_epilogue = lambda *arguments: arguments
        self.binary_conv2d_default_engine = lambda index: 1 if architecture >= 80 else 0
        self.binary_conv2d_has_engine = lambda engine, index: engine <= self.binary_conv2d_default_engine(index)
        self.binary_conv2d_workspace_bytes = lambda *arguments: arguments
        self.popcount_peak = self.popcount_peak_operations = lambda *arguments: arguments
        self.unpack = lambda *arguments: arguments


def test_device_and_stream_stand_behind_the_arguments():
    kernels = _native.CudaKernels(Module(90), 0, lambda index: 1000 + index)
    assert kernels.unpack(1, 2) == (1, 2, 0, 1000)
    assert kernels.binary_conv2d_workspace_bytes(1, 2) == (1, 2, 0)
    assert kernels.level == "cuda:0 sm_90"


def test_workspace_is_held_by_its_caller_alone():
    class Workspace:
        pass

    class Tensor:
        is_cuda = True

        def new_empty(self, size, dtype):
            assert (size, dtype) == (100, torch.uint8)
            return Workspace()

    workspace = _native.workspace(100, Tensor())
    held = weakref.ref(workspace)
    del workspace
    assert held() is None


def test_engine_stands_before_the_device():
    kernels = _native.CudaKernels(Module(90), 0, lambda index: 1000)
    assert kernels.binary_conv2d(1, 2) == kernels.binary_conv2d_epilogue(1, 2) == (1, 2, 1, 0, 1000)
    chosen = _native.CudaKernels(Module(90), 0, lambda index: 1000, "popcount")
    assert chosen.engine == "popcount"
    assert chosen.binary_conv2d(1, 2) == (1, 2, 0, 0, 1000)


def test_engine_that_the_device_does_not_have():
    assert _native.CudaKernels(Module(75), 0, lambda index: 0).engine == "popcount"
    with pytest.raises(RuntimeError) as raised:
        _native.CudaKernels(Module(75), 0, lambda index: 0, "mma")
    assert str(raised.value) == "LOWBIT_CUDA_ENGINE: cuda:0 sm_75 cannot run mma; it can run popcount"


def test_engine_that_does_not_exist():
    command = [sys.executable, "-I", "-c", "import lowbit_ext"]
    done = subprocess.run(command, env={**os.environ, "LOWBIT_CUDA_ENGINE": "dp4a"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: LOWBIT_CUDA_ENGINE: expected one of {', '.join(_native.CUDA_ENGINES)}, got 'dp4a'"
    )


def test_device_that_cuda_does_not_know():
    with pytest.raises(RuntimeError, match=r"^lowbit_ext: no CUDA device 3: invalid device ordinal$"):
        _native.CudaKernels(Module(90), 3, lambda index: 0)


def test_device_that_is_too_old():
    with pytest.raises(RuntimeError) as raised:
        _native.CudaKernels(Module(61), 0, lambda index: 0)
    assert str(raised.value) == (
        "lowbit_ext: cuda:0 has compute capability 6.1, this installation was built for 75 80 90a, with PTX of 90a for "
        "others"
    )


ALL, PTX = ["75", "80", "86", "89", "90a", "100", "120"], ["100", "120"]


@pytest.mark.parametrize(
    ("architecture", "built", "virtual", "code"),
    [
        (75, ALL, PTX, "75"), (87, ALL, PTX, "86"), (89, ALL, PTX, "89"), (90, ALL, PTX, "90a"), (103, ALL, PTX, "100"),
        (110, ALL, PTX, "100"), (121, ALL, PTX, "120"), (130, ALL, PTX, "120"), (70, ALL, PTX, None),
        (90, ["75"], ["75"], "75"), (90, ["80"], ["80"], "80"), (100, ["90a"], ["90a"], None),
        (80, ["86"], ["86"], None),
    ],
)
def test_code_that_a_device_runs(architecture, built, virtual, code):
    assert _native.code_of(architecture, built, virtual) == code


@pytest.mark.parametrize(
    ("built", "engines"), [("75", ("popcount",)), ("80", ("popcount", "mma")), ("90a", ("popcount", "mma"))]
)
def test_engines_are_those_of_the_code(built, engines):
    """On a 9.0 that a module for older devices serves by its PTX, an engine that it has none of would give garbage."""
    kernels = _native.CudaKernels(Module(90, built, built), 0, lambda index: 0)
    assert kernels.engines == engines
    assert kernels.engine == engines[-1]


def test_module_that_was_not_built(monkeypatch):
    _native.cuda_module.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^lowbit_ext: this installation has no CUDA kernels, .*LOWBIT_CUDA=on"):
        _native.cuda_module()


def test_module_without_a_driver():
    """The module loads on every machine; what CUDA refuses names CUDA's reason."""
    if importlib.util.find_spec("lowbit_ext._cuda") is None or torch.cuda.is_available():
        pytest.skip("needs the CUDA module and no GPU")
    module = _native.cuda_module()
    assert module.architecture(0) == -1
    words, values = torch.zeros(1, dtype=torch.int64), torch.empty(1)
    status = module.unpack(words.data_ptr(), 1, 1, 0.0, 1.0, values.data_ptr(), 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"^unpack: CUDA reports: .*\(cudaError\w+\)(: no driver was found)?$"):
        _native.check("unpack", status)
