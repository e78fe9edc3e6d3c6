"""Steps on float pixels, with a window between two programs of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.binary.ops.geometry import Window, as_window, pool_shape, window_size
from lowbit_ext.binary.ops.steps import (
    ELEMENTWISE,
    Step,
    channel_axis,
    new_outputs,
    pixel_stride,
    read_steps,
    step_table,
    with_outputs,
)
from lowbit_ext.packed import FLOAT_TYPES

REDUCTIONS: dict[str, int] = _native.cpu.REDUCTIONS
_ONE_PIXEL = Window(1, 1, 1, 1, 0, 0, 1, 1, 0)


def _images(input: Tensor) -> tuple[int, int, int]:
    """Batch, height and width of (N, C), rows (N, T, C) or (N, C, H, W)."""
    if input.dim() == 4:
        batch, _, height, width = input.shape
        return batch, height, width
    return input.shape[0], 1, input.shape[1] if input.dim() == 3 else 1


def _read(
    input: Tensor, window: Sequence[int], reduction: str, divisor_override: int, steps: Sequence[int], before: int,
    operands: Sequence[Tensor | None],
) -> tuple[Window, tuple[int, int], tuple[int, ...], list[Step]]:
    """Checks the arguments; returns the window, the output's height and width, its shape, and the steps."""
    op = "pointwise"
    if input.dtype not in FLOAT_TYPES:
        raise TypeError(f"{op}: input must be float32, bfloat16 or float16, got {input.dtype}")
    if input.dim() not in (2, 3, 4):
        raise ValueError(f"{op}: input must be (N, C), (N, T, C) or (N, C, H, W), got {tuple(input.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'none', 'maximum' or 'average', got {reduction!r}")
    axis = channel_axis(input)
    shape: tuple[int, ...] = tuple(input.shape)
    _, *size = _images(input)
    if reduction == "none":
        if len(window) > 0 or before > 0:
            raise ValueError(
                f"{op}: a window and steps before it need a reduction, got window={list(window)} and before={before}"
            )
        of_image, out = _ONE_PIXEL, (size[0], size[1])
    else:
        if input.dim() != 4:
            raise ValueError(f"{op}: a window needs an input (N, C, H, W), got {tuple(input.shape)}")
        if len(window) != len(_ONE_PIXEL):
            raise ValueError(f"{op}: window must be {len(_ONE_PIXEL)} integers (Window), got {len(window)}")
        of_image = as_window(window)
        if reduction == "average" and of_image.dilation != (1, 1):
            raise ValueError(f"{op}: dilation of an average must be 1, got {list(of_image.dilation)}")
        if divisor_override < 0:
            raise ValueError(f"{op}: divisor_override must be at least 1, or 0 for none, got {divisor_override}")
        out = window_size(op, size, shape[1], of_image)
        shape = (*shape[:2], *out)
    program = read_steps(op, steps, operands, shape, axis, input)
    if not 0 <= before <= len(program) or any(step.kind not in ELEMENTWISE for step in program[:before]):
        raise ValueError(
            f"{op}: before must count steps in front of the window, of kinds {', '.join(ELEMENTWISE)}; got {before} of "
            f"{[step.kind for step in program]}"
        )
    return of_image, out, shape, program


def _outputs(
    input: Tensor, window: Sequence[int], reduction: str, count_include_pad: bool, divisor_override: int,
    steps: Sequence[int], before: int, operands: Sequence[Tensor | None],
) -> list[Tensor]:
    *_, shape, program = _read(input, window, reduction, divisor_override, steps, before, operands)
    return new_outputs(program, shape, channel_axis(input), input)


def _pointwise(
    input: Tensor, window: Sequence[int], reduction: str, count_include_pad: bool, divisor_override: int,
    steps: Sequence[int], before: int, operands: Sequence[Tensor | None],
) -> list[Tensor]:
    of_image, out, shape, program = _read(input, window, reduction, divisor_override, steps, before, operands)
    axis = channel_axis(input)
    outputs = new_outputs(program, shape, axis, input)
    complete = with_outputs(program, outputs, axis)  # holds copies until the kernel has run
    table = step_table("pointwise", complete, input)
    stride = pixel_stride(input, axis)
    if stride is None and not (input.dim() == 4 and input.is_contiguous()):
        input = input.movedim(axis, -1).contiguous().movedim(-1, axis)
        stride = shape[axis]
    native_shape = pool_shape("pointwise", _images(input), shape[axis], out, of_image)
    status = _native.kernels(input).pointwise(
        native_shape, REDUCTIONS[reduction], count_include_pad, divisor_override,
        pointer(input, input, "pointwise: input"), FLOAT_TYPES[input.dtype], stride is not None, stride or 0,
        table.data_ptr(), before, len(table) - before,
    )
    _native.check("pointwise", status)
    return outputs


# (N, C), rows (N, T, C) or (N, C, H, W) -> what the store and bits steps write (steps.py), in order: floats of the
# result's shape with channels last in memory, and words. The first `before` steps come before the window, which is
# Window's integers, or empty where reduction is "none". csrc/core/ops/pointwise.h.
pointwise = _oplib.define(
    "pointwise(Tensor input, int[] window, str reduction, bool count_include_pad, int divisor_override, int[] steps, "
    "int before, Tensor?[] operands) -> Tensor[]",
    outputs=_outputs,
    launcher=_pointwise,
)
