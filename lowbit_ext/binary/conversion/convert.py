"""convert(): networks whose binary layers are of other origin, on the layers of this package."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext import _arguments
from lowbit_ext._graph import first_line, has_binary_weight, is_own_layer
from lowbit_ext._torch import pytree
from lowbit_ext.binary.conversion.adoption import Adopted, adopt
from lowbit_ext.binary.conversion.inline_signs import with_activations
from lowbit_ext.binary.conversion.recognition import Visit, copied, is_sign, run, surrogate_of, visits
from lowbit_ext.binary.layers import BinaryActivation
from lowbit_ext.binary.surrogates import SURROGATES

__all__ = ["LayerConversion", "conversions", "convert"]

_REPORT = "binary_conversions"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}  # of outputs, relative to the largest
_Rule = Callable[[Any], nn.Module]


@dataclasses.dataclass(frozen=True)
class LayerConversion:
    """What `convert` did with one module.

    Attributes:
        name: within the model.
        kind: name of the original class.
        converted: whether a layer of this package stands in its place now.
        how: what the layer took over, or why the module was left.
    """

    name: str
    kind: str
    converted: bool
    how: str


def convert(
    model: nn.Module, example_input: Any, *, rules: Mapping[type, _Rule] | None = None, surrogate: str = "clip"
) -> nn.Module:
    """The same network on BinaryConv2d, BinaryConv1d, BinaryLinear and BinaryActivation, to train on or to pack.

    The model is run on the example. A module that computes one convolution or matrix product becomes a layer where its
    weight, however it was made, is scale * sign in each filter and its input is binary, made so in front of it or as
    the sign (or step at 1/2) of what comes in. Modules without parameters that give the sign of their input become
    BinaryActivations, as do signs within the forward of a module that torch.fx can trace. Convolutions of two levels
    that are not opposite become TwoLevelConv2d. Every layer is compared with the module on the example and on random
    values, and the network with the model.

    Models of bfloat16 or float16 are looked at in float32 and have their type again in the end.

    A layer's weight is the module's own parameter where it has the signs; otherwise that less the mean of its filter,
    or its magnitudes with the signs. The scale follows from this weight (weight_scale "channel" or "layer") or is
    "learned". In training the gradients are the layers' own: that of a module's derivative where it is one of ours.

    Args:
        model: a module; not modified. Its parts that are not converted are copied as they are.
        example_input: a tensor, a tuple of the model's positional arguments or a dictionary of its keyword arguments,
            with values as they occur in use.
        rules: for classes of modules, what makes the module to stand in place of one: a binary layer or any other
            module that gives the same. They come first, the class that is nearest in the module's own.
        surrogate: of signs whose derivative is none of lowbit_ext.binary.surrogates.

    Returns:
        The converted copy, in the model's modes; `conversions` lists what became of each module. State dictionaries
        keep their names but for weights that the modules had under another one.

    Warns:
        UserWarning: names a module that looks binary and was left, and why; zeros among weights or binarized values,
            which count as +1 here, with the difference that they make.

    Raises:
        TypeError: not a module; rules that are no mapping of classes to functions, or whose result is no module.
        ValueError: unknown surrogate; the model does not run on the example; nothing could be converted (names the
            reasons) but activations; what a rule made, or the whole network, gives something else than the original.

    Source:
        Rastegari et al., "XNOR-Net", ECCV 2016; Liu et al., "Bi-Real Net", ECCV 2018; Qin et al., "IR-Net", CVPR 2020;
        Liu et al., "ReActNet", ECCV 2020; Tu et al., "AdaBin", ECCV 2022: layers like those of their public code.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    _arguments.choice("convert", "surrogate", surrogate, SURROGATES)
    for value in pytree.tree_leaves(example_input):
        if isinstance(value, Tensor):
            _arguments.tensor("convert", "example_input", value)
    checked = _check_rules(rules)
    converter = _Converter(model, example_input, checked, surrogate)
    converter.check()
    result = converter.result.to(converter.dtype)
    vars(result)[_REPORT] = tuple(converter.found)
    return result


