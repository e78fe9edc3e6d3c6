"""Packed pooling: equal to torch's pooling of the values, on every level."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import BACKENDS, generator, running_on
from lowbit_ext.binary import avg_pool2d, binarize, global_avg_pool, max_pool2d
from lowbit_ext.binary.activation import invert_words


@st.composite
def windows(draw):
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return dict(
        kernel_size=kernel,
        stride=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        padding=tuple(draw(st.integers(0, k // 2)) for k in kernel),
        ceil_mode=draw(st.booleans()),
    )


@pytest.mark.host_cuda
@settings(max_examples=150, deadline=None)
@given(
    window=windows(),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sizes=st.tuples(
        st.integers(0, 2), st.sampled_from([1, 45, 64, 65, 128, 200]), st.integers(7, 15), st.integers(7, 15)
    ),
    encoding=st.sampled_from(["sign", "step"]),
    include=st.booleans(),
    divisor=st.sampled_from([None, 3]),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_window(window, dilation, sizes, encoding, include, divisor, backend, seed):
    with running_on(backend):
        packed = binarize(torch.randn(sizes, generator=generator(seed)), encoding)
        values = packed.unpack()
        largest = max_pool2d(packed, dilation=dilation, **window).unpack()
        assert torch.equal(largest, F.max_pool2d(values, dilation=dilation, **window))
        # Counts are exact; torch divides the same integers in float32.
        mean = avg_pool2d(packed, count_include_pad=include, divisor_override=divisor, **window)
        expected = F.avg_pool2d(values, count_include_pad=include, divisor_override=divisor, **window)
        assert torch.equal(mean, expected)


@pytest.mark.parametrize(("channels", "size"), itertools.product([1, 63, 64, 65, 512], [(1, 1), (7, 7), (56, 3)]))
def test_global_average(backend, channels, size, rng):
    for encoding in ("sign", "step"):
        packed = binarize(torch.randn(3, channels, *size, generator=rng), encoding)
        expected = packed.unpack(torch.float32).double().mean((2, 3), keepdim=True).float()
        assert torch.equal(global_avg_pool(packed), expected)


@pytest.mark.parametrize("channels", [5, 64, 100, 129])
def test_inverted_channels_take_the_minimum(backend, channels, rng):
    packed = binarize(torch.randn(2, channels, 8, 9, generator=rng))
    flip = torch.rand(channels, generator=rng) < 0.5
    pooled = max_pool2d(packed, 3, 2, 1, invert=invert_words(flip)).unpack()
    values = packed.unpack()
    smallest = -F.max_pool2d(-values, 3, 2, 1)
    assert torch.equal(pooled, torch.where(flip.view(-1, 1, 1), smallest, F.max_pool2d(values, 3, 2, 1)))


def test_threads_do_not_change_bits(backend, threads, rng):
    packed = binarize(torch.randn(4, 130, 31, 33, generator=rng))
    assert torch.equal(max_pool2d(packed, 3, 2, 1).unpack(), F.max_pool2d(packed.unpack(), 3, 2, 1))
    assert torch.equal(avg_pool2d(packed, 3, 2, 1), F.avg_pool2d(packed.unpack(), 3, 2, 1))
