"""Hostile calls of every public function and class.

Each call starts from arguments that must work; none, one or a few of them are then replaced by something hostile. What
may come of it: a result, which equals a slow reference where there is one, or a TypeError or ValueError (or what the
docstring names besides) whose text names the function and an argument. Everything else is a finding.

`python tests/fuzz.py` runs calls by the hundred thousand in processes that may crash or hang.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fractions
import functools
import importlib
import inspect
import io
import math
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import foreign_networks as foreign
import fuzz_reference as reference
from lowbit_ext import PackedTensor, antithetic, binary, cone, duo, helstrom, lowmem

PACKAGES = ("antithetic", "binary", "cone", "duo", "helstrom", "lowmem")

Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A public function, class or method.

    Attributes:
        call: what is called, by keywords.
        arguments: makes the keywords of a call that must succeed.
        says: further names by which a message may call the function, and its arguments.
        raises: exceptions that the docstring names besides TypeError and ValueError, whatever their text.
        expected: the slow reference: takes the arguments and the result, returns what is wrong with it or "".
        share: how often it is called beside the others.
        functions: arguments that it calls, whose own exceptions come through.
    """

    call: Callable[..., Any]
    arguments: Callable[[random.Random], Arguments]
    says: tuple[str, ...] = ()
    raises: tuple[type[Exception], ...] = ()
    expected: Callable[[Arguments, Any], str] | None = None
    share: int = 10
    functions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """A call that did something else than it may. The same `kind` of the same target is the same fault."""

    seed: int
    index: int
    target: str
    kind: str
    detail: str
    arguments: str


# --- arguments that must work -----------------------------------------------------------------------------------------

ENCODINGS, DTYPES = ("sign", "step"), (torch.float32, torch.bfloat16, torch.float16)


def floats(r: random.Random, *size: int) -> Tensor:
    return torch.randn(size).to(r.choice(DTYPES))


def packed(r: random.Random, *size: int) -> PackedTensor:
    made = binary.binarize(torch.randn(size), r.choice(ENCODINGS))
    if r.random() < 0.1:
        return PackedTensor(made.words, made.channels, made.encoding, torch.rand(1))
    return made


def bit_rows(r: random.Random, channels: int) -> PackedTensor:
    return binary.binarize(torch.randn(3, channels), "step")


def chosen(r: random.Random, **options: Any) -> Arguments:
    """Some of the options: lists of values, or functions that make one."""
    taken = {name: values for name, values in options.items() if r.random() < 0.4}
    return {name: values() if callable(values) else r.choice(values) for name, values in taken.items()}


