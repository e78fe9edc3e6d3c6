"""Small networks of every structure that the tests of lowmem share, each with the shape of its input."""

import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext import models


class PostActivation(nn.Module):
    """Two convolutions, each with batch norm, and the sum behind ReLU; one ReLU module, in place, for both."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding="same"), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return F.dropout(self.relu(y), 0.25, training=self.training)


class Functional(nn.Module):
    """Functional ReLUs, in place by name, by position and as a method; arguments by name; a result that is a dict."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(5, 10)

    def forward(self, x, scale=1.0, *, flag=True):
        x = F.relu(self.bn1(input=self.conv1(input=x)), inplace=True)
        x = self.pool(F.max_pool2d(F.relu(F.relu(input=x) * 2, True), kernel_size=2, stride=1))
        x = self.bn2(self.conv2(x)).relu_()
        x = F.adaptive_avg_pool2d(x, 1)
        return {"logits": self.fc(torch.flatten(x, 1)) * scale, "flag": flag}


class Branching(nn.Module):
    """What torch.fx cannot trace, with parts that it can."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.bn, self.fc, self.same = nn.BatchNorm2d(4), nn.Linear(4, 10), self.body

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.fc(F.relu(self.bn(self.same(x))).mean((2, 3)))


class Shared(nn.Module):
    """Layers that are called several times, and a batch norm's result with two readers."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv, self.relu = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x):
        for _ in range(2):
            x = self.conv(self.relu(self.bn(x)))
        y = self.bn(x)
        return self.conv(self.relu(y)) + self.conv(y * 2) + y


class Attributes(nn.Module):
    """Parameters and buffers that the model itself reads, one that is not saved, a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.unused, self.bn, self.conv = nn.Linear(2, 2), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("gain", torch.ones(1), persistent=False)
        self.list, self.drop = nn.ParameterList([torch.ones(1)]), nn.Dropout(0.3)
        self.alias = self.conv

    def forward(self, x):
        x = F.relu(self.bn(x * self.scale - self.mean) * self.gain) + torch.tensor([0.5])
        return F.dropout(self.drop(self.alias(x)) * self.list[0], 0.2, self.training)


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.ReLU())
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.act(self.first(x)))


class Attention(nn.Module):
    """Layers without a rule."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        y = self.norm(x)
        return self.mlp(x + self.attention(y, y, y)[0])


def _block(dimensions, norm_settings=None, layer=None):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](4, **(norm_settings or {}))
    return nn.Sequential(conv(3, 4, 3), norm, nn.ReLU(), layer or conv(4, 5, 3, padding=1))


def _of_own_layers(stage):
    """Two residual blocks of the ResNet of this stage, the second with a shortcut that halves the image."""
    options = {"in_channels": 1, "num_classes": 10, "stem": "imagenet", "shortcuts": "standard", "surrogate": "clip"}
    return models.ResNet(stage, (1, 1), (4, 5, 6), **options)


_IMAGES = (6, 1, 12, 12)
_SMALL = (4, 3, 8, 8)

NETWORKS = {
    # From 8 channels on: torch 2.13 on CPUs without AVX-512 writes past the end in the backward pass of a channels_last
    # 1x1 convolution of stride 2 and fewer.
    "preact": (lambda: models.preact_resnet(8, in_channels=1, widths=(8, 16, 16)), _IMAGES),
    "bottleneck": (lambda: models.PreActResNet(2, True, (2, 3, 4), 1, 10), _IMAGES),
    "post": (lambda: nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), PostActivation(5), PostActivation(5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10),
    ), _IMAGES),
    "vgg": (lambda: nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(5, 7, 3, padding=1),
        nn.BatchNorm2d(7), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(63, 9),
        nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 10),
    ), _IMAGES),
    "binary": (lambda: _of_own_layers("binary"), _IMAGES),
    "coupled": (lambda: _of_own_layers("coupled"), _IMAGES),
    "mlp": (lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(144, 33), nn.ReLU(), nn.Linear(33, 9), nn.ReLU(), nn.Linear(9, 10)
    ), _IMAGES),
    "functional": (Functional, (4, 3, 12, 12)),
    "branching": (Branching, _SMALL),
    "shared": (Shared, _SMALL),
    "attributes": (Attributes, _SMALL),
    "tied": (Tied, (4, 8)),
    "attention": (Attention, (2, 5, 8)),
    "1d": (lambda: _block(1), (4, 3, 9)),
    "3d": (lambda: _block(3), (4, 3, 5, 5, 5)),
    "linear in 3 dimensions": (lambda: nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(16, 5)
    ), (4, 7, 8)),
    "momentum None": (lambda: _block(2, {"momentum": None}), _SMALL),
    "no running statistics": (lambda: _block(2, {"track_running_stats": False}), _SMALL),
    "not affine": (lambda: _block(2, {"affine": False}), _SMALL),
    "grouped": (lambda: _block(2, layer=nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2, bias=False)), _SMALL),
    "transposed": (lambda: _block(2, layer=nn.ConvTranspose2d(4, 5, 3)), _SMALL),
    "reflected": (lambda: _block(2, layer=nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")), _SMALL),
    "even same": (lambda: _block(2, layer=nn.Conv2d(4, 5, 2, padding="same")), _SMALL),
    "group norm": (lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 5, 3)
    ), _SMALL),
    "unbatched": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), (3, 8, 8)),
    "one layer": (lambda: nn.BatchNorm2d(3), _SMALL),
}


def make(name):
    """(model, shape of its input), from the state of torch's generator."""
    build, shape = NETWORKS[name]
    return build(), shape


def step(model, shape, seed=1, dtype=torch.float32):
    """One pass, forward and backward, of seeded input and gradient: (results, input's gradient, {name: gradient})."""
    torch.manual_seed(seed)
    x = torch.randn(shape).to(dtype).requires_grad_()
    model.zero_grad()
    out = model(x)
    out = out["logits"] if isinstance(out, dict) else out
    torch.manual_seed(seed + 1)  # whatever the forward pass has drawn
    out.backward(torch.randn(out.shape).to(out))
    return out.detach(), x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def joined(result):
    """All gradients of `step` as one vector."""
    _, grad, grads = result
    return torch.cat([grad.flatten(), *(grads[name].flatten() for name in sorted(grads))]).double()


def relative(found, exact):
    """Norm of the difference over the norm."""
    return float((found - exact).norm() / exact.norm())


def rounding_of_inputs(bits):
    """Bound on the relative error of a weight gradient whose input is kept in codes of groups of 256.

    256 normal values span about 6 deviations, a step is that over 2^bits - 1, and the rounding errors, uniform within a
    step, are independent of the gradient: their deviation is a step / sqrt(12). Three tenths more for the sample.
    """
    return 1.3 * 6 / (2**bits - 1) / 12**0.5
