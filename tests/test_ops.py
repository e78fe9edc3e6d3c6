"""Every operator through torch's own checks, and the functions through compile, export and vmap's refusals."""

import pytest
import torch
from torch.library import opcheck

from conftest import generator
from lowbit_ext import PackedTensor, _oplib, lowmem
from lowbit_ext.binary import binarize, conv2d, linear, max_pool2d, pack_weight

GEOMETRY = (5, [3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1)  # filters, kernel, stride, padding, dilation, groups


def samples(layout):
    """One call of each operator, {name: arguments}."""
    rng = generator(0)
    x = torch.randn(2, 70, 6, 7, generator=rng)
    if layout == "permuted":
        x = torch.randn(7, 6, 70, 2, generator=rng).permute(3, 2, 1, 0)
    elif layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    words = binarize(x).words
    weight = pack_weight(torch.randn(5, 70, 3, 3, generator=rng))
    grad = torch.randn(2, 5, 6, 7, generator=rng)
    thresholds = torch.zeros(2, 5, dtype=torch.int32)
    conv = (70, *GEOMETRY, "sign", 0)
    logits = torch.randn(70, 6, generator=rng).t() if layout == "permuted" else torch.randn(6, 70, generator=rng)
    statistics, affine = (torch.zeros(70), torch.ones(70)), (torch.randn(70, generator=rng), torch.ones(70))
    last = layout == "channels_last"
    codes = torch.zeros((2, 6, 7, 35) if last else (2, 70, 21), dtype=torch.uint8)
    flat = torch.zeros(x.numel() // 2, dtype=torch.uint8)
    scale_minimum = torch.ones(-(-x.numel() // lowmem.ops.GROUP), 2, dtype=torch.bfloat16)
    last_or_dense = x.clone() if last else x.contiguous()
    return {
        "lowbit::binarize": [
            (x, None, None, 0.0, "sign"),
            (x, torch.zeros(70), torch.zeros(70, dtype=torch.bool), 0.0, "step"),
            (x, torch.zeros(2, 70), torch.zeros(2, 70, dtype=torch.bool), 0.0, "step"),
        ],
        "lowbit::binarize_with_mask": [(x, 0.0, "sign"), (x, 0.5, "step")],
        "lowbit::quantized_activation": [(x, "sign"), (x, "step"), (x, "ternary")],
        "lowbit::quantized_activation_with_mask": [(x, "ternary", 0.0, 1.0, False), (x, "sign", -1.0, 1.0, True)],
        "lowbit::masked_gradient": [(x, torch.zeros((x.numel() + 63) // 64, dtype=torch.int64))],
        "lowbit::unpack": [(words, 70, -1.0, 1.0, torch.float32), (words, 70, 0.0, 1.0, torch.bfloat16)],
        "lowbit::binary_conv2d_block_weight": [(weight.words, 70, 1)],
        "lowbit::binary_conv2d": [
            (words, weight.blocked, None, None, None, None, None, *conv, torch.int32),
            (words, weight.blocked, torch.ones(5), torch.ones(5), grad, None, None, *conv, torch.float32),
            (words, weight.blocked, None, None, None, thresholds, None, *conv, torch.int32),
        ],
        "lowbit::binary_conv2d_input_grad": [
            (grad, weight.words, None, None, [2, 70, 6, 7], *GEOMETRY),
            (grad.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), weight.words, torch.ones(5), words,
             [2, 70, 6, 7], *GEOMETRY),
        ],
        "lowbit::binary_conv2d_weight_grad": [(grad, words, *conv)],
        "lowbit::group_quantize_saved": [(x, 4, None), (x.relu(), 2, torch.tensor(3, device="cpu"))],
        "lowbit::antithetic_sample": [
            (logits, None, 4, "dirichlet", "sample", torch.tensor(1), 0),
            (logits, -logits.abs(), 9, "gaussian", "dimension", torch.tensor(1), 7),
        ],
        "lowbit::antithetic_gradient": [
            (torch.ones(6, 70, dtype=torch.uint8), torch.randn(6, 4), logits, 70, "sample"),
            (torch.ones(4, 6, 2, dtype=torch.int64), torch.randn(6, 4), None, 70, "dimension"),
        ],
        "lowbit::batch_norm_relu_quantize": [
            (x, *statistics, *affine, 4, 8.0, x.clone()),
            (x.bfloat16(), *statistics, *affine, 2, 6.0, x.bfloat16()),
        ],
        "lowbit::batch_norm_quantize": [
            (x, *statistics, *affine, 4, 8.0),
            (x.bfloat16(), *statistics, *affine, 2, 6.0),
        ],
        "lowbit::channel_dequantize": [
            (codes, *affine, [2, 70, 6, 7], last, dtype, 4, 8.0, relu)
            for dtype, relu in ((torch.float32, True), (torch.float16, False))
        ],
        "lowbit::channel_dequantize_into": [(codes, *affine, last, 4, 8.0, True, last_or_dense)],
        "lowbit::batch_norm_relu_backward": [
            (x, codes, *affine, statistics[1], 4, 8.0, relu, training)
            for relu, training in ((True, True), (False, False))
        ],
        "lowbit::group_quantize": [(x, 4, False, None, 0), (x, 2, True, torch.tensor(1, device="cpu"), 16)],
        "lowbit::group_dequantize": [(flat, scale_minimum, [2, 70, 6, 7], last, torch.float16, 4)],
        "lowbit::group_dequantize_into": [(flat, scale_minimum, 4, last_or_dense)],
        "lowbit::binary_max_pool2d": [(words, None, 70, [2, 2], [2, 2], [0, 0], [1, 1], False)],
        "lowbit::binary_avg_pool2d": [(words, 70, [3, 3], [2, 2], [1, 1], True, True, 0, "sign")],
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("name", _oplib.operators())
def test_opcheck(device, name, layout):
    operator = getattr(torch.ops.lowbit, name.split("::")[1]).default
    for arguments in samples(layout)[name]:
        assert set(opcheck(operator, arguments).values()) == {"SUCCESS"}
        with_grad = tuple(
            a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        )
        # Raw operators carry no autograd rule: what remains to check on inputs that want a gradient.
        checks = ("test_schema", "test_faketensor")
        assert set(opcheck(operator, with_grad, test_utils=checks).values()) == {"SUCCESS"}


def network(x, w, v):
    """Float in, float out; packed in between."""
    bits = conv2d(x, w, padding=1, threshold=0.0)
    return conv2d(max_pool2d(bits, 2), v, scale=0.5).sum((2, 3))


def test_compiled_forward(device, rng):
    x, w, v = torch.randn(2, 40, 8, 8), torch.randn(70, 40, 3, 3), torch.randn(6, 70, 3, 3)
    expected = network(x, w, v)
    compiled = torch.compile(network, fullgraph=True)
    assert torch.equal(compiled(x, w, v), expected)
    batch = torch.randn(5, 40, 8, 8)
    dynamic = torch.compile(network, fullgraph=True, dynamic=True)
    assert torch.equal(dynamic(x, w, v), expected)
    assert torch.equal(dynamic(batch, w, v), network(batch, w, v))


def test_compiled_with_packed_arguments(device):
    x, weight = binarize(torch.randn(2, 40, 8, 8)), pack_weight(torch.randn(70, 40, 3, 3))
    compiled = torch.compile(lambda a, b: conv2d(a, b, threshold=1.0), fullgraph=True, backend="aot_eager")
    result = compiled(x, weight)
    assert isinstance(result, PackedTensor)
    assert torch.equal(result.words, conv2d(x, weight, threshold=1.0).words)


@pytest.mark.parametrize("surrogate", ["clip", "approx_sign"])
def test_compiled_backward(device, surrogate):
    def loss(x, w, b):
        return conv2d(x, w, bias=b, padding=1, surrogate=surrogate).square().mean()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        torch.manual_seed(0)
        leaves = [torch.randn(2, 40, 8, 8), torch.randn(7, 40, 3, 3), torch.randn(7)]
        for leaf in leaves:
            leaf.requires_grad_()
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-7)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = torch.nn.Parameter(torch.randn(70, 40, 3, 3)), torch.nn.Parameter(torch.randn(6, 70))

    def forward(self, x):
        with torch.no_grad():
            return linear(conv2d(x, self.w, padding=1).mean((2, 3)), self.v)


def test_export(device, tmp_path):
    model, x = Network(), torch.randn(2, 40, 8, 8)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    torch.export.save(exported, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_export_with_packed_input(device):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(6, 40, 3, 3))

        def forward(self, x):
            with torch.no_grad():
                return conv2d(x, self.w)

    model, x = Layer(), binarize(torch.randn(2, 40, 8, 8))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_profiler_sees_the_operators(device):
    x, weight = binarize(torch.randn(2, 40, 8, 8)), pack_weight(torch.randn(70, 40, 3, 3))
    with torch.profiler.profile() as profile:
        conv2d(x, weight)
    assert "lowbit::binary_conv2d" in {event.key for event in profile.key_averages()}
