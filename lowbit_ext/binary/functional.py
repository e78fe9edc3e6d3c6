"""Binary convolution, linear and pooling as functions. Bits in, bits or numbers out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit_ext import _arguments, _native, _oplib
from lowbit_ext.binary import ops
from lowbit_ext.binary.ops import Geometry, Window
from lowbit_ext.binary.surrogates import INTERVALS, SURROGATES, derivative
from lowbit_ext.packed import (
    ENCODING_VALUES,
    WORD_BITS,
    PackedTensor,
    clear_tail,
    packed_words,
    unchecked,
    unpack_op,
    words_for,
)

Pair = int | Sequence[int]

# Where the binary activation switches: sign at 0, BinaryDuo's step at 1/2.
DEFAULT_THRESHOLDS = {"sign": 0.0, "step": 0.5}


def _check_encoding(op: str, encoding: str) -> None:
    if not isinstance(encoding, str) or encoding not in ENCODING_VALUES:
        raise ValueError(f"{op}: encoding must be 'sign' or 'step', got {encoding!r}")


def _check_surrogate(op: str, surrogate: str) -> None:
    if not isinstance(surrogate, str) or surrogate not in SURROGATES:
        raise ValueError(f"{op}: surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}")


def _check_float(op: str, name: str, value: Any) -> None:
    _arguments.tensor(op, name, value, _arguments.FLOATS)


def _check_input(op: str, input: Any) -> None:
    """A PackedTensor, a float tensor, or one of float64."""
    if not isinstance(input, PackedTensor) and not (isinstance(input, Tensor) and input.dtype == torch.float64):
        _check_float(op, "input", input)


def _check_weight(op: str, weight: Any, shape: str) -> None:
    """A PackedWeight or a float tensor of the dimensions that `shape` names."""
    if not isinstance(weight, PackedWeight):
        _arguments.tensor(op, "weight", weight)
    if len(weight.shape) != shape.count(",") + 1:
        raise ValueError(f"{op}: weight must be {shape}, got {tuple(weight.shape)}")


def _check_real(op: str, name: str, value: Any, like: Tensor) -> None:
    """A tensor of numbers, no bools, on the device of `like`."""
    _arguments.tensor_like(op, name, value, like)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{op}: {name} must be real numbers, got {value.dtype}")


def _holds_nan(values: Tensor) -> bool:
    """Whether there is a NaN among values that can be looked at."""
    return _oplib._is_eager() and not values.is_meta and bool(values.isnan().any())


# --- binarize and unpack ----------------------------------------------------------------------------------------------


def binarize(
    x: Tensor,
    encoding: str = "sign",
    threshold: float | Tensor | None = None,
    flip: Tensor | None = None,
) -> PackedTensor:
    """Packs one bit an element: x >= threshold, or x <= threshold in flipped channels.

    Args:
        x: (N, C, *spatial) float32, bfloat16 or float16; contiguous and channels-last tensors are read in place.
        encoding: "sign" (bits stand for -1 and +1) or "step" (0 and 1).
        threshold: a number, a tensor with one value a channel, or (2, C); default 0 for "sign", 1/2 for "step".
        flip: bool, one value a threshold: compare with <= there (a batch norm with negative scale).

    Returns:
        PackedTensor of shape (N, C, *spatial), or with two thresholds a channel (N, 2 C, *spatial), whose bits c and
        C + c come from channel c. A NaN gives bit 0 whatever the comparison.

    Raises:
        TypeError: x, threshold or flip of the wrong type.
        ValueError: unknown encoding, x of fewer than two dimensions, wrong number of thresholds, NaN threshold.

    Gradient:
        none; conv2d, linear and BinaryActivation carry a straight-through estimator.
    """
    _check_encoding("binarize", encoding)
    _check_float("binarize", "input", x)
    if x.dim() < 2:
        raise ValueError(f"binarize: input must have shape (N, C, ...), got {tuple(x.shape)}")
    if flip is not None:
        _arguments.tensor_like("binarize", "flip", flip, x)
    common = DEFAULT_THRESHOLDS[encoding]
    per_channel = None
    if isinstance(threshold, Tensor):
        _check_real("binarize", "threshold", threshold, x)
        per_channel = threshold.detach().to(torch.float32)
        if per_channel.dim() != 2 or per_channel.shape[0] != 2:
            per_channel = per_channel.reshape(-1)
        if per_channel.numel() == 1 and x.shape[1] != 1:
            per_channel = per_channel.expand(x.shape[1])
        if _holds_nan(per_channel):
            raise ValueError("binarize: threshold holds NaN, which no value can be compared with")
    elif threshold is not None:
        common = _arguments.number("binarize", "threshold", threshold)
        if math.isnan(common):
            raise ValueError("binarize: threshold is NaN, which no value can be compared with")
    words = ops.binarize(x, per_channel, flip, common, encoding)
    channels = x.shape[1] if per_channel is None else per_channel.numel()
    return packed_words(words, channels, encoding)


def unpack(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of a packed tensor: see PackedTensor.unpack."""
    if not isinstance(packed, PackedTensor):
        raise TypeError(f"unpack: packed must be a PackedTensor, got {type(packed).__name__}")
    return packed.unpack(dtype)


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """Signs of a weight, packed once for many calls. Made by pack_weight or from_words.

    Attributes:
        words: int64 (O, kh, kw, ceil(C / groups / 64)); bit 1 is +1, bits past the last channel are 0.
        blocked: uint8, the same bits in the order the kernels of `isa` read.
        shape: shape of the float weight: (O, C / groups, kh, kw), (O, C / groups, k) or (O, C).
        groups: convolution groups.
        isa: what `blocked` is for: an instruction-set level, or a GPU and its architecture.
    """

    words: Tensor
    blocked: Tensor
    shape: tuple[int, ...]
    groups: int
    isa: str

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        shape, groups = _check_weight_words("PackedWeight", self.words, self.shape, self.groups)
        blocked = _arguments.tensor_like("PackedWeight", "blocked", self.blocked, self.words, (torch.uint8,))
        if blocked.dim() != 1 or not blocked.is_contiguous():
            raise ValueError(f"PackedWeight: blocked must be contiguous bytes (B,), got {tuple(blocked.shape)}")
        if not isinstance(self.isa, str):
            raise TypeError(f"PackedWeight: isa must be a string, got {self.isa!r}")
        if shape[1] % WORD_BITS:
            self.__dict__.update(vars(_packed_weight(clear_tail(self.words, shape[1]), shape, groups)))
        else:
            self.__dict__.update(shape=shape, groups=groups)

    def __reduce__(self) -> Any:
        # Copies and pickles make the private copy anew: they are checked, and may be read on another machine.
        return PackedWeight.from_words, (self.words, self.shape, self.groups)

    @property
    def channels(self) -> int:
        """Input channels over all groups."""
        return self.shape[1] * self.groups

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Signs as a dense tensor of the float weight's shape."""
        return unpack_op(self.words, self.shape[1], -1.0, 1.0, dtype).movedim(-1, 1).reshape(self.shape)

    @staticmethod
    def from_words(words: Tensor, shape: Sequence[int], groups: int = 1) -> PackedWeight:
        """Rebuilds the kernels' private copy from words, e.g. those of a loaded file; bits past the last channel count
        as 0.

        Args:
            words: int64 (O, kh, kw, ceil(C / groups / 64)).
            shape: (O, C / groups, kh, kw), (O, C / groups, k) or (O, C).
            groups: convolution groups.

        Raises:
            TypeError, ValueError: words that are not those of a weight of this shape, or groups that do not divide it.
        """
        shape, groups = _check_weight_words("PackedWeight.from_words", words, shape, groups)
        return _packed_weight(clear_tail(words, shape[1]), shape, groups)


