"""allocate_bits(): bits where the gradients need them, for saved_tensors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext import _arguments
from lowbit_ext.lowmem._forms import Encoded, Form, dictionary, encode
from lowbit_ext.lowmem.audit import scalar_loss
from lowbit_ext.lowmem.hooks import BitPlan, has_bits, saved_tensors

_MEASURED = (2, 4)  # bits
# Rounding errors are uniform within a step, and a step is the range over 2^bits - 1.
_OF_EIGHT = (15 / 255) ** 2


@dataclasses.dataclass(eq=False)
class _Piece:
    """A tensor that may be kept in 2, 4 or 8 bits, exact until `bits` says otherwise.

    Attributes:
        layer, index: see BitPlan.
        errors: square of the gradients' error by bits, where this tensor alone is codes.
    """

    layer: str
    index: int
    count: int
    form: Form
    bits: int | None = None
    errors: dict[int, float] = dataclasses.field(default_factory=dict)

    def decode(self, flat: Tensor) -> Tensor:
        """The elements, or what codes say of them."""
        found = None if self.bits is None else encode(flat, self.form, self.bits, None)
        if found is None or self.bits is None:
            return flat
        if found.tensors[0].dtype != torch.uint8:  # codes would not resolve it, and half precision saves nothing
            self.errors[self.bits] = math.inf
        return found.decode(*found.tensors)


class _Probe(saved_tensors):
    """Keeps everything as it is, and the pieces that may be codes in a list."""

    def __init__(self, min_numel: int) -> None:
        super().__init__(min_numel=min_numel)
        self.pieces: list[_Piece] = []

    def _encoded(self, x: Tensor, flat: Tensor, form: Form) -> Encoded | None:
        if not has_bits(x, form) or (not x.requires_grad and dictionary(flat) is not None):
            return Encoded((flat,), lambda kept: kept)
        piece = _Piece(*self._piece(), flat.numel(), form)
        self.pieces.append(piece)
        return Encoded((flat,), piece.decode)


def allocate_bits(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, budget: float = 4.0, *,
    min_numel: int = 1024,
) -> BitPlan:
    """Chooses 2, 4 or 8 bits for each tensor that a model keeps, for the least error of its gradients.

    Measured on one forward pass: for each tensor two backward passes, in which it alone is read from codes of 2 and of
    4 bits. Errors of different tensors are taken to add up. Memory: what plain torch keeps.

    Args:
        model: not modified: a copy of it runs, from the present state of torch's generators, which is restored.
        loss: loss(model, batch) is the scalar to differentiate.
        batch: whatever `loss` takes.
        budget: bits an element on average, from 2 to 8, of what the table in docs/lowmem.md says is kept as codes; what
            has another form, as a bit of a threshold, keeps it.
        min_numel: see saved_tensors.

    Returns:
        BitPlan, for ``with lowmem.saved_tensors(plan)``. It is of use for other batches and later weights, while the
        order in which a layer keeps its tensors stays.

    Raises:
        TypeError: model is no module, loss no function or its result no tensor, or another argument of another type.
        ValueError: budget or min_numel out of range, or a model without parameters to differentiate.

    Source:
        by sensitivity: Chen et al., "ActNN", ICML 2021, section 4, which estimates what is measured here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"allocate_bits: model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"allocate_bits: loss must be a function, got {type(loss).__name__}")
    budget = _arguments.number("allocate_bits", "budget", budget)
    if not 2 <= budget <= 8:
        raise ValueError(f"allocate_bits: budget must be from 2 to 8 bits an element, got {budget}")
    min_numel = _arguments.integer("allocate_bits", "min_numel", min_numel, 0)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("allocate_bits: model has no parameter that requires a gradient")
    pieces = _measured(copy.deepcopy(model), loss, batch, min_numel)
    chosen, average = _chosen(pieces, budget)
    bits: dict[str, tuple[int, ...]] = {}
    for piece in pieces:  # in the order of their indices
        bits[piece.layer] = (*bits.get(piece.layer, ()), chosen[piece])
    return BitPlan(bits, average)


def _measured(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, min_numel: int) -> list[_Piece]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    probe = _Probe(min_numel)
    with torch.random.fork_rng(), probe:
        value = scalar_loss("allocate_bits", loss, model, batch)

    def gradients() -> list[Tensor]:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return [grad for grad in found if grad is not None]

    exact = gradients()
    for piece in probe.pieces:
        for bits in _MEASURED:
            piece.bits = bits
            pairs = zip(gradients(), exact, strict=True)
            error = sum(float((grad - other).double().square().sum()) for grad, other in pairs)
            piece.errors.setdefault(bits, error if math.isfinite(error) else math.inf)
        piece.bits = None
        piece.errors[4] = min(piece.errors[4], piece.errors[2])
        piece.errors[8] = piece.errors[4] * _OF_EIGHT
    return probe.pieces


def _chosen(pieces: list[_Piece], budget: float) -> tuple[dict[_Piece, int], float]:
    """Bits of each piece and their average: 2 for all, then more where a bit gains most, while the budget lasts."""
    chosen = dict.fromkeys(pieces, 2)
    count = sum(piece.count for piece in pieces)
    left = (budget - 2) * count
    steps = [(piece, low, high) for piece in pieces for low, high in ((2, 4), (4, 8))]

    def gain(step: tuple[_Piece, int, int]) -> float:
        piece, low, high = step
        if math.isinf(piece.errors[low]):
            return math.inf
        return (piece.errors[low] - piece.errors[high]) / ((high - low) * piece.count)

    for piece, low, high in sorted(steps, key=gain, reverse=True):
        cost = (high - low) * piece.count
        if chosen[piece] == low and cost <= left:
            chosen[piece], left = high, left - cost
    return chosen, sum(bits * piece.count for piece, bits in chosen.items()) / max(count, 1)
