"""Fixtures shared by all tests.

A test that takes `backend` runs under every instruction set of the CPU and on a GPU where there is one; one that takes
`device` runs under the active instruction set and on a GPU. On a GPU, tensors that the test makes are there: it is
torch's default device, and that of the generator `rng`. LOWBIT_HOST_CUDA names the module `_cuda` built for the host
(tests/host_cuda): then both also run the CUDA kernels, on tensors of the CPU, in tests with the mark `host_cuda`, which
a test sets itself where it chooses among BACKENDS or DEVICES.
"""

import contextlib
import functools
import importlib.util
import os

import pytest
import torch

from lowbit_ext import _native

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []),
           *(["host_cuda"] if os.environ.get("LOWBIT_HOST_CUDA") else [])]
BACKENDS = [*_native.available_isas(), *DEVICES[1:]]


def marked(names):
    """Parameters of a fixture, with the mark of the host's CUDA kernels."""
    return [pytest.param(name, marks=pytest.mark.host_cuda) if name == "host_cuda" else name for name in names]


@functools.cache
def host_cuda(engine=""):
    """The CUDA kernels compiled for the host, with an engine of the convolution."""
    spec = importlib.util.spec_from_file_location("_cuda", os.environ["LOWBIT_HOST_CUDA"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _native.CudaKernels(module, 0, lambda index: 0, engine)


@contextlib.contextmanager
def running_on(backend):
    """Calls run on `backend`: an instruction set, which is proven to have run, or one of DEVICES."""
    if backend == "cpu":
        yield
    elif backend == "cuda":
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # the references are float32 or float64
        with torch.device("cuda"):
            yield
        torch.backends.cudnn.allow_tf32 = before
    elif backend == "host_cuda":
        host = host_cuda()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_native, "kernels", lambda tensor: host)
            yield
    else:
        before = _native.active_isa()
        _native.select_isa(backend)
        try:
            yield
            assert _native.active_isa() == backend
        finally:
            _native.select_isa(before)


@pytest.fixture(params=marked(BACKENDS))
def backend(request):
    """Name of what the test runs on."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=marked(DEVICES))
def device(request):
    """Name of what the test runs on."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=_native.ISA_LEVELS)
def isa(request):
    """Runs a test under one instruction-set level of the CPU; skips what the machine cannot run."""
    if request.param not in _native.available_isas():
        pytest.skip(f"this machine cannot run {request.param}")
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs a test with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    assert _native.cpu.threads() == request.param
    yield request.param
    torch.set_num_threads(before)


def generator(seed):
    """A seeded generator of the device that the test runs on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@contextlib.contextmanager
def defaults(dtype, device):
    """Torch's default dtype and device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def rng():
    """A seeded generator."""
    return generator(20260101)


def sum_bound(terms, magnitude, dtype=torch.float32):
    """Bound on the rounding of a sum of products taken in any order, whose absolute values sum to `magnitude`.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, equation 3.5: n u / (1 - n u).
    """
    error = terms * torch.finfo(dtype).eps / 2
    return error / (1 - error) * magnitude
