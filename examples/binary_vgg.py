"""Trains a binary VGG-style network and its float twin, packs the binary one and compares accuracy, speed and size.

python examples/binary_vgg.py                       # 5000 MNIST images, some minutes on two cores
python examples/binary_vgg.py --data cifar10 --root FOLDER --epochs 60
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit_ext
from lowbit_ext import binary

try:
    import matplotlib
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"binary_vgg: needs {error.name}: pip install rich matplotlib") from None

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

WIDTHS = (128, 128, 256, 256, 512, 512)
MODELS = ("float twin", "binary, float values", "binary, packed")
COLORS = ("#8a8f98", "#8fb8de", "#1f6fb2")


class FloatConv2d(nn.Sequential):
    """The twin of a BinaryConv2d: the same shape, hardtanh in place of the sign."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Hardtanh(), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))


def binary_conv(inputs: int, outputs: int) -> nn.Module:
    """A convolution of bits. A batch norm follows, so it needs no bias."""
    return binary.BinaryConv2d(inputs, outputs, 3, padding=1, bias=False)


def vgg(conv: Callable[[int, int], nn.Module], channels: int, size: int) -> nn.Sequential:
    """Float stem, five binary (or float) convolutions with pooling in front of batch norm, float classifier."""
    layers: list[nn.Module] = [nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0])]
    for index in range(1, len(WIDTHS)):
        layers.append(conv(WIDTHS[index - 1], WIDTHS[index]))
        if index % 2:
            layers.append(nn.MaxPool2d(2))
            size //= 2
        layers.append(nn.BatchNorm2d(WIDTHS[index]))
    return nn.Sequential(*layers, nn.Hardtanh(), nn.Flatten(), nn.Linear(WIDTHS[-1] * size**2, 10))


def train(name: str, model: nn.Module, split: data.Split, options: argparse.Namespace, progress: Progress) -> float:
    """Adam with a one-cycle learning rate; the same for all models. Returns the seconds it took."""
    images, labels = split
    steps = len(images) // options.batch
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps * options.epochs)
    order = torch.Generator().manual_seed(options.seed)
    bar = progress.add_task(f"training {name}", total=steps * options.epochs)
    model.train()
    start = time.perf_counter()
    for _ in range(options.epochs):
        for index in torch.randperm(len(images), generator=order)[: steps * options.batch].split(options.batch):
            loss = F.cross_entropy(model(data.to_float(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, description=f"training {name}: loss {loss.item():.3f}")
    model.eval()
    return time.perf_counter() - start


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Classes of all images."""
    return torch.cat([model(data.to_float(part)).argmax(1) for part in images.split(100)])


@torch.inference_mode()
def milliseconds_per_call(models: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, float]:
    """Median over blocks of calls that alternate between the models, so that a busy moment meets all of them."""
    blocks: dict[str, list[float]] = {name: [] for name in models}
    calls = {}
    for name, model in models.items():
        model(x)
        start = time.perf_counter()
        model(x)
        calls[name] = max(1, round(0.02 / (time.perf_counter() - start)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(blocks[name]) < 5:
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                model(x)
            blocks[name].append((time.perf_counter() - start) / calls[name])
    return {name: 1e3 * statistics.median(times) for name, times in blocks.items()}


def plot(results: dict[str, Any], path: Path) -> None:
    """Latency, accuracy and size of the three models, side by side."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(14, 4), layout="constrained")
    panels: list[tuple[str, dict[str, float], str]] = [
        (f"milliseconds, batch {batch}", values, "{:.2f}") for batch, values in results["milliseconds"].items()
    ]
    panels.append(("test accuracy, %", results["accuracy_percent"], "{:.1f}"))
    panels.append(("stored megabytes", {name: size / 1e6 for name, size in results["bytes"].items()}, "{:.2f}"))
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.bar(range(3), [values[name] for name in MODELS], color=COLORS, width=0.7)
        axis.bar_label(bars, fmt=form, padding=3)
        axis.set_title(title, fontsize=11)
        axis.set_xticks([])
        axis.margins(y=0.12)
    figure.legend(bars, MODELS, loc="outside lower center", ncols=3, frameon=False)
    speedups = " and ".join(f"{value:.0f}x" for value in results["speedup"].values())
    batches = " and ".join(results["speedup"])
    figure.suptitle(
        f"VGG-7 on {results['data']}: packed bits are {speedups} faster than float at batch {batches} "
        f"({results['threads']} threads)"
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=data.NAMES, default="mnist5k")
    parser.add_argument("--root", type=Path, help="folder of the files of fashion and cifar10")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("examples_out"))
    return parser.parse_args()


def main() -> None:
    """Trains, packs, measures, reports."""
    options = arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    console = Console()
    training, (test_images, test_labels) = data.load(options.data, options.root)
    channels, size = test_images.shape[1], test_images.shape[-1]
    options.out.mkdir(parents=True, exist_ok=True)

    networks = {"float twin": vgg(FloatConv2d, channels, size), "binary": vgg(binary_conv, channels, size)}
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        seconds = {name: train(name, model, training, options, progress) for name, model in networks.items()}

    packed = binary.pack(networks["binary"], data.to_float(test_images[:8]))
    file = options.out / f"binary_vgg_{options.data}.safetensors"
    binary.save(packed, file)
    models = dict(zip(MODELS, (networks["float twin"], networks["binary"], packed), strict=True))

    classes = {name: predict(model, test_images) for name, model in models.items()}
    equal = int((classes[MODELS[1]] == classes[MODELS[2]]).sum())
    with console.status("timing"):
        times = {
            str(batch): milliseconds_per_call(models, data.to_float(test_images[:batch]), seconds=6)
            for batch in (1, 32)
        }
    results = {
        "data": options.data,
        "train_images": len(training[0]),
        "test_images": len(test_images),
        "epochs": options.epochs,
        "threads": options.threads,
        "instruction_set": lowbit_ext.active_isa(),
        "torch": torch.__version__,
        "train_seconds": seconds,
        "accuracy_percent": {
            name: 100 * (found == test_labels).float().mean().item() for name, found in classes.items()
        },
        "predictions_equal": equal,
        "milliseconds": times,
        "speedup": {batch: values[MODELS[0]] / values[MODELS[2]] for batch, values in times.items()},
        "bytes": {
            name: sum(tensor.nbytes for tensor in model.state_dict().values())
            for name, model in list(models.items())[:2]
        }
        | {MODELS[2]: file.stat().st_size},
    }

    table = Table(title=f"VGG-7 {'-'.join(map(str, WIDTHS))} on {options.data}, {options.threads} threads")
    for heading in ("", "accuracy", "batch 1", "batch 32", "images/s", "stored", "trained in"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in MODELS:
        table.add_row(
            name,
            f"{results['accuracy_percent'][name]:.1f} %",
            f"{times['1'][name]:.2f} ms",
            f"{times['32'][name]:.1f} ms",
            f"{32e3 / times['32'][name]:.0f}",
            f"{results['bytes'][name] / 1e6:.2f} MB",
            f"{seconds['float twin' if name == MODELS[0] else 'binary']:.0f} s",
        )
    console.print(table)
    console.print(
        f"packed predicts like the model it was packed from on {equal} of {len(test_images)} images; it is "
        + " and ".join(
            f"{ratio:.1f}x faster than the float twin at batch {n}" for n, ratio in results["speedup"].items()
        )
    )
    stem = options.out / f"binary_vgg_{options.data}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, stem.with_suffix(".png"))
    console.print(f"wrote {stem}.json, {stem}.png and {file}")


if __name__ == "__main__":
    main()
