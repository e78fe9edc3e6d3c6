"""Antithetic sampler and estimators: laws, unbiasedness by enumeration, variances, replay, integration, errors."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from conftest import BACKENDS, one_thread, running_on
from lowbit_ext import antithetic, binary
from lowbit_ext.antithetic import bounds, estimators, expectation, gradient, multi_sample_bound, ops, sample, surrogate
from lowbit_ext.antithetic.samples import owens_t
from lowbit_ext.models import BernoulliVAE
from process_groups import needs_gloo, run_in_two_processes
from reference import antithetic as reference

COUPLINGS = tuple(ops.COUPLINGS)
COUPLED = ("antithetic_pairs", "dirichlet", "systematic", "gaussian")
SEEDED = dict(seed=20260101)
# Non-zero on both sides, confident, and 0, where p = 1/2 takes the unflipped branch.
LOGITS = (0.3, -1.7, 4.0)


def pack_by_sample(bits):
    """(rows, n, D) of 0 and 1 as the integers of layout "sample"."""
    n = bits.shape[1]
    weights = (torch.ones(n, dtype=torch.int64) << torch.arange(n)).view(-1, 1)
    return (bits.long() * weights).sum(1).to(ops.bits_type(n))


def given_samples(coupling, bits, logits):
    """AntitheticSamples that hold the given bits (rows, n, D), one row a configuration, with the library's ratio."""
    rows = logits.expand(len(bits), -1)
    samples = sample(rows.detach().float(), bits.shape[1], coupling, seed=0)
    return dataclasses.replace(samples, bits=pack_by_sample(bits), logits=rows)


def quadratic(b):
    """A function of three or fewer bits with interactions and a large constant part."""
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=b.dtype)[: b.shape[-1]]
    return 7 + (b * weight).sum(-1) ** 2 + 3 * b[..., 0] * b[..., -1]


# --- the sampler's law ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_counts_follow_the_exact_law(isa, coupling, n):
    """Chi-square of the number of ones, and z of every pair, from 400 000 draws: a shift of 0.5 % is seen with 99 %."""
    if coupling == "antithetic_pairs" and n % 2:
        pytest.skip("pairs need an even number")
    if coupling == "gaussian" and n == 8:
        pytest.skip("no closed form for the law; its margins and pairs are tested below")
    rows = 200_000
    for logit in (-0.4, 1.6):
        law = reference.law(coupling, n, logit)
        samples = sample(torch.full((rows, 2), logit), n, coupling, **SEEDED).unpack(torch.int64)
        counts = torch.bincount(samples.sum(0).flatten(), minlength=n + 1).double()
        expected = np.zeros(n + 1)
        for pattern, probability in law.items():
            expected[sum(pattern)] += probability
        assert counts[torch.tensor(expected < 1e-9)].sum() == 0
        likely = expected * 2 * rows > 5
        observed, wanted = counts.numpy()[likely], expected[likely] * 2 * rows
        p_value = stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), max(likely.sum() - 1, 1))
        assert p_value > 1e-4, (logit, observed, wanted)


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_margins_and_mean_pair_correlation(coupling, n):
    if coupling == "antithetic_pairs":
        n &= ~1
    logits = torch.tensor([-6.0, -2.0, -0.1, 0.0, 1.0, 3.0])
    rows = 200_000
    samples = sample(logits.expand(rows, -1), n, coupling, **SEEDED)
    bits = samples.unpack(torch.float64)
    p = torch.sigmoid(logits.double())
    z = (bits.mean(1) - p) / (p * (1 - p) / rows).sqrt()  # of every sample's margin
    assert z.abs().max() < 5
    # Mean covariance of two samples: from the sum over samples, E (sum - np)^2 = n p(1-p) (1 + (n-1) rho).
    deviation = (bits.sum(0) - n * p).square()
    mean_pairs = n - 1 if coupling != "antithetic_pairs" else 1  # partners of a sample that it depends on
    rho = 1 - 1 / samples.ratio[0].double()
    wanted = n * p * (1 - p) * (1 + mean_pairs * rho)
    error = deviation.std(0).clamp_min(1e-3) / math.sqrt(rows)  # 0 where the number of ones is certain
    assert ((deviation.mean(0) - wanted).abs() / error).max() < 5


