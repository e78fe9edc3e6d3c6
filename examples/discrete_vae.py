"""A variational autoencoder of digits with Bernoulli latents, trained with gradients of REINFORCE, LOORF and ARMS.

All take as many samples; the antithetic ones of ARMS have the least variance. `pip install ".[examples]"` in the
repository's folder brings what this needs. A plot goes to examples_out/. experiments/discrete_vae.py is the comparison
at full size.
"""

import signal
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lowbit_ext.models import BernoulliVAE

OUT = Path("examples_out")
ESTIMATORS = {"reinforce": "REINFORCE", "loorf": "LOORF", "arms_s": "ARMS, systematic"}
SAMPLES = 4  # of each estimate
STEPS = 400


def gradient_variance(model: BernoulliVAE, x: Tensor, estimator: str, repeats: int = 50) -> float:
    """Of the gradient of the encoder's last layer, summed over its weights."""
    weight = model.encoder[-1].weight
    gradients = [
        torch.autograd.grad(model.evidence_lower_bound(x, SAMPLES, estimator).mean(), weight)[0] for _ in range(repeats)
    ]
    return float(torch.stack(gradients).var(0).sum())


def train(images: Tensor, estimator: str) -> tuple[BernoulliVAE, list[float]]:
    """The model, and the evidence lower bound in nats, a mean over every 50 steps."""
    torch.manual_seed(0)
    model = BernoulliVAE(pixels=64, latents=50, hidden=(100,), mean=images.mean(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bounds: list[float] = []
    for _ in range(STEPS):
        x = torch.bernoulli(images[torch.randint(len(images), (50,))])  # grey values are probabilities
        bound = model.evidence_lower_bound(x, SAMPLES, estimator).mean()
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        bounds.append(bound.item())
    return model, [statistics.fmean(bounds[start : start + 50]) for start in range(0, STEPS, 50)]


def main() -> None:
    images = torch.from_numpy(load_digits().images).float().flatten(1) / 16
    figure, (curves, pictures) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    print(f"{'estimator':18} bound, nats", flush=True)
    for estimator, label in ESTIMATORS.items():
        model, bounds = train(images, estimator)
        print(f"{label:18} {bounds[-1]:11.2f}", flush=True)
        curves.plot(range(50, STEPS + 1, 50), bounds, "o-", label=label)
    x = torch.bernoulli(images[:50])
    variances = {estimator: gradient_variance(model, x, estimator) for estimator in ESTIMATORS}
    print("\nvariance of the gradient on the last model, LOORF's = 1")
    for estimator, label in ESTIMATORS.items():
        print(f"{label:18} {variances[estimator] / variances['loorf']:11.2f}")

    curves.set(xlabel="step", ylabel="evidence lower bound, nats")
    curves.legend()
    drawn = model.generate(40, generator=torch.Generator().manual_seed(0))
    pictures.imshow(drawn.view(5, 8, 8, 8).transpose(1, 2).reshape(40, 64).numpy(), cmap="gray_r")
    pictures.set(title="drawn from the model", xticks=[], yticks=[])
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "discrete_vae.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
