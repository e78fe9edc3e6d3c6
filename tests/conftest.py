"""Fixtures shared by all tests."""

import pytest
import torch

from lowbit_ext import _native


@pytest.fixture(params=_native.ISA_LEVELS)
def isa(request):
    """Runs a test under one instruction-set level and proves that it ran; skips what the machine cannot run."""
    if request.param not in _native.available_isas():
        pytest.skip(f"this machine cannot run {request.param}")
    before = _native.active_isa()
    _native.select_isa(request.param)
    assert _native.active_isa() == request.param
    yield request.param
    assert _native.active_isa() == request.param
    _native.select_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs a test with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    assert _native.cpu.threads() == request.param
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def rng():
    """A seeded generator."""
    return torch.Generator().manual_seed(20260101)