def test_dimensions_are_independent():
    bits = sample(torch.zeros(200_000, 4), 4, "systematic", **SEEDED).unpack(torch.float64)
    for i in range(4):
        for j in range(4):
            correlation = ((bits[i, :, 0] - 0.5) * (bits[j, :, 1] - 0.5)).mean() * 4
            assert abs(correlation) < 5 / math.sqrt(200_000)


def test_owens_t_against_numerical_integration():
    from scipy.special import owens_t as exact

    h = torch.tensor([0.0, 0.1, 1.0, 3.0, 6.0, 8.0], dtype=torch.float64)
    for a in (1.0, 1.2, math.sqrt(3.0)):
        wanted = torch.from_numpy(exact(h.numpy(), a))
        assert torch.allclose(owens_t(-h, a), wanted, rtol=1e-11, atol=0)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("coupling", COUPLED)
def test_ratio_is_not_damped_for_confident_logits(coupling, n):
    if coupling == "antithetic_pairs" and n % 2:
        pytest.skip("pairs need an even number")
    logits = torch.linspace(-30, 30, 241)
    ratio = sample(logits, n, coupling, **SEEDED).ratio.double()
    q = torch.sigmoid(-logits.double().abs())
    assert bool(((ratio > 0) & (ratio <= 1 + 1e-6)).all())
    # Where at most one of the n bits can differ, the ratio is exactly 1 - q; ARMS's epsilon would give 0 at |logit| 17.
    never_two = q <= 2.0 ** -(n - 1) if coupling == "dirichlet" else q <= 1 / n
    if coupling != "gaussian":
        assert torch.allclose(ratio[never_two], 1 - q[never_two], rtol=1e-6)
    assert torch.allclose(ratio[logits.abs() > 13], torch.ones(1, dtype=torch.float64), rtol=2e-2)


@pytest.mark.parametrize("n", [2, 4, 64])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_every_finite_logit_has_a_ratio(coupling, n):
    """exp(-745) is 0 in float64, and so was the ratio's denominator."""
    logits = torch.tensor([100.0, 700, 743, 744, 745, 746, 1e4, torch.finfo(torch.float32).max])
    logits = torch.cat([logits, -logits])
    samples = sample(logits, n, coupling, **SEEDED)
    assert torch.equal(samples.ratio, torch.ones_like(logits))
    assert torch.equal(samples.unpack(), (logits > 0).float().expand(n, -1))
    assert torch.isfinite(gradient(samples, torch.arange(float(n)))).all()


@pytest.mark.parametrize("coupling", ["dirichlet", "gaussian", "systematic"])
def test_two_samples_are_the_antithetic_pair(coupling):
    """n = 2: every coupling with the lowest correlation is DisARM's: never both rare, ratio max(p, 1 - p)."""
    logits = torch.linspace(-5, 5, 41).expand(5000, -1)
    samples = sample(logits, 2, coupling, **SEEDED)
    assert torch.allclose(samples.ratio[0], torch.sigmoid(logits[0].abs()), rtol=1e-6)
    bits = samples.unpack(torch.bool)
    rare = bits ^ (logits > 0)
    assert not bool((rare[0] & rare[1]).any())


# --- unbiasedness by enumeration --------------------------------------------------------------------------------------


def enumerable(coupling, n):
    return not (coupling == "antithetic_pairs" and n % 2) and not (coupling == "gaussian" and n == 8)


CASES = [(c, n) for c in COUPLINGS for n in (2, 3, 4, 8) if enumerable(c, n)]


@pytest.mark.parametrize(("coupling", "n"), CASES)
def test_gradient_is_unbiased(coupling, n):
    logits = torch.tensor(LOGITS if n < 4 else LOGITS[:2] if n == 4 else LOGITS[1:2])
    bits, probability = reference.configurations(coupling, n, logits.tolist())
    assert probability.sum().item() == pytest.approx(1, abs=1e-8)
    samples = given_samples(coupling, bits, logits)
    estimates = gradient(samples, quadratic(bits.double()).t())
    mean = (probability.unsqueeze(1) * estimates.double()).sum(0)
    assert torch.allclose(mean, reference.exact_gradient(quadratic, logits), rtol=1e-5, atol=2e-6)


def test_gradient_of_eight_gaussian_samples_is_unbiased():
    """By the mean pair law alone, on which the expectation of the estimate depends: it is linear in f_i b_j."""
    logit, n = -1.7, 8
    samples = sample(torch.tensor([logit]), n, "gaussian", **SEEDED)
    q = reference.sigmoid(logit)
    h, rho = stats.norm.ppf(q), -1 / (n - 1)
    both = stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([h, h])
    assert float(samples.ratio[0]) == pytest.approx(q * (1 - q) / (q - both), rel=1e-5)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("estimator", [name for name in antithetic.ESTIMATORS if name != "straight_through"])