def conv(r: random.Random, dims: int) -> Arguments:
    """Arguments of conv2d, conv1d and linear: dims 2, 1 and 0."""
    groups = r.choice([1, 1, 1, 2]) if dims else 1
    channels, filters = groups * r.choice([1, 3, 5, 32, 64, 65]), groups * r.choice([1, 2, 4, 33])
    kernel = [r.randint(1, 3) for _ in range(dims)]
    size = [r.randint(3, 7) for _ in range(dims)]
    precise = r.random() < 0.15
    weight: Any = floats(r, filters, channels // groups, *kernel)
    if precise:
        input: Any = torch.randn(r.randint(1, 3), channels, *size, dtype=torch.float64)
    elif r.random() < 0.5:
        input = packed(r, r.randint(1, 3), channels, *size)
        weight = weight if r.random() < 0.5 else binary.pack_weight(weight, groups)
    else:
        input = floats(r, r.randint(1, 3), channels, *size)
    made = {"input": input, "weight": weight}
    if dims:
        made |= chosen(
            r, stride=[1, 2], padding=[0, 1, 2, "valid", (0, 2) if dims == 1 else ((0, 1), (2, 0))],
            dilation=[1, 1, 2], padding_value=[0, 1], groups=[groups],
        )
        made["groups"] = groups
        if made.get("dilation") == 2:
            made["padding"] = 2
    made |= chosen(
        r, scale=[0.5, lambda: torch.rand(filters)][r.randint(0, 1) :][:1], bias=lambda: torch.randn(filters),
        encoding=ENCODINGS, surrogate=["clip", "identity", "steep"],
    )
    made = {name: value() if callable(value) else value for name, value in made.items()}
    out = reference.conv_size(made, dims)
    bits = not precise and r.random() < 0.3
    if bits:
        made["threshold"] = r.choice([0, 0.5, torch.randn(filters), torch.randn(2, filters)])
        made |= chosen(r, flip=lambda: torch.rand(filters) < 0.5)
    elif r.random() < 0.3:
        made["residual"] = floats(r, *out)
    if not precise and not bits and r.random() < 0.3:
        made["out_dtype"] = r.choice(DTYPES)
    if r.random() < 0.2:
        for name in ("input", "weight", "scale", "bias", "residual"):
            if isinstance(made.get(name), Tensor) and made[name].is_floating_point() and r.random() < 0.5:
                made[name].requires_grad_()
    return made


def product(r: random.Random) -> Arguments:
    """Arguments of matmul."""
    rows, columns, depth = r.choice([1, 5, 33]), r.choice([1, 4, 65]), r.choice([1, 3, 63, 64, 65])
    batches = r.choice([((), ()), ((2,), (2,)), ((2,), ()), ((2, 1), (3,))])
    precise = r.random() < 0.1
    made: Arguments = {}
    for name, batch, size in (("a", batches[0], (rows, depth)), ("b", batches[1], (depth, columns))):
        values = torch.randn(*batch, *size)
        if not precise and r.random() < 0.3:
            by_row = values if name == "a" else values.mT  # K last
            encoding = r.choice(ENCODINGS)
            words = binary.binarize(by_row.reshape(-1, depth), encoding).words
            scale = torch.rand(1) if r.random() < 0.2 else None
            made[name] = PackedTensor(words.reshape(*by_row.shape[:-1], -1), depth, encoding, scale)
        else:
            made[name] = values.double() if precise else values.to(r.choice(DTYPES))
            if r.random() < 0.2:
                made[name].requires_grad_()
    made |= chosen(
        r, a_encoding=ENCODINGS, b_encoding=ENCODINGS, surrogate=["clip", "identity", "steep"], scale=[0.5, 3],
    )
    if not precise and r.random() < 0.3:
        made["out_dtype"] = r.choice(DTYPES)
    return made


def pool(r: random.Random, average: bool) -> Arguments:
    kernel = r.choice([1, 2, 3, (2, 3), (3, 1)])
    least = min(kernel) if isinstance(kernel, tuple) else kernel
    made = {"input": packed(r, r.randint(1, 2), r.choice([1, 5, 64, 65]), 6, 7), "kernel_size": kernel}
    made |= chosen(r, stride=[1, 2, (2, 1)], padding=[0, least // 2], ceil_mode=[True, False])
    if average:
        return made | chosen(r, count_include_pad=[True, False], divisor_override=[1, 3])
    invert = lambda: binary.binarize(torch.randn(1, made["input"].channels)).words[0]  # noqa: E731
    return made | chosen(r, dilation=[1, 2], invert=invert)


def layer_options(r: random.Random) -> Arguments:
    return chosen(
        r, bias=[True, False], dtype=[torch.float32, torch.float64], device=["cpu", torch.device("cpu")],
        weight_scale=["channel", "layer", None],
    )


def learned_scale(r: random.Random) -> Arguments:
    return chosen(r, weight_scale=["learned"])


def signs_or_floats(r: random.Random) -> Any:
    x = floats(r, 2, 4, 5, 5)
    return r.choice([x, binary.binarize(x)])


def conv_layer(r: random.Random, binary_options: bool, dims: int = 2) -> Arguments:
    groups = r.choice([1, 2])
    made = {"in_channels": 4 * groups, "out_channels": 3 * groups, "kernel_size": r.choice([1, 3]), "groups": groups}
    made |= chosen(r, stride=[1, 2], padding=[0, 1, "valid"], dilation=[1, 2], padding_mode=["zeros"])
    made |= layer_options(r)
    if binary_options:
        sides = chosen(r, padding=[((0, 1), (1, 0))] if dims == 2 else [(0, 1), ((0, 1),)])
        return made | chosen(r, encoding=ENCODINGS, surrogate=["clip"], padding_value=[0, 1]) | learned_scale(r) | sides
    return made | chosen(r, save_codes=[True, False])


def linear_layer(r: random.Random, binary_options: bool) -> Arguments:
    made = {"in_features": 5, "out_features": 3} | layer_options(r)
    if binary_options:
        return made | chosen(r, encoding=ENCODINGS, surrogate=["clip"]) | learned_scale(r)
    return made | chosen(r, save_codes=[True, False])


def binary_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), binary.BinaryConv2d(8, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2),
        binary.BinaryConv2d(8, 4, 1), nn.Flatten(), binary.BinaryLinear(16, 3),
    ).eval()


def foreign_network() -> nn.Module:
    return nn.Sequential(
        foreign.BinaryActivation(), foreign.HardBinaryConv(4, 8), nn.BatchNorm2d(8),
        foreign.BinaryActivation(), foreign.HardBinaryConv(8, 4),
    ).eval()


def two_level_conv() -> nn.Module:
    return binary.BinaryConv2d(
        4, 3, 3, bias=False, weight_scale="learned", padding=1, device="cpu", dtype=torch.float32
    )


def with_cached_weights(input: Any) -> Tensor:
    """A layer's second call, on the weight that the first one has packed."""
    layer = binary.BinaryConv2d(4, 3, 3, device="cpu", dtype=torch.float32)
    with torch.no_grad(), binary.cached_weights():
        layer(input)
        return layer(input)


def coupled_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), duo.TernaryActivation(), duo.CoupledConv2d(4, 4, 3), nn.BatchNorm2d(4),
        duo.TernaryActivation(), nn.Flatten(), duo.CoupledLinear(4 * 16, 3),
    ).eval()


def float_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2)
    )


def image(r: random.Random) -> Tensor:
    return torch.randn(r.randint(1, 2), 1, 8, 8)


def written(r: random.Random) -> Arguments:
    """A packed model and a file of it."""
    model = binary.pack(binary_network(), image(r))
    binary.save(model, "model.safetensors")
    return {"model": model, "path": "model.safetensors"}


def samples(r: random.Random) -> antithetic.AntitheticSamples:
    return antithetic.sample(torch.randn(3, 5), r.choice([2, 4]), layout=r.choice(["sample", "dimension"]))


@functools.cache
def small_cones() -> list[cone.Cone]:
    return [cone.monotone(3), cone.simplex(3), cone.box(3), cone.nonnegative(3)]


def small_cone(r: random.Random) -> cone.Cone:
    return r.choice(small_cones())


def estimate(r: random.Random) -> Arguments:
    name = r.choice([name for name in antithetic.ESTIMATORS if name != "double_cv"])
    return {"f": lambda b: b.sum(-1), "logits": torch.randn(2, 3), "n": 2, "estimator": name} | chosen(r, seed=[0, 5])


def bound(r: random.Random) -> Arguments:
    return {"log_joint": lambda b: -b.sum(-1), "logits": torch.randn(2, 3), "importance_samples": 2} | chosen(
        r, estimator=["arms_d", "loorf", "disarm", "vimco"], n=[2]
    )


def rows(r: random.Random) -> Arguments:
    return {"X": np.random.default_rng(r.randint(0, 99)).uniform(size=(12, 4)), "y": np.arange(12) % 2}


def saving(**settings: Any) -> Tensor:
    """A backward pass under saved_tensors."""
    x = torch.randn(2, 8, 16, requires_grad=True)
    with lowmem.saved_tensors(**settings):
        result = (x.relu() * x.sigmoid()).sum()
    return torch.autograd.grad(result, x)[0]


