"""The layers of a packed network.

Between them flow bare words (N, H, W, words), where one-dimensional data has H = 1 and vectors H = W = 1, and floats in
the model's own shapes, channels-last in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments, _native
from lowbit_ext.binary import ops
from lowbit_ext.binary.activation import DEFAULT_THRESHOLDS
from lowbit_ext.binary.packing.packed_base import Epilogue, Layout, PackedLayer
from lowbit_ext.binary.packing.plan import Plan, Value
from lowbit_ext.binary.weights import PackedWeight
from lowbit_ext.packed import ENCODING_VALUES, FLOAT_TYPES, clear_tail, unpack_op, words_for

_BITS_BY_INTEGER: int = _native.cpu.CONV_OUTPUTS["bits_by_integer"]
_ONE_PIXEL = ops.Window(1, 1, 1, 1, 0, 0, 1, 1, 0)


def _unless_zero(buffer: Tensor | None) -> Tensor | None:
    """Flips and inversions that no channel has cost the kernels nothing."""
    return buffer if buffer is not None and bool(buffer.any()) else None


class PackedBinarize(PackedLayer):
    """Float (N, C, *spatial) -> words, by one threshold for all channels or, behind a batch norm, one or two for each.

    Two, of shape (2, C), give 2 C bits. With `axis` -1 the channels are the last axis.
    """

    threshold: Tensor | None
    flip: Tensor | None

    def __init__(
        self, channels: int, encoding: str, threshold: Tensor | None = None, flip: Tensor | None = None, axis: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.encoding, self.axis = channels, encoding, axis
        self.register_buffer("threshold", threshold)
        self.register_buffer("flip", flip)
        self.prepare()

    def prepare(self) -> None:
        super().prepare()
        common = DEFAULT_THRESHOLDS[self.encoding]
        self._arguments = (self.threshold, _unless_zero(self.flip), common, self.encoding)

    def forward(self, x: Tensor) -> Tensor:
        words = ops.binarize(self._read(x), *self._arguments)
        shape = words.shape
        return words if len(shape) == 4 else words.reshape(shape[0], *(1,) * (4 - len(shape)), *shape[1:])

    def _read(self, x: Tensor) -> Tensor:
        """The input, checked, with channels at axis 1."""
        _arguments.tensor("packed model", "input", x, _arguments.FLOATS)
        if x.dim() < 2 or x.shape[self.axis] != self.channels:
            raise ValueError(f"packed model: input must have {self.channels} channels, got {tuple(x.shape)}")
        return x if self.axis == 1 else x.movedim(-1, 1)

    def plan(self, plan: Plan, x: Value) -> Value:
        """The layer's call in a plan."""
        value = self._read(x.tensor)
        channels_last = not value.is_contiguous()
        if channels_last and not value.movedim(1, -1).is_contiguous():
            return plan.dynamic(self, (x,), {})
        threshold, flip, common, encoding = self._arguments
        batch, channels, *space = value.shape
        bits = 1 if threshold is None else threshold.dim()
        words = plan.buffer((batch, *(1,) * (2 - len(space)), *space, words_for(bits * channels)), torch.int64)
        plan.call(
            "binarize", _native.cpu.binarize, x, FLOAT_TYPES[value.dtype], channels_last, batch, channels,
            math.prod(space), 0 if threshold is None else threshold.contiguous(), common,
            0 if flip is None else flip.contiguous(), ops.ENCODINGS[encoding], words, 0, bits,
        )
        return Value(words)

    def extra_repr(self) -> str:
        thresholds = "one" if self.threshold is None else ("per channel", "two per channel")[self.threshold.dim() - 1]
        return f"channels={self.channels}, encoding={self.encoding!r}, thresholds={thresholds}, axis={self.axis}"


