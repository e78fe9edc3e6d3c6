"""Operators of the antithetic estimators: schema, outputs and launcher of each. Raw: samples.py holds what users call.

Logits, ratios and gradients are (rows, dimensions) float32; weights (rows, samples) float32. Bits are (rows,
dimensions) integers, bit i of which is sample i, or words (samples, rows, words) as in packed.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_ext import _native, _oplib
from lowbit_ext.packed import words_for

COUPLINGS: dict[str, int] = _native.cpu.COUPLINGS
LAYOUTS: dict[str, int] = _native.cpu.SAMPLE_LAYOUTS
MOST_SAMPLES: int = _native.cpu.MOST_SAMPLES


def bits_type(samples: int) -> torch.dtype:
    """Smallest integer type that holds one bit a sample."""
    if samples <= 8:
        return torch.uint8
    return torch.int16 if samples <= 16 else torch.int32 if samples <= 32 else torch.int64


def bits_size(rows: int, dimensions: int, samples: int, layout: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the bits of so many samples."""
    if layout == "dimension":
        return (samples, rows, words_for(dimensions)), torch.int64
    return (rows, dimensions), bits_type(samples)


def _check_sample(logits: Tensor, quantile: Tensor | None, samples: int, coupling: str, layout: str) -> None:
    if coupling not in COUPLINGS:
        raise ValueError(f"antithetic_sample: coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"antithetic_sample: layout must be 'sample' or 'dimension', got {layout!r}")
    if logits.dtype != torch.float32 or logits.dim() != 2:
        raise ValueError(
            f"antithetic_sample: logits must be float32 (rows, dimensions), got {logits.dtype} {tuple(logits.shape)}"
        )
    least = 1 if coupling == "independent" else 2
    if not least <= samples <= MOST_SAMPLES:
        raise ValueError(
            f"antithetic_sample: n must be {least} to {MOST_SAMPLES} for coupling {coupling!r}, got {samples}"
        )
    if coupling == "antithetic_pairs" and samples % 2:
        raise ValueError(f"antithetic_sample: n must be even for coupling 'antithetic_pairs', got {samples}")
    if (coupling == "gaussian") != (quantile is not None):
        raise ValueError("antithetic_sample: quantile must be given for coupling 'gaussian' and for no other")
    if quantile is not None and (quantile.dtype != torch.float32 or quantile.shape != logits.shape):
        raise ValueError(
            f"antithetic_sample: quantile must be float32 {tuple(logits.shape)}, "
            f"got {quantile.dtype} {tuple(quantile.shape)}"
        )


def _sample_outputs(
    logits: Tensor, quantile: Tensor | None, samples: int, coupling: str, layout: str, seed: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    _check_sample(logits, quantile, samples, coupling, layout)
    size, dtype = bits_size(logits.shape[0], logits.shape[1], samples, layout)
    return logits.new_empty(size, dtype=dtype), logits.new_empty(logits.shape)


def _sample(
    logits: Tensor, quantile: Tensor | None, samples: int, coupling: str, layout: str, seed: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    bits, ratio = _sample_outputs(logits, quantile, samples, coupling, layout, seed, offset)
    rows, dimensions = logits.shape
    logits = logits.contiguous()
    quantile = None if quantile is None else quantile.contiguous()
    status = _native.kernels(logits).antithetic_sample(
        _native.pointer(logits, logits, "antithetic_sample: logits"),
        _native.pointer(quantile, logits, "antithetic_sample: quantile"),
        rows,
        dimensions,
        samples,
        COUPLINGS[coupling],
        LAYOUTS[layout],
        int(seed) & (2**64 - 1),
        offset & (2**64 - 1),
        bits.data_ptr(),
        ratio.data_ptr(),
    )
    if status == _native.NOT_FINITE:
        raise ValueError("antithetic_sample: logits must be finite, got a NaN or an infinity")
    _native.check("antithetic_sample", status)
    if quantile is not None:
        ratio.fill_(1)
    return bits, ratio


# (bits, ratio). seed: int64 tensor of one element, so that compiled graphs draw it anew at every run. ratio is 1 for
# the gaussian coupling, whose ratio the wrapper computes.
antithetic_sample = _oplib.define(
    "antithetic_sample(Tensor logits, Tensor? quantile, int samples, str coupling, str layout, Tensor seed, int offset)"
    " -> (Tensor, Tensor)",
    outputs=_sample_outputs,
    launcher=_sample,
)


def _gradient_outputs(bits: Tensor, weight: Tensor, ratio: Tensor | None, dimensions: int, layout: str) -> Tensor:
    if weight.dtype != torch.float32 or weight.dim() != 2:
        raise ValueError(
            f"antithetic_gradient: weight must be float32 (rows, samples), got {weight.dtype} {tuple(weight.shape)}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"antithetic_gradient: layout must be 'sample' or 'dimension', got {layout!r}")
    rows, samples = weight.shape
    if not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"antithetic_gradient: weight must have 1 to {MOST_SAMPLES} samples, got {samples}")
    size, dtype = bits_size(rows, dimensions, samples, layout)
    if bits.dtype != dtype or bits.shape != size:
        raise ValueError(
            f"antithetic_gradient: bits must be {dtype} {size} for {samples} samples and {dimensions} dimensions, "
            f"got {bits.dtype} {tuple(bits.shape)}"
        )
    if ratio is not None and (ratio.dtype != torch.float32 or ratio.shape != (rows, dimensions)):
        raise ValueError(
            f"antithetic_gradient: ratio must be float32 {(rows, dimensions)}, got {ratio.dtype} {tuple(ratio.shape)}"
        )
    return bits.new_empty((rows, dimensions), dtype=torch.float32)


def _gradient(bits: Tensor, weight: Tensor, ratio: Tensor | None, dimensions: int, layout: str) -> Tensor:
    gradient = _gradient_outputs(bits, weight, ratio, dimensions, layout)
    rows, samples = weight.shape
    bits, weight = bits.contiguous(), weight.contiguous()
    ratio = None if ratio is None else ratio.contiguous()
    status = _native.kernels(bits).antithetic_gradient(
        _native.pointer(bits, bits, "antithetic_gradient: bits"),
        LAYOUTS[layout],
        rows,
        dimensions,
        samples,
        _native.pointer(weight, bits, "antithetic_gradient: weight"),
        _native.pointer(ratio, bits, "antithetic_gradient: ratio"),
        gradient.data_ptr(),
    )
    _native.check("antithetic_gradient", status)
    return gradient


# ratio * sum over samples of weight * bit, (rows, dimensions) float32.
antithetic_gradient = _oplib.define(
    "antithetic_gradient(Tensor bits, Tensor weight, Tensor? ratio, SymInt dimensions, str layout) -> Tensor",
    outputs=_gradient_outputs,
    launcher=_gradient,
)
