"""What the layers of a packed network share: buffers that keep their types, and the epilogues of passes over floats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext.binary import ops
from lowbit_ext.binary.packing.plan import Plan, Value
from lowbit_ext.packed import FLOAT_TYPES, words_for


@dataclasses.dataclass(frozen=True)
class Layout:
    """How floats of the model stand for images (N, C, H, W).

    Attributes:
        dims: dimensions of the model's value, 2 to 4.
        axis: of its channels, 1 or -1.
    """

    dims: int
    axis: int = 1

    def images(self, value: Tensor) -> Tensor:
        """The value as images: a view."""
        value = value.movedim(-1, 1) if self.axis == -1 else value
        shape = value.shape
        return value if len(shape) == 4 else value.reshape(*shape[:2], *(1,) * (4 - len(shape)), *shape[2:])

    def of_images(self, images: Tensor) -> Tensor:
        """Images as a value of the model: a view."""
        if self.dims == 2:
            return images.flatten(1)
        value = images.squeeze(2) if self.dims == 3 else images
        return value.movedim(1, -1) if self.axis == -1 else value


class Exact(nn.Module):
    """A module whose buffers are its meaning: casts leave their dtypes alone.

    Attributes:
        version: grows whenever what a call needs is made anew.
    """

    version = 0

    def prepare(self) -> None:
        """Derives from the buffers what a call needs."""
        self.version += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        self.prepare()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.prepare()


class PackedLayer(Exact):
    """A layer of a packed network, under the model's checksum.

    Attributes:
        float_dtype: of the floats that it writes.
    """

    float_dtype = torch.float32


class Epilogue(Exact):
    """The steps that a value runs through, and what is written on the way: csrc/core/epilogue.h.

    Args:
        steps: names among the kernels' steps, each with its factors, float32 (C,). A step "add_tensor" or
            "multiply_image" takes the next of the call's tensors; "store" writes floats; "bits" has thresholds (1 or 2,
            C) and flips, bool of the same shape.
        layout: of the floats.
    """

    def __init__(self, steps: Sequence[tuple[str, Sequence[Tensor]]], layout: Layout) -> None:
        super().__init__()
        self.kinds, self.layout = tuple(kind for kind, _ in steps), layout
        for index, (_, factors) in enumerate(steps):
            for name, factor in zip(("first", "second"), factors, strict=False):
                self.register_buffer(f"{name}_{index}", factor.contiguous())

    def factors(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """The factors of a step."""
        return getattr(self, f"first_{index}", None), getattr(self, f"second_{index}", None)

    def program(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[int], list[Tensor | None]]:
        """Steps and operands as the operators take them (ops/steps.py).

        Args:
            tensors: of the steps that read some, in the model's own shapes.
            dtype: of the floats that are written.
        """
        steps: list[int] = []
        operands: list[Tensor | None] = []
        for step in self.complete(tensors, dtype):
            steps += [ops.STEP_KINDS[step.kind], step.option]
            operands += step.tensors
        return steps, operands

    def complete(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[ops.Step]:
        """The steps with what they read."""
        waiting = iter(tensors)
        steps = []
        for index, kind in enumerate(self.kinds):
            option = 0
            first, second = self.factors(index)
            read: tuple[Tensor | None, ...] = (first,) if second is None else (first, second)
            if kind == "add_tensor":
                read = (self.layout.images(next(waiting)),)
            elif kind == "multiply_image":
                read = (self.layout.images(next(waiting)).flatten(1).to(torch.float32),)
            elif kind == "store":
                option, read = FLOAT_TYPES[dtype], ()
            elif kind == "bits":
                option, read = first.shape[0], (first, second)  # type: ignore[union-attr]
            steps.append(ops.Step(kind, option, read))
        return steps

    def plan(
        self, plan: Plan, tensors: Sequence[Value], dtype: torch.dtype, size: Sequence[int]
    ) -> tuple[list[ops.Step], list[Value], list[tuple[int, Value]]]:
        """The steps with what they write too, their results, and the rows that read what each run has elsewhere.

        A sum is stored over the tensor that has been added where nothing else reads that one.
        """
        reading = [kind for kind in self.kinds if kind in ("add_tensor", "multiply_image")]
        tensors = [
            self._readable(plan, value, kind) for value, kind in zip(tensors, reading, strict=True)
        ]
        steps = self.complete([value.tensor for value in tensors], dtype)
        waiting = iter(tensors)
        rows: list[tuple[int, Value]] = []
        reusable: list[Tensor] = []
        results: list[Value] = []
        for index, step in enumerate(steps):
            written: tuple[Tensor, ...] = ()
            if step.kind in ("add_tensor", "multiply_image"):
                value = next(waiting)
                rows.append((index, value))
                images = step.tensors[0]
                dense = step.kind == "add_tensor" and images.movedim(1, -1).is_contiguous()  # type: ignore[union-attr]
                if dense and images.dtype == dtype and plan.dies_here(value):  # type: ignore[union-attr]
                    reusable.append(images)  # type: ignore[arg-type]
            elif step.kind == "store":
                written = (reusable.pop() if reusable else plan.images(size, dtype),)
                results.append(Value(self.layout.of_images(written[0])))
            elif step.kind == "bits":
                shape = (size[0], *size[2:], words_for(step.option * size[1]))
                written = (plan.buffer(shape, torch.int64),)
                results.append(Value(written[0]))
            steps[index] = step._replace(tensors=(*step.tensors, *written))
        return steps, results, rows

    def _readable(self, plan: Plan, value: Value, kind: str) -> Value:
        """A value as kernels read it: gates float32, other tensors with each pixel's channels together."""
        images = self.layout.images(value.tensor)
        if kind == "multiply_image" and (images.dtype != torch.float32 or not images.flatten(1).is_contiguous()):
            return plan.dynamic(lambda gate: gate.to(torch.float32).contiguous(), (value,), {})
        if kind == "add_tensor" and ops.steps.pixel_stride(images, 1) is None:
            return plan.dynamic(self._with_channels_last, (value,), {})
        return value

    def _with_channels_last(self, value: Tensor) -> Tensor:
        return self.layout.of_images(self.layout.images(value).contiguous(memory_format=torch.channels_last))

    def results(self, outputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """What the operator wrote: words, and floats in the model's own shapes; a single one as it is."""
        results = [output if output.dtype == torch.int64 else self.layout.of_images(output) for output in outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def extra_repr(self) -> str:
        return f"{'+'.join(self.kinds)}, {self.layout}"
