"""Trains a ResNet and a VGG with exact and with low-bit stored activations: accuracy, time and memory side by side.

Variants: exact; lowmem.convert with 4 and 8 bits; lowmem.saved_tensors with 4 bits; torch.utils.checkpoint for every
block. All have the same initial weights, batches and schedule for a seed. Memory is what autograd keeps (lowmem.ledger)
and what the operating system sees: a few steps of every variant in a process of its own.
`python experiments/lowmem.py` takes about five minutes on two cores; `--full` is Fashion-MNIST, under an hour; `--data
cifar10 --root FOLDER --recipe paper --device cuda` the ResNet-164 of the paper; `--audit` the error of gradients by
depth. A record of all runs and plots go to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common
import data
from common import console, plt, spread
from lowbit_ext import lowmem, models

CURVE_POINTS, CURVE_IMAGES = 10, 500  # evaluations along a run, of as many test images
EVALUATION_BATCH = 250
MEMORY_STEPS = 3  # in the process that measures memory
MEMORY_S = 6.0  # what that process takes, most of it to start, for the estimate alone
# glibc gives blocks from this size on back to the system when they are freed; by default it keeps many up to 32 MB.
GIVE_BACK = ("MALLOC_MMAP_THRESHOLD_", "65536")
PROBED_STEPS = 3  # for the estimate, behind one that warms up
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
AUDIT_DEPTHS, AUDIT_BATCH = (20, 56, 164), 32
AUDIT_METHODS = (("convert", 4), ("hooks", 4), ("naive", 8))  # naive: rounded in the forward pass too


# --- what is compared -------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A block that keeps its input alone and runs forward once more in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """What the block gives."""
        return checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)  # no block draws numbers


def checkpointed(model: nn.Module) -> nn.Module:
    """The model with each of its `blocks` checkpointed."""
    model.blocks = nn.Sequential(*map(Checkpointed, model.blocks))  # type: ignore[arg-type]
    return model


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to store activations: what becomes of the model, and the context that its forward pass runs in."""

    label: str
    colour: str
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


VARIANTS = {
    "exact": Variant("exact", "#555555"),
    "convert4": Variant("convert(4)", "#1f5fa8", lambda model: lowmem.convert(model, 4)),
    "convert8": Variant("convert(8)", "#8fbbe0", lambda model: lowmem.convert(model, 8)),
    "hooks4": Variant("hooks(4)", "#d1863a", context=lambda: lowmem.saved_tensors(4)),
    "checkpoint": Variant("checkpoint", "#2a8f5b", checkpointed),
    "convert2": Variant("convert(2)", "#8a4fa3", lambda model: lowmem.convert(model, 2)),
    "hooks8": Variant("hooks(8)", "#e8c08f", context=lambda: lowmem.saved_tensors(8)),
    "hooks4s": Variant("hooks(4, s)", "#c0504d", context=lambda: lowmem.saved_tensors(4, stochastic=True)),
}
DEFAULT_VARIANTS = ("exact", "convert4", "convert8", "hooks4", "checkpoint")