def test_expectation_is_unbiased(monkeypatch, estimator, n):
    coupling = antithetic.ESTIMATORS[estimator]
    if not enumerable(coupling, n):
        pytest.skip("pairs need an even number")
    leaf = torch.tensor(LOGITS[:2]).requires_grad_()
    bits, probability = reference.configurations(coupling, n, leaf.tolist())
    monkeypatch.setattr(estimators, "sample", lambda logits, n, name, **_: given_samples(name, bits, logits))
    values = expectation(quadratic, leaf, n, estimator)
    (values.double() * probability).sum().backward()
    assert torch.allclose(leaf.grad.double(), reference.exact_gradient(quadratic, leaf), rtol=1e-5, atol=5e-6)


def log_joint(b):
    """Of two bits."""
    return b[..., 0] * b[..., 1] - 0.7 * b[..., 0] + 0.2


BOUNDS = [
    (name, slots, n) for name in bounds.BOUND_ESTIMATORS for slots in (1, 2, 3) for n in (2, 3)
    if not (name == "disarm" and n == 3) and not (name == "vimco" and (slots == 1 or n == 3))
]


@pytest.mark.parametrize(("estimator", "slots", "n"), BOUNDS)
def test_multi_sample_bound_is_unbiased(monkeypatch, estimator, slots, n):
    """All samples of all slots: value and gradient of the mean are those of the bound of `slots` samples."""
    leaf = torch.tensor([0.4, -1.1]).requires_grad_()
    vimco = estimator == "vimco"
    coupling, each = ("independent", slots) if vimco else (antithetic.ESTIMATORS[estimator], n)
    bits, chance = reference.configurations(coupling, each, leaf.tolist())
    choices = [torch.arange(len(bits))] * (1 if vimco else slots)
    chosen = torch.cartesian_prod(*choices).reshape(-1, len(choices))

    def drawn(logits, count, name, **_):
        samples = given_samples(name, bits[chosen.t().flatten()], leaf)  # slots outermost
        parts = {"bits": samples.bits, "ratio": samples.ratio, "logits": samples.logits}
        return dataclasses.replace(samples, **{key: part.reshape(logits.shape) for key, part in parts.items()})

    monkeypatch.setattr(bounds, "sample", drawn)
    result = multi_sample_bound(log_joint, leaf.expand(len(chosen), -1), slots, estimator, n=n)
    (result.double() * chance[chosen].prod(1)).sum().backward()
    exact = reference.exact_bound_gradient(log_joint, leaf, slots)
    assert torch.allclose(leaf.grad.double(), exact, rtol=1e-5, atol=2e-6)


def test_multi_sample_bound_of_one_sample_is_the_evidence_lower_bound():
    logits = torch.tensor([[0.2, -1.0]]).expand(50_000, -1).clone().requires_grad_()
    value = multi_sample_bound(quadratic, logits, 1, "arms_d", n=3, generator=torch.Generator().manual_seed(1))
    value.sum().backward()
    mean, error = logits.grad.mean(0), logits.grad.std(0) / math.sqrt(50_000)
    assert ((mean - reference.exact_bound_gradient(quadratic, logits[0], 1)).abs() / error).max() < 5


def test_bound_and_pathwise_gradient_are_their_definition():
    """The mean over r of the bound of the r-th samples, and its derivative for the parameters of log_joint."""
    logits, theta = torch.randn(5, 7), torch.randn(7, requires_grad=True)
    seen = []

    def joint(b):
        seen.append(b)
        return b @ theta

    bound = multi_sample_bound(joint, logits, 4, "arms_s", n=3, generator=torch.Generator().manual_seed(2))
    (drawn,) = seen
    log_w = drawn @ theta - (drawn * logits - torch.nn.functional.softplus(logits)).sum(-1)
    wanted = (log_w.reshape(3, 4, 5).logsumexp(1) - math.log(4)).mean(0)
    torch.testing.assert_close(bound, wanted)
    torch.testing.assert_close(torch.autograd.grad(bound.sum(), theta), torch.autograd.grad(wanted.sum(), theta))


