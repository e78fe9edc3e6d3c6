"""lowmem under torch.compile, whole graphs and any batch size, and in processes with DistributedDataParallel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import one_thread, sum_bound
from lowbit_ext.lowmem import LowMemBlock, convert, dequantize, ledger, quantize_channels, saved_tensors
from lowmem_networks import joined, make, relative, step
from process_groups import needs_gloo, run_in_two_processes
from reference import lowmem as reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)
    torch._dynamo.reset()


@pytest.fixture
def compiled():
    """Compiles whole graphs; by default without machine code, which takes long and changes nothing that we do."""

    def compile(model, backend="aot_eager", **options):
        return torch.compile(model, fullgraph=True, backend=backend, **options)

    return compile


# --- converted models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["post", "vgg", "mlp", "1d", "3d", "attributes", "shared", "not affine"])
def test_converted_models_train_compiled(compiled, name):
    """The same gradients as eager, to the rounding of float32 in sums of another order, at any batch size."""
    plain, shape = make(name)
    model = convert(plain, 4, 7.5)
    if name in ("post", "attributes"):
        model.eval()  # a compiled dropout draws other numbers
    # torch 2.13 cannot trace an autograd.Function twice with the same float (eps) where every float is dynamic.
    fast = compiled(copy.deepcopy(model), dynamic=None if name == "shared" else True)
    for batch in (shape[0], 5, 7):
        got, expected = (step(network, (batch, *shape[1:])) for network in (fast, model))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
        assert relative(joined(got), joined(expected)) < 1e-5
    for got, expected in zip(fast.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, expected)


def test_machine_code(compiled):
    """Inductor, whose float sums have another order."""
    model = convert(nn.Sequential(LowMemBlock(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), nn.ReLU()))
    got, expected = (step(network, (4, 3, 6, 6)) for network in (compiled(copy.deepcopy(model), "inductor"), model))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert relative(joined(got), joined(expected)) < 1e-5


class PostActivation(nn.Module):
    """A residual block with ReLU behind the sum: its second batch norm keeps codes without ReLU."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def quantised(self, x):
        """What a converted block makes codes of: with ReLU, without, and, behind another ReLU, in groups."""
        first = self.bn1(self.conv1(x))
        second = self.bn2(self.conv2(F.relu(first)))
        return first, second, second + x

    def forward(self, x):
        return F.relu(self.quantised(x)[2])

    def codes(self, values, bits=4, span=8.0):
        """The codes of what `quantised` gives, and the scale of the sum, which is one group."""
        for norm, value, relu in ((self.bn1, values[0], True), (self.bn2, values[1], False)):
            gamma, beta = norm.weight.detach(), norm.bias.detach()
            normalised = (value - beta.view(-1, 1, 1)) / gamma.view(-1, 1, 1)
            yield reference.channel_codes(normalised, value if relu else None, gamma, beta, bits, span)
        yield from reference.group_codes(values[2].flatten(), bits, positive=True)[:2]


