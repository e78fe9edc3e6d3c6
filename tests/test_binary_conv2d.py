"""Convolution and linear: integers equal to torch in float64, on every level, for every argument."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import BACKENDS, generator, running_on
from lowbit_ext import PackedTensor, _native
from lowbit_ext.binary import binarize, conv1d, conv2d, linear, pack_weight
from reference import binary as reference

# Round one, two, eight and sixteen words; BinaryDuo's odd widths.
CHANNELS = [1, 7, 8, 31, 32, 33, 45, 63, 64, 65, 90, 127, 128, 129, 256, 511, 513, 1025]


def operands(rng, batch, channels, height, width, filters, kernel, groups, encoding):
    x = torch.randn(batch, channels, height, width, generator=rng)
    w = torch.randn(filters, channels // groups, *kernel, generator=rng)
    a = reference.activation(x, encoding, 0.5 if encoding == "step" else 0.0)
    return x, w, a, reference.sign(w)


def check(rng, batch, channels, size, filters, kernel, encoding, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
          groups=1, padding_value=0):
    x, w, a, s = operands(rng, batch, channels, *size, filters, kernel, groups, encoding)
    sides = (padding[0], padding[1], padding[0], padding[1])
    expected = reference.conv2d(a, s, stride, sides, dilation, groups, padding_value)
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, padding_value=padding_value)
    got = conv2d(binarize(x, encoding), pack_weight(w, groups), **options)
    assert got.dtype == torch.int32
    assert torch.equal(got.double(), expected), f"{_native.active_isa()} differs: {x.shape} {w.shape} {options}"
    return x, w, expected, options


@pytest.mark.parametrize("encoding", ["sign", "step"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_channel_counts(backend, channels, encoding, rng):
    check(rng, 2, channels, (5, 6), 17, (3, 3), encoding, padding=(1, 1))
    check(rng, 1, channels, (4, 4), 65, (1, 1), encoding)


@pytest.mark.parametrize("filters", [1, 15, 16, 17, 63, 64, 65, 128, 130, 200])
def test_filter_counts(backend, filters, rng):
    for encoding in ("sign", "step"):
        check(rng, 2, 40, (5, 5), filters, (3, 3), encoding, padding=(1, 1))


@pytest.mark.parametrize(
    ("encoding", "padding_value"), [("sign", 0), ("sign", 1), ("sign", -1), ("step", 0), ("step", 1)]
)
def test_padding_values(backend, encoding, padding_value, rng):
    for kernel, padding, size in [((3, 3), (1, 1), (6, 5)), ((5, 3), (2, 3), (4, 7)), ((3, 3), (3, 3), (2, 2)),
                                  ((1, 1), (2, 1), (3, 3)), ((7, 7), (6, 6), (1, 1))]:
        check(rng, 2, 70, size, 20, kernel, encoding, padding=padding, padding_value=padding_value)


@pytest.mark.parametrize("groups_channels_filters", [(2, 6, 4), (3, 99, 66), (2, 128, 128), (4, 256, 8), (5, 5, 5),
                                                     (32, 32, 64), (2, 130, 130)])
def test_groups(backend, groups_channels_filters, rng):
    groups, channels, filters = groups_channels_filters
    for encoding in ("sign", "step"):
        check(rng, 2, channels, (5, 4), filters, (3, 3), encoding, groups=groups, padding=(1, 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 24, 26, 32, 33, 48, 64, 65])  # of a group
def test_narrow_groups(backend, channels, rng):
    """Groups that begin anywhere in a byte or word, and blocks of filters that begin anywhere in a group."""
    around_words = {2, *(64 * words // channels + more for words in (1, 2) for more in (0, 1))} - {0, 1}
    for groups, filters in itertools.product(sorted(around_words), (1, 3, channels)):
        for encoding, padding_value in (("sign", 0), ("sign", -1), ("step", 0), ("step", 1)):
            check(rng, 1, groups * channels, (4, 5), groups * filters, (3, 3), encoding, groups=groups, padding=(1, 1),
                  padding_value=padding_value)
    for encoding in ("sign", "step"):
        check(rng, 2, 5 * channels, (9, 8), 5 * channels, (2, 3), encoding, groups=5, stride=(2, 1), dilation=(1, 2),
              padding=(2, 1), padding_value=1)
        # More taps than counts of a byte take.
        check(rng, 1, 5 * channels, (7, 41), 5, (6, 37), encoding, groups=5, padding=(1, 2))


def test_strides_dilations_and_rectangles(backend, rng):
    strides, dilations, kernels = [(1, 1), (2, 2), (3, 1)], [(1, 1), (2, 3)], [(3, 3), (1, 5), (2, 4)]
    for stride, dilation, kernel in itertools.product(strides, dilations, kernels):
        check(rng, 2, 65, (13, 17), 33, kernel, "sign", stride=stride, dilation=dilation, padding=(1, 2))
        check(rng, 2, 65, (13, 17), 33, kernel, "step", stride=stride, dilation=dilation, padding=(1, 2))


@pytest.mark.parametrize("batch", [0, 1, 17])
def test_batches_and_threads(backend, threads, batch, rng):
    check(rng, batch, 128, (14, 14), 128, (3, 3), "sign", padding=(1, 1))
    check(rng, batch, 64, (7, 7), 130, (3, 3), "step", padding=(1, 1))


@st.composite
def calls(draw):
    """A valid convolution call."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 40, 65]))
    encoding = draw(st.sampled_from(["sign", "step"]))
    call = dict(
        batch=draw(st.sampled_from([0, 1, 2, 3])),
        channels=groups * draw(st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 192, 255, 256, 320]))),
        filters=groups * draw(st.integers(1, 70)),
        kernel=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=(draw(st.integers(0, 4)), draw(st.integers(0, 4))),
        dilation=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        groups=groups,
        encoding=encoding,
        padding_value=draw(st.sampled_from([0, 1, -1] if encoding == "sign" else [0, 1])),
    )
    least = [max(1, call["dilation"][i] * (call["kernel"][i] - 1) + 1 - 2 * call["padding"][i]) for i in (0, 1)]
    call["size"] = (least[0] + draw(st.integers(0, 9)), least[1] + draw(st.integers(0, 9)))
    return call


