"""What the results of fuzz_api's calls must equal, from the slow definitions of tests/reference and torch.

Each function takes the arguments of a call and its result, and returns what is wrong with the result, or "". Where
torch refuses the arguments it raises, which is a finding as well. Bits past the last channel count as zeros, negated
views and subclasses as what torch makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_ext import PackedTensor, binary
from reference import binary as slow

THRESHOLDS = {"sign": 0.0, "step": 0.5}
SURROUNDINGS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, of one rounding and a few

Arguments = Mapping[str, Any]


def plain(x: Any) -> Tensor:
    """The elements of a tensor of any kind, in float64 on the CPU."""
    x = x.detach()
    if hasattr(x, "a"):  # TwoTensor, twice the same
        x = x.a
    return x.as_subclass(Tensor).resolve_neg().to("cpu", torch.float64)


def bits(words: Tensor, channels: int) -> Tensor:
    """(..., W) as bools (..., channels)."""
    index = torch.arange(channels)
    return (words[..., index // 64] >> index % 64 & 1).bool()


def values_of(packed: PackedTensor) -> Tensor:
    """(N, C, *spatial) in float64."""
    ones = bits(packed.words, packed.channels).movedim(-1, 1).double()
    values = ones if packed.encoding == "step" else 2 * ones - 1
    return values if packed.scale is None else values * plain(packed.scale)


def unlike(result: Tensor, expected: Tensor, tolerance: float = 0.0) -> str:
    """What differs, or ""."""
    if result.is_meta:
        return "" if result.shape == expected.shape else f"shape {tuple(result.shape)}, not {tuple(expected.shape)}"
    got = plain(result)
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    size = expected.nan_to_num(0, 0, 0).abs().max() if expected.numel() else 0
    if torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(size), equal_nan=True):
        return ""
    return f"values differ: {got.flatten()[:8].tolist()}, not {expected.flatten()[:8].tolist()}"


def unlike_packed(result: PackedTensor, expected: Tensor) -> str:
    """What differs from values, tail bits included, or ""."""
    if result.words.is_meta:
        return ""
    clean = bits(result.words, result.channels)
    tail = result.channels % 64
    if tail and bool((result.words[..., -1] >> tail).any()):
        return "bits past the last channel are set"
    return unlike(values_of(result), expected) if clean.numel() or expected.numel() else ""


# --- packing ----------------------------------------------------------------------------------------------------------


def packed_tensor(a: Arguments, result: PackedTensor) -> str:
    if result.words.is_meta or a["words"].is_meta:
        return ""
    made = values_of(result)
    wanted = bits(plain_words(a["words"]), result.channels).movedim(-1, 1).double()
    wanted = wanted if result.encoding == "step" else 2 * wanted - 1
    return unlike_packed(result, wanted if result.scale is None else wanted * plain(result.scale)) or unlike(
        result.unpack(), made, 1e-6
    )


def plain_words(words: Any) -> Tensor:
    return (words.a if hasattr(words, "a") else words).as_subclass(Tensor).resolve_neg()


def unpack(a: Arguments, result: Tensor) -> str:
    if result.is_meta:
        return ""
    dtype = a.get("dtype", torch.float32)
    return unlike(result, values_of(a["packed"]), SURROUNDINGS[dtype] if a["packed"].scale is not None else 0)


def binarize(a: Arguments, result: PackedTensor) -> str:
    if result.words.is_meta:
        return ""
    x, encoding = plain(a["x"]), a.get("encoding", "sign")
    threshold, flip = a.get("threshold"), a.get("flip")
    threshold = THRESHOLDS[encoding] if threshold is None else threshold
    bounds = plain(threshold).float().double() if isinstance(threshold, Tensor) else torch.tensor(float(threshold))
    bounds = bounds.float().double()
    rows = 2 if bounds.dim() == 2 and bounds.shape[0] == 2 else 1
    bounds = bounds.reshape(rows, -1).expand(rows, x.shape[1])
    flips = torch.zeros(rows, x.shape[1]) if flip is None else plain(flip).reshape(rows, -1)
    parts = [slow.activation(x, encoding, row, turned.bool()) for row, turned in zip(bounds, flips, strict=True)]
    return unlike_packed(result, torch.cat(parts, 1))


def pack_weight(a: Arguments, result: binary.PackedWeight) -> str:
    return "" if result.words.is_meta else unlike(result.unpack(), slow.sign(plain(a["weight"])))


def weight(a: Arguments, result: binary.PackedWeight) -> str:
    """A packed weight does what its words say."""
    if result.words.is_meta or result.isa != binary.pack_weight(torch.ones(1, 1)).isa:
        return ""
    filters, channels, *kernel = result.shape
    x = torch.randn(1, channels * result.groups, *(size + 1 for size in kernel))
    call = (binary.linear, binary.conv1d, binary.conv2d)[len(kernel)]
    options = {"groups": result.groups} if kernel else {}
    expected = {"input": x, "weight": result.unpack(), **options}
    got = call(x, result, **options)
    return conv(expected, got, len(kernel)) or ("" if filters else "no filters")


def from_words(a: Arguments, result: binary.PackedWeight) -> str:
    if result.words.is_meta:
        return ""
    signs = 2 * bits(plain_words(a["words"]), result.shape[1]).double() - 1
    wanted = signs.movedim(-1, 1).reshape(result.shape)
    return unlike(result.unpack(), wanted) or weight(a, result)


# --- convolution ------------------------------------------------------------------------------------------------------


def _geometry(a: Arguments, dims: int, kernel: tuple[int, ...]) -> tuple[Any, ...]:
    """Stride, (left, right) padding and dilation of each dimension."""

    def each(value: Any) -> list[Any]:
        sizes = list(value) if isinstance(value, (tuple, list)) else [value]
        return sizes * dims if len(sizes) == 1 else sizes

    def both(side: Any) -> tuple[int, int]:
        return (int(side[0]), int(side[-1])) if isinstance(side, (tuple, list)) else (int(side), int(side))

    stride, dilation = ([int(size) for size in each(a.get(name, 1))] for name in ("stride", "dilation"))
    padding = a.get("padding", 0)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = [padding] if dims == 1 else each(padding)
        sides = [both(side) for side in ([0] * dims if isinstance(a.get("padding"), str) else padding)]
    return stride, sides, dilation


def conv_size(a: Arguments, dims: int) -> tuple[int, ...]:
    """Shape of a convolution's result."""
    input, weight = a["input"], a["weight"]
    if dims == 0:
        return (*input.shape[:-1], weight.shape[0])
    stride, sides, dilation = _geometry(a, dims, tuple(weight.shape[2:]))
    space = [
        (size + before + after - step * (kernel - 1) - 1) // move + 1
        for size, (before, after), step, kernel, move in zip(
            input.shape[2:], sides, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return (input.shape[0], weight.shape[0], *space)


def conv(a: Arguments, result: Any, dims: int) -> str:
    """conv2d, conv1d and linear, dims 2, 1 and 0, as convolutions of two dimensions in float64."""
    input, weight = a["input"], a["weight"]
    packed, encoding = isinstance(input, PackedTensor), a.get("encoding", "sign")
    encoding = input.encoding if packed else encoding
    if (result.words if isinstance(result, PackedTensor) else result).is_meta:
        return ""
    x = values_of(input) if packed else slow.activation(plain(input), encoding, THRESHOLDS[encoding])
    signs = slow.sign(plain(weight.unpack() if isinstance(weight, binary.PackedWeight) else weight))
    leading = x.shape[:-1] if dims == 0 else ()
    if dims == 0:
        x = x.reshape(-1, x.shape[-1])
    ones = (1,) * (2 - dims)
    stride, sides, dilation = _geometry(a, dims, tuple(signs.shape[2:]))
    sides = [(0, 0)] * (2 - dims) + sides
    acc = slow.conv2d(
        x.reshape(*x.shape[:2], *ones, *x.shape[2:]), signs.reshape(*signs.shape[:2], *ones, *signs.shape[2:]),
        (*ones, *stride), (sides[0][0], sides[1][0], sides[0][1], sides[1][1]), (*ones, *dilation),
        int(a.get("groups", 1)), a.get("padding_value", 0) * (float(input.scale) if packed and input.scale is not None
                                                              else 1),
    )
    acc = acc.reshape(*acc.shape[:2], *acc.shape[4 - dims :]) if dims else acc.reshape(*leading, acc.shape[1])
    axis = acc.dim() - 1 if dims == 0 else 1
    value = acc
    if a.get("scale") is not None:
        scale = _vector(a["scale"], acc, axis)
        if getattr(weight, "requires_grad", False) and not bool((scale.abs() < 1e300).all()):
            return ""  # the gradient of a latent weight needs the scale within the sum, where inf - inf is NaN
        value = value * scale
    if a.get("bias") is not None:
        value = value + _vector(a["bias"], acc, axis)
    if a.get("residual") is not None:
        residual = plain(a["residual"])
        if residual.shape != acc.shape:
            return f"a residual {tuple(residual.shape)} of a result {tuple(acc.shape)} was taken"
        value = value + residual
    if a.get("threshold") is not None:
        return _unlike_bits(a, result, value.reshape(-1, value.shape[-1]) if dims == 0 else value, encoding)
    dtype = result.dtype
    if dtype == torch.int32:
        return unlike(result, value)
    return unlike(result, value.to(dtype).double(), 1e-9 if dtype == torch.float64 else SURROUNDINGS[dtype])


def _vector(value: Any, like: Tensor, axis: int) -> Tensor:
    numbers = plain(value) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    filters = like.shape[axis]
    return numbers.double().reshape(-1).expand(filters).reshape(-1, *(1,) * (like.dim() - 1 - axis))


def _unlike_bits(a: Arguments, result: PackedTensor, value: Tensor, encoding: str) -> str:
    """Bits of value >= threshold; near the threshold float32's rounding may decide."""
    filters = value.shape[1]
    given, flip = a["threshold"], a.get("flip")
    threshold = plain(given) if isinstance(given, Tensor) else torch.tensor(float(given), dtype=torch.float64)
    rows = threshold.shape[0] if threshold.dim() == 2 else 1
    threshold = threshold.expand(rows, filters)
    flips = torch.zeros(rows, filters) if flip is None else plain(flip).expand(rows, filters)
    if result.channels != rows * filters or result.encoding != encoding:
        return f"{result.channels} channels of encoding {result.encoding!r}"
    got = bits(result.words, result.channels).movedim(-1, 1)
    exact = all(a.get(name) is None for name in ("scale", "bias", "residual"))
    exact = exact and getattr(a["input"], "scale", None) is None
    for row in range(rows):
        bound, turned = (part[row].reshape(-1, *(1,) * (value.dim() - 2)) for part in (threshold, flips))
        wanted = torch.where(turned.bool(), value <= bound, value >= bound)
        near = torch.zeros_like(wanted) if exact else (value - bound).abs() <= 1e-5 * (1 + value.abs() + bound.abs())
        if bool(((got[:, row * filters : (row + 1) * filters] != wanted) & ~near & ~(value - bound).isnan()).any()):
            return f"bits of threshold {row} differ"
    tail = result.channels % 64
    return "bits past the last channel are set" if tail and bool((result.words[..., -1] >> tail).any()) else ""


def conv2d(a: Arguments, result: Any) -> str:
    return conv(a, result, 2)


def conv1d(a: Arguments, result: Any) -> str:
    return conv(a, result, 1)


def linear(a: Arguments, result: Any) -> str:
    return conv(a, result, 0)


def matmul(a: Arguments, result: Tensor) -> str:
    if result.is_meta:
        return ""
    values, scales, scale = [], [], a.get("scale")
    if scale is not None:
        scales.append(plain(scale) if isinstance(scale, Tensor) else torch.tensor(float(scale), dtype=torch.float64))
    for name in ("a", "b"):
        operand = a[name]
        if isinstance(operand, PackedTensor):
            ones = bits(plain_words(operand.words), operand.channels).double()  # K last
            rows = ones if operand.encoding == "step" else 2 * ones - 1
            scales += [] if operand.scale is None else [plain(operand.scale)]
        else:
            encoding = a.get(f"{name}_encoding", "sign")
            rows = slow.activation(plain(operand), encoding, THRESHOLDS[encoding])
            rows = rows if name == "a" else rows.mT
        values.append(rows)
    wanted = slow.matmul(values[0], values[1].mT)
    if scales:  # factors are float32, and may have overflowed there
        factors = torch.stack([factor.reshape(()) for factor in scales])
        wanted = wanted * factors.to(torch.promote_types(result.dtype, torch.float32)).prod().double()
    wanted = wanted.to(result.dtype).double()
    return unlike(result, wanted, SURROUNDINGS.get(result.dtype, 0))


# --- pooling, activations, products -----------------------------------------------------------------------------------


def _pooling(a: Arguments, *names: str) -> dict[str, Any]:
    def ints(value: Any) -> Any:
        if isinstance(value, (bool, type(None))):
            return value
        return tuple(map(int, value)) if isinstance(value, (tuple, list)) else int(value)

    names = ("kernel_size", "stride", "padding", "ceil_mode", *names)
    return {name: ints(a[name]) for name in names if name in a}


def max_pool2d(a: Arguments, result: PackedTensor) -> str:
    if result.words.is_meta:
        return ""
    x, options = values_of(a["input"]), _pooling(a, "dilation")
    wanted = F.max_pool2d(x, **options)
    if a.get("invert") is not None:
        lowest = -F.max_pool2d(-x, **options)
        wanted = torch.where(bits(a["invert"], x.shape[1]).reshape(-1, 1, 1), lowest, wanted)
    return unlike_packed(result, wanted)


def avg_pool2d(a: Arguments, result: Tensor) -> str:
    return "" if result.is_meta else unlike(
        result, F.avg_pool2d(values_of(a["input"]), **_pooling(a, "count_include_pad", "divisor_override")), 1e-6
    )


def global_avg_pool(a: Arguments, result: Tensor) -> str:
    if result.is_meta:
        return ""
    mean = values_of(PackedTensor(a["input"].words, a["input"].channels, a["input"].encoding)).mean((2, 3), True)
    scale = a["input"].scale
    return unlike(result, mean if scale is None else mean * plain(scale), 1e-6)


def _levels(a: Arguments, result: Tensor, encoding: str) -> str:
    return "" if result.is_meta else unlike(result, slow.activation(plain(a["x"]), encoding, THRESHOLDS[encoding]))


def activation(a: Arguments, result: Tensor) -> str:
    return _levels(a, result, a.get("encoding", "sign"))


def step(a: Arguments, result: Tensor) -> str:
    return _levels(a, result, "step")


def ternary(a: Arguments, result: Tensor) -> str:
    if result.is_meta:
        return ""
    x = plain(a["x"])
    return unlike(result, ((x >= 0.25).double() + (x >= 0.75).double()) / 2)


def gram(a: Arguments, result: Tensor) -> str:
    if result.is_meta:
        return ""
    other = a["a"] if a.get("b") is None else a["b"]
    return unlike(result, values_of(a["a"]) @ values_of(other).T)


def transpose(a: Arguments, result: PackedTensor) -> str:
    return "" if result.words.is_meta else unlike_packed(result, values_of(a["a"]).T)
