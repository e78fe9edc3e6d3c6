"""pack(): checks what it is given, has the model traced and rebuilt, and compares the result with the model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit_ext import _arguments
from lowbit_ext._graph import first_line, has_binary_weight, is_own_layer
from lowbit_ext._torch import pytree
from lowbit_ext.binary.activation import DEFAULT_THRESHOLDS
from lowbit_ext.binary.packing.batches import is_by_image
from lowbit_ext.binary.packing.chains import Model
from lowbit_ext.binary.packing.functions import is_binary_call
from lowbit_ext.binary.packing.packed_model import Call, PackedModel
from lowbit_ext.binary.packing.packer import Packer
from lowbit_ext.packed import unpack_op

__all__ = ["pack"]

_HALVES = (torch.bfloat16, torch.float16)


def pack(model: nn.Module, example_input: Any, *, float_dtype: torch.dtype | None = None) -> PackedModel:
    """Packs a trained model: binary layers on bits, thresholds in integers, float parts in fused passes.

    conv2d, conv1d and linear of this package, called in a forward with a constant weight, are layers too.

    A copy of the model in evaluation mode is traced by torch.fx for the call that the example makes: arguments that are
    no tensors, those left out among them, are fixed. Activations stay packed between binary layers: scale, bias, batch
    norm, ReLU, hardtanh, clamp, constants a channel, dropout and max-pooling between them become one integer threshold
    a channel. Where values are needed as floats too, as on a residual stream, one pass behind the accumulator makes
    them - batch norms, additions, (P)ReLUs, constants - and writes floats and bits. All other layers are the model's
    own. The result is compared with the model's on the example, bit for bit at every packed value.

    Args:
        model: a module; not modified. One on another device or in another float type is packed as float32 on the CPU
            and moved back, a float64 one as float32.
        example_input: a tensor, a tuple of the model's positional arguments or a dictionary of its keyword arguments.
            Batch size is free later, the image size only where no linear layer is packed.
        float_dtype: type of the float parts, streams included. None, the model's own: float32 agrees with the model bit
            for bit at every packed value. torch.bfloat16 or torch.float16 halves the traffic of float parts; bits close
            to a threshold change, and the report says how many predictions on the example agree.

    Returns:
        PackedModel; its `report()` says of every layer what became of it.

    Warns:
        UserWarning: names a layer with a binary weight that stays as it is, and why.

    Raises:
        TypeError: not a module, float_dtype no float type of the kernels.
        ValueError: the model has no binary layer or none that can be packed, cannot be traced or run on the example, or
            the packed model differs from it (names the first layer that does).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack: model must be a torch.nn.Module, got {type(model).__name__}")
    if float_dtype is not None:
        _arguments.dtype("pack", "float_dtype", float_dtype, _arguments.FLOATS)
    for value in pytree.tree_leaves(example_input):
        if isinstance(value, Tensor):
            _arguments.tensor("pack", "example_input", value)
    device, dtype = _home(model)
    if float_dtype is None and dtype in _HALVES:
        float_dtype = dtype
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if is_own_layer(model):
        model = nn.Sequential(model)
    call = Call.of(model, _in_float32(example_input))
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        expected = _run(model, call)
        traced = Model(model, call)
        _check_binary(traced)
        packer = Packer(traced)
        _check_packed(traced)
        body = fx.GraphModule(packer.modules, packer.graph, class_name="PackedGraph")
        result = _check_bits(traced, packer, body, call)
        _check_output(expected, result)
    rows = tuple(packer.rows[node] for node in traced.graph.nodes if node in packer.rows)
    packed = PackedModel(body, call, rows, is_by_image(traced))
    if float_dtype in _HALVES:
        packed.to(float_dtype)
        packed.agreement = _agreement(expected, packed(*call.example()))
    return packed.to(device)


def _home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and float type of the model's parameters and buffers, by its first one."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"pack: the model must have values, {name} is on the device meta")
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def _in_float32(example: Any) -> Any:
    """The example on the CPU, floats as float32; copies, which a model may write into."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)

    return pytree.tree_map(moved, example)


def _run(model: nn.Module, call: Call) -> Any:
    """The model's own result for the call."""
    try:
        return call.on(model)
    except Exception as error:
        shapes = ", ".join(str(tuple(value.shape)) for value in call.example())
        raise ValueError(f"pack: the model does not run on the example {shapes}: {first_line(error)}") from error


def _check_binary(traced: Model) -> None:
    """Refuses a model without binary layers."""
    binary = any(has_binary_weight(module) for module in traced.modules.values())
    if not binary and not any(map(is_binary_call, traced.graph.nodes)):
        raise ValueError("pack: the model has no BinaryConv2d, BinaryConv1d or BinaryLinear, nor such a function")


def _check_packed(traced: Model) -> None:
    """Warns of binary layers that stay as they are; refuses a model of which nothing is packed."""
    left = {node: traced.left_because(node) for node in traced.graph.nodes}
    reasons = [f"{traced.label(node)} stays as it is: {reason}" for node, reason in left.items() if reason is not None]
    if not any(traced.binary_layer(node) is not None for node in traced.graph.nodes):
        raise ValueError(f"pack: nothing could be packed; {'; '.join(reasons) or 'no binary layer is called'}")
    for reason in reasons:
        warnings.warn(f"pack: {reason}", stacklevel=3)


def _check_bits(traced: Model, packer: Packer, body: fx.GraphModule, call: Call) -> Any:
    """Runs the packed network; compares every packed value with the model's."""
    interpreter = fx.Interpreter(body, garbage_collect_values=False)
    result = interpreter.run(*call.example())
    for words, (node, encoding, axis, _, part) in packer.points:
        bits = unpack_op(interpreter.env[words.node], words.channels, 0.0, 1.0, torch.float32).movedim(-1, 1)
        wanted = (traced.values[node] >= DEFAULT_THRESHOLDS[encoding]).movedim(axis, 1)[:, slice(*(part or (None,)))]
        wrong = int((bits.flatten(1).bool() != wanted.flatten(1)).sum())
        if wrong:
            raise ValueError(
                f"pack: the packed bits of {traced.label(node)} differ from the model's in {wrong} of "
                f"{wanted.numel()} places"
            )
    return result


def _check_output(expected: Any, result: Any) -> None:
    """Float layers see equal inputs, but perhaps in another memory format: that may change a few roundings."""
    (wants, structure), (gots, came) = pytree.tree_flatten(expected), pytree.tree_flatten(result)
    if structure != came:
        raise ValueError(f"pack: the packed model returns {came}, the model {structure}")
    for want, got in zip(wants, gots, strict=True):
        if not isinstance(want, Tensor) or torch.equal(want, got):
            continue
        close = want.shape == got.shape and torch.allclose(want, got, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        if not close or not torch.equal(want.argmax(-1), got.argmax(-1)):
            raise ValueError("pack: the packed model's output differs from the model's, though all packed bits agree")


def _agreement(expected: Any, result: Any) -> tuple[int, int]:
    """How many predictions agree, of how many: the largest logit along axis 1 of each floating-point result."""
    equal = count = 0
    for want, got in zip(pytree.tree_leaves(expected), pytree.tree_leaves(result), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point() and want.dim() > 1:
            agrees = want.argmax(1) == got.argmax(1)
            equal, count = equal + int(agrees.sum()), count + agrees.numel()
    return equal, count
