"""Coupled Bernoulli samples: sample() and what it returns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from lowbit_ext import _arguments
from lowbit_ext._torch import register_tree
from lowbit_ext.antithetic import ops
from lowbit_ext.packed import PackedTensor, unchecked, unpack_op

# Gauss-Legendre nodes of Owen's T: enough for 1e-12 at |h| <= 37.3, where the quantiles of LARGEST_LOGIT end.
_OWEN_NODES = 64

# Larger logits are taken for it, by the kernels as well (core/ops/antithetic_sample.h): exp(-745) is 0 in float64.
LARGEST_LOGIT = 700


def _magnitude(logits: Tensor) -> Tensor:
    """|logits| in float64, LARGEST_LOGIT at most; NaN for infinities."""
    magnitude = logits.double().abs()
    return magnitude.clamp(max=LARGEST_LOGIT) + 0 * magnitude


def normal_quantile(logits: Tensor) -> Tensor:
    """Phi^-1(min(p, 1 - p)) with p = sigmoid(logits), in float64, [-37.3, 0]."""
    return torch.special.ndtri(torch.sigmoid(-_magnitude(logits)))


def owens_t(h: Tensor, a: float) -> Tensor:
    """Owen's T function, 1/(2 pi) * integral over x in [0, a] of exp(-h^2 (1 + x^2) / 2) / (1 + x^2), in float64."""
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(_OWEN_NODES)
    half_square = h.double().square() / 2
    total = torch.zeros_like(half_square)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        x = a / 2 * (node + 1)
        total += weight * torch.exp(-half_square * (1 + x * x)) / (1 + x * x)
    return total * (a / 2 / (2 * math.pi))


def _gaussian_ratio(logits: Tensor, quantile: Tensor, n: int) -> Tensor:
    magnitude = _magnitude(logits)
    rare, likely = torch.sigmoid(-magnitude), torch.sigmoid(magnitude)
    if n == 2:
        return likely.float()
    return (rare * likely / (2 * owens_t(quantile, math.sqrt(n / (n - 2))))).float()


