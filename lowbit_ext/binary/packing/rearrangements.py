"""Nodes that only move values of an image: shuffles of channels and pixels, which bits can go through as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit_ext.binary.packing.packed_layers import Rearrangement

if TYPE_CHECKING:
    from lowbit_ext.binary.packing.chains import Model

_SHUFFLES: dict[Any, tuple[Any, str]] = {  # torch's function, and the name of its argument
    **dict.fromkeys((nn.ChannelShuffle, F.channel_shuffle, torch.channel_shuffle), (torch.channel_shuffle, "groups")),
    **dict.fromkeys((nn.PixelShuffle, F.pixel_shuffle, torch.pixel_shuffle), (torch.pixel_shuffle, "upscale_factor")),
    **dict.fromkeys(
        (nn.PixelUnshuffle, F.pixel_unshuffle, torch.pixel_unshuffle), (torch.pixel_unshuffle, "downscale_factor")
    ),
}
_VIEWS = ("view", "reshape", torch.reshape, "contiguous", "transpose", torch.transpose, "permute", torch.permute)


def rearrangement(model: Model, node: fx.Node) -> Rearrangement | None:
    """What a node does to a batch of images, or None of others."""
    if model.kind(node) not in _SHUFFLES or len(model.shape(node)) != 4 or model.axis(node) != 1:
        return None
    function, name = _SHUFFLES[model.kind(node)]
    argument = model.options(node, (name,)).get(name)
    return Rearrangement(function, (argument,)) if isinstance(argument, int) else None


def name_channel_shuffles(model: Model) -> bool:
    """Puts one node for a channel shuffle that is spelled (N, C, H, W) -> (N, g, C / g, H, W) -> (N, C / g, g, H, W) ->
    (N, C, H, W), as most networks do; whether there was one.
    """
    found = False
    for node in model.graph.nodes:
        shape = model.shape(node)
        if model.kind(node) not in _VIEWS or len(shape) != 4:
            continue
        inner, groups = node.args[0], None
        while isinstance(inner, fx.Node) and model.kind(inner) in _VIEWS and len(model.shape(inner)) == 5:
            groups = model.shape(inner)[1]  # in the end, of the first of the views
            inner = inner.args[0]
        if groups is None or not isinstance(inner, fx.Node) or model.shape(inner) != shape or shape[1] % groups:
            continue
        places = torch.arange(model.values[node].numel()).reshape(shape)  # all different, where values may not be
        if torch.equal(_through(model, node, inner, places), torch.channel_shuffle(places, groups)):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.channel_shuffle, (inner, groups), {}
            found = True
    if found:
        fx.GraphModule(model.root, model.graph).graph.eliminate_dead_code()
    return found


def _through(model: Model, node: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
    """What the views from a source to a node make of another value."""

    def given(argument: fx.Node) -> Any:
        if argument is source:
            return value
        known = model.values[argument]
        return _through(model, argument, source, value) if isinstance(known, Tensor) else known

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    function = getattr(Tensor, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
    return function(*args, **kwargs)  # type: ignore[operator]