@pytest.mark.host_cuda
@settings(max_examples=200, deadline=None)
@given(call=calls(), seed=st.integers(0, 2**31), backend=st.sampled_from(BACKENDS))
def test_any_call(call, seed, backend):
    with running_on(backend):
        check(generator(seed), **call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_epilogue(backend, dtype, rng):
    """Each term rounds to float32 on its own, then once to the output type: equal to torch's elementwise chain."""
    for filters in (5, 64, 100):
        x, w, expected, options = check(rng, 2, 70, (6, 5), filters, (3, 3), "sign", padding=(1, 1))
        acc = expected.float()
        scale, bias = torch.rand(filters, generator=rng), torch.randn(filters, generator=rng)
        residual = torch.randn(acc.shape, generator=rng).to(dtype)
        view = (1, -1, 1, 1)
        packed, weight = binarize(x), pack_weight(w)
        terms = [
            (dict(out_dtype=dtype), acc),
            (dict(scale=scale), acc * scale.view(view)),
            (dict(scale=0.125), acc * 0.125),
            (dict(bias=bias), acc + bias.view(view)),
            (dict(scale=scale, bias=bias), acc * scale.view(view) + bias.view(view)),
            (
                dict(scale=scale, bias=bias, residual=residual),
                acc * scale.view(view) + bias.view(view) + residual.float(),
            ),
            (dict(residual=residual.contiguous(memory_format=torch.channels_last)), acc + residual.float()),
        ]
        for arguments, value in terms:
            got = conv2d(packed, weight, **{"out_dtype": dtype, **arguments}, **options)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, value.to(dtype)), f"{backend}: {list(arguments)}"


@pytest.mark.parametrize("filters", [1, 20, 45, 64, 90, 128, 130])
@pytest.mark.parametrize("rows", [1, 2])
def test_threshold_epilogue(backend, filters, rows, rng):
    for groups in (1, filters) if filters in (20, 45) else (1,):
        channels = 70 if groups == 1 else filters * 3
        x, w, expected, options = check(
            rng, 2, channels, (6, 5), filters, (3, 3), "sign", padding=(1, 1), groups=groups
        )
        packed, weight = binarize(x), pack_weight(w, groups)
        for real in (False, True):
            threshold = torch.randint(-9, 9, (rows, filters), generator=rng)
            threshold = threshold + 0.5 * torch.randint(0, 2, (rows, filters), generator=rng) if real else threshold
            flip = torch.rand(rows, filters, generator=rng) < 0.5
            for flips in (None, flip):
                got = conv2d(packed, weight, threshold=threshold, flip=flips, **options)
                down = torch.zeros(rows, filters, dtype=torch.bool) if flips is None else flips
                bits = [
                    torch.where(d.view(-1, 1, 1), expected <= t.view(-1, 1, 1), expected >= t.view(-1, 1, 1))
                    for d, t in zip(down, threshold, strict=True)
                ]
                assert isinstance(got, PackedTensor)
                assert got.channels == rows * filters
                assert torch.equal(got.words, reference.pack(torch.cat(bits, 1).double())), f"{backend} {groups}"
        scale, residual = torch.rand(filters, generator=rng), torch.randn(expected.shape, generator=rng)
        level = torch.randn(rows, filters, generator=rng)
        got = conv2d(packed, weight, scale=scale, residual=residual, threshold=level, **options)
        value = expected.float() * scale.view(-1, 1, 1) + residual
        bits = torch.cat([value >= level[r].view(-1, 1, 1) for r in range(rows)], 1)
        assert torch.equal(got.words, reference.pack(bits.double()))


