"""Gradients of the convolution: within twice torch's own float32 error of the float64 reference, on every level."""

import pytest
import torch

from conftest import assert_as_good, assert_gradient, sum_bound, surrogate_tolerances
from lowbit_ext import _native
from lowbit_ext.binary import binarize, conv1d, conv2d, linear, ops, pack_weight
from lowbit_ext.packed import unpack_op
from reference import binary as reference

# (batch, channels, (height, width), filters, kernel, stride, padding, dilation, groups)
CALLS = [
    (2, 70, (6, 5), 9, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, (4, 4), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (3, 64, (14, 14), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 129, (7, 9), 65, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (2, 33, (11, 8), 17, (2, 5), (3, 1), (2, 3), (2, 1), 1),
    (2, 99, (5, 6), 66, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    (2, 128, (5, 6), 256, (3, 3), (1, 2), (0, 1), (1, 1), 2),
    (2, 6, (5, 5), 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (1, 40, (3, 3), 130, (5, 5), (4, 4), (2, 2), (1, 1), 1),
    (0, 40, (3, 3), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
]


def float_gradients(a, s, g, stride, sides, dilation, groups, padding_value, dtype):
    """Gradients of the binary values a and s by torch's own convolution in `dtype`."""
    a, s = (value.detach().to(dtype, copy=True).requires_grad_() for value in (a, s))
    top, left, bottom, right = sides
    padded = torch.nn.functional.pad(a, (left, right, top, bottom), value=float(padding_value))
    torch.nn.functional.conv2d(padded, s, stride=stride, dilation=dilation, groups=groups).backward(g.to(dtype))
    return a.grad, s.grad


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize(("encoding", "padding_value"), [("sign", 0), ("sign", -1), ("step", 1)])
def test_kernels(backend, call, encoding, padding_value, rng):
    batch, channels, size, filters, kernel, stride, padding, dilation, groups = call
    x = torch.randn(batch, channels, *size, generator=rng)
    w = torch.randn(filters, channels // groups, *kernel, generator=rng)
    a, s = reference.activation(x, encoding, 0.5 if encoding == "step" else 0.0), reference.sign(w)
    sides = (*padding, *padding)
    out = reference.conv2d(a, s, stride, sides, dilation, groups, padding_value)
    g = torch.randn(out.shape, generator=rng)
    options = (stride, sides, dilation, groups, padding_value)
    exact = float_gradients(a, s, g, *options, torch.float64)
    plain = float_gradients(a, s, g, *options, torch.float32)
    shape = (filters, ops.Geometry(*kernel, *stride, *sides, *dilation, groups))
    words = binarize(x, encoding).words
    weight = ops.binary_conv2d_weight_grad(g, words, channels, *shape, encoding, padding_value)
    assert_gradient(weight, plain[1], exact[1], g[:, 0].numel(), f"{backend} weight")
    scale = torch.rand(filters, generator=rng)
    packed = pack_weight(w, groups)
    mask = binarize(torch.randn(x.shape, generator=rng), "step").words
    for factor, bits in ((None, None), (scale, None), (None, mask), (scale[:1], mask)):
        scaled = g if factor is None else g * factor.view(-1, 1, 1)
        exact_input = float_gradients(a, s, scaled.double(), *options, torch.float64)[0]
        plain_input = float_gradients(a, s, scaled, *options, torch.float32)[0]
        if bits is not None:
            inside = unpack_op(bits, channels, 0.0, 1.0, torch.float32).movedim(-1, 1)
            exact_input, plain_input = exact_input * inside, plain_input * inside
        got = ops.binary_conv2d_input_grad(g, packed.words, factor, bits, list(x.shape), *shape)
        assert_gradient(got, plain_input, exact_input, w[:, 0].numel(), f"{backend} input")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding_value", [0, 1])
def test_gradients_of_expanded_bits(dtype, padding_value, rng, monkeypatch):
    """What a GPU does, on the CPU: no kernel of ours, the gradient's own type, padding a side, mask and scale."""

    class NoKernels:
        def __getattr__(self, name):
            if name.endswith("_grad"):
                raise AttributeError(name)
            return getattr(_native.cpu, name)

    x, w = torch.randn(2, 33, 7, 6, generator=rng), torch.randn(6, 11, 3, 2, generator=rng)
    geometry = ops.Geometry(3, 2, 2, 1, 1, 0, 2, 1, 1, 1, 3)
    a, s = reference.activation(x, "sign", 0.0), reference.sign(w)
    options = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    out = reference.conv2d(a, s, *options, padding_value)
    g = torch.randn(out.shape, generator=rng).to(dtype)
    scale, inside = torch.rand(6, generator=rng).to(dtype).float(), torch.randn(x.shape, generator=rng) > 0
    inside[0, 0, 0, 0], mask = False, None
    with monkeypatch.context() as patch:
        patch.setattr(ops.gradients._native, "kernels", lambda tensor: NoKernels())
        patch.setattr(ops.gradients, "_check_grad_output", lambda grad, size: None)
        mask = binarize(inside.float(), "step").words
        got_input = ops.binary_conv2d_input_grad(g, pack_weight(w, 3).words, scale, mask, list(x.shape), 6, geometry)
        got_weight = ops.binary_conv2d_weight_grad(g, binarize(x).words, 33, 6, geometry, "sign", padding_value)
    assert got_input.dtype == got_weight.dtype == dtype
    assert got_input.is_contiguous(memory_format=torch.channels_last)
    scaled = g.double() * scale.double().view(-1, 1, 1)
    exact_input = float_gradients(a, s, scaled, *options, padding_value, torch.float64)[0] * inside
    exact_weight = float_gradients(a, s, g.double(), *options, padding_value, torch.float64)[1]
    epsilon = torch.finfo(dtype).eps
    for got, exact in ((got_input, exact_input), (got_weight, exact_weight)):
        # Products of the given type are exact or rounded once; the sum is rounded to it at the end.
        bound = 2 * epsilon * float(exact.abs().max()) + sum_bound(200, 4 * float(exact.abs().max()))
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=bound)


def test_threads_do_not_change_gradients(isa, rng):
    g, x, w = (torch.randn(size, generator=rng) for size in [(4, 64, 14, 14), (4, 96, 14, 14), (64, 96, 3, 3)])
    shape = (64, ops.Geometry(3, 3, *(1,) * 9))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((
            ops.binary_conv2d_weight_grad(g, binarize(x).words, 96, *shape, "sign", 0),
            ops.binary_conv2d_input_grad(g, pack_weight(w).words, None, None, list(x.shape), *shape),
        ))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("surrogate", ["clip", "steep", "identity", "approx_sign", "polynomial", "swish_sign"])
@pytest.mark.parametrize("encoding", ["sign", "step"])
def test_straight_through(device, encoding, surrogate, rng):
    """Through the functions: surrogate at the input, the sign's gradient at the weight, exact for bias and scale."""
    x = torch.randn(2, 33, 6, 5, generator=rng).requires_grad_()
    w = torch.randn(7, 33, 3, 3, generator=rng).requires_grad_()
    bias, scale = torch.randn(7, generator=rng).requires_grad_(), torch.rand(7, generator=rng).requires_grad_()
    residual = torch.randn(2, 7, 6, 5, generator=rng).requires_grad_()
    leaves = (x, w, bias, scale, residual)
    g = torch.randn(2, 7, 6, 5, generator=rng)
    options = dict(padding=1, encoding=encoding, surrogate=surrogate, bias=bias, residual=residual)
    acc = reference.conv2d(reference.activation(x, encoding, 0.5 if encoding == "step" else 0.0), reference.sign(w),
                           1, (1,) * 4, 1, 1, 0)
    a, s = reference.activation(x, encoding, 0.5 if encoding == "step" else 0.0), reference.sign(w)
    for factor in (scale, scale.detach()):
        for leaf in leaves:
            leaf.grad = None
        conv2d(x, w, scale=factor, **options).backward(g)
        scaled = g.double() * factor.detach().double().view(-1, 1, 1)
        geometry = ((1, 1), (1,) * 4, (1, 1), 1, 0)
        through, _ = float_gradients(a, s, scaled, *geometry, torch.float64)
        expected = through * reference.surrogate_derivative(x.detach(), surrogate, encoding)
        # The derivative's rounding, and that of sums of 7 filters and 9 places.
        tolerances = surrogate_tolerances(surrogate, torch.float32, float(through.abs().max()))
        tolerances["atol"] += sum_bound(7 * 9, 4 * float(expected.abs().max()))
        torch.testing.assert_close(x.grad.double(), expected, **tolerances)
        assert_as_good(bias.grad, g.sum((0, 2, 3)), g.double().sum((0, 2, 3)))
        assert torch.equal(residual.grad, g)
        if factor is scale:
            plain, exact = ((g.to(dtype) * acc.to(dtype)).sum((0, 2, 3)) for dtype in (torch.float32, torch.float64))
            assert_as_good(scale.grad, plain, exact)
        through_weight = scaled if factor is scale else g
        plain, exact = (
            float_gradients(a, s, through_weight, *geometry, dtype)[1] for dtype in (torch.float32, torch.float64)
        )
        assert_gradient(w.grad, plain, exact, g[:, 0].numel())


def test_gradients_reach_one_dimension_and_linear(device, rng):
    """Of squares of integers: integers, which float32 holds."""
    x = torch.randn(3, 20, 9, generator=rng).requires_grad_()
    w, v = torch.randn(4, 20, 3, generator=rng).requires_grad_(), torch.randn(6, 9, generator=rng).requires_grad_()
    conv1d(x, w, padding=1).square().sum().backward()
    a, s = reference.activation(x, "sign", 0.0).requires_grad_(), reference.sign(w).requires_grad_()
    torch.nn.functional.conv1d(a, s, padding=1).square().sum().backward()
    assert torch.equal(x.grad.double(), a.grad * (x.detach().abs() <= 1))
    assert torch.equal(w.grad.double(), s.grad)
    x.grad = None
    linear(x, v).square().sum().backward()
    a, s = reference.activation(x, "sign", 0.0).requires_grad_(), reference.sign(v).requires_grad_()
    (a @ s.T).square().sum().backward()
    assert torch.equal(x.grad.double(), a.grad * (x.detach().abs() <= 1))
    assert torch.equal(v.grad.double(), s.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, dtype, rng):
    x = torch.randn(2, 33, 6, 5, generator=rng).to(dtype).requires_grad_()
    w = torch.randn(7, 33, 3, 3, generator=rng).to(dtype).requires_grad_()
    out = conv2d(x, w)
    assert out.dtype == dtype
    out.sum().backward()
    a, s = reference.activation(x, "sign", 0.0).requires_grad_(), reference.sign(w).requires_grad_()
    torch.nn.functional.conv2d(a, s).sum().backward()
    assert torch.equal(x.grad, (a.grad * (x.detach().double().abs() <= 1)).to(dtype))
    assert torch.equal(w.grad, s.grad.to(dtype))


def test_only_bits_are_saved(device, rng):
    """An activation bit and a mask bit an element, and the weight's bits."""
    x = torch.randn(4, 256, 14, 14, generator=rng).requires_grad_()
    w = torch.randn(256, 256, 3, 3, generator=rng).requires_grad_()

    def saved_bytes(function):
        sizes = {}
        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function()
        return sum(sizes.values())

    ours = saved_bytes(lambda: conv2d(x, w, padding=1))
    assert ours == (2 * x.numel() + w.numel()) // 8
    emulated = saved_bytes(lambda: torch.nn.functional.conv2d(
        torch.nn.functional.hardtanh(x).sign(), w.sign(), padding=1))
    assert 10 * ours <= emulated