def grouped(r: random.Random) -> Arguments:
    x = floats(r, 2, 5, 7)
    return {"quantized": r.choice([lowmem.quantize, lowmem.quantize_channels])(x)} | chosen(
        r, out=[torch.empty(2, 5, 7)]
    )


# --- what is called ---------------------------------------------------------------------------------------------------


def method(name: str) -> Callable[..., Any]:
    """A method as a function of `self` and its arguments; hostile values do not replace `self`."""
    return lambda self, **arguments: getattr(self, name)(**arguments)


def of(owner: Callable[[random.Random], Any], **options: Callable[[random.Random], Any]) -> Any:
    return lambda r: {"self": owner(r)} | {name: make(r) for name, make in options.items()}


CONV = ("input", "binary_conv2d", "groups", "kernel", "channels", "out_dtype", "sizes")
# torch's own, of layers that pass on what torch is given; documented there.
TORCH = (RuntimeError,)
SKLEARN = (TypeError, ValueError)  # of its validation, whose words its own checks ask for

TARGETS: dict[str, Target] = {
    "PackedTensor": Target(
        PackedTensor,
        lambda r: {"words": torch.randint(-(2**63), 2**63 - 1, (2, 3, 2)), "channels": r.randint(65, 128)}
        | chosen(r, encoding=ENCODINGS, scale=lambda: torch.rand(r.choice([(), (1,), (1, 1)]))),
        expected=reference.packed_tensor,
    ),
    "PackedTensor.unpack": Target(
        method("unpack"), of(lambda r: packed(r, 2, 5, 3), dtype=lambda r: r.choice(DTYPES)), says=("unpack", "words"),
    ),
    "PackedTensor.to": Target(
        method("to"), of(lambda r: packed(r, 2, 5, 3), device=lambda r: r.choice(["cpu", "meta"])), raises=TORCH
    ),
    "binary.binarize": Target(
        binary.binarize,
        lambda r: {"x": floats(r, 2, 5, 3)}
        | chosen(
            r, encoding=ENCODINGS, threshold=[0.5, torch.randn(5), torch.randn(5, 1, 1)], flip=[torch.rand(5) < 0.5]
        ),
        says=("input",), expected=reference.binarize, share=30,
    ),
    "binary.unpack": Target(
        binary.unpack, lambda r: {"packed": packed(r, 2, 5, 3)} | chosen(r, dtype=DTYPES), says=("words",),
        expected=reference.unpack,
    ),
    "binary.pack_weight": Target(
        binary.pack_weight, lambda r: {"weight": floats(r, 4, r.choice([3, 65]), *r.choice([(), (3,), (3, 2)]))}
        | chosen(r, groups=[1, 2, 4]), says=("binary_conv2d", "sizes"), expected=reference.pack_weight,
    ),
    "binary.PackedWeight": Target(
        binary.PackedWeight,
        lambda r: vars(binary.pack_weight(floats(r, 4, r.choice([3, 64]), 3, 3))).copy(), expected=reference.weight,
    ),
    "binary.PackedWeight.from_words": Target(
        binary.PackedWeight.from_words,
        lambda r: {"words": torch.randint(-(2**63), 2**63 - 1, (4, 3, 3, 1)), "shape": (4, r.randint(1, 64), 3, 3)}
        | chosen(r, groups=[1, 2]),
        expected=reference.from_words,
    ),
    "binary.PackedWeight.unpack": Target(
        method("unpack"),
        of(lambda r: binary.pack_weight(floats(r, 4, 5, 3)), dtype=lambda r: r.choice(DTYPES)),
        says=("unpack", "words"),
    ),
    "binary.conv2d": Target(
        binary.conv2d, lambda r: conv(r, 2), says=CONV, expected=reference.conv2d, share=80
    ),
    "binary.conv1d": Target(
        binary.conv1d, lambda r: conv(r, 1), says=CONV, expected=reference.conv1d, share=30
    ),
    "binary.linear": Target(
        binary.linear, lambda r: conv(r, 0), says=CONV, expected=reference.linear, share=30
    ),
    "binary.matmul": Target(
        binary.matmul, product, says=("binary_matmul", "encoding", "batch", "float64"), expected=reference.matmul,
        share=30
    ),
    "binary.max_pool2d": Target(
        binary.max_pool2d, lambda r: pool(r, False), expected=reference.max_pool2d, says=("kernel", "sizes"), share=30
    ),
    "binary.avg_pool2d": Target(
        binary.avg_pool2d, lambda r: pool(r, True), expected=reference.avg_pool2d, says=("kernel", "sizes"), share=30
    ),
    "binary.global_avg_pool": Target(
        binary.global_avg_pool, lambda r: {"input": packed(r, 2, 5, 3, 4)}, says=("avg_pool2d",),
        expected=reference.global_avg_pool,
    ),
    "binary.binary_activation": Target(
        binary.binary_activation,
        lambda r: {"x": floats(r, 2, 5)} | chosen(r, encoding=ENCODINGS, surrogate=["clip", "approx_sign"]),
        says=("input",), expected=reference.activation, share=20,
    ),
    "binary.BinaryActivation": Target(
        binary.BinaryActivation, lambda r: chosen(r, encoding=ENCODINGS, surrogate=["clip"])
    ),
    "binary.BinaryActivation.forward": Target(
        method("__call__"), of(lambda r: binary.BinaryActivation(), input=lambda r: floats(r, 3, 4)),
        says=("binary_activation",),
    ),
    "binary.BinaryConv2d": Target(binary.BinaryConv2d, lambda r: conv_layer(r, True)),
    "binary.BinaryConv2d.forward": Target(
        method("__call__"),
        of(lambda r: binary.BinaryConv2d(4, 3, 3), input=signs_or_floats), says=CONV,
    ),
    "binary.BinaryConv1d": Target(binary.BinaryConv1d, lambda r: conv_layer(r, True, 1)),
    "binary.BinaryConv1d.forward": Target(
        method("__call__"),
        of(lambda r: binary.BinaryConv1d(4, 3, 3), input=lambda r: floats(r, 2, 4, 5)), says=("binary_conv1d", *CONV),
    ),
    "binary.BinaryLinear": Target(binary.BinaryLinear, lambda r: linear_layer(r, True)),
    "binary.BinaryLinear.forward": Target(
        method("__call__"),
        of(lambda r: binary.BinaryLinear(5, 3), input=lambda r: floats(r, 2, 5)), says=("binary_linear", *CONV),
    ),
    "binary.pack": Target(
        binary.pack, lambda r: {"model": binary_network(), "example_input": image(r)}, says=("example", "model"),
        share=2,
    ),
    "binary.TwoLevelConv2d": Target(
        binary.TwoLevelConv2d, lambda r: {"conv": two_level_conv(), "offset": torch.randn(3)} | chosen(
            r, alpha=[0.5, 2], beta=[-1, 0.5], bias=lambda: torch.randn(3)
        ),
    ),
    "binary.TwoLevelConv2d.forward": Target(
        method("__call__"), of(
            lambda r: binary.TwoLevelConv2d(two_level_conv(), torch.randn(3), 0.5, 0.1),
            x=lambda r: torch.randn(2, 4, 5, 5),
        ),
        says=("input", *CONV), raises=TORCH,
    ),
    "binary.cached_weights": Target(
        with_cached_weights, lambda r: {"input": floats(r, 2, 4, 5, 5)}, says=("cached_weights", *CONV), share=2,
    ),
    "binary.convert": Target(
        binary.convert, lambda r: {"model": foreign_network(), "example_input": torch.randn(2, 4, 7, 7)} | chosen(
            r, rules=[{}, {foreign.BinaryActivation: lambda module: binary.BinaryActivation("sign", "approx_sign")}],
            surrogate=["clip", "identity"],
        ),
        says=("example", "model"), share=2,
    ),
    "binary.conversions": Target(
        binary.conversions,
        lambda r: {"model": binary.convert(foreign_network(), torch.randn(2, 4, 7, 7))}, share=2,
    ),
    "binary.PackedModel": Target(
        binary.PackedModel, lambda r: {"body": binary.pack(binary_network(), image(r)).body}, share=2
    ),
    "binary.PackedModel.forward": Target(
        lambda self, x: self(x), of(lambda r: binary.pack(binary_network()[2:], torch.randn(1, 8, 6, 6)),
                                    x=lambda r: torch.randn(2, 8, 6, 6)),
        says=("packed model", "binarize", "input", "forward"), share=2,
    ),
    "binary.save": Target(binary.save, written, raises=(OSError, ImportError), share=2),
    "binary.load": Target(binary.load, written, raises=(OSError, ImportError), share=2),
    "duo.ternary_activation": Target(
        duo.ternary_activation, lambda r: {"x": floats(r, 2, 5)} | chosen(r, surrogate=["clip", "swish_sign"]),
        says=("input",), expected=reference.ternary,
    ),
    "duo.step_activation": Target(
        duo.step_activation, lambda r: {"x": floats(r, 2, 5)} | chosen(r, surrogate=["clip", "steep"]),
        says=("input",), expected=reference.step,
    ),
    "duo.TernaryActivation": Target(duo.TernaryActivation, lambda r: chosen(r, surrogate=["clip"])),
    "duo.StepActivation": Target(
        duo.StepActivation, lambda r: chosen(r, surrogate=["clip"]), says=("BinaryActivation",)
    ),
    "duo.CoupledConv2d": Target(duo.CoupledConv2d, lambda r: conv_layer(r, False)),
    "duo.CoupledConv2d.forward": Target(
        method("__call__"),
        of(lambda r: duo.CoupledConv2d(4, 3, 3), input=lambda r: torch.randint(0, 3, (2, 4, 5, 5)) / 2), raises=TORCH,
    ),
    "duo.CoupledLinear": Target(duo.CoupledLinear, lambda r: linear_layer(r, False)),
    "duo.CoupledLinear.forward": Target(
        method("__call__"),
        of(lambda r: duo.CoupledLinear(5, 3), input=lambda r: torch.randint(0, 3, (2, 5)) / 2), raises=TORCH,
    ),
    "duo.decouple": Target(
        duo.decouple, lambda r: {"model": coupled_network(), "example_input": image(r)}, says=("example", "model"),
        share=2,
    ),
    "duo.gradient_mismatch": Target(
        duo.gradient_mismatch,
        lambda r: {
            "model": nn.Sequential(nn.Linear(3, 2), duo.StepActivation()), "loss": nn.functional.mse_loss,
            "batch": (torch.randn(4, 3), torch.randn(4, 2)), "eps": 0.1,
        } | chosen(r, layers=[["0.weight"], ("0.bias",)], max_weights=[3], generator=[torch.Generator()],
                   chunk_size=[1, 2], progress=[lambda done: None]),
        raises=(Exception,), share=2,  # what the model and the loss raise comes through
    ),
    "lowmem.quantize": Target(
        lowmem.quantize, lambda r: {"x": floats(r, 2, 5, 7)} | chosen(
            r, bits=[2, 4, 8], stochastic=[True, False], positive=[True, False], generator=[torch.Generator()]
        ), says=("input", "group_quantize"), share=20,
    ),
    "lowmem.quantize4": Target(
        lowmem.quantize4,
        lambda r: {"x": floats(r, 2, 5)} | chosen(r, stochastic=[True], generator=[torch.Generator()]),
        says=("input", "group_quantize", "quantize"),
    ),
    "lowmem.quantize_channels": Target(
        lowmem.quantize_channels, lambda r: {"x": floats(r, 2, 5, 7)} | chosen(r, bits=[2, 4, 8], range=[6, 8.0]),
        says=("input", "batch_norm_relu_quantize"),
    ),
    "lowmem.dequantize": Target(
        lowmem.dequantize, grouped, says=("channel_dequantize", "group_dequantize", "codes", "output"), share=20
    ),
    "lowmem.dequantize4": Target(
        lowmem.dequantize4,
        lambda r: {"quantized": lowmem.quantize4(floats(r, 2, 5))} | chosen(r, out=[torch.empty(2, 5)]),
        says=("dequantize", "codes", "output"),
    ),
    "lowmem.Codes": Target(
        lambda **fields: lowmem.dequantize(lowmem.Codes(**fields)),
        lambda r: vars(lowmem.quantize(floats(r, 2, 5))).copy(),
        says=("dequantize", "Codes"),
    ),
    "lowmem.ChannelCodes": Target(
        lambda **fields: lowmem.dequantize(lowmem.ChannelCodes(**fields)),
        lambda r: vars(lowmem.quantize_channels(floats(r, 2, 5, 7))).copy(), says=("dequantize", "ChannelCodes"),
    ),
    "lowmem.LowMemBlock": Target(
        lowmem.LowMemBlock, lambda r: {"norm": nn.BatchNorm2d(4), "layer": nn.Conv2d(4, 2, 3)}
        | chosen(r, pool=[nn.MaxPool2d(2)], bits=[2, 4], range=[6.0]),
    ),
    "lowmem.LowMemBlock.forward": Target(
        method("__call__"),
        of(lambda r: lowmem.LowMemBlock(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)), x=lambda r: torch.randn(2, 4, 5, 5)),
        says=("input", "batch_norm_relu_quantize"), raises=TORCH,
    ),
    "lowmem.convert": Target(
        lowmem.convert,
        lambda r: {"model": float_network()} | chosen(r, bits=[2, 4, 8], range=[8.0], rest=["exact", "codes"]), share=2,
    ),
    "lowmem.empty_cache": Target(lowmem.empty_cache, lambda r: {}),
    "lowmem.report": Target(lowmem.report, lambda r: {"model": lowmem.convert(float_network())}, share=2),
    "lowmem.saved_tensors": Target(
        saving, lambda r: chosen(r, bits=[2, 4, 8], stochastic=[True], min_numel=[1, 64], keep=[()], compiled=[False]),
        says=("saved_tensors",), share=4,
    ),
    "lowmem.allocate_bits": Target(
        lowmem.allocate_bits,
        lambda r: {"model": float_network(), "loss": lambda model, x: model(x).square().mean(), "batch": image(r)}
        | chosen(r, budget=[2, 3.5, 8], min_numel=[1, 64]),
        raises=(Exception,), share=2,  # what the model and the loss raise comes through
    ),
    "lowmem.BitPlan": Target(lowmem.BitPlan, lambda r: {"bits": {"conv": (2, 8), "": (4,)}, "average": 4.5}),
    "lowmem.ledger": Target(lowmem.ledger, lambda r: chosen(r, model=float_network), share=2),
    "lowmem.Ledger": Target(lowmem.Ledger, lambda r: {"model": float_network()}, says=("ledger",), share=2),
    "lowmem.gradient_audit": Target(
        lowmem.gradient_audit,
        lambda r: {"model": float_network(), "loss": lambda model, x: model(x).square().mean(), "batch": image(r)}
        | chosen(r, bits=[4, 8], method=["convert", "hooks", "naive"], rest=["exact"]),
        raises=(Exception,), share=2,  # what the model and the loss raise comes through
    ),
    "antithetic.sample": Target(
        antithetic.sample,
        lambda r: {"logits": floats(r, 3, 5), "n": r.choice([2, 4])} | chosen(
            r, coupling=["dirichlet", "systematic", "gaussian", "independent", "antithetic_pairs"],
            layout=["sample", "dimension"], seed=[0, 5], offset=[0, 15],
        ), says=("antithetic_sample",), share=20,
    ),
    "antithetic.AntitheticSamples": Target(
        lambda **fields: antithetic.AntitheticSamples(**fields).unpack(), lambda r: vars(samples(r)).copy(),
        says=("AntitheticSamples", "unpack"),
    ),
    "antithetic.AntitheticSamples.unpack": Target(
        method("unpack"), of(samples, dtype=lambda r: r.choice(DTYPES)), says=("unpack", "words")
    ),
    "antithetic.gradient": Target(
        antithetic.gradient, lambda r: {"samples": (s := samples(r)), "values": torch.randn(s.n, 3)},
        says=("antithetic_gradient",),
    ),
    "antithetic.surrogate": Target(
        antithetic.surrogate, lambda r: {"samples": (s := samples(r)), "values": torch.randn(s.n, 3)},
        says=("gradient", "antithetic_gradient"),
    ),
    "antithetic.expectation": Target(
        antithetic.expectation, estimate, says=("sample", "antithetic_sample", "values"), share=4, functions=("f",)
    ),
    "antithetic.multi_sample_bound": Target(
        antithetic.multi_sample_bound, bound, says=("sample", "antithetic_sample"), share=4, functions=("log_joint",)
    ),
    "cone.Cone": Target(
        cone.Cone, lambda r: {"A": [[1, -1, 0], [0, 1, -1]]}
        | chosen(r, b=[[0, 1]], equality=[[[1, 1, 1]]], exact=["auto", True], max_rays=[100]), share=4,
    ),
    "cone.Polyhedron": Target(
        cone.Polyhedron, lambda r: {"A": [[1, -1, 0], [0, 1, -1]]} | chosen(r, b=[[0, 1]], equality=[[[1, 1, 1]]]),
        share=4,
    ),
    "cone.Polyhedron.project": Target(
        method("project"),
        of(lambda r: cone.Polyhedron([[1, 1, 0], [0, 1, 1]], [1, 1]), x=lambda r: torch.randn(4, 3)), share=4,
    ),
    "cone.Cone.project": Target(method("project"), of(small_cone, x=lambda r: torch.randn(4, 3))),
    "cone.Cone.contains": Target(
        method("contains"), of(small_cone, x=lambda r: torch.randn(4, 3), tolerance=lambda r: 1e-6)
    ),
    "cone.Cone.violation": Target(method("violation"), of(small_cone, x=lambda r: torch.randn(4, 3))),
    "cone.Cone.coefficients": Target(
        method("coefficients"), of(small_cone, x=lambda r: torch.rand(4, 3).sort().values.softmax(-1))
    ),
    "cone.Cone.combine": Target(
        method("combine"),
        lambda r: {"self": (c := small_cone(r)), "coefficients": torch.rand(2, sum(c.coefficient_counts))},
    ),
    "cone.Cone.describe": Target(method("describe"), of(small_cone), share=1),
    "cone.ConeActivation": Target(
        cone.ConeActivation, lambda r: {"cone": small_cones()[0]} | chosen(r, nonnegative=["abs", "relu"], box=[1.0])
    ),
    "cone.ConeActivation.forward": Target(
        method("__call__"),
        of(lambda r: cone.ConeActivation(small_cones()[0]), x=lambda r: torch.randn(2, 3)), says=("input",),
    ),
    "cone.ConeActivation.coefficients": Target(
        method("coefficients"),
        of(lambda r: cone.ConeActivation(small_cones()[0]), x=lambda r: torch.randn(2, 3)),
    ),
    "cone.ConeActivation.rounding_bound": Target(
        method("rounding_bound"),
        of(lambda r: cone.ConeActivation(small_cones()[0]), x=lambda r: torch.randn(2, 3)),
    ),
    "cone.ConeLinear": Target(
        cone.ConeLinear, lambda r: {"in_features": 4, "cone": small_cones()[0]} | chosen(r, nonnegative=["relu"])
    ),
    "cone.ConeLinear.forward": Target(
        method("__call__"),
        of(lambda r: cone.ConeLinear(4, small_cones()[0]), x=lambda r: torch.randn(2, 4)), says=("input",),
    ),
    "cone.box": Target(cone.box, lambda r: {"dimension": 3} | chosen(r, low=[-1, [0, 0, 0]], high=[1, 2.5]), share=4),
    "cone.checkerboard": Target(
        cone.checkerboard, lambda r: {"height": 4, "width": 4, "tile": 2}, says=("tile",), share=4
    ),
    "cone.convex": Target(cone.convex, lambda r: {"dimension": 4} | chosen(r, concave=[True]), share=4),
    "cone.monotone": Target(cone.monotone, lambda r: {"dimension": 4} | chosen(r, decreasing=[True]), share=4),
    "cone.monotone_convex": Target(cone.monotone_convex, lambda r: {"dimension": 4}, share=4),
    "cone.nonnegative": Target(cone.nonnegative, lambda r: {"dimension": 4}, share=4),
    "cone.simplex": Target(cone.simplex, lambda r: {"dimension": 4}, share=4),
    "cone.predicted_rays": Target(cone.predicted_rays, lambda r: {"rows": 5, "rank": 3}, share=4),
    "helstrom.gram": Target(
        helstrom.gram,
        lambda r: {"a": bit_rows(r, r.choice([5, 64, 70]))} | chosen(r, out=[torch.empty(3, 3).int()]),
        expected=reference.gram, share=20,
    ),
    "helstrom.transpose": Target(
        helstrom.transpose, lambda r: {"a": bit_rows(r, r.choice([5, 70]))},
        expected=reference.transpose,
    ),
    "helstrom.HelstromClassifier": Target(
        lambda **options: helstrom.HelstromClassifier(**options).fit(**rows(random.Random(0))),
        lambda r: chosen(r, state=["mixed", "pure"], encoding=["normalise"], copies=[1, 2], prior=["equal", 0.4],
                         tol=[1e-8]),
        raises=SKLEARN, share=3,
    ),
    "helstrom.HelstromClassifier.fit": Target(
        method("fit"),
        lambda r: {"self": helstrom.HelstromClassifier()} | rows(r) | chosen(r, sample_weight=[np.ones(12)]),
        raises=SKLEARN, share=3,
    ),
    "helstrom.HelstromClassifier.predict": Target(
        method("predict"),
        lambda r: {"self": helstrom.HelstromClassifier().fit(**rows(r)), "X": rows(r)["X"]},
        raises=SKLEARN, share=3,
    ),
}

