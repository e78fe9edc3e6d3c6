"""One training step of 14 networks that people train: memory, gradients and time with activations of a few bits.

Networks of timm, torchvision and transformers with random weights, on crops of scikit-learn's photographs or on bytes
of Python's own help texts: lowmem.convert, lowmem.saved_tensors and exact. What autograd keeps (lowmem.ledger), the
peak that the operating system sees in a process of its own, the cosine of all gradients with the exact ones, and the
time of a step. `python experiments/lowmem_models.py` takes about half an hour on two cores. `--rows` prints the rows of
docs/lowmem.md as well, with the times of steps that are made in turns. A record of all and a plot go to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import console, plt
from lowbit_ext import lowmem
from lowmem import GIVE_BACK, peak_bytes, reset_peak

TIMED_STEPS = 3
CASE_S = 20.0  # for the progress bar alone: what a case takes, more or less
VOCABULARY = 256  # bytes


# --- networks and data ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Network:
    """A network by the name that its library has for it.

    Attributes:
        library: "timm", "torchvision" or "transformers".
        goal: how many times less convert is to keep.
    """

    library: str
    name: str
    goal: float


NETWORKS = {
    "resnet50": Network("timm", "resnet50", 7), "densenet121": Network("timm", "densenet121", 7),
    "regnety_002": Network("timm", "regnety_002", 7), "vgg11_bn": Network("torchvision", "vgg11_bn", 7),
    "mobilenet_v2": Network("torchvision", "mobilenet_v2", 6),
    "mobilenetv3": Network("timm", "mobilenetv3_large_100", 6),
    "efficientnet_b0": Network("timm", "efficientnet_b0", 6), "googlenet": Network("torchvision", "googlenet", 6),
    "shufflenet": Network("torchvision", "shufflenet_v2_x1_0", 6),
    "squeezenet": Network("torchvision", "squeezenet1_1", 6), "convnext_tiny": Network("timm", "convnext_tiny", 5),
    "vit_tiny": Network("timm", "vit_tiny_patch16_224", 5), "bert": Network("transformers", "Bert", 5),
    "gpt2": Network("transformers", "GPT2", 5),
}
VARIANTS: dict[str, str] = {
    "exact": "#555555", "convert": "#1f5fa8", "convert, rest": "#8fbbe0", "saved_tensors": "#d1863a",
}


def library(name: str) -> Any:
    """The library, or the end of the process with one line. A torchvision for another torch raises RuntimeError."""
    try:
        module = importlib.import_module(name)
        if name == "transformers":  # which imports its models when they are asked for
            assert module.BertForMaskedLM
            assert module.GPT2LMHeadModel
        return module
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f'lowmem_models needs {name} ({reason}): pip install "lowbit-ext[models]"')


def build(network: Network) -> nn.Module:
    """The network with random weights, in training."""
    made = library(network.library)
    if network.library == "timm":
        return made.create_model(network.name).train()
    if network.library == "torchvision":
        # Not with the initialisation of the paper, whose random draws take minutes.
        options: dict[str, Any] = dict(aux_logits=False, init_weights=False) if network.name == "googlenet" else {}
        return getattr(made.models, network.name)(weights=None, **options).train()
    if network.name == "Bert":
        sizes = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
        return made.BertForMaskedLM(made.BertConfig(vocab_size=VOCABULARY, **sizes)).train()
    sizes = dict(n_embd=256, n_layer=4, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
    return made.GPT2LMHeadModel(made.GPT2Config(vocab_size=VOCABULARY, **sizes)).train()


def crops(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Pieces of scikit-learn's two photographs, of mean 0 and deviation 1 in every channel, and labels at random."""
    generator = np.random.default_rng(0)
    photographs = library("sklearn.datasets").load_sample_images().images
    images = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        y, x = (generator.integers(edge - size) for edge in photograph.shape[:2])
        images.append(torch.tensor(photograph[y : y + size, x : x + size] / 255.0, dtype=torch.float32))
    x = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return x, torch.from_numpy(generator.integers(1000, size=count))


