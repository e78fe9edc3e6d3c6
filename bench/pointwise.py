"""What lies between two binary convolutions, in one pass: against torch's operators, eager and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import DTYPE_NAMES, Config, Row, bare_binary_conv2d, column, measure, percent_of_rate, require_equal
from lowbit_ext import _native, binary
from lowbit_ext.binary import ops
from lowbit_ext.binary.ops.geometry import pool_shape
from lowbit_ext.packed import FLOAT_TYPES

CAPTION = (
    "block: batch norm, + residual, stream and sign bits. shifts: the same with two shifts and PReLU, as in ReActNet. "
    "stem: batch norm, ReLU, max-pool 3x3 of stride 2, stream and bits of a second batch norm. conv: a binary 3x3 "
    "convolution with the steps of shifts as its epilogue; torch's are those steps alone. Ours into ready tensors; "
    "torch's into fresh ones, its bits bool. Copy: of the bytes that ours moves. Bare convolution: to int32."
)
CHANNELS = 64
HALVING = ops.Window(3, 3, 2, 2, 1, 1, 1, 1, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pass that makes (batch, 64, 56, 56)."""

    name: str
    batch: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {CHANNELS}@56 N={self.batch} {DTYPE_NAMES[self.dtype]}"


@dataclasses.dataclass(kw_only=True)
class PointwiseRow(Row):
    """Times, speed-ups and bandwidth of one pass."""

    speedup_over_torch: float | None = column("vs torch")
    speedup_over_torch_compile: float | None = column("vs torch.compile")
    percent_of_copy_bandwidth: float | None = column("of copy bandwidth")
    percent_of_bare_convolution: float | None = column("of bare convolution")
    ours_us: float | None = column("ours µs")
    torch_us: float | None = column("torch µs", optional=True)
    torch_compile_us: float | None = column("torch.compile µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """In the caches and beyond them."""
    names, batches = (("block", "stem"), (1,)) if quick else (("block", "shifts", "stem", "conv"), (1, 16))
    return [
        Case(name, batch, dtype) for name in names for batch in batches for dtype in (torch.float32, torch.bfloat16)
    ]


def _last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@dataclasses.dataclass
class _Pass:
    """Ours and torch's, and what they read and write."""

    ours: Callable[[], Any]
    torchs: Callable[[Tensor], tuple[Tensor, Tensor]]
    input: Tensor
    stream: Tensor
    words: Tensor
    kept: tuple[Any, ...]  # whose addresses `ours` holds
    bytes: int = 0
    convolution: Callable[[], Any] | None = None


def _pass(case: Case) -> _Pass:
    torch.manual_seed(0)
    batch, dtype = case.batch, case.dtype
    gain, shift, first, slope, second = (torch.rand(CHANNELS) + 0.1 for _ in range(5))
    zero, one, infinity = torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.full((CHANNELS,), float("inf"))
    residual = _last(batch, CHANNELS, 56, 56, dtype=dtype)
    stream, words = torch.empty_like(residual), torch.empty(batch, 56, 56, 1, dtype=torch.int64)
    store = ops.Step("store", FLOAT_TYPES[dtype], (stream,))
    bits = ops.Step("bits", 1, (zero, None, words))
    norm, add = ops.Step("multiply_add", 0, (gain, shift)), ops.Step("add_tensor", 0, (residual,))
    shifts = [ops.Step("add", 0, (first,)), ops.Step("prelu", 0, (slope,)), ops.Step("add", 0, (second,))]
    before = [norm, ops.Step("clamp", 0, (zero, infinity))] if case.name == "stem" else []
    after = {
        "block": [norm, add, store, bits],
        "shifts": [norm, add, *shifts, store, bits],
        "stem": [store, norm, bits],
        "conv": [norm, add, *shifts, store, bits],
    }[case.name]

    def batch_norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, zero, one, gain, shift, eps=0.0)

    views = [tensor.to(dtype).view(-1, 1, 1) for tensor in (first, second)]

    def torchs(x: Tensor) -> tuple[Tensor, Tensor]:
        if case.name == "stem":
            y = F.max_pool2d(batch_norm(x).relu(), 3, 2, 1)
            return y, batch_norm(y) >= 0
        y = batch_norm(x) + residual
        if case.name != "block":
            y = F.prelu(y + views[0], slope.to(dtype)) + views[1]
        return y, y >= 0

    native, table = _native.cpu, ops.step_table("bench", before + after, residual)
    kept = (table, before, after)
    if case.name == "conv":
        packed = binary.binarize(_last(batch, CHANNELS, 56, 56))
        weight = binary.pack_weight(torch.randn(CHANNELS, CHANNELS, 3, 3))
        convolution, acc = bare_binary_conv2d(packed, weight, 1)
        geometry = ops.Geometry(3, 3, *(1,) * 9)
        plan = ops.conv_shape(batch, 56, 56, CHANNELS, CHANNELS, (56, 56), geometry), ops.ENCODINGS["sign"], 0
        size = native.binary_conv2d_epilogue_workspace_bytes(*plan, table.data_ptr(), len(table))
        workspace = torch.empty(size, dtype=torch.uint8)
        arguments = (
            *plan, packed.words.data_ptr(), weight.blocked.data_ptr(), table.data_ptr(), len(table),
            workspace.data_ptr(), size,
        )
        return _Pass(
            lambda: native.binary_conv2d_epilogue(*arguments), torchs, acc.to(dtype), stream, words,
            (*kept, packed, weight, workspace), convolution=convolution,
        )
    side = 112 if before else 56
    x = _last(batch, CHANNELS, side, side, dtype=dtype)
    window = HALVING if before else ops.Window(1, 1, 1, 1, 0, 0, 1, 1, 0)
    arguments = (
        pool_shape("bench", (batch, side, side), CHANNELS, (56, 56), window),
        ops.REDUCTIONS["maximum" if before else "none"], False, 0, x.data_ptr(), FLOAT_TYPES[dtype], True, CHANNELS,
        table.data_ptr(), len(before), len(after),
    )
    moved = x.nbytes + (0 if before else residual.nbytes) + stream.nbytes + words.nbytes
    return _Pass(lambda: native.pointwise(*arguments), torchs, x, stream, words, kept, moved)