def conversions(model: nn.Module) -> tuple[LayerConversion, ...]:
    """What `convert` did with each module of a model that it made.

    Args:
        model: of `convert`, or a copy of one.

    Raises:
        TypeError: model is no module.
        ValueError: `convert` did not make the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"conversions: model must be a torch.nn.Module, got {type(model).__name__}")
    if _REPORT not in vars(model):
        raise ValueError(f"conversions: model must be one that convert made, got {type(model).__name__}")
    return vars(model)[_REPORT]


def _check_rules(rules: Any) -> dict[type, _Rule]:
    if rules is None:
        return {}
    if not isinstance(rules, Mapping):
        raise TypeError(f"convert: rules must be a mapping of classes to functions, got {type(rules).__name__}")
    for kind, rule in rules.items():
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise TypeError(f"convert: rules must be for classes of modules, got {kind!r}")
        _arguments.function("convert", f"rules[{kind.__name__}]", rule)
    return dict(rules)


def _example_of(example: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of the example, which a model may write into, its floats in a type."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        return value.detach().to(dtype if dtype and value.is_floating_point() else value.dtype, copy=True)

    return pytree.tree_map(copied, example)


class _Converter:
    """One model on its way: `result`, and `found` for the report."""

    def __init__(self, model: nn.Module, example: Any, rules: dict[type, _Rule], surrogate: str) -> None:
        self.rules, self.surrogate = rules, surrogate
        dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
        half = dtype in (torch.bfloat16, torch.float16)
        # In half precision rounding would hide what a weight is made of.
        self.original = copied(model).float() if half else model
        self.example = _example_of(example, torch.float32) if half else example
        self.found: list[LayerConversion] = []
        self.warnings: list[str] = []
        self.zeros = self.fitted = False
        self.made: dict[nn.Module, nn.Module] = {}
        root = copied(self.original)
        modes = {module: module.training for module in root.modules()}
        root.eval()
        with torch.no_grad():
            try:
                self.expected, self.visits = visits(root, _example_of(self.example))
            except Exception as error:  # it is somebody's own forward
                raise ValueError(f"convert: model does not run on example_input: {first_line(error)}") from error
            self.calls: dict[nn.Module, list[Visit]] = {}
            for visit in self.visits:
                self.calls.setdefault(visit.module, []).append(visit)
            self.readers: set[nn.Module] = set()  # layers that read signs that something in front makes
            self._convert(root, "", set())
            self.result = self._put(root)
            self._convert_inline_signs()
        self.dtype = dtype if half else None
        for module, training in modes.items():
            module.training = training
            if module in self.made:
                for part in self.made[module].modules():
                    part.training = training

    # --- modules ------------------------------------------------------------------------------------------------------

    def _note(self, name: str, module: nn.Module, converted: bool, how: str) -> None:
        self.found.append(LayerConversion(name, type(module).__name__, converted, how))
        if not converted:
            self.warnings.append(f"{name or 'the model'} ({type(module).__name__}) stays as it is: {how}")

    def _convert(self, module: nn.Module, name: str, seen: set[nn.Module]) -> None:
        """Finds what stands for a module, or for those within it."""
        if module in seen:
            return
        seen.add(module)
        rule = next((self.rules[kind] for kind in type(module).__mro__ if kind in self.rules), None)
        if rule is not None:
            self.made[module] = self._by_rule(rule, module, name)
        elif has_binary_weight(module) or is_own_layer(module):
            self.found.append(LayerConversion(name, type(module).__name__, True, "as it was"))
        elif not self._convert_alone(module, name):
            for child_name, child in module.named_children():
                self._convert(child, f"{name}.{child_name}" if name else child_name, seen)

    def _by_rule(self, rule: _Rule, module: nn.Module, name: str) -> nn.Module:
        label = f"{name or 'the model'} ({type(module).__name__})"
        made = rule(module)
        if not isinstance(made, nn.Module):
            raise TypeError(f"convert: the rule for {label} must return a module, got {type(made).__name__}")
        made.eval()
        for visit in self.calls.get(module, ()):
            got = made(*visit.inputs)
            if _is_close(got, visit.output, 1e-4):
                continue
            differ = (
                f"what the rule for {label} made gives something else than the module: they differ by "
                f"{_difference(got, visit.output)}"
            )
            tensors = [value for value in (*visit.inputs, *module.parameters()) if isinstance(value, Tensor)]
            if not any(bool((value == 0).any()) for value in tensors):
                raise ValueError(f"convert: {differ}")
            self.zeros = True
            self.warnings.append(f"{differ}; its input or parameters have zeros, which are +1 here")
        self.found.append(LayerConversion(name, type(module).__name__, True, f"{type(made).__name__} by its rule"))
        return made

    def _convert_alone(self, module: nn.Module, name: str) -> bool:
        """Whether the module itself was dealt with, so that its children need not be."""
        calls = self.calls.get(module)
        if not calls:
            return False
        if any(call.products for call in calls):
            outcome = adopt([call for call in calls if call.products], self.surrogate)
        elif not any(True for _ in module.parameters()) and not type(module).__module__.startswith("torch.nn"):
            outcome = self._activation(calls)
        else:
            return False
        if outcome is None:
            return False
        if not isinstance(outcome, str) and any(vars(module)[hooks] for hooks in _HOOKS):
            outcome = "hooks watch it"
        if isinstance(outcome, str):
            self._note(name, module, False, outcome)
            return not any(self.calls.get(child) for child in module.children())
        self.made[module] = outcome.layer
        self._take(outcome, name, module)
        return True

    def _activation(self, calls: list[Visit]) -> Adopted | None:
        """A sign in a module of its own."""
        visit = calls[0]
        given = visit.inputs[0] if len(visit.inputs) == 1 else None
        if not isinstance(given, Tensor) or not given.is_floating_point() or not is_sign(visit.module, given):
            return None
        own = surrogate_of(visit.module, given)
        zeros = sum(int((call.inputs[0] == 0).sum()) for call in calls)
        note = f"surrogate {own or self.surrogate!r}{'' if own else ', in place of a derivative of its own'}"
        return Adopted(BinaryActivation("sign", own or self.surrogate), False, False, (0, zeros), [note])

    def _take(self, outcome: Adopted, name: str, module: nn.Module) -> None:
        layer = outcome.layer
        kind = type(layer).__name__
        scale = f", weight_scale={layer.weight_scale!r}" if hasattr(layer, "weight_scale") else ""
        self.found.append(
            LayerConversion(name, type(module).__name__, True, f"{kind}{scale}: {', '.join(outcome.notes)}")
        )
        if outcome.reads_signs:
            self.readers.add(layer)
        self.fitted = self.fitted or outcome.fitted
        for count, what in zip(outcome.zeros, ("weights are", "binarized values of the example are"), strict=True):
            if count:
                self.zeros = True
                self.warnings.append(f"{count} {what} exactly 0 in {name or 'the model'}, which is +1 here")

    def _put(self, root: nn.Module) -> nn.Module:
        """Puts what was made in the places of the modules."""
        if root in self.made:
            return self.made[root]
        for module in root.modules():
            for name, child in module._modules.items():
                if child in self.made:
                    module._modules[name] = self.made[child]
        return root

    def _convert_inline_signs(self) -> None:
        """Signs within the forward of modules whose layers read signs."""
        names = {module: name for name, module in self.result.named_modules()}
        parents: dict[nn.Module, Visit] = {}
        for visit in self.visits:
            layer = self.made.get(visit.module)
            if layer in self.readers and visit.parent is not None and visit.parent in names:
                parents.setdefault(visit.parent, self.calls[visit.parent][0])
        for module, visit in parents.items():
            if type(module).__module__.startswith("torch.nn") or any(vars(module)[hooks] for hooks in _HOOKS):
                continue
            outcome = with_activations(module, visit.inputs, self.surrogate)
            name, kind = names[module], type(module).__name__
            if isinstance(outcome, str):
                self._note(f"{name}.forward" if name else "forward", module, False, f"its own operations: {outcome}")
                continue
            made, remarks = outcome
            for remark in remarks:
                self.found.append(LayerConversion(name, kind, True, f"a sign in its forward: {remark}"))
            if made is not module:
                self.made[module] = made
        self.result = self._put(self.result)

    # --- the whole ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Warns of what was left; refuses a model of which nothing is converted or that has become another one."""
        if not any(not isinstance(layer, BinaryActivation) for layer in self.made.values()):
            reasons = "; ".join(self.warnings) or "it has no binary layer"
            raise ValueError(f"convert: nothing of the model could be converted; {reasons}")
        got, want, dtype = self._outputs()
        if not _is_close(got, want, _ROUNDING[dtype]):
            differ = f"the converted network's output differs from the model's by {_difference(got, want)}"
            if not (self.zeros or self.fitted) and dtype == torch.float64:
                raise ValueError(f"convert: {differ}, though every layer agrees")
            self.warnings.append(differ)
        for reason in self.warnings:
            warnings.warn(f"convert: {reason}", stacklevel=4)

    def _outputs(self) -> tuple[Any, Any, torch.dtype]:
        """Of both networks, in float64, in which no value is likely to cross 0 by rounding, where they run in it."""
        with torch.no_grad():
            try:
                both = [
                    run(_in_double(copied(network).eval()), _example_of(self.example, torch.float64))
                    for network in (self.result, self.original)
                ]
                return both[0], both[1], torch.float64
            except Exception:  # tensors that are neither parameters nor buffers stay in their type
                result = copy.deepcopy(self.result).eval()
                return run(result, _example_of(self.example)), self.expected, torch.float32


def _in_double(model: nn.Module) -> nn.Module:
    """The model in float64, attributes of its parameters included."""
    for parameter in model.double().parameters():
        for name, value in vars(parameter).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(parameter)[name] = value.double()
    return model


def _is_close(got: Any, want: Any, rounding: float) -> bool:
    """Whether two results agree, relative to the largest value."""
    (gots, came), (wants, structure) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    if came != structure:
        return False
    for a, b in zip(gots, wants, strict=True):
        if isinstance(b, Tensor):
            if not isinstance(a, Tensor) or a.shape != b.shape:
                return False
            bound = rounding * float(b.abs().max()) if b.numel() else 0.0
            if bool(((a - b).abs() > bound).any()):
                return False
    return True


def _difference(got: Any, want: Any) -> str:
    """The largest difference of two results, and the largest value."""
    pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape]
    if not tensors:
        return "their shapes"
    largest = max(float((a - b).abs().max()) for a, b in tensors)
    return f"up to {largest:.3g}, of values up to {max(float(b.abs().max()) for _, b in tensors):.3g}"
