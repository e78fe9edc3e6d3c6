"""Density operators, observables and measurements: the mathematics of the classifier, on plain float64 arrays.

A state is given by coordinates in any orthonormal basis, or by its overlaps with reference vectors. A measurement is a
list of factors F, one for each outcome: the outcome's effect is F F', its probability for a state psi is |psi F|^2.
What the effects do not cover is the null space, which tells the classes apart no better than their priors.

Sources: Helstrom, "Quantum Detection and Estimation Theory" (1976), chapter IV; Tiwari and Melucci, "Towards a
Quantum-Inspired Binary Classifier" (IEEE Access 2019); Giuntini et al., "Multi-class classification based on quantum
state discrimination" (2023), for copies of states and their Gram form; Hausladen and Wootters (1994) and Barnum and
Knill (2002) for the pretty good measurement.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Measurement = list[Array]


# --- encodings --------------------------------------------------------------------------------------------------------


def unit_rows(x: Array) -> Array:
    """Rows divided by their length; rows of zeros stay as they are."""
    # Scaled by the largest entry first: squares must neither overflow nor vanish.
    largest = np.abs(x).max(axis=1, initial=0.0, keepdims=True)
    x = x / np.where(largest > 0, largest, 1.0)
    length = np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
    return x / np.where(length > 0, length, 1.0)


def encode(x: Array, encoding: str) -> Array:
    """State vectors of samples (N, d).

    Args:
        encoding: "normalise": x / |x|; "amplitude": [x, 1] / |[x, 1]|; "stereographic": [2x, |x|^2 - 1] / (|x|^2 + 1).

    Returns:
        (N, d) or, for the other two, (N, d + 1); rows of length 1, or 0 where a row cannot be normalised.
    """
    if encoding == "normalise":
        return unit_rows(x)
    if encoding == "amplitude":
        return unit_rows(np.hstack([x, np.ones((len(x), 1))]))
    with np.errstate(over="ignore"):  # an infinite square is the pole of the sphere
        scale = 2.0 / (np.einsum("ij,ij->i", x, x)[:, None] + 1.0)
    return np.hstack([x * scale, 1.0 - scale])


def encoded_product(inner: Array, squares: Array, other_squares: Array, encoding: str) -> Array:
    """Inner products of encoded samples from those of the samples themselves.

    Args:
        inner: (N, M) products <x_i, y_j>.
        squares, other_squares: (N,) and (M,) squared lengths of x and y.
        encoding: as for `encode`.
    """
    rows, columns = squares[:, None], other_squares[None, :]
    if encoding == "stereographic":
        return (4.0 * inner + (rows - 1.0) * (columns - 1.0)) / ((rows + 1.0) * (columns + 1.0))
    if encoding == "amplitude":
        inner, rows, columns = inner + 1.0, rows + 1.0, columns + 1.0
    return inner / (np.sqrt(np.where(rows > 0, rows, 1.0)) * np.sqrt(np.where(columns > 0, columns, 1.0)))


# --- copies -----------------------------------------------------------------------------------------------------------


def symmetric_dimension(dimension: int, copies: int) -> int:
    """Dimension of the space that the vectors psi (x) ... (x) psi of `copies` factors span."""
    return math.comb(dimension + copies - 1, copies)


@functools.lru_cache(maxsize=4)
def _monomials(dimension: int, copies: int) -> tuple[NDArray[np.intp], Array]:
    """Monomials (M, copies) by the indices of their factors, and the roots (M,) of their multinomial coefficients."""
    indices = np.array(list(itertools.combinations_with_replacement(range(dimension), copies)), dtype=np.intp)
    coefficients = np.full(len(indices), float(math.factorial(copies)))
    run = np.ones(len(indices))
    for place in range(1, copies):  # n! / prod(multiplicity!), the multiplicities being runs of equal indices
        run = np.where(indices[:, place] == indices[:, place - 1], run + 1.0, 1.0)
        coefficients /= run
    return indices, np.sqrt(coefficients)


def symmetric_power(states: Array, copies: int) -> Array:
    """Coordinates of psi (x) ... (x) psi in an orthonormal basis of the symmetric space.

    The basis vectors belong to the monomials of degree `copies`, with the square root of the multinomial coefficient as
    weight; so <psi, phi>^copies = <power(psi), power(phi)>, with about copies! fewer coordinates than the product has.
    """
    if copies == 1:
        return states
    monomials, weights = _monomials(states.shape[1], copies)
    result = weights * states[:, monomials[:, 0]]
    for place in range(1, copies):
        result *= states[:, monomials[:, place]]
    return result


def span_basis(gram: Array, tol: float) -> tuple[Array, float]:
    """Orthonormal basis of the span of states that are known by their Gram matrix.

    Args:
        gram: (N, N) inner products.
        tol: directions with at most this part of the trace do not count.

    Returns:
        (N, k) basis vectors as combinations of the states, so that gram @ basis are the states' coordinates; and the
        smallest eigenvalue as part of the trace, negative if no vectors have these inner products.
    """
    eigenvalues, vectors = np.linalg.eigh(gram)
    trace = float(np.trace(gram))
    kept = eigenvalues > tol * trace
    return vectors[:, kept] / np.sqrt(eigenvalues[kept]), float(eigenvalues[0] / trace) if trace > 0 else 0.0


# --- density operators and the Helstrom measurement -------------------------------------------------------------------


def outer_sum(states: Array, weights: Array) -> Array:
    """Sum of w psi psi': a density operator times the weights' sum."""
    return (states * weights[:, None]).T @ states


def helstrom_observable(rho1: Array, rho0: Array, p1: float) -> Array:
    """H = p1 rho1 - p0 rho0 with p0 = 1 - p1."""
    return p1 * rho1 - (1.0 - p1) * rho0


def helstrom_measurement(observable: Array, tol: float) -> tuple[Array, Measurement]:
    """Measurement that tells two states apart with the largest probability of success.

    Args:
        observable: (k, k) H, its states of trace 1.
        tol: eigenvalues up to this size belong to the null space. The traces of p1 rho1 and p0 rho0 add up to 1, so it
            is relative to them.

    Returns:
        Eigenvalues outside the null space, ascending; factors of P- and P+, the projectors on the eigenvectors of
        negative and of positive eigenvalues: the outcomes "class 0" and "class 1".
    """
    eigenvalues, vectors = np.linalg.eigh(observable)
    negative, positive = eigenvalues < -tol, eigenvalues > tol
    return eigenvalues[negative | positive], [vectors[:, negative], vectors[:, positive]]


def success_bound(eigenvalues: Array) -> float:
    """Helstrom's bound (1 + |H|_1) / 2: no measurement names the class with a larger probability."""
    return 0.5 * (1.0 + float(np.abs(eigenvalues).sum()))


