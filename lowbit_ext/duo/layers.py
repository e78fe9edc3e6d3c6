"""Layers of coupled networks: the ternary and the step activation, convolution and linear layer with binary weights."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from lowbit_ext.binary import BinaryActivation
from lowbit_ext.binary.functional import straight_through_weight
from lowbit_ext.binary.layers import check_choice, weight_scale_of
from lowbit_ext.binary.surrogates import SURROGATES, keeps_bits
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
        check_choice("TernaryActivation", "surrogate", surrogate, SURROGATES)
        self.surrogate = surrogate

    @property
    def keeps_bits(self) -> bool:
        """Whether the activation keeps bits for its backward pass; otherwise its surrogate needs the input."""
        return keeps_bits(self.surrogate, "ternary")

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return functional.ternary_activation(input, self.surrogate)

    def extra_repr(self) -> str:
        """The option."""
        return f"surrogate={self.surrogate!r}"


class StepActivation(BinaryActivation):
    """1 where x >= 1/2, else 0: binary's activation in the encoding "step". Argument as TernaryActivation."""

    def __init__(self, surrogate: str = "clip") -> None:
        super().__init__("step", surrogate)


class CoupledConv2d(nn.Conv2d):
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
        ValueError: another weight_scale.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: _size_2_t, *arguments: Any,
        weight_scale: str | None = "layer", save_codes: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, *arguments, **options)
        check_choice("CoupledConv2d", "weight_scale", weight_scale, ("channel", "layer", None))
        self.weight_scale, self.save_codes = weight_scale, save_codes

    @property
    def keeps_bits(self) -> bool:
        """Whether the layer keeps bits for its backward pass, of an input of 0, 1/2 and 1."""
        return self.save_codes

    def scale(self) -> Tensor | None:
        """Factor of the weight's signs without gradient, (O,) or (1,), or None."""
        return weight_scale_of(self.weight, self.weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        weight = straight_through_weight(self.weight, self.scale())
        with functional.saved_as_codes(input, self.save_codes):
            return self._conv_forward(input, weight, self.bias)

    def extra_repr(self) -> str:
        """torch's line and the options."""
        return f"{super().extra_repr()}, weight_scale={self.weight_scale!r}, save_codes={self.save_codes}"


class CoupledLinear(nn.Linear):
    """CoupledConv2d's linear layer: input (*, C), output (*, O). Arguments as torch.nn.Linear, and those two."""

    def __init__(
        self, in_features: int, out_features: int, *arguments: Any, weight_scale: str | None = "layer",
        save_codes: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, *arguments, **options)
        check_choice("CoupledLinear", "weight_scale", weight_scale, ("channel", "layer", None))
        self.weight_scale, self.save_codes = weight_scale, save_codes

    @property
    def keeps_bits(self) -> bool:
        """Whether the layer keeps bits for its backward pass, of an input of 0, 1/2 and 1."""
        return self.save_codes

    def scale(self) -> Tensor | None:
        """Factor of the weight's signs without gradient, (O,) or (1,), or None."""
        return weight_scale_of(self.weight, self.weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        weight = straight_through_weight(self.weight, self.scale())
        with functional.saved_as_codes(input, self.save_codes):
            return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """torch's line and the options."""
        return f"{super().extra_repr()}, weight_scale={self.weight_scale!r}, save_codes={self.save_codes}"
