"""Binary layers: torch.nn's layers with latent float weights, whose forward sees only signs.

A layer binarizes its own input, multiplies bits by bits and saves two bits an activation for the backward pass. It
keeps the arguments, parameter names and initialisation of the torch.nn layer it derives from, so that optimizers,
state_dicts and initialisers carry over.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit_ext import _arguments
from lowbit_ext._torch import Size1, Size2
from lowbit_ext.binary import activation, convolution
from lowbit_ext.binary.ops.geometry import Sides
from lowbit_ext.binary.surrogates import SURROGATES, keeps_bits
from lowbit_ext.binary.weight_cache import cached_operands
from lowbit_ext.binary.weights import PackedWeight
from lowbit_ext.packed import ENCODING_VALUES, PackedTensor

WEIGHT_SCALES = ("channel", "layer", None)  # that follow from the weight
_LEARNED = "learned"  # that of a binary layer may also be a parameter

_MOST_ELEMENTS = 2**48  # of a weight


def check_factory(layer: str, device: Any, dtype: Any) -> None:
    """Checks where and of which type a layer makes its parameters."""
    if device is not None:
        _arguments.device(layer, "device", device)
    if dtype is not None:
        _arguments.dtype(layer, "dtype", dtype, _arguments.FLOATS_AND_DOUBLE)


def check_conv(
    layer: str, dims: int, *, in_channels: Any, out_channels: Any, kernel_size: Any, stride: Any, padding: Any,
    dilation: Any, groups: Any, bias: Any, device: Any, dtype: Any, own_sides: bool = False,
) -> dict[str, Any]:
    """torch's arguments of a convolution, checked: torch itself fails in the midst of some of them.

    `own_sides`: padding may have other sizes on each side.
    """

    def sizes(name: str, value: Any, least: int) -> Any:
        checked = _arguments.pair(layer, name, value) if dims == 2 else _one(layer, name, value)
        for size in checked:
            _arguments.integer(layer, name, size, least)
        return checked

    check_factory(layer, device, dtype)
    channels = {
        name: _arguments.integer(layer, name, value, 1)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups))
    }
    kernel_size = sizes("kernel_size", kernel_size, 1)
    _check_elements(layer, "in_channels, out_channels and kernel_size", in_channels, out_channels, *kernel_size)
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"{layer}: groups must divide in_channels={in_channels} and out_channels={out_channels}, got {groups}"
        )
    if isinstance(padding, str):
        _arguments.choice(layer, "padding", padding, ("same", "valid"))
    elif own_sides:
        padding = _check_sides(layer, dims, padding)
    else:
        padding = sizes("padding", padding, 0)
    stride = sizes("stride", stride, 1)
    if padding == "same" and any(step != 1 for step in stride):
        raise ValueError(f"{layer}: padding 'same' needs stride 1, got stride={stride}")
    return {
        **channels, "kernel_size": kernel_size, "stride": stride, "padding": padding,
        "dilation": sizes("dilation", dilation, 1), "bias": _arguments.flag(layer, "bias", bias), "device": device,
        "dtype": dtype,
    }


def _check_sides(layer: str, dims: int, padding: Any) -> tuple[Any, ...]:
    """Padding of each dimension: an int for both sides, or the pair of them where they differ."""
    if dims == 2:
        checked: tuple[Any, ...] = _arguments.sides(layer, "padding", padding)
    else:
        alone = isinstance(padding, (tuple, list)) and len(padding) == 1
        only = padding[0] if alone else padding
        checked = (_arguments.pair(layer, "padding", only),) if isinstance(only, (tuple, list)) else _one(
            layer, "padding", only
        )
    for size in (size for side in checked for size in (side if isinstance(side, tuple) else (side,))):
        _arguments.integer(layer, "padding", size, 0)
    return checked


def _check_elements(layer: str, names: str, *sizes: int) -> None:
    """Refuses a weight that torch cannot count the bytes of."""
    if math.prod(map(int, sizes)) >= _MOST_ELEMENTS:
        raise ValueError(f"{layer}: {names} must have a product below 2^48, got {', '.join(map(str, sizes))}")


def _one(layer: str, name: str, value: Any) -> tuple[int]:
    """An int, or a tuple of one, as torch.nn.Conv1d takes them."""
    return (_arguments.integer(layer, name, value[0] if isinstance(value, tuple) and len(value) == 1 else value),)


def check_linear(
    layer: str, *, in_features: Any, out_features: Any, bias: Any, device: Any, dtype: Any
) -> dict[str, Any]:
    """torch's arguments of a linear layer, checked."""
    check_factory(layer, device, dtype)
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        _arguments.integer(layer, name, value, 1)
    _check_elements(layer, "in_features and out_features", in_features, out_features)
    return {
        "in_features": int(in_features), "out_features": int(out_features),
        "bias": _arguments.flag(layer, "bias", bias), "device": device, "dtype": dtype,
    }


