"""Weak and strong augmentation of batches of images, as tensor operations with a generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAXIMAL_MAGNITUDE = 30  # RandAugment's scale
SHIFT = 0.125  # part of the image's side


def _check(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        raise TypeError(f"{name}: images must be a floating point tensor (N, C, H, W)")


def _uniform(count: int, low: float, high: float, images: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(count, generator=generator, device=images.device, dtype=images.dtype) * (high - low) + low


def weak(images: Tensor, generator: torch.Generator | None = None, *, flip: bool = True) -> Tensor:
    """Flips half of the images left to right and shifts each by up to an eighth of its side, borders reflected.

    Args:
        images: (N, C, H, W), floating point.
        generator: of the choices, on the images' device.
        flip: False for images whose mirror image means something else, such as digits.

    Raises:
        TypeError: not a batch of images.
    """
    _check("weak", images)
    count, channels, height, width = images.shape
    if not count:
        return images.clone()
    if flip:
        flipped = _uniform(count, 0, 1, images, generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
    most = [max(1, math.floor(side * SHIFT)) for side in (height, width)]
    padded = F.pad(images, (most[1], most[1], most[0], most[0]), mode="reflect")
    index = []
    for side, margin in zip((height, width), most, strict=True):
        start = torch.randint(2 * margin + 1, (count, 1), generator=generator, device=images.device)
        index.append(start + torch.arange(side, device=images.device))
    rows = index[0].view(count, 1, height, 1).expand(-1, channels, -1, padded.shape[3])
    columns = index[1].view(count, 1, 1, width).expand(-1, channels, height, -1)
    return padded.gather(2, rows).gather(3, columns)


_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_PHOTOMETRIC = ("identity", "autocontrast", "brightness", "contrast", "posterize", "sharpness", "solarize")
_OPERATIONS = (*_GEOMETRIC, *_PHOTOMETRIC)


def _warp(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """The geometric operations of the images that chose one; others are left as they are. strength in [-1, 1]."""
    which = torch.nonzero(chosen < len(_GEOMETRIC)).flatten()
    if not len(which):
        return images
    kind, size = chosen[which], strength[which]

    def of(name: str, value: Tensor) -> Tensor:
        return torch.where(kind == _GEOMETRIC.index(name), value, torch.zeros_like(value))

    angle = of("rotate", size * math.pi / 6)
    matrix = images.new_zeros(len(which), 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = angle.cos(), angle.cos()
    matrix[:, 0, 1] = -angle.sin() + of("shear_x", size * 0.3)
    matrix[:, 1, 0] = angle.sin() + of("shear_y", size * 0.3)
    matrix[:, 0, 2], matrix[:, 1, 2] = of("translate_x", size * 0.6), of("translate_y", size * 0.6)
    grid = F.affine_grid(matrix, [len(which), *images.shape[1:]], align_corners=False)
    warped = F.grid_sample(images[which], grid, padding_mode="zeros", align_corners=False)
    return images.index_copy(0, which, warped)


def _colour(name: str, x: Tensor, strength: Tensor) -> Tensor:
    """One photometric operation. strength: (N, 1, 1, 1) in [-1, 1]; values of x in [0, 1]."""
    size = strength.abs()
    if name == "autocontrast":
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)
    if name == "brightness":
        return x * (1 + 0.9 * strength)
    if name == "contrast":
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + (x - mean) * (1 + 0.9 * strength)
    if name == "posterize":
        levels = 2 ** (8 - 4 * size).round()
        return torch.floor(x * 255 / (256 / levels)) * (256 / levels) / 255
    if name == "sharpness":
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return blurred + (x - blurred) * (1 + 0.9 * strength)
    if name == "solarize":
        return torch.where(x >= 1 - size, 1 - x, x)
    return x


def strong(
    images: Tensor, generator: torch.Generator | None = None, *, operations: int = 2, magnitude: int = 10,
    cutout: float = 0.5, flip: bool = True,
) -> Tensor:
    """RandAugment(operations, magnitude) behind the weak augmentation, and a square of the image cut out.

    Each image draws `operations` of twelve: rotation, shear and translation in both directions, contrast stretched or
    changed, brightness, fewer grey levels, sharpness, inversion of bright values, and none.

    Args:
        images: (N, C, H, W), floating point, values in [0, 1].
        generator: of the choices, on the images' device.
        operations: number of operations a image.
        magnitude: their strength, 0 to 30.
        cutout: largest side of the grey square, a part of the image's; 0 for none.
        flip: as in weak.

    Raises:
        TypeError, ValueError: not a batch of images, or a magnitude out of range.

    Source:
        Cubuk et al., "RandAugment", NeurIPS 2020; DeVries and Taylor, "Cutout", 2017; combined as in FixMatch.
    """
    _check("strong", images)
    if not 0 <= magnitude <= MAXIMAL_MAGNITUDE:
        raise ValueError(f"strong: magnitude must be 0 to {MAXIMAL_MAGNITUDE}, got {magnitude}")
    x = weak(images, generator, flip=flip)
    count, _, height, width = x.shape
    if not count:
        return x
    for _ in range(operations):
        chosen = torch.randint(len(_OPERATIONS), (count,), generator=generator, device=x.device)
        strength = magnitude / MAXIMAL_MAGNITUDE * torch.sign(_uniform(count, -1, 1, x, generator))
        x = _warp(x, chosen, strength)
        for i, name in enumerate(_PHOTOMETRIC, len(_GEOMETRIC)):
            which = torch.nonzero(chosen == i).flatten()
            if len(which) and name != "identity":
                x = x.index_copy(0, which, _colour(name, x[which], strength[which].view(-1, 1, 1, 1)).clamp(0, 1))
    if cutout > 0:
        side = _uniform(count, 0, cutout, x, generator).view(-1, 1, 1) / 2
        rows = (torch.arange(height, device=x.device, dtype=x.dtype) + 0.5).view(1, -1, 1) / height
        columns = (torch.arange(width, device=x.device, dtype=x.dtype) + 0.5).view(1, 1, -1) / width
        centre = [_uniform(count, 0, 1, x, generator).view(-1, 1, 1) for _ in range(2)]
        inside = ((rows - centre[0]).abs() < side) & ((columns - centre[1]).abs() < side)
        x = torch.where(inside.unsqueeze(1), torch.full_like(x, 0.5), x)
    return x
