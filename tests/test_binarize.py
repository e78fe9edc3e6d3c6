"""binarize and unpack: every bit equal to a float64 comparison, on every level."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import BACKENDS, generator, running_on
from lowbit_ext import PackedTensor, _native
from lowbit_ext.binary import binarize, ops, unpack
from lowbit_ext.binary.activation import DEFAULT_THRESHOLDS
from reference import binary as reference

# Below, at and past one and two words; BinaryDuo's widths; past eight words.
CHANNELS = [1, 3, 31, 32, 33, 45, 63, 64, 65, 127, 128, 129, 513]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Values on, just beside and far from every comparison: ties, signed zero, denormals, infinities, NaN.
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 6e-8, 0.5, 0.25, 1.0, -1.0, 0.9999, 1.0001, math.inf, -math.inf, math.nan]


def values(shape, rng, dtype):
    """Normal values with every special value sprinkled in."""
    x = torch.randn(shape, generator=rng)
    flat = x.view(-1)
    if flat.numel():
        spots = torch.randint(flat.numel(), (min(flat.numel(), 4 * len(SPECIAL)),), generator=rng)
        flat[spots] = torch.tensor(SPECIAL).repeat(4)[: spots.numel()]
    return x.to(dtype)


def check(x, encoding, threshold=None, flip=None):
    packed = binarize(x, encoding, threshold, flip)
    level = DEFAULT_THRESHOLDS[encoding] if threshold is None else threshold
    expected = reference.activation(x, encoding, level, flip)
    assert packed.shape == x.shape
    assert torch.equal(packed.words, reference.pack(expected)), f"{_native.active_isa()} {tuple(x.shape)}"
    return packed, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_bits_of_every_layout(backend, channels, dtype, rng):
    image = values((2, channels, 5, 7), rng, dtype)
    for x in (
        image,
        image.to(memory_format=torch.channels_last),
        image.transpose(2, 3),  # neither layout: copied once
        image[:, :, 1:4, ::2],
        values((3, channels), rng, dtype),
        values((3, channels, 130), rng, dtype),
        values((3, 130, channels), rng, dtype).movedim(1, 2),  # channels-last (N, C, L)
    ):
        check(x, "sign")
        check(x, "step")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_two_thresholds_a_channel(backend, channels, dtype, rng):
    threshold = torch.randn(2, channels, generator=rng)
    flip = torch.rand(2, channels, generator=rng) < 0.3
    image = values((2, channels, 5, 13), rng, dtype)
    for x in (image, image.to(memory_format=torch.channels_last), values((3, channels), rng, dtype)):
        for flips in (None, flip):
            packed = binarize(x, "step", threshold, flips)
            per_bit = None if flips is None else flips.flatten()
            expected = reference.activation(torch.cat([x, x], 1), "step", threshold.flatten(), per_bit)
            assert packed.shape == expected.shape
            assert torch.equal(packed.words, reference.pack(expected)), f"{_native.active_isa()} {tuple(x.shape)}"


@pytest.mark.parametrize("channels", [1, 33, 64, 130])
def test_thresholds_and_flips(backend, channels, rng):
    x = values((2, channels, 6, 11), rng, torch.float32)
    threshold = torch.randn(channels, generator=rng)
    threshold[::3] = x[0, ::3, 0, 0].nan_to_num(0.0, 0.0, 0.0)  # exact ties
    threshold[1::7] = math.inf
    flip = torch.rand(channels, generator=rng) < 0.5
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        check(y, "sign", threshold)
        check(y, "step", threshold, flip)
        check(y, "sign", 0.25, flip)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(backend, dtype, rng):
    for channels in (1, 64, 100):
        x = values((2, channels, 4, 33), rng, dtype)
        for y in (x, x.to(memory_format=torch.channels_last)):
            for encoding in ("sign", "step"):
                words, mask = ops.binarize_with_mask(y, DEFAULT_THRESHOLDS[encoding], encoding)
                assert torch.equal(words, binarize(y, encoding).words)
                inside = reference.surrogate_derivative(y, "clip", encoding)
                assert torch.equal(mask, reference.pack(inside))


@pytest.mark.host_cuda
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 300), st.integers(1, 20), st.integers(1, 20)),
    encoding=st.sampled_from(["sign", "step"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(sizes, encoding, channels_last, seed):
    for backend in BACKENDS:
        with running_on(backend):
            x = values(sizes, generator(seed), torch.float32)
            check(x.to(memory_format=torch.channels_last) if channels_last else x, encoding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ["sign", "step"])
def test_unpack_inverts_binarize(backend, encoding, dtype, rng):
    for channels in CHANNELS:
        packed, expected = check(values((2, channels, 3, 5), rng, torch.float32), encoding)
        assert torch.equal(unpack(packed, dtype).double(), expected)
        assert packed.unpack(dtype).dtype == dtype
    scaled = PackedTensor(packed.words, packed.channels, encoding, torch.tensor(0.5))
    assert torch.equal(scaled.unpack(dtype).double(), expected / 2)


def test_threads_do_not_change_bits(backend, threads, rng):
    check(values((3, 70, 40, 41), rng, torch.float32), "sign")
    check(values((3, 70, 40, 41), rng, torch.float32).to(memory_format=torch.channels_last), "sign")


def test_empty_batches(backend):
    for shape in [(0, 5), (0, 70, 3, 3), (2, 5, 0, 3)]:
        assert binarize(torch.zeros(shape)).shape == shape
        assert binarize(torch.zeros(shape)).unpack().shape == shape


def test_packed_tensor_moves_and_serializes(tmp_path, rng):
    packed = binarize(values((2, 70, 3, 3), rng, torch.float32), "step")
    torch.save(packed, tmp_path / "packed.pt")
    loaded = torch.load(tmp_path / "packed.pt")
    assert torch.equal(loaded.words, packed.words)
    assert (loaded.channels, loaded.encoding, loaded.scale) == (70, "step", None)
    assert torch.equal(packed.to("cpu").words, packed.words)
    assert packed.device.type == "cpu"


def test_packed_tensor_goes_through_compile(rng):
    def normalize(x):
        return binarize(x, "sign")

    compiled = torch.compile(normalize, fullgraph=True, backend="aot_eager")
    x = values((2, 70, 3, 3), rng, torch.float32)
    result = compiled(x)
    assert isinstance(result, PackedTensor)
    assert torch.equal(result.words, normalize(x).words)
    assert torch.equal(torch.compile(lambda p: p.unpack() * 2, fullgraph=True, backend="aot_eager")(result),
                       result.unpack() * 2)
