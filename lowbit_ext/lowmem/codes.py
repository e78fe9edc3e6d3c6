"""Tensors as codes of 2, 4 or 8 bits: in groups of 256, or on the fixed grid of each channel."""

from __future__ import annotations

import builtins
import dataclasses
import numbers
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.lowmem import ops
from lowbit_ext.packed import unchecked

# Standard deviations that a channel's codes span. The paper has 6; on ResNets 8 and 9 have smaller gradient errors.
RANGES = {2: 6.0, 4: 8.0, 8: 9.0}


def as_int(name: str, argument: str, value: Any) -> int:
    """The plain int of an integer of any library, or TypeError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
    return int(value)


def check_settings(name: str, bits: int, range: Any) -> tuple[int, float]:
    """(bits, span) as plain numbers, or an error."""
    bits = as_int(name, "bits", bits)
    if bits not in ops.BITS:
        raise ValueError(f"{name}: bits must be 2, 4 or 8, got {bits}")
    if range is None:
        return bits, RANGES[bits]
    is_number = isinstance(range, numbers.Real) and not isinstance(range, bool)
    if not is_number:
        raise TypeError(f"{name}: range must be a number or None, got {type(range).__name__}")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= range <= limits.max:  # what the kernels take
        raise ValueError(f"{name}: range must be a positive number of standard deviations, got {range}")
    return bits, float(range)


def check_generator(name: str, generator: torch.Generator | None) -> None:
    """Raises TypeError for what is no generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator or None, got {type(generator).__name__}")


def drawn_seed(
    name: str, like: Tensor, stochastic: bool, generator: torch.Generator | None = None
) -> Tensor | None:
    """The seed of stochastic rounding of `like`, drawn, on the CPU; None of rounding to the nearest.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    return _arguments.fresh_seed(name, like, generator).cpu() if stochastic else None


def check_flags(name: str, **flags: bool) -> None:
    """Raises TypeError for what is no bool."""
    for argument, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: {argument} must be a bool, got {type(flag).__name__}")


def check_tensor(name: str, argument: str, x: Tensor) -> None:
    """Raises TypeError for what is not a dense tensor of a type that has codes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in ops.FLOAT_TYPES or x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.dtype if x.layout is torch.strided else x.layout
        raise TypeError(f"{name}: {argument} must be float32, bfloat16 or float16 and dense, got {kind}")


def _check_original(op: str, bits: Any, shape: Any, dtype: Any, channels_last: Any) -> None:
    """Checks what codes say of the tensor that they stand for."""
    check_settings(op, bits, None)
    if not isinstance(shape, tuple):
        raise TypeError(f"{op}: shape must be a tuple of ints, got {shape!r}")
    for size in shape:
        _arguments.integer(op, "shape", size, 0, 2**62)
    _arguments.dtype(op, "dtype", dtype, tuple(ops.FLOAT_TYPES))
    if _arguments.flag(op, "channels_last", channels_last) and len(shape) not in (4, 5):
        raise ValueError(f"{op}: channels_last needs a shape of 4 or 5 dimensions, got {shape}")


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantised tensor.

    Attributes:
        codes: uint8, two elements a byte at 4 bits, the first in the lower half, in memory order.
        scale_minimum: bfloat16 (groups of 256, 2): an element is code * scale + minimum.
        bits: 2, 4 or 8.
        shape, dtype, channels_last: of the tensor.
    """

    codes: Tensor
    scale_minimum: Tensor
    bits: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    def __post_init__(self) -> None:
        _check_original("Codes", self.bits, self.shape, self.dtype, self.channels_last)
        codes = _arguments.tensor("Codes", "codes", self.codes, (torch.uint8,))
        _arguments.tensor_like("Codes", "scale_minimum", self.scale_minimum, codes, (torch.bfloat16,))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.codes.nbytes + self.scale_minimum.nbytes

    def to(self, device: torch.device | str | int) -> Codes:
        """The same codes on a device; themselves where they are there."""
        return _to(self, "Codes", device)


@dataclasses.dataclass(frozen=True)
class ChannelCodes:
    """A tensor (N, C, ...) quantised channel by channel.

    Attributes:
        codes: uint8 (N, C, bytes), or (N, *spatial, bytes of C) of a channels_last tensor, in rows of whole bytes.
        std, mean: float32 (C,) of the channels, which the grid stands on; there is no other scale.
        bits: 2, 4 or 8.
        span: standard deviations that the grid covers.
        shape, dtype, channels_last: of the tensor.
    """

    codes: Tensor
    std: Tensor
    mean: Tensor
    bits: int
    span: float
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    def __post_init__(self) -> None:
        check_settings("ChannelCodes", self.bits, _arguments.number("ChannelCodes", "span", self.span))
        _check_original("ChannelCodes", self.bits, self.shape, self.dtype, self.channels_last)
        if len(self.shape) < 2:
            raise ValueError(f"ChannelCodes: shape must be (N, C, ...), got {self.shape}")
        codes = _arguments.tensor("ChannelCodes", "codes", self.codes, (torch.uint8,))
        for name in ("std", "mean"):
            value = _arguments.tensor_like("ChannelCodes", name, getattr(self, name), codes, (torch.float32,))
            if value.shape != self.shape[1:2]:
                raise ValueError(f"ChannelCodes: {name} must be ({self.shape[1]},), got {tuple(value.shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, deviations and means."""
        return self.codes.nbytes + self.std.nbytes + self.mean.nbytes

    def to(self, device: torch.device | str | int) -> ChannelCodes:
        """The same codes on a device; themselves where they are there."""
        return _to(self, "ChannelCodes", device)


