"""Mutated messages of the federated wire, and what may come of them.

A test runs 2000 of them; `python tests/fuzz_wire.py 100000` more, with another seed as its second argument.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import random
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_ext.federated import Coordinator, wire

EXACT = {"ema"}
STATE = {
    "conv.weight": torch.linspace(-1, 1, 216).view(8, 3, 3, 3),
    "bn.running_var": torch.linspace(1e-3, 1e1, 64),
    "bn.num_batches_tracked": torch.tensor(7),
    "fc.weight": torch.linspace(-2, 2, 300, dtype=torch.float64).view(5, 60),
    "fc.bias": torch.linspace(-1, 1, 7).bfloat16(),
    "half": torch.linspace(-3, 3, 257).half(),
    "mask": torch.arange(9) % 2 == 0,
    "ema": torch.linspace(0, 1, 100),
}
_PREFIX = struct.Struct("<6sHI")


def _stepped(step: float) -> dict[str, torch.Tensor]:
    return {key: tensor + step if tensor.is_floating_point() else tensor for key, tensor in STATE.items()}


def message(bits: int, number: int = 0, step: float = 0.01) -> bytes:
    """A good reply to round `number` of a coordinator that starts from STATE."""
    new = _stepped(step)
    update = new if bits == 32 else wire.difference(new, STATE, EXACT)
    return wire.to_bytes(wire.compress(update, bits, exact=EXACT)[0], number)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"0" * 1000)
    return buffer.getvalue()


def _npy(claimed: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": claimed})
    return buffer.getvalue()


# Whole messages of other kinds, and headers that are no header.
FOREIGN = (
    b"", b"\0", b"lowbit", _zip(), pickle.dumps({"w": 1}), _npy((2**34,)), wire.MAGIC * 100, b"\xff" * 64,
    _PREFIX.pack(wire.MAGIC, wire.VERSION, 2**32 - 1), _PREFIX.pack(wire.MAGIC, wire.VERSION, 0),
)
HEADERS = (
    b"", b"{}", b"[]", b"null", b"\xff\xfe{}", b'"\\ud800"', b"[" * 200_000, b'{"a":' * 50_000, b"1" * 5000, b"NaN",
    b'{"round":0,"bits":4,"tensors":{}}', b'{"round":0,"bits":4,"tensors":[],"more":1}', b"{" + b" " * 100_000,
)
NUMBERS = (
    -1, 0, 1, 2, 3, 4, 5, 7, 8, 32, 64, 255, 2**31, 2**34, 2**62, 2**63, 2**64, 10**4000, -(2**63), 0.5, 4.0, 1e300,
    math.inf, -math.inf, math.nan, True, False, None, "4", "", [], [4], {},
)
NAMES = (
    "", "conv.weight", "bn.running_var", "weight", "w" * 10_000, "\ud800", "\0", "../../etc", 3, None, [], "fc.bias",
)
DTYPES = (
    "load", "float", "float32", "float64", "bfloat16", "int64", "bool", "object", "Tensor", "__class__", "complex64",
    "uint8", "qint8", "", 3, None, [], "torch.float32",
)
SHAPES = (
    [], [0], [-1], [216], [8, 27], [2**34], [2**33, 2], [-2, -108], [2**62], [2**32, 2**32], [0, 2**61], [0, 2**70],
    [1] * 65, [1] * 1000, [math.inf], [math.nan], [1.5], ["8"], [None], [[8]], [True], None, "216", 216, {},
)
VALUES = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e300, -1.0, 1e-40, 0.0)


def _mutated_field(header: dict[str, Any], rng: random.Random) -> None:
    """Changes one thing of a header, in place."""
    tensors = header["tensors"]
    entry = rng.choice(tensors)
    kind = rng.randrange(10)
    if kind < 2:
        header[rng.choice(("round", "bits"))] = rng.choice(NUMBERS)
    elif kind < 6:
        place = kind - 2
        entry[place] = rng.choice((NAMES, DTYPES, SHAPES, NUMBERS)[place])
    elif kind == 6:
        tensors.remove(entry)
    elif kind == 7:
        tensors.append(rng.choice((entry, list(entry), [], None, "w", entry[:3], [*entry, 1])))
    elif kind == 8:
        rng.shuffle(tensors)
    else:
        header[rng.choice(("round", "bits", "tensors"))] = rng.choice((*NUMBERS, *SHAPES))


def _with_header(header: bytes, rest: bytes, length: int | None = None) -> bytes:
    return _PREFIX.pack(wire.MAGIC, wire.VERSION, len(header) if length is None else length) + header + rest


def _mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Other bytes somewhere, fewer, or more."""
    changed = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 2:
        start = rng.randrange(len(changed))
        del changed[start : start + rng.randint(1, 100)]
    elif kind == 3:
        start = rng.randrange(len(changed) + 1)
        changed[start:start] = rng.randbytes(rng.randint(1, 100))
    else:
        start = rng.randrange(12)
        changed[start : start + rng.randint(1, 4)] = rng.randbytes(4)
    return bytes(changed)


