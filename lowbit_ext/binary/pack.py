"""pack(): a trained model as a network of packed bits and integer thresholds.

Between a binary layer and the next place that binarizes its result, everything a network usually has there - the
layer's scale and bias, batch norm, ReLU, hardtanh, max-pooling - is monotone in the integer accumulator, channel by
channel. The whole chain is therefore one comparison, acc >= t or acc <= t. Bisection over the accumulator's range finds
t with the model's own modules in float32, which reproduces their rounding to the bit; the formula for t would not.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit_ext.binary import layers
from lowbit_ext.binary.activation import DEFAULT_THRESHOLDS, invert_words
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
from lowbit_ext.binary.weights import pack_weight
from lowbit_ext.packed import unpack_op

__all__ = ["pack"]

# --- the model's graph ------------------------------------------------------------------------------------------------

_BINARY_LAYERS = (layers.BinaryConv2d, layers.BinaryConv1d, layers.BinaryLinear)
# Monotone with every rounding included, the same for all channels. Sigmoid and tanh are not: their last bits may fall.
_MONOTONE_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, layers.BinaryActivation)
_MONOTONE_CALLS = (F.relu, torch.relu, F.relu6, F.hardtanh, torch.clamp, "relu", "clamp")
_TRANSPARENT_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
_DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d)
_RESHAPES = (torch.flatten, torch.reshape, "flatten", "reshape", "view")
_POOL_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL_OPTIONS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _images(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of the words of a value of shape (N, C, *spatial)."""
    return (shape[1], *(1,) * (4 - len(shape)), *shape[2:])  # type: ignore[return-value]


