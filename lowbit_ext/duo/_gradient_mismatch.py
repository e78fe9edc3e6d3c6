"""How far straight-through gradients are from the gradient of the smoothed loss, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext import _arguments


@dataclasses.dataclass(frozen=True)
class LayerMismatch:
    """One layer's comparison.

    Attributes:
        name: of the parameter.
        cosine: of the two gradients over the weights used; higher is better, NaN where one of them is 0.
        weights: number of weights used.
        of_weights: number of weights the layer has.
        discrete: (weights,) float64, coordinate discrete gradient.
        straight_through: (weights,) float64, gradient by autograd.
        indices: (weights,) int64, positions in the flattened parameter.
    """

    name: str
    cosine: float
    weights: int
    of_weights: int
    discrete: Tensor
    straight_through: Tensor
    indices: Tensor


@dataclasses.dataclass(frozen=True)
class GradientMismatch:
    """Result of gradient_mismatch.

    Attributes:
        layers: one entry a layer, in the model's order.
        eps: half width of the smoothing window.
        samples: size of the batch.
    """

    layers: tuple[LayerMismatch, ...]
    eps: float
    samples: int

    @property
    def cosines(self) -> dict[str, float]:
        """Cosine by parameter name."""
        return {layer.name: layer.cosine for layer in self.layers}


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else math.nan


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The weights to look at: those named, or every parameter of two dimensions or more."""
    parameters = dict(model.named_parameters())
    if layers is None:
        chosen = {name: value for name, value in parameters.items() if value.dim() >= 2}
        if not chosen:
            raise ValueError("gradient_mismatch: the model has no weight of two dimensions or more")
        return chosen
    for name in layers:
        if not isinstance(name, str) or name not in parameters:
            raise ValueError(f"gradient_mismatch: layers names {name!r}; the model has {', '.join(parameters)}")
    return {name: parameters[name] for name in layers}


def gradient_mismatch(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Any],
    *,
    eps: float,
    layers: Sequence[str] | None = None,
    max_weights: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> GradientMismatch:
    """Cosine between straight-through gradients and coordinate discrete gradients of the weights.

    The coordinate discrete gradient of weight i is (L(w + eps e_i) - L(w - eps e_i)) / (2 eps): the exact partial
    derivative of the loss smoothed by a uniform window of width 2 eps along that weight, which also exists where the
    activations are steps. It costs two forward passes a weight. The answer depends on eps and on the size of the batch:
    state both beside it.

    Args:
        model: any module; neither it nor its buffers nor the global random state is changed. Its training flag counts:
            batch norm in training mode uses the batch.
        loss: maps (output, target) to a scalar. The output arrives in float64, in which the two losses are subtracted.
        batch: (input, target).
        eps: half width of the window, in units of the weights.
        layers: parameter names; default every parameter of two dimensions or more.
        max_weights: at most so many weights a layer, drawn without replacement; default all.
        generator: draws them.
        chunk_size: perturbed weights evaluated at once by torch.func.vmap: quicker for small networks, at chunk_size
            times the memory. Binary convolution and linear layers have no batching rule; they need 1.
        progress: called with the number of weights done after every chunk.

    Returns:
        GradientMismatch.

    Raises:
        TypeError: an argument of another type. ValueError: eps, max_weights or chunk_size not positive, unknown layers,
            a loss that is no scalar or not finite. What the model and the loss raise comes through.

    Source:
        Kim et al., "BinaryDuo", ICLR 2020, section 4.
    """
    _check(model, loss, batch, eps, layers, max_weights, generator, chunk_size, progress)
    input, target = batch
    model = copy.deepcopy(model)
    chosen = _chosen(model, layers)

    def value(run: Callable[[], Any]) -> Tensor:
        torch.manual_seed(0)  # dropout and its like: the same draws at every evaluation
        result = loss(run().double(), target)
        if not isinstance(result, Tensor) or result.dim() != 0:
            raise ValueError("gradient_mismatch: loss must return a scalar tensor")
        return result

    with torch.random.fork_rng(devices=[]):
        model.zero_grad()
        straight = value(lambda: model(input))
        if not torch.isfinite(straight):
            raise ValueError(f"gradient_mismatch: the loss is {straight.item()}")
        gradients = torch.autograd.grad(straight, list(chosen.values()), allow_unused=True)
        found = []
        for (name, weight), gradient in zip(chosen.items(), gradients, strict=True):
            indices = torch.arange(weight.numel(), device=weight.device)
            if max_weights is not None and max_weights < weight.numel():
                device = generator.device if generator else "cpu"
                order = torch.randperm(weight.numel(), generator=generator, device=device)
                indices = order[:max_weights].sort().values.to(weight.device)
            with torch.no_grad():
                if chunk_size == 1:
                    discrete = _one_by_one(lambda: value(lambda: model(input)), weight, indices, eps, progress)
                else:
                    discrete = _in_chunks(model, value, input, name, weight, indices, eps, chunk_size, progress)
            flat = (torch.zeros_like(weight) if gradient is None else gradient).detach().reshape(-1)
            through = flat[indices].double()
            layer = LayerMismatch(
                name, _cosine(discrete, through), len(indices), weight.numel(), discrete, through, indices
            )
            found.append(layer)
    samples = len(input) if isinstance(input, Tensor) else len(input[0])
    return GradientMismatch(tuple(found), eps, samples)


