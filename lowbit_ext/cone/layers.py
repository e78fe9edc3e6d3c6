"""Layers whose outputs satisfy A x <= b by construction: coefficients in, points out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext import _arguments
from lowbit_ext.cone.constraints import Cone

NONNEGATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "relu": torch.relu,
    "square": torch.square,
    "softplus": F.softplus,
}

# Coordinates with at most one entry over all generators are copies of one coefficient and are gathered; the others
# (wide) are a matrix product. The gather pays up to this share of wide coordinates: the activation is 5.8 times as fast
# as with one product with all generators at 2 % (checkerboard), 1.3 at 50 %, 1.1 at 75 %, 0.96 at 96 % (bench/cone.py,
# batch 256, one thread of a Zen 4).
LARGEST_WIDE_SHARE = 0.75


def _check_options(op: str, cone: Any, nonnegative: Any, box: Any) -> None:
    if not isinstance(cone, Cone):
        raise TypeError(f"{op}: cone must be a Cone, got {type(cone).__name__}")
    _arguments.choice(op, "nonnegative", nonnegative, tuple(NONNEGATIVE))
    if box is None:
        return
    if not 0 < _arguments.number(op, "box", box) < math.inf:
        raise ValueError(f"{op}: box must be a positive number, got {box!r}")
    if not cone.is_homogeneous:
        raise ValueError(f"{op}: box needs constraints with b = 0: others do not survive a division")


def _check_features(op: str, x: Any, count: int, parameter: Tensor) -> None:
    _arguments.tensor(op, "x", x, _arguments.FLOATS_AND_DOUBLE)
    if x.shape[-1:] != (count,):
        raise ValueError(f"{op}: x must have {count} values in the last dimension, got {tuple(x.shape)}")
    if x.device != parameter.device:
        raise ValueError(f"{op}: x is on {x.device}, the module on {parameter.device}")


def _moments(activation: Callable[[Tensor], Tensor], deviation: float) -> tuple[float, float]:
    """Mean and variance of the activation of a normal variable with mean 0."""
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64, device="cpu")
    density = torch.softmax(-z.square() / 2, 0)
    image = activation(deviation * z)
    mean = float((image * density).sum())
    return mean, float(((image - mean).square() * density).sum())


_MIXING = ("ray_scale", "line_scale", "line_mix", "line_spread", "ray_spread")


def _mixing(cone: Cone) -> dict[str, Tensor | None]:
    """How coefficients of unit rays and orthonormal lines become those of the cone's own generators, float64.

    Each line has a coordinate that no other ray or line touches, where it is s. So lines = S [1 | N], and
    (1 - U D U') [1 | N] is orthonormal for N = U diag(w) V' and D = 1 - (1 + w^2)^-1/2: a correction of rank(N), cheap
    where few coordinates are shared. Rays are made orthogonal to lines by subtracting
    R N' (1 + N N')^-1 [1 | N] = R (1 + N'N)^-1 N' [1 | N].
    """
    rays, lines = cone.rays, cone.lines
    none: dict[str, Tensor | None] = dict.fromkeys(_MIXING)
    own = ((rays != 0).sum(0) + (lines != 0).sum(0) == 1) & (lines != 0).any(0)
    if not len(lines) or not bool((lines[:, own] != 0).any(1).all()):
        # Without lines, or with lines from a pseudo-inverse, which are orthonormal as they are.
        return none | {"ray_scale": 1 / rays.norm(dim=1)}
    line, coordinate = torch.nonzero(lines[:, own].T)[:, 1], torch.nonzero(own).flatten()
    basis = torch.zeros_like(lines[:, 0], dtype=torch.int64)
    basis[line] = coordinate
    size = lines.gather(1, basis.unsqueeze(1)).squeeze(1)
    shared = torch.ones_like(own)
    shared[basis] = False
    shared &= (lines != 0).any(0)
    inner = lines[:, shared] / size.unsqueeze(1)
    left, widths, right = torch.linalg.svd(inner, full_matrices=False)
    kept = widths > 1e-12
    left, widths, right = left[:, kept], widths[kept], right[kept]
    spread = -(rays[:, shared] @ right.T * (widths / (1 + widths.square()))) @ left.T
    orthogonal = rays + spread @ (lines / size.unsqueeze(1))
    return {
        "ray_scale": 1 / orthogonal.norm(dim=1),
        "line_scale": 1 / size,
        "line_mix": left,
        "line_spread": -(1 - (1 + widths.square()).rsqrt()).unsqueeze(1) * left.T,
        "ray_spread": spread / size,
    }


class ConeActivation(nn.Module):
    """Maps free numbers to points of a Cone: phi(beta) @ rays + gamma @ lines + softmax(alpha) @ vertices.

    Rays have a non-negative coefficient, lines any, which halves the layer of the source, where a line is two rays.
    Each group of vertices has its own softmax. Every point of the set (for vertices: of its relative interior) is an
    output, and the constraints hold for every input, in training and after.

    The rays and lines of the formula have norm 1, the lines are orthogonal to one another and to the rays, so that
    gradient steps in the coefficients are steps of the same size in the output. The generators that are multiplied
    are nevertheless the cone's sparse integer ones: only the coefficients of its lines, which are free, are mixed.

    Args:
        cone: the constraints.
        nonnegative: phi, "abs" (as in the source), "relu", "square" or "softplus".
        box: for cones with b = 0, a positive number c: outputs are divided by max(1, max |x| / c), which keeps them in
            [-c, c] and in the cone.

    Attributes:
        in_features: number of coefficients, in the order rays, lines, vertices.
        out_features: dimension of the points.

    Shape:
        (..., in_features) -> (..., out_features).

    Rounding:
        Generators are integers times powers of two, in float32 or float64: bfloat16 and float16 coefficients, also
        those under autocast, are multiplied in float32, and the output is rounded once. With u the unit roundoff of the
        output's type (2^-53, 2^-24, 2^-8, 2^-11), v that of the product (2^-53 or 2^-24), n the number of coefficients
        and c the coefficients after phi:
        ``max(a x - b) <= |a| (u |x| + v (n + 2) (sum of |c_k| |g_k| + |offset|))``.
        `rounding_bound` computes it. In half precision the first term rules: max(A x) <= u |A| |x|.

    Gradient:
        that of phi; at beta = 0 torch's convention for phi.

    Raises:
        TypeError, ValueError: wrong arguments; from forward, coefficients of another number or wider type.
        ValueError: from load_state_dict, where the state's generators are those of another cone.

    Source:
        Frerix, Niessner, Cremers (2020), section 3.
    """

    rays: Tensor
    lines: Tensor
    vertices: Tensor
    offset: Tensor | None
    factor: Tensor | None
    ray_scale: Tensor
    line_scale: Tensor
    line_mix: Tensor | None
    line_spread: Tensor | None
    ray_spread: Tensor | None
    source: Tensor | None

    def __init__(self, cone: Cone, nonnegative: str = "abs", box: float | None = None) -> None:
        super().__init__()
        _check_options(type(self).__name__, cone, nonnegative, box)
        self.cone, self.nonnegative, self.box = cone, nonnegative, box
        self.in_features, self.out_features = sum(cone.coefficient_counts), cone.dimension
        self._groups = _runs(cone.vertex_groups)
        for key, value in self._exact_buffers().items():
            if value is not None and value.is_floating_point():
                value = value.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
            value = None if value is None else value.to(torch.get_default_device())
            # The mixing is recomputed, not stored: its last digits depend on the machine's singular values.
            self.register_buffer(key, value, persistent=key not in _MIXING)

    # --- buffers ------------------------------------------------------------------------------------------------------

    def _exact_buffers(self) -> dict[str, Tensor | None]:
        """All buffers but those of None, floats as float64, on the CPU.

        rays, lines and vertices hold the wide columns of the generators. Where that is all of them, source and factor
        are None. Otherwise the output is factor times a gather from [beta, gamma, alpha, wide coordinates].
        """
        cone = self.cone
        parts = cone.ray_generators, cone.line_generators, cone.vertex_generators
        starts = (0, parts[0].shape[0], parts[0].shape[0] + parts[1].shape[0])
        generator = torch.cat([part.index[0] + start for part, start in zip(parts, starts, strict=True)])
        column = torch.cat([part.index[1] for part in parts])
        value = torch.cat([part.values for part in parts])

        entries = torch.bincount(column, minlength=self.out_features)
        source = torch.where(entries > 1, -1, 0)  # -1: wide
        factor = (entries != 0).double()
        single = entries[column] == 1
        source[column[single]], factor[column[single]] = generator[single], value[single]
        wide = torch.nonzero(source < 0).flatten()
        dense = len(wide) > LARGEST_WIDE_SHARE * self.out_features
        if dense:
            wide = torch.arange(self.out_features, device="cpu")
        place_of = torch.full_like(entries, -1)
        place_of[wide] = torch.arange(len(wide), device="cpu")
        buffers: dict[str, Tensor | None] = {}
        for name, part in zip(("rays", "lines", "vertices"), parts, strict=True):
            inside = place_of[part.index[1]] >= 0
            matrix = part.values.new_zeros(part.shape[0], len(wide))
            matrix[part.index[0][inside], place_of[part.index[1][inside]]] = part.values[inside]
            buffers[name] = matrix
        buffers |= _mixing(cone)
        buffers["offset"] = cone.offset.clone() if bool(cone.offset.any()) else None
        if dense:
            return buffers | {"source": None, "factor": None}
        source[wide] = self.in_features + torch.arange(len(wide), device="cpu")
        factor[wide] = 1.0
        return buffers | {"source": source, "factor": None if bool((factor == 1).all()) else factor}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConeActivation:
        super()._apply(fn, recurse)
        # fn may have rounded the buffers to a half type, or left them empty. The cone knows them exactly.
        for name, exact in self._exact_buffers().items():
            buffer = getattr(self, name)
            if exact is not None and not buffer.is_meta:
                dtype = torch.promote_types(buffer.dtype, torch.float32) if exact.is_floating_point() else exact.dtype
                if dtype == buffer.dtype:
                    buffer.copy_(exact)
                else:
                    setattr(self, name, exact.to(buffer.device, dtype))
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if loaded is None:
                continue
            own = buffer.detach().to(loaded.device, loaded.dtype)
            if own.shape != loaded.shape or not (own.is_meta or torch.equal(own, loaded)):
                raise ValueError(
                    f"{type(self).__name__}: {prefix}{name} of the state belongs to another cone than {self.cone!r}"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    # --- forward ------------------------------------------------------------------------------------------------------

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of the cone's rays (>= 0), lines and vertices (>= 0, each group sums to 1)."""
        name = type(self).__name__
        _check_features(name, x, self.in_features, self.rays)
        if torch.promote_types(x.dtype, self.rays.dtype) != self.rays.dtype:
            raise TypeError(f"{name}: x is {x.dtype}, the module {self.rays.dtype}: convert either")
        parts = x.split(self.cone.coefficient_counts, dim=-1)
        beta, gamma, alpha = (part.to(self.rays.dtype) for part in parts)
        beta = NONNEGATIVE[self.nonnegative](beta) * self.ray_scale
        if self.line_mix is not None and self.line_spread is not None and self.ray_spread is not None:
            gamma = (gamma + gamma @ self.line_mix @ self.line_spread) * self.line_scale + beta @ self.ray_spread
        return beta, gamma, self._softmax(alpha)

    def _softmax(self, alpha: Tensor) -> Tensor:
        if not self._groups:
            return alpha
        weights, start = [], 0
        for size, count in self._groups:
            part = alpha[..., start : start + size * count]
            weights.append(part.unflatten(-1, (count, size)).softmax(-1).flatten(-2))
            start += size * count
        return weights[0] if len(weights) == 1 else torch.cat(weights, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        _arguments.tensor(type(self).__name__, "x", x)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._combine(self.coefficients(x)).to(x.dtype)
        return self._combine(self.coefficients(x)).to(x.dtype)

    def _combine(self, parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        matrices = self.rays, self.lines, self.vertices
        pairs = [(part, matrix) for part, matrix in zip(parts, matrices, strict=True) if matrix.shape[0]]
        wide = _sum_of_products(pairs)
        if self.source is None:
            x = wide
        else:
            x = torch.cat([*(part for part, _ in pairs), wide], -1).index_select(-1, self.source)
            if self.factor is not None:
                x = x * self.factor
        if self.offset is not None:
            x = x + self.offset
        if self.box is not None:
            x = x / (x.abs().amax(-1, keepdim=True) / self.box).clamp_min(1)
        return x

    def rounding_bound(self, x: Tensor) -> Tensor:
        """Bound on |a|^-1 (a output - b) over the rows a of A, for coefficients x: see Rounding. float64 (...)."""
        with torch.no_grad():
            parts = [part.double() for part in self.coefficients(x)]
            norms = [part.dense().norm(dim=1).to(x.device) for part in self.cone._all_generators]
            mass = sum((part.abs() @ norm for part, norm in zip(parts, norms, strict=True)), self.cone.offset.norm())
            output = torch.finfo(x.dtype).eps / 2
            inner = torch.finfo(self.rays.dtype).eps / 2
            return output * self(x).double().norm(dim=-1) + inner * (self.in_features + 2) * mass

    def extra_repr(self) -> str:
        layout = "dense" if self.source is None else f"gathered, {self.rays.shape[1]} wide coordinates"
        text = f"{self.in_features}, {self.out_features}, nonnegative={self.nonnegative!r}, {layout}"
        return text if self.box is None else f"{text}, box={self.box}"


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of part @ matrix."""
    total = pairs[0][0] @ pairs[0][1]
    for part, matrix in pairs[1:]:
        flat = torch.addmm(total.flatten(0, -2), part.flatten(0, -2), matrix) if total.dim() > 1 else None
        total = total + part @ matrix if flat is None else flat.view(total.shape)
    return total


def _runs(sizes: list[int]) -> list[tuple[int, int]]:
    """Consecutive groups of the same size: (size, how many)."""
    runs: list[tuple[int, int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1] = size, runs[-1][1] + 1
        else:
            runs.append((size, 1))
    return runs


class ConeLinear(nn.Module):
    """A linear layer whose outputs satisfy a Cone's constraints: an affine map to coefficients, then ConeActivation.

    Weights are drawn so that inputs of variance 1 give outputs of variance 1, on average over the coordinates (for
    polyhedra with vertices: coefficients of variance 1). The source puts a BatchNorm in front.

    Args:
        in_features: size of the input.
        cone: the constraints.
        nonnegative, box: as for ConeActivation.

    Attributes:
        linear: nn.Linear(in_features, coefficients).
        activation: ConeActivation.

    Shape:
        (..., in_features) -> (..., cone.dimension).
    """

    def __init__(self, in_features: int, cone: Cone, nonnegative: str = "abs", box: float | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        in_features = _arguments.integer(name, "in_features", in_features, 1, 1 << 40)
        _check_options(name, cone, nonnegative, box)
        self.activation = ConeActivation(cone, nonnegative, box)
        self.linear = nn.Linear(in_features, self.activation.in_features)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew; biases are 0."""
        cone, inputs = self.activation.cone, self.linear.in_features
        activation = NONNEGATIVE[self.activation.nonnegative]
        rays, lines, _ = cone.coefficient_counts
        # A coefficient adds its variance to the outputs' total. All ray coefficients share the fluctuation of the
        # input's norm, deviation / sqrt(2 inputs), and their means follow it together.
        # Rays and lines have norm 1 here.
        squares = rays + lines
        mixing = _mixing(cone)
        scale, spread = mixing["ray_scale"], mixing["ray_spread"]
        assert scale is not None
        column_sums = scale @ cone.rays
        if spread is not None:
            column_sums += scale @ spread @ cone.lines
        pairs = float(column_sums.square().sum()) - rays

        def output_variance(deviation: float) -> float:
            rise = _moments(activation, 1.01 * deviation)[0] - _moments(activation, 0.99 * deviation)[0]
            shared = (rise / 0.02) ** 2 / (2 * inputs)
            return (_moments(activation, deviation)[1] * squares + shared * pairs) / cone.dimension

        deviations = torch.ones(self.linear.out_features, device="cpu")
        if squares:
            low, high = 1e-6, 1e6
            for _ in range(60):
                middle = math.sqrt(low * high)
                low, high = (low, middle) if output_variance(middle) > 1 else (middle, high)
            deviations[:rays] = middle
            deviations[rays : rays + lines] = math.sqrt(_moments(activation, middle)[1])
        self.linear.weight.normal_().mul_(deviations.to(self.linear.weight).unsqueeze(1)).div_(math.sqrt(inputs))
        self.linear.bias.zero_()

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """Dimension of the points."""
        return self.activation.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        name = type(self).__name__
        _check_features(name, x, self.in_features, self.linear.weight)
        if x.dtype != self.linear.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: x is {x.dtype}, the weight {self.linear.weight.dtype}: convert either")
        return self.activation(self.linear(x))
