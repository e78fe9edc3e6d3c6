"""The other implementations that are measured beside ours, each in its fastest known form."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import fastest

Call = Callable[[], Any]


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


@functools.cache
def openvino() -> types.ModuleType | None:
    """The openvino package, or None, said once, where it is not installed."""
    try:
        import openvino
    except ImportError:
        print('openvino is not installed, its columns stay empty: pip install "lowbit-ext[bench]"')
        return None
    return openvino


class OpenVinoBinaryConv2d:
    """float32 -> FakeQuantize with two levels -> BinaryConvolution -> float32, stride 1, zero padding.

    The quantiser puts out 0 and 1: only then does the CPU plugin write bits in one pass. With -1 and +1 it writes
    floats, which a reference reorder packs: 175 us instead of 117 us for 256 -> 256 3x3 at 14x14 on one thread.
    """

    def __init__(self, x: Tensor, weight: Tensor, padding: int, threads: int) -> None:
        ov = openvino()
        assert ov is not None
        from openvino import opset1

        # OpenVINO aliases the arrays behind u1 constants and shared tensors: they live as long as this object.
        self._bits = np.packbits((weight >= 0).numpy().reshape(-1), bitorder="little")
        self._x = x.contiguous().numpy()

        def number(value: float) -> Any:
            return opset1.constant(np.full((1, 1, 1, 1), value, np.float32))

        parameter = opset1.parameter(list(x.shape), np.float32)
        quantised = opset1.fake_quantize(parameter, number(0), number(0), number(0), number(1), 2)
        bits = ov.Tensor(self._bits, ov.Shape(list(weight.shape)), ov.Type.u1)
        constant = ov.op.Constant(bits, shared_memory=True)
        pads = [padding, padding]
        conv = opset1.binary_convolution(quantised, constant, [1, 1], pads, pads, [1, 1], "xnor-popcount", 0.0)
        model = ov.Model([opset1.result(conv)], [parameter])
        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self._plain = self._request(ov, model, options)
        self._profiled = self._request(ov, model, options | {"PERF_COUNT": True})

    def _request(self, ov: types.ModuleType, model: Any, options: dict[str, Any]) -> Any:
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        request.set_input_tensor(ov.Tensor(self._x, shared_memory=True))
        return request

    def call(self) -> None:
        """One inference, quantisation and layout changes included; no copy of input or output."""
        self._plain.infer(share_outputs=True)

    def kernel_us(self) -> float:
        """One inference; the time that its profile gives for the BinaryConvolution node alone (whole microseconds)."""
        self._profiled.infer(share_outputs=True)
        times = (node.real_time for node in self._profiled.profiling_info if node.node_type == "BinaryConvolution")
        return sum(time.total_seconds() for time in times) * 1e6

    def output(self) -> Tensor:
        """Result (N, O, H, W) of the last call()."""
        return torch.from_numpy(self._plain.get_output_tensor().data.copy())


# --- whole networks ---------------------------------------------------------------------------------------------------


def compiled_network(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """A float network for inference: torch.compile with frozen, channels-last weights of dtype. Compiles at once."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._dynamo.reset()
    model = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    x = x.to(dtype=dtype, memory_format=torch.channels_last)
    compiled = torch.compile(model, dynamic=False)

    def call() -> Tensor:
        with torch.inference_mode():
            return compiled(x)

    call()
    return call


class OpenVinoNetwork:
    """A float network converted for OpenVINO's CPU plugin, which chooses bfloat16 by itself where the machine has it.

    Args:
        model: in evaluation mode.
        x: an input; compile() takes other batch sizes.
        calibration: images (1, ...) by which nncf quantises the network to int8; None leaves it as it is.
    """

    def __init__(self, model: nn.Module, x: Tensor, calibration: list[Tensor] | None = None) -> None:
        ov = openvino()
        assert ov is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = ov.convert_model(model, example_input=x[:1])
        self.model.reshape([1, *x.shape[1:]])
        if calibration is not None:
            nncf = _optional("nncf")
            assert nncf is not None
            options = {"subset_size": len(calibration)}
            if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
                options["model_type"] = nncf.ModelType.TRANSFORMER
            with contextlib.redirect_stdout(io.StringIO()):
                data = nncf.Dataset([image.numpy() for image in calibration])
                self.model = nncf.quantize(self.model, data, **options)

    def compile(self, x: Tensor, threads: int) -> Call:
        """An inference of x, of any batch size, without copies of input or output."""
        ov = openvino()
        assert ov is not None
        model = self.model.clone()
        model.reshape(list(x.shape))
        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        images = x.contiguous().numpy()
        request.set_input_tensor(ov.Tensor(images, shared_memory=True))

        def call(images: np.ndarray = images) -> None:  # keeps what the tensor points at
            request.infer(share_outputs=True)

        return call


def has_nncf() -> bool:
    """Whether OpenVINO's quantiser is installed; said once where it is not."""
    return _optional("nncf") is not None


# --- torch: convolution and linear ------------------------------------------------------------------------------------


def _can_reorder_weights(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's operators on weights reordered beforehand, for dtype on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def torch_conv2d(x: Tensor, weight: Tensor, padding: int, groups: int, dtype: torch.dtype) -> Call:
    """conv2d of dtype on inputs of dtype: NCHW, channels-last, and channels-last with a weight reordered beforehand."""
    x, weight = x.to(dtype), weight.to(dtype)
    x_last, weight_last = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    candidates: list[Call] = [
        lambda: F.conv2d(x, weight, padding=padding, groups=groups),
        lambda: F.conv2d(x_last, weight_last, padding=padding, groups=groups),
    ]
    pair = [padding, padding]
    if _can_reorder_weights(dtype):
        # What torch.compile emits for a frozen model.
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, pair, [1, 1], [1, 1], groups, list(x.shape))
        arguments = (packed, None, pair, [1, 1], [1, 1], groups, "none", [], "")
        candidates.append(lambda: torch.ops.mkldnn._convolution_pointwise(x_last, *arguments))
    return fastest(candidates)