@dataclasses.dataclass(frozen=True, eq=False)
class AntitheticSamples:
    """n coupled Bernoulli samples of logits of shape (*batch, D), one bit each.

    Attributes:
        bits: layout "sample": integers (*batch, D) of the smallest type with n bits, sample i in bit i; layout
            "dimension": int64 words (n, rows, ceil(D / 64)), dimension d in bit d % 64 of word d // 64.
        ratio: (*batch, D) float32, 1 / (1 - rho), rho the mean correlation of two samples of a dimension.
        logits: (*batch, D), those given, still part of their graph.
        n: number of samples.
        coupling, layout: as given to sample().
        seed, offset: replay: sample(logits, n, coupling, seed=seed, offset=offset) gives the same bits.
    """

    bits: Tensor
    ratio: Tensor
    logits: Tensor
    n: int
    coupling: str
    layout: str
    seed: Tensor
    offset: int

    def __post_init__(self) -> None:
        op = "AntitheticSamples"
        logits = _arguments.tensor(op, "logits", self.logits, _arguments.FLOATS)
        if logits.dim() < 1:
            raise ValueError(f"{op}: logits must have at least one dimension, got a scalar")
        n = _arguments.integer(op, "n", self.n, 1, ops.MOST_SAMPLES)
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "offset", _arguments.integer(op, "offset", self.offset))
        _arguments.choice(op, "coupling", self.coupling, tuple(ops.COUPLINGS))
        _arguments.choice(op, "layout", self.layout, tuple(ops.LAYOUTS))
        size, dtype = ops.bits_size(logits.shape[:-1].numel(), logits.shape[-1], n, self.layout)
        size = tuple(logits.shape) if self.layout == "sample" else size
        bits = _arguments.tensor_like(op, "bits", self.bits, logits, (dtype,))
        ratio = _arguments.tensor_like(op, "ratio", self.ratio, logits, (torch.float32,))
        if tuple(bits.shape) != size or ratio.shape != logits.shape:
            raise ValueError(
                f"{op}: bits and ratio must have shapes {size} and {tuple(logits.shape)} for these logits, got "
                f"{tuple(bits.shape)} and {tuple(ratio.shape)}"
            )
        object.__setattr__(self, "seed", seed_tensor(op, self.seed))

    @property
    def packed(self) -> PackedTensor:
        """The samples as a batch of n * rows packed rows of D channels in {0, 1}, sample-major; no copy.

        Raises:
            ValueError: the layout is "sample".
        """
        if self.layout != "dimension":
            raise ValueError('AntitheticSamples.packed: sample with layout="dimension" for packed rows')
        return PackedTensor(self.bits.flatten(0, 1), self.logits.shape[-1], "step")

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Samples as 0 and 1, (n, *batch, D).

        Args:
            dtype: any; float32, bfloat16 and float16 have a kernel from words.

        Raises:
            TypeError: no dtype.
        """
        _arguments.dtype("AntitheticSamples.unpack", "dtype", dtype)
        size = (self.n, *self.logits.shape)
        if self.layout == "dimension":
            dense = dtype if dtype in _arguments.FLOATS else torch.float32
            return unpack_op(self.bits, self.logits.shape[-1], 0.0, 1.0, dense).reshape(size).to(dtype)
        index = torch.arange(self.n, dtype=self.bits.dtype, device=self.bits.device)
        return ((self.bits >> index.view(-1, *(1,) * self.logits.dim())) & 1).to(dtype)


def seed_tensor(op: str, seed: Any) -> Tensor:
    """A seed as the operator takes it: an int64 tensor of one element."""
    if isinstance(seed, Tensor):
        seed = _arguments.tensor(op, "seed", seed, (torch.int64,))
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed must have one element, got {tuple(seed.shape)}")
        return seed
    value = _arguments.integer(op, "seed", seed, -(2**63), 2**63 - 1)
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def checked(op: str, samples: Any) -> AntitheticSamples:
    """The argument `samples` of an operation."""
    if not isinstance(samples, AntitheticSamples):
        raise TypeError(f"{op}: samples must be AntitheticSamples, made by sample(), got {type(samples).__name__}")
    return samples


def _samples(
    bits: Tensor, ratio: Tensor, logits: Tensor, n: int, coupling: str, layout: str, seed: Tensor, offset: int
) -> AntitheticSamples:
    return unchecked(
        AntitheticSamples, bits=bits, ratio=ratio, logits=logits, n=n, coupling=coupling, layout=layout, seed=seed,
        offset=offset,
    )


def _unflatten(tensors: Any, context: Any) -> AntitheticSamples:
    bits, ratio, logits, seed = tensors
    n, coupling, layout, offset = context
    return _samples(bits, ratio, logits, n, coupling, layout, seed, offset)


register_tree(
    AntitheticSamples, ("bits", "ratio", "logits", "seed"), ("n", "coupling", "layout", "offset"), _unflatten
)


def sample(
    logits: Tensor,
    n: int,
    coupling: str = "dirichlet",
    *,
    generator: torch.Generator | None = None,
    layout: str = "sample",
    seed: Tensor | int | None = None,
    offset: int = 0,
) -> AntitheticSamples:
    """Draws n coupled Bernoulli(sigmoid(logits)) samples, dimensions independent, packed to bits in one pass.

    The bits are a function of (seed, offset, position of the logit): the instruction set, the number of threads and the
    device do not change them. A slice of rows [a, b) with offset = offset + a * D gives the slice of the samples.

    Args:
        logits: (*batch, D) float32, bfloat16 or float16, finite. On a GPU, whose results nobody waits for, others raise
            no error but have a ratio, and so a gradient, of NaN.
        n: 1 to 64; 2 or more unless independent, even for antithetic_pairs.
        coupling: of the samples of one dimension. "dirichlet" (ARMS-D), "gaussian" (ARMS-N), "systematic" (evenly
            spaced, shuffled in each dimension: the lowest correlation that any coupling can have), "independent"
            (LOORF) or "antithetic_pairs" (u and 1 - u: DisARM).
        generator: draws the seed; torch's default otherwise.
        layout: "sample" (the n bits of a dimension side by side: the smallest gradient traffic) or "dimension" (rows of
            packed dimensions, which lowbit_ext.binary.linear multiplies).
        seed, offset: for replay, instead of a generator.

    Returns:
        AntitheticSamples. The margins are exact to n * 2^-32; beyond |logit| = 22 two samples and independent ones are
        constant.

    Raises:
        TypeError, ValueError: wrong dtype, shape, n, coupling or layout, NaN or infinite logits.

    Source:
        Dimitriev and Zhou, "ARMS: Antithetic-REINFORCE-Multi-Sample gradient for binary variables", ICML 2021; Yin and
        Zhou, "ARM", 2019, and Dong, Mnih and Tucker, "DisARM", NeurIPS 2020, for pairs.
    """
    logits = _arguments.tensor("sample", "logits", logits, _arguments.FLOATS)
    n = _arguments.integer("sample", "n", n, most=2**31)
    coupling = _arguments.choice("sample", "coupling", coupling, tuple(ops.COUPLINGS))
    layout = _arguments.choice("sample", "layout", layout, tuple(ops.LAYOUTS))
    offset = _arguments.integer("sample", "offset", offset, -(2**63), 2**63 - 1)
    if logits.dim() < 1:
        raise ValueError("sample: logits must have at least one dimension, got a scalar")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"sample: generator must be a torch.Generator, got {type(generator).__name__}")
        if seed is not None:
            raise ValueError("sample: give generator or seed, not both")
    seed = _arguments.fresh_seed("sample", logits, generator) if seed is None else seed_tensor("sample", seed)
    rows = logits.detach().float().reshape(logits.shape[:-1].numel(), logits.shape[-1])
    quantile = normal_quantile(rows) if coupling == "gaussian" else None
    bits, ratio = ops.antithetic_sample(
        rows, None if quantile is None else quantile.float(), n, coupling, layout, seed, offset
    )
    if quantile is not None:
        ratio = _gaussian_ratio(rows, quantile, n)
    if layout == "sample":
        bits = bits.reshape(logits.shape)
    return _samples(bits, ratio.reshape(logits.shape), logits, n, coupling, layout, seed, offset)
