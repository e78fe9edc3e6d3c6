"""Recognises binary layers and activations of other origin by what they compute.

A model is run on an example and every convolution or matrix product within it is seen with its operands, however they
were made. A weight counts as binary where every filter is scale * sign, to rounding; an input where its values are two.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit_ext.binary.surrogates import SURROGATES, derivative

_PRODUCTS = {torch.conv2d: nn.Conv2d, torch.conv1d: nn.Conv1d, F.linear: nn.Linear}
_CONV_OPTIONS = ("stride", "padding", "dilation", "groups")
_KINKS = (0.0, 0.5, 1.0)  # where derivatives jump, and one-sided ones are a matter of taste
# Straight-through estimators are often spelled signs - clipped + clipped, of values up to 1: what that leaves of signs.
_ROUNDINGS = 16


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or matrix product: its kind (a class of torch.nn), operands and options."""

    kind: type
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        """The same of other operands, without bias."""
        function: Any = next(function for function, kind in _PRODUCTS.items() if kind is self.kind)
        return function(input, weight, **self.options)


@dataclasses.dataclass
class Visit:
    """A call of a module while the model ran: what came, what it gave, whose forward called it, its own products."""

    module: nn.Module
    parent: nn.Module | None
    inputs: tuple[Any, ...]
    output: Any = None
    products: list[Product] = dataclasses.field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Notes visits of modules and the products within them."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[Visit] = []
        self._open: list[Visit] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS and self._open:
            self._open[-1].products.append(_product(function, *args, **kwargs))
        return function(*args, **kwargs)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a module's forward."""
        values = (*args, *kwargs.values())
        kept = tuple(value.clone() if isinstance(value, Tensor) else value for value in values)
        self._open.append(Visit(module, self._open[-1].module if self._open else None, kept))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind it. What is kept may be written into later."""
        visit = self._open.pop()
        visit.output = output.clone() if isinstance(output, Tensor) else output
        self.visits.append(visit)


def _product(
    function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
) -> Product:
    options = dict(zip(_CONV_OPTIONS, rest, strict=False)) | options
    return Product(_PRODUCTS[function], input.detach().clone(), weight.detach().clone(), bias, options)


def run(model: nn.Module, example: Any) -> Any:
    """The model's result on a tensor, a tuple of arguments or a dictionary of them by name."""
    if isinstance(example, dict):
        return model(**example)
    return model(*(example if isinstance(example, tuple) else (example,)))


def visits(model: nn.Module, example: Any) -> tuple[Any, list[Visit]]:
    """The model's result on an example, and every call of a module on the way."""
    recorder = _Recorder()
    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder:
            return run(model, example), recorder.visits
    finally:
        for handle in handles:
            handle.remove()


