"""Gradients of expectations over Bernoulli variables: from samples and values, or for a function in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.antithetic import ops
from lowbit_ext.antithetic.samples import AntitheticSamples, checked, sample

# Coupling of each estimator's samples.
ESTIMATORS = {
    "reinforce": "independent",
    "loorf": "independent",
    "disarm": "antithetic_pairs",
    "arms_d": "dirichlet",
    "arms_n": "gaussian",
    "arms_s": "systematic",
    "straight_through": "independent",
    "double_cv": "independent",
}


def _check_values(op: str, samples: AntitheticSamples, values: Any) -> None:
    samples = checked(op, samples)
    values = _arguments.tensor_like(op, "values", values, samples.logits)
    batch = samples.logits.shape[:-1]
    if values.shape != (samples.n, *batch):
        raise ValueError(
            f"{op}: values must have one value a sample and row, shape {(samples.n, *batch)}, got {tuple(values.shape)}"
        )
    if values.dtype not in _arguments.FLOATS_AND_DOUBLE:
        raise TypeError(f"{op}: values must be floating point, got {values.dtype}")


def undefined_as_nan(values: Tensor) -> Tensor:
    """Values (n, *batch), all of a row NaN where one of them is NaN or infinite: no gradient can be told from them."""
    return values + (values - values).sum(0)


def _centred_weights(samples: AntitheticSamples, values: Tensor) -> Tensor:
    """Weight of each sample's bits in the gradient, (rows, n) float32; they sum to 0 in each group that is coupled."""
    # In float64: a large common part of f cancels exactly.
    values = undefined_as_nan(values.detach().double())
    values = values.reshape(samples.n, samples.logits.shape[:-1].numel()).t()
    if samples.coupling == "antithetic_pairs":  # the mean of n / 2 estimates from two samples
        pairs = values.reshape(-1, samples.n // 2, 2)
        weights = (pairs - pairs.mean(2, keepdim=True)).reshape(values.shape) / (samples.n // 2)
    else:
        weights = (values - values.mean(1, keepdim=True)) / (samples.n - 1)
    return weights.float()


def gradient(samples: AntitheticSamples, values: Tensor) -> Tensor:
    """Unbiased estimate of the gradient of E f(b) with respect to the logits, from the packed bits.

    ratio / (n - 1) * sum_i (f(b_i) - mean f) b_i; for antithetic pairs the mean over pairs of that with n = 2.

    Args:
        samples: n >= 2 samples of logits (*batch, D).
        values: f at each sample, (n, *batch), any float dtype. f may contain log q(b); treat it as a constant.

    Returns:
        (*batch, D) float32, without gradient. A row in which a value is infinite or NaN has no finite exact gradient:
        its estimate is NaN, but 0 in dimensions in which no sample is 1. Other rows are as ever.

    Raises:
        TypeError, ValueError: values of another shape or an integer dtype; a single sample.

    Source:
        Dimitriev and Zhou, "ARMS", ICML 2021, the general estimator; LOORF for independent samples (Kool et al. 2019).
    """
    _check_values("gradient", samples, values)
    if samples.n < 2:
        raise ValueError("gradient: needs n >= 2 samples, got 1: a single value cannot be compared with a mean")
    shape = samples.logits.shape
    rows = (shape[:-1].numel(), shape[-1])
    bits = samples.bits.reshape(rows) if samples.layout == "sample" else samples.bits
    ratio = None if samples.coupling == "independent" else samples.ratio.reshape(rows)
    weights = _centred_weights(samples, values)
    return ops.antithetic_gradient(bits, weights, ratio, shape[-1], samples.layout).reshape(shape)


class _Surrogate(torch.autograd.Function):
    """Mean of the values over the samples; its gradient with respect to the logits is the one given."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor, estimate: Tensor) -> Tensor:
        ctx.save_for_backward(estimate)
        ctx.n, ctx.dtypes = values.shape[0], (logits.dtype, values.dtype)
        return values.mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (estimate,) = ctx.saved_tensors
        (grad,) = grads
        logits_grad = values_grad = None
        if ctx.needs_input_grad[0]:
            row = grad.unsqueeze(-1)
            # A row that the loss leaves out counts for nothing, even where its estimate is NaN.
            logits_grad = torch.where(row == 0, 0, row * estimate).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            values_grad = (grad / ctx.n).expand(ctx.n, *grad.shape).to(ctx.dtypes[1])
        return logits_grad, values_grad, None


def surrogate_rows(logits: Tensor, values: Tensor, estimate: Tensor) -> Tensor:
    """The mean of values (n, *batch) over the samples, (*batch), whose gradient for the logits is the estimate."""
    return _Surrogate.apply(logits, values, estimate)


def surrogate(samples: AntitheticSamples, values: Tensor) -> Tensor:
    """A scalar for use in any loss: its value estimates sum over rows of E f(b), its backward that sum's gradient.

    Args:
        samples: n >= 2 samples of logits (*batch, D).
        values: f at each sample, (n, *batch); may require a gradient.

    Returns:
        Scalar: mean over samples, sum over rows.

    Gradient:
        logits: gradient(samples, values), infinite values included; 0 for rows that the loss leaves out. values: 1 / n,
        the pathwise gradient of f's own parameters.

    Raises:
        TypeError, ValueError: as gradient().
    """
    estimate = gradient(samples, values)  # checks both
    return surrogate_rows(samples.logits, values, estimate).sum()


def expectation(
    f: Callable[[Tensor], Tensor],
    logits: Tensor,
    n: int,
    estimator: str = "arms_d",
    *,
    generator: torch.Generator | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Monte Carlo estimate of E f(b), b ~ Bernoulli(sigmoid(logits)), whose backward is the estimator's.

    Args:
        f: maps samples (n, *batch, D) of 0 and 1 in the logits' dtype to values (n, *batch). Called once.
        logits: (*batch, D).
        n: number of samples; 1 is enough for reinforce and straight_through.
        estimator: "arms_d", "arms_n", "arms_s" (ARMS with Dirichlet, Gaussian, systematic coupling), "disarm", "loorf",
            "reinforce" (no baseline), "straight_through" (biased; differentiates f) or "double_cv" (leave-one-out with
            control variates from the gradient of f).
        generator, seed: as sample().

    Returns:
        (*batch): mean over the samples.

    Gradient:
        logits: the estimator's. Parameters of f: pathwise. A row in which f is infinite or NaN at a sample has no
        finite exact gradient: its estimate is NaN (0 as in gradient()), other rows are as ever, and a row that the loss
        leaves out counts for nothing. Straight-through looks at the derivative of f alone.

    Raises:
        TypeError, ValueError: as sample(); unknown estimator; f returns another shape, or has no gradient where the
            estimator needs it.

    Source:
        Dimitriev and Zhou, "ARMS", ICML 2021; Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", 2019;
        Dong, Mnih and Tucker, "DisARM", 2020; Bengio et al., 2013 (straight-through); Titsias and Shi, "Double control
        variates for gradient estimation in discrete latent variable models", AISTATS 2022.
    """
    _arguments.function("expectation", "f", f)
    estimator = _arguments.choice("expectation", "estimator", estimator, tuple(ESTIMATORS))
    n = _arguments.integer("expectation", "n", n)
    if n < 2 and estimator not in ("reinforce", "straight_through"):
        raise ValueError(f"expectation: {estimator} needs n >= 2 samples, got {n}")
    samples = sample(logits, n, ESTIMATORS[estimator], generator=generator, seed=seed)
    b = samples.unpack(logits.dtype)
    if estimator == "straight_through":
        p = torch.sigmoid(logits)
        values = f(b + p - p.detach())
        _check_values("expectation", samples, values)
        return values.mean(0)
    if estimator == "double_cv":
        return _double_control_variate(f, samples, b)
    values = f(b)
    _check_values("expectation", samples, values)
    if estimator == "reinforce":
        score = b.float() - torch.sigmoid(logits.detach().float())
        estimate = (undefined_as_nan(values.detach().float()).unsqueeze(-1) * score).mean(0)
    else:
        estimate = gradient(samples, values)
    return surrogate_rows(logits, values, estimate)


def _double_control_variate(f: Callable[[Tensor], Tensor], samples: AntitheticSamples, b: Tensor) -> Tensor:
    """Leave-one-out REINFORCE on f minus its first-order part, whose share is then added in closed form.

    With g_-k the mean gradient of f at the other samples: the estimate is the mean over k of
    (f(b_k) - g_-k (b_k - p) - B_k) (b_k - p) + g_-k p (1 - p), B_k the mean of f(b_j) - grad f(b_j) (b_j - p) over the
    others. Unbiased, since neither g_-k nor B_k depends on b_k.
    """
    inputs = b.detach().requires_grad_()
    with torch.enable_grad():
        values = f(inputs)
        _check_values("expectation", samples, values)
        if not values.requires_grad:
            raise ValueError("expectation: double_cv needs the gradient of f, which f's result does not have")
        (slope,) = torch.autograd.grad(values.sum(), inputs, retain_graph=True)
    n, p = samples.n, torch.sigmoid(samples.logits.detach().double())
    centred, slope, heights = b.detach().double() - p, slope.double(), undefined_as_nan(values.detach().double())
    others_slope = (slope.sum(0) - slope) / (n - 1)
    reduced = heights - (slope * centred).sum(-1)
    baseline = (reduced.sum(0) - reduced) / (n - 1)
    advantage = heights - (others_slope * centred).sum(-1) - baseline
    estimate = (advantage.unsqueeze(-1) * centred + others_slope * p * (1 - p)).mean(0)
    return surrogate_rows(samples.logits, values, estimate.float())
