"""pack(): a trained model as a network of packed bits and integer thresholds.

Between a binary layer and the next place that binarizes its result, everything a network usually has there - the
layer's scale and bias, batch norm, ReLU, hardtanh, max-pooling - is monotone in the integer accumulator, channel by
channel. The whole chain is therefore one comparison, acc >= t or acc <= t. Bisection over the accumulator's range finds
t with the model's own modules in float32, which reproduces their rounding to the bit; the formula for t would not.
"""

from __future__ import annotations

import collections
import copy
import operator
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lowbit_ext import _arguments
from lowbit_ext._graph import first_line
from lowbit_ext._torch import pytree
from lowbit_ext.binary import layers
from lowbit_ext.binary.activation import DEFAULT_THRESHOLDS, invert_words
from lowbit_ext.binary.chains import BINARY_LAYERS, Model, chain_of
from lowbit_ext.binary.convolution import geometry_of
from lowbit_ext.binary.packed_model import (
    PackedAvgPool2d,
    PackedBinarize,
    PackedConv2d,
    PackedMaxPool2d,
    PackedModel,
    PackedUnpack,
    Window,
)
from lowbit_ext.binary.thresholds import Chain, Fold, fold_floats, fold_integers
from lowbit_ext.binary.weights import pack_weight
from lowbit_ext.packed import unpack_op

__all__ = ["pack"]

# --- building the packed graph ----------------------------------------------------------------------------------------

_FLOAT = "float"


def _images(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of the words of a value of shape (N, C, *spatial)."""
    return (shape[1], *(1,) * (4 - len(shape)), *shape[2:])  # type: ignore[return-value]


class _Words(NamedTuple):
    """A node of the packed graph that gives words, and what they hold."""

    node: fx.Node
    channels: int
    height: int
    width: int


class _Packer:
    """Rebuilds the graph: bits where a value is only ever binarized, the model's own nodes elsewhere."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph = fx.Graph()
        self.modules: dict[str, Any] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.words: dict[tuple[fx.Node, str], _Words] = {}
        # For the comparison on the example: packed node, the value whose bits it should be, encoding.
        self.points: list[tuple[_Words, fx.Node, str]] = []
        # What each node must give: floats, or bits of a later value, named (value, encoding).
        self.demands: dict[fx.Node, set[Any]] = collections.defaultdict(set)
        self._collect_demands()
        self.residuals = self._find_residuals()
        for node in model.graph.nodes:
            self._emit(node)

    # Which value is binarized

    def _bits_source(self, node: fx.Node, encoding: str) -> tuple[fx.Node, Window | None]:
        """The value with the same bits furthest up the graph, and the pooling it is the result of."""
        model = self.model
        while True:
            module = model.module(node)
            same = isinstance(module, layers.BinaryActivation) and module.encoding == encoding
            if not (same or model.is_transparent(node) or model.is_flatten(node)):
                return node, model.max_pool(node)
            node = node.args[0]  # type: ignore[assignment]

    def _demand_bits(self, node: fx.Node, encoding: str) -> None:
        node, window = self._bits_source(node, encoding)
        if window is not None:
            self._demand_bits(node.args[0], encoding)  # type: ignore[arg-type]
            return
        source = chain_of(self.model, node).source
        integer = self.model.binary_layer(source) is not None
        self.demands[source].add((node, encoding) if integer else _FLOAT)

    def _collect_demands(self) -> None:
        model = self.model
        for node in reversed(model.graph.nodes):
            layer, encoding = model.binary_layer(node), model.binary_values(node)
            if node.op != "output" and not self.demands[node]:
                continue
            if layer is not None:
                self._demand_bits(node.args[0], layer.encoding)
            elif encoding is not None:
                self._demand_bits(node, encoding)
            elif model.avg_pool(node) is not None and model.binary_values(node.args[0]):
                self._demand_bits(node.args[0], model.binary_values(node.args[0]))  # type: ignore[arg-type]
            else:
                for source in node.all_input_nodes:
                    self.demands[source].add(_FLOAT)

    def _find_residuals(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """Additions directly behind a binary layer, which the kernel does exactly: {addition: (layer, other)}."""
        model, residuals = self.model, {}
        for node in model.graph.nodes:
            added = node.target in (operator.add, torch.add) and not node.kwargs and len(node.all_input_nodes) == 2
            if not added or _FLOAT not in self.demands[node]:
                continue
            for layer, other in (node.args, node.args[::-1]):
                if (
                    model.binary_layer(layer) is not None
                    and len(layer.users) == 1
                    and model.shape(other) == model.shape(layer)
                    and model.values[other].dtype == torch.float32
                ):
                    residuals[node] = (layer, other)
                    break
        return residuals

    # Emission

    def _add(self, node: fx.Node, suffix: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        name = (str(node.target) if node.op == "call_module" else node.name) + suffix
        while name in self.modules:
            name += "_"
        self.modules[name] = module
        return self.graph.call_module(name, inputs)

    def _emit(self, node: fx.Node) -> None:
        model = self.model
        demands, layer = self.demands[node], model.binary_layer(node)
        if node in self.residuals:
            source, other = self.residuals[node]
            self.floats[node] = self._emit_layer(source, None, self.floats[other])
        elif layer is not None:
            if len(demands) == 1 and _FLOAT not in demands:
                self._emit_layer(node, next(iter(demands)))
            elif demands and not any(node is source for source, _ in self.residuals.values()):
                self.floats[node] = self._emit_layer(node, None)
        elif _FLOAT in demands or node.op in ("placeholder", "output"):
            self.floats[node] = self._emit_float(node)

    def _emit_float(self, node: fx.Node) -> fx.Node:
        model = self.model
        encoding = model.binary_values(node)
        if encoding is not None:
            words = self._bits(node, encoding)
            unpack = PackedUnpack(words.channels, encoding, len(model.shape(node)))
            return self._add(node, "_unpack", unpack, words.node)
        pool = model.avg_pool(node)
        encoding = None if pool is None else model.binary_values(node.args[0])  # type: ignore[arg-type]
        if pool is not None and encoding is not None:
            words = self._bits(node.args[0], encoding)  # type: ignore[arg-type]
            # Kernel, stride, padding, ceil_mode, count_pad and divisor, where the windows are not one of the image.
            window = None if pool.output else (*pool[1:6], pool.divisor or 0)
            return self._add(node, "", PackedAvgPool2d(words.channels, encoding, window), words.node)
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            self.modules[target] = operator.attrgetter(target)(model.root)
        return self.graph.node_copy(node, self.floats.__getitem__)

    def _emit_layer(self, node: fx.Node, bits: tuple[fx.Node, str] | None, residual: fx.Node | None = None) -> fx.Node:
        """A binary layer as floats, or as the bits of a later value."""
        model, layer = self.model, self.model.binary_layer(node)
        words = self._bits(node.args[0], layer.encoding)  # type: ignore[arg-type]
        weight, options = layer.weight.detach(), {}
        one_pixel = isinstance(layer, nn.Linear)
        if one_pixel:
            # The features behind a flatten are channels times pixels: a convolution whose kernel is the image.
            weight = weight.reshape(-1, words.channels, words.height, words.width)
            geometry = geometry_of(weight.shape, 1, 0, 1, 1)
        else:
            flat = weight.dim() == 3
            weight = weight.unsqueeze(2) if flat else weight
            padding = layer.padding
            geometry = geometry_of(
                weight.shape,
                (1, *layer.stride) if flat else layer.stride,
                padding if isinstance(padding, str) or not flat else (0, *padding),
                (1, *layer.dilation) if flat else layer.dilation,
                layer.groups,
            )
        packed = pack_weight(weight, geometry.groups)
        filters = weight.shape[0]
        scale, bias = layer.scale(), None if layer.bias is None else layer.bias.detach().clone()
        chain = fold = None
        if bits is None:
            options = {"scale": scale, "bias": bias}
        else:
            chain = chain_of(model, bits[0])
            fold = fold_integers(chain, bits[1], weight[0].numel(), scale, bias, filters)
            options = {"threshold": fold.threshold.reshape(-1, filters), "flip": fold.flip.reshape(-1, filters)}
        module = PackedConv2d(
            packed, geometry, layer.encoding, getattr(layer, "padding_value", 0), out_dims=len(model.shape(node)),
            one_pixel=one_pixel, **options,
        )
        inputs = (words.node,) if residual is None else (words.node, residual)
        output = self._add(node, "", module, *inputs)
        if bits is not None:
            self._finish_bits(bits, chain, fold, output)  # type: ignore[arg-type]
        return output

    def _finish_bits(self, bits: tuple[fx.Node, str], chain: Chain, fold: Fold | None, output: fx.Node) -> _Words:
        """The chain's poolings behind its bits."""
        channels = self.model.shape(chain.source)[1] * chain.copies
        inverts = iter(fold.inverts if fold is not None else ())
        for step in chain.steps:
            if isinstance(step, Window):
                invert = invert_words(next(inverts)) if fold is not None else None
                output = self._add(bits[0], "_pool", PackedMaxPool2d(channels, step, invert), output)
        words = _Words(output, *_images((0, channels, *chain.spatial)))
        self.words[bits] = words
        self.points.append((words, *bits))
        return words

    def _bits(self, node: fx.Node, encoding: str) -> _Words:
        """The bits of a value, packed once for all that read them."""
        node, window = self._bits_source(node, encoding)
        key = (node, encoding)
        if key in self.words:
            return self.words[key]
        if window is not None:
            before = self._bits(node.args[0], encoding)  # type: ignore[arg-type]
            pooled = self._add(node, "_bits", PackedMaxPool2d(before.channels, window), before.node)
            self.words[key] = _Words(pooled, *_images(self.model.shape(node)))
            return self.words[key]
        chain = chain_of(self.model, node)
        channels = self.model.shape(chain.source)[1]
        fold = fold_floats(chain, encoding, channels) if chain.folds else None
        thresholds: tuple[Tensor, ...] = () if fold is None else (fold.threshold, fold.flip)
        if chain.doubled:
            thresholds = tuple(values.reshape(2, channels) for values in thresholds)
        binarize = PackedBinarize(channels, encoding, *thresholds)
        output = self._add(node, "_bits", binarize, self.floats[chain.source])
        return self._finish_bits(key, chain, fold, output)


# --- pack -------------------------------------------------------------------------------------------------------------


def pack(model: nn.Module, example_input: Any) -> PackedModel:
    """Packs a trained model: binary layers on bits, thresholds in integers, all else as it is.

    A copy of the model in evaluation mode is traced by torch.fx (so it needs static control flow). Activations stay
    packed between binary layers: scale, bias, batch norm, ReLU, hardtanh, clamp, dropout and max-pooling between them
    become one integer threshold a channel, bit-exact with the float model; flattening, average pooling of bits and an
    addition directly behind a binary layer are taken along. Float layers are untouched. The result is compared with the
    model on the example, bit for bit at every packed value.

    Args:
        model: a float32 CPU module; not modified.
        example_input: a tensor, or a tuple of the model's inputs. Batch size is free later, the image size only where
            no linear layer is packed.

    Returns:
        PackedModel.

    Warns:
        UserWarning: names a layer with a binary weight that stays as it is, and why.

    Raises:
        TypeError: not a module.
        ValueError: the model has no binary layer, cannot be traced or run on the example, is not float32 on the CPU, or
            the packed model differs from it (names the first layer that does).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack: model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    for value in inputs:
        if isinstance(value, Tensor):
            _arguments.tensor("pack", "example_input", value)
    if not any(type(module) in BINARY_LAYERS for module in model.modules()):
        raise ValueError("pack: the model has no BinaryConv2d, BinaryConv1d or BinaryLinear")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(f"pack: the model must be float32 on the CPU, {name} is {tensor.dtype} on {tensor.device}")
    model = copy.deepcopy(model).eval()

    def example() -> tuple[Any, ...]:
        return copy.deepcopy(inputs)

    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        try:
            model(*example())
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor))
            raise ValueError(f"pack: the model does not run on the example {shapes}: {first_line(error)}") from error
        traced = Model(model, example())
        packer = _Packer(traced)
        body = fx.GraphModule(packer.modules, packer.graph, class_name="PackedGraph")
        interpreter = fx.Interpreter(body, garbage_collect_values=False)
        result = interpreter.run(*example())
        for words, node, encoding in packer.points:
            bits = unpack_op(interpreter.env[words.node], words.channels, 0.0, 1.0, torch.float32).movedim(-1, 1)
            wanted = traced.values[node] >= DEFAULT_THRESHOLDS[encoding]
            wrong = int((bits.flatten(1).bool() != wanted.flatten(1)).sum())
            if wrong:
                raise ValueError(
                    f"pack: the packed bits of {traced.label(node)} differ from the model's in {wrong} of "
                    f"{wanted.numel()} places"
                )
        _check_output(traced.output, result)
        for node in traced.graph.nodes:
            reason = traced.left_because(node)
            if reason is not None:
                warnings.warn(f"pack: {traced.label(node)} stays as it is: {reason}", stacklevel=2)
    return PackedModel(body)


def _check_output(expected: Any, result: Any) -> None:
    """Float layers see equal inputs, but perhaps in another memory format: that may change a few roundings."""
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(result), strict=True)
    for want, got in pairs:
        if not isinstance(want, Tensor) or torch.equal(want, got):
            continue
        close = want.shape == got.shape and torch.allclose(want, got, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        if not close or not torch.equal(want.argmax(-1), got.argmax(-1)):
            raise ValueError("pack: the packed model's output differs from the model's, though all packed bits agree")
