"""Runs the benchmarks of a GPU: `python bench/gpu.py`. Tables on the terminal; JSON in --out.

Needs torch and numpy alone. Times are of calls that are enqueued one after the other and waited for together; graph:
of the same calls replayed from a CUDA graph, without the launches' cost. Small operands stay in the second-level cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit_ext
from binary_conv2d import Case
from harness import (
    DTYPE_NAMES,
    Row,
    Timings,
    column,
    measure,
    percent_of_rate,
    ratio,
    require_equal,
    time_block,
)
from lowbit_ext import _native, binary
from lowbit_ext._torch import current_cuda_stream
from lowbit_ext.binary import ops
from lowbit_ext.lowmem import ops as lowmem
from lowbit_ext.packed import FLOAT_TYPES

GRAPH_CALLS = 10  # in one graph: the pause between two replays is no part of a call
PEAK_MICROSECONDS = 1000  # of one call of a limit: its launch is nothing beside


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the benchmarks run on.

    Attributes:
        device: where tensors are made.
        kernels: the compiled functions, by the convolution's engine; the default first.
        synchronize: waits for all that was enqueued.
        graph: a call that does GRAPH_CALLS calls of another.
    """

    device: str
    kernels: dict[str, _native.CudaKernels]
    synchronize: Callable[[], None]
    graph: Callable[[Callable[[], Any]], Callable[[], Any]]

    @contextlib.contextmanager
    def engine(self, name: str) -> Iterator[None]:
        """Calls use the engine inside."""
        before = _native.kernels
        _native.kernels = lambda tensor: self.kernels[name]
        try:
            yield
        finally:
            _native.kernels = before

    def measure(self, contenders: dict[str, Callable[[], Any]], graphs: dict[str, Callable[[], Any]],
                seconds: float) -> Timings:
        """Times calls under their names, and graphs of calls under theirs with " graph" behind."""
        replays = {f"{name} graph": self.graph(call) for name, call in graphs.items()}
        return measure(contenders | replays, seconds, synchronize=self.synchronize)


def _cuda_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is chosen or loaded at first use
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def current_gpu(engines: Sequence[str]) -> Gpu:
    """torch's current GPU with those of the engines that it has."""
    module, index = _native.cuda_module(), torch.cuda.current_device()
    own = _native.cuda_kernels(index)
    kernels = {
        name: _native.CudaKernels(module, index, current_cuda_stream, name)
        for name in sorted(engines, key=lambda name: name != own.engine)
        if name in own.engines
    }
    if not kernels:
        sys.exit(f"bench/gpu.py: {torch.cuda.get_device_name(index)} has no engine {' or '.join(engines)}")
    return Gpu("cuda", kernels, torch.cuda.synchronize, _cuda_graph)


def _graph_us(timings: Timings, name: str) -> float | None:
    return ratio(timings.median_us(f"{name} graph"), GRAPH_CALLS)


# --- the limit of bit matrices ----------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class PeakRow(Row):
    """Rate of an engine's matrix instruction, from registers or shared memory alone."""

    peak_tops: float | None = column("TOPS")


class Peak:
    """A contender that does nothing but an engine's matrix instruction on all multiprocessors.

    Attributes:
        operations: binary operations of one call, 2 a multiply-add.
    """

    def __init__(self, gpu: Gpu, engine: str) -> None:
        self._kernels = gpu.kernels[engine]
        self._counts = torch.empty(self._kernels.popcount_peak_bytes(), dtype=torch.uint8, device=gpu.device)
        self._iterations = 1
        while min(time_block(self, 1, gpu.synchronize) for _ in range(3)) < PEAK_MICROSECONDS:
            self._iterations *= 2
        self.operations = self._kernels.popcount_peak_operations(self._iterations)

    def __call__(self) -> None:
        _native.check("popcount_peak", self._kernels.popcount_peak(self._iterations, self._counts.data_ptr()))


def _peaks(gpu: Gpu) -> dict[str, Peak]:
    """Of the engines that are made of a matrix instruction."""
    return {name: Peak(gpu, name) for name, kernels in gpu.kernels.items() if kernels.popcount_peak_operations(1)}


def peak_rows(gpu: Gpu, seconds: float) -> Iterator[Row]:
    """Every matrix instruction for bits that the GPU has."""
    for name, peak in _peaks(gpu).items():
        timings = gpu.measure({"peak": peak}, {}, seconds)
        best_us = timings.best_us("peak")
        assert best_us is not None
        yield PeakRow(case=name, threads=1, blocks_us=timings.blocks_us, peak_tops=peak.operations / best_us * 1e-6)


