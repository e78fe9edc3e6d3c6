"""Slow definition of the steps of csrc/core/epilogue.h: each operation in float64, then rounded to float32 or further.

A rounding to float64 before that to float32 changes no product, sum or quotient of float32 numbers; the sum of a fused
multiply-add is rounded to odd instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference import binary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by FloatType


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c with one rounding."""
    product, c = a.double() * b.double(), c.double()  # 48 bits: exact
    product, c = torch.broadcast_tensors(product, c)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # of the sum, exactly
    bits = total.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits % 2 == 0)
    odd = torch.where((error > 0) == (total > 0), bits + 1, bits - 1).view(torch.float64)
    return torch.where(inexact, odd, total).float()


def of_channels(operand: Tensor, like: Tensor, axis: int) -> Tensor:
    """(C,) or (N, C) seen with the dimensions of `like`."""
    shape = [1] * like.dim()
    shape[axis] = operand.shape[-1]
    if operand.dim() == 2:
        shape[0] = operand.shape[0]
    return operand.reshape(shape)


def run(value: Tensor, steps, axis: int) -> tuple[Tensor, list[Tensor]]:
    """The float32 value behind the last of (kind, option, operands), and what its store and bits steps write."""
    outputs = []
    for kind, option, operands in steps:
        if kind == "store":
            outputs.append(value.to(DTYPES[option]))
            continue
        if kind == "bits":
            threshold, flip = operands
            bits = []
            for t in range(option):
                limit = of_channels(threshold[t], value, axis)
                bit = value >= limit
                if flip is not None:
                    bit = torch.where(of_channels(flip[t], value, axis), value <= limit, bit)
                bits.append(bit.movedim(axis, 1))
            outputs.append(binary.pack(torch.cat(bits, 1)))
            continue
        if kind == "add_tensor":
            value = (value.double() + operands[0].double()).float()
            continue
        first, *rest = (of_channels(operand, value, axis) for operand in operands)
        if kind in ("multiply", "multiply_image"):
            value = (value.double() * first.double()).float()
        elif kind == "add":
            value = (value.double() + first.double()).float()
        elif kind == "multiply_add":
            value = fused_multiply_add(value, first, *rest)
        elif kind == "prelu":
            value = torch.where(value > 0, value, (value.double() * first.double()).float())
        elif kind == "clamp":
            value = torch.where(value < first, first, value)
            value = torch.where(value > rest[0], rest[0], value)
    return value, outputs


def average(value: Tensor, window, count_include_pad: bool, divisor_override: int) -> Tensor:
    """Average pooling of float32 (N, C, H, W), summed in row-major order."""
    (kh, kw), (sh, sw), (ph, pw) = window.kernel, window.stride, window.padding
    height, width = value.shape[2:]
    out = F.avg_pool2d(value, window.kernel, window.stride, window.padding, bool(window.ceil_mode))
    result = torch.zeros_like(out)
    for y in range(out.shape[2]):
        for x in range(out.shape[3]):
            top, left = y * sh - ph, x * sw - pw
            total = value.new_zeros(value.shape[:2])
            rows = range(max(top, 0), min(top + kh, height))
            columns = range(max(left, 0), min(left + kw, width))
            for row in rows:
                for column in columns:
                    total = total + value[:, :, row, column]
            count = len(rows) * len(columns)
            if count_include_pad:
                count = (min(top + kh, height + ph) - top) * (min(left + kw, width + pw) - left)
            result[:, :, y, x] = total / (divisor_override or count) if len(rows) * len(columns) else 0
    return result
