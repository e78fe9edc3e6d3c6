"""PackedTensor and PackedWeight: bits past the last channel count as zeros, wherever a tensor comes from."""

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lowbit_ext import PackedTensor, binary
from lowbit_ext.binary import ops
from lowbit_ext.packed import join_channels, packed_words

CHANNELS = [1, 5, 63, 64, 65, 130]


def made(channels, encoding="sign"):
    return binary.binarize(torch.randn(2, channels, 4, 4), encoding)


def loaded(packed):
    file = io.BytesIO()
    torch.save(packed, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def dirty(packed):
    """The complement as a file or another process may hold it: bits past the last channel set, nothing checked."""
    other = copy.copy(packed)
    other.__dict__["words"] = ~packed.words
    return other


# Ways to a tensor of complemented words.
WAYS = {
    "constructor": lambda p: PackedTensor(~p.words, p.channels, p.encoding),
    "replace": lambda p: dataclasses.replace(p, words=~p.words),
    "pytree": lambda p: torch.utils._pytree.tree_map_only(torch.Tensor, torch.bitwise_not, p),
    "pickle": lambda p: pickle.loads(pickle.dumps(dirty(p))),
    "copy": lambda p: copy.copy(dirty(p)),
    "deepcopy": lambda p: copy.deepcopy(dirty(p)),
    "torch.load": lambda p: loaded(dirty(p)),
    "vmap": lambda p: packed_words(
        torch.func.vmap(lambda words: dataclasses.replace(p, words=~words).words)(p.words.unsqueeze(0)).squeeze(0),
        p.channels,
        p.encoding,
    ),
}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("way", WAYS)
def test_complemented_words_are_the_opposite_values(way, channels):
    torch.manual_seed(0)
    p = made(channels)
    q = WAYS[way](p)
    assert torch.equal(q.unpack(), -p.unpack())
    tail = channels % 64
    assert tail == 0 or not (q.words[..., -1] >> tail).any()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("encoding", ["sign", "step"])
def test_operations_on_complemented_words(channels, encoding):
    torch.manual_seed(0)
    p = made(channels, encoding)
    q = PackedTensor(~p.words, channels, encoding)
    weight = torch.randn(3, channels, 3, 3)
    clean = binary.binarize(q.unpack(), encoding)
    assert torch.equal(binary.conv2d(q, weight, padding=1), binary.conv2d(clean, weight, padding=1))
    assert torch.equal(binary.max_pool2d(q, 2).words, binary.max_pool2d(clean, 2).words)
    assert torch.equal(binary.avg_pool2d(q, 2), binary.avg_pool2d(clean, 2))
    everything = torch.full((q.words.shape[-1],), -1)
    smallest = binary.max_pool2d(q, 2, invert=everything)
    assert torch.equal(smallest.unpack(), -nn.functional.max_pool2d(-q.unpack(), 2))
    assert channels % 64 == 0 or not (smallest.words[..., -1] >> channels % 64).any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("channels", [5, 64])
def test_compiled(channels, backend):
    """Construction inside a compiled function, and a packed argument and result of one."""

    @torch.compile(fullgraph=True, backend=backend)
    def complement(p):
        q = PackedTensor(~p.words, p.channels, p.encoding)
        return q, binary.conv2d(q, weight), q.unpack()

    torch.manual_seed(0)
    p, weight = made(channels), binary.pack_weight(torch.randn(3, channels, 3, 3))
    q, sums, values = complement(p)
    assert torch.equal(values, -p.unpack())
    assert torch.equal(sums, -binary.conv2d(p, weight))
    assert channels % 64 == 0 or not (q.words[..., -1] >> channels % 64).any()


def test_whole_words_are_shared_and_results_of_kernels_not_copied():
    p = made(128)
    assert PackedTensor(p.words, 128).words is p.words
    q = made(5)
    assert binary.linear(binary.binarize(torch.randn(2, 5)), torch.randn(3, 5)).shape == (2, 3)
    assert q.to("cpu").words is q.words


def test_numpy_integers_are_channels():
    p = PackedTensor(made(5).words, np.int64(5))
    assert type(p.channels) is int
    assert p.channels == 5


def test_a_weight_from_words_has_its_own_filters():
    words = torch.randint(-(2**63), 2**63 - 1, (5, 1, 1, 1))
    with pytest.raises(ValueError, match=r"from_words: words of a weight of shape \(8, 64, 1, 1\) must have shape "
                                         r"\(8, 1, 1, 1\), got \(5, 1, 1, 1\)"):
        binary.PackedWeight.from_words(words, (8, 64, 1, 1))
    with pytest.raises(ValueError, match="groups must divide the 5 filters, got 2"):
        binary.PackedWeight.from_words(words, (5, 64, 1, 1), 2)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_weight_ignores_bits_past_the_last_channel(channels):
    torch.manual_seed(0)
    weight = binary.pack_weight(torch.randn(4, channels, 3, 3))
    x = made(channels)
    for other in (
        binary.PackedWeight.from_words(~weight.words, weight.shape),
        dataclasses.replace(weight, words=~weight.words),
        pickle.loads(pickle.dumps(dirty(weight))),
    ):
        assert torch.equal(other.unpack(), -weight.unpack())
        assert torch.equal(binary.conv2d(x, other, padding=1), -binary.conv2d(x, weight, padding=1))


def test_a_packed_model_ignores_bits_past_the_last_channel():
    """Those of a file whose checksums fit it."""
    torch.manual_seed(0)
    net = nn.Sequential(binary.BinaryConv2d(5, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), binary.BinaryConv2d(3, 2, 1))
    net[1].weight.data = torch.tensor([1.0, -1.0, -2.0])  # a pooling with a minimum
    x = torch.randn(2, 5, 8, 8)
    model = binary.pack(net.eval(), x)
    expected = model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, layer in model.packed_layers().items():
        for key, tensor in layer.state_dict().items():
            if tensor.dtype == torch.int64:
                channels = layer.shape[1] if key == "words" else layer.channels
                state[f"{name}.{key}"] = tensor | -1 << channels
    state["checksum"] = torch.tensor(model._checksum(state))
    assert any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items() if "words" in name)
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), r"scale must be a float tensor that broadcasts against \(2, 5, 4, 4\), got torch.float32 \(3,"),
        (torch.ones(1, dtype=torch.int64), "scale must be a float tensor"),
        (torch.ones(1, device="meta"), "scale must be on the CPU like the input, got meta"),
    ],
)
def test_scales_that_do_not_fit(scale, message):
    with pytest.raises(ValueError, match=message):
        PackedTensor(made(5).words, 5, "sign", scale)


