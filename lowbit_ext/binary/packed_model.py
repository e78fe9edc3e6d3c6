"""The packed network that pack() makes, its layers and its files.

Between packed layers flow bare words (N, H, W, words): one-dimensional data has H = 1, vectors H = W = 1.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit_ext import _arguments, _native
from lowbit_ext.binary import ops
from lowbit_ext.binary.activation import DEFAULT_THRESHOLDS
from lowbit_ext.binary.weights import PackedWeight
from lowbit_ext.packed import ENCODING_VALUES, clear_tail, unpack_op

FORMAT = "lowbit_ext.packed"
FORMAT_VERSION = "1"

# --- layers -----------------------------------------------------------------------------------------------------------


def drop_axes(value: Tensor, dims: int) -> Tensor:
    """(N, C, H, W) as a tensor of `dims` dimensions: H = 1 dropped for three, all flattened for two."""
    if dims == 2:
        return value.flatten(1)
    return value.squeeze(2) if dims == 3 else value


class PackedLayer(nn.Module):
    """A layer whose buffers are its meaning: the model's checksum covers them and casts leave their dtypes alone."""

    def prepare(self) -> None:
        """Derives from the buffers what a call needs."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        self.prepare()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.prepare()


def _unless_zero(buffer: Tensor | None) -> Tensor | None:
    """Flips and inversions that no channel has cost the kernels nothing."""
    return buffer if buffer is not None and bool(buffer.any()) else None


class PackedBinarize(PackedLayer):
    """Float (N, C, *spatial) -> words, by one threshold for all channels or, behind a batch norm, one or two for each.

    Two, of shape (2, C), give 2 C bits.
    """

    threshold: Tensor | None
    flip: Tensor | None

    def __init__(
        self, channels: int, encoding: str, threshold: Tensor | None = None, flip: Tensor | None = None
    ) -> None:
        super().__init__()
        self.channels, self.encoding = channels, encoding
        self.register_buffer("threshold", threshold)
        self.register_buffer("flip", flip)
        self.prepare()

    def prepare(self) -> None:
        common = DEFAULT_THRESHOLDS[self.encoding]
        self._arguments = (self.threshold, _unless_zero(self.flip), common, self.encoding)

    def forward(self, x: Tensor) -> Tensor:
        _arguments.tensor("packed model", "input", x, _arguments.FLOATS)
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"packed model: input must have {self.channels} channels, got {tuple(x.shape)}")
        words = ops.binarize(x, *self._arguments)
        shape = words.shape
        return words if len(shape) == 4 else words.reshape(shape[0], *(1,) * (4 - len(shape)), *shape[1:])

    def extra_repr(self) -> str:
        thresholds = "one" if self.threshold is None else ("per channel", "two per channel")[self.threshold.dim() - 1]
        return f"channels={self.channels}, encoding={self.encoding!r}, thresholds={thresholds}"


class PackedConv2d(PackedLayer):
    """Words -> words by integer thresholds, or -> float32; convolutions and linear layers of any number of dimensions.

    Args:
        weight: of four dimensions.
        geometry: of the convolution.
        encoding, padding_value: of the input's bits.
        scale, bias: float32, for a float result.
        threshold, flip: int32 and bool of shape (1 or 2, O), for a result of bits.
        out_dims: dimensions of a float result.
        one_pixel: a linear layer, whose kernel covers the image.
    """

    words: Tensor
    blocked: Tensor
    scale: Tensor | None
    bias: Tensor | None
    threshold: Tensor | None
    flip: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        geometry: ops.Geometry,
        encoding: str,
        padding_value: int,
        *,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        threshold: Tensor | None = None,
        flip: Tensor | None = None,
        out_dims: int = 4,
        one_pixel: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.geometry = tuple(weight.shape), geometry
        self.encoding, self.padding_value = encoding, padding_value
        self.out_dims, self.one_pixel = out_dims, one_pixel
        self.register_buffer("words", weight.words)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("threshold", threshold)
        self.register_buffer("flip", flip)
        # Private to the device and its instruction set: made from the words, never stored.
        self.register_buffer("blocked", weight.blocked, persistent=False)
        self.prepare()

    def prepare(self) -> None:
        geometry = self.geometry
        channels = self.shape[1] * geometry.groups
        self.isa = _native.kernels(self.words).level
        words = clear_tail(self.words, self.shape[1])  # the kernels' copy, whatever a file holds past the last channel
        self.blocked = ops.binary_conv2d_block_weight(words, channels, geometry.groups)
        # Looked up once here and not in each call: nn.Module.__getattr__ takes a third of a microsecond a buffer.
        self._before_residual = (self.blocked, self.scale, self.bias)
        self._after_residual = (
            self.threshold, _unless_zero(self.flip), channels, self.shape[0], geometry, self.encoding,
            self.padding_value, torch.float32,
        )

    def forward(self, words: Tensor, residual: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling() and self.isa != _native.kernels(words).level:
            self.prepare()
        if residual is not None and residual.dim() < 4:
            shape = residual.shape
            residual = residual.reshape(*shape[:2], *(1,) * (4 - len(shape)), *shape[2:])
        if self.one_pixel and words.shape[1:3] != self.shape[2:]:
            raise ValueError(
                f"packed model: a linear layer was packed for images of {self.shape[2]} x {self.shape[3]} pixels, "
                f"got {words.shape[1]} x {words.shape[2]}"
            )
        output = ops.binary_conv2d(words, *self._before_residual, residual, *self._after_residual)
        return output if output.dtype == torch.int64 else drop_axes(output, self.out_dims)

    def extra_repr(self) -> str:
        geometry = self.geometry
        terms = [name for name in ("scale", "bias", "threshold") if getattr(self, name) is not None]
        return (
            f"{self.shape[1] * geometry.groups}, {self.shape[0]}, kernel={geometry.kernel}, stride={geometry.stride}, "
            f"padding={geometry.padding}, dilation={geometry.dilation}, groups={geometry.groups}, "
            f"encoding={self.encoding!r}, padding_value={self.padding_value}, dims={self.out_dims}, "
            f"epilogue={'+'.join(terms) or None}"
        )


@dataclasses.dataclass(frozen=True)
class Window:
    """Geometry of a max-pooling, in the order of the operator's arguments."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


