"""Times whole networks, packed, against their float twins: `python bench/networks.py`. A table; JSON in --out.

Every network of lowbit_ext.models at its paper's size. Batch norm has the statistics of images, so that activations
have both signs. The twins are compiled with frozen channels-last weights in float32 and bfloat16, and run by OpenVINO
as they are and, where nncf is installed, in int8. All contestants of a row take turns. Most of the time goes into
compiling the twins, for each batch size and number of threads: about two minutes a row on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import gc
import inspect
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import peers
import report
from harness import Row, Timings, column, measure, require_close
from lowbit_ext import binary, models

CAPTION = (
    "Times of a batch in ms, medians over blocks in turns; channels-last images. twin: the network with float weights, "
    "by torch.compile with frozen weights, or by OpenVINO (bf16 by itself where the machine has it). in conv, other "
    "packed: parts of a call of the packed network spent in packed convolutions (linear layers are some) and in its "
    "other packed layers, by hooks round them; the rest is in float layers and between. peak: memory that a call takes "
    "beyond what the process has, the packed network's first one and the compiled float32 twin's."
)
TWINS = ("fp32", "bf16", "openvino", "openvino_int8")
SETTLING_BATCHES, CALIBRATION_IMAGES, PROFILED_CALLS = 4, 8, 7


@dataclasses.dataclass(frozen=True)
class Family:
    """A network and the images that it is for.

    Attributes:
        build: makes a stage of it.
        size: height and width of the images.
        batches: sizes that are measured by default.
    """

    build: Callable[..., nn.Module]
    size: int = 224
    batches: tuple[int, ...] = (1, 16)


FAMILIES = {
    **{
        build.__name__: Family(build)
        for build in (
            models.resnet18, models.birealnet18, models.reactnet18, models.reactnet_a, models.quicknet,
            models.binary_densenet28, models.meliusnet22, models.binary_vit, models.alexnet,
        )
    },
    "vgg7": Family(models.vgg7, 32, (1, 64)),
    "resnet20": Family(models.resnet20, 32, (1, 64)),
}


@dataclasses.dataclass(kw_only=True)
class NetworkRow(Row):
    """Times of all contestants, and what the packed network takes."""

    packed_ms: float | None = column("packed")
    packed_bf16_ms: float | None = column("packed bf16")
    unpacked_ms: float | None = column("not packed")
    fp32_ms: float | None = column("twin fp32")
    bf16_ms: float | None = column("twin bf16")
    openvino_ms: float | None = column("Open- VINO")
    openvino_int8_ms: float | None = column("Open- VINO int8")
    speedup_over_fp32: float | None = column("over fp32")
    speedup_over_fastest_twin: float | None = column("over fastest")
    percent_of_time_in_convolutions: float | None = column("in conv")
    percent_of_time_in_other_packed_layers: float | None = column("other packed")
    stored_bytes: int | None = column("stored", optional=True)
    float32_bytes: int | None = column("stored fp32", optional=True)
    peak_bytes: int | None = column("peak", optional=True)
    float32_peak_bytes: int | None = column("peak fp32", optional=True)
    fastest_twin: str | None = None
    fastest_packed: str | None = None


# --- networks ---------------------------------------------------------------------------------------------------------


def images(count: int, size: int) -> Tensor:
    """Blurred noise of deviation 1, (N, 3, size, size): like photographs strongest in its low frequencies."""
    coarse = F.interpolate(torch.randn(count, 3, 7, 7), size=(size, size), mode="bilinear")
    fine = coarse + 0.3 * torch.randn(count, 3, size, size)
    return fine / fine.std()


@torch.no_grad()
def settled(model: nn.Module, size: int) -> nn.Module:
    """The model in evaluation mode; batch norm has the mean statistics of a few batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    for _ in range(SETTLING_BATCHES):
        model.train()(images(4, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


class Network:
    """One family: the binary network, packed, and its twins."""

    def __init__(self, name: str, use_openvino: bool) -> None:
        torch.manual_seed(0)
        family = FAMILIES[name]
        self.size = family.size
        self.model, self.twin = (settled(family.build(stage), family.size) for stage in ("binary", "float"))
        example = images(1, family.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that stay as they are
            self.packed = {"packed": binary.pack(self.model, example)}
            if "float_dtype" in inspect.signature(binary.pack).parameters:
                options: dict[str, Any] = {"float_dtype": torch.bfloat16}
                self.packed["packed_bf16"] = binary.pack(self.model, example, **options)
        self.openvino: dict[str, peers.OpenVinoNetwork] = {}
        if use_openvino:
            self.openvino["openvino"] = peers.OpenVinoNetwork(self.twin, example)
            if peers.has_nncf():
                calibration = list(images(CALIBRATION_IMAGES, family.size).split(1))
                self.openvino["openvino_int8"] = peers.OpenVinoNetwork(self.twin, example, calibration)

    def calls(self, x: Tensor, threads: int) -> dict[str, Callable[[], Any]]:
        """All contestants on a batch."""

        def without_gradients(model: nn.Module, x: Tensor) -> Callable[[], Any]:
            @torch.inference_mode()
            def call() -> Tensor:
                return model(x)

            return call

        calls = {
            name: without_gradients(model, x.bfloat16() if name == "packed_bf16" else x)
            for name, model in self.packed.items()
        }
        calls["unpacked"] = without_gradients(self.model, x)
        calls["fp32"] = peers.compiled_network(self.twin, x, torch.float32)
        calls["bf16"] = peers.compiled_network(self.twin, x, torch.bfloat16)
        return calls | {name: network.compile(x, threads) for name, network in self.openvino.items()}


# --- measurements -----------------------------------------------------------------------------------------------------


def stored_bytes(model: nn.Module) -> int:
    """Size of a model's state."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _give_back() -> None:
    """Gives freed memory back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # where the C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(call: Callable[[], Any], before: Callable[[], Any]) -> int | None:
    """Resident memory at its highest during a call, less that in front of it; None where the system does not tell.

    What the call keeps for later ones counts. `before` touches again what everything needs but the system took back.
    """
    _give_back()
    before()
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest is from now on
        resident = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - resident)
    except OSError:
        return None


@torch.inference_mode()
def percent_of_time(packed: binary.PackedModel, x: Tensor) -> dict[str, float]:
    """Parts of a call's time: in packed "convolutions" (linear layers are some), in "other" packed layers. Medians."""
    inside, start = {"convolutions": 0.0, "other": 0.0}, 0.0

    def enter(*_: Any) -> None:
        nonlocal start
        start = time.perf_counter()

    def leave(layer: nn.Module, *_: Any) -> None:
        inside["convolutions" if "Conv" in type(layer).__name__ else "other"] += time.perf_counter() - start

    hooks = [
        hook for layer in packed.packed_layers().values()
        for hook in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]
    parts: dict[str, list[float]] = {name: [] for name in inside}
    for _ in range(PROFILED_CALLS):
        inside.update(dict.fromkeys(inside, 0.0))
        begin = time.perf_counter()
        packed(x)
        whole = time.perf_counter() - begin
        for name, seconds in inside.items():
            parts[name].append(100 * seconds / whole)
    for hook in hooks:
        hook.remove()
    return {name: statistics.median(values) for name, values in parts.items()}


def check(name: str, network: Network, x: Tensor) -> None:
    """Raises RuntimeError unless the packed network gives the unpacked one's result."""
    with torch.inference_mode():
        require_close(name, network.packed["packed"](x), network.model(x), relative=1e-3)


def row(name: str, network: Network, batch: int, threads: int, seconds: float) -> NetworkRow:
    """Measures one family at one batch size and number of threads."""
    x = images(batch, network.size).contiguous(memory_format=torch.channels_last)
    packed = copy.deepcopy(network.packed["packed"])  # keeps nothing yet from a call before
    with torch.inference_mode():
        peak = peak_bytes(lambda: packed(x), before=lambda: network.model(x))
    check(name, network, x)
    calls = network.calls(x, threads)
    float32_peak = peak_bytes(calls["fp32"], before=calls["fp32"])
    timings = measure(calls, seconds)
    fastest_twin = _fastest(timings, TWINS)
    fastest_packed = _fastest(timings, network.packed)
    parts = percent_of_time(network.packed["packed"], x)
    times = {f"{each}_ms": timings.blocks_us[each][2] * 1e-3 for each in calls}
    return NetworkRow(
        case=f"{name} N{batch}", threads=threads, blocks_us=timings.blocks_us,
        speedup_over_fp32=timings.speedup("fp32", fastest_packed),
        speedup_over_fastest_twin=timings.speedup(fastest_twin, fastest_packed),
        percent_of_time_in_convolutions=parts["convolutions"], percent_of_time_in_other_packed_layers=parts["other"],
        stored_bytes=stored_bytes(network.packed["packed"]), float32_bytes=stored_bytes(network.twin),
        peak_bytes=peak, float32_peak_bytes=float32_peak, fastest_twin=fastest_twin, fastest_packed=fastest_packed,
        **times,
    )


def _fastest(timings: Timings, names: Any) -> str:
    return min((name for name in names if name in timings.blocks_us), key=lambda name: timings.blocks_us[name][2])


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME",
                        help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N",
                        help="images in a call (default: 1 and 16, of networks for 32 px 1 and 64)")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}), metavar="N",
                        help="thread counts to run with (default: 1 and all cores)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the blocks of a row, at least (default: 4)")
    parser.add_argument("--no-openvino", action="store_true", help="torch's twins only")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), metavar="DIR", help="default: bench_out")
    return parser.parse_args()


