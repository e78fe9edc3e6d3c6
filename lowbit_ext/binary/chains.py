"""The model that pack reads: its values on an example, what its nodes are, and the chains of steps between them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit_ext._graph import Pool, Traced, first_line, has_binary_weight, reads_batch_size, reads_bits, trace
from lowbit_ext.binary import layers
from lowbit_ext.binary.packed_model import Window
from lowbit_ext.binary.thresholds import Chain, Step

BINARY_LAYERS = (layers.BinaryConv2d, layers.BinaryConv1d, layers.BinaryLinear)
# Monotone with every rounding included, the same for all channels. Sigmoid and tanh are not: their last bits may fall.
_MONOTONE = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, layers.BinaryActivation, F.relu, torch.relu, F.relu6, F.hardtanh, torch.clamp,
    "relu", "clamp",
)


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

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        try:
            graph = trace(model, inference=True)
        except Exception as error:
            raise ValueError(f"pack: torch.fx cannot trace the model: {first_line(error)}") from error
        super().__init__(model, graph)
        # Out of place: a recorded value must stay what the nodes that read it saw.
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        for node in self.graph.nodes:
            if node.kwargs.get("inplace"):
                node.update_kwarg("inplace", False)
        self.root = model
        self._run(inputs)
        if self._take_bits_as_bits():
            self._run(inputs)
        self._read_batch_size_from_input()

    def _run(self, inputs: tuple[Any, ...]) -> None:
        """Records every node's value and shape, and the result."""
        interpreter = fx.Interpreter(fx.GraphModule(self.root, self.graph), garbage_collect_values=False)
        self.output = interpreter.run(*copy.deepcopy(inputs))
        self.values = interpreter.env
        self.shapes = {node: tuple(x.shape) for node, x in self.values.items() if isinstance(x, Tensor)}

    def _take_bits_as_bits(self) -> bool:
        """Puts binary layers for layers that take values as they are, where these are bits: whether there are any."""
        found = False
        for node in self.graph.nodes:
            layer, target = self.module(node), str(node.target)
            if not has_binary_weight(layer) or reads_bits(layer):
                continue
            if self.binary_values(node.args[0]) == "step" and getattr(layer, "padding_mode", "zeros") == "zeros":
                parent, _, name = target.rpartition(".")
                self.modules[target] = _binary_twin(layer)
                setattr(self.root.get_submodule(parent), name, self.modules[target])
                found = True
        return found

    def _read_batch_size_from_input(self) -> None:
        """The batch size of inner values is the input's, so that they need not exist as floats."""
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        for node in self.graph.nodes:
            if reads_batch_size(node) and self.shape(node.args[0])[:1] == self.shape(first)[:1]:
                node.update_arg(0, first)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value on the example; () for what is no tensor."""
        return self.shapes.get(node, ())

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
        if type(module) not in BINARY_LAYERS:
            return None
        return None if isinstance(module, nn.Linear) and len(self.shape(node)) != 2 else module

    def is_transparent(self, node: fx.Node) -> bool:
        """Leaves values as they are, in evaluation."""
        drops = node.op != "call_module" and bool(self.options(node, ("p", "training")).get("training", True))
        return self.is_identity(node) or (self.is_dropout(node) and not drops)

    def is_flatten(self, node: fx.Node) -> bool:
        """(N, C, *spatial) -> (N, features), of what words hold."""
        return super().is_flatten(node) and len(self.shape(node.args[0])) <= 4  # type: ignore[arg-type]

    def left_because(self, node: fx.Node) -> str | None:
        """Why a layer with a binary weight stays as it is; None of packed layers and all others."""
        layer = self.module(node)
        if not has_binary_weight(layer) or self.binary_layer(node) is not None:
            return None
        if not reads_bits(layer):
            return "its input is not known to be bits"
        if type(layer) in BINARY_LAYERS:
            return f"its result is {self.shape(node)}, and only linear layers that give (N, features) are packed"
        return "its class is derived from a packable one and may do something else"

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
        return self.kind(node) in _MONOTONE and node.all_input_nodes == [node.args[0]]

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
            if not (self.is_transparent(node) or self.is_flatten(node) or self.max_pool(node)):
                return None
            node = node.args[0]  # type: ignore[assignment]


# --- chains -----------------------------------------------------------------------------------------------------------


def chain_of(model: Model, node: fx.Node) -> Chain:
    """Walks back from a value through monotone steps, to a binary layer or as far as they go."""
    steps: list[Step] = []
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
    return Chain(node, steps[::-1], doubled, model.shape(layout)[2:])


def _elementwise_step(model: Model, node: fx.Node) -> Callable[[Tensor], Tensor]:
    return lambda values: model.call(node, values.unsqueeze(0)).squeeze(0)


def _batch_norm_step(model: Model, node: fx.Node) -> Callable[[Tensor], Tensor]:
    """A batch norm on one value a channel, in the shape it has in the model."""
    shape = model.shape(node.all_input_nodes[0])
    pixels = len(shape) - 2

    def step(values: Tensor) -> Tensor:
        images = values.reshape(-1, shape[1], *(1,) * pixels).expand(-1, -1, *(2,) * pixels).contiguous()
        return model.call(node, images).reshape(*images.shape[:2], -1)[..., 0].reshape(-1)

    return step
