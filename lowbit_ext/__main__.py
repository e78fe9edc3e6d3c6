"""`python -m lowbit_ext`: what is installed, and what this machine runs it with."""

import importlib.util
import platform

import torch

import lowbit_ext
from lowbit_ext import _native


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
        "CUDA library": "built, not used yet" if importlib.util.find_spec("lowbit_ext._cuda") else "not built",
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for name, value in rows.items():
        print(f"{name + ':':15}{value}")


if __name__ == "__main__":
    main()
