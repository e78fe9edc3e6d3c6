"""describe(): parameters and operations of every layer, binary and float apart."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_ext.binary import BinaryConv1d, BinaryConv2d, BinaryLinear
from lowbit_ext.duo import CoupledConv2d, CoupledLinear

_BINARY = (BinaryConv1d, BinaryConv2d, BinaryLinear, CoupledConv2d, CoupledLinear)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One layer on one image.

    Attributes:
        name: within the model.
        kind: name of its class.
        output: shape of its result without the batch.
        binary_parameters: weights of one bit.
        float_parameters: all others.
        binary_operations: multiply-accumulates with a weight of one bit.
        float_operations: multiply-accumulates of convolutions and linear layers with float weights.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    binary_parameters: int = 0
    float_parameters: int = 0
    binary_operations: int = 0
    float_operations: int = 0


@dataclasses.dataclass(frozen=True)
class Description:
    """Layers in the order of their first call, and totals. `print` shows it as a table.

    Attributes:
        layers: one LayerCost for every layer with parameters.
        binary_parameters, float_parameters, binary_operations, float_operations: sums over the layers.
    """

    layers: tuple[LayerCost, ...]

    def _total(self, name: str) -> int:
        return sum(getattr(layer, name) for layer in self.layers)

    @property
    def binary_parameters(self) -> int:
        """Weights of one bit."""
        return self._total("binary_parameters")

    @property
    def float_parameters(self) -> int:
        """Float weights, biases and batch norm parameters."""
        return self._total("float_parameters")

    @property
    def binary_operations(self) -> int:
        """Multiply-accumulates with weights of one bit, of one image."""
        return self._total("binary_operations")

    @property
    def float_operations(self) -> int:
        """Multiply-accumulates of float convolutions and linear layers, of one image."""
        return self._total("float_operations")

    def __str__(self) -> str:
        heading = ["layer", "kind", "output", "binary parameters", "float parameters", "binary MACs", "float MACs"]
        rows = [
            [layer.name, layer.kind, "x".join(map(str, layer.output))]
            + [f"{count:,}" if count else "-" for count in dataclasses.astuple(layer)[3:]]
            for layer in (*self.layers, LayerCost("total", "", (), *map(self._total, _COUNTS)))
        ]
        widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if index < 3 else cell.rjust(width)
                      for index, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in (heading, ["-" * width for width in widths], *rows)
        ]
        return "\n".join(lines)


_COUNTS = ("binary_parameters", "float_parameters", "binary_operations", "float_operations")


def describe(model: nn.Module, example_input: Any) -> Description:
    """Counts the parameters and operations of a model's layers.

    Args:
        model: of any stage, also decoupled; not modified. Its convolutions and linear layers are counted, whatever
            else it computes costs parameters only.
        example_input: a tensor (N, ...) or a tuple of the model's inputs; operations are those of one image, 1 / N of
            the batch.

    Returns:
        Description: data, and a table under `print`.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"describe: model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    names = {module: name for name, module in model.named_modules()}
    costs: dict[nn.Module, LayerCost] = {}

    def count(module: nn.Module, _: Any, output: Any) -> None:
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if not parameters or not isinstance(output, Tensor):
            return
        weight = getattr(module, "weight", None)
        operations = binary_weights = 0
        is_binary = isinstance(module, _BINARY)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and isinstance(weight, Tensor):
            operations = output[:1].numel() * math.prod(weight.shape[1:])
            binary_weights = weight.numel() if is_binary else 0
        before = costs.get(module, LayerCost("", "", ()))
        costs[module] = LayerCost(
            names[module],
            type(module).__name__,
            tuple(output.shape[1:]),
            binary_weights,
            parameters - binary_weights,
            before.binary_operations + (operations if is_binary else 0),
            before.float_operations + (0 if is_binary else operations),
        )

    was_training = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(count) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    return Description(tuple(costs.values()))
