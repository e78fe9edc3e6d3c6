"""Every public function and layer on tensors of the CPU, under another default device and dtype of torch.

Results are where the arguments are, with the same bits. A layer is made on the defaults, as torch's own are.
"""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from conftest import defaults
from fuzz_api import TARGETS
from lowbit_ext import cone, duo, federated, lowmem, models
from lowbit_ext.federated import wire
from lowbit_ext.lowmem import _stored

DEFAULTS = pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "meta"), (torch.float64, "cpu")], ids=["bfloat16", "float64"]
)


def leaves(value):
    """Tensors, arrays and numbers in a result, but those of a layer that the call has made."""
    if type(value).__module__.startswith("lowbit_ext") and not isinstance(value, (nn.Module, tuple)):
        value = vars(value)
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value, key=str)]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in leaves(each)]
    return [value] if isinstance(value, (torch.Tensor, np.ndarray, float, int)) else []


def outcome(call, arguments):
    """Leaves of a call's result, and of a backward pass the gradients of what the call was given."""
    torch.manual_seed(1)
    arguments = copy.deepcopy(arguments)
    found = leaves(call(**arguments))
    given = [
        each for value in arguments.values()
        for each in (value.parameters() if isinstance(value, nn.Module) else [value])
        if isinstance(each, torch.Tensor) and each.requires_grad
    ]
    results = [each.double().sum() for each in found if isinstance(each, torch.Tensor) and each.requires_grad]
    if given and results:
        gradients = torch.autograd.grad(results, given, allow_unused=True)
        found += [each for each in gradients if each is not None]
    return found


def check(call, arguments, dtype, device):
    expected = outcome(call, arguments)
    with defaults(dtype, device):
        got = outcome(call, arguments)
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, torch.Tensor):
            assert (a.dtype, a.device) == (b.dtype, b.device)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            np.testing.assert_array_equal(a, b)


@DEFAULTS
@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"lowmem.saved_tensors"}))  # its target makes the input itself
def test_calls(name, dtype, device, tmp_path, monkeypatch):
    """Of arguments that the fuzzer starts from."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        torch.manual_seed(seed)
        check(TARGETS[name].call, TARGETS[name].arguments(random.Random(seed)), dtype, device)


# --- what the fuzzer does not call ------------------------------------------------------------------------------------


def seeded():
    return torch.Generator().manual_seed(1)


def state():
    return {"w": torch.randn(700), "b": torch.randn(3), "n": torch.tensor(3), "bn.running_var": torch.rand(5)}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def saved(x, **options):
    with lowmem.saved_tensors(min_numel=1, **options):
        return x.sigmoid().relu()


def unpacked_into_workspace(block, x):
    """A backward pass whose activations are large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stored, "_FRESH_BYTES", 0)
        patch.setattr(_stored, "_workspace", _stored.Workspace())
        return torch.autograd.grad(block(x).sum(), list(block.parameters()))


def sent(state, bits):
    packed, _ = federated.compress(state, bits)
    return packed, federated.decompress(packed), wire.from_bytes(wire.to_bytes(packed, 3))[0]


def measured(model, batches):
    federated.recompute_statistics(model, batches)
    return model.state_dict()


def without_batch_norm(model, x):
    made = federated.replace_batchnorm(model)
    return made.state_dict(), made(x)


def simulated(model, images, labels):
    settings = federated.Settings(rounds=2, steps=2, batch=4, drop=0.3, bits=4, statistics="recompute", threshold=0.1)
    return federated.simulate(model, (images, labels), [images] * 2, settings, test=(images, labels)).state


def of_vae(model, x):
    bounds = model.evidence_lower_bound(x, 2, generator=seeded()), model.multi_sample_bound(x, 2, generator=seeded())
    return bounds, model.encode(x), model.reconstruct(x), model.generate(3, generator=seeded())


def of_polyhedron(polyhedron, x):
    return polyhedron.project(x), polyhedron.contains(x), polyhedron.violation(x)


def mismatch(model, x):
    options = {"eps": 0.1, "max_weights": 5, "generator": seeded()}
    return [
        duo.gradient_mismatch(model, lambda out, _: out.square().mean(), (x, None), chunk_size=chunk_size, **options)
        for chunk_size in (1, 2)
    ]


def images():
    return torch.rand(20, 1, 8, 8)


def classes():
    return torch.arange(20) % 3