# Public, and only ever made by the functions above.
RESULTS = {
    "binary.LayerConversion", "duo.GradientMismatch", "duo.LayerMismatch", "lowmem.Conversion", "lowmem.LayerError",
}


def missing() -> set[str]:
    """Public callables that the table does not have."""
    names = {
        f"{package}.{name}"
        for package in PACKAGES
        for module in [importlib.import_module(f"lowbit_ext.{package}")]
        for name in module.__all__
        if callable(getattr(module, name))
    }
    return names - set(TARGETS) - RESULTS


# --- hostile values ---------------------------------------------------------------------------------------------------


class Plain(Tensor):
    """A subclass that changes nothing."""


ODDITIES: tuple[Callable[[], Any], ...] = (
    *(functools.partial(copy.copy, value) for value in (
        None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, -(2**63), 0.0, -0.5, 1.0, math.nan,
        math.inf, -math.inf, 1e308, 1j, "", "sign", "clip", "0", "nonsense", b"bytes", (), (1,), (1, 1), (1, 1, 1),
        (2**62, 1), (1.0, 1), (True, 1), {}, object(), torch.float32, torch.float64, torch.int32, torch.complex64,
        torch.device("cpu"), torch.device("meta"), len, int, np.int64(1), np.int32(-1), np.uint8(2), np.float32(1),
        np.bool_(True), np.array(2), np.array([1, 1]), np.zeros((2, 3)), np.array(["a"]), fractions.Fraction(1, 3),
        torch.strided, torch.channels_last, Ellipsis, slice(None), nn.Identity(), type,
    )),
    list, lambda: [1, 1], lambda: [[1], [1, 2]], lambda: {1: 2}, set,
    lambda: torch.tensor(1), lambda: torch.tensor(True), lambda: torch.tensor([1, 2]), lambda: torch.tensor(math.nan),
    lambda: torch.randn(2, 5, 3), lambda: torch.empty(0), lambda: torch.randn(2, 4, 5, 5), lambda: nn.Linear(2, 2),
    lambda: binary.binarize(torch.randn(2, 5, 3, 3)), lambda: binary.pack_weight(torch.randn(4, 5, 3, 3)),
    lambda: iter([1, 2]), lambda: torch.nn.Parameter(torch.randn(5)), torch.Generator,
)


