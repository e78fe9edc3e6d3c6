"""What the nodes of a traced model are: the vocabulary in which pack, decouple and convert read a torch.fx graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_IDENTITIES = (nn.Identity, "contiguous", "clone", torch.clone)
_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, F.dropout,
    F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
)
_FLATTENS = (nn.Flatten, torch.flatten, "flatten")
_SIZED = (torch.reshape, "reshape", "view")
_RESHAPES = (*_FLATTENS, *_SIZED, "reshape_as", "view_as")

# Arguments of functions behind the input; modules have attributes of these names.
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_ADAPTIVE = ("output_size", "return_indices")
_POOLS: dict[Any, tuple[str, int, tuple[str, ...]]] = {  # kind, dimensions of the image, arguments
    **dict.fromkeys((nn.MaxPool1d, F.max_pool1d, torch.max_pool1d), ("max", 1, _MAX)),
    **dict.fromkeys((nn.MaxPool2d, F.max_pool2d, torch.max_pool2d), ("max", 2, _MAX)),
    **dict.fromkeys((nn.MaxPool3d, F.max_pool3d, torch.max_pool3d), ("max", 3, _MAX)),
    **dict.fromkeys((nn.AvgPool1d, F.avg_pool1d), ("average", 1, _AVERAGE)),
    **dict.fromkeys((nn.AvgPool2d, F.avg_pool2d), ("average", 2, _AVERAGE)),
    **dict.fromkeys((nn.AvgPool3d, F.avg_pool3d), ("average", 3, _AVERAGE)),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d), ("max", 1, _ADAPTIVE)),
    **dict.fromkeys((nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d), ("max", 2, _ADAPTIVE)),
    **dict.fromkeys((nn.AdaptiveMaxPool3d, F.adaptive_max_pool3d), ("max", 3, _ADAPTIVE)),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d), ("average", 1, _ADAPTIVE)),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d), ("average", 2, _ADAPTIVE)),
    **dict.fromkeys((nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d), ("average", 3, _ADAPTIVE)),
}


def first_line(error: Exception) -> str:
    """An error in one line, with its type."""
    kind, lines = type(error).__name__, str(error).splitlines()
    return f"{kind}: {lines[0]}" if lines else kind


# --- modules ----------------------------------------------------------------------------------------------------------


def has_binary_weight(module: nn.Module | None) -> bool:
    """A convolution or linear layer of this library with a weight of one bit: of bits, or of values as they are."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) and hasattr(module, "weight_scale")


def reads_bits(module: nn.Module | None) -> bool:
    """A layer with a binary weight that binarizes its input."""
    return has_binary_weight(module) and hasattr(module, "encoding")


class Pool(NamedTuple):
    """A pooling. Sizes have a number for each dimension of the image; () where only the call tells.

    Attributes:
        kind: "max" or "average".
        kernel: () of an adaptive pooling, which has `output`.
        count_pad, divisor: of averages: whether padding counts as pixels, and the divisor in place of their number.
    """

    kind: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False
    count_pad: bool = True
    divisor: int | None = None
    dilation: tuple[int, ...] = (1, 1)
    output: tuple[int | None, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether its windows are known before the call."""
        return () not in (self.kernel, self.stride, self.padding, self.dilation)

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean of the pixels in a window: it divides by their number alone."""
        padded = self.count_pad and set(self.padding) != {0}
        return self.kind == "average" and self.divisor is None and not padded


def pool_of(kind: Any, options: Mapping[str, Any]) -> Pool | None:
    """The pooling that a class of modules or a function is with these arguments by name.

    None: it is no pooling, or gives indices as well.
    """
    if kind not in _POOLS or options.get("return_indices"):
        return None
    name, dims, _ = _POOLS[kind]

    def sizes(option: str, default: tuple[Any, ...]) -> tuple[Any, ...]:
        value = options.get(option)
        value = tuple(value) if isinstance(value, tuple | list) else () if value is None else (value,)
        value = value or default
        value = value * dims if len(value) == 1 else value
        return value if all(isinstance(size, int | None) for size in value) else ()

    kernel = sizes("kernel_size", ())
    return Pool(
        name, kernel, sizes("stride", kernel), sizes("padding", (0,)), bool(options.get("ceil_mode")),
        bool(options.get("count_include_pad", True)), options.get("divisor_override"), sizes("dilation", (1,)),
        sizes("output_size", ()),
    )


# --- tracing ----------------------------------------------------------------------------------------------------------


_DEVICES = ("cpu", "cuda")


def _modes() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)


