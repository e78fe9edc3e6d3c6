"""Definition of torch operators in one call: schema, outputs, launcher.

Operators of this library are raw: they carry no autograd rule, because an autograd.Function outside the operator,
entered only when a gradient is needed, costs less per call. Users call the wrappers of each method's package.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _native
from lowbit_ext._torch import (
    below_write_counting,
    dispatch_modes,
    innermost_transform,
    is_profiling,
    jit_tracing_state,
    keys_below_write_counting,
)

_library = torch.library.Library("lowbit", "DEF")
_functions: dict[str, Callable[..., Any]] = {}


def is_eager() -> bool:
    """Whether nothing watches operator calls: no tracing, no dispatch mode, no functorch level, no profiler."""
    return not (
        torch.compiler.is_compiling()
        or dispatch_modes()
        or innermost_transform() is not None
        or jit_tracing_state() is not None
        or is_profiling()
    )


def may_read(values: torch.Tensor) -> bool:
    """Whether a check may look at values: on a GPU a look waits for all work before it and cannot be captured."""
    return values.is_cpu and is_eager()


def define(schema: str, *, outputs: Callable[..., Any], launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `lowbit::<schema>` and returns the function that calls it.

    In plain eager execution that function runs the launcher at once: the dispatcher takes 6.5 us to carry the 17
    arguments of binary_conv2d to it, longer than the rest of the call. Where the launcher meets a tensor whose elements
    are not plain memory (`_native.pointer`: a subclass, a negated view), torch's dispatcher resolves it.

    Args:
        schema: name and signature, e.g. ``"binarize(Tensor x) -> Tensor"``. A tensor that is written is ``Tensor(a!)``.
        outputs: checks the arguments and allocates the results; on tensors without data it is the operator's fake.
        launcher: takes the results from there, or from its parts where sizes are looked up, and calls the kernel of its
            tensors' device.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, launcher, device)
    overload = getattr(torch.ops.lowbit, name).default

    @functools.wraps(outputs)
    def fake(*arguments: Any) -> Any:
        _check_devices(overload, arguments)
        return outputs(*arguments)

    torch.library.register_fake(f"lowbit::{name}", fake, lib=_library)
    aliases = [argument.alias_info for argument in overload._schema.arguments]
    written = [index for index, alias in enumerate(aliases) if alias is not None and alias.is_write]
    if written:
        _count_writes(name, overload, written)

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        if not (type(first) in _native.PLAIN_TENSORS and (first.is_cpu or first.is_cuda) and is_eager()):
            return overload(*arguments)
        try:
            result = launcher(*arguments)
        except _native.NotPlainMemory:
            for index in written:  # torch's way round a negated view reads the result, and there is none
                if isinstance(arguments[index], Tensor) and arguments[index].is_neg():
                    raise
            return overload(*arguments)
        except Exception:  # what is said of a sparse tensor names something else
            _check_layouts(overload, arguments)
            raise
        for index in written:
            _count_write(arguments[index])
        return result

    _functions[f"lowbit::{name}"] = call
    return call


def _count_write(tensor: Tensor | None) -> None:
    """Tells autograd that the elements have changed: a gradient that needs the old ones raises."""
    if tensor is not None and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _count_writes(name: str, overload: Any, written: list[int]) -> None:
    """The same for calls that come through the dispatcher, as torch.library.custom_op does it."""

    def count(keyset: Any, *arguments: Any) -> Any:
        for index in written:
            _count_write(arguments[index])
        with below_write_counting():
            return overload.redispatch(keyset & keys_below_write_counting, *arguments)

    _library.impl(name, count, "ADInplaceOrView", with_keyset=True)


def _tensors(overload: Any, arguments: tuple[Any, ...]) -> list[tuple[str, Tensor]]:
    """The tensors among the arguments, each with "op: argument"."""
    op = overload._schema.name.removeprefix("lowbit::")
    named = zip(overload._schema.arguments, arguments, strict=True)
    return [(f"{op}: {argument.name}", value) for argument, value in named if isinstance(value, Tensor)]


def _check_layouts(overload: Any, arguments: tuple[Any, ...]) -> None:
    for name, tensor in _tensors(overload, arguments):
        if tensor.layout is not torch.strided or tensor.is_nested:
            layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor, got {layout}")


def _check_devices(overload: Any, arguments: tuple[Any, ...]) -> None:
    """What `_native.pointer` checks, without data. As in torch, a scalar on the CPU goes with any device."""
    for name, tensor in _tensors(overload, arguments):
        if tensor.device != arguments[0].device and not (tensor.dim() == 0 and tensor.is_cpu):
            place = "the CPU" if arguments[0].is_cpu else arguments[0].device
            raise ValueError(f"{name} must be on {place} like the input, got {tensor.device}")


def functions() -> dict[str, Callable[..., Any]]:
    """What `define` returned for each operator, by qualified name."""
    return dict(sorted(_functions.items()))
