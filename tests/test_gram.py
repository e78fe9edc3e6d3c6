"""Gram matrices and transposes of packed rows, exactly, against integer products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_ext import PackedTensor, binary
from lowbit_ext.helstrom._gram import gram, transpose

FEATURES = (1, 63, 64, 65, 127, 128, 129, 512, 513, 4096)


def rows(count, features, rng, density=0.3):
    dense = (torch.rand(count, features, generator=rng) < density).float()
    return dense, binary.binarize(dense, "step")


@pytest.mark.parametrize("features", FEATURES)
def test_gram_is_exact(isa, threads, features, rng):
    for count, others in ((0, 3), (1, 1), (3, 0), (17, 33), (70, 64)):
        a, packed_a = rows(count, features, rng)
        b, packed_b = rows(others, features, rng, 0.8)
        product = gram(packed_a, packed_b)
        assert product.dtype == torch.int32
        assert torch.equal(product.double(), a.double() @ b.double().t())
        assert torch.equal(gram(packed_a).double(), a.double() @ a.double().t())
        assert torch.equal(transpose(packed_a).unpack(), a.t())


def test_blocks_of_rows_and_co_occurrence_counts(rng):
    a, packed = rows(2500, 70, rng)
    assert torch.equal(gram(packed).double(), a.double() @ a.double().t())
    out = torch.full((2500, 2600), -1, dtype=torch.int32)[:, :2500]
    assert gram(packed, out=out) is out
    assert torch.equal(out, gram(packed))
    columns = transpose(packed)
    assert columns.shape == (70, 2500)
    assert torch.equal(columns.unpack(), a.t())
    assert torch.equal(gram(columns).double(), a.double().t() @ a.double())


def test_many_ones(rng):
    ones = binary.binarize(torch.ones(3, 70_001), "step")
    assert bool((gram(ones) == 70_001).all())


def test_no_features():
    nothing = PackedTensor(torch.zeros((3, 0), dtype=torch.int64), 0, "step")
    assert torch.equal(gram(nothing), torch.zeros((3, 3), dtype=torch.int32))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 200), others=st.integers(0, 200), features=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_size(count, others, features, seed):
    rng = torch.Generator().manual_seed(seed)
    a, packed_a = rows(count, features, rng)
    b, packed_b = rows(others, features, rng)
    assert torch.equal(gram(packed_a, packed_b).double(), a.double() @ b.double().t())
    assert torch.equal(transpose(packed_a).unpack(), a.t())


STEP = binary.binarize(torch.ones(2, 5), "step")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gram(torch.ones(2, 5)), TypeError, "gram: a must be a PackedTensor, got Tensor"),
        (lambda: gram(binary.binarize(torch.ones(2, 5))), ValueError,
         "gram: a must be rows (N, d) of encoding 'step' without a scale, got (2, 5) of encoding 'sign'"),
        (lambda: gram(STEP, binary.binarize(torch.ones(2, 5, 3), "step")), ValueError,
         "gram: b must be rows (N, d) of encoding 'step' without a scale, got (2, 5, 3) of encoding 'step'"),
        (lambda: gram(STEP, binary.binarize(torch.ones(2, 6), "step")), ValueError,
         "gram: a and b must have the same number of features, got 5 and 6"),
        (lambda: gram(PackedTensor(torch.zeros((0, 2**24), dtype=torch.int64), 2**30, "step")), ValueError,
         "gram: a has 1073741824 features; fewer than 2^30 keep the products in int32"),
        (lambda: gram(STEP, out=torch.zeros(2, 3, dtype=torch.int32)), ValueError,
         "gram: out must be an int32 tensor (2, 2) on cpu, got torch.int32 (2, 3) on cpu"),
        (lambda: gram(STEP, out=[1]), TypeError, "gram: out must be a tensor, got list"),
        (lambda: transpose([1]), TypeError, "transpose: a must be a PackedTensor, got list"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
