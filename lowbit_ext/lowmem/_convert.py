"""convert(): a model whose batch norms, ReLUs, convolutions and linear layers keep codes of a few bits."""

from __future__ import annotations

import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from lowbit_ext._graph import Pool, Traced, first_line
from lowbit_ext._rebuilt import Rebuilt
from lowbit_ext._torch import Convolution, StatisticsNorm, is_compiled
from lowbit_ext.lowmem import blocks
from lowbit_ext.lowmem._modes import read_modes, trace_in_both_modes
from lowbit_ext.lowmem.codes import check_settings

__all__ = ["Conversion", "convert", "report"]

_RELU_CALLS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_IN_PLACE_CALLS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, F.relu_, torch.relu_,
)
# Results in memory of their own; those of other calls may be views of an argument.
_FRESH_CALLS = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat, "add", "mul", "sub")
_FRESH_LAYERS = (
    nn.Linear, Convolution, StatisticsNorm, nn.GroupNorm, nn.LayerNorm, nn.MaxPool2d,
    nn.AvgPool2d,
)
# Results that may be views of the first argument, beside those of dropout.
_VIEWS = frozenset((
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "t", "transpose", "permute", "movedim",
    "squeeze", "unsqueeze", "expand", "expand_as", "narrow", "select", "chunk", "split", "unbind", "getitem", "detach",
    "to", "float", "contiguous", nn.Identity, nn.Flatten, nn.Unflatten,
))
_CURVED = "its derivative needs the value of its input: rounded, errors would build up with depth"
_LEFT: dict[type, str] = {
    nn.SyncBatchNorm: "its statistics are those of all processes",
    nn.GroupNorm: "only batch norms have codes by channel",
    nn.LayerNorm: "only batch norms have codes by channel",
    **dict.fromkeys((nn.GELU, nn.SiLU, nn.ELU, nn.Mish, nn.Softplus, nn.Hardswish, nn.Tanh, nn.Sigmoid), _CURVED),
}
_REPORT = "lowmem_report"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of one layer.

    Attributes:
        name: within the model; of a function, that of its node in the graph.
        kind: name of the original class, or of the function.
        converted: whether it keeps codes, or reads codes and keeps nothing; of the layers of lowbit_ext.binary and
            lowbit_ext.duo, which stay as they are, whether they keep bits.
        how: what it keeps now, or why it was left.
    """

    name: str
    kind: str
    converted: bool
    how: str


def convert(model: nn.Module, bits: int = 4, range: float | None = None) -> nn.Module:
    """The same model, exact in its forward pass, that keeps codes of `bits` bits for its backward pass.

    Batch norms keep codes of their result, with the ReLU behind them where there is one; ReLUs elsewhere keep codes in
    groups of 256; convolutions and linear layers that read one of these, also through pooling or reshapes, read its
    codes and keep nothing. Max-pooling keeps a byte a window, average pooling nothing. Layers of lowbit_ext.binary and
    lowbit_ext.duo keep bits already. Everything else, and what torch.fx cannot trace, stays as it is. `report` lists
    both.

    Args:
        model: any module: ResNets of both orders, VGG, perceptrons. It is not modified, but the result shares its
            parameters and buffers: optimizers and state_dicts of the one serve the other. Where torch.fx can trace the
            model the result is a torch.fx.GraphModule with the same names of layers, otherwise its class stays and
            its children are converted one by one. Hooks stay, and a model within that has hooks is converted on its
            own; hooks of a batch norm, ReLU or pooling, whose result is no longer there to be seen, and those that
            may change the input of a convolution or linear layer are a reason to leave that layer.
        bits: 2, 4 or 8.
        range: standard deviations that a channel's codes span; None: 8 for 4 bits, 9 for 8, 6 (the paper's) for 2.

    Returns:
        The converted model, in the mode (training or evaluation) of each of the model's layers. It can be copied,
        pickled and compiled; what Module.compile() compiled is to be compiled again. A model that was converted before
        comes back as it is, in a copy.

    Gradient:
        see LowMemBlock; ReLU's mask is exact everywhere. There is no second derivative.

    Raises:
        TypeError: model is no module, bits no int, or range no number.
        ValueError: bits or range out of range; a result of torch.compile, which goes on running the original, as does a
            module whose forward is an attribute of the object. Within a model these are left as they are.

    Source:
        Chakrabarti and Moseley, "Backprop with approximate activations for memory-efficient network training", NeurIPS
        2019, section 3; groups: Chen et al., "ActNN", ICML 2021.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    reason = _uncopyable(model)
    if reason is not None:
        raise ValueError(f"convert: model cannot be converted: {reason}")
    bits, span = check_settings("convert", bits, range)
    found: list[Conversion] = []
    result = _convert(model, "", bits, span, found)
    vars(result)[_REPORT] = tuple(found)
    return result