def torch_int8_conv2d(x: Tensor, weight: Tensor, padding: int, groups: int) -> Call | None:
    """Quantised conv2d, 8-bit input to 8-bit output, weight packed beforehand; None where torch has no such kernel."""
    candidates: list[Call] = []
    pair = [padding, padding]
    before = torch.backends.quantized.engine
    for engine in ("x86", "onednn", "fbgemm"):
        if engine in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = engine
            quantised = torch.quantize_per_tensor(x.sign(), 1.0, 64, torch.quint8)
            quantised = quantised.contiguous(memory_format=torch.channels_last)
            signs = torch.quantize_per_tensor(weight.sign(), 1.0, 0, torch.qint8)
            packed = torch.ops.quantized.conv2d_prepack(signs, None, [1, 1], pair, [1, 1], groups)
            candidates.append(functools.partial(torch.ops.quantized.conv2d, quantised, packed, 20.0, 128))
    torch.backends.quantized.engine = before
    return fastest(candidates) if candidates else None


def torch_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Call:
    """linear of dtype on inputs of dtype, also with a weight reordered beforehand where torch can."""
    x, weight = x.to(dtype), weight.to(dtype)
    candidates: list[Call] = [lambda: F.linear(x, weight)]
    if dtype == torch.bfloat16 and _can_reorder_weights(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        candidates.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return fastest(candidates)


def torch_int8_linear(x: Tensor, weight: Tensor) -> Call:
    """torch._int_mm: 8-bit times 8-bit to 32-bit."""
    x, weight = x.sign().to(torch.int8), weight.sign().to(torch.int8)
    transposed = weight.t().contiguous()
    return fastest([lambda: torch._int_mm(x, weight.t()), lambda: torch._int_mm(x, transposed)])


# --- torch: bits ------------------------------------------------------------------------------------------------------

# Times eight bytes of 0 or 1 seen as one integer, lowest first: puts their bits, lowest first, into the highest byte.
_GATHER_BITS = 0x0102040810204080


def torch_pack(x: Tensor) -> Tensor:
    """x >= 0 packed to words (N, *spatial, C / 64) in plain torch; channels must be a multiple of 64."""
    bits = (x.movedim(1, -1) >= 0).contiguous()
    return ((bits.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8).view(torch.int64)


def torch_unpack(words: Tensor, dtype: torch.dtype) -> Call:
    """Words to -1 and +1, channels-last, in plain torch: shifts, or a table of the 8 values of each byte."""
    shifts = torch.arange(8, dtype=torch.uint8)
    table = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).to(dtype) * 2 - 1

    def by_shifts() -> Tensor:
        bits = (words.view(torch.uint8).unsqueeze(-1) >> shifts) & 1
        return bits.flatten(-2).to(dtype).mul_(2).sub_(1)

    def by_table() -> Tensor:
        return F.embedding(words.view(torch.uint8).int(), table).flatten(-2)

    return fastest([by_shifts, by_table])


# --- torch: training --------------------------------------------------------------------------------------------------


class _SignWithClippedGradient(torch.autograd.Function):
    """sign with the straight-through gradient 1[|x| <= 1], as binary networks are commonly written in PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad_output * (x.abs() <= 1)


class _SignWithIdentityGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output


def emulated_binary_conv2d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """A binary layer emulated with floats: sign of both, then conv2d."""
    return F.conv2d(_SignWithClippedGradient.apply(x), _SignWithIdentityGradient.apply(weight), padding=padding)


# --- quantisers -------------------------------------------------------------------------------------------------------


@functools.cache
def _optional(package: str) -> types.ModuleType | None:
    """A module of a package, or None, said once, where it is not installed."""
    logging.disable(logging.WARNING)  # they report each of their CUDA libraries that does not load
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        print(f'{name} is not installed, its columns stay empty: pip install "lowbit-ext[bench]"')
        return None
    finally:
        logging.disable(logging.NOTSET)


def torchao_groups(x: Tensor, bits: int) -> tuple[Call | None, Call | None]:
    """Affine quantisation of a flat tensor in groups of 256 and back, by torchao: codes of one byte, not packed."""
    primitives = _optional("torchao.quantization.quant_primitives")
    if primitives is None:
        return None, None
    highest, block = 2**bits - 1, (1, 256)
    groups = x.view(-1, 256)
    scheme = primitives.MappingType.ASYMMETRIC

    def pack() -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = primitives.choose_qparams_affine(groups, scheme, block, torch.uint8, 0, highest)
        return primitives.quantize_affine(groups, block, scale, zero, torch.uint8, 0, highest), scale, zero

    codes, scale, zero = pack()
    return pack, lambda: primitives.dequantize_affine(
        codes, block, scale, zero, torch.uint8, 0, highest, output_dtype=x.dtype
    )


def bitsandbytes_nf4(x: Tensor) -> tuple[Call | None, Call | None]:
    """4-bit quantisation in blocks of 64 and back, by bitsandbytes."""
    package = _optional("bitsandbytes.functional")
    if package is None:
        return None, None
    codes, state = package.quantize_4bit(x, blocksize=64, quant_type="nf4")
    return (
        lambda: package.quantize_4bit(x, blocksize=64, quant_type="nf4"),
        lambda: package.dequantize_4bit(codes, state),
    )