def _check_weight_words(op: str, words: Any, shape: Any, groups: Any) -> tuple[tuple[int, ...], int]:
    """Checks words against the shape of the weight they are of; returns the shape and the groups as ints."""
    _arguments.tensor(op, "words", words, (torch.int64,))
    sizes = [_arguments.index(size) for size in shape] if isinstance(shape, (tuple, list)) else []
    if not 2 <= len(sizes) <= 4 or any(size is None or size < 0 for size in sizes):
        raise ValueError(f"{op}: shape must be (O, C), (O, C, k) or (O, C, kh, kw), got {shape!r}")
    filters, channels, *kernel = sizes
    wanted = (filters, *(1,) * (2 - len(kernel)), *kernel, words_for(channels))  # type: ignore[arg-type]
    if words.shape != wanted:
        raise ValueError(
            f"{op}: words of a weight of shape {tuple(sizes)} must have shape {wanted}, got {tuple(words.shape)}"
        )
    return tuple(sizes), _check_groups(op, groups, filters)  # type: ignore[arg-type]


def _check_groups(op: str, groups: Any, filters: int) -> int:
    count = _arguments.integer(op, "groups", groups)
    if count < 1 or filters % count:
        raise ValueError(f"{op}: groups must divide the {filters} filters, got {groups}")
    return count


def _packed_weight(words: Tensor, shape: tuple[int, ...], groups: int) -> PackedWeight:
    """With the private copy of the active kernels, of words that are known to be right."""
    blocked = ops.binary_conv2d_block_weight(words, shape[1] * groups, groups)
    level = _native.kernels(words).level
    return unchecked(PackedWeight, words=words, blocked=blocked, shape=shape, groups=groups, isa=level)


def _flatten_weight(weight: PackedWeight) -> tuple[list[Any], Any]:
    return [weight.words, weight.blocked], (weight.shape, weight.groups, weight.isa)


def _flatten_weight_with_keys(weight: PackedWeight) -> tuple[list[Any], Any]:
    tensors, context = _flatten_weight(weight)
    keys = (torch.utils._pytree.GetAttrKey("words"), torch.utils._pytree.GetAttrKey("blocked"))
    return list(zip(keys, tensors, strict=True)), context


def _unflatten_weight(tensors: Any, context: Any) -> PackedWeight:
    words, blocked = tensors
    shape, groups, isa = context
    return unchecked(PackedWeight, words=words, blocked=blocked, shape=tuple(shape), groups=groups, isa=isa)


torch.utils._pytree.register_pytree_node(
    PackedWeight,
    _flatten_weight,
    _unflatten_weight,
    serialized_type_name="lowbit_ext.PackedWeight",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_weight_with_keys,
)


