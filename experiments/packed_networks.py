"""Trains the published binary networks at small widths, packs them, and compares every prediction on the test set.

`python experiments/packed_networks.py` takes about ten minutes on two cores. A record of the runs and a plot go to
--out.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
from common import plt
from inference import accuracy_percent, predict
from lowbit_ext import binary, models

SIZE = 28  # of the images; smaller ones are enlarged


def scaled(width: float, *channels: int, multiple: int = 1) -> list[int]:
    """Numbers of channels, times `width`, as multiples of a number."""
    return [multiple * max(1, round(width * each / multiple)) for each in channels]


def _resnet18(width: float) -> dict[str, Any]:
    return {"stem": "cifar", "widths": scaled(width, 16, 32, 64, 128, multiple=4)}


# Options of each network, at so many times the standard width.
FAMILIES: dict[str, Callable[[float], dict[str, Any]]] = {
    "birealnet18": _resnet18,
    "reactnet18": _resnet18,
    "reactnet_a": lambda width: {"stem": "cifar", "width": scaled(width, 8)[0]},
    "quicknet": _resnet18,
    "binary_densenet28": lambda width: {"stem": "cifar", "width": scaled(width, 16, multiple=2)[0]},
    "meliusnet22": lambda width: {"stem": "cifar", "width": scaled(width, 16, multiple=16)[0]},
    "resnet20": lambda width: {"widths": scaled(width, 16, 32, 64)},
    "binary_vit": lambda width: {
        "image_size": SIZE, "patch_size": 4, "width": scaled(width, 96, multiple=4)[0], "depth": 4, "heads": 4,
    },
    "vgg7": lambda width: {"image_size": SIZE, "widths": scaled(width, 32, 32, 64, 64, 256, 256)},
    "resnet18": lambda width: {"stem": "cifar", "widths": scaled(width, 16, 32, 64, 128, 128)},
}


def enlarged(images: Tensor) -> Tensor:
    """Images of SIZE x SIZE pixels or more."""
    return images if images.shape[-1] >= SIZE else F.interpolate(images, size=(SIZE, SIZE), mode="bilinear")


def build(name: str, width: float, channels: int) -> nn.Module:
    """The binary network for images of so many channels."""
    return getattr(models, name)("binary", in_channels=channels, num_classes=data.CLASSES, **FAMILIES[name](width))


def train(
    model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace, bar: common.Bar
) -> list[float]:
    """Cross-entropy of every step, by Adam with a learning rate that falls to 0 along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    batch = min(options.batch, len(images))
    orders = (torch.randperm(len(images)).split(batch)[: len(images) // batch] for _ in itertools.count())
    losses = []
    model.train()
    for chosen in itertools.islice(itertools.chain.from_iterable(orders), options.steps):
        loss = F.cross_entropy(model(enlarged(images[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.advance()
    return losses


def layers_on_bits(model: nn.Module, packed: binary.PackedModel) -> tuple[int, int]:
    """Binary layers that the packed network runs on bits, and all."""
    kinds = (binary.BinaryConv2d, binary.BinaryLinear)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    left = {name for name, module in packed.body.named_modules() if isinstance(module, kinds)}
    return sum(name not in left for name in names), len(names)


def run(name: str, sets: tuple[data.Set, data.Set], options: argparse.Namespace, bar: common.Bar) -> dict[str, Any]:
    """Trains and packs one network."""
    (images, labels), (test_images, test_labels) = sets
    torch.manual_seed(options.seed)
    model = build(name, options.width, images.shape[1])
    start = time.perf_counter()
    losses = train(model, images, labels, options, bar)
    seconds = time.perf_counter() - start
    test_images = enlarged(test_images)
    expected = predict(model, test_images)
    equal = {}
    dtypes: dict[str, dict[str, Any]] = {"float32": {}}
    if "float_dtype" in inspect.signature(binary.pack).parameters:
        dtypes["bfloat16"] = {"float_dtype": torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says how many layers are on bits
        for dtype, packing in dtypes.items():
            packed = binary.pack(model, test_images[:1], **packing)
            equal[dtype] = int((predict(packed, test_images) == expected).sum())
    return {
        "losses": losses, "train_seconds": seconds, "test_images": len(test_labels), "equal_predictions": equal,
        "test_accuracy_percent": accuracy_percent(expected, test_labels),
        "layers_on_bits": layers_on_bits(model, packed),
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data", choices=data.DATASETS, help="dataset, default fashion")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME",
                        help="networks")
    parser.add_argument("--steps", type=common.positive, default=200, help="of training")
    parser.add_argument("--batch", type=common.positive, default=64, help="images in a step")
    parser.add_argument("--width", type=float, default=1.0, help="times the standard width")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate at the start")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the images")
    return common.parse(parser)


def plot(path: Any, results: dict[str, dict[str, Any]], title: str) -> None:
    """Training loss, averaged over a twentieth of the steps."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, result in results.items():
        losses = torch.tensor(result["losses"])
        window = math.ceil(len(losses) / 20)
        means = [part.mean().item() for part in losses.split(window)]
        axes.plot([window * (index + 0.5) for index in range(len(means))], means,
                  label=f"{name}, {result['test_accuracy_percent']:.1f} %")
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.legend(frameon=False, fontsize=8)
    common.save(figure, path)


def result_table(results: dict[str, dict[str, Any]], title: str) -> Any:
    """A line for every network."""
    dtypes = list(next(iter(results.values()))["equal_predictions"])
    headings = [f"equal, {dtype}" for dtype in dtypes]
    table = common.table(title, "network", "test accuracy", *headings, "layers on bits", "training")
    for name, result in results.items():
        equal = [f"{result['equal_predictions'][dtype]} of {result['test_images']}" for dtype in dtypes]
        bits, layers = result["layers_on_bits"]
        table.add_row(
            name, f"{result['test_accuracy_percent']:.2f} %", *equal, f"{bits} of {layers}",
            f"{result['train_seconds']:.0f} s",
        )
    return table


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    asked = options.data is not None
    ((source, sets),) = common.load([options.data or "fashion"], options.root, asked=asked).items()
    record = common.Record(options.out / "packed_networks.json")
    shapes = {name: getattr(options, name) for name in ("steps", "batch", "width", "lr", "seed")}
    results = {}
    with common.progress(options.steps * len(options.families)) as bar:
        for name in options.families:
            bar.label(f"train {name}")
            results[name] = record.run(
                {"network": name, "data": source, **shapes},
                lambda name=name: run(name, sets, options, bar),
                on_found=lambda: bar.advance(options.steps),
            )
    title = f"{options.steps} steps of {options.batch} on {source}"
    path = options.out / f"packed_networks_{source}.png"
    plot(path, results, title)
    common.console.print(result_table(results, title))
    common.console.print(f"written: {record.path}, {path}")
    different = [name for name, result in results.items()
                 if result["equal_predictions"]["float32"] != result["test_images"]]
    if different:
        sys.exit(f"the packed network's predictions differ from the trained one's: {', '.join(different)}")


if __name__ == "__main__":
    common.start(main)
