"""Steps on float pixels and windows between them: equal to the reference on every level and thread count."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import BACKENDS, generator, running_on
from epilogue_programs import assert_same, encoded, random_steps
from lowbit_ext.binary import ops
from reference import epilogue


@st.composite
def windows(draw):
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    return ops.Window(*kernel, *stride, *padding, 1, 1, int(draw(st.booleans())))


def layouts(x):
    """x in the memory orders that kernels read in place, and in one that they do not."""
    last = x.movedim(1, -1)
    wide = torch.empty(*last.shape[:-1], last.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1:-2] = last
    return {
        "channels first": x.contiguous(),
        "channels last": last.contiguous().movedim(-1, 1),
        "slice": wide[..., 1:-2].movedim(-1, 1),
        "permuted": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


@pytest.mark.host_cuda
@settings(max_examples=200, deadline=None)
@given(
    window=windows(),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sizes=st.tuples(
        st.integers(0, 2), st.sampled_from([1, 5, 63, 64, 65, 127, 128, 129]), st.integers(7, 12), st.integers(7, 40)
    ),
    reduction=st.sampled_from(["none", "maximum", "average"]),
    include=st.booleans(),
    divisor=st.sampled_from([0, 3]),
    dtype=st.sampled_from(epilogue.DTYPES),
    layout=st.sampled_from(["channels first", "channels last", "slice", "permuted"]),
    counts=st.tuples(st.integers(0, 5), st.integers(1, 8)),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_pass(
    window, dilation, sizes, reduction, include, divisor, dtype, layout, counts, backend, seed
):
    with running_on(backend):
        rng = generator(seed)
        x = layouts(torch.randn(sizes, generator=rng).to(dtype))[layout]
        before = [] if reduction == "none" else random_steps(rng, x.shape, 1, counts[0], writing=False)
        value, _ = epilogue.run(x.float(), before, 1)
        if reduction == "maximum":
            window = window._replace(dilation_height=dilation[0], dilation_width=dilation[1])
            value = F.max_pool2d(value, window.kernel, window.stride, window.padding, window.dilation,
                                 bool(window.ceil_mode))
        elif reduction == "average":
            value = epilogue.average(value, window, include, divisor)
        after = random_steps(rng, value.shape, 1, counts[1])
        numbers, operands = encoded(before + after)
        got = ops.pointwise(x, window if reduction != "none" else [], reduction, include, divisor, numbers,
                            len(before), operands)
        assert_same(got, epilogue.run(value, after, 1)[1])


@pytest.mark.parametrize("dtype", epilogue.DTYPES)
@pytest.mark.parametrize("include", [True, False])
def test_average_is_torchs(backend, dtype, include, rng):
    x = torch.randn(2, 70, 11, 13, generator=rng).to(dtype)
    window = ops.Window(3, 2, 2, 2, 1, 1, 1, 1, 1)
    (got,) = ops.pointwise(x, window, "average", include, 0, *encoded_before(0, [("store", epilogue.DTYPES.index(dtype),
                                                                                 ())]))
    expected = F.avg_pool2d(x.cpu(), (3, 2), 2, 1, ceil_mode=True, count_include_pad=include)
    assert torch.equal(got.cpu(), expected)


def encoded_before(before, steps):
    numbers, operands = encoded(steps)
    return numbers, before, operands


@pytest.mark.parametrize("shape", [(5, 70), (0, 70), (2, 9, 70), (3, 1, 64), (2, 0, 65)])
def test_vectors_and_rows(backend, threads, shape, rng):
    axis = len(shape) - 1
    wide = torch.randn(*shape[:-1], shape[-1] + 6, generator=rng)
    for x in (wide[..., :-6].contiguous(), wide[..., :-6]):
        steps = random_steps(rng, shape, axis, 9)
        got = ops.pointwise(x, [], "none", False, 0, *encoded_before(0, steps))
        assert_same(got, epilogue.run(x, steps, axis)[1])


def test_stem(backend, threads, rng):
    """BN -> ReLU -> max-pool -> BN -> stream and bits of an ImageNet stem, one call."""
    x = torch.randn(2, 64, 56, 56, generator=rng).bfloat16().to(memory_format=torch.channels_last)
    a, b, c, d = (torch.randn(64, generator=rng) for _ in range(4))
    relu = (torch.zeros(64), torch.full((64,), float("inf")))
    before = [("multiply_add", 0, (a, b)), ("clamp", 0, relu)]
    after = [("store", 1, ()), ("multiply_add", 0, (c, d)), ("bits", 1, (torch.zeros(1, 64), None))]
    numbers, operands = encoded(before + after)
    got = ops.pointwise(x, ops.Window(3, 3, 2, 2, 1, 1, 1, 1, 0), "maximum", False, 0, numbers, 2, operands)
    pooled = F.max_pool2d(epilogue.run(x.float(), before, 1)[0], 3, 2, 1)
    assert_same(got, epilogue.run(pooled, after, 1)[1])


def test_nan_goes_through_a_maximum(backend):
    x = torch.zeros(1, 70, 4, 4)
    x[0, 3, 1, 1] = float("nan")
    window = ops.Window(2, 2, 2, 2, 0, 0, 1, 1, 0)
    (got,) = ops.pointwise(x, window, "maximum", False, 0, *encoded_before(0, [("store", 0, ())]))
    assert got.isnan().nonzero().tolist() == [[0, 3, 0, 0]]


def test_compiled(device, rng):
    x = torch.randn(2, 70, 8, 8, generator=rng)
    steps, operands = encoded([("prelu", 0, (torch.rand(70),)), ("store", 1, ()),
                               ("bits", 1, (torch.zeros(1, 70), None))])

    def call(x, *operands):
        return ops.pointwise(x + 1, [], "none", False, 0, steps, 0, list(operands))

    expected = call(x, *operands)
    assert_same(torch.compile(call, fullgraph=True)(x, *operands), expected)
    dynamic = torch.compile(call, fullgraph=True, dynamic=True)
    batch = torch.randn(5, 70, 8, 8, generator=rng)
    assert_same(dynamic(x, *operands), expected)
    assert_same(dynamic(batch, *operands), call(batch, *operands))
