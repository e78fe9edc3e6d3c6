"""The multi-sample variational bound (importance weighted) for Bernoulli latents, with unbiased gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.antithetic.estimators import ESTIMATORS, gradient, surrogate_rows
from lowbit_ext.antithetic.ops import MOST_SAMPLES
from lowbit_ext.antithetic.samples import sample

BOUND_ESTIMATORS = ("arms_d", "arms_n", "arms_s", "loorf", "disarm", "vimco")


def multi_sample_bound(
    log_weight: Callable[[Tensor], Tensor],
    logits: Tensor,
    importance_samples: int,
    estimator: str = "arms_d",
    *,
    n: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E log 1/K sum_k w(b_k), w = p(x, b) / q(b), K independent samples of q: one estimate a row, unbiased gradient.

    For each k the bound is a function of b_k given the others. Its gradient through b_k is estimated from n coupled
    samples t_j that take b_k's place: sum_k ratio / (n - 1) sum_j (F_kj - mean_j F_kj) t_j with
    F_kj = log 1/K (w(t_j) + sum_{i != k} w(b_i)). How w depends directly on its parameters, the logits included, is
    differentiated by torch.

    Args:
        log_weight: maps samples (m, *batch, D) of 0 and 1 in the logits' dtype to log w, (m, *batch); log q(b) in it is
            differentiated through the logits. Called once, with m = K + n (K for vimco).
        logits: (*batch, D) of q.
        importance_samples: K, 1 to 64; 2 or more for vimco.
        estimator: "arms_d", "arms_n", "arms_s", "loorf", "disarm" (couplings of the t_j) or "vimco" (no t_j; the
            baseline of each sample is the bound with the geometric mean of the other weights in its place).
        n: coupled samples t_j.
        generator: draws the seeds.

    Returns:
        (*batch): the bound from the K independent samples.

    Gradient:
        logits: unbiased. Parameters of log_weight: pathwise.
        A sample of weight 0, log w = -inf, contributes nothing: the gradient is finite where the bound is and no w(t_j)
        is infinite. A k beside which all other weights are 0 is left out where its bounds would be compared with log 0;
        its exact gradient, given the others, is infinite. In a row whose bound is infinite or NaN the estimate for the
        logits is NaN (0 as in gradient()); a row that the loss leaves out counts for nothing.

    Raises:
        TypeError, ValueError: as sample(); unknown estimator; log_weight returns another shape.

    Source:
        Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016; Dimitriev and Zhou, "ARMS", ICML
        2021 (its multi-sample extension: summed over k, with the pathwise term); Mnih and Rezende, "Variational
        inference for Monte Carlo objectives", ICML 2016 (vimco).
    """
    op = "multi_sample_bound"
    _arguments.function(op, "log_weight", log_weight)
    estimator = _arguments.choice(op, "estimator", estimator, BOUND_ESTIMATORS)
    importance_samples = _arguments.integer(op, "importance_samples", importance_samples, 1, MOST_SAMPLES)
    n = _arguments.integer(op, "n", n)
    if estimator == "vimco" and importance_samples < 2:
        raise ValueError(f"multi_sample_bound: vimco needs importance_samples >= 2, got {importance_samples}")
    independent = sample(logits, importance_samples, "independent", generator=generator)
    drawn = independent.unpack(logits.dtype)
    coupled = None
    if estimator != "vimco":
        coupled = sample(logits, n, ESTIMATORS[estimator], generator=generator)
        drawn = torch.cat([drawn, coupled.unpack(logits.dtype)])
    log_w = _arguments.tensor_like(op, "the result of log_weight", log_weight(drawn), logits)
    if log_w.shape != (drawn.shape[0], *logits.shape[:-1]):
        raise ValueError(
            f"multi_sample_bound: log_weight must return shape {(drawn.shape[0], *logits.shape[:-1])}, "
            f"got {tuple(log_w.shape)}"
        )
    fixed = log_w[:importance_samples]
    bound = _log_sum(fixed) - math.log(importance_samples)
    with torch.no_grad():
        if coupled is None:
            score = drawn.double() - torch.sigmoid(logits.detach().double())
            estimate = (_vimco_signal(fixed.double()).unsqueeze(-1) * score).sum(0).float()
        else:
            estimate = gradient(coupled, _replaced_bounds(fixed.double(), log_w[importance_samples:].double()))
    # The pathwise part of the bound, and the score part with value 0.
    zero = surrogate_rows(independent, torch.zeros_like(fixed), estimate)
    return bound + zero


def _log_sum(log_w: Tensor) -> Tensor:
    """log of the sum over the samples. Where all are 0 the derivative is 0; torch.logsumexp's is NaN."""
    some = (log_w != -math.inf).any(0)
    return torch.where(some, torch.where(some, log_w, 0).logsumexp(0), -math.inf)


def _others(log_w: Tensor, in_place: float) -> Tensor:
    """The weights beside each one, (K, K, *batch): entry [k, i] is log_w[i], entry [k, k] is in_place."""
    count = log_w.shape[0]
    others = log_w.unsqueeze(0).expand(count, *log_w.shape).clone()
    others[range(count), range(count)] = in_place
    return others


def _replaced_bounds(fixed: Tensor, replacing: Tensor) -> Tensor:
    """Sum over k of F_kj, the bound with sample k replaced by replacement j: (n, *batch).

    The sum may come before the gradient, which is linear. Left out is a k with F_kj = -inf at some j.
    """
    rest = _others(fixed, -math.inf).logsumexp(1)
    replaced = torch.logaddexp(replacing.unsqueeze(1), rest) - math.log(fixed.shape[0])
    empty = (replaced == -math.inf).any(0)
    bound = torch.logsumexp(fixed, 0)
    return torch.where(empty, 0, replaced).sum(1) + (bound - bound)  # + 0, or NaN where the bound is infinite


def _vimco_signal(log_w: Tensor) -> Tensor:
    """The bound minus the bound with each weight replaced by the geometric mean of the others, (K, *batch).

    0 where the others are 0, and the geometric mean says nothing; NaN where the bound is infinite.
    """
    geometric = _others(log_w, 0.0).sum(1) / (log_w.shape[0] - 1)  # of the others' logarithms
    baseline = torch.logaddexp(geometric, _others(log_w, -math.inf).logsumexp(1))
    bound = torch.logsumexp(log_w, 0)
    return bound - torch.where(baseline == -math.inf, bound, baseline)
