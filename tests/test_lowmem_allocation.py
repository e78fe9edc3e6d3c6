"""lowmem.allocate_bits: what a plan says, that saved_tensors follows it, what it gains, refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext.lowmem import BitPlan, allocate_bits, ledger, saved_tensors
from lowmem_networks import relative


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def cross_entropy(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def with_gradients(model, batch, bits):
    """(bytes kept, all gradients); bits None: exact."""
    with ledger(model) as book:
        if bits is None:
            loss = cross_entropy(model, batch)
        else:
            with saved_tensors(bits):
                loss = cross_entropy(model, batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return book.stored, torch.cat([grad.flatten() for grad in grads]).double()


class Concatenating(nn.Module):
    """As GoogLeNet: branches of convolutions, batch norm and ReLU, joined."""

    def __init__(self, channels, width):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, size, padding=size // 2), nn.BatchNorm2d(width), nn.ReLU())
            for size in (1, 3, 5)
        )

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def concatenating():
    layers = [Concatenating(3, 8), Concatenating(24, 8), nn.MaxPool2d(2), Concatenating(24, 16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)), (16, 3, 16, 16)


class Inverted(nn.Module):
    """As MobileNetV2: a narrow sum, and a wide depthwise convolution between two of 1x1."""

    def __init__(self, channels, wide):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.layers(x)


def depthwise():
    layers = [nn.Conv2d(3, 16, 3, 2), *(Inverted(16, 64) for _ in range(4))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), (16, 3, 32, 32)


def transformer():
    layers = [nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.LayerNorm(32), nn.Flatten(), nn.Linear(32 * 24, 10)), (16, 24, 32)


@pytest.mark.parametrize("build", [concatenating, depthwise, transformer])
def test_smaller_errors_in_as_many_bytes(build):
    """Also of another batch than the plan was made with; of the depthwise network on the plan's own alone."""
    for seed in range(2):
        torch.manual_seed(seed)
        model, shape = build()
        # Smooth images: of noise, batch norms of few values have gradients that are differences of large terms.
        batches = [(torch.randn(shape), torch.arange(16) % 10) for _ in range(2)]
        if len(shape) == 4:
            batches = [(F.interpolate(x[..., ::4, ::4], shape[2:], mode="bicubic"), labels) for x, labels in batches]
        plan = allocate_bits(model, cross_entropy, batches[0])
        assert 3.5 < plan.average <= 4
        errors = []
        for batch in batches:
            _, exact = with_gradients(model, batch, None)
            (kept, uniform), (planned_kept, planned) = (with_gradients(model, batch, bits) for bits in (4, plan))
            assert planned_kept <= kept
            errors += [relative(uniform, exact), relative(planned, exact)]
        text = ", ".join(f"{error:.4f}" for error in errors)
        print(f"{build.__name__}, seed {seed}: {planned_kept / 1e6:.2f} of {kept / 1e6:.2f} MB; 4 bits, plan: {text}")
        assert errors[1] < errors[0]
        assert errors[3] < errors[2] or build is depthwise


def test_the_ends_of_the_budget_are_uniform():
    model, shape = concatenating()
    batch = torch.randn(shape), torch.arange(16) % 10
    for budget in (2, 8):
        plan = allocate_bits(model, cross_entropy, batch, budget)
        assert plan.average == budget
        assert {bits for found in plan.bits.values() for bits in found} == {budget}
        got, expected = (with_gradients(model, batch, bits) for bits in (plan, budget))
        assert got[0] == expected[0]
        assert torch.equal(got[1], expected[1])


def test_plans_are_followed_by_name_and_order():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Tanh()

        def forward(self, x):
            x = self.first(x * 2)
            return self.first(x.sinh()).cosh()

    model, x = Model(), torch.randn(64, 64, requires_grad=True)
    plan = BitPlan({"first": (2, 8), "": (4, 2)}, 4.0)
    sizes = []
    for bits in (plan, pickle.loads(pickle.dumps(plan))):
        with ledger(model) as book, saved_tensors(bits):
            model(x).square()
        sizes.append([8 * entry.stored // 4096 for entry in book.entries if entry.stored > 128])
    # Both results of tanh, which sinh and cosh read as well, and that of cosh, which is kept outside of all modules.
    assert sizes == [[2, 8, 4]] * 2
    with ledger(model) as book, saved_tensors(plan):  # several steps within one context
        kept = [model(x), model(x)]
    assert [8 * entry.stored // 4096 for entry in book.entries if entry.stored > 128] == [2, 8] * 2
    del kept


def test_leaves_model_and_generator_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 10))
    batch = torch.randn(64, 64), torch.arange(64) % 10
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    plan = allocate_bits(model, cross_entropy, batch, 5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(plan.bits) == {"0", "1", "3"}, "the input, the norm's, tanh's result"
    empty = allocate_bits(nn.Linear(4, 10), cross_entropy, (torch.randn(3, 4), torch.arange(3)))
    assert empty == BitPlan({}, 0.0)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(model=3), TypeError, "allocate_bits: model must be a torch.nn.Module, got int"),
    (dict(loss=None), TypeError, "allocate_bits: loss must be a function, got NoneType"),
    (dict(budget="4"), TypeError, "allocate_bits: budget must be a number or a tensor, got str"),
    (dict(budget=1.5), ValueError, "allocate_bits: budget must be from 2 to 8 bits an element, got 1.5"),
    (dict(min_numel=-1), ValueError, "allocate_bits: min_numel must be at least 0, got -1"),
    (dict(model=nn.ReLU()), ValueError, "allocate_bits: model has no parameter that requires a gradient"),
    (dict(loss=lambda model, batch: 3), TypeError, "allocate_bits: loss must return a scalar tensor, got int"),
])
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        allocate_bits(**{"model": nn.Linear(2, 2), "loss": cross_entropy, "batch": None, **arguments})


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: BitPlan([], 4.0), TypeError, "BitPlan: bits must be a dict, got list"),
    (lambda: BitPlan({"a": [4]}, 4.0), TypeError, r"BitPlan: bits must be tuples by names of layers, got \[4\] by 'a'"),
    (lambda: BitPlan({"a": (3,)}, 4.0), ValueError, "BitPlan: bits must be 2, 4 or 8, got 3"),
    (lambda: BitPlan({}, None), TypeError, "BitPlan: average must be a number or a tensor, got NoneType"),
    (lambda: saved_tensors(BitPlan({}, 4.0), compiled=True), ValueError,
     "saved_tensors: compiled hooks take neither a generator nor tensors to keep nor a BitPlan"),
])
def test_refuses_plans(make, error, message):
    with pytest.raises(error, match=message):
        make()