def _with_values(rest: bytes, rng: random.Random) -> bytes:
    """Numbers in the tensors that are not finite, or huge, or negative."""
    kind, size = rng.choice((("<f", 4), ("<d", 8), ("<e", 2)))
    value = rng.choice(VALUES)
    if kind == "<e":
        value = max(-60000.0, min(value, 60000.0))  # NaN becomes 60000
    elif kind == "<f" and abs(value) == 1e300:
        value = math.inf
    start = rng.randrange(len(rest) // size) * size
    count = min(rng.choice((1, 64, 1000)), (len(rest) - start) // size)
    return rest[:start] + struct.pack(kind, value) * count + rest[start + count * size :]


def mutated_messages(seed: int, count: int) -> Iterator[bytes]:
    """Messages of which most are wrong in one way; the same for the same seed."""
    rng = random.Random(seed)
    good = [message(bits, number) for bits in wire.WIRE_BITS for number in (0, 0, 0, 1)]
    for _ in range(count):
        data = rng.choice(good)
        end = _PREFIX.size + _PREFIX.unpack_from(data)[2]
        header, rest = data[_PREFIX.size : end], data[end:]
        kind = rng.randrange(10)
        if kind == 0:
            yield rng.choice(FOREIGN)
        elif kind == 1:
            yield _with_header(rng.choice(HEADERS), rest)
        elif kind == 2:
            yield _with_header(header, rest, rng.choice((0, 1, len(header) - 1, len(header) + 1, 2**32 - 1)))
        elif kind < 6:
            fields = json.loads(header)
            _mutated_field(fields, rng)
            yield _with_header(json.dumps(fields).encode(), rest)
        elif kind == 6:
            yield _with_header(header, _with_values(rest, rng))
        else:
            yield _mutated_bytes(data, rng)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that torch gives within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.storages[storage._cdata] = storage.nbytes()
        return result

    @property
    def nbytes(self) -> int:
        return sum(self.storages.values())


with _Allocations():  # the first one imports much, which is not to be counted
    torch.empty(1)


def _watched(
    data: bytes, like: dict[str, torch.Tensor] | None
) -> tuple[tuple[wire.CompressedUpdate, int] | None, str, int, int]:
    """from_bytes: its result or the text of its refusal, and the bytes that it took as tensors and as objects."""
    result, refusal = None, "from_bytes: "
    tracemalloc.start()
    with _Allocations() as allocations:
        try:
            result = wire.from_bytes(data, like, EXACT)
        except (TypeError, ValueError) as error:
            refusal = str(error)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, refusal, allocations.nbytes, peak


def _read(data: bytes, like: dict[str, torch.Tensor] | None) -> tuple[wire.CompressedUpdate, int] | None:
    """from_bytes, checked; None where it refused."""
    # Of a list of a list ...: 64 bytes each; the rest for the texts of errors.
    most = 80 * min(len(data), wire.LARGEST_HEADER) + 200_000
    result, refusal, tensors, objects = _watched(data, like)
    if objects > most:  # a table of the interpreter's own may have grown at that moment: once in tens of thousands
        result, refusal, tensors, objects = _watched(data, like)
    assert refusal.startswith("from_bytes: "), refusal
    assert len(refusal.encode()) < 2000, refusal
    assert tensors <= len(data), f"{tensors} bytes of tensors for {len(data)}"
    assert objects <= most, f"{objects} bytes of objects for {len(data)}"
    return result


def check_one(data: bytes) -> str:
    """Gives a message to everybody who reads messages; what became of it.

    Returns:
        "unreadable"; of those that can be read: "of another model", "lost" or "dropped" by the coordinator, "used".

    Raises:
        AssertionError: anything but a ValueError or TypeError that names the function, more memory than the message
            stands for, a round that does not go on, a state that is no longer near the honest users'.
    """
    anything = _read(data, None)
    if anything is None:
        assert _read(data, STATE) is None
        return "unreadable"
    sizes = [math.prod(form.shape) * form.dtype.itemsize for form in anything[0].layout.values()]
    assert sum(sizes) <= 64 * len(data)  # one bit may stand for a float64
    assert wire.decompress(anything[0]).keys() == anything[0].layout.keys()
    mine = _read(data, STATE)
    if mine is None:
        return "of another model"
    return _in_a_round(*mine)


def _in_a_round(packed: wire.CompressedUpdate, number: int) -> str:
    """What a coordinator makes of it beside two honest users."""
    coordinator = Coordinator(STATE, range(4), groups=1, bits=4, participants=3, exact=EXACT)
    sender, *honest = coordinator.begin()
    for user in (sender, *honest):
        coordinator.send(user)
    coordinator.receive(sender, packed, number)
    for user in honest:
        coordinator.receive(user, wire.from_bytes(message(4, 0), STATE, EXACT)[0], 0)
    report = coordinator.finish(_stepped(0.01))
    assert set(report.lost) <= {sender}
    for key, tensor in coordinator.state.items():
        assert tensor.dtype == STATE[key].dtype
        assert bool(torch.isfinite(tensor).all())
        assert float((tensor.double() - STATE[key].double()).norm()) < 100, f"{key} is {tensor}"
    assert bool((coordinator.state["bn.running_var"] >= 0).all())
    if sender in report.dropped:
        assert report.lost[sender] == "no answer"
        return "dropped"
    return "lost" if sender in report.lost else "used"


def main(count: int, seed: int) -> None:
    """Runs so many and prints what became of them."""
    outcomes = collections.Counter(check_one(data) for data in mutated_messages(seed, count))
    print(f"seed {seed}, {count} messages:", ", ".join(f"{n} {name}" for name, n in outcomes.most_common()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
