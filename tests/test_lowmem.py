"""lowmem.LowMemBlock and quantize: gradients against the float64 formulas, forward to the bit, refusals."""

import copy
import io
import math
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn

from conftest import sum_bound
from lowbit_ext import lowmem
from lowbit_ext.lowmem import (
    LowMemBlock,
    _stored,
    blocks,
    codes,
    dequantize,
    dequantize4,
    ops,
    quantize,
    quantize4,
    quantize_channels,
)
from lowmem_networks import joined, make, relative, step
from reference import lowmem as reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def odd_norm():
    """A batch norm with scales of both signs, almost and exactly zero, and ratios beyond the range."""
    norm = nn.BatchNorm2d(9)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1, -1, 0.3, -0.3, 2.0, 1e-3, 0.0, 0.0, -1]))
        norm.bias.copy_(torch.tensor([0, 0.5, 3, -3, -1, 0.01, 0.5, -0.5, 10.0]))
    return norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bits", ops.BITS)
def test_block_has_the_formulas_gradients(bits, layout):
    norm, conv = odd_norm(), nn.Conv2d(9, 4, 3, padding=1, bias=False)
    x = torch.randn(8, 9, 7, 7).contiguous(memory_format=layout).requires_grad_()
    out = LowMemBlock(norm, conv, bits=bits)(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    found = (out.detach(), x.grad, norm.weight.grad, norm.bias.grad, conv.weight.grad)
    expected = reference.block(
        x.detach(), norm.weight.detach(), norm.bias.detach(), conv.weight.detach(), grad, norm.eps, bits,
        codes.RANGES[bits], padding=1,
    )
    for got, want in zip(found, expected, strict=True):
        bound = sum_bound(8 * 7 * 7, float(want.abs().max()))  # the longest sums are over a channel
        torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [
    None, nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((1, 3)),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, divisor_override=3),
])
def test_block_with_pooling_is_the_plain_one(pool, training):
    """Forward to the bit; with wide and fine codes the gradients of the plain layers, through the pooling exactly."""
    norm, conv = odd_norm(), nn.Conv2d(9, 4, 3, padding=1)
    plain = nn.Sequential(copy.deepcopy(norm), nn.ReLU(), pool or nn.Identity(), copy.deepcopy(conv)).train(training)
    block = LowMemBlock(norm, conv, pool, bits=8, range=12.0).train(training)
    got, expected = step(block, (8, 9, 7, 8)), step(plain, (8, 9, 7, 8))
    assert torch.equal(got[0], expected[0])
    assert all(map(torch.equal, block.buffers(), plain.buffers()))
    grads = [torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (block, plain)]
    assert relative(*grads) < 0.05
    assert torch.equal(got[2]["layer.bias"], expected[2]["3.bias"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["preact", "vgg", "mlp"])
def test_large_activations_share_memory(monkeypatch, name, layout):
    """The same gradients to the bit whether a backward pass unpacks into fresh or into kept memory."""
    model, shape = make(name)
    model, x = lowmem.convert(model), torch.randn(shape)
    if x.dim() == 4:
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    gradients = []
    for threshold in (_stored._FRESH_BYTES, 0):
        monkeypatch.setattr(_stored, "_FRESH_BYTES", threshold)
        monkeypatch.setattr(_stored, "_workspace", _stored.Workspace())
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (_stored._workspace.memory.nbytes > 0) == (threshold == 0)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("width", [7, 127, 128, 254, 255, 256, 300])
@pytest.mark.parametrize("pool", [((2, 2), (2, 2), (0, 0)), ((3, 3), (1, 2), (1, 1)), ((1, 7), (1, 3), (0, 3)),
                                  ((7, 1), (3, 1), (3, 0))])
def test_places_of_maxima_fit_a_byte(pool, width):
    """Wide images, where a step to the window's next line is more than a byte holds."""
    x = torch.randn(2, 3, 9, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = blocks._MaxPool.apply(x, blocks.Pool("max", *pool))
    (place,) = out.grad_fn.saved_tensors
    assert place.dtype == torch.uint8
    same = x.detach().clone().requires_grad_()
    expected = nn.functional.max_pool2d(same, *pool)
    grad = torch.randint(-4, 5, out.shape).float()  # exact sums
    out.backward(grad), expected.backward(grad)
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, same.grad)


def test_block_of_linear_layers():
    norm, layer = nn.BatchNorm1d(9), nn.Linear(9, 4)
    plain = nn.Sequential(copy.deepcopy(norm), nn.ReLU(), copy.deepcopy(layer))
    assert torch.equal(step(LowMemBlock(norm, layer), (8, 9))[0], step(plain, (8, 9))[0])
    norm, layer = odd_norm(), nn.Linear(9 * 4, 4)
    plain = nn.Sequential(copy.deepcopy(norm), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), copy.deepcopy(layer))
    block = LowMemBlock(norm, layer, nn.MaxPool2d(2), bits=8, range=12.0)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(8, 9, 4, 4).contiguous(memory_format=layout)
        block.zero_grad(), plain.zero_grad()
        got, expected = block(x), plain(x)
        assert torch.equal(got, expected)
        got.square().sum().backward(), expected.square().sum().backward()
        grads = [torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (block, plain)]
        assert relative(*grads) < 0.05


