"""BinaryDuo on real images: coupled training, decoupling, fine-tuning, packing, beside a plain binary network.

The baseline trains a VGG-7 with step activations for all epochs. BinaryDuo trains a narrower one with ternary
activations for a part of them, decouples it into a network of step activations and as many parameters, and fine-tunes
that for the rest: the same number of steps, data and seeds. `python experiments/binaryduo.py` takes about two minutes
on two cores; `--data fashion --epochs 6 --seeds 0 1 2` is README's table. JSON, a plot and checkpoints go to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common
import data
from common import plt, spread
from inference import accuracy_percent, faster_layout, median_seconds, predict
from lowbit_ext import binary, duo, models
from training import train

PAPER_WIDTHS = (64, 64, 128, 128, 512, 512)
COUPLED_SHARE = 0.5**0.5  # of the hidden widths: as many parameters after decoupling
BASELINE, COUPLED, DECOUPLED, TUNED = "binary baseline", "coupled", "decoupled", "decoupled, fine-tuned"
PHASES = (BASELINE, COUPLED, DECOUPLED, TUNED)
COLOURS = dict(zip(PHASES, ("#7f8c9a", "#d1863a", "#8fbbe0", "#1f5fa8"), strict=True))
TIMED_BATCHES = (1, 64)
TIMING_S = 3.0
VALIDATION_PART = 6  # one image in six, when --search compares learning rates


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one phase trains."""

    epochs: int
    learning_rate: float
    optimizer: str
    schedule: str
    batch: int
    weight_decay: float


# --- networks ---------------------------------------------------------------------------------------------------------


