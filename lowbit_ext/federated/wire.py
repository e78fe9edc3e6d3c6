"""Model updates of 4 or 1 bits an element for the way between server and users."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_ext.federated.core import State

GROUP = 256  # elements that share a scale
SMALLEST = 64  # elements from which a tensor is packed; its group's scale and padding would undo the gain on fewer
LARGEST_CODE = 7  # of 4 bits: -7 to 7, so that 0 stays 0
WIRE_BITS = (1, 4, 32)


@dataclasses.dataclass(frozen=True)
class CompressedUpdate:
    """A state in few bits.

    Attributes:
        bits: 4, 1, or 32 (nothing packed).
        codes: uint8, by name: two codes a byte, low nibble first, or eight signs a byte, low bit first.
        scales: bfloat16, one of each 256 elements, by name.
        plain: the tensors that travel as they are: small ones, integers, everything at 32 bits.
        shapes, dtypes: of the packed tensors.
    """

    bits: int
    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    plain: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            tensor.numel() * tensor.element_size()
            for part in (self.codes, self.scales, self.plain)
            for tensor in part.values()
        )


def state_bytes(state: State) -> int:
    """Bytes of a state that travels as it is."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _pack(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a flat float tensor."""
    groups = F.pad(values.float(), (0, -len(values) % GROUP)).view(-1, GROUP)
    if bits == 4:
        scales = (groups.abs().amax(1) / LARGEST_CODE).bfloat16()
        steps = scales.float().unsqueeze(1)
        codes = (groups / torch.where(steps > 0, steps, 1)).round().clamp(-LARGEST_CODE, LARGEST_CODE) + 8
        nibbles = codes.to(torch.uint8).view(-1, 2)
        return (nibbles[:, 0] | nibbles[:, 1] << 4)[: (len(values) + 1) // 2], scales
    counts = torch.full((len(groups),), GROUP, device=values.device)
    counts[-1] = len(values) - GROUP * (len(groups) - 1)
    scales = (groups.abs().sum(1) / counts).bfloat16()
    signs = (groups >= 0).view(-1, 8).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=values.device)
    return (signs << places).sum(1, dtype=torch.uint8)[: (len(values) + 7) // 8], scales


def _unpack(codes: Tensor, scales: Tensor, bits: int, count: int) -> Tensor:
    """Flat float32 values."""
    if bits == 4:
        values = torch.stack((codes & 15, codes >> 4), 1).flatten()[:count].float() - 8
    else:
        places = torch.arange(8, dtype=torch.uint8, device=codes.device)
        values = ((codes.unsqueeze(1) >> places) & 1).flatten()[:count].float() * 2 - 1
    return values * scales.float().repeat_interleave(GROUP)[:count]


def compress(
    update: State, bits: int = 4, error_feedback: bool = True, residual: State | None = None
) -> tuple[CompressedUpdate, dict[str, Tensor] | None]:
    """Packs an update.

    4 bits: -7 to 7 times a seventh of the largest magnitude of each 256 elements. 1 bit: the sign times their mean
    magnitude. Tensors of fewer than 64 elements and of integers stay as they are.

    Args:
        update: changes of a model's tensors, by name.
        bits: 4, 1 or 32.
        error_feedback: return what the packing lost, to be handed in as `residual` with the next update.
        residual: what the last packing lost; it is added to the update first.

    Returns:
        The packed update, and the new residual or None.

    Raises:
        ValueError: other bits; NaN or infinity in the update.

    Source:
        Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al., "Error feedback fixes
        SignSGD", ICML 2019.
    """
    if bits not in WIRE_BITS:
        raise ValueError(f"compress: bits must be one of {', '.join(map(str, WIRE_BITS))}, got {bits}")
    packed = CompressedUpdate(bits, {}, {}, {}, {}, {})
    lost: dict[str, Tensor] = {}
    for key, tensor in update.items():
        if bits == 32 or not tensor.is_floating_point() or tensor.numel() < SMALLEST:
            packed.plain[key] = tensor
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"compress: {key} has a NaN or an infinity")
        wanted = tensor.flatten() if residual is None else tensor.flatten() + residual[key].flatten()
        packed.codes[key], packed.scales[key] = _pack(wanted, bits)
        packed.shapes[key], packed.dtypes[key] = tuple(tensor.shape), tensor.dtype
        if error_feedback:
            sent = _unpack(packed.codes[key], packed.scales[key], bits, tensor.numel()).to(tensor.dtype)
            lost[key] = (wanted - sent).view(tensor.shape)
    return packed, lost if error_feedback else None


def decompress(packed: CompressedUpdate) -> dict[str, Tensor]:
    """Inverse of compress, up to what the packing lost.

    Raises:
        ValueError: codes or scales of another number than the shapes ask for.
    """
    update = dict(packed.plain)
    for key, codes in packed.codes.items():
        shape, scales = packed.shapes[key], packed.scales[key]
        count = torch.Size(shape).numel()
        if codes.numel() != -(-count * packed.bits // 8) or scales.numel() != -(-count // GROUP):
            raise ValueError(
                f"decompress: {key} of {count} elements has {codes.numel()} bytes and {scales.numel()} scales"
            )
        update[key] = _unpack(codes, scales, packed.bits, count).to(packed.dtypes[key]).view(shape)
    return update


def difference(new: State, old: State) -> dict[str, Tensor]:
    """new - old of floating point tensors; the new ones of others."""
    return {key: tensor - old[key] if tensor.is_floating_point() else tensor for key, tensor in new.items()}


def apply(update: Mapping[str, Tensor], old: State) -> dict[str, Any]:
    """old + update of floating point tensors; the update's of others."""
    return {key: old[key] + tensor if tensor.is_floating_point() else tensor for key, tensor in update.items()}