class VGG(nn.Module):
    """Blocks of two 3x3 convolutions, each with batch norm and ReLU, in front of a max-pooling; a linear classifier."""

    def __init__(self, widths: Sequence[int], image: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, size, _ = image
        blocks = []
        for width in widths:
            layers: list[nn.Module] = []
            for before in (channels, width):
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
            channels, size = width, size // 2
        self.blocks = nn.Sequential(*blocks)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels * size**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.fc(self.flatten(self.blocks(x)))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum 0.9."""

    depth: int  # of the ResNet
    widths: tuple[int, int, int]  # of the three groups of blocks of both networks
    batch: int
    steps: int
    learning_rate: float
    weight_decay: float
    schedule: str  # "triangle": up for a tenth of the steps, then down to 0; "paper": a division by 10 at 1/2 and 3/4
    augment: bool  # random shifts by up to four pixels and mirror images


RECIPES = {
    "quick": Recipe(20, (8, 16, 32), 50, 160, 0.1, 1e-4, "triangle", False),
    "full": Recipe(20, (16, 32, 64), 64, 1000, 0.1, 1e-4, "triangle", False),
    # He et al., ECCV 2016, with the weight decay of Chakrabarti and Moseley's code.
    "paper": Recipe(164, (16, 32, 64), 128, 64000, 0.1, 2e-4, "paper", True),
}


@dataclasses.dataclass(frozen=True)
class Case(Recipe):
    """A line of the table: all that shapes a run but its seed."""

    data: str
    image: tuple[int, int, int]
    classes: int
    network: str  # "resnet" or "vgg"
    variant: str
    layout: str
    device: str

    @property
    def network_label(self) -> str:
        """Its name in tables and plots."""
        return f"ResNet-{self.depth}" if self.network == "resnet" else f"VGG-{2 * len(self.widths) + 1}"


@dataclasses.dataclass
class Memory:
    """Bytes of a step: what autograd keeps, and the peak beyond weights, gradients and optimizer."""

    stored: int
    peak: int  # of tensors alive at one time: what is freed goes back to the system
    default_peak: int  # of a process as it is, where malloc keeps what is freed; on a GPU the same as `peak`


@dataclasses.dataclass
class Run:
    """What training with one seed gave."""

    steps: list[int]  # of the points of the curves
    train_loss: list[float]  # mean since the point before
    test_accuracy: list[float]  # in percent, of CURVE_IMAGES; the last one of all test images
    step_ms: float  # median of forward, backward and optimizer
    seconds: float


# --- training ---------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Waits for a GPU, if it is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Trainer:
    """Model and optimizer of a case."""

    def __init__(self, case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        self.case, self.variant = case, VARIANTS[case.variant]
        if case.network == "resnet":
            model: nn.Module = models.preact_resnet(
                case.depth, in_channels=case.image[0], num_classes=case.classes, widths=case.widths
            )
        else:
            model = VGG(case.widths, case.image, case.classes)
        self.memory_format = MEMORY_FORMATS[case.layout]
        self.model = self.variant.prepare(model.to(case.device, memory_format=self.memory_format))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=case.learning_rate, momentum=0.9, weight_decay=case.weight_decay
        )

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, outside of the context: the few numbers it keeps are worth no rounding."""
        with self.variant.context():
            logits = self.model(x)
        return F.cross_entropy(logits, labels)

    def step(self, x: Tensor, labels: Tensor, rate: float) -> Tensor:
        """One step at this part of the learning rate; the loss in front of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.case.learning_rate * rate
        self.optimizer.zero_grad()
        loss = self.loss(x, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Percent."""
        self.model.eval()
        right = sum(
            int((self.model(x.contiguous(memory_format=self.memory_format)).argmax(1) == y).sum())
            for x, y in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
        )
        self.model.train()
        return 100 * right / len(images)


def rate_at(case: Case, step: int) -> float:
    """Part of the learning rate at a step."""
    part = step / case.steps
    if case.schedule == "paper":
        if part < 1 / 160:  # 400 of 64 000 steps
            return 0.1
        return 1.0 if part < 1 / 2 else 0.1 if part < 3 / 4 else 0.01
    return min(10 * (part + 1 / case.steps), (1 - part) / 0.9, 1.0)


def batches(images: Tensor, labels: Tensor, case: Case, seed: int) -> Iterator[data.Set]:
    """Endless batches, a new order in every epoch: the same for every variant of a case."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // case.batch * case.batch].split(case.batch):
            x = images[rows.to(images.device)]
            yield augmented(x, generator) if case.augment else x, labels[rows.to(labels.device)]


def augmented(x: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """Images shifted at random by up to `margin` pixels, a half of them mirrored."""
    count, channels, height, width = x.shape
    down, right = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    columns = right + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns).to(x.device)
    rows = (down + torch.arange(height)).to(x.device)
    image, channel = torch.arange(count, device=x.device), torch.arange(channels, device=x.device)
    padded = F.pad(x, (margin,) * 4)
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def train(case: Case, seed: int, sets: tuple[data.Set, data.Set], on_step: Callable[[], None]) -> Run:
    """Trains one model."""
    began = time.perf_counter()
    trainer = Trainer(case, seed)
    test_images, test_labels = sets[1]
    result = Run([], [], [], 0.0, 0.0)
    every = max(1, case.steps // CURVE_POINTS)
    times, losses = [], []
    for step, (x, labels) in zip(range(case.steps), batches(*sets[0], case, seed), strict=False):
        x = x.contiguous(memory_format=trainer.memory_format)
        synchronize(case.device)
        start = time.perf_counter()
        loss = trainer.step(x, labels, rate_at(case, step))
        synchronize(case.device)
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
        if (step + 1) % every == 0 or step + 1 == case.steps:
            last = step + 1 == case.steps
            shown = len(test_images) if last else CURVE_IMAGES
            result.steps.append(step + 1)
            result.train_loss.append(statistics.fmean(losses))
            result.test_accuracy.append(trainer.accuracy(test_images[:shown], test_labels[:shown]))
            losses.clear()
        on_step()
    result.step_ms = 1e3 * statistics.median(times)
    result.seconds = time.perf_counter() - began
    return result


def random_batch(case: Case) -> data.Set:
    """Noise of the shape of a batch."""
    x = torch.randn(case.batch, *case.image).to(case.device, memory_format=MEMORY_FORMATS[case.layout])
    return x, torch.randint(case.classes, (case.batch,), device=case.device)


def probe(case: Case) -> float:
    """Seconds a step, roughly."""
    trainer, (x, labels) = Trainer(case, 0), random_batch(case)
    times = []
    for _ in range(1 + PROBED_STEPS):
        start = time.perf_counter()
        trainer.step(x, labels, 0.0)
        synchronize(case.device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


# --- memory -----------------------------------------------------------------------------------------------------------


def reset_peak(device: str) -> int:
    """Forgets the peak where the system allows that; bytes in use, or the peak so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux, proc(5): 5 resets VmHWM
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: str) -> int:
    """Most memory so far: resident memory of the process, or what torch had allocated on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(case: Case, threads: int) -> tuple[int, int]:
    """For a fresh process: bytes that autograd keeps, and the peak over a few steps beyond what was there before.

    A step of two images in front makes gradients, the optimizer's state and what libraries allocate once.
    """
    torch.set_num_threads(threads)
    trainer, (x, labels) = Trainer(case, 0), random_batch(case)
    trainer.step(x[:2], labels[:2], 0.0)
    before = reset_peak(case.device)
    for _ in range(MEMORY_STEPS):
        trainer.step(x, labels, 0.0)
    peak = peak_bytes(case.device) - before
    with lowmem.ledger(trainer.model) as book:
        trainer.loss(x, labels)
    return book.stored, peak


def memory_of(case: Case) -> Memory:
    """measure_memory in two processes of their own, that differ in what malloc does."""
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    environment = dict(os.environ)
    with ProcessPoolExecutor(1, context) as default, ProcessPoolExecutor(1, context) as frugal:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: an interruption is for this process alone
        try:
            as_it_is = default.submit(measure_memory, case, threads)  # starts the process
            os.environ.update([GIVE_BACK])
            giving_back = frugal.submit(measure_memory, case, threads)
        finally:
            os.environ.clear()
            os.environ.update(environment)
            signal.signal(signal.SIGINT, handler)
        return Memory(*giving_back.result(), as_it_is.result()[1])


# --- runs made before -------------------------------------------------------------------------------------------------


def training_key(case: Case, seed: int) -> dict[str, Any]:
    """Of a run in the record."""
    return {"what": "training", **dataclasses.asdict(case), "seed": seed}


def memory_key(case: Case) -> dict[str, Any]:
    """Of a measurement of memory in the record."""
    return {"what": "memory", **dataclasses.asdict(case)}


@dataclasses.dataclass
class Results:
    """What the cases of one table gave."""

    memory: dict[Case, Memory] = dataclasses.field(default_factory=dict)
    runs: dict[Case, list[Run]] = dataclasses.field(default_factory=dict)  # by seed


# --- report -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def seeds_label(seeds: Sequence[int]) -> str:
    """Their number, or the only one."""
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def beside(value: float, exact: float | None) -> str:
    """A time or a size, and how many times exact training's, or which part of it."""
    if not exact:
        return f"{value:.3g}"
    part = f"x{value / exact:.2f}" if value >= exact else f"1/{exact / max(value, 1e-3):.2g}"
    return f"{value:.3g} ({part})"


