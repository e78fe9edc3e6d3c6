"""One training step of a binary layer, and the two gradients alone, against emulation with floats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import peers
from harness import Config, Row, column, fastest, measure, ratio, require_close
from lowbit_ext import binary
from lowbit_ext.binary import ops

CAPTION = (
    "step: forward and backward of a 3x3 layer in float32, input and weight gradients; torch emulates it with sign of "
    "input and weight, then conv2d, NCHW or channels-last, whichever is faster. Saved: bytes kept for backward. "
    "Gradients alone: against aten.convolution_backward; ours applies the straight-through mask as well."
)

# torch sums in another order, and with a blocked algorithm of its own.
RELATIVE_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A 3x3 layer with as many filters as channels."""

    channels: int
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.channels}@{self.size} 3x3 N={self.batch}"


@dataclasses.dataclass(kw_only=True)
class BinaryConv2dGradRow(Row):
    """Times of a step or of a gradient, and what a step saves."""

    speedup_over_torch: float | None = column("vs torch")
    saved_bytes_ratio: float | None = column("saved less")
    ours_us: float | None = column("ours µs")
    torch_us: float | None = column("torch µs")
    ours_saved_bytes: int | None = column("ours saved")
    torch_saved_bytes: int | None = column("torch saved")


# Rows of one case: the step and two gradients.
ROWS_PER_CASE = 3


def cases(quick: bool) -> list[Case]:
    """Layers of ResNet-18 at training batches."""
    layers = [Case(256, 14, 8), Case(64, 56, 8)]
    return layers if quick else [*layers, Case(128, 28, 8), Case(512, 7, 8), Case(256, 14, 32), Case(64, 56, 32)]


def saved_bytes(forward: Callable[[], Tensor], weight: Tensor) -> int:
    """Bytes of the tensors that autograd keeps for backward, each storage once, the weight itself left out."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    storages.pop(weight.untyped_storage().data_ptr(), None)
    del output
    return sum(storages.values())


def _step(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x, weight, padding=1), (x, weight), grad)


def _row(case: str, config: Config, contenders: dict[str, Callable[[], Any] | None], **more: Any) -> Row:
    timings = measure(contenders, config.seconds / 2)
    return BinaryConv2dGradRow(
        case=case,
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_torch=timings.speedup("torch", "ours"),
        ours_us=timings.median_us("ours"),
        torch_us=timings.median_us("torch"),
        **more,
    )


def _step_row(case: Case, config: Config, x: Tensor, weight: Tensor, grad: Tensor) -> Row:
    def leaves(layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
        moved = [tensor.detach().contiguous(memory_format=layout) for tensor in (x, weight)]
        return (*(tensor.requires_grad_() for tensor in moved), grad.contiguous(memory_format=layout))

    planar, last = leaves(torch.contiguous_format), leaves(torch.channels_last)
    for ours, expected in zip(
        _step(binary.conv2d, *last), _step(peers.emulated_binary_conv2d, *planar), strict=True
    ):
        require_close(f"binary_conv2d_grad {case}", ours, expected, RELATIVE_TOLERANCE)
    emulated = None
    if config.peers:
        emulated = fastest(
            [
                lambda: _step(peers.emulated_binary_conv2d, *planar),
                lambda: _step(peers.emulated_binary_conv2d, *last),
            ]
        )
    ours_saved = saved_bytes(lambda: binary.conv2d(last[0], last[1], padding=1), last[1])
    torch_saved = saved_bytes(lambda: peers.emulated_binary_conv2d(last[0], last[1], 1), last[1])
    return _row(
        f"step {case}",
        config,
        {"ours": lambda: _step(binary.conv2d, *last), "torch": emulated},
        saved_bytes_ratio=ratio(torch_saved, ours_saved),
        ours_saved_bytes=ours_saved,
        torch_saved_bytes=torch_saved,
    )


@torch.inference_mode()
def _gradient_rows(case: Case, config: Config, x: Tensor, weight: Tensor, grad: Tensor) -> Iterator[Row]:
    geometry = (case.channels, ops.Geometry(3, 3, *(1,) * 9))
    words, mask = ops.binarize_with_mask(x, 0.0, "sign")
    weight_words = binary.pack_weight(weight).words
    grad_last = grad.contiguous(memory_format=torch.channels_last)

    def torch_gradient(wanted: tuple[bool, bool, bool]) -> Callable[[], Any] | None:
        if not config.peers:
            return None

        def in_layout(layout: torch.memory_format) -> Callable[[], Any]:
            tensors = [tensor.contiguous(memory_format=layout) for tensor in (grad, x.sign(), weight.sign())]
            return lambda: torch.ops.aten.convolution_backward(
                *tensors, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
            )

        return fastest([in_layout(torch.contiguous_format), in_layout(torch.channels_last)])

    yield _row(
        f"input grad {case}",
        config,
        {
            "ours": lambda: ops.binary_conv2d_input_grad(grad_last, weight_words, None, mask, x.shape, *geometry),
            "torch": torch_gradient((True, False, False)),
        },
    )
    yield _row(
        f"weight grad {case}",
        config,
        {
            "ours": lambda: ops.binary_conv2d_weight_grad(grad_last, words, case.channels, *geometry, "sign", 0),
            "torch": torch_gradient((False, True, False)),
        },
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case: a step, then its gradients alone."""
    for case in cases(config.quick):
        torch.manual_seed(0)
        x = torch.randn(case.batch, case.channels, case.size, case.size)
        weight = torch.randn(case.channels, case.channels, 3, 3)
        grad = torch.randn(x.shape)
        yield _step_row(case, config, x, weight, grad)
        yield from _gradient_rows(case, config, x, weight, grad)
