"""Trains a binary VGG, packs it, and compares it with its float twin: accuracy, speed, size.

`python experiments/binary_vgg.py` takes about three minutes on two cores. JSON, a plot, the packed model and
checkpoints go to --out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
import data
from common import plt
from inference import accuracy_percent, faster_layout, fold_batch_norm, median_seconds, predict
from lowbit_ext import binary
from training import train

with common.optional_packages():
    import safetensors.torch

# The float twin is trained if the run is then likely to end within this time.
TIME_LIMIT_S = 240.0
TIMING_S = 4.0
TIMED_BATCHES = (1, 64)
CONTENDERS = ("float twin", "binary, unpacked", "binary, packed")
COLOURS = dict(zip(CONTENDERS, ("#7f8c9a", "#8fbbe0", "#1f5fa8"), strict=True))

# --- networks ---------------------------------------------------------------------------------------------------------


def _stem(images: Tensor, width: int) -> nn.Conv2d:
    """The first convolution; large images are halved."""
    channels = images.shape[1]
    if images.shape[-1] > 16:
        return nn.Conv2d(channels, width, 5, stride=2, padding=2, bias=False)
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


def _body(width: int) -> list[tuple[int, int, bool]]:
    """Input channels, output channels and whether pooling follows, of every 3x3 convolution behind the first."""
    outputs = ((width, False), (2 * width, True), (2 * width, False), (4 * width, True), (4 * width, False))
    inputs = (width, *(channels for channels, _ in outputs))
    return [(before, after, pools) for before, (after, pools) in zip(inputs, outputs, strict=False)]


def _head(images: Tensor, features: list[nn.Module]) -> nn.Sequential:
    with torch.no_grad():
        size = nn.Sequential(*features).eval()(images[:1]).numel()
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(size, data.CLASSES)).to(memory_format=torch.channels_last)


def binary_vgg(images: Tensor, width: int) -> nn.Sequential:
    """VGG for images like these: every convolution but the first on bits. Each binary layer binarizes its own input."""
    layers: list[nn.Module] = [_stem(images, width), nn.BatchNorm2d(width)]
    for before, after, pools in _body(width):
        layers.append(binary.BinaryConv2d(before, after, 3, padding=1, bias=False))
        # Pooling ahead of batch norm: it then picks among the accumulator's many values instead of among signs.
        layers += [nn.MaxPool2d(2)] * pools
        layers.append(nn.BatchNorm2d(after))
    return _head(images, [*layers, nn.Hardtanh()])


def float_vgg(images: Tensor, width: int) -> nn.Sequential:
    """The same widths with float convolutions and ReLU, in the usual order, in which batch norm can be folded."""
    layers: list[nn.Module] = [_stem(images, width), nn.BatchNorm2d(width), nn.ReLU()]
    for before, after, pools in _body(width):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pools
    return _head(images, layers)


# --- training ---------------------------------------------------------------------------------------------------------


class TooSlow(Exception):
    """The training would take longer than allowed."""

    def __init__(self, expected_s: float) -> None:
        super().__init__(expected_s)
        self.expected_s = expected_s


def watch(bar: common.Bar, steps: int, limit_s: float) -> Callable[[int], None]:
    """Counts steps; raises TooSlow after six of a training from its start if all would take longer than limit_s."""
    done, warm = 0, 0.0

    def on_step(count: int) -> None:
        nonlocal done, warm
        bar.advance(count)
        done += count
        if done == 1:
            warm = time.perf_counter()
        elif done == 6 and count == 1 and (expected_s := (time.perf_counter() - warm) / 5 * steps) > limit_s:
            raise TooSlow(expected_s)

    return on_step


def fit(
    model: nn.Module, name: str, sets: tuple[data.Set, data.Set], options: argparse.Namespace, bar: common.Bar,
    limit_s: float = math.inf,
) -> dict[str, Any]:
    """Adam with a cosine schedule. What training.train returns, or expected_s where that is more than limit_s."""
    count = len(sets[0][0])
    batch = min(options.batch, count)
    steps = count // batch * options.epochs
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(options.seed)
    key = {name: getattr(options, name) for name in ("data", "epochs", "batch", "width", "seed")}
    bar.label(f"train {name}")
    try:
        return train(
            model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), sets,
            epochs=options.epochs, batch=batch,
            orders=(torch.randperm(count, generator=generator) for _ in itertools.count()),
            checkpoint=common.checkpoint(options.out, f"binary_vgg_{options.data}_{name.split()[0]}", key),
            on_step=watch(bar, steps, limit_s),
            on_epoch=lambda curve: bar.label(f"train {name}: epoch {len(curve)}, test {curve[-1]:.1f} %"),
        )
    except TooSlow as slow:
        return {"expected_s": slow.expected_s}


# --- timing -----------------------------------------------------------------------------------------------------------


def measure(twin: nn.Sequential, model: nn.Module, packed: nn.Module, images: Tensor) -> dict[str, float]:
    """Median seconds of one batch; the float twin in the faster of torch's two memory layouts."""
    channels_last = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        calls = (faster_layout(twin, images), lambda: model(channels_last), lambda: packed(channels_last))
        return median_seconds(dict(zip(CONTENDERS, calls, strict=True)), TIMING_S)


