"""Networks of BinaryDuo: layers and their order, widths, costs, initialisation, training."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext import duo, models
from lowbit_ext.binary import BinaryConv2d, BinaryLinear
from lowbit_ext.duo import CoupledConv2d, CoupledLinear, StepActivation, TernaryActivation
from lowbit_ext.models.layers import STAGES

BINARY = (BinaryConv2d, BinaryLinear, CoupledConv2d, CoupledLinear)
SMALL = {
    "vgg7": lambda stage: models.vgg7(stage, widths=(5, 7, 9, 6, 13, 11), in_channels=1, image_size=28),
    "alexnet": lambda stage: models.alexnet(stage, widths=(5, 7, 9, 6, 13, 11, 8), image_size=28, in_channels=1),
    "resnet18": lambda stage: models.resnet18(stage, widths=(5, 7, 9, 11, 13), in_channels=1),
    "resnet18 every_conv cifar": lambda stage: models.resnet18(
        stage, widths=(5, 7, 9, 11, 13), in_channels=1, stem="cifar", shortcuts="every_conv"
    ),
}


@pytest.fixture
def meta():
    """Tensors without data: costs depend on shapes alone."""
    with torch.device("meta"):
        yield


def cost(model, size):
    return models.describe(model, torch.empty(1, 3, size, size))


# --- costs ------------------------------------------------------------------------------------------------------------


def hidden_weights(description):
    """Weights of all convolutions and linear layers but the classifier."""
    layers = [layer for layer in description.layers if "BatchNorm" not in layer.kind]
    return sum(layer.binary_parameters + layer.float_parameters for layer in layers[:-1])


@pytest.mark.parametrize(
    ("build", "size", "count", "ratio"),
    [
        (models.vgg7, 32, hidden_weights, 0.998),
        (models.alexnet, 224, hidden_weights, 0.972),
        (models.resnet18, 224, lambda description: description.binary_parameters, 1.095),
    ],
)
def test_decoupled_widths_match_the_baseline(meta, build, size, count, ratio):
    """The paper's widths: parameters of the decoupled network over those of the binary baseline."""
    baseline = cost(build("binary"), size)
    decoupled = cost(duo.decouple(build("coupled")), size)
    assert round(count(decoupled) / count(baseline), 3) == ratio


def test_describe_counts_by_hand():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), padding=(1, 2), bias=False), nn.BatchNorm2d(4),
        BinaryConv2d(4, 6, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), shared, shared,
        BinaryLinear(6, 2),
    )
    model[1].eval()
    training = [module.training for module in model.modules()]
    description = models.describe(model, torch.zeros(5, 3, 9, 7))
    assert [module.training for module in model.modules()] == training
    rows = [(row.name, row.kind, row.output) for row in description.layers]
    assert rows == [
        ("0", "Conv2d", (4, 9, 7)), ("1", "BatchNorm2d", (4, 9, 7)), ("2", "BinaryConv2d", (6, 4, 3)),
        ("5", "Linear", (6,)), ("7", "BinaryLinear", (2,)),
    ]
    counts = [
        (row.binary_parameters, row.float_parameters, row.binary_operations, row.float_operations)
        for row in description.layers
    ]
    assert counts == [
        (0, 4 * 3 * 15, 0, 4 * 9 * 7 * 3 * 15), (0, 8, 0, 0), (6 * 2 * 9, 6, 6 * 4 * 3 * 2 * 9, 0),
        (0, 42, 0, 2 * 36), (12, 2, 12, 0),
    ]
    totals = (description.binary_parameters, description.float_parameters)
    assert totals == tuple(sum(column) for column in list(zip(*counts, strict=True))[:2])
    lines = str(description).splitlines()
    assert len(lines) == 2 + 5 + 1
    assert f"{4 * 9 * 7 * 3 * 15 + 72:,}" in lines[-1]
    with pytest.raises(TypeError, match="describe: model must be"):
        models.describe(F.relu, torch.zeros(1))