# --- convolution ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class ConvRow(Row):
    """One layer by one engine. call: bf16 -> bf16, binarized inside; packed: packed -> threshold -> packed.

    torch: conv2d of the type, channels-last, by cuDNN, over our call; torch_int8: torch._int_mm of the layer's matrix
    product, gathering its operand not counted, over our packed. All ratios are of graphs. percent_of_peak: packed
    against the fastest matrix instruction of the engines that are measured; operations on padding are not counted.
    """

    speedup_over_torch_bfloat16: float | None = column("vs bf16")
    speedup_over_torch_float16: float | None = column("vs fp16")
    speedup_over_torch_int8: float | None = column("vs int8")
    percent_of_peak: float | None = column("of peak")
    call_us: float | None = column("call µs")
    call_graph_us: float | None = column("graph µs")
    packed_us: float | None = column("packed µs")
    packed_graph_us: float | None = column("graph µs")
    torch_bfloat16_us: float | None = column("bf16 µs")
    torch_bfloat16_graph_us: float | None = column("graph µs")
    torch_float16_graph_us: float | None = column("fp16 graph µs")
    torch_int8_graph_us: float | None = column("int8 graph µs")


BATCHES = (1, 16, 64, 256)


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def conv_cases() -> list[Case]:
    """The layers of bench/binary_conv2d.py, and linear ones."""
    layers = [(256, 14, 3), (64, 56, 3), (128, 28, 3), (512, 7, 3), (4096, 1, 1), (8192, 1, 1)]
    return [Case(channels, size, batch, kernel) for channels, size, kernel in layers for batch in BATCHES]


@torch.inference_mode()
def conv_row(case: Case, engine: str, gpu: Gpu, peak: Peak | None, seconds: float) -> ConvRow:
    """Checks and measures one layer."""
    torch.manual_seed(0)
    last = torch.channels_last
    x = torch.randn(case.batch, case.channels, case.size, case.size, device=gpu.device).to(memory_format=last)
    weight = torch.randn(case.channels, case.channels, case.kernel, case.kernel, device=gpu.device)
    threshold = torch.zeros(case.channels, dtype=torch.int32, device=gpu.device)
    bfloat16, x_signs, signs = x.bfloat16(), _signs(x), _signs(weight).to(memory_format=last)
    pixels, depth = case.batch * case.size**2, case.channels * case.kernel**2

    def torch_conv(dtype: torch.dtype) -> Callable[[], Any]:
        operands = x_signs.to(dtype), signs.to(dtype)
        return lambda: F.conv2d(*operands, padding=case.padding)

    graphs = {"bfloat16": torch_conv(torch.bfloat16), "float16": torch_conv(torch.float16)}
    if pixels > 16:  # else _int_mm refuses
        rows = torch.randint(-1, 2, (pixels, depth), dtype=torch.int8, device=gpu.device)
        columns = torch.randint(-1, 2, (case.channels, depth), dtype=torch.int8, device=gpu.device).t()
        graphs["int8"] = lambda: torch._int_mm(rows, columns)
    with gpu.engine(engine):
        packed, packed_weight = binary.binarize(x), binary.pack_weight(weight)

        def call() -> Tensor:
            return binary.conv2d(bfloat16, packed_weight, padding=case.padding)

        def chain() -> Any:
            return binary.conv2d(packed, packed_weight, padding=case.padding, threshold=threshold)

        reference = F.conv2d(x_signs, signs, padding=case.padding).round()  # cuDNN may transform, and be inexact
        require_equal(f"{case}", binary.conv2d(packed, packed_weight, padding=case.padding), reference)
        require_equal(f"{case} with threshold", chain().words, binary.binarize(reference).words)
        del reference
        calls = {"call": call, "packed": chain, "bfloat16": graphs["bfloat16"]}
        graphs |= {"call": call, "packed": chain}
        timings = gpu.measure(calls | ({} if peak is None else {"peak": peak}), graphs, seconds)
    call_us, packed_us = _graph_us(timings, "call"), _graph_us(timings, "packed")
    return ConvRow(
        case=f"{case} {engine}",
        threads=1,
        blocks_us=timings.blocks_us,
        speedup_over_torch_bfloat16=ratio(_graph_us(timings, "bfloat16"), call_us),
        speedup_over_torch_float16=ratio(_graph_us(timings, "float16"), call_us),
        speedup_over_torch_int8=ratio(_graph_us(timings, "int8"), packed_us),
        percent_of_peak=None if peak is None else percent_of_rate(
            case.operations, packed_us, peak.operations, timings.best_us("peak")
        ),
        call_us=timings.median_us("call"),
        call_graph_us=call_us,
        packed_us=timings.median_us("packed"),
        packed_graph_us=packed_us,
        torch_bfloat16_us=timings.median_us("bfloat16"),
        torch_bfloat16_graph_us=_graph_us(timings, "bfloat16"),
        torch_float16_graph_us=_graph_us(timings, "float16"),
        torch_int8_graph_us=_graph_us(timings, "int8"),
    )