def of_layout(x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layout(x)


TENSOR_CHANGES: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda x, r: x.to(r.choice([torch.float64, torch.bfloat16, torch.float16, torch.float32])),
    lambda x, r: x.to(r.choice([torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.int8])),
    lambda x, r: x.to(r.choice([torch.float8_e4m3fn, torch.uint16, torch.complex128])),
    lambda x, r: x.to("meta"),
    lambda x, r: torch.empty(r.choice([(2**40, 2**10), (2**20, 2**20, 2**20), (0, 2**40)]), device="meta"),
    lambda x, r: x.unsqueeze(r.randint(0, x.dim())),
    lambda x, r: x.select(r.randint(0, x.dim() - 1), 0),
    lambda x, r: x.flatten(),
    lambda x, r: x.narrow(d := r.randint(0, x.dim() - 1), 0, r.randint(0, x.shape[d])),
    lambda x, r: torch.cat([x, x], r.randint(0, x.dim() - 1)),
    lambda x, r: x.transpose(0, -1),
    lambda x, r: x.repeat_interleave(2, -1)[..., ::2],
    lambda x, r: x.flip(-1).as_strided(x.shape, x.stride()),
    lambda x, r: x[..., :1].expand_as(x),
    lambda x, r: x.new_zeros(1).expand(r.choice([2**12, 2**40]), *x.shape[1:]),
    lambda x, r: x.expand(2**40, *x.shape),
    lambda x, r: x.new_empty(r.choice([(0,), (0, *x.shape[1:]), (*x.shape[:-1], 0)])),
    lambda x, r: x.contiguous(memory_format=torch.channels_last),
    lambda x, r: torch._neg_view(x.float()).to(x.dtype),
    lambda x, r: torch.complex(x.float(), x.float()).conj().imag.to(x.dtype),
    lambda x, r: x.to_sparse(),
    lambda x, r: of_layout(x.flatten(1), Tensor.to_sparse_csr),
    lambda x, r: x.to_mkldnn(),
    lambda x, r: of_layout(x, lambda y: torch.nested.nested_tensor([y, y[:0]])),
    lambda x, r: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x, r: x.as_subclass(Plain),
    lambda x, r: TwoTensor(x, x.clone()),
    lambda x, r: nn.Parameter(x) if x.is_floating_point() else nn.Buffer(x),
    lambda x, r: x.clone().requires_grad_(),
    lambda x, r: torch.full_like(x, r.choice([math.nan, math.inf, -math.inf, 0, 1e30, -1])),
    lambda x, r: ~x,
    lambda x, r: x.numpy(),
    lambda x, r: x.tolist(),
    lambda x, r: x.to_sparse().to("meta"),
)