def report(model: nn.Module) -> tuple[Conversion, ...]:
    """What `convert` did to each layer of a converted model, and why it left the others.

    Args:
        model: of `convert`, or a copy of one.

    Returns:
        One Conversion for each layer, functional ReLU and functional pooling; several for a layer that is called
        several times with different outcomes.

    Raises:
        TypeError: model is no module.
        ValueError: `convert` did not make the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    if _REPORT not in vars(model):
        raise ValueError(f"report: model must be one that convert made, got {type(model).__name__}")
    return vars(model)[_REPORT]


def _uncopyable(module: nn.Module) -> str | None:
    """Why a second module with the same attributes would run the first one's layers, or None."""
    if is_compiled(module):
        return "torch.compile has compiled it; convert it first and compile the result"
    if "forward" in vars(module):
        return "its forward is an attribute of the object, not of its class"
    return None


def _has_hooks(module: nn.Module | None) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


def _keeps_bits(module: nn.Module | None) -> bool | None:
    """Whether a quantised layer of this library reads bits alone in its backward pass; None of other modules."""
    return getattr(module, "keeps_bits", None)


def _of_own_layer(module: nn.Module) -> tuple[bool, str]:
    """What a report says of a quantised layer of this library."""
    bits = bool(_keeps_bits(module))
    return bits, "keeps bits by itself" if bits else f"{type(module).__name__} keeps its input"