def test_full_size_costs(meta):
    """AlexNet and ResNet-18 at ImageNet's size, against sums over the layers' shapes."""
    alexnet = cost(models.alexnet("float"), 224)
    convolutions = [(3, 96, 11, 55), (96, 256, 5, 27), (256, 384, 3, 13), (384, 384, 3, 13), (384, 256, 3, 13)]
    weights = sum(into * out * k * k for into, out, k, _ in convolutions)
    operations = sum(into * out * k * k * size**2 for into, out, k, size in convolutions)
    linear = 256 * 36 * 4096 + 4096 * 4096 + 4096 * 1000
    norms = 2 * (96 + 256 + 384 + 384 + 256 + 4096 + 4096)
    assert alexnet.float_parameters == weights + linear + 1000 + norms
    assert alexnet.float_operations == operations + linear
    # torchvision's ResNet-18 has 11,689,512 parameters; the second batch norm of the stem adds 128.
    assert cost(models.resnet18("float"), 224).float_parameters == 11_689_512 + 128


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SMALL)
def test_layers_of_each_stage(name, stage):
    model = SMALL[name](stage)
    activations = {"float": nn.Hardtanh, "binary": StepActivation, "coupled": TernaryActivation}
    hidden = [module for module in model.modules() if isinstance(module, tuple(activations.values()))]
    assert {type(module) for module in hidden} == {activations[stage]}
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    outer = [layers[0], layers[-1], *(layer for layer in layers if getattr(layer, "kernel_size", 0) == (1, 1))]
    assert all(type(layer) in (nn.Conv2d, nn.Linear) for layer in outer)
    inner = [layer for layer in layers if not any(layer is other for other in outer)]
    assert len(inner) == len(hidden), "one activation in front of each hidden layer"
    assert all(isinstance(layer, BINARY) == (stage != "float") for layer in inner)
    assert all(layer.bias is None for layer in layers[:-1])
    assert all(layer.weight_scale == "layer" for layer in inner if stage != "float")


def test_order_of_layers():
    kinds = [type(module).__name__ for module in SMALL["vgg7"]("binary")]
    assert kinds[:7] == [
        "Conv2d", "BatchNorm2d", "StepActivation", "BinaryConv2d", "MaxPool2d", "BatchNorm2d", "StepActivation",
    ]
    assert kinds[-7:] == [
        "BinaryLinear", "BatchNorm1d", "StepActivation", "BinaryLinear", "BatchNorm1d", "ReLU", "Linear",
    ]
    kinds = [type(module).__name__ for module in models.resnet18("coupled", widths=(4, 4, 4, 4, 4)).stem]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "BatchNorm2d"]


@pytest.mark.parametrize("size", [28, 32, 63, 64])
@pytest.mark.parametrize("build", [models.vgg7, models.alexnet])
def test_image_sizes(build, size):
    widths = (4,) * (6 if build is models.vgg7 else 7)
    model = build("binary", in_channels=1, num_classes=3, image_size=size, widths=widths)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 3)


@pytest.mark.parametrize("size", [28, 31, 32])
@pytest.mark.parametrize("shortcuts", ["standard", "every_conv"])
def test_shortcuts_fit_odd_sizes(shortcuts, size):
    model = models.resnet18("binary", num_classes=3, widths=(4, 5, 6, 7, 8), stem="cifar", shortcuts=shortcuts)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 3)


def test_default_widths(meta):
    widths = [layer.output[0] for layer in cost(models.vgg7("coupled"), 32).layers if "BatchNorm" in layer.kind]
    assert widths == [45, 45, 90, 90, 336, 512]
    model = models.resnet18("coupled")
    assert [block.conv2.out_channels for block in model.blocks] == [64, 64, 90, 90, 180, 180, 360, 512]
    model = models.resnet18("binary")
    assert [block.conv1.out_channels for block in model.blocks] == [64, 64, 128, 128, 256, 256, 512, 512]