def changed_number(value: Any, r: random.Random) -> Any:
    return r.choice([
        lambda: -value, lambda: value + 1, lambda: value - 1, lambda: value * 2**r.choice([20, 31, 61, 62]),
        lambda: float(value), lambda: np.int64(value), lambda: np.float64(value), lambda: np.array(value),
        lambda: bool(value), lambda: str(value), lambda: [value], lambda: (value, value), lambda: torch.tensor(value),
        lambda: (value, 2**62),
    ])()


def hostile(value: Any, r: random.Random) -> Any:
    """Something in place of an argument: any oddity, or what is near the argument."""
    if r.random() < 0.4:
        return r.choice(ODDITIES)()
    if isinstance(value, Tensor):
        return r.choice(TENSOR_CHANGES)(value, r)
    if isinstance(value, PackedTensor):
        return changed_packed(value, r)
    if isinstance(value, binary.PackedWeight):
        return changed_weight(value, r)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return changed_number(value, r)
    if isinstance(value, tuple) and value:
        at = r.randrange(len(value))
        return r.choice([
            lambda: value[:-1], lambda: value * 2, lambda: list(value), lambda: np.array(value), lambda: value[0],
            lambda: (*value[:at], hostile(value[at], r), *value[at + 1 :]),
        ])()
    if isinstance(value, str):
        return r.choice([value.upper(), value + " ", value.encode(), [value], np.str_(value)])
    return r.choice(ODDITIES)()


