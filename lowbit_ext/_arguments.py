"""Checks of arguments that the packages share: each returns the value as its caller wants it, or raises an error that
names the operation, the argument, what came and what was expected.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit_ext._torch import torch_function_modes

_Function = TypeVar("_Function", bound=Callable[..., Any])
TAKE_NOTHING_OVER: set[type] = {torch.Tensor, torch.nn.Parameter, int, float, str, tuple, type(None)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels read
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)


def named(values: Sequence[Any]) -> str:
    """The values as words: "float32, bfloat16 or float16"."""
    words = [str(value).removeprefix("torch.") for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def index(value: Any) -> int | None:
    """A value that torch takes as a size, an int or what stands for one, as NumPy's do, as an int; None for others."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(op: str, name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An int, not below `least` nor above `most`."""
    if type(value) is int and least is most is None:  # what is usual, at once
        return value
    size = index(value)
    if size is None:
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if least is not None and size < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {size}")
    if most is not None and size > most:
        raise ValueError(f"{op}: {name} must be at most {most}, got {size}")
    return size


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    """One int for both dimensions, or two."""
    if type(value) is int and -(2**31) < value < 2**31:  # what is usual, at once
        return value, value
    is_plain = type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int
    if is_plain and max(map(abs, value)) < 2**31:
        return value
    sizes = [index(item) for item in (value if isinstance(value, (tuple, list)) else (value,))]
    if len(sizes) not in (1, 2) or None in sizes:
        raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {value!r}")
    if any(type(size) is int and abs(size) >= 2**63 for size in sizes):
        raise ValueError(f"{op}: {name} must be less than 2^63 in magnitude, got {value!r}")
    return sizes[0], sizes[-1]  # type: ignore[return-value]


def sides(op: str, name: str, value: Any) -> tuple[Any, Any]:
    """Padding of both dimensions: for each an int for both sides, or a pair of what is before and behind."""
    if isinstance(value, (tuple, list)) and len(value) == 2 and any(isinstance(side, (tuple, list)) for side in value):
        first, second = (
            pair(op, name, side) if isinstance(side, (tuple, list)) else integer(op, name, side) for side in value
        )
        return first, second
    return pair(op, name, value)


def number(op: str, name: str, value: Any) -> float:
    """A real number."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be a number that float64 holds, got {value}") from None


def fresh_seed(op: str, like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """A seed for one call on the device of `like`, int64 of no dimensions, drawn by the generator or torch's own.

    Raises:
        RuntimeError: a CUDA graph is being captured, every replay of which would draw the same bits.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: a CUDA graph is being captured, and each of its replays would draw the same bits; call it outside "
            "the graph, or give a seed that is to be repeated where it takes one"
        )
    return torch.randint(2**63 - 1, (), generator=generator, device="cpu" if generator is None else generator.device)


def flag(op: str, name: str, value: Any) -> bool:
    """True or False, and nothing that is like them."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{op}: {name} must be a bool, got {value!r}")
    return value  # type: ignore[return-value]


def function(op: str, name: str, value: Any) -> Callable[..., Any]:
    """What can be called."""
    if not callable(value):
        raise TypeError(f"{op}: {name} must be callable, got {type(value).__name__}")
    return value


def choice(op: str, name: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of `choices`: strings, ints or None."""
    if not isinstance(value, (str, int, type(None))) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def dtype(op: str, name: str, value: Any, choices: Sequence[torch.dtype] = ()) -> torch.dtype:
    """One of `choices`, or any dtype."""
    if not isinstance(value, torch.dtype) or (choices and value not in choices):
        raise TypeError(f"{op}: {name} must be {named(choices) if choices else 'a torch.dtype'}, got {value!r}")
    return value


def device(op: str, name: str, value: Any) -> torch.device:
    """A device, or what torch.device makes one of."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"{op}: {name} must be a device, got {value!r}")
    try:
        return torch.device(value)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{op}: {name} must be a device, got {value!r}: {error}") from None


def tensor(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype] = ()) -> Tensor:
    """A dense tensor, of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {named(dtypes)}, got {value.dtype}")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.dtype} of layout {value.layout}")
    return value


def tensor_like(op: str, name: str, value: Any, like: Tensor, dtypes: Sequence[torch.dtype] = ()) -> Tensor:
    """A dense tensor on the device of `like`, the operation's input."""
    checked = tensor(op, name, value, dtypes)
    if checked.device != like.device:
        place = "the CPU" if like.is_cpu else like.device
        raise ValueError(f"{op}: {name} must be on {place} like the input, got {checked.device}")
    return checked


def overridable(function: _Function) -> _Function:
    """A public function of tensors that what stands for a tensor can take over: a torch.fx proxy records the call.

    Asking torch takes 0.5 us for each argument of a class of ours, so those in TAKE_NOTHING_OVER are not asked about.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        taken = torch_function_modes() > 0
        for argument in arguments:
            taken = taken or type(argument) not in TAKE_NOTHING_OVER
        if taken and torch.overrides.has_torch_function(arguments):
            return torch.overrides.handle_torch_function(call, arguments, *arguments, **options)
        return function(*arguments, **options)

    return call  # type: ignore[return-value]
