"""Activations that satisfy linear inequalities A x <= b and equalities by construction.

Source: Frerix, Niessner, Cremers, "Homogeneous Linear Inequality Constraints for Neural Network Activations" (2020).
"""

from lowbit_ext.cone.constraints import Cone
from lowbit_ext.cone.double_description import predicted_rays
from lowbit_ext.cone.layers import ConeActivation, ConeLinear
from lowbit_ext.cone.named import box, checkerboard, convex, monotone, monotone_convex, nonnegative, simplex
from lowbit_ext.cone.polyhedron import Polyhedron

__all__ = [
    "Cone",
    "ConeActivation",
    "ConeLinear",
    "Polyhedron",
    "box",
    "checkerboard",
    "convex",
    "monotone",
    "monotone_convex",
    "nonnegative",
    "predicted_rays",
    "simplex",
]