def conv_rows(gpu: Gpu, seconds: float) -> Iterator[Row]:
    """Every layer by every engine that is made of a matrix instruction; by the plain cores where there is none."""
    peaks = _peaks(gpu)
    best = max(peaks.values(), key=lambda peak: peak.operations / time_block(peak, 3, gpu.synchronize), default=None)
    for engine in peaks or gpu.kernels:
        for case in conv_cases():
            yield conv_row(case, engine, gpu, best, seconds)


# --- what streams memory ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class MemoryRow(Row):
    """A kernel that only moves bytes: those it reads and writes a second, against those of a copy. Graphs."""

    percent_of_copy_bandwidth: float | None = column("of copy bandwidth")
    gigabytes_per_second: float | None = column("GB/s")
    call_us: float | None = column("call µs")
    graph_us: float | None = column("graph µs")
    copy_us: float | None = column("copy µs")


@torch.inference_mode()
def memory_row(name: str, call: Callable[[], Any], moved: int, source: Tensor, gpu: Gpu, seconds: float) -> MemoryRow:
    """Measures a call that reads and writes `moved` bytes against a copy of `source`."""
    target = torch.empty_like(source)
    timings = gpu.measure({"call": call}, {"call": call, "copy": lambda: target.copy_(source)}, seconds)
    graph_us, copy_best_us = _graph_us(timings, "call"), ratio(timings.best_us("copy graph"), GRAPH_CALLS)
    return MemoryRow(
        case=name,
        threads=1,
        blocks_us=timings.blocks_us,
        percent_of_copy_bandwidth=percent_of_rate(
            moved, graph_us, 2 * source.numel() * source.element_size(), copy_best_us
        ),
        gigabytes_per_second=None if graph_us is None else moved / graph_us * 1e-3,
        call_us=timings.median_us("call"),
        graph_us=graph_us,
        copy_us=_graph_us(timings, "copy"),
    )


def memory_rows(gpu: Gpu, seconds: float, shape: tuple[int, ...] = (256, 64, 56, 56)) -> Iterator[Row]:
    """The packers and the quantised activations on tensors larger than the second-level cache."""
    torch.manual_seed(0)
    with gpu.engine(next(iter(gpu.kernels))), torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, device=gpu.device).to(dtype).contiguous(memory_format=layout)
                size, bits = x.numel() * x.element_size(), x.numel() // 8
                what = f"{DTYPE_NAMES[dtype]} {'NHWC' if layout == torch.channels_last else 'NCHW'}"
                packed = binary.binarize(x)
                require_equal(f"binarize {what}", packed.unpack(), _signs(x))
                yield memory_row(f"binarize {what}", lambda x=x: binary.binarize(x), size + bits, x, gpu, seconds)
                if layout == torch.contiguous_format:
                    continue  # the rest is elementwise, or writes channels-last
                stream, norm = x.flip(0), torch.ones(2, shape[1], device=gpu.device)
                steps = [0, 0, 0, 0, 4, 0, 7, FLOAT_TYPES[dtype], 8, 1]  # multiply twice, add_tensor, store, bits
                operands = [*norm, stream, torch.zeros(1, shape[1], device=gpu.device), None]
                arguments = ([], "none", False, 0, steps, 0, operands)
                require_equal(f"pointwise {what}", ops.pointwise(x, *arguments)[0], x + stream)
                yield memory_row(f"pointwise {what}",
                                 lambda x=x, arguments=arguments: ops.pointwise(x, *arguments), 3 * size + bits, x, gpu,
                                 seconds)
                yield memory_row(f"unpack {what}", lambda packed=packed, dtype=dtype: packed.unpack(dtype),
                                 size + bits, x, gpu, seconds)
                arguments = ("ternary", 0.0, 1.0, False)
                values, mask = ops.quantized_activation_with_mask(x, *arguments)
                require_equal(f"activation {what}", values, ((x >= 0.25).to(dtype) + (x >= 0.75).to(dtype)) / 2)
                yield memory_row(f"quantized_activation {what}",
                                 lambda x=x, arguments=arguments: ops.quantized_activation_with_mask(x, *arguments),
                                 2 * size + bits, x, gpu, seconds)
                require_equal(f"masked gradient {what}", ops.masked_gradient(x, mask), x * ((x > 0) & (x < 1)))
                yield memory_row(f"masked_gradient {what}", lambda x=x, mask=mask: ops.masked_gradient(x, mask),
                                 2 * size + bits, x, gpu, seconds)