class PackedMaxPool2d(PackedLayer):
    """Maximum over windows of words; the minimum in the channels whose bit of `invert` is set."""

    invert: Tensor | None

    def __init__(self, channels: int, window: Window, invert: Tensor | None = None) -> None:
        super().__init__()
        self.channels, self.window = channels, window
        self.register_buffer("invert", invert)
        self.prepare()

    def prepare(self) -> None:
        w = self.window
        window = ops.Window(*w.kernel, *w.stride, *w.padding, *w.dilation, int(w.ceil_mode))
        invert = None if self.invert is None else clear_tail(self.invert, self.channels)
        self._arguments = (_unless_zero(invert), self.channels, window)

    def forward(self, words: Tensor) -> Tensor:
        return ops.binary_max_pool2d(words, *self._arguments)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, {self.window}, inverts={self.invert is not None}"


class PackedAvgPool2d(PackedLayer):
    """Mean over windows of words, or over the whole image: words -> float32.

    Args:
        channels, encoding: of the words.
        window: kernel, stride, padding, ceil_mode, count_include_pad, divisor_override (0: none); None: the image.
    """

    def __init__(self, channels: int, encoding: str, window: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.channels, self.encoding, self.window = channels, encoding, window

    def forward(self, words: Tensor) -> Tensor:
        size = words.shape[1:3]
        given: tuple[Any, ...] = self.window if self.window is not None else (size, size, (0, 0), False, True, 0)
        kernel, stride, padding, ceil_mode, count_include_pad, divisor_override = given
        window = ops.Window._make((*kernel, *stride, *padding, 1, 1, int(ceil_mode)))
        return ops.binary_avg_pool2d(
            words, self.channels, window, count_include_pad, divisor_override, self.encoding
        )

    def extra_repr(self) -> str:
        return f"channels={self.channels}, encoding={self.encoding!r}, window={self.window}"


class PackedUnpack(PackedLayer):
    """Words -> float32 values of `dims` dimensions."""

    def __init__(self, channels: int, encoding: str, dims: int) -> None:
        super().__init__()
        self.channels, self.encoding, self.dims = channels, encoding, dims

    def forward(self, words: Tensor) -> Tensor:
        low, high = ENCODING_VALUES[self.encoding]
        return drop_axes(unpack_op(words, self.channels, low, high, torch.float32).movedim(-1, 1), self.dims)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, encoding={self.encoding!r}, dims={self.dims}"


# --- model ------------------------------------------------------------------------------------------------------------


def _crc32(tensors: Mapping[str, Tensor], seed: str) -> int:
    """CRC-32 over a text, then names, dtypes, shapes and contents in the order of the names."""
    crc = zlib.crc32(seed.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


class PackedModel(nn.Module):
    """A packed network, made by pack() of a traced graph, `body`: inference only, without gradients.

    Binary layers hold words of weights and integer thresholds; float layers are the model's own. Takes the model's
    inputs, of any batch size. The buffer `checksum` is a CRC-32 over the packed layers' buffers and architecture.

    Raises:
        TypeError: a body that is no torch.fx.GraphModule. ValueError: from load_state_dict, before anything is written,
            for a state whose packed buffers do not match its checksum or whose entries are not this model's. What float
            layers raise in a call comes through.
    """

    checksum: Tensor

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        if not isinstance(body, fx.GraphModule):
            raise TypeError(f"PackedModel: body must be a torch.fx.GraphModule, got {type(body).__name__}")
        self.body = body
        checksum = torch.tensor(self._checksum(self.state_dict()), dtype=torch.int64, device="cpu")
        self.register_buffer("checksum", checksum)
        self.requires_grad_(False)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result. torch.fx records a packed network within another model as one call."""
        for value in args:
            if isinstance(value, fx.Proxy):
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self.body), args, kwargs)
        with torch.no_grad():
            return self.body.forward(*args, **kwargs)

    def train(self, mode: bool = True) -> PackedModel:
        """Stays in evaluation mode, whatever `mode`."""
        return super().train(False)

    def packed_layers(self) -> dict[str, PackedLayer]:
        """The packed layers by name, in the order of the network."""
        return {name: module for name, module in self.named_modules() if isinstance(module, PackedLayer)}

    def _checksum(self, state: Mapping[str, Tensor]) -> int:
        packed = self.packed_layers()
        architecture = "\n".join(
            f"{name} {type(layer).__name__}({layer.extra_repr()})" for name, layer in packed.items()
        )
        names = [f"{name}.{key}" for name, layer in packed.items() for key in layer.state_dict()]
        return _crc32({name: state[name] for name in names}, architecture)

    def check_state(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Raises ValueError unless `state` is this model's, whole and unharmed."""
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state:
                raise ValueError(f"packed model: the state lacks {name}")
            if not isinstance(state[name], Tensor):
                raise ValueError(f"packed model: {name} must be a tensor, got {type(state[name]).__name__}")
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(
                    f"packed model: {name} must be {tensor.dtype} {tuple(tensor.shape)}, "
                    f"got {state[name].dtype} {tuple(state[name].shape)}"
                )
        unexpected = sorted(set(state) - set(own))
        if strict and unexpected:
            raise ValueError(f"packed model: the state has {unexpected[0]}, which the model has not")
        if int(state["checksum"]) != self._checksum(state):
            raise ValueError(
                "packed model: the state's checksum does not match its bits: it is corrupted or of another architecture"
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        # torch calls this before the children's, so that a refused state leaves every buffer as it was.
        own = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        self.check_state(own, strict)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


# --- files ------------------------------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving packed models needs safetensors: pip install safetensors") from error
    return safetensors


def _check_model(op: str, model: Any) -> None:
    if not isinstance(model, PackedModel):
        raise TypeError(f"{op}: model must be a packed model, made by pack(), got {type(model).__name__}")


def _check_path(op: str, path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{op}: path must be a string or a path, got {type(path).__name__}")
    return Path(path)


def save(model: PackedModel, path: str | os.PathLike[str]) -> None:
    """Writes a packed model's tensors as a safetensors file. An existing file is replaced at once or not at all.

    Args:
        model: made by pack().
        path: file to write. It gets the permissions of the file that it replaces, a new one what the umask leaves.

    Raises:
        TypeError: not a packed model. ValueError: the path names no file. ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    _check_model("save", model)
    path = _check_path("save", path)
    if not path.name:
        raise ValueError(f"save: path must name a file, got {str(path)!r}")
    safetensors = _safetensors()
    # Clones: safetensors refuses tensors that share memory, as tied layers do.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": FORMAT, "version": FORMAT_VERSION, "checksum": str(_crc32(state, FORMAT))}
    content = safetensors.torch.save(state, metadata)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(temporary, "xb") as file:  # created as open() does it, under the process's umask
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def load(model: PackedModel, path: str | os.PathLike[str]) -> PackedModel:
    """Reads a file that save() wrote into a packed model of the same architecture.

    Args:
        model: made by pack() from a model of the same layers, trained or not.
        path: file to read.

    Returns:
        The model.

    Raises:
        TypeError: not a packed model. ImportError: safetensors is not installed. FileNotFoundError: no such file.
        ValueError: a truncated, altered or foreign file, or one of another architecture; the model is then unchanged.
    """
    _check_model("load", model)
    path = _check_path("load", path)
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"load: no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is no whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"load: {path} holds no packed model")
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(f"load: {path} has format version {metadata.get('version')}, this reads {FORMAT_VERSION}")
    if metadata.get("checksum") != str(_crc32(state, FORMAT)):
        raise ValueError(f"load: {path} is corrupted: its checksum does not match its contents")
    model.load_state_dict(state)
    return model