class PackedConv2d(PackedLayer):
    """Words -> words by integer thresholds, or -> what an epilogue writes; convolutions and linear layers.

    Args:
        weight: of four dimensions.
        geometry: of the convolution.
        encoding, padding_value: of the input's bits.
        threshold, flip: int32 and bool of shape (1 or 2, O), for a result of bits.
        epilogue: what becomes of the accumulator otherwise.
        one_pixel: a linear layer, whose kernel covers the image.
    """

    words: Tensor
    blocked: Tensor
    threshold: Tensor | None
    flip: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        geometry: ops.Geometry,
        encoding: str,
        padding_value: int,
        *,
        threshold: Tensor | None = None,
        flip: Tensor | None = None,
        epilogue: Epilogue | None = None,
        one_pixel: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.geometry = tuple(weight.shape), geometry
        self.encoding, self.padding_value, self.one_pixel = encoding, padding_value, one_pixel
        self.epilogue = epilogue
        self.register_buffer("words", weight.words)
        self.register_buffer("threshold", threshold)
        self.register_buffer("flip", flip)
        # Private to the device and its instruction set: made from the words, never stored.
        self.register_buffer("blocked", weight.blocked, persistent=False)
        self.prepare()

    def prepare(self) -> None:
        super().prepare()
        geometry = self.geometry
        self.channels = self.shape[1] * geometry.groups
        self.isa = _native.kernels(self.words).level
        words = clear_tail(self.words, self.shape[1])  # the kernels' copy, whatever a file holds past the last channel
        self.blocked = ops.binary_conv2d_block_weight(words, self.channels, geometry.groups)
        # Looked up once here and not in each call: nn.Module.__getattr__ takes a third of a microsecond a buffer.
        self._weight = self.blocked
        self._before = (self.blocked, None, None, None, self.threshold, _unless_zero(self.flip))
        self._call = (self.channels, self.shape[0], geometry, self.encoding, self.padding_value)

    def forward(self, words: Tensor, *tensors: Tensor) -> Any:
        if not torch.compiler.is_compiling() and self.isa != _native.kernels(words).level:
            self.prepare()
        if self.one_pixel and words.shape[1:3] != self.shape[2:]:
            raise ValueError(
                f"packed model: a linear layer was packed for images of {self.shape[2]} x {self.shape[3]} pixels, "
                f"got {words.shape[1]} x {words.shape[2]}"
            )
        if self.epilogue is None:
            return ops.binary_conv2d(words, *self._before, *self._call, torch.float32)
        program = self.epilogue.program(tensors, self.float_dtype)
        return self.epilogue.results(ops.binary_conv2d_epilogue(words, self._weight, *self._call, *program))

    def plan(self, plan: Plan, words: Value, *tensors: Value) -> Any:
        """The layer's call in a plan."""
        native, call = _native.cpu, self._call
        if self.isa != native.level:
            self.prepare()
        if self.one_pixel and words.tensor.shape[1:3] != self.shape[2:]:
            self.forward(words.tensor)  # raises
        sizes = ops.geometry.conv_plan(native, words.tensor.shape, *call)
        if sizes.aligned:
            words = self._plan_groups(plan, words)
        code = (sizes.shape, ops.ENCODINGS[self.encoding], self.padding_value)
        if self.epilogue is None:
            threshold, flip = self._before[4:]
            assert threshold is not None
            kind, count, (batch, _, height, width) = _BITS_BY_INTEGER, threshold.shape[0], sizes.out_size
            output = plan.buffer((batch, height, width, words_for(count * self.shape[0])), torch.int64)
            size = native.binary_conv2d_workspace_bytes(*code, kind, count)
            plan.call(
                "binary_conv2d", native.binary_conv2d, *code, kind, words, self.blocked, 0, 0, 0, 0, 0,
                threshold.contiguous(), 0 if flip is None else flip.contiguous(), count, output, plan.workspace(size),
                size,
            )
            return Value(output)
        steps, results, rows = self.epilogue.plan(plan, tensors, self.float_dtype, sizes.out_size)
        table = ops.step_table("binary_conv2d_epilogue", steps, words.tensor)
        plan.keep(steps)
        size = native.binary_conv2d_epilogue_workspace_bytes(*code, table.data_ptr(), len(table))
        plan.call(
            "binary_conv2d_epilogue", native.binary_conv2d_epilogue, *code, words, self.blocked, table, len(table),
            plan.workspace(size), size, table=table, rows=rows,
        )
        return results[0] if len(results) == 1 else tuple(results)

    def _plan_groups(self, plan: Plan, words: Value) -> Value:
        """The words with each group's channels at a word boundary."""
        groups, channels = self.geometry.groups, self.shape[1]
        pixels = words.tensor.shape[:-1]
        aligned = plan.buffer((*pixels, groups, words_for(channels)), torch.int64)
        plan.call(
            "align_groups", _native.cpu.align_groups, words, pixels.numel(), groups, channels, aligned
        )
        return Value(aligned)

    def extra_repr(self) -> str:
        geometry = self.geometry
        return (
            f"{self.shape[1] * geometry.groups}, {self.shape[0]}, kernel={geometry.kernel}, stride={geometry.stride}, "
            f"padding={geometry.padding}, dilation={geometry.dilation}, groups={geometry.groups}, "
            f"encoding={self.encoding!r}, padding_value={self.padding_value}, "
            f"{'thresholds' if self.epilogue is None else self.epilogue.extra_repr()}"
        )


