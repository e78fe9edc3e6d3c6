"""lowmem.saved_tensors: what is coded and what is not, exact masks and indices, once a piece of memory, versions."""

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowbit_ext.lowmem import _stored, convert, hooks, ledger, saved_tensors
from lowmem_networks import joined, make, relative, step


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def gradients(function, *inputs, context=None, **options):
    """Gradients of `function` of leaves made of inputs, under the context."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    with context or contextlib.nullcontext():
        out = function(*leaves)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape).to(out), **options)
    return [leaf.grad for leaf in leaves if leaf.is_floating_point()]


def transformer():
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 24), nn.Softmax(-1),
                         nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 8)).train()


# --- accuracy and size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
# Steps of 1/3, 1/15 and 1/255 of the range.
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.5), (4, 0.12), (8, 0.008)])
def test_gradients_are_close(bits, bound, stochastic):
    model = transformer()
    exact = joined(step(model, (64, 16)))
    with saved_tensors(bits, stochastic, min_numel=0):
        out = step(model, (64, 16))
    assert 0 < relative(joined(out), exact) < bound * (2 if stochastic else 1)


def test_stores_codes_in_place_of_floats():
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 24), nn.Softmax(-1),
                          nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))
    with ledger(model) as before:
        model(torch.randn(512, 16))
    for bits in (2, 4, 8):
        with ledger(model) as book, saved_tensors(bits):
            model(torch.randn(512, 16))
        floats = sum(entry.stored for entry in before.entries if entry.shape != (32,))  # batch norm's statistics
        expected = floats * (bits + 0.125) / 32 + before.stored - floats
        assert expected <= book.stored < 1.02 * expected  # groups end with the tensor
        assert book.equivalent == before.stored
        assert {entry.shape for entry in book.full_precision} == {(32,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded", "scalar", "empty"]
)
def test_layouts(layout, dtype):
    """exp keeps its result in any layout: what is read has the same elements, in the same order of memory if dense."""
    x = torch.randn(4, 6, 5, 8, dtype=dtype)
    x = {
        "contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "transposed": x.transpose(0, 2),
        "sliced": x[:, ::2, 1:], "expanded": x[:, :1].expand(-1, 3, -1, -1), "scalar": x[0, 0, 0, 0], "empty": x[:0],
    }[layout]
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(ctx.saved_tensors[0])
            return grad * seen[0] * 2

    with saved_tensors(8, min_numel=0):
        # Not a leaf, which would be kept as it is.
        out = Square.apply(x.detach().requires_grad_().as_strided(x.shape, x.stride(), x.storage_offset()).view_as(x))
    out.sum().backward()
    assert seen[0].shape == x.shape
    assert seen[0].dtype == dtype
    if layout in ("contiguous", "channels_last", "transposed"):
        assert seen[0].stride() == x.stride()
    if x.numel():
        x = x.detach().double()
        # Half a step, or, of what is clipped, one; minimum and scale are bfloat16.
        code = (x.max() - x.min() + x.abs().max() / 128) / 255 * (1 + 1 / 128)
        assert (seen[0].double() - x).abs().max() <= code + 2 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_types_are_kept_as_they_are(dtype):
    x = torch.randn(40, 40, dtype=dtype).requires_grad_()
    exact = torch.autograd.grad((x * 2).sin().abs().sum(), x)[0]
    with saved_tensors(2, min_numel=0):
        loss = (x * 2).sin().abs().sum()
    assert torch.equal(torch.autograd.grad(loss, x)[0], exact)


# --- exact ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([2, 4, 8]), st.booleans())
def test_relu_masks_are_exact(shape, bits, stochastic):
    x = torch.randn(shape) * 10.0 ** torch.randint(-6, 3, shape)  # far below the step of the codes as well
    for inplace in (False, True):
        def relu(x, inplace=inplace):
            return F.relu(x + 0, inplace)

        expected = gradients(relu, x)
        assert torch.equal(*gradients(relu, x, context=saved_tensors(bits, stochastic, min_numel=0)), *expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_bool_masks_take_a_bit_and_are_exact(shape):
    x, mask = torch.randn(shape), torch.rand(shape) < 0.5
    with ledger() as book:
        got = gradients(torch.where, mask, x, x + 1, context=saved_tensors(min_numel=0))
    assert all(map(torch.equal, got, gradients(torch.where, mask, x, x + 1)))
    if x.numel():
        assert [(e.dtype, e.stored, e.equivalent) for e in book.entries] == [
            (torch.uint8, -(-x.numel() // 8), x.numel())
        ]


@pytest.mark.parametrize(
    ("size", "dtype"), [(16, torch.uint8), (20, torch.int16), (200, torch.uint16), (260, torch.int32)]
)
def test_pool_indices_are_narrow_and_exact(size, dtype):
    x = torch.randn(1, 2, size, size)

    def pool(x):
        return F.max_pool2d(x, 2)

    with ledger() as book:
        got = gradients(pool, x, context=saved_tensors(min_numel=0))
    assert torch.equal(*got, *gradients(pool, x))
    entry = next(entry for entry in book.entries if not entry.dtype.is_floating_point)
    assert entry.dtype == dtype
    assert entry.equivalent == 8 * 2 * (size // 2) ** 2


class Buffer(nn.Module):
    """A large buffer that the input is multiplied by."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.randn(64, 64))

    def forward(self, x):
        return x * self.gain


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [
    lambda: nn.Linear(64, 64), lambda: nn.Conv1d(64, 64, 3, padding=1), Buffer,
    lambda: nn.Sequential(nn.Linear(64, 64, bias=False), nn.Conv1d(64, 64, 1), Buffer()),
])
def test_weights_are_not_coded(build, autocast, frozen):
    """The input's gradient reads weights and buffers alone: it is exact, under autocast too, where they are casts."""
    model = build().requires_grad_(not frozen)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x * 1)

    x = torch.randn(64, 64)
    assert torch.equal(*gradients(run, x, context=saved_tensors(2, min_numel=0)), *gradients(run, x))


