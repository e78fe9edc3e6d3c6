"""pack(): a trained model as a network of packed bits, integer thresholds and fused passes over floats.

Between a binary layer and the next place that binarizes its result, everything a network usually has there - the
layer's scale and bias, batch norm, ReLU, hardtanh, max-pooling - is monotone in the integer accumulator, channel by
channel. The whole chain is therefore one comparison, acc >= t or acc <= t. Bisection over the accumulator's range finds
t with the model's own modules in float32, which reproduces their rounding to the bit; the formula for t would not.

Where the values themselves are needed, as on the stream of a residual network, one pass (fusion.py) makes them from the
accumulator and writes floats and bits at once.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lowbit_ext.binary import layers
from lowbit_ext.binary.activation import invert_words
from lowbit_ext.binary.convolution import geometry_of
from lowbit_ext.binary.ops.steps import MOST_STEPS
from lowbit_ext.binary.packing.chains import Model, chain_of, pixels_of
from lowbit_ext.binary.packing.concatenations import parts
from lowbit_ext.binary.packing.fusion import FLOATS, Fusion, Pass, window_of
from lowbit_ext.binary.packing.packed_layers import (
    Epilogue,
    FloatWindow,
    Layout,
    PackedAvgPool2d,
    PackedBinarize,
    PackedConv2d,
    PackedMaxPool2d,
    PackedPointwise,
    PackedRearrange,
    PackedUnpack,
    PackedUpsample2d,
    Rearrangement,
    Upsampling,
    Window,
)
from lowbit_ext.binary.packing.packed_model import Row
from lowbit_ext.binary.packing.thresholds import Chain, Fold, fold_floats, fold_integers
from lowbit_ext.binary.weights import pack_weight
from lowbit_ext.packed import WORD_BITS, join_channels


class Bits(NamedTuple):
    """A demand: the bits of a value.

    Attributes:
        node, encoding: the value, and where its bits switch.
        axis: of its channels.
        in_order: whether the reader needs the channels in the value's own order.
        part: range of channels, where only one of the values is meant that a concatenation on the way joins.
    """

    node: fx.Node
    encoding: str
    axis: int
    in_order: bool = False
    part: tuple[int, int] | None = None


class Words(NamedTuple):
    """A node of the packed graph that gives words, and what they hold.

    Attributes:
        order: which of the value's channels each is; None where it is their own order.
    """

    node: fx.Node
    channels: int
    pixels: tuple[int, ...]
    order: Tensor | None = None

    @property
    def image(self) -> tuple[int, int]:
        """Height and width."""
        return (*(1,) * (2 - len(self.pixels)), *self.pixels)  # type: ignore[return-value]


class Packer:
    """Rebuilds the graph: bits where a value is only ever binarized, passes over floats, the model's nodes elsewhere.

    Attributes:
        graph, modules: the packed network.
        points: for the comparison on an example, the words that stand for the bits of a value.
        rows: of the report.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph = fx.Graph()
        self.modules: dict[str, Any] = {}
        self.points: list[tuple[Words, Bits]] = []
        self.rows: dict[fx.Node, Row] = {}
        self._floats: dict[fx.Node, fx.Node] = {}
        self._words: dict[Bits, Words] = {}
        self._made: set[Pass] = set()  # passes that stand in the graph
        self._made_floats: Set[fx.Node] = frozenset()
        self._demands = self._collect_demands(self._made_floats)
        # Values that are made as floats give their bits at once. Chains that end there change no demand for floats.
        self._demands = self._collect_demands(
            frozenset(n for n, demands in self._demands.items() if FLOATS in demands and self._reads(n) is None)
        )
        self._passes = Fusion(model, self._demands, lambda node: self._reads(node) is not None).passes
        self._stored = self._find_stored()
        for node in model.graph.nodes:
            if node.op == "placeholder":
                self._floats[node] = self.graph.node_copy(node, self._floats.__getitem__)
        for node in model.graph.nodes:
            if node.op == "output":
                self._emit_all(node)
        for node in model.graph.nodes:
            folded = node.op.startswith("call_") and model.shape(node) and model.constant(node) is None
            if folded and node not in self.rows:
                self._note(node, "bits", "in the thresholds behind it")

    # What is needed

    def _bits_source(self, node: fx.Node, encoding: str) -> tuple[fx.Node, Window | Upsampling | Rearrangement | None]:
        """The value with the same bits furthest up the graph, and what it is the result of that bits can go through."""
        model = self.model
        while True:
            module = model.module(node)
            same = isinstance(module, layers.BinaryActivation) and module.encoding == encoding
            if not (same or model.is_transparent(node) or model.is_flatten(node)):
                return node, model.moves_bits(node)
            node = node.args[0]  # type: ignore[assignment]

    def _reads(self, node: fx.Node) -> Bits | None:
        """The bits that a binary layer, an activation or a pooling of bits reads."""
        model = self.model
        layer, encoding = model.binary_layer(node), model.binary_values(node)
        if layer is not None:
            grouped = getattr(layer, "groups", 1) > 1
            return Bits(node.args[0], layer.encoding, model.axis(node), grouped)  # type: ignore[arg-type]
        if encoding is not None:
            return Bits(node, encoding, model.axis(node), True)
        pooled = model.binary_values(node.args[0]) if model.avg_pool(node) is not None else None  # type: ignore[arg-type]
        return None if pooled is None else Bits(node.args[0], pooled, 1, True)  # type: ignore[arg-type]

    def _chain(self, bits: Bits) -> Chain:
        model = self.model
        chain = chain_of(model, bits.node, bits.axis, self._made_floats)
        if bits.part is None:
            return chain
        (part,) = (part for part, begin, _ in parts(model, chain.source) if begin == bits.part[0])
        inner = chain_of(model, part, bits.axis, self._made_floats)
        return inner.behind(chain, slice(*bits.part), model.channels(chain.source))

    def _parts(self, bits: Bits) -> list[Bits]:
        """The bits of each value that a concatenation joins, where they can be made one by one; else []."""
        chain = self._chain(bits)
        ranges = [(begin, end) for _, begin, end in parts(self.model, chain.source)]
        if not bits.in_order:  # those that do not fill their words go to the end
            ranges.sort(key=lambda part: (part[1] - part[0]) % WORD_BITS != 0)
        if bits.part is not None or not chain.is_pointwise:
            return []
        return [bits._replace(part=part) for part in ranges]

    def _sources_of(self, bits: Bits) -> list[tuple[Bits, fx.Node]]:
        """The bits behind which no others stand, and the nodes whose floats or accumulators they are made of."""
        node, spatial = self._bits_source(bits.node, bits.encoding)
        bits = bits._replace(node=node)
        if spatial is not None and node not in self._made_floats:
            return self._sources_of(_before(bits, spatial))
        return [(part, self._chain(part).source) for part in self._parts(bits) or [bits]]

    def _collect_demands(self, made: Set[fx.Node]) -> dict[fx.Node, set[Any]]:
        """What each node must give: floats, or bits of a later value. `made`: see chain_of."""
        self._made_floats = made
        wanted: dict[fx.Node, set[Any]] = collections.defaultdict(set)
        for node in reversed(self.model.graph.nodes):
            if node.op != "output" and not wanted[node]:
                continue
            bits = self._reads(node)
            if bits is not None:
                for key, source in self._sources_of(bits):
                    wanted[source].add(key)
            else:
                for source in self.model.variables(node):
                    wanted[source].add(FLOATS)
        return wanted

    def _find_stored(self) -> set[fx.Node]:
        """The values of passes that something else reads as floats."""
        stored = set()
        for node in self.model.graph.nodes:
            joined = self._passes.get(node)
            if (not self._demands[node] and node.op != "output") or self._reads(node) is not None:
                continue
            inputs = set(self.model.variables(node))
            if joined is not None and joined.nodes[:1] != [node]:
                inputs.discard(joined.nodes[joined.nodes.index(node) - 1])
            elif joined is not None and joined.reads_accumulator:
                inputs.discard(joined.source)
            stored |= inputs
        return stored

    # Emission, each node after what it reads

    def _emit_all(self, last: fx.Node) -> None:
        waiting = [last]
        while waiting:
            node = waiting[-1]
            missing = [value for value in self._inputs(node) if value not in self._floats and not self._is_made(value)]
            if missing and node not in self._floats:
                waiting.extend(missing)
                continue
            if node not in self._floats and not self._is_made(node):
                self._emit(node)
            waiting.pop()

    def _is_made(self, node: fx.Node) -> bool:
        """Whether all that a pass writes is there."""
        joined = self._passes.get(node)
        return joined is not None and joined in self._made

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that must have been emitted before a node, or before the pass that it is part of."""
        joined = self._passes.get(node)
        if joined is None:
            bits = self._reads(node)
            return node.all_input_nodes if bits is None else [source for _, source in self._sources_of(bits)]
        if not joined.reads_accumulator:
            return [joined.source, *joined.operands()]
        sources = self._sources_of(self._reads(joined.source))  # type: ignore[arg-type]
        return [*(source for _, source in sources), *joined.operands()]

    def _emit(self, node: fx.Node) -> None:
        joined = self._passes.get(node)
        if joined is None:
            self._floats[node] = self._emit_node(node)
            return
        self._made.add(joined)
        if joined.reads_accumulator:
            self._emit_layer(joined)
        else:
            self._emit_pointwise(joined)

    def _add(self, node: fx.Node, suffix: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        name = (str(node.target) if node.op == "call_module" else node.name) + suffix
        while name in self.modules:
            name += "_"
        self.modules[name] = module
        return self.graph.call_module(name, inputs)

    def _add_spatial(
        self, node: fx.Node, suffix: str, channels: int, step: Window | Upsampling | Rearrangement, words: fx.Node,
        invert: Tensor | None = None,
    ) -> fx.Node:
        module: nn.Module
        if isinstance(step, Window):
            module = PackedMaxPool2d(channels, step, invert)
        elif isinstance(step, Upsampling):
            module = PackedUpsample2d(step)
        else:
            module = PackedRearrange(channels, step)
        return self._add(node, suffix, module, words)

    def _note(self, node: fx.Node, how: str, note: str = "") -> None:
        self.rows[node] = Row(self.model.name(node), self.model.kind_name(node), how, note)

    def _emit_node(self, node: fx.Node) -> fx.Node:
        """A node outside passes: bits as floats, an average of bits, or the model's own."""
        model, bits = self.model, self._reads(node)
        if bits is not None:
            words = self._bits(bits)
            self._note(node, "bits", "unpacked" if bits.node is node else "mean of bits")
            if bits.node is node:
                layout = Layout(len(model.shape(node)), model.axis(node))
                return self._add(node, "_unpack", PackedUnpack(words.channels, bits.encoding, layout), words.node)
            pool = model.avg_pool(node)
            assert pool is not None
            # Kernel, stride, padding, ceil_mode, count_pad and divisor, where the windows are not one of the image.
            window = None if pool.output else (*pool[1:6], pool.divisor or 0)
            return self._add(node, "", PackedAvgPool2d(words.channels, bits.encoding, window), words.node)
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            self.modules[target] = operator.attrgetter(target)(model.root)
            if isinstance(self.modules[target], nn.Conv2d) and len(model.shape(node)) == 4:
                _prefer_channels_last(self.modules[target], model.values[node.args[0]])  # type: ignore[index]
        if node.op.startswith("call_"):
            self._note(node, "as it was", model.left_because(node) or "")
        return self.graph.node_copy(node, self._floats.__getitem__)

    def _emit_layer(self, joined: Pass) -> None:
        """A binary layer: the bits of one later value by integer thresholds, or a pass behind its accumulator."""
        model, node = self.model, joined.source
        layer = model.binary_layer(node)
        bits = self._reads(node)
        words = self._bits(bits)  # type: ignore[arg-type]
        weight, one_pixel = layer.weight.detach(), isinstance(layer, nn.Linear) and len(model.shape(node)) == 2
        if one_pixel:
            # The features behind a flatten are channels times pixels: a convolution whose kernel is the image.
            weight = weight.reshape(-1, words.channels, *words.image)
        if words.order is not None:
            weight = weight[:, words.order]
        weight = weight.reshape(*weight.shape[:2], *(1,) * (4 - weight.dim()), *weight.shape[2:])
        geometry = _geometry(layer, weight)
        arguments = (pack_weight(weight, geometry.groups), geometry, layer.encoding, getattr(layer, "padding_value", 0))
        filters, scale = weight.shape[0], layer.scale()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        demands = self._demands[node]
        if not joined.nodes and len(demands) == 1 and FLOATS not in demands:
            (key,) = demands
            chain = self._chain(key)
            fold = fold_integers(chain, key.encoding, weight[0].numel(), scale, bias, filters)
            threshold, flip = fold.threshold.reshape(-1, filters), fold.flip.reshape(-1, filters)
            module = PackedConv2d(*arguments, threshold=threshold, flip=flip, one_pixel=one_pixel)
            output = self._add(node, "", module, words.node)
            self._note(node, "bits", "bits to bits")
            self._finish_bits(key, chain, fold, output)
            return
        start: list[tuple[str, tuple[Tensor, ...]]] = []
        if scale is not None:
            start.append(("multiply", (scale.float().expand(filters).contiguous(),)))
        if bias is not None:
            start.append(("add", (bias.float(),)))
        epilogue, keys = self._epilogue(joined, start)
        module = PackedConv2d(*arguments, epilogue=epilogue, one_pixel=one_pixel)
        operands = [self._floats[operand] for operand in joined.operands()]
        self._finish_pass(keys, self._add(node, "", module, words.node, *operands))
        written = {"bits" if isinstance(key, Bits) else FLOATS for key, _, _ in keys}
        self._note(node, "bits", f"bits to {' and '.join(sorted(written))}")

    def _emit_pointwise(self, joined: Pass) -> None:
        model, first = self.model, joined.nodes[0]
        pool = None if joined.pool is None else window_of(model, joined.pool)
        cut = 0 if joined.pool is None else joined.nodes.index(joined.pool)
        before = [(step.kind, step.factors) for node in joined.nodes[:cut] for step in joined.steps[node]]
        layout = Layout(len(model.shape(joined.source)), model.axis(first))
        epilogue, keys = self._epilogue(joined, [], joined.nodes[cut:])
        module = PackedPointwise(
            model.channels(first), Epilogue(before, layout), None if pool is None else _float_window(pool), epilogue
        )
        inputs = [self._floats[value] for value in (joined.source, *joined.operands())]
        for node in joined.nodes[:cut]:
            self._note(node, "pass", f"with {model.name(joined.source)}")
        self._finish_pass(keys, self._add(first, "_pass", module, *inputs))

    def _epilogue(
        self, joined: Pass, steps: list[tuple[str, tuple[Tensor, ...]]], nodes: list[fx.Node] | None = None
    ) -> tuple[Epilogue, list[tuple[Any, Chain | None, Fold | None]]]:
        """The steps of a pass, and for each result the demand that it meets."""
        model = self.model
        keys: list[tuple[Any, Chain | None, Fold | None]] = []
        nodes = [joined.source, *joined.nodes] if nodes is None else nodes
        steps = list(steps)
        for index, node in enumerate(nodes):
            steps += [(step.kind, step.factors) for step in joined.steps.get(node, ())]
            if node is not joined.source:
                self._note(node, "pass", f"with {model.name(joined.source)}")
            wanted = sorted(self._demands[node] - {FLOATS}, key=lambda bits: (bits.node.name, bits.part or ()))
            later = sum(len(joined.steps[other]) + (other in self._stored) for other in nodes[index + 1 :])
            room = max(0, MOST_STEPS - len(steps) - 1 - later)
            if node in self._stored or len(wanted) > room:
                steps.append(("store", ()))
                keys.append((node, None, None))
            for key in wanted[:room]:  # the others are made of the floats
                chain = self._chain(key)
                fold = fold_floats(chain, key.encoding, model.channels(node))
                channels = model.channels(node)
                flip = (fold.flip.reshape(-1, channels),) if bool(fold.flip.any()) else ()
                steps.append(("bits", (fold.threshold.reshape(-1, channels), *flip)))
                keys.append((key, chain, fold))
        return Epilogue(steps, Layout(len(model.shape(nodes[-1])), model.axis(nodes[-1]))), keys

    def _finish_pass(self, keys: list[tuple[Any, Chain | None, Fold | None]], output: fx.Node) -> None:
        for index, (key, chain, fold) in enumerate(keys):
            result = output if len(keys) == 1 else self.graph.call_function(operator.getitem, (output, index))
            if isinstance(key, Bits):
                self._finish_bits(key, chain, fold, result)  # type: ignore[arg-type]
            else:
                # torch knows no channels-last order of three dimensions; where its own result has none, sums behind it
                # must meet the elements in the same order.
                value = self.model.values[key]
                if value.dim() == 3 and value.is_contiguous():
                    result = self.graph.call_method("contiguous", (result,))
                self._floats[key] = result

    def _finish_bits(self, bits: Bits, chain: Chain, fold: Fold | None, output: fx.Node) -> Words:
        """The chain's poolings and upsamplings behind its bits."""
        channels = self.model.shape(chain.source)[bits.axis] * chain.copies
        inverts = iter(fold.inverts if fold is not None else ())
        for step in chain.steps:
            if isinstance(step, Window):
                invert = invert_words(next(inverts)) if fold is not None else None
                output = self._add_spatial(bits.node, "_pool", channels, step, output, invert)
            elif isinstance(step, Upsampling):
                output = self._add_spatial(bits.node, "_upsample", channels, step, output)
        words = Words(output, channels, chain.spatial)
        self._words[bits] = words
        self.points.append((words, bits))
        return words

    def _bits(self, bits: Bits) -> Words:
        """The bits of a value, packed once for all that read them."""
        node, spatial = self._bits_source(bits.node, bits.encoding)
        bits = bits._replace(node=node)
        if bits in self._words:
            return self._words[bits]
        if spatial is not None and node not in self._made_floats:
            before = self._bits(_before(bits, spatial))
            moved = self._add_spatial(node, "_bits", before.channels, spatial, before.node)
            shape = self.model.shape(node)
            channels = shape[bits.axis] if isinstance(spatial, Rearrangement) else before.channels
            self._words[bits] = Words(moved, channels, pixels_of(shape, bits.axis), before.order)
            return self._words[bits]
        of_parts = [self._bits(part) for part in self._parts(bits)]
        if of_parts:
            values, counts = [words.node for words in of_parts], [words.channels for words in of_parts]
            joined = self.graph.call_function(join_channels, (values, counts))
            order = torch.cat([torch.arange(*key.part) for key in self._parts(bits)])  # type: ignore[misc]
            self._words[bits] = Words(joined, len(order), of_parts[0].pixels, order)
            return self._words[bits]
        chain = self._chain(bits)
        channels = self.model.shape(chain.source)[bits.axis]
        fold = fold_floats(chain, bits.encoding, channels) if chain.folds else None
        threshold, flip = (None, None) if fold is None else (fold.threshold, fold.flip)
        if fold is not None and chain.doubled:
            threshold, flip = fold.threshold.reshape(2, channels), fold.flip.reshape(2, channels)
        binarize = PackedBinarize(channels, bits.encoding, threshold, flip, bits.axis)
        output = self._add(node, "_bits", binarize, self._floats[chain.source])
        return self._finish_bits(bits, chain, fold, output)