def test_initialisation():
    torch.manual_seed(0)
    model = models.resnet18("binary", widths=(64, 96, 128, 128, 128))
    cases = {
        "stem.conv": 49 * 3 + 16 * 64,  # 7x7 with stride 2: ceil(7 / 2)^2 outputs see an input
        "blocks.1.conv1": 9 * 64 + 9 * 64,
        "blocks.2.conv1": 9 * 64 + 4 * 96,
        "blocks.2.shortcut.conv": 64 + 96,
        "fc": 128 + 1000,
    }
    for name, fan in cases.items():
        weight = model.get_submodule(name).weight
        deviation = math.sqrt(4 / fan)
        assert weight.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * weight.numel())), name
        assert abs(weight.mean().item()) < 4 * deviation / math.sqrt(weight.numel()), name


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (models.vgg7, {"stage": "ternary"}, "vgg7: stage must be one of 'float', 'binary', 'coupled', got 'ternary'"),
        (models.vgg7, {"widths": (4, 4)}, r"vgg7: widths must be 6 positive integers, got \(4, 4\)"),
        (models.vgg7, {"widths": (4, 4, 4, 4, 4, 0)}, "vgg7: widths must be 6 positive integers"),
        (models.vgg7, {"image_size": 7}, "vgg7: image_size must be at least 8, got 7"),
        (models.vgg7, {"surrogate": "none"}, "surrogate"),
        (models.alexnet, {"widths": (4,) * 6}, "alexnet: widths must be 7 positive integers"),
        (models.alexnet, {"image_size": 14}, "alexnet: image_size must be at least 15, got 14"),
        (models.resnet18, {"stem": "big"}, "resnet18: stem must be one of 'imagenet', 'cifar', got 'big'"),
        (models.resnet18, {"shortcuts": 1}, "resnet18: shortcuts must be one of 'standard', 'every_conv', got 1"),
        (models.resnet18, {"widths": (4,) * 4}, "resnet18: widths must be 5 positive integers"),
    ],
)
def test_refused_arguments(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name, stage):
    torch.manual_seed(0)
    model = SMALL[name](stage)
    loss = F.cross_entropy(model(torch.randn(16, 1, 28, 28)), torch.arange(16) % 10)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.abs().sum() > 0), key


def test_dropout_reaches_the_product_of_binary_layers():
    """A layer that took its input as bits would read 1 / (1 - p) as 1."""
    model = models.alexnet("binary", widths=(5, 7, 9, 6, 13, 11, 8), image_size=28, in_channels=1, dropout=0.5)
    assert type(model.fc6) is CoupledLinear
    assert type(models.alexnet("binary", widths=(4,) * 7, image_size=28, dropout=0.0).fc6) is BinaryLinear
    ones = torch.ones(4096, model.fc6.in_features)
    with torch.no_grad():
        expected, mean = model.fc6(ones[:1]), model.fc6(model.dropout6(ones)).mean(0)
    deviation = float(model.fc6.scale()) * math.sqrt(ones.shape[1] / ones.shape[0])
    assert bool(((mean - expected).abs() < 5 * deviation).all())


@pytest.mark.parametrize("name", ["vgg7", "resnet18 every_conv cifar"])
def test_coupled_model_compiles(name):
    torch.manual_seed(0)
    model = SMALL[name]("coupled")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 1, 28, 28)
    expected = model(x)
    expected.sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    got = compiled(x)
    got.sum().backward()
    torch.testing.assert_close(got, expected)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], msg=key, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "convolutions"), [(20, 19 + 2), (56, 55 + 2), (164, 163 + 3)])
def test_preact_resnet_has_the_papers_layers(depth, convolutions):
    # Weighted layers on the main path are `depth`; shortcuts that change width, and fc among the depth, apart.
    network = models.preact_resnet(depth, in_channels=1, widths=(4, 8, 8) if depth < 164 else (4, 8, 16))
    found = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [m for name, m in network.named_modules() if name.endswith("shortcut")]
    assert len(found) - len(shortcuts) == depth - 1
    assert len(found) == convolutions
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(depth=21), "depth must be 6n"), (dict(depth=165), "depth must be 6n"), (dict(widths=(16, 32)), "3 positive"),
])
def test_preact_resnet_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.preact_resnet(**arguments)
