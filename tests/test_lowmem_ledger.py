"""lowmem.ledger and gradient_audit: real bytes, the plain model's bytes, names and peaks; errors by layer and depth."""

import contextlib
import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lowbit_ext import lowmem, models
from lowbit_ext.lowmem import LowMemBlock, convert, gradient_audit, ledger, saved_tensors
from lowbit_ext.lowmem.audit import METHODS
from lowmem_networks import NETWORKS, make, relative


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def recount(model, x):
    """Bytes that autograd keeps, counted another way: tensors in the hands of a hook of our own, storages once."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        tensor = tensor.detach()
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    total = sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in held)
    return total, out


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_stored_is_what_is_kept_and_equivalent_what_the_plain_model_keeps(name):
    plain, shape = make(name)
    model = convert(copy.deepcopy(plain))
    x = torch.randn(shape).requires_grad_()
    before, _ = recount(plain, x)
    after, _ = recount(model, x)
    with ledger(plain) as exact:
        plain(x)
    with ledger(model) as book:
        model(x)
    assert exact.stored == exact.equivalent == exact.peak == before
    assert book.stored == book.peak == after
    # The plain model's in-place ReLU saves it a tensor that ours need not have; its dropout masks are the same.
    assert book.equivalent == before


def test_every_bit_width():
    plain, shape = make("vgg")
    x = torch.randn(shape)
    with ledger(plain) as exact:
        plain(x)
    for bits in (2, 4, 8):
        with ledger() as book:
            convert(copy.deepcopy(plain), bits)(x)
        assert book.equivalent == exact.stored
        with ledger() as coded, saved_tensors(bits, min_numel=0):
            plain(x)
        assert coded.equivalent == exact.stored
        assert coded.stored < exact.stored


@pytest.mark.parametrize(("bits", "channels", "size"), [(4, 16, 32), (4, 7, 9), (2, 16, 32), (8, 16, 32)])
def test_a_block_keeps_its_bits_and_numbers_a_channel(bits, channels, size):
    """Rows of codes are whole bytes; the numbers are one a channel: 1 / sigma. gamma and beta are the parameters."""
    block = LowMemBlock(nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 3), bits=bits)
    x = torch.randn(4, channels, size, size)
    with ledger(block) as book:
        block(x)
    row = -(-size * size * bits // 8)
    assert book.stored == 4 * channels * row + 4 * channels
    assert book.equivalent == 2 * x.nbytes + 8 * channels
    if bits == 4 and size == 32:
        assert book.stored <= 0.51 * x.numel() + 8 * channels
    assert not book.full_precision


def test_resnet_164_stores_fifteen_times_less():
    """The paper's network on images of its size, per image; a buffer is the largest activation, of which a forward pass
    has two in hand, the running sum and the branch, whatever it keeps."""
    plain = models.preact_resnet(164)
    x = torch.randn(2, 3, 32, 32)
    with ledger(plain) as exact:
        plain(x)
    with ledger(model := convert(plain)) as book:
        model(x)
    buffers = 2 * 2 * 64 * 32 * 32 * 4
    ratio = exact.stored / book.stored
    with_buffers = (exact.stored + buffers) / (book.stored + buffers)
    print(f"ResNet-164: {exact.stored / 2e6:.2f} -> {book.stored / 2e6:.2f} MB an image, {ratio:.1f} times; "
          f"with two buffers {with_buffers:.1f} times")
    assert book.equivalent == exact.stored
    assert ratio > 15
    assert with_buffers >= 12
    assert {entry.module for entry in book.full_precision} == {"conv"}


def test_storages_count_once_and_parameters_never():
    x = torch.randn(8, 8).requires_grad_()
    with ledger() as book:
        y = x * 2
        (y * y + y[2:].sum() * y.t().exp()).sum()
    assert sorted(entry.stored for entry in book.entries) == [4, 256, 256]  # y, exp's result, the sum
    layer = nn.Linear(8, 8)
    for given in (None, layer):
        with ledger(given) as book:
            layer(x)
            F.linear(x * 1, layer.weight)
        assert [entry.shape for entry in book.entries] == [(8, 8), (8, 8)], "the input, and its copy"


def test_peak_is_of_what_is_alive_together():
    layer = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    with ledger(layer) as book:
        for _ in range(3):
            x = torch.randn(64, 64)
            layer(x).sum().backward()
            del x
    assert book.stored == 6 * 64 * 64 * 4
    assert book.peak == 2 * 64 * 64 * 4
    with ledger(layer) as book:
        outs = [layer(torch.randn(64, 64)) for _ in range(3)]
    assert book.peak == book.stored
    del outs


# --- who --------------------------------------------------------------------------------------------------------------


def test_full_precision_names_who_keeps_it():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Softplus()))
    with ledger(model) as book:
        (model(torch.randn(2, 3, 8, 8)) ** 2).sum()
    # Softplus' input is conv 3's result; the square keeps that of Softplus.
    assert [(e.module, e.shape) for e in book.full_precision] == [
        ("0", (2, 3, 8, 8)), ("4", (2, 4, 4, 4)), ("outside of modules", (2, 4, 4, 4))
    ]
    text = str(book)
    assert text.startswith(f"stored {book.stored:,} bytes, peak {book.peak:,}; plain torch {book.equivalent:,} (")
    assert "full precision: 4, torch.float32 (2, 4, 4, 4), 512 bytes" in text
    with ledger() as book:
        model(torch.randn(2, 3, 8, 8))
    assert [entry.module for entry in book.full_precision] == ["Conv2d", "Softplus"]


def test_nested_ledgers_and_hooks_in_any_order():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    x = torch.randn(64, 64)
    books = []
    for contexts in ([ledger, ledger, lambda: saved_tensors(4)], [lambda: saved_tensors(4), ledger, ledger],
                     [ledger, lambda: saved_tensors(4), ledger]):
        with contextlib.ExitStack() as stack:
            entered = [stack.enter_context(context()) for context in contexts]
            out = model(x)
        out.sum().backward()
        books += [context for context in entered if isinstance(context, lowmem.Ledger)]
    assert {(book.stored, book.equivalent, len(book.entries)) for book in books} == {
        (2048 + 64 + 4096 + 64, 2 * 4 * 4096, 4)  # GELU bends at its argument: 8 bits
    }
    with ledger() as inner_first, torch.autograd.graph.save_on_cpu(), ledger() as second:
        model(x).sum().backward()
    assert not inner_first.entries
    assert second.equivalent == 2 * 4 * 4096


def test_other_threads_are_not_seen():
    x = torch.randn(64, 64).requires_grad_()
    books = {}

    def work(size):
        with ledger() as book:
            barrier.wait()
            (x[:size] * 1).exp()
            barrier.wait()
        books[size] = book.stored

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(size,)) for size in (8, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert books == {8: 8 * 64 * 4, 32: 32 * 64 * 4}


def test_refuses():
    with pytest.raises(TypeError, match=r"ledger: model must be a torch.nn.Module or None, got Tensor"):
        ledger(torch.ones(1))


# --- audit ------------------------------------------------------------------------------------------------------------


def digits(count):
    data = load_digits()
    images = torch.from_numpy(data.images[:count]).float().unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.from_numpy(data.target[:count])


def cross_entropy(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def mean_error(depth, method, bits=4, widths=(4, 8, 16)):
    """Mean relative error of the gradients of convolutions behind an activation, at initialisation."""
    torch.manual_seed(0)
    model = models.preact_resnet(depth, in_channels=1, widths=widths)
    errors = gradient_audit(model, cross_entropy, digits(64), bits=bits, method=method)
    assert [error.name for error in errors] == [name for name, _ in model.named_parameters()]
    found = [error.relative for error in errors if "conv" in error.name and error.name != "conv.weight"]
    assert len(found) >= depth - 2
    return sum(found) / len(found)


def test_errors_do_not_grow_with_depth():
    """The paper's claim. Rounding in the forward pass grows with depth, with twice the bits."""
    converted = [mean_error(depth, "convert") for depth in (20, 56)]
    hooks = [mean_error(depth, "hooks") for depth in (20, 56)]
    naive = [mean_error(depth, "naive", 8) for depth in (20, 56)]
    print(f"depths 20, 56: convert {converted}, hooks {hooks}, naive with 8 bits {naive}")
    assert max(converted) < 0.25
    assert converted[1] < 1.1 * converted[0]
    assert hooks[1] < 1.1 * hooks[0]
    assert naive[1] > 1.5 * naive[0] > 3 * converted[0]