def rows_of(options: argparse.Namespace, console: Console) -> Iterator[NetworkRow]:
    """All rows, with a bar of what is done."""
    batches = {name: options.batches or FAMILIES[name].batches for name in options.families}
    use_openvino = not options.no_openvino and peers.openvino() is not None
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=len(options.threads) * sum(map(len, batches.values())))
        for name in options.families:
            progress.update(task, description=f"{name}: build and pack")
            torch.set_num_threads(max(options.threads))
            network = Network(name, use_openvino)
            for threads in options.threads:
                torch.set_num_threads(threads)
                for batch in batches[name]:
                    progress.update(task, description=f"{name}, batch {batch}, threads {threads}")
                    yield row(name, network, batch, threads, options.seconds)
                    progress.advance(task)


def summary(result: NetworkRow) -> str:
    """One line: the packed network beside the fastest of its twins."""
    packed_us, twin_us = (result.blocks_us[str(name)][2] for name in (result.fastest_packed, result.fastest_twin))
    return (
        f"{result.case}, {result.threads} thread{'s' if result.threads > 1 else ''}: {result.fastest_packed} "
        f"{packed_us * 1e-3:.2f} ms, fastest twin ({result.fastest_twin}) {twin_us * 1e-3:.2f} ms: packed takes "
        f"{packed_us / twin_us:.2f} times as long"
    )


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    openvino = None if options.no_openvino else peers.openvino()
    facts = report.machine(None if openvino is None else openvino.__version__.split("-")[0])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"networks_{report.file_stem(facts)}.json"
    rows: list[Row] = []
    with contextlib.suppress(KeyboardInterrupt):
        for result in rows_of(options, console):
            rows.append(result)
            report.write_json(path, facts, options.threads, {"networks": rows})  # so that Ctrl-C loses one row only
    if not rows:
        sys.exit("interrupted before the first row")
    console.print(
        f"\n{facts['cpu']}\nlevel {facts['isa']} (of {', '.join(facts['available_isas'])}); torch {facts['torch']}, "
        f"OpenVINO {facts['openvino'] or 'not used'}\n",
        highlight=False,
    )
    console.print(report.table(f"networks, level {facts['isa']}, ms a batch", rows, console.width))
    console.print(CAPTION + "\n", style="dim", highlight=False)
    disturbed = sum(result.disturbed() for result in rows)
    if disturbed:
        console.print(f"* {disturbed} of {len(rows)} rows were disturbed by other work on this machine")
    for result in rows:
        console.print(summary(result), highlight=False, soft_wrap=True)  # type: ignore[arg-type]
    console.print(f"written: {path}", highlight=False)


if __name__ == "__main__":
    main()