def texts(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Bytes of Python's help texts, as input and as labels."""
    topics = importlib.import_module("pydoc_data.topics").topics
    content = "\n".join(topics[key] for key in sorted(topics)).encode()[: count * length]
    tokens = torch.tensor(list(content)).reshape(count, length)
    return tokens, tokens


# --- measurement ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with a way to store activations, and the batch."""

    network: str
    variant: str
    bits: int
    images: int
    size: int
    sequences: int
    length: int


@dataclasses.dataclass
class Result:
    """What a step costs, and how good its gradients are."""

    kept: int  # bytes that autograd keeps
    peak: int  # bytes beyond what was there before, by the operating system
    step_s: float
    cosine: float  # of all gradients with the exact ones
    relative: float
    same: bool  # whether the loss is the exact one to the bit
    converted: str  # layers of all


class Step:
    """Forward and backward passes of one variant."""

    def __init__(self, case: Case, variant: str) -> None:
        torch.manual_seed(0)
        self.model = build(NETWORKS[case.network])
        self.context: Callable[[], Any] = contextlib.nullcontext
        if variant.startswith("convert"):
            self.model = lowmem.convert(self.model, case.bits, rest="codes" if "rest" in variant else "exact")
        elif variant == "saved_tensors":
            self.context = lambda: lowmem.saved_tensors(case.bits)
        is_text = NETWORKS[case.network].library == "transformers"
        self.batch = texts(case.sequences, case.length) if is_text else crops(case.images, case.size)

    def loss(self) -> Tensor:
        """With the same dropout every time."""
        torch.manual_seed(1)
        x, labels = self.batch
        with self.context():
            if x.dtype == torch.int64:
                return self.model(x, labels=labels).loss
            return F.cross_entropy(self.model(x), labels)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The loss, and all gradients in one vector."""
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return loss.detach(), torch.cat([grad.flatten() for grad in grads]).double()


def measure(case: Case, threads: int) -> dict[str, Any]:
    """For a fresh process, in which the peak is that of this case."""
    torch.set_num_threads(threads)
    step = Step(case, case.variant)
    whole = step.batch
    step.batch = (whole[0][:2], whole[1][:2])
    step.gradients()  # makes gradients, and what libraries allocate once
    step.batch = whole
    before = reset_peak("cpu")
    step.loss().backward()
    peak = peak_bytes("cpu") - before
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step.loss().backward()
        times.append(time.perf_counter() - start)
    with lowmem.ledger(step.model) as book:
        step.loss()
    loss, found = step.gradients()
    exact_loss, exact = Step(case, "exact").gradients()
    converted = ""
    if case.variant.startswith("convert"):
        entries = lowmem.report(step.model)
        converted = f"{sum(entry.converted for entry in entries)} of {len(entries)}"
    return dataclasses.asdict(Result(
        book.stored, peak, statistics.median(times), float(F.cosine_similarity(found, exact, 0)),
        float((found - exact).norm() / exact.norm()), torch.equal(loss, exact_loss), converted,
    ))


def best_times(case: Case, threads: int) -> dict[str, float]:
    """The shortest of a few steps of each variant, made in turns, so that all meet the same machine."""
    torch.set_num_threads(threads)
    steps = {variant: Step(case, variant) for variant in VARIANTS}
    best = dict.fromkeys(VARIANTS, math.inf)
    for turn in range(1 + TIMED_STEPS):
        for variant, step in steps.items():
            start = time.perf_counter()
            step.loss().backward()
            if turn:  # the first one allocates
                best[variant] = min(best[variant], time.perf_counter() - start)
    return best


def alone(function: Callable[[Case, int], dict[str, Any]], case: Case) -> dict[str, Any]:
    """A measurement in a process of its own, whose malloc gives back what is freed."""
    context, environment = multiprocessing.get_context("spawn"), dict(os.environ)
    with ProcessPoolExecutor(1, context) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: an interruption is for this process alone
        try:
            os.environ.update([GIVE_BACK])
            future = pool.submit(function, case, torch.get_num_threads())
        finally:
            os.environ.clear()
            os.environ.update(environment)
            signal.signal(signal.SIGINT, handler)
        return future.result()


# --- report -----------------------------------------------------------------------------------------------------------


def print_results(title: str, results: dict[tuple[str, str], Result], variants: list[str]) -> None:
    """A line a network and variant."""
    table = common.table(
        title, "", "layers", "kept, MB", "of exact", "goal", "peak, MB", "cosine", "ms a step", "of exact"
    )
    for network in dict.fromkeys(name for name, _ in results):
        table.add_section()
        exact = results[network, "exact"]
        for variant in variants:
            result = results[network, variant]
            table.add_row(
                f"{network}, {variant}", result.converted, f"{result.kept / 1e6:.1f}",
                f"1/{exact.kept / max(result.kept, 1):.1f}", f"1/{NETWORKS[network].goal:g}",
                f"{result.peak / 1e6:.0f}", f"{result.cosine:.4f}",
                f"{1e3 * result.step_s:.0f}", f"x{result.step_s / exact.step_s:.2f}",
            )
    console.print(table)
    other = [f"{network}, {variant}" for (network, variant), result in results.items() if not result.same]
    console.print("every loss is the exact one to the bit" if not other else f"another loss: {'; '.join(other)}")


_HEAD = (
    '| network | exact: kept, peak, MB | `convert`: kept, cosine | with `rest="codes"`: kept, peak, cosine, time '
    "| `saved_tensors`: kept, peak, cosine, time |", "| --- | --- | --- | --- | --- |",
)


def print_rows(results: dict[tuple[str, str], Result], times: dict[str, dict[str, float]]) -> None:
    """The rows of the table in docs/lowmem.md."""
    for row in _HEAD:
        print(row)
    for network, best in times.items():
        exact = results[network, "exact"]
        cells = [network, f"{exact.kept / 1e6:.0f}, {exact.peak / 1e6:.0f}"]
        for variant in (variant for variant in VARIANTS if variant != "exact"):
            found = results[network, variant]
            cosine = f"{found.cosine:.3f}".removeprefix("0")
            cell = [f"1/{exact.kept / max(found.kept, 1):.1f}", f"{found.peak / 1e6:.0f}", cosine]
            whole = [*cell, f"\u00d7{best[variant] / best['exact']:.2f}"]
            cells.append(", ".join((cell[0], cosine) if variant == "convert" else whole))
        print(f"| {' | '.join(cells)} |")


def plot(path: Any, title: str, results: dict[tuple[str, str], Result], variants: list[str]) -> None:
    """Kept memory and cosine by network."""
    networks = list(dict.fromkeys(name for name, _ in results))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    shown = [variant for variant in variants if variant != "exact"]
    height = 0.8 / max(len(shown), 1)
    for index, variant in enumerate(shown):
        places = [place + index * height for place in range(len(networks))]
        found = [results[network, variant] for network in networks]
        exact = [results[network, "exact"] for network in networks]
        times = [e.kept / max(r.kept, 1) for r, e in zip(found, exact, strict=True)]
        left.barh(places, times, height, color=VARIANTS[variant], label=variant)
        right.barh(places, [r.cosine for r in found], height, color=VARIANTS[variant])
    left.set_yticks([place + 0.4 - height / 2 for place in range(len(networks))], networks)
    left.invert_yaxis()
    left.set_xlabel("times less memory kept for the backward pass")
    right.set_xlabel("cosine of all gradients with the exact ones")
    right.axvline(0.97, color="#555555", linewidth=0.8)
    right.set_xlim(0.9, 1)
    left.legend(frameon=False)
    figure.suptitle(title)
    common.save(figure, path)


def main() -> None:
    """Command line entry."""
    parser = common.arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--images", type=common.positive, default=8, help="of a batch")
    parser.add_argument("--size", type=common.positive, default=224, help="of an image")
    parser.add_argument("--sequences", type=common.positive, default=8, help="of a batch")
    parser.add_argument("--length", type=common.positive, default=256, help="of a sequence, at most 256")
    parser.add_argument("--rows", action="store_true", help="print the rows of docs/lowmem.md, timed in turns")
    options: argparse.Namespace = common.parse(parser)
    for name in options.networks:
        library(NETWORKS[name].library)
    batch = dict(images=options.images, size=options.size, sequences=options.sequences, length=options.length)
    cases = [Case(n, v, options.bits, **batch) for n in options.networks for v in VARIANTS]
    record = common.Record(options.out / "lowmem_models.json")
    results: dict[tuple[str, str], Result] = {}
    times: dict[str, dict[str, float]] = {}
    timed = [Case(n, "times", options.bits, **batch) for n in options.networks] if options.rows else []
    with common.progress(CASE_S * len(cases + timed)) as bar:
        for case in cases:
            bar.label(f"{case.network}, {case.variant}")
            found = record.run(dataclasses.asdict(case), lambda case=case: alone(measure, case))
            results[case.network, case.variant] = Result(**found)
            bar.advance(CASE_S)
        for case in timed:
            bar.label(f"{case.network}, times")
            times[case.network] = record.run(dataclasses.asdict(case), lambda case=case: alone(best_times, case))
            bar.advance(CASE_S)
    title = (
        f"{options.bits} bits, one step of {options.images} photographs of {options.size}x{options.size} or "
        f"{options.sequences} texts of {options.length} bytes, {options.threads} threads"
    )
    print_results(title, results, list(VARIANTS))
    if options.rows:
        print_rows(results, times)
    picture = options.out / "lowmem_models.png"
    plot(picture, title, results, list(VARIANTS))
    console.print(f"written: {record.path} (all measurements), {picture}")


if __name__ == "__main__":
    common.start(main)
