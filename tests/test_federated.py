"""Federated learning: partition, losses, averages, measures, wire, rounds, faults, simulation."""

import dataclasses
import itertools
import math
import os
import random
import resource
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fuzz_wire
from conftest import sum_bound
from lowbit_ext import federated
from lowbit_ext.federated import Coordinator, Participant, Settings, run_round, simulate, wire


def scalar_state(value):
    return {"w": torch.tensor([float(value)], dtype=torch.float64)}


def random_state(seed, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(5, 3, 3, 3, generator=rng).to(dtype),
        "bn.running_mean": torch.randn(5, generator=rng).to(dtype),
        "bn.num_batches_tracked": torch.tensor(seed),
        "fc.bias": torch.randn(7, generator=rng).to(dtype),
    }


# --- data -------------------------------------------------------------------------------------------------------------


def test_non_iid_level_of_known_cases():
    assert federated.non_iid_level(torch.full((4, 10), 7)) == 0
    assert federated.non_iid_level(torch.eye(10, dtype=torch.int64) * 13) == 1
    # Two pairs of users: within a pair distance 0, across 1/2.
    counts = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [2, 0, 2, 0]])
    assert federated.non_iid_level(counts) == pytest.approx(4 / 6 * 0.5)


@pytest.mark.parametrize("target", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("users", "factor"), [(10, 1.0), (20, 0.947), (30, 0.931)])
def test_partition_reaches_its_level(target, users, factor):
    labels = torch.arange(10).repeat(1200)[torch.randperm(12_000, generator=torch.Generator().manual_seed(1))]
    split = federated.partition(labels, users, target, labelled=200, generator=torch.Generator().manual_seed(0))
    counts = split.counts(labels)
    assert federated.non_iid_level(counts) == pytest.approx(target * factor, abs=0.01)
    assert torch.bincount(labels[split.server]).tolist() == [20] * 10
    indices = torch.cat([split.server, *split.users])
    assert len(indices.unique()) == len(indices)
    assert len({len(user) for user in split.users}) == 1


@settings(max_examples=50, deadline=None)
@given(users=st.integers(1, 12), target=st.floats(0, 1), classes=st.integers(1, 6), seed=st.integers(0, 99))
def test_partition_of_any_size(users, target, classes, seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes).repeat(40), torch.randint(classes, (300,), generator=rng)])
    split = federated.partition(labels, users, target, labelled=2 * classes, generator=rng)
    indices = torch.cat([split.server, *split.users])
    assert len(indices.unique()) == len(indices)
    assert min(len(user) for user in split.users) >= 1


# --- loss -------------------------------------------------------------------------------------------------------------


def test_consistency_loss():
    rng = torch.Generator().manual_seed(0)
    weak = torch.randn(40, 5, generator=rng, dtype=torch.float64).mul(2).requires_grad_()
    strong = torch.randn(40, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    none = federated.consistency_loss(weak, strong, 1.1)
    none.backward()
    assert none == 0
    assert not strong.grad.any()
    assert weak.grad is None
    every = federated.consistency_loss(weak, strong, 0.0)
    assert torch.allclose(every, F.cross_entropy(strong, weak.argmax(1)))
    some = federated.consistency_loss(weak, strong, 0.7)
    total = sum(
        -torch.log_softmax(strong[i], 0)[weak[i].argmax()]
        for i in range(40) if torch.softmax(weak[i], 0).max() >= 0.7
    )
    assert torch.allclose(some, total / 40)  # of the whole batch
    assert federated.consistency_loss(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


# --- averages ---------------------------------------------------------------------------------------------------------


def test_one_group_is_fedavg_with_server_bit_for_bit():
    server, users = random_state(0), {k: random_state(k + 1) for k in range(3)}
    average, (group,) = federated.group_average(server, users, [[0, 1, 2]])
    for key in ("conv.weight", "fc.bias", "bn.running_mean"):
        total = server[key].double() + users[0][key].double() + users[1][key].double() + users[2][key].double()
        assert torch.equal(average[key], (total / 4).float())
        assert torch.equal(group[key], average[key])
    assert average["bn.num_batches_tracked"] == 0  # an integer: the server's


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_coefficients(sizes):
    """A basis vector for each participant: its coordinate of the average is its coefficient."""
    total, groups_count = sum(sizes), len(sizes)
    basis = torch.eye(total + 1, dtype=torch.float64)
    ends = list(itertools.accumulate(sizes))
    groups = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    average, _ = federated.group_average({"w": basis[total]}, {k: {"w": basis[k]} for k in range(total)}, groups)
    for group in groups:
        for user in group:
            assert average["w"][user] == pytest.approx(1 / (groups_count * (len(group) + 1)), abs=1e-15)
    server = sum(1 / (groups_count * (size + 1)) for size in sizes)
    assert average["w"][total] == pytest.approx(server, abs=1e-15)
    assert float(average["w"].sum()) == pytest.approx(1, abs=1e-14)


def test_groups_of_one_meet_only_the_server_and_equal_models_stay():
    server, users = scalar_state(8), {k: scalar_state(k) for k in range(4)}
    _, means = federated.group_average(server, users, [[k] for k in range(4)])
    assert [float(mean["w"]) for mean in means] == [(8 + k) / 2 for k in range(4)]
    state = random_state(3)
    average, means = federated.group_average(state, dict.fromkeys("abc", state), [["a"], ["b", "c"]])
    for result in (average, *means):
        assert all(torch.equal(result[key], state[key]) for key in state)


def test_batch_norm_statistics_policies():
    server, users = random_state(0), {0: random_state(1)}
    average, _ = federated.group_average(server, users, [[0]], "average")
    assert torch.allclose(average["bn.running_mean"], (server["bn.running_mean"] + users[0]["bn.running_mean"]) / 2)
    local, _ = federated.group_average(server, users, [[0]], "local")
    assert torch.equal(local["bn.running_mean"], server["bn.running_mean"])
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    batches = torch.randn(6, 1, 8, 8).split(3)
    federated.recompute_statistics(model, batches)
    outputs = torch.stack([model[0](batch).mean((0, 2, 3)) for batch in batches])
    bound = sum_bound(3 * 36 + 2, float(model[0](torch.cat(batches)).abs().max()))  # means of 108, and of two of them
    torch.testing.assert_close(model[1].running_mean, outputs.mean(0), rtol=0, atol=2 * bound)
    assert model[1].momentum == 0.1


def test_assign_groups():
    groups = federated.assign_groups(list(range(11)), 3, random.Random(0))
    assert sorted(user for group in groups for user in group) == list(range(11))
    assert sorted(map(len, groups)) == [3, 4, 4]
    assert groups != federated.assign_groups(list(range(11)), 3, random.Random(1))
    assert [federated.default_groups(n) for n in (1, 10, 47, 100)] == [1, 1, 5, 10]


# --- measures ---------------------------------------------------------------------------------------------------------


def test_gradient_diversity():
    same = [{"w": torch.ones(5)}] * 4
    assert federated.gradient_diversity(same) == pytest.approx(1 / 4)
    assert federated.gradient_diversity(same, "figures") == pytest.approx(1)
    orthogonal = [{"w": 3 * row} for row in torch.eye(4)]
    assert federated.gradient_diversity(orthogonal) == pytest.approx(1)
    assert federated.gradient_diversity(orthogonal, "figures") == pytest.approx(4)
    assert federated.gradient_diversity([{"w": torch.ones(1)}, {"w": -torch.ones(1)}]) == math.inf
    with_norm = [{"w": torch.ones(2), "n": torch.tensor([float(i)])} for i in range(3)]
    assert federated.gradient_diversity(with_norm, skip={"n"}) == pytest.approx(1 / 3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.GroupNorm(1, 2)))
    assert federated.norm_parameters(model) == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked", "2.0.weight", "2.0.bias"
    }