def test_a_post_activation_block_in_machine_code(compiled):
    """A training step with sums in another order, on an input of which no code is at the edge of its cell.

    Where plain torch in float32 is off by e from float64, ours are by 2 e at most, and by 4 e from one another. So are
    gradients while all codes are the same: one other code moves its element by half a deviation.
    """
    shape = (4, 4, 4, 4)  # at most 256 elements: one group in any order of memory
    plain = nn.Sequential(PostActivation(4), nn.Conv2d(4, 3, 3))
    double, model = copy.deepcopy(plain).double(), convert(copy.deepcopy(plain))
    fast = copy.deepcopy(model)

    torch.manual_seed(1)
    x = torch.randn(shape)  # the input of `step`
    with torch.no_grad():
        values = copy.deepcopy(double)[0].quantised(x.double())
        errors = [(a - b).abs().max() for a, b in zip(copy.deepcopy(plain)[0].quantised(x), values, strict=True)]
    # The kernel rounds four times on its way to a cell, numbers up to the span of 8, which gamma <= 1.5 scales.
    errors = [4 * error + 4 * 2.0**-24 * 8 * 1.5 for error in errors]
    low, high = (
        list(plain[0].codes([value + sign * error for value, error in zip(values, errors, strict=True)]))
        for sign in (-1, 1)
    )
    assert all(map(torch.equal, low, high)), "this input has a code at the edge of its cell"

    got, expected, torchs = (step(network, shape) for network in (compiled(fast, "inductor"), model, plain))
    exact = step(double, shape, dtype=torch.float64)
    assert (got[0] - expected[0]).abs().max() <= 4 * (torchs[0] - exact[0]).abs().max()
    assert relative(joined(got), joined(expected)) <= 4 * relative(joined(torchs), joined(exact))
    for a, b in zip(fast.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bits", [4, 8])
def test_channel_codes_in_machine_code(compiled, bits):
    """Of a sum that may be taken in another order: a code differs, by one, only where rounding puts it over an edge."""

    def run(terms):
        x = terms.sum(-1)
        return x, quantize_channels(x, bits)

    terms = torch.randn(8, 5, 9, 9, 16) + 0.2
    results = compiled(run, "inductor")(terms), run(terms)
    exact = terms.double().sum(-1)
    error = sum_bound(16, float(terms.abs().sum(-1).max()))
    std, mean = torch.std_mean(exact, (0, 2, 3), correction=0)
    # Deviation and mean, of sums in float64, are off by no more than x itself, and rounded to float32.
    of_channel = error + 2.0**-24 * float(torch.maximum(std, mean.abs()).max())
    normalised = (exact - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    # What that changes in (x - mean) / std and in the place of the edge, a multiple of mean / std; four roundings of
    # the kernel, of numbers up to the span.
    parts = 3 + normalised.abs().max() + (mean / std).abs().max()
    shift = of_channel / std.min() * parts + 4 * 2.0**-24 * results[1][1].span
    settings = std, mean, bits, results[1][1].span
    low, high = (reference.channel_codes(normalised + sign * shift, None, *settings) for sign in (-1, 1))
    assert (high - low).max() <= 1
    assert (high > low).double().mean() < 0.01
    low, high = (reference.channel_values(codes, *settings, False, torch.float32) for codes in (low, high))
    slack = shift * std.max()
    for x, codes in results:
        assert (x - exact).abs().max() <= error
        assert (codes.std - std).abs().max() <= of_channel
        assert (codes.mean - mean).abs().max() <= of_channel
        values = dequantize(codes)
        assert ((low - slack <= values) & (values <= high + slack)).all()


def test_modes_and_no_grad(compiled):
    plain, shape = make("vgg")
    model = convert(plain)
    fast = compiled(model)
    x = torch.randn(shape)
    fast(x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    assert torch.equal(fast(x), model(x))


def test_a_ledger_sees_what_a_compiled_model_keeps(compiled):
    plain, shape = make("vgg")
    model = convert(plain)
    with ledger(model) as eager:
        model(torch.randn(shape))
    with ledger(model) as book:
        compiled(model)(torch.randn(shape))
    codes = [sum(e.stored for e in b.entries if e.dtype == torch.uint8 and len(e.shape) == 3) for b in (eager, book)]
    assert codes[0] == codes[1] > 0
    # The input, two statistics a channel, and no activation.
    assert {entry.shape for entry in book.full_precision if entry.stored > 1000} == {shape}


# --- hooks round compiled models --------------------------------------------------------------------------------------


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.GELU(), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(8 * 36, 64), nn.Sigmoid(), nn.Linear(64, 8),
    )


SHAPE = (16, 3, 16, 16)


def kept(model, context):
    """Tensors in the hands of a compiled graph's node, with large floats alone."""
    x = torch.randn(SHAPE)
    with context:
        out = model(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    return [
        tensor for tensor in out.grad_fn.saved_tensors
        if tensor.numel() >= 1024 and tensor.untyped_storage().data_ptr() not in parameters
    ]


def test_hooks_round_a_compiled_model(compiled):
    """They run after its forward pass, on what the graph returns."""
    model = network()
    exact = step(model, SHAPE)
    fast = compiled(model)
    assert relative(joined(step(fast, SHAPE)), joined(exact)) < 1e-5
    with saved_tensors(8):
        got = step(fast, SHAPE)
    torch.testing.assert_close(got[0], exact[0], rtol=1e-5, atol=1e-5)
    assert 1e-5 < relative(joined(got), joined(exact)) < 0.01
    with ledger(model) as book, saved_tensors(4):
        fast(torch.randn(SHAPE))
    assert all(entry.stored < 4096 for entry in book.full_precision)


def test_hooks_within_compiled_graphs(compiled):
    """The graph itself keeps codes: no float activation leaves it."""
    model = network()
    exact = step(model, SHAPE)
    fast = compiled(model)
    for bits, bound in ((8, 0.01), (4, 0.1)):
        with saved_tensors(bits, compiled=True):
            got = step(fast, SHAPE)
        torch.testing.assert_close(got[0], exact[0], rtol=1e-5, atol=1e-5)
        assert 1e-5 < relative(joined(got), joined(exact)) < bound
    assert any(tensor.is_floating_point() for tensor in kept(fast, torch.enable_grad()))
    inside = kept(fast, saved_tensors(4, compiled=True))
    assert sum(tensor.nbytes for tensor in inside if tensor.is_floating_point()) == 0
    assert inside
    # The settings are the graph's; without them it is the plain one again.
    assert relative(joined(step(fast, SHAPE)), joined(exact)) < 1e-5


def test_hooks_within_machine_code(compiled):
    """Inductor lays activations out as it likes."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    exact = step(model, SHAPE)
    with saved_tensors(8, compiled=True):
        got = step(compiled(model, "inductor"), SHAPE)
    assert 1e-7 < relative(joined(got), joined(exact)) < 0.01


def test_compiled_hooks_at_any_batch_size(compiled):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 8))
    fast = compiled(model, dynamic=True)
    for batch in (16, 5, 9):
        exact = step(model, (batch, *SHAPE[1:]))
        with saved_tensors(8, compiled=True):
            got = step(fast, (batch, *SHAPE[1:]))
        assert relative(joined(got), joined(exact)) < 0.01


def test_compiled_hooks_keep_relu_masks(compiled):
    x = torch.randn(64, 64) * 10.0 ** torch.randint(-6, 3, (64, 64))
    x = x.requires_grad_()
    with saved_tensors(2, compiled=True):
        out = compiled(lambda x: torch.relu(x * 1) * 2)(x)
    grad = torch.autograd.grad(out.sum(), x)[0]
    assert torch.equal(grad, 2.0 * (x > 0))


def test_compiled_stochastic_hooks_are_reproducible(compiled):
    model = network()
    fast = compiled(model)
    runs = []
    for seed in (1, 1, 2):
        with saved_tensors(4, stochastic=True, compiled=True):
            runs.append(joined(step(fast, SHAPE, seed)))
    assert torch.equal(runs[0], runs[1])
    with saved_tensors(4, compiled=True):
        assert not torch.equal(runs[0], joined(step(fast, SHAPE, 1)))


def test_compiled_hooks_in_eager_code():
    """The same pair of hooks serves what is not compiled."""
    model = network()
    exact = step(model, SHAPE)
    with saved_tensors(8, compiled=True):
        got = step(model, SHAPE)
    assert torch.equal(got[0], exact[0])
    assert 0 < relative(joined(got), joined(exact)) < 0.01
    mask = torch.rand(64, 64) < 0.5
    x = torch.randn(64, 64).requires_grad_()
    with saved_tensors(8, compiled=True):
        out = torch.where(mask, x, 0).double().cumsum(0)
    assert torch.equal(torch.autograd.grad(out[-1].sum(), x)[0], mask.float())


def test_a_ledger_counts_compiled_hooks_from_within(compiled):
    fast = compiled(network())
    with saved_tensors(4, compiled=True), ledger() as book:
        fast(torch.randn(SHAPE))
    assert book.stored < book.equivalent / 3


def test_contexts_are_refused_within_compiled_code(compiled):
    def run(x):
        with saved_tensors(4):
            return x.exp()

    with pytest.raises(Exception, match="open it round the call of a compiled function"):
        compiled(run)(torch.randn(4, 4).requires_grad_())


# --- several processes ------------------------------------------------------------------------------------------------


def distributed_steps(rank, models, batches, expected):
    for index, model in enumerate(models):
        wrapped = nn.parallel.DistributedDataParallel(model)
        with saved_tensors(4, min_numel=0) if index == 1 else torch.enable_grad():
            out = wrapped(batches[rank])
        out.square().mean().backward()
        for parameter, want in zip(model.parameters(), expected[index], strict=True):
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)


@needs_gloo
def test_distributed_data_parallel():
    """A converted model, and a plain one within saved_tensors: gradients are the means of the processes' own."""
    plain, shape = make("vgg")
    models = [convert(copy.deepcopy(plain)), plain]
    batches = torch.randn(2, *shape)
    expected = []
    for index, model in enumerate(models):
        state = copy.deepcopy(model.state_dict())
        totals = [torch.zeros_like(p) for p in model.parameters()]
        for batch in batches:
            model.load_state_dict(state)
            model.zero_grad()
            with one_thread(), saved_tensors(4, min_numel=0) if index == 1 else torch.enable_grad():
                out = model(batch)
            with one_thread():  # in another order, rounding might change a code
                out.square().mean().backward()
            for total, p in zip(totals, model.parameters(), strict=True):
                total += p.grad / 2
        model.load_state_dict(state)
        model.zero_grad()
        expected.append(totals)
    run_in_two_processes(distributed_steps, models, batches, expected)
    assert all(total.abs().sum() > 0 for totals in expected for total in totals)
