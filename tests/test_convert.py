"""convert(): networks as their authors write them, on the binary layers: same values, same signs, trainable, packed."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foreign_networks as foreign
from conftest import sum_bound
from lowbit_ext import binary
from lowbit_ext.binary import BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear

LAYERS = (BinaryConv2d, BinaryConv1d, BinaryLinear)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def xnor_net():
    model = foreign.xnor_net()
    foreign.BinOp(model).binarize()
    return model


NETWORKS = {
    "XNOR-Net": (xnor_net, 2), "Bi-Real Net": (foreign.birealnet, 3), "ReActNet": (foreign.reactnet, 2),
    "IR-Net": (foreign.irnet, 2), "BinaryNet": (foreign.binarynet, 3),
}


def converted(model, x, **options):
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return binary.convert(model, x, **options)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def rounding(want):
    """The scale outside the sums of signs, of at most 576 taps, in place of within them; a few layers of factors."""
    return sum_bound(576 + 100, 4 * float(want.abs().max()))


# --- the authors' networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_the_same(name):
    build, count = NETWORKS[name]
    model, x = build(), foreign.images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = converted(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(layers_of(made)) == count
    assert not made.training
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(made(x), want, rtol=0, atol=rounding(want))
        if name != "BinaryNet":  # whose latent weights are no parameters, and stay float32
            made, double = made.double(), copy.deepcopy(model).double()
            torch.testing.assert_close(made(x.double()), double(x.double()), rtol=1e-9, atol=1e-12)
    entries = binary.conversions(made)
    assert all(entry.converted for entry in entries)
    assert sum("weight_scale" in entry.how for entry in entries) == count


@pytest.mark.parametrize("name", NETWORKS)
def test_all_of_it_packs(name):
    build, _ = NETWORKS[name]
    model, x = build(), foreign.images(16)
    made = converted(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = binary.pack(made, x)
    rows = packed._rows
    assert all(row.how == "bits" for row in rows if row.kind.startswith("Binary"))
    floats = [row for row in rows if row.kind in ("sign", "sub", "where", "BinaryActivation")]
    assert not [row for row in floats if row.how == "as it was"]
    with torch.no_grad():
        want, got = model(x), packed(x)
    torch.testing.assert_close(got, want, rtol=0, atol=rounding(want))
    assert torch.equal(got.argmax(1), want.argmax(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains(name):
    build, _ = NETWORKS[name]
    made = converted(build().train(), foreign.images())
    assert made.training
    assert all(module.training for module in made.modules())
    x, target = foreign.images(32), torch.randint(0, 10, (32,))
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(made(x), target)
        loss.backward()
        assert all(layer.weight.grad.abs().sum() > 0 for layer in layers_of(made))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_the_weight_is_the_user_s_own():
    model = foreign.birealnet()
    made = converted(model, foreign.images())
    theirs = [module for module in model.modules() if isinstance(module, foreign.HardBinaryConv)]
    for layer, conv in zip(layers_of(made), theirs, strict=True):
        assert torch.equal(layer.weight.flatten(), conv.weights.flatten())
        assert layer.weight_scale == "channel"
        assert layer.surrogate == "identity"  # the activation in front has the derivative
    activations = [module for module in made.modules() if isinstance(module, BinaryActivation)]
    assert {activation.surrogate for activation in activations} == {"approx_sign"}


def test_latent_weights_that_were_binarized_in_place_are_loaded_later():
    model, x = foreign.xnor_net(), foreign.images()
    operation = foreign.BinOp(model)
    operation.binarize()
    made = converted(model, x)
    with torch.no_grad():
        want = model(x)
    operation.restore()
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made(x), want, rtol=0, atol=rounding(want))


def test_input_gradient_of_the_authors():
    """That of the polynomial, where the estimator is the same in both; of the weight it is the layer's own."""
    block = nn.Sequential(foreign.BinaryActivation(), foreign.HardBinaryConv(32, 48))
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    made = converted(block, x.detach())
    grad = torch.randn(2, 48, 6, 6)
    (want,), (got,) = (torch.autograd.grad(model(x), x, grad) for model in (block, made))
    torch.testing.assert_close(got, want, rtol=0, atol=sum_bound(48 * 9, 4 * float(want.abs().max())))