def _before(bits: Bits, moved_by: Window | Upsampling | Rearrangement) -> Bits:
    """The bits that a node moves: all channels in their own order, where it moves them between channels."""
    source: fx.Node = bits.node.args[0]  # type: ignore[assignment]
    bits = bits._replace(node=source)
    return bits._replace(in_order=True) if isinstance(moved_by, Rearrangement) else bits


def _geometry(layer: Any, weight: Tensor) -> Any:
    """Of a binary layer, whose weight has four dimensions here."""
    if isinstance(layer, nn.Linear):
        return geometry_of(weight.shape, 1, 0, 1, 1)
    flat = isinstance(layer, nn.Conv1d)
    padding = layer.padding
    return geometry_of(
        weight.shape,
        (1, *layer.stride) if flat else layer.stride,
        padding if isinstance(padding, str) or not flat else (0, *padding),
        (1, *layer.dilation) if flat else layer.dilation,
        layer.groups,
    )


def _prefer_channels_last(conv: nn.Conv2d, images: Tensor) -> None:
    """Has a float convolution give its result channels-last, as passes read it, where its values stay the same."""
    weight = conv.weight.data
    before = conv(images)
    conv.weight.data = weight.contiguous(memory_format=torch.channels_last)
    if not torch.equal(conv(images.contiguous(memory_format=torch.channels_last)), before):
        conv.weight.data = weight


def _float_window(pool: Any) -> FloatWindow:
    if pool.output:
        return FloatWindow(True)
    average = pool.kind == "average"
    return FloatWindow(
        average, pool.kernel, pool.stride, pool.padding, (1, 1) if average else pool.dilation, pool.ceil_mode,
        pool.count_pad, pool.divisor or 0,
    )
