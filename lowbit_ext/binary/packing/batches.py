"""Whether a model treats the images of a batch one by one, so that the batch may be cut and given to threads."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, padding, pooling

from lowbit_ext._graph import has_binary_weight
from lowbit_ext.binary.layers import BinaryActivation
from lowbit_ext.binary.packing.chains import Model

_MODULE_FILES = {file.__name__ for file in (activation, batchnorm, conv, dropout, instancenorm, padding, pooling)}
_MODULES = (
    nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Identity, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, BinaryActivation,
)
_OF_AXES = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin)  # which may be the batch's

# Functions and methods by name: those that cannot mix images, and those that do along the axes they are given.
_FUNCTIONS = {
    "add", "sub", "mul", "div", "truediv", "neg", "abs", "sign", "exp", "sqrt", "clamp", "clamp_min", "clamp_max",
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh",
    "dropout", "contiguous", "clone", "to", "float", "getattr", "size", "expand_as", "pad", "interpolate", "conv1d",
    "conv2d", "linear", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "layer_norm", "group_norm", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "matmul", "bmm", "view", "reshape", "flatten",
}
_AXIS_ARGUMENTS = {  # position of the axes behind the input
    "mean": (0,), "sum": (0,), "amax": (0,), "softmax": (0,), "log_softmax": (0,), "cat": (0,), "concat": (0,),
    "unsqueeze": (0,), "squeeze": (0,), "flip": (0,), "transpose": (0, 1), "chunk": (1,), "split": (1,), "narrow": (0,),
}


def is_by_image(model: Model) -> bool:
    """Whether every node's result for an image depends on that image alone, as far as its kind tells.

    A kind that is not known counts as one that mixes images.
    """
    nodes = [node for node in model.graph.nodes if node.op != "get_attr" and model.constant(node) is None]
    batch = next((model.shape(node)[:1] for node in nodes if node.op == "placeholder"), ())
    results = next(node for node in nodes if node.op == "output").all_input_nodes
    if not batch or not all(model.shape(node) for node in results):
        return False
    return all(
        model.shape(node)[:1] in (batch, ()) and (node.op in ("placeholder", "output") or _keeps_images(model, node))
        for node in nodes
    )


def _keeps_images(model: Model, node: fx.Node) -> bool:
    module = model.module(node)
    if module is not None:
        if isinstance(module, nn.Flatten):
            return bool(module.start_dim == 1)
        if isinstance(module, _OF_AXES) or getattr(module, "running_mean", ()) is None:
            return False
        return isinstance(module, _MODULES) or type(module).__module__ in _MODULE_FILES or has_binary_weight(module)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is operator.getitem:  # of a tuple, or not along the batch
        taken = node.args[1]
        return not model.shape(node.args[0]) or (isinstance(taken, tuple) and taken[0] == slice(None))  # type: ignore
    if name == "permute":
        return 0 in (node.args[1], *(node.args[1][:1] if isinstance(node.args[1], tuple | list) else ()))
    return name in _FUNCTIONS or (name in _AXIS_ARGUMENTS and _leaves_batch(model, node, _AXIS_ARGUMENTS[name]))


def _leaves_batch(model: Model, node: fx.Node, positions: tuple[int, ...]) -> bool:
    """Whether the axes of a call are there and none is the batch's."""
    rank = len(model.shape(node.all_input_nodes[0]))
    given: list[Any] = [node.args[1 + index] for index in positions if len(node.args) > 1 + index]
    given += [value for key, value in node.kwargs.items() if key in ("dim", "dim0", "dim1", "dims", "axis")]
    axes = [axis for value in given for axis in (value if isinstance(value, tuple | list) else (value,))]
    whole = [axis for axis in axes if isinstance(axis, int) and not isinstance(axis, bool)]
    return rank > 0 and len(whole) == len(axes) > 0 and all(axis % rank != 0 for axis in whole)
