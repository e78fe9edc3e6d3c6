"""Sign, step and ternary activations: values, straight-through gradients, layouts, what they keep."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from conftest import sum_bound, surrogate_tolerances
from lowbit_ext import binary, duo
from lowbit_ext.binary import ops
from lowbit_ext.binary.surrogates import SURROGATES, derivative
from reference import binary as binary_reference
from reference import duo as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (0, 1, 63, 64, 65, 127, 128, 129, 1000)


def numbers(count, dtype, rng):
    """Normal numbers round 1/2, with thresholds, interval ends, their neighbours and special values among them."""
    x = (torch.randn(count, generator=rng) + 0.5).to(dtype)
    points = torch.tensor([-1, -0.5, -0.0, 0.0, 0.25, 0.5, 0.75, 1.0], dtype=dtype)
    up, down = torch.full_like(points, math.inf), torch.full_like(points, -math.inf)
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf], dtype=dtype)
    if dtype == torch.float16:  # torch has no nextafter for it
        steps = torch.finfo(dtype).eps * points.abs().clamp_min(2.0**-14)
        near = torch.cat([points + steps, points - steps])
    else:
        near = torch.cat([torch.nextafter(points, up), torch.nextafter(points, down)])
    special = torch.cat([points, near, special])
    x[: len(special)] = special[: len(x)]
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", ["sign", "step", "ternary"])
def test_values_and_mask_are_exact(backend, threads, levels, dtype, rng):
    exact = {"sign": binary_reference.sign, "step": reference.step, "ternary": reference.ternary}[levels]
    for count in (*COUNTS, 100_000):
        x = numbers(count, dtype, rng)
        output, mask = ops.quantized_activation_with_mask(x, levels, 0.0, 1.0, False)
        assert output.dtype == dtype
        assert torch.equal(output.double(), exact(x))
        assert torch.equal(ops.quantized_activation(x, levels), output)
        gradient = torch.randn(count, generator=rng).to(dtype)
        masked = ops.masked_gradient(gradient, mask)
        assert torch.equal(masked, torch.where(reference.clip_derivative(x).bool(), gradient, 0))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_ternary_is_the_mean_of_two_steps(dtype, rng):
    """t(y) = (b(y - 1/4) + b(y + 1/4)) / 2, exact where y -+ 1/4 is: at multiples of 1/1024."""
    y = (torch.randint(-2048, 3072, (5000,), generator=rng).double() / 1024).to(dtype)
    pair = duo.step_activation(y.double() - 0.25) + duo.step_activation(y.double() + 0.25)
    assert torch.equal(duo.ternary_activation(y).double(), pair / 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("activation", [duo.ternary_activation, duo.step_activation])
def test_gradient_is_the_surrogate(device, activation, surrogate, dtype, rng):
    x = (torch.randn(3, 7, 5, generator=rng) + 0.5).to(dtype).requires_grad_()
    grad = torch.randn(3, 7, 5, generator=rng).to(dtype)
    (got,) = torch.autograd.grad(activation(x, surrogate), x, grad)
    wide = x.detach().double()
    step = binary_reference.surrogate_derivative
    if activation is duo.step_activation:
        slope = step(wide, surrogate, "step")
    elif surrogate in ("clip", "steep"):
        slope = reference.clip_derivative(wide)
    else:
        slope = (step(wide - 0.25, surrogate, "step") + step(wide + 0.25, surrogate, "step")) / 2
    tolerances = surrogate_tolerances(surrogate, dtype, float(grad.abs().max()))
    torch.testing.assert_close(got.double(), grad.double() * slope, **tolerances)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=5), order=st.randoms(use_true_random=False),
    strided=st.booleans(), surrogate=st.sampled_from(["clip", "steep", "identity", "polynomial"]),
)
def test_any_shape_and_memory_order(shape, order, strided, surrogate):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).permute(axes)
    if strided and x.dim():
        x = torch.stack([x, x], -1)[..., 0]
    x = x.detach().requires_grad_()
    output = duo.ternary_activation(x, surrogate)
    assert torch.equal(output.double(), reference.ternary(x.detach()))
    if not strided:
        assert output.stride() == x.stride() or x.numel() < 2 or 1 in x.shape
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))  # contiguous, unlike x
    (got,) = torch.autograd.grad(output, x, grad)
    torch.testing.assert_close(got, grad * derivative(x.detach(), surrogate, "ternary"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [duo.TernaryActivation(), duo.StepActivation(), binary.BinaryActivation()])
def test_one_bit_an_element_is_kept(device, module):
    saved = []
    x = torch.randn(8, 64, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage()) or t, lambda t: t):
        output = module(x)
    assert sum(storage.nbytes() for storage in saved) == x.numel() // 8
    assert output.untyped_storage().data_ptr() not in [storage.data_ptr() for storage in saved]


def test_compiles_to_one_graph_and_autocasts():
    def loss(x):
        return (duo.ternary_activation(2 * x) * torch.arange(6.0)).sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = torch.linspace(-1, 1, 60).reshape(10, 6).requires_grad_()
        function(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    with torch.autocast("cpu", torch.bfloat16):
        layer = torch.nn.Sequential(torch.nn.Linear(6, 6), duo.TernaryActivation())
        assert layer(torch.randn(2, 6)).dtype == torch.bfloat16


def coupled_step(layer, activation, x, autocast):
    """Gradients of one step, and whether the layer's float input outlived the forward pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        values = activation(x)
        storage = StorageWeakRef(values.untyped_storage())
        output = layer(values)
    del values
    kept = not storage.expired()
    (output.float().square().sum() + output.float().sum()).backward()
    return [x.grad, *(p.grad for p in layer.parameters())], kept


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["conv", "strided", "circular", "linear"])
def test_coupled_layers_keep_two_bits_of_their_input(kind, dtype, autocast, rng):
    if kind == "linear":
        make = partial(duo.CoupledLinear, 70, 9)
        x = torch.randn(5, 70, generator=rng)
    else:
        options = {"conv": {"padding": 1}, "strided": {"stride": 2, "groups": 2, "bias": False}, "circular": {
            "padding": 1, "padding_mode": "circular"}}[kind]
        make = partial(duo.CoupledConv2d, 70, 8, 3, **options)
        x = torch.randn(2, 70, 9, 5, generator=rng)
        if kind == "conv":
            x = x.to(memory_format=torch.channels_last)
    x = (x + 0.5).to(dtype)
    layers = [make(save_codes=save_codes).to(dtype) for save_codes in (True, False)]
    layers[1].load_state_dict(layers[0].state_dict())
    (codes, codes_kept), (values, values_kept) = (
        coupled_step(layer, duo.TernaryActivation(), x, autocast) for layer in layers
    )
    assert all(map(torch.equal, codes, values))
    if kind != "circular" and not (autocast and dtype != torch.bfloat16):  # which convert and keep a copy
        assert (codes_kept, values_kept) == (False, True)