def test_threshold_extremes(backend, rng):
    x, w, _, _ = check(rng, 1, 64, (3, 3), 4, (1, 1), "sign")
    infinity = float("inf")
    threshold = torch.tensor([infinity, -infinity, infinity, -infinity])
    flip = torch.tensor([False, False, True, True])
    got = conv2d(binarize(x), pack_weight(w), threshold=threshold, flip=flip).unpack()
    assert torch.equal(got, torch.tensor([-1.0, 1, 1, -1]).view(1, 4, 1, 1).expand_as(got))


def test_packed_chain_stays_packed(backend, rng):
    """Words out of one layer go straight into the next."""
    x, w, expected, options = check(rng, 2, 64, (8, 8), 96, (3, 3), "sign", padding=(1, 1))
    second = torch.randn(10, 96, 3, 3, generator=rng)
    bits = conv2d(binarize(x), pack_weight(w), threshold=torch.zeros(96), **options)
    got = conv2d(bits, pack_weight(second), padding=1)
    middle = torch.where(expected >= 0, 1.0, -1.0).double()
    assert torch.equal(got.double(), reference.conv2d(middle, reference.sign(second), 1, (1,) * 4, 1, 1, 0))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(backend, padding, rng):
    for kernel, dilation in [((2, 3), (1, 1)), ((4, 4), (1, 2)), ((3, 3), (2, 1))]:
        x, w, a, s = operands(rng, 2, 33, 11, 12, 6, kernel, 1, "sign")
        got = conv2d(binarize(x), w, padding=padding, dilation=dilation)
        expected = torch.nn.functional.conv2d(a, s, padding=padding, dilation=dilation)
        assert torch.equal(got.double(), expected)


def test_float_inputs(backend, rng):
    """Float inputs are binarized on the fly, whatever their layout; the result has their dtype."""
    x, w, a, s = operands(rng, 2, 33, 6, 7, 9, (3, 3), 1, "sign")
    expected = torch.nn.functional.conv2d(a, s)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = x.to(dtype)
        exact = torch.nn.functional.conv2d(reference.activation(y, "sign", 0.0), s)
        for view in (y, y.to(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3)):
            got = conv2d(view, w.to(dtype))
            assert got.dtype == dtype
            assert torch.equal(got.double(), exact.to(dtype).double())
    assert torch.equal(conv2d(x, w, out_dtype=torch.int32).double(), expected)


def test_conv1d(backend, rng):
    for channels, kernel, options in [
        (70, 3, {}),
        (64, 5, dict(stride=2, padding=2)),
        (6, 3, dict(dilation=2, groups=3)),
    ]:
        groups = options.get("groups", 1)
        x = torch.randn(3, channels, 21, generator=rng)
        w = torch.randn(12, channels // groups, kernel, generator=rng)
        expected = torch.nn.functional.conv1d(reference.activation(x, "sign", 0.0), reference.sign(w), **options)
        assert torch.equal(conv1d(binarize(x), pack_weight(w, groups), **options).double(), expected)
        assert torch.equal(conv1d(x, w, **options).double(), expected)
        bits = conv1d(binarize(x), w, threshold=0.0, **options)
        assert torch.equal(bits.unpack().double(), torch.where(expected >= 0, 1.0, -1.0).double())


@pytest.mark.parametrize("features", [1, 63, 64, 65, 129, 1000])
def test_linear(backend, features, rng):
    for batch, outputs in [(0, 5), (1, 1), (1, 130), (17, 64)]:
        x, w = torch.randn(batch, features, generator=rng), torch.randn(outputs, features, generator=rng)
        for encoding, level in (("sign", 0.0), ("step", 0.5)):
            expected = reference.activation(x, encoding, level) @ reference.sign(w).T
            assert torch.equal(linear(binarize(x, encoding), pack_weight(w)).double(), expected)
            assert torch.equal(linear(x, w, encoding=encoding).double(), expected)
            bits = linear(binarize(x, encoding), w, threshold=1.0)
            assert torch.equal(bits.words, reference.pack((expected >= 1).double()).reshape(bits.words.shape))
    shaped = torch.randn(2, 3, 4, features, generator=rng)
    flat = linear(shaped.reshape(-1, features), w)
    assert torch.equal(linear(shaped, w), flat.reshape(2, 3, 4, -1))
    assert torch.equal(linear(shaped[0, 0, 0], w), flat[0])


def test_scale_of_a_packed_input_reaches_the_result(rng):
    x, w, a, s = operands(rng, 2, 33, 6, 7, 9, (3, 3), 1, "sign")
    packed = binarize(x)
    scaled = PackedTensor(packed.words, packed.channels, "sign", torch.tensor(0.25))
    assert torch.equal(conv2d(scaled, w).double(), torch.nn.functional.conv2d(a, s) / 4)


def test_weight_packed_under_another_level_is_blocked_again(rng):
    x, w, a, s = operands(rng, 1, 100, 5, 5, 70, (3, 3), 1, "sign")
    weight = pack_weight(w)
    for level in _native.available_isas():
        with running_on(level):
            assert torch.equal(conv2d(binarize(x), weight).double(), torch.nn.functional.conv2d(a, s))
    assert torch.equal(weight.unpack().double(), s)
