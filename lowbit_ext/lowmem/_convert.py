"""convert(): a model whose batch norms, ReLUs, convolutions and linear layers keep codes of a few bits."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import fx, nn

from lowbit_ext._graph import first_line
from lowbit_ext._torch import is_compiled
from lowbit_ext.lowmem import activations, blocks, norms
from lowbit_ext.lowmem._layers import (
    REPORT,
    Conversion,
    batch_norm_class,
    curve_of,
    has_hooks,
    has_own_activation,
    is_converted,
    join,
    keeps_bits,
    of_own_layer,
)
from lowbit_ext.lowmem._modes import trace_in_both_modes
from lowbit_ext.lowmem._rewrite import Converter
from lowbit_ext.lowmem.codes import check_settings
from lowbit_ext.lowmem.hooks import saved_tensors

__all__ = ["Conversion", "convert", "report"]


def convert(model: nn.Module, bits: int = 4, range: float | None = None, *, rest: str = "exact") -> nn.Module:
    """The same model, exact in its forward pass, that keeps codes of `bits` bits for its backward pass.

    Batch norms keep codes of their result, with the ReLU behind them where there is one; ReLUs elsewhere keep codes in
    groups of 256; layer, RMS, group and instance norms codes of the normalised value, of 8 bits where an activation
    function other than ReLU reads them; nn.SyncBatchNorm is a batch norm. ReLU6, Hardtanh, Hardsigmoid, LeakyReLU and
    dropout keep a bit an element. SiLU, GELU, Hardswish and Mish read the codes of their argument, which have 8 bits. A
    convolution or linear layer reads the codes of its input, through functions of one element, products as those of
    squeeze and excitation, concatenation, pooling or reshapes, and keeps nothing; where there are none, it makes codes
    of its own for the gradient of its weight. Max-pooling keeps a byte a window, average pooling nothing. Layers of
    lowbit_ext.binary and lowbit_ext.duo keep bits already. Everything else stays as it is, or is coded: see `rest`.
    Where torch.fx cannot trace a model, its layers are converted one by one, and find codes with the values that they
    are given. `report` lists all.

    Args:
        model: any module: ResNets, MobileNets, DenseNets, transformers. It is not modified, but the result shares its
            parameters and buffers: optimizers and state_dicts of the one serve the other. Where torch.fx can trace the
            model the result is a torch.fx.GraphModule with the same names of layers, otherwise its class stays and
            its children are converted one by one. Hooks stay, and a model within that has hooks is converted on its
            own; hooks of a batch norm, ReLU or pooling, whose result is no longer there to be seen, and those that
            may change the input of a convolution or linear layer are a reason to leave that layer.
        bits: 2, 4 or 8.
        range: standard deviations that a channel's codes span; None: 8 for 4 bits, 9 for 8, 6 (the paper's) for 2.
        rest: "exact": what no rule above is for is kept as it is. "codes": the model runs within saved_tensors(bits):
            attention, the model's input and whatever else is kept becomes codes as well, and the gradients that pass
            attention and the like are rounded; not within graphs of torch.compile.

    Returns:
        The converted model, in the mode (training or evaluation) of each of the model's layers. It can be copied,
        pickled and compiled; what Module.compile() compiled is to be compiled again. A model that was converted before
        comes back as it is, in a copy.

    Gradient:
        see LowMemBlock; what compares with a threshold is exact everywhere, derivatives of curves have the error of 8
        bits of their argument. There is no second derivative.

    Raises:
        TypeError: model is no module, bits no int, or range no number.
        ValueError: bits or range out of range, another `rest`; a result of torch.compile, which goes on running the
            original, as does a module whose forward is an attribute of the object. Within a model these are left as
            they are.

    Source:
        Chakrabarti and Moseley, "Backprop with approximate activations for memory-efficient network training", NeurIPS
        2019, section 3; groups: Chen et al., "ActNN", ICML 2021.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    reason = _uncopyable(model)
    if reason is not None:
        raise ValueError(f"convert: model cannot be converted: {reason}")
    bits, span = check_settings("convert", bits, range)
    check_rest("convert", rest)
    found: list[Conversion] = []
    result = _convert(model, "", bits, span, found)
    vars(result)[REPORT] = tuple(found)
    if rest == "codes" and not any(isinstance(hook, _CodeRest) for hook in result._forward_pre_hooks.values()):
        hook = _CodeRest(bits)
        result.register_forward_pre_hook(hook)
        result.register_forward_hook(hook.leave, always_call=True)
    return result


def check_rest(name: str, rest: str) -> None:
    """Raises ValueError for what convert's argument may not be."""
    if not isinstance(rest, str) or rest not in ("exact", "codes"):
        raise ValueError(f"{name}: rest must be 'exact' or 'codes', got {rest!r}")


