"""The forms in which saved_tensors keeps a tensor, and which derivative asks for which.

A code's error is a part of its group's range. A derivative that multiplies by the value passes it on as it is; one that
divides by the value, takes its exponential or compares it with a threshold may make any error of it. So the form
follows from the function that runs and from the one that made the tensor: the table of torch's derivatives is in
docs/lowmem.md. Tensors are encoded flat, in the order of memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_ext.lowmem import ops

FINE_BITS = 8  # where a derivative bends at the value, or multiplies its error
_SAMPLED_GROUPS = 32  # each costs a cache miss
_DISTINCT = 16  # values of a dictionary
# Elements below a fiftieth of a step are lost; more than a tenth of them, as of logits with a mask of -1e4 among them,
# and codes are no use. Of normal elements in 4 bits these are 0.6 %, of their squares 9 %.
_LOST, _LOST_SHARE = 50, 0.1
_LOGIT_LIMIT = 17.0  # float32 has no number between sigmoid(17) and 1
_LOG_PROBABILITY_LIMIT = -30.0  # exp(-30) is nothing beside the 1 that probabilities add up to


class Form(NamedTuple):
    """How a tensor is kept: a name, and the bounds of "sides" or the length of "rows"."""

    name: str
    numbers: tuple[float, ...] = ()


EXACT = Form("exact")
CODES = Form("codes")
FINE = Form("fine")  # codes of 8 bits
HALF = Form("half")  # bfloat16: an error of 1/512 of the value itself
LOGIT = Form("logit")  # codes of log(p / (1 - p)): p and 1 - p have a small error of themselves
LOG_PROBABILITY = Form("log_probability")  # codes above -30: exp has a small error of itself


class Encoded(NamedTuple):
    """What is kept of a tensor, and the function that reads it."""

    tensors: tuple[Tensor, ...]
    decode: Callable[..., Tensor]


# --- bits and integers ------------------------------------------------------------------------------------------------


def pack_bits(bits: Tensor) -> Tensor:
    """Bools, eight a byte, the first in the lowest bit."""
    bytes = F.pad(bits.view(torch.uint8), (0, -bits.numel() % 8)).view(torch.int64)
    # The product has the bit of byte i at 56 + i, and no two of its other bits at one place.
    return (bytes * sum(1 << 56 - 7 * i for i in range(8)) >> 56).to(torch.uint8)


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """The first `count` bools."""
    copies = words.to(torch.int64) * 0x0101010101010101
    picked = copies & (sum(1 << 9 * i for i in range(7)) - (1 << 63))  # bit i of byte i
    return picked.view(torch.uint8)[:count] != 0


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    rows = F.pad(codes.to(torch.uint8), (0, -codes.numel() % (8 // bits))).reshape(-1, 8 // bits)
    return (rows << torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)).sum(1, dtype=torch.uint8)


def _unpack_codes(words: Tensor, bits: int, count: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return (words[:, None] >> shifts & (2**bits - 1)).reshape(-1)[:count]


def bools(flat: Tensor) -> Encoded:
    """A bit an element."""
    count = flat.numel()
    return Encoded((pack_bits(flat),), lambda words: unpack_bits(words, count))


def integers(flat: Tensor) -> Encoded:
    """The narrowest type, of indices as pooling has them."""
    low, high = (int(value) for value in torch.aminmax(flat))
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return Encoded((flat.to(dtype),), lambda narrow: narrow.to(torch.int64))
    return Encoded((flat.clone(),), lambda kept: kept)


def _sides(flat: Tensor, low: float, high: float, ends: bool) -> Encoded:
    """A bit an element, between low and high or not, the `ends` included or not; read as a value on that side."""
    count, dtype = flat.numel(), flat.dtype
    inner = (low + high) / 2 if math.isfinite(low + high) else low + 1 if math.isfinite(low) else high - 1
    outer = low - 1 if math.isfinite(low) else high + 1

    def decode(words: Tensor) -> Tensor:
        within, outside = (torch.tensor(value, dtype=dtype, device=words.device) for value in (inner, outer))
        return torch.where(unpack_bits(words, count), within, outside)

    inside = (flat >= low) & (flat <= high) if ends else (flat > low) & (flat < high)
    return Encoded((pack_bits(inside),), decode)


def dictionary(flat: Tensor) -> Encoded | None:
    """At most 16 values as they are and a code of 1, 2 or 4 bits for each element; None of other tensors."""
    count = flat.numel()
    values = flat[:: -(-count // 256)].unique()  # of a sample, before all are sorted
    if len(values) > _DISTINCT:
        return None
    if len(values) <= 2:
        low, high = values[0], values[-1]
        is_high = flat == high
        if bool((is_high | (flat == low)).all()):
            return Encoded(
                (pack_bits(is_high), values), lambda words, values: torch.where(
                    unpack_bits(words, count), values[-1], values[0]
                )
            )
    values = flat.unique()
    if len(values) > _DISTINCT or bool(values.isnan().any()):
        return None
    bits = 2 if len(values) <= 4 else 4
    words = _pack_codes(torch.searchsorted(values, flat), bits)
    return Encoded((words, values), lambda words, values: values[_unpack_codes(words, bits, count).int()])


# --- floats -----------------------------------------------------------------------------------------------------------


def _codes(
    flat: Tensor, bits: int, seed: Tensor | None, unresolved: Callable[[Tensor], Encoded | None] | None = None
) -> Encoded | None:
    """Codes in groups of 256, zeros exact where the smallest element is 0; None where an element is not finite.

    `unresolved` takes what codes do not resolve.
    """
    count, dtype, low = flat.numel(), flat.dtype, float(flat.amin())
    if not math.isfinite(low):  # NaN included
        return None
    # Elsewhere to raise small elements from code 0 would be a bias for nothing.
    kept = ops.group_quantize(flat, bits, low == 0, seed, 0)
    greatest = float(kept[1].amax())  # of steps and minima
    if not greatest * (2**bits - 1) < torch.finfo(dtype).max:
        return None
    if unresolved is not None and not _is_resolved(flat, kept[1], greatest):
        return unresolved(flat)
    return Encoded(kept, lambda codes, scales: ops.group_dequantize(codes, scales, (count,), False, dtype, bits))


def _rows(flat: Tensor, length: int, bits: int) -> Encoded:
    """Codes between minimum and maximum of each row, where groups of 256 would span rows of different scales."""
    rows, dtype, span = flat.view(1, -1, length), flat.dtype, 1.0
    low, high = (extreme.float() for extreme in torch.aminmax(rows[0], dim=1))
    middle, extent, zeros = (low + high) / 2, high - low, torch.zeros_like(low)
    inverse = torch.where(extent > torch.finfo(torch.float32).tiny, 1 / extent, 0.0)
    codes, shape = ops.batch_norm_quantize(rows, middle, inverse, extent, zeros, bits, span), tuple(rows.shape)

    def decode(codes: Tensor, extent: Tensor, middle: Tensor) -> Tensor:
        # Around the row's middle: the kernel's grid, which has an edge at 0, would not reach rows that are far from it.
        zeros = torch.zeros_like(extent)
        found = ops.channel_dequantize(codes, extent, zeros, shape, False, dtype, bits, span, False)
        return (found + middle.to(dtype)[:, None]).reshape(-1)

    return Encoded((codes, extent, middle), decode)


def _half(flat: Tensor) -> Encoded | None:
    """bfloat16; None where that is no saving, or the greatest numbers become infinite."""
    dtype, half = flat.dtype, flat.to(torch.bfloat16)
    if dtype != torch.float32 or bool(half.isinf().any()):
        return None
    return Encoded((half,), lambda kept: kept.to(dtype))


def _logit(flat: Tensor, seed: Tensor | None) -> Encoded | None:
    dtype = flat.dtype
    logits = flat.float().logit().clamp_(-_LOGIT_LIMIT, _LOGIT_LIMIT)
    found = _codes(logits, FINE_BITS, seed)
    return found and Encoded(found.tensors, lambda *kept: found.decode(*kept).sigmoid_().to(dtype))


def encode(flat: Tensor, form: Form, bits: int, seed: Tensor | None) -> Encoded | None:
    """A flat tensor in a form; None of one that is to be kept as it is."""
    if flat.dtype == torch.bool:
        return bools(flat)
    if flat.dtype == torch.int64:
        return integers(flat)
    if form.name in ("sides", "sides_and_ends"):
        low, high = form.numbers
        return _sides(flat, low, high, form.name == "sides_and_ends")
    if form.name == "rows":
        return _rows(flat, int(form.numbers[0]), bits)
    if form.name == "half":
        return _half(flat)
    if form.name == "logit":
        return _logit(flat, seed)
    if form.name == "log_probability":
        return _codes(flat.clamp(min=_LOG_PROBABILITY_LIMIT), FINE_BITS, seed)
    if form in (CODES, FINE):
        return _codes(flat, bits if form == CODES else FINE_BITS, seed, _half)
    return None


def _is_resolved(flat: Tensor, scales: Tensor, greatest: float) -> bool:
    """Whether codes tell the elements from 0: looks at 16 neighbours in each of up to 32 groups.

    Mostly one look is enough, at what the `greatest` step would lose: 6 us.
    """
    whole = flat.numel() // ops.GROUP
    stride = max(-(-whole // _SAMPLED_GROUPS), 1)
    groups = -(-whole // stride)
    # Seven further from group to group: not always the borders of images.
    sample = flat.as_strided((groups, 16), (ops.GROUP * stride + 7, 1)) if whole else flat
    count = sample.numel()
    most = _LOST_SHARE * count
    lost = count - int(torch.hardshrink(sample, greatest / _LOST).count_nonzero())
    if lost <= most:
        return True
    zeros = count - int(sample.count_nonzero())
    if lost - zeros <= most:
        return True
    steps = scales.as_strided((groups, 1), (2 * stride, 1)) if whole else scales[0, 0]
    return count - zeros - int(torch.hardshrink(sample / steps, 1 / _LOST).count_nonzero()) <= most


# --- which form -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """A function of torch that runs: its name without the underscore of in-place forms, and its arguments."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def curve(self) -> Callable[[Tensor], Tensor] | None:
        """The function of one element that it is, where its result is worth no codes beside its argument's."""
        if self.name == "gelu":
            return functools.partial(F.gelu, approximate=self.kwargs.get("approximate", "none"))
        return {"silu": F.silu, "hardswish": F.hardswish, "mish": F.mish}.get(self.name)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def gives(self, x: Tensor, index: int, name: str) -> bool:
        """Whether x is that argument, or a view of it."""
        value = self.argument(index, name)
        return isinstance(value, Tensor) and value.untyped_storage()._cdata == x.untyped_storage()._cdata

    def is_input(self, x: Tensor) -> bool:
        """Whether x has as many elements as the first argument."""
        value = self.argument(0, "input")
        return isinstance(value, Tensor) and value.numel() == x.numel()


