"""Binary layers against their float emulation, and what training code does with modules."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import assert_as_good, assert_gradient, sum_bound, surrogate_tolerances
from lowbit_ext.binary import BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear, binarize
from lowbit_ext.binary.surrogates import SURROGATES
from process_groups import needs_gloo, run_in_two_processes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


# --- float emulation, from the definitions ----------------------------------------------------------------------------


def surrogate_derivative(x, surrogate, encoding):
    """Derivatives as their sources write them, in float64."""
    u = x if encoding == "sign" else 2 * x - 1
    if surrogate == "identity":
        return torch.ones_like(x)
    if surrogate == "clip":
        return ((u >= -1) & (u <= 1) if encoding == "sign" else (x > 0) & (x < 1)).double()
    if surrogate == "steep":
        return 2.0 * ((u.abs() <= 0.5) if encoding == "sign" else (u.abs() < 0.5)).double()
    if surrogate == "swish_sign":
        z = 5 * u
        return 5 * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z))
    return (2 - 2 * u.abs()).clamp_min(0)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, surrogate, encoding):
        ctx.derivative = surrogate_derivative(x, surrogate, encoding)
        if encoding == "sign":
            return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        return (x >= 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.derivative, None, None


def emulate(layer, x, dtype=torch.float64):
    """The layer in a type, from torch's own operators: output, and gradients by autograd."""
    weight = layer.weight.to(dtype)
    signs = torch.where(weight >= 0, 1.0, -1.0).to(dtype)
    scale = {
        None: torch.ones((), dtype=dtype),
        "layer": weight.detach().abs().mean(),
        "channel": weight.detach().abs().flatten(1).mean(1).reshape(-1, *(1,) * (weight.dim() - 1)),
    }
    # Straight through: the quantised weight's value with the latent weight's gradient.
    if layer.weight_scale == "learned":
        factor = layer.learned_scale.to(dtype).reshape(-1, *(1,) * (weight.dim() - 1))
        quantised = factor * (weight + (signs - weight).detach())
    else:
        quantised = weight + (signs * scale[layer.weight_scale] - weight).detach()
    bits = StraightThrough.apply(x.to(dtype), layer.surrogate, layer.encoding)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if isinstance(layer, BinaryLinear):
        return F.linear(bits, quantised, bias)
    conv, padding = (F.conv2d, layer.padding) if weight.dim() == 4 else (F.conv1d, layer.padding)
    if not isinstance(padding, str):
        sides = [side if isinstance(side, tuple) else (side, side) for side in padding]
        bits = F.pad(bits, [size for side in reversed(sides) for size in side], value=layer.padding_value)
        padding = 0
    return conv(bits, quantised, bias, layer.stride, padding, layer.dilation, layer.groups)


def gradients(output, x, layer, grad):
    return torch.autograd.grad(output, [x, *layer.parameters()], grad.to(output.dtype))


