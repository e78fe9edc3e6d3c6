"""Steps of an epilogue: what a value runs through between a kernel and memory (csrc/core/epilogue.h).

Operators take a program as `int[] steps`, kind and option of each step in turn, and `Tensor?[] operands`, what they
read in the same order. Kernels take the int64 table that `step_table` makes, which may be kept and called many times.

| kind           | option               | operands                                              | written            |
|----------------|----------------------|-------------------------------------------------------|--------------------|
| multiply, add  | 0                    | float32 (C,)                                          |                    |
| multiply_add   | 0                    | float32 (C,) factor and (C,) summand                  |                    |
| multiply_image | 0                    | float32 (N, C)                                        |                    |
| add_tensor     | 0                    | float32, bfloat16 or float16 of the result's shape    |                    |
| prelu          | 0                    | float32 (C,) slope                                    |                    |
| clamp          | 0                    | float32 (C,) least and (C,) greatest value            |                    |
| store          | of FLOAT_TYPES       |                                                       | floats             |
| bits           | 1 or 2, thresholds T | float32 (T, C) threshold, bool (T, C) flip or None    | words              |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_ext import _native
from lowbit_ext._native import pointer
from lowbit_ext.packed import FLOAT_TYPES, words_for

STEP_KINDS: dict[str, int] = _native.cpu.STEP_KINDS
MOST_STEPS: int = _native.cpu.MOST_STEPS

_NAMES = {number: name for name, number in STEP_KINDS.items()}
_DTYPES = {number: dtype for dtype, number in FLOAT_TYPES.items()}
_OPERANDS = {"multiply_add": 2, "clamp": 2, "store": 0, "bits": 2}  # else one
ELEMENTWISE = ("multiply", "add", "multiply_add", "multiply_image", "prelu", "clamp")  # read no tensor, write nothing


class Step(NamedTuple):
    """A step with what it reads and, behind that, what it writes."""

    kind: str
    option: int
    tensors: tuple[Tensor | None, ...]


def channel_axis(tensor: Tensor) -> int:
    """Dimension of the channels: 1 of (N, C) and (N, C, H, W), 2 of rows (N, T, C)."""
    return 2 if tensor.dim() == 3 else 1


def pixel_stride(tensor: Tensor, axis: int) -> int | None:
    """Elements from a pixel to the next, where pixels lie evenly and each one's channels together; else None."""
    pixels = tensor.movedim(axis, -1)
    channels = pixels.shape[-1]
    if tensor.numel() == 0:
        return channels
    if channels > 1 and pixels.stride(-1) != 1:
        return None
    stride = expected = 0
    for size, step in zip(reversed(pixels.shape[:-1]), reversed(pixels.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride == 0:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    stride = stride or channels
    return stride if stride >= channels else None


def _even_stride(op: str, name: str, tensor: Tensor, axis: int) -> int:
    stride = pixel_stride(tensor, axis)
    if stride is None:
        raise ValueError(
            f"{op}: {name} must have each pixel's channels together and its pixels evenly apart, got strides "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}"
        )
    return stride


def step_table(op: str, steps: Sequence[Step], like: Tensor) -> Tensor:
    """The program as kernels read it: int64 (steps, 6) in the CPU's memory, rows as in csrc/core/epilogue.h.

    It holds addresses: the tensors must outlive its calls. Operands of channels are contiguous; tensors of pixels lie
    evenly (`pixel_stride`), so that they may be slices of larger ones. A store may write the tensor that a step before
    it has added.

    Args:
        op: named by errors.
        steps: at most MOST_STEPS; their tensors have the dtypes and shapes of the module's table.
        like: a tensor of the device.
    """
    rows = []
    for index, (kind, option, tensors) in enumerate(steps):
        name = f"step {index} ({kind})"
        addresses = [pointer(tensor, like, f"{op}: {name}") for tensor in tensors]
        row = [STEP_KINDS[kind], option, 0, 0, 0, 0]
        last = tensors[-1]
        assert last is not None
        if kind == "store":
            row[4:] = addresses[0], _even_stride(op, name, last, channel_axis(last))
        elif kind == "bits":
            row[2:] = *addresses, _even_stride(op, name, last, -1)
        elif kind == "add_tensor":
            row[1:3] = FLOAT_TYPES[last.dtype], addresses[0]
            row[5] = _even_stride(op, name, last, channel_axis(last))
        else:
            row[2 : 2 + len(addresses)] = addresses
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), 6)


# --- operators --------------------------------------------------------------------------------------------------------


