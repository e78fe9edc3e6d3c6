"""Laws of coupled Bernoulli samples and exact gradients by enumeration, in float64; from the definitions alone."""

import itertools
import math

import numpy as np
import torch
from scipy.stats import multivariate_normal, norm


def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def exactly(n, joint):
    """{pattern: probability} of n exchangeable events by inclusion and exclusion, from joint(k) = P(k given occur)."""
    joints = [joint(k) for k in range(n + 1)]

    def probability(k):
        return sum((-1) ** j * math.comb(n - k, j) * joints[k + j] for j in range(n - k + 1))

    exact = [probability(k) for k in range(n + 1)]
    return {pattern: exact[sum(pattern)] for pattern in itertools.product((0, 1), repeat=n)}


def rare_law(coupling, n, q):
    """Law of the n rare events of probability q <= 1/2 each."""
    if coupling == "independent":
        return exactly(n, lambda k: q**k)
    if coupling == "antithetic_pairs":
        pair = {(1, 0): q, (0, 1): q, (0, 0): 1 - 2 * q}
        law = {}
        for parts in itertools.product(pair, repeat=n // 2):
            law[sum(parts, ())] = math.prod(pair[part] for part in parts)
        return law
    if coupling == "dirichlet":  # P(k given spacings exceed tau) = max(0, 1 - k tau)^(n-1)
        tau = 1 - q ** (1 / (n - 1))
        return exactly(n, lambda k: max(0.0, 1 - k * tau) ** (n - 1))
    if coupling == "systematic":
        m = math.floor(n * q)
        more = n * q - m
        chances = {m: 1 - more, m + 1: more}
        return {
            pattern: chances.get(sum(pattern), 0.0) / math.comb(n, sum(pattern))
            for pattern in itertools.product((0, 1), repeat=n)
        }
    if coupling == "gaussian":  # correlation -1 / (n - 1), singular
        h = norm.ppf(q)

        def joint(k):
            if k == 0 or k == n:
                return float(k == 0)  # all below h <= 0 contradicts the sum of 0
            covariance = np.full((k, k), -1 / (n - 1)) + np.eye(k) * (1 + 1 / (n - 1))
            if k == 1:
                return q
            if k == 2 and n == 2:
                return 0.0
            limits, mean = np.full(k, h), np.zeros(k)
            return float(multivariate_normal.cdf(limits, mean, covariance, maxpts=200000 * k, abseps=1e-9))

        return exactly(n, joint)
    raise ValueError(coupling)


def law(coupling, n, logit):
    """Law of the n samples of one dimension: {pattern: probability}."""
    q = sigmoid(-abs(logit))
    rare = rare_law(coupling, n, q)
    if logit <= 0:
        return rare
    return {tuple(1 - b for b in pattern): probability for pattern, probability in rare.items()}


def configurations(coupling, n, logits):
    """All samples of all dimensions: bits (configurations, n, D) and their probabilities, without impossible ones."""
    laws = [law(coupling, n, logit) for logit in logits]
    bits, probabilities = [], []
    for patterns in itertools.product(*laws):
        probability = math.prod(each[pattern] for each, pattern in zip(laws, patterns, strict=True))
        if probability > 0:
            bits.append(patterns)
            probabilities.append(probability)
    return torch.tensor(bits).movedim(1, 2), torch.tensor(probabilities, dtype=torch.float64)


def exact_gradient(f, logits):
    """Gradient of E f(b) with respect to the logits, f a map of (*, D) float64 to (*), by enumeration of b."""
    logits = logits.detach().double().requires_grad_()
    cube = torch.tensor(list(itertools.product((0.0, 1.0), repeat=logits.numel())), dtype=torch.float64)
    log_q = (cube * logits - torch.nn.functional.softplus(logits)).sum(-1)
    (gradient,) = torch.autograd.grad((log_q.exp() * f(cube).detach()).sum(), logits)
    return gradient


def exact_bound_gradient(log_joint, logits, count):
    """Gradient of E log mean_k w(b_k), log w = log_joint(b) - log q(b), K = count independent samples of q."""
    logits = logits.detach().double().requires_grad_()
    cube = torch.tensor(list(itertools.product((0.0, 1.0), repeat=logits.numel())), dtype=torch.float64)
    log_q = (cube * logits - torch.nn.functional.softplus(logits)).sum(-1)
    log_w = log_joint(cube) - log_q
    total = 0
    for chosen in itertools.product(range(len(cube)), repeat=count):
        index = list(chosen)
        total = total + log_q[index].sum().exp() * (log_w[index].logsumexp(0) - math.log(count))
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient
