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
    log_joint: Callable[[Tensor], Tensor],
    logits: Tensor,
    importance_samples: int,
    estimator: str = "arms_d",
    *,
    n: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E log 1/K sum_k w(b_k), w = p(x, b) / q(b), K independent samples of q = Bernoulli(sigmoid(logits)).

    Each of the K samples has a slot, and each slot n coupled samples b_kr: K n evaluations, n bounds L_r of K
    independent samples each, whose mean is the result. Given the other slots, L_r is a function of the sample in
    slot k, which the slot's samples evaluate: the gradient through q is

        sum_k ratio / (n - 1) sum_j (F_kj - mean_j F_kj) b_kj,
        F_kj = mean_r (log 1/K (w(b_kj) + W_kr) - w(b_kj) / (w(b_kj) + W_kr)), W_kr = sum_{i != k} w(b_ir).

    The second term is the weights' own dependence on q, as a score: it is coupled like the first.

    Args:
        log_joint: maps samples (m, *batch, D) of 0 and 1 in the logits' dtype to log p(x, b), (m, *batch). Called once,
            with m = K n (K for vimco).
        logits: (*batch, D) of q.
        importance_samples: K, 1 to 64; 2 or more for vimco.
        estimator: "arms_d", "arms_n", "arms_s", "loorf", "disarm" (couplings of the n samples of a slot) or "vimco"
            (one sample a slot; its baseline is the bound with the geometric mean of the other weights in its place).
        n: samples of a slot; more train on less variance, more slots on a tighter bound.
        generator: draws the seeds.

    Returns:
        (*batch): the mean of n bounds.

    Gradient:
        logits: unbiased. Parameters of log_joint: pathwise, through the result.
        A sample of weight 0, log_joint = -inf, contributes nothing: the gradient is finite where the result is. A slot
        beside which all other weights of an L_r are 0 is left out of that L_r where one of the slot's own is 0 too; the
        exact gradient, given the others, is infinite. In a row whose result is infinite or NaN the estimate for the
        logits is NaN (0 as in gradient()); a row that the loss leaves out counts for nothing.

    Raises:
        TypeError, ValueError: as sample(); unknown estimator; log_joint returns another shape.

    Source:
        Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016; Dimitriev and Zhou, "ARMS", ICML
        2021 (its multi-sample extension, each slot with samples of its own); Mnih and Rezende, "Variational inference
        for Monte Carlo objectives", ICML 2016 (vimco).
    """
    op = "multi_sample_bound"
    _arguments.function(op, "log_joint", log_joint)
    estimator = _arguments.choice(op, "estimator", estimator, BOUND_ESTIMATORS)
    slots = _arguments.integer(op, "importance_samples", importance_samples, 1, MOST_SAMPLES)
    n = _arguments.integer(op, "n", n)
    logits = _arguments.tensor(op, "logits", logits, _arguments.FLOATS)
    if estimator == "vimco" and slots < 2:
        raise ValueError(f"multi_sample_bound: vimco needs importance_samples >= 2, got {slots}")
    if estimator != "vimco" and n < 2:
        raise ValueError(f"multi_sample_bound: {estimator} needs n >= 2 samples a slot, got {n}")
    if logits.dim() < 1:
        raise ValueError("multi_sample_bound: logits must have at least one dimension, got a scalar")
    if estimator == "vimco":
        samples = sample(logits, slots, "independent", generator=generator)
        drawn = samples.unpack(logits.dtype).unsqueeze(0)
    else:
        every_slot = logits.detach().expand(slots, *logits.shape)
        samples = sample(every_slot, n, ESTIMATORS[estimator], generator=generator)
        drawn = samples.unpack(logits.dtype)  # (n, slots, *batch, D)
    given = drawn.flatten(0, 1)
    joint = _arguments.tensor_like(op, "the result of log_joint", log_joint(given), logits)
    if joint.shape != given.shape[:-1]:
        raise ValueError(
            f"multi_sample_bound: log_joint must return shape {tuple(given.shape[:-1])}, got {tuple(joint.shape)}"
        )
    constant = logits.detach().float()
    log_w = (joint - _log_likelihood(given, constant)).unflatten(0, drawn.shape[:2])
    bound = _log_sum(log_w) - math.log(slots)
    with torch.no_grad():
        if estimator == "vimco":
            score = given.double() - torch.sigmoid(constant.double())
            estimate = (_vimco_signal(log_w[0].double()).unsqueeze(-1) * score).sum(0).float()
        else:
            estimate = gradient(samples, _slot_values(log_w.double())).sum(0)
    # The pathwise part of the bound, and the score part with value 0.
    return bound.mean(0) + surrogate_rows(logits, torch.zeros_like(bound), estimate)


def _log_likelihood(bits: Tensor, logits: Tensor) -> Tensor:
    """log of the probability of bits (m, *batch, D) of 0 and 1, (m, *batch)."""
    return (bits * logits).sum(-1) - torch.nn.functional.softplus(logits).sum(-1)


def _log_sum(log_w: Tensor) -> Tensor:
    """log of the sum over the slots, (n, *batch). Where all are 0 the derivative is 0; torch.logsumexp's is NaN."""
    some = (log_w != -math.inf).any(1)
    return torch.where(some, torch.where(some.unsqueeze(1), log_w, 0).logsumexp(1), -math.inf)


def _others(log_w: Tensor, in_place: float) -> Tensor:
    """The weights beside each slot's, (K, K, *batch): entry [k, i] is log_w[i], entry [k, k] is in_place."""
    count = log_w.shape[0]
    others = log_w.unsqueeze(0).expand(count, *log_w.shape).clone()
    others[range(count), range(count)] = in_place
    return others


def _slot_values(log_w: Tensor) -> Tensor:
    """F_kj of the docstring above, (n, K, *batch), of log_w (n, K, *batch).

    A pair of k and r is left out where the bound with one of the slot's samples is log 0.
    """
    rest = torch.stack([_others(each, -math.inf).logsumexp(1) for each in log_w])  # (n, K, *batch)
    own = log_w.unsqueeze(1)
    replaced = torch.logaddexp(own, rest)  # [j, r, k]
    values = replaced - math.log(log_w.shape[1]) - (own - replaced).exp()
    empty = (replaced == -math.inf).any(0)
    bound = torch.logsumexp(log_w, 1).sum(0)
    return torch.where(empty, 0, values).mean(1) + (bound - bound)  # + 0, or NaN where a bound is infinite


def _vimco_signal(log_w: Tensor) -> Tensor:
    """The factor of each sample's score, (K, *batch).

    It is the bound minus the bound with each weight replaced by the geometric mean of the others, and minus the
    weight's share, its own dependence on q. The difference is 0 where the others are 0, and the geometric mean says
    nothing; NaN where the bound is infinite.
    """
    geometric = _others(log_w, 0.0).sum(1) / (log_w.shape[0] - 1)  # of the others' logarithms
    baseline = torch.logaddexp(geometric, _others(log_w, -math.inf).logsumexp(1))
    bound = torch.logsumexp(log_w, 0)
    return bound - torch.where(baseline == -math.inf, bound, baseline) - (log_w - bound).exp()