def print_results(title: str, cases: Sequence[Case], results: Results) -> None:
    """The table: a line a variant and network."""
    gpu = cases[0].device.startswith("cuda")
    headings = ("test, %", "ms a step", "stored, MB", "peak, MB", *(() if gpu else ("default, MB",)))
    table = common.table(title, "", *headings)
    for network in dict.fromkeys(case.network_label for case in cases):
        table.add_section()
        table.add_row(network, style="bold")
        exact: dict[str, float] = {}
        for case in cases:
            if case.network_label != network:
                continue
            runs, memory = results.runs[case], results.memory[case]
            values = {"ms": statistics.median(run.step_ms for run in runs), "stored": memory.stored / 1e6,
                      "peak": memory.peak / 1e6}
            cells = [beside(value, exact.get(name)) for name, value in values.items()]
            cells += [] if gpu else [f"{memory.default_peak / 1e6:.3g}"]
            accuracy = spread([run.test_accuracy[-1] for run in runs])
            table.add_row(VARIANTS[case.variant].label, accuracy, *cells)
            if case.variant == "exact":
                exact = values
    console.print(table)
    note = (
        "Stored: what autograd keeps for the backward pass (lowmem.ledger). Peak: beyond weights, gradients and "
        f"optimizer, over {MEMORY_STEPS} steps in a process for each variant, by torch's allocator"
    )
    if not gpu:
        note = note.replace("torch's allocator", "the operating system") + (
            f", with {'='.join(GIVE_BACK)}. Default: the same with malloc as it is, which keeps freed tensors"
        )
    console.print(
        f"{note}. In brackets: beside exact. With checkpoint, batch norms' running statistics move twice a step; its "
        "weights are those of exact.\n",
        style="dim",
    )


