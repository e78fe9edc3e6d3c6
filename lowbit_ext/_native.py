"""The compiled kernels: loading, choice of instruction set, status codes turned into exceptions."""

import os
import threading

# First: torch loads the OpenMP runtime whose symbols the kernels use (csrc/cpu/parallel.h).
import torch  #

try:
    from lowbit_ext import _cpu as cpu  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "lowbit_ext: the compiled module lowbit_ext._cpu could not be loaded; reinstall with `pip install .` from the "
        f"project's folder (and not from inside it with PYTHONPATH set). The loader said: {error}"
    ) from error

_scratch = threading.local()

ISA_LEVELS = ("scalar", "avx2", "avx512", "amx")

_STATUS_MESSAGES = {
    1: "the native core refused the sizes: negative, inconsistent, or their product overflows",
    2: "the native core refused an argument outside its documented values",
    3: "this machine cannot run the requested instruction set",
    4: "the workspace is smaller than the kernel asked for; was the thread count changed during the call?",
    5: "a value that must be finite is NaN or infinite",
}
NOT_FINITE = 5


def check(op: str, status: int) -> None:
    """Raises RuntimeError for a status other than ok (csrc/core/status.h)."""
    if status != 0:
        raise RuntimeError(f"{op}: {_STATUS_MESSAGES.get(status, f'unknown status {status}')}")


def scratch(size: int) -> int:
    """Address of at least `size` bytes, 64-byte aligned, for the length of one kernel call; one buffer a thread, kept.

    A fresh tensor instead costs 0.9 us and, above the allocator's threshold, page faults at every call.
    """
    if size == 0:
        return 0
    try:
        held, address = _scratch.held, _scratch.address
    except AttributeError:
        held = address = 0
    if held < size:
        _scratch.buffer = torch.empty(size, dtype=torch.uint8)
        _scratch.held, _scratch.address = size, _scratch.buffer.data_ptr()
        address = _scratch.address
    return address


def available_isas() -> tuple[str, ...]:
    """The instruction-set levels this machine can run, lowest first."""
    return ISA_LEVELS[: ISA_LEVELS.index(cpu.best_isa()) + 1]


def active_isa() -> str:
    """The level whose kernels run now."""
    return _active_isa


def select_isa(name: str) -> None:
    """Makes the kernels of one level run, process-wide. Packed weights made before are re-blocked at their next use.

    Raises:
        ValueError: not a level's name.
        RuntimeError: this CPU or operating system cannot run it.
    """
    if name not in ISA_LEVELS:
        raise ValueError(f"LOWBIT_ISA: expected one of {', '.join(ISA_LEVELS)}, got {name!r}")
    global _active_isa
    if not cpu.select_isa(ISA_LEVELS.index(name)):
        raise RuntimeError(f"LOWBIT_ISA: this machine cannot run {name}; it can run {', '.join(available_isas())}")
    _active_isa = name


_active_isa: str = cpu.active_isa()  # a copy: asking the module costs more than the whole check that needs it

if os.environ.get("LOWBIT_ISA"):
    select_isa(os.environ["LOWBIT_ISA"])