class _CodeRest:
    """Runs a model's forward pass within saved_tensors: called in front of it, and leave() behind."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.entered = threading.local()

    def __call__(self, module: nn.Module, args: Any) -> None:
        # torch.compile takes no hooks of autograd within its graphs: there saved_tensors(compiled=True) is of use.
        if not torch.compiler.is_compiling():
            context = saved_tensors(self.bits)
            vars(self.entered).setdefault("contexts", []).append(context.__enter__())

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if not torch.compiler.is_compiling():
            self.entered.contexts.pop().__exit__(None, None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _CodeRest, (self.bits,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CodeRest:
        made = memo[id(self)] = _CodeRest(self.bits)
        return made


def report(model: nn.Module) -> tuple[Conversion, ...]:
    """What `convert` did to each layer of a converted model, and why it left the others.

    Args:
        model: of `convert`, or a copy of one.

    Returns:
        One Conversion for each layer, functional ReLU and functional pooling; several for a layer that is called
        several times with different outcomes.

    Raises:
        TypeError: model is no module.
        ValueError: `convert` did not make the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    if REPORT not in vars(model):
        raise ValueError(f"report: model must be one that convert made, got {type(model).__name__}")
    return vars(model)[REPORT]


def _uncopyable(module: nn.Module) -> str | None:
    """Why a second module with the same attributes would run the first one's layers, or None."""
    if is_compiled(module):
        return "torch.compile has compiled it; convert it first and compile the result"
    if "forward" in vars(module):
        return "its forward is an attribute of the object, not of its class"
    return None


def _copied(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """Second modules of the same classes, all the way down, on the same parameters and buffers."""
    if isinstance(module, torch.jit.ScriptModule) or _uncopyable(module) is not None:
        return module
    if module not in copies:
        made = copies[module] = object.__new__(type(module))
        made.__dict__ = blocks.shared_attributes(module)
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else _copied(child, copies)
    return copies[module]


def _convert(model: nn.Module, prefix: str, bits: int, span: float, found: list[Conversion]) -> nn.Module:
    """The converted module; its children one by one where the whole cannot be traced."""
    if is_converted(model):
        entries = vars(model).get(REPORT, (Conversion("", type(model).__name__, True, "converted before"),))
        found.extend(dataclasses.replace(entry, name=join(prefix, entry.name)) for entry in entries)
        return _copied(model, {})
    reason = _uncopyable(model)
    if reason is not None:
        found.append(Conversion(prefix, type(model).__name__, False, reason))
        return model
    if not any(True for _ in model.children()):
        return _convert_alone(model, prefix, bits, span, found)
    copies: dict[nn.Module, nn.Module] = {}
    made = _copied(model, copies)
    try:
        graph = trace_in_both_modes(made, _is_whole)
        reason = "its graph is another one in evaluation"
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        graph, reason = None, first_line(error)
    for original, copied in copies.items():
        copied.training = original.training
    if graph is not None:
        return Converter(
            made, graph, prefix, bits, span, found,
            lambda module, name: _convert(module, name, bits, span, found),
        ).result
    children = {child: _convert(child, join(prefix, name), bits, span, found) for name, child in made.named_children()}
    made._modules.update({name: children[child] for name, child in made._modules.items() if child is not None})
    how = f"children one by one, torch.fx cannot trace it: {reason}"
    found.append(Conversion(prefix, type(model).__name__, False, how))
    return made


def _is_whole(module: nn.Module) -> bool:
    """Tracing looks into the containers without hooks; those with hooks are called as they are."""
    alone = has_hooks(module) or isinstance(module, fx.GraphModule) or is_converted(module)
    return alone or _uncopyable(module) is not None or has_own_activation(module)


def _convert_alone(model: nn.Module, prefix: str, bits: int, span: float, found: list[Conversion]) -> nn.Module:
    """A layer whose neighbours are unknown: it finds the codes of its input with the value, where that has some."""
    made, how = _copied(model, {}), "alone: its neighbours are unknown"
    converted = False
    if keeps_bits(model) is not None:
        converted, how = of_own_layer(model)
    elif not has_hooks(model) and not getattr(model, "inplace", False):
        curve = curve_of(type(model), vars(model), model)
        if batch_norm_class(model) is not None:
            made, how = batch_norm_class(model).like(model, bits, span, alone=True), "codes of its result"
        elif type(model) in blocks.READERS and blocks.unreadable(model) is None:
            made, how = blocks.READERS[type(model)].like(model, bits), "codes of its input"
        elif type(model) in norms.NORMS:
            made, how = norms.NORMS[type(model)].like(model, bits, alone=True), "codes of its normalised value"
        elif curve is not None:
            made, how = activations.Activation(curve, made), "codes of its input, or a bit"
        elif type(model) is nn.ReLU:
            made, how = activations.ReLU(bits), "codes of its result in groups of 256"
        elif type(model) is nn.Dropout:
            made, how = activations.Dropout.like(model), "a bit an element"
        elif blocks.is_transposed_linear(model):
            made, how = blocks.TransposedLinear.like(model, bits), "codes of its input"
        converted = how != "alone: its neighbours are unknown"
        made.training = model.training
    found.append(Conversion(prefix, type(model).__name__, converted, how))
    return made
