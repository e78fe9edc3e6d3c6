"""Messages between server and users: whole states, or differences of 4 or 1 bits an element, and their bytes.

A message as bytes, integers little endian:

    6  b"lowbit"
    2  version of the format
    4  length of the header
       header, JSON: {"round": 3, "bits": 4, "tensors": [["conv.weight", "float32", [16, 3, 3, 3], true], ...]}
       of each tensor in that order: codes and scales where the last field, "coded", is true, otherwise its elements

Coded tensors carry differences to what the receiver holds, others their values.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import struct
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_ext.binary.ops import binarize
from lowbit_ext.federated.core import State, check_like, is_statistic
from lowbit_ext.lowmem.ops import GROUP, group_dequantize, group_quantize
from lowbit_ext.packed import unpack_op, words_for

SMALLEST = 64  # elements from which a tensor is coded; its group's scale and padding would undo the gain on fewer
GREATEST = 1e30  # magnitude that is coded: sums of a group and the bounds of its code stay finite in float32
WIRE_BITS = (1, 4, 32)

MAGIC = b"lowbit"
VERSION = 2
LARGEST_HEADER = 4 << 20  # bytes: tens of thousands of tensors; as Python objects it is up to thirty times as much
_PREFIX = struct.Struct("<6sHI")

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
        "uint8", "bool", "complex64", "complex128",
    )
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Form(NamedTuple):
    """What a message says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    coded: bool

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}{' in codes' if self.coded else ''}"


@dataclasses.dataclass(frozen=True)
class CompressedUpdate:
    """A state, or the difference of two, in few bits.

    Attributes:
        bits: 4, 1, or 32 (nothing coded).
        layout: type, shape and way of each tensor, by name.
        codes: of the coded tensors. 4 bits: uint8, two codes a byte, low nibble first. 1 bit: int64 words of 64 signs,
            low bit first.
        scales: of the codes, bfloat16, for each 256 elements: (groups, 2) scale and minimum of 4 bits, (groups,) mean
            magnitude of 1 bit.
        plain: the tensors that travel as they are.
    """

    bits: int
    layout: dict[str, Form]
    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    plain: dict[str, Tensor]

    def parts(self, key: str) -> tuple[Tensor, ...]:
        """The tensors that carry the one of that name."""
        return (self.codes[key], self.scales[key]) if self.layout[key].coded else (self.plain[key],)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for key in self.layout for part in self.parts(key))


# --- codes ------------------------------------------------------------------------------------------------------------


def is_coded(key: str, tensor: Tensor, exact: Collection[str] = ()) -> bool:
    """Whether a tensor's difference may be sent in few bits, rather than its value as it is.

    What must keep its sign or count may not: a code that is off by half a step makes a small variance negative. Those
    are integers, the running statistics of batch normalisation, and the names of `exact`.
    """
    return tensor.is_floating_point() and tensor.numel() >= SMALLEST and not is_statistic(key) and key not in exact


def layout_of(state: State, bits: int, exact: Collection[str] = ()) -> dict[str, Form]:
    """The layout of a message about a state."""
    return {
        key: Form(tensor.dtype, tuple(tensor.shape), bits != 32 and is_coded(key, tensor, exact))
        for key, tensor in state.items()
    }


def check_layout(name: str, layout: Mapping[str, Form], expected: Mapping[str, Form]) -> None:
    """Raises ValueError where a message has other tensors than it must have."""
    if layout.keys() != expected.keys():
        odd = sorted(layout.keys() ^ expected.keys())
        shown = ", ".join(reprlib.repr(key)[1:-1] for key in odd[:3])
        raise ValueError(f"{name} has other tensors than the server's model: {shown}")
    for key, form in expected.items():
        if layout[key] != form:
            raise ValueError(f"{name}: {key} must be {form}, got {layout[key]}")


