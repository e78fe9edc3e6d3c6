"""Codes of 2, 4 and 8 bits in groups of 256, both ways, against libraries of quantisers and plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import peers
from harness import DTYPE_NAMES, Config, Row, Timings, column, measure, percent_of_rate
from lowbit_ext import lowmem

CAPTION = (
    "Packing to codes with a scale and a minimum for every 256 elements, and unpacking into a ready tensor. torch: the "
    "same in plain operators, compiled (JSON: eager too). torchao: its affine quantiser in groups of 256, without "
    "packing. bitsandbytes: NF4 in blocks of 64. Limit: bytes that ours reads and writes a second against those of a "
    "copy between two ready tensors."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Elements of one type to codes of so many bits."""

    elements: int
    dtype: torch.dtype
    bits: int

    def __str__(self) -> str:
        size = f"{self.elements >> 20} Mi" if self.elements >> 20 else f"{self.elements >> 10} Ki"
        return f"{size} {DTYPE_NAMES[self.dtype]}, {self.bits} bits"


@dataclasses.dataclass(kw_only=True)
class GroupRow(Row):
    """Times, speed-ups and bandwidth of both ways."""

    percent_of_copy_bandwidth_pack: float | None = column("pack, of copy bandwidth")
    percent_of_copy_bandwidth_unpack: float | None = column("unpack, of copy bandwidth")
    stochastic_over_nearest: float | None = column("stoch-astic over nearest")
    pack_speedup_over_torch: float | None = column("pack vs torch eager", optional=True)
    pack_speedup_over_torch_compiled: float | None = column("pack vs torch")
    pack_speedup_over_torchao: float | None = column("pack vs torchao")
    pack_speedup_over_bitsandbytes: float | None = column("pack vs bitsand-bytes")
    unpack_speedup_over_torch: float | None = column("unpack vs torch eager", optional=True)
    unpack_speedup_over_torch_compiled: float | None = column("unpack vs torch")
    unpack_speedup_over_torchao: float | None = column("unpack vs torchao")
    unpack_speedup_over_bitsandbytes: float | None = column("unpack vs bitsand-bytes")
    pack_us: float | None = column("pack µs", optional=True)
    unpack_us: float | None = column("unpack µs", optional=True)


def cases(quick: bool) -> list[Case]:
    """Larger than all caches, and in the second-level cache."""
    if quick:
        return [Case(1 << 24, torch.float32, 4)]
    large = [Case(1 << 24, torch.float32, bits) for bits in (4, 2, 8)]
    return [*large, Case(1 << 24, torch.bfloat16, 4), Case(1 << 17, torch.float32, 4)]


def _torch_pack(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    groups = x.view(-1, 256).float()
    low, high = torch.aminmax(groups, dim=1, keepdim=True)
    scale, low = ((high - low) / (2**bits - 1)).bfloat16(), low.bfloat16()
    codes = ((groups - low) / scale + 0.5).clamp_(0, 2**bits - 1).to(torch.uint8).view(-1, 8 // bits)
    packed = codes[:, 0]
    for position in range(1, 8 // bits):
        packed = packed | codes[:, position] << (position * bits)
    return packed, torch.cat([scale, low], 1)


def _torch_unpack(packed: Tensor, scale_minimum: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([packed >> (position * bits) & (2**bits - 1) for position in range(8 // bits)], 1)
    return (codes.view(-1, 256) * scale_minimum[:, :1].float() + scale_minimum[:, 1:].float()).to(dtype).view(-1)


@torch.inference_mode()
def _row(case: Case, config: Config) -> GroupRow:
    torch.manual_seed(0)
    x = torch.randn(case.elements).to(case.dtype)
    out, codes = torch.empty_like(x), lowmem.quantize(x, case.bits)
    step = codes.scale_minimum[:, :1].float() * (0.5 + 2**-6)  # half a code and the rounding of its value
    wrong = (lowmem.dequantize(codes).view(-1, 256).float() - x.view(-1, 256).float()).abs() > step + 2**-7
    if wrong.any():
        raise RuntimeError(f"{case}: a code is further than half a step from its element; nothing was measured")
    contenders: dict[str, Callable[[], object] | None] = {
        "pack": lambda: lowmem.quantize(x, case.bits),
        "stochastic": lambda: lowmem.quantize(x, case.bits, stochastic=True),
        "unpack": lambda: lowmem.dequantize(codes, out),
        "copy": lambda: out.copy_(x),
    }
    if config.peers:
        packed = _torch_pack(x, case.bits)
        torch.compiler.reset()
        pack, unpack = torch.compile(_torch_pack), torch.compile(_torch_unpack)
        pack(x, case.bits), unpack(*packed, case.bits, case.dtype)
        contenders |= {
            "torch pack": lambda: _torch_pack(x, case.bits),
            "torch unpack": lambda: _torch_unpack(*packed, case.bits, case.dtype),
            "compiled pack": lambda: pack(x, case.bits),
            "compiled unpack": lambda: unpack(*packed, case.bits, case.dtype),
        }
        contenders["torchao pack"], contenders["torchao unpack"] = peers.torchao_groups(x, case.bits)
        contenders["bitsandbytes pack"], contenders["bitsandbytes unpack"] = (
            peers.bitsandbytes_nf4(x) if case.bits == 4 else (None, None)
        )
    timings = measure(contenders, config.seconds)
    size = x.nbytes

    def of_copy(name: str) -> float | None:
        return percent_of_rate(size + codes.nbytes, timings.median_us(name), 2 * size, timings.best_us("copy"))

    return GroupRow(
        case=str(case),
        threads=config.threads,
        blocks_us=timings.blocks_us,
        percent_of_copy_bandwidth_pack=of_copy("pack"),
        percent_of_copy_bandwidth_unpack=of_copy("unpack"),
        stochastic_over_nearest=timings.speedup("stochastic", "pack"),
        pack_us=timings.median_us("pack"),
        unpack_us=timings.median_us("unpack"),
        **_speedups(timings),
    )


def _speedups(timings: Timings) -> dict[str, float | None]:
    named = {"torch": "torch", "torch_compiled": "compiled", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}
    return {
        f"{way}_speedup_over_{name}": timings.speedup(f"{peer} {way}", way)
        for way in ("pack", "unpack") for name, peer in named.items()
    }


def rows(config: Config) -> Iterator[Row]:
    """Measures every case."""
    for case in cases(config.quick):
        yield _row(case, config)
