"""The Flower application: the same numbers as the driver in one process, and faults, with and without Ray."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("flwr", reason='needs Flower: pip install "lowbit-ext[federated]"')

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from lowbit_ext.federated import GroupedAveraging, client_app, wire
from lowbit_ext.federated.flower import to_content


def plain_loop(groups_of_rounds, lost):
    """The rounds in plain arithmetic, with the groups that were drawn and without the users that were lost."""
    server, users = 0.0, [0.0] * 4
    for groups, gone in zip(groups_of_rounds, lost, strict=True):
        moved = server + 0.5 * (10 - server)
        trained = [value + 0.5 * (p - value) for p, value in enumerate(users)]
        means, total = {}, []
        for i, group in enumerate(groups):
            came = [trained[k] for k in group if str(k) not in gone]
            if came:
                means[i] = (moved + sum(came)) / (len(came) + 1)
                total.append(means[i])
        if not total:
            continue
        server = sum(total) / len(total)
        for i, group in enumerate(groups):
            for k in group:
                users[k] = means.get(i, server)
    return server


# --- in this process --------------------------------------------------------------------------------------------------

NODES = [2**64 - 1 - p for p in range(4)]  # Flower's are random numbers of 64 bits


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """What Flower sets in a process of the server before there can be messages."""
    known = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(known, name, 1)


def first_state():
    return {"w": torch.zeros(100, dtype=torch.float64), "p": torch.zeros(1, dtype=torch.float64)}


def towards(target):
    return lambda state, number: {"w": state["w"] + 0.5 * (target - state["w"]), "p": torch.zeros_like(state["p"])}


class Nodes:
    """Stands for Flower's grid: nodes that are client apps in this process.

    Args:
        tamper: (round, message, its reply) to the replies that the server gets instead.
        present: of a round, the nodes that are there.
    """

    def __init__(self, tamper, present=lambda number: NODES, **options):
        self.tamper, self.present, self.calls = tamper, present, 0
        self.app = client_app(lambda context: towards(context.node_config["partition-id"]), **options)
        self.contexts = {
            node: Context(1, node, {"partition-id": p}, RecordDict(), {}) for p, node in enumerate(NODES)
        }

    def get_node_ids(self):
        return self.present(self.calls // 2)

    def send_and_receive(self, messages, *, timeout):
        number, messages = self.calls // 2, list(messages)
        self.calls += 1  # two a round: Flower's evaluation, without any messages, is the second
        replies = [self.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]
        return [
            reply
            for message, good in zip(messages, replies, strict=True)
            for reply in self.tamper(number, message, good)
        ]


def run(rounds, tamper=lambda number, message, reply: [reply], present=lambda number: NODES, bits=32, **options):
    strategy = GroupedAveraging(first_state(), towards(10), minimum=4, groups=2, bits=bits, timeout=0.1, **options)
    strategy.run(Nodes(tamper, present, bits=bits), rounds)
    return strategy


def expected_of(strategy):
    """plain_loop for what the reports say."""
    groups = [[[NODES.index(node) for node in group] for group in report.groups] for report in strategy.reports]
    return plain_loop(groups, [{str(NODES.index(node)) for node in report.lost} for report in strategy.reports])


def content_of(**arrays):
    return RecordDict({"message": ArrayRecord(arrays)})


GOOD = to_content(wire.compress(first_state(), 32)[0], 1)
DATA = GOOD["message"]["message"].data
CONTENTS = {
    "nothing": (RecordDict(), "from_content: the content must be an ArrayRecord with 'message'"),
    "configuration": (RecordDict({"message": ConfigRecord({"message": DATA})}), "from_content: the content must be"),
    "no message": (content_of(w=Array(torch.zeros(3))), "from_content: the content must be"),
    "numpy": (content_of(message=Array(torch.zeros(3))), "from_bytes: a message begins with"),
    "empty": (content_of(message=Array("uint8", (), "", b"")), "from_bytes: a message has at least 12 bytes, got 0"),
    "cut": (content_of(message=Array("uint8", (), "", DATA[:-1])), "from_bytes: the tensors take 808 bytes, got 807"),
    "other model": (to_content(wire.compress({"w": torch.zeros(100), "p": torch.zeros(1)}, 32)[0], 1),
                    "from_bytes: the message: w must be torch.float64 (100,), got torch.float32 (100,)"),
    "NaN": (to_content(wire.compress({**first_state(), "p": torch.full((1,), math.nan).double()}, 32)[0], 1),
            f"user {NODES[1]}: p has a NaN or an infinity"),
    "3e38": (to_content(wire.compress({**first_state(), "p": torch.full((1,), 3e38).double()}, 32)[0], 1),
             "its change has the norm 3e+38, where "),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_wrong_reply_is_its_users_loss(kind):
    content, reason = CONTENTS[kind]

    def tamper(number, message, reply):
        wrong = number == 1 and message.metadata.dst_node_id == NODES[1]
        return [Message(content, reply_to=message)] if wrong else [reply]

    strategy = run(4, tamper)
    assert [list(report.lost) for report in strategy.reports] == [[], [NODES[1]], [], []]
    assert strategy.reports[1].lost[NODES[1]].startswith(reason)
    assert float((strategy.coordinator.state["w"] - expected_of(strategy)).abs().max()) < 1e-12


def test_a_client_that_fails():
    def tamper(number, message, reply):
        node = message.metadata.dst_node_id
        if number == 1 and node in NODES[:2]:
            return [Message(Error(2, "battery empty" if node == NODES[0] else ""), reply_to=message)]
        return [reply]

    strategy = run(3, tamper)
    assert strategy.reports[1].lost == {NODES[0]: "battery empty", NODES[1]: "the client failed"}
    assert float((strategy.coordinator.state["w"] - expected_of(strategy)).abs().max()) < 1e-12


def test_strangers_repeats_and_late_replies_are_named_and_dropped():
    kept = {}

    def tamper(number, message, reply):
        node = message.metadata.dst_node_id
        if node == NODES[0] and number == 1:
            kept["late"] = reply
            return []
        if node == NODES[0] and number == 2:
            return [kept["late"], reply]
        if node == NODES[1] and number == 2:
            return [reply, Message(GOOD, reply_to=message)]
        if node == NODES[2] and number == 2:
            stranger = Message(GOOD, reply_to=message)
            stranger.metadata.__dict__["_src_node_id"] = 77
            return [stranger, reply]
        return [reply]

    strategy = run(4, tamper)
    assert [report.lost for report in strategy.reports] == [{}, {NODES[0]: "no answer"}, {}, {}]
    late = dict.fromkeys((NODES[0], NODES[1], 77), "answers round 1 instead of 2")
    assert [report.dropped for report in strategy.reports] == [{}, {}, late, {}]
    assert float((strategy.coordinator.state["w"] - expected_of(strategy)).abs().max()) < 1e-12


def test_a_second_reply_and_a_strangers_to_the_same_round():
    def tamper(number, message, reply):
        again, stranger = (Message(reply.content, reply_to=message) for _ in range(2))
        stranger.metadata.__dict__["_src_node_id"] = 77
        return [reply, again, stranger]

    strategy = run(1, tamper)
    assert strategy.reports[0].lost == {}
    assert strategy.reports[0].dropped == {**dict.fromkeys(NODES, "answered before"), 77: "was not drawn"}


def test_nodes_that_leave_do_not_end_the_run():
    left = [NODES, NODES[:3], NODES[:2], [], [], NODES]
    strategy = run(6, present=lambda number: left[number])
    assert [len(report.drawn) for report in strategy.reports] == [4, 3, 2, 0, 0, 4]
    assert [report.failed for report in strategy.reports] == [False] * 3 + [True] * 2 + [False]
    assert 0 < float(strategy.coordinator.state["w"].mean()) < 10
    with pytest.raises(RuntimeError, match=r"^round 4: no user's update could be used, 3 rounds in a row \(no users\)"):
        run(9, present=lambda number: NODES if number < 2 else [])
    with pytest.raises(RuntimeError, match=r"^GroupedAveraging: 3 of at least 4 nodes came within 0.1 s$"):
        run(1, present=lambda number: NODES[:3])


@pytest.mark.parametrize("bits", [4, 1])
def test_what_a_node_holds_between_rounds(bits):
    strategy = run(8, bits=bits)
    assert all(not report.lost and not report.dropped for report in strategy.reports)
    assert float((strategy.coordinator.state["w"] - expected_of(strategy)).abs().max()) < 0.05
    # 4 bits: 50 bytes of codes, scale and minimum, and "p"; 1 bit: two words, a scale, and "p".
    assert strategy.reports[-1].bytes_up == 4 * ({4: 50 + 4, 1: 16 + 2}[bits] + 8)


# --- through Ray ------------------------------------------------------------------------------------------------------

# In a process of its own: Ray starts processes, and must not outlive the test.
PROGRAM = """
import json, math, os, sys, time
import torch
from flwr.simulation import run_simulation
from lowbit_ext.federated import GroupedAveraging, client_app, server_app

