"""Thresholds that stand for a chain of monotone steps: found by bisection with the steps themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from lowbit_ext.binary.activation import DEFAULT_THRESHOLDS
from lowbit_ext.binary.packing.packed_layers import Upsampling, Window

Step = Callable[[Tensor], Tensor] | Window | Upsampling
SPATIAL = (Window, Upsampling)  # steps that leave values as they are


@dataclasses.dataclass
class Chain:
    """The way of a value from its source to where it is binarized: value = last step(... first step(source))."""

    source: fx.Node
    steps: list[Step]
    doubled: bool
    spatial: tuple[int, ...]  # of the bits, whose pixels a flatten on the way has not merged

    @property
    def folds(self) -> bool:
        """Whether values change on the way."""
        return self.doubled or any(not isinstance(step, SPATIAL) for step in self.steps)

    @property
    def is_pointwise(self) -> bool:
        """Whether each bit depends on one value of the source alone, and no other bit does."""
        return not self.doubled and not any(isinstance(step, SPATIAL) for step in self.steps)

    def behind(self, outer: Chain, channels: slice, count: int) -> Chain:
        """This chain of some of the channels, and behind it the steps of a chain of all `count` channels."""

        def on_part(step: Callable[[Tensor], Tensor]) -> Step:
            def run(values: Tensor) -> Tensor:
                everything = values.new_zeros(count)
                everything[channels] = values
                return step(everything)[channels]

            return run

        steps = [*self.steps, *(on_part(step) for step in outer.steps)]  # type: ignore[arg-type]
        return Chain(self.source, steps, self.doubled, outer.spatial)

    @property
    def copies(self) -> int:
        """Bits for each value of the source."""
        return 2 if self.doubled else 1


@dataclasses.dataclass
class Fold:
    """A chain as one comparison a channel: position >= threshold, or <= where flip."""

    threshold: Tensor
    flip: Tensor
    inverts: list[Tensor]  # of each pooling: whether it takes the minimum of bits
    constant: Tensor  # whether always or never met


def _fold(chain: Chain, encoding: str, low: Tensor, high: Tensor, value: Callable[[Tensor], Tensor]) -> Fold:
    """Bisection for the threshold of a chain, all channels at once.

    Args:
        chain: its steps; pooling compares values, upsampling repeats them.
        encoding: what binarizes the chain's result.
        low, high: int64 (C,), ends of the range of positions.
        value: monotone map of positions to the source's values.
    """
    threshold = DEFAULT_THRESHOLDS[encoding]

    def run(positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        values, pooled = value(positions), []
        for step in chain.steps:
            if isinstance(step, Window):
                pooled.append(values)
            elif not isinstance(step, Upsampling):
                values = step(values)
        return values >= threshold, pooled

    (first, pooled_first), (last, pooled_last) = run(low), run(high)
    below, above = low.clone(), high.clone()  # bit(below) == first, bit(above) == last
    while bool((above - below > 1).any()):
        middle = (below + above) >> 1
        as_first = run(middle)[0] == first
        below, above = torch.where(as_first, middle, below), torch.where(as_first, above, middle)
    constant, flip = first == last, first & ~last
    position = torch.where(flip, below, above)
    position = torch.where(constant, torch.where(first, low, high + 1), position)
    # A maximum of values is the maximum of their bits where the bit rises with the value, their minimum where it falls.
    inverts = [~constant & ((before < after) == flip) for before, after in zip(pooled_first, pooled_last, strict=True)]
    return Fold(position, flip, inverts, constant)


def fold_integers(
    chain: Chain, encoding: str, reach: int, scale: Tensor | None, bias: Tensor | None, filters: int
) -> Fold:
    """Thresholds on the accumulator of a binary layer, |acc| <= reach, whose own epilogue comes first."""

    def value(positions: Tensor) -> Tensor:
        values = positions.reshape(-1, filters).to(torch.float32)
        values = values if scale is None else values * scale
        values = values if bias is None else values + bias
        return values.reshape(-1)

    high = torch.full((filters * chain.copies,), reach)
    fold = _fold(chain, encoding, -high, high, value)
    fold.threshold = fold.threshold.to(torch.int32)
    return fold


def fold_floats(chain: Chain, encoding: str, channels: int) -> Fold:
    """Thresholds on the channels of a float32 source, bisected over all its values in order."""

    def value(positions: Tensor) -> Tensor:
        bits = torch.where(positions < 0, positions ^ 0x7FFFFFFF, positions)
        return bits.to(torch.int32).view(torch.float32)

    # The largest finite number's bits; negative numbers' bits below the sign run downwards.
    high = torch.full((channels * chain.copies,), 0x7F7FFFFF)
    fold = _fold(chain, encoding, -high - 1, high, value)
    infinite = torch.where(fold.threshold == -high - 1, -math.inf, math.inf).float()
    threshold = value(fold.threshold.minimum(high))
    fold.threshold = torch.where(fold.constant, infinite, threshold)
    return fold
