"""The Flower application: the same numbers as the driver in one process, and faults, through Ray."""

import json
import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("flwr", reason='needs Flower: pip install "lowbit-ext[federated]"')

# In a process of its own: Ray starts processes, and must not outlive the test.
PROGRAM = """
import json, math, sys, time
import torch
from flwr.simulation import run_simulation
from lowbit_ext.federated import GroupedAveraging, client_app, server_app

bits, fault = int(sys.argv[1]), sys.argv[2]

def training(context):
    p = int(context.node_config["partition-id"])
    def run(state, number):
        if p == 1 and number == 1:
            if fault == "nan":
                return {key: value * math.nan for key, value in state.items()}
            if fault == "shape":
                return {"w": torch.zeros(3), "p": state["p"]}
            if fault == "error":
                raise OSError("battery empty")
            if fault == "late":
                time.sleep(45)
        # "p" tells the test which partition a node has.
        return {"w": state["w"] + 0.5 * (p - state["w"]), "p": torch.full_like(state["p"], p)}
    return run

def server(state, number):
    return {"w": state["w"] + 0.5 * (10 - state["w"]), "p": torch.zeros_like(state["p"])}

first = {"w": torch.zeros(100, dtype=torch.float64), "p": torch.zeros(1, dtype=torch.float64)}
partitions, found = {}, {}

class Watched(GroupedAveraging):
    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        partitions.update({node: int(state["p"]) for node, state in self.coordinator.replies.items()})
        return result

def end(strategy):
    found["w"] = strategy.coordinator.state["w"].tolist()
    found["groups"] = [[[partitions.get(n, 1) for n in g] for g in r.groups] for r in strategy.reports]
    found["lost"] = [{partitions.get(n, 1): why for n, why in r.lost.items()} for r in strategy.reports]
    found["bytes"] = [[r.bytes_down, r.bytes_up] for r in strategy.reports]

def strategy(context):
    timeout = 30 if fault == "late" else 120
    return Watched(first, server, minimum=4, groups=2, bits=bits, timeout=timeout)

run_simulation(
    server_app(strategy, 5, end), client_app(training, bits=bits), num_supernodes=4,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
print("found", json.dumps(found))
"""


def through_flower(tmp_path, bits, fault):
    environment = {**os.environ, "HOME": str(tmp_path), "FLWR_HOME": str(tmp_path / "flwr")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bits), fault],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=False,
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.startswith("found ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(lines[0][len("found ") :])


def plain_loop(groups_of_rounds, lost):
    """The rounds in plain arithmetic, with the groups that were drawn and without the users that were lost."""
    server, users = 0.0, [0.0] * 4
    for groups, gone in zip(groups_of_rounds, lost, strict=True):
        moved = server + 0.5 * (10 - server)
        trained = [value + 0.5 * (p - value) for p, value in enumerate(users)]
        means = []
        for group in groups:
            came = [trained[k] for k in group if str(k) not in gone]
            if came:
                means.append((moved + sum(came)) / (len(came) + 1))
                for k in group:
                    users[k] = means[-1]
        server = sum(means) / len(means)
    return server


def test_equals_a_plain_loop(tmp_path):
    found = through_flower(tmp_path, 32, "none")
    assert found["lost"] == [{}] * 5
    expected = plain_loop(found["groups"], found["lost"])
    assert max(abs(value - expected) for value in found["w"]) < 1e-12
    assert found["bytes"] == [[4 * 808] * 2] * 5


def test_packed_messages(tmp_path):
    found = through_flower(tmp_path, 4, "none")
    expected = plain_loop(found["groups"], found["lost"])
    assert max(abs(value - expected) for value in found["w"]) < 0.05  # steps of a seventh of the difference
    assert found["bytes"][-1] == [4 * (50 + 2 + 8)] * 2


@pytest.mark.parametrize(("fault", "reason"), [
    ("nan", "w has a NaN or an infinity"), ("shape", "w must be torch.float64 (100,), got torch.float32 (3,)"),
    ("error", "battery empty"), ("late", ""),
])  # fmt: skip
def test_a_lost_user_does_not_harm_the_round(tmp_path, fault, reason):
    found = through_flower(tmp_path, 32, fault)
    assert [list(lost) for lost in found["lost"]] == [[], ["1"], [], [], []]
    assert reason in found["lost"][1]["1"]
    assert all(math.isfinite(value) for value in found["w"])
    assert max(abs(value - plain_loop(found["groups"], found["lost"])) for value in found["w"]) < 1e-12
    assert len(set(found["w"])) == 1