def test_audit_measures_the_difference():
    plain, shape = make("vgg")
    batch = torch.randn(shape), torch.arange(shape[0]) % 10
    before = copy.deepcopy(plain.state_dict())
    errors = [gradient_audit(plain, cross_entropy, batch, bits=bits, range=12.0) for bits in (2, 4, 8)]
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert all(p.grad is None for p in plain.parameters())
    coarse, middle, fine = ({error.name: error for error in found} for found in errors)
    cross_entropy(plain, batch).backward()
    exact = {name: p.grad.clone() for name, p in plain.named_parameters()}
    plain.zero_grad()
    model = convert(plain, 4, 12.0)
    cross_entropy(model, batch).backward()
    for name, p in model.named_parameters():
        if exact[name].norm() > 1e-6:  # not a bias in front of a batch norm
            difference = float((p.grad - exact[name]).norm() / exact[name].norm())
            assert middle[name].relative == pytest.approx(difference, rel=1e-3, abs=1e-6)
            assert middle[name].cosine == pytest.approx(float(F.cosine_similarity(
                p.grad.flatten(), exact[name].flatten(), dim=0)), abs=1e-5)
    assert fine["4.weight"].relative < middle["4.weight"].relative < coarse["4.weight"].relative
    assert fine["12.bias"].relative == 0


