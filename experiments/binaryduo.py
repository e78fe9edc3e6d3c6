"""BinaryDuo on real images: coupled training, decoupling, fine-tuning, packing, beside a plain binary network.

The baseline trains a VGG-7 with step activations for all epochs. BinaryDuo trains a narrower one with ternary
activations for a part of them, decouples it into a network of step activations and as many parameters, and fine-tunes
that for the rest: the same number of steps, data and seeds. `python examples/binaryduo.py` takes about two minutes on
two cores; `--data fashion --seeds 0 1 2` is the experiment of the README. Runs resume from --out where they stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import lowbit_ext
from inference import accuracy_percent, faster_layout, median_seconds, predict
from lowbit_ext import binary, duo, models

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f'examples/binaryduo.py needs {error.name}: pip install "lowbit-ext[examples]"')

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
    ).to(memory_format=torch.channels_last)  # fmt: skip


def binary_parameters(model: nn.Module) -> int:
    """Number of weights that are one bit at inference."""
    kinds = (binary.BinaryConv2d, binary.BinaryLinear, duo.CoupledConv2d, duo.CoupledLinear)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, kinds))


# --- training ---------------------------------------------------------------------------------------------------------


def _save(path: Path, state: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


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


def train(
    model: nn.Module, recipe: Recipe, sets: tuple[data.Set, data.Set], seed: int, checkpoint: Path, bar: Progress,
    task: Any, label: str,
) -> list[float]:  # fmt: skip
    """Trains or goes on from the checkpoint; returns the test accuracy in percent after every epoch."""
    (images, labels), (test_images, test_labels) = sets
    steps = len(images) // recipe.batch
    optimizer = _optimizer(model, recipe)
    schedule = _schedule(optimizer, recipe, steps * recipe.epochs)
    curve: list[float] = []
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != dataclasses.asdict(recipe):
            raise ValueError(f"binaryduo: {checkpoint} belongs to another recipe; choose another --out or remove it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        curve = state["curve"]
        bar.advance(task, steps * len(curve))
    for epoch in range(len(curve), recipe.epochs):
        model.train()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for chosen in order.split(recipe.batch)[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            bar.advance(task)
        curve.append(accuracy_percent(predict(model, test_images), test_labels))
        bar.update(task, description=f"{label}: epoch {epoch + 1}, {curve[-1]:.1f} %")
        state = {
            "recipe": dataclasses.asdict(recipe), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(), "curve": curve,
        }  # fmt: skip
        _save(checkpoint, state)
    return curve


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
    seed: int, sets: tuple[data.Set, data.Set], options: argparse.Namespace, bar: Progress, task: Any
) -> tuple[dict[str, Any], nn.Module]:
    """Both arms with one seed: accuracies, curves and, as a module, the fine-tuned network."""
    images, (test_images, test_labels) = sets[0][0], sets[1]
    chosen = recipes(options)
    stem = f"{options.data}_width{options.width:g}_epochs{options.epochs}_seed{seed}"

    def path(phase: str) -> Path:
        return options.out / "checkpoints" / f"{stem}_{phase.split()[-1]}.pt"

    def fit(phase: str, model: nn.Module) -> list[float]:
        return train(model, chosen[phase], sets, seed, path(phase), bar, task, f"seed {seed}, {phase}")

    baseline = build("binary", images, options, seed)
    curves = {BASELINE: fit(BASELINE, baseline)}
    coupled = build("coupled", images, options, seed)
    curves[COUPLED] = fit(COUPLED, coupled)
    network = duo.decouple(coupled.eval(), images[:4])
    before = predict(network, test_images)
    agreeing = int((before == predict(coupled, test_images)).sum())
    curves[DECOUPLED] = [accuracy_percent(before, test_labels)]
    curves[TUNED] = fit(TUNED, network)
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
                     "packed": lambda x=last: packed(x)}  # fmt: skip
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


def summary(values: Sequence[float]) -> str:
    """Mean and, over several seeds, the standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Accuracy by phase, then speed."""
    runs = results["runs"]
    table = Table(title=results["title"], box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for heading in ("", "epochs", "binary weights", "test accuracy, %", "by seed"):
        table.add_column(heading, justify="left" if not heading else "right")
    chosen = results["recipes"]
    for phase in PHASES:
        values = [run["accuracy_percent"][phase] for run in runs]
        weights = runs[0]["binary_parameters"].get(phase)
        table.add_row(
            phase, str(chosen[phase]["epochs"]) if phase in chosen else "-", f"{weights:,}" if weights else "-",
            summary(values), " ".join(f"{value:.2f}" for value in values),
            style="bold" if phase in (BASELINE, TUNED) else "",
        )  # fmt: skip
    console.print(table)
    gains = [run["accuracy_percent"][TUNED] - run["accuracy_percent"][BASELINE] for run in runs]
    better = sum(gain > 0 for gain in gains)
    count, kept = results["test_images"], runs[0]["decoupled_predictions_as_coupled"]
    console.print(
        f"fine-tuned minus baseline: {summary(gains)} points; better with {better} of {len(runs)} seeds\n"
        f"identical predictions: decoupled and coupled {kept}, packed and fine-tuned "
        f"{results['identical_predictions']}, of {count} test images\n",
        highlight=False,
    )
    speed = Table(title="Inference", box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for heading in ("network", "batch", "float twin", "unpacked", "packed", "speed-up"):
        speed.add_column(heading, justify="left" if heading == "network" else "right")
    for name, batches in results["seconds_per_batch"].items():
        for batch, times in batches.items():
            cells = [f"{1e3 * times[kind]:.3g} ms" for kind in ("float twin", "unpacked", "packed")]
            speed.add_row(name, batch, *cells, f"{times['float twin'] / times['packed']:.1f} x")
    console.print(speed)


def plot(path: Path, results: dict[str, Any]) -> None:
    """Test accuracy over the epochs of both arms, every seed thin and the mean thick."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    start = results["recipes"][COUPLED]["epochs"]
    for phase, offset in ((BASELINE, 0), (COUPLED, 0), (TUNED, start)):
        curves = torch.tensor([run["curves"][phase] for run in results["runs"]])
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
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # type: ignore[union-attr]
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", choices=data.DATASETS, default="mnist5k", help="dataset")
    parser.add_argument("--root", type=Path, help="folder of the files of fashion or cifar10")
    parser.add_argument("--epochs", type=int, default=12,
                        help="of the baseline, and of coupled and fine-tuned together")  # fmt: skip
    parser.add_argument("--fine-tune-part", type=float, default=0.3, help="part of the epochs for fine-tuning")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--width", type=float, default=0.25, help="hidden widths as a part of the paper's")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="sgd: Nesterov momentum 0.9")
    parser.add_argument("--schedule", choices=("cosine", "step"), default="cosine")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of the baseline")
    parser.add_argument("--coupled-learning-rate", type=float, default=1e-2)
    parser.add_argument("--fine-tune-learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--search", nargs="+", type=float, metavar="RATE",
                        help="only compare these learning rates on a part of the training set")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("examples_out"), help="folder for results and checkpoints")
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error(f"--epochs must be at least 2, got {options.epochs}")
    if not 0 < options.fine_tune_part < 1:
        parser.error(f"--fine-tune-part must lie between 0 and 1, got {options.fine_tune_part}")
    return options