@pytest.mark.parametrize("used", [False, True])
def test_latent_weights_beside_a_parameter_are_found(used):
    model, x = foreign.binarynet(), foreign.images()
    latent = model[3].weight.detach().clone()
    if used:
        with torch.no_grad():
            model(x.clone())
        assert not torch.equal(model[3].weight, latent)
    made = converted(model, x)
    assert torch.equal(made[3].weight, latent)
    assert (made[3].weight_scale, made[3].surrogate) == (None, "identity")  # the Hardtanh in front clips
    torch.testing.assert_close(made[3].bias, model[3].bias, rtol=0, atol=1e-5)


class Sign(nn.Module):
    def forward(self, weight):
        return weight.abs().mean((1, 2, 3), keepdim=True) * foreign.BinActive.apply(weight)


def test_a_parametrized_weight():
    model, x = nn.Sequential(foreign.BinaryActivation(), nn.Conv2d(16, 24, 3)), torch.randn(2, 16, 6, 6)
    latent = model[1].weight.detach().clone()
    nn.utils.parametrize.register_parametrization(model[1], "weight", Sign())
    made = converted(model, x)
    assert type(made[1]) is BinaryConv2d
    assert torch.equal(made[1].weight, latent)
    assert made[1].weight_scale == "channel"
    assert torch.equal(made[1].bias, model[1].bias)


def test_standardised_weights_keep_their_signs_and_scale():
    conv = foreign.IRConv2d(32, 48, 3, bias=False)
    nn.init.uniform_(conv.weight, -0.1, 0.3)
    nn.init.normal_(conv.weight[::2].detach())
    with torch.no_grad():
        conv.weight[1] = torch.where(torch.rand(32, 3, 3) < 0.02, 1.0, -0.001)  # standardised, of a small mean |w|
    x = torch.randn(2, 32, 6, 6)
    made = converted(conv, x)
    centred = conv.weight - conv.weight.flatten(1).mean(1).view(-1, 1, 1, 1)
    assert torch.equal(made.weight, centred)
    assert made.weight_scale == "learned"
    assert set(made.learned_scale.log2().frac().tolist()) == {0.0}
    assert len(set(made.learned_scale.tolist())) > 1
    with torch.no_grad():
        want = conv(x)
        torch.testing.assert_close(made(x), want, rtol=0, atol=rounding(want))


# --- two levels that are not opposite ---------------------------------------------------------------------------------


def test_two_levels():
    """Exactly: two binary convolutions and an image without a batch, whose constants are evaluated once."""
    model, x = foreign.adabin(), foreign.images()
    made = converted(model, x)
    layer = made.blocks[1]
    assert isinstance(layer, binary.TwoLevelConv2d)
    assert layer.conv.surrogate == "approx_sign"
    packed = binary.pack(made, x)
    other = foreign.images(8)
    with torch.no_grad():
        want = model(other)
        for network in (made, packed):
            torch.testing.assert_close(network(other), want, rtol=0, atol=rounding(want))
        torch.testing.assert_close(made.double()(x.double()), model.double()(x.double()), rtol=1e-6, atol=1e-8)
    rows = packed._rows
    assert [row.how for row in rows if row.kind == "BinaryConv2d"] == ["bits", "bits"]
    assert not [row for row in rows if row.kind in ("sum", "view", "binary_activation")]


def test_two_levels_train_as_the_authors_do():
    """Gradients of the input and of its two levels; the weight's own levels are statistics there, parameters here."""
    conv, x = foreign.AdaBinConv2d(8, 6, 3, 2, 1), torch.randn(2, 8, 7, 6, requires_grad=True)
    made = converted(conv, x.detach())
    grad = torch.randn(2, 6, 4, 3)
    activation = conv.activation
    wanted = torch.autograd.grad(conv(x), [x, activation.alpha_a, activation.beta_a, conv.bias], grad)
    got = torch.autograd.grad(made(x), [x, made.alpha, made.beta, made.bias], grad)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))
    made(x).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in made.parameters())


class OneTap(nn.Conv1d):
    """Two levels in one dimension."""

    def forward(self, x):
        return self._conv_forward(x.sign() * 0.5 + 0.2, self.weight.sign() * 0.7 - 0.1, None)


def test_two_levels_of_other_products_are_refused():
    with pytest.raises(ValueError, match=r"the model \(OneTap\) stays as it is: the two values of its"):
        binary.convert(OneTap(4, 4, 3), torch.randn(2, 4, 9))


