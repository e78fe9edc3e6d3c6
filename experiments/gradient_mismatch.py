"""Cosine between straight-through and smoothed gradients, layer by layer: float, 2-bit, ternary and binary activations.

First on three-layer perceptrons that learn from a teacher, for several widths of the smoothing window, as in
BinaryDuo's analysis; then on a small convolutional network on real images, with a sample of each layer's weights.
`python examples/gradient_mismatch.py` takes about two minutes on two cores; table, JSON and plot go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from lowbit_ext.duo import StepActivation, TernaryActivation, gradient_mismatch

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f'examples/gradient_mismatch.py needs {error.name}: pip install "lowbit-ext[examples]"')


class TwoBitActivation(nn.Module):
    """0, 1/3, 2/3 or 1; straight-through where 0 < x < 1."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        clipped = x.clamp(0, 1)
        return clipped + (torch.round(3 * clipped) / 3 - clipped).detach()


def _clip() -> nn.Module:
    return nn.Hardtanh(0.0, 1.0)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "float": _clip, "2-bit": TwoBitActivation, "ternary": TernaryActivation, "binary": StepActivation,
}  # fmt: skip
COLOURS = {"float": "#7f8c9a", "2-bit": "#2a8f5b", "ternary": "#1f5fa8", "binary": "#d1863a"}
FEATURES = 16
LAYERS = ("first layer", "second layer", "third layer")
WINDOWS = (0.05, 0.1, 0.2)  # eps, in units of the weights


def perceptron(activation: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """16-16-16-1 with pre-activations round 1/2."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(FEATURES, FEATURES), activation(), nn.Linear(FEATURES, FEATURES), activation(), nn.Linear(FEATURES, 1)
    )
    first, _, second, _, last = model
    with torch.no_grad():
        for layer, deviation in ((first, 0.25), (second, 0.5), (last, 0.25)):
            layer.weight.normal_(0, deviation)
        first.bias.fill_(0.5)
        second.bias.copy_(0.5 - second.weight.sum(1) / 2)
        last.bias.zero_()
    return model


def on_perceptrons(samples: int, students: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """Cosines by eps, activation and layer, one a student."""
    results: dict[str, Any] = {}
    for eps in WINDOWS:
        results[str(eps)] = {}
        for name, activation in ACTIVATIONS.items():
            cosines = []
            for seed in range(students):
                x = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(seed))
                student = perceptron(activation, seed)
                with torch.no_grad():
                    target = perceptron(_clip, 100 + seed)(x).double()
                    student[-1].bias += (target - student(x)).mean()
                found = gradient_mismatch(student, F.mse_loss, (x, target), eps=eps, progress=advance)
                cosines.append(list(found.cosines.values()))
            results[str(eps)][name] = [list(values) for values in zip(*cosines, strict=True)]
    return results


def network(activation: Callable[[], nn.Module], images: Tensor) -> nn.Sequential:
    """Three convolutions and a classifier on images, batch norm before every activation."""
    torch.manual_seed(0)
    width = 16
    layers: list[nn.Module] = []
    for before, after in ((images.shape[1], width), (width, width), (width, width)):
        norm = nn.BatchNorm2d(after)
        nn.init.constant_(norm.bias, 0.5)
        nn.init.constant_(norm.weight, 0.5)
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), norm, activation()]
    with torch.no_grad():
        size = nn.Sequential(*layers)(images[:2])[0].numel()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, data.CLASSES))


def on_images(
    images: Tensor, labels: Tensor, weights: int, eps: float, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Cosines by activation and layer, from a sample of the weights."""
    results = {}
    for name, activation in ACTIVATIONS.items():
        found = gradient_mismatch(
            network(activation, images), F.cross_entropy, (images, labels), eps=eps, max_weights=weights,
            generator=torch.Generator().manual_seed(0), progress=advance,
        )  # fmt: skip
        results[name] = [layer.cosine for layer in found.layers]
    return results


def print_results(console: Console, results: dict[str, Any]) -> None:
    """One table for the perceptrons, one for the images."""
    options = results["options"]
    title = f"Perceptrons, {options['samples']} samples, mean of {options['students']} students"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for heading in ("eps", "layer", *ACTIVATIONS):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for eps, by_activation in results["perceptrons"].items():
        for index, layer in enumerate(LAYERS):
            cells = [f"{statistics.fmean(by_activation[name][index]):.3f}" for name in ACTIVATIONS]
            table.add_row(eps, layer, *cells, end_section=index + 1 == len(LAYERS))
    console.print(table)
    title = (
        f"Convolutions on {options['data']}, {options['images']} images, up to {options['weights']} weights a layer, "
        f"eps {options['eps']}"
    )
    table = Table("layer", title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for heading in ACTIVATIONS:
        table.add_column(heading, justify="right")
    for index in range(len(results["images"]["float"])):
        name = f"convolution {index + 1}" if index < 3 else "classifier"
        table.add_row(name, *(f"{results['images'][kind][index]:.3f}" for kind in ACTIVATIONS))
    console.print(table)


def plot(path: Path, results: dict[str, Any]) -> None:
    """Cosine by layer, one panel a window and one for the images."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    panels = [(f"perceptrons, eps {eps}", {name: [statistics.fmean(c) for c in values] for name, values in by.items()})
              for eps, by in results["perceptrons"].items()]  # fmt: skip
    panels.append((f"convolutions on {results['options']['data']}, eps {results['options']['eps']}", results["images"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, layout="constrained")
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for name, values in curves.items():
            axis.plot(range(1, len(values) + 1), values, "o-", color=COLOURS[name], label=name)
        axis.set(title=title, xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("cosine of straight-through and\nsmoothed gradient")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # type: ignore[union-attr]
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=16000, help="of the perceptrons' batch")
    parser.add_argument("--students", type=int, default=3, help="perceptrons of other weights")
    parser.add_argument("--data", choices=data.DATASETS, default="mnist5k")
    parser.add_argument("--root", type=Path, help="folder of the files of fashion or cifar10")
    parser.add_argument("--images", type=int, default=2000, help="batch of the convolutional networks")
    parser.add_argument("--weights", type=int, default=40, help="weights sampled from each of their layers")
    parser.add_argument("--eps", type=float, default=0.1, help="window of the convolutional networks")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("examples_out"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    try:
        (images, labels), _ = data.load(options.data, options.root)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(str(error))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: options.images]
    perceptron_weights = len(WINDOWS) * len(ACTIVATIONS) * options.students * (2 * FEATURES**2 + FEATURES)
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("perceptrons", total=perceptron_weights)
        perceptrons = on_perceptrons(options.samples, options.students, lambda count: bar.advance(task, count))
        layers = [value.numel() for value in network(_clip, images).parameters() if value.dim() > 1]
        total = len(ACTIVATIONS) * sum(min(options.weights, size) for size in layers)
        other = bar.add_task("convolutions", total=total)
        found = on_images(
            images[chosen], labels[chosen], options.weights, options.eps, lambda count: bar.advance(other, count)
        )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    results = {"options": settings, "perceptrons": perceptrons, "images": found}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / "gradient_mismatch"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(stem.with_suffix(".png"), results)
    print_results(console, results)
    console.print(f"written: {stem}.json, {stem}.png", highlight=False)


if __name__ == "__main__":
    main()