def test_replace_batchnorm():
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48, eps=1e-3), nn.Sequential(nn.BatchNorm2d(48)))
    nn.init.uniform_(model[1].weight)
    replaced = federated.replace_batchnorm(model)
    assert isinstance(replaced[1], nn.GroupNorm)
    assert (replaced[1].num_groups, replaced[1].eps) == (24, 1e-3)  # 32 does not divide 48
    assert torch.equal(replaced[1].weight, model[1].weight)
    assert isinstance(replaced[2][0], nn.GroupNorm)
    assert isinstance(model[1], nn.BatchNorm2d)  # the model given is left alone
    assert replaced(torch.randn(2, 3, 8, 8)).shape == (2, 48, 6, 6)
    assert isinstance(federated.replace_batchnorm(nn.BatchNorm2d(5)), nn.GroupNorm)


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [federated.weak, federated.strong])
def test_augmentations_are_reproducible_and_keep_range(augment):
    images = torch.rand(64, 3, 28, 20, generator=torch.Generator().manual_seed(0))
    first = augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(2)))
    assert first.shape == images.shape
    assert (float(first.min()), float(first.max())) >= (0.0, 0.0)
    assert float(first.max()) <= 1 + 1e-6
    assert augment(images[:0]).shape == (0, 3, 28, 20)
    assert augment(images[:3].bfloat16()).dtype == torch.bfloat16


def test_weak_shifts_and_flips():
    images = torch.arange(16.0 * 16).reshape(1, 1, 16, 16).expand(500, -1, -1, -1) / 256
    result = federated.weak(images, torch.Generator().manual_seed(0))
    rising = result[:, 0, 8, 8] < result[:, 0, 8, 9]
    assert 0.4 < float(rising.float().mean()) < 0.6  # half are mirrored
    plain = federated.weak(images, torch.Generator().manual_seed(0), flip=False)
    shifts = ((plain[:, 0, 8, 8] - images[:, 0, 8, 8]) * 256).round().long()
    assert set(shifts.tolist()) == {16 * dy + dx for dy in range(-2, 3) for dx in range(-2, 3)}


# --- wire -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [64, 255, 256, 257, 1001])  # around a group, and around a 64-bit word of signs
@pytest.mark.parametrize("bits", [4, 1])
def test_wire_round_trip(bits, count, dtype):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, residual = federated.compress({"w": values, "n": torch.tensor(3)}, bits)
    update = federated.decompress(packed)
    assert update["w"].dtype == dtype
    assert update["n"] == 3
    # The residual is rounded, and the sum here.
    error = (update["w"] + residual["w"] - values).abs().max()
    assert error <= torch.finfo(dtype).eps * values.abs().max()
    rounding = torch.finfo(dtype).eps * 8
    for group, sent in zip(values.double().split(256), update["w"].double().split(256), strict=True):
        if bits == 4:
            # Half a step; the bfloat16 minimum lies up to 2^-7 of itself below and the scale is rounded up.
            least = float(group.abs().max())
            step = float(group.max() - group.min() + least * 2**-7) / 15 * (1 + 2**-7)
            assert (group - sent).abs().max() <= step * 0.5001 + rounding
        else:
            assert torch.equal(sent >= 0, group >= 0)
            assert sent.abs().mean() == pytest.approx(float(group.abs().mean()), rel=2**-7)
    zero, _ = federated.compress({"w": torch.zeros(300)}, bits)
    assert not federated.decompress(zero)["w"].any()


def test_wire_bytes():
    state = {"w": torch.randn(100_000), "bias": torch.randn(10)}
    assert federated.compress(state, 4)[0].nbytes <= 400_040 / 7.5
    assert federated.compress(state, 1)[0].nbytes <= 400_040 / 28
    assert federated.compress(state, 32)[0].nbytes == 400_040
    for bits in wire.WIRE_BITS:
        packed = federated.compress(state, bits)[0]
        assert len(wire.to_bytes(packed, 0)) < packed.nbytes + 200


@pytest.mark.parametrize("bits", [32, 4, 1])
def test_bytes_of_a_message(bits):
    state = fuzz_wire.STATE | {"scalar": torch.tensor(0.25), "none": torch.zeros(0, 3), "c": torch.ones(2).cfloat()}
    state["conv.weight"] = state["conv.weight"].to(memory_format=torch.channels_last)
    packed = federated.compress(state, bits)[0]
    for like in (None, state):
        read, number = wire.from_bytes(wire.to_bytes(packed, 12), like)
        assert (read.bits, read.layout, number) == (bits, packed.layout, 12)
        values, expected = federated.decompress(read), federated.decompress(packed)
        assert all(torch.equal(values[key], expected[key]) for key in {**values, **expected})


@pytest.mark.parametrize(("bits", "codes"), [
    # -8 to 7 in steps of 1: scale 1 and minimum -8 in bfloat16. Signs, of which half are negative: mean magnitude 4.
    (4, b"".join(bytes([16 * (k + 1) + k]) for k in range(0, 16, 2)) * 4 + b"\x80\x3f\x00\xc1"),
    (1, b"\x00\xff" * 4 + b"\x80\x40"),
    (32, torch.arange(-8.0, 8.0).repeat(4).numpy().tobytes()),
])
def test_format_of_version_2(bits, codes):
    """Byte for byte: another format needs another version."""
    state = {"fc.w": torch.arange(-8.0, 8.0).repeat(4).view(8, 8), "n": torch.tensor(3)}
    coded = "false" if bits == 32 else "true"
    header = f'{{"round":5,"bits":{bits},"tensors":[["fc.w","float32",[8,8],{coded}],["n","int64",[],false]]}}'.encode()
    expected = b"lowbit" + b"\2\0" + len(header).to_bytes(4, "little") + header + codes + b"\3" + bytes(7)
    assert wire.to_bytes(federated.compress(state, bits)[0], 5) == expected


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([4, 1]), seed=st.integers(0, 999))
def test_statistics_and_counters_are_exact(bits, seed):
    """Variances of 1e-3 to 1e1: a difference of few bits would take many below 0."""
    rng = torch.Generator().manual_seed(seed)

    def state():
        return {
            "bn.running_var": 10 ** (torch.rand(64, generator=rng) * 4 - 3),
            "bn.running_mean": torch.randn(64, generator=rng),
            "bn.num_batches_tracked": torch.randint(2**60, (), generator=rng),
            "ema": torch.rand(80, generator=rng),
            "bias": torch.randn(63, generator=rng) * 1e6,
        }

    new, old = state(), state()
    update = wire.difference(new, old, exact={"ema"})
    arrived = wire.apply(wire.decompress(wire.compress(update, bits, exact={"ema"})[0]), old, exact={"ema"})
    assert all(torch.equal(arrived[key], new[key]) for key in new)


def test_mutated_messages():
    outcomes = [fuzz_wire.check_one(data) for data in fuzz_wire.mutated_messages(seed=1, count=5000)]
    assert set(outcomes) == {"unreadable", "of another model", "lost", "dropped", "used"}


def with_header(**fields):
    header = {"round": 0, "bits": 32, "tensors": [["w", "float32", [100], False]]} | fields
    return fuzz_wire._with_header(fuzz_wire.json.dumps(header).encode(), bytes(400))


def described(*entry):
    return with_header(tensors=[list(entry)])


DESCRIBES = "the header describes a tensor by name, type, shape and whether it is coded, got ['w', "


@pytest.mark.parametrize(("data", "message"), [
    (b"", "a message has at least 12 bytes, got 0"),
    (fuzz_wire._zip(), r"a message begins with b'lowbit', got b'PK\x03\x04\x14\x00'"),
    (b"lowbit\1\0" + bytes(4), "the message is of version 1, this end reads 2"),
    (with_header()[:50], "the header must have at most 38 bytes, got 69"),
    (fuzz_wire._with_header(b"[" * 100_000, b""), "the header must have at most 1146 bytes, got 100000"),
    (fuzz_wire._with_header(b"[" * 1000, b""), "the header is no JSON: "),
    (fuzz_wire._with_header(b"\xff", b""), "the header is no JSON: 'utf-8' codec can't decode byte 0xff"),
    (fuzz_wire._with_header(b"3", b""), "the header must have round, bits and tensors, got 3"),
    (with_header(bits=math.inf), "the header must have round, bits and tensors, got {'bits': inf, "),
    (with_header(bits=8), "bits must be one of 1, 4, 32, got 8"),
    (with_header(round=-1), "round must be 0 to 2^63 - 1, got -1"),
    (described("w", "load", [100], False), DESCRIBES + "'load', [100], False]"),
    (described("w", "float32", [-100], False), DESCRIBES + "'float32', [-100], False]"),
    (described("w", "float32", [math.nan], False), DESCRIBES + "'float32', [nan], False]"),
    (described("w", "float32", [2**34], False),
     "the message: w must be torch.float32 (100,), got torch.float32 (17179869184,)"),
    (described("w", "float64", [50], False), "the message: w must be torch.float32 (100,), got torch.float64 (50,)"),
    (described("v", "float32", [100], False), "the message has other tensors than the server's model: v, w"),
    (with_header(tensors=[["w", "float32", [100], False]] * 2), "the header names a tensor twice"),
    (with_header() + b"0", "the tensors take 400 bytes, got 401"),
], ids=range(19))
def test_wrong_messages(data, message):
    with pytest.raises(ValueError, match=r"^from_bytes: ") as caught:
        wire.from_bytes(data, {"w": torch.zeros(100)})
    assert str(caught.value).startswith(f"from_bytes: {message}")


