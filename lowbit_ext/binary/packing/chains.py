"""The model that pack reads: its values on an example, what its nodes are, and the chains of steps between them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit_ext._graph import (
    Pool,
    Traced,
    first_line,
    has_binary_weight,
    out_of_place,
    reads_batch_size,
    reads_bits,
    trace,
)
from lowbit_ext.binary import layers
from lowbit_ext.binary.packing import concatenations, rearrangements
from lowbit_ext.binary.packing.functions import is_binary_call, layer_of, reason_against
from lowbit_ext.binary.packing.packed_layers import Rearrangement, Upsampling, Window
from lowbit_ext.binary.packing.packed_model import Call
from lowbit_ext.binary.packing.thresholds import Chain, Step

_LIBRARY = __package__.split(".")[0] + "."
BINARY_LAYERS = (layers.BinaryConv2d, layers.BinaryConv1d, layers.BinaryLinear)
# Monotone with every rounding included, the same for all channels. Sigmoid and tanh are not: their last bits may fall.
_MONOTONE = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, layers.BinaryActivation, F.relu, torch.relu, F.relu6, F.hardtanh,
    F.leaky_relu, torch.clamp, torch.clamp_min, torch.clamp_max, "relu", "clamp", "clamp_min", "clamp_max",
)
ADDITIONS = (operator.add, torch.add, "add")
SUBTRACTIONS = (operator.sub, torch.sub, "sub")
PRODUCTS = (operator.mul, torch.mul, "mul")
PARAMETRIC_RELUS = (nn.PReLU, F.prelu, torch.prelu, "prelu")
_UPSAMPLINGS = (nn.Upsample, nn.UpsamplingNearest2d, F.interpolate)
_READ_LAST_AXIS = (nn.Linear, nn.LayerNorm, nn.Embedding)
_FUNCTIONS_OF_LAST_AXIS = (F.linear, F.layer_norm, F.embedding)


def layer_kind(layer: Any) -> type | None:
    """The class of BINARY_LAYERS whose forward and scale a layer has, also one derived or parametrized; or None."""
    for kind in BINARY_LAYERS:
        if isinstance(layer, kind):
            changed = type(layer).forward is not kind.forward or type(layer).scale is not kind.scale
            return None if changed or layer._forward_hooks or layer._forward_pre_hooks else kind
    return None


def _binary_twin(layer: Any) -> nn.Module:
    """The binary layer that gives the same as `layer` on bits of encoding "step"; shares its parameters."""
    options = {"bias": False, "encoding": "step", "weight_scale": layer.weight_scale}
    if isinstance(layer, nn.Linear):
        twin: Any = layers.BinaryLinear(layer.in_features, layer.out_features, **options)
    else:
        twin = layers.BinaryConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, **options,
        )
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin.eval()


class Model(Traced):
    """The traced model, every node's value on the example, and what each node is to packing."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        try:
            graph = trace(model, inference=True, call=call)
        except Exception as error:
            raise ValueError(f"pack: torch.fx cannot trace the model: {first_line(error)}") from error
        super().__init__(model, graph)
        out_of_place(graph, self.modules)  # a recorded value must stay what the nodes that read it saw
        self.root = model
        self._constants: dict[fx.Node, Any] = {}
        self._axes: dict[fx.Node, int] = {}
        self._run(call)
        if self._take_functions_as_layers():
            self._run(call)
        if rearrangements.name_channel_shuffles(self):
            self._run(call)
        changed = self._take_bits_as_bits()
        if concatenations.simplify(self) or changed:
            self._run(call)
        self._evaluate_constants()
        self._read_batch_size_from_input()

    def _run(self, call: Call) -> None:
        """Records every node's value and shape."""
        interpreter = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        interpreter.run(*call.example())
        self.values: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        for node in self.graph.nodes:
            self.record(node, interpreter.env[node])

    def add_module(self, name: str, module: nn.Module) -> str:
        """Puts a module into the model; its name."""
        parent, _, last = name.rpartition(".")
        setattr(self.root.get_submodule(parent), last, module)
        self.modules[name] = module
        return name

    def add_constant(self, name: str, value: Tensor) -> fx.Node:
        """A node that gives a tensor, at the graph's insertion point."""
        self.root.register_buffer(name, value)
        node = self.graph.create_node("get_attr", name)
        self.record(node, value)
        return node

    def record(self, node: fx.Node, value: Any) -> None:
        """Takes a value for a node that has come into the graph."""
        self.values[node] = value
        if isinstance(value, Tensor):
            self.shapes[node] = tuple(value.shape)
        self._axes[node] = self._find_axis(node)

    def _take_functions_as_layers(self) -> bool:
        """Puts binary layers for calls of binary functions with constant weights: whether there are any."""
        found = False
        for node in self.graph.nodes:
            if is_binary_call(node) and reason_against(node, self.constant, self.values) is None:
                source, layer = layer_of(node, self.constant)
                name = self.add_module(f"{node.name}_layer", layer)
                node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}
                found = True
        return found

    def _evaluate_constants(self) -> None:
        """Puts values for what is made of the model's own tensors alone, as a scale by an expression of weights."""
        fixed = {node for node in self.graph.nodes if node.op == "get_attr"}
        for node in self.graph.nodes:
            inputs = node.all_input_nodes
            if not node.op.startswith("call_") or not inputs or not fixed.issuperset(inputs):
                continue
            fixed.add(node)
            if node in self.shapes:
                name = f"{node.name}_value"
                self.root.register_buffer(name, self.values[node].detach().clone())
                node.op, node.target, node.args, node.kwargs = "get_attr", name, (), {}

    def _take_bits_as_bits(self) -> bool:
        """Puts binary layers for layers that take values as they are, where these are bits: whether there are any."""
        found = False
        for node in self.graph.nodes:
            layer, target = self.module(node), str(node.target)
            if not has_binary_weight(layer) or reads_bits(layer) or not type(layer).__module__.startswith(_LIBRARY):
                continue
            if self.binary_values(node.args[0]) == "step" and getattr(layer, "padding_mode", "zeros") == "zeros":
                self.add_module(target, _binary_twin(layer))
                found = True
        return found

    def _read_batch_size_from_input(self) -> None:
        """The batch size of inner values is the input's, so that they need not exist as floats."""
        first = next((node for node in self.graph.nodes if node.op == "placeholder"), None)
        for node in self.graph.nodes:
            if first is not None and reads_batch_size(node) and self.shape(node.args[0])[:1] == self.shape(first)[:1]:
                node.update_arg(0, first)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value on the example; () for what is no tensor."""
        return self.shapes.get(node, ())

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """Type of a node's value on the example; None of what is no tensor."""
        return self.values[node].dtype if node in self.shapes else None

    def constant(self, node: Any) -> Any:
        """The value of an argument that is the same in every call: a number, or made of the model's own tensors.

        None of others. What is expanded to the size of another value counts as it was before.
        """
        if not isinstance(node, fx.Node):
            return node if isinstance(node, int | float) and not isinstance(node, bool) else None
        if node not in self._constants:
            self._constants[node] = self._find_constant(node)
        return self._constants[node]

    def _find_constant(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.values[node]
        if node.target in ("expand_as", "type_as"):
            return self.constant(node.args[0])
        inputs = node.all_input_nodes
        made = node.op.startswith("call_") and inputs and all(self.constant(value) is not None for value in inputs)
        return self.values[node] if made and isinstance(self.values[node], Tensor) else None

    def call(self, node: fx.Node, value: Tensor) -> Tensor:
        """What a node makes of a value in place of the one that is no constant."""
        module = self.module(node)
        if module is not None:
            return module(value)

        def given(argument: fx.Node) -> Any:
            constant = self.constant(argument)
            return value if constant is None else constant

        function = getattr(Tensor, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
        return function(*fx.map_arg(node.args, given), **fx.map_arg(node.kwargs, given))  # type: ignore[operator]

    def norm(self, node: fx.Node, norm: nn.Module, values: Tensor) -> Tensor:
        """What a batch norm in a node's place makes of values (k, C).

        As pixels of images in the memory order that the model has there, on which torch's rounding depends.
        """
        (source,) = self.variables(node)
        pixels = len(self.shape(source)) - 2
        images = values.reshape(*values.shape, *(1,) * pixels).expand(-1, -1, *(2,) * pixels).contiguous()
        if not self.values[source].is_contiguous():
            images = images.movedim(1, -1).contiguous().movedim(-1, 1)
        return norm(images).reshape(*values.shape, -1)[..., 0]

    def variables(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that are no constants."""
        return [value for value in node.all_input_nodes if self.constant(value) is None]

    def axis(self, node: fx.Node) -> int:
        """Where a value's channels are: -1 behind layers that read the last axis, else 1."""
        return self._axes[node]

    def _find_axis(self, node: fx.Node) -> int:
        if len(self.shape(node)) == 2:
            return 1
        if isinstance(self.module(node), _READ_LAST_AXIS) or self.kind(node) in _FUNCTIONS_OF_LAST_AXIS:
            return -1
        sources = [self._axes[value] for value in self.variables(node) if self.shape(value) == self.shape(node)]
        return min(sources) if sources and self.is_pointwise(node) else 1

    def channels(self, node: fx.Node) -> int:
        """Size of the channel axis."""
        return self.shape(node)[self.axis(node)]

    def factor(self, node: fx.Node, value: Any) -> Tensor | None:
        """A constant as one float32 a channel of a node's value, or None where it differs within a channel."""
        shape, axis = self.shape(node), self.axis(node)
        if not isinstance(value, Tensor):
            return torch.full((shape[axis],), float(value))
        if value.dtype != torch.float32 or value.dim() > len(shape):
            return None
        value = value.detach().reshape(*(1,) * (len(shape) - value.dim()), *value.shape).movedim(axis, -1)
        if value.numel() not in (1, value.shape[-1]) or value.shape[-1] not in (1, shape[axis]):
            return None
        return value.reshape(-1).expand(shape[axis]).contiguous()

    def binary_layer(self, node: fx.Node) -> Any:
        """The binary layer a node calls, or None. Of a linear layer's input the channels are the last axis."""
        module = self.module(node)
        if module is None or layer_kind(module) is None or not 2 <= len(self.shape(node)) <= 4:
            return None
        batched = len(self.shape(node)) == 4 if isinstance(module, nn.Conv2d) else len(self.shape(node)) == 3
        return module if isinstance(module, nn.Linear) or batched else None

    def is_transparent(self, node: fx.Node) -> bool:
        """Leaves values as they are, in evaluation."""
        drops = node.op != "call_module" and bool(self.options(node, ("p", "training")).get("training", True))
        return self.is_identity(node) or (self.is_dropout(node) and not drops)

    def is_flatten(self, node: fx.Node) -> bool:
        """(N, C, *spatial) -> (N, features), of what words hold. With channels last, pixels would come first."""
        if not super().is_flatten(node):
            return False
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        return len(self.shape(source)) <= 4 and self.axis(source) == 1

    def left_because(self, node: fx.Node) -> str | None:
        """Why a layer with a binary weight stays as it is; None of packed layers and all others."""
        layer = self.module(node)
        if is_binary_call(node):
            return reason_against(node, self.constant, self.values)
        if not has_binary_weight(layer) or self.binary_layer(node) is not None:
            return None
        if not reads_bits(layer):
            return "its input is not known to be bits"
        if layer_kind(layer) is None:
            return "its class or a hook changes what the layer does"
        return f"its result is {self.shape(node)}, and only batches of at most two axes of pixels are packed"

    def is_doubling(self, node: fx.Node) -> bool:
        """torch.cat([x, x], 1): two thresholds for one accumulator (BinaryDuo)."""
        if node.target not in (torch.cat, torch.concat) or len(node.all_input_nodes) != 1:
            return False
        tensors, axis, *_ = (*node.args, *node.kwargs.values(), 0)
        return bool(len(tensors) == 2 and axis == 1)  # type: ignore[arg-type]

    def is_batch_norm(self, node: fx.Node) -> bool:
        """A batch norm that uses its running statistics."""
        return super().is_batch_norm(node) and self.module(node).running_mean is not None

    def is_monotone(self, node: fx.Node) -> bool:
        """Elementwise, never falling, the same for all channels."""
        if self.kind(node) not in _MONOTONE or self.variables(node) != [node.args[0]]:
            return False
        if self.kind(node) in (nn.LeakyReLU, F.leaky_relu):
            return bool(self.options(node, ("negative_slope",)).get("negative_slope", 0.01) >= 0)
        return all(not isinstance(value, fx.Node) for value in (*node.args[1:], *node.kwargs.values()))

    def channel_constant(self, node: fx.Node) -> Tensor | None:
        """The constant that a node adds to, subtracts from or multiplies with a value, one a channel, or None."""
        kinds = (*ADDITIONS, *SUBTRACTIONS, *PRODUCTS)
        if self.kind(node) not in kinds or node.kwargs or len(node.args) != 2 or len(self.variables(node)) != 1:
            return None
        (source,) = self.variables(node)
        if node.args.count(source) != 1 or self.shape(source) != self.shape(node):
            return None
        if self.kind(node) in SUBTRACTIONS and node.args[0] is not source:
            return None
        (other,) = (argument for argument in node.args if argument is not source)
        return self.factor(source, self.constant(other))

    def slope(self, node: fx.Node) -> Tensor | None:
        """Slope of a parametric or leaky ReLU at negative values, one a channel, or None of other nodes."""
        kind, module = self.kind(node), self.module(node)
        if kind in (nn.LeakyReLU, F.leaky_relu):
            return self.factor(node, float(self.options(node, ("negative_slope",)).get("negative_slope", 0.01)))
        if kind not in PARAMETRIC_RELUS or len(self.variables(node)) != 1:
            return None
        weight = module.weight if module is not None else self.constant(node.args[1])
        if not isinstance(weight, Tensor) or weight.numel() not in (1, self.channels(node)):
            return None
        if weight.numel() > 1 and self.axis(node) != 1:  # torch's channels are axis 1
            return None
        return weight.detach().reshape(-1).expand(self.channels(node)).contiguous()

    def is_monotone_by_channel(self, node: fx.Node) -> bool:
        """Elementwise, rising or falling in each channel: a constant of its own, or a slope that is not negative."""
        if self.channel_constant(node) is not None:
            return True
        slope = self.slope(node)
        return slope is not None and bool((slope >= 0).all())

    def is_addition(self, node: fx.Node) -> bool:
        """A sum of two values of its own shape."""
        variables = self.variables(node)
        return (
            self.kind(node) in ADDITIONS and not node.kwargs and len(node.args) == 2
            and len(node.all_input_nodes) == len(variables) == 2
            and all(self.shape(value) == self.shape(node) for value in variables)
        )

    def is_pointwise(self, node: fx.Node) -> bool:
        """Each element of the result depends on that of its inputs alone, or on it and the channel's constants."""
        return (
            self.is_transparent(node) or self.is_monotone(node) or self.slope_kind(node) or self.is_addition(node)
            or self.kind(node) in (*ADDITIONS, *SUBTRACTIONS, *PRODUCTS)
        )

    def slope_kind(self, node: fx.Node) -> bool:
        """A parametric ReLU."""
        return self.kind(node) in (*PARAMETRIC_RELUS, nn.LeakyReLU, F.leaky_relu)

    def max_pool(self, node: fx.Node) -> Window | None:
        """Geometry of a one- or two-dimensional max-pooling of a batch."""
        pool = self.pool(node)
        if pool is None or pool.kind != "max" or not pool.is_known:
            return None
        if len(pool.kernel) > 2 or len(self.shape(node)) != len(pool.kernel) + 2:
            return None

        def pair(sizes: tuple[int, ...], single: int) -> tuple[int, int]:
            return (single, *sizes)[-2:]  # type: ignore[return-value]

        kernel, stride = pair(pool.kernel, 1), pair(pool.stride, 1)
        return Window(kernel, stride, pair(pool.padding, 0), pair(pool.dilation, 1), pool.ceil_mode)

    def upsampling(self, node: fx.Node) -> Upsampling | None:
        """Nearest upsampling of a batch of images of one or two dimensions by whole numbers."""
        options = self.options(node, ("size", "scale_factor", "mode")) if self.kind(node) in _UPSAMPLINGS else {}
        dims, scale = len(self.shape(node)) - 2, options.get("scale_factor")
        if scale is None or options.get("mode", "nearest") != "nearest" or dims not in (1, 2):
            return None
        scales = tuple(scale) if isinstance(scale, tuple | list) else (scale,) * dims
        if not all(isinstance(each, int | float) and each == int(each) >= 1 for each in scales):
            return None
        return Upsampling((*(1,) * (2 - dims), *map(int, scales)))  # type: ignore[arg-type]

    def spatial(self, node: fx.Node) -> Window | Upsampling | None:
        """A max-pooling or upsampling, which bits can go through as well."""
        return self.max_pool(node) or self.upsampling(node)

    def moves_bits(self, node: fx.Node) -> Window | Upsampling | Rearrangement | None:
        """What bits can go through as well as the values that they are made of."""
        return self.spatial(node) or rearrangements.rearrangement(self, node)

    def avg_pool(self, node: fx.Node) -> Pool | None:
        """A two-dimensional average of a batch, over windows or over the whole image."""
        pool = self.pool(node)
        if pool is None or pool.kind != "average" or len(pool.padding) != 2 or len(self.shape(node)) != 4:
            return None
        return pool if pool.is_known or pool.output == (1, 1) else None

    def binary_values(self, node: fx.Node) -> str | None:
        """Encoding of a value that a binary activation produced, through pooling and reshapes, or None."""
        while True:
            module = self.module(node)
            if isinstance(module, layers.BinaryActivation):
                return module.encoding if len(self.shape(node)) <= 4 else None
            if not (self.is_transparent(node) or self.is_flatten(node) or self.moves_bits(node)):
                return None
            node = node.args[0]  # type: ignore[assignment]


# --- chains -----------------------------------------------------------------------------------------------------------


def pixels_of(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape without batch and channels."""
    return shape[1:-1] if axis == -1 else shape[2:]


def chain_of(model: Model, node: fx.Node, axis: int, made: Set[fx.Node] = frozenset()) -> Chain:
    """Walks back from a value through monotone steps, to a binary layer or as far as they go.

    Args:
        model, node: whose bits are wanted.
        axis: of the channels, of which each has a threshold of its own.
        made: values that are made as floats anyway; the chain goes no further.
    """
    steps: list[Step] = []
    doubled = normed = False
    layout = node
    while model.binary_layer(node) is None and model.axis(node) == axis:
        spatial = model.spatial(node)
        if node in made and not model.is_transparent(node) and not model.is_flatten(node):
            break
        if model.is_flatten(node):
            one_pixel = math.prod(model.shape(node.args[0])[2:]) == 1  # type: ignore[arg-type]
            if (normed or doubled) and not one_pixel:
                break  # One pixel's channel and another's have thresholds of their own.
            layout = node.args[0]  # type: ignore[assignment]
        elif spatial is not None:
            steps.append(spatial)
        elif model.is_batch_norm(node):
            steps.append(_batch_norm_step(model, node))
            normed = True
        elif model.is_monotone(node):
            steps.append(_elementwise_step(model, node))
        elif model.is_monotone_by_channel(node):
            steps.append(_channel_step(model, node))
            normed = True
        elif model.is_doubling(node) and not doubled:
            doubled = True
        elif not model.is_transparent(node):
            break
        node = model.variables(node)[0]
    return Chain(node, steps[::-1], doubled, pixels_of(model.shape(layout), axis))


def _elementwise_step(model: Model, node: fx.Node) -> Callable[[Tensor], Tensor]:
    return lambda values: model.call(node, values.unsqueeze(0)).squeeze(0)


def _channel_step(model: Model, node: fx.Node) -> Callable[[Tensor], Tensor]:
    """A step with a constant for each channel, on one value a channel."""
    (source,) = model.variables(node)
    axis, dims, channels = model.axis(source), len(model.shape(source)), model.channels(source)

    def step(values: Tensor) -> Tensor:
        pixels = values.reshape(-1, *(1,) * (dims - 2), channels).movedim(-1, axis)
        return model.call(node, pixels).movedim(axis, -1).reshape(-1)

    return step


def _batch_norm_step(model: Model, node: fx.Node) -> Callable[[Tensor], Tensor]:
    """A batch norm on one value a channel."""
    return lambda values: model.norm(node, model.module(node), values.reshape(-1, model.channels(node))).reshape(-1)
