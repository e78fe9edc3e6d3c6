"""Slow float64 definition of the quantum-inspired classifier: full tensor products, dense matrices, no shortcuts."""

import functools

import numpy as np


def psi(sample: np.ndarray, encoding: str, copies: int) -> np.ndarray:
    """State vector psi (x) ... (x) psi of one sample."""
    x = np.asarray(sample, dtype=np.float64)
    if encoding == "amplitude":
        x = np.append(x, 1.0)
    if encoding == "stereographic":
        square = x @ x
        x = np.append(2 * x, square - 1) / (square + 1)
    length = np.linalg.norm(x)
    return functools.reduce(np.kron, [x / length if length > 0 else x] * copies)


def density(samples: np.ndarray, encoding: str = "normalise", copies: int = 1) -> np.ndarray:
    """Mixed state 1/n sum psi psi'."""
    vectors = [psi(sample, encoding, copies) for sample in samples]
    return sum(np.outer(vector, vector) for vector in vectors) / len(vectors)


def pure_density(samples: np.ndarray, copies: int = 1) -> np.ndarray:
    """Pure state v v' of v_w = sqrt(p(w | c)), normalised."""
    v = np.sqrt((np.asarray(samples) > 0).mean(axis=0))
    v = functools.reduce(np.kron, [v / np.linalg.norm(v)] * copies)
    return np.outer(v, v)


def projectors(observable: np.ndarray, tol: float = 1e-10) -> tuple[np.ndarray, np.ndarray]:
    """P- and P+ of H, one eigenvector at a time."""
    minus, plus = np.zeros_like(observable), np.zeros_like(observable)
    for value, vector in _pairs(observable):
        if value > tol:
            plus += np.outer(vector, vector)
        elif value < -tol:
            minus += np.outer(vector, vector)
    return minus, plus


def _pairs(matrix: np.ndarray) -> list[tuple[float, np.ndarray]]:
    values, vectors = np.linalg.eigh(matrix)
    return list(zip(values, vectors.T, strict=True))


def decision(rho1: np.ndarray, rho0: np.ndarray, p1: float, vectors: list[np.ndarray]) -> np.ndarray:
    """s1 - s0 of state vectors."""
    minus, plus = projectors(p1 * rho1 - (1 - p1) * rho0)
    return np.array([vector @ plus @ vector - vector @ minus @ vector for vector in vectors])


def inverse_root(rho: np.ndarray, tol: float = 1e-10) -> np.ndarray:
    """rho^-1/2 on the support of rho."""
    return sum(np.outer(vector, vector) / np.sqrt(value) for value, vector in _pairs(rho) if value > tol)


def pretty_good_effects(rhos: list[np.ndarray], priors: np.ndarray) -> list[np.ndarray]:
    """E_c = rho^-1/2 p_c rho_c rho^-1/2."""
    root = inverse_root(sum(p * rho for p, rho in zip(priors, rhos, strict=True)))
    return [root @ (p * rho) @ root for p, rho in zip(priors, rhos, strict=True)]