def test_two_levels_refuse_other_layers():
    with pytest.raises(ValueError, match="TwoLevelConv2d: conv must have encoding 'sign', weight_scale 'learned', pad"):
        binary.TwoLevelConv2d(BinaryConv2d(4, 4, 3), torch.zeros(4))
    conv = BinaryConv2d(4, 4, 3, bias=False, weight_scale="learned")
    with pytest.raises(ValueError, match=r"TwoLevelConv2d: offset must have one value a filter \(4\), got \(5,\)"):
        binary.TwoLevelConv2d(conv, torch.zeros(5))
    with pytest.raises(ValueError, match="TwoLevelConv2d: alpha must be positive, got 0"):
        binary.TwoLevelConv2d(conv, torch.zeros(4), alpha=0)


# --- rules ------------------------------------------------------------------------------------------------------------


def as_layer(conv):
    """The rule for HardBinaryConv, spelled out."""
    filters, channels, kernel, _ = conv.shape
    layer = BinaryConv2d(channels, filters, kernel, conv.stride, conv.padding, bias=False)
    layer.weight.data = conv.weights.data.reshape(conv.shape)
    return layer


class Derived(foreign.HardBinaryConv):
    pass


def test_rules_come_first_and_the_nearest_class_counts():
    sign, x = foreign.BinaryActivation(), torch.randn(2, 7, 5, 5)
    model = nn.Sequential(sign, Derived(7, 8, padding=0), nn.BatchNorm2d(8), sign, foreign.HardBinaryConv(8, 8))
    foreign.trained(model)
    seen = []

    def rule(conv):
        seen.append(type(conv))
        return as_layer(conv)

    made = converted(model, x, rules={foreign.HardBinaryConv: rule, Derived: as_layer})
    assert seen == [foreign.HardBinaryConv]
    assert len(layers_of(made)) == 2
    assert "BinaryConv2d by its rule" in {entry.how for entry in binary.conversions(made)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rules": [1]}, TypeError, "convert: rules must be a mapping of classes to functions, got list"),
        ({"rules": {"HardBinaryConv": as_layer}}, TypeError, "rules must be for classes of modules, got 'Hard"),
        ({"rules": {nn.Linear: 3}}, TypeError, r"convert: rules\[Linear\] must be callable, got int"),
        ({"rules": {foreign.HardBinaryConv: lambda conv: None}}, TypeError,
         r"the rule for 1 \(HardBinaryConv\) must return a module, got NoneType"),
        ({"rules": {foreign.HardBinaryConv: lambda conv: BinaryConv2d(8, 8, 3, padding=1)}}, ValueError,
         r"what the rule for 1 \(HardBinaryConv\) made gives something else than the module: they differ by up to"),
        ({"surrogate": "tanh"}, ValueError, "convert: surrogate must be one of 'clip'"),
        ({"example_input": torch.zeros(1, 3, 5, 5)}, ValueError, "convert: model does not run on example_input: Run"),
        ({"model": 3}, TypeError, "convert: model must be a torch.nn.Module, got int"),
        ({"model": nn.Conv2d(8, 8, 3)}, ValueError, "nothing of the model could be converted; it has no binary layer"),
        ({"example_input": torch.randn(0, 8, 5, 5)}, ValueError, "1 .* stays as it is: the example has no values"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    model = nn.Sequential(foreign.BinaryActivation(), foreign.HardBinaryConv(8, 8))
    arguments = {"model": model, "example_input": torch.randn(2, 8, 5, 5)} | options
    with pytest.raises(error, match=message):
        binary.convert(**arguments)


# --- other ways to write them -----------------------------------------------------------------------------------------


class Inline(nn.Module):
    """An estimator spelled out in the forward, then a layer; and a float function that stays."""

    def __init__(self, estimator):
        super().__init__()
        self.estimator, self.conv, self.unused = estimator, foreign.HardBinaryConv(16, 24), nn.Linear(2, 2)
        self.label = "kept"

    def forward(self, x):
        x = F.gelu(x) - 0.1
        return F.silu(self.conv(self.estimator(x)))


def clipped_estimator(x):
    clipped = x.clamp(-1, 1)
    return (torch.where(x >= 0, 1.0, -1.0) - clipped).detach() + clipped


def detached_estimator(x):
    return x.sign().detach() - x.detach() + x


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        z = 5 * x
        return grad * 5 * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z))


