"""gradient_audit(): what low-bit activations do to the gradients of a model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext.lowmem import codes, ops
from lowbit_ext.lowmem._convert import check_rest, convert
from lowbit_ext.lowmem.hooks import saved_tensors

METHODS = ("convert", "hooks", "naive")


@dataclasses.dataclass(frozen=True)
class LayerError:
    """How far a parameter's gradient is from the exact one.

    Attributes:
        name: of the parameter.
        relative: norm of the difference over the norm of the exact gradient; NaN where that is 0.
        cosine: of the angle between the two; NaN where one of them is 0.
        share: norm of the difference over the norm of the exact gradients of all parameters together; NaN where that is
            0. The largest is the layer that loses, `max(errors, key=lambda error: error.share).name`: a gradient that
            is nearly 0, as of a bias in front of a batch norm, has a large relative error that costs nothing.
    """

    name: str
    relative: float
    cosine: float
    share: float = math.nan


def gradient_audit(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, *, bits: int = 4,
    range: float | None = None, method: str = "convert", stochastic: bool = False, rest: str = "exact",
) -> list[LayerError]:
    """Compares exact and approximate gradients of one batch, parameter by parameter.

    Args:
        model: not modified: copies of it run, from the same state of torch's generators, which is restored.
        loss: loss(model, batch) is the scalar to differentiate.
        batch: whatever `loss` takes.
        bits: 2, 4 or 8.
        range: for "convert", see there.
        method: "convert"; "hooks" for `saved_tensors`; "naive" for a forward pass that goes on with the rounded result
            of every layer, in groups of 256, as networks with quantised activations do.
        stochastic: stochastic rounding, for "hooks" and "naive".
        rest: for "convert", see there: "exact" or "codes".

    Returns:
        One LayerError for every parameter that has a gradient, in the model's order.

    Raises:
        TypeError: model is no module, loss no function, or another argument of another type.
        ValueError: another method, bits, range or `rest`; `range`, `stochastic` or `rest` with a method that has none;
            a model without parameters to differentiate.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gradient_audit: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"gradient_audit: method must be one of {', '.join(METHODS)}, got {method!r}")
    if not callable(loss):
        raise TypeError(f"gradient_audit: loss must be a function, got {type(loss).__name__}")
    bits, _ = codes.check_settings("gradient_audit", bits, range)
    codes.check_flags("gradient_audit", stochastic=stochastic)
    if range is not None and method != "convert":
        raise ValueError(f"gradient_audit: method {method!r} has no range: its codes span minimum to maximum")
    check_rest("gradient_audit", rest)
    if rest != "exact" and method != "convert":
        raise ValueError(f"gradient_audit: method {method!r} has no rest: it is for 'convert'")
    if stochastic and method == "convert":
        raise ValueError("gradient_audit: method 'convert' rounds to the nearest code alone")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("gradient_audit: model has no parameter that requires a gradient")
    exact = _gradients(copy.deepcopy(model), loss, batch)
    # Seeds of their own: dropout draws the same numbers in both runs.
    generator = torch.Generator().manual_seed(0)
    if method == "convert":
        rounded = _gradients(convert(copy.deepcopy(model), bits, range, rest=rest), loss, batch)
    elif method == "hooks":
        with saved_tensors(bits, stochastic, min_numel=0, generator=generator):
            rounded = _gradients(copy.deepcopy(model), loss, batch)
    else:
        rounded = _gradients(_rounding(copy.deepcopy(model), bits, stochastic, generator), loss, batch)
    total = float(torch.stack([grad.double().norm() for grad in exact.values()]).norm()) if exact else 0.0
    return [_error(name, grad, rounded[name], total) for name, grad in exact.items()]


def scalar_loss(name: str, loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any) -> Tensor:
    """What `loss` returns, if it is a tensor."""
    value = loss(model, batch)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: loss must return a scalar tensor, got {type(value).__name__}")
    return value


def _gradients(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> dict[str, Tensor]:
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng():
        value = scalar_loss("gradient_audit", loss, model, batch)
        found = torch.autograd.grad(value, list(names.values()), allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def _rounding(model: nn.Module, bits: int, stochastic: bool, generator: torch.Generator) -> nn.Module:
    """The model with the results of its innermost layers rounded; their gradient passes as it is."""

    def round_result(module: nn.Module, _: Any, result: Any) -> Any:
        if not isinstance(result, Tensor) or result.dtype not in ops.FLOAT_TYPES:
            return result
        quantized = codes.quantize(
            result, bits, stochastic=stochastic, positive=isinstance(module, nn.ReLU), generator=generator
        )
        return result + (codes.dequantize(quantized) - result).detach()

    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(round_result)
    return model


def _error(name: str, exact: Tensor, rounded: Tensor, total: float) -> LayerError:
    a, b = exact.double().flatten(), rounded.double().flatten()
    difference, cosine = float((a - b).norm()), a @ b / (a.norm() * b.norm())
    norm = float(a.norm())
    return LayerError(
        name, difference / norm if norm else math.nan, float(cosine), difference / total if total else math.nan
    )
