"""Fused CPU and CUDA kernels for networks whose activations, gradients or samples need only a few bits."""

from importlib.metadata import version as _version

from lowbit_ext import antithetic, binary, cone, duo, federated, helstrom, lowmem, models
from lowbit_ext._native import active_isa, available_isas
from lowbit_ext.packed import PackedTensor

__version__ = _version("lowbit-ext")
__all__ = [
    "PackedTensor",
    "active_isa",
    "antithetic",
    "available_isas",
    "binary",
    "cone",
    "duo",
    "federated",
    "helstrom",
    "lowmem",
    "models",
]