def test_pooling_with_a_scale():
    p = made(5)
    for scale in (torch.tensor(0.5), torch.rand(5, 1, 1), torch.rand(2, 1, 1, 1)):
        q = PackedTensor(p.words, 5, "sign", scale)
        assert torch.equal(binary.max_pool2d(q, 2).unpack(), nn.functional.max_pool2d(q.unpack(), 2))
        assert torch.allclose(binary.avg_pool2d(q, 2), nn.functional.avg_pool2d(q.unpack(), 2))
    of_pixels = PackedTensor(p.words, 5, "sign", torch.rand(2, 1, 4, 4))
    for pool in (binary.max_pool2d, binary.avg_pool2d):
        with pytest.raises(ValueError, match=r"scale must be the same for all pixels, got shape \(2, 1, 4, 4\)"):
            pool(of_pixels, 2)
    with pytest.raises(ValueError, match="input's scale must not be negative"):
        binary.max_pool2d(PackedTensor(p.words, 5, "sign", torch.tensor(-1.0)), 2)


def test_a_private_copy_of_a_weight_is_contiguous_bytes():
    """Memory past the end of an expanded tensor is not read."""
    p, weight = made(5), binary.pack_weight(torch.randn(4, 5, 3, 3))
    expanded = weight.blocked[:1].expand_as(weight.blocked)
    geometry = ops.Geometry(3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    with pytest.raises(ValueError, match="weight was not packed for 4 filters"):
        ops.binary_conv2d(
            p.words, expanded, None, None, None, None, None, 5, 4, geometry, "sign", 0, torch.int32
        )


@pytest.mark.parametrize("channels", [(1, 1), (63, 1, 5), (64, 3), (3, 64, 64), (65, 64, 63), (130, 127, 1, 200), (7,)])
def test_channels_are_joined(channels):
    torch.manual_seed(0)
    bits = [torch.randint(2, (2, 3, 3, count)).float().movedim(-1, 1) for count in channels]
    words = [binary.binarize(value, "step").words for value in bits]
    wanted = binary.binarize(torch.cat(bits, 1), "step").words
    assert torch.equal(join_channels(words, channels), wanted)
