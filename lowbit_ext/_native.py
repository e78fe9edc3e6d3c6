"""The compiled kernels: loading, choice of device and instruction set, status codes turned into exceptions."""

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

# First: torch loads the OpenMP runtime whose symbols the kernels use (csrc/cpu/parallel.h).
import torch

from lowbit_ext._torch import current_cuda_stream

try:
    import lowbit_ext._cpu as cpu
except ImportError as error:
    raise ImportError(
        "lowbit_ext: the compiled module lowbit_ext._cpu could not be loaded; reinstall with `pip install .` from the "
        f"project's folder (and not from inside it with PYTHONPATH set). The loader said: {error}"
    ) from error

_kept = threading.local()  # each thread's workspace

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)  # a subclass may carry its own __torch_dispatch__

ISA_LEVELS: tuple[str, ...] = cpu.ISA_LEVELS
CUDA_ENGINES: tuple[str, ...] = tuple(cpu.CONV_ENGINES)  # of the convolution

NOT_FINITE: int = cpu.STATUSES["not_finite"]
_CUDA_ERROR: int = cpu.STATUSES["cuda_error"]


def check(op: str, status: int) -> None:
    """Raises RuntimeError for a status other than ok (csrc/core/status.h)."""
    if status == _CUDA_ERROR:
        raise RuntimeError(f"{op}: CUDA reports: {cuda_module().last_error_text()}")
    if status != 0:
        raise RuntimeError(f"{op}: {cpu.status_text(status)}")


def workspace(size: int, like: torch.Tensor) -> torch.Tensor:
    """At least `size` bytes on the device of `like`, aligned to 64, for one kernel call.

    The launcher holds the tensor until the kernel has run (on CUDA: is enqueued). On the CPU it is one buffer a thread,
    kept: a fresh tensor costs 0.9 us and, above the allocator's threshold, page faults at every call. A signal handler
    that runs a layer between this and the kernel may replace the thread's buffer; it cannot free the caller's. On CUDA
    it is a fresh one from torch's allocator, which knows what its stream still uses.
    """
    if like.is_cuda:
        return like.new_empty(size, dtype=torch.uint8)
    try:
        buffer, held = _kept.workspace
        if held >= size:
            return buffer
    except AttributeError:
        pass
    buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    _kept.workspace = (buffer, size)
    return buffer


@functools.cache
def cuda_module() -> Any:
    """The compiled module of the CUDA kernels, loaded by the first call.

    Raises:
        RuntimeError: it was not built, or does not load.
    """
    if importlib.util.find_spec("lowbit_ext._cuda") is None:
        raise RuntimeError(
            "lowbit_ext: this installation has no CUDA kernels, because there was no nvcc when it was built; install "
            "again where there is one: `LOWBIT_CUDA=on pip install .` from the project's folder"
        )
    try:
        return importlib.import_module("lowbit_ext._cuda")
    except ImportError as error:
        raise RuntimeError(f"lowbit_ext: the module of the CUDA kernels could not be loaded: {error}") from error


def code_of(architecture: int, built: Sequence[str], virtual: Sequence[str]) -> str | None:
    """The architecture whose code a device runs, of those that the module has; None if it can run none.

    Machine code serves later minor versions of its major version, that of a specific architecture ("90a") itself alone.
    PTX is compiled by the driver for all later devices.
    """

    def number(name: str) -> int:
        return int(name.rstrip("af"))

    def serves(name: str) -> bool:
        minors = number(name) // 10 == architecture // 10 and number(name) <= architecture
        return minors if name.isdigit() else number(name) == architecture

    fitting = [name for name in built if serves(name)] or [
        name for name in virtual if name.isdigit() and number(name) <= architecture
    ]
    return max(fitting, key=number, default=None)


def _has_code(engine: str, code: str) -> bool:
    """Whether code for an architecture contains an engine of the convolution, of which others have an empty shell."""
    return engine == "popcount" or code == "90a" or (engine == "mma" and 80 <= int(code.rstrip("af")) <= 90)


