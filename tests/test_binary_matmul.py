"""Matrix product of binary operands: sums equal to torch's in float64 on every level, gradients of its definition."""

import itertools

import pytest
import torch
from torch import nn

from conftest import surrogate_tolerances
from lowbit_ext import PackedTensor, _native, binary
from lowbit_ext.binary import binarize, matmul
from lowbit_ext.binary.surrogates import SURROGATES
from reference import binary as reference

ENCODINGS = list(itertools.product(("sign", "step"), repeat=2))
# Round the word, vectors of 16 and 32 columns, and the 256 rows of a part.
SIZES = [(1, 1, 1), (5, 7, 3), (17, 15, 63), (16, 33, 64), (6, 64, 65), (255, 65, 20), (257, 1, 129), (513, 17, 31),
         (1, 200, 640)]


def expected(a, b, encodings, scale=None):
    products = reference.matmul(*(
        reference.activation(x, encoding, 0.5 if encoding == "step" else 0.0)
        for x, encoding in zip((a, b), encodings, strict=True)
    ))
    return products if scale is None else products.float() * scale


@pytest.mark.parametrize("encodings", ENCODINGS)
@pytest.mark.parametrize("size", SIZES)
def test_sums_are_exact(backend, size, encodings, rng):
    rows, columns, depth = size
    a, b = torch.randn(3, rows, depth, generator=rng), torch.randn(3, depth, columns, generator=rng)
    options = dict(a_encoding=encodings[0], b_encoding=encodings[1])
    wanted = expected(a, b, encodings)
    got = matmul(a, b, out_dtype=torch.int32, **options)
    assert got.dtype == torch.int32
    assert got.is_contiguous()
    assert torch.equal(got.double(), wanted), f"{_native.active_isa()} differs at {size}"
    packed = binarize(a.mT, encodings[0]), binarize(b, encodings[1])
    assert torch.equal(matmul(*packed), got)
    assert torch.equal(matmul(packed[0], b, b_encoding=encodings[1], out_dtype=torch.int32), got)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(matmul(a, b, out_dtype=dtype, **options), wanted.to(dtype))
        scaled = matmul(*packed, scale=0.3, out_dtype=dtype)
        assert torch.equal(scaled, expected(a, b, encodings, torch.tensor(0.3)).to(dtype))


@pytest.mark.parametrize("batches", [((), ()), ((4,), ()), ((), (4,)), ((2, 1, 3), (5, 3)), ((1,), (6,)), ((0,), (1,))])
def test_batches_broadcast_and_threads(backend, threads, batches, rng):
    a = torch.randn(*batches[0], 40, 70, generator=rng)
    b = torch.randn(*batches[1], 70, 33, generator=rng)
    for transposed in (False, True):  # columns that lie together
        operand = b.mT.contiguous().mT if transposed else b
        assert torch.equal(matmul(a, operand).double(), expected(a, b, ("sign", "sign")))
    assert matmul(a[..., :0, :], b).shape == (*torch.broadcast_shapes(*batches), 0, 33)
    assert matmul(a, b[..., :0]).shape == (*torch.broadcast_shapes(*batches), 40, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_default_types(dtype, rng):
    a, b = torch.randn(4, 8, generator=rng).to(dtype), torch.randn(8, 3, generator=rng)
    assert matmul(a, b.to(dtype)).dtype == dtype
    assert matmul(a, b).dtype == torch.float32
    assert matmul(binarize(a), b.to(dtype)).dtype == dtype
    scaled = PackedTensor(binarize(a).words, 8, "sign", torch.tensor(0.5))
    columns = binarize(b.t())
    assert matmul(binarize(a), columns).dtype == torch.int32
    assert torch.equal(matmul(scaled, columns, scale=4), 2.0 * matmul(binarize(a), columns))
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul(a, b).dtype == torch.bfloat16


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("encodings", ENCODINGS)
def test_gradients(device, surrogate, encodings, rng):
    """Those of the float64 product of binary values, times the surrogate's derivative; a batch that broadcasts is
    summed.
    """
    a = torch.randn(2, 3, 9, 70, generator=rng, requires_grad=True)
    b = torch.randn(3, 70, 11, generator=rng, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    grad = torch.randint(-8, 9, (2, 3, 9, 11), generator=rng).float()  # of integers and halves sums are exact
    options = dict(a_encoding=encodings[0], b_encoding=encodings[1], surrogate=surrogate)
    values = [
        reference.activation(x.detach(), encoding, 0.5 if encoding == "step" else 0.0)
        for x, encoding in zip((a, b), encodings, strict=True)
    ]
    upstream = grad.double() * 0.5
    products = upstream @ values[1].mT, (values[0].mT @ upstream).sum(0)
    learned = torch.autograd.grad(matmul(a, b, scale=scale, **options), (a, b, scale), grad)
    assert torch.equal(learned[2].double(), (grad.double() * reference.matmul(*values)).sum())
    for got in (learned[:2], torch.autograd.grad(matmul(a, b, scale=0.5, **options), (a, b), grad)):
        for x, encoding, one, product in zip((a, b), encodings, got, products, strict=True):
            wanted = product * reference.surrogate_derivative(x.detach(), surrogate, encoding)
            largest = float(product.abs().max())
            torch.testing.assert_close(one.double(), wanted, **surrogate_tolerances(surrogate, torch.float32, largest))


def test_float64_is_the_definition(rng):
    a, b = torch.randn(2, 9, 70, generator=rng).double(), torch.randn(70, 11, generator=rng).double()
    a.requires_grad_(), b.requires_grad_()
    output = matmul(a, b, a_encoding="step", scale=0.5)
    assert torch.equal(output, expected(a.detach(), b.detach(), ("step", "sign")) * 0.5)
    assert all(grad is not None for grad in torch.autograd.grad(output.sum(), (a, b)))


class Attention(nn.Module):
    """Of one binary layer before it and one behind it."""

    def __init__(self):
        super().__init__()
        self.project = binary.BinaryLinear(32, 96, bias=False)
        self.norm = nn.LayerNorm(96)
        self.out = binary.BinaryLinear(32, 32)

    def forward(self, x):
        q, k, v = self.norm(self.project(x)).chunk(3, -1)
        weights = matmul(q, k.mT, scale=32**-0.5).softmax(-1)
        return self.out(matmul(weights * 8, v, a_encoding="step"))


def test_attention_trains_and_packs(rng):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 20, 32, generator=rng)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    packed = binary.pack(model.eval(), x)
    assert [runs for _, kind, runs, _ in packed.report() if kind == "matmul"] == ["as it was"] * 2
    with torch.inference_mode():
        assert torch.equal(packed(x), model(x))
        assert torch.equal(packed(x[:1]), model(x[:1]))


def test_compile(rng):
    a, b = torch.randn(2, 9, 70, generator=rng), torch.randn(2, 70, 11, generator=rng)

    def product(a, b):
        return matmul(a, b, b_encoding="step", scale=0.5)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), product(a, b))
    a.requires_grad_()
    got, expected = (torch.autograd.grad(function(a, b).sum(), a)[0] for function in (compiled, product))
    assert torch.equal(got, expected)
