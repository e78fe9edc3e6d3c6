"""Binary convolution: words and a blocked weight -> numbers or bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext._native import pointer
from lowbit_ext.binary.ops.geometry import (
    ENCODINGS,
    ConvPlan,
    Geometry,
    Size,
    as_geometry,
    conv_plan,
    conv_size,
    weight_bytes,
    weight_shape,
)
from lowbit_ext.binary.ops.steps import new_outputs, read_steps, step_table, with_outputs
from lowbit_ext.packed import FLOAT_TYPES, words_for

# What the convolution writes: values of a type, or bits by thresholds.
_CONV_OUTPUTS: dict[str, int] = _native.cpu.CONV_OUTPUTS
_OUTPUT_KINDS = {getattr(torch, name): kind for name, kind in _CONV_OUTPUTS.items() if hasattr(torch, name)}


def aligned_groups(words: Tensor, channels: int, groups: int) -> Tensor:
    """Channels of each group moved to a word boundary, where they do not lie there: csrc/core/ops/align_groups.h."""
    words = words.contiguous()
    per_group = channels // groups
    if groups == 1 or per_group % 64 == 0:
        return words
    output = words.new_empty((*words.shape[:-1], groups, words_for(per_group)), dtype=torch.int64)
    status = _native.kernels(words).align_groups(
        pointer(words, words, "align_groups: words"), words.shape[:-1].numel(), groups, per_group, output.data_ptr()
    )
    _native.check("align_groups", status)
    return output


# --- weight -----------------------------------------------------------------------------------------------------------


def check_weight_words(words: Tensor, channels: int, groups: int) -> None:
    """Raises ValueError unless `words` are those of a weight for that many channels."""
    if words.dtype != torch.int64 or words.dim() != 4 or words.shape[3] != words_for(channels // groups):
        raise ValueError(
            f"binary_conv2d: weight words must be int64 (O, kh, kw, {words_for(channels // groups)}) for "
            f"{channels // groups} channels per group, got {words.dtype} {tuple(words.shape)}"
        )


def _block_weight_outputs(words: Tensor, channels: int, groups: int) -> Tensor:
    check_weight_words(words, channels, groups)
    filters, height, width = (int(size) for size in words.shape[:3])
    native = _native.kernels(words)
    shape = weight_shape(filters, channels, Geometry(height, width, 1, 1, 0, 0, 0, 0, 1, 1, groups))
    # Zeros: the layout has gaps.
    return words.new_zeros(weight_bytes(shape, native, native.level), dtype=torch.uint8)


def _block_weight(words: Tensor, channels: int, groups: int) -> Tensor:
    op = "binary_conv2d_block_weight"
    blocked = _block_weight_outputs(words, channels, groups)
    words = words.contiguous()
    filters, height, width = words.shape[:3]
    shape = weight_shape(filters, channels, Geometry(height, width, 1, 1, 0, 0, 0, 0, 1, 1, groups))
    status = _native.kernels(words).binary_conv2d_block_weight(
        shape, pointer(words, words, f"{op}: words"), blocked.data_ptr()
    )
    _native.check(op, status)
    return blocked


# words (O, kh, kw, W of one group) -> the active level's private copy, opaque bytes.
binary_conv2d_block_weight = _oplib.define(
    "binary_conv2d_block_weight(Tensor words, int channels, int groups) -> Tensor",
    outputs=_block_weight_outputs,
    launcher=_block_weight,
)


# --- convolution ------------------------------------------------------------------------------------------------------


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """An optional argument as a kernel reads it."""
    return None if tensor is None else tensor.contiguous()


def check_factors(op: str, filters: int, **factors: Tensor | None) -> None:
    """Raises ValueError unless `scale` and `bias` have one float32 a filter; a scale may be one for all."""
    for name, value in factors.items():
        if value is not None and (
            value.dtype != torch.float32
            or value.dim() != 1
            or not (value.shape[0] == filters or (name == "scale" and value.shape[0] == 1))
        ):
            raise ValueError(
                f"{op}: {name} must be float32 of shape ({filters},), got {value.dtype} {tuple(value.shape)}"
            )


def _check_thresholds(filters: int, threshold: Tensor, flip: Tensor | None, exact: bool) -> None:
    expected = torch.int32 if exact else torch.float32
    if threshold.dtype != expected or threshold.dim() != 2 or threshold.shape[0] not in (1, 2):
        raise ValueError(
            f"binary_conv2d: threshold must be {expected} of shape (1 or 2, {filters}), "
            f"got {threshold.dtype} {tuple(threshold.shape)}"
        )
    if threshold.shape[1] != filters or (
        flip is not None and (flip.dtype != torch.bool or flip.shape != threshold.shape)
    ):
        raise ValueError(
            f"binary_conv2d: threshold and flip (bool) must have shape (1 or 2, {filters}), got "
            f"{tuple(threshold.shape)} and {None if flip is None else (flip.dtype, tuple(flip.shape))}"
        )


def check_residual(residual: Tensor, out_size: Sequence[int], dtypes: Collection[torch.dtype]) -> None:
    """Raises ValueError unless a residual is a float tensor of the result's size."""
    if residual.dtype not in dtypes or residual.shape != out_size:
        raise ValueError(
            f"binary_conv2d: residual must be a float tensor of the output's shape {tuple(out_size)}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )


def output_kind(
    filters: int, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, threshold: Tensor | None,
    flip: Tensor | None, out_dtype: torch.dtype, out_size: Sequence[int],
) -> int:
    """Checks the optional arguments; returns what is written."""
    exact = scale is None and bias is None and residual is None
    if threshold is None and flip is None and exact and out_dtype in _OUTPUT_KINDS:
        return _OUTPUT_KINDS[out_dtype]
    check_factors("binary_conv2d", filters, scale=scale, bias=bias)
    if residual is not None:
        check_residual(residual, out_size, FLOAT_TYPES)
    if threshold is not None:
        _check_thresholds(filters, threshold, flip, exact)
        return _CONV_OUTPUTS["bits_by_integer" if exact else "bits_by_float"]
    if flip is not None:
        raise ValueError("binary_conv2d: flip needs a threshold")
    if out_dtype not in _OUTPUT_KINDS:
        raise TypeError(f"binary_conv2d: out_dtype must be int32, float32, bfloat16 or float16, got {out_dtype}")
    if out_dtype == torch.int32 and not exact:
        raise TypeError("binary_conv2d: out_dtype int32 takes no scale, bias or residual; ask for a float dtype")
    return _OUTPUT_KINDS[out_dtype]


def _empty(input: Tensor, size: Size, threshold: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The result without its values: numbers, channels-last in memory, or words."""
    batch, filters, height, width = size
    if threshold is not None:
        return input.new_empty((batch, height, width, words_for(threshold.shape[0] * filters)))
    strides = (height * width * filters, 1, width * filters, filters)
    return input.new_empty_strided(size, strides, dtype=out_dtype)


def _blocked_weight(
    op: str, weight: Tensor, input: Tensor, channels: int, filters: int, geometry: Sequence[int], plan: ConvPlan,
    level: str,
) -> Tensor:
    """A weight, or its words, as the kernels read it."""
    pointer(weight, input, f"{op}: weight")  # before its size, which depends on the device
    if weight.dtype == torch.int64:
        weight = _block_weight(weight, channels, geometry[-1])
    if weight.dtype != torch.uint8 or weight.numel() != plan.weight_bytes or not weight.is_contiguous():
        raise ValueError(
            f"{op}: weight was not packed for {filters} filters, {channels} input channels, "
            f"{as_geometry(geometry)} and {level}"
        )
    return weight


def _outputs(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    threshold: Tensor | None, flip: Tensor | None, channels: int, filters: int, geometry: Sequence[int], encoding: str,
    padding_value: int, out_dtype: torch.dtype,
) -> Tensor:
    size = conv_size(input.shape, channels, filters, as_geometry(geometry), encoding, padding_value)
    output_kind(filters, scale, bias, residual, threshold, flip, out_dtype, size)
    return _empty(input, size, threshold, out_dtype)


def _binary_conv2d(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    threshold: Tensor | None, flip: Tensor | None, channels: int, filters: int, geometry: Sequence[int], encoding: str,
    padding_value: int, out_dtype: torch.dtype,
) -> Tensor:
    native = _native.kernels(input)
    plan = conv_plan(native, input.shape, channels, filters, geometry, encoding, padding_value)
    if input.dtype != torch.int64:
        raise TypeError(f"binary_conv2d: input must be int64 words, got {input.dtype}")
    kind = output_kind(filters, scale, bias, residual, threshold, flip, out_dtype, plan.out_size)
    weight = _blocked_weight("binary_conv2d", weight, input, channels, filters, geometry, plan, native.level)
    output = _empty(input, plan.out_size, threshold, out_dtype)
    input = aligned_groups(input, channels, geometry[-1]) if plan.aligned else input.contiguous()
    thresholds = 0
    if scale is not None or bias is not None:
        scale, bias = contiguous(scale), contiguous(bias)
    if threshold is not None:
        thresholds, threshold, flip = threshold.shape[0], threshold.contiguous(), contiguous(flip)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    code = ENCODINGS[encoding]
    size = native.binary_conv2d_workspace_bytes(plan.shape, code, padding_value, kind, thresholds)
    workspace = _native.workspace(size, input)
    status = native.binary_conv2d(
        plan.shape, code, padding_value, kind, pointer(input, input, "binary_conv2d: input"), weight.data_ptr(),
        pointer(scale, input, "binary_conv2d: scale"), 0 if scale is None or scale.numel() == 1 else 1,
        pointer(bias, input, "binary_conv2d: bias"), pointer(residual, input, "binary_conv2d: residual"),
        0 if residual is None else FLOAT_TYPES[residual.dtype], pointer(threshold, input, "binary_conv2d: threshold"),
        pointer(flip, input, "binary_conv2d: flip"), thresholds, output.data_ptr(), workspace.data_ptr(), size,
    )
    _native.check("binary_conv2d", status)
    return output


# Words and a weight -> (N, O, H', W') channels-last int32 or float, or, with thresholds, words (N, H', W', W). The
# weight is words (O, kh, kw, W of one group), or their blocked copy, made once for many calls. Training hands words: a
# compiled graph, which torch keeps on disk, then holds no size that only one instruction set has.
# Epilogue and exactness: csrc/core/ops/binary_conv2d.h.
binary_conv2d = _oplib.define(
    "binary_conv2d(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? threshold, "
    "Tensor? flip, int channels, int filters, int[] geometry, str encoding, int padding_value, ScalarType out_dtype) "
    "-> Tensor",
    outputs=_outputs,
    launcher=_binary_conv2d,
)


def _epilogue_outputs(
    input: Tensor, weight: Tensor, channels: int, filters: int, geometry: Sequence[int], encoding: str,
    padding_value: int, steps: Sequence[int], operands: Sequence[Tensor | None],
) -> list[Tensor]:
    size = conv_size(input.shape, channels, filters, as_geometry(geometry), encoding, padding_value)
    return new_outputs(read_steps("binary_conv2d_epilogue", steps, operands, size, 1, input), size, 1, input)


def _binary_conv2d_epilogue(
    input: Tensor, weight: Tensor, channels: int, filters: int, geometry: Sequence[int], encoding: str,
    padding_value: int, steps: Sequence[int], operands: Sequence[Tensor | None],
) -> list[Tensor]:
    op = "binary_conv2d_epilogue"
    native = _native.kernels(input)
    plan = conv_plan(native, input.shape, channels, filters, geometry, encoding, padding_value)
    if input.dtype != torch.int64:
        raise TypeError(f"{op}: input must be int64 words, got {input.dtype}")
    program = read_steps(op, steps, operands, plan.out_size, 1, input)
    weight = _blocked_weight(op, weight, input, channels, filters, geometry, plan, native.level)
    outputs = new_outputs(program, plan.out_size, 1, input)
    complete = with_outputs(program, outputs, 1)  # holds copies until the kernel has run
    table = step_table(op, complete, input)
    input = aligned_groups(input, channels, geometry[-1]) if plan.aligned else input.contiguous()
    code = ENCODINGS[encoding]
    size = native.binary_conv2d_epilogue_workspace_bytes(
        plan.shape, code, padding_value, table.data_ptr(), len(table)
    )
    workspace = _native.workspace(size, input)
    status = native.binary_conv2d_epilogue(
        plan.shape, code, padding_value, pointer(input, input, f"{op}: input"), weight.data_ptr(), table.data_ptr(),
        len(table), workspace.data_ptr(), size,
    )
    _native.check(op, status)
    return outputs


# Words and a weight, as above, and a program on the accumulators (steps.py) -> what its store and bits steps write, in
# order: (N, O, H', W') channels-last floats, words (N, H', W', W).
binary_conv2d_epilogue = _oplib.define(
    "binary_conv2d_epilogue(Tensor input, Tensor weight, int channels, int filters, int[] geometry, str encoding, "
    "int padding_value, int[] steps, Tensor?[] operands) -> Tensor[]",
    outputs=_epilogue_outputs,
    launcher=_binary_conv2d_epilogue,
)
