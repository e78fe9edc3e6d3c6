"""lowmem.convert: activation functions, norms, dropout, products, concatenation; models that torch.fx cannot trace."""

import contextlib
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lowbit_ext import lowmem
from lowbit_ext.lowmem import convert, ledger, report
from lowmem_networks import joined, relative, rounding_of_inputs, step


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20260101)


def how(model):
    return {entry.name: entry.how for entry in report(model)}


def stored(model, shape, seed=1):
    torch.manual_seed(seed)
    with ledger(model) as book:
        model(torch.randn(shape))
    return book


class SqueezeAndExcitation(nn.Module):
    def __init__(self, channels, gate):
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), gate

    def forward(self, x):
        return self.gate(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True))))) * x


class Concatenating(nn.Module):
    """Branches behind pooling and without, joined twice."""

    def __init__(self):
        super().__init__()
        self.bn, self.first, self.second = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.last = nn.Conv2d(15, 3, 3)

    def forward(self, x):
        x = F.relu(self.bn(x))
        y = torch.cat([F.relu(self.first(x)), x], 1)
        return self.last(torch.cat((y, F.relu(self.second(F.max_pool2d(x, 3, 1, 1)))), dim=1))


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: an activation function within."""

    def __init__(self, channels, drop, act):
        super().__init__(channels)
        self.drop, self.act = drop, act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def behind_norm(act, norm=None):
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm or nn.BatchNorm2d(8), act, nn.Conv2d(8, 4, 3))


def alone(act):
    return nn.Sequential(nn.Conv2d(3, 8, 1), act, nn.Conv2d(8, 4, 3))


ACTIVATIONS = {
    "relu6": nn.ReLU6, "hardtanh": lambda **k: nn.Hardtanh(-0.5, 0.7, **k), "leaky": lambda **k: nn.LeakyReLU(0.2, **k),
    "hardsigmoid": nn.Hardsigmoid, "silu": nn.SiLU, "hardswish": nn.Hardswish, "mish": nn.Mish, "gelu": nn.GELU,
}
_IMAGES = (6, 3, 12, 12)
RULES = {
    **{f"{name} behind a norm": (lambda act=act: behind_norm(act()), _IMAGES) for name, act in ACTIVATIONS.items()},
    **{f"{name} alone": (lambda act=act: alone(act()), _IMAGES) for name, act in ACTIVATIONS.items()},
    **{f"{name} in place": (lambda act=act: behind_norm(act(inplace=True)), _IMAGES)
       for name, act in ACTIVATIONS.items() if name != "gelu"},
    "gelu by tanh": (lambda: behind_norm(nn.GELU("tanh")), _IMAGES),
    "squeeze": (lambda: behind_norm(nn.Sequential(nn.SiLU(), SqueezeAndExcitation(8, nn.Sigmoid()))), _IMAGES),
    "hard squeeze": (lambda: behind_norm(nn.Sequential(nn.ReLU(), SqueezeAndExcitation(8, nn.Hardsigmoid()))), _IMAGES),
    "concatenation": (Concatenating, (4, 6, 9, 9)),
    "norm and activation": (
        lambda: behind_norm(nn.Identity(), BatchNormAct2d(8, nn.Identity(), nn.SiLU(True))), _IMAGES
    ),
    "norm and dropout": (lambda: behind_norm(nn.Identity(), BatchNormAct2d(8, nn.Dropout(0.2), nn.ReLU())), _IMAGES),
    "dropout": (lambda: alone(nn.Sequential(nn.ReLU(), nn.Dropout(0.3))), _IMAGES),
    "no dropout": (lambda: alone(nn.Sequential(nn.ReLU(), nn.Dropout(0.0))), _IMAGES),
    "layer norm": (lambda: nn.Sequential(nn.Linear(7, 24), nn.LayerNorm(24), nn.Linear(24, 5)), (4, 9, 7)),
    "layer norm, not affine": (lambda: nn.Sequential(
        nn.Linear(7, 24), nn.LayerNorm((9, 24), elementwise_affine=False), nn.Linear(24, 5)), (4, 9, 7)),
    "layer norm without bias": (lambda: nn.Sequential(
        nn.Linear(7, 24), nn.LayerNorm(24, bias=False), nn.GELU(), nn.Linear(24, 5)), (4, 9, 7)),
    "RMS norm": (lambda: nn.Sequential(nn.Linear(7, 24), nn.RMSNorm(24), nn.Linear(24, 5)), (4, 9, 7)),
    "RMS norm, not affine": (lambda: nn.Sequential(
        nn.Linear(7, 24), nn.RMSNorm((9, 24), 1e-5, False), nn.SiLU(), nn.Linear(24, 5)), (4, 9, 7)),
    "instance norm": (lambda: behind_norm(nn.ReLU(), nn.InstanceNorm2d(8)), _IMAGES),
    "instance norm, affine": (lambda: behind_norm(nn.SiLU(), nn.InstanceNorm2d(8, affine=True)), _IMAGES),
    "instance norm, statistics": (
        lambda: behind_norm(nn.GELU(), nn.InstanceNorm2d(8, 1e-3, None, True, True)), _IMAGES
    ),
    "instance norm, lines": (lambda: nn.Sequential(
        nn.Conv1d(3, 8, 1), nn.InstanceNorm1d(8, track_running_stats=True), nn.ReLU(), nn.Conv1d(8, 2, 3)), (4, 3, 50)),
    "instance norm, volumes": (lambda: nn.Sequential(
        nn.Conv3d(3, 8, 1), nn.InstanceNorm3d(8, affine=True), nn.ReLU6(), nn.Conv3d(8, 2, 3)), (2, 3, 5, 6, 7)),
    "synchronised": (lambda: behind_norm(nn.ReLU(), nn.SyncBatchNorm(8)), _IMAGES),
    "synchronised, mean of all": (lambda: behind_norm(nn.SiLU(), nn.SyncBatchNorm(8, momentum=None)), _IMAGES),
    "group norm": (lambda: behind_norm(nn.SiLU(), nn.GroupNorm(2, 8)), _IMAGES),
    "group norm, not affine": (lambda: behind_norm(nn.ReLU(), nn.GroupNorm(4, 8, affine=False)), _IMAGES),
}


@pytest.mark.parametrize("name", RULES)
def test_is_the_same_function(name):
    """To the bit in both modes, also of copies and pickles; gradients close with codes of 8 bits."""
    build, shape = RULES[name]
    plain = build()
    model = convert(copy.deepcopy(plain), 8, 12.0)
    assert not any(not entry.converted for entry in report(model)[1:] if entry.kind not in ("Sigmoid", "BatchNorm2d"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for network in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        for training in (True, False):
            network.train(training), plain.train(training)
            plain.load_state_dict(network.state_dict())
            got, expected = step(network, shape), step(plain, shape)
            assert torch.equal(got[0], expected[0])
            assert got[2].keys() == expected[2].keys()
            assert relative(joined(got), joined(expected)) < 0.1
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]


@pytest.mark.parametrize("name", RULES)
def test_keeps_no_floats_and_counts_what_plain_torch_keeps(name):
    build, shape = RULES[name]
    plain = build()
    model = convert(copy.deepcopy(plain))
    book, exact = stored(model, shape), stored(plain, shape)
    large = [entry for entry in book.full_precision if entry.stored > 200]
    assert {entry.module for entry in large} <= {"0", "first", "bn"}
    assert book.stored < exact.stored / 2


@pytest.mark.parametrize("name", ["relu6", "leaky", "hardtanh", "hardsigmoid"])
def test_thresholds_and_dropout_pass_exact_gradients(name):
    """Behind a batch norm as well, whose codes in 2 bits say nothing of 6 or -0.5."""
    for layers in ((nn.Linear(8, 600), ACTIVATIONS[name]()), (nn.Linear(8, 600), nn.Dropout(0.4), nn.Identity())):
        plain = nn.Sequential(*layers, nn.Linear(600, 4))
        got, expected = (step(network, (5, 8)) for network in (convert(copy.deepcopy(plain), 2), plain))
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])
        torch.testing.assert_close(got[2]["0.weight"], expected[2]["0.weight"])
    plain = nn.Sequential(nn.BatchNorm1d(8), ACTIVATIONS[name](), nn.Linear(8, 4))
    got, expected = (step(network, (50, 8))[2] for network in (convert(copy.deepcopy(plain), 2), plain))
    torch.testing.assert_close(got["0.bias"], expected["0.bias"])


@pytest.mark.parametrize("name", ["silu", "hardswish", "mish", "gelu"])
def test_curves_want_eight_bits_of_the_norm_in_front(name):
    plain = behind_norm(ACTIVATIONS[name]())
    model = convert(copy.deepcopy(plain), 4)
    assert how(model)["1"] == "codes of its result in 8 bits"
    assert how(model)["2"] == how(model)["3"] == "reads the codes of its input"
    got, expected = step(model, _IMAGES), step(plain, _IMAGES)
    assert relative(joined(got), joined(expected)) < 0.03


@pytest.mark.parametrize(
    "name", ["squeeze", "concatenation", "norm and activation", "layer norm", "RMS norm", "group norm",
             "instance norm, affine", "synchronised", "dropout"]
)
def test_one_graph_of_torch_compile(name):
    build, shape = RULES[name]
    plain = build()
    model = convert(copy.deepcopy(plain), 8, 12.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = step(compiled, shape), step(plain, shape)
    assert relative(got[0], expected[0]) < 1e-5
    if "dropout" not in name:
        assert relative(joined(got), joined(expected)) < 0.1


@pytest.mark.parametrize("name", [
    "relu6 behind a norm", "squeeze", "layer norm", "RMS norm", "group norm", "instance norm", "gelu alone"
])
def test_autocast(name):
    build, shape = RULES[name]
    plain = build()
    model = convert(copy.deepcopy(plain), 8, 12.0)
    results = []
    for network in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(network, shape))
    assert torch.equal(results[0][0], results[1][0])
    assert relative(joined(results[0]), joined(results[1])) < 0.1


# --- models that cannot be traced -------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a transformer that torch.fx cannot trace."""

    def __init__(self, act):
        super().__init__()
        self.norm, self.query, self.key = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.value, self.out, self.drop = nn.Linear(32, 32), nn.Linear(32, 32), nn.Dropout(0.1)
        self.second, self.up, self.act, self.down = nn.LayerNorm(32), nn.Linear(32, 64), act, nn.Linear(64, 32)

    def forward(self, x, mask=None):
        if x.sum() > 1e9:
            return x
        y = self.norm(x)
        y = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y), mask)
        x = x + self.drop(self.out(y))
        return x + self.down(self.act(self.up(self.second(x))))


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.ReLU6()])
def test_layers_find_the_codes_of_their_neighbours(act):
    plain = Block(act)
    model = convert(copy.deepcopy(plain), 8)
    assert type(model) is Block
    got, expected = step(model, (4, 40, 32)), step(plain, (4, 40, 32))
    assert torch.equal(got[0], expected[0])
    assert relative(joined(got), joined(expected)) < rounding_of_inputs(8)
    book = stored(model, (4, 40, 32))
    floats = [entry for entry in book.full_precision if entry.stored >= 4 * 40 * 32 * 4]
    assert len(floats) == 4, "queries, keys, values and the attention's result"
    copied = copy.deepcopy(model)
    assert torch.equal(joined(step(copied, (4, 40, 32))), joined(got))


