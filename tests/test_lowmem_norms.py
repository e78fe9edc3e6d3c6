"""lowmem.convert of layer, RMS, group, instance and synchronised norms: gradients against the float64 formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import sum_bound
from lowbit_ext.lowmem import _synchronised, convert, ledger, norms, ops, report
from lowbit_ext.lowmem._stored import read_codes
from lowmem_networks import joined, relative, step
from process_groups import needs_gloo, run_in_two_processes
from reference import lowmem as reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


# The layer, shape of its input, how many groups its channels are split in, and whether it subtracts the mean.
NORMS = {
    "layer": (lambda: nn.LayerNorm(48), (5, 7, 48), None, True),
    "layer of two dimensions": (lambda: nn.LayerNorm((7, 48)), (5, 7, 48), None, True),
    "RMS": (lambda: nn.RMSNorm(48), (5, 7, 48), None, False),
    "RMS of two dimensions": (lambda: nn.RMSNorm((7, 48)), (5, 7, 48), None, False),
    "RMS, not affine": (lambda: nn.RMSNorm(48, 1e-3, False), (5, 7, 48), None, False),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 5, 7), 2, True),
    "instance, lines": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 35), 6, True),
    "instance": (lambda: nn.InstanceNorm2d(6), (4, 6, 5, 7), 6, True),
    "instance, affine": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 6, 5, 7), 6, True),
    "instance, volumes": (lambda: nn.InstanceNorm3d(6, affine=True), (4, 6, 2, 3, 7), 6, True),
}


def split(x, groups):
    return x if groups is None else x.reshape(x.shape[0], groups, -1)


def column(parameter, layer, x):
    """A parameter beside x."""
    channels = not hasattr(layer, "normalized_shape")
    return parameter.view(-1, *(1,) * (x.dim() - 2)) if channels else parameter


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_the_formulas_of_what_the_codes_say(name, bits):
    """In float64, of the normalised value that the codes stand for and the exact deviation."""
    build, shape, groups, centred = NORMS[name]
    plain = build()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    layer = norms.NORMS[type(plain)].like(plain, bits)
    x, grad = (torch.randn(shape) * 3 + 1).requires_grad_(), torch.randn(shape)
    out, stored = layer(x)
    assert torch.equal(out, plain(x))
    got = torch.autograd.grad(out, (x, *layer.parameters()), grad)

    dims = (2,) if groups else tuple(range(-len(layer.normalized_shape), 0))
    rows = split(x.detach().double(), groups)
    spread = rows.var(dims, correction=0, keepdim=True) if centred else rows.square().mean(dims, keepdim=True)
    eps = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
    rstd = (spread + eps).rsqrt()
    xhat = split(read_codes(stored._replace(steps=()), stored.tensors[:2], torch.float32), groups)
    half = (rows - (rows.mean(dims, keepdim=True) if centred else 0)) * rstd - xhat.double()
    # Between minimum and maximum of a group: half a step, and bfloat16's rounding of both.
    span = float(xhat.max() - xhat.min())
    assert half.abs().max() <= span / (2**bits - 1) / 2 + span * 2.0**-7

    weight = getattr(layer, "weight", None)
    spreading = None if weight is None else split(column(weight, layer, x).detach().expand(shape), groups)
    exact, by_weight, by_bias = reference.norm_backward(split(grad, groups), xhat, rstd, dims, centred, spreading)
    wanted = [exact.reshape(shape)]
    for parameter, terms in zip(layer.parameters(), (by_weight, by_bias), strict=False):
        wanted.append(terms.reshape(shape).sum_to_size(column(parameter, layer, x).shape).view(parameter.shape))
    for found, want in zip(got, wanted, strict=True):
        bound = sum_bound(x.numel() // 4, float(want.abs().max()))  # the longest sums
        torch.testing.assert_close(found.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(name, dtype):
    build, shape, *_ = NORMS[name]
    plain = build().to(dtype)
    layer = convert(copy.deepcopy(plain), 8)
    got, expected = step(layer, shape, dtype=dtype), step(plain, shape, dtype=dtype)
    assert torch.equal(got[0], expected[0])
    assert all(grad.dtype == dtype for grad in got[2].values())
    # Beside 8 bits of some seven deviations, the type's own 8 bits in the statistics.
    assert relative(joined(got), joined(expected)) < 0.03


def test_codes_and_deviations_alone_are_kept():
    for name in ("RMS", "instance, affine"):
        build, shape, *_ = NORMS[name]
        model = nn.Sequential(build())
        with ledger(model) as book:
            convert(model)(torch.randn(shape).requires_grad_() * 1)
        count = torch.Size(shape).numel()
        deviations = 5 * 7 if name == "RMS" else 4 * 6
        assert book.stored == count // 2 + -(-count // ops.GROUP) * 4 + deviations * 4


def test_curves_want_eight_bits_of_the_norm_in_front():
    for norm in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)):
        plain = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.SiLU(), nn.Conv2d(8, 4, 3))
        model = convert(copy.deepcopy(plain))
        assert [entry.how for entry in report(model)][1:] == [
            "codes of its normalised value in 8 bits", "reads the codes of its input", "reads the codes of its input"
        ]
        got, expected = step(model, (6, 3, 12, 12)), step(plain, (6, 3, 12, 12))
        assert relative(joined(got), joined(expected)) < 0.03


def test_functions_and_single_samples():
    class Functional(nn.Module):
        def forward(self, x):
            x = F.instance_norm(x * 1, eps=1e-3)
            return F.rms_norm(x, (12,), eps=1e-3)

    model = nn.Sequential(Functional())
    assert all(entry.converted for entry in report(convert(model)))
    for shape in ((6, 3, 12, 12), (2, 3, 12, 12)):
        assert torch.equal(step(convert(model), shape)[0], step(model, shape)[0])
    plain = nn.Sequential(nn.InstanceNorm2d(3, affine=True))
    assert torch.equal(step(convert(plain), (3, 8, 8))[0], step(plain, (3, 8, 8))[0])
    for shape in ((2, 4, 8, 8), (2, 3), (2, 3, 1, 1)):
        for network in (plain, convert(plain)):
            with pytest.raises(ValueError, match=r"expected input's size|expected 3D|more than 1 spatial element"):
                network(torch.randn(shape, requires_grad=True))


# --- statistics of all processes --------------------------------------------------------------------------------------


def _statistics_on_the_cpu(patch):
    """What torch has on GPUs alone, for its function to run here."""
    dims = [0, 2, 3]
    patch.setattr(torch, "batch_norm_stats", lambda x, eps: (
        x.mean(dims), (x.var(dims, correction=0) + eps).rsqrt()
    ), raising=False)

    def gathered(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        weights = (counts / counts.sum())[:, None]
        mean = (means * weights).sum(0)
        square = ((invstds**-2 - eps + means**2) * weights).sum(0)
        return mean, (square - mean**2 + eps).rsqrt()

    def normalised(x, weight, bias, mean, invstd, eps):
        scale, shift = ((p.view(-1, 1, 1)) for p in (invstd * weight, bias - mean * invstd * weight))
        return x * scale + shift

    patch.setattr(torch, "batch_norm_gather_stats_with_counts", gathered, raising=False)
    patch.setattr(torch, "batch_norm_elemt", normalised, raising=False)


def _batch():
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(7, 3, 6, 5, generator=generator) * 2 for _ in range(2))
    return x, grad, torch.tensor([0.5, -2.0, 1.5]), torch.tensor([0.3, 0.0, -1.0])


def _of_process(rank, relu, last):
    x, grad, gamma, beta = _batch()
    rows = slice(0, 3) if rank == 0 else slice(3, 7)
    order = torch.channels_last if last else torch.contiguous_format
    leaves = [x[rows].contiguous(memory_format=order), gamma, beta]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with pytest.MonkeyPatch.context() as patch:
        _statistics_on_the_cpu(patch)
        out, codes, *_ = _synchronised.SyncBatchNormFunction.apply(
            *leaves, None, None, 0.1, 1e-5, relu, 8, 12.0, torch.distributed.group.WORLD
        )
        return out.detach(), codes, torch.autograd.grad(out, leaves, grad[rows])


@needs_gloo
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_of_all_processes(relu, last):
    """Of batches of 3 and 4: the gradients of the whole batch, by exact statistics of what 8 bits say."""
    x, grad, gamma, beta = _batch()
    first, second = run_in_two_processes(_of_process, relu, last)
    x, gamma, beta = (leaf.double().requires_grad_() for leaf in (x, gamma, beta))
    out = F.batch_norm(x, None, None, gamma, beta, True, 0.1, 1e-5)
    out = out.relu() if relu else out
    exact = torch.autograd.grad(out, (x, gamma, beta), grad.double())
    torch.testing.assert_close(torch.cat([first[0], second[0]]).double(), out.detach(), rtol=0, atol=1e-5)
    got = torch.cat([first[2][0], second[2][0]])
    assert relative(got.double(), exact[0]) < 0.01  # a step of 12/256 of a deviation, in the smallest term
    torch.testing.assert_close((first[2][2] + second[2][2]).double(), exact[2], rtol=0, atol=sum_bound(210, 100.0))
    assert relative((first[2][1] + second[2][1]).double(), exact[1]) < 0.01


@needs_gloo
def test_within_a_group_a_gpu_is_wanted():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.SyncBatchNorm(3))
        for network in (model, convert(model)):
            with pytest.raises(ValueError, match=r"SyncBatchNorm.* on (a )?GPU"):
                network(torch.randn(2, 3, 4, 4, requires_grad=True))
            network.eval()(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
