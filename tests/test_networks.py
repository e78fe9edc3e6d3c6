"""Networks on signs: the papers' figures, blocks against their formulas, float twins, gradients, packing."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext import binary, models
from lowbit_ext.binary import BinaryConv2d, BinaryLinear
from lowbit_ext.models import densenet, layers, residual, transformer

WIDTHS = {"widths": (8, 10, 12, 15)}
SMALL = {  # the options of a small network
    "birealnet18": WIDTHS, "reactnet18": WIDTHS, "reactnet_a": {"width": 3}, "quicknet": WIDTHS,
    "binary_densenet28": {"width": 6}, "meliusnet22": {"width": 16}, "resnet20": {"widths": (4, 6, 9)},
    "binary_vit": {"width": 12, "depth": 2, "heads": 3, "patch_size": 4, "image_size": 16},
}
WITH_STEMS = [name for name in SMALL if name not in ("resnet20", "binary_vit")]
CASES = [(name, stem) for name in WITH_STEMS for stem in layers.STEMS] + [("resnet20", None), ("binary_vit", None)]


def build(name, stem=None, stage="binary", **options):
    options = {"in_channels": 2, "num_classes": 5} | SMALL[name] | options | ({} if stem is None else {"stem": stem})
    torch.manual_seed(0)
    return getattr(models, name)(stage, **options)


def images(name, stem=None, count=2):
    size = 64 if stem == "imagenet" else 16
    return torch.randn(count, 2, size, size)


def settled(model, x):
    """In evaluation mode, with batch norm statistics of its own activations."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x + torch.randn_like(x))
    return model.eval()


# --- the papers' figures ----------------------------------------------------------------------------------------------


@pytest.fixture
def meta():
    """Tensors without data: costs depend on shapes alone."""
    with torch.device("meta"):
        yield


def costs(model, size):
    return models.describe(model, torch.empty(1, 3, size, size))


def state_elements(model):
    """Parameters and batch norm statistics, as Keras counts them."""
    return sum(tensor.numel() for tensor in model.state_dict().values() if tensor.dim())


def test_parameters_of_published_models(meta):
    """The counts of larq_zoo's documentation, which are of these networks."""
    assert state_elements(models.birealnet18()) == 11_699_112
    assert state_elements(models.binary_densenet28()) == 5_150_504
    assert costs(models.meliusnet22(), 224).float_parameters + 6_119_424 == 6_944_584
    quicknet = models.quicknet()
    blur = sum(pool.weight.numel() for pool in quicknet.modules() if isinstance(pool, residual.BlurPool))
    statistics = 2 * quicknet.stem.depthwise_bn.num_features  # of a batch norm that has nothing else
    assert sum(parameter.numel() for parameter in quicknet.parameters()) + blur + statistics == 13_234_088
    # DeiT-S has 22,050,664, of which a token and its position: 768.
    assert sum(parameter.numel() for parameter in models.binary_vit("float").parameters()) == 22_050_664 - 768
    # torchvision's ResNet-18, whose shortcuts have the same weights.
    assert costs(models.birealnet18("float"), 224).float_parameters == 11_689_512


@pytest.mark.parametrize(
    ("name", "binary_operations", "float_operations"),
    [
        ("birealnet18", 1.68e9, 1.37e8),  # 1.63e8 in the paper, where 64 binary ones count as one
        ("reactnet_a", 4.82e9, 0.12e8),
        ("meliusnet22", 4.62e9, 1.35e8),
    ],
)
def test_operations_of_the_papers(meta, name, binary_operations, float_operations):
    description = costs(getattr(models, name)(), 224)
    assert description.binary_operations == pytest.approx(binary_operations, rel=5e-3)
    assert description.float_operations == pytest.approx(float_operations, rel=2e-2)


@pytest.mark.parametrize(
    ("name", "binary_weights"),
    [
        ("birealnet18", 9 * (4 * 64**2 + 64 * 128 + 3 * 128**2 + 128 * 256 + 3 * 256**2 + 256 * 512 + 3 * 512**2)),
        ("quicknet", 9 * 4 * (64**2 + 128**2 + 256**2 + 512**2)),
        ("reactnet_a", sum(
            (9 * into + out) * into
            for into, out in [(32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 5,
                              (512, 1024), (1024, 1024)]
        )),
        ("resnet20", 9 * (6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)),
        ("binary_vit", 12 * 12 * 384**2),
    ],
)
def test_binary_weights_by_hand(meta, name, binary_weights):
    description = costs(getattr(models, name)(), 32 if name == "resnet20" else 224)
    assert description.binary_parameters == binary_weights


# --- blocks -----------------------------------------------------------------------------------------------------------


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


def sign_conv(x, layer, scale=True, padding_value=0.0):
    """A binary convolution by its definition."""
    weight = layer.weight
    factor = weight.abs().mean((1, 2, 3), keepdim=True) if scale else 1.0
    padded = F.pad(signs(x), (layer.padding[0],) * 4, value=padding_value)
    return F.conv2d(padded, factor * signs(weight), stride=layer.stride)


def rprelu(x, module):
    x = x + module.before.shift[:, None, None]
    x = torch.where(x >= 0, x, x * module.prelu.weight[:, None, None])
    return x + module.after.shift[:, None, None]


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 6, 7, 7)


