"""Plans of packed models: slices of a batch, threads, buffers that are used again, and what makes a plan anew."""

import copy
import multiprocessing
import os
import threading
from types import MappingProxyType

import pytest
import torch
from torch import nn

from lowbit_ext import models
from lowbit_ext.binary import BinaryConv2d, BinaryLinear, pack
from lowbit_ext.binary.packing import executor
from lowbit_ext.binary.packing.plan import Plan


def trained(model):
    """Statistics of both signs, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def resnet(**options):
    torch.manual_seed(20261128)
    return trained(models.resnet18("binary", widths=(16, 24, 32, 40, 48), num_classes=7, stem="cifar", **options))


IMAGE = (3, 24, 24)


@pytest.fixture(scope="module")
def packed():
    return pack(resnet(shortcuts="every_conv"), torch.randn(2, *IMAGE))


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of few images, whatever the machine's cache."""
    monkeypatch.setattr(executor, "CACHES", 1)
    monkeypatch.setattr(executor, "cache_bytes", lambda: 60_000)


class Halves(nn.Module):
    """Keeps the parts of a tuple that torch has made for longer than the tuple."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = BinaryLinear(32, 64), nn.LayerNorm(64), BinaryLinear(32, 8)

    def forward(self, x):
        left, right = self.norm(self.first(x)).chunk(2, -1)
        return self.last(left.softmax(-1) * right.exp())


def test_items_outlive_their_tuple():
    torch.manual_seed(20261128)
    model, x = Halves().eval(), torch.randn(4, 20, 32)
    packed = pack(model, x)
    with torch.inference_mode():
        assert torch.equal(packed(x), model(x))


def without_plan(packed, x):
    with torch.no_grad():
        return packed.body(x)


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 7, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_threads_give_the_same(packed, small_slices, batch, threads, dtype):
    model = copy.deepcopy(packed).to(dtype)
    x = torch.randn(batch, *IMAGE, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = model(x)
        expected = without_plan(model, x)
        assert torch.get_num_threads() == threads, "the caller's threads are as they were"
    finally:
        torch.set_num_threads(before)
    assert got.shape == expected.shape == (batch, 7)
    if dtype == torch.float32:
        assert torch.equal(got, expected)
    else:  # torch's layers may round otherwise in a smaller batch
        torch.testing.assert_close(got, expected, rtol=0, atol=0.1)


def test_a_plan_serves_its_number_of_threads(isa):
    """Kernels have a workspace for each thread: a plan made on one thread is not run on three."""
    layers = [layer for _ in range(2) for layer in (BinaryConv2d(64, 64, 3, padding=1, encoding="step"), nn.Identity())]
    model, x = pack(nn.Sequential(*layers).eval(), torch.rand(1, 64, 9, 9)), torch.rand(1, 64, 40, 40)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(model(x), without_plan(model, x))
    finally:
        torch.set_num_threads(before)


def test_a_batch_is_cut_and_the_head_is_not(packed, small_slices, monkeypatch):
    shapes = []
    initialise = Plan.__init__

    def watch(plan, body, inputs, after=None, until=None, functions=MappingProxyType({})):
        shapes.append((tuple(inputs[0].shape), after is not None, until is not None))
        initialise(plan, body, inputs, after, until, functions)

    monkeypatch.setattr(Plan, "__init__", watch)
    torch.set_num_threads(1)
    try:
        model = copy.deepcopy(packed).bfloat16()
        model(torch.randn(9, *IMAGE))
    finally:
        torch.set_num_threads(os.cpu_count() or 1)
    whole = [shape for shape, after, _ in shapes if after]
    assert whole == [(9, 48)], "the classifier meets all images at once"
    cut = {shape[0] for shape, _, until in shapes if until}
    assert max(cut) < 9


def test_results_are_the_callers_own(packed):
    """No later call writes into an earlier result, also where the network ends with a pass."""
    features = pack(
        trained(nn.Sequential(nn.Conv2d(3, 8, 3), BinaryConv2d(8, 8, 3), nn.BatchNorm2d(8))), torch.randn(1, *IMAGE)
    )
    for model in (packed, features):
        x, y = torch.randn(2, *IMAGE), torch.randn(2, *IMAGE)
        first = model(x)
        kept = first.clone()
        model(y)
        assert torch.equal(first, kept)
        assert torch.equal(model(x), kept)


@pytest.mark.parametrize("change", [
    lambda x: x[:, :, ::2, ::2].repeat(1, 1, 2, 2)[..., :24, :24], lambda x: x.transpose(2, 3),
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.expand(4, -1, -1, -1),
    lambda x: torch.cat([x, x])[::2], lambda x: x.to(torch.float64), lambda x: x.requires_grad_(),
])
def test_any_memory_order(packed, change):
    x = change(torch.randn(1, *IMAGE))
    got = packed(x)
    assert torch.equal(got.float(), without_plan(packed, x.float()))
    assert not got.requires_grad


def test_grad_modes(packed):
    x = torch.randn(2, *IMAGE)
    expected = without_plan(packed, x)
    with torch.inference_mode():
        assert torch.equal(packed(x), expected)
    result = packed(x)
    assert torch.equal(result, expected)
    assert not result.is_inference()


def test_several_threads_may_call_one_model(packed, small_slices):
    inputs = [torch.randn(batch, *IMAGE) for batch in (1, 2, 3, 1, 5, 2)]
    expected = [without_plan(packed, x) for x in inputs]
    wrong = []

    def work(seed):
        for index in torch.randperm(60, generator=torch.Generator().manual_seed(seed)).tolist():
            if not torch.equal(packed(inputs[index % 6]), expected[index % 6]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(model, x, results):
    torch.set_num_threads(2)
    results.put(bool(torch.equal(model(x), without_plan(model, x))))


def test_a_forked_child_runs_the_model(packed, small_slices):
    """The parent's threads are not in a child, which must not wait for them."""
    torch.set_num_threads(2)
    x = torch.randn(6, *IMAGE)
    torch.set_num_threads(1)
    # OpenMP itself does not survive a fork of a process that has used several threads in a region, so that the parent
    # of this test is a fresh process.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_fork_and_run, args=(packed, x, results))
    child.start()
    assert results.get(timeout=120) is True
    child.join(60)
    torch.set_num_threads(os.cpu_count() or 1)