def _weight_words(weight: Tensor) -> Tensor:
    """Sign bits of a float weight (O, C, kh, kw), (O, C, k) or (O, C) as words (O, kh, kw, W)."""
    words = ops.binarize(weight.detach(), None, None, 0.0, "sign")
    kernel = words.shape[1:-1]
    return words.reshape(words.shape[0], *(1,) * (2 - len(kernel)), *kernel, words.shape[-1])


def pack_weight(weight: Tensor, groups: int = 1) -> PackedWeight:
    """Packs the signs of a weight (sign(0) = +1) for any number of calls.

    Args:
        weight: (O, C / groups, kh, kw), (O, C / groups, k) or (O, C); float32, bfloat16 or float16.
        groups: convolution groups the weight is for.

    Raises:
        TypeError: wrong dtype. ValueError: not 2 to 4 dimensions, or groups does not divide the filters.
    """
    _check_float("pack_weight", "weight", weight)
    if not 2 <= weight.dim() <= 4:
        raise ValueError(
            f"pack_weight: weight must be (O, C), (O, C, k) or (O, C, kh, kw), got {tuple(weight.shape)}"
        )
    groups = _check_groups("pack_weight", groups, weight.shape[0])
    return _packed_weight(_weight_words(weight), tuple(weight.shape), groups)


# --- convolution ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _cached_geometry(
    weight_shape: Sequence[int], stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Geometry:
    kernel = (weight_shape[2], weight_shape[3])
    stride, dilation = _arguments.pair("", "", stride), _arguments.pair("", "", dilation)
    if padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding == "same":
        if stride != (1, 1):
            raise ValueError(f"binary_conv2d: padding 'same' needs stride 1, got stride={stride}")
        # As torch: where the total is odd, the extra row or column goes to the bottom or right.
        total = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
        top, left = total[0] // 2, total[1] // 2
        sides = (top, left, total[0] - top, total[1] - left)
    elif isinstance(padding, str):
        raise ValueError(f"binary_conv2d: padding must be ints, 'same' or 'valid', got {padding!r}")
    else:
        sides = _arguments.pair("", "", padding) * 2
    return Geometry(*kernel, *stride, *sides, *dilation, groups)


