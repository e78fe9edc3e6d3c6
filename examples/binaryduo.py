"""BinaryDuo: trains ternary activations, decouples each into two binary ones, the same function, fine-tunes and packs.

A baseline of as many binary weights trains with binary activations for as many epochs. `pip install ".[examples]"` in
the repository's folder brings what this needs. experiments/binaryduo.py is the comparison at full size.
"""

import signal
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lowbit_ext import binary, duo, models

OUT = Path("examples_out")
WIDTHS = (32, 32, 64, 64, 128, 128)
COUPLED_WIDTHS = (23, 23, 45, 45, 70, 128)  # 1/sqrt(2) or so: decoupling doubles the channels that a layer reads
COUPLED_EPOCHS, FINE_TUNING_EPOCHS = 6, 3


def train(network: nn.Module, data: tuple[Tensor, ...], epochs: int, rate: float) -> list[float]:
    """Test accuracy in percent after every epoch."""
    images, labels, test_images, test_labels = data
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curve = []
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(len(images)).split(32)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
        curve.append(accuracy(network, test_images, test_labels))
        print(f"  {curve[-1]:.1f} %", flush=True)
    return curve


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((network.eval()(images).argmax(1) == labels).double().mean())


def main() -> None:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels, is_test = torch.from_numpy(digits.target), torch.arange(len(images)) % 5 == 0
    data = images[~is_test], labels[~is_test], images[is_test], labels[is_test]
    shape = dict(in_channels=1, image_size=8)
    torch.manual_seed(0)
    print("baseline: binary activations", flush=True)
    baseline = train(models.vgg7("binary", widths=WIDTHS, **shape), data, COUPLED_EPOCHS + FINE_TUNING_EPOCHS, 3e-3)
    print("coupled: ternary activations", flush=True)
    network: nn.Module = models.vgg7("coupled", widths=COUPLED_WIDTHS, **shape)
    coupled = train(network, data, COUPLED_EPOCHS, 3e-3)
    network = duo.decouple(network.eval(), data[0][:4])
    print(f"decoupled: {accuracy(network, *data[2:]):.1f} % as it comes, now fine-tuned", flush=True)
    tuned = train(network, data, FINE_TUNING_EPOCHS, 1e-3)
    packed = binary.pack(network, data[0][:2])

    print(f"\n{'':24} epochs  test accuracy")
    print(f"{'binary baseline':24} {len(baseline):6} {baseline[-1]:12.1f} %")
    print(f"{'decoupled, fine-tuned':24} {len(coupled + tuned):6} {tuned[-1]:12.1f} %")
    print(f"{'packed':24} {'':6} {accuracy(packed, *data[2:]):12.1f} %")
    plt.plot(range(1, len(baseline) + 1), baseline, "o-", label="binary baseline")
    plt.plot(range(1, len(baseline) + 1), coupled + tuned, "o-", label="coupled, then decoupled")
    plt.xlabel("epoch")
    plt.ylabel("test accuracy, %")
    plt.legend()
    OUT.mkdir(exist_ok=True)
    plt.savefig(OUT / "binaryduo.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
