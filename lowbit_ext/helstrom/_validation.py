"""What HelstromClassifier is given, checked: parameters, samples, labels and their weights."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    check_non_negative,
    column_or_1d,
    validate_data,
)
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext.helstrom import samples as rows
from lowbit_ext.helstrom.samples import Samples
from lowbit_ext.helstrom.states import Array
from lowbit_ext.packed import PackedTensor

CHOICES = {
    "state": ("mixed", "pure"),
    "encoding": ("normalise", "amplitude", "stereographic"),
    "solver": ("auto", "explicit", "gram"),
    "multi_class": ("ovr", "pgm"),
}

# Largest order of a matrix whose eigenvectors are sought: 8 GiB in float64, hours of work.
LARGEST_ORDER = 32768


def check_parameters(classifier: BaseEstimator) -> None:
    """Raises ValueError for a parameter of HelstromClassifier that is out of range, or two that do not go together."""
    for name, choices in CHOICES.items():
        if (value := getattr(classifier, name)) not in choices:
            raise ValueError(f"HelstromClassifier: {name} must be one of {', '.join(choices)}, got {value!r}")
    if not _is_number(classifier.copies) or not classifier.copies > 0:
        raise ValueError(f"HelstromClassifier: copies must be a number above 0, got {classifier.copies!r}")
    named = isinstance(classifier.prior, str) and classifier.prior in ("equal", "empirical")
    if not named and not (_is_number(classifier.prior) and float(classifier.prior) > 0):
        raise ValueError(
            f"HelstromClassifier: prior must be 'equal', 'empirical' or p0 / p1 above 0, got {classifier.prior!r}"
        )
    if not _is_number(classifier.tol) or not 0 <= classifier.tol < 1:
        raise ValueError(f"HelstromClassifier: tol must be a number from 0 to below 1, got {classifier.tol!r}")
    if classifier.threshold is not None and not _is_number(classifier.threshold):
        raise ValueError(f"HelstromClassifier: threshold must be a number or None, got {classifier.threshold!r}")
    if classifier.state == "pure" and classifier.encoding == "stereographic":
        raise ValueError("HelstromClassifier: pure states take encoding 'normalise' or 'amplitude', which keep "
                         "frequencies, got 'stereographic'")
    if classifier.state == "mixed" and classifier.solver == "explicit" and not is_whole(classifier.copies):
        raise ValueError(
            f"HelstromClassifier: solver='explicit' needs whole copies, got {classifier.copies!r}; use solver='gram'"
        )


def validate(classifier: BaseEstimator, X: Any, y: Any = "no_validation", reset: bool = False) -> Any:
    """Samples, and labels if there are any, checked and in the form that the computation takes."""
    if not reset:
        check_is_fitted(classifier)
    if isinstance(X, PackedTensor):
        return _validate_packed(classifier, X, y, reset)
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        X = (X.float() if X.dtype in (torch.bfloat16, torch.float16) else X).numpy()
    checked = validate_data(classifier, X, y, reset=reset, accept_sparse="csr", dtype=np.float64)
    values, y = (checked, y) if isinstance(y, str) else checked
    if classifier.threshold is not None and scipy.sparse.issparse(values) and classifier.threshold < 0:
        raise ValueError(
            f"HelstromClassifier: threshold {classifier.threshold} would turn every absent value of a sparse X into 1; "
            "it must be at least 0 there"
        )
    if classifier.state == "pure" and classifier.threshold is None:
        check_non_negative(values, "HelstromClassifier with state='pure' (counts or frequencies of features)")
    if scipy.sparse.issparse(values):
        values = scipy.sparse.csr_matrix(values)
    samples = rows.binarize(values, classifier.threshold)
    return samples if isinstance(y, str) else (samples, y)


def _validate_packed(classifier: BaseEstimator, X: PackedTensor, y: Any, reset: bool) -> Any:
    if X.dim() != 2 or X.encoding != "step" or X.scale is not None:
        raise ValueError(
            f"HelstromClassifier: a PackedTensor must be (N, C) of encoding 'step' without a scale, got "
            f"{tuple(X.shape)} of encoding {X.encoding!r}{'' if X.scale is None else ' with a scale'}; "
            "or pass its unpack()"
        )
    if X.shape[0] == 0 or X.channels == 0:
        raise ValueError(f"HelstromClassifier: X must hold a sample and a feature, got {tuple(X.shape)}")
    if reset:
        classifier.n_features_in_ = X.channels
        classifier.__dict__.pop("feature_names_in_", None)
    elif X.channels != classifier.n_features_in_:
        raise ValueError(
            f"X has {X.channels} features, but HelstromClassifier is expecting {classifier.n_features_in_} features "
            "as input"
        )
    samples = X.to("cpu")
    if classifier.threshold is not None and not 0 <= classifier.threshold < 1:
        samples = rows.pack(np.full(tuple(X.shape), classifier.threshold < 0))
    if isinstance(y, str):
        return samples
    y = column_or_1d(y, warn=True)
    if len(y) != X.shape[0]:
        raise ValueError(f"HelstromClassifier: X holds {X.shape[0]} samples, y {len(y)} labels")
    return samples, y


def validate_training(classifier: BaseEstimator, X: Any, y: Any, reset: bool) -> tuple[Samples, np.ndarray]:
    """The same for training: samples and labels that can be classes."""
    if isinstance(y, torch.Tensor):
        y = y.detach().cpu().numpy()
    samples, y = validate(classifier, X, y, reset)
    check_classification_targets(y)
    return samples, y


def class_weights(classifier: BaseEstimator, samples: Samples, labels: np.ndarray, sample_weight: Any) -> Array:
    """Weights (K, N): a sample's own in the row of its class."""
    if len(classifier.classes_) < 2:
        raise ValueError(f"HelstromClassifier: needs at least 2 classes, got 1 class: {classifier.classes_.tolist()}")
    proxy = np.empty((rows.count(samples), 1))
    if isinstance(sample_weight, Tensor):
        sample_weight = _arguments.tensor("HelstromClassifier", "sample_weight", sample_weight).detach().cpu().double()
    weight = _check_sample_weight(sample_weight, proxy, dtype=np.float64)
    if (weight < 0).any():
        raise ValueError(f"HelstromClassifier: sample_weight must not be negative, the smallest is {weight.min()}")
    weights = np.zeros((len(classifier.classes_), rows.count(samples)))
    weights[labels, np.arange(rows.count(samples))] = weight
    return weights


def check_order(order: int, solver: str, other: str) -> int:
    """The order of the matrices that a solver needs, or ValueError where they are too large."""
    if order > LARGEST_ORDER:
        raise ValueError(
            f"HelstromClassifier: solver='{solver}' needs matrices of order {order}, more than {LARGEST_ORDER}; use "
            f"solver='{other}', fewer features, copies or samples, or state='pure'"
        )
    return order


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, of any type."""
    return _is_number(value) and float(value) == int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(float(value)))
