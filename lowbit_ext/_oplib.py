"""Definition of torch operators in one call: schema, launchers, fake.

Operators of this library are raw: they carry no autograd rule, because an autograd.Function outside the operator,
entered only when a gradient is needed, costs less per call. Users call the wrappers of each method's package.
"""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("lowbit", "DEF")

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)  # a subclass may carry its own __torch_dispatch__


def _is_eager() -> bool:
    """Whether nothing watches operator calls: no tracing, no dispatch mode, no functorch level, no profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def define(
    schema: str, *, cpu: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Registers `lowbit::<schema>` and returns the function that calls it.

    In plain eager execution that function runs the launcher at once: the dispatcher takes 6.5 us to carry the 17
    arguments of binary_conv2d to it, longer than the rest of the call.

    Args:
        schema: name and signature, e.g. ``"binarize(Tensor x) -> Tensor"``.
        cpu: launcher: checks, allocates, calls the kernel.
        cuda: the same for CUDA tensors, usually the same function; None where there is no CUDA kernel yet.
        fake: the same on tensors without data: checks, returns empty tensors of the launcher's shapes and strides.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    on_cuda = cuda or _no_cuda_kernel(name)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"lowbit::{name}", fake, lib=_library)
    overload = getattr(torch.ops.lowbit, name).default

    def call(*arguments: Any) -> Any:
        if _is_eager() and type(arguments[0]) in _PLAIN_TENSORS:
            if arguments[0].is_cpu:
                return cpu(*arguments)
            if arguments[0].is_cuda:
                return on_cuda(*arguments)
        return overload(*arguments)

    return call


def _no_cuda_kernel(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"{name}: there is no CUDA kernel for it yet; call it with tensors on the CPU")

    return refuse


def operators() -> list[str]:
    """Qualified names of all registered operators."""
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowbit::"))
