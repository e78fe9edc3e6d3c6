"""Grouped averaging as a Flower application: the strategy, the server's and the clients' app."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# Before Flower and Ray are imported: neither reports what is run here.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from lowbit_ext.federated.core import State
from lowbit_ext.federated.rounds import Coordinator, Participant, RoundReport
from lowbit_ext.federated.simulate import LocalTraining
from lowbit_ext.federated.wire import CompressedUpdate

_PARTS = ("codes", "scales", "plain")
# numpy has no bfloat16: its bits travel as int16.
_AS_INTEGER = {torch.bfloat16: torch.int16}


def _to_arrays(state: State) -> ArrayRecord:
    return ArrayRecord(
        torch_state_dict={key: value.view(_AS_INTEGER.get(value.dtype, value.dtype)) for key, value in state.items()}
    )


def _from_arrays(record: ArrayRecord, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    return {key: tensor.view(dtypes[key]) for key, tensor in record.to_torch_state_dict().items()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_records(packed: CompressedUpdate, number: int) -> RecordDict:
    """A packed update as the content of a Flower message of a round."""
    content = RecordDict({part: _to_arrays(getattr(packed, part)) for part in _PARTS})
    content["about"] = ConfigRecord(
        {
            "round": number,
            "bits": packed.bits,
            "names": list(packed.shapes),
            "shapes": [",".join(map(str, shape)) for shape in packed.shapes.values()],
            "dtypes": [_dtype_name(dtype) for dtype in packed.dtypes.values()],
            "plain_names": list(packed.plain),
            "plain_dtypes": [_dtype_name(tensor.dtype) for tensor in packed.plain.values()],
        }
    )
    return content


def from_records(content: RecordDict) -> tuple[CompressedUpdate, int]:
    """Inverse of to_records.

    Raises:
        KeyError, ValueError: the content is not that of to_records.
    """
    about: Any = content["about"]
    names = about["names"]
    shapes = {
        name: tuple(int(size) for size in shape.split(",") if size)
        for name, shape in zip(names, about["shapes"], strict=True)
    }
    dtypes = {name: getattr(torch, dtype) for name, dtype in zip(names, about["dtypes"], strict=True)}
    plain = {n: getattr(torch, dtype) for n, dtype in zip(about["plain_names"], about["plain_dtypes"], strict=True)}
    records: Any = {part: content[part] for part in _PARTS}
    packed = CompressedUpdate(
        int(about["bits"]),
        _from_arrays(records["codes"], dict.fromkeys(names, torch.uint8)),
        _from_arrays(records["scales"], dict.fromkeys(names, torch.bfloat16)),
        _from_arrays(records["plain"], plain),
        shapes,
        dtypes,
    )
    return packed, int(about["round"])


class GroupedAveraging(FedAvg):
    """Flower strategy: each round every group's average goes to its users, and the server trains while they do.

    Args:
        state: the first state of everyone.
        server: the server's own training in each round.
        minimum: nodes to wait for before the first round.
        timeout: seconds for the replies of a round; later ones are lost.
        on_round: called with each round's report.
        options: groups, participants, seed, bits, statistics, skip, recompute: see Coordinator.

    Attributes:
        coordinator: holds the averaged state and what each node holds.
        reports: one of each round.
    """

    def __init__(
        self, state: State, server: LocalTraining, *, minimum: int = 2, timeout: float = 3600,
        on_round: Callable[[RoundReport[int]], None] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(fraction_evaluate=0.0, min_available_nodes=minimum, min_train_nodes=minimum)
        self.server, self.minimum, self.timeout, self.on_round = server, minimum, timeout, on_round
        self.coordinator: Coordinator[int] = Coordinator(state, range(minimum), **options)
        self.coordinator.meet([])
        self.reports: list[RoundReport[int]] = []
        self._worker = ThreadPoolExecutor(1)
        self._training: Future[State | None] | None = None

    def summary(self) -> None:
        """Flower's log of a strategy's settings; the reports say more."""

    def run(self, grid: Grid, rounds: int) -> dict[str, Tensor]:
        """All rounds; returns the averaged state."""
        self.start(grid, _to_arrays(self.coordinator.state), rounds, self.timeout)
        self._worker.shutdown()
        return self.coordinator.state

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages. The server's training begins beside them."""
        nodes = _wait_for_nodes(grid, self.minimum, self.timeout)
        self.coordinator.meet(nodes)
        drawn = self.coordinator.begin()
        number = self.coordinator.report.round
        messages = [
            Message(to_records(self.coordinator.send(node), number), dst_node_id=node, message_type=MessageType.TRAIN)
            for node in drawn
        ]
        self._training = self._worker.submit(self.server, dict(self.coordinator.state), number)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Averages what came. Raises RuntimeError where nothing did."""
        assert self._training is not None
        for message in replies:
            node = message.metadata.src_node_id
            if message.has_error():
                self.coordinator.lose(node, message.error.reason or "the client failed")
                continue
            try:
                packed, number = from_records(message.content)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                self.coordinator.lose(node, f"unreadable message: {error}")
                continue
            if number == self.coordinator.report.round:
                self.coordinator.receive(node, packed)
        trained = self._training.result()
        if trained is None:
            raise RuntimeError(f"round {self.coordinator.report.round}: the server's training returned nothing")
        report = self.coordinator.finish(trained)
        self.reports.append(report)
        if self.on_round is not None:
            self.on_round(report)
        measures = {"diversity": report.diversity, "normalised_diversity": report.normalised_diversity}
        counts = {"lost": len(report.lost), "bytes_up": report.bytes_up, "bytes_down": report.bytes_down}
        return _to_arrays(self.coordinator.state), MetricRecord({**measures, **counts})


def _wait_for_nodes(grid: Grid, minimum: int, timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= minimum:
            return nodes
        if time.monotonic() > deadline:
            raise RuntimeError(f"GroupedAveraging: {len(nodes)} of at least {minimum} nodes came within {timeout:g} s")
        time.sleep(0.2)


def client_app(
    training: Callable[[Context], LocalTraining], *, bits: int = 32, error_feedback: bool = True,
    statistics: str = "average",
) -> ClientApp:  # fmt: skip
    """Flower app of a user. What it holds between rounds is in the node's context.

    Args:
        training: makes the local training of a node; context.node_config has what the node was started with, in a
            simulation "partition-id" and "num-partitions".
        bits, error_feedback, statistics: see Participant; bits must be the server's.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        participant = Participant(bits, error_feedback, statistics)
        _restore(participant, context)
        packed, number = from_records(message.content)
        state = training(context)(participant.receive(packed), number)
        if state is None:
            raise RuntimeError("no answer")
        reply = to_records(participant.reply(state), number)
        _store(participant, context)
        return Message(reply, reply_to=message)

    return app


_HELD = ("received", "residual", "own")


def _store(participant: Participant, context: Context) -> None:
    for name in _HELD:
        state = getattr(participant, name)
        if state is not None and not (name == "own" and participant.statistics != "local"):
            context.state[name] = _to_arrays(state)
            context.state[name + " dtypes"] = ConfigRecord({key: _dtype_name(x.dtype) for key, x in state.items()})


def _restore(participant: Participant, context: Context) -> None:
    for name in _HELD:
        if name in context.state:
            names: Any = context.state[name + " dtypes"]
            record: Any = context.state[name]
            setattr(participant, name, _from_arrays(record, {k: getattr(torch, v) for k, v in names.items()}))


def server_app(
    strategy: Callable[[Context], GroupedAveraging], rounds: int,
    on_end: Callable[[GroupedAveraging], None] | None = None,
) -> ServerApp:  # fmt: skip
    """Flower app of the server.

    Args:
        strategy: makes the strategy.
        rounds: number of rounds.
        on_end: called with the strategy after the last, to keep its state and reports.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        grouped = strategy(context)
        grouped.run(grid, rounds)
        if on_end is not None:
            on_end(grouped)

    return app