def _check_channels(op: str, name: str, operand: Tensor | None, shape: tuple[int, ...]) -> None:
    if operand is None or operand.dtype != torch.float32 or operand.shape != shape:
        came = "None" if operand is None else f"{operand.dtype} {tuple(operand.shape)}"
        raise ValueError(f"{op}: {name} must be float32 of shape {shape}, got {came}")


def _check_step(op: str, step: Step, name: str, shape: Sequence[int], channels: int) -> None:
    """Checks what a step reads."""
    kind, option, operands = step
    if kind == "bits":
        if option not in (1, 2):
            raise ValueError(f"{op}: {name} must have option 1 or 2, its thresholds a channel, got {option}")
        threshold, flip = operands
        _check_channels(op, f"{name}, threshold", threshold, (option, channels))
        if flip is not None and (flip.dtype != torch.bool or flip.shape != (option, channels)):
            raise ValueError(
                f"{op}: {name}, flip must be bool of shape {(option, channels)} or None, got {flip.dtype} "
                f"{tuple(flip.shape)}"
            )
    elif kind == "store":
        if option not in _DTYPES:
            raise ValueError(f"{op}: {name} must have an option of FLOAT_TYPES {tuple(_DTYPES)}, got {option}")
    elif kind == "add_tensor":
        (tensor,) = operands
        if tensor is None or tensor.dtype not in FLOAT_TYPES or tensor.shape != shape:
            came = "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(
                f"{op}: {name} must be float32, bfloat16 or float16 of the result's shape {tuple(shape)}, got {came}"
            )
    else:
        expected = (shape[0], channels) if kind == "multiply_image" else (channels,)
        for operand in operands:
            _check_channels(op, name, operand, expected)


def read_steps(
    op: str, steps: Sequence[int], operands: Sequence[Tensor | None], shape: Sequence[int], axis: int, like: Tensor
) -> list[Step]:
    """Checks the program of an operator whose result has `shape`, with channels in dimension `axis`; its steps, without
    what they write.
    """
    if len(steps) % 2 or len(steps) > 2 * MOST_STEPS:
        raise ValueError(
            f"{op}: steps must be kind and option of at most {MOST_STEPS} steps, got {len(steps)} numbers"
        )
    program = []
    taken = 0
    for index, (number, option) in enumerate(zip(steps[::2], steps[1::2], strict=True)):
        kind = _NAMES.get(number)
        if kind is None:
            raise ValueError(f"{op}: steps must have kinds of STEP_KINDS {STEP_KINDS}, got {number} in step {index}")
        count = _OPERANDS.get(kind, 1)
        step = Step(kind, option, tuple(operands[taken : taken + count]))
        taken += count
        if taken > len(operands):
            break
        _check_step(op, step, f"step {index} ({kind})", shape, shape[axis])
        program.append(step)
    needed = sum(_OPERANDS.get(_NAMES.get(number, ""), 1) for number in steps[::2])
    if needed != len(operands):
        raise ValueError(f"{op}: the steps read {needed} operands, got {len(operands)}")
    for operand in operands:
        if operand is not None and operand.device != like.device:
            place = "the CPU" if like.is_cpu else like.device
            raise ValueError(f"{op}: operands must be on {place} like the input, got one on {operand.device}")
    return program


def new_outputs(program: Sequence[Step], shape: Sequence[int], axis: int, like: Tensor) -> list[Tensor]:
    """Results of the store and bits steps, in order: floats with channels last in memory, words (N, *spatial, W)."""
    space = [size for dimension, size in enumerate(shape) if dimension != axis]
    outputs = []
    for step in program:
        if step.kind == "store":
            floats = like.new_empty((*space, shape[axis]), dtype=_DTYPES[step.option])
            outputs.append(floats.movedim(-1, axis))
        elif step.kind == "bits":
            outputs.append(like.new_empty((*space, words_for(step.option * shape[axis])), dtype=torch.int64))
    return outputs


def with_outputs(program: Sequence[Step], outputs: Sequence[Tensor], axis: int) -> list[Step]:
    """The steps as `step_table` takes them: operands as kernels read them, and what is written."""
    written = iter(outputs)
    complete = []
    for kind, option, operands in program:
        tensors: tuple[Tensor | None, ...]
        if kind == "add_tensor":
            (tensor,) = operands
            assert tensor is not None
            if pixel_stride(tensor, axis) is None:
                tensor = tensor.movedim(axis, -1).contiguous().movedim(-1, axis)
            tensors = (tensor,)
        else:
            tensors = tuple(operand if operand is None else operand.contiguous() for operand in operands)
        if kind in ("store", "bits"):
            tensors = (*tensors, next(written))
        complete.append(Step(kind, option, tensors))
    return complete