def plot(path: Path, title: str, cases: Sequence[Case], results: Results) -> None:
    """A row for each network: test accuracy and train loss over the steps, memory and time as bars."""
    networks = list(dict.fromkeys(case.network_label for case in cases))
    size = 16, 3.7 * len(networks)
    figure, axes = plt.subplots(len(networks), 4, figsize=size, squeeze=False, layout="constrained")
    for (accuracy, loss, memory, times), network in zip(axes, networks, strict=True):
        chosen = [case for case in cases if case.network_label == network]
        labels = [VARIANTS[case.variant].label for case in chosen]
        colours = [VARIANTS[case.variant].colour for case in chosen]
        for case, label, colour in zip(chosen, labels, colours, strict=True):
            runs = results.runs[case]
            for axis, curves in (
                (accuracy, np.array([run.test_accuracy for run in runs])),
                (loss, np.array([run.train_loss for run in runs])),
            ):
                axis.plot(runs[0].steps, curves.mean(0), label=label, color=colour, linewidth=1.6)
                axis.fill_between(runs[0].steps, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
        accuracy.set(title=f"{network}: test accuracy, %", xlabel="step")
        loss.set(title="train loss", xlabel="step", yscale="log")
        accuracy.legend(frameon=False, loc="lower right")
        places = range(len(chosen))
        measured = [results.memory[case] for case in chosen]
        for offset, values, alpha in (
            (-0.2, [one.stored / 1e6 for one in measured], 1.0),
            (0.2, [one.peak / 1e6 for one in measured], 0.4),
        ):
            bars = memory.bar([place + offset for place in places], values, 0.38, color=colours, alpha=alpha)
            memory.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=7)
        memory.set(title="memory of a step, MB: stored, and peak (pale)")
        values = [statistics.median(run.step_ms for run in results.runs[case]) for case in chosen]
        times.bar_label(times.bar(places, values, 0.6, color=colours), [f"{value:.3g}" for value in values], fontsize=7)
        times.set(title="ms a step")
        for axis in (memory, times):
            axis.set_xticks(list(places), labels, rotation=20)
    figure.suptitle(title, fontsize=10)
    common.save(figure, path)


# --- error of gradients by depth --------------------------------------------------------------------------------------