def assert_equals_emulation(layer, shape):
    x = torch.randn(shape) * 0.8 + (0.5 if layer.encoding == "step" else 0)
    x.requires_grad_()
    outputs = layer(x), emulate(layer, x, torch.float32), emulate(layer, x)
    assert outputs[0].dtype == torch.float32
    assert_as_good(*outputs)
    grad = torch.randn_like(outputs[0])
    # The leaves are float32, and so are the gradients of all three.
    terms = max(grad.numel() // layer.weight.shape[0], layer.weight[:, 0].numel())
    for got, plain, exact in zip(*(gradients(output, x, layer, grad) for output in outputs), strict=True):
        assert got.dtype == torch.float32
        assert_gradient(got, plain, exact.double(), terms)


@pytest.mark.parametrize("encoding", ["sign", "step"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("weight_scale", ["channel", "layer", "learned", None])
def test_options_equal_emulation(device, encoding, surrogate, weight_scale):
    options = {"encoding": encoding, "surrogate": surrogate, "weight_scale": weight_scale}
    assert_equals_emulation(BinaryConv2d(45, 33, 3, padding=1, **options), (2, 45, 7, 6))
    assert_equals_emulation(BinaryLinear(70, 33, **options), (5, 70))


@pytest.mark.parametrize(
    ("layer", "arguments", "shape"),
    [
        (BinaryConv2d, (70, 33, 3, 2, 1), (2, 70, 7, 6)),
        (BinaryConv1d, (70, 33, 3), (2, 70, 9)),
        (BinaryLinear, (70, 33), (5, 70)),
    ],
)
def test_a_learned_scale_of_any_sign(device, layer, arguments, shape):
    """Against float64; its start, its place among the parameters, and its gradient through float64 itself."""
    made = layer(*arguments, weight_scale="learned")
    assert torch.equal(made.learned_scale, made.weight.detach().abs().flatten(1).mean(1))
    assert [name for name, _ in made.named_parameters()] == ["weight", "bias", "learned_scale"]
    nn.init.normal_(made.learned_scale)
    made.learned_scale.data[::5] = 0
    assert_equals_emulation(made, shape)
    precise, x = copy.deepcopy(made).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = precise(x), emulate(precise, x)
    grad = torch.randn_like(outputs[0])
    assert_as_good(outputs[0], outputs[0].float(), outputs[1])
    for got, want in zip(*(gradients(output, x, precise, grad) for output in outputs), strict=True):
        bound = sum_bound(70 * 9 + 100, 10 * float(want.abs().max()), torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=bound)
    other = layer(*arguments, weight_scale="learned")
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.learned_scale, made.learned_scale)
    other.reset_parameters()
    assert torch.equal(other.learned_scale, other.weight.detach().abs().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("layer", "arguments", "options", "shape"),
    [
        (BinaryConv2d, (64, 64, 3), {"stride": 2, "padding": 1, "bias": False}, (2, 64, 9, 8)),
        (BinaryConv2d, (90, 60, (3, 2)), {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}, (2, 90, 8, 9)),
        (BinaryConv2d, (96, 36, 3), {"groups": 3, "padding": "same", "dilation": 2}, (2, 96, 7, 7)),
        (BinaryConv2d, (48, 48, 3), {"groups": 48, "padding": 1}, (2, 48, 5, 5)),
        (BinaryConv2d, (64, 32, 3), {"padding": 1, "padding_value": -1}, (2, 64, 6, 6)),
        (BinaryConv2d, (33, 32, 3), {"padding": 1, "padding_value": 1, "encoding": "step"}, (2, 33, 6, 6)),
        (BinaryConv2d, (45, 32, 3), {"stride": 2, "padding": ((0, 1), (0, 1))}, (2, 45, 8, 6)),
        (BinaryConv2d, (45, 32, (2, 5)), {"padding": (1, (4, 2)), "padding_value": 1}, (2, 45, 6, 6)),
        (BinaryConv1d, (45, 70, 4), {"stride": 2, "padding": (0, 3), "padding_value": -1}, (3, 45, 30)),
        (BinaryConv1d, (45, 70, 5), {"stride": 2, "padding": 3, "dilation": 2}, (3, 45, 30)),
        (BinaryConv1d, (64, 64, 4), {"groups": 2, "padding": "same", "padding_value": 0}, (3, 64, 13)),
        (BinaryLinear, (129, 65), {"bias": False}, (3, 4, 129)),
        (BinaryLinear, (64, 10), {}, (64,)),
    ],
)
def test_geometry_equals_emulation(device, layer, arguments, options, shape):
    assert_equals_emulation(layer(*arguments, **options), shape)


@pytest.mark.parametrize("encoding", ["sign", "step"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_equals_emulation(device, encoding, surrogate, dtype):
    x = (torch.randn(3, 45, 5, 4) + (0.5 if encoding == "step" else 0)).to(dtype)
    x[0, 0, 0] = torch.tensor([0.0, 0.5, 1.0, -1.0])
    x.requires_grad_()
    output = BinaryActivation(encoding, surrogate)(x)
    wide = x.double()
    expected = StraightThrough.apply(wide, surrogate, encoding)
    assert output.dtype == dtype
    assert torch.equal(output.double(), expected)
    (got,) = torch.autograd.grad(output.sum(), x)
    want = surrogate_derivative(wide.detach(), surrogate, encoding)
    torch.testing.assert_close(got.double(), want, **surrogate_tolerances(surrogate, dtype))


def test_packed_input_equals_float_input(device):
    x = torch.randn(2, 70, 5, 5)
    for layer in (BinaryConv2d(70, 20, 3, padding=1), BinaryConv2d(70, 20, 3, bias=False, weight_scale=None)):
        with torch.no_grad():
            assert torch.equal(layer(binarize(x)), layer(x))
    layer = BinaryLinear(70, 9)
    with torch.no_grad():
        assert torch.equal(layer(binarize(x[:, :, 0, 0])), layer(x[:, :, 0, 0]))


def test_memory_formats_give_the_same_bits(device):
    layer = BinaryConv2d(45, 30, 3, padding=1)
    x = torch.randn(2, 45, 6, 7)
    with torch.no_grad():
        expected = layer(x)
        assert expected.is_contiguous(memory_format=torch.channels_last)
        for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(layer(other), expected)
        assert torch.equal(copy.deepcopy(layer).to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.parametrize(
    ("layer", "shape"), [(BinaryConv2d(45, 6, 3, padding=1), (45, 6, 7)), (BinaryConv1d(45, 6, 3), (45, 9))]
)
def test_unbatched_input(device, layer, shape):
    """As torch's layers take it; hooks see one call."""
    layer, x, calls = copy.deepcopy(layer).to(torch.get_default_device()), torch.randn(shape), []
    layer.register_forward_hook(lambda module, arguments, output: calls.append(output.shape))
    x.requires_grad_()
    output = layer(x)
    expected = layer(x.unsqueeze(0)).squeeze(0)
    assert torch.equal(output, expected)
    assert calls == [output.shape, (1, *output.shape)]
    grad = torch.randn_like(output)
    assert torch.equal(*(torch.autograd.grad(value, x, grad)[0] for value in (output, expected)))
    with pytest.raises(ValueError, match="input must be"):
        layer(x[0])


def test_sizes_of_numpy():
    two, three = np.int64(2), np.int32(3)
    for made in (
        BinaryConv2d(np.int64(6), np.uint8(4), (three, three), two, (np.int64(1), two), np.int64(1), two),
        BinaryConv2d(6, 4, 3, padding=((np.int64(0), two), np.int16(1))), BinaryConv1d(np.int64(6), 4, three, two, two),
        BinaryLinear(np.int64(6), three),
    ):
        x = torch.randn(2, 6, *(7,) * (made.weight.dim() - 2))
        made(x).sum().backward()
        assert made.weight.grad is not None
        for sizes in (getattr(made, name, ()) for name in ("kernel_size", "stride", "padding", "dilation")):
            assert all(type(size) in (int, tuple) for size in sizes)


def test_padding_same_of_tensorflow():
    """Its sides depend on the image: with stride 2 an even one has them at the bottom and right alone."""

    def sides(size, kernel, stride):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    for size, kernel, stride in ((8, 3, 2), (7, 3, 2), (9, 5, 3), (6, 2, 1)):
        padding = (sides(size, kernel, stride), sides(size + 1, kernel, stride))
        layer = BinaryConv2d(5, 4, kernel, stride, padding, bias=False)
        assert layer(torch.randn(1, 5, size, size + 1)).shape[2:] == (-(-size // stride), -(-(size + 1) // stride))
        assert_equals_emulation(layer, (2, 5, size, size + 1))


@pytest.mark.parametrize(
    ("layer", "shape", "out"),
    [
        (BinaryConv2d(8, 4, 3, padding=1), (0, 8, 5, 5), (0, 4, 5, 5)),
        (BinaryConv1d(8, 4, 3), (0, 8, 5), (0, 4, 3)),
        (BinaryLinear(8, 4), (0, 8), (0, 4)),
        (BinaryActivation(), (0, 8, 3), (0, 8, 3)),
    ],
)
def test_empty_batch(device, layer, shape, out):
    x = torch.zeros(shape, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == out
    assert x.grad.shape == shape
    assert all(parameter.grad.abs().sum() == 0 for parameter in layer.parameters())


# --- as modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (BinaryConv2d, nn.Conv2d, (6, 4, 3, 2, 1, 1, 2)),
        (BinaryConv1d, nn.Conv1d, (6, 4, 3, 2, 1)),
        (BinaryLinear, nn.Linear, (6, 4)),
    ],
)
def test_stands_in_for_the_torch_layer(device, ours, theirs, arguments):
    torch.manual_seed(0)
    layer = ours(*arguments)
    torch.manual_seed(0)
    original = theirs(*arguments)
    assert isinstance(layer, theirs)
    assert layer.load_state_dict(original.state_dict()).missing_keys == []
    for (name, parameter), (other_name, other) in zip(
        layer.named_parameters(), original.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(parameter, other)
    assert layer.extra_repr().startswith(original.extra_repr())
    assert "encoding='sign'" in repr(layer)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BinaryConv2d(4, 4, 3, encoding="binary"), "encoding must be one of 'sign', 'step', got 'binary'"),
        (lambda: BinaryConv2d(4, 4, 3, surrogate="relu"), "surrogate must be one of 'clip'"),
        (lambda: BinaryLinear(4, 4, weight_scale="filter"),
         "weight_scale must be one of 'channel', 'layer', 'learned', None"),
        (lambda: BinaryConv2d(4, 4, 3, padding_value=2), "padding_value must be one of 0, 1, -1, got 2"),
        (lambda: BinaryConv1d(4, 4, 3, encoding="step", padding_value=-1), "padding_value must be one of 0, 1, got -1"),
        (lambda: BinaryConv2d(4, 4, 3, padding_mode="reflect"), "padding_mode must be 'zeros', got 'reflect'"),
        (lambda: BinaryConv2d(4, 4, 3, padding=((1, 0), (0, -1))), "padding must be at least 0, got -1"),
        (lambda: BinaryConv1d(4, 4, 3, padding=(-1, 1)), "padding must be at least 0, got -1"),
        (lambda: BinaryActivation("ternary"), "BinaryActivation: encoding"),
        (lambda: BinaryLinear(4, 4)(binarize(torch.zeros(1, 4), "step")), "encoding 'step', the layer 'sign'"),
        (lambda: BinaryLinear(4, 4)(torch.zeros(1, 5)), "4 input features"),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 45, 3, padding=1),
        nn.BatchNorm2d(45),
        BinaryConv2d(45, 64, 3, padding=1, bias=False, weight_scale="learned"),
        nn.BatchNorm2d(64),
        BinaryActivation("step"),
        BinaryConv2d(64, 32, 3, encoding="step", surrogate="identity", weight_scale="layer"),
        nn.Flatten(),
        BinaryLinear(32 * 9, 10),
    )


def train_step(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_alike(device, clone):
    model, x = small_network(), torch.randn(4, 3, 5, 5)
    other = clone(model)
    (loss, grads), (other_loss, other_grads) = train_step(model, x), train_step(other, x)
    assert torch.equal(loss, other_loss)
    assert all(map(torch.equal, grads, other_grads))


def test_autocast():
    layer, x = BinaryConv2d(45, 16, 3, padding=1), torch.randn(2, 45, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        packed = layer(binarize(x))
        chained = BinaryLinear(16, 4)(output[:, :, 0, 0])
    assert output.dtype == packed.dtype == chained.dtype == torch.bfloat16
    assert torch.equal(output, layer(x).to(torch.bfloat16)), "the accumulator is exact, only the result is rounded"
    output.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_bfloat16_network(device):
    layer, x = BinaryConv2d(45, 16, 3).bfloat16(), torch.randn(2, 45, 6, 6).bfloat16()
    output = layer(x)
    output.sum().backward()
    assert output.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.bfloat16
    # Three roundings to bfloat16: of the scale, the product and the sum with the bias.
    expected = emulate(layer, x)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3 * 2.0**-8 * float(expected.abs().max()))


def saved_bytes(function, *arguments):
    """Bytes of distinct storages that autograd keeps for the backward pass, parameters left out."""
    storages = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function(*arguments)
    assert output.requires_grad
    return sum(storages.values())


def test_saves_a_tenth_of_the_bytes(device):
    layer = BinaryConv2d(256, 256, 3, padding=1)
    x = torch.randn(4, 256, 14, 14, requires_grad=True)

    def plain(x):
        bits = x + (torch.where(x >= 0, 1.0, -1.0) - x.clamp(-1, 1)).detach() + x.clamp(-1, 1) - x
        weight = layer.weight + (layer.weight.sign() - layer.weight).detach()
        return F.conv2d(bits, weight, layer.bias, padding=1)

    assert saved_bytes(layer, x) * 10 <= saved_bytes(plain, x)
    # Two bits an activation (its sign and the mask), one a weight, and the scales.
    assert saved_bytes(layer, x) == x.numel() // 4 + layer.weight.numel() // 8 + 256 * 4


def test_compiles_without_graph_breaks(device):
    # Binary layers alone: recompiled, a float layer in front may round a value across a threshold.
    model = nn.Sequential(
        BinaryConv2d(45, 64, 3, padding=1, weight_scale=None),
        BinaryActivation(),
        nn.Flatten(),
        BinaryLinear(64 * 9, 10),
    )
    x = torch.randn(4, 45, 3, 3)
    compiled = torch.compile(model, fullgraph=True)
    (loss, grads), (compiled_loss, compiled_grads) = train_step(model, x), train_step(compiled, x)
    # Sums in another order, one behind the other: of 40 squares, 10 and 64 channels, and 4 images.
    for got, want in zip((compiled_loss, *compiled_grads), (loss, *grads), strict=True):
        bound = sum_bound(40 + 10 + 64 + 4, 4 * float(want.abs().max()))
        torch.testing.assert_close(got, want, rtol=0, atol=bound)


def test_exports(device):
    model, x = small_network().eval(), torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))


class Noise(torch.utils.data.Dataset):
    """Runs a binary layer in the worker process, forked while the parent's thread pool is alive."""

    def __init__(self):
        self.layer = BinaryConv2d(64, 64, 3, padding=1)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.randn(1, 64, 14, 14, generator=torch.Generator().manual_seed(index)))[0]


def test_forked_data_loader():
    dataset, before = Noise(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = torch.stack([dataset[index] for index in range(len(dataset))])
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        assert torch.equal(torch.cat(list(loader)), expected)
    finally:
        torch.set_num_threads(before)


def distributed_step(rank, model, batches, expected):
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(batches[rank]).square().mean().backward()
    for parameter, want in zip(model.parameters(), expected, strict=True):
        # Sums of 20 squares, 4 and 64 channels, and 10 images, by other numbers of threads.
        bound = sum_bound(20 + 4 + 64 + 10, 4 * float(want.abs().max()))
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=bound)


@needs_gloo
def test_distributed_data_parallel():
    model = nn.Sequential(BinaryConv2d(45, 64, 3), BinaryActivation(), nn.Flatten(), BinaryLinear(64, 4))
    batches = torch.randn(2, 5, 45, 3, 3)
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for batch in batches:
        for total, grad in zip(expected, train_step(model, batch)[1], strict=True):
            total += grad / 2
    model.zero_grad()
    run_in_two_processes(distributed_step, model, batches, expected)
    assert any(grad.abs().sum() > 0 for grad in expected)
