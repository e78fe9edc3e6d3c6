"""Quantile regression whose quantiles cannot cross: the last layer gives non-decreasing sequences by construction.

The progression of diabetes in 442 patients, nine quantiles from ten features, beside the same network with a linear
last layer. `pip install ".[examples]"` in the repository's folder brings what this needs. A plot goes to examples_out/.
experiments/constrained.py has projections, autoencoders and monotone regression.
"""

import signal
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from lowbit_ext import cone

OUT = Path("examples_out")
LEVELS = torch.linspace(0.1, 0.9, 9)
EPOCHS = 60


def pinball(quantiles: Tensor, target: Tensor) -> Tensor:
    """The loss that the quantiles of these levels minimise, (N, 9) and (N, 1)."""
    error = target - quantiles
    return torch.maximum(LEVELS * error, (LEVELS - 1) * error).mean()


def train(head: nn.Module, x: Tensor, y: Tensor) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            pinball(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return network


def main() -> None:
    x, y = (torch.from_numpy(array).float() for array in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)
    is_test = torch.arange(len(x)) % 4 == 0
    sequences = cone.monotone(len(LEVELS))  # y[0] <= y[1] <= ... <= y[8]
    print(f"the cone of the layer: {sequences.describe()}\n")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    print(f"{'last layer':12} test loss   crossing pairs   patients with one", flush=True)
    for axis, name in zip(axes, ("Linear", "ConeLinear"), strict=True):
        torch.manual_seed(0)
        head = nn.Linear(32, len(LEVELS)) if name == "Linear" else cone.ConeLinear(32, sequences)
        network = train(head, x[~is_test], y[~is_test])
        with torch.no_grad():
            quantiles = network(x[is_test])
        crossing = quantiles.diff(dim=1) < 0
        print(
            f"{name:12} {float(pinball(quantiles, y[is_test])):9.3f} {int(crossing.sum()):16} "
            f"{int(crossing.any(1).sum()):10} of {len(crossing)}",
            flush=True,
        )
        order = quantiles[:, 4].argsort()
        axis.plot(quantiles[order].numpy(), linewidth=1)
        axis.plot(y[is_test][order].numpy(), "k.", markersize=3)
        axis.set(title=name, xlabel="test patients, by predicted median")
    axes[0].set_ylabel("progression and its quantiles")
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "cone.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