def test_messages_that_claim_much_take_no_memory():
    """64 GiB of whole tensors, and of codes, of which a receiver that knows no model has only the header."""
    for entry in (["w", "float32", [2**34], False], ["w", "float32", [2**34], True], ["w", "bool", [2**36], False]):
        with (
            fuzz_wire._Allocations() as allocations,
            pytest.raises(ValueError, match=r"^from_bytes: the tensors take \d+ bytes, got 400"),
        ):
            wire.from_bytes(with_header(bits=4, tensors=[entry]))
        assert allocations.nbytes == 0
    with pytest.raises(ValueError, match=r"^from_bytes: 'w' is bool and has other bytes than 0 and 1"):
        wire.from_bytes(described("w", "bool", [400], False).replace(bytes(400), bytes(399) + b"\2"))
    with pytest.raises(TypeError, match=r"^from_bytes: data must be bytes, got str"):
        wire.from_bytes("lowbit")


def test_error_feedback_sends_everything_in_the_end():
    """The same update each time: what arrives, averaged, tends to it with feedback and stays wrong without."""
    wanted = {"w": torch.randn(512, generator=torch.Generator().manual_seed(0))}
    errors = {}
    for feedback in (True, False):
        residual, arrived = None, torch.zeros(512)
        for _ in range(1000):
            packed, residual = federated.compress(wanted, 1, feedback, residual)
            arrived += federated.decompress(packed)["w"]
        errors[feedback] = float((arrived / 1000 - wanted["w"]).norm() / wanted["w"].norm())
    assert errors[True] < 0.05
    assert errors[False] > 0.5  # the signs alone, sqrt(1 - 2/pi) for normal values


# --- rounds -----------------------------------------------------------------------------------------------------------

GROUPS = [[0, 1], [2, 3]]


def towards(target):
    return lambda state, number: {"w": state["w"] + 0.5 * (target - state["w"])}


def plain_loop(rounds):
    """The five rounds of the check in plain arithmetic."""
    server, users = 0.0, [0.0] * 4
    for _ in range(rounds):
        moved = server + 0.5 * (10 - server)
        trained = [value + 0.5 * (p - value) for p, value in enumerate(users)]
        means = [(moved + sum(trained[k] for k in group)) / (len(group) + 1) for group in GROUPS]
        for mean, group in zip(means, GROUPS, strict=True):
            for k in group:
                users[k] = mean
        server = sum(means) / len(means)
    return server


def drive(rounds, users=None, groups=GROUPS, deadline=None, **options):
    coordinator = Coordinator(scalar_state(0), range(4), groups=2, **options)
    participants = {k: Participant() for k in range(4)}
    trainings = {k: towards(k) for k in range(4)} | (users or {})
    reports = [
        run_round(coordinator, participants, towards(10), trainings, groups=groups, deadline=deadline)
        for _ in range(rounds)
    ]
    return coordinator, reports


def test_driver_equals_a_plain_loop():
    coordinator, reports = drive(5)
    assert float(coordinator.state["w"]) == pytest.approx(plain_loop(5), abs=1e-12)
    assert [report.round for report in reports] == list(range(5))
    assert all(report.bytes_up == report.bytes_down == 4 * 8 for report in reports)
    # The first round by hand: v = 5 of the server, p/2 of the users.
    for_group = [(25 + 0 + 0.25) / 5.5**2, (25 + 1 + 2.25) / 7.5**2]
    assert reports[0].diversity == pytest.approx(sum(for_group) / 2)
    assert reports[0].normalised_diversity == pytest.approx(3 * sum(for_group) / 2)


def broken(state, number):
    raise OSError("battery empty")


FAULTS = {
    "never answers": (lambda state, number: None, "no answer"),
    "NaN": (lambda state, number: {"w": state["w"] * math.nan}, "user 1: w has a NaN or an infinity"),
    "shape": (lambda state, number: {"w": torch.zeros(2, dtype=torch.float64)},
              "user 1: w must be torch.float64 (1,), got torch.float64 (2,)"),
    "names": (lambda state, number: {"v": state["w"]},
              "user 1 has other tensors than the server's model: v, w"),
    "exception": (broken, "OSError: battery empty"),
    "huge": (lambda state, number: {"w": state["w"] + 3e38},
             "its change has the norm 3e+38, where 5 is usual in the round"),
    "overflow": (lambda state, number: {"w": state["w"] - 1.7e308},
                 "its change has the norm 1.7e+308, where 5 is usual in the round"),
    "not a state": (lambda state, number: 3, "AttributeError: 'int' object has no attribute 'items'"),
}