def _to(codes: Any, name: str, device: Any) -> Any:
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(f"{name}.to: device must be a torch.device, str or int, got {type(device).__name__}")
    fields = vars(codes)
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in fields.items()}
    return codes if all(moved[key] is fields[key] for key in fields) else unchecked(type(codes), **moved)


# torch.load(weights_only=True) reads them.
torch.serialization.add_safe_globals([Codes, ChannelCodes])


def quantize(
    x: Tensor, bits: int = 4, *, stochastic: bool = False, positive: bool = False,
    generator: torch.Generator | None = None,
) -> Codes:
    """Quantises a tensor in groups of 256 neighbours in memory between their minimum and maximum.

    Args:
        x: float32, bfloat16 or float16, any shape; contiguous or channels_last without a copy.
        bits: 2, 4 or 8; with scales and minima 0.125 bits more an element.
        stochastic: round up with the fraction's probability (in steps of 2^-16), so that the mean is exact; the bits
            are a function of a seed and the element, the same on every instruction set and number of threads. Otherwise
            to the nearest code.
        positive: zero and negative elements, and they alone, become exactly 0: for results of ReLU.
        generator: gives the seed; None: torch's own of the CPU. One of a GPU makes the call wait for that GPU.

    Returns:
        Codes. Finite elements stay finite. A NaN becomes its group's minimum, -0 becomes 0; a group with an infinite
        element decodes to infinity or its minimum.

    Gradient:
        none: the result holds integers.

    Raises:
        TypeError: x is no dense tensor of these dtypes, or another argument of another type.
        ValueError: another number of bits.
        RuntimeError: `stochastic` while a CUDA graph is being captured, every replay of which would round the same way.

    Source:
        groups and stochastic rounding: Chen et al., "ActNN", ICML 2021, section 3.
    """
    return _quantize("quantize", x, bits, stochastic, positive, generator)


def _quantize(
    name: str, x: Tensor, bits: int, stochastic: bool, positive: bool, generator: torch.Generator | None
) -> Codes:
    bits, _ = check_settings(name, bits, None)
    check_tensor(name, "x", x)
    check_flags(name, stochastic=stochastic, positive=positive)
    check_generator(name, generator)
    seed = drawn_seed(name, x, stochastic, generator)
    codes, scale_minimum = ops.group_quantize(x.detach(), bits, positive, seed, 0)
    return unchecked(
        Codes, codes=codes, scale_minimum=scale_minimum, bits=bits, shape=tuple(x.shape), dtype=x.dtype,
        channels_last=ops.is_channels_last(x),
    )