def code_rows(gpu: Gpu, seconds: float, shape: tuple[int, ...] = (256, 64, 56, 56)) -> Iterator[Row]:
    """The kernels of low-memory back-propagation at 4 bits on tensors larger than the second-level cache."""
    torch.manual_seed(0)
    seed, settings = torch.tensor(1), (4, 8.0)
    with gpu.engine(next(iter(gpu.kernels))), torch.inference_mode():
        ones, zeros = torch.ones(shape[1], device=gpu.device), torch.zeros(shape[1], device=gpu.device)
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, device=gpu.device).to(dtype).contiguous(memory_format=layout)
                last, size = layout == torch.channels_last, x.numel() * x.element_size()
                what, y, out = f"{DTYPE_NAMES[dtype]} {'NHWC' if last else 'NCHW'}", x.clone(), torch.empty_like(x)
                codes = lowmem.batch_norm_relu_quantize(x, zeros, ones, ones, zeros, *settings, y)
                require_equal(f"batch_norm_relu_quantize {what}", y, x.relu())
                lowmem.channel_dequantize_into(codes, ones, zeros, last, *settings, True, out)
                require_equal(f"mask of the codes {what}", out > 0, x > 0)
                calls = {
                    "batch_norm_relu_quantize": (3 * size + codes.numel(), lambda x=x, y=y: (
                        lowmem.batch_norm_relu_quantize(x, zeros, ones, ones, zeros, *settings, y)
                    )),
                    "channel_dequantize": (size + codes.numel(), lambda codes=codes, last=last, out=out: (
                        lowmem.channel_dequantize_into(codes, ones, zeros, last, *settings, True, out)
                    )),
                    "batch_norm_relu_backward": (3 * size + 2 * codes.numel(), lambda x=x, codes=codes: (
                        lowmem.batch_norm_relu_backward(x, codes, ones, zeros, ones, *settings, True, True)
                    )),
                }
                if not last:  # the rest does not see the order
                    groups = lowmem.group_quantize(x, 4, False, None, 0)
                    moved = size + sum(part.numel() * part.element_size() for part in groups)
                    calls |= {
                        "group_quantize": (moved, lambda x=x: lowmem.group_quantize(x, 4, False, None, 0)),
                        "group_quantize stochastic": (moved, lambda x=x: lowmem.group_quantize(x, 4, False, seed, 0)),
                        "group_dequantize": (moved, lambda groups=groups, out=out: (
                            lowmem.group_dequantize_into(*groups, 4, out)
                        )),
                    }
                for name, (moved, call) in calls.items():
                    yield memory_row(f"{name} {what}", call, moved, x, gpu, seconds)


# --- the run ----------------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Callable[[Gpu, float], Iterator[Row]]] = {
    "popcount_peak": peak_rows,
    "binary_conv2d": conv_rows,
    "memory": memory_rows,
    "codes": code_rows,
}


def machine() -> dict[str, Any]:
    """What the results depend on."""
    index = torch.cuda.current_device()
    return {
        "gpu": torch.cuda.get_device_name(index),
        "multiprocessors": torch.cuda.get_device_properties(index).multi_processor_count,
        "built_for": _native.cuda_module().architectures(),
        "default_engine": _native.cuda_kernels(index).engine,
        "lowbit_ext": lowbit_ext.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def print_row(row: Row, *, heading: bool) -> None:
    """One line; a * marks rows that other work disturbed."""
    fields = [field for field in dataclasses.fields(row) if "heading" in field.metadata and field.name != "threads"]
    if heading:
        print("  ".join(f"{field.metadata['heading']:>{34 if field.name == 'case' else 10}}" for field in fields))
    cells = [getattr(row, field.name) for field in fields]
    texts = ["-" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells]
    first = f"{texts[0]}{' *' if row.disturbed() else ''}"
    print("  ".join([f"{first:>34}", *(f"{text:>10}" for text in texts[1:])]), flush=True)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME",
                        help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--engines", nargs="+", choices=_native.CUDA_ENGINES, default=_native.CUDA_ENGINES,
                        metavar="NAME", help=f"of the convolution: {', '.join(_native.CUDA_ENGINES)}")
    parser.add_argument("--seconds", type=float, default=0.2, help="that the blocks of a row take, at least")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), metavar="DIR", help="default: bench_out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: torch finds no GPU here")
    torch.backends.cudnn.benchmark = True  # the peer's fastest algorithm
    gpu, facts = current_gpu(options.engines), machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.only:
        print(f"\n{name}")
        results[name] = []
        for row in BENCHMARKS[name](gpu, options.seconds):
            print_row(row, heading=not results[name])
            results[name].append(dataclasses.asdict(row))
            (options.out / "gpu.json").write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    print(f"\nwritten: {options.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