bits, faults, over = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]

def training(context):
    p = int(context.node_config["partition-id"])
    def run(state, number):
        fault = faults.get(str(number)) if p == 1 else None
        if fault == "nan":
            return {key: value * math.nan for key, value in state.items()}
        if fault == "shape":
            return {"w": torch.zeros(3), "p": state["p"]}
        if fault == "error":
            raise OSError("battery empty")
        while fault == "late" and not os.path.exists(over):
            time.sleep(0.05)
        # "p" tells the test which partition a node has.
        return {"w": state["w"] + 0.5 * (p - state["w"]), "p": torch.full_like(state["p"], p)}
    return run

def server(state, number):
    return {"w": state["w"] + 0.5 * (10 - state["w"]), "p": torch.zeros_like(state["p"])}

first = {"w": torch.zeros(100, dtype=torch.float64), "p": torch.zeros(1, dtype=torch.float64)}
partitions, found = {}, {}

class EventGrid:
    # Flower's, but a round is over when all but the late one have answered, however long that takes.
    def __init__(self, grid, strategy):
        self.grid, self.strategy = grid, strategy
    def __getattr__(self, name):
        return getattr(self.grid, name)
    def send_and_receive(self, messages, *, timeout):
        awaited, replies = set(self.grid.push_messages(messages)), []
        late = bool(awaited) and faults.get(str(self.strategy.coordinator.report.round)) == "late"
        while len(awaited) > late:
            came = list(self.grid.pull_messages(awaited))
            awaited -= {reply.metadata.reply_to_message_id for reply in came}
            replies += came
            time.sleep(0.05)
        return replies

