"""Operators of the binary layers. Raw: the modules beside hold what users call.

Tensors here are words (int64, channels-last, packed.py) and dense floats; geometry travels as one tuple of integers.
"""

from lowbit_ext.binary.ops.activation import (
    LEVELS,
    masked_gradient,
    quantized_activation,
    quantized_activation_with_mask,
)
from lowbit_ext.binary.ops.binarization import binarize, binarize_with_mask
from lowbit_ext.binary.ops.convolution import (
    binary_conv2d,
    binary_conv2d_block_weight,
    binary_conv2d_epilogue,
    check_residual,
    output_kind,
)
from lowbit_ext.binary.ops.geometry import ENCODINGS, Geometry, Window, conv_shape, conv_size
from lowbit_ext.binary.ops.gradients import binary_conv2d_input_grad, binary_conv2d_weight_grad, gradient_dtype
from lowbit_ext.binary.ops.matmul import MOST_DEPTH, binary_matmul
from lowbit_ext.binary.ops.pointwise import REDUCTIONS, pointwise
from lowbit_ext.binary.ops.pooling import binary_avg_pool2d, binary_max_pool2d
from lowbit_ext.binary.ops.steps import MOST_STEPS, STEP_KINDS, Step, step_table

__all__ = [
    "ENCODINGS",
    "LEVELS",
    "MOST_DEPTH",
    "MOST_STEPS",
    "REDUCTIONS",
    "STEP_KINDS",
    "Geometry",
    "Step",
    "Window",
    "binarize",
    "binarize_with_mask",
    "binary_avg_pool2d",
    "binary_conv2d",
    "binary_conv2d_block_weight",
    "binary_conv2d_epilogue",
    "binary_conv2d_input_grad",
    "binary_conv2d_weight_grad",
    "binary_matmul",
    "binary_max_pool2d",
    "check_residual",
    "conv_shape",
    "conv_size",
    "gradient_dtype",
    "masked_gradient",
    "output_kind",
    "pointwise",
    "quantized_activation",
    "quantized_activation_with_mask",
    "step_table",
]