def test_block_shares_its_layers_parameters():
    norm, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
    block = LowMemBlock(norm, conv)
    assert [id(p) for p in block.parameters()] == [id(p) for p in (*norm.parameters(), *conv.parameters())]
    assert block.norm.running_mean is norm.running_mean
    copied = copy.deepcopy(block)
    assert all(map(torch.equal, joined(step(copied, (4, 3, 6, 6))), joined(step(block, (4, 3, 6, 6)))))


def at(name, call, error, message):
    return pytest.param(call, error, message, id=name)


NORM, CONV = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
X = torch.ones(4, 6)
WRONG_CALLS = [
    at("norm", lambda: LowMemBlock(nn.GroupNorm(3, 3), CONV), TypeError,
       "LowMemBlock: norm must be an nn.BatchNorm1d, 2d or 3d, got GroupNorm"),
    at("layer", lambda: LowMemBlock(NORM, nn.ReLU()), TypeError,
       "LowMemBlock: layer must be an nn.Conv1d, 2d, 3d or nn.Linear: ReLU keeps its input"),
    at("padding", lambda: LowMemBlock(NORM, nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), TypeError,
       "LowMemBlock: layer must be an nn.Conv1d, 2d, 3d or nn.Linear: padding_mode 'reflect' keeps the padded input"),
    at("pool", lambda: LowMemBlock(NORM, CONV, nn.AdaptiveAvgPool2d(1)), TypeError,
       "LowMemBlock: pool must be an nn.MaxPool2d or nn.AvgPool2d, got AdaptiveAvgPool2d(output_size=1)"),
    at("block bits", lambda: LowMemBlock(NORM, CONV, bits=5), ValueError,
       "LowMemBlock: bits must be 2, 4 or 8, got 5"),
    at("block bits type", lambda: LowMemBlock(NORM, CONV, bits=4.0), TypeError,
       "LowMemBlock: bits must be an int, got float"),
    at("range", lambda: LowMemBlock(NORM, CONV, range=0), ValueError,
       "LowMemBlock: range must be a positive number of standard deviations, got 0"),
    at("range type", lambda: LowMemBlock(NORM, CONV, range="8"), TypeError,
       "LowMemBlock: range must be a number or None, got str"),
    at("one value", lambda: LowMemBlock(NORM, nn.Conv2d(3, 4, 1))(torch.ones(1, 3, 1, 1)), ValueError,
       "Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1, 1])"),
    at("block range type", lambda: LowMemBlock(NORM, CONV, range=True), TypeError,
       "LowMemBlock: range must be a number or None, got bool"),
    at("range of float64", lambda: LowMemBlock(NORM, CONV, range=1e39), ValueError,
       "LowMemBlock: range must be a positive number of standard deviations, got 1e+39"),
    at("block input", lambda: LowMemBlock(NORM, CONV)(None), TypeError,
       "BatchNorm2d: input must be a torch.Tensor, got NoneType"),
    at("quantize", lambda: quantize(None), TypeError, "quantize: x must be a torch.Tensor, got NoneType"),
    at("quantize dtype", lambda: quantize(X.int()), TypeError,
       "quantize: x must be float32, bfloat16 or float16 and dense, got torch.int32"),
    at("quantize layout", lambda: quantize(X.to_sparse()), TypeError,
       "quantize: x must be float32, bfloat16 or float16 and dense, got torch.sparse_coo"),
    at("quantize bits", lambda: quantize(X, 3), ValueError, "quantize: bits must be 2, 4 or 8, got 3"),
    at("quantize bits type", lambda: quantize(X, None), TypeError, "quantize: bits must be an int, got NoneType"),
    at("quantize flag", lambda: quantize(X, stochastic=None), TypeError,
       "quantize: stochastic must be a bool, got NoneType"),
    at("quantize generator", lambda: quantize(X, generator=3), TypeError,
       "quantize: generator must be a torch.Generator or None, got int"),
    at("quantize4", lambda: quantize4("x"), TypeError, "quantize4: x must be a torch.Tensor, got str"),
    at("quantize_channels", lambda: quantize_channels([1.0]), TypeError,
       "quantize_channels: x must be a torch.Tensor, got list"),
    at("dequantize", lambda: dequantize(X), TypeError,
       "dequantize: quantized must be Codes or ChannelCodes, got Tensor"),
    at("dequantize out", lambda: dequantize(quantize(X), 3), TypeError,
       "dequantize: out must be a torch.Tensor, got int"),
    at("dequantize dtype", lambda: dequantize(quantize(X), X.double()), TypeError,
       "dequantize: out must be float32, bfloat16 or float16 and dense, got torch.float64"),
    at("dequantize device", lambda: dequantize(quantize(X), X.to("meta")), ValueError,
       "dequantize: out must be on cpu like the codes, got meta"),
    at("dequantize shape", lambda: dequantize(quantize(X), torch.empty(6, 4)), ValueError,
       "dequantize: out must be contiguous (4, 6), got (6, 4) with strides (4, 1)"),
    at("quantize_channels vector", lambda: quantize_channels(torch.ones(4)), ValueError,
       "quantize_channels: x must be (N, C, ...), got (4,)"),
    at("quantize_channels range", lambda: quantize_channels(X, range=-1), ValueError,
       "quantize_channels: range must be a positive number of standard deviations, got -1"),
    at("quantize_channels dtype", lambda: quantize_channels(X.long()), TypeError,
       "quantize_channels: x must be float32, bfloat16 or float16 and dense, got torch.int64"),
    at("dequantize channels", lambda: dequantize(quantize_channels(X), torch.empty(6, 4)), ValueError,
       "dequantize: out must be contiguous (4, 6), got (6, 4) with strides (4, 1)"),
    at("dequantize4", lambda: dequantize4(quantize(X, 2)), ValueError,
       "dequantize4: expected codes of 4 bits, got 2"),
    at("dequantize4 channels", lambda: dequantize4(quantize_channels(X)), TypeError,
       "dequantize4: quantized must be Codes, got ChannelCodes"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS)
def test_refuses(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_quantize4_and_back():
    x = torch.randn(40, 40)
    quantized = quantize4(x)
    assert isinstance(quantized, lowmem.Codes)
    assert quantized.nbytes == 800 + 4 * 7
    groups = nn.functional.pad(x.flatten(), (0, 192), value=float(x[0, 0])).reshape(7, 256)
    half_codes = (groups.amax(1) - groups.amin(1)) / 30 * 1.02  # minimum and scale are bfloat16
    assert ((dequantize4(quantized) - x).flatten().abs() <= half_codes.repeat_interleave(256)[:1600] + 0.02).all()
    out = torch.empty(40, 40)
    assert dequantize4(quantized, out) is out
    assert torch.equal(out, dequantize(quantized))
    own = torch.Generator().manual_seed(3)
    first = quantize4(x, stochastic=True, generator=own)
    assert torch.equal(first.codes, quantize4(x, stochastic=True, generator=own.manual_seed(3)).codes)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", ops.BITS)
def test_quantize_channels_and_back(bits, dtype, layout):
    x = (torch.randn(8, 5, 6, 7) * torch.tensor([0.1, 1, 10, 1, 0]).view(-1, 1, 1)
         + torch.tensor([0.0, 0.3, -4, 3, 0.5]).view(-1, 1, 1))
    x = x.to(dtype).contiguous(memory_format=layout)
    quantized = quantize_channels(x, bits)
    assert isinstance(quantized, lowmem.ChannelCodes)
    std, mean = torch.std_mean(x.double(), (0, 2, 3), correction=0)
    for got, exact in ((quantized.mean, mean), (quantized.std, std)):
        torch.testing.assert_close(got.double(), exact, rtol=2.0**-24, atol=1e-12)  # float64, rounded once
    span = codes.RANGES[bits]
    found = dequantize(quantized)
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    # Half a cell within the grid, whose ends are half the range less a cell from the mean; the type's rounding.
    half, ends = std.view(-1, 1, 1) * span / 2**bits / 2, std.view(-1, 1, 1) * span * (0.5 - 2.0**-bits)
    inside = (x.double() - mean.view(-1, 1, 1)).abs() < ends
    error = (found.double() - x.double()).abs()
    bound = half * 1.001 + x.double().abs() * 2 * torch.finfo(dtype).eps + 1e-5
    assert (error <= bound)[inside].all()
    # An edge is at 0: signs survive in the channels whose grid reaches it.
    assert ((found < 0) == (x < 0))[:, :3].all() or bits == 2
    out = torch.empty_like(x)
    assert dequantize(quantized, out) is out
    assert torch.equal(out, found)


def test_settings_are_numbers_of_any_library():
    assert type(quantize(X, np.int64(2)).bits) is int
    channels = quantize_channels(X, np.uint8(8), range=np.float32(7))
    assert (type(channels.bits), channels.bits, channels.span) == (int, 8, 7.0)


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_stays_finite(dtype, bits):
    """The type's last numbers, alone and with smaller ones; deviations whose squares no float holds."""
    last, small = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    for values in ((last, -last), (last, last), (-last, 0.0), (last, -last, 1.0, last / 3), (small, -small)):
        x = torch.tensor(values, dtype=dtype).repeat(64)[:, None]
        for positive in (False, True):
            for stochastic in (False, True):
                assert dequantize(quantize(x, bits, stochastic=stochastic, positive=positive)).isfinite().all()
        found = dequantize(quantize_channels(x, bits))
        assert found.isfinite().all()
        # Half a cell, in a channel whose deviation is its greatest magnitude at most.
        half = codes.RANGES[bits] / 2**bits / 2 * float(x.double().std(correction=0))
        error = half * 1.01 + torch.finfo(dtype).eps * x.double().abs() + small
        inside = (x.double() - x.double().mean()).abs() < (2**bits - 2) * half  # of the grid
        assert ((found.double() - x.double()).abs() <= error)[inside].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_channel_that_is_not_finite_is_nan(value):
    x = torch.randn(6, 4, 3)
    x[2, 1, 0] = value
    for bits in ops.BITS:
        found = dequantize(quantize_channels(x, bits))
        assert found[:, 1].isnan().all()
        assert found[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_codes_of_channels_do_not_depend_on_their_scale(scale):
    x = torch.randn(40, 3, 5)
    assert torch.equal(quantize_channels(x * 2.0 ** round(math.log2(scale))).codes, quantize_channels(x).codes)


def test_range_of_channels():
    x = torch.randn(64, 3, 5)
    wide, narrow = (quantize_channels(x, 4, range=span) for span in (20.0, 6.0))
    assert (dequantize(wide) - x).square().mean() > 3 * (dequantize(narrow) - x).square().mean()
    assert wide.span == 20.0


# --- codes as objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [lowmem.quantize, lowmem.quantize_channels])
def test_codes_are_loaded_by_weights_only_and_moved(quantize):
    quantized = quantize(torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last), 4)
    file = io.BytesIO()
    torch.save({"codes": quantized}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["codes"]
    assert torch.equal(lowmem.dequantize(loaded), lowmem.dequantize(quantized))
    assert quantized.to("cpu") is quantized.to(torch.device("cpu")) is quantized
    moved = quantized.to("meta")
    assert type(moved) is type(quantized)
    assert moved.codes.device.type == "meta"
    assert moved.shape == quantized.shape
    with pytest.raises(TypeError, match=f"{type(quantized).__name__}.to: device must be a torch.device, str or int"):
        quantized.to(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_greatest_numbers_stay_finite_and_nan_shows(bits, dtype):
    greatest = torch.finfo(dtype).max
    for values in ([greatest, -greatest] * 25, [greatest] * 50, [0.0] * 49 + [greatest], [-greatest] * 49 + [greatest]):
        x = torch.tensor(values * 2, dtype=dtype).reshape(1, 2, 50)
        for quantized in (lowmem.quantize(x, bits), lowmem.quantize(x, bits, stochastic=True, positive=True),
                          lowmem.quantize_channels(x, bits), lowmem.quantize_channels(x, bits, range=20)):
            assert lowmem.dequantize(quantized).isfinite().all()
    x = torch.randn(3, 4, 10).to(dtype)
    x[1, 2, 3] = float("nan")
    found = lowmem.dequantize(lowmem.quantize_channels(x, bits)).isnan()
    assert found.all(2).all(0).tolist() == [False, False, True, False]
    assert int(found.sum()) == 30


def test_empty_cache(monkeypatch):
    """Also what another thread has."""
    monkeypatch.setattr(_stored, "_FRESH_BYTES", 0)
    model = lowmem.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)))

    def run():
        model(torch.randn(4, 3, 9, 9)).sum().backward()

    thread = threading.Thread(target=run)
    thread.start(), thread.join()
    run()
    assert _stored._workspace.memory.nbytes
    lowmem.empty_cache()
    assert not any(memory.bytes.nbytes for memory in _stored._memories)
    run()
    assert _stored._workspace.memory.nbytes