@_arguments.overridable
def weight_scale_of(weight: Tensor, weight_scale: str | None) -> Tensor | None:
    """Mean |weight| without gradient, of each filter ("channel", (O,)) or of all ("layer", (1,)), or None.

    float32; of a float64 weight float64.
    """
    if weight_scale is None:
        return None
    magnitude = weight.detach().abs()
    dtype = torch.float64 if magnitude.dtype == torch.float64 else torch.float32
    if weight_scale == "layer":
        return magnitude.mean(dtype=dtype).reshape(1)
    return magnitude.flatten(1).mean(1, dtype=dtype)


class _BinaryLayer(nn.Module):
    """What the binary layers share: the encoding of the input, its surrogate and the scale of the weight."""

    weight: Tensor
    encoding: str
    surrogate: str
    weight_scale: str | None
    learned_scale: nn.Parameter  # of weight_scale "learned"

    def _configure(self, encoding: str, surrogate: str, weight_scale: str | None) -> None:
        layer = type(self).__name__
        _arguments.choice(layer, "encoding", encoding, tuple(ENCODING_VALUES))
        _arguments.choice(layer, "surrogate", surrogate, SURROGATES)
        _arguments.choice(layer, "weight_scale", weight_scale, (*WEIGHT_SCALES[:-1], _LEARNED, None))
        self.encoding, self.surrogate, self.weight_scale = encoding, surrogate, weight_scale
        if weight_scale == _LEARNED:
            self.learned_scale = nn.Parameter(self.weight.new_empty(self.weight.shape[0]))
            self._reset_scale()

    def _reset_scale(self) -> None:
        with torch.no_grad():
            self.learned_scale.copy_(self.weight.abs().flatten(1).mean(1))

    def reset_parameters(self) -> None:
        """As torch's layer; a learned scale becomes the mean |weight| of its filter."""
        super().reset_parameters()  # type: ignore[misc]
        if "learned_scale" in self._parameters:
            self._reset_scale()

    def scale(self) -> Tensor | None:
        """Factor of the accumulator, (O,) or (1,), or None. It has a gradient where it is learned."""
        if self.weight_scale == _LEARNED:
            return self.learned_scale
        return weight_scale_of(self.weight, self.weight_scale)

    @property
    def keeps_bits(self) -> bool:
        """Whether the layer keeps bits for its backward pass; otherwise its surrogate needs the input."""
        return self.surrogate in ("clip", "identity")

    def _operands(self, input: Tensor | PackedTensor) -> tuple[Tensor | PackedWeight, dict[str, Any]]:
        """The weight, and arguments that conv2d, conv1d and linear share."""
        out_dtype = None
        if isinstance(input, PackedTensor):
            if input.encoding != self.encoding:
                raise ValueError(
                    f"{type(self).__name__}: packed input has encoding {input.encoding!r}, the layer {self.encoding!r}"
                )
            out_dtype = convolution.autocast_dtype(input.device, self.weight.dtype)
        precise = isinstance(input, Tensor) and input.dtype == torch.float64
        cached = None if precise else cached_operands(self)
        weight: Tensor | PackedWeight = self.weight
        if cached is None:
            scale = self.scale()
        else:
            weight, scale = cached
            if self.weight_scale == _LEARNED or type(self).scale is not _BinaryLayer.scale:
                scale = self.scale()  # of more than the weight
        return weight, {
            "encoding": self.encoding,
            "surrogate": self.surrogate,
            "scale": scale,
            "bias": self.bias,
            "out_dtype": out_dtype,
        }

    def extra_repr(self) -> str:
        """torch's line and the binary options."""
        return (
            f"{super().extra_repr()}, encoding={self.encoding!r}, surrogate={self.surrogate!r}, "
            f"weight_scale={self.weight_scale!r}"
        )


