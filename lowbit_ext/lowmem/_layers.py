"""What convert() knows of layers: which have a form with codes, and what a report says of one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import nn

from lowbit_ext._rebuilt import Rebuilt
from lowbit_ext.lowmem import _synchronised, activations, blocks, norms
from lowbit_ext.lowmem._stored import Curve

# Activation functions with their arguments: names, which modules have as attributes, and defaults.
CURVES: dict[Any, tuple[str, tuple[tuple[str, float], ...]]] = {
    nn.ReLU6: ("hardtanh", (("min_val", 0.0), ("max_val", 6.0))),
    F.relu6: ("hardtanh", (("min_val", 0.0), ("max_val", 6.0))),
    **dict.fromkeys((nn.Hardtanh, F.hardtanh), ("hardtanh", (("min_val", -1.0), ("max_val", 1.0)))),
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu), ("leaky_relu", (("negative_slope", 0.01),))),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), ("hardsigmoid", ())),
    **dict.fromkeys((nn.SiLU, F.silu), ("silu", ())), **dict.fromkeys((nn.Mish, F.mish), ("mish", ())),
    **dict.fromkeys((nn.Hardswish, F.hardswish), ("hardswish", ())),
    **dict.fromkeys((nn.GELU, F.gelu), ("gelu", ())),
}
REPORT = "lowmem_report"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = (blocks.__name__, activations.__name__, norms.__name__, _synchronised.__name__)
_BATCH_NORMS = {**blocks.BATCH_NORMS, nn.SyncBatchNorm: _synchronised.SyncBatchNorm}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of one layer.

    Attributes:
        name: within the model; of a function, that of its node in the graph.
        kind: name of the original class, or of the function.
        converted: whether it keeps codes, or reads codes and keeps nothing; of the layers of lowbit_ext.binary and
            lowbit_ext.duo, which stay as they are, whether they keep bits.
        how: what it keeps now, or why it was left.
    """

    name: str
    kind: str
    converted: bool
    how: str


def has_hooks(module: nn.Module | None) -> bool:
    """Whether somebody watches or changes what the module takes or gives."""
    return any(getattr(module, name, None) for name in _HOOKS)


def keeps_bits(module: nn.Module | None) -> bool | None:
    """Whether a quantised layer of this library reads bits alone in its backward pass; None of other modules."""
    return getattr(module, "keeps_bits", None)


def of_own_layer(module: nn.Module) -> tuple[bool, str]:
    """What a report says of a quantised layer of this library."""
    bits = bool(keeps_bits(module))
    return bits, "keeps bits by itself" if bits else f"{type(module).__name__} keeps its input"


def join(prefix: str, name: str) -> str:
    """A name within a part of the model."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def has_own_activation(module: nn.Module | None) -> bool:
    """timm's batch norm with a dropout and an activation function in it."""
    return type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d) and {"drop", "act"} <= set(
        module._modules
    )


def batch_norm_class(module: nn.Module) -> Any:
    """The form with codes of a batch norm, or None."""
    return blocks.BatchNorm2d if has_own_activation(module) else _BATCH_NORMS.get(type(module))


def curve_of(kind: Any, options: Any, module: nn.Module | None) -> Curve | nn.Module | None:
    """The activation function that a class or function is with these arguments, or None."""
    if kind not in CURVES:
        return module if type(module).__module__ == "transformers.activations" and module is not None else None
    name, arguments = CURVES[kind]
    fixed = kind in (nn.ReLU6, F.relu6)
    numbers = tuple(default if fixed else options.get(argument, default) for argument, default in arguments)
    words = (("approximate", options.get("approximate", "none")),) if name == "gelu" else ()
    known = all(isinstance(number, int | float) for number in numbers) and all(isinstance(v, str) for _, v in words)
    return Curve(name, tuple(map(float, numbers)), words) if known else None


def is_converted(module: nn.Module) -> bool:
    """Whether convert() made a module, or it is a layer of its."""
    return REPORT in vars(module) or isinstance(module, Rebuilt) or type(module).__module__ in _OWN