@pytest.fixture
def prepared():
    """A block in evaluation mode with parameters and statistics that are not where they start."""
    def prepare(block):
        torch.manual_seed(2)
        with torch.no_grad():
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else torch.randn_like(tensor))
        return block.eval()

    return prepare


@torch.no_grad()
def test_residual_blocks_are_their_formulas(x, prepared):
    near = dict(rtol=1e-5, atol=1e-5)
    network = build("birealnet18", "cifar", widths=(6, 6, 9, 9))
    plain, down = prepared(network.blocks[1]), prepared(network.blocks[8])
    torch.testing.assert_close(plain(x), plain.bn(sign_conv(x, plain.conv)) + x, **near)
    averaged = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    expected = down.bn(sign_conv(x, down.conv)) + down.shortcut.bn(down.shortcut.conv(averaged))
    torch.testing.assert_close(down(x), expected, **near)

    react = prepared(build("reactnet18", "cifar", widths=(6,) * 4).blocks[0])
    shifted = x + react.before.shift[:, None, None]
    torch.testing.assert_close(react(x), rprelu(react.bn(sign_conv(shifted, react.conv)) + x, react.after), **near)

    doubling = prepared(residual.DoublingConv("binary", 6, "clip"))
    shifted = x + doubling.before.shift[:, None, None]
    halves = [norm(sign_conv(shifted, conv)) + x
              for conv, norm in ((doubling.conv1, doubling.bn1), (doubling.conv2, doubling.bn2))]
    torch.testing.assert_close(doubling(x), rprelu(torch.cat(halves, 1), doubling.after), **near)

    ir = prepared(build("resnet20", widths=(6, 9, 9)).blocks[6])
    padded = torch.zeros(2, 9, 4, 4)
    padded[:, 1:7] = x[:, :, ::2, ::2]
    torch.testing.assert_close(ir(x), (ir.bn(sign_conv(x, ir.conv)) + padded).clamp(-1, 1), **near)


@torch.no_grad()
def test_quicknet_and_dense_blocks_are_their_formulas(x, prepared):
    near = dict(rtol=1e-5, atol=1e-5)
    quick = prepared(residual.QuickConv("binary", 6, "clip"))
    convolved = sign_conv(x, quick.conv, scale=False, padding_value=1.0)
    torch.testing.assert_close(quick(x), quick.bn(convolved.relu()) + x, **near)

    grows, improves = (prepared(densenet.DenseConv("binary", 6, 4, "clip", adds)) for adds in (False, True))
    new = sign_conv(grows.bn(x), grows.conv, scale=False)
    assert torch.equal(grows(x), torch.cat([x, new], 1))
    expected = x.clone()
    expected[:, 2:] += sign_conv(improves.bn(x), improves.conv, scale=False)
    assert torch.equal(improves(x), expected)


def test_blur_pool_keeps_means():
    pool = residual.BlurPool(3)
    blurred = pool(torch.full((1, 3, 8, 8), 2.0))
    assert torch.equal(blurred[..., 1:, 1:], torch.full((1, 3, 3, 3), 2.0))
    impulse = torch.zeros(1, 3, 5, 5)
    impulse[0, 1, 2, 2] = 16.0
    assert pool(impulse)[0].nonzero().tolist() == [[1, 1, 1]]
    assert pool(impulse)[0, 1, 1, 1] == 4.0


@torch.no_grad()
def test_attention_is_its_formula():
    torch.manual_seed(3)
    attention, x = transformer.Attention("binary", 12, 3, "clip"), torch.randn(2, 5, 12)
    nn.init.normal_(attention.qkv.bias)
    result = torch.zeros(2, 5, 12)
    query, key, value = attention.qkv(x).split(12, -1)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = signs(query[..., part]) @ signs(key[..., part]).mT / 2
        result[..., part] = scores.softmax(-1) @ value[..., part]
    torch.testing.assert_close(attention(x), attention.projection(result))
    factor = attention.qkv.weight.abs().mean(1)
    expected = signs(x) @ signs(attention.qkv.weight).T * factor + attention.qkv.bias
    torch.testing.assert_close(attention.qkv(x), expected)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stem"), CASES)
