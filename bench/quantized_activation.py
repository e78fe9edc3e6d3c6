"""Ternary and step activations, forward and backward, against the same in plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from harness import DTYPE_NAMES, Config, Row, column, measure, percent_of_rate, require_equal
from lowbit_ext import duo
from lowbit_ext.binary import ops

CAPTION = (
    "Values and the straight-through mask of the clip surrogate (forward), the masked gradient (backward). torch: "
    "comparisons and products, eager and compiled; it keeps the input, ours one bit an element. Limit: bytes that ours "
    "reads and writes a second against those of a copy into a fresh tensor, which ours allocates too."
)


class _TorchTernary(torch.autograd.Function):
    """The usual way: a comparison a threshold, the input kept for the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return ((x >= 0.25).to(x.dtype) + (x >= 0.75).to(x.dtype)) / 2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad_output * ((x > 0) & (x < 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """Elements of one type."""

    elements: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"ternary, {self.elements >> 10} Ki {DTYPE_NAMES[self.dtype]}"


@dataclasses.dataclass(kw_only=True)
class ActivationRow(Row):
    """Times, speed-ups, bandwidth and kept bytes of a forward and backward pass."""

    speedup_over_torch: float | None = column("vs torch eager")
    speedup_over_torch_compiled: float | None = column("vs torch compiled")
    percent_of_copy_bandwidth_forward: float | None = column("forward, of copy bandwidth")
    percent_of_copy_bandwidth_backward: float | None = column("backward, of copy bandwidth")
    saved_ratio: float | None = column("bytes kept, torch over ours")
    ours_us: float | None = column("ours µs")
    torch_us: float | None = column("torch µs", optional=True)
    torch_compiled_us: float | None = column("compiled µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """In the second-level cache, and larger than all caches."""
    sizes = ((1 << 16), (1 << 24))
    all_cases = [Case(size, dtype) for size in sizes for dtype in (torch.float32, torch.bfloat16)]
    return [case for case in all_cases if not quick or case.dtype == torch.float32]


def _step(activation: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(activation(x), x, grad)


def _row(case: Case, config: Config) -> ActivationRow:
    torch.manual_seed(0)
    x = (torch.randn(case.elements) + 0.5).to(case.dtype).requires_grad_()
    grad, data = torch.randn(case.elements).to(case.dtype), x.detach()
    require_equal(f"{case}", duo.ternary_activation(data), _TorchTernary.apply(data))
    (ours,), (torchs,) = _step(duo.ternary_activation, x, grad)(), _step(_TorchTernary.apply, x, grad)()
    require_equal(f"{case}, gradient", ours, torchs)
    _, mask = ops.quantized_activation_with_mask(data, "ternary", 0.0, 1.0, False)
    compiled = None
    if config.peers:
        torch.compiler.reset()
        compiled = torch.compile(lambda value: _TorchTernary.apply(value))
        _step(compiled, x, grad)()
    timings = measure(
        {
            "ours": _step(duo.ternary_activation, x, grad),
            "torch": _step(_TorchTernary.apply, x, grad) if config.peers else None,
            "torch compiled": _step(compiled, x, grad) if compiled is not None else None,
            "forward": lambda: ops.quantized_activation_with_mask(data, "ternary", 0.0, 1.0, False),
            "backward": lambda: ops.masked_gradient(grad, mask),
            "copy": lambda: data.clone(),
        },
        config.seconds,
    )
    size = data.numel() * data.element_size()
    moved = 2 * size + mask.numel() * 8
    copy_us = timings.best_us("copy")
    return ActivationRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch=timings.speedup("torch", "ours"),
        speedup_over_torch_compiled=timings.speedup("torch compiled", "ours"),
        percent_of_copy_bandwidth_forward=percent_of_rate(moved, timings.median_us("forward"), 2 * size, copy_us),
        percent_of_copy_bandwidth_backward=percent_of_rate(moved, timings.median_us("backward"), 2 * size, copy_us),
        saved_ratio=size / (mask.numel() * 8),
        ours_us=timings.median_us("ours"),
        torch_us=timings.median_us("torch"),
        torch_compiled_us=timings.median_us("torch compiled"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
