"""Variational autoencoder with Bernoulli latent variables."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext.antithetic import multi_sample_bound
from lowbit_ext.antithetic.estimators import expectation

_SLOPE = 0.3  # of LeakyReLU


def _layers(sizes: list[int]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*modules[:-1])


def _log_likelihood(bits: Tensor, logits: Tensor) -> Tensor:
    """log of the probability of bits of 0 and 1 under independent Bernoullis, summed over the last dimension."""
    return (bits * logits - F.softplus(logits)).sum(-1)


class BernoulliVAE(nn.Module):
    """p(b) p(x | b) with Bernoulli latents b and pixels x, and the approximate posterior q(b | x).

    Args:
        pixels: number of binary observations a datum.
        latents: number of Bernoulli latents.
        hidden: widths of the hidden layers of the encoder, and reversed of the decoder; () is the linear model, (200,
            200) the nonlinear one of the papers. LeakyReLU of slope 0.3 between layers.
        mean: (pixels,) mean of the data, subtracted from the encoder's input; also the initial bias of the decoder.

    Attributes:
        prior_logits: (latents,) parameter, logits of p(b).

    Source:
        Dimitriev and Zhou, "ARMS", ICML 2021, experiments; Dong, Mnih and Tucker, "DisARM", NeurIPS 2020.
    """

    mean: Tensor

    def __init__(
        self, pixels: int, latents: int = 200, hidden: tuple[int, ...] = (), mean: Tensor | None = None
    ) -> None:
        super().__init__()
        self.encoder = _layers([pixels, *hidden, latents])
        self.decoder = _layers([latents, *reversed(hidden), pixels])
        self.prior_logits = nn.Parameter(torch.zeros(latents))
        mean_of_data = torch.zeros(pixels) if mean is None else mean.detach().to(self.prior_logits, copy=True)
        self.register_buffer("mean", mean_of_data)
        if mean is not None:
            with torch.no_grad():
                self.decoder[-1].bias.copy_(torch.logit(mean.float().clamp(1e-3, 1 - 1e-3)))  # type: ignore[operator]

    def encode(self, x: Tensor) -> Tensor:
        """Logits of q(b | x): (*batch, pixels) of 0 and 1 to (*batch, latents)."""
        return self.encoder(x - self.mean)

    def decode(self, b: Tensor) -> Tensor:
        """Logits of p(x | b): (*, latents) of 0 and 1 to (*, pixels)."""
        return self.decoder(2 * b - 1)

    def log_joint(self, x: Tensor, b: Tensor) -> Tensor:
        """log p(x, b), (samples, *batch), for b (samples, *batch, latents)."""
        return _log_likelihood(x, self.decode(b)) + _log_likelihood(b, self.prior_logits)

    def log_weight(self, x: Tensor, b: Tensor, logits: Tensor) -> Tensor:
        """log p(x, b) - log q(b | x), (samples, *batch), for b (samples, *batch, latents)."""
        return self.log_joint(x, b) - _log_likelihood(b, logits)

    def evidence_lower_bound(
        self, x: Tensor, n: int, estimator: str = "arms_d", *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Estimate of the evidence lower bound in nats, (*batch); to be maximised. Gradients by the estimator.

        Args:
            x: (*batch, pixels) of 0 and 1.
            n: samples.
            estimator: a name of lowbit_ext.antithetic.ESTIMATORS.
            generator: draws the samples.
        """
        logits = self.encode(x)
        # The score of log q has mean 0: log q may enter as a constant.
        constant = logits.detach()
        return expectation(lambda b: self.log_weight(x, b, constant), logits, n, estimator, generator=generator)

    def multi_sample_bound(
        self, x: Tensor, importance_samples: int, estimator: str = "arms_d", *, n: int = 2,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Importance-weighted bound in nats, (*batch): see lowbit_ext.antithetic.multi_sample_bound."""
        return multi_sample_bound(
            lambda b: self.log_joint(x, b), self.encode(x), importance_samples, estimator, n=n, generator=generator
        )

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixel probabilities given the likeliest latents of x, (*batch, pixels)."""
        return torch.sigmoid(self.decode((self.encode(x) > 0).to(x.dtype)))

    @torch.no_grad()
    def generate(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Pixel probabilities of `count` draws from the prior, (count, pixels)."""
        p = torch.sigmoid(self.prior_logits).expand(count, -1)
        return torch.sigmoid(self.decode(torch.bernoulli(p, generator=generator)))
