"""Binary convolution, linear and pooling: trained in PyTorch, run on packed bits.

Source: Courbariaux et al., "Binarized Neural Networks" (2016); Rastegari et al., "XNOR-Net" (2016); the {0, 1} encoding
and double thresholds are those of Kim et al., "BinaryDuo" (ICLR 2020).
"""

from lowbit_ext.binary.activation import binarize, binary_activation, unpack
from lowbit_ext.binary.conversion.convert import LayerConversion, conversions, convert
from lowbit_ext.binary.convolution import conv1d, conv2d, linear
from lowbit_ext.binary.layers import BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear
from lowbit_ext.binary.packing.pack import pack
from lowbit_ext.binary.packing.packed_model import PackedModel, load, save
from lowbit_ext.binary.pooling import avg_pool2d, global_avg_pool, max_pool2d
from lowbit_ext.binary.products import matmul
from lowbit_ext.binary.two_levels import TwoLevelConv2d
from lowbit_ext.binary.weight_cache import cached_weights
from lowbit_ext.binary.weights import PackedWeight, pack_weight

__all__ = [
    "BinaryActivation",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "LayerConversion",
    "PackedModel",
    "PackedWeight",
    "TwoLevelConv2d",
    "avg_pool2d",
    "binarize",
    "binary_activation",
    "cached_weights",
    "conv1d",
    "conv2d",
    "conversions",
    "convert",
    "global_avg_pool",
    "linear",
    "load",
    "matmul",
    "max_pool2d",
    "pack",
    "pack_weight",
    "save",
    "unpack",
]
