"""Cosine between straight-through and smoothed gradients, layer by layer: float, 2-bit, ternary and binary activations,
the latter with the surrogate derivatives that BinaryDuo's paper compares.

First on three-layer perceptrons that learn from a teacher, for several widths of the smoothing window, as in
BinaryDuo's analysis; then on a small convolutional network on real images, with a sample of each layer's weights.
`python experiments/gradient_mismatch.py` takes four minutes on two cores; a record and a plot go to --out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
from common import console, plt
from lowbit_ext.duo import StepActivation, TernaryActivation, gradient_mismatch


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
    "steep": lambda: StepActivation("steep"), "polynomial": lambda: StepActivation("polynomial"),
    "swish_sign": lambda: StepActivation("swish_sign"),
}
COLOURS = {"float": "#7f8c9a", "2-bit": "#2a8f5b", "ternary": "#1f5fa8", "binary": "#d1863a", "steep": "#e0b080",
           "polynomial": "#c8553d", "swish_sign": "#8c5a2a"}
FEATURES = 16
STUDENT_WEIGHTS = 2 * FEATURES**2 + FEATURES
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


def on_perceptrons(options: argparse.Namespace, record: common.Record, bar: common.Bar) -> dict[str, Any]:
    """Cosines by eps, activation and layer, one a student."""

    def cosines_of(eps: float, activation: Callable[[], nn.Module], seed: int) -> list[float]:
        x = torch.randn(options.samples, FEATURES, generator=torch.Generator().manual_seed(seed))
        student = perceptron(activation, seed)
        with torch.no_grad():
            target = perceptron(_clip, 100 + seed)(x).double()
            student[-1].bias += (target - student(x)).mean()
        found = gradient_mismatch(student, F.mse_loss, (x, target), eps=eps, progress=bar.advance)
        return list(found.cosines.values())

    results: dict[str, Any] = {}
    for eps in WINDOWS:
        results[str(eps)] = {}
        for name, activation in ACTIVATIONS.items():
            bar.label(f"perceptrons, eps {eps}, {name}")
            cosines = []
            for seed in range(options.students):
                key = {"network": "perceptron", "eps": eps, "activation": name, "seed": seed,
                       "samples": options.samples}
                arguments = eps, activation, seed
                cosines.append(record.run(
                    key, lambda arguments=arguments: cosines_of(*arguments),
                    on_found=lambda: bar.advance(STUDENT_WEIGHTS),
                ))
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
    images: Tensor, labels: Tensor, options: argparse.Namespace, record: common.Record, bar: common.Bar
) -> dict[str, Any]:
    """Cosines by activation and layer, from a sample of the weights."""

    def cosines_of(activation: Callable[[], nn.Module]) -> list[float]:
        found = gradient_mismatch(
            network(activation, images), F.cross_entropy, (images[chosen], labels[chosen]), eps=options.eps,
            max_weights=options.weights, generator=torch.Generator().manual_seed(0), progress=bar.advance,
        )
        return [layer.cosine for layer in found.layers]

    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: options.images]
    results = {}
    for name, activation in ACTIVATIONS.items():
        bar.label(f"convolutions, {name}")
        key = {"network": "convolutions", "activation": name,
               **{name: getattr(options, name) for name in ("data", "images", "weights", "eps")}}
        results[name] = record.run(
            key, lambda activation=activation: cosines_of(activation),
            on_found=lambda: bar.advance(sampled_weights(images, options)),
        )
    return results


def sampled_weights(images: Tensor, options: argparse.Namespace) -> int:
    """Weights that are moved in a convolutional network."""
    layers = [value.numel() for value in network(_clip, images).parameters() if value.dim() > 1]
    return sum(min(options.weights, size) for size in layers)


def print_results(options: argparse.Namespace, perceptrons: dict[str, Any], images: dict[str, Any]) -> None:
    """One table for the perceptrons, one for the images."""
    title = f"Perceptrons, {options.samples} samples, mean of {options.students} students"
    table = common.table(title, "eps", "layer", *ACTIVATIONS)
    for eps, by_activation in perceptrons.items():
        for index, layer in enumerate(LAYERS):
            cells = [f"{statistics.fmean(by_activation[name][index]):.3f}" for name in ACTIVATIONS]
            table.add_row(eps, layer, *cells, end_section=index + 1 == len(LAYERS))
    console.print(table)
    title = (
        f"Convolutions on {options.data}, {options.images} images, up to {options.weights} weights a layer, "
        f"eps {options.eps}"
    )
    table = common.table(title, "layer", *ACTIVATIONS)
    for index in range(len(images["float"])):
        name = f"convolution {index + 1}" if index < 3 else "classifier"
        table.add_row(name, *(f"{images[kind][index]:.3f}" for kind in ACTIVATIONS))
    console.print(table)


def plot(path: Path, options: argparse.Namespace, perceptrons: dict[str, Any], images: dict[str, Any]) -> None:
    """Cosine by layer, one panel a window and one for the images."""
    panels = [(f"perceptrons, eps {eps}", {name: [statistics.fmean(c) for c in values] for name, values in by.items()})
              for eps, by in perceptrons.items()]
    panels.append((f"convolutions on {options.data}, eps {options.eps}", images))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, layout="constrained")
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for name, values in curves.items():
            axis.plot(range(1, len(values) + 1), values, "o-", color=COLOURS[name], label=name)
        axis.set(title=title, xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("cosine of straight-through and\nsmoothed gradient")
    axes[0].legend(frameon=False, loc="lower right")
    common.save(figure, path)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--samples", type=common.positive, default=16000, help="of the perceptrons' batch")
    parser.add_argument("--students", type=common.positive, default=3, help="perceptrons of other weights")
    parser.add_argument("--data", choices=data.DATASETS, default="mnist5k", help="of the convolutional networks")
    parser.add_argument("--images", type=common.positive, default=2000, help="batch of the convolutional networks")
    parser.add_argument("--weights", type=common.positive, default=40, help="weights sampled from each of their layers")
    parser.add_argument("--eps", type=float, default=0.1, help="window of the convolutional networks")
    return common.parse(parser)


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    (images, labels), _ = common.load([options.data], options.root, asked=True)[options.data]
    record = common.Record(options.out / "gradient_mismatch.json")
    students = len(WINDOWS) * options.students * STUDENT_WEIGHTS
    with common.progress(len(ACTIVATIONS) * (students + sampled_weights(images, options))) as bar:
        perceptrons = on_perceptrons(options, record, bar)
        found = on_images(images, labels, options, record, bar)
    picture = options.out / "gradient_mismatch.png"
    plot(picture, options, perceptrons, found)
    print_results(options, perceptrons, found)
    console.print(f"written: {record.path}, {picture}")


if __name__ == "__main__":
    common.start(main)
