"""The packed network that pack() makes, and its files."""

from __future__ import annotations

import contextlib
import inspect
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lowbit_ext import _arguments
from lowbit_ext._native import PLAIN_TENSORS
from lowbit_ext._oplib import is_eager
from lowbit_ext._torch import pytree
from lowbit_ext.binary.packing.executor import Executor
from lowbit_ext.binary.packing.packed_base import PackedLayer

FORMAT = "lowbit_ext.packed"
FORMAT_VERSION = "2"

# --- call -------------------------------------------------------------------------------------------------------------

class Call:
    """The call that a model was packed for: its tensors are inputs, all other arguments fixed.

    Attributes:
        names: of the tensors.
    """

    def __init__(self, signature: inspect.Signature, arguments: dict[str, Any]) -> None:
        self._signature = signature
        self._example = tuple(leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
        # The class Tensor stands for a tensor.
        self._fixed = pytree.tree_map(lambda leaf: Tensor if isinstance(leaf, Tensor) else leaf, arguments)
        self.names = []
        for name, value in self._fixed.items():
            leaves = pytree.tree_leaves(value)
            names = [name] if len(leaves) == 1 else [f"{name}_{index}" for index in range(len(leaves))]
            self.names += [name for name, leaf in zip(names, leaves, strict=True) if leaf is Tensor]

    @staticmethod
    def of(model: nn.Module, example: Any) -> Call:
        """The call of a model with an example: a tensor, a tuple of arguments or a dictionary of them by name."""
        signature = inspect.signature(model.forward)
        signature = signature.replace(
            parameters=[value.replace(annotation=inspect.Parameter.empty) for value in signature.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
        kwargs = example if isinstance(example, dict) else {}
        args: tuple[Any, ...] = example if isinstance(example, tuple) else ()
        if not isinstance(example, tuple | dict):
            args = (example,)
        try:
            return Call(signature, _bind(signature, args, kwargs))
        except TypeError as error:
            raise ValueError(f"pack: example_input does not fit the model's forward: {error}") from error

    def example(self) -> tuple[Tensor, ...]:
        """The example's tensors: copies."""
        return tuple(tensor.clone() for tensor in self._example)

    def on(self, model: nn.Module, tensors: Sequence[Any] | None = None) -> Any:
        """What a model's forward gives for these tensors, by default the example's."""
        waiting = iter(self.example() if tensors is None else tensors)
        bound = self._signature.bind_partial()
        bound.arguments.update(
            pytree.tree_map(lambda leaf: next(waiting) if leaf is Tensor else leaf, self._fixed)
        )
        return model.forward(*bound.args, **bound.kwargs)

    def is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has just the tensors, one an argument and by position."""
        return (
            not kwargs and len(args) == len(self.names) == len(self._fixed)
            and all(isinstance(value, Tensor) for value in args)
        )

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The tensors of a call.

        Raises:
            TypeError: the arguments do not fit the signature. ValueError: one that was fixed has another value.
        """
        found: list[Any] = []
        for name, value in _bind(self._signature, args, kwargs).items():
            fixed = self._fixed[name]
            (wanted, structure), (given, came) = pytree.tree_flatten(fixed), pytree.tree_flatten(value)
            for want, got in zip(wanted, given, strict=False):
                same = isinstance(got, Tensor) if want is Tensor else not isinstance(got, Tensor) and got == want
                if not same or structure != came:
                    was = "a tensor" if want is Tensor else f"{want!r}"
                    got = "a tensor" if isinstance(got, Tensor) else f"{got!r}"
                    raise ValueError(f"packed model: it was packed for a call with {name}={was}, got {got}")
                if want is Tensor:
                    found.append(got)
            if structure != came:
                raise ValueError(f"packed model: it was packed for another {name}: {fixed!r}")
        return tuple(found)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_example": ()}  # of use while packing alone


def _bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


# --- model ------------------------------------------------------------------------------------------------------------


def _crc32(tensors: Mapping[str, Tensor], seed: str) -> int:
    """CRC-32 over a text, then names, dtypes, shapes and contents in the order of the names."""
    crc = zlib.crc32(seed.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


class Row(NamedTuple):
    """A line of a packed model's report.

    Attributes:
        name: of the node in the model.
        kind: class of the module, function or method.
        how: "bits" (reads bits), "pass" (part of one pass over floats) or "as it was".
        note: what it gives, what it runs with, or why it stayed.
    """

    name: str
    kind: str
    how: str
    note: str


class PackedModel(nn.Module):
    """A packed network, made by pack() of a traced graph, `body`: inference only, without gradients.

    Binary layers hold words of weights, thresholds and epilogues; the other layers are the model's own. Takes the
    arguments that the model was packed for, with tensors of any batch size; what was no tensor must be as it was.
    Floats of any type are computed in `float_dtype`, also inside autocast; results have the type of the first float
    tensor given. `.to(dtype)` changes `float_dtype`. The buffer `checksum` is a CRC-32 over the packed layers' buffers
    and architecture.

    Attributes:
        float_dtype: of the float parts.
        agreement: of a model in half precision, how many of the example's predictions equal the float32 model's, of how
            many; else None.

    Raises:
        TypeError: a body that is no torch.fx.GraphModule, a cast to a type other than float32, bfloat16 and float16.
        ValueError: a call with other arguments than the model was packed for; from load_state_dict, before anything is
            written, for a state whose packed buffers do not match its checksum or whose entries are not this model's.
            What float layers raise in a call comes through.
    """

    checksum: Tensor
    float_dtype = torch.float32
    agreement: tuple[int, int] | None = None

    def __init__(
        self, body: fx.GraphModule, call: Call | None = None, rows: tuple[Row, ...] = (), by_image: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(body, fx.GraphModule):
            raise TypeError(f"PackedModel: body must be a torch.fx.GraphModule, got {type(body).__name__}")
        self.body, self._call, self._rows, self._by_image = body, call, rows, by_image
        self._executor = Executor(body, by_image)
        checksum = torch.tensor(self._checksum(self.state_dict()), dtype=torch.int64, device="cpu")
        self.register_buffer("checksum", checksum)
        self.requires_grad_(False)
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_executor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._executor = Executor(self.body, self._by_image)

    def report(self) -> Report:
        """What became of each of the model's operations, in its order; prints as a table."""
        return Report(self._rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModel:
        dtype = fn(torch.empty(0, dtype=self.float_dtype, device="cpu")).dtype
        if dtype not in _arguments.FLOATS:
            raise TypeError(f"packed model: floats are float32, bfloat16 or float16, got {dtype}")
        super()._apply(fn, recurse)
        self.float_dtype = dtype
        self._executor.clear()
        for layer in self.packed_layers().values():
            layer.float_dtype = dtype
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result. torch.fx records a packed network within another model as one call."""
        for value in args:
            if isinstance(value, fx.Proxy):
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self.body), args, kwargs)
        inputs = self._tensors(args, kwargs)
        wanted = next((value.dtype for value in inputs if value.is_floating_point()), self.float_dtype)
        inputs = [value.to(self.float_dtype) if value.is_floating_point() else value for value in inputs]
        with torch.no_grad(), _without_autocast(inputs):
            result = (self._executor.run if self._is_plain(inputs) else self.body.forward)(*inputs)
        if wanted == self.float_dtype:
            return result

        def as_given(value: Any) -> Any:
            return value.to(wanted) if isinstance(value, Tensor) and value.dtype == self.float_dtype else value

        return pytree.tree_map(as_given, result)

    def _is_plain(self, inputs: Sequence[Tensor]) -> bool:
        """Whether kernels may be called with addresses, past torch's dispatcher and the layers' hooks."""
        return (
            not torch.compiler.is_compiling() and is_eager()
            and all(type(x) in PLAIN_TENSORS and x.is_cpu and x.layout is torch.strided for x in inputs)
            and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in self._executor.layers)
        )

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """The body's inputs."""
        call = self._call
        if call is not None and not call.is_plain(args, kwargs):
            return call.tensors(args, kwargs)
        if kwargs or not all(isinstance(value, Tensor) for value in args):
            raise TypeError(f"packed model: inputs must be tensors, got {args} {kwargs}")
        return args

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


class Report(tuple[Row, ...]):
    """Rows of a packed model's report, which print as a table."""

    def __str__(self) -> str:
        titles = Row("layer", "kind", "runs", "note")
        widths = [max((len(row[i]) for row in (titles, *self)), default=0) for i in range(3)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, (*widths, 0), strict=True)).rstrip()
                 for row in (titles, *self)]
        return "\n".join(lines)


def _without_autocast(inputs: Sequence[Any]) -> Any:
    """The dtypes of a packed model are its own."""
    for value in inputs:
        if isinstance(value, Tensor) and not value.is_meta and torch.is_autocast_enabled(value.device.type):
            return torch.autocast(value.device.type, enabled=False)
    return contextlib.nullcontext()


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
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is no whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"load: {path} holds no packed model")
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(f"load: {path} has format version {metadata.get('version')}, this reads {FORMAT_VERSION}")
    if metadata.get("checksum") != str(_crc32(state, FORMAT)):
        raise ValueError(f"load: {path} is corrupted: its checksum does not match its contents")
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    return model
