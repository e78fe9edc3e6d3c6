"""Operators of lowmem: the float64 formulas, the same bits on every backend, edges of the grids, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import generator, running_on
from lowbit_ext import _native
from lowbit_ext.lowmem import ops
from reference import lowmem as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1, 63, 64, 65, 127, 129, 255, 256, 257)
SPANS = {2: 6.0, 4: 8.0, 8: 9.0}


def on_scalar(function, *arguments):
    """What the scalar kernels make of copies of the arguments: (result, copies)."""
    copies = [a.cpu().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.MonkeyPatch.context() as patch, torch.device("cpu"), running_on("scalar"):
        patch.setattr(_native, "kernels", lambda tensor: _native.cpu)
        return function(*copies), copies


def same(got, expected):
    """Whether tensors have the same bits, on whatever device and in whatever order of memory."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    return got.dtype == expected.dtype and torch.equal(got.cpu().view(bits), expected.view(bits))


def unpack(codes, bits, length):
    """Codes of rows of `length`, from the last dimension of bytes; padding bits must be 0."""
    shifts = torch.arange(0, 8, bits)
    rows = (codes[..., None].long() >> shifts & (2**bits - 1)).flatten(-2)
    assert not rows[..., length:].any()
    return rows[..., :length]


def pack(codes, bits):
    """Bytes of codes along the last dimension."""
    codes = F.pad(codes, (0, -codes.shape[-1] % (8 // bits)))
    return sum(codes[..., i :: 8 // bits] << bits * i for i in range(8 // bits)).to(torch.uint8)


def channel_unpack(codes, shape, channels_last, bits):
    """(N, C, ...) of an operator's channel codes."""
    if channels_last or len(shape) == 2:
        return unpack(codes, bits, shape[1]).movedim(-1, 1)
    return unpack(codes, bits, math.prod(shape[2:])).reshape(shape)


def channel_pack(codes, channels_last, bits):
    if channels_last or codes.dim() == 2:
        return pack(codes.movedim(1, -1), bits)
    return pack(codes.flatten(2), bits)


def shapes():
    """Tensors of every layout; rows and channels of every count, none among them."""
    for count in COUNTS:
        yield (5, count), False
        yield (3, 2, count), False
        yield (2, count, 3, 1), True
        yield (1, 3, 1, count, 2), True
    yield (2, 1030, 2), False
    yield (2, 16, 40, 41), True  # pixels of several chunks
    yield (2, 2, 70, 71), False  # more terms than a lane's float takes
    yield (1, 300, 6, 6), True
    for empty in ((0, 4), (3, 0), (0, 3, 5), (2, 3, 0)):
        yield empty, False
    yield (0, 3, 2, 2), True


def arranged(x, channels_last):
    """A copy in that order."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.clone(memory_format=formats[x.dim()] if channels_last else torch.contiguous_format)


def strided(x):
    """The same values, not dense in memory."""
    return torch.stack([x, x], -1)[..., 0]


def parameters(channels, rng):
    """Statistics and affine parameters of channels: gains of both signs and none, edges within the grid and far off."""
    mean, invstd = torch.randn(channels, generator=rng), torch.rand(channels, generator=rng) + 0.5
    gamma, beta = torch.rand(channels, generator=rng) + 0.5, 2 * torch.randn(channels, generator=rng)
    gamma[::2] *= -1
    gamma[3::7], beta[4::7], beta[5::11] = 0.0, 0.0, 12.0
    return mean, invstd, gamma, beta


def per_channel(values, x):
    return values.reshape(1, -1, *(1,) * (x.dim() - 2))


def random_codes(shape, bits, rng):
    return torch.randint(2**bits, shape, generator=rng)


# --- channel codes ----------------------------------------------------------------------------------------------------


def channel_quantize(*arguments):
    """The operator with ReLU, or without where its last argument, y, is None."""
    *arguments, y = arguments
    return ops.batch_norm_quantize(*arguments) if y is None else ops.batch_norm_relu_quantize(*arguments, y)


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_codes(backend, threads, dtype, bits, rng):
    """Codes of the float64 formula, but for what float32 cannot tell from a cell's edge; signs without exception."""
    for index, (shape, channels_last) in enumerate(shapes()):
        mean, invstd, gamma, beta = parameters(shape[1], rng)
        x = arranged((2 * torch.randn(shape, generator=rng)).to(dtype), channels_last)
        xhat = (x.double() - per_channel(mean, x)) * per_channel(invstd, x)
        y = (xhat * per_channel(gamma, x) + per_channel(beta, x)).to(dtype)
        y = arranged(torch.where(torch.rand(shape, generator=rng) < 0.05, -y, y), channels_last)  # y has the last word
        for relu in (True, False):
            arguments = (x, mean, invstd, gamma, beta, bits, SPANS[bits], y.clone() if relu else None)
            expected, copies = on_scalar(channel_quantize, *arguments)
            source = strided(x) if index % 3 == 0 and not channels_last else x
            target = arguments[-1]
            codes = channel_quantize(source, *arguments[1:])
            assert same(codes, expected)
            found = channel_unpack(codes, shape, ops.is_channels_last(x), bits)
            error = 2.0**-20 * (xhat.abs() + 9)
            sides = [
                reference.channel_codes(xhat + side, y if relu else None, gamma, beta, bits, SPANS[bits])
                for side in (-error, error)
            ]
            assert (torch.minimum(*sides) <= found).all()
            assert (found <= torch.maximum(*sides)).all()
            if relu:
                assert same(target, copies[-1])
                assert torch.equal(target, torch.where(y <= 0, 0, y))


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_values(backend, threads, dtype, bits, rng):
    for shape, channels_last in shapes():
        _, _, gamma, beta = parameters(shape[1], rng)
        numbers = random_codes(shape, bits, rng)
        codes = channel_pack(numbers, channels_last, bits)
        for relu in (True, False):
            arguments = (codes, gamma, beta, shape, channels_last, dtype, bits, SPANS[bits], relu)
            values = ops.channel_dequantize(*arguments)
            assert values.shape == shape
            assert values.dtype == dtype
            assert same(values, on_scalar(ops.channel_dequantize, *arguments)[0])
            xhat, _, rectified = reference.channel_decode(numbers, gamma, beta, bits, SPANS[bits])
            exact = rectified if relu else xhat * per_channel(gamma.double(), xhat) + per_channel(beta.double(), xhat)
            torch.testing.assert_close(values.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(backend, threads, dtype, bits, rng):
    for index, (shape, channels_last) in enumerate(shapes()):
        _, invstd, gamma, beta = parameters(shape[1], rng)
        numbers = random_codes(shape, bits, rng)
        codes = channel_pack(numbers, channels_last, bits)
        grad = arranged(torch.randn(shape, generator=rng).to(dtype), channels_last)
        for relu, training in ((True, True), (True, False), (False, True)):
            arguments = (codes, gamma, beta, invstd, bits, SPANS[bits], relu, training)
            found = ops.batch_norm_relu_backward(strided(grad) if index % 3 == 0 else grad, *arguments)
            expected, _ = on_scalar(ops.batch_norm_relu_backward, grad, *arguments)
            assert all(same(got, want) for got, want in zip(found, expected, strict=True))
            if not relu:
                continue
            exact = reference.batch_norm_relu_backward(
                grad, numbers, gamma, beta, invstd, bits, SPANS[bits], training
            )
            terms = grad.double().abs().transpose(0, 1).flatten(1).sum(1).sum() / max(shape[1], 1)  # of a channel's sum
            torch.testing.assert_close(found[0].double(), exact[0], rtol=torch.finfo(dtype).eps, atol=1e-5)
            for got, want in zip(found[1:], exact[1:], strict=True):
                # The edge of a channel is up to 24 standard deviations away, of which float32 has 2^-22.
                torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=24 * 2.0**-22 * terms)


@pytest.mark.parametrize("span", [6.0, 8.0, 9.0])
@pytest.mark.parametrize("bits", ops.BITS)
def test_mask_is_exact_for_every_ratio(backend, bits, span, rng):
    """beta / gamma from -10 to 10, gamma of both signs: codes from `shift` on are what torch's batch norm leaves."""
    ratio = torch.linspace(-10, 10, 401).repeat(2)
    gamma = torch.where(torch.arange(802) < 401, 1.5, -0.7)
    beta = ratio * gamma
    near = torch.randn(64, 802, generator=rng) * 1e-4 - ratio  # xhat where y changes its sign
    x = torch.cat([torch.randn(64, 802, generator=rng), near, 3 * torch.randn(64, 802, generator=rng)])
    mean, invstd = torch.zeros(802), torch.ones(802)
    y = torch.nn.functional.batch_norm(x, mean, invstd, gamma, beta, eps=0.0)
    positive = y > 0
    assert positive.any(0).all()
    codes = ops.batch_norm_relu_quantize(x, mean, invstd, gamma, beta, bits, span, y)
    assert torch.equal(y > 0, positive)
    ones = torch.ones_like(x)
    grad, _, count = ops.batch_norm_relu_backward(ones, codes, gamma, beta, invstd, bits, span, True, False)
    assert torch.equal(grad != 0, positive)
    assert torch.equal(count, positive.sum(0).float())
    values = ops.channel_dequantize(codes, gamma, beta, x.shape, False, x.dtype, bits, span, True)
    assert not values[~positive].any()


def test_edges_of_channel_cells(backend):
    """A channel of 16 cells of half a standard deviation; their edges are exact numbers, of the cell above."""
    edges = torch.arange(-8, 9) / 2.0
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 3e38, -3e38])
    tiny = torch.tensor([-1e-45, 1e-45])
    for gamma, beta in ((1.0, 0.0), (-1.0, 0.0), (2.0, 1.0), (1.0, -2.5), (1.0, 0.25), (-4.0, 5.0)):
        moved = beta / abs(gamma)
        close = torch.nextafter(torch.full((2,), -moved), torch.tensor([-math.inf, math.inf]))  # to y = 0
        u = torch.cat([edges - moved, edges - moved - 2.0**-18, edges - moved + 2.0**-18, special, tiny, close])
        x = (u * math.copysign(1.0, gamma))[:, None]
        y = gamma * x + beta
        channel = (torch.tensor([gamma]), torch.tensor([beta]), 4, 8.0)
        for target in (y, None):
            statistics = torch.zeros(1), torch.ones(1)
            codes = channel_quantize(x, *statistics, *channel, None if target is None else y.clone())
            codes, exact = unpack(codes, 4, 1), reference.channel_codes(x, target, *channel)
            assert torch.equal(codes[:-4], exact[:-4])
            if target is not None:  # what float32 cannot tell from an edge has the sign that y says
                assert torch.equal(codes >= 8 - math.floor(2 * moved), y > 0)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_channels_stay_finite(backend, dtype, bits, relu):
    """Gains and shifts up to the greatest floats: cells past the type's end are its last number. Others are NaN."""
    greatest, last = torch.finfo(torch.float32).max, torch.finfo(dtype).max
    numbers = torch.tensor([0.0, 1.0, -1.0, last / 4, -last / 4, last, -last, greatest, -greatest, math.inf, math.nan])
    gamma, beta = torch.cartesian_prod(numbers, numbers).T.contiguous()
    codes = torch.arange(2**bits)[:, None].expand(-1, len(gamma)).contiguous()
    packed, span = channel_pack(codes, False, bits), SPANS[bits]
    values = ops.channel_dequantize(packed, gamma, beta, codes.shape, False, dtype, bits, span, relu)
    finite = gamma.isfinite() & beta.isfinite()
    assert torch.equal(values.isfinite(), finite.expand_as(values))
    assert torch.equal(values.isnan(), ~finite.expand_as(values))
    found, exact = (
        v.double()[:, finite] for v in (values, reference.channel_values(codes, gamma, beta, bits, span, relu, dtype))
    )
    # Of the edge, up to 1e6 cells from the mean, float32 has 2^-4 of a cell.
    error = 2.0**-4 * (gamma.double().abs() * span / 2**bits)[finite] + torch.finfo(dtype).eps * exact.abs() + 1e-7
    assert ((found - exact).abs() <= error).all()


# --- group codes ------------------------------------------------------------------------------------------------------


def group_values(count, dtype, rng):
    """Numbers of groups that differ in place and width."""
    groups = -(-count // 256)
    width = 10.0 ** torch.randint(-3, 3, (groups, 1), generator=rng)
    place = torch.randn(groups, 1, generator=rng) * width
    return (torch.randn(groups, 256, generator=rng) * width + place).reshape(-1)[:count].to(dtype)


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_codes(backend, threads, dtype, bits, rng):
    for count in (0, *COUNTS, 5000):
        x = group_values(count, dtype, rng)
        for positive in (False, True):
            for seed, offset in ((None, 0), (-5, 0), (2**62 + 12345, 2**32 - 7)):
                key = None if seed is None else torch.tensor(seed, device="cpu")
                arguments = (x, bits, positive, key, offset)
                codes, scale_minimum = ops.group_quantize(*arguments)
                expected, _ = on_scalar(ops.group_quantize, *arguments)
                assert same(codes, expected[0])
                assert same(scale_minimum, expected[1])
                thresholds = torch.full((count,), 0.5, dtype=torch.float64)
                if seed is not None:
                    thresholds = reference.rounding_thresholds(count, seed % 2**64, offset).to(x.device)
                error = 2.0 ** (bits - 22)  # of a position in float32
                low, scale, minimum = reference.group_codes(x, bits, positive, thresholds - error)
                high, _, _ = reference.group_codes(x, bits, positive, thresholds + error)
                found = unpack(codes, bits, count)
                assert (low <= found).all()
                assert (found <= high).all()
                assert torch.equal(scale_minimum.double(), torch.stack([scale, minimum], 1))

                arguments = (codes, scale_minimum, [count], False, dtype, bits)
                values = ops.group_dequantize(*arguments)
                assert same(values, on_scalar(ops.group_dequantize, *arguments)[0])
                each = torch.stack([scale, minimum], 1).repeat_interleave(256, 0)[:count]
                exact = found * each[:, 0] + each[:, 1]
                torch.testing.assert_close(values.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
                if positive:
                    assert torch.equal(values > 0, x > 0)


def test_group_codes_follow_memory(backend, rng):
    """A channels_last tensor is coded and decoded as it lies; one that is not dense as its copy."""
    x = torch.randn(2, 7, 9, 5, generator=rng)
    last = x.to(memory_format=torch.channels_last)
    flat, scale_minimum = ops.group_quantize(last.permute(0, 2, 3, 1).reshape(-1), 4, False, None, 0)
    codes, also = ops.group_quantize(last, 4, False, None, 0)
    assert torch.equal(codes, flat)
    assert torch.equal(also, scale_minimum)
    dense, _ = ops.group_quantize(x, 4, False, None, 0)
    assert torch.equal(ops.group_quantize(strided(x), 4, False, None, 0)[0], dense)
    values = ops.group_dequantize(codes, also, x.shape, True, torch.float32, 4)
    assert values.stride() == last.stride()
    output = torch.empty_like(last)
    ops.group_dequantize_into(codes, also, 4, output)
    assert torch.equal(output, values)
    assert (values - x).abs().max() <= also[:, 0].max() / 2 * (1 + 1e-5)


@pytest.mark.parametrize("bits", ops.BITS)
def test_edges_of_group_cells(backend, bits):
    """Scales and minima that bfloat16 holds and steps that float32 does: halves go up, what is below them down."""
    last = 2**bits - 1
    for scale, minimum in ((1.0, 0.0), (2.0**-20, -(2.0**-14)), (2.0**30, 0.0), (0.125, -4.0)):
        steps = torch.arange(last) + 0.5
        for moved, expected in ((steps, torch.arange(1, last + 1)), (steps - 2.0**-12, torch.arange(last))):
            for first in range(0, last, 254):  # with the ends in every group
                part = torch.cat([torch.tensor([0.0, last]), moved[first : first + 254]])
                codes, found = ops.group_quantize(part * scale + minimum, bits, False, None, 0)
                assert found.tolist() == [[scale, minimum]]
                wanted = torch.cat([torch.tensor([0, last]), expected[first : first + 254]])
                assert torch.equal(unpack(codes, bits, len(part)), wanted)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_groups_stay_finite(backend, dtype, bits, positive):
    """Both ends of the type's range, of bfloat16's and of normal numbers, alone and with one another."""
    info = torch.finfo(dtype)
    numbers = [0.0, 1.0, info.max, info.max * (1 - info.eps), info.max * (1 - 2.0**-9), info.max / 3, info.tiny,
               info.smallest_normal / 8, 2.0**-149, 3e-39]
    numbers = torch.tensor([sign * value for value in numbers for sign in (1, -1)]).to(dtype)
    pairs = torch.cartesian_prod(numbers, numbers).repeat(1, 128)  # groups
    mixed = numbers.repeat(13)[:256]
    x = torch.cat([pairs.flatten(), mixed, numbers[4:5]])  # the last group has one element
    for key in (None, torch.tensor(3, device="cpu")):
        arguments = (x, bits, positive, key, 0)
        codes, scale_minimum = ops.group_quantize(*arguments)
        expected, _ = on_scalar(ops.group_quantize, *arguments)
        assert same(codes, expected[0])
        assert same(scale_minimum, expected[1])
        arguments = (codes, scale_minimum, [len(x)], False, dtype, bits)
        values = ops.group_dequantize(*arguments)
        assert same(values, on_scalar(ops.group_dequantize, *arguments)[0])
        assert values.isfinite().all()
        if positive:
            assert torch.equal(values > 0, x > 0)
        _, most, minimum = reference.group_codes(x, bits, positive)
        _, least, _ = reference.group_codes(x, bits, positive, error=2.0**-20)  # float32 rounds the quotient
        scale = scale_minimum[:, 0].double()
        assert ((scale == most) | (scale == least)).all()
        assert torch.equal(scale_minimum[:, 1].double(), minimum)
        # Half a step, or one; what a bfloat16 cannot tell from the last number; the type's own rounding.
        steps = 0.5 if key is None and not positive else 1.0
        cut = torch.where(x.double().abs() > info.max / 2, 2.0**-6 * info.max, 0.0)
        error = (steps * scale).repeat_interleave(256)[: len(x)] + cut + info.eps * (x.double().abs() + info.tiny)
        wanted = x.double().clamp(min=0) if positive else x.double()
        assert ((values.double() - wanted).abs() <= error * (1 + 1e-6)).all()
    for number in numbers:  # groups of one element
        codes, scale_minimum = ops.group_quantize(number[None], bits, positive, None, 0)
        value = ops.group_dequantize(codes, scale_minimum, [1], False, dtype, bits)
        assert value.isfinite()
        wanted = number.double().clamp(min=0) if positive else number.double()
        smallest = 2**bits * 2.0**-133 + info.tiny * info.eps  # of bfloat16 and of the type
        assert (value.double() - wanted).abs() <= 2.0**-7 * wanted.abs() + smallest


def test_special_values_in_groups(backend):
    def coded(values, positive=False):
        codes, scale_minimum = ops.group_quantize(torch.tensor(values), 4, positive, None, 0)
        return unpack(codes, 4, len(values)).tolist(), *scale_minimum.flatten().tolist()

    def decoded(values, dtype=torch.float32):
        codes, scale_minimum = ops.group_quantize(torch.tensor(values, dtype=dtype), 4, False, None, 0)
        return ops.group_dequantize(codes, scale_minimum, [len(values)], False, dtype, 4).tolist()

    nan, inf, greatest = math.nan, math.inf, float(torch.finfo(torch.bfloat16).max)
    assert coded([nan, nan]) == ([0, 0], 0.0, 0.0)
    assert coded([nan, 1.0, 16.0]) == ([0, 0, 15], 1.0, 1.0)
    assert coded([2.5, 2.5]) == ([0, 0], 0.0, 2.5)
    assert coded([0.0, -0.0]) == ([0, 0], 0.0, 0.0)
    assert math.copysign(1.0, coded([-0.0, -0.0])[2]) == 1.0
    assert coded([inf, 3.0]) == ([15, 0], greatest, 3.0)
    assert coded([-inf, 3.0]) == ([0, 15], greatest, -inf)
    assert coded([-1.0, 0.0, -0.0, nan, 1e-30, 15.0], positive=True) == ([0, 0, 0, 0, 1, 15], 1.0, 0.0)
    assert coded([-1.0, -2.0], positive=True) == ([0, 0], 0.0, 0.0)
    for dtype in DTYPES:
        assert decoded([inf, 3.0], dtype) == [inf, 3.0]
        assert decoded([-inf, 3.0, inf], dtype) == [-inf] * 3
        assert decoded([inf, inf], dtype) == [inf] * 2
        assert decoded([nan, 1.0, 16.0], dtype) == [1.0, 1.0, 16.0]
        assert math.copysign(1.0, decoded([-0.0], dtype)[0]) == 1.0


@pytest.mark.parametrize("bits", ops.BITS)
def test_stochastic_rounding_is_unbiased(backend, bits):
    """z of the mean error of 2^19 elements, and of each place in a group, in steps of the grid.

    A step's fraction is uniform: the error has a variance of 1/6. A bias of 0.4 % of a step is seen with 99 %; that of
    one of the 256 places with 99 % from 6.5 % on.
    """
    groups, last = 2**11, 2**bits - 1
    x = torch.rand(groups, 256, generator=generator(7)) * last
    x[:, 0], x[:, 255] = 0.0, last  # scale 1, minimum 0
    seed = torch.tensor(20260101, device="cpu")
    codes, scale_minimum = ops.group_quantize(x, bits, False, seed, 0)
    assert torch.equal(scale_minimum.float(), torch.tensor([1.0, 0.0]).expand(groups, 2))
    error = (unpack(codes, bits, x.numel()).reshape(x.shape) - x)[:, 1:255].double()
    assert (error.abs() < 1).all()
    deviation = (1 / 6) ** 0.5
    assert abs(error.mean()) < 4 * deviation / error.numel() ** 0.5
    assert error.mean(0).abs().max() < 4.8 * deviation / groups**0.5
    again = unpack(ops.group_quantize(x, bits, False, seed, 0)[0], bits, x.numel())
    assert torch.equal(again.reshape(x.shape)[:, 1:255] - x[:, 1:255], error.float())
    # Other seeds and offsets draw anew: two roundings agree where both go down or both up, 2/3 of the time.
    for other in ((seed + 1, 0), (seed, 16 * groups)):
        codes, _ = ops.group_quantize(x, bits, False, *other)
        agree = (unpack(codes, bits, x.numel()).reshape(x.shape) - x)[:, 1:255].double() == error
        assert abs(agree.double().mean() - 2 / 3) < 0.005
    # An offset of 16 is the next group.
    shifted, _ = ops.group_quantize(x[1:].clone(), bits, False, seed, 16)
    assert torch.equal(shifted, ops.group_quantize(x, bits, False, seed, 0)[0][256 * bits // 8 :])


# --- refusals ---------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3, 4)
ONES = torch.ones(3)
CODES = torch.zeros(2, 3, 2, dtype=torch.uint8)
FLAT = torch.zeros(12, dtype=torch.uint8)
SCALES = torch.zeros(1, 2, dtype=torch.bfloat16)


def at(name, call, error, message):
    return pytest.param(call, error, message, id=name)


def quantize(x=X, mean=ONES, gamma=ONES, bits=4, span=8.0, y=X):
    return ops.batch_norm_relu_quantize(x, mean, ONES, gamma, ONES, bits, span, y)


def dequantize(codes=CODES, gamma=ONES, shape=(2, 3, 4), dtype=torch.float32, span=8.0):
    return ops.channel_dequantize(codes, gamma, ONES, shape, False, dtype, 4, span, True)


def backward(grad=X, codes=CODES, invstd=ONES, bits=4):
    return ops.batch_norm_relu_backward(grad, codes, ONES, ONES, invstd, bits, 8.0, True, True)


WRONG_CALLS = [
    at("quantize dtype", lambda: quantize(X.double()), TypeError,
       "batch_norm_relu_quantize: input must be float32, bfloat16 or float16, got torch.float64"),
    at("quantize dimensions", lambda: quantize(X[0, 0]), ValueError,
       "batch_norm_relu_quantize: input must be (N, C, ...), got (4,)"),
    at("quantize bits", lambda: quantize(bits=3), ValueError,
       "batch_norm_relu_quantize: bits must be 2, 4 or 8, got 3"),
    at("quantize span", lambda: quantize(span=math.nan), ValueError,
       "batch_norm_relu_quantize: span must be a positive number of standard deviations, got nan"),
    at("quantize mean", lambda: quantize(mean=torch.ones(4)), ValueError,
       "batch_norm_relu_quantize: mean must be floats (3,), got torch.float32 (4,)"),
    at("quantize gamma device", lambda: quantize(gamma=torch.ones(3, device="meta")), ValueError,
       "batch_norm_relu_quantize: gamma must be on the CPU like the input, got meta"),
    at("quantize without ReLU", lambda: ops.batch_norm_quantize(X, ONES, ONES, ONES, ONES[:2], 4, 8.0), ValueError,
       "batch_norm_quantize: beta must be floats (3,), got torch.float32 (2,)"),
    at("quantize y", lambda: quantize(y=X[:1]), ValueError,
       "batch_norm_relu_quantize: y must be torch.float32 (2, 3, 4) like the input, got torch.float32 (1, 3, 4)"),
    at("quantize y device", lambda: quantize(y=X.to("meta")), ValueError,
       "batch_norm_relu_quantize: y must be on the CPU like the input, got meta"),
    at("dequantize codes", lambda: dequantize(CODES[..., :1]), ValueError,
       "channel_dequantize: codes must be uint8 (2, 3, 2), got torch.uint8 (2, 3, 1)"),
    at("dequantize codes dtype", lambda: dequantize(CODES.int()), ValueError,
       "channel_dequantize: codes must be uint8 (2, 3, 2), got torch.int32 (2, 3, 2)"),
    at("dequantize dtype", lambda: dequantize(dtype=torch.int32), TypeError,
       "channel_dequantize: dtype must be float32, bfloat16 or float16, got torch.int32"),
    at("dequantize shape", lambda: dequantize(shape=(3,)), ValueError,
       "channel_dequantize: shape must be (N, C, ...), got (3,)"),
    at("dequantize span", lambda: dequantize(span=0.0), ValueError,
       "channel_dequantize: span must be a positive number of standard deviations, got 0.0"),
    at("dequantize gamma", lambda: dequantize(gamma=ONES.int()), ValueError,
       "channel_dequantize: gamma must be floats (3,), got torch.int32 (3,)"),
    at("backward codes", lambda: backward(codes=CODES[:1]), ValueError,
       "batch_norm_relu_backward: codes must be uint8 (2, 3, 2), got torch.uint8 (1, 3, 2)"),
    at("backward bits", lambda: backward(bits=1), ValueError,
       "batch_norm_relu_backward: bits must be 2, 4 or 8, got 1"),
    at("backward codes device", lambda: backward(codes=CODES.to("meta")), ValueError,
       "batch_norm_relu_backward: codes must be on the CPU like the input, got meta"),
    at("backward invstd", lambda: backward(invstd=torch.ones(3, 1)), ValueError,
       "batch_norm_relu_backward: invstd must be floats (3,), got torch.float32 (3, 1)"),
    at("group dtype", lambda: ops.group_quantize(X.long(), 4, False, None, 0), TypeError,
       "group_quantize: input must be float32, bfloat16 or float16, got torch.int64"),
    at("group bits", lambda: ops.group_quantize(X, 5, False, None, 0), ValueError,
       "group_quantize: bits must be 2, 4 or 8, got 5"),
    at("group seed", lambda: ops.group_quantize(X, 4, False, torch.zeros(1), 0), ValueError,
       "group_quantize: seed must be an int64 scalar on the CPU, got torch.float32 (1,) on cpu"),
    at("group seed device", lambda: ops.group_quantize(X, 4, False, torch.tensor(1).to("meta"), 0), ValueError,
       "group_quantize: seed must be an int64 scalar on the CPU, got torch.int64 () on meta"),
    at("group codes", lambda: ops.group_dequantize(FLAT, SCALES, [25], False, torch.float32, 4), ValueError,
       "group_dequantize: codes must be uint8 (13,), got torch.uint8 (12,)"),
    at("group scales", lambda: ops.group_dequantize(FLAT, SCALES[0], [24], False, torch.float32, 4), ValueError,
       "group_dequantize: scale_minimum must be bfloat16 (1, 2), got torch.bfloat16 (2,)"),
    at("group scales device", lambda: ops.group_dequantize(FLAT, SCALES.to("meta"), [24], False, torch.float32, 4),
       ValueError, "group_dequantize: scale_minimum must be on the CPU like the input, got meta"),
    at("group out", lambda: ops.group_dequantize_into(FLAT, SCALES, 4, X.transpose(1, 2)), ValueError,
       "group_dequantize: out must be contiguous or channels_last, got strides (12, 1, 4) for (2, 4, 3)"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
