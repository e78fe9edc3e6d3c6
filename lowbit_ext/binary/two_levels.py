"""Convolutions of two-level values that are not opposite, on bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext.binary.activation import binary_activation
from lowbit_ext.binary.convolution import conv2d
from lowbit_ext.binary.layers import BinaryConv2d


class TwoLevelConv2d(nn.Module):
    """conv2d(a, w) of a = alpha * sign((x - beta) / alpha) + beta and filters w = scale * sign(weight) + offset.

    With signs s of the input and s' of a filter it is

        alpha * scale * (s * s') + alpha * offset * (s * 1) + beta * (1 * w):

    a binary convolution, one of a single filter of ones, and an image that is the same for every input.

    Args:
        conv: gives s * s' of its input's signs, without bias; weight_scale "learned" is `scale`.
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
        ValueError: a conv with groups, a bias or a scale that is not learned.

    Source:
        Tu et al., "AdaBin", ECCV 2022.
    """

    ones: Tensor

    def __init__(
        self, conv: BinaryConv2d, offset: Tensor, alpha: float = 1.0, beta: float = 0.0, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        if conv.groups != 1 or conv.bias is not None or conv.weight_scale != "learned":
            raise ValueError("TwoLevelConv2d: conv must have weight_scale 'learned' and neither groups nor a bias")
        weight = conv.weight
        self.conv = conv
        self.offset = nn.Parameter(offset.detach().clone())
        self.alpha, self.beta = (nn.Parameter(weight.new_tensor(value)) for value in (alpha, beta))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("ones", torch.ones_like(weight[:1]).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sums (N, O, H', W')."""
        conv = self.conv
        geometry: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        normal = (x - self.beta) * self.alpha.reciprocal()
        pixels = conv2d(normal, self.ones, surrogate=conv.surrogate, scale=self.alpha, **geometry)
        # Of an image of ones a filter sees its taps, summed over the channels.
        signs = binary_activation(conv.weight, "sign", "identity").sum(1, keepdim=True)
        taps = signs * conv.learned_scale.view(-1, 1, 1, 1) + self.offset.view(-1, 1, 1, 1) * conv.weight.shape[1]
        border = F.conv2d(torch.ones_like(x[:1, :1]), taps * self.beta, self.bias, **geometry)
        return conv(normal) * self.alpha + pixels * self.offset.view(1, -1, 1, 1) + border