# --- results ----------------------------------------------------------------------------------------------------------


def result_table(results: dict[str, Any]) -> common.Table:
    """One column for each network."""
    table = common.table(results["title"], "", *CONTENDERS)
    table.columns[-1].style = "bold"

    def row(heading: str, values: dict[str, str], **style: Any) -> None:
        table.add_row(heading, *(values.get(name, "") for name in CONTENDERS), **style)

    float_name, unpacked, packed = CONTENDERS
    training, accuracy, count = results["training"], results["test_accuracy_percent"], results["test_images"]
    row("test accuracy", {name: f"{accuracy[name]:.1f} %" for name in accuracy}
        | ({} if float_name in accuracy else {float_name: "not trained"}))
    row("identical predictions", {packed: f"{results['identical_predictions']} of {count}"})
    row("... saved and loaded", {packed: f"{results['identical_after_loading']} of {count}"})
    row("training time", {name: f"{training[name]['seconds']:.0f} s" if "seconds" in training[name] else
        f"would be {training[name]['expected_s']:.0f} s" for name in training}, end_section=True)
    for batch, times in results["seconds_per_batch"].items():
        row(f"batch {batch}: latency", {name: f"{1e3 * times[name]:.3g} ms" for name in times})
        row("  throughput", {name: f"{int(batch) / times[name]:,.0f} images/s" for name in times})
        row("  speed-up",
            {name: f"{times[float_name] / times[name]:.1f} x" for name in (unpacked, packed)},
            end_section=True)
    stored = results["stored_bytes"]
    row("file", {name: f"{size / 1e6:.2f} MB" for name, size in stored.items()})
    row("smaller", {packed: f"{stored[float_name] / stored[packed]:.1f} x"})
    return table