def run_audit(options: argparse.Namespace, name: str, sets: tuple[data.Set, data.Set]) -> None:
    """Table of the errors of the convolutions' weight gradients at initialisation."""
    (images, labels), _ = sets
    widths = options.widths or RECIPES["full"].widths
    batch = options.batch or AUDIT_BATCH
    layout = MEMORY_FORMATS[options.layout]
    console.print(
        f"Error of the gradients of pre-activation ResNets of depth {', '.join(map(str, AUDIT_DEPTHS))} at "
        f"initialisation: {batch} images of {name}, {seeds_label(options.seeds)}, {options.layout}. "
        "About a minute on two cores."
    )

    def measure(depth: int, seed: int, method: str, bits: int) -> list[dict[str, Any]]:
        torch.manual_seed(seed)
        model = models.preact_resnet(
            depth, in_channels=images.shape[1], num_classes=int(labels.max()) + 1, widths=widths
        ).to(options.device, memory_format=layout)
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:batch]
        examples = images[rows].to(options.device, memory_format=layout), labels[rows].to(options.device)
        errors = lowmem.gradient_audit(model, audit_loss, examples, bits=bits, method=method)
        return [dataclasses.asdict(error) for error in errors]

    record = common.Record(options.out / "lowmem_audit.json")
    found: dict[tuple[int, str], list[list[dict[str, Any]]]] = {}
    with common.progress(len(options.seeds) * len(AUDIT_METHODS) * sum(AUDIT_DEPTHS)) as bar:
        for depth in AUDIT_DEPTHS:
            for seed in options.seeds:
                for method, bits in AUDIT_METHODS:
                    bar.label(f"depth {depth}, seed {seed}, {method}({bits})")
                    key = {"data": name, "depth": depth, "widths": widths, "batch": batch, "seed": seed,
                           "method": method, "bits": bits, "layout": options.layout,
                           "device": options.device}
                    arguments = depth, seed, method, bits
                    errors = record.run(key, lambda arguments=arguments: measure(*arguments))
                    found.setdefault((depth, method), []).append([e for e in errors if "conv" in e["name"]])
                    bar.advance(depth)
    headings = ("all", "first quarter", "last quarter", "largest", "cosine")
    table = common.table("Error of the convolutions' weight gradients, as a part of the gradient's norm", "", *headings)
    for depth in AUDIT_DEPTHS:
        table.add_section()
        table.add_row(f"ResNet-{depth}", style="bold")
        for method, bits in AUDIT_METHODS:
            runs = found[depth, method]
            quarter = len(runs[0]) // 4
            table.add_row(
                f"{method}({bits})",
                spread([statistics.fmean(e["relative"] for e in errors) for errors in runs], 3),
                spread([statistics.fmean(e["relative"] for e in errors[:quarter]) for errors in runs], 3),
                spread([statistics.fmean(e["relative"] for e in errors[-quarter:]) for errors in runs], 3),
                spread([max(e["relative"] for e in errors) for errors in runs], 3),
                spread([statistics.fmean(e["cosine"] for e in errors) for errors in runs], 4),
            )
    console.print(table)
    console.print(f"written: {record.path}")


