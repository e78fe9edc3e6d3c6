"""Calls of binary.conv2d, conv1d and linear with constant weights, as the layers that do the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit_ext.binary import convolution, layers

_LAYERS: dict[Any, Any] = {
    convolution.conv2d: layers.BinaryConv2d, convolution.conv1d: layers.BinaryConv1d,
    convolution.linear: layers.BinaryLinear,
}
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_value")
_OTHERS = ("threshold", "flip", "residual", "out_dtype")  # that no layer has


def is_binary_call(node: fx.Node) -> bool:
    """A call of one of the functions."""
    return node.op == "call_function" and node.target in _LAYERS


def _arguments_of(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, those of conv1d that it hands on to conv2d among them."""
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    return bound | bound.pop("options", {})


def reason_against(node: fx.Node, constant: Callable[[Any], Any], values: Mapping[fx.Node, Any]) -> str | None:
    """Why a call is not that of a layer.

    Args:
        node: a binary call.
        constant: the value of an argument that is the same in every call, or None.
        values: of nodes on an example.
    """
    given = _arguments_of(node)
    if not isinstance(values.get(given["input"]), Tensor):
        return "its input is packed already"
    if not isinstance(constant(given["weight"]), Tensor):
        return "its weight is not a constant tensor"
    for name in ("scale", "bias"):
        if given.get(name) is not None and constant(given[name]) is None:
            return f"its {name} is not constant"
    extra = [name for name in _OTHERS if given.get(name) is not None]
    if extra:
        return f"it takes {extra[0]}, which no layer has"
    if any(isinstance(given.get(name), fx.Node) for name in (*_GEOMETRY, "encoding")):
        return "its geometry is not constant"
    return None


def layer_of(node: fx.Node, constant: Callable[[Any], Any]) -> tuple[Any, nn.Module]:
    """Input of a call and the layer that gives the same; `constant` as above, where nothing is against it."""
    given = _arguments_of(node)
    weight = constant(given["weight"])
    filters, scale, bias = weight.shape[0], constant(given.get("scale")), constant(given.get("bias"))
    kind, linear = _LAYERS[node.target], node.target is convolution.linear
    options: dict[str, Any] = {name: given[name] for name in ("encoding", "surrogate") if name in given}
    if not linear:
        options |= {name: given[name] for name in _GEOMETRY if name in given}
    sizes = (weight.shape[1] * given.get("groups", 1), filters, *([] if linear else [tuple(weight.shape[2:])]))
    layer = kind(*sizes, bias=bias is not None, weight_scale=None if scale is None else "learned", **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
        for parameter, value in (("learned_scale", scale), ("bias", bias)):
            if value is not None:
                getattr(layer, parameter).copy_(torch.as_tensor(value).reshape(-1).expand(filters))
    return given["input"], layer.eval()
