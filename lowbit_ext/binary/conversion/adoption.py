"""Makes the binary layer that stands for a module of other origin, from what the module did while its model ran."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext.binary import layers
from lowbit_ext.binary.conversion.recognition import (
    Product,
    Reason,
    Signs,
    Visit,
    levels_of,
    matching_surrogate,
    probe,
    signs_of_weight,
    tensors_like,
)
from lowbit_ext.binary.surrogates import SURROGATES
from lowbit_ext.binary.two_levels import TwoLevelConv2d

_LAYERS: dict[type, Any] = {
    nn.Conv2d: layers.BinaryConv2d, nn.Conv1d: layers.BinaryConv1d, nn.Linear: layers.BinaryLinear,
}
_SAME_SCALE = 1e-5  # relative; means are rounded in another order
_NOT_ITS_OWN = ", in place of a derivative of its own"
_ROUNDING = 1e-5  # of the largest sum that a filter can have


@dataclasses.dataclass
class Adopted:
    """A layer and how it came about.

    Attributes:
        layer: in place of the module.
        reads_signs: whether something in front makes the signs, with a derivative of its own.
        fitted: whether scale and bias were fitted to the module's result.
        zeros: weights, activations on the example that are exactly 0, and +1 in the layer.
        notes: for the report.
    """

    layer: Any
    reads_signs: bool
    fitted: bool
    zeros: tuple[int, int]
    notes: list[str]


def adopt(calls: list[Visit], surrogate: str) -> Adopted | str | None:
    """The binary layer for a module.

    Args:
        calls: the module's, at least one with a product.
        surrogate: of a layer that binarizes its input, where the module's derivative is none of ours.

    Returns:
        The layer, the reason why there is none, or None of a float layer.
    """
    visit = calls[0]
    product = visit.products[0]
    largest = [float(value.detach().abs().max()) for value in visit.module.parameters() if value.numel()]
    signs, levels = signs_of_weight(product.weight, max(largest, default=0.0)), levels_of(product.input)
    one_tap = product.weight[0].numel() == 1
    two_levels = [isinstance(each, Reason) and each.two_valued for each in (signs, levels)]
    if any(two_levels) and not one_tap:
        adopted = _adopt_two_levels(calls, product, surrogate)
        if adopted is not None:
            return adopted
    if isinstance(levels, Reason) and (isinstance(signs, Reason) or one_tap):
        return next((each.text for each in (signs, levels) if isinstance(each, Reason) and each.two_valued), None)
    if isinstance(signs, Reason):
        return signs.text
    if isinstance(levels, Reason):
        return levels.text
    if any(len(call.products) != 1 for call in calls):
        return "its forward has several convolutions or matrix products"
    if any(not torch.equal(call.products[0].weight, product.weight) for call in calls):
        return "its weight is another one in every call"
    if len(visit.inputs) != 1 or not isinstance(visit.inputs[0], Tensor) or not isinstance(visit.output, Tensor):
        return "it takes more than one tensor, or returns none"
    where = _place_of_signs(visit.inputs[0], product.input, levels.encoding)
    if where is None:
        return "its input is padded, scaled or shifted before it is binarized; a rule for its class can say how"
    return _Adoption(calls, product, signs, levels.zeros, *where).made(surrogate)


def _place_of_signs(given: Tensor, values: Tensor, encoding: str) -> tuple[str, bool] | None:
    """Encoding, and whether what comes in is binary already; None where it is something else that is binarized."""
    if given.shape != values.shape or not given.is_floating_point():
        return None
    factor = values.abs().amax()
    close = 1e-5 * float(factor)
    if bool(((given - values).abs() <= close).all()):
        return encoding, True
    if bool(((given.sign() * factor - values).abs() <= close).all()):
        return "sign", False
    if bool((((given >= 0.5) * factor - values).abs() <= close).all()):
        return "step", False
    return None


def _two_levels(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of rows (R, n) of two values each, center - size and center + size: center and size (R,). None of others."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    close = 1e-5 * float(values.abs().amax())
    if bool((torch.minimum((values - low).abs(), (values - high).abs()) > close).any()) or bool((low == high).any()):
        return None
    return (low + high).flatten() / 2, (high - low).flatten() / 2


def _adopt_two_levels(calls: list[Visit], product: Product, surrogate: str) -> Adopted | None:
    """A convolution of two-level values, as AdaBin's; None where it is another."""
    visit = calls[0]
    weight, activation = _two_levels(product.weight.flatten(1)), _two_levels(product.input.reshape(1, -1))
    plain = product.kind is nn.Conv2d and product.options.get("groups", 1) == 1
    if weight is None or activation is None or not plain or len(visit.products) != 1 or len(visit.inputs) != 1:
        return None
    (offset, scale), (beta, alpha) = weight, (float(value) for value in activation)
    signs = Signs(torch.where(product.weight >= offset.view(-1, 1, 1, 1), 1.0, -1.0).to(product.weight), scale, 0)
    adoption = _Adoption(calls, product, signs, 0, "sign", False)
    latent = adoption.latent()
    options: dict[str, Any] = {name: _sizes(value) for name, value in product.options.items() if name != "groups"}
    with torch.random.fork_rng(devices=[]):
        conv = layers.BinaryConv2d(
            latent.shape[1], latent.shape[0], (latent.shape[2], latent.shape[3]), bias=False, weight_scale="learned",
            surrogate=surrogate, device=latent.device, dtype=latent.dtype, **options,
        )
    with torch.no_grad():
        conv.weight.copy_(latent)
        conv.learned_scale.copy_(scale)
    layer = TwoLevelConv2d(conv, offset, alpha, beta, product.bias)
    values = probe(visit.inputs[0])
    reads_levels = torch.allclose(visit.inputs[0], product.input, rtol=0, atol=1e-5 * (alpha + abs(beta)))
    if reads_levels:
        values = values.sign() * alpha + beta
        conv.surrogate, remark = "identity", ""
    else:
        conv.surrogate, remark = _surrogate_of_levels(layer, visit, surrogate)
    pairs = [(call.inputs[0], call.output) for call in calls] + [(values, visit.module(values.clone()))]
    largest = alpha * float((scale + offset.abs()).max()) * latent[0].numel()
    for given, wanted in pairs:
        if not isinstance(wanted, Tensor) or wanted.dim() != 4 or given.shape[1:] != visit.inputs[0].shape[1:]:
            return None
        got = layer(given)
        if got.shape != wanted.shape or bool(((got - wanted).abs() > _ROUNDING * largest).any()):
            return None
    trained = any(value.requires_grad for value in visit.module.parameters())
    notes = [*adoption.notes, f"surrogate {conv.surrogate!r}{remark}"]
    return Adopted(layer.requires_grad_(trained).train(visit.module.training), False, False, (0, 0), notes)