def dense(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise TypeError("a transformation puts dense tensors in place of tensors")
    return value


def changed_packed(value: PackedTensor, r: random.Random) -> Any:
    """With bits past the last channel, in other ways, or with words, sizes or scale changed."""
    flipped = lambda part: ~part if part is value.words else part  # noqa: E731
    return r.choice([
        lambda: PackedTensor(~value.words, value.channels, value.encoding),
        lambda: torch.utils._pytree.tree_map(flipped, value),
        lambda: dataclasses.replace(value, words=~value.words),
        lambda: dataclasses.replace(value, words=hostile(value.words, r)),
        lambda: dataclasses.replace(value, channels=hostile(value.channels, r)),
        lambda: dataclasses.replace(value, encoding=r.choice(ENCODINGS)),
        lambda: dataclasses.replace(value, scale=hostile(torch.rand(1), r)),
        lambda: dataclasses.replace(value, scale=torch.randn(value.channels, *(1,) * (value.dim() - 2))),
        lambda: torch.utils._pytree.tree_map_only(Tensor, lambda part: dense(hostile(part, r)), value),
        lambda: value.to("meta"),
        lambda: value.words,
        lambda: value.unpack(),
    ])()


def changed_weight(value: binary.PackedWeight, r: random.Random) -> Any:
    return r.choice([
        lambda: binary.PackedWeight.from_words(~value.words, value.shape, value.groups),
        lambda: dataclasses.replace(value, **{(name := r.choice(list(vars(value)))): hostile(vars(value)[name], r)}),
        lambda: dataclasses.replace(value, isa="another"),
        lambda: value.words,
        lambda: value.unpack(),
        lambda: torch.utils._pytree.tree_map(torch.clone, value),
    ])()


NO_MEMORY = "can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
MIXED = "Creating a new Tensor subclass"  # torch's word where two subclasses meet

# --- a call -----------------------------------------------------------------------------------------------------------


def call(seed: int, index: int, only: str = "") -> Finding | None:
    """Makes call number `index` of `seed`; `only` picks targets whose name has it. The finding, or None."""
    name, r = drawn(seed, index, only)
    return _call(name, seed, index, r, spoiled)


def plain_call(name: str, seed: int, index: int) -> Finding | None:
    """A call of one target with arguments that must work."""
    return _call(name, seed, index, random.Random(f"{seed} {index}"), lambda arguments, r: (arguments, ()))


def _call(
    name: str, seed: int, index: int, r: random.Random,
    spoil: Callable[[Arguments, random.Random], tuple[Arguments, tuple[str, ...]]],
) -> Finding | None:
    torch.default_generator.manual_seed(r.randrange(2**31))  # torch.manual_seed takes 3 ms, for devices as well
    target, arguments, changed = TARGETS[name], {}, ()

    def finding(kind: str, detail: str) -> Finding:
        return Finding(seed, index, name, kind, detail, f"{describe(arguments)}, changed: {', '.join(changed) or '-'}")

    try:
        arguments = target.arguments(r)
    except Exception as error:
        return finding("arguments that must work do not", f"{type(error).__name__}: {error}")
    arguments, changed = spoil(arguments, r)
    try:
        result = target.call(**arguments)
    except MemoryError:
        return None
    except Exception as error:
        if any(name in changed and callable(arguments[name]) for name in target.functions):
            return None
        return _judged(error, name, target, arguments, changed, finding)
    if target.expected is not None:
        try:
            wrong = target.expected(arguments, result)
        except Exception as error:
            if re.search(NO_MEMORY, str(error)):
                return None
            wrong = f"the reference refuses it: {type(error).__name__}: {error}"
        if wrong:
            return finding("wrong result" if changed else "wrong result of a plain call", wrong)
    return None


def drawn(seed: int, index: int, only: str = "") -> tuple[str, random.Random]:
    """The target of a call, and the random numbers of what follows."""
    names = [name for name in TARGETS if only in name]
    r = random.Random(f"{seed} {index}")
    return r.choices(names, [TARGETS[name].share for name in names])[0], r


def spoiled(arguments: Arguments, r: random.Random) -> tuple[Arguments, tuple[str, ...]]:
    """Some of the arguments replaced, and their names. One call in eight stays as it is."""
    names = [name for name in arguments if name != "self"]
    count = min(len(names), r.choice([0, 1, 1, 1, 1, 1, 2, 3]))
    made, changed = dict(arguments), []
    for name in r.sample(names, count):
        # What torch cannot make, or a constructor refuses, is no value to hand on.
        with contextlib.suppress(Exception):
            made[name] = hostile(made[name], r)
            changed.append(name)
    return made, tuple(changed)


def _judged(
    error: Exception, name: str, target: Target, arguments: Arguments, changed: tuple[str, ...],
    finding: Callable[[str, str], Finding],
) -> Finding | None:
    text, kind = str(error), type(error).__name__
    if not changed:
        return finding("a plain call raises", f"{kind}: {text}")
    if isinstance(error, target.raises) or re.search(f"{NO_MEMORY}|{MIXED}", text):
        return None
    if not isinstance(error, (TypeError, ValueError)):
        return finding(kind, text)
    owner = name.removesuffix(".forward").split(".")[-1]
    if not any(word in text for word in (owner, *name.split(".")[1:], *target.says)):
        return finding(f"{kind} does not name the function", text)
    parameters = {*_parameters(target.call), *arguments, *target.says}
    if not any(re.search(rf"\b{re.escape(word)}\b", text) for word in parameters):
        return finding(f"{kind} names no argument", text)
    return None


def _parameters(call: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(call).parameters)


def describe(arguments: Arguments) -> str:
    """The arguments in a line."""
    return ", ".join(f"{name}={_short(value)}" for name, value in arguments.items())


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        with contextlib.suppress(Exception):
            plain = "" if type(value) is Tensor else f"{type(value).__name__} "
            layout = "" if value.layout is torch.strided else f" {value.layout}"
            return f"{plain}{value.dtype} {tuple(value.shape)} on {value.device}{layout}".replace("torch.", "")
    if isinstance(value, PackedTensor):
        return f"PackedTensor({_short(value.words)}, {value.channels}, {value.encoding}, scale={_short(value.scale)})"
    with contextlib.suppress(Exception):
        return " ".join(repr(value).split())[:80]
    return f"<{type(value).__name__}>"


# --- many calls -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """An empty folder to work in, no output, no warnings, and torch's settings back afterwards."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def state() -> Mapping[str, Any]:
    """What a call must leave as it was."""
    return {
        "default dtype": torch.get_default_dtype(), "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(), "inference": torch.is_inference_mode_enabled(),
        "hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
    }


def run(
    seed: int, count: int, start: int = 0, on_call: Callable[[int], None] = lambda index: None, only: str = ""
) -> Iterator[Finding]:
    """Makes calls start .. start + count - 1 of `seed` in this process; `on_call` hears of each before it is made."""
    with surroundings():
        before = state()
        for index in range(start, start + count):
            on_call(index)
            found = call(seed, index, only)
            if found is None and state() != before:
                found = Finding(seed, index, "?", "changed torch's settings", f"{before} became {state()}", "")
            if found is not None:
                yield found
