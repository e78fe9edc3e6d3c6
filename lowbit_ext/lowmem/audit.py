"""gradient_audit(): what low-bit activations do to the gradients of a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext.lowmem.convert import convert
from lowbit_ext.lowmem.hooks import saved_tensors


@dataclasses.dataclass(frozen=True)
class LayerError:
    """How far a parameter's gradient is from the exact one.

    Attributes:
        name: of the parameter.
        relative: norm of the difference over the norm of the exact gradient; NaN where that is 0.
        cosine: of the angle between the two.
    """

    name: str
    relative: float
    cosine: float


def gradient_audit(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, *, bits: int = 4,
    range: float | None = None, method: str = "convert", stochastic: bool = False,
) -> list[LayerError]:  # fmt: skip
    """Compares exact and approximate gradients of one batch, parameter by parameter.

    Args:
        model: not modified: copies of it run, from the same state of torch's generator.
        loss: loss(model, batch) is the scalar to differentiate.
        batch: whatever `loss` takes.
        bits, range: as in `convert`.
        method: "convert", or "hooks" for `saved_tensors`.
        stochastic: for "hooks".

    Returns:
        One LayerError for every parameter that has a gradient, in the model's order.

    Raises:
        ValueError: another method.
    """
    if method not in ("convert", "hooks"):
        raise ValueError(f"gradient_audit: method must be 'convert' or 'hooks', got {method!r}")
    state = torch.random.get_rng_state()

    def gradients(run: nn.Module) -> dict[str, Tensor]:
        torch.random.set_rng_state(state)
        value = loss(run, batch)
        names = {name: parameter for name, parameter in run.named_parameters() if parameter.requires_grad}
        found = torch.autograd.grad(value, list(names.values()), allow_unused=True)
        return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}

    try:
        exact = gradients(copy.deepcopy(model))
        if method == "convert":
            rounded = gradients(convert(copy.deepcopy(model), bits, range))
        else:
            with saved_tensors(bits, stochastic, min_numel=0):
                rounded = gradients(copy.deepcopy(model))
    finally:
        torch.random.set_rng_state(state)
    errors = []
    for name, grad in exact.items():
        a, b = grad.double().flatten(), rounded[name].double().flatten()
        relative, cosine = (a - b).norm() / a.norm(), a @ b / (a.norm() * b.norm())
        errors.append(LayerError(name, float(relative), float(cosine)))
    return errors