def plot(path: Path, results: dict[str, Any]) -> None:
    """Test accuracy by epoch, and latency by batch size."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, training in results["training"].items():
        if "seconds" in training:
            values = training["test_accuracy_percent"]
            label = "binary" if name.startswith("binary") else name
            colour = COLOURS[CONTENDERS[-1] if label == "binary" else name]
            curves.plot(range(1, len(values) + 1), values, "o-", color=colour, label=f"{label}, {values[-1]:.1f} %")
    curves.set(xlabel="epoch", ylabel="test accuracy (%)", title="Training")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(axis="y", alpha=0.25)
    curves.legend(loc="lower right", frameon=False)

    spacing = 0.27
    timed = results["seconds_per_batch"]
    for offset, name in enumerate(CONTENDERS):
        positions = [index + (offset - 1) * spacing for index in range(len(timed))]
        milliseconds = [1e3 * times[name] / int(batch) for batch, times in timed.items()]
        drawn = bars.bar(positions, milliseconds, spacing * 0.92, color=COLOURS[name], label=name)
        labels = [f"{value:.0f}" if value >= 100 else f"{value:.2g}" for value in milliseconds]
        if name == CONTENDERS[-1]:
            speed_ups = [times[CONTENDERS[0]] / times[name] for times in timed.values()]
            labels = [f"{label}\n{speed_up:.0f}x faster" for label, speed_up in zip(labels, speed_ups, strict=True)]
        bars.bar_label(drawn, labels, padding=2, fontsize=9)
    bars.set_yscale("log")
    bars.margins(y=0.2)
    bars.set_xticks(range(len(timed)), [f"batch {batch}" for batch in timed])
    count = results["environment"]["threads"]
    threads = f"{count} thread{'s' if count > 1 else ''}"
    bars.set(ylabel="ms per image (log scale)", title=f"Inference, {threads}")
    bars.legend(frameon=False)
    figure.suptitle(results["title"])
    common.save(figure, path)


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data", choices=data.DATASETS, default="mnist5k", help="dataset")
    parser.add_argument("--epochs", type=common.positive, default=5, help="passes over the training set")
    parser.add_argument("--batch", type=common.positive, default=50, help="images in a training step")
    parser.add_argument("--width", type=common.positive, default=128,
                        help="channels of the first layer; the last has four times as many")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the images")
    return common.parse(parser)


def run(options: argparse.Namespace, sets: tuple[data.Set, data.Set]) -> dict[str, Any]:
    """Trains, packs, saves, loads and measures."""
    start = time.perf_counter()
    (train_images, _), (images, labels) = sets
    float_name, unpacked_name, packed_name = CONTENDERS

    def new_model(build: Callable[[Tensor, int], nn.Sequential]) -> nn.Sequential:
        torch.manual_seed(options.seed)
        return build(images, options.width)

    steps = len(train_images) // min(options.batch, len(train_images)) * options.epochs
    with common.progress(2 * steps) as bar:
        model, twin = new_model(binary_vgg), new_model(float_vgg)
        training = {unpacked_name: fit(model, "binary VGG", sets, options, bar)}
        predictions = predict(model, images)
        accuracy = {unpacked_name: accuracy_percent(predictions, labels)}

        packed = binary.pack(model, images[:1])
        packed_predictions = predict(packed, images)
        accuracy[packed_name] = accuracy_percent(packed_predictions, labels)
        path = options.out / f"binary_vgg_{options.data}.safetensors"
        binary.save(packed, path)
        loaded = binary.load(binary.pack(new_model(binary_vgg), images[:1]), path)
        identical, identical_loaded = (
            int((other == predictions).sum()) for other in (packed_predictions, predict(loaded, images))
        )

        timing_s = 2 * TIMING_S * len(TIMED_BATCHES)
        left_s = TIME_LIMIT_S - timing_s - (time.perf_counter() - start)
        training[float_name] = fit(twin, "float twin", sets, options, bar, left_s)
        if "seconds" in training[float_name]:
            accuracy[float_name] = accuracy_percent(predict(twin, images), labels)

        bar.label("time inference")
        seconds_per_batch = {
            str(batch): measure(twin, model.eval(), packed, images[:batch]) for batch in TIMED_BATCHES
        }
    float_bytes = len(safetensors.torch.save(
        {name: value.contiguous() for name, value in fold_batch_norm(twin).state_dict().items()}
    ))
    widths = "-".join(str(channels) for channels in (options.width, *(after for _, after, _ in _body(options.width))))
    return {
        "title": f"VGG {widths} on {options.data}",
        "options": common.plain(options),
        "environment": common.environment(),
        "train_images": len(train_images),
        "test_images": len(labels),
        "training": training,
        "test_accuracy_percent": accuracy,
        "identical_predictions": identical,
        "identical_after_loading": identical_loaded,
        "seconds_per_batch": seconds_per_batch,
        "stored_bytes": {float_name: float_bytes, packed_name: path.stat().st_size},
        "total_s": time.perf_counter() - start,
    }


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    results = run(options, common.load([options.data], options.root, asked=True)[options.data])
    stem = options.out / f"binary_vgg_{options.data}"
    common.write_json(stem.with_suffix(".json"), results)
    plot(stem.with_suffix(".png"), results)
    common.console.print(result_table(results))
    environment = results["environment"]
    notes = [
        f"threads {environment['threads']}, level {environment['isa']}, torch {environment['torch']}; medians of",
        "blocks in turns. Float twin: the same widths in float32 with ReLU, timed with batch norm folded and in the",
        "faster of torch's memory layouts.",
    ]
    if "expected_s" in results["training"][CONTENDERS[0]]:
        notes.append(f"The float twin was timed but not trained: the run would have passed {TIME_LIMIT_S:.0f} s.")
    common.console.print(*notes, style="dim")
    common.console.print(f"{results['total_s']:.0f} s; written: {stem}.json, .png, .safetensors")
    if min(results["identical_predictions"], results["identical_after_loading"]) != results["test_images"]:
        sys.exit("the packed model's predictions differ from the trained model's")


if __name__ == "__main__":
    common.start(main)
