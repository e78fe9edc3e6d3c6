"""What every benchmark shares: configuration, rows, timing in alternating blocks, limits of the machine."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit_ext import PackedTensor, _native
from lowbit_ext.binary import PackedWeight, ops

# A block is one contender's run of calls. It starts with calls that are not timed, because the block before has left
# the caches to another contender, and its thread pool may still be spinning on the cores.
BLOCK_SECONDS = 4e-3
SETTLE_SECONDS = 1e-3
WARM_UP_SECONDS = 20e-3
LEAST_ROUNDS = 7

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclasses.dataclass(frozen=True)
class Config:
    """How one pass over the benchmarks runs.

    Attributes:
        quick: the small set of cases.
        threads: threads of torch, of our kernels (torch's own pool) and of the peers.
        peers: whether peers are measured beside us.
        seconds: time that the blocks of one row may take, at least; LEAST_ROUNDS rounds are always done.
    """

    quick: bool
    threads: int
    peers: bool
    seconds: float


# --- rows -------------------------------------------------------------------------------------------------------------


def column(heading: str, *, optional: bool = False) -> Any:
    """Declares a number of a Row that may be absent, and how the printed table heads it.

    Args:
        heading: words that the table may break between.
        optional: left out of the printed table where the terminal is too narrow; the JSON has it.
    """
    return dataclasses.field(default=None, metadata={"heading": heading, "optional": optional})


@dataclasses.dataclass(kw_only=True)
class Row:
    """One line of a result table. Subclasses add fields whose names carry the unit.

    Names ending in _us are microseconds (medians over blocks) and in _bytes bytes; speedup_over_<peer> is the peer's
    time divided by ours; percent_of_<limit> is our rate in percent of a limit, the best block of a loop run in turns
    with ours.

    Attributes:
        case: what was run.
        threads: on how many threads.
        blocks_us: least, lower quartile, median and upper quartile of the blocks' times per call, by contender.
    """

    # Quartiles of a contender further apart than this part of its median: other work on the machine took its cores.
    DISTURBED: ClassVar[float] = 0.3

    case: str = dataclasses.field(metadata={"heading": "case"})
    threads: int = dataclasses.field(metadata={"heading": "thr."})
    blocks_us: dict[str, tuple[float, float, float, float]] = dataclasses.field(default_factory=dict)

    def disturbed(self) -> bool:
        """Whether the blocks of some contender scatter too widely to be trusted."""
        spreads = ((upper - lower) / median for _, lower, median, upper in self.blocks_us.values())
        return any(spread > self.DISTURBED for spread in spreads)


# --- timing -----------------------------------------------------------------------------------------------------------


def _done() -> None:
    """Waits for calls that return when their work is done."""


def _calls_lasting(call: Callable[[], Any], seconds: float, synchronize: Callable[[], None] = _done) -> int:
    """Calls, at least one, until `seconds` have passed; returns their number."""
    calls, end = 0, time.perf_counter() + seconds
    while calls == 0 or time.perf_counter() < end:
        call()
        synchronize()
        calls += 1
    return calls


def time_block(call: Callable[[], Any], calls: int, synchronize: Callable[[], None] = _done) -> float:
    """Microseconds a call, over one block."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def _self_timed_block(call: Callable[[], float], calls: int, _synchronize: Callable[[], None]) -> float:
    return statistics.fmean(call() for _ in range(calls))


@dataclasses.dataclass(frozen=True)
class Timings:
    """Times per call of the contenders of one row, in microseconds."""

    blocks_us: dict[str, tuple[float, float, float, float]]

    def median_us(self, name: str) -> float | None:
        """Median over the blocks of one contender; None where it did not take part."""
        return self.blocks_us[name][2] if name in self.blocks_us else None

    def best_us(self, name: str) -> float | None:
        """Least over the blocks of one contender, for limits: what the machine can do, not what it did on average."""
        return self.blocks_us[name][0] if name in self.blocks_us else None

    def speedup(self, peer: str, ours: str) -> float | None:
        """How many times as long as ours the peer takes."""
        return ratio(self.median_us(peer), self.median_us(ours))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Quotient, or None where a side is absent."""
    return None if numerator is None or denominator is None else numerator / denominator


def measure(
    contenders: Mapping[str, Callable[[], Any] | None],
    seconds: float,
    self_timed: Sequence[str] = (),
    synchronize: Callable[[], None] = _done,
) -> Timings:
    """Times contenders against one another in alternating blocks of calls.

    Args:
        contenders: calls by name; None is left out.
        seconds: go on until this much time has passed and LEAST_ROUNDS rounds are done.
        self_timed: names of the contenders that return microseconds which they have measured themselves.
        synchronize: waits for the work that calls have enqueued; within a block, for all its calls together.
    """
    calls_by_name = {name: call for name, call in contenders.items() if call is not None}
    times_us: dict[str, list[float]] = {name: [] for name in calls_by_name}
    calls_per_block = {}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name, call in calls_by_name.items():
            calls = _calls_lasting(call, WARM_UP_SECONDS, synchronize)
            calls_per_block[name] = max(1, round(calls * BLOCK_SECONDS / WARM_UP_SECONDS))
        end = time.perf_counter() + seconds
        while len(next(iter(times_us.values()))) < LEAST_ROUNDS or time.perf_counter() < end:
            for name, call in calls_by_name.items():
                _calls_lasting(call, SETTLE_SECONDS, synchronize)
                block = _self_timed_block if name in self_timed else time_block
                times_us[name].append(block(call, calls_per_block[name], synchronize))
    finally:
        if collecting:
            gc.enable()
    return Timings({name: (min(times), *_quartiles(times)) for name, times in times_us.items()})


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    lower, median, upper = statistics.quantiles(times, n=4)
    return lower, median, upper


def fastest(candidates: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The quickest of several ways to do the same, so that a peer is measured at its best."""
    if len(candidates) == 1:
        return candidates[0]
    timings = measure({str(index): call for index, call in enumerate(candidates)}, 0.0)
    return candidates[min(range(len(candidates)), key=lambda index: timings.blocks_us[str(index)][2])]


# --- limits -----------------------------------------------------------------------------------------------------------

# What the loop of csrc/cpu/popcount_peak does at each level.
POPCOUNT_FORMS = {
    "scalar": "xor, popcount without a popcount instruction, add on 64-bit words",
    "avx2": "xor, nibble counts by VPSHUFB (Mula), add on 256 bits",
    "avx512": "xor, VPOPCNTD, add on 512 bits",
    "amx": "TDPBSSD on bits widened to bytes",
}


def popcount_level() -> str:
    """The level whose popcount loop is the limit: the active one, or avx512 where amx is active."""
    return "avx512" if _native.active_isa() == "amx" else _native.active_isa()


class BinaryLimit:
    """A contender that does nothing but binary multiply-adds in registers, on all threads.

    Attributes:
        operations: binary operations of one call, 2 a multiply-add, all threads together.
    """

    def __init__(self, level: str) -> None:
        self._level = _native.ISA_LEVELS.index(level)
        self._iterations = 1
        # Long enough to make the start of a team negligible. Found on one thread and by the least of a few times: on a
        # busy machine a team may wait longer than that for its cores, and the loop would stay too short.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        while min(time_block(self, 1) for _ in range(5)) < 300:
            self._iterations *= 2
        torch.set_num_threads(threads)

    def __call__(self) -> None:
        self.operations = _native.cpu.popcount_peak(self._level, self._iterations)

    def gops(self, timings: Timings, name: str) -> float | None:
        """Billions of binary operations a second, measured under `name`."""
        time_us = timings.best_us(name)
        return None if time_us is None else self.operations / time_us * 1e-3


def reading(tensor: Tensor) -> Callable[[], Any]:
    """A contender that only reads a dense tensor: the sum of its memory seen as float32, torch's fastest reader."""
    memory = tensor.as_strided((tensor.numel(),), (1,)).view(torch.float32)
    return lambda: memory.sum()


def percent_of_rate(amount: float, time_us: float | None, limit_amount: float, limit_us: float | None) -> float | None:
    """amount / time in percent of limit_amount / limit time; None where a time is absent."""
    if time_us is None or limit_us is None:
        return None
    return 100 * (amount / time_us) / (limit_amount / limit_us)


# --- checks -----------------------------------------------------------------------------------------------------------


def require_equal(what: str, ours: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError unless the values are equal: a fast wrong kernel is not a result."""
    if ours.shape != expected.shape or not torch.equal(ours.to(expected.dtype), expected):
        raise RuntimeError(f"{what}: our result differs from the reference; nothing was measured")


def require_close(what: str, ours: Tensor, expected: Tensor, relative: float) -> None:
    """Raises RuntimeError where the largest difference passes `relative` times the largest expected magnitude."""
    error = (ours - expected).abs().max().item()
    if not error <= relative * expected.abs().max().item():
        raise RuntimeError(f"{what}: our result is {error:g} away from the reference; nothing was measured")


# --- the bare kernel --------------------------------------------------------------------------------------------------


def bare_binary_conv2d(
    packed: PackedTensor, weight: PackedWeight, padding: int
) -> tuple[Callable[[], None], Tensor]:
    """The compiled convolution, packed -> int32, without the Python around it, and the tensor it writes.

    The result is allocated and the arguments are converted beforehand, as in a peer's profiled kernel time. Groups are
    such as kernels read packed: narrow ones and those of whole words.
    """
    batch, height, width, _ = packed.words.shape
    filters, _, *kernel = weight.shape
    out_height, out_width = height + 2 * padding - kernel[0] + 1, width + 2 * padding - kernel[1] + 1
    shape = _native.cpu.ConvShape(
        batch, height, width, packed.channels, filters, *kernel, out_height, out_width, 1, 1, padding, padding, 1, 1,
        weight.groups,
    )
    output = torch.empty(
        (batch, filters, out_height, out_width), dtype=torch.int32, memory_format=torch.channels_last
    )
    encoding, padding_value, int32, thresholds = ops.ENCODINGS[packed.encoding], 0, 0, 0
    workspace_bytes = _native.cpu.binary_conv2d_workspace_bytes(shape, encoding, padding_value, int32, thresholds)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
    tensors = (packed.words, weight.blocked, output, workspace)
    absent = (0,) * 8  # scale, bias, residual, threshold
    arguments = (
        shape, encoding, padding_value, int32, packed.words.data_ptr(), weight.blocked.data_ptr(), *absent,
        output.data_ptr(), workspace.data_ptr(), workspace_bytes,
    )

    def call(tensors: tuple[Tensor, ...] = tensors) -> None:  # keeps what the addresses point at
        _native.cpu.binary_conv2d(*arguments)

    call()
    return call, output