def test_straight_through_differentiates_the_function():
    logits = torch.tensor([0.3, -0.8], requires_grad=True)
    samples = sample(logits, 3, "independent", **SEEDED).unpack()
    weight = torch.tensor([2.0, -1.0])
    expectation(lambda b: (b @ weight) ** 2, logits, 3, "straight_through", **SEEDED).backward()
    p = torch.sigmoid(logits.detach())
    slope = 2 * (samples @ weight).unsqueeze(1) * weight
    assert torch.allclose(logits.grad, slope.mean(0) * p * (1 - p), rtol=1e-5)


# --- variance ---------------------------------------------------------------------------------------------------------


def exact_variance(coupling, n, logits, f):
    """Sum over dimensions of the variance of one estimate, by enumeration."""
    bits, probability = reference.configurations(coupling, n, logits.tolist())
    estimates = gradient(given_samples(coupling, bits, logits), f(bits.double()).t()).double()
    mean = (probability.unsqueeze(1) * estimates).sum(0)
    return float((probability.unsqueeze(1) * (estimates - mean).square()).sum())


PUBLISHED = {  # f = (b - 0.49)^2, n = 4: LOORF, ARMS-N, ARMS-D, systematic
    0.1: (6.3000e-6, 5.2087e-6, 4.8600e-6, 4.8600e-6),
    0.25: (7.0313e-6, 3.5047e-6, 1.8241e-6, 0.0),
    0.5: (4.1667e-6, 4.2767e-7, 6.0780e-7, 0.0),
}


@pytest.mark.parametrize("p", PUBLISHED)
def test_variance_in_one_dimension(p):
    logits = torch.tensor([math.log(p / (1 - p))])
    for coupling, wanted in zip(("independent", "gaussian", "dirichlet", "systematic"), PUBLISHED[p], strict=True):
        got = exact_variance(coupling, 4, logits, lambda b: (b[..., 0] - 0.49) ** 2)
        assert got == pytest.approx(wanted, rel=2e-4, abs=1e-12), coupling


@pytest.mark.parametrize("n", [2, 3, 4])
def test_variance_in_three_dimensions_agrees_with_monte_carlo(n):
    """And the systematic coupling's is the lowest of all in these cells."""
    for scale in (0.5, 1.0, 2.0):
        logits = torch.tensor([0.9, -0.4, -1.3]) * scale
        variances = {}
        for coupling in ("independent", "dirichlet", "systematic"):
            variances[coupling] = exact_variance(coupling, n, logits, quadratic)
            samples = sample(logits.expand(200_000, -1), n, coupling, **SEEDED)
            estimates = gradient(samples, quadratic(samples.unpack(torch.float64))).double()
            squares = (estimates - estimates.mean(0)).square().sum(1)
            assert abs(squares.mean() - variances[coupling]) < 5 * squares.std() / math.sqrt(200_000)
        assert variances["systematic"] <= variances["dirichlet"] * (1 + 1e-6) <= variances["independent"] * (1 + 2e-6)


# --- bits: layouts, levels, threads, replay ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    coupling=st.sampled_from(COUPLINGS), half=st.integers(1, 32), odd=st.booleans(), rows=st.integers(0, 5),
    dimensions=st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 200]), seed=st.integers(0, 2**63 - 1),
)
def test_layouts_hold_the_same_samples(coupling, half, odd, rows, dimensions, seed):
    n = 2 * half - (1 if odd and half > 1 and coupling != "antithetic_pairs" else 0)
    logits = torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed & 0xFFFF)) * 2
    by_sample = sample(logits, n, coupling, seed=seed)
    by_dimension = sample(logits, n, coupling, seed=seed, layout="dimension")
    dense = by_sample.unpack()
    assert dense.shape == (n, rows, dimensions)
    assert torch.equal(by_dimension.unpack(), dense)
    assert torch.equal(by_dimension.packed.unpack(), dense.flatten(0, 1))
    assert torch.equal(by_dimension.ratio, by_sample.ratio)
    values = torch.randn(n, rows, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gradient(by_sample, values), gradient(by_dimension, values))