def _has_binary_weight(module: nn.Module | None) -> bool:
    """A binary layer, or one of lowbit_ext.duo that multiplies values as they are with a binary weight."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) and hasattr(module, "weight_scale")


def _binary_twin(layer: Any) -> nn.Module:
    """The binary layer that gives the same as `layer` on bits of encoding "step"; shares its parameters."""
    options = {"bias": False, "encoding": "step", "weight_scale": layer.weight_scale}
    if isinstance(layer, nn.Linear):
        twin: Any = layers.BinaryLinear(layer.in_features, layer.out_features, **options)
    else:
        twin = layers.BinaryConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, **options,
        )  # fmt: skip
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin.eval()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        ours = _has_binary_weight(module) or isinstance(module, layers.BinaryActivation)
        return ours or super().is_leaf_module(module, qualified_name)


class _Model:
    """The traced model, every node's value on the example, and what each node is."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        try:
            self.graph = _Tracer().trace(model)
        except Exception as error:
            raise ValueError(f"pack: torch.fx cannot trace the model: {_first_line(error)}") from error
        # Out of place: a recorded value must stay what the nodes that read it saw.
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        for node in self.graph.nodes:
            if node.kwargs.get("inplace"):
                node.update_kwarg("inplace", False)
        self.root = model
        self.modules = dict(model.named_modules())
        self.values, self.output = self._run(inputs)
        if self._take_bits_as_bits():
            self.values, self.output = self._run(inputs)
        self._read_batch_size_from_input()

    def _run(self, inputs: tuple[Any, ...]) -> tuple[dict[fx.Node, Any], Any]:
        """Every node's value, and the result."""
        interpreter = fx.Interpreter(fx.GraphModule(self.root, self.graph), garbage_collect_values=False)
        output = interpreter.run(*copy.deepcopy(inputs))
        return interpreter.env, output

    def _take_bits_as_bits(self) -> bool:
        """Puts binary layers for layers that take values as they are, where these are bits: whether there are any."""
        found = False
        for node in self.graph.nodes:
            layer, target = self.module(node), str(node.target)
            if not _has_binary_weight(layer) or type(layer) in _BINARY_LAYERS:
                continue
            if self.binary_values(node.args[0]) == "step" and getattr(layer, "padding_mode", "zeros") == "zeros":
                parent, _, name = target.rpartition(".")
                self.modules[target] = _binary_twin(layer)
                setattr(self.root.get_submodule(parent), name, self.modules[target])
                found = True
        return found

    def _read_batch_size_from_input(self) -> None:
        """x.size(0) and x.shape[0] of inner values are the input's, so that x itself need not exist as floats."""
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        for node in self.graph.nodes:
            sizes = (node.op == "call_method" and node.target == "size") or (
                node.target is getattr and node.args[1] == "shape"
            )
            if not sizes or self.shape(node.args[0])[:1] != self.shape(first)[:1]:
                continue
            if node.args[1:] == (0,) or all(
                user.target is operator.getitem and user.args[1] == 0 for user in node.users
            ):
                node.update_arg(0, first)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value on the example; () for what is no tensor."""
        value = self.values.get(node)
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def call(self, node: fx.Node, value: Tensor) -> Tensor:
        """What a node makes of a value in place of its first argument."""
        module = self.module(node)
        if module is not None:
            return module(value)
        function = getattr(Tensor, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
        return function(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]

    def binary_layer(self, node: fx.Node) -> Any:
        """The binary layer a node calls, or None. A linear layer over (N, T, C) stays as it is."""
        module = self.module(node)
        if type(module) not in _BINARY_LAYERS:
            return None
        return None if isinstance(module, nn.Linear) and len(self.shape(node)) != 2 else module

    def is_transparent(self, node: fx.Node) -> bool:
        """Leaves values as they are."""
        if node.op == "call_module":
            return type(self.module(node)) in _TRANSPARENT_MODULES
        return node.target == "contiguous" or (node.target in _DROPOUT_CALLS and not node.kwargs.get("training", True))

    def is_flatten(self, node: fx.Node) -> bool:
        """Reshapes (N, C, *spatial) to (N, features)."""
        if type(self.module(node)) is not nn.Flatten and node.target not in _RESHAPES:
            return False
        before = self.shape(node.args[0])  # type: ignore[arg-type]
        return len(before) > 1 and self.shape(node) == (before[0], math.prod(before[1:]))

    def is_doubling(self, node: fx.Node) -> bool:
        """torch.cat([x, x], 1): two thresholds for one accumulator (BinaryDuo)."""
        if node.target not in (torch.cat, torch.concat) or len(node.all_input_nodes) != 1:
            return False
        tensors, axis, *_ = (*node.args, *node.kwargs.values(), 0)
        return bool(len(tensors) == 2 and axis == 1)  # type: ignore[arg-type]

    def is_batch_norm(self, node: fx.Node) -> bool:
        """A batch norm that uses its running statistics."""
        module = self.module(node)
        return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None

    def is_monotone(self, node: fx.Node) -> bool:
        """Elementwise, never falling, the same for all channels."""
        if node.op == "call_module":
            return type(self.module(node)) in _MONOTONE_MODULES
        return node.target in _MONOTONE_CALLS and node.all_input_nodes == [node.args[0]]

    def _options(self, node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
        module = self.module(node)
        if module is not None:
            return {name: getattr(module, name) for name in names if hasattr(module, name)}
        return dict(zip(names, node.args[1:], strict=False)) | node.kwargs

    def max_pool(self, node: fx.Node) -> Window | None:
        """Geometry of a one- or two-dimensional max-pooling of a batch."""
        if type(self.module(node)) in (nn.MaxPool1d, nn.MaxPool2d):
            dims = 3 if isinstance(self.module(node), nn.MaxPool1d) else 4
        elif node.target in (F.max_pool1d, torch.max_pool1d, F.max_pool2d, torch.max_pool2d):
            dims = 3 if node.target in (F.max_pool1d, torch.max_pool1d) else 4
        else:
            return None
        options = self._options(node, _POOL_OPTIONS)
        if options.get("return_indices") or len(self.shape(node)) != dims:
            return None

        def pair(name: str, single: int, default: Any) -> tuple[int, int]:
            value = options.get(name)
            value = default if value is None else value
            values = (value,) * (dims - 2) if isinstance(value, int) else tuple(value)
            return (single, values[0]) if dims == 3 else (values[0], values[-1])

        kernel = options["kernel_size"]
        return Window(
            pair("kernel_size", 1, kernel),
            pair("stride", 1, kernel),
            pair("padding", 0, 0),
            pair("dilation", 1, 1),
            bool(options.get("ceil_mode", False)),
        )

    def avg_pool(self, node: fx.Node) -> tuple[bool, tuple[Any, ...] | None]:
        """Whether a node is a two-dimensional average, and its window (PackedAvgPool2d)."""
        kind = type(self.module(node))
        if len(self.shape(node)) != 4:
            return False, None
        if kind is nn.AdaptiveAvgPool2d or node.target is F.adaptive_avg_pool2d:
            options = self._options(node, ("output_size",))
            size = options["output_size"]
            return (size if isinstance(size, int) else tuple(size)) in (1, (1, 1)), None
        if kind is not nn.AvgPool2d and node.target is not F.avg_pool2d:
            return False, None
        options = self._options(node, _AVG_POOL_OPTIONS)

        def pair(value: Any) -> tuple[int, int]:
            return (value, value) if isinstance(value, int) else (value[0], value[-1])

        kernel = pair(options["kernel_size"])
        return True, (
            kernel,
            pair(options["stride"]) if options.get("stride") else kernel,
            pair(options.get("padding", 0)),
            bool(options.get("ceil_mode", False)),
            bool(options.get("count_include_pad", True)),
            options.get("divisor_override") or 0,
        )

    def binary_values(self, node: fx.Node) -> str | None:
        """Encoding of a value that a binary activation produced, through pooling and reshapes, or None."""
        while True:
            module = self.module(node)
            if isinstance(module, layers.BinaryActivation):
                return module.encoding
            if not (self.is_transparent(node) or self.is_flatten(node) or self.max_pool(node)):
                return None
            node = node.args[0]  # type: ignore[assignment]


# --- chains and thresholds --------------------------------------------------------------------------------------------

_Step = Callable[[Tensor], Tensor] | Window


@dataclasses.dataclass
class _Chain:
    """The way of a value from its source to where it is binarized: value = last step(... first step(source))."""

    source: fx.Node
    steps: list[_Step]
    doubled: bool
    spatial: tuple[int, ...]  # of the bits, whose pixels a flatten on the way has not merged

    @property
    def folds(self) -> bool:
        """Whether anything but pooling happens on the way."""
        return self.doubled or any(not isinstance(step, Window) for step in self.steps)

    @property
    def copies(self) -> int:
        """Bits for each value of the source."""
        return 2 if self.doubled else 1


def _chain(model: _Model, node: fx.Node) -> _Chain:
    """Walks back from a value through monotone steps, to a binary layer or as far as they go."""
    steps: list[_Step] = []
    doubled = normed = False
    layout = node
    while model.binary_layer(node) is None:
        window = model.max_pool(node)
        if model.is_flatten(node):
            one_pixel = math.prod(model.shape(node.args[0])[2:]) == 1  # type: ignore[arg-type]
            if (normed or doubled) and not one_pixel:
                break  # One pixel's channel and another's have thresholds of their own.
            layout = node.args[0]  # type: ignore[assignment]
        elif window is not None:
            steps.append(window)
        elif model.is_batch_norm(node):
            steps.append(_batch_norm_step(model, node))
            normed = True
        elif model.is_monotone(node):
            steps.append(_elementwise_step(model, node))
        elif model.is_doubling(node) and not doubled:
            doubled = True
        elif not model.is_transparent(node):
            break
        node = node.all_input_nodes[0]
    return _Chain(node, steps[::-1], doubled, model.shape(layout)[2:])


def _elementwise_step(model: _Model, node: fx.Node) -> Callable[[Tensor], Tensor]:
    return lambda values: model.call(node, values.unsqueeze(0)).squeeze(0)


def _batch_norm_step(model: _Model, node: fx.Node) -> Callable[[Tensor], Tensor]:
    """A batch norm on one value a channel, in the shape it has in the model."""
    shape = model.shape(node.all_input_nodes[0])
    pixels = len(shape) - 2

    def step(values: Tensor) -> Tensor:
        images = values.reshape(-1, shape[1], *(1,) * pixels).expand(-1, -1, *(2,) * pixels).contiguous()
        return model.call(node, images).reshape(*images.shape[:2], -1)[..., 0].reshape(-1)

    return step


@dataclasses.dataclass
class _Fold:
    """A chain as one comparison a channel: position >= threshold, or <= where flip."""

    threshold: Tensor
    flip: Tensor
    inverts: list[Tensor]  # of each pooling: whether it takes the minimum of bits
    constant: Tensor  # whether always or never met


def _fold(chain: _Chain, encoding: str, low: Tensor, high: Tensor, value: Callable[[Tensor], Tensor]) -> _Fold:
    """Bisection for the threshold of a chain, all channels at once.

    Args:
        chain: its steps; pooling compares values and leaves them as they are.
        encoding: what binarizes the chain's result.
        low, high: int64 (C,), ends of the range of positions.
        value: monotone map of positions to the source's values.
    """
    threshold = DEFAULT_THRESHOLDS[encoding]

    def run(positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        values, pooled = value(positions), []
        for step in chain.steps:
            if isinstance(step, Window):
                pooled.append(values)
            else:
                values = step(values)
        return values >= threshold, pooled

    (first, pooled_first), (last, pooled_last) = run(low), run(high)
    below, above = low.clone(), high.clone()  # bit(below) == first, bit(above) == last
    while bool((above - below > 1).any()):
        middle = (below + above) >> 1
        as_first = run(middle)[0] == first
        below, above = torch.where(as_first, middle, below), torch.where(as_first, above, middle)
    constant, flip = first == last, first & ~last
    position = torch.where(flip, below, above)
    position = torch.where(constant, torch.where(first, low, high + 1), position)
    # A maximum of values is the maximum of their bits where the bit rises with the value, their minimum where it falls.
    inverts = [~constant & ((before < after) == flip) for before, after in zip(pooled_first, pooled_last, strict=True)]
    return _Fold(position, flip, inverts, constant)


def _fold_integers(
    chain: _Chain, encoding: str, reach: int, scale: Tensor | None, bias: Tensor | None, filters: int
) -> _Fold:
    """Thresholds on the accumulator of a binary layer, |acc| <= reach, whose own epilogue comes first."""

    def value(positions: Tensor) -> Tensor:
        values = positions.reshape(-1, filters).to(torch.float32)
        values = values if scale is None else values * scale
        values = values if bias is None else values + bias
        return values.reshape(-1)

    high = torch.full((filters * chain.copies,), reach)
    fold = _fold(chain, encoding, -high, high, value)
    fold.threshold = fold.threshold.to(torch.int32)
    return fold


def _fold_floats(chain: _Chain, encoding: str, channels: int) -> _Fold:
    """Thresholds on the channels of a float32 source, bisected over all its values in order."""

    def value(positions: Tensor) -> Tensor:
        bits = torch.where(positions < 0, positions ^ 0x7FFFFFFF, positions)
        return bits.to(torch.int32).view(torch.float32)

    # The largest finite number's bits; negative numbers' bits below the sign run downwards.
    high = torch.full((channels * chain.copies,), 0x7F7FFFFF)
    fold = _fold(chain, encoding, -high - 1, high, value)
    infinite = torch.where(fold.threshold == -high - 1, -math.inf, math.inf)
    threshold = value(fold.threshold.minimum(high))
    fold.threshold = torch.where(fold.constant, infinite, threshold)
    return fold


# --- building the packed graph ----------------------------------------------------------------------------------------

_FLOAT = "float"


@dataclasses.dataclass
class _Words:
    """A node of the packed graph that gives words, and what they hold."""

    node: fx.Node
    channels: int
    height: int
    width: int


class _Packer:
    """Rebuilds the graph: bits where a value is only ever binarized, the model's own nodes elsewhere."""

    def __init__(self, model: _Model) -> None:
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
        source = _chain(self.model, node).source
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
            elif model.avg_pool(node)[0] and model.binary_values(node.args[0]):
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
        averages, window = model.avg_pool(node)
        if averages:
            encoding = model.binary_values(node.args[0])  # type: ignore[arg-type]
            if encoding is not None:
                words = self._bits(node.args[0], encoding)  # type: ignore[arg-type]
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
            chain = _chain(model, bits[0])
            fold = _fold_integers(chain, bits[1], weight[0].numel(), scale, bias, filters)
            options = {"threshold": fold.threshold.reshape(-1, filters), "flip": fold.flip.reshape(-1, filters)}
        module = PackedConv2d(
            packed, geometry, layer.encoding, getattr(layer, "padding_value", 0), out_dims=len(model.shape(node)),
            one_pixel=one_pixel, **options,
        )  # fmt: skip
        inputs = (words.node,) if residual is None else (words.node, residual)
        output = self._add(node, "", module, *inputs)
        if bits is not None:
            self._finish_bits(bits, chain, fold, output)  # type: ignore[arg-type]
        return output

    def _finish_bits(self, bits: tuple[fx.Node, str], chain: _Chain, fold: _Fold | None, output: fx.Node) -> _Words:
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
        chain = _chain(self.model, node)
        channels = self.model.shape(chain.source)[1]
        fold = _fold_floats(chain, encoding, channels) if chain.folds else None
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

    Raises:
        TypeError: not a module.
        ValueError: the model has no binary layer, cannot be traced or run on the example, is not float32 on the CPU, or
            the packed model differs from it (names the first layer that does).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack: model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(type(module) in _BINARY_LAYERS for module in model.modules()):
        raise ValueError("pack: the model has no BinaryConv2d, BinaryConv1d or BinaryLinear")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(f"pack: the model must be float32 on the CPU, {name} is {tensor.dtype} on {tensor.device}")
    model = copy.deepcopy(model).eval()

    def example() -> tuple[Any, ...]:
        return copy.deepcopy(inputs)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            model(*example())
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor))
            raise ValueError(f"pack: the model does not run on the example {shapes}: {_first_line(error)}") from error
        traced = _Model(model, example())
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
                    f"pack: the packed bits of {node.target} ({node.name}) differ from the model's in {wrong} of "
                    f"{wanted.numel()} places"
                )
        _check_output(traced.output, result)
    return PackedModel(body)


def _check_output(expected: Any, result: Any) -> None:
    """Float layers see equal inputs, but perhaps in another memory format: that may change a few roundings."""
    pairs = zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(result), strict=True)
    for want, got in pairs:
        if not isinstance(want, Tensor) or torch.equal(want, got):
            continue
        close = want.shape == got.shape and torch.allclose(want, got, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        if not close or not torch.equal(want.argmax(-1), got.argmax(-1)):
            raise ValueError("pack: the packed model's output differs from the model's, though all packed bits agree")