def test_arguments_that_may_be_none():
    """A graph traced with all arguments would not serve a call without them."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(8, 8), nn.GELU()

        def forward(self, x, mask=None):
            x = self.fc(x)
            if mask is not None:
                x = x * mask
            return self.act(x)

    plain = nn.ModuleDict({"inner": Masked()})["inner"]
    model = convert(copy.deepcopy(plain))
    x = torch.randn(3, 8)
    for mask in (None, torch.zeros(8)):
        assert torch.equal(model(x, mask), plain(x, mask))
    assert "depends on which arguments are given" in how(model)[""]


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_rest_as_codes():
    plain = Block(nn.GELU())
    model = convert(copy.deepcopy(plain), 4, rest="codes")
    book, exact = stored(model, (4, 40, 32)), stored(plain, (4, 40, 32))
    assert book.stored < exact.stored / 5
    assert all(entry.stored < 4 * 1024 for entry in book.full_precision)
    got, expected = step(model, (4, 40, 32)), step(plain, (4, 40, 32))
    assert torch.equal(got[0], expected[0])
    assert relative(joined(got), joined(expected)) < rounding_of_inputs(4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False), convert(model, rest="codes")):
        assert stored(copied, (4, 40, 32)).stored == book.stored


def test_the_context_of_the_rest_ends_with_the_forward_pass():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(40, 40)

        def forward(self, x):
            if x.sum() > 1e9:
                raise ValueError("too large")
            return self.fc(x).tanh()

    model = convert(Failing(), rest="codes")
    with pytest.raises(ValueError, match="too large"):
        model(torch.full((40, 40), 1e10))
    model(torch.ones(40, 40))
    with ledger() as book:
        torch.ones(40, 40).requires_grad_().exp()
    assert [entry.dtype for entry in book.entries] == [torch.float32]
    with pytest.raises(ValueError, match="convert: rest must be 'exact' or 'codes', got 'none'"):
        convert(Failing(), rest="none")


def test_fully_sharded_in_mixed_precision():
    """FSDP2 with parameters in bfloat16. With batch norms torch's own refuses on CPUs: their buffers stay float32."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        plain = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(),
            nn.Linear(512, 32), nn.LayerNorm(32), nn.Linear(32, 4),
        )
        x, results = torch.randn(4, 3, 12, 12), []
        for rest in (None, "exact", "codes"):
            network = copy.deepcopy(plain)
            model = network if rest is None else convert(network, 8, rest=rest)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            out = model(x)
            out.float().square().sum().backward()
            grads = [p.grad.full_tensor().flatten() for p in model.parameters()]
            results.append((out.detach(), torch.cat(grads)))
        for out, grads in results[1:]:
            assert torch.equal(out, results[0][0])
            assert relative(grads, results[0][1]) < 0.05
    finally:
        torch.distributed.destroy_process_group()