def test_coupled_layers_keep_other_inputs_as_they_are(rng):
    layer = duo.CoupledLinear(6, 3)
    x = torch.randn(4, 6, generator=rng)
    (gradient, *_), kept = coupled_step(layer, nn.Identity(), x, False)
    assert kept
    assert gradient.isfinite().all()
    codes = duo.ternary_activation(torch.randn(4, 6, generator=rng)).requires_grad_()
    empty = duo.ternary_activation(torch.randn(0, 6, generator=rng)).requires_grad_()
    for inputs in (codes, empty):
        output = layer(inputs)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)[0]
        first.square().sum().backward()  # twice differentiable
    assert torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, codes).sum())(
        layer.weight.detach()
    ).shape == (3, 6)


@pytest.mark.parametrize("weight_scale", ["layer", "channel", None])
def test_coupled_layers_use_binary_weights(weight_scale):
    torch.manual_seed(0)
    conv = duo.CoupledConv2d(5, 4, 3, padding=1, bias=False, weight_scale=weight_scale).double()
    linear = duo.CoupledLinear(5, 4, weight_scale=weight_scale).double()
    with torch.no_grad():
        conv.weight[0, 0] = 0.0  # sign(0) = +1
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    for layer, run in ((conv, F.conv2d), (linear, F.linear)):
        magnitude = layer.weight.detach().abs()
        scale = {"layer": magnitude.mean(), "channel": magnitude.flatten(1).mean(1), None: torch.ones(1)}[weight_scale]
        signs = torch.where(layer.weight.detach() >= 0, 1.0, -1.0).double()
        quantised = (signs * scale.reshape(-1, *(1,) * (signs.dim() - 1))).requires_grad_()
        value = x if layer is conv else x[:, :, 0, 0]
        expected = run(value, quantised, layer.bias, **({"padding": 1} if layer is conv else {}))
        output = layer(value)
        assert torch.equal(output, expected)
        grad = torch.randn_like(output)
        got = torch.autograd.grad(output, (x, layer.weight), grad)
        want = torch.autograd.grad(expected, (x, quantised), grad)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="CoupledConv2d: weight_scale must be one of 'channel', 'layer', None"):
        duo.CoupledConv2d(4, 4, 3, weight_scale="filter")


@pytest.mark.parametrize("options", [
    dict(encoding="sign", padding_value=-1, weight_scale="channel"),
    dict(encoding="step", surrogate="identity", weight_scale="layer"),
    dict(encoding="sign", padding_value=0, weight_scale=None, surrogate="swish_sign"),
])
def test_float64_layers_equal_the_kernels(options, rng):
    """Binary layers in float64, by torch's operators, against the same layers in float32 by the kernels."""
    torch.manual_seed(0)
    layer = binary.BinaryConv2d(70, 12, 3, stride=2, padding=1, groups=2, **options)
    x = torch.randn(2, 70, 9, 8, generator=rng)
    grad = torch.randn(2, 12, 5, 4, generator=rng)
    results = []
    for dtype in (torch.float32, torch.float64):
        layer = layer.to(dtype)
        value = x.to(dtype).requires_grad_()
        output = layer(value)
        assert output.dtype == dtype
        results.append((output, *torch.autograd.grad(output, (value, layer.weight, layer.bias), grad.to(dtype))))
    for ours, exact in zip(*results, strict=True):
        bound = sum_bound(35 * 9, 4 * float(exact.detach().abs().max()))  # the longest sums, over a filter's weights
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound)