def geometry_of(
    weight_shape: Sequence[int], stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Geometry:
    """Checked and completed geometry of a call."""
    # The cache would take True and 1.0 for 1.
    if not type(stride) is type(padding) is type(dilation) is int:
        stride = _arguments.pair("binary_conv2d", "stride", stride)
        dilation = _arguments.pair("binary_conv2d", "dilation", dilation)
        if not isinstance(padding, str):
            padding = _arguments.pair("binary_conv2d", "padding", padding)
    if torch.compiler.is_compiling():
        return _cached_geometry.__wrapped__(weight_shape, stride, padding, dilation, groups)
    return _cached_geometry(weight_shape, stride, padding, dilation, groups)


def _channel_vector(
    name: str, value: float | Tensor, filters: int, like: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A scale or bias as a contiguous vector of one or `filters` values."""
    if isinstance(value, Tensor):
        _check_real("binary_conv2d", name, value, like)
    else:
        value = torch.tensor([_arguments.number("binary_conv2d", name, value)], dtype=dtype, device=like.device)
    if value.dtype != dtype or value.dim() != 1 or not value.is_contiguous():
        value = value.to(dtype).reshape(-1).contiguous()
    if value.numel() not in (1, filters):
        raise ValueError(
            f"binary_conv2d: {name} must be a number or have one value a filter ({filters}), got {value.numel()}"
        )
    return value.expand(filters).contiguous() if name == "bias" and value.numel() != filters else value


def integer_threshold(threshold: Tensor, flip: Tensor | None) -> Tensor:
    """Threshold on an integer accumulator equal to a real one: ceil for acc >= t, floor for acc <= t, int32.

    Args:
        threshold: float or integer tensor; infinities become the ends of int32, always or never met.
        flip: bool of the same shape, or None.
    """
    if threshold.dtype == torch.int32:
        return threshold
    rounded = threshold.to(torch.float64).ceil()
    if flip is not None:
        rounded = torch.where(flip, threshold.to(torch.float64).floor(), rounded)
    limits = torch.iinfo(torch.int32)
    return rounded.clamp(limits.min, limits.max).to(torch.int32)


def _thresholds(
    threshold: float | Tensor, flip: Tensor | None, filters: int, exact: bool, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Threshold (T, O), int32 for exact accumulators and float32 else, and flip (T, O)."""
    if isinstance(threshold, Tensor):
        _check_real("binary_conv2d", "threshold", threshold, like)
    else:
        value = _arguments.number("binary_conv2d", "threshold", threshold)
        threshold = torch.tensor(value, dtype=torch.float64, device=like.device)
    if flip is not None and (not isinstance(flip, Tensor) or flip.dtype != torch.bool):
        came = flip.dtype if isinstance(flip, Tensor) else type(flip).__name__
        raise TypeError(f"binary_conv2d: flip must be a bool tensor, got {came}")
    if flip is not None:
        _arguments.tensor_like("binary_conv2d", "flip", flip, like)
    rows = threshold.shape[0] if threshold.dim() == 2 else 1
    if threshold.dim() > 2 or rows not in (1, 2) or (threshold.dim() > 0 and threshold.shape[-1] not in (1, filters)):
        raise ValueError(
            f"binary_conv2d: threshold must be a number or have shape ({filters},), (1, {filters}) or (2, {filters}), "
            f"got {tuple(threshold.shape)}"
        )
    if flip is not None and (flip.dim() > 2 or any(
        size not in (1, wanted) for size, wanted in zip(reversed(flip.shape), (filters, rows), strict=False)
    )):  # fmt: skip
        raise ValueError(
            f"binary_conv2d: flip must have shape ({filters},) or that of threshold, got {tuple(flip.shape)}"
        )
    if threshold.is_floating_point() and _holds_nan(threshold):
        raise ValueError("binary_conv2d: threshold holds NaN, which no value can be compared with")
    threshold = threshold.detach().expand(rows, filters)
    if flip is not None:
        flip = flip.expand(rows, filters).contiguous()
    threshold = integer_threshold(threshold, flip) if exact else threshold.to(torch.float32)
    return threshold.contiguous(), flip


def straight_through_weight(weight: Tensor, scale: Tensor | None) -> Tensor:
    """scale * sign(weight), sign(0) = +1, whose gradient goes to the weight as it is.

    Args:
        weight: latent float weight, any float dtype.
        scale: None, (1,) or one value a filter; taken as a constant.
    """
    signs = torch.where(weight.detach() >= 0, 1.0, -1.0).to(weight.dtype)
    if scale is not None:
        signs = signs * scale.detach().to(weight.dtype).reshape(-1, *(1,) * (weight.dim() - 1))
    return signs + (weight - weight.detach())  # plus 0


def _conv2d_float64(
    input: Tensor, weight: Tensor, geometry: Geometry, padding_value: int, encoding: str, surrogate: str,
    scale: float | Tensor | None, bias: Tensor | None, residual: Tensor | None,
) -> Tensor:
    """conv2d by torch's operators in float64, in which networks are compared."""
    batch, channels, height, width = input.shape
    filters = weight.shape[0]
    _arguments.tensor_like("binary_conv2d", "weight", weight, input)
    size = (batch, height, width, words_for(channels))
    out_size = ops.conv_size(size, channels, filters, geometry, encoding, padding_value)
    factor = None if scale is None else _channel_vector("scale", scale, filters, input, torch.float64)
    offset = None if bias is None else _channel_vector("bias", bias, filters, input, torch.float64)
    if residual is not None:
        ops.check_residual(residual, out_size, (*_arguments.FLOATS, torch.float64))
    late = _wants_grad(scale)
    top, left, bottom, right = geometry.padding
    values = F.pad(binary_activation(input, encoding, surrogate), (left, right, top, bottom), value=padding_value)
    effective = straight_through_weight(weight.to(torch.float64), None if late else factor)
    output = F.conv2d(values, effective, None, geometry.stride, 0, geometry.dilation, geometry.groups)
    if late:
        output = output * factor.reshape(-1, 1, 1)  # type: ignore[union-attr]
    if offset is not None:
        output = output + offset.reshape(-1, 1, 1)
    return output if residual is None else output + residual


class _BinaryConv2d(torch.autograd.Function):
    """Convolution of binarized values; saves the activation's bits, its mask bits and the weight's bits.

    The input's gradient is straight-through with `surrogate`; the latent weight's is the gradient of its sign. Only a
    surrogate that is neither "clip" nor "identity" keeps the float input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        packed_weight: PackedWeight | None,
        scale: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        channels: int,
        geometry: Geometry,
        encoding: str,
        surrogate: str,
        padding_value: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        mask = None
        if input.dtype == torch.int64:
            words = input
        elif surrogate == "clip" and ctx.needs_input_grad[0]:
            words, mask = ops.binarize_with_mask(input, DEFAULT_THRESHOLDS[encoding], encoding)
        else:
            words = ops.binarize(input, None, None, DEFAULT_THRESHOLDS[encoding], encoding)
        if packed_weight is not None:
            weight_words, blocked = packed_weight.words, packed_weight.blocked
        else:
            assert weight is not None
            weight_words = _weight_words(weight)
            blocked = ops.binary_conv2d_block_weight(weight_words, channels, geometry.groups)
        output = ops.binary_conv2d(
            words, blocked, scale, bias, residual, None, None, channels, weight_words.shape[0], geometry, encoding,
            padding_value, out_dtype,
        )  # fmt: skip
        keeps_input = surrogate not in ("clip", "identity") and ctx.needs_input_grad[0]
        ctx.save_for_backward(words, mask, weight_words, scale, input if keeps_input else None)
        ctx.call = (channels, geometry, encoding, surrogate, padding_value)
        ctx.input_dtype = input.dtype
        ctx.weight_like = None if weight is None else (weight.dtype, weight.shape)
        ctx.residual_dtype = None if residual is None else residual.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        words, mask, weight_words, scale, kept_input = ctx.saved_tensors
        channels, geometry, encoding, surrogate, padding_value = ctx.call
        filters = weight_words.shape[0]
        grad = grad_output.to(torch.float32)
        grad_input = grad_weight = grad_bias = grad_residual = None
        if ctx.needs_input_grad[0]:
            size = (words.shape[0], channels, words.shape[1], words.shape[2])
            grad_input = ops.binary_conv2d_input_grad(grad, weight_words, scale, mask, size, filters, geometry)
            if kept_input is not None:
                grad_input = grad_input * derivative(kept_input, surrogate, encoding)
            grad_input = grad_input.to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = ops.binary_conv2d_weight_grad(
                grad, words, channels, filters, geometry, encoding, padding_value
            )
            dtype, weight_shape = ctx.weight_like
            grad_weight = grad_weight.to(dtype).reshape(weight_shape)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum((0, 2, 3))
        if ctx.needs_input_grad[5]:
            grad_residual = grad_output.to(ctx.residual_dtype)
        return (grad_input, grad_weight, None, None, grad_bias, grad_residual, *(None,) * 6)


def _default_dtype(input: Tensor | PackedTensor, plain: bool) -> torch.dtype:
    if isinstance(input, PackedTensor):
        return torch.int32 if plain else torch.float32
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know meta
        return input.dtype
    return torch.get_autocast_dtype(device)


def _wants_grad(*values: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    for value in values:  # noqa: SIM110  half the time of any() over a generator
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def conv2d(
    input: Tensor | PackedTensor,
    weight: Tensor | PackedWeight,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    padding_value: int = 0,
    encoding: str = "sign",
    surrogate: str = "clip",
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    threshold: float | Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | PackedTensor:
    """Two-dimensional convolution of binary values with binary weights.

    The values are those of torch.nn.functional.conv2d on the +-1 (or 0/1) activations and +-1 weights, exactly.

    Args:
        input: (N, C, H, W): a PackedTensor, or float32, bfloat16 or float16, binarized on the fly.
        weight: (O, C / groups, kh, kw) float, of which the signs count, or a PackedWeight.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d; padding also "same" or "valid".
        padding_value: value of the activations in the padding: 0 (these taps add nothing), +1, or -1 (sign only).
        encoding, surrogate: of a float input: its bits ("sign" or "step") and its straight-through estimator
            (lowbit_ext.binary.surrogates). A PackedTensor brings its own encoding.
        scale: number or (O,): factor of the accumulator. A PackedTensor's own scale, one number, multiplies it.
        bias: (O,), added after scale.
        residual: (N, O, H', W') float, added last.
        threshold: number, (O,), (1, O) or (2, O): gives bits, value >= threshold. Two rows give two bits from one
            value: channels o and O + o of the result.
        flip: bool like threshold: compare with <= there.
        out_dtype: int32, float32, bfloat16 or float16. Default: a float input's dtype (autocast's inside autocast);
            for a PackedTensor int32, or float32 with scale, bias or residual.

    Returns:
        (N, O, H', W') channels-last in memory, or with threshold a PackedTensor of encoding `encoding` (a packed
        input's own) and O or 2 O channels. Float results are round(round(round(scale * acc) + bias) + residual) in
        float32, then rounded once to out_dtype.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Gradient:
        input: straight-through (`surrogate`). Float weight: that of the effective weight scale * sign(weight), taken
        as it is (BinaryDuo); with a scale that itself wants a gradient, that of sign(weight). Scale, bias, residual:
        exact. Packed inputs, packed weights and packed results carry none.
    """
    if isinstance(input, PackedTensor):
        words, channels, encoding, own_scale, precise = input.words, input.channels, input.encoding, input.scale, False
    else:
        _check_input("binary_conv2d", input)
        _check_encoding("binary_conv2d", encoding)
        _check_surrogate("binary_conv2d", surrogate)
        words, channels, own_scale = input, (input.shape[1] if input.dim() > 1 else 0), None
        precise = input.dtype == torch.float64
    if words.dim() != 4:
        raise ValueError(f"binary_conv2d: input must be (N, C, H, W), got {tuple(input.shape)}")
    if not isinstance(weight, PackedWeight) and not (
        precise and isinstance(weight, Tensor) and weight.dtype == torch.float64
    ):
        _check_float("binary_conv2d", "weight", weight)
    if len(weight.shape) != 4:
        raise ValueError(f"binary_conv2d: weight must be (O, C / groups, kh, kw), got {tuple(weight.shape)}")
    filters = weight.shape[0]
    if type(groups) is not int or type(padding_value) is not int:
        groups = _arguments.integer("binary_conv2d", "groups", groups)
        padding_value = _arguments.integer("binary_conv2d", "padding_value", padding_value)
    if groups < 1 or channels != weight.shape[1] * groups:
        raise ValueError(
            f"binary_conv2d: weight has {weight.shape[1]} input channels per group, input has {channels} with "
            f"groups={groups} ({channels / groups if groups else 0:g} per group)"
        )
    if groups > 1 and filters % groups:
        raise ValueError(
            f"binary_conv2d: groups must divide the {channels} input channels and the {filters} filters, got {groups}"
        )
    if isinstance(weight, PackedWeight) and (weight.groups != groups or weight.isa != _native.kernels(words).level):
        weight = _packed_weight(weight.words, weight.shape, groups)
    geometry = geometry_of(weight.shape, stride, padding, dilation, groups)
    if residual is not None:
        _arguments.tensor_like("binary_conv2d", "residual", residual, words)
    if flip is not None and threshold is None:
        raise ValueError("binary_conv2d: flip needs a threshold")
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"binary_conv2d: out_dtype must be int32, float32, bfloat16 or float16, got {out_dtype!r}")
    if precise:
        assert isinstance(input, Tensor)
        if isinstance(weight, PackedWeight) or threshold is not None or out_dtype not in (None, torch.float64):
            raise TypeError(
                "binary_conv2d: float64 input is convolved by torch's operators, for comparisons, and takes neither a "
                "packed weight nor threshold nor another out_dtype"
            )
        return _conv2d_float64(input, weight, geometry, padding_value, encoding, surrogate, scale, bias, residual)
    if out_dtype is None:
        out_dtype = _default_dtype(input, scale is own_scale is bias is residual is None)
    if scale is not None:
        scale = _channel_vector("scale", scale, filters, words)
    if bias is not None:
        bias = _channel_vector("bias", bias, filters, words)
    if own_scale is not None:
        scale = _scaled(own_scale, scale)

    if threshold is None and _wants_grad(input, weight, scale, bias, residual):
        packed_weight = weight if isinstance(weight, PackedWeight) else None
        # A scale that learns needs the accumulator in its gradient: multiply outside, where autograd sees it.
        late = _wants_grad(scale)
        output = _BinaryConv2d.apply(
            words, None if packed_weight is not None else weight, packed_weight, None if late else scale,
            None if late else bias, None if late else residual, channels, geometry, encoding, surrogate, padding_value,
            torch.float32 if late else out_dtype,
        )
        if late:
            ops.output_kind(filters, scale, bias, residual, None, None, out_dtype, output.shape)
            output = output * scale.reshape(-1, 1, 1)  # type: ignore[union-attr]
            output = output if bias is None else output + bias.reshape(-1, 1, 1)
            output = output if residual is None else output + residual
            output = output.to(out_dtype)
        return output

    if threshold is not None:
        exact = scale is None and bias is None and residual is None
        threshold, flip = _thresholds(threshold, flip, filters, exact, words)
    if isinstance(weight, PackedWeight):
        blocked = weight.blocked
    else:
        blocked = ops.binary_conv2d_block_weight(_weight_words(weight), channels, groups)
    if not isinstance(input, PackedTensor):
        words = ops.binarize(words, None, None, DEFAULT_THRESHOLDS[encoding], encoding)
    output = ops.binary_conv2d(
        words, blocked, scale, bias, residual, threshold, flip, channels, filters, geometry, encoding, padding_value,
        out_dtype,
    )  # fmt: skip
    return output if threshold is None else packed_words(output, threshold.shape[0] * filters, encoding)


def _scaled(factor: Tensor, scale: Tensor | None) -> Tensor:
    """A scale times that of a packed input."""
    if factor.numel() != 1:
        raise ValueError(
            "binary_conv2d: a packed input's scale must be one number; values scaled per channel cannot be summed as "
            f"bits, got {tuple(factor.shape)}"
        )
    factor = factor.to(torch.float32).reshape(1)
    return factor if scale is None else factor * scale


def conv1d(
    input: Tensor | PackedTensor,
    weight: Tensor | PackedWeight,
    *,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor | PackedTensor:
    """One-dimensional conv2d: input (N, C, L), weight (O, C / groups, k), result (N, O, L').

    Takes conv2d's arguments with one number in place of each pair; the same exactness, gradients and errors.
    """
    _check_input("binary_conv1d", input)
    _check_weight("binary_conv1d", weight, "(O, C / groups, k)")
    if input.dim() != 3:
        raise ValueError(f"binary_conv1d: input must be (N, C, L), got {tuple(input.shape)}")
    if residual is not None and _arguments.tensor("binary_conv1d", "residual", residual).dim() != 3:
        raise ValueError(f"binary_conv1d: residual must be (N, O, L'), got {tuple(residual.shape)}")
    if not isinstance(padding, str):
        padding = (0, _arguments.integer("binary_conv1d", "padding", padding))  # type: ignore[assignment]
    output = conv2d(
        _insert_axes(input, 1),
        _insert_axes(weight, 1),
        stride=(1, _arguments.integer("binary_conv1d", "stride", stride)),
        padding=padding,
        dilation=(1, _arguments.integer("binary_conv1d", "dilation", dilation)),
        residual=None if residual is None else residual.unsqueeze(2),
        **options,
    )
    if isinstance(output, PackedTensor):
        return packed_words(output.words.squeeze(1), output.channels, output.encoding)
    return output.squeeze(2)


def linear(
    input: Tensor | PackedTensor,
    weight: Tensor | PackedWeight,
    *,
    encoding: str = "sign",
    surrogate: str = "clip",
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    threshold: float | Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | PackedTensor:
    """Matrix product of binary values with binary weights: input (*, C) float or PackedTensor (N, C), weight (O, C).

    The other arguments, the result (*, O), gradients and errors are conv2d's.
    """
    _check_input("binary_linear", input)
    _check_weight("binary_linear", weight, "(O, C)")
    if isinstance(input, PackedTensor):
        if input.dim() != 2:
            raise ValueError(f"binary_linear: packed input must be (N, C), got {tuple(input.shape)}")
        leading = tuple(input.shape[:1])
    else:
        if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"binary_linear: weight has {weight.shape[1]} input features, input has shape {tuple(input.shape)}"
            )
        leading = tuple(input.shape[:-1])
        if input.dim() != 2:
            input = input.reshape(math.prod(leading), input.shape[-1])
    if residual is not None:
        wanted = (*leading, weight.shape[0])
        if _arguments.tensor("binary_linear", "residual", residual).shape != wanted:
            raise ValueError(f"binary_linear: residual must have shape {wanted}, got {tuple(residual.shape)}")
        residual = residual.reshape(math.prod(leading), weight.shape[0], 1, 1)
    output = conv2d(
        _insert_axes(input, 2), _insert_axes(weight, 2), encoding=encoding, surrogate=surrogate, scale=scale,
        bias=bias, threshold=threshold, flip=flip, residual=residual, out_dtype=out_dtype,
    )
    if isinstance(output, PackedTensor):
        return packed_words(output.words.flatten(0, 2), output.channels, output.encoding)
    return output.reshape(*leading, weight.shape[0])


def _insert_axes(value: Any, count: int) -> Any:
    """Adds `count` spatial axes of size 1 before the last ones: what makes a 1-D or 0-D convolution a 2-D one."""
    if isinstance(value, PackedTensor):
        words = value.words.reshape(value.words.shape[0], *(1,) * count, *value.words.shape[1:])
        return packed_words(words, value.channels, value.encoding, value.scale)
    if isinstance(value, PackedWeight):
        shape = (*value.shape[:2], *(1,) * count, *value.shape[2:])
        return unchecked(
            PackedWeight, words=value.words, blocked=value.blocked, shape=shape, groups=value.groups, isa=value.isa
        )
    return value.reshape(*value.shape[:2], *(1,) * count, *value.shape[2:])


# --- pooling ----------------------------------------------------------------------------------------------------------


def _check_packed(op: str, value: Any) -> None:
    if not isinstance(value, PackedTensor):
        raise TypeError(f"{op}: input must be a PackedTensor, got {type(value).__name__}")
    if value.dim() != 4:
        raise ValueError(f"{op}: input must be (N, C, H, W), got {tuple(value.shape)}")
    if value.scale is not None and any(size != 1 for size in value.scale.shape[-2:]):
        raise ValueError(
            f"{op}: input's scale must be the same for all pixels, got shape {tuple(value.scale.shape)}"
        )


def _window(
    op: str, kernel_size: Pair, stride: Pair | None, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Window:
    kernel = _arguments.pair(op, "kernel_size", kernel_size)
    strides = kernel if stride is None else _arguments.pair(op, "stride", stride)
    paddings, dilations = _arguments.pair(op, "padding", padding), _arguments.pair(op, "dilation", dilation)
    return Window(*kernel, *strides, *paddings, *dilations, int(_arguments.flag(op, "ceil_mode", ceil_mode)))


def max_pool2d(
    input: PackedTensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    invert: Tensor | None = None,
) -> PackedTensor:
    """Maximum over windows of a packed tensor, as torch.nn.functional.max_pool2d on its values; stays packed.

    Args:
        input: PackedTensor (N, C, H, W); its scale, if any, the same for all pixels and not negative.
        kernel_size, stride, padding, dilation, ceil_mode: as torch.nn.functional.max_pool2d.
        invert: words (ceil(C / 64),): channels whose bit is set take the minimum instead.

    Raises:
        TypeError, ValueError: not a four-dimensional PackedTensor, a geometry torch refuses, or one with a window that
            a wide dilation leaves without a pixel: torch gives -inf there, which no bit stands for.
    """
    op = "binary_max_pool2d"
    _check_packed(op, input)
    if input.scale is not None and _oplib._is_eager() and bool((input.scale < 0).any()):
        raise ValueError(f"{op}: input's scale must not be negative, which makes a maximum of bits a minimum of values")
    if invert is not None:
        _arguments.tensor_like(op, "invert", invert, input.words)
        if invert.shape == (words_for(input.channels),) and invert.dtype == torch.int64:
            invert = clear_tail(invert, input.channels)
    window = _window(op, kernel_size, stride, padding, dilation, ceil_mode)
    words = ops.binary_max_pool2d(input.words, invert, input.channels, window)
    for axis in (0, 1):
        size, dilations = input.words.shape[1 + axis], window.dilation
        geometry = (window.stride[axis], window.padding[axis], dilations[axis])
        if dilations[axis] > size and _misses_image(size, words.shape[1 + axis], *geometry):
            raise ValueError(
                f"{op}: dilation {list(dilations)} leaves a window without a pixel of the image "
                f"{tuple(input.words.shape[1:3])}: torch gives -inf there, which no bit stands for"
            )
    return packed_words(words, input.channels, input.encoding, input.scale)


def _misses_image(size: int, windows: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether taps `dilation` apart step over the whole image in one of the windows that begin in the padding.

    By the pigeonhole principle it is one of the first size + 1 of them, or none.
    """
    starts = range(-padding, 0, stride)[: min(windows, size + 1)]
    return any(start % dilation >= size for start in starts)


def avg_pool2d(
    input: PackedTensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows of a packed tensor, as torch.nn.functional.avg_pool2d on its values.

    Args:
        input: PackedTensor (N, C, H, W); its scale, if any, the same for all pixels.
        kernel_size, stride, padding, ceil_mode, count_include_pad: as torch.nn.functional.avg_pool2d.
        divisor_override: divides the sums in place of the number of pixels; at least 1.

    Returns:
        float32 (N, C, H', W'), channels-last in memory.

    Raises:
        TypeError, ValueError: not a four-dimensional PackedTensor, or a geometry torch refuses.
    """
    op = "binary_avg_pool2d"
    _check_packed(op, input)
    divisor = 0  # none
    if divisor_override is not None:
        divisor = _arguments.integer(op, "divisor_override", divisor_override, 1, 2**63 - 1)
    window = _window(op, kernel_size, stride, padding, 1, ceil_mode)
    include = _arguments.flag(op, "count_include_pad", count_include_pad)
    output = ops.binary_avg_pool2d(input.words, input.channels, window, include, divisor, input.encoding)
    return output if input.scale is None else output * input.scale


def global_avg_pool(input: PackedTensor) -> Tensor:
    """Mean over all pixels of a packed tensor (N, C, H, W) of at least one pixel: float32 (N, C, 1, 1)."""
    _check_packed("global_avg_pool", input)
    size = tuple(input.words.shape[1:3])
    if 0 in size:
        raise ValueError(f"global_avg_pool: input must have pixels, got {tuple(input.shape)}")
    return avg_pool2d(input, size)


# --- activation -------------------------------------------------------------------------------------------------------


class _QuantizedActivation(torch.autograd.Function):
    """Levels in the input's dtype. A surrogate that is an interval saves one bit an element, "identity" nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, levels: str, surrogate: str) -> Tensor:
        interval = INTERVALS.get((surrogate, levels))
        if interval is not None:
            low, high, closed = interval.low, interval.high, interval.closed
            output, mask = ops.quantized_activation_with_mask(input, levels, low, high, closed)
            ctx.save_for_backward(mask)
        else:
            output = ops.quantized_activation(input, levels)
            ctx.save_for_backward(None if surrogate == "identity" else input)
        ctx.call = (levels, surrogate, output.stride())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        levels, surrogate, strides = ctx.call
        interval = INTERVALS.get((surrogate, levels))
        if interval is not None:
            grad_output = ops.masked_gradient(_with_strides(grad_output, strides), kept)
            grad_output = grad_output if interval.slope == 1 else grad_output * interval.slope
        elif kept is not None:
            grad_output = grad_output * derivative(kept, surrogate, levels)
        return grad_output, None, None


def _with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The tensor in the memory order of another: itself where it has it."""
    if tensor.stride() == tuple(strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def quantized_activation(op: str, x: Tensor, levels: str, surrogate: str) -> Tensor:
    """What binary_activation and BinaryDuo's activations share; `op` names the caller in messages."""
    _arguments.tensor(op, "input", x, (*_arguments.FLOATS, torch.float64))
    _check_surrogate(op, surrogate)
    if x.dtype == torch.float64:
        return _DenseActivation.apply(x, levels, surrogate)
    if _wants_grad(x):
        return _QuantizedActivation.apply(x, levels, surrogate)
    return ops.quantized_activation(x, levels)


class _DenseActivation(torch.autograd.Function):
    """The same from torch's operators, for float64, in which networks are compared."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, levels: str, surrogate: str) -> Tensor:
        ctx.save_for_backward(input)
        ctx.call = (surrogate, levels)
        if levels == "sign":
            return torch.where(input >= 0, 1.0, -1.0).to(input.dtype)
        if levels == "step":
            return (input >= 0.5).to(input.dtype)
        return ((input >= 0.25).to(input.dtype) + (input >= 0.75).to(input.dtype)) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (input,) = ctx.saved_tensors
        return grad_output * derivative(input, *ctx.call), None, None


def binary_activation(x: Tensor, encoding: str = "sign", surrogate: str = "clip") -> Tensor:
    """sign(x) in {-1, +1} (sign(0) = +1) or the step 1[x >= 1/2] in {0, 1}, with a straight-through gradient.

    Args:
        x: any shape, float32, bfloat16, float16, or float64 (by torch's operators, for comparisons).
        encoding: "sign" or "step".
        surrogate: a name of lowbit_ext.binary.surrogates.SURROGATES.

    Returns:
        Tensor of x's shape, dtype and, where x is dense, memory order. A NaN gives -1 or 0.

    Raises:
        TypeError: wrong dtype. ValueError: unknown encoding or surrogate.
    """
    _check_encoding("binary_activation", encoding)
    return quantized_activation("binary_activation", x, encoding, surrogate)


def invert_words(flip: Tensor) -> Tensor:
    """Bool (C,) as words (ceil(C / 64),): the `invert` of max_pool2d."""
    return ops.binarize(flip.reshape(1, -1).to(torch.float32), None, None, 0.5, "step").reshape(words_for(flip.numel()))