def _fork_and_run(model, x, results):
    torch.set_num_threads(1)
    executor._workers().submit(int).result()  # the parent has worker threads
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_in_child, args=(model, x, results))
    child.start()
    child.join(100)


def test_weights_that_change_are_seen(packed):
    """Of float layers, whose modules are called, and of packed ones by load_state_dict and casts."""
    x = torch.randn(2, *IMAGE)
    model = copy.deepcopy(packed)
    first = model(x)
    with torch.no_grad():
        model.body.fc.bias += 1
    assert not torch.equal(model(x), first)
    assert torch.equal(model(x), without_plan(model, x))
    torch.manual_seed(3)
    stranger = pack(trained(models.resnet18(
        "binary", widths=(16, 24, 32, 40, 48), num_classes=7, stem="cifar", shortcuts="every_conv")),
        torch.randn(2, *IMAGE))
    model.load_state_dict(stranger.state_dict())
    assert torch.equal(model(x), stranger(x))
    assert torch.equal(model.bfloat16()(x), stranger.bfloat16()(x))


def test_levels_may_change(packed, isa):
    x = torch.randn(3, *IMAGE)
    assert torch.equal(packed(x), without_plan(packed, x))


def test_hooks_on_packed_layers_are_called(packed):
    model, called = copy.deepcopy(packed), []
    layer = model.packed_layers()["body.blocks.0.conv1"]
    handle = layer.register_forward_hook(lambda *arguments: called.append(1))
    x = torch.randn(2, *IMAGE)
    expected = model(x)
    assert called
    handle.remove()
    assert torch.equal(model(x), expected)
    assert len(called) == 1


def test_many_shapes_keep_few_plans():
    torch.manual_seed(1)
    model = pack(nn.Sequential(BinaryConv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), torch.randn(1, *IMAGE))
    for size in range(5, 40):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(model(x), without_plan(model, x))
    assert len(model._executor._plans) <= executor._MOST_SHAPES


def test_buffers_are_used_again():
    """Thirty layers of one size need the memory of a few."""
    layers = [layer for _ in range(30) for layer in (BinaryConv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))]
    model = pack(nn.Sequential(*layers).eval(), torch.randn(1, 64, 16, 16))
    x = torch.randn(1, 64, 16, 16)
    plan = Plan(model.body, [x])
    assert torch.equal(plan.run([x]), without_plan(model, x))
    bits, floats = 16 * 16 * 8, 16 * 16 * 64 * 4
    assert sum(plan._memory.values()) <= 4 * 4096 + 4 * bits + floats


def test_a_residual_is_added_in_place():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(BinaryConv2d(64, 64, 3, padding=1) for _ in range(10))

        def forward(self, x):
            x = self.layers[0](x)
            for layer in self.layers[1:]:
                x = layer(x) + x
            return x

    model, x = pack(Stream(), torch.randn(1, 64, 16, 16)), torch.randn(1, 64, 16, 16)
    plan = Plan(model.body, [x])
    assert torch.equal(plan.run([x]), without_plan(model, x))
    assert sum(plan._memory.values()) < 2 * 16 * 16 * 64 * 4, "one stream, not two"


class Mixing(nn.Module):
    """Looks at its whole batch."""

    def __init__(self):
        super().__init__()
        self.layer = BinaryLinear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(0)


class Reshaped(nn.Module):
    """Gives something that has no batch."""

    def __init__(self):
        super().__init__()
        self.layer = BinaryLinear(8, 8)

    def forward(self, x):
        return self.layer(x).sum()


@pytest.mark.parametrize("build", [Mixing, Reshaped, lambda: nn.Sequential(BinaryLinear(8, 8), nn.Softmax(0))])
def test_batches_that_belong_together_are_not_cut(build, small_slices, monkeypatch):
    monkeypatch.setattr(executor, "cache_bytes", lambda: 1)
    model = build().eval()
    packed, x = pack(model, torch.randn(4, 8)), torch.randn(64, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=0, atol=1e-5)
        assert torch.equal(packed(x), packed.body(x))


def test_rounding_that_depends_on_the_batch_is_respected(small_slices, monkeypatch):
    """In float32 a batch is cut only where torch's own layers give an image the same bits alone."""

    class Uneven(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * (1 + len(x) * 2.0**-20)

    monkeypatch.setattr(executor, "cache_bytes", lambda: 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BinaryConv2d(8, 8, 3)).eval()
    packed = pack(model, torch.randn(2, *IMAGE))
    packed.body.get_submodule("0").__class__ = Uneven
    x = torch.randn(6, *IMAGE)
    assert torch.equal(packed(x), without_plan(packed, x))


def test_errors_leave_the_model_usable(packed):
    x = torch.randn(2, *IMAGE)
    expected = packed(x)
    with pytest.raises(RuntimeError):
        packed(torch.randn(2, 4, 24, 24))
    assert torch.equal(packed(x), expected)