@contextlib.contextmanager
def _marked_modes() -> Iterator[None]:
    """Gradients, and autocast to what nobody casts to: switching either on or off shows as another state."""
    before = {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES}
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.float32)
        with torch.enable_grad():
            yield
    finally:
        for device, (enabled, dtype) in before.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class Invocation(Protocol):
    """A call of a model, of which the tensors alone are inputs of the graph."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors."""

    def on(self, model: nn.Module, tensors: Sequence[Any]) -> Any:
        """The model's forward with these tensors."""


class _Tracer(fx.Tracer):
    """Torch's layers, those of this library and those that `is_whole` names are one node each."""

    def __init__(
        self, is_whole: Callable[[nn.Module], bool], modes: tuple[Any, ...] | None, call: Invocation | None
    ) -> None:
        super().__init__()
        self.is_whole, self.modes, self.call = is_whole, modes, call

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        if self.call is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in self.call.names]
        on = self.call.on
        return (lambda root, *tensors: on(root, tensors)), [self.root, *inputs]

    def create_node(self, *arguments: Any, **options: Any) -> fx.Node:
        if self.modes not in (None, _modes()):
            raise fx.proxy.TraceError("it switches gradients or autocast on or off, which a graph does not record")
        return super().create_node(*arguments, **options)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return super().is_leaf_module(module, qualified_name) or is_own_layer(module) or self.is_whole(module)


def is_own_layer(module: nn.Module) -> bool:
    """A layer of this library or one derived from it, without modules in it; no part of the ready-made networks."""
    homes = [kind.__module__ for kind in type(module).__mro__ if kind.__module__.startswith(f"{__package__}.")]
    ours = any(not home.startswith(f"{__package__}.models.") for home in homes)
    return ours and not any(True for _ in module.children())


def trace(
    model: nn.Module, is_whole: Callable[[nn.Module], bool] = lambda module: False, inference: bool = False,
    call: Invocation | None = None, absent: Sequence[str] = (),
) -> fx.Graph:
    """The model's graph, with sizes spelled x.size(axis) and the input of a call as its first argument.

    Args:
        model: whose layers are one node each: torch's, this library's and those derived from this library's.
        is_whole: other modules that tracing does not look into.
        inference: the graph will run without gradients and is compared with the model on an example.
        call: what is called with which tensors; by default forward with all that its signature names.
        absent: arguments of forward that are None.

    Raises:
        Whatever torch.fx or the model's own forward raises; TraceError unless `inference` if the forward switches
        gradients or autocast, as `with torch.no_grad()` does, which a graph would lose.
    """
    with contextlib.nullcontext() if inference else _marked_modes():
        graph = _Tracer(is_whole, None if inference else _modes(), call).trace(model, dict.fromkeys(absent) or None)
    modules = dict(model.named_modules())
    for node in graph.nodes:
        if not node.args and "input" in node.kwargs and _has_input_first(node, modules):
            node.args, node.kwargs = (node.kwargs["input"],), {k: v for k, v in node.kwargs.items() if k != "input"}
        if node.target == "size" and "dim" in node.kwargs:
            node.args, node.kwargs = (*node.args, node.kwargs["dim"]), {}
        elif node.target is operator.getitem and isinstance(node.args[1], int) and _is_shape(node.args[0]):
            shape = node.args[0]
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_method("size", (shape.args[0], node.args[1])))
            graph.erase_node(node)
            if not shape.users:
                graph.erase_node(shape)
    return graph


def _has_input_first(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module).__module__.startswith("torch.nn.") or is_own_layer(module)
    home = getattr(node.target, "__module__", None) or "torch"  # torch's own builtin functions name none
    return node.op == "call_function" and home.split(".")[0] == "torch"


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    attribute = node.target is getattr and node.args[1] == "shape"
    return attribute or (node.op == "call_method" and node.target == "size" and len(node.args) == 1)


_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, F.relu_: F.relu, torch.relu_: torch.relu, F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu, torch.clamp_: torch.clamp,
    "add_": torch.add, "sub_": torch.sub, "mul_": torch.mul, "div_": torch.div, "relu_": torch.relu,
    "clamp_": torch.clamp, "clamp_min_": torch.clamp_min, "clamp_max_": torch.clamp_max,
}