def progress(console: Console) -> Progress:
    """The bar of a training."""
    columns = (TextColumn("{task.description:52}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=2)


def search(options: argparse.Namespace, sets: tuple[data.Set, data.Set], console: Console) -> None:
    """Accuracy on held-out training images of every learning rate, for both arms alike. Test images are not touched."""
    images, labels = sets[0]
    held = torch.arange(len(images)) % VALIDATION_PART == 0
    parts = ((images[~held], labels[~held]), (images[held], labels[held]))
    steps = len(parts[0][0]) // options.batch
    table = Table("phase", "learning rate", "validation accuracy, %", box=box.SIMPLE_HEAD)
    with progress(console) as bar:
        task = bar.add_task("", total=3 * len(options.search) * options.epochs * steps)
        best: dict[str, tuple[float, nn.Module]] = {}
        for phase in (BASELINE, COUPLED, TUNED):
            for rate in options.search:
                start = {BASELINE: "binary", COUPLED: "coupled"}
                if phase == TUNED:
                    model = duo.decouple(best[COUPLED][1].eval(), images[:4])
                else:
                    model = build(start[phase], images, options, 0)
                epochs = recipes(options)[phase].epochs
                recipe = dataclasses.replace(recipes(options)[phase], learning_rate=rate)
                path = options.out / "checkpoints" / f"search_{options.data}_{phase.split()[-1]}_{rate:g}.pt"
                accuracy = train(model, recipe, parts, 0, path, bar, task, f"{phase}, rate {rate:g}")[-1]
                bar.advance(task, (options.epochs - epochs) * steps)
                table.add_row(phase, f"{rate:g}", f"{accuracy:.2f}")
                if phase not in best or accuracy > best[phase][0]:
                    best[phase] = (accuracy, model)
    console.print(table)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Trains, decouples, packs and measures."""
    sets = data.load(options.data, options.root)
    (options.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    if options.search:
        search(options, sets, console)
        return None
    start = time.perf_counter()
    test_images = sets[1][0]
    steps = len(sets[0][0]) // options.batch
    runs = []
    with progress(console) as bar:
        task = bar.add_task("", total=2 * options.epochs * steps * len(options.seeds))
        for seed in options.seeds:
            result, network = run_seed(seed, sets, options, bar, task)
            runs.append(result)
        bar.update(task, description="packing and timing")
        widths = tuple(round(width * options.width) for width in PAPER_WIDTHS)
        packed, trained_seconds = pack_and_time(network, widths, test_images)
        identical = int((predict(packed, test_images) == predict(network, test_images)).sum())
        _, paper_seconds = pack_and_time(paper_network(test_images), PAPER_WIDTHS, test_images)
    shape = "x".join(str(size) for size in test_images.shape[1:])
    return {
        "title": f"VGG-7, widths {'-'.join(map(str, widths))}, on {options.data}",
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "recipes": {phase: dataclasses.asdict(recipe) for phase, recipe in recipes(options).items()},
        "threads": torch.get_num_threads(),
        "isa": lowbit_ext.active_isa(),
        "versions": {"lowbit_ext": lowbit_ext.__version__, "torch": torch.__version__},
        "test_images": len(test_images),
        "runs": runs,
        "identical_predictions": identical,
        "seconds_per_batch": {f"trained, {shape}": trained_seconds, f"paper's widths, {shape}": paper_seconds},
        "total_s": time.perf_counter() - start,
    }


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    console = Console()
    try:
        results = run(options, console)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(str(error))
    if results is None:
        return
    stem = options.out / f"binaryduo_{options.data}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(stem.with_suffix(".png"), results)
    print_results(console, results)
    console.print(
        f"threads {results['threads']}, level {results['isa']}, torch {results['versions']['torch']}; "
        f"{results['total_s']:.0f} s; written: {stem}.json (recipes, curves), .png",
        highlight=False,
    )
    if results["identical_predictions"] != results["test_images"]:
        sys.exit("the packed network's predictions differ from the fine-tuned one's")


if __name__ == "__main__":
    main()