class Clock:
    """Stands still but for what `passes`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def passes(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_user_does_not_harm_the_round(fault):
    training, reason = FAULTS[fault]
    coordinator, (report,) = drive(1, {1: training})
    assert report.lost == {1: reason}
    means = [(5 + 0) / 2, (5 + 1 + 1.5) / 3]  # as if user 1 had not been drawn
    assert float(coordinator.state["w"]) == pytest.approx(sum(means) / 2, abs=1e-14)
    assert float(coordinator.starts[1]["w"]) == means[0]
    run_round(coordinator, {k: Participant() for k in range(4)}, towards(10), {k: towards(k) for k in range(4)})


@pytest.mark.parametrize(("seconds", "lost"), [(0.5, {}), (0.6, {1: "later than 0.5 s"})])
def test_a_late_user_is_lost(seconds, lost, monkeypatch):
    clock = Clock(monkeypatch)

    def slow(state, number):
        clock.passes(seconds)
        return state

    assert drive(1, {1: slow}, deadline=0.5)[1][0].lost == lost


@pytest.mark.parametrize("bits", [4, 1])
@pytest.mark.parametrize("fault", [*FAULTS, "count"])
def test_a_lost_user_of_packed_messages(fault, bits):
    """The same as if it had not been drawn, and the user is taken up again in the next round."""

    def state(value):
        return {"w": torch.full((128,), value), "n": torch.tensor(0)}

    def training(target):
        return lambda state, number: {**state, "w": state["w"] + 0.5 * (target - state["w"])}

    wrong = FAULTS[fault][0] if fault in FAULTS else lambda state, number: {**state, "n": torch.tensor(math.nan)}
    states = {}
    for users in (range(3), range(2)):
        coordinator = Coordinator(state(0.0), users, groups=1, bits=bits)
        participants = {k: Participant(bits) for k in users}
        trainings = {0: training(1), 1: training(2), 2: wrong}
        report = run_round(coordinator, participants, training(3), trainings, groups=[[*users]])
        assert list(report.lost) == [2] * (len(users) == 3)
        states[len(users)] = coordinator.state["w"]
        if len(users) == 3:
            assert not run_round(coordinator, participants, training(3), {k: training(k) for k in users}).lost
    assert torch.equal(states[2], states[3])


@pytest.mark.parametrize(("server", "users", "why"), [
    ({"w"}, (), "w must be torch.float32 (128,), got torch.float32 (128,) in codes"),
    ((), {"w"}, "w must be torch.float32 (128,) in codes, got torch.float32 (128,)"),
])
def test_both_ends_must_agree_on_what_is_coded(server, users, why):
    """Otherwise a value would be taken for a difference. Round 0 sends states, round 1 differences."""
    first = {"w": torch.zeros(128)}
    coordinator = Coordinator(first, range(2), groups=1, bits=4, exact=server)
    participants = {0: Participant(4, exact=server), 1: Participant(4, exact=users)}
    trainings = {k: lambda s, n: {"w": s["w"] + 1} for k in range(2)}
    report = run_round(coordinator, participants, lambda s, n: {"w": s["w"] + 1}, trainings)
    assert report.lost == {1: f"user 1: {why}"}
    with pytest.raises(ValueError, match=r"^Participant: the message: w must be torch.float32 \(128,\)"):
        participants[1].receive(coordinator.send(0))


@pytest.mark.parametrize("reply", [-1.0, 1e30], ids=["negative", "huge"])
@pytest.mark.parametrize("statistics", ["average", "local"])
def test_statistics_that_would_poison(statistics, reply):
    def state(value):
        return {"w": torch.ones(3) * value, "bn.running_var": torch.ones(64) * value}

    coordinator = Coordinator(state(1.0), range(3), groups=1, statistics=statistics)
    trainings = {k: lambda s, n: state(1.1) for k in range(2)}
    trainings[2] = lambda s, n: {"w": torch.ones(3), "bn.running_var": torch.full((64,), reply)}
    participants = {k: Participant() for k in range(3)}
    report = run_round(coordinator, participants, lambda s, n: state(1.2), trainings)
    if reply < 0:
        assert report.lost == {2: "user 2: bn.running_var has a variance below 0"}
    elif statistics == "average":
        why = "its change of the running statistics has the norm 8e+30, where 1.6 is usual in the round"
        assert report.lost == {2: why}
    else:  # its own affair
        assert report.lost == {}
    assert float(coordinator.state["bn.running_var"].max()) < 1.3


def test_norm_bound():
    """The server's norm is 5: up to ten times as much is used. If it does not move, the users' median counts."""
    assert drive(1, {1: lambda s, n: {"w": s["w"] + 50.0}})[1][0].lost == {}
    assert list(drive(1, {1: lambda s, n: {"w": s["w"] + 51.0}})[1][0].lost) == [1]
    assert list(drive(1, {1: lambda s, n: {"w": s["w"] + 11.0}}, max_norm_ratio=2.0)[1][0].lost) == [1]
    assert drive(1, {1: lambda s, n: {"w": s["w"] + 1e30}}, max_norm_ratio=None)[1][0].lost == {}
    coordinator = Coordinator(scalar_state(0), range(4), groups=1)
    participants = {k: Participant() for k in range(4)}
    trainings = {k: towards(target) for k, target in enumerate((0, 1, 2, 1e4))}  # the first does not move either
    report = run_round(coordinator, participants, lambda s, n: s, trainings)
    assert report.lost == {3: "its change has the norm 5e+03, where 1 is usual in the round"}


def test_messages_of_no_use_are_named_and_dropped():
    coordinator = Coordinator(scalar_state(0), range(4), groups=1, participants=2, seed=1)
    first, second = coordinator.begin()
    stranger = next(k for k in range(4) if k not in (first, second))
    for user in (first, second):
        coordinator.send(user)
    reply = wire.compress(scalar_state(1), 32)[0]
    poison = wire.compress(scalar_state(40), 32)[0]
    coordinator.receive(first, reply, 0)
    coordinator.receive(first, poison, 0)
    coordinator.receive(stranger, poison, 0)
    coordinator.receive(99, poison)
    coordinator.receive(second, poison, 7)
    report = coordinator.finish(scalar_state(5))
    assert report.dropped == {
        first: "answered before", stranger: "was not drawn", 99: "was not drawn", second: "answers round 7 instead of 0"
    }
    assert report.lost == {second: "no answer"}
    assert float(coordinator.state["w"]) == 3
    coordinator.begin([[first, second]])
    coordinator.receive(first, poison, 0)  # late
    assert coordinator.report.dropped == {first: "answers round 0 instead of 1"}
    coordinator.lose(first, "a" + "x" * 10_000 + "battery empty")
    (why,) = coordinator.report.lost.values()
    assert len(why) < 510
    assert why.startswith("ax")
    assert why.endswith("xbattery empty")


def test_a_group_of_which_nobody_arrives():
    silent = FAULTS["never answers"][0]
    coordinator, (report,) = drive(1, {0: silent, 1: silent})
    assert set(report.lost) == {0, 1}
    assert float(coordinator.state["w"]) == pytest.approx((5 + 1 + 1.5) / 3)
    assert torch.equal(coordinator.starts[0]["w"], coordinator.state["w"])


@pytest.mark.parametrize("bits", [32, 4])
def test_rounds_without_any_reply(bits):
    """The model stays and the run goes on, until there are too many of them in a row."""
    first = {"w": torch.zeros(100)}
    coordinator = Coordinator(first, range(2), groups=1, bits=bits, max_failed_rounds=3)
    participants = {k: Participant(bits) for k in range(2)}
    silent = dict.fromkeys(range(2), FAULTS["never answers"][0])

    def play(users):
        return run_round(coordinator, participants, towards(10), users, groups=[[0, 1]])

    for _ in range(2):
        report = play(silent)
        assert report.failed
        assert report.lost == {0: "no answer", 1: "no answer"}
        assert torch.equal(coordinator.state["w"], first["w"])
    assert not play({k: towards(k) for k in range(2)}).failed
    state = coordinator.state["w"]
    assert float(state.mean()) == pytest.approx((5 + 0 + 0.5) / 3, abs=1e-2)
    play(silent)
    play(silent)
    why = r"round 5: no user's update could be used, 3 rounds in a row \(0: no answer; 1: no answer\)"
    with pytest.raises(RuntimeError, match=why):
        play(silent)
    assert coordinator.state["w"] is state


def test_a_round_without_users():
    coordinator = Coordinator(scalar_state(1), range(2), groups=2)
    coordinator.meet([])
    assert coordinator.begin() == []
    assert coordinator.finish(scalar_state(2)).failed
    assert float(coordinator.state["w"]) == 1


@pytest.mark.parametrize("bits", [4, 1])
def test_packed_differences_stay_together(bits):
    """Users that do not train: both ends of the wire hold the same, which tends to the server's model."""
    rng = torch.Generator().manual_seed(0)
    target = {"w": torch.randn(600, generator=rng)}
    coordinator = Coordinator({"w": torch.zeros(600)}, range(2), groups=1, bits=bits)
    participants = {k: Participant(bits) for k in range(2)}
    for _ in range(100):
        run_round(coordinator, participants, lambda state, number: target, {k: lambda s, n: s for k in range(2)})
        for k in range(2):
            assert torch.equal(participants[k].received["w"], coordinator.held[k]["w"])
    start = float(target["w"].norm())
    assert float((coordinator.state["w"] - target["w"]).norm()) < 0.1 * start