class Tanh(Swish):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(3 * x) ** 2)


@pytest.mark.parametrize(
    ("estimator", "surrogate"),
    [(clipped_estimator, "clip"), (detached_estimator, "identity"), (foreign.BinActive.apply, "clip"),
     (Swish.apply, "swish_sign"), (Tanh.apply, "steep")],
)
def test_a_sign_in_the_forward(estimator, surrogate):
    model, x = Inline(estimator), torch.randn(3, 16, 6, 6)
    made = converted(model, x, surrogate="steep")
    assert isinstance(made.sign, BinaryActivation)
    assert made.sign.surrogate == surrogate
    assert made.label == "kept"
    assert "unused.weight" in made.state_dict()
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(made(x), want, rtol=0, atol=rounding(want))
    binary.pack(made, x)
    clones = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    assert all(torch.equal(clone(x), made(x)) for clone in clones)
    assert all(binary.conversions(clone) == binary.conversions(made) for clone in clones)


class OtherFunction(Inline):
    def forward(self, x):
        return super().forward(DoubledGradient.apply(x))


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_forward_that_a_graph_would_change_stays():
    """Its layer is converted all the same."""
    model, x = OtherFunction(foreign.BinActive.apply), torch.randn(3, 16, 6, 6)
    with pytest.warns(UserWarning, match=r"forward \(OtherFunction\) stays as it is: its own operations: .*no sign"):
        made = binary.convert(model, x)
    assert isinstance(made, OtherFunction)
    assert isinstance(made.conv, BinaryConv2d)
    assert not hasattr(made, "sign")
    assert torch.equal(model(x).argmax(1), made(x).argmax(1))


class ScaledBehind(nn.Module):
    """Alpha and bias of each filter behind the product of signs."""

    def __init__(self, weight, product, shape):
        super().__init__()
        self.weight, self.product = nn.Parameter(weight), product
        self.alpha, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.product(foreign.BinActive.apply(x), torch.sign(self.weight)) * self.alpha + self.bias


@pytest.mark.parametrize(
    ("weight", "product", "shape", "image", "kind"),
    [
        ((24, 8, 3, 3), lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 2), (24, 1, 1), (16, 9, 8), BinaryConv2d),
        ((24, 16, 5), lambda x, w: F.conv1d(x, w, padding="same"), (24, 1), (16, 9), BinaryConv1d),
        ((24, 16), F.linear, (24,), (5, 16), BinaryLinear),
        ((24, 16), F.linear, (24,), (16,), BinaryLinear),
    ],
)
def test_scale_and_bias_behind_the_product(weight, product, shape, image, kind):
    model, x = ScaledBehind(torch.randn(weight), product, shape), torch.randn(4, *image)
    made = converted(model, x)
    assert type(made) is kind
    assert torch.equal(made.weight, model.weight)
    assert made.surrogate == "clip"
    torch.testing.assert_close(made.learned_scale, model.alpha.flatten(), rtol=1e-5, atol=0)
    torch.testing.assert_close(made.bias, model.bias.flatten(), rtol=0, atol=1e-4)
    other = torch.randn(4, *image)
    with torch.no_grad():
        want = model(other)
        torch.testing.assert_close(made(other), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_step_in_front_and_a_factor():
    """DoReFa-like: activations of 0 and 1, or of -a and a, and one scale for the layer."""

    class Conv(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, torch.sign(self.weight) * self.weight.abs().mean(), self.bias)

    class Step(nn.Module):
        def forward(self, x):
            return torch.round(x.clamp(0, 1))

    class Scaled(nn.Module):
        def forward(self, x):
            return 0.7 * torch.sign(x)

    x = torch.randn(2, 16, 6, 6)
    for front, encoding, scale in ((Step(), "step", "layer"), (Scaled(), "sign", "learned")):
        model = nn.Sequential(front, Conv(16, 24, 3, padding=1))
        made = converted(model, x)
        assert (made[1].encoding, made[1].weight_scale) == (encoding, scale)
        assert torch.equal(made[1].weight, model[1].weight)
        with torch.no_grad():
            want = model(x)
            torch.testing.assert_close(made(x), want, rtol=0, atol=rounding(want))


# --- what is not hidden -----------------------------------------------------------------------------------------------


def test_zeros_are_reported():
    model, x = foreign.birealnet(), foreign.images()
    model.blocks[1].binary_conv.weights.data[5:12] = 0
    with (
        pytest.warns(UserWarning, match=r"7 weights are exactly 0 in blocks\.1\.binary_conv, which is \+1 here"),
        pytest.warns(UserWarning, match="the converted network's output differs from the model's by up to"),
    ):
        made = binary.convert(model, x)
    assert torch.equal(made.blocks[1].binary_conv.weight.flatten(), model.blocks[1].binary_conv.weights.flatten())

    block = nn.Sequential(nn.ReLU(), foreign.BinaryActivation(), foreign.HardBinaryConv(8, 8))
    with pytest.warns(UserWarning, match="binarized values of the example are exactly 0 in 1, which is"):
        binary.convert(block, torch.randn(2, 8, 5, 5))


class WeightsAlone(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, torch.sign(self.weight), self.bias)


class Twice(WeightsAlone):
    def forward(self, x):
        return super().forward(torch.sign(x)) + super().forward(torch.sign(x))


class Shifted(WeightsAlone):
    def forward(self, x):
        return super().forward(torch.sign(x - 0.3))


class MeanOfPixels(WeightsAlone):
    """XNOR-Net's factor K, the mean |x| of each window."""

    def forward(self, x):
        return super().forward(torch.sign(x)) * F.avg_pool2d(x.abs().mean(1, keepdim=True), 3, 1, 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WeightsAlone, "its input is not binary"),
        (Twice, "its forward has several convolutions"),
        (Shifted, "its input is padded, scaled or shifted before it is binarized"),
        (MeanOfPixels, "its result is not scale"),
    ],
)
def test_what_is_left_is_named(kind, reason):
    model = nn.Sequential(foreign.IRConv2d(8, 8, 3, padding=1), kind(8, 8, 3, padding=1))
    x = torch.randn(2, 8, 6, 6)
    with pytest.warns(UserWarning, match=rf"convert: 1 \({kind.__name__}\) stays as it is: {reason}"):
        made = binary.convert(model, x)
    assert type(made[1]) is kind
    assert binary.conversions(made)[-1].converted is False
    with pytest.raises(ValueError, match=rf"nothing of the model could be converted; 1 \({kind.__name__}\) .*{reason}"):
        binary.convert(model[1:], x)