def audit_loss(model: nn.Module, examples: Any) -> Tensor:
    """Cross-entropy of a batch."""
    x, labels = examples
    return F.cross_entropy(model(x), labels)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; what is not given depends on the data and the recipe."""
    parser = common.arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="Fashion-MNIST")
    parser.add_argument("--data", choices=data.ALL_DATASETS, help="default mnist5k, with --full fashion")
    parser.add_argument("--recipe", choices=tuple(RECIPES), help="default quick for digits and mnist5k, else full")
    parser.add_argument("--audit", action="store_true", help="only the error of gradients of ResNets by depth")
    parser.add_argument("--network", nargs="+", choices=("resnet", "vgg"), help="default both; paper: resnet")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), metavar="NAME",
                        default=list(DEFAULT_VARIANTS),
                        help=f"of {', '.join(VARIANTS)} (s: stochastic rounding)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each a run of every variant")
    for field in dataclasses.fields(Recipe):
        name = f"--{field.name.replace('_', '-')}"
        if field.name == "widths":
            parser.add_argument(name, nargs=3, type=common.positive, metavar="W", help="of both networks' groups")
        elif field.type in ("int", "float"):
            kind = common.positive if field.type == "int" else float
            parser.add_argument(name, type=kind, help="in place of the recipe's")
    parser.add_argument("--layout", choices=tuple(MEMORY_FORMATS),
                        help="default channels_last on CPUs, which makes exact training faster")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = common.parse(parser)
    options.asked = options.data is not None
    options.data = options.data or ("fashion" if options.full else "mnist5k")
    options.recipe = options.recipe or ("quick" if options.data in ("digits", "mnist5k") else "full")
    options.network = options.network or (["resnet"] if options.recipe == "paper" else ["resnet", "vgg"])
    options.layout = options.layout or ("channels_last" if options.device == "cpu" else "contiguous")
    return options


def cases_of(options: argparse.Namespace, name: str, images: Tensor, classes: int) -> list[Case]:
    """The lines of the table."""
    recipe = dataclasses.asdict(RECIPES[options.recipe])
    given = {name: getattr(options, name, None) for name in recipe}
    recipe.update({name: value for name, value in given.items() if value is not None})
    common = dict(
        recipe, widths=tuple(recipe["widths"]), data=name, image=tuple(images.shape[1:]), classes=classes,
        layout=options.layout, device=options.device,
    )
    cases = [Case(**common, network=network, variant=v) for network in options.network for v in options.variants]
    if cases[0].batch > len(images):
        sys.exit(f"lowmem: --batch {cases[0].batch} is more than the {len(images)} training images")
    return cases


def make_runs(
    cases: Sequence[Case], seeds: Sequence[int], sets: tuple[data.Set, data.Set], record: common.Record
) -> Results:
    """What the record has, and what it lacks made, seeds outermost."""
    missing = [(case, seed) for seed in seeds for case in cases if training_key(case, seed) not in record]
    unmeasured = [case for case in cases if memory_key(case) not in record]
    with console.status("timing a few steps of each variant"):
        step_s = {case: probe(case) for case in dict.fromkeys(case for case, _ in missing)}
    # Evaluation has no backward pass: a third of a step's time for as many images.
    evaluated = len(sets[1][0]) + (CURVE_POINTS - 1) * min(CURVE_IMAGES, len(sets[1][0]))
    cost_s = {case: s * (1 + evaluated / (3 * case.batch * case.steps)) for case, s in step_s.items()}  # of a step
    total_s = MEMORY_S * len(unmeasured) + sum(cost_s[case] * case.steps for case, _ in missing)
    console.print(
        f"{len(missing)} runs to make, {len(cases) * len(seeds) - len(missing)} there already: about "
        f"{duration(total_s)} on this machine. Results so far are kept when you interrupt it."
    )
    results = Results()
    with common.progress(total_s) as bar:
        for case in cases:
            bar.label(f"memory: {case.network}, {VARIANTS[case.variant].label}")
            found = record.run(memory_key(case), lambda case=case: dataclasses.asdict(memory_of(case)))
            results.memory[case] = Memory(**found)
            bar.advance(MEMORY_S * (case in unmeasured))
        for seed in seeds:
            for case in cases:
                bar.label(f"{case.network}, {VARIANTS[case.variant].label}, seed {seed}")

                def make(case: Case = case, seed: int = seed) -> dict[str, Any]:
                    return dataclasses.asdict(train(case, seed, sets, lambda: bar.advance(cost_s[case])))

                results.runs.setdefault(case, []).append(Run(**record.run(training_key(case, seed), make)))
    return results


def compare(options: argparse.Namespace, name: str, sets: tuple[data.Set, data.Set]) -> None:
    """The comparison: makes the runs, prints and plots."""
    images, labels = sets[0]
    cases = cases_of(options, name, images, int(labels.max()) + 1)
    first = cases[0]
    title = (
        f"{name}: {first.steps} steps of {first.batch} of {len(images)} images "
        f"({first.steps * first.batch / len(images):.2g} epochs), {seeds_label(options.seeds)}"
    )
    kinds = {"resnet": "pre-activation", "vgg": "batch norm"}
    networks = " and ".join(dict.fromkeys(f"{case.network_label} ({kinds[case.network]})" for case in cases))
    widths = "-".join(map(str, first.widths))
    variants = ", ".join(VARIANTS[name].label for name in options.variants)
    console.print(
        f"{title}.\n{networks}, widths {widths}; activations: {variants}. On {options.device}, {options.threads} "
        f"threads, {options.layout}, level {common.environment()['isa']}."
    )
    on_device = tuple((x.to(options.device), y.to(options.device)) for x, y in sets)
    record = common.Record(options.out / "lowmem.json")
    results = make_runs(cases, options.seeds, on_device, record)  # type: ignore[arg-type]
    print_results(title, cases, results)
    picture = options.out / f"lowmem_{name}_{options.recipe}.png"
    plot(picture, title, cases, results)
    console.print(f"written: {record.path} (all runs and curves), {picture}")


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"lowmem: no device {options.device!r}: {str(error).splitlines()[0]}")
    for name, sets in common.load([options.data], options.root, asked=options.asked).items():
        (run_audit if options.audit else compare)(options, name, sets)


if __name__ == "__main__":
    common.start(main)
