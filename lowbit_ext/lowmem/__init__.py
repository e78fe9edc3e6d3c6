"""Back-propagation with approximate activations: an exact forward pass that keeps a few bits an element.

`convert` rewrites the norms, activation functions, convolutions and linear layers of a model; `saved_tensors` works on
any module, `allocate_bits` tells it how many bits each tensor is worth; `ledger` shows what is kept, `gradient_audit`
what it costs in accuracy of gradients.

Source: Chakrabarti and Moseley, "Backprop with approximate activations for memory-efficient network training", NeurIPS
2019.
"""

from lowbit_ext.lowmem._convert import Conversion, convert, report
from lowbit_ext.lowmem._ledger import Ledger, ledger
from lowbit_ext.lowmem._stored import empty_cache
from lowbit_ext.lowmem.allocation import allocate_bits
from lowbit_ext.lowmem.audit import LayerError, gradient_audit
from lowbit_ext.lowmem.blocks import LowMemBlock
from lowbit_ext.lowmem.codes import (
    ChannelCodes,
    Codes,
    dequantize,
    dequantize4,
    quantize,
    quantize4,
    quantize_channels,
)
from lowbit_ext.lowmem.hooks import BitPlan, saved_tensors

__all__ = [
    "BitPlan", "ChannelCodes", "Codes", "Conversion", "LayerError", "Ledger", "LowMemBlock", "allocate_bits", "convert",
    "dequantize", "dequantize4", "empty_cache", "gradient_audit", "ledger", "quantize", "quantize4",
    "quantize_channels", "report", "saved_tensors",
]
