"""Binary convolution and linear layers against OpenVINO's binary kernel, torch's own and the machine's limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import peers
from harness import (
    BinaryLimit,
    Config,
    Row,
    bare_binary_conv2d,
    column,
    measure,
    percent_of_rate,
    popcount_level,
    require_equal,
)
from lowbit_ext import _native, binary

CAPTION = (
    "kernel: packed -> int32 into a ready tensor; int32: the same as a call. fp32: float32 NCHW -> float32, binarized "
    "inside. packed: packed -> threshold -> packed. Speed-ups: OpenVINO kernel (its convolution node alone) over our "
    "kernel; OpenVINO call and torch fp32, bf16 (input of that type) over our fp32; torch int8 (8-bit to 8-bit) over "
    "our packed. Limits: over our kernel; operations on padding are not counted."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer with as many filters as channels; size 1 and kernel 1 is a linear layer."""

    channels: int
    size: int
    batch: int
    kernel: int = 3
    groups: int = 1

    @property
    def padding(self) -> int:
        """Zero padding on every side that keeps the image's size."""
        return self.kernel // 2

    @property
    def operations(self) -> int:
        """2 for each multiply-add of two bits that a result needs: taps in the padding need none."""
        row_taps = sum(
            0 <= out + tap - self.padding < self.size for out in range(self.size) for tap in range(self.kernel)
        )
        return 2 * self.batch * row_taps**2 * self.channels**2 // self.groups

    def __str__(self) -> str:
        if self.size == 1:
            return f"linear {self.channels} N={self.batch}"
        groups = "" if self.groups == 1 else f" {self.groups} groups"
        return f"{self.channels}@{self.size} {self.kernel}x{self.kernel}{groups} N={self.batch}"


@dataclasses.dataclass(kw_only=True)
class BinaryConv2dRow(Row):
    """Times, ratios and limits of one layer."""

    speedup_over_openvino_kernel: float | None = column("vs OpenVINO kernel")
    speedup_over_openvino_call: float | None = column("vs OpenVINO call")
    speedup_over_torch_float32: float | None = column("vs torch fp32")
    kernel_speedup_over_torch_float32: float | None = column("kernel vs torch fp32")
    speedup_over_torch_bfloat16: float | None = column("vs torch bf16")
    speedup_over_torch_int8: float | None = column("vs torch int8")
    percent_of_popcount_limit: float | None = column("of popcount limit")
    percent_of_amx_limit: float | None = column("of amx limit")
    ours_kernel_us: float | None = column("ours kernel µs", optional=True)
    ours_int32_us: float | None = column("ours int32 µs", optional=True)
    ours_float32_us: float | None = column("ours fp32 µs", optional=True)
    ours_packed_us: float | None = column("ours packed µs", optional=True)
    openvino_kernel_us: float | None = column("OpenVINO kernel µs", optional=True)
    openvino_call_us: float | None = column("OpenVINO call µs", optional=True)
    torch_float32_us: float | None = column("torch fp32 µs", optional=True)
    torch_bfloat16_us: float | None = column("torch bf16 µs", optional=True)
    torch_int8_us: float | None = column("torch int8 µs", optional=True)
    equals_openvino: bool | None = column("equals OpenVINO", optional=True)
    popcount_limit_gops: float | None = column("popcount limit GOPS", optional=True)
    amx_limit_gops: float | None = column("amx limit GOPS", optional=True)


