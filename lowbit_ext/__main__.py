"""`python -m lowbit_ext`: what is installed, and what this machine runs it with."""

import platform

import torch

import lowbit_ext
from lowbit_ext import _native


def _cuda_kernels() -> str:
    """What the CUDA module was built for."""
    try:
        return f"built for compute capability {_native.cuda_module().architectures().replace(' ', ', ')}"
    except RuntimeError as error:
        return str(error)


def _cuda_device(index: int) -> str:
    """Name of a device and what its kernels are chosen by."""
    name = torch.cuda.get_device_name(index)
    try:
        kernels = _native.cuda_kernels(index)
        return f"{name} ({kernels.level}, convolution by {kernels.engine} of {', '.join(kernels.engines)})"
    except RuntimeError as error:
        return f"{name} ({error})"


def main() -> None:
    """Prints versions, instruction sets, the thread pool in use and the state of CUDA."""
    one_pool = _native.cpu.threads() == torch.get_num_threads()
    rows = {
        "lowbit_ext": lowbit_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU levels": f"{', '.join(_native.available_isas())} (active: {_native.active_isa()})",
        "threads": f"{_native.cpu.threads()} in the kernels, {torch.get_num_threads()} in torch "
        f"({'one pool' if one_pool else 'two pools: torch is not using OpenMP'})",
        "CUDA kernels": _cuda_kernels(),
        "CUDA devices": ", ".join(_cuda_device(index) for index in range(torch.cuda.device_count())) or "none",
    }
    for name, value in rows.items():
        print(f"{name + ':':15}{value}")


if __name__ == "__main__":
    main()
