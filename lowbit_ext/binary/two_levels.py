"""Convolutions of two-level values that are not opposite, on bits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit_ext import _arguments
from lowbit_ext.binary.activation import binary_activation
from lowbit_ext.binary.convolution import conv2d
from lowbit_ext.binary.layers import BinaryConv2d


class TwoLevelConv2d(nn.Module):
    """conv2d(a, w) of a = alpha * sign((x - beta) / alpha) + beta and filters w = scale * sign(weight) + offset.

    With signs s of the input and s' of a filter it is

        alpha * scale * (s * s') + alpha * offset * (s * 1) + beta * (1 * w):

    a binary convolution, one of a single filter of ones, and an image that is the same for every input.

    Args:
        conv: makes s * s' of its input's signs, with `scale` as its learned scale; zero padding, no groups, no bias.
        offset: (O,) of each filter.
        alpha, beta: numbers of the input, alpha positive.
        bias: (O,) or None.

    Attributes:
        conv: the layer.
        offset, alpha, beta, bias: parameters.

    Shape:
        input (N, C, H, W), output (N, O, H', W').

    Gradient:
        input: conv's surrogate at (x - beta) / alpha. Parameters: exact but for the signs, which are straight-through.

    Raises:
        TypeError, ValueError: conv is no BinaryConv2d or has options that this form does not allow, offset or bias are
            not one float a filter on its device, alpha is not positive.

    Source:
        Tu et al., "AdaBin", ECCV 2022.
    """

    ones: Tensor

    def __init__(
        self, conv: BinaryConv2d, offset: Tensor, alpha: float = 1.0, beta: float = 0.0, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        op = "TwoLevelConv2d"
        if not isinstance(conv, BinaryConv2d):
            raise TypeError(f"{op}: conv must be a BinaryConv2d, got {type(conv).__name__}")
        plain = conv.groups == 1 and conv.bias is None and conv.padding_value == 0 and conv.encoding == "sign"
        if not plain or conv.weight_scale != "learned":
            raise ValueError(
                f"{op}: conv must have encoding 'sign', weight_scale 'learned', padding of 0, one group and no bias, "
                f"got {conv}"
            )
        weight = conv.weight
        for name, value in (("offset", offset), *(() if bias is None else (("bias", bias),))):
            _arguments.tensor_like(op, name, value, weight, _arguments.FLOATS_AND_DOUBLE)
            if value.shape != weight.shape[:1]:
                raise ValueError(
                    f"{op}: {name} must have one value a filter ({weight.shape[0]}), got {tuple(value.shape)}"
                )
        alpha, beta = _arguments.number(op, "alpha", alpha), _arguments.number(op, "beta", beta)
        if not 0 < alpha < math.inf:
            raise ValueError(f"{op}: alpha must be positive, got {alpha}")
        self.conv = conv
        self.offset = nn.Parameter(offset.detach().clone())
        self.alpha, self.beta = (nn.Parameter(weight.new_tensor(value)) for value in (alpha, beta))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("ones", torch.ones_like(weight[:1]).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sums (N, O, H', W')."""
        if not isinstance(x, fx.Proxy):
            _arguments.tensor_like("TwoLevelConv2d", "x", x, self.alpha, _arguments.FLOATS_AND_DOUBLE)
        conv = self.conv
        geometry: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        normal = (x - self.beta) * self.alpha.reciprocal()
        pixels: Any = conv2d(normal, self.ones, surrogate=conv.surrogate, scale=self.alpha, **geometry)
        # Of an image of ones a filter sees its taps, summed over the channels.
        signs = binary_activation(conv.weight, "sign", "identity").sum(1, keepdim=True)
        taps = signs * conv.learned_scale.view(-1, 1, 1, 1) + self.offset.view(-1, 1, 1, 1) * conv.in_channels
        border = F.conv2d(torch.ones_like(x[:1, :1]), taps * self.beta, self.bias, **geometry)
        return conv(normal) * self.alpha + pixels * self.offset.view(1, -1, 1, 1) + border