# --- values -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signs:
    """A weight as scale * signs.

    Attributes:
        signs: +-1 of the weight's shape; +1 where the weight is 0.
        scale: (O,), not negative.
        zeros: number of weights that are exactly 0.
    """

    signs: Tensor
    scale: Tensor
    zeros: int


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why operands are not those of a binary layer; and whether they are two-valued all the same."""

    text: str
    two_valued: bool = False


@dataclasses.dataclass(frozen=True)
class Levels:
    """Binary activations: their encoding, and how many of encoding "sign" are 0."""

    encoding: str
    zeros: int


def signs_of_weight(weight: Tensor, magnitude: float) -> Signs | Reason:
    """A weight (O, ...) as scale * signs, or why it is none.

    Args:
        weight: that of a product.
        magnitude: of the values that it was made of, whose rounding it may have.
    """
    flat = weight.flatten(1).double()
    zero = flat == 0
    scale = (flat.abs().sum(1) / (~zero).sum(1).clamp_min(1)).reshape(-1, 1)
    rounding = _ROUNDINGS * torch.finfo(weight.dtype).eps * scale.clamp_min(magnitude)
    tolerance = torch.minimum(rounding, scale / 100)
    if bool(((flat.abs() - scale).abs() > tolerance)[~zero].any()):
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        two_levels = (torch.minimum((flat - low).abs(), (flat - high).abs()) <= rounding).all()
        if bool(two_levels):
            return Reason("the two values of its filters are not opposite, which takes a sum of pixels besides", True)
        return Reason("its filters are not scale * sign")
    signs = torch.where(flat >= 0, 1.0, -1.0).to(weight.dtype).reshape(weight.shape)
    return Signs(signs, scale.flatten().to(weight.dtype), int(zero.sum()))


def levels_of(values: Tensor) -> Levels | Reason:
    """Binary activations, or why they are none.

    Values a and -a are "sign", 0 and a are "step"; the layer's scale takes the factor.
    """
    if not values.numel():
        return Reason("the example has no values for it")
    size = values.abs().amax()
    tolerance = _ROUNDINGS * torch.finfo(values.dtype).eps * float(size.clamp_min(1))
    zero = values.abs() <= tolerance
    if float(size) == 0 or bool(((values.abs() - size).abs() > tolerance)[~zero].any()):
        levels = values.flatten()
        low, high = levels.min(), levels.max()
        if bool((torch.minimum((levels - low).abs(), (levels - high).abs()) <= tolerance).all()) and low < high:
            text = f"its input's values, {float(low):.4g} and {float(high):.4g}, are neither opposite nor 0 and another"
            return Reason(text, True)
        return Reason("its input is not binary")
    if bool(zero.any()) and not bool((values < -tolerance).any()):
        return Levels("step", 0)
    return Levels("sign", int(zero.sum()))


def probe(like: Tensor, seed: int = 0) -> Tensor:
    """Normal values of a tensor's shape and type, none of which is near a kink of a derivative."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    for kink in _KINKS:
        near = (values.abs() - kink).abs() < 0.01
        values = torch.where(near, values.sign() * (kink + 0.02), values)
    return values.to(like)


def is_sign(function: Any, like: Tensor) -> bool:
    """Whether a function of one tensor is the sign of each element, to rounding and but for 0."""
    for seed in (0, 1):
        values = probe(like, seed)
        try:
            got = function(values.clone())
        except Exception:  # it is somebody's own code, on values that it may not expect
            return False
        if not isinstance(got, Tensor) or got.shape != values.shape:
            return False
        if not bool(((got - values.sign()).abs() <= _ROUNDINGS * torch.finfo(values.dtype).eps * 4).all()):
            return False
    return True


def surrogate_of(function: Any, like: Tensor) -> str | None:
    """Name of the surrogate that a sign's derivative is; None where it is none of ours."""
    with torch.enable_grad():
        values = probe(like).requires_grad_()
        try:
            (got,) = torch.autograd.grad(function(values).sum(), values)
        except RuntimeError:  # no gradient at all
            return None
    return matching_surrogate(got, values.detach(), torch.ones_like(got))


def matching_surrogate(grad: Tensor, values: Tensor, straight: Tensor) -> str | None:
    """The surrogate by which `grad` is the gradient `straight` of a straight-through identity."""
    bound = 1e-4 * float(straight.abs().amax()) if straight.numel() else 0.0
    for name in SURROGATES:
        if bool(((grad - straight * derivative(values, name, "sign")).abs() <= bound).all()):
            return name
    return None


def tensors_like(module: nn.Module, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a module has of as many elements as a weight: attributes of its parameters, as latent weights, before these.

    Courbariaux and Hubara's layers write signs over their parameter and keep the latent weight as its attribute `org`.
    """
    for name, parameter in module.named_parameters():
        if parameter.numel() == weight.numel():
            for attribute, value in vars(parameter).items():
                if isinstance(value, Tensor) and value.numel() == weight.numel():
                    yield f"{name}.{attribute}", value
            yield name, parameter


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, attributes of its parameters included."""
    made = copy.deepcopy(model)
    for own, parameter in zip(made.parameters(), model.parameters(), strict=True):
        vars(own).update(copy.deepcopy(vars(parameter)))
    return made