class _BinaryConv(_BinaryLayer):
    """What the two convolutions share: padding."""

    padding_value: int

    def _configure_padding(self, padding_value: int) -> None:
        layer = type(self).__name__
        allowed = (0, 1, -1) if self.encoding == "sign" else (0, 1)
        padding_value = _arguments.integer(layer, "padding_value", padding_value)
        _arguments.choice(layer, "padding_value", padding_value, allowed)
        self.padding_value = padding_value

    def extra_repr(self) -> str:
        """torch's line and the binary options."""
        return f"{super().extra_repr()}, padding_value={self.padding_value}"


def _check_padding_mode(layer: str, padding_mode: Any) -> None:
    if not isinstance(padding_mode, str) or padding_mode != "zeros":
        raise ValueError(
            f"{layer}: padding_mode must be 'zeros', got {padding_mode!r}; padding_value sets what is padded"
        )


def _is_unbatched(input: Any, dims: int) -> bool:
    """Whether an input is one image or sequence; of what is no dense tensor the convolution itself says so."""
    dense = isinstance(input, Tensor) and input.layout is torch.strided and not input.is_nested
    return dense and input.dim() == dims


class BinaryConv2d(_BinaryConv, nn.Conv2d):
    """Convolution of the input's bits with the weight's signs: scale * conv2d(binarize(x), sign(weight)) + bias.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch.nn.Conv2d; padding also with sides of their own ((top, bottom), (left, right)), as "same" of
            TensorFlow and Larq has them with a stride; padding_mode only "zeros".
        encoding: "sign" (x >= 0 is +1, else -1) or "step" (x >= 1/2 is 1, else 0; BinaryDuo).
        surrogate: derivative that stands for the binarization's (lowbit_ext.binary.surrogates). Behind a
            BinaryActivation("step") use "identity": its 0 and 1 lie on the ends of the clipped mask 0 < x < 1, which
            would stop every gradient.
        padding_value: value of the padding's activations: 0, +1, or -1 (sign only). 0 is torch's padding.
        weight_scale: "channel" (mean |weight| of each filter, XNOR-Net), "layer" (of the whole weight, BinaryDuo),
            "learned" (the parameter `learned_scale` (O,), which starts as mean |weight| of each filter and may take any
            sign) or None (1).

    Shape:
        input (N, C, H, W) or (C, H, W) float32, bfloat16, float16, float64 (by torch's operators, for comparisons; the
        layer in float64 too), or a PackedTensor (N, C, H, W) of the layer's encoding; output (N, O, H', W') or
        (O, H', W') in the input's dtype (autocast's inside autocast; for packed input the weight's). It is
        channels-last in memory: flatten(1), not view(n, -1), makes rows of it.

    The weight's signs are packed anew at every call, but within cached_weights.

    Gradient:
        input: straight-through with `surrogate`. weight: the gradient of scale * sign(weight) as it is, with no
        gradient through the scale; with a learned scale that of sign(weight), which has the scale as a factor. bias and
        learned_scale: exact.

    Raises:
        ValueError: an option outside those above, or a packed input of another encoding.

    Source:
        Rastegari et al., "XNOR-Net", ECCV 2016; Kim et al., "BinaryDuo", ICLR 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: str | Sides = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        encoding: str = "sign",
        surrogate: str = "clip",
        padding_value: int = 0,
        weight_scale: str | None = "channel",
    ) -> None:
        _check_padding_mode(type(self).__name__, padding_mode)
        super().__init__(
            **check_conv(
                type(self).__name__, 2, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size,
                stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype,
                own_sides=True,
            ),
        )
        self._configure(encoding, surrogate, weight_scale)
        self._configure_padding(padding_value)

    def forward(self, input: Tensor | PackedTensor) -> Tensor:
        """Numbers (N, O, H', W') or (O, H', W')."""
        alone = _is_unbatched(input, 3)
        weight, options = self._operands(input)
        output: Any = convolution.conv2d(
            input.unsqueeze(0) if alone else input,  # type: ignore[union-attr]
            weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_value=self.padding_value,
            **options,
        )
        return output.squeeze(0) if alone else output


class BinaryConv1d(_BinaryConv, nn.Conv1d):
    """BinaryConv2d in one dimension: input (N, C, L) or (C, L), output (N, O, L') or (O, L').

    Arguments as torch.nn.Conv1d, padding also (left, right); the options, gradients and errors of BinaryConv2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size1,
        stride: Size1 = 1,
        padding: str | Size1 | tuple[int, int] = 0,
        dilation: Size1 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        encoding: str = "sign",
        surrogate: str = "clip",
        padding_value: int = 0,
        weight_scale: str | None = "channel",
    ) -> None:
        _check_padding_mode(type(self).__name__, padding_mode)
        super().__init__(
            **check_conv(
                type(self).__name__, 1, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size,
                stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype,
                own_sides=True,
            ),
        )
        self._configure(encoding, surrogate, weight_scale)
        self._configure_padding(padding_value)

    def forward(self, input: Tensor | PackedTensor) -> Tensor:
        """Numbers (N, O, L') or (O, L')."""
        alone = _is_unbatched(input, 2)
        weight, options = self._operands(input)
        output: Any = convolution.conv1d(
            input.unsqueeze(0) if alone else input,  # type: ignore[union-attr]
            weight,
            stride=self.stride[0],
            padding=self.padding if isinstance(self.padding, str) else self.padding[0],
            dilation=self.dilation[0],
            groups=self.groups,
            padding_value=self.padding_value,
            **options,
        )
        return output.squeeze(0) if alone else output


