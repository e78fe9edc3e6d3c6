"""Layers of coupled networks: the ternary and the step activation, convolution and linear layer with binary weights."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext import _arguments
from lowbit_ext._torch import Size2
from lowbit_ext.binary import BinaryActivation
from lowbit_ext.binary.layers import WEIGHT_SCALES, check_conv, check_linear, weight_scale_of
from lowbit_ext.binary.surrogates import SURROGATES, keeps_bits
from lowbit_ext.binary.weights import straight_through_weight
from lowbit_ext.duo import functional


class TernaryActivation(nn.Module):
    """0, 1/2 or 1 by the thresholds 1/4 and 3/4: see lowbit_ext.duo.ternary_activation.

    Args:
        surrogate: derivative that stands for the activation's (lowbit_ext.binary.surrogates).

    Raises:
        ValueError: unknown surrogate.
    """

    def __init__(self, surrogate: str = "clip") -> None:
        super().__init__()
        _arguments.choice("TernaryActivation", "surrogate", surrogate, SURROGATES)
        self.surrogate = surrogate

    @property
    def keeps_bits(self) -> bool:
        """Whether the activation keeps bits for its backward pass; otherwise its surrogate needs the input."""
        return keeps_bits(self.surrogate, "ternary")

    def forward(self, input: Tensor) -> Tensor:
        """0, 1/2 and 1 in the input's shape and dtype."""
        return functional.ternary_activation(input, self.surrogate)

    def extra_repr(self) -> str:
        """The option."""
        return f"surrogate={self.surrogate!r}"


class StepActivation(BinaryActivation):
    """1 where x >= 1/2, else 0: binary's activation in the encoding "step". Argument as TernaryActivation."""

    def __init__(self, surrogate: str = "clip") -> None:
        super().__init__("step", surrogate)


class _CoupledLayer(nn.Module):
    """What the coupled layers share: the scale of the weight and what is kept for the backward pass."""

    weight: Tensor

    def _configure(self, weight_scale: str | None, save_codes: bool) -> None:
        layer = type(self).__name__
        self.weight_scale = _arguments.choice(layer, "weight_scale", weight_scale, WEIGHT_SCALES)
        self.save_codes = _arguments.flag(layer, "save_codes", save_codes)

    @property
    def keeps_bits(self) -> bool:
        """Whether the layer keeps bits for its backward pass, of an input of 0, 1/2 and 1."""
        return self.save_codes

    def scale(self) -> Tensor | None:
        """Factor of the weight's signs without gradient, (O,) or (1,), or None."""
        return weight_scale_of(self.weight, self.weight_scale)

    def _check_input(self, input: Any, channels: int, axis: int, dims: tuple[int, ...]) -> None:
        """A float tensor of `channels` channels along `axis`."""
        layer = type(self).__name__
        if not _arguments.tensor(layer, "input", input).is_floating_point():
            raise TypeError(f"{layer}: input must be floating point, got {input.dtype}")
        if (dims and input.dim() not in dims) or input.dim() < 1 or input.shape[axis] != channels:
            raise ValueError(f"{layer}: input must have {channels} channels, got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        """torch's line and the options."""
        return f"{super().extra_repr()}, weight_scale={self.weight_scale!r}, save_codes={self.save_codes}"


class CoupledConv2d(_CoupledLayer, nn.Conv2d):
    """Convolution of values as they are, in a coupled network 0, 1/2 and 1, with the binary weight s * sign(weight).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch.nn.Conv2d.
        weight_scale: "layer" (s = mean |weight| of the whole weight, BinaryDuo), "channel" (of each filter) or None
            (1).
        save_codes: keep an input of 0, 1/2 and 1 for the backward pass as two bits an element, from which the same
            gradients come: with the activation's mask 3 bits instead of 32. A training step of VGG-7 on one core takes
            0 to 11 % longer. Other inputs are kept as they are.

    Gradient:
        weight: that of s * sign(weight) as it is, with no gradient through s. Input, bias: exact.

    Raises:
        TypeError, ValueError: another weight_scale, an argument outside torch.nn.Conv2d's, an input that is no float
            tensor (N, C, H, W) or (C, H, W) of in_channels.
        RuntimeError: torch.nn.functional.conv2d's, for an input of another device or dtype than the weight, or smaller
            than the kernel.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: str | Size2 = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        weight_scale: str | None = "layer",
        save_codes: bool = True,
    ) -> None:
        layer = type(self).__name__
        modes = ("zeros", "reflect", "replicate", "circular")
        super().__init__(
            padding_mode=_arguments.choice(layer, "padding_mode", padding_mode, modes),
            **check_conv(
                layer, 2, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
                padding=padding, dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype,
            ),
        )
        self._configure(weight_scale, save_codes)

    def forward(self, input: Tensor) -> Tensor:
        """(N, O, H', W'), or (O, H', W') of an input without N; the weight's signs are taken anew at every call."""
        self._check_input(input, self.in_channels, -3, (3, 4))
        weight = straight_through_weight(self.weight, self.scale())
        with functional.saved_as_codes(input, self.save_codes):
            return self._conv_forward(input, weight, self.bias)


class CoupledLinear(_CoupledLayer, nn.Linear):
    """CoupledConv2d's linear layer: input (*, C), output (*, O). Arguments as torch.nn.Linear, and those two."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_scale: str | None = "layer",
        save_codes: bool = True,
    ) -> None:
        super().__init__(
            **check_linear(
                type(self).__name__, in_features=in_features, out_features=out_features, bias=bias, device=device,
                dtype=dtype,
            )
        )
        self._configure(weight_scale, save_codes)

    def forward(self, input: Tensor) -> Tensor:
        """(*, O); the weight's signs are taken anew at every call."""
        self._check_input(input, self.in_features, -1, ())
        weight = straight_through_weight(self.weight, self.scale())
        with functional.saved_as_codes(input, self.save_codes):
            return F.linear(input, weight, self.bias)
