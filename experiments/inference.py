"""What the examples share to compare networks at inference: predictions, folded batch norm, times in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BLOCK_S = 5e-3
LEAST_BLOCKS = 9


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(256)])


def accuracy_percent(predictions: Tensor, labels: Tensor) -> float:
    """Share of right predictions."""
    return 100.0 * float((predictions == labels).double().mean())


def fold_batch_norm(model: nn.Sequential) -> nn.Sequential:
    """A copy of the model for inference, batch norm folded into the convolutions."""
    layers: list[nn.Module] = []
    for module in copy.deepcopy(model).eval():
        if isinstance(module, nn.BatchNorm2d) and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], module)
        else:
            layers.append(module)
    return nn.Sequential(*layers)


def _block(call: Callable[[], Any], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def median_seconds(contenders: dict[str, Callable[[], Any]], limit_s: float) -> dict[str, float]:
    """Median time a call of every contender, over blocks in turns: what disturbs the machine meets all of them."""
    calls = {}
    for name, call in contenders.items():
        call()
        calls[name] = max(1, round(BLOCK_S / min(_block(call, 1) for _ in range(3))))
    blocks: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + limit_s
    while len(blocks[next(iter(blocks))]) < LEAST_BLOCKS or time.perf_counter() < end:
        for name, call in contenders.items():
            call()  # not timed: the caches hold another network
            blocks[name].append(_block(call, calls[name]))
    return {name: statistics.median(times) for name, times in blocks.items()}


def faster_layout(twin: nn.Sequential, images: Tensor) -> Callable[[], Tensor]:
    """A call of a float network for inference, batch norm folded, in the faster of torch's two memory layouts."""
    last = fold_batch_norm(twin).to(memory_format=torch.channels_last)
    contiguous = fold_batch_norm(twin).to(memory_format=torch.contiguous_format)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    layouts = {"contiguous": lambda: contiguous(images), "channels-last": lambda: last(channels_last)}
    times = median_seconds(layouts, 0.0)
    return layouts[min(times, key=times.__getitem__)]