@pytest.mark.host_cuda
@pytest.mark.parametrize("layout", ["sample", "dimension"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_every_backend_and_thread_count_gives_the_same_bits(coupling, layout):
    logits = torch.randn(700, 129, generator=torch.Generator().manual_seed(0)) * 3
    values = torch.randn(12, 700, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    results = []
    try:
        for name in BACKENDS:
            with running_on(name):
                device = torch.get_default_device()
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    samples = sample(logits.to(device), 12, coupling, layout=layout, **SEEDED)
                    tensors = (samples.bits, samples.ratio, gradient(samples, values.to(device)))
                    results.append([tensor.cpu() for tensor in tensors])
    finally:
        torch.set_num_threads(before)
    for bits, ratio, estimate in results[1:]:
        assert torch.equal(bits, results[0][0])
        # The Gaussian coupling's ratio, which scales its gradient, comes from the device's own normal quantile.
        tolerance = 1e-6 if coupling == "gaussian" else 0
        assert torch.allclose(ratio, results[0][1], rtol=tolerance, atol=0)
        assert torch.allclose(estimate, results[0][2], rtol=tolerance, atol=0)


def test_replay_and_slices():
    logits = torch.randn(10, 70)
    samples = sample(logits, 5, generator=torch.Generator().manual_seed(3))
    again = sample(logits, 5, seed=samples.seed, offset=samples.offset)
    assert torch.equal(again.bits, samples.bits)
    part = sample(logits[4:7], 5, seed=samples.seed, offset=4 * 70)
    assert torch.equal(part.bits, samples.bits[4:7])
    assert not torch.equal(sample(logits, 5).bits, sample(logits, 5).bits)
    torch.manual_seed(9)
    first = sample(logits, 5).bits
    torch.manual_seed(9)
    assert torch.equal(sample(logits, 5).bits, first)


def test_shapes_types_and_memory():
    for shape in [(5,), (2, 3, 65), (0, 4), (3, 0)]:
        samples = sample(torch.zeros(shape), 4)
        assert samples.unpack().shape == (4, *shape)
        assert samples.ratio.shape == shape
        assert gradient(samples, torch.zeros(4, *shape[:-1])).shape == shape
    x = torch.randn(6, 40).t()  # not contiguous
    assert torch.equal(sample(x, 4, **SEEDED).bits, sample(x.contiguous(), 4, **SEEDED).bits)
    for dtype in (torch.bfloat16, torch.float16):
        low = torch.randn(4, 40).to(dtype)
        assert torch.equal(sample(low, 4, **SEEDED).bits, sample(low.float(), 4, **SEEDED).bits)
    for n, size in [(8, 1), (9, 2), (17, 4), (33, 8)]:
        assert sample(torch.zeros(3, 64), n).bits.element_size() == size
    packed = sample(torch.zeros(8, 64), 8, layout="dimension").packed
    assert packed.words.numel() * 8 == 8 * 8 * 64 // 8  # an eighth of bool
    weight = torch.randn(10, 64)
    dense = packed.unpack() @ torch.where(weight >= 0, 1.0, -1.0).t()
    assert torch.equal(binary.linear(packed, weight), dense)


def test_gradient_cancels_a_large_common_part():
    samples = sample(torch.randn(20, 30), 4, **SEEDED)
    values = torch.randn(4, 20, dtype=torch.float64)
    shifted = gradient(samples, values + 1e9)
    assert torch.allclose(shifted, gradient(samples, values), rtol=1e-5, atol=1e-5)


# --- values and weights that are not finite ---------------------------------------------------------------------------

# Every way in which one, two or all of three values are not finite.
NOT_FINITE = [pattern for pattern in itertools.product((1.5, math.inf, -math.inf, math.nan), repeat=3)
              if not all(map(math.isfinite, pattern))]


@pytest.mark.parametrize("layout", ["sample", "dimension"])
@pytest.mark.parametrize("coupling", [name for name in COUPLINGS if name != "antithetic_pairs"])
def test_a_value_that_is_not_finite_concerns_its_row_alone(backend, coupling, layout):
    rows = len(NOT_FINITE)
    samples = sample(torch.zeros(2 * rows, 70), 3, coupling, layout=layout, **SEEDED)
    values = torch.randn(3, 2 * rows)
    expected = gradient(samples, values)
    values[:, ::2] = torch.tensor(NOT_FINITE).t()
    estimate = gradient(samples, values)
    assert torch.equal(estimate[1::2], expected[1::2])
    some = samples.unpack(torch.bool).any(0)[::2]
    assert torch.equal(estimate[::2].isnan(), some)
    assert not estimate[::2][~some].any()


@pytest.mark.parametrize("estimator", [name for name in antithetic.ESTIMATORS if name != "straight_through"])
def test_expectation_of_values_that_are_not_finite(estimator):
    """Beside finite rows, whose gradient stays; and left out by the loss."""
    n = 2 if estimator == "disarm" else 3
    added = torch.zeros(n, 2 * len(NOT_FINITE))
    added[:, ::2] = torch.tensor(NOT_FINITE)[:, -n:].t()
    bad = ~added.isfinite().all(0)
    leaf = torch.randn(len(bad), 70, requires_grad=True)

    def run(more, rows):
        result = expectation(lambda b: quadratic(b[..., :3]) + more, leaf, n, estimator, **SEEDED)
        (grad,) = torch.autograd.grad(torch.where(rows, result, 0).sum(), leaf)
        return result, grad

    _, expected = run(0, ~bad)
    result, grad = run(added, torch.ones_like(bad))
    assert torch.equal(grad[~bad], expected[~bad])
    assert result[~bad].isfinite().all()
    assert not result[bad].isfinite().any()
    some = torch.ones(len(bad), 70, dtype=torch.bool)
    if estimator not in ("reinforce", "double_cv"):
        some = sample(leaf.detach(), n, antithetic.ESTIMATORS[estimator], **SEEDED).unpack(torch.bool).any(0)
    assert torch.equal(grad[bad].isnan(), some[bad])
    assert torch.equal(run(added, ~bad)[1][bad], torch.zeros_like(grad[bad]))


WEIGHTS = (0.0, 0.3, 2.0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_vimco_signal_is_its_definition(count):
    """For every choice of weights, among them 0: in plain numbers."""
    for weights in itertools.product(WEIGHTS, repeat=count):
        signal = bounds._vimco_signal(torch.tensor(weights, dtype=torch.float64).log()).tolist()
        for k in range(count):
            others = weights[:k] + weights[k + 1 :]
            baseline = sum(others) + math.prod(others) ** (1 / (count - 1))
            if sum(weights) == 0:
                assert math.isnan(signal[k])
            else:
                wanted = (math.log(sum(weights) / baseline) if baseline else 0.0) - weights[k] / sum(weights)
                assert signal[k] == pytest.approx(wanted, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("estimator", bounds.BOUND_ESTIMATORS)
def test_bound_with_weights_of_zero(estimator):
    """All ways in which the weights of three slots, two samples each, are 0 or positive, one a row."""
    slots, n = 3, 1 if estimator == "vimco" else 2
    zero = torch.tensor(list(itertools.product((False, True), repeat=slots * n))).t()
    finite = torch.randn(zero.shape, dtype=torch.float64)

    def run(log_of_zero, select=None):
        leaf = torch.zeros(zero.shape[1], 70, requires_grad=True)
        log_p = torch.where(zero, log_of_zero, finite).requires_grad_()
        generator = torch.Generator().manual_seed(0)
        bound = multi_sample_bound(lambda b: log_p, leaf, slots, estimator, n=2, generator=generator)
        (bound if select is None else torch.where(select, bound, 0)).sum().backward()
        return bound.detach(), leaf.grad, log_p.grad

    bound, grad, pathwise = run(-math.inf)
    by_slot = zero.unflatten(0, (n, slots))
    some = ~by_slot.all(1).any(0)  # every bound has a positive weight
    assert torch.equal(bound.isfinite(), some)
    assert grad[some].isfinite().all()
    assert grad[~some].isnan().any(1).all()
    shares = torch.where(zero, -math.inf, finite).unflatten(0, (n, slots)).softmax(1).nan_to_num() / n
    torch.testing.assert_close(pathwise.unflatten(0, (n, slots)), shares, rtol=1e-13, atol=0)
    _, limit, _ = run(-1e6)
    two = (by_slot.sum(1) <= slots - 2).all(0)  # no comparison with log 0: the limit of small weights
    torch.testing.assert_close(grad[two], limit[two], rtol=1e-6, atol=1e-6)
    _, grad, _ = run(-math.inf, some)
    assert grad.isfinite().all()
    assert not grad[~some].any()


@pytest.mark.parametrize("estimator", bounds.BOUND_ESTIMATORS)
def test_bound_with_weights_that_are_infinite_or_nan(estimator):
    patterns = torch.tensor(NOT_FINITE).double()
    bad = ((patterns == math.inf) | patterns.isnan()).any(1)
    leaf = torch.zeros(len(bad), 70, requires_grad=True)
    more = torch.zeros(0 if estimator == "vimco" else 3, len(bad), dtype=torch.float64)
    bound = multi_sample_bound(lambda b: torch.cat([patterns.t(), more]), leaf, 3, estimator)
    bound.sum().backward()
    assert not bound[bad].isfinite().any()
    assert leaf.grad[bad].isnan().any(1).all()
    kept = ~bad & (patterns != -math.inf).any(1)
    assert bound[kept].isfinite().all()
    assert leaf.grad[kept].isfinite().all()


# --- integration ------------------------------------------------------------------------------------------------------


def loss_of(logits, theta, seed):
    samples = sample(logits, 4, seed=seed)
    return surrogate(samples, (samples.unpack() * theta).sum(-1) ** 2)


def test_surrogate_gradients():
    logits, theta = torch.randn(6, 9, requires_grad=True), torch.randn(9, requires_grad=True)
    seed = torch.tensor(5)
    value = loss_of(logits, theta, seed)
    (2 * value).backward()
    samples = sample(logits, 4, seed=5)
    values = (samples.unpack() * theta).sum(-1) ** 2
    assert value.item() == pytest.approx(values.mean(0).sum().item(), rel=1e-5)
    assert torch.allclose(logits.grad, 2 * gradient(samples, values))
    (pathwise,) = torch.autograd.grad(values.mean(0).sum(), theta)
    assert torch.allclose(theta.grad, 2 * pathwise, rtol=1e-5)


def test_compiles_to_one_graph():
    compiled = torch.compile(loss_of, fullgraph=True)
    results = []
    for function in (loss_of, compiled):
        torch.manual_seed(0)
        logits, theta = torch.randn(6, 9, requires_grad=True), torch.randn(9, requires_grad=True)
        function(logits, theta, torch.tensor(5)).backward()
        results.append((logits.grad, theta.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)

    drawn = torch.compile(lambda x: sample(x, 4).unpack(), fullgraph=True)
    x = torch.zeros(8, 64)
    assert not torch.equal(drawn(x), drawn(x))  # a new seed at every call


def test_autocast_and_functional_call():
    model = BernoulliVAE(64, latents=20, hidden=(16,))
    x = (torch.rand(10, 64) > 0.5).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = model.evidence_lower_bound(x, 4, generator=torch.Generator().manual_seed(0)).mean()
    value.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    class Bound(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner.evidence_lower_bound(x, 4, generator=torch.Generator().manual_seed(1))

    module = Bound()
    named = {f"inner.{name}": value for name, value in (parameters | buffers).items()}
    assert torch.equal(torch.func.functional_call(module, named, (x,)), module(x))


class _Training(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vae = BernoulliVAE(32, latents=10)

    def forward(self, x, seed):
        return -self.vae.evidence_lower_bound(x, 4, generator=torch.Generator().manual_seed(seed)).mean()


def _distributed_gradients(rank):
    x = (torch.rand(8, 32, generator=torch.Generator().manual_seed(rank)) > 0.5).float()
    model = torch.nn.parallel.DistributedDataParallel(_Training())
    model(x, rank).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


@needs_gloo
def test_distributed_data_parallel_averages_the_estimates():
    first, second = run_in_two_processes(_distributed_gradients)
    single = _Training()
    with one_thread():
        for rank in (0, 1):
            x = (torch.rand(8, 32, generator=torch.Generator().manual_seed(rank)) > 0.5).float()
            (single(x, rank) / 2).backward()
    for name, parameter in single.named_parameters():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], parameter.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("estimator", [name for name in antithetic.ESTIMATORS if name != "straight_through"])
def test_estimators_agree_on_a_trained_decoder(estimator):
    """On real digits: mean of the estimates within 5 standard errors of LOORF's, by component and in the norm."""
    digits = pytest.importorskip("sklearn.datasets").load_digits().images.reshape(-1, 64) / 16
    x = torch.from_numpy(digits[:4]).round().float()
    torch.manual_seed(0)
    model = BernoulliVAE(64, latents=12, mean=x.mean(0))
    repeats = 4000
    logits = (model.encode(x).detach() * 3).expand(repeats, -1, -1)

    def estimate(name):
        leaf = logits.clone().requires_grad_()
        generator = torch.Generator().manual_seed(7)
        values = expectation(lambda b: model.log_weight(x, b, logits), leaf, 4, name, generator=generator)
        values.sum().backward()
        return leaf.grad.mean(0), leaf.grad.var(0) / repeats

    (mean, error), (wanted, wanted_error) = estimate(estimator), estimate("loorf")
    z = (mean - wanted) / (error + wanted_error).sqrt()
    assert z.abs().max() < 5
    assert z.square().mean() < 2 or estimator == "loorf"


# --- wrong calls ------------------------------------------------------------------------------------------------------

X = torch.zeros(3, 5)
S = sample(X, 4, seed=0)

WRONG_CALLS = [
    (lambda: sample([0.0], 2), TypeError, "sample: logits must be a tensor, got list"),
    (lambda: sample(X.double(), 2), TypeError,
     "sample: logits must be float32, bfloat16 or float16, got torch.float64"),
    (lambda: sample(torch.zeros(()), 2), ValueError, "sample: logits must have at least one dimension, got a scalar"),
    (lambda: sample(X, 1), ValueError, "antithetic_sample: n must be 2 to 64 for coupling 'dirichlet', got 1"),
    (lambda: sample(X, 65), ValueError, "antithetic_sample: n must be 2 to 64 for coupling 'dirichlet', got 65"),
    (lambda: sample(X, 0, "independent"), ValueError,
     "antithetic_sample: n must be 1 to 64 for coupling 'independent', got 0"),
    (lambda: sample(X, 3, "antithetic_pairs"), ValueError,
     "antithetic_sample: n must be even for coupling 'antithetic_pairs', got 3"),
    (lambda: sample(X, 2, "clayton"), ValueError,
     "sample: coupling must be one of 'independent', 'antithetic_pairs', 'dirichlet', 'systematic', 'gaussian', "
     "got 'clayton'"),
    (lambda: sample(X, 2, layout="rows"), ValueError,
     "sample: layout must be one of 'sample', 'dimension', got 'rows'"),
    (lambda: sample(X + math.nan, 2), ValueError, "antithetic_sample: logits must be finite, got a NaN or an infinity"),
    (lambda: sample(X - math.inf, 2, "gaussian"), ValueError,
     "antithetic_sample: logits must be finite, got a NaN or an infinity"),
    (lambda: sample(X, 2, seed=1, generator=torch.Generator()), ValueError, "sample: give generator or seed, not both"),
    (lambda: S.packed, ValueError,
     'AntitheticSamples.packed: sample with layout="dimension" for packed rows'),
    (lambda: gradient(S, torch.zeros(4)), ValueError,
     "gradient: values must have one value a sample and row, shape (4, 3), got (4,)"),
    (lambda: gradient(S, torch.zeros(4, 3, dtype=torch.int64)), TypeError,
     "gradient: values must be floating point, got torch.int64"),
    (lambda: gradient(sample(X, 1, "independent"), torch.zeros(1, 3)), ValueError,
     "gradient: needs n >= 2 samples, got 1: a single value cannot be compared with a mean"),
    (lambda: expectation(quadratic, X, 4, "arms"), ValueError,
     f"expectation: estimator must be one of {', '.join(map(repr, antithetic.ESTIMATORS))}, got 'arms'"),
    (lambda: expectation(quadratic, X, 1, "loorf"), ValueError, "expectation: loorf needs n >= 2 samples, got 1"),
    (lambda: expectation(lambda b: b, X, 2), ValueError,
     "expectation: values must have one value a sample and row, shape (2, 3), got (2, 3, 5)"),
    (lambda: expectation(lambda b: b.detach().sum(-1), X, 2, "double_cv"), ValueError,
     "expectation: double_cv needs the gradient of f, which f's result does not have"),
    (lambda: multi_sample_bound(quadratic, X, 2, "arms"), ValueError,
     "multi_sample_bound: estimator must be one of 'arms_d', 'arms_n', 'arms_s', 'loorf', 'disarm', 'vimco', "
     "got 'arms'"),
    (lambda: multi_sample_bound(quadratic, X, 1, "vimco"), ValueError,
     "multi_sample_bound: vimco needs importance_samples >= 2, got 1"),
    (lambda: multi_sample_bound(lambda b: b.sum(), X, 2), ValueError,
     "multi_sample_bound: log_joint must return shape (4, 3), got ()"),
    (lambda: multi_sample_bound(quadratic, X, 2, n=1), ValueError,
     "multi_sample_bound: arms_d needs n >= 2 samples a slot, got 1"),
    (lambda: ops.antithetic_gradient(S.bits, torch.zeros(3, 4), None, 6, "sample"), ValueError,
     "antithetic_gradient: bits must be torch.uint8 (3, 6) for 4 samples and 6 dimensions, got torch.uint8 (3, 5)"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS)
def test_wrong_calls(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