@dataclasses.dataclass(frozen=True)
class FloatWindow:
    """A pooling of floats, in the order of the operator's arguments; `average` alone uses the last two.

    Without a kernel the window is the whole image.
    """

    average: bool
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int = 0

    def of_images(self, size: Sequence[int]) -> ops.Window:
        """The window on images of this height and width."""
        height, width = size if self.kernel is None else self.kernel
        return ops.Window(height, width, *self.stride, *self.padding, *self.dilation, int(self.ceil_mode))


class PackedPointwise(PackedLayer):
    """Floats -> what an epilogue writes, with a pooling and steps in front of it in the same pass."""

    def __init__(
        self, channels: int, before: Epilogue, window: FloatWindow | None, epilogue: Epilogue
    ) -> None:
        super().__init__()
        self.channels, self.before, self.window, self.epilogue = channels, before, window, epilogue

    def forward(self, x: Tensor, *tensors: Tensor) -> Any:
        images = self._images(x)
        before, operands = self.before.program((), self.float_dtype)
        after, others = self.epilogue.program(tensors, self.float_dtype)
        window, count = self._window(images.shape[2:]), len(self.before.kinds)
        outputs = ops.pointwise(images, *window, [*before, *after], count, [*operands, *others])
        return self.epilogue.results(outputs)

    def _images(self, x: Tensor) -> Tensor:
        _arguments.tensor("packed model", "input", x, _arguments.FLOATS)
        images = self.before.layout.images(x)
        if images.shape[1] != self.channels:
            raise ValueError(f"packed model: input must have {self.channels} channels, got {tuple(x.shape)}")
        return images

    def _window(self, size: Sequence[int]) -> tuple[Sequence[int], str, bool, int]:
        """The window as the operator takes it, what it makes, and the options of averages."""
        w = self.window
        if w is None:
            return (), "none", True, 0
        return w.of_images(size), "average" if w.average else "maximum", w.count_include_pad, w.divisor_override

    def plan(self, plan: Plan, x: Value, *tensors: Value) -> Any:
        """The layer's call in a plan."""
        op, images = "pointwise", self._images(x.tensor)
        window, reduction, *options = self._window(images.shape[2:])
        size = (images.shape[0], *images.shape[2:])
        of_image, out = _ONE_PIXEL, size[1:]
        if self.window is not None:
            of_image, out = window, ops.geometry.window_size(op, size[1:], self.channels, window)  # type: ignore
        shape = ops.geometry.pool_shape(op, size, self.channels, out, of_image)
        stride = ops.steps.pixel_stride(images, 1)
        if stride is None and not images.is_contiguous():
            x = plan.dynamic(torch.Tensor.contiguous, (x,), {})
            images = self._images(x.tensor)
            stride = ops.steps.pixel_stride(images, 1)
        steps, results, rows = self.epilogue.plan(plan, tensors, self.float_dtype, (size[0], self.channels, *out))
        before = self.before.complete((), self.float_dtype)
        table = ops.step_table(op, [*before, *steps], images)
        plan.keep([*before, *steps])
        plan.call(
            op, _native.cpu.pointwise, shape, ops.REDUCTIONS[reduction], *options, x, FLOAT_TYPES[images.dtype],
            stride is not None, stride or 0, table, len(before), len(steps), table=table,
            rows=[(len(before) + row, value) for row, value in rows],
        )
        return results[0] if len(results) == 1 else tuple(results)

    def extra_repr(self) -> str:
        before, after = self.before.extra_repr(), self.epilogue.extra_repr()
        return f"{self.channels}, {before}, window={self.window}, {after}"


@dataclasses.dataclass(frozen=True)
class Window:
    """Geometry of a max-pooling, in the order of the operator's arguments."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


@dataclasses.dataclass(frozen=True)
class Upsampling:
    """Nearest upsampling by whole numbers: height, width."""

    scale: tuple[int, int]


class PackedUpsample2d(PackedLayer):
    """Every pixel's words as often as the scale says."""

    def __init__(self, upsampling: Upsampling) -> None:
        super().__init__()
        self.upsampling = upsampling

    def forward(self, words: Tensor) -> Tensor:
        batch, height, width, count = words.shape
        down, across = self.upsampling.scale
        pixels = words[:, :, None, :, None].expand(batch, height, down, width, across, count)
        return pixels.reshape(batch, height * down, width * across, count)

    def extra_repr(self) -> str:
        return f"scale={self.upsampling.scale}"


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A function of torch that only moves the values of images, and its arguments behind the first."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(images, *self.arguments)


class PackedRearrange(PackedLayer):
    """Words of images whose values have been moved.

    Between channels, bits have no better way than through values: half-precision ones are a half of what floats take.
    """

    def __init__(self, channels: int, rearrangement: Rearrangement) -> None:
        super().__init__()
        self.channels, self.rearrangement = channels, rearrangement

    def forward(self, words: Tensor) -> Tensor:
        values = unpack_op(words, self.channels, 0.0, 1.0, torch.bfloat16).movedim(-1, 1)
        return ops.binarize(self.rearrangement(values), None, None, DEFAULT_THRESHOLDS["step"], "step")

    def extra_repr(self) -> str:
        return f"channels={self.channels}, {self.rearrangement.function.__name__}{self.rearrangement.arguments}"


class PackedMaxPool2d(PackedLayer):
    """Maximum over windows of words; the minimum in the channels whose bit of `invert` is set."""

    invert: Tensor | None

    def __init__(self, channels: int, window: Window, invert: Tensor | None = None) -> None:
        super().__init__()
        self.channels, self.window = channels, window
        self.register_buffer("invert", invert)
        self.prepare()

    def prepare(self) -> None:
        super().prepare()
        w = self.window
        window = ops.Window(*w.kernel, *w.stride, *w.padding, *w.dilation, int(w.ceil_mode))
        invert = None if self.invert is None else clear_tail(self.invert, self.channels)
        self._arguments = (_unless_zero(invert), self.channels, window)

    def forward(self, words: Tensor) -> Tensor:
        return ops.binary_max_pool2d(words, *self._arguments)

    def plan(self, plan: Plan, words: Value) -> Value:
        """The layer's call in a plan."""
        op, (invert, channels, window) = "binary_max_pool2d", self._arguments
        shape, size = ops.geometry.pool_plan(op, words.tensor.shape, torch.int64, channels, window)
        output = plan.buffer((words.tensor.shape[0], *size, words.tensor.shape[3]), torch.int64)
        plan.call(op, _native.cpu.binary_max_pool2d, shape, words, 0 if invert is None else invert, output)
        return Value(output)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, {self.window}, inverts={self.invert is not None}"


class PackedAvgPool2d(PackedLayer):
    """Mean over windows of words, or over the whole image: words -> floats.

    Args:
        channels, encoding: of the words.
        window: kernel, stride, padding, ceil_mode, count_include_pad, divisor_override (0: none); None: the image.
    """

    def __init__(self, channels: int, encoding: str, window: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.channels, self.encoding, self.window = channels, encoding, window

    def forward(self, words: Tensor) -> Tensor:
        size = words.shape[1:3]
        given: tuple[Any, ...] = self.window if self.window is not None else (size, size, (0, 0), False, True, 0)
        kernel, stride, padding, ceil_mode, count_include_pad, divisor_override = given
        window = ops.Window._make((*kernel, *stride, *padding, 1, 1, int(ceil_mode)))
        mean = ops.binary_avg_pool2d(words, self.channels, window, count_include_pad, divisor_override, self.encoding)
        return mean.to(self.float_dtype)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, encoding={self.encoding!r}, window={self.window}"


class PackedUnpack(PackedLayer):
    """Words -> values in the model's own shape."""

    def __init__(self, channels: int, encoding: str, layout: Layout) -> None:
        super().__init__()
        self.channels, self.encoding, self.layout = channels, encoding, layout

    def forward(self, words: Tensor) -> Tensor:
        low, high = ENCODING_VALUES[self.encoding]
        return self.layout.of_images(unpack_op(words, self.channels, low, high, self.float_dtype).movedim(-1, 1))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, encoding={self.encoding!r}, {self.layout}"
