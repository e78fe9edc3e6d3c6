"""What a GPU adds to a call: streams, graphs, several devices, tensors that lie elsewhere. Skipped where there is none.

Every comparison is with the CPU's scalar level, whose bits the CUDA kernels give.
"""

import pytest
import torch

from conftest import DEVICES, running_on
from lowbit_ext import _arguments, _native, _oplib
from lowbit_ext.antithetic import ops as antithetic_ops
from lowbit_ext.binary import binarize, conv2d, ops, pack_weight
from lowbit_ext.binary.epilogue import integer_threshold
from lowbit_ext.lowmem import codes
from lowbit_ext.lowmem import ops as lowmem_ops
from lowbit_ext.packed import unpack_op

GPUS = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

SHAPE = (66, ops.Geometry(3, 3, *(1,) * 9))  # filters that share words

HALF = ops.Window(2, 2, 2, 2, 0, 0, 1, 1, 0)


def operands(where="cpu", seed=0):
    """Tensors of the calls of every_operator, the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        "x": torch.randn(16, 70, 9, 8, generator=rng),
        "weight": torch.randn(66, 70, 3, 3, generator=rng),
        "grad": torch.randn(16, 66, 9, 8, generator=rng),
        "integers": torch.randint(-4, 5, (16, 66, 9, 8), generator=rng).float(),  # whose sums every order gives
        "scale": torch.rand(66, generator=rng),
        "threshold": torch.randint(-9, 9, (2, 66), generator=rng, dtype=torch.int32),
        "logits": torch.randn(16, 70, generator=rng),
        "values": torch.randn(16, 4, generator=rng),
        "gain": torch.rand(70, generator=rng) + 0.5,
        "shift": torch.randn(70, generator=rng),
    }
    return {name: tensor.to(where) for name, tensor in tensors.items()}


def every_operator(t):
    """Results of one call of each operator, with and without a workspace."""
    words, mask = ops.binarize_with_mask(t["x"], 0.0, "sign")
    weight = pack_weight(t["weight"])
    conv = (70, *SHAPE, "sign", 0)
    levels, inside = ops.quantized_activation_with_mask(t["x"], "ternary", 0.0, 1.0, False)
    bits, ratio = antithetic_ops.antithetic_sample(t["logits"], None, 4, "dirichlet", "sample", torch.tensor(5), 0)
    no, rows = None, (words[:, 0], words[:, 1])
    affine, grid = (t["gain"], t["shift"]), (4, 8.0)
    relu = t["x"].clone()
    codes = lowmem_ops.batch_norm_relu_quantize(t["x"], t["shift"], t["gain"], *affine, *grid, relu)
    grads = lowmem_ops.batch_norm_relu_backward(t["x"], codes, *affine, t["gain"], *grid, True, True)
    groups, scales = lowmem_ops.group_quantize(t["x"], 4, False, torch.tensor(5), 0)
    steps = [0, 0, 4, 0, 7, 1, 8, 2]  # multiply, add_tensor, store bfloat16, bits of two thresholds
    stream, stream_bits = ops.binary_conv2d_epilogue(
        words, weight.blocked, *conv, steps, [t["scale"], t["grad"], t["threshold"].float(), no]
    )
    pooled, pooled_bits = ops.pointwise(
        t["x"], HALF, "maximum", False, 0, [2, 0, 7, 0, 8, 1], 1, [t["gain"], t["shift"], t["shift"][None], no]
    )
    return {
        "stream": stream,
        "bits of the stream": stream_bits,
        "pooled": pooled,
        "bits of the pooled": pooled_bits,
        "words": words,
        "mask": mask,
        "unpacked": unpack_op(words, 70, -1.0, 1.0, torch.float32),
        "int32": ops.binary_conv2d(words, weight.blocked, no, no, no, no, no, *conv, torch.int32),
        "float": ops.binary_conv2d(words, weight.blocked, t["scale"], t["scale"], t["grad"], no, no, *conv,
                                   torch.float32),
        "bits": ops.binary_conv2d(words, weight.blocked, no, no, no, t["threshold"], no, *conv, torch.int32),
        "input gradient": ops.binary_conv2d_input_grad(t["integers"], weight.words, no, mask, list(t["x"].shape),
                                                       *SHAPE),
        "weight gradient": ops.binary_conv2d_weight_grad(t["integers"], words, *conv),
        "product": ops.binary_matmul(*rows, no, 70, "sign", "step", torch.int32),
        "float product": ops.binary_matmul(*rows, t["scale"][:1], 70, "step", "sign", torch.bfloat16),
        "max": ops.binary_max_pool2d(words, no, 70, HALF),
        "mean": ops.binary_avg_pool2d(words, 70, ops.Window(3, 3, 2, 2, 1, 1, 1, 1, 0), True, 0, "sign"),
        "levels": levels,
        "inside": inside,
        "masked": ops.masked_gradient(t["x"], inside),
        "samples": bits,
        "gradient": antithetic_ops.antithetic_gradient(bits, t["values"], ratio, 70, "sample"),
        "relu": relu,
        "codes": codes,
        "plain codes": lowmem_ops.batch_norm_quantize(t["x"], t["shift"], t["gain"], *affine, *grid),
        "value": lowmem_ops.channel_dequantize(codes, *affine, list(t["x"].shape), False, torch.float32, *grid, True),
        "grad of x": grads[0],
        "grad of gain": grads[1],
        "grad of shift": grads[2],
        "groups": groups,
        "scales": scales,
        "group value": lowmem_ops.group_dequantize(groups, scales, list(t["x"].shape), False, torch.float32, 4),
    }


def scalar_results(seed=0):
    with running_on("scalar"):
        return every_operator(operands(seed=seed))


def assert_same(got, expected):
    for name, tensor in expected.items():
        assert torch.equal(got[name].cpu(), tensor), name


@pytest.mark.host_cuda
@pytest.mark.parametrize("kernels", [name for name in DEVICES if name != "cpu"])
def test_every_operator(kernels):
    expected = scalar_results()
    with running_on(kernels):
        got = every_operator(operands("cuda" if kernels == "cuda" else "cpu"))
    assert_same(got, expected)


@needs_gpu
def test_current_stream_is_used():
    late, stream = operands("cuda", seed=1), torch.cuda.Stream()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in late.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: kernels of another stream would find zeros
        for name, tensor in late.items():
            tensors[name].copy_(tensor)
        got = every_operator(tensors)
    stream.synchronize()
    assert_same(got, scalar_results(seed=1))


@needs_gpu
def test_graph_replays_on_new_values():
    tensors, late = operands("cuda"), operands("cuda", seed=1)
    every_operator(tensors)  # what is loaded or chosen at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = every_operator(tensors)
    every_operator(tensors)  # workspaces of the graph and of calls beside it are not the same
    for name, tensor in late.items():
        tensors[name].copy_(tensor)
    graph.replay()
    assert_same(got, scalar_results(seed=1))


@needs_gpu
def test_compile_with_graphs():
    """torch's graphs refuse memory that outlives the call: a workspace must not."""
    t = operands("cuda")
    weight = pack_weight(t["weight"])

    def network(x):
        return conv2d(binarize(x), weight, padding=1, threshold=t["threshold"]).unpack()

    compiled = torch.compile(network, mode="reduce-overhead")
    for seed in range(4):
        x = operands("cuda", seed)["x"]
        assert torch.equal(compiled(x), network(x))


