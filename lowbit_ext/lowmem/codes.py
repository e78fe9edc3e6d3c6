"""Tensors as codes of 2, 4 or 8 bits in groups of 256."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowbit_ext.lowmem import ops


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

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.codes.nbytes + self.scale_minimum.nbytes


def quantize(
    x: Tensor, bits: int = 4, *, stochastic: bool = False, positive: bool = False,
    generator: torch.Generator | None = None,
) -> Codes:  # fmt: skip
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
        Codes. A NaN becomes its group's minimum.

    Gradient:
        none: the result holds integers.

    Raises:
        TypeError, ValueError: another dtype or number of bits.

    Source:
        groups and stochastic rounding: Chen et al., "ActNN", ICML 2021, section 3.
    """
    seed = None
    if stochastic:
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device).cpu()
    codes, scale_minimum = ops.group_quantize(x.detach(), bits, positive, seed, 0)
    return Codes(codes, scale_minimum, bits, tuple(x.shape), x.dtype, ops.is_channels_last(x))


def dequantize(quantized: Codes, out: Tensor | None = None) -> Tensor:
    """The tensor that codes stand for.

    Args:
        quantized: of `quantize`.
        out: written and returned instead of a new tensor: its shape and memory order, and a float type. Fresh memory
            costs more than the arithmetic.

    Returns:
        Tensor of the original's shape and memory order, and of its dtype or that of `out`.

    Raises:
        ValueError: `out` has another shape or memory order.
    """
    q = quantized
    if out is None:
        return ops.group_dequantize(q.codes, q.scale_minimum, q.shape, q.channels_last, q.dtype, q.bits)
    if tuple(out.shape) != q.shape or ops.is_channels_last(out) != q.channels_last:
        order = "channels_last" if q.channels_last else "contiguous"
        raise ValueError(
            f"dequantize: out must be {order} {q.shape}, got {tuple(out.shape)} with strides {out.stride()}"
        )
    ops.group_dequantize_into(q.codes, q.scale_minimum, q.bits, out)
    return out


def quantize4(x: Tensor, *, stochastic: bool = False, generator: torch.Generator | None = None) -> Codes:
    """`quantize` to 4 bits."""
    return quantize(x, 4, stochastic=stochastic, generator=generator)


def dequantize4(quantized: Codes, out: Tensor | None = None) -> Tensor:
    """`dequantize` of 4 bits.

    Raises:
        ValueError: the codes have other bits.
    """
    if quantized.bits != 4:
        raise ValueError(f"dequantize4: expected codes of 4 bits, got {quantized.bits}")
    return dequantize(quantized, out)
