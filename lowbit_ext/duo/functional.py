"""Activations of BinaryDuo as functions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext._torch import innermost_transform
from lowbit_ext.binary.activation import binarize, quantized_activation, unpack
from lowbit_ext.packed import FLOAT_TYPES, PackedTensor


@_arguments.overridable
def ternary_activation(x: Tensor, surrogate: str = "clip") -> Tensor:
    """0, 1/2 or 1 by the thresholds 1/4 and 3/4: the mean of two step activations of x - 1/4 and x + 1/4, exactly.

    Args:
        x: any shape, float32, bfloat16, float16, or float64 (by torch's operators, for comparisons).
        surrogate: derivative that stands for the activation's (lowbit_ext.binary.surrogates).

    Returns:
        Tensor of x's shape, dtype and, where x is dense, memory order. A NaN gives 0.

    Gradient:
        straight-through: for "clip" 1 where 0 < x < 1, else 0. "clip" and "steep" keep one bit an element for it.

    Raises:
        TypeError: wrong dtype. ValueError: unknown surrogate.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020, section 5.
    """
    return quantized_activation("ternary_activation", x, "ternary", surrogate)


@_arguments.overridable
def step_activation(x: Tensor, surrogate: str = "clip") -> Tensor:
    """1 where x >= 1/2, else 0; arguments, gradient and errors as ternary_activation.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020, section 3.
    """
    return quantized_activation("step_activation", x, "step", surrogate)


def pack_ternary(x: Tensor) -> PackedTensor | None:
    """Two bits an element, x >= 1/4 and x >= 3/4, channels c and C + c; None where x has other values than 0, 1/2, 1.

    Args:
        x: (N, C, ...), float32, bfloat16 or float16.
    """
    if not torch.equal(quantized_activation("pack_ternary", x, "ternary", "clip"), x):
        return None
    thresholds = x.new_tensor([[0.25], [0.75]], dtype=torch.float32).expand(2, x.shape[1])
    return binarize(x, "step", threshold=thresholds)


def unpack_ternary(packed: PackedTensor, out: Tensor) -> Tensor:
    """Inverse of pack_ternary: writes into out and returns it."""
    lower, upper = unpack(packed, out.dtype).chunk(2, 1)
    return torch.add(lower, upper, out=out).mul_(0.5)


def saved_as_codes(input: Tensor, wanted: bool) -> AbstractContextManager[Any]:
    """Within it, if `wanted`, operators of `input` keep it as two bits an element for gradients, if it is ternary.

    The bits give the same numbers back, so no gradient changes. Tensors of other shapes and values, float64, compiled
    code, where the compiler decides what is kept, and torch.func, which has no such hooks, are left alone.
    """
    if not wanted or torch.compiler.is_compiling() or not torch.is_grad_enabled() or input.dim() < 2:
        return nullcontext()
    if innermost_transform() is not None:
        return nullcontext()

    shape = input.shape

    def pack(tensor: Tensor) -> Tensor | tuple[PackedTensor, torch.dtype, tuple[int, ...]]:
        if tensor.shape != shape or tensor.dtype not in FLOAT_TYPES:
            return tensor
        packed = pack_ternary(tensor.detach())
        return tensor if packed is None else (packed, tensor.dtype, tensor.stride())

    def restore(saved: Tensor | tuple[PackedTensor, torch.dtype, tuple[int, ...]]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        packed, dtype, strides = saved
        return unpack_ternary(packed, torch.empty_strided(shape, strides, dtype=dtype, device=packed.device))

    return torch.autograd.graph.saved_tensors_hooks(pack, restore)