@needs_gpu
def test_backward_runs_on_the_stream_of_the_forward():
    x, weight = (torch.randn(size, device="cuda").requires_grad_() for size in [(4, 70, 9, 8), (66, 70, 3, 3)])
    conv2d(x, weight, padding=1).square().sum().backward()
    expected = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        conv2d(x, weight, padding=1).square().sum().backward()
    torch.cuda.synchronize()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@needs_gpu
def test_slices_and_permutations():
    x = torch.randn(3, 70, 10, 9)
    for change in (lambda x: x[:, 1:, ::2], lambda x: x.permute(3, 1, 0, 2), lambda x: x[1:].flatten(1).t()):
        assert torch.equal(binarize(change(x.cuda())).words.cpu(), binarize(change(x)).words)
    words = binarize(x).words
    pooled = ops.binary_max_pool2d(words[:, ::2], None, 70, HALF)
    got = ops.binary_max_pool2d(words.cuda()[:, ::2], None, 70, HALF)
    assert torch.equal(got.cpu(), pooled)


@needs_gpu
def test_tensors_of_different_devices_are_refused():
    t = operands("cuda")
    words, weight = binarize(t["x"]).words, pack_weight(t["weight"])
    conv = (70, *SHAPE, "sign", 0)
    here = f"must be on {t['x'].device} like the input, got cpu"
    with pytest.raises(ValueError, match=f"binary_conv2d: scale {here}"):
        ops.binary_conv2d(words, weight.blocked, t["scale"].cpu(), None, None, None, None, *conv, torch.float32)
    with pytest.raises(ValueError, match=f"binary_conv2d_weight_grad: input {here}"):
        ops.binary_conv2d_weight_grad(t["integers"], words.cpu(), *conv)
    with pytest.raises(ValueError, match=f"antithetic_gradient: weight must be on the CPU .* got {t['x'].device}"):
        antithetic_ops.antithetic_gradient(torch.zeros(16, 70, dtype=torch.uint8), t["values"], None, 70, "sample")
    with pytest.raises(ValueError, match=f"must be on the CPU like the input, got {t['x'].device}"):
        conv2d(t["x"].cpu(), weight, padding=1)


class OfDevice(torch.Tensor):
    """Stands in for a tensor of a GPU before a check."""

    is_cuda, is_cpu = True, False


def test_seeds_are_not_captured(monkeypatch):
    """A seed is a constant of a CUDA graph: all replays would draw the same bits."""
    logits = torch.zeros(3).as_subclass(OfDevice)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^sample: a CUDA graph is being captured, and each of its replays"):
        _arguments.fresh_seed("sample", logits, None)
    with pytest.raises(RuntimeError, match=r"^saved_tensors: a CUDA graph is being captured"):
        codes.drawn_seed("saved_tensors", logits, True)
    assert codes.drawn_seed("saved_tensors", logits, False) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _arguments.fresh_seed("sample", logits, None).dtype == torch.int64


def test_checks_do_not_wait_for_a_gpu():
    """They look at values of the CPU alone; a NaN threshold is never met then, whichever the comparison."""
    assert not _oplib.may_read(torch.zeros(3).as_subclass(OfDevice))
    assert not _oplib.may_read(torch.zeros(3, device="meta"))
    assert _oplib.may_read(torch.zeros(3, device="cpu"))
    nan, limits = torch.full((2,), torch.nan), torch.iinfo(torch.int32)
    got = integer_threshold(torch.cat((nan, torch.tensor([1.5, 1.5]))), torch.tensor([False, True, False, True]))
    assert got.tolist() == [limits.max, limits.min, 2, 1]
    assert integer_threshold(nan, None).tolist() == [limits.max] * 2


@needs_two_gpus
def test_second_device_while_the_first_is_current():
    got = every_operator(operands("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in got.values())
    assert_same(got, scalar_results())


@needs_gpu
def test_device_that_is_not_there():
    with pytest.raises(RuntimeError, match=rf"^lowbit_ext: no CUDA device {GPUS}: "):
        _native.cuda_kernels(GPUS)