def _norm(x: Tensor, call: Call) -> Form:
    """Statistics are few, and multiply everything. Rows have scales of their own: that of a class token is another."""
    if not call.is_input(x):
        return EXACT
    shape = call.argument(1, "normalized_shape")
    if call.name in ("layer_norm", "rms_norm") and x.is_contiguous() and math.prod(shape) % ops.GROUP:
        return Form("rows", (math.prod(shape),))
    return CODES


def _attention(x: Tensor, call: Call) -> Form:
    """Backward, probabilities are the exponential of the logits, with their mask, less the exact sums of the rows."""
    if not x.requires_grad or call.gives(x, 3, "attn_mask"):
        return EXACT
    return FINE if call.gives(x, 0, "query") or call.gives(x, 1, "key") else CODES


def _division(x: Tensor, call: Call) -> Form:
    return CODES if call.gives(x, 0, "input") and not call.gives(x, 1, "other") else HALF


def _power(x: Tensor, call: Call) -> Form:
    exponent = call.argument(1, "exponent")
    return CODES if isinstance(exponent, int | float) and exponent >= 1 else HALF


def _sides_of(low: float | None, high: float | None = None, ends: bool = False) -> Form:
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    return Form("sides_and_ends" if ends else "sides", bounds)


def _clamp(x: Tensor, call: Call) -> Form:
    low, high = call.argument(1, "min"), call.argument(2, "max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return HALF
    return _sides_of(low, high, ends=True)


def _hardtanh(x: Tensor, call: Call) -> Form:
    return _sides_of(call.argument(1, "min_val", -1.0), call.argument(2, "max_val", 1.0))


def _shrink(x: Tensor, call: Call) -> Form:
    bound = call.argument(1, "lambd", 0.5)
    return _sides_of(-bound, bound, ends=True)


# By the function that keeps a tensor, which may be one of several of its arguments and results.
_OF_FUNCTION: dict[str, Form | Callable[[Tensor, Call], Form]] = {
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"), _norm),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": lambda x, call: CODES if x.requires_grad else EXACT,
    # Thresholds.
    "hardtanh": _hardtanh, "relu6": _sides_of(0.0, 6.0), "hardsigmoid": _sides_of(-3.0, 3.0),
    "leaky_relu": _sides_of(0.0), "threshold": lambda x, call: _sides_of(call.argument(1, "threshold")),
    **dict.fromkeys(("clamp", "clip"), _clamp), **dict.fromkeys(("hardshrink", "softshrink"), _shrink),
    "clamp_min": lambda x, call: _sides_of(call.argument(1, "min"), ends=True),
    "clamp_max": lambda x, call: _sides_of(None, call.argument(1, "max"), ends=True),
    **dict.fromkeys(("abs", "maximum", "minimum", "fmax", "fmin"), HALF),
    # Comparisons with a result, indices and coordinates that are floats, and what divides by differences or products.
    **dict.fromkeys(("max", "min", "amax", "amin", "prod", "cumprod", "cdist", "pdist", "dist", "ctc_loss"), EXACT),
    "grid_sample": lambda x, call: EXACT if call.gives(x, 1, "grid") else CODES,
    # Curves.
    **dict.fromkeys(("silu", "gelu", "hardswish", "mish", "softplus", "elu", "celu", "selu", "logsigmoid"), FINE),
    # Quotients and exponentials.
    **dict.fromkeys(("div", "true_divide", "divide"), _division), "pow": _power, "float_power": _power,
    **dict.fromkeys((
        "log", "log2", "log10", "log1p", "logsumexp", "logaddexp", "addcdiv", "atan2", "acos", "asin", "acosh", "atanh",
        "tan", "erfinv", "logit", "digamma", "lgamma", "xlogy", "kl_div", "norm", "hypot",
    ), HALF),
    "binary_cross_entropy": lambda x, call: LOGIT if x.requires_grad else EXACT,
}
# By the node that made a tensor, whoever keeps it: results that their own derivative reads.
_OF_RESULT = {
    "SigmoidBackward0": LOGIT, "LogSoftmaxBackward0": LOG_PROBABILITY,
    **dict.fromkeys((
        "ExpBackward0", "Exp2Backward0", "Expm1Backward0", "SqrtBackward0", "RsqrtBackward0", "ReciprocalBackward0",
        "TanBackward0", "PowBackward1", "LinalgVectorNormBackward0", "NormBackward1", "LogsumexpBackward0",
        "StdBackward0",
    ), HALF),
}


def form_of(x: Tensor, call: Call | None) -> Form:
    """The form of a float tensor that autograd keeps while `call` runs, None of what no function of torch keeps."""
    if x.grad_fn is not None and x.grad_fn.name() in _OF_RESULT:
        return _OF_RESULT[x.grad_fn.name()]
    if call is None:
        return CODES
    rule = _OF_FUNCTION.get(call.name)
    if rule is None:
        risky = call.name.startswith("linalg_") or call.name.endswith("_loss")
        return (HALF if x.requires_grad else EXACT) if risky else CODES
    return rule if isinstance(rule, Form) else rule(x, call)