class Watched(GroupedAveraging):
    def run(self, grid, rounds):
        return super().run(EventGrid(grid, self), rounds)
    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        partitions.update({node: int(state["p"]) for node, state in self.coordinator.replies.items()})
        if faults.get(str(self.coordinator.report.round)) == "late":
            open(over, "w").close()
        return result

def end(strategy):
    found["w"] = strategy.coordinator.state["w"].tolist()
    found["groups"] = [[[partitions[n] for n in g] for g in r.groups] for r in strategy.reports]
    found["lost"] = [{partitions[n]: why for n, why in r.lost.items()} for r in strategy.reports]
    found["bytes"] = [[r.bytes_down, r.bytes_up] for r in strategy.reports]

run_simulation(
    server_app(lambda context: Watched(first, server, minimum=4, groups=2, bits=bits, timeout=3600), 6, end),
    client_app(training, bits=bits), num_supernodes=4,
    # Two processes on any machine: one may have to wait for what the other does.
    backend_config={"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
print("found", json.dumps(found))
"""

HANG = 1800  # seconds: nothing waits for so long but what would wait for ever


def through_ray(tmp_path, bits, faults=None):
    environment = {**os.environ, "HOME": str(tmp_path), "FLWR_HOME": str(tmp_path / "flwr")}
    command = [sys.executable, "-I", "-c", PROGRAM, str(bits), json.dumps(faults or {}), str(tmp_path / "over")]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=HANG, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("found ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(lines[0][len("found ") :])


def test_equals_a_plain_loop(tmp_path):
    found = through_ray(tmp_path, 32)
    assert found["lost"] == [{}] * 6
    expected = plain_loop(found["groups"], found["lost"])
    assert max(abs(value - expected) for value in found["w"]) < 1e-12
    assert found["bytes"] == [[4 * 808] * 2] * 6


def test_packed_messages(tmp_path):
    found = through_ray(tmp_path, 4)
    expected = plain_loop(found["groups"], found["lost"])
    assert max(abs(value - expected) for value in found["w"]) < 0.05  # steps of a fifteenth of the difference
    assert found["bytes"][-1] == [4 * (50 + 4 + 8)] * 2


def test_a_lost_user_does_not_harm_the_round(tmp_path):
    found = through_ray(tmp_path, 32, {1: "nan", 2: "shape", 3: "error", 4: "late"})
    assert [list(lost) for lost in found["lost"]] == [[], ["1"], ["1"], ["1"], ["1"], []]
    reasons = ("NaN or an infinity", "w must be torch.float64 (100,), got torch.float32 (3,)", "battery empty")
    for lost, reason in zip(found["lost"][1:], (*reasons, "no answer"), strict=False):
        assert reason in lost["1"]
    assert max(abs(value - plain_loop(found["groups"], found["lost"])) for value in found["w"]) < 1e-12
    assert len(set(found["w"])) == 1