# --- other libraries' models ------------------------------------------------------------------------------------------


def test_gpt2_of_transformers():
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except (ImportError, RuntimeError) as error:  # a torchvision that does not go with this torch raises either
        pytest.skip(str(error))
    sizes = dict(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    plain = GPT2LMHeadModel(GPT2Config(**sizes)).train()
    model = convert(copy.deepcopy(plain), rest="codes")
    tokens = torch.tensor(list(__doc__.encode()[:64]) * 4).reshape(4, 64)
    results = []
    for network in (model, plain):
        torch.manual_seed(2)
        with ledger(network) as book:
            loss = network(tokens, labels=tokens).loss
        network.zero_grad()
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters()]), book.stored))
    assert torch.equal(results[0][0], results[1][0])
    assert F.cosine_similarity(results[0][1], results[1][1], 0) > 0.97
    assert results[0][2] < results[1][2] / 4  # small tensors stay
    assert lowmem.report(model)


@pytest.mark.parametrize("name", ["mobilenetv3_large_100", "regnety_002"])
def test_networks_of_timm(name):
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    plain = timm.create_model(name).train()
    # Smooth images: of noise, batch norms of few values have gradients that are differences of large terms.
    x = F.interpolate(torch.randn(8, 3, 16, 16), (96, 96), mode="bicubic")
    results = []
    for network, context in (
        (copy.deepcopy(plain), contextlib.nullcontext()), (convert(copy.deepcopy(plain)), contextlib.nullcontext()),
        (copy.deepcopy(plain), lowmem.saved_tensors(4)),
    ):
        torch.manual_seed(2)
        with ledger(network) as book, context:
            loss = F.cross_entropy(network(x), torch.arange(8))
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters()]), book.stored))
    for loss, grads, kept in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert F.cosine_similarity(grads, results[0][1], 0) > 0.97
        assert kept < results[0][2] / 6