def test_a_hook_keeps_a_module():
    model, x = nn.Sequential(foreign.IRConv2d(8, 8, 3), foreign.IRConv2d(8, 8, 3)), torch.randn(2, 8, 6, 6)
    model[1].register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.warns(UserWarning, match=r"1 \(IRConv2d\) stays as it is: "):
        made = binary.convert(model, x)
    assert isinstance(made[1], foreign.IRConv2d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model, x = foreign.reactnet().to(dtype), foreign.images().to(dtype)
    made = converted(model, x)
    assert {value.dtype for value in made.parameters()} == {dtype}
    theirs = [module.weights for module in model.modules() if isinstance(module, foreign.HardBinaryConv)]
    for layer, weight in zip(layers_of(made), theirs, strict=True):
        assert torch.equal(layer.weight.flatten(), weight.flatten())
    with torch.no_grad():
        assert made(x).dtype == dtype


def test_modes_shared_modules_and_frozen_parameters():
    block = foreign.BiRealBlock(16, 16).requires_grad_(False)
    model = nn.Sequential(block, block, foreign.BiRealBlock(16, 16)).train()
    model[2].eval()
    made = converted(model, torch.randn(2, 16, 6, 6))
    assert made[0] is made[1]
    assert not made[0].binary_conv.weight.requires_grad
    assert made[2].binary_conv.weight.requires_grad
    assert made[0].binary_conv.training
    assert made[0].binary_activation.training
    assert not made[2].binary_conv.training


def test_own_layers_stay():
    model, x = nn.Sequential(BinaryConv2d(8, 8, 3), foreign.IRConv2d(8, 8, 3)), torch.randn(2, 8, 6, 6)
    made = converted(model, x)
    assert torch.equal(made[0].weight, model[0].weight)
    assert [entry.how.split(",")[0] for entry in binary.conversions(made)] == ["as it was", "BinaryConv2d"]


def test_conversions_refuses_other_models():
    with pytest.raises(ValueError, match="conversions: model must be one that convert made, got Linear"):
        binary.conversions(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"conversions: model must be a torch\.nn\.Module, got int"):
        binary.conversions(3)