def quantize_channels(x: Tensor, bits: int = 4, *, range: float | None = None) -> ChannelCodes:
    """Quantises each channel on a grid of 2^bits equal cells that covers `range` of its standard deviations.

    A cell's edge is at 0, so that no element changes its sign but those of cells cut off at the ends of the grid. This
    is what the layers of `convert` keep, which know mean and deviation from the batch norm.

    Args:
        x: (N, C, ...) float32, bfloat16 or float16; contiguous or channels_last without a copy.
        bits: 2, 4 or 8.
        range: standard deviations from end to end; None: 8 for 4 bits, 9 for 8, 6 (the paper's) for 2.

    Returns:
        ChannelCodes. Finite channels stay finite. A NaN or infinity in a channel makes the channel NaN, as it makes its
        deviation. A channel is its mean where a cell would be narrower than the smallest normal float.

    Gradient:
        none: the result holds integers.

    Raises:
        TypeError: x is no dense tensor of these dtypes, bits no int, or range no number.
        ValueError: another number of dimensions or bits, or a range that is not positive in float32.

    Source:
        Chakrabarti and Moseley, NeurIPS 2019, section 3.
    """
    bits, span = check_settings("quantize_channels", bits, range)
    check_tensor("quantize_channels", "x", x)
    if x.dim() < 2:
        raise ValueError(f"quantize_channels: x must be (N, C, ...), got {tuple(x.shape)}")
    x = x.detach()
    # In double: squares of floats may be too large or too small for a float.
    dims = [dim for dim in builtins.range(x.dim()) if dim != 1]
    std, mean = torch.std_mean(x.double(), dims, correction=0)
    std = torch.where(std * (span / 2**bits) < torch.finfo(torch.float32).tiny, 0.0, std).float()
    mean = mean.float()
    inverse = torch.where(std > 0, 1 / std, 0.0)
    codes = ops.batch_norm_quantize(x, mean, inverse, std, mean, bits, span)
    return unchecked(
        ChannelCodes, codes=codes, std=std, mean=mean, bits=bits, span=span, shape=tuple(x.shape), dtype=x.dtype,
        channels_last=ops.is_channels_last(x),
    )


def dequantize(quantized: Codes | ChannelCodes, out: Tensor | None = None) -> Tensor:
    """The tensor that codes stand for.

    Args:
        quantized: of `quantize` or `quantize_channels`.
        out: written and returned instead of a new tensor: its shape and memory order, and a float type. Fresh memory
            costs more than the arithmetic.

    Returns:
        Tensor of the original's shape and memory order, and of its dtype or that of `out`.

    Raises:
        TypeError: neither kind of codes, or `out` is no dense float tensor.
        ValueError: `out` has another shape, memory order or device, or requires grad while gradients are recorded.
    """
    if not isinstance(quantized, Codes | ChannelCodes):
        raise TypeError(f"dequantize: quantized must be Codes or ChannelCodes, got {type(quantized).__name__}")
    return _dequantize("dequantize", quantized, out)


def _dequantize(name: str, q: Codes | ChannelCodes, out: Tensor | None) -> Tensor:
    if out is None:
        out = ops.empty(q.codes, q.shape, q.dtype, q.channels_last)
    check_tensor(name, "out", out)
    if tuple(out.shape) != q.shape or ops.is_channels_last(out) != q.channels_last:
        order = "channels_last" if q.channels_last else "contiguous"
        raise ValueError(
            f"{name}: out must be {order} {q.shape}, got {tuple(out.shape)} with strides {out.stride()}"
        )
    if out.device != q.codes.device:
        raise ValueError(f"{name}: out must be on {q.codes.device} like the codes, got {out.device}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: out requires grad, and what is written into it carries no gradient")
    if isinstance(q, ChannelCodes):
        ops.channel_dequantize_into(q.codes, q.std, q.mean, q.channels_last, q.bits, q.span, False, out)
    else:
        ops.group_dequantize_into(q.codes, q.scale_minimum, q.bits, out)
    return out


def quantize4(x: Tensor, *, stochastic: bool = False, generator: torch.Generator | None = None) -> Codes:
    """`quantize` to 4 bits."""
    return _quantize("quantize4", x, 4, stochastic, False, generator)


def dequantize4(quantized: Codes, out: Tensor | None = None) -> Tensor:
    """`dequantize` of 4 bits.

    Raises:
        TypeError, ValueError: no Codes of 4 bits, or see dequantize.
    """
    if not isinstance(quantized, Codes):
        raise TypeError(f"dequantize4: quantized must be Codes, got {type(quantized).__name__}")
    if quantized.bits != 4:
        raise ValueError(f"dequantize4: expected codes of 4 bits, got {quantized.bits}")
    return _dequantize("dequantize4", quantized, out)