def test_float_twin_has_the_same_topology(name, stem):
    model, twin = build(name, stem), build(name, stem, "float")
    x = images(name, stem, 1)
    kinds = (nn.Conv2d, nn.Linear)
    outputs = [
        [(row.name, row.output, row.binary_operations + row.float_operations) for row in models.describe(each, x).layers
         if isinstance(each.get_submodule(row.name), kinds)]
        for each in (model, twin)
    ]
    assert outputs[0] == outputs[1]
    assert set(twin.state_dict()) <= set(model.state_dict())
    assert all(name.endswith("before.shift") for name in set(model.state_dict()) - set(twin.state_dict()))
    assert not any(isinstance(module, (BinaryConv2d, BinaryLinear)) for module in twin.modules())
    weighted = [module for module in model.modules() if isinstance(module, kinds)]
    hidden = [module for module in weighted if isinstance(module, (BinaryConv2d, BinaryLinear))]
    assert type(weighted[0]) is nn.Conv2d
    assert type(weighted[-1]) is nn.Linear
    assert all(module.encoding == "sign" for module in hidden)
    inner = [module for key, module in model.named_modules() if isinstance(module, kinds) and key.startswith("blocks")]
    assert all(module in hidden or module.kernel_size == (1, 1) for module in inner)


@pytest.mark.parametrize(("name", "stem"), CASES)
@pytest.mark.parametrize("stage", layers.SIGN_STAGES)
def test_every_parameter_learns(name, stem, stage):
    model = build(name, stem, stage)
    F.cross_entropy(model(images(name, stem, 8)), torch.arange(8) % 5).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.abs().sum() > 0), key


@pytest.mark.parametrize("stage", layers.SIGN_STAGES)
@pytest.mark.parametrize(("name", "stem"), [case for case in CASES if case[0] != "binary_vit"])
def test_image_sizes(name, stem, stage):
    model = build(name, stem, stage).eval()
    with torch.no_grad():
        for size in (67, 96) if stem == "imagenet" else (28, 33):
            assert model(torch.randn(1, 2, size, size)).shape == (1, 5)


@pytest.mark.parametrize(("name", "stem"), CASES)
def test_packed_network_agrees(name, stem):
    x = images(name, stem, 4)
    model = settled(build(name, stem), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that stay as they are
        packed = binary.pack(model, x[:1])
    with torch.no_grad():
        expected, got = model(x), packed(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((name, {"stage": "coupled"}, f"{name}: stage must be one of 'float', 'binary', got 'coupled'")
          for name in SMALL),
        *((name, {"stem": "big"}, f"{name}: stem must be one of 'imagenet', 'cifar', got 'big'")
          for name in WITH_STEMS),
        *((name, {"surrogate": "none"}, f"{name}: surrogate must be one of") for name in SMALL),
        *((name, {"num_classes": 0}, f"{name}: num_classes must be at least 1, got 0") for name in SMALL),
        *((name, {"in_channels": "3"}, f"{name}: in_channels must be an int, got '3'") for name in SMALL),
        ("birealnet18", {"widths": 4}, "birealnet18: widths must be 4 positive integers, got 4"),
        ("birealnet18", {"widths": (4, 4)}, r"birealnet18: widths must be 4 positive integers, got \(4, 4\)"),
        ("reactnet18", {"widths": (4, 4, 4, 0)}, "reactnet18: widths must be 4 positive integers"),
        ("quicknet", {"widths": (6, 8, 8, 8)}, "quicknet: the first of widths must be a multiple of 4, got 6"),
        ("reactnet_a", {"width": 0}, "reactnet_a: width must be at least 1, got 0"),
        ("binary_densenet28", {"width": 7}, "binary_densenet28: width must be a multiple of 2, got 7"),
        ("meliusnet22", {"width": 24}, "meliusnet22: width must be a multiple of 16, got 24"),
        ("resnet20", {"widths": (8, 4, 4)}, r"resnet20: widths must not fall, got \(8, 4, 4\)"),
        ("binary_vit", {"image_size": 18}, "binary_vit: image_size must be a multiple of 4, got 18"),
        ("binary_vit", {"width": 14}, "binary_vit: width must be a multiple of 3, got 14"),
        ("binary_vit", {"heads": 0}, "binary_vit: heads must be at least 1, got 0"),
        ("binary_vit", {"depth": 1.5}, "binary_vit: depth must be an int, got 1.5"),
    ],
)
def test_refused_arguments(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(name, **options)