def test_partial_participation_and_draws():
    coordinator = Coordinator(scalar_state(0), range(10), groups=2, participants=4, seed=5)
    drawn = [sorted(coordinator.begin()) for _ in range(1)]
    again = Coordinator(scalar_state(0), range(10), groups=2, participants=4, seed=5)
    assert sorted(again.begin()) == drawn[0]
    assert len(drawn[0]) == 4
    assert [len(group) for group in again.report.groups] == [2, 2]


# --- simulation -------------------------------------------------------------------------------------------------------


def small_problem(norm=True):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    split = federated.partition(labels, 4, 0.4, labelled=100, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    users = [images[user] for user in split.users]
    return model, (images[split.server], labels[split.server]), users, [labels[user] for user in split.users]


BASE = Settings(rounds=3, steps=2, groups=2, batch=16, flip=False, threshold=0.5, seed=1)


@pytest.mark.parametrize("changes", [
    {}, {"statistics": "local"}, {"statistics": "recompute"}, {"bits": 4}, {"bits": 1, "groups": 1},
    {"objective": "self_training", "warm_up": 5, "participants": 3}, {"alternate": 2}, {"alternate": 2, "groups": 1},
    {"drop": 0.3},
], ids=str)
def test_simulation_is_deterministic_and_resumes(changes, tmp_path):
    model, server, users, labels = small_problem()
    chosen = dataclasses.replace(BASE, **changes)
    whole = simulate(model, server, users, chosen, user_labels=labels, test=server)
    assert len(whole.history) == 3
    assert all(torch.isfinite(tensor).all() for tensor in whole.state.values())
    path = tmp_path / "run.pt"

    class Interrupted(Exception):
        pass

    def stop(report):
        if report.round == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        simulate(model, server, users, chosen, user_labels=labels, test=server, checkpoint=path, on_round=stop)
    resumed = simulate(model, server, users, chosen, user_labels=labels, test=server, checkpoint=path)
    assert all(torch.equal(resumed.state[key], whole.state[key]) for key in whole.state)
    assert resumed.history == whole.history
    assert 0 <= whole.history[-1].measures["accuracy"] <= 1
    with pytest.raises(ValueError, match="holds a run of other settings"):
        simulate(model, server, users, dataclasses.replace(chosen, seed=9), checkpoint=path)


CHECKPOINTED = Settings(rounds=2, steps=1, groups=1, batch=8, flip=False, threshold=0.5, bits=4, warm_up=1)


def checkpointed(path, users=4, model=None, data=0.0, **changes):
    """A short run with a checkpoint, of so many users, with `data` added to the last one's images."""
    given, server, images, _ = small_problem()
    images = [*images[: users - 1], images[users - 1] + data]
    return simulate(model or given, server, images, dataclasses.replace(CHECKPOINTED, **changes), checkpoint=path)


def test_a_finished_run_is_extended(tmp_path):
    path = tmp_path / "run.pt"
    finished = checkpointed(path)
    again = checkpointed(path)
    assert again.history == finished.history
    assert all(torch.equal(again.state[key], finished.state[key]) for key in finished.state)
    extended = checkpointed(path, rounds=3)
    assert extended.history[:2] == finished.history
    assert len(extended.history) == 3
    assert not all(torch.equal(extended.state[key], finished.state[key]) for key in finished.state)
    with pytest.raises(ValueError, match=r"^simulate: .*run.pt holds 3 rounds, more than 2 of the settings$"):
        checkpointed(path)


def test_failed_rounds_count_over_interruptions(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.0))  # every user's reply is lost
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = checkpointed(path, model=model, drop=0.5, rounds=2, alternate=1)
    assert all(report.failed for report in result.history)
    with pytest.raises(RuntimeError, match=r"^round 2: no user's update could be used, 3 rounds in a row"):
        checkpointed(path, model=model, drop=0.5, rounds=3, alternate=1)