def _part_forms(form: Form, bits: int) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """Types and shapes of the tensors that carry one."""
    if not form.coded:
        return ((form.dtype, form.shape),)
    count = math.prod(form.shape)
    groups = -(-count // GROUP)
    if bits == 4:
        return (torch.uint8, ((count + 1) // 2,)), (torch.bfloat16, (groups, 2))
    return (torch.int64, (words_for(count),)), (torch.bfloat16, (groups,))


def _encode(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of flat float32 values."""
    if bits == 4:
        codes, scales = group_quantize(values, 4, False, None, 0)
        return codes, scales
    whole = len(values) // GROUP * GROUP
    # A MB at a time, or absolute values in fresh memory would take six times as long.
    scales = [part.abs().mean(1) for part in values[:whole].view(whole // GROUP, GROUP).split(1024)]
    if whole < len(values):
        scales.append(values[whole:].abs().mean().view(1))
    return binarize(values.view(1, -1), None, None, 0.0, "sign").view(-1), torch.cat(scales).bfloat16()


def _decode(codes: Tensor, scales: Tensor, bits: int, count: int) -> Tensor:
    """Flat float32 values."""
    if bits == 4:
        values: Tensor = group_dequantize(codes, scales, (count,), False, torch.float32, 4)
        return values
    signs: Tensor = unpack_op(codes.view(1, -1), count, -1.0, 1.0, torch.float32).view(-1)
    whole = count // GROUP * GROUP
    signs[:whole].view(whole // GROUP, GROUP).mul_(scales[: whole // GROUP].float().unsqueeze(1))
    signs[whole:].mul_(scales[-1:].float())
    return signs


def _as_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 in another type; what the rounding of a scale takes past the type's range is its greatest number."""
    if torch.finfo(dtype).max < torch.finfo(torch.float32).max:
        greatest = torch.finfo(dtype).max
        values = values.clamp(-greatest, greatest)
    return values.to(dtype)


def _wanted(key: str, tensor: Tensor, residual: State | None) -> Tensor:
    """What is to be sent of a tensor, flat."""
    if residual is None:
        wanted = tensor.flatten()
    elif key not in residual or residual[key].shape != tensor.shape:
        raise ValueError(f"compress: residual must have {key} of shape {tuple(tensor.shape)}")
    else:
        wanted = tensor.flatten() + residual[key].flatten()
    low, high = torch.aminmax(wanted)
    if not (float(low) >= -GREATEST and float(high) <= GREATEST):  # so written, NaN is caught
        raise ValueError(f"compress: {key} has a NaN, an infinity or a magnitude above {GREATEST:g}")
    return wanted


def compress(
    update: State, bits: int = 4, error_feedback: bool = True, residual: State | None = None,
    exact: Collection[str] = (),
) -> tuple[CompressedUpdate, dict[str, Tensor] | None]:
    """Codes an update.

    4 bits: the nearest of 16 steps from the least to the greatest of each 256 elements, as lowmem's group codes. 0 need
    not be one of the steps: an element that did not change may be sent half a step off, which error feedback takes back
    with the next message. 1 bit: the sign times the mean magnitude of each 256 elements. Tensors of fewer than 64
    elements, of integers, running statistics and those of `exact` stay as they are.

    Args:
        update: changes of a model's tensors, by name, as `difference` gives them.
        bits: 4, 1 or 32.
        error_feedback: return what the coding lost, to be handed in as `residual` with the next update.
        residual: what the last coding lost; it is added to the update first.
        exact: names of further tensors that stay as they are.

    Returns:
        The coded update, and the new residual or None.

    Raises:
        ValueError: other bits; NaN, infinity or a magnitude above 1e30 in what is coded; a residual of other tensors.

    Source:
        Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al., "Error feedback fixes
        SignSGD", ICML 2019.
    """
    if bits not in WIRE_BITS:
        raise ValueError(f"compress: bits must be one of {', '.join(map(str, WIRE_BITS))}, got {bits}")
    packed = CompressedUpdate(bits, layout_of(update, bits, exact), {}, {}, {})
    lost: dict[str, Tensor] = {}
    for key, tensor in update.items():
        tensor = tensor.detach()
        if not packed.layout[key].coded:
            packed.plain[key] = tensor
            continue
        wanted = _wanted(key, tensor, residual)
        packed.codes[key], packed.scales[key] = _encode(wanted.float(), bits)
        if error_feedback:
            sent = _decode(packed.codes[key], packed.scales[key], bits, tensor.numel())
            lost[key] = (wanted - _as_type(sent, tensor.dtype)).view(tensor.shape)
    return packed, lost if error_feedback else None


def decompress(packed: CompressedUpdate) -> dict[str, Tensor]:
    """Inverse of compress, up to what the coding lost.

    Raises:
        ValueError: tensors that are not those of the layout.
    """
    update = {}
    for key, form in packed.layout.items():
        parts = packed.parts(key)
        for part, (dtype, shape) in zip(parts, _part_forms(form, packed.bits), strict=True):
            if part.dtype != dtype or part.shape != shape:
                raise ValueError(
                    f"decompress: {key} of {form} must have {dtype} {shape}, got {part.dtype} {tuple(part.shape)}"
                )
        if form.coded:
            values = _decode(packed.codes[key], packed.scales[key], packed.bits, math.prod(form.shape))
            update[key] = _as_type(values, form.dtype).view(form.shape)
        else:
            update[key] = packed.plain[key]
    return update


def difference(new: State, old: State, exact: Collection[str] = ()) -> dict[str, Tensor]:
    """new - old of the tensors that may be coded; the new ones of others.

    Raises:
        ValueError: states of different tensors.
    """
    check_like("difference: the new state", new, old)
    return {
        key: tensor.to(old[key].device) - old[key] if is_coded(key, tensor, exact) else tensor
        for key, tensor in new.items()
    }


def apply(update: State, old: State, exact: Collection[str] = ()) -> dict[str, Tensor]:
    """old + update of the tensors that may be coded; the update's of others.

    Raises:
        ValueError: an update and a state of different tensors.
    """
    check_like("apply: the update", update, old)
    return {
        key: old[key] + tensor.to(old[key].device) if is_coded(key, tensor, exact) else tensor
        for key, tensor in update.items()
    }


# --- bytes ------------------------------------------------------------------------------------------------------------


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in their order; its own memory where that is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _header(layout: Mapping[str, Form], bits: int, number: int) -> bytes:
    tensors = [[key, _DTYPE_NAMES[form.dtype], form.shape, form.coded] for key, form in layout.items()]
    return json.dumps({"round": number, "bits": bits, "tensors": tensors}, separators=(",", ":")).encode()


def to_bytes(packed: CompressedUpdate, number: int) -> bytes:
    """A message of a round as bytes; this module's text has their order.

    Raises:
        TypeError: a tensor of a type that messages do not have.
        ValueError: more tensors than a header holds.
    """
    for key, form in packed.layout.items():
        if form.dtype not in _DTYPE_NAMES:
            raise TypeError(f"to_bytes: {key} must be one of {', '.join(_DTYPES)}, got {form.dtype}")
    header = _header(packed.layout, packed.bits, number)
    if len(header) > LARGEST_HEADER:
        raise ValueError(f"to_bytes: names and shapes take {len(header)} bytes, at most {LARGEST_HEADER} are sent")
    parts = [memory_of(part) for key in packed.layout for part in packed.parts(key)]
    return b"".join([_PREFIX.pack(MAGIC, VERSION, len(header)), header, *parts])


def from_bytes(data: bytes, like: State | None = None, exact: Collection[str] = ()) -> tuple[CompressedUpdate, int]:
    """Inverse of to_bytes, for bytes from anybody.

    Args:
        data: the message.
        like: a state of the tensors that the message must have, which are compared before anything is allocated; None:
            whatever it has.
        exact: see compress.

    Returns:
        The message and its round. Its tensors take as much memory as their bytes.

    Raises:
        TypeError: not bytes.
        ValueError: whatever is wrong with them.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"from_bytes: data must be bytes, got {type(data).__name__}")
    number, bits, layout, start = _read_header(data, like)
    if like is not None:
        check_layout("from_bytes: the message", layout, layout_of(like, bits, exact))
    forms = [(key, part) for key, form in layout.items() for part in _part_forms(form, bits)]
    sizes = [math.prod(shape) * dtype.itemsize for _, (dtype, shape) in forms]
    if sum(sizes) != len(data) - start:
        raise ValueError(f"from_bytes: the tensors take {sum(sizes)} bytes, got {len(data) - start}")
    packed = CompressedUpdate(bits, layout, {}, {}, {})
    for (key, (dtype, shape)), size in zip(forms, sizes, strict=True):
        parts = packed.plain
        if layout[key].coded:
            parts = packed.scales if key in packed.codes else packed.codes
        parts[key] = _read_tensor(key, memoryview(data)[start : start + size], dtype, shape)
        start += size
    return packed, number


def _read_header(data: bytes, like: State | None) -> tuple[int, int, dict[str, Form], int]:
    """Round, bits, layout, and where the tensors begin."""
    if len(data) < _PREFIX.size:
        raise ValueError(f"from_bytes: a message has at least {_PREFIX.size} bytes, got {len(data)}")
    magic, version, length = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"from_bytes: a message begins with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise ValueError(f"from_bytes: the message is of version {version}, this end reads {VERSION}")
    most = LARGEST_HEADER
    if like is not None:  # another's names and numbers may take a little more, to say what is wrong with them
        most = min(most, 2 * len(_header(layout_of(like, 32), 32, 0)) + 1024)
    end = _PREFIX.size + length
    if length > most or end > len(data):
        raise ValueError(
            f"from_bytes: the header must have at most {min(most, len(data) - _PREFIX.size)} bytes, got {length}"
        )
    try:
        header = json.loads(data[_PREFIX.size : end].decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"from_bytes: the header is no JSON: {error}") from None
    match header:
        case {"round": int(number), "bits": int(bits), "tensors": list(tensors)} if len(header) == 3:
            pass
        case _:
            raise ValueError(f"from_bytes: the header must have round, bits and tensors, got {reprlib.repr(header)}")
    if isinstance(bits, bool) or bits not in WIRE_BITS:
        raise ValueError(f"from_bytes: bits must be one of {', '.join(map(str, WIRE_BITS))}, got {reprlib.repr(bits)}")
    if isinstance(number, bool) or not 0 <= number < 2**63:
        raise ValueError(f"from_bytes: round must be 0 to 2^63 - 1, got {reprlib.repr(number)}")
    layout = dict(_read_form(entry, bits) for entry in tensors)
    if len(layout) != len(tensors):
        raise ValueError("from_bytes: the header names a tensor twice")
    return number, bits, layout, end


def _read_form(entry: Any, bits: int) -> tuple[str, Form]:
    match entry:
        case [str(key), str(name), list(shape), bool(coded)] if name in _DTYPES and _is_shape(shape):
            dtype = _DTYPES[name]
            if not coded or (dtype.is_floating_point and bits != 32):
                return key, Form(dtype, tuple(shape), coded)
    raise ValueError(
        f"from_bytes: the header describes a tensor by name, type, shape and whether it is coded, got "
        f"{reprlib.repr(entry)}"
    )


def _is_shape(sizes: list[Any]) -> bool:
    """Whether they are the sizes of a tensor that torch can address; an empty one may have others than 0."""
    return (
        len(sizes) <= 64
        and all(type(size) is int and 0 <= size < 2**62 for size in sizes)
        and math.prod(max(size, 1) for size in sizes) < 2**62
    )


def _read_tensor(key: str, data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    memory_of(tensor)[:] = data
    if dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise ValueError(f"from_bytes: {reprlib.repr(key)} is bool and has other bytes than 0 and 1")
    return tensor