def test_tensors_to_keep():
    x, y = torch.randn(64, 64), torch.randn(64, 64).requires_grad_()
    with saved_tensors(2, keep=[x]):
        out = (y * x).sum()
    out.backward()
    assert torch.equal(y.grad, x)


# --- once a piece of memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)),
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)),
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 4, 1)),
])
def test_what_relu_and_the_next_layer_keep_is_packed_once(model):
    x = torch.randn(64, 64)
    with ledger(model) as book, saved_tensors(4):
        model(x)
    codes = [entry for entry in book.entries if entry.dtype == torch.uint8]
    assert [(entry.module, entry.stored) for entry in codes] == [("0", 2048), ("1", 2048)]


def test_codes_live_as_long_as_the_graph():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    context = saved_tensors(4)
    with context:
        for _ in range(3):
            model(torch.randn(64, 64)).sum().backward()
            assert not context._coded
        out = model(torch.randn(64, 64))
        assert len(context._coded) == 2
    del out
    assert not context._coded


def test_a_piece_that_changed_is_packed_again():
    x = torch.randn(64, 64).requires_grad_()
    with saved_tensors(8):
        y = x * 1
        first = (x * y.detach()).sum()
        y.detach().mul_(100)
        second = (x * y.detach()).sum()
    small, large = (torch.autograd.grad(out, x)[0] for out in (first, second))
    torch.testing.assert_close(small, x.detach(), rtol=0, atol=0.02)  # half a step of 8 / 255
    torch.testing.assert_close(large, 100 * x.detach(), rtol=0, atol=2)


# --- modification, graphs, nesting ------------------------------------------------------------------------------------


def test_packed_values_are_read_as_they_were():
    x = torch.randn(64, 64).requires_grad_()
    for change in (False, True):
        with saved_tensors(8):
            y = x * 2
            out = y * y
        if change:
            y.detach().zero_()
        grad = torch.autograd.grad(out.sum(), x)[0]
        torch.testing.assert_close(grad, 8 * x.detach(), rtol=0, atol=0.1)  # half a step of 4 times 8 / 255


@pytest.mark.parametrize("context", [lambda: saved_tensors(4), ledger])
def test_modification_in_place_of_what_is_kept_is_detected(context):
    layer = nn.Linear(64, 64)
    with context():
        out = layer(torch.randn(8, 64).requires_grad_())
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="a tensor needed for the backward pass was modified in place"):
        out.sum().backward()


@pytest.mark.parametrize("context", [lambda: saved_tensors(4, min_numel=10**6), lambda: saved_tensors(4), ledger])
def test_graphs_that_never_go_backward_are_freed(context):
    gc.disable()
    try:
        with context():
            out = torch.randn(64, 64).requires_grad_().exp()  # keeps its own result
        kept = StorageWeakRef(out.untyped_storage())
        del out
        assert kept.expired()
    finally:
        gc.enable()


def test_retain_graph():
    model = transformer()
    with saved_tensors(4, stochastic=True):
        loss = model(torch.randn(64, 16)).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), first, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    """Within a checkpoint nothing is kept; what is behind it is coded. In the reentrant form the context is not there
    when the part runs again."""
    front, back = transformer(), nn.Sequential(nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 8))

    def run(x):
        return back(torch.utils.checkpoint.checkpoint(front, x, use_reentrant=reentrant))

    x = torch.randn(64, 16)
    with saved_tensors(4, min_numel=0):
        run(x.requires_grad_()).square().sum().backward()
    found = [p.grad.clone() for p in (*front.parameters(), *back.parameters())]
    front.zero_grad(), back.zero_grad()
    run(x).square().sum().backward()
    exact = [p.grad for p in (*front.parameters(), *back.parameters())]
    errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(errors) < 0.3
    assert errors[-2] > 0, "the last layer read rounded values"


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast(frozen):
    model = transformer().requires_grad_(not frozen)
    results = []
    for context in (contextlib.nullcontext(), saved_tensors(8, min_numel=0)):
        with context, torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, (64, 16)))
    assert torch.equal(results[0][0], results[1][0])
    assert 0 < relative(joined(results[1]), joined(results[0])) < 0.02


