"""How far straight-through gradients are from the gradient of the smoothed loss, for three activations.

Perceptrons of three layers learn from a teacher. A cosine of 1 says that the straight-through gradient points where the
loss, smoothed over a window of width 2 eps, falls fastest. `pip install ".[examples]"` in the repository's folder
brings what this needs. A plot goes to examples_out/. experiments/gradient_mismatch.py has more windows, and images.
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext.duo import StepActivation, TernaryActivation, gradient_mismatch

OUT = Path("examples_out")
FEATURES, SAMPLES, EPS = 12, 2000, 0.1
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "float, clipped": lambda: nn.Hardtanh(0.0, 1.0), "ternary": TernaryActivation, "binary": StepActivation,
}


def perceptron(activation: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """12-12-12-1, its biases such that the activations' inputs are round 1/2."""
    torch.manual_seed(seed)
    first, second, last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 1)
    with torch.no_grad():
        for layer, deviation in ((first, 0.25), (second, 0.5), (last, 0.25)):
            layer.weight.normal_(0, deviation)
        first.bias.fill_(0.5)
        second.bias.copy_(0.5 - second.weight.sum(1) / 2)
    return nn.Sequential(first, activation(), second, activation(), last)


def main() -> None:
    x = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = perceptron(ACTIVATIONS["float, clipped"], seed=1)(x).double()
    print(f"cosine of the two gradients, {SAMPLES} samples, eps {EPS}")
    print(f"{'activation':16} layer 1  layer 2  layer 3", flush=True)
    for name, activation in ACTIVATIONS.items():
        found = gradient_mismatch(perceptron(activation, seed=0), F.mse_loss, (x, target), eps=EPS)
        cosines = list(found.cosines.values())
        print(f"{name:16}" + "".join(f"{cosine:8.3f} " for cosine in cosines), flush=True)
        plt.plot((1, 2, 3), cosines, "o-", label=name)
    plt.xticks((1, 2, 3))
    plt.xlabel("layer")
    plt.ylabel("cosine")
    plt.legend()
    OUT.mkdir(exist_ok=True)
    plt.savefig(OUT / "gradient_mismatch.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
