"""Binary networks as their authors write them, in small: what binary.convert must take.

BinaryNet writes signs over inputs and weights.
XNOR-Net binarizes plain convolutions from outside and activations by a function; Bi-Real Net and ReActNet have modules
for both, with a flat weight; IR-Net does both within the convolution; AdaBin's values are not opposite.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def images(batch=4, channels=3, size=12):
    return torch.randn(batch, channels, size, size)


def trained(model):
    """Batch norms with statistics of their own, as after training; evaluation mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


class Classifier(nn.Module):
    """Float stem, blocks, batch norm, average and a float linear layer."""

    def __init__(self, *blocks, width=32, out=64):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(out)
        self.fc = nn.Linear(out, 10)

    def forward(self, x):
        x = self.bn(self.blocks(self.stem(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# --- XNOR-Net ---------------------------------------------------------------------------------------------------------


class BinActive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad, 0)


class BinConv2d(nn.Module):
    """BN, sign, convolution, ReLU; the convolution itself is torch's."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1, dropout=0.0):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels, eps=1e-4)
        self.dropout_ratio = dropout
        if dropout:
            self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.bn(x)
        x = BinActive.apply(x)
        if self.dropout_ratio:
            x = self.dropout(x)
        return self.relu(self.conv(x))


class BinOp:
    """Binarizes the weights of all but the first convolution in place, before a forward pass, and restores them."""

    def __init__(self, model):
        self.weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)][1:]

    def binarize(self):
        self.saved = []
        for weight in self.weights:
            centred = (weight.data - weight.data.mean(1, keepdim=True)).clamp(-1.0, 1.0)
            self.saved.append(centred)
            scale = centred.abs().sum((1, 2, 3), keepdim=True) / centred[0].numel()
            weight.data = centred.sign() * scale

    def restore(self):
        for weight, saved in zip(self.weights, self.saved, strict=True):
            weight.data = saved


def xnor_net():
    """Latent weights; BinOp(model).binarize() makes them those of a forward pass."""
    blocks = BinConv2d(32, 48, 3, 1, 1, dropout=0.5), nn.MaxPool2d(2), BinConv2d(48, 64, 3, 1, 1, groups=2)
    return trained(Classifier(*blocks))


# --- BinaryNet --------------------------------------------------------------------------------------------------------


def binarized(tensor):
    return tensor.sign()


class BinarizeConv2d(nn.Conv2d):
    """Signs written over input and weight, whose latent values are an attribute of the parameter."""

    def forward(self, x):
        if x.size(1) != 3:
            x.data = binarized(x.data)
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()
        self.weight.data = binarized(self.weight.org)
        out = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        if self.bias is not None:
            self.bias.org = self.bias.data.clone()
            out += self.bias.view(1, -1, 1, 1).expand_as(out)
        return out


class BinarizeLinear(nn.Linear):
    def forward(self, x):
        x.data = binarized(x.data)
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()
        self.weight.data = binarized(self.weight.org)
        out = F.linear(x, self.weight)
        if self.bias is not None:
            self.bias.org = self.bias.data.clone()
            out += self.bias.view(1, -1).expand_as(out)
        return out


def binarynet():
    """As for CIFAR-10, in small."""
    return trained(nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Hardtanh(inplace=True),
        BinarizeConv2d(32, 48, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(48), nn.Hardtanh(inplace=True),
        BinarizeConv2d(48, 64, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.Hardtanh(),
        nn.Flatten(), BinarizeLinear(64 * 9, 32), nn.BatchNorm1d(32), nn.Hardtanh(inplace=True), nn.Linear(32, 10),
    ))


# --- Bi-Real Net and ReActNet -----------------------------------------------------------------------------------------


class BinaryActivation(nn.Module):
    """Sign, with the derivative of a piecewise polynomial."""

    def forward(self, x):
        sign = torch.sign(x)
        mask1, mask2, mask3 = ((x < bound).type(torch.float32) for bound in (-1, 0, 1))
        out = -mask1 + (x * x + 2 * x) * (1 - mask1)
        out = out * mask2 + (-x * x + 2 * x) * (1 - mask2)
        out = out * mask3 + (1 - mask3)
        return sign.detach() - out.detach() + out


class HardBinaryConv(nn.Module):
    """Signs times mean |w| of each filter, of a flat weight."""

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, padding=1):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weights = nn.Parameter((torch.rand((math.prod(self.shape), 1)) - 0.5) * 0.1)

    def forward(self, x):
        weight = self.weights.view(self.shape)
        scale = weight.abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True).detach()
        binary = scale * torch.sign(weight)
        clipped = torch.clamp(weight, -1.0, 1.0)
        binary = binary.detach() - clipped.detach() + clipped
        return F.conv2d(x, binary, stride=self.stride, padding=self.padding)


class BiRealBlock(nn.Module):
    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.binary_activation = BinaryActivation()
        self.binary_conv = HardBinaryConv(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(2, stride), nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        residual = x
        out = self.bn1(self.binary_conv(self.binary_activation(x)))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return out


def birealnet():
    return trained(Classifier(BiRealBlock(32, 32), BiRealBlock(32, 64, 2), BiRealBlock(64, 64)))


class LearnableBias(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.2)

    def forward(self, x):
        return x + self.bias.expand_as(x)


class ReActBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.move0, self.binary_activation = LearnableBias(channels), BinaryActivation()
        self.binary_conv, self.bn1 = HardBinaryConv(channels, channels), nn.BatchNorm2d(channels)
        self.move1, self.prelu, self.move2 = LearnableBias(channels), nn.PReLU(channels), LearnableBias(channels)

    def forward(self, x):
        out = self.binary_conv(self.binary_activation(self.move0(x)))
        out = self.bn1(out) + x
        return self.move2(self.prelu(self.move1(out)))


def reactnet():
    return trained(Classifier(ReActBlock(64), ReActBlock(64), width=64))


# --- IR-Net -----------------------------------------------------------------------------------------------------------


class BinaryQuantize(torch.autograd.Function):
    """Sign, with the derivative k t (1 - tanh(t x)^2) of an estimator that evolves over training."""

    @staticmethod
    def forward(ctx, x, k, t):
        ctx.save_for_backward(x, k, t)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        x, k, t = ctx.saved_tensors
        return k * t * (1 - torch.tanh(x * t) ** 2) * grad, None, None


class IRConv2d(nn.Conv2d):
    """Standardised weights, a power of two a filter, and the sign of the input, all in its forward."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.k, self.t = torch.tensor([10.0]), torch.tensor([0.1])

    def forward(self, x):
        weight = self.weight
        weight = weight - weight.view(weight.size(0), -1).mean(-1).view(-1, 1, 1, 1)
        weight = weight / weight.view(weight.size(0), -1).std(-1).view(-1, 1, 1, 1)
        mean = weight.abs().view(weight.size(0), -1).mean(-1)
        scale = torch.pow(torch.tensor([2.0]), (torch.log(mean) / math.log(2)).round()).view(-1, 1, 1, 1).detach()
        signs = BinaryQuantize.apply(weight, self.k, self.t)
        x = BinaryQuantize.apply(x, self.k, self.t)
        return F.conv2d(x, signs * scale, self.bias, self.stride, self.padding, self.dilation, self.groups)


class IRBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = IRConv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = IRConv2d(channels, channels, 3, padding=1, bias=True), nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.hardtanh(self.bn1(self.conv1(x)) + x)
        return F.hardtanh(self.bn2(self.conv2(out)) + out)


def irnet():
    return trained(Classifier(IRBlock(64), width=64))


# --- AdaBin -----------------------------------------------------------------------------------------------------------


class AdaBinActivation(nn.Module):
    """alpha * sign((x - beta) / alpha) + beta."""

    def __init__(self):
        super().__init__()
        self.alpha_a, self.beta_a = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(0.2))
        self.sign = BinaryActivation()

    def forward(self, x):
        return self.alpha_a * self.sign((x - self.beta_a) / self.alpha_a) + self.beta_a


class AdaBinConv2d(nn.Conv2d):
    """Weights of two levels a filter: its mean, up and down by its standard deviation."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.activation = AdaBinActivation()

    def levels(self):
        """Mean and standard deviation of each filter, (O, 1, 1, 1)."""
        beta = self.weight.mean((1, 2, 3), keepdim=True)
        return beta, ((self.weight - beta) ** 2).mean((1, 2, 3), keepdim=True).sqrt()

    def forward(self, x):
        beta, alpha = self.levels()
        weight = alpha * BinaryQuantize.apply((self.weight - beta) / alpha, torch.ones(1), torch.ones(1)) + beta
        return F.conv2d(self.activation(x), weight, self.bias, self.stride, self.padding)


def adabin():
    conv = AdaBinConv2d(32, 64, 3, 2, 1, bias=False)
    return trained(Classifier(nn.BatchNorm2d(32), conv, nn.BatchNorm2d(64), nn.Hardtanh()))