@pytest.mark.parametrize("method", METHODS)
def test_audit_draws_the_same_dropout(method):
    """The runs agree, also where rounding draws seeds: with other masks they would differ by more than their norm."""
    model = nn.Sequential(nn.Linear(64, 512), nn.Dropout(0.5), nn.ReLU(), nn.Linear(512, 10))
    model[0].weight.requires_grad_(False)
    batch = torch.randn(8, 64), torch.arange(8)
    state = torch.random.get_rng_state()
    errors = gradient_audit(model, cross_entropy, batch, bits=8, method=method, stochastic=method != "convert")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [error.name for error in errors] == ["0.bias", "3.weight", "3.bias"]
    assert max(error.relative for error in errors) < 0.2


def test_audit_of_a_gradient_that_is_zero():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    errors = gradient_audit(model, lambda model, x: (model(x) * 0).sum(), torch.randn(3, 4))
    assert all(error.relative != error.relative for error in errors)


def test_audit_of_the_rest():
    """Tanh, whose result no rule of convert is for, rounds the gradients of the layer in front of it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Identity())
    batch = torch.randn(64, 64), torch.arange(64)
    exact, coded = (
        {error.name: error for error in gradient_audit(model, cross_entropy, batch, bits=2, rest=rest)}
        for rest in ("exact", "codes")
    )
    assert exact["0.weight"].relative == exact["0.bias"].relative == 0
    assert coded["0.bias"].relative > 0.01
    assert exact["2.weight"].relative > 0.01


def test_audit_names_the_layer_that_loses():
    """By the share of all gradients' error, not by that of a bias in front of a batch norm, whose gradient is 0."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )
    batch = torch.randn(16, 3, 12, 12), torch.arange(16) % 10
    errors = gradient_audit(model, cross_entropy, batch, bits=2)
    grads = []
    for network in (model, convert(model, 2)):
        model.zero_grad()
        cross_entropy(network, batch).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    total = sum(error.share**2 for error in errors) ** 0.5
    assert total == pytest.approx(relative(grads[1], grads[0]), rel=1e-3)
    assert max(errors, key=lambda error: error.relative).name in ("0.bias", "3.bias")
    assert max(errors, key=lambda error: error.share).name == "7.weight"


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(model=3), TypeError, "gradient_audit: model must be a torch.nn.Module, got int"),
    (dict(method="exact"), ValueError, "gradient_audit: method must be one of convert, hooks, naive, got 'exact'"),
    (dict(bits=5), ValueError, "gradient_audit: bits must be 2, 4 or 8, got 5"),
    (dict(loss=None), TypeError, "gradient_audit: loss must be a function, got NoneType"),
    (dict(stochastic=1), TypeError, "gradient_audit: stochastic must be a bool, got int"),
    (dict(), ValueError, "gradient_audit: model has no parameter that requires a gradient"),
    (dict(model=nn.Linear(2, 2), loss=lambda model, batch: 3), TypeError,
     "gradient_audit: loss must return a scalar tensor, got int"),
    (dict(range=6.0, method="hooks"), ValueError,
     "gradient_audit: method 'hooks' has no range: its codes span minimum to maximum"),
    (dict(rest=1), ValueError, "gradient_audit: rest must be 'exact' or 'codes', got 1"),
    (dict(rest="codes", method="naive"), ValueError, "gradient_audit: method 'naive' has no rest: it is for 'convert'"),
    (dict(stochastic=True), ValueError, "gradient_audit: method 'convert' rounds to the nearest code alone"),
])
def test_audit_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        gradient_audit(**{"model": nn.ReLU(), "loss": cross_entropy, "batch": None, **arguments})
