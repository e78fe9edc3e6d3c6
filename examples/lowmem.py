"""Low-memory back-propagation: one network trained exactly, and with 4 bits an activation kept for the backward pass.

`lowmem.convert` rewrites the network's layers, `lowmem.saved_tensors` takes any network as it is. `pip install
".[examples]"` in the repository's folder brings what this needs. A plot goes to examples_out/. experiments/lowmem.py is
the comparison at full size, with times and the memory that the operating system sees.
"""

import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lowbit_ext import lowmem, models

OUT = Path("examples_out")
STEPS, BATCH = 100, 64


def train(network: nn.Module, images: Tensor, labels: Tensor, context: Any) -> tuple[list[float], lowmem.Ledger]:
    """Training losses, and what autograd kept for the backward pass of the last step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.Generator().manual_seed(0)  # the same batches for all
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=order)
        with lowmem.ledger(network) as book:
            with context():
                logits = network(images[batch])
            loss = F.cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, book


def main() -> None:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels, is_test = torch.from_numpy(digits.target), torch.arange(len(images)) % 5 == 0

    def network() -> nn.Module:
        torch.manual_seed(0)  # the same weights for all
        return models.preact_resnet(14, in_channels=1, num_classes=10, widths=(8, 16, 32))

    converted = lowmem.convert(network(), bits=4)
    print(f"converted: {sum(layer.converted for layer in lowmem.report(converted))} of the network's layers\n")
    runs = {
        "exact": (network(), contextlib.nullcontext),
        "convert, 4 bits": (converted, contextlib.nullcontext),
        "saved_tensors, 4 bits": (network(), lambda: lowmem.saved_tensors(bits=4)),
    }
    print(f"{'training':22} test accuracy   kept a step   of exact", flush=True)
    for name, (model, context) in runs.items():
        losses, book = train(model, images[~is_test], labels[~is_test], context)
        with torch.no_grad():
            accuracy = 100 * float((model.eval()(images[is_test]).argmax(1) == labels[is_test]).double().mean())
        kept = f"{book.stored / 1e6:.2f} MB   {book.stored / book.equivalent:8.3f}"
        print(f"{name:22} {accuracy:11.1f} % {kept:>24}", flush=True)
        plt.plot(losses, label=name, linewidth=1)
    plt.xlabel("step")
    plt.ylabel("training loss")
    plt.legend()
    OUT.mkdir(exist_ok=True)
    plt.savefig(OUT / "lowmem.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