def _row(case: Case, config: Config) -> PointwiseRow:
    one = _pass(case)
    one.ours()
    if case.dtype == torch.float32:  # where torch rounds no more often
        stream, bits = one.torchs(one.input)
        require_equal(f"stream of {case}", one.stream, stream)
        require_equal(f"bits of {case}", one.words, binary.binarize(bits.float() * 2 - 1).words)
    source = torch.empty(one.bytes // 2, dtype=torch.uint8)
    copied = torch.empty_like(source)
    compiled = torch.compile(one.torchs) if config.peers else None
    timings = measure(
        {
            "ours": one.ours,
            "torch": lambda: one.torchs(one.input),
            "torch.compile": None if compiled is None else lambda: compiled(one.input),
            "copy": (lambda: copied.copy_(source)) if one.bytes else None,
            "convolution": one.convolution,
        },
        config.seconds,
    )
    ours_us = timings.median_us("ours")
    convolution_us = timings.median_us("convolution")
    return PointwiseRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch=timings.speedup("torch", "ours"),
        speedup_over_torch_compile=timings.speedup("torch.compile", "ours"),
        percent_of_copy_bandwidth=percent_of_rate(one.bytes, ours_us, one.bytes, timings.best_us("copy")),
        percent_of_bare_convolution=percent_of_rate(1, ours_us, 1, convolution_us),
        ours_us=ours_us,
        torch_us=timings.median_us("torch"),
        torch_compile_us=timings.median_us("torch.compile"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