def _check(
    model: Any, loss: Any, batch: Any, eps: Any, layers: Any, max_weights: Any, generator: Any, chunk_size: Any,
    progress: Any,
) -> None:
    """Checks gradient_mismatch's arguments, as far as they can be without a run of the model."""
    op = "gradient_mismatch"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss) or not (progress is None or callable(progress)):
        raise TypeError(f"{op}: loss and progress must be callable, got {loss!r} and {progress!r}")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"{op}: batch must be a pair (input, target), got {type(batch).__name__}")
    if not _arguments.number(op, "eps", eps) > 0 or not math.isfinite(eps):
        raise ValueError(f"{op}: eps must be positive, got {eps}")
    if isinstance(layers, str) or not isinstance(layers, (Sequence, type(None))):
        raise TypeError(f"{op}: layers must be a sequence of parameter names, got {layers!r}")
    if max_weights is not None:
        _arguments.integer(op, "max_weights", max_weights, 1)
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
    _arguments.integer(op, "chunk_size", chunk_size, 1)


def _one_by_one(
    evaluate: Callable[[], Tensor], weight: nn.Parameter, indices: Tensor, eps: float,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """Perturbs each weight in place and puts its value back."""
    flat = weight.data.view(-1)
    discrete = torch.empty(len(indices), dtype=torch.float64, device=weight.device)
    for at, index in enumerate(indices.tolist()):
        kept = flat[index].clone()
        flat[index] = kept + eps
        high, above = float(flat[index]), evaluate()
        flat[index] = kept - eps
        low, below = float(flat[index]), evaluate()
        flat[index] = kept
        discrete[at] = (above - below) / (high - low)  # 2 eps as the weight's type rounds it
        if progress is not None:
            progress(1)
    return discrete


def _in_chunks(
    model: nn.Module, value: Callable[[Callable[[], Any]], Tensor], input: Any, name: str, weight: nn.Parameter,
    indices: Tensor, eps: float, chunk_size: int, progress: Callable[[int], None] | None,
) -> Tensor:
    """Evaluates chunk_size perturbed copies of one weight at a time."""
    parts = []
    flat = weight.detach().reshape(-1)

    def evaluate(perturbed: Tensor) -> Tensor:
        return value(lambda: torch.func.functional_call(model, {name: perturbed.view_as(weight)}, (input,)))

    batched = torch.func.vmap(evaluate, randomness="same")
    for chunk in indices.split(chunk_size):
        rows = torch.arange(len(chunk), device=chunk.device)
        copies = flat.repeat(2, len(chunk), 1)
        copies[0, rows, chunk] += eps
        copies[1, rows, chunk] -= eps
        width = (copies[0, rows, chunk].double() - copies[1, rows, chunk].double())
        losses = batched(copies.flatten(0, 1)).reshape(2, -1)
        parts.append((losses[0] - losses[1]) / width)
        if progress is not None:
            progress(len(chunk))
    return torch.cat(parts)