def coupled_widths(widths: Sequence[int], size: int) -> tuple[int, ...]:
    """Widths of the coupled network for images of `size` pixels a side: as many binary weights after decoupling.

    1/sqrt(2) of the baseline's, but for the last hidden layer, which is not doubled. The layer before it, which reads
    the pixels, takes the width at which the number of weights is the baseline's, or just below (BinaryDuo: 336).
    """
    convs = [round(width * COUPLED_SHARE) for width in widths[:4]]
    pixels = (size // 8) ** 2

    def conv_weights(channels: Sequence[int], copies: int) -> int:
        return sum(9 * copies * before * after for before, after in pairwise(channels))

    baseline = conv_weights(widths[:4], 1) + widths[3] * pixels * widths[4] + widths[4] * widths[5]
    left = baseline - conv_weights(convs, 2)
    return (*convs, left // (2 * convs[3] * pixels + 2 * widths[5]), widths[5])


def build(stage: str, images: Tensor, options: argparse.Namespace, seed: int) -> nn.Module:
    """A VGG-7 of one stage for these images."""
    torch.manual_seed(seed)
    widths = tuple(round(width * options.width) for width in PAPER_WIDTHS)
    return models.vgg7(
        stage, in_channels=images.shape[1], image_size=images.shape[-1], num_classes=data.CLASSES,
        widths=coupled_widths(widths, images.shape[-1]) if stage == "coupled" else widths,
    ).to(memory_format=torch.channels_last)


def binary_parameters(model: nn.Module) -> int:
    """Number of weights that are one bit at inference."""
    kinds = (binary.BinaryConv2d, binary.BinaryLinear, duo.CoupledConv2d, duo.CoupledLinear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, kinds))


# --- training ---------------------------------------------------------------------------------------------------------


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    milestones = [steps * part // 100 for part in (60, 80)]  # as the paper's VGG: epochs 121 and 161 of 200
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)


def fit(
    model: nn.Module, phase: str, recipe: Recipe, sets: tuple[data.Set, data.Set], seed: int, key: dict[str, Any],
    options: argparse.Namespace, bar: common.Bar,
) -> list[float]:
    """Trains or goes on from the checkpoint under `key`; returns the test accuracy in percent after every epoch."""
    count = len(sets[0][0])
    label = f"seed {seed}, {phase}"
    optimizer = _optimizer(model, recipe)
    key = {"phase": phase, **dataclasses.asdict(recipe), "seed": seed, "data": options.data, "images": count,
           "width": options.width, **key}
    bar.label(label)
    return train(
        model, optimizer, _schedule(optimizer, recipe, count // recipe.batch * recipe.epochs), sets,
        epochs=recipe.epochs, batch=recipe.batch,
        orders=(torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
                for epoch in itertools.count()),
        checkpoint=common.checkpoint(options.out, f"binaryduo_{options.data}_seed{seed}_{phase.split()[-1]}", key),
        on_step=bar.advance,
        on_epoch=lambda curve: bar.label(f"{label}: epoch {len(curve)}, {curve[-1]:.1f} %"),
    )["test_accuracy_percent"]


def recipes(options: argparse.Namespace) -> dict[str, Recipe]:
    """Of the three trained phases; coupled and fine-tuned have the baseline's number of epochs together."""
    fine_tune = max(1, round(options.epochs * options.fine_tune_part))
    common = (options.optimizer, options.schedule, options.batch, options.weight_decay)
    return {
        BASELINE: Recipe(options.epochs, options.learning_rate, *common),
        COUPLED: Recipe(options.epochs - fine_tune, options.coupled_learning_rate, *common),
        TUNED: Recipe(fine_tune, options.fine_tune_learning_rate, *common),
    }


def run_seed(
    seed: int, sets: tuple[data.Set, data.Set], options: argparse.Namespace, bar: common.Bar
) -> tuple[dict[str, Any], nn.Module]:
    """Both arms with one seed: accuracies, curves and, as a module, the fine-tuned network."""
    images, (test_images, test_labels) = sets[0][0], sets[1]
    chosen = recipes(options)
    baseline = build("binary", images, options, seed)
    curves = {BASELINE: fit(baseline, BASELINE, chosen[BASELINE], sets, seed, {}, options, bar)}
    coupled = build("coupled", images, options, seed)
    curves[COUPLED] = fit(coupled, COUPLED, chosen[COUPLED], sets, seed, {}, options, bar)
    network = duo.decouple(coupled.eval(), images[:4])
    before = predict(network, test_images)
    agreeing = int((before == predict(coupled, test_images)).sum())
    curves[DECOUPLED] = [accuracy_percent(before, test_labels)]
    started_from = {"coupled": dataclasses.asdict(chosen[COUPLED])}
    curves[TUNED] = fit(network, TUNED, chosen[TUNED], sets, seed, started_from, options, bar)
    result = {
        "seed": seed,
        "curves": curves,
        "accuracy_percent": {phase: curve[-1] for phase, curve in curves.items()},
        "decoupled_predictions_as_coupled": agreeing,
        "binary_parameters": {BASELINE: binary_parameters(baseline), TUNED: binary_parameters(network)},
    }
    return result, network


# --- packing and speed ------------------------------------------------------------------------------------------------


def float_twin(images: Tensor, widths: Sequence[int]) -> nn.Sequential:
    """The baseline's layers in plain torch, with ReLU; batch norm, which inference folds away, is left out."""
    size = images.shape[-1]
    layers: list[nn.Module] = [nn.Conv2d(images.shape[1], widths[0], 3, padding=1), nn.ReLU()]
    for before, after in pairwise(widths[:4]):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        size //= 2
    layers += [nn.Flatten(), nn.Linear(widths[3] * size**2, widths[4]), nn.ReLU()]
    layers += [nn.Linear(widths[4], widths[5]), nn.ReLU(), nn.Linear(widths[5], data.CLASSES)]
    return nn.Sequential(*layers).eval()


def pack_and_time(network: nn.Module, widths: Sequence[int], images: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """The packed network, and seconds a batch of it, of the network it comes from and of the float twin."""
    network.eval()
    packed = binary.pack(network, images[:2])
    seconds: dict[str, Any] = {}
    with torch.inference_mode():
        twin = float_twin(images, widths)
        for batch in TIMED_BATCHES:
            x = images[:batch]
            last = x.contiguous(memory_format=torch.channels_last)
            calls = {"float twin": faster_layout(twin, x), "unpacked": lambda x=last: network(x),
                     "packed": lambda x=last: packed(x)}
            seconds[str(batch)] = median_seconds(calls, TIMING_S)
    return packed, seconds


def paper_network(images: Tensor) -> nn.Module:
    """A decoupled VGG-7 of the paper's widths, untrained, with batch norms that differ from channel to channel."""
    torch.manual_seed(0)
    network = models.vgg7("coupled", in_channels=images.shape[1], image_size=images.shape[-1])
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.5, 0.3)
        network(images[:64])  # running statistics
    return duo.decouple(network.eval(), images[:2])


# --- results ----------------------------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    """Accuracy by phase, then speed."""
    runs = results["runs"]
    table = common.table(results["title"], "", "epochs", "binary weights", "test accuracy, %", "by seed")
    chosen = results["recipes"]
    for phase in PHASES:
        values = [run["accuracy_percent"][phase] for run in runs]
        weights = runs[0]["binary_parameters"].get(phase)
        table.add_row(
            phase, str(chosen[phase]["epochs"]) if phase in chosen else "-", f"{weights:,}" if weights else "-",
            spread(values), " ".join(f"{value:.2f}" for value in values),
            style="bold" if phase in (BASELINE, TUNED) else "",
        )
    common.console.print(table)
    gains = [run["accuracy_percent"][TUNED] - run["accuracy_percent"][BASELINE] for run in runs]
    better = sum(gain > 0 for gain in gains)
    count, kept = results["test_images"], runs[0]["decoupled_predictions_as_coupled"]
    common.console.print(
        f"fine-tuned minus baseline: {spread(gains)} points; better with {better} of {len(runs)} seeds\n"
        f"identical predictions: decoupled and coupled {kept}, packed and fine-tuned "
        f"{results['identical_predictions']}, of {count} test images\n"
    )
    speed = common.table("Inference", "network", "batch", "float twin", "unpacked", "packed", "speed-up")
    for name, batches in results["seconds_per_batch"].items():
        for batch, times in batches.items():
            cells = [f"{1e3 * times[kind]:.3g} ms" for kind in ("float twin", "unpacked", "packed")]
            speed.add_row(name, batch, *cells, f"{times['float twin'] / times['packed']:.1f} x")
    common.console.print(speed)


def plot(path: Path, results: dict[str, Any]) -> None:
    """Test accuracy over the epochs of both arms, every seed thin and the mean thick."""
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    start = results["recipes"][COUPLED]["epochs"]
    for phase, offset in ((BASELINE, 0), (COUPLED, 0), (TUNED, start)):
        curves = np.array([run["curves"][phase] for run in results["runs"]])
        epochs = [offset + epoch + 1 for epoch in range(curves.shape[1])]
        for curve in curves:
            axes.plot(epochs, curve, color=COLOURS[phase], linewidth=0.7, alpha=0.4)
        label = f"{phase}: {float(curves[:, -1].mean()):.2f} %"
        axes.plot(epochs, curves.mean(0), "o-", color=COLOURS[phase], linewidth=2, markersize=3, label=label)
    lowest = min(min(run["curves"][BASELINE][1:] or run["curves"][BASELINE]) for run in results["runs"])
    highest = max(value for run in results["runs"] for curve in run["curves"].values() for value in curve)
    axes.set_ylim(max(0.0, min(lowest, highest - 8)), highest + 0.5)
    axes.axvline(start + 0.5, color="#bbbbbb", linestyle="--", linewidth=1)
    axes.annotate("decoupled", (start + 0.6, axes.get_ylim()[0]), fontsize=8, color="#888888", va="bottom")
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=results["title"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    common.save(figure, path)


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data", choices=data.DATASETS, default="mnist5k", help="dataset")
    parser.add_argument("--epochs", type=int, default=12,
                        help="of the baseline, and of coupled and fine-tuned together")
    parser.add_argument("--fine-tune-part", type=float, default=0.3, help="part of the epochs for fine-tuning")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each a run of both arms")
    parser.add_argument("--width", type=float, default=0.25, help="hidden widths as a part of the paper's")
    parser.add_argument("--batch", type=common.positive, default=128, help="images in a training step")
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="sgd: Nesterov momentum 0.9")
    parser.add_argument("--schedule", choices=("cosine", "step"), default="cosine", help="of the learning rate")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of the baseline")
    parser.add_argument("--coupled-learning-rate", type=float, default=1e-2, help="of the coupled network")
    parser.add_argument("--fine-tune-learning-rate", type=float, default=3e-3, help="of the decoupled network")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of all three")
    parser.add_argument("--search", nargs="+", type=float, metavar="RATE",
                        help="only compare these learning rates on a part of the training set")
    options = common.parse(parser)
    if options.epochs < 2:
        parser.error(f"--epochs must be at least 2, got {options.epochs}")
    if not 0 < options.fine_tune_part < 1:
        parser.error(f"--fine-tune-part must lie between 0 and 1, got {options.fine_tune_part}")
    return options


def search(options: argparse.Namespace, sets: tuple[data.Set, data.Set]) -> None:
    """Accuracy on held-out training images of every learning rate, for both arms alike. Test images are not touched."""
    images, labels = sets[0]
    held = torch.arange(len(images)) % VALIDATION_PART == 0
    parts = ((images[~held], labels[~held]), (images[held], labels[held]))
    steps = len(parts[0][0]) // options.batch
    table = common.table("Validation", "phase", "learning rate", "accuracy, %")
    phases = recipes(options)
    best: dict[str, tuple[float, float, nn.Module]] = {}
    with common.progress(steps * len(options.search) * sum(recipe.epochs for recipe in phases.values())) as bar:
        for phase, recipe in phases.items():
            for rate in options.search:
                started_from: dict[str, Any] = {}
                if phase == TUNED:
                    _, coupled_rate, coupled = best[COUPLED]
                    model: nn.Module = duo.decouple(coupled.eval(), images[:4])
                    coupled_recipe = dataclasses.replace(phases[COUPLED], learning_rate=coupled_rate)
                    started_from = {"coupled": dataclasses.asdict(coupled_recipe)}
                else:
                    model = build("binary" if phase == BASELINE else "coupled", images, options, 0)
                recipe = dataclasses.replace(recipe, learning_rate=rate)
                accuracy = fit(model, phase, recipe, parts, 0, started_from, options, bar)[-1]
                table.add_row(phase, f"{rate:g}", f"{accuracy:.2f}")
                if phase not in best or accuracy > best[phase][0]:
                    best[phase] = (accuracy, rate, model)
    common.console.print(table)


def run(options: argparse.Namespace, sets: tuple[data.Set, data.Set]) -> dict[str, Any]:
    """Trains, decouples, packs and measures."""
    start = time.perf_counter()
    test_images = sets[1][0]
    steps = len(sets[0][0]) // options.batch
    runs = []
    with common.progress(2 * options.epochs * steps * len(options.seeds)) as bar:
        for seed in options.seeds:
            result, network = run_seed(seed, sets, options, bar)
            runs.append(result)
        bar.label("packing and timing")
        widths = tuple(round(width * options.width) for width in PAPER_WIDTHS)
        packed, trained_seconds = pack_and_time(network, widths, test_images)
        identical = int((predict(packed, test_images) == predict(network, test_images)).sum())
        _, paper_seconds = pack_and_time(paper_network(test_images), PAPER_WIDTHS, test_images)
    shape = "x".join(str(size) for size in test_images.shape[1:])
    return {
        "title": f"VGG-7, widths {'-'.join(map(str, widths))}, on {options.data}",
        "options": common.plain(options),
        "environment": common.environment(),
        "recipes": {phase: dataclasses.asdict(recipe) for phase, recipe in recipes(options).items()},
        "test_images": len(test_images),
        "runs": runs,
        "identical_predictions": identical,
        "seconds_per_batch": {f"trained, {shape}": trained_seconds, f"paper's widths, {shape}": paper_seconds},
        "total_s": time.perf_counter() - start,
    }


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    sets = common.load([options.data], options.root, asked=True)[options.data]
    if options.search:
        return search(options, sets)
    results = run(options, sets)
    stem = options.out / f"binaryduo_{options.data}"
    common.write_json(stem.with_suffix(".json"), results)
    plot(stem.with_suffix(".png"), results)
    print_results(results)
    environment = results["environment"]
    common.console.print(
        f"threads {environment['threads']}, level {environment['isa']}, torch {environment['torch']}; "
        f"{results['total_s']:.0f} s; written: {stem}.json (recipes, curves), .png"
    )
    if results["identical_predictions"] != results["test_images"]:
        sys.exit("the packed network's predictions differ from the fine-tuned one's")


if __name__ == "__main__":
    common.start(main)