def _copied(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """Second modules of the same classes, all the way down, on the same parameters and buffers."""
    if isinstance(module, torch.jit.ScriptModule) or _uncopyable(module) is not None:
        return module
    if module not in copies:
        made = copies[module] = object.__new__(type(module))
        made.__dict__ = blocks.shared_attributes(module)
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else _copied(child, copies)
    return copies[module]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _convert(model: nn.Module, prefix: str, bits: int, span: float, found: list[Conversion]) -> nn.Module:
    """The converted module; its children one by one where the whole cannot be traced."""
    if _is_converted(model):
        entries = vars(model).get(_REPORT, (Conversion("", type(model).__name__, True, "converted before"),))
        found.extend(dataclasses.replace(entry, name=_join(prefix, entry.name)) for entry in entries)
        return _copied(model, {})
    reason = _uncopyable(model)
    if reason is not None:
        found.append(Conversion(prefix, type(model).__name__, False, reason))
        return model
    if not any(True for _ in model.children()):
        return _convert_alone(model, prefix, bits, span, found)
    copies: dict[nn.Module, nn.Module] = {}
    made = _copied(model, copies)
    try:
        graph = trace_in_both_modes(made, _is_whole)
        reason = "its graph is another one in evaluation"
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        graph, reason = None, first_line(error)
    for original, copied in copies.items():
        copied.training = original.training
    if graph is not None:
        return _Converter(made, graph, prefix, bits, span, found).result
    children = {child: _convert(child, _join(prefix, name), bits, span, found) for name, child in made.named_children()}
    made._modules.update({name: children[child] for name, child in made._modules.items() if child is not None})
    how = f"children one by one, torch.fx cannot trace it: {reason}"
    found.append(Conversion(prefix, type(model).__name__, False, how))
    return made


def _is_whole(module: nn.Module) -> bool:
    """Tracing looks into the containers without hooks; those with hooks are called as they are."""
    alone = _has_hooks(module) or isinstance(module, fx.GraphModule) or _is_converted(module)
    return alone or _uncopyable(module) is not None


def _convert_alone(model: nn.Module, prefix: str, bits: int, span: float, found: list[Conversion]) -> nn.Module:
    """A layer whose neighbours are unknown: a batch norm keeps codes all the same, for its own gradient."""
    if type(model) in blocks.BATCH_NORMS and not _has_hooks(model):
        found.append(Conversion(prefix, type(model).__name__, True, "codes of its result, which nobody else reads"))
        return blocks.BATCH_NORMS[type(model)].like(model, bits, span, alone=True)
    outcome = (False, "alone: its neighbours are unknown") if _keeps_bits(model) is None else _of_own_layer(model)
    found.append(Conversion(prefix, type(model).__name__, *outcome))
    return _copied(model, {})


# --- rewriting --------------------------------------------------------------------------------------------------------


class _Converter(Traced):
    """Rewrites a traced graph: every coded value gets a second node, its codes, which readers take."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, prefix: str, bits: int, span: float, found: list[Conversion]
    ) -> None:
        super().__init__(model, graph)
        self.prefix, self.bits, self.span, self.found = prefix, bits, span, found
        self.changed: dict[nn.Module, nn.Module] = {}
        self.fresh: set[fx.Node] = set()  # values that the rules below make
        self.codes: dict[fx.Node, fx.Node] = {}  # value -> its codes
        self.flat: set[fx.Node] = set()  # coded values that were flattened: for linear layers alone
        for node in graph.nodes:
            self._visit(node)
        read_modes(graph)
        for module in self.modules.values():
            module._modules.update({
                name: self.changed[child] for name, child in module._modules.items() if child in self.changed
            })
        self.result = Rebuilt.of(model, graph)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _note(self, node: fx.Node, converted: bool, how: str) -> None:
        entry = Conversion(_join(self.prefix, self.name(node)), self.kind_name(node), converted, how)
        if entry not in self.found:
            self.found.append(entry)

    def _is_relu(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return type(module) is nn.ReLU and not _has_hooks(module)
        return node.op in ("call_function", "call_method") and node.target in _RELU_CALLS

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node changes its first argument in place."""
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        named = isinstance(node.target, str) and node.target.endswith("_") and not node.target.endswith("__")
        by_position = node.target is F.relu and len(node.args) > 1 and bool(node.args[1])
        return named or by_position or node.target in _IN_PLACE_CALLS or bool(node.kwargs.get("inplace"))

    def _is_private(self, value: fx.Node) -> bool:
        """Whether its only user alone reads the memory of a value."""
        if len(value.users) > 1 or value.op in ("placeholder", "get_attr"):
            return False
        fresh = value in self.fresh or value.target in _FRESH_CALLS or isinstance(self.module(value), _FRESH_LAYERS)
        return fresh or all(map(self._is_private, value.all_input_nodes))

    def _is_written(self, value: fx.Node) -> bool:
        """Whether a value, or a view of it, is changed in place: then codes no longer stand for it."""
        return any(
            self._writes(user) or (self._is_view(user) and self._is_written(user))
            for user in value.users if user.args and user.args[0] is value
        )

    def _is_view(self, node: fx.Node) -> bool:
        kind = self.kind(node)
        return self.is_dropout(node) or kind in _VIEWS or getattr(kind, "__name__", "") in _VIEWS

    def _replace(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """Puts the value of `made`, which gives a value and its codes, in the place of a node; returns the value."""
        with self.graph.inserting_after(made):
            codes = self.graph.call_function(operator.getitem, (made, 1))
            value = self.graph.call_function(operator.getitem, (made, 0))
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in (value, codes))
        self.fresh.add(value)
        if not self._is_written(value):
            self.codes[value] = codes
        return value

    # --- rules --------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        module, pool = self.module(node), self.pool(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if self.is_batch_norm(node):
            self._batch_norm(node)
        elif source is not None and self._is_relu(node):
            self._relu(node, source)
        elif _keeps_bits(module) is not None:
            self._note(node, *_of_own_layer(module))
        elif isinstance(module, nn.Linear | Convolution):
            self._reader(node, source)
        elif pool is not None and len(pool.padding) == 2 and not pool.output:
            self._pool(node, source, pool)
        elif self.is_identity(node) or self.is_reshape(node):
            self._pass_on(node, source)
        elif module is not None:
            whole = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
            if not whole and any(True for _ in module.children()):
                name = _join(self.prefix, self.name(node))
                self.changed[module] = _convert(module, name, self.bits, self.span, self.found)
            else:
                self._note(node, False, _LEFT.get(type(module), "no rule for it"))

    def _pass_on(self, node: fx.Node, source: fx.Node | None) -> None:
        """A value with the elements of its source in the same order: the source's codes stand for it."""
        if _has_hooks(self.module(node)):
            return self._note(node, False, "hooks watch its result")
        if source in self.codes:
            self.codes[node] = self.codes[source]
            if source in self.flat or self.is_reshape(node):
                self.flat.add(node)
        return None

    def _batch_norm(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)]
        if _has_hooks(module):
            return self._note(node, False, "hooks watch its result")
        users = list(node.users)
        relu = users[0] if len(users) == 1 and self._is_relu(users[0]) else None
        self._note(node, True, f"codes of its result{'' if relu is None else ' behind ReLU'}")
        if module not in self.changed:
            self.changed[module] = blocks.BATCH_NORMS[type(module)].like(module, self.bits, self.span)
        if relu is not None:
            relu.replace_all_uses_with(node)
            self.graph.erase_node(relu)
            node.args = (*node.args, True)
        self._replace(node, node)
        return None

    def _relu(self, node: fx.Node, source: fx.Node) -> None:
        if self._writes(node) and not self._is_private(source):
            return self._note(node, False, "it changes a value in place that others may read")
        self._note(node, True, "codes of its result in groups of 256")
        with self.graph.inserting_before(node):
            both = self.graph.call_function(blocks.relu, (source, self.bits))
        self._replace(node, both)
        self.graph.erase_node(node)
        return None

    def _reader(self, node: fx.Node, source: fx.Node | None) -> None:
        module = self.modules[str(node.target)]
        reason = blocks.unreadable(module)
        if reason is None and source not in self.codes:
            reason = "its input has no codes"
        if reason is None and source in self.flat and not isinstance(module, nn.Linear):
            reason = "its input was flattened"
        if reason is None and module._forward_pre_hooks:
            reason = "a hook may change its input"
        if reason is not None:
            return self._note(node, False, reason)
        if module not in self.changed:
            self.changed[module] = blocks.READERS[type(module)].like(module)
        node.kwargs = {"stored": self.codes[source]}  # type: ignore[index]
        self._note(node, True, "reads the codes of its input")
        return None

    def _pool(self, node: fx.Node, source: fx.Node | None, pool: Pool) -> None:
        if _has_hooks(self.module(node)):
            return self._note(node, False, "hooks watch its result")
        if source is None or not blocks.is_poolable(pool):
            return self._note(node, False, "no rule for these arguments")
        self._note(node, True, "keeps a byte a window" if pool.kind == "max" else "keeps nothing")
        codes = None if source in self.flat else self.codes.get(source)
        with self.graph.inserting_before(node):
            both = self.graph.call_function(blocks.pool, (source, codes, pool))
        value = self._replace(node, both)
        self.graph.erase_node(node)
        if codes is None:
            self.codes.pop(value, None)
        return None


# --- result -----------------------------------------------------------------------------------------------------------


def _is_converted(module: nn.Module) -> bool:
    return _REPORT in vars(module) or isinstance(module, Rebuilt) or type(module).__module__ == blocks.__name__