CALLS = {
    "lowmem.saved_tensors": (saved, lambda: {"x": torch.randn(2, 300, requires_grad=True), "bits": 4}),
    "lowmem.LowMemBlock of large activations": (
        unpacked_into_workspace,
        lambda: {"block": lowmem.LowMemBlock(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), "x": torch.randn(2, 3, 5, 5)},
    ),
    "lowmem.convert": (lambda model, x: model(x), lambda: {"model": lowmem.convert(network()), "x": images()}),
    "duo.gradient_mismatch": (
        mismatch, lambda: {"model": nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "x": torch.randn(4, 3)}
    ),
    "cone.Polyhedron": (
        of_polyhedron,
        lambda: {"polyhedron": cone.Polyhedron([[1, -1, 0], [0, 1, -1]], [0, 1]), "x": torch.randn(5, 3)},
    ),
    "federated.partition": (
        federated.partition,
        lambda: {"labels": torch.arange(200) % 10, "users": 3, "non_iid": 0.5, "labelled": 10, "generator": None},
    ),
    "federated.non_iid_level": (federated.non_iid_level, lambda: {"counts": torch.tensor([[3, 1], [2, 5]])}),
    "federated.consistency_loss": (
        federated.consistency_loss,
        lambda: {"logits_weak": torch.randn(5, 4), "logits_strong": torch.randn(5, 4, requires_grad=True)},
    ),
    "federated.group_average": (
        federated.group_average,
        lambda: {"server": state(), "users": {user: state() for user in range(3)}, "groups": [[0, 1], [2]]},
    ),
    "federated.gradient_diversity": (
        federated.gradient_diversity, lambda: {"updates": [{"w": torch.randn(5)} for _ in range(3)]}
    ),
    "federated.weak": (federated.weak, lambda: {"images": images()}),
    "federated.strong": (federated.strong, lambda: {"images": images()}),
    **{f"federated.compress to {bits}": (sent, lambda bits=bits: {"state": state(), "bits": bits})
       for bits in wire.WIRE_BITS},
    "federated.recompute_statistics": (measured, lambda: {"model": network(), "batches": [images(), images()]}),
    "federated.replace_batchnorm": (without_batch_norm, lambda: {"model": network(), "x": images()}),
    "federated.simulate": (simulated, lambda: {"model": network(), "images": images(), "labels": classes()}),
    "models.BernoulliVAE": (
        of_vae, lambda: {"model": models.BernoulliVAE(6, 4, (5,)), "x": torch.randint(0, 2, (3, 6)).float()}
    ),
    "models.ResNet": (
        lambda model, x: (model(x), models.describe(model, x)),
        lambda: {"model": models.preact_resnet(8, in_channels=1, widths=(8, 16, 16)), "x": images()},
    ),
    **{
        f"models.{build.__name__}": (
            lambda model, x: (model(x), models.describe(model, x)),
            lambda build=build, options=options: {"model": build(in_channels=1, **options), "x": images()},
        )
        for build, options in {
            models.reactnet_a: {"width": 2, "stem": "cifar"}, models.quicknet: {"widths": (4,) * 4, "stem": "cifar"},
            models.binary_densenet28: {"width": 2, "stem": "cifar"}, models.resnet20: {"widths": (4, 4, 4)},
            models.binary_vit: {"image_size": 8, "patch_size": 4, "width": 12, "heads": 3, "depth": 1},
        }.items()
    },
}


@DEFAULTS
@pytest.mark.parametrize("name", CALLS)
def test_other_calls(name, dtype, device):
    call, arguments = CALLS[name]
    torch.manual_seed(0)
    check(call, arguments(), dtype, device)


LAYERS = {
    "CoupledConv2d": lambda: duo.CoupledConv2d(3, 4, 3),
    "CoupledLinear": lambda: duo.CoupledLinear(3, 4),
    "ConeLinear": lambda: cone.ConeLinear(4, cone.monotone(3)).linear,
    "BernoulliVAE": lambda: models.BernoulliVAE(6, 4, mean=torch.full((6,), 0.5, dtype=torch.float32, device="cpu")),
    "resnet18": lambda: models.resnet18("coupled", widths=(8,) * 5),
    "preact_resnet": lambda: models.preact_resnet(8, widths=(8, 8, 8)),
    "reactnet_a": lambda: models.reactnet_a(width=2),
    "quicknet": lambda: models.quicknet(widths=(4, 4, 4, 4)),
    "meliusnet22": lambda: models.meliusnet22(width=16),
    "binary_vit": lambda: models.binary_vit(width=12, heads=3, depth=1),
}


@DEFAULTS
@pytest.mark.parametrize("name", LAYERS)
def test_new_layers(name, dtype, device):
    with defaults(dtype, device):
        tensors = LAYERS[name]().state_dict()
    for key, tensor in tensors.items():
        assert tensor.device.type == device, key
        assert tensor.dtype == dtype or not tensor.is_floating_point(), key


@DEFAULTS
def test_generators_of_a_cone(dtype, device):
    """Of no narrower type than float32."""
    with defaults(dtype, device):
        tensors = dict(cone.ConeActivation(cone.monotone(3)).named_buffers())
    wanted = torch.promote_types(dtype, torch.float32)
    assert all(each.device.type == device for each in tensors.values())
    assert all(each.dtype == wanted for each in tensors.values() if each.is_floating_point())
