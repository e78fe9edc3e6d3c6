"""Antithetic multi-sample gradient estimates for Bernoulli variables, with a fused sampler that writes bits.

Source: Dimitriev and Zhou, "ARMS: Antithetic-REINFORCE-Multi-Sample gradient for binary variables", ICML 2021.
"""

from lowbit_ext.antithetic.bounds import multi_sample_bound
from lowbit_ext.antithetic.estimators import ESTIMATORS, expectation, gradient, surrogate
from lowbit_ext.antithetic.samples import AntitheticSamples, sample

__all__ = [
    "ESTIMATORS",
    "AntitheticSamples",
    "expectation",
    "gradient",
    "multi_sample_bound",
    "sample",
    "surrogate",
]
