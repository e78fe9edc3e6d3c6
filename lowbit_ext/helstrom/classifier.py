"""HelstromClassifier: the quantum-inspired classifier with scikit-learn's estimator interface."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted

from lowbit_ext.helstrom import samples as rows
from lowbit_ext.helstrom import states
from lowbit_ext.helstrom._validation import (
    check_order,
    check_parameters,
    class_weights,
    is_whole,
    validate,
    validate_training,
)
from lowbit_ext.helstrom.samples import Samples
from lowbit_ext.helstrom.states import Array, Measurement


def _adds_up(classifier: HelstromClassifier) -> bool:
    """Whether samples can be added to what is known of earlier ones."""
    if classifier.state == "mixed" and (classifier.solver == "gram" or not is_whole(classifier.copies)):
        raise AttributeError(
            "HelstromClassifier: partial_fit adds up samples, which solver='gram' and fractional copies of mixed "
            "states do not; use solver='explicit' and whole copies, or fit"
        )
    return True


class HelstromClassifier(ClassifierMixin, BaseEstimator):
    """Classifier that measures samples as quantum states with the Helstrom measurement of the classes' states.

    A sample becomes a unit vector psi, a class a density operator: the mean of psi psi' over its samples (mixed), or
    one vector made of its features' frequencies (pure). With H = p1 rho_1 - p0 rho_0 and the projectors P+ and P- on
    its eigenvectors of positive and negative eigenvalues, s1 = psi' P+ psi and s0 = psi' P- psi; the class is 1 where
    s1 > s0. A sample on which both are 0, such as an empty one, goes to the class with the larger prior.

    Args:
        state: "mixed", or "pure": (v_c)_w = sqrt(share of the class's samples that hold feature w), normalised. For
            pure states features must not be negative; above 0 a sample holds them.
        encoding: "normalise": psi = x / |x| (a sample without features has no state); "amplitude": [x, 1] / |[x, 1]|;
            "stereographic": [2x, |x|^2 - 1] / (|x|^2 + 1), for mixed states. Only the latter two see lengths and signs.
        copies: every state is taken this many times, psi (x) ... (x) psi, which compares products of that many
            features. Fractions are possible where states are known by their products: for pure states and
            solver="gram", as long as no product is negative.
        prior: "equal"; "empirical": shares of the training samples; or p0 / p1, also the cost of a wrong "1" relative
            to a wrong "0": larger values name the positive class more rarely. With one-vs-rest it holds for every class
            against the others, so that "equal" weighs the class as much as all others together.
        solver: of mixed states. "explicit": matrices of the order of the encoded features (of their monomials of degree
            `copies`), samples are only added up. "gram": from the products of the N training samples, matrices N x N;
            products of bits are counted with AND and popcount. "auto": the smaller matrix.
        multi_class: for more than two classes "ovr", one class against the others, or "pgm", the pretty good
            measurement. "pgm" applies to two classes as well.
        threshold: features above it are 1, others 0. None leaves values as they are.
        tol: eigenvalues up to this size belong to the null space. The operators' traces add up to 1.

    Attributes:
        classes_: (K,) labels; of two, the latter is the positive class 1.
        eigenvalues_: eigenvalues of H outside the null space, ascending; a list of K arrays for one-vs-rest; for the
            pretty good measurement those of rho = sum p_c rho_c.
        success_bound_: no measurement of one sample names the class with a larger probability. Helstrom's bound
            (1 + |H|_1) / 2, (K,) of them for one-vs-rest; the square root of the pretty good measurement's own success.
            It speaks of a sample drawn from the training set's states, not of the error on new samples.
        class_prior_: priors (K, 2) of "not c" and "c" for one-vs-rest, otherwise (1, K).
        class_count_: (K,) training samples (their weights' sum).
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    X is an array, a scipy sparse matrix, a torch tensor, a data frame, or a PackedTensor (N, C) with encoding "step".
    The work is done in float64; values 0 and 1 are packed where their products are needed.

    Source: Tiwari and Melucci, "Towards a Quantum-Inspired Binary Classifier", IEEE Access 2019; further in `states`.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from lowbit_ext.helstrom import HelstromClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> HelstromClassifier(threshold=7).fit(X[:1200], y[:1200]).score(X[1200:], y[1200:]) > 0.8
        True
    """

    def __init__(
        self,
        *,
        state: str = "mixed",
        encoding: str = "normalise",
        copies: float = 1,
        prior: str | float = "equal",
        solver: str = "auto",
        multi_class: str = "ovr",
        threshold: float | None = None,
        tol: float = 1e-10,
    ) -> None:
        self.state = state
        self.encoding = encoding
        self.copies = copies
        self.prior = prior
        self.solver = solver
        self.multi_class = multi_class
        self.threshold = threshold
        self.tol = tol

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = self.state == "pure" and self.threshold is None
        # Means of states, seen without signs and lengths or one class against all others, may not part Gaussian blobs.
        tags.classifier_tags.poor_score = True
        return tags

    # --- training -----------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> HelstromClassifier:
        """Learns the measurement.

        Args:
            X: (N, d) samples.
            y: (N,) labels.
            sample_weight: (N,) non-negative weights.

        Raises:
            TypeError, ValueError: a parameter or an input that does not fit; a class without a state.
        """
        check_parameters(self)
        samples, y = validate_training(self, X, y, reset=True)
        self.classes_, labels = np.unique(y, return_inverse=True)
        weights = class_weights(self, samples, labels, sample_weight)
        solver = self._choose_solver(samples)
        self._start_sums(samples, solver)
        if solver == "gram":
            self._add_by_products(samples, weights)
        else:
            self._add(samples, weights)
        traces = self._sums.sum(axis=1) if self.state == "pure" else np.trace(self._sums, axis1=1, axis2=2)
        if not (traces > 0).all():
            names = ", ".join(repr(label) for label in self.classes_[~(traces > 0)].tolist())
            raise ValueError(
                f"HelstromClassifier: each class needs a sample with a weight and with a value other than 0; "
                f"class {names} has none"
            )
        self._measure()
        if solver == "gram":
            del self._sums  # they hold for these samples' coordinates alone
        return self

    @available_if(_adds_up)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> HelstromClassifier:
        """Adds samples to the classes' states, and learns the measurement of all samples so far.

        Args:
            X, y, sample_weight: as for `fit`. A class without samples so far is never named.
            classes: all labels that will ever come; needed in the first call.

        Raises:
            TypeError, ValueError: as for `fit`; a label that is not among the classes.
            AttributeError: solver "gram" or fractional copies for mixed states: products of samples do not add up.
        """
        check_parameters(self)
        first = not hasattr(self, "classes_")
        if first and classes is None:
            raise ValueError("HelstromClassifier: the first call of partial_fit needs classes, all labels to come")
        samples, y = validate_training(self, X, y, reset=first)
        if first:
            self.classes_ = np.unique(classes)
        elif classes is not None and not np.array_equal(self.classes_, np.unique(classes)):
            raise ValueError(
                f"HelstromClassifier: classes must stay {self.classes_.tolist()}, got {np.unique(classes).tolist()}"
            )
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"HelstromClassifier: y holds {unknown.tolist()}, not among classes")
        weights = class_weights(self, samples, np.searchsorted(self.classes_, y), sample_weight)
        if first:
            self._start_sums(samples, self._choose_solver(None))
        elif not hasattr(self, "_sums"):
            raise ValueError(
                "HelstromClassifier: fit used solver 'gram', which keeps no sums; fit with solver='explicit' "
                "before partial_fit"
            )
        self._add(samples, weights)
        self._measure()
        return self

    def _choose_solver(self, samples: Samples | None) -> str:
        """ "pure", "explicit" or "gram"; without samples the one that can add up samples, if there is one."""
        if self.state == "pure":
            return "pure"
        if self.solver != "auto":
            return self.solver
        if not is_whole(self.copies):
            return "gram"
        if samples is None:
            return "explicit"
        encoded = samples.shape[1] + (self.encoding != "normalise")
        return "explicit" if states.symmetric_dimension(encoded, int(self.copies)) <= rows.count(samples) else "gram"

    def _start_sums(self, samples: Samples, solver: str) -> None:
        """Sums over no samples: of states' outer products, or for pure states of features held."""
        classes, encoded = len(self.classes_), samples.shape[1] + (self.encoding != "normalise")
        self.class_count_ = np.zeros(classes)
        # Samples or vectors whose products with a sample the measurement applies to; None: to the sample's coordinates.
        self._references: Any = None
        self._basis: Array | None = None
        if solver == "pure":
            self._sums = np.zeros((classes, encoded))
        elif solver == "explicit":
            order = check_order(states.symmetric_dimension(encoded, int(self.copies)), "explicit", "gram")
            self._sums = np.zeros((classes, order, order))

    def _add(self, samples: Samples, weights: Array) -> None:
        """Adds samples to the classes' sums."""
        self.class_count_ += weights.sum(axis=1)
        for total, weight in zip(self._sums, weights, strict=True):
            members = np.flatnonzero(weight)
            for part, block in rows.blocks(rows.take(samples, members)):
                own = weight[members[part]]
                if self.state == "pure":
                    total[: block.shape[1]] += own @ (block > 0)
                    total[block.shape[1] :] += own.sum()  # what "amplitude" appends, every sample holds
                else:
                    total += states.outer_sum(self._explicit_coordinates(block), own)

    def _add_by_products(self, samples: Samples, weights: Array) -> None:
        """The sums in a basis of the samples' span, which their products determine."""
        check_order(rows.count(samples), "gram", "explicit")
        self.class_count_ += weights.sum(axis=1)
        self._references = samples
        gram = self._power(rows.state_product(samples, samples, self.encoding))
        self._basis, smallest = states.span_basis(gram, self.tol)
        if smallest < -self.tol:
            warnings.warn(
                f"HelstromClassifier: no states have products of {self.copies} copies like these (an eigenvalue of "
                f"their matrix is {smallest:.1e} of its trace); its positive part is used",
                stacklevel=3,
            )
        coordinates = gram @ self._basis
        self._sums = np.stack([states.outer_sum(coordinates, weight) for weight in weights])

    def _measure(self) -> None:
        """Measurement of the classes' states as they are."""
        classes = len(self.classes_)
        share = self.class_count_ / max(self.class_count_.sum(), np.finfo(float).tiny)
        self.eigenvalues_: Array | list[Array]
        self.success_bound_: float | Array
        if self.multi_class == "pgm":
            self.class_prior_ = self._priors(share)[None] if classes > 2 else self._pairs(share[1:])
            self.eigenvalues_, success, factors = self._pretty_good(self.class_prior_[0])
            self.success_bound_ = min(float(np.sqrt(success)), 1.0)
            self._measurements = [factors]
            return
        positives = range(classes) if classes > 2 else [1]
        self.class_prior_ = self._pairs(share[list(positives)])
        eigenvalues, self._measurements = self._one_against_rest(positives)
        bounds = [states.success_bound(values) for values in eigenvalues]
        self.eigenvalues_ = eigenvalues if classes > 2 else eigenvalues[0]
        self.success_bound_ = np.array(bounds) if classes > 2 else bounds[0]

    def _priors(self, share: Array) -> Array:
        """Priors of classes, from their shares of the samples."""
        if self.prior == "empirical":
            return share
        if self.prior == "equal":
            return np.full(len(share), 1.0 / len(self.classes_))
        raise ValueError(
            f"HelstromClassifier: a number as prior weighs one class against the others; multi_class='pgm' measures "
            f"{len(self.classes_)} classes at once and takes 'equal' or 'empirical', got {self.prior!r}"
        )

    def _pairs(self, share: Array) -> Array:
        """Priors of "not c" and "c", from the shares of the classes c."""
        if self.prior == "empirical":
            positive = share
        else:
            positive = np.full(len(share), 1.0 / (1.0 + (1.0 if self.prior == "equal" else float(self.prior))))
        return np.stack([1.0 - positive, positive], axis=1)

    def _one_against_rest(self, positives: Sequence[int]) -> tuple[list[Array], list[Measurement]]:
        """Eigenvalues and Helstrom measurement of each class against all others."""
        total = self._sums.sum(axis=0)
        eigenvalues, measurements, pairs = [], [], []
        for index, (_, p1) in zip(positives, self.class_prior_, strict=True):
            own = self._sums[index]
            rest = total - own if len(self.classes_) > 2 else self._sums[0]
            if self.state == "pure":
                pair = states.unit_rows(np.sqrt(np.stack([rest, own])))
                pairs.append(pair)
                values, measurement = states.pure_measurement(pair[1], pair[0], p1, self.copies, self.tol)
            else:
                observable = states.helstrom_observable(_density(own), _density(rest), p1)
                values, measurement = states.helstrom_measurement(observable, self.tol)
                measurement = self._in_references(measurement)
            eigenvalues.append(values)
            measurements.append(measurement)
        if self.state == "pure":
            self._references = np.concatenate(pairs)
        return eigenvalues, measurements

    def _pretty_good(self, priors: Array) -> tuple[Array, float, Measurement]:
        """Eigenvalues, success and measurement of all classes at once."""
        if self.state == "mixed":
            operators = [prior * _density(total) for prior, total in zip(priors, self._sums, strict=True)]
        else:
            self._references = states.unit_rows(np.sqrt(self._sums))
            gram = (self._references @ self._references.T) ** self.copies
            self._basis, _ = states.span_basis(gram, self.tol)
            coordinates = gram @ self._basis
            operators = [prior * np.outer(vector, vector) for prior, vector in zip(priors, coordinates, strict=True)]
        eigenvalues, success, factors = states.pretty_good_measurement(operators, self.tol)
        return eigenvalues, success, self._in_references(factors)

    def _in_references(self, factors: Measurement) -> Measurement:
        """Factors for coordinates in the basis as factors for products with the references."""
        return factors if self._basis is None else [self._basis @ factor for factor in factors]

    # --- prediction ---------------------------------------------------------------------------------------------------

    def decision_function(self, X: Any) -> Array:
        """s1 - s0 for every sample.

        Returns:
            (N,) in [-1, 1] for two classes: positive for classes_[1]. For more (N, K): s1 - s0 of each class against
            the others, or the probability of each outcome of the pretty good measurement. Where a sample lies in the
            null space the priors stand in for s.
        """
        judged = self._judged(validate(self, X))
        if len(self.classes_) == 2:
            return judged[:, 0, 1] - judged[:, 0, 0]
        return judged[:, 0] if self.multi_class == "pgm" else judged[:, :, 1] - judged[:, :, 0]

    def predict(self, X: Any) -> np.ndarray:
        """Label of every sample."""
        decision = self.decision_function(X)
        return self.classes_[decision.argmax(axis=1) if decision.ndim == 2 else (decision > 0).astype(np.intp)]

    def predict_proba(self, X: Any) -> Array:
        """Probabilities (N, K) of the measurement's outcomes (Born's rule); the null space's is shared out evenly.

        One-vs-rest measures each class on its own; their probabilities are divided by their sum.
        """
        judged = self._judged(validate(self, X))
        missing = np.maximum(1.0 - judged.sum(axis=2, keepdims=True), 0.0)
        probabilities = judged + missing / judged.shape[2]
        probabilities = probabilities[:, 0] if judged.shape[1] == 1 else probabilities[:, :, 1]
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def explain(self, top: int | None = None, feature_names: Any = None) -> dict[Any, list[tuple[str, float]]]:
        """Features that speak for each class: the diagonal of P+ - P-, the decision on a state of that feature alone.

        Args:
            top: number of features for each class; None for all.
            feature_names: (d,) names, such as a vectorizer's `get_feature_names_out()`; default: those of the data
                frame, otherwise x0, x1, ...

        Returns:
            For every label (name, weight) from the largest weight to the smallest. The weight is s1 - s0, or for the
            pretty good measurement of more than two classes the outcome's probability.
        """
        check_is_fitted(self)
        names = _check_feature_names_in(self, feature_names)
        scores = self._outcomes(self._feature_coordinates())
        if len(self.classes_) == 2:
            weights = (scores[:, 0, 1] - scores[:, 0, 0])[:, None] * np.array([-1.0, 1.0])
        else:
            weights = scores[:, 0] if self.multi_class == "pgm" else scores[:, :, 1] - scores[:, :, 0]
        order = np.argsort(-weights, axis=0, kind="stable")[:top]
        return {
            label: [(str(names[feature]), float(column[feature])) for feature in chosen]
            for label, column, chosen in zip(self.classes_.tolist(), weights.T, order.T, strict=True)
        }

    def _judged(self, samples: Samples) -> Array:
        """Outcome probabilities (N, measurements, outcomes), the priors where a sample lies in the null space."""
        parts = [
            self._outcomes(self._coordinates(rows.take(samples, slice(start, start + rows.BLOCK))))
            for start in range(0, rows.count(samples), rows.BLOCK)
        ]
        judged = np.concatenate(parts)
        return np.where(judged.sum(axis=2, keepdims=True) > self.tol, judged, self.class_prior_)

    def _coordinates(self, samples: Samples) -> Array:
        """What the measurements' factors apply to: products with the references, or coordinates of the copies."""
        if self._references is None:
            return self._explicit_coordinates(rows.dense(samples))
        if self.state == "pure":
            return self._power(states.encode(rows.dense(samples), self.encoding) @ self._references.T)
        return self._power(rows.state_product(samples, self._references, self.encoding))

    def _explicit_coordinates(self, block: Array) -> Array:
        """Coordinates of the copies of samples (N, d)."""
        return states.symmetric_power(states.encode(block, self.encoding), int(self.copies))

    def _feature_coordinates(self) -> Array:
        """The same for the states of single features, unit vectors of the encoded space."""
        features = self.n_features_in_
        if self._references is not None and self.state == "mixed":
            parts = [states.encode(block, self.encoding)[:, :features] for _, block in rows.blocks(self._references)]
            return self._power(np.concatenate(parts).T)
        unit = np.eye(features, features + (self.encoding != "normalise"))
        if self._references is not None:
            return self._power(unit @ self._references.T)
        return states.symmetric_power(unit, int(self.copies))

    def _outcomes(self, coordinates: Array) -> Array:
        """Probabilities (N, measurements, outcomes)."""
        if self.state == "pure" and self.multi_class == "ovr":  # each measurement has two references of its own
            pairs = np.split(coordinates, len(self._measurements), axis=1)
        else:
            pairs = [coordinates] * len(self._measurements)
        measured = zip(pairs, self._measurements, strict=True)
        return np.stack([states.outcome_probabilities(pair, factors) for pair, factors in measured], axis=1)

    def _power(self, products: Array) -> Array:
        """Products of copies from those of single states."""
        if self.copies == 1:
            return products
        if not is_whole(self.copies):
            if products.min(initial=0.0) < -self.tol:
                raise ValueError(
                    f"HelstromClassifier: copies={self.copies} needs products that are not negative, the smallest is "
                    f"{products.min():.3g}; use whole copies, or features and an encoding without negative values"
                )
            products = np.maximum(products, 0.0)
        return products**self.copies


def _density(total: Array) -> Array:
    """A sum of w psi psi' as a density operator of trace 1; 0 stays 0. Samples without a state are not in it."""
    trace = np.trace(total)
    return total / trace if trace > 0 else total
