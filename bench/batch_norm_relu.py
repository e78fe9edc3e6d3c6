"""Batch norm and ReLU that keep 4-bit codes, forward and backward, against torch's two operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harness import Config, Row, column, measure, percent_of_rate, require_equal
from lowbit_ext.lowmem import blocks, ops
from lowbit_ext.lowmem.codes import RANGES

CAPTION = (
    "relu(batch_norm(x)) in training, fp32. torch: its two operators, which keep x and the result; ours: torch's batch "
    "norm, then one pass that makes its ReLU and the codes; the gradient from the codes alone. Kernels alone (quantise "
    "in place, dequantise and gradient into fresh tensors) in percent of a copy's bandwidth into a fresh tensor."
)
BITS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A tensor (batch, channels, size, size)."""

    batch: int
    channels: int
    size: int
    channels_last: bool

    def __str__(self) -> str:
        order = "NHWC" if self.channels_last else "NCHW"
        return f"{self.channels}@{self.size} N={self.batch} {order}"


@dataclasses.dataclass(kw_only=True)
class BatchNormRow(Row):
    """Times, speed-ups, bandwidths and kept bytes of one tensor."""

    speedup_over_torch_forward: float | None = column("forward vs torch")
    speedup_over_torch_step: float | None = column("forward and backward vs torch")
    percent_of_copy_bandwidth_quantize: float | None = column("quantise, of copy bandwidth")
    percent_of_copy_bandwidth_dequantize: float | None = column("dequantise, of copy bandwidth")
    percent_of_copy_bandwidth_gradient: float | None = column("gradient, of copy bandwidth")
    saved_ratio: float | None = column("bytes kept, torch over ours")
    step_us: float | None = column("forward and backward µs")
    torch_step_us: float | None = column("torch µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """Of a ResNet's first and last stages, in both orders of memory."""
    sizes = [(64, 64, 28)] if quick else [(64, 64, 28), (128, 16, 32), (128, 64, 8), (64, 64, 56)]
    return [Case(*size, channels_last) for size in sizes for channels_last in (False, True)]


def _step(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(layer(x), x, grad)


def _row(case: Case, config: Config) -> BatchNormRow:
    torch.manual_seed(0)
    shape = (case.batch, case.channels, case.size, case.size)
    order = torch.channels_last if case.channels_last else torch.contiguous_format
    data, grad = (torch.randn(shape).contiguous(memory_format=order) for _ in range(2))
    x = data.clone().requires_grad_()
    norm = nn.BatchNorm2d(case.channels)
    coded = blocks.BatchNorm2d.like(norm, BITS, RANGES[BITS])

    def torchs(value: Tensor) -> Tensor:
        return norm(value).relu()

    def ours(value: Tensor) -> Tensor:
        return coded(value, True)[0]

    require_equal(f"batch norm and ReLU {case}", ours(x), torchs(x))
    zeros, ones = torch.zeros(case.channels), torch.ones(case.channels)
    settings = BITS, RANGES[BITS]
    y = data.clone()
    codes = ops.batch_norm_relu_quantize(data, zeros, ones, ones, zeros, *settings, y)
    timings = measure(
        {
            "ours forward": lambda: ours(x),
            "torch forward": lambda: torchs(x),
            "ours": _step(ours, x, grad),
            "torch": _step(torchs, x, grad),
            "quantize": lambda: ops.batch_norm_relu_quantize(data, zeros, ones, ones, zeros, *settings, y),
            "dequantize": lambda: ops.channel_dequantize(
                codes, ones, zeros, shape, case.channels_last, data.dtype, *settings, True
            ),
            "gradient": lambda: ops.batch_norm_relu_backward(grad, codes, ones, zeros, ones, *settings, True, True),
            "copy": lambda: data.clone(),
        },
        config.seconds,
    )
    size, copy_us = data.nbytes, timings.best_us("copy")

    def of_copy(name: str, moved: int) -> float | None:
        return percent_of_rate(moved, timings.median_us(name), 2 * size, copy_us)

    return BatchNormRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch_forward=timings.speedup("torch forward", "ours forward"),
        speedup_over_torch_step=timings.speedup("torch", "ours"),
        percent_of_copy_bandwidth_quantize=of_copy("quantize", 3 * size + codes.nbytes),
        percent_of_copy_bandwidth_dequantize=of_copy("dequantize", size + codes.nbytes),
        percent_of_copy_bandwidth_gradient=of_copy("gradient", 3 * size + 2 * codes.nbytes),
        saved_ratio=2 * size / codes.nbytes,
        step_us=timings.median_us("ours"),
        torch_step_us=timings.median_us("torch"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
