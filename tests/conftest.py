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


@contextlib.contextmanager
def one_thread():
    """Sums in the order of processes that have one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
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


def assert_as_good(got, plain, exact, what=""):
    """The error is at most twice that of plain float32 torch, counted in its largest element."""
    bound = 2 * (plain.double() - exact).abs().max().item() if exact.numel() else 0.0
    spacing = 4e-7 * exact.abs().max().item() if exact.numel() else 0.0  # torch may be exact where we round once
    error = (got.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert got.shape == exact.shape
    assert error <= max(bound, spacing), f"{what}: error {error:.3g}, torch's {bound / 2:.3g}"


def sum_bound(terms, magnitude, dtype=torch.float32):
    """Bound on the rounding of a sum of products taken in any order, no partial sum of which exceeds `magnitude`.

    Partial sums never exceed the sum of absolute values; those of terms of both signs are about as large as the largest
    results of a tensor. Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, sections 3.1 and 4.2.
    """
    error = terms * torch.finfo(dtype).eps / 2
    return error / (1 - error) * magnitude


def assert_gradient(got, plain, exact, terms, what=""):
    """A gradient of a binary convolution: our kernels' is as good as torch's.

    On a GPU torch's own convolution sums `terms` products, in an order of its choice.
    """
    if hasattr(_native.kernels(got), "binary_conv2d_input_grad"):
        assert_as_good(got, plain, exact, what)
    else:
        bound = sum_bound(terms, 4 * float(exact.abs().max()) if exact.numel() else 0.0)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=bound, msg=lambda text: f"{what}: {text}")


def surrogate_tolerances(surrogate, dtype, grad=1.0):
    """Of a surrogate's derivative at x times gradients up to `grad`: two roundings to the type, and that of 2x - 1.

    A unit of the latter, near x = 1, moves a derivative by up to 4 units. swish_sign's moves by 70 and rounds by 23
    itself, in float32 or float64; its formula in the float64 reference by 146.
    """
    eps = torch.finfo(dtype).eps
    if surrogate == "swish_sign":
        units = (70 + 23 + 146) * 2.0**-53 if dtype == torch.float64 else (70 + 23) * 2.0**-24
        return {"rtol": eps, "atol": units * grad}
    return {"rtol": eps, "atol": 4 * eps / 2 * grad}