@pytest.mark.parametrize(("changes", "what"), [
    ({"seed": 9}, "settings.*settings: seed is 0 there and 9 here"),
    ({"users": 3}, "users, data.*users: number is 4 there and 3 here; data: images of user 3 is torch.float32 .* there "
                   "and nothing here"),
    ({"data": 0.1}, "data.*data: images of user 3 is torch.float32 .* there and torch.float32 .* here"),
    ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}, r"model.*model: 1.weight is .* there and .* here"),
    ({"data": 0.1, "bits": 1}, "settings, data; .*settings: bits is 4 there and 1 here; data: "),
], ids=["settings", "users", "data", "model", "two"])
def test_another_runs_checkpoint_is_refused(changes, what, tmp_path):
    path = tmp_path / "run.pt"
    checkpointed(path, rounds=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^simulate: .*run.pt holds a run of other {what}"):
        checkpointed(path, **changes)
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    checkpointed(path, rounds=1)
    whole = path.read_bytes()
    rng = random.Random(0)
    for place in (30, 61, 62, len(whole) - 1, *(rng.randrange(30, len(whole)) for _ in range(20))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"^simulate: .*run.pt is damaged, its checksum is wrong"):
            checkpointed(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"^simulate: .*run.pt is damaged"):
        checkpointed(path)
    for other in (b"", b"PK", whole[1:]):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"^simulate: .*run.pt is no checkpoint of this version"):
            checkpointed(path)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    checkpointed(path, rounds=1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"simulate: the checkpoint cannot be written: File too large: '.*run.pt'"):
            checkpointed(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.pt", "run.pt.lock"]
    assert len(checkpointed(path).history) == 2


HOLDER = """
import sys
from lowbit_ext.federated.checkpoint import Checkpoint
with Checkpoint(sys.argv[1], {}):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_one_process_a_checkpoint(end, tmp_path):
    path = tmp_path / "run.pt"
    command = [sys.executable, "-I", "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        why = rf"^simulate: .*run.pt is the checkpoint of a run that goes on in process {holder.pid}; wait for it"
        with pytest.raises(RuntimeError, match=why):
            checkpointed(path)
        assert not path.exists()
        if end == "killed":
            holder.kill()
        else:
            holder.stdin.close()
        holder.wait()
    assert len(checkpointed(path).history) == 2


def test_a_checkpoint_is_as_readable_as_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        checkpointed(tmp_path / "run.pt", rounds=1)
    finally:
        os.umask(before)
    assert (tmp_path / "run.pt").stat().st_mode & 0o777 == 0o640


def test_training_learns_digits():
    model, server, users, labels = small_problem(norm=False)
    test = (torch.cat(users), torch.cat(labels))
    chosen = dataclasses.replace(BASE, rounds=10, steps=8, warm_up=300, batch=32, threshold=0.8, learning_rate=0.2)
    result = simulate(model, server, users, chosen, user_labels=labels, test=test, test_every=5)
    assert [i for i, report in enumerate(result.history) if "accuracy" in report.measures] == [4, 9]
    assert result.history[-1].measures["accuracy"] > 0.8
    assert result.history[-1].measures["label_accuracy"] > 0.8
    assert result.history[-1].normalised_diversity >= 1


# --- wrong calls ------------------------------------------------------------------------------------------------------

LABELS = torch.arange(4).repeat(10)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: federated.partition([1, 2], 2, 0.5, labelled=0), TypeError,
     "partition: labels must be an int64 tensor (N,) with at least one sample"),
    (lambda: federated.partition(LABELS, 2, 1.5, labelled=0), ValueError,
     "partition: non_iid must be between 0 and 1, got 1.5"),
    (lambda: federated.partition(LABELS, 2, 0.5, labelled=3), ValueError,
     "partition: labelled must be a multiple of the 4 classes, got 3"),
    (lambda: federated.partition(LABELS, 2, 0.0, labelled=4, per_user=50), ValueError,
     "partition: 40 samples allow at most 14 a user beside 4 of the server, got per_user 50"),
    (lambda: federated.non_iid_level(torch.ones(1, 3)), ValueError,
     "non_iid_level: counts must be (users, classes) of at least 2 users, got (1, 3)"),
    (lambda: federated.non_iid_level(torch.tensor([[0, 0], [1, 1]])), ValueError,
     "non_iid_level: every user must have samples, and no count may be negative"),
    (lambda: federated.consistency_loss(torch.zeros(2, 3), torch.zeros(3, 3)), ValueError,
     "consistency_loss: both logits must be (N, classes), got (2, 3) and (3, 3)"),
    (lambda: federated.assign_groups([1, 2], 3, random.Random()), ValueError,
     "assign_groups: groups must be 1 to 2, the number of users, got 3"),
    (lambda: federated.group_average(scalar_state(0), {1: scalar_state(0)}, [[1], [1]]), ValueError,
     "group_average: groups must hold every user exactly once and no group may be empty"),
    (lambda: federated.group_average(scalar_state(0), {1: {"w": torch.zeros(1)}}, [[1]]), ValueError,
     "group_average: user 1: w must be torch.float64 (1,), got torch.float32 (1,)"),
    (lambda: federated.group_average(scalar_state(0), {1: scalar_state(0)}, [[1]], "mean"), ValueError,
     "group_average: statistics must be one of average, local, recompute, got 'mean'"),
    (lambda: federated.gradient_diversity([]), ValueError, "gradient_diversity: at least one update is needed"),
    (lambda: federated.gradient_diversity([{}], "l2"), ValueError,
     "gradient_diversity: norm must be 'paper' or 'figures', got 'l2'"),
    (lambda: federated.replace_batchnorm(nn.ReLU(), 0), ValueError,
     "replace_batchnorm: groups must be at least 1, got 0"),
    (lambda: federated.weak(torch.zeros(3, 3)), TypeError,
     "weak: images must be a floating point tensor (N, C, H, W)"),
    (lambda: federated.strong(torch.zeros(1, 1, 4, 4), magnitude=31), ValueError,
     "strong: magnitude must be 0 to 30, got 31"),
    (lambda: federated.compress({}, 2), ValueError, "compress: bits must be one of 1, 4, 32, got 2"),
    (lambda: federated.compress({"w": torch.full((70,), math.nan)}), ValueError,
     "compress: w has a NaN, an infinity or a magnitude above 1e+30"),
    (lambda: federated.compress({"w": torch.full((70,), -3e38)}), ValueError,
     "compress: w has a NaN, an infinity or a magnitude above 1e+30"),
    (lambda: federated.compress({"w": torch.ones(70)}, residual={}), ValueError,
     "compress: residual must have w of shape (70,)"),
    (lambda: federated.decompress(dataclasses.replace(
        federated.compress({"w": torch.ones(70)})[0], layout={"w": wire.Form(torch.float32, (80,), True)})), ValueError,
     "decompress: w of torch.float32 (80,) in codes must have torch.uint8 (40,), got torch.uint8 (35,)"),
    (lambda: wire.difference({"w": torch.ones(70)}, {"v": torch.ones(70)}), ValueError,
     "difference: the new state has other tensors than the server's model: v, w"),
    (lambda: wire.to_bytes(federated.compress({"w": torch.ones(3).to(torch.float8_e5m2)}, 32)[0], 0), TypeError,
     "to_bytes: w must be one of float64, float32, float16, bfloat16, int64, int32, int16, int8, uint64, uint32, "
     "uint16, uint8, bool, complex64, complex128, got torch.float8_e5m2"),
    (lambda: Coordinator(scalar_state(0), [1, 2], participants=3), ValueError,
     "Coordinator: participants must be 1 to 2, the number of users, got 3"),
    (lambda: Coordinator(scalar_state(0), [1, 2], groups=3), ValueError,
     "Coordinator: groups must be 1 to 2 participants, got 3"),
    (lambda: Coordinator(scalar_state(0), [1], statistics="recompute"), ValueError,
     'Coordinator: recompute must be given for statistics "recompute" and for no other'),
    (lambda: Coordinator(scalar_state(0), [1], max_norm_ratio=0), ValueError,
     "Coordinator: max_norm_ratio must be above 0 or None, got 0"),
    (lambda: Coordinator(scalar_state(0), [1], max_failed_rounds=0), ValueError,
     "Coordinator: max_failed_rounds must be at least 1, got 0"),
    (lambda: Settings(rounds=1, objective="mixup"), ValueError,
     "Settings: objective must be one of consistency, self_training, got 'mixup'"),
    (lambda: Settings(rounds=-1), ValueError, "Settings: rounds must not be negative, got -1"),
    (lambda: simulate(nn.ReLU(), (torch.zeros(1), torch.zeros(1)), [], Settings(1)), ValueError,
     "simulate: there must be users, and each must have images"),
])
def test_wrong_calls(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
