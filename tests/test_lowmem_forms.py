"""lowmem.saved_tensors: the form that each derivative asks for; masks, thresholds, quotients, exponentials, curves."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowbit_ext.lowmem import _forms, ledger, saved_tensors
from lowmem_networks import relative


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def gradient(function, x, context=None):
    """Gradient of a sum with random weights of function(x)."""
    leaf = x.detach().clone().requires_grad_()
    with context or contextlib.nullcontext():
        out = function(leaf * 1)
    torch.manual_seed(3)
    return torch.autograd.grad(out, leaf, torch.randn(out.shape).to(out.dtype))[0]


# --- each derivative --------------------------------------------------------------------------------------------------

# From 1e-3 to 1e3 in groups of 256: codes do not tell most elements from 0.
_WIDE = torch.logspace(-3, 3, 2048)[torch.randperm(2048, generator=torch.Generator().manual_seed(1))]
QUOTIENTS = {
    "log": torch.log, "log2": torch.log2, "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "division of 1": lambda x: 1 / x, "division": lambda x: torch.ones(2048) / x,
    "division by another": lambda x: x / x.flip(0), "power": lambda x: x**-1.5, "root": lambda x: x.pow(1 / 3),
    "norm": lambda x: x.view(1024, 2).norm(dim=1), "x log y": lambda x: torch.xlogy(torch.ones(2048), x),
    "exp": lambda x: x.log().exp(), "log-sum-exp": lambda x: x.log().view(1024, 2).logsumexp(1),
    "addcdiv": lambda x: torch.addcdiv(x, torch.ones(2048), x + 1), "abs": lambda x: (x - 1).abs(),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", QUOTIENTS)
def test_quotients_and_exponentials(name, bits):
    """Read in half precision: an error of 1/256 in each of at most four factors."""
    exact = gradient(QUOTIENTS[name], _WIDE)
    assert relative(gradient(QUOTIENTS[name], _WIDE, saved_tensors(bits)), exact) < 4 / 256


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_probabilities(bits):
    """Sigmoid by its logit, log-softmax without what is beyond exp(-30): half a code of 8 bits is 34 / 510 at most."""
    logits = torch.randn(64, 64) * 8
    targets = (torch.rand(64, 64) < 0.5).float()
    for function in (
        torch.sigmoid, lambda x: F.binary_cross_entropy(x.sigmoid(), targets, reduction="none"),
        lambda x: F.binary_cross_entropy(x.sigmoid().flatten(), targets.flatten(), reduction="none"),
        lambda x: x.log_softmax(1), lambda x: F.cross_entropy(x, targets.argmax(1), reduction="none"),
        lambda x: F.log_softmax(x.masked_fill(targets == 0, -1e4), 1),
    ):
        exact = gradient(function, logits)
        assert relative(gradient(function, logits, saved_tensors(bits)), exact) < 0.07


THRESHOLDS = {
    "hardtanh": F.hardtanh, "relu6": F.relu6, "module": nn.ReLU6(), "in place": lambda x: F.relu6(x * 1, True),
    "bounds": lambda x: F.hardtanh(x, -0.3, 0.2), "hardsigmoid": F.hardsigmoid, "leaky": F.leaky_relu,
    "leaky in place": lambda x: F.leaky_relu(x * 1, 0.2, True), "threshold": lambda x: F.threshold(x, 0.7, 5.0),
    "clamp": lambda x: x.clamp(-0.5, 2), "clamp below": lambda x: x.clamp(min=0.1),
    "clamp above": lambda x: x.clamp(max=0.1), "clip": lambda x: torch.clip(x, max=1.0),
    "clamp_min": lambda x: x.clamp_min(-1), "clamp_max": lambda x: x.clamp_max(-1),
    "hardshrink": F.hardshrink, "softshrink": F.softshrink, "relu": F.relu,
}


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_are_exact_in_a_bit(name, dtype):
    x = (torch.randn(40, 40) * 4).to(dtype)
    with ledger() as book:
        got = gradient(THRESHOLDS[name], x, saved_tensors(2))
    assert torch.equal(got, gradient(THRESHOLDS[name], x))
    if name != "relu":
        assert [entry.stored for entry in book.entries] == [200]


@pytest.mark.parametrize("function", [torch.amax, torch.amin, torch.max, torch.min, torch.cumprod])
def test_comparisons_with_a_result_are_exact(function):
    x = torch.randn(40, 40)
    arguments = {torch.amax: (1,), torch.amin: (1,), torch.cumprod: (1,)}.get(function, ())
    exact = gradient(lambda x: function(x, *arguments), x)
    assert torch.equal(gradient(lambda x: function(x, *arguments), x, saved_tensors(2)), exact)


# --- curves -----------------------------------------------------------------------------------------------------------

CURVES = {
    "silu": F.silu, "gelu": F.gelu, "tanh": lambda x: F.gelu(x, approximate="tanh"), "hardswish": F.hardswish,
    "mish": F.mish, "in place": lambda x: F.silu(x * 1, True), "module": nn.GELU(),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CURVES)
def test_curves_keep_their_argument_for_two(name, layout):
    """Eight bits of it, from which a reader of the result has that as well."""
    x = torch.randn(2, 32, 8, 8).to(memory_format=layout)
    weight = torch.randn(4, 32, 1, 1, requires_grad=True)

    grads = []
    for context in (contextlib.nullcontext(), saved_tensors(4)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with ledger() as book, context:
            y = CURVES[name](leaf * 1)
            out = F.conv2d(y, weight)
        grads.append(torch.autograd.grad(out.square().sum(), (leaf, weight)))
    assert book.stored == 4096 + 4096 // 256 * 4 + weight.nbytes
    assert book.equivalent == 2 * 4 * 4096 + weight.nbytes
    for got, exact in zip(grads[1], grads[0], strict=True):
        # Half a step of 1/255 of a range of some seven deviations, and as much of the function.
        assert relative(got, exact) < 0.03


def test_a_curves_result_that_changed_is_coded_itself():
    x = torch.randn(40, 40, requires_grad=True)
    weight = torch.randn(40, 40, requires_grad=True)
    with saved_tensors(8):
        y = F.silu(x * 1)
        y.detach().mul_(-3)
        out = y @ weight
    got = torch.autograd.grad(out.sum(), weight)[0]
    exact = (F.silu(x.detach()) * -3).sum(0)[:, None].expand(-1, 40)
    assert relative(got, exact) < 0.02


# --- constants, masks, what codes do not resolve ----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.integers(1, 600), st.integers(0, 2**31))
def test_dictionaries_are_exact(values, count, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(values, generator=generator) * 10.0 ** torch.randint(-30, 30, (values,), generator=generator)
    table[0] = -math.inf
    flat = table[torch.randint(values, (count,), generator=generator)]
    (words, found), decode = _forms.dictionary(flat)
    assert len(words) <= -(-count // (8 if len(flat.unique()) <= 2 else 2))
    assert torch.equal(decode(words, found), flat)
    assert _forms.dictionary(torch.arange(17.0)) is None
    assert _forms.dictionary(torch.full((17,), math.nan)) is None


MASKS = {
    "boolean": torch.ones(48, 48, dtype=torch.bool).tril(), "infinite": torch.full((48, 48), -math.inf).triu(1),
    "-1e4": torch.full((48, 48), -1e4).triu(1), "least": torch.full((48, 48), torch.finfo(torch.float32).min).triu(1),
    "slopes": -(torch.arange(48.0)[:, None] - torch.arange(48.0)).abs() * 8, "none": None,
    "mixed": torch.randn(48, 48) + torch.full((48, 48), -1e4).triu(1),
}


@pytest.mark.parametrize("dropout", [0.0, 0.25])  # above 0: composed of matrix products on the CPU
@pytest.mark.parametrize("mask", MASKS)
def test_attention_masks(mask, dropout):
    q, k, v = (torch.randn(2, 2, 48, 16) for _ in range(3))
    grads = []
    for context in (contextlib.nullcontext(), saved_tensors(8)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(4)
        with context:
            out = F.scaled_dot_product_attention(*(x * 1 for x in leaves), MASKS[mask], dropout)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), leaves)]))
    assert relative(grads[1], grads[0]) < 0.05


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformer_layers_with_padding(bits, options):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0, **options)
    x, ends = torch.randn(4, 40, 32, requires_grad=True), torch.tensor([39, 20, 30, 10])
    padding = torch.arange(40) > ends[:, None]
    grads = []
    for context in (contextlib.nullcontext(), saved_tensors(bits)):
        with context:
            loss = layer(x, src_key_padding_mask=padding).square().mean()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (x, *layer.parameters()))]))
    assert relative(grads[1], grads[0]) < {4: 0.12, 8: 0.01}[bits]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sigmoid_and_binary_cross_entropy(bits):
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1), nn.Sigmoid())
    net[2].weight.data *= 8
    x = torch.randn(8, 3, 32, 32)
    targets = (x.mean(1, keepdim=True) > 0).float()
    norms = []
    for context in (contextlib.nullcontext(), saved_tensors(bits)):
        with context:
            loss = F.binary_cross_entropy(net(x), targets)
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]).norm())
    assert abs(norms[1] / norms[0] - 1) < 0.1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_kept(value):
    x = torch.randn(64, 64, requires_grad=True)
    y = torch.randn(64, 64)
    y[3, 5] = value
    for shifted in (y, y.clone().requires_grad_() * 1):
        with saved_tensors(4):
            out = (x * shifted).sum()
        assert torch.equal(torch.autograd.grad(out, x)[0].nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_logits_with_a_mask_among_them(bits):
    """Half precision where an operation without a rule keeps what codes do not resolve."""
    hidden, x = torch.rand(64, 64) < 0.5, torch.randn(64, 64).requires_grad_()
    scale = torch.ones(64, 64, requires_grad=True)
    with saved_tensors(bits):
        out = (x.masked_fill(hidden, -1e4) * scale).sum()
    (got,) = torch.autograd.grad(out, scale)
    assert relative(got[~hidden], x.detach()[~hidden]) < 1 / 256


def test_statistics_of_norms_are_exact_and_rows_have_scales_of_their_own():
    """A row of a thousandth of the others' scale, as of a class token at the beginning of training."""
    x = torch.randn(1500, 192) + torch.arange(1500.0)[:, None]
    x[::7] *= 1e-3
    norm = nn.LayerNorm(192)
    grads = [gradient(norm, x, context) for context in (None, saved_tensors(4))]
    for rows in (slice(0, None, 7), slice(1, None, 7)):
        assert relative(grads[1][rows], grads[0][rows]) < 0.1
    with ledger(norm) as book, saved_tensors(4):
        norm(x.requires_grad_() * 1)
    assert sorted(entry.stored for entry in book.entries) == [6000] * 4 + [1500 * 96]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [F.gelu, F.relu6, torch.sigmoid])
def test_composes_with_torch_compile_and_checkpoint(function):
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64))

    def run(x):
        return function(model(x))

    x = torch.randn(64, 32, requires_grad=True)
    exact = torch.autograd.grad(run(x).square().sum(), x)[0]
    calls = (
        torch.compile(run, backend="aot_eager"),
        lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False),
    )
    for call in calls:
        with saved_tensors(8):
            loss = call(x).square().sum()
        assert relative(torch.autograd.grad(loss, x)[0], exact) < 0.05