def _surrogate_of_levels(layer: TwoLevelConv2d, visit: Visit, otherwise: str) -> tuple[str, str]:
    """The surrogate by which the layer has the module's gradient, or `otherwise`, with a remark that says so."""
    with torch.enable_grad():
        values = probe(visit.inputs[0])
        own_input = values.clone().requires_grad_()
        own = visit.module(own_input)
        weights = probe(own)
        (wanted,) = torch.autograd.grad((own * weights).sum(), own_input, allow_unused=True)
        for name in SURROGATES if wanted is not None else ():
            layer.conv.surrogate = name
            inputs = values.clone().requires_grad_()
            (got,) = torch.autograd.grad((layer(inputs) * weights).sum(), inputs)
            if bool(((got - wanted).abs() <= 1e-4 * wanted.abs().amax()).all()):
                return name, ""
    return otherwise, _NOT_ITS_OWN


class _Adoption:
    """One module on its way to a layer."""

    def __init__(
        self, calls: list[Visit], product: Product, signs: Signs, zeros: int, encoding: str, reads_signs: bool
    ) -> None:
        self.calls, self.product, self.signs = calls, product, signs
        self.module, self.input, self.output = calls[0].module, calls[0].inputs[0], calls[0].output
        self.encoding, self.reads_signs, self.fitted = encoding, reads_signs, False
        self.zeros = signs.zeros, zeros
        self.notes: list[str] = []
        self.factor = float(product.input.abs().amax())  # of the binary values

    def made(self, surrogate: str) -> Adopted | str:
        """The layer, if it does on the example and on other values what the module does."""
        latent = self.latent()
        bias = None if self.product.bias is None else self.product.bias.detach()
        layer = self._layer(latent, self.signs.scale * self.factor, bias)
        if not self._agrees(layer, self.input, self.output):
            scale, bias = self._fit(layer)
            layer = self._layer(latent, scale, bias)
            self.fitted = True
            self.notes.append("scale and bias fitted to its result")
        if any(not self._agrees(layer, call.inputs[0], call.output) for call in self.calls):
            return "its result is not scale * (convolution of signs) + bias; a rule for its class can say what it is"
        values = probe(self.input, seed=1)
        if self.reads_signs:
            values = values.sign() * self.factor if self.encoding == "sign" else (values > 0) * self.factor
        if not self._agrees(layer, values, self.module(values.clone())):
            return "on other values it gives something else than on the example"
        self._choose_surrogate(layer, surrogate)
        return Adopted(layer, self.reads_signs, self.fitted, self.zeros, self.notes)

    def latent(self) -> Tensor:
        """The module's own weight where it has the signs; else centred by filter; else its magnitudes with signs."""
        signs, shape = self.signs.signs > 0, self.signs.signs.shape
        own = [(name, value.detach().reshape(shape)) for name, value in tensors_like(self.module, signs)]
        for name, value in own:
            if torch.equal(value >= 0, signs):
                self.notes.append(f"its {name}")
                return value
        for name, value in own:
            centred = value - value.flatten(1).mean(1).reshape(-1, *(1,) * (len(shape) - 1))
            if torch.equal(centred >= 0, signs):
                self.notes.append(f"its {name} less the mean of each filter")
                return centred
        if own:
            name, value = own[0]
            self.notes.append(f"magnitudes of its {name} with the signs of its forward")
            # A magnitude of 0 has the sign +1 alone.
            least = torch.finfo(value.dtype).tiny
            return torch.where(signs, value.abs(), -value.abs().clamp_min(least))
        self.notes.append("scale * sign of its forward")
        return self.product.weight

    def _layer(self, latent: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
        """The layer with this weight, its scale by the rule that gives these values or as a parameter."""
        weight_scale: str | None = "learned"
        for rule in (None, "channel", "layer"):
            value = layers.weight_scale_of(latent, rule)
            value = torch.ones_like(scale) if value is None else value.to(scale.dtype)
            if torch.allclose(value.expand_as(scale), scale, rtol=_SAME_SCALE, atol=0):
                weight_scale = rule
                break
        options: dict[str, Any] = {
            "bias": bias is not None, "device": latent.device, "dtype": latent.dtype, "encoding": self.encoding,
            "surrogate": "identity", "weight_scale": weight_scale,
        }
        groups = self.product.options.get("groups", 1)
        sizes: list[Any] = [latent.shape[1] * groups, latent.shape[0]]
        kind = _LAYERS[self.product.kind]
        if self.product.kind is not nn.Linear:
            options |= {name: _sizes(value) for name, value in self.product.options.items()}
            sizes.append(tuple(latent.shape[2:]))
        with torch.random.fork_rng(devices=[]):
            layer = kind(*sizes, **options)
        with torch.no_grad():
            layer.weight.copy_(latent)
            if weight_scale == "learned":
                layer.learned_scale.copy_(scale)
            if bias is not None:
                layer.bias.copy_(bias)
        wanted = any(value.requires_grad for value in self.module.parameters())
        return layer.requires_grad_(wanted).train(self.module.training)

    def _agrees(self, layer: Any, values: Tensor, wanted: Any) -> bool:
        """Whether the layer gives what is wanted, to rounding and but for zeros, which are +1 here."""
        got = layer(values)
        if not isinstance(wanted, Tensor) or got.shape != wanted.shape:
            return False
        scale = layer.scale()
        unit = float(scale.abs().max()) if scale is not None else 1.0
        bound = _ROUNDING * (unit * layer.weight[0].numel() + float(wanted.abs().amax()))
        allowed = torch.full_like(got, bound)
        if self.zeros[0]:
            allowed += unit * self.product(torch.ones_like(values), (self.product.weight == 0).to(values))
        if self.encoding == "sign":
            allowed += unit * self.product((values == 0).to(values), torch.ones_like(self.product.weight))
        return bool(((got - wanted).abs() <= allowed).all())

    def _fit(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Scale and bias of each filter by least squares, for modules that scale or shift behind their product."""
        axis = -1 if isinstance(layer, nn.Linear) else 1
        bits = torch.where(self.product.input >= 0, 1, -1) if self.encoding == "sign" else self.product.input > 0
        sums = self.product(bits.to(self.output), self.signs.signs).movedim(axis, 0).flatten(1).double()
        if self.output.shape != layer(self.input).shape:
            return self.signs.scale, None
        output = self.output.movedim(axis, 0).flatten(1).double()
        mean, centred = sums.mean(1, keepdim=True), sums - sums.mean(1, keepdim=True)
        variance = centred.square().sum(1)
        scale = (centred * output).sum(1) / variance.clamp_min(torch.finfo(torch.float64).tiny)
        scale = torch.where(variance > 0, scale, self.signs.scale.double())
        bias = output.mean(1) - scale * mean.flatten()
        small = bias.abs().max() <= _ROUNDING * output.abs().max()
        return scale.to(self.output.dtype), None if bool(small) else bias.to(self.output.dtype)

    def _choose_surrogate(self, layer: Any, otherwise: str) -> None:
        """Identity where signs come in; else the module's own derivative, or where that is none of ours `otherwise`."""
        layer.surrogate = "identity"
        if self.reads_signs:
            return
        found = None
        if self.encoding == "sign":
            with torch.enable_grad():
                values = probe(self.input)
                inputs = values.clone().requires_grad_(), values.clone().requires_grad_()  # modules may write into it
                straight, own = layer(inputs[0]), self.module(inputs[1])
                if own.requires_grad:
                    weights = probe(own)
                    (straight,) = torch.autograd.grad((straight * weights).sum(), inputs[0])
                    (grad,) = torch.autograd.grad((own * weights).sum(), inputs[1], allow_unused=True)
                    found = None if grad is None else matching_surrogate(grad, values, straight)
        layer.surrogate = found or otherwise
        self.notes.append(f"surrogate {layer.surrogate!r}{'' if found else _NOT_ITS_OWN}")


def _sizes(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