def cases(quick: bool) -> list[Case]:
    """The 3x3 layers of ResNet-18, by groups too, depthwise ones among them, and a linear layer."""
    layers = [(256, 14), (64, 56), (128, 28), (512, 7)]
    if quick:
        convolutions = [*(Case(channels, size, 1) for channels, size in layers), Case(256, 14, 8)]
        convolutions += [Case(128, 28, 1, groups=128), Case(256, 14, 1, groups=32)]
    else:
        convolutions = [Case(channels, size, batch) for batch in (1, 8, 32) for channels, size in layers]
        convolutions += [
            Case(channels, size, batch, groups=groups)
            for batch in (1, 16)
            for channels, size in layers[1:] + layers[:1]
            for groups in (channels, channels // 2, channels // 4, channels // 8, 4)
        ]
    return [*convolutions, Case(4096, 1, 1, kernel=1), Case(4096, 1, 64, kernel=1)]


@torch.inference_mode()
def _row(case: Case, config: Config) -> BinaryConv2dRow:
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    weight = torch.randn(case.channels, case.channels // case.groups, case.kernel, case.kernel)
    geometry = {"padding": case.padding, "groups": case.groups}
    threshold = torch.zeros(case.channels, dtype=torch.int32)
    packed, packed_weight = binary.binarize(x), binary.pack_weight(weight, case.groups)

    reference = F.conv2d(x.sign(), weight.sign(), **geometry)
    ours = binary.conv2d(packed, packed_weight, **geometry)
    require_equal(f"binary_conv2d {case}", ours, reference)
    fused = binary.conv2d(packed, packed_weight, threshold=threshold, **geometry)
    require_equal(f"binary_conv2d {case} with threshold", fused.words, binary.binarize(reference).words)

    kernel, kernel_output = bare_binary_conv2d(packed, packed_weight, case.padding)
    require_equal(f"binary_conv2d {case} bare", kernel_output, reference)

    contenders = {
        "ours_kernel": kernel,
        "ours_int32": lambda: binary.conv2d(packed, packed_weight, **geometry),
        "ours_float32": lambda: binary.conv2d(x, packed_weight, **geometry),
        "ours_packed": lambda: binary.conv2d(packed, packed_weight, threshold=threshold, **geometry),
    }
    equals_openvino = None
    if config.peers:
        if case.groups == 1 and peers.openvino() is not None:
            peer = peers.OpenVinoBinaryConv2d(x, weight, case.padding, config.threads)
            peer.call()
            equals_openvino = torch.equal(ours.float(), peer.output())
            contenders |= {"openvino_kernel": peer.kernel_us, "openvino_call": peer.call}
        if case.size == 1:
            rows, matrix = x.flatten(1), weight.flatten(1)
            contenders["torch_float32"] = peers.torch_linear(rows, matrix, torch.float32)
            contenders["torch_bfloat16"] = peers.torch_linear(rows, matrix, torch.bfloat16)
            contenders["torch_int8"] = peers.torch_int8_linear(rows, matrix)
        else:
            contenders["torch_float32"] = peers.torch_conv2d(x, weight, case.padding, case.groups, torch.float32)
            contenders["torch_bfloat16"] = peers.torch_conv2d(x, weight, case.padding, case.groups, torch.bfloat16)
            contenders["torch_int8"] = peers.torch_int8_conv2d(x, weight, case.padding, case.groups)
    popcount_limit = BinaryLimit(popcount_level())
    amx_limit = BinaryLimit("amx") if _native.active_isa() == "amx" else None
    contenders |= {"popcount_limit": popcount_limit, "amx_limit": amx_limit}

    timings = measure(contenders, config.seconds, self_timed=("openvino_kernel",))
    kernel_us = timings.median_us("ours_kernel")
    amx_operations = 0 if amx_limit is None else amx_limit.operations
    return BinaryConv2dRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        speedup_over_openvino_kernel=timings.speedup("openvino_kernel", "ours_kernel"),
        speedup_over_openvino_call=timings.speedup("openvino_call", "ours_float32"),
        speedup_over_torch_float32=timings.speedup("torch_float32", "ours_float32"),
        kernel_speedup_over_torch_float32=timings.speedup("torch_float32", "ours_kernel"),
        speedup_over_torch_bfloat16=timings.speedup("torch_bfloat16", "ours_float32"),
        speedup_over_torch_int8=timings.speedup("torch_int8", "ours_packed"),
        percent_of_popcount_limit=percent_of_rate(
            case.operations, kernel_us, popcount_limit.operations, timings.best_us("popcount_limit")
        ),
        percent_of_amx_limit=percent_of_rate(
            case.operations, kernel_us, amx_operations, timings.best_us("amx_limit")
        ),
        ours_kernel_us=kernel_us,
        ours_int32_us=timings.median_us("ours_int32"),
        ours_float32_us=timings.median_us("ours_float32"),
        ours_packed_us=timings.median_us("ours_packed"),
        openvino_kernel_us=timings.median_us("openvino_kernel"),
        openvino_call_us=timings.median_us("openvino_call"),
        torch_float32_us=timings.median_us("torch_float32"),
        torch_bfloat16_us=timings.median_us("torch_bfloat16"),
        torch_int8_us=timings.median_us("torch_int8"),
        equals_openvino=equals_openvino,
        popcount_limit_gops=popcount_limit.gops(timings, "popcount_limit"),
        amx_limit_gops=None if amx_limit is None else amx_limit.gops(timings, "amx_limit"),
    )


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