class CudaKernels:
    """The functions of _cuda on one device, called like those of _cpu: the device and its current stream are added.

    Args:
        module: the compiled module.
        index: the device's.
        stream: handle of a device's current stream.
        engine: of CUDA_ENGINES, what makes the convolution's inner products; "" for the device's default.

    Attributes:
        level: name of the device and its architecture.
        engines: what the device has of CUDA_ENGINES.
        engine: the chosen one of them.
    """

    def __init__(self, module: Any, index: int, stream: Callable[[int], int], engine: str = "") -> None:
        architecture = module.architecture(index)
        if architecture < 0:
            raise RuntimeError(f"lowbit_ext: no CUDA device {index}: {module.last_error_text()}")
        code = code_of(architecture, module.architectures().split(), module.virtual_architectures().split())
        if code is None:
            raise RuntimeError(
                f"lowbit_ext: cuda:{index} has compute capability {architecture / 10}, this installation was built for "
                f"{module.architectures()}, with PTX of {module.virtual_architectures()} for others"
            )
        self.level = f"cuda:{index} sm_{architecture}"
        for name, function in vars(module).items():
            if not name.startswith("_") and callable(function):
                asks = name.endswith(("_bytes", "_engine", "_operations", "_reads_aligned"))  # enqueues nothing
                setattr(self, name, _with(function, index) if asks else _with_stream(function, index, stream))
        self.engines = tuple(
            name for number, name in enumerate(CUDA_ENGINES)
            if module.binary_conv2d_has_engine(number, index) and _has_code(name, code)
        )
        default = CUDA_ENGINES[module.binary_conv2d_default_engine(index)]
        self.engine = engine or (default if default in self.engines else "popcount")
        if self.engine not in self.engines:
            raise RuntimeError(
                f"LOWBIT_CUDA_ENGINE: {self.level} cannot run {self.engine}; it can run {', '.join(self.engines)}"
            )
        number = CUDA_ENGINES.index(self.engine)
        self.binary_conv2d = _with_stream(module.binary_conv2d, index, stream, number)
        self.binary_conv2d_epilogue = _with_stream(module.binary_conv2d_epilogue, index, stream, number)
        self.popcount_peak = _with_stream(module.popcount_peak, index, stream, number)
        self.popcount_peak_operations = _with(module.popcount_peak_operations, index, number)


def _with(function: Callable[..., int], index: int, *choices: int) -> Callable[..., int]:
    return lambda *arguments: function(*arguments, *choices, index)


def _with_stream(
    function: Callable[..., int], index: int, stream: Callable[[int], int], *choices: int
) -> Callable[..., int]:
    return lambda *arguments: function(*arguments, *choices, index, stream(index))


@functools.cache
def cuda_kernels(index: int) -> CudaKernels:
    """The functions of _cuda on one device.

    Raises:
        RuntimeError: there is no module, no such device, the device is older than what the module was built for, or it
            does not have the engine that LOWBIT_CUDA_ENGINE names.
    """
    return CudaKernels(cuda_module(), index, current_cuda_stream, _CUDA_ENGINE)


def kernels(tensor: torch.Tensor) -> Any:
    """The compiled functions for the device of `tensor`.

    Their attribute `level` says what a private copy of a weight is made for: an instruction set, or a GPU.
    """
    return cuda_kernels(tensor.get_device()) if tensor.is_cuda else cpu


class NotPlainMemory(TypeError):
    """A tensor whose elements a kernel cannot read where the tensor points; torch's dispatcher may know how to."""


def pointer(tensor: torch.Tensor | None, like: torch.Tensor, name: str) -> int:
    """Address of a launcher's argument: the one door through which tensors reach a kernel.

    Args:
        tensor: None where it is absent, which gives 0: kernels take a null pointer for it.
        like: the input, on whose device the tensor must be; its dtype, shape and memory order have been checked.
        name: "op: argument".

    Raises:
        ValueError: it is on another device.
        NotPlainMemory: the elements are not what lies at its address: a wrapper subclass, a negated view, a tensor that
            stands for zeros, one whose storage has been freed.
    """
    if tensor is None:
        return 0
    kind = type(tensor)
    if kind not in PLAIN_TENSORS and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise NotPlainMemory(f"{name} must be a plain tensor, got {kind.__name__}")
    if not (tensor.is_cpu and like.is_cpu) and tensor.device != like.device:
        place = "the CPU" if like.is_cpu else like.device
        raise ValueError(f"{name} must be on {place} like the input, got {tensor.device}")
    address = tensor.data_ptr()
    if tensor.is_neg() or (address == 0 and tensor.numel() > 0):
        came = "a negated view" if tensor.is_neg() else "one without storage"
        raise NotPlainMemory(f"{name} must be a plain tensor, got {came}")
    return address


def available_isas() -> tuple[str, ...]:
    """The instruction-set levels this machine can run, lowest first."""
    return ISA_LEVELS[: ISA_LEVELS.index(cpu.best_isa()) + 1]


def active_isa() -> str:
    """The level whose kernels run now."""
    return cpu.level


def select_isa(name: str) -> None:
    """Makes the kernels of one level run, process-wide. Packed weights made before are re-blocked at their next use.

    Raises:
        ValueError: not a level's name.
        RuntimeError: this CPU or operating system cannot run it.
    """
    if name not in ISA_LEVELS:
        raise ValueError(f"LOWBIT_ISA: expected one of {', '.join(ISA_LEVELS)}, got {name!r}")
    if not cpu.select_isa(ISA_LEVELS.index(name)):
        raise RuntimeError(f"LOWBIT_ISA: this machine cannot run {name}; it can run {', '.join(available_isas())}")
    cpu.level = name


cpu.level = cpu.active_isa()  # a copy: asking the module costs more than the whole check that needs it

if os.environ.get("LOWBIT_ISA"):
    select_isa(os.environ["LOWBIT_ISA"])

_CUDA_ENGINE = os.environ.get("LOWBIT_CUDA_ENGINE", "")
if _CUDA_ENGINE and _CUDA_ENGINE not in CUDA_ENGINES:
    raise ValueError(f"LOWBIT_CUDA_ENGINE: expected one of {', '.join(CUDA_ENGINES)}, got {_CUDA_ENGINE!r}")
