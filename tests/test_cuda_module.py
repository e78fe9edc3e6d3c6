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

    def __init__(self, architecture):
        self.architecture = lambda index: architecture if index == 0 else -1
        self.architectures = lambda: "75 80 90a"
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
        "lowbit_ext: cuda:0 has compute capability 6.1, this installation was built for 7.5 and later"
    )


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
    with pytest.raises(RuntimeError, match=r"^unpack: CUDA reports: .*\(cudaError\w+\)$"):
        _native.check("unpack", status)