def pure_measurement(v1: Array, v0: Array, p1: float, copies: float, tol: float) -> tuple[Array, Measurement]:
    """Helstrom measurement of two pure states, in closed form.

    Args:
        v1, v0: (D,) unit vectors with non-negative product.
        p1, tol: as for `helstrom_observable` and `helstrom_measurement`.
        copies: each state is taken this many times.

    Returns:
        Eigenvalues outside the null space, ((p1 - p0) -+ sqrt(1 - 4 p1 p0 c^2)) / 2 with c = <v1, v0>^copies; and the
        factors, (2, 1) or (2, 0), for coordinates (<psi, v0>^copies, <psi, v1>^copies).
    """
    p0 = 1.0 - p1
    # 1 - c^2 from the distance of the vectors: subtracting from 1 would leave half of the digits where they are close.
    # At least tol: vectors that are closer count as one.
    distance = min(0.5 * float(np.square(v1 - v0).sum()), 1.0)
    sine2 = -math.expm1(copies * math.log1p(-distance * (2.0 - distance))) if distance < 1.0 else 1.0
    cosine = (1.0 - distance) ** copies
    if sine2 <= tol:
        sine2, cosine = 0.0, 1.0
    root = math.sqrt((p1 - p0) ** 2 + 4.0 * p1 * p0 * sine2)
    # The eigenvalue of larger size without cancellation; the other from their product -p1 p0 (1 - c^2).
    larger = 0.5 * (abs(p1 - p0) + root)
    smaller = p1 * p0 * sine2 / larger if larger > 0 else 0.0
    negative, positive = (-smaller, larger) if p1 >= p0 else (-larger, smaller)

    none = np.empty((2, 0))
    factors = [none, none]
    if negative < -tol:
        length = math.hypot(negative * cosine, (negative - p1) * math.sqrt(sine2))
        factors[0] = np.array([[negative - p1], [p1 * cosine]]) / length
    if positive > tol:
        length = math.hypot(positive + p0 * sine2, p0 * cosine * math.sqrt(sine2))
        factors[1] = np.array([[-p0 * cosine], [positive + p0]]) / length
    eigenvalues = np.array([value for value in (negative, positive) if abs(value) > tol])
    return eigenvalues, factors


# --- pretty good measurement ------------------------------------------------------------------------------------------


def pretty_good_measurement(weighted: list[Array], tol: float) -> tuple[Array, float, Measurement]:
    """Square-root measurement E_c = rho^-1/2 p_c rho_c rho^-1/2 of any number of states, rho = sum p_c rho_c.

    Args:
        weighted: p_c rho_c, each (k, k).
        tol: eigenvalues of rho, and of an effect, up to this size belong to the null space.

    Returns:
        Eigenvalues of rho above tol, ascending; the probability of success; a factor of every effect.
    """
    eigenvalues, vectors = np.linalg.eigh(np.sum(weighted, axis=0))
    kept = eigenvalues > tol
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    root = vectors / np.sqrt(eigenvalues)
    success = 0.0
    factors = []
    for operator in weighted:
        effect = root.T @ operator @ root
        success += float(np.einsum("ij,ij->", effect, vectors.T @ operator @ vectors))
        values, axes = np.linalg.eigh(effect)
        counted = values > tol
        factors.append(vectors @ (axes[:, counted] * np.sqrt(values[counted])))
    return eigenvalues, success, factors


# --- outcomes ---------------------------------------------------------------------------------------------------------


def outcome_probabilities(coordinates: Array, measurement: Measurement) -> Array:
    """Probabilities (N, outcomes) of a measurement's outcomes (Born's rule); 1 less their sum is the null space's."""
    return np.stack([np.square(coordinates @ factor).sum(axis=1) for factor in measurement], axis=1)