class BinaryLinear(_BinaryLayer, nn.Linear):
    """Product of the input's bits with the weight's signs: scale * binarize(x) @ sign(weight).T + bias.

    Input (*, C) or a PackedTensor (N, C), output (*, O). Arguments as torch.nn.Linear; encoding, surrogate,
    weight_scale, gradients and errors as BinaryConv2d.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        encoding: str = "sign",
        surrogate: str = "clip",
        weight_scale: str | None = "channel",
    ) -> None:
        super().__init__(
            **check_linear(
                type(self).__name__, in_features=in_features, out_features=out_features, bias=bias, device=device,
                dtype=dtype,
            )
        )
        self._configure(encoding, surrogate, weight_scale)

    def forward(self, input: Tensor | PackedTensor) -> Tensor:
        """Numbers (*, O)."""
        weight, options = self._operands(input)
        return convolution.linear(input, weight, **options)  # type: ignore[return-value]


class BinaryActivation(nn.Module):
    """sign(x) in {-1, +1} or the step 1[x >= 1/2] in {0, 1}, with a straight-through gradient.

    Args:
        encoding: "sign" (sign(0) = +1) or "step".
        surrogate: derivative that stands for the activation's (lowbit_ext.binary.surrogates).

    Shape:
        input of any shape, float32, bfloat16, float16, or float64 (by torch's operators, for comparisons); output of
        the same shape, dtype and memory order.

    Raises:
        ValueError: unknown encoding or surrogate.

    Source:
        Hubara et al., "Binarized Neural Networks", NeurIPS 2016; Kim et al., "BinaryDuo", ICLR 2020.
    """

    def __init__(self, encoding: str = "sign", surrogate: str = "clip") -> None:
        super().__init__()
        _arguments.choice("BinaryActivation", "encoding", encoding, tuple(ENCODING_VALUES))
        _arguments.choice("BinaryActivation", "surrogate", surrogate, SURROGATES)
        self.encoding, self.surrogate = encoding, surrogate

    @property
    def keeps_bits(self) -> bool:
        """Whether the activation keeps bits for its backward pass; otherwise its surrogate needs the input."""
        return keeps_bits(self.surrogate, self.encoding)

    def forward(self, input: Tensor) -> Tensor:
        """-1 and +1, or 0 and 1, in the input's shape and dtype."""
        return activation.binary_activation(input, self.encoding, self.surrogate)

    def extra_repr(self) -> str:
        """The options."""
        return f"encoding={self.encoding!r}, surrogate={self.surrogate!r}"