def out_of_place(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Puts out-of-place calls for those that write into their first argument, in graph and modules.

    What reads the argument afterwards, by itself or through nn.Identity, reads the result. Views of an argument do not
    see it change: whoever runs the graph compares it with the model.
    """

    def root(node: fx.Node) -> fx.Node:
        while node.op == "call_module" and type(modules[str(node.target)]) is nn.Identity:
            node = node.args[0]  # type: ignore[assignment]
        return node

    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        written = node.target in _OUT_OF_PLACE
        if written:
            node.target, node.op = _OUT_OF_PLACE[node.target], "call_function"
        if getattr(module, "inplace", False) or node.kwargs.get("inplace"):
            written = True
            if module is None:
                node.update_kwarg("inplace", False)
        if written and isinstance(node.args[0], fx.Node):
            for same in [other for other in graph.nodes if root(other) is root(node.args[0])]:
                same.replace_all_uses_with(node, lambda user, at=position[node]: position[user] > at)
    for module in modules.values():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


# --- nodes ------------------------------------------------------------------------------------------------------------


def reads_batch_size(node: Any) -> bool:
    """x.size(0), however spelled."""
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == "size" and node.args[1:] == (0,)


class Traced:
    """A traced model: what its nodes call, and what that is.

    Attributes:
        graph: of `trace`.
        modules: of the model, by name.
        shapes: of nodes' values on an example, where there is one.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.graph, self.modules = graph, dict(model.named_modules())
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def module(self, node: fx.Node) -> Any:
        """The module that a node calls, or None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def kind(self, node: fx.Node) -> Any:
        """Class of the module that a node calls, the function, or the method's name; None of what is no call."""
        if node.op == "call_module":
            return type(self.module(node))
        return node.target if node.op in ("call_function", "call_method") else None

    def name(self, node: fx.Node) -> str:
        """The module's name in the model; otherwise the node's in the graph."""
        return str(node.target) if node.op == "call_module" else node.name

    def kind_name(self, node: fx.Node) -> str:
        """Name of the class, function or method."""
        return getattr(self.kind(node), "__name__", str(node.target))

    def label(self, node: fx.Node) -> str:
        """How messages name a node."""
        return f"{self.name(node)} ({self.kind_name(node)})"

    def options(self, node: fx.Node, names: tuple[str, ...]) -> Mapping[str, Any]:
        """Arguments by name, those of a call behind its first one."""
        module = self.module(node)
        return vars(module) if module is not None else dict(zip(names, node.args[1:], strict=False)) | node.kwargs

    def is_identity(self, node: fx.Node) -> bool:
        """Leaves values as they are."""
        return self.kind(node) in _IDENTITIES

    def is_dropout(self, node: fx.Node) -> bool:
        """A dropout, in training or not."""
        return self.kind(node) in _DROPOUTS

    def is_batch_norm(self, node: fx.Node) -> bool:
        """An nn.BatchNorm1d, 2d or 3d."""
        return self.kind(node) in BATCH_NORMS

    def pool(self, node: fx.Node) -> Pool | None:
        """The pooling that a node is, or None."""
        kind = self.kind(node)
        return pool_of(kind, self.options(node, _POOLS[kind][2])) if kind in _POOLS else None

    def is_reshape(self, node: fx.Node) -> bool:
        """The same elements in the same order, under another shape."""
        arguments = (*node.args, *node.kwargs.values())
        return self.kind(node) in _RESHAPES and not any(isinstance(value, torch.dtype) for value in arguments)

    def is_flatten(self, node: fx.Node) -> bool:
        """(N, C, *spatial) -> (N, features): by the shapes where they are known, otherwise by the spelling.

        By the spelling, what reshapes to two sizes of which one is the batch's, or the number of features a constant:
        x.view(-1, 512) of values of other than 512 features is taken for one.
        """
        if not self.is_reshape(node):
            return False
        if node in self.shapes:
            before, after = self.shapes.get(node.all_input_nodes[0], ()), self.shapes[node]
            return len(before) > 1 and len(after) == 2 and after[0] == before[0]
        if self.kind(node) in _FLATTENS:
            return self.options(node, ("start_dim", "end_dim")).get("start_dim", 0) == 1
        sizes = self.sizes(node)
        if len(sizes) != 2:
            return False
        batch, features = sizes
        return _is_count(features) or _is_count(batch) or reads_batch_size(batch)

    def sizes(self, node: fx.Node) -> tuple[Any, ...]:
        """The sizes that a view or reshape names, numbers or nodes; () of others."""
        if self.kind(node) not in _SIZED:
            return ()
        sizes = (*node.args[1:], *node.kwargs.values())
        return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _is_count(size: Any) -> bool:
    return isinstance(size, int) and size > 0
