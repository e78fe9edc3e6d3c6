"""Quantum-inspired classifier: samples as quantum states, classes as density operators, decisions as measurements.

`HelstromClassifier` needs scikit-learn and is loaded when it is first asked for; `gram` and `transpose` do without.
"""

from typing import TYPE_CHECKING, Any

from lowbit_ext.helstrom._gram import gram, transpose

if TYPE_CHECKING:
    from lowbit_ext.helstrom.classifier import HelstromClassifier

__all__ = ["HelstromClassifier", "gram", "transpose"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name != "HelstromClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lowbit_ext.helstrom.classifier import HelstromClassifier
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("sklearn", "scipy"):
            raise
        raise ImportError(
            'lowbit_ext.helstrom.HelstromClassifier needs scikit-learn: pip install "lowbit-ext[helstrom]"'
        ) from error
    return HelstromClassifier