def test_the_innermost_of_nested_contexts_counts():
    x = torch.randn(64, 64).requires_grad_()
    stored = []
    for first, second in ((2, 8), (8, 2)):
        with ledger() as book, saved_tensors(first), saved_tensors(second):
            (x * 1).square()
        stored.append(book.stored)
    assert stored == [64 * 64 + 64, 64 * 64 // 4 + 64]
    with saved_tensors(4) as context, context, ledger() as book:
        (x * 1).square()
    assert book.stored == 64 * 64 // 2 + 64


def test_converted_models_within():
    """Codes of a converted model are no floats: they stay; the rest is coded."""
    plain, shape = make("vgg")
    model = convert(plain)
    expected = step(model, shape)
    with ledger(model) as before:
        model(torch.randn(shape))
    with ledger(model) as book, saved_tensors(8, min_numel=0):
        model(torch.randn(shape))
    assert book.stored < before.stored
    assert not book.full_precision
    with saved_tensors(8, min_numel=0):
        got = step(model, shape)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2]["4.weight"], expected[2]["4.weight"])
    assert relative(joined(got), joined(expected)) < 0.01


# --- stochastic rounding ----------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_reproducible():
    x = torch.randn(64, 64)

    def run(seed, generator):
        torch.manual_seed(seed)
        context = saved_tensors(4, True, generator=generator)
        return gradients(lambda x: (x * 1).square(), x, context=context)[0]

    assert torch.equal(run(1, None), run(1, None))
    assert not torch.equal(run(1, None), run(2, None))
    own = torch.Generator()
    assert torch.equal(run(1, own.manual_seed(5)), run(2, own.manual_seed(5)))
    assert not torch.equal(run(1, own), run(1, own))


def test_stochastic_rounding_is_unbiased():
    """The mean of 400 runs is within five standard errors of the exact gradient; rounding to the nearest is not.

    A code is a third of 0.9; an element's standard deviation is at most half of it.
    """
    x = torch.rand(40, 40) * 0.9 + 0.05
    exact = gradients(lambda x: (x * 1).square(), x)[0]
    seeds = torch.Generator().manual_seed(1)
    context = saved_tensors(2, True, min_numel=0, generator=seeds)
    runs = torch.stack([gradients(lambda x: (x * 1).square(), x, context=context)[0] for _ in range(400)]).double()
    weight = (exact / x / 2).abs()  # error of the gradient over that of the element, halved
    deviations = (runs - exact).mean(0) / (0.15 * 2 * weight / 20)
    assert deviations.abs().max() < 5
    assert abs(float(deviations.mean())) < 5 / 40
    nearest = gradients(lambda x: (x * 1).square(), x, context=saved_tensors(2, min_numel=0))[0]
    assert (nearest - exact).abs().mean() > 0.1


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(bits=3), ValueError, "saved_tensors: bits must be 2, 4 or 8, got 3"),
    (dict(bits="4"), TypeError, "saved_tensors: bits must be an int, got str"),
    (dict(min_numel=-1), ValueError, "saved_tensors: min_numel must not be negative, got -1"),
    (dict(min_numel=None), TypeError, "saved_tensors: min_numel must be an int, got NoneType"),
    (dict(stochastic="yes"), TypeError, "saved_tensors: stochastic must be a bool, got str"),
    (dict(generator=3), TypeError, "saved_tensors: generator must be a torch.Generator or None, got int"),
    (dict(keep=3), TypeError, "saved_tensors: keep must be tensors, got int"),
    (dict(keep=[None]), TypeError, "saved_tensors: keep must be tensors, got NoneType"),
    (dict(compiled=True, keep=[torch.ones(1)]), ValueError,
     "saved_tensors: compiled hooks take neither a generator nor tensors to keep"),
    (dict(compiled=True, generator=torch.Generator()), ValueError, "compiled hooks take neither a generator"),
])
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        saved_tensors(**arguments)


def test_refuses_compiled_hooks_within_a_ledger():
    with ledger(), pytest.raises(RuntimeError, match="a ledger cannot see into compiled graphs"), saved_tensors(
        compiled=True
    ):
        pass


def test_operator_decides_at_every_call():
    """group_quantize_saved has codes above 0 for all positive elements where 0 is the smallest."""
    x = torch.tensor([0.0, 1e-6, 1.0])
    assert hooks.quantize_saved(x, 8, None)[0][:2].tolist() == [0, 1]
    for shift in (-0.5, 0.5):
        assert hooks.quantize_saved(x + shift, 8, None)[0][:2].tolist() == [0, 0]
    # What a GPU does, without a look at the smallest element.
    for values in (x, x - 0.5, x + 0.5, torch.randn(700), torch.randn(700).relu()):
        for seed in (None, torch.tensor(3)):
            got, expected = (f(values, 4, seed) for f in (_stored.quantize_both_ways, hooks.quantize_saved))
            assert all(map(torch.equal, got, expected))
