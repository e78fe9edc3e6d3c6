"""binary_conv2d with a program of steps: equal to the reference, bit for bit, on every level and thread count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import BACKENDS, generator, running_on
from epilogue_programs import assert_same, encoded, random_steps
from lowbit_ext import _native
from lowbit_ext.binary import binarize, ops, pack_weight
from reference import binary, epilogue

POINT = ops.Geometry(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)


def accumulators(x, w, geometry, encoding, padding_value):
    a = binary.activation(x, encoding, 0.5 if encoding == "step" else 0.0)
    padding = geometry.padding
    acc = binary.conv2d(a, binary.sign(w), geometry.stride, padding, geometry.dilation, geometry.groups, padding_value)
    return acc.float()  # integers


@pytest.mark.host_cuda
@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.sampled_from([1, 45, 64, 65]), st.integers(3, 9), st.integers(3, 9)),
    filters=st.sampled_from([1, 5, 63, 64, 65, 127, 128, 129]),
    groups=st.sampled_from([1, 1, 2]),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    encoding=st.sampled_from(["sign", "step"]),
    padding_value=st.sampled_from([0, 1]),
    count=st.integers(1, 16),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_program(sizes, filters, groups, kernel, stride, encoding, padding_value, count, backend, seed):
    with running_on(backend):
        rng = generator(seed)
        batch, channels, height, width = sizes
        channels, filters = channels * groups, filters * groups
        pad = kernel // 2
        geometry = ops.Geometry(kernel, kernel, stride, stride, pad, pad, pad, pad, 1, 1, groups)
        x = torch.randn(batch, channels, height, width, generator=rng)
        w = torch.randn(filters, channels // groups, kernel, kernel, generator=rng)
        acc = accumulators(x, w, geometry, encoding, padding_value)
        steps = random_steps(rng, acc.shape, 1, count)
        got = ops.binary_conv2d_epilogue(
            binarize(x, encoding).words, pack_weight(w, groups).blocked, channels, filters, geometry, encoding,
            padding_value, *encoded(steps),
        )
        assert_same(got, epilogue.run(acc, steps, 1)[1])


def test_residual_block(backend, threads, rng):
    """Batch norm, residual, shifts, PReLU and the next layer's bits, with the stream kept and rounded."""
    x, w = torch.randn(2, 64, 28, 28, generator=rng), torch.randn(128, 64, 3, 3, generator=rng)
    geometry = ops.Geometry(3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    acc = accumulators(x, w, geometry, "sign", 0)
    a, b, c, d, e = (torch.randn(128, generator=rng) for _ in range(5))
    stream = torch.randn(2, 128, 28, 28, generator=rng).bfloat16().to(memory_format=torch.channels_last)
    steps = [("multiply_add", 0, (a, b)), ("add_tensor", 0, (stream,)), ("add", 0, (c,)), ("prelu", 0, (d,)),
             ("add", 0, (e,)), ("store", 1, ()), ("bits", 1, (torch.zeros(1, 128), None))]
    got = ops.binary_conv2d_epilogue(binarize(x).words, pack_weight(w).blocked, 64, 128, geometry, "sign", 0,
                                     *encoded(steps))
    assert_same(got, epilogue.run(acc, steps, 1)[1])
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_fused_multiply_add_rounds_once(backend):
    """1 + 2^-12 squared needs 25 bits: rounded on its own, the product loses what the sum then shows."""
    factor = torch.tensor([1 + 2.0**-12])
    value = torch.full((1, 1), 1 + 2.0**-12)
    (got,) = ops.pointwise(value, [], "none", False, 0, *encoded_at(0, [
        ("multiply_add", 0, (factor, torch.tensor([-1 - 2.0**-11]))), ("store", 0, ()),
    ]))
    assert got.item() == 2.0**-24


def encoded_at(before, steps):
    numbers, operands = encoded(steps)
    return numbers, before, operands


def test_planned_call_in_place_and_in_slices(backend, rng):
    """What an executor does: a kept table of addresses, a stream written over itself, slices of larger tensors."""
    x, w = torch.randn(2, 70, 9, 8, generator=rng), torch.randn(64, 70, 1, 1, generator=rng)
    words, weight = binarize(x).words, pack_weight(w).blocked
    acc = accumulators(x, w, POINT, "sign", 0)
    wide = torch.randn(2, 9, 8, 100, generator=rng)
    bits = torch.full((2, 9, 8, 3), -1)
    stream, zero = wide[..., 20:84].permute(0, 3, 1, 2), torch.zeros(1, 64)
    steps = [("add_tensor", 0, (stream.clone(),)), ("store", 0, ()), ("bits", 1, (zero, None))]
    expected_stream, expected_bits = epilogue.run(acc, steps, 1)[1]
    expected_wide = wide.clone()
    expected_wide[..., 20:84] = expected_stream.permute(0, 2, 3, 1)
    native = _native.kernels(words)
    table = ops.step_table("planned", [
        ops.Step("add_tensor", 0, (stream,)), ops.Step("store", 0, (stream,)),
        ops.Step("bits", 1, (zero, None, bits[..., 1:2])),
    ], words)
    shape = ops.conv_shape(2, 9, 8, 70, 64, (9, 8), POINT)
    plan = (shape, ops.ENCODINGS["sign"], 0)
    size = native.binary_conv2d_epilogue_workspace_bytes(*plan, table.data_ptr(), len(table))
    workspace = _native.workspace(size, words)
    status = native.binary_conv2d_epilogue(
        *plan, words.data_ptr(), weight.data_ptr(), table.data_ptr(), len(table), workspace.data_ptr(), size
    )
    assert status == 0
    assert torch.equal(wide, expected_wide)
    assert torch.equal(bits[..., 1], expected_bits[..., 0])
    assert (bits[..., ::2] == -1).all()


def test_native_refuses_wrong_steps(device):
    words = torch.zeros(1, 2, 2, 1, dtype=torch.int64)
    floats = torch.zeros(64)
    native = _native.kernels(words)
    plan = (ops.conv_shape(1, 2, 2, 64, 64, (2, 2), POINT), ops.ENCODINGS["sign"], 0)
    weight = pack_weight(torch.ones(64, 64, 1, 1)).blocked
    at, kinds = floats.data_ptr(), ops.STEP_KINDS
    for row in ([-1, 0, at, at, at, 64], [9, 0, at, at, at, 64], [kinds["store"], 3, 0, 0, at, 64],
                [kinds["store"], 0, 0, 0, at, 63], [kinds["store"], 0, 0, 0, 0, 64], [kinds["add"], 0, 0, 0, 0, 0],
                [kinds["clamp"], 0, at, 0, 0, 0], [kinds["bits"], 3, at, 0, at, 3], [kinds["bits"], 2, at, 0, at, 1],
                [kinds["add_tensor"], 0, at, 0, 0, 2**62]):
        table = torch.tensor([row], device="cpu")
        size = native.binary_conv2d_epilogue_workspace_bytes(*plan, table.data_ptr(), 1)
        workspace = _native.workspace(size, words)
        status = native.binary_conv2d_epilogue(
            *plan, words.data_ptr(), weight.data_ptr(), table.data_ptr(), 1, workspace.data_ptr(), size
        )
        assert status in (_native.cpu.STATUSES["bad_argument"], _native.cpu.STATUSES["bad_shape"]), row


def test_compiled(device, rng):
    x, w = torch.randn(2, 40, 8, 8, generator=rng), torch.randn(70, 40, 3, 3, generator=rng)
    words, weight = binarize(x).words, pack_weight(w)
    geometry = ops.Geometry(3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    steps, operands = encoded([("multiply_add", 0, (torch.rand(70), torch.rand(70))), ("store", 0, ()),
                               ("bits", 2, (torch.zeros(2, 70), None))])

    def call(words, weight, *operands):
        return ops.binary_conv2d_epilogue(words, weight, 40, 70, geometry, "sign", 0, steps, list(operands))

    expected = call(words, weight.blocked, *operands)
    assert_same(torch.compile(call, fullgraph=True)(words, weight.words, *operands), expected)
