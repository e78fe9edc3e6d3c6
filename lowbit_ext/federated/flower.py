"""Grouped averaging as a Flower application: the strategy, the server's and the clients' app."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# Before Flower and Ray are imported: neither reports what is run here.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from lowbit_ext.federated import wire
from lowbit_ext.federated._simulate import LocalTraining
from lowbit_ext.federated.core import State
from lowbit_ext.federated.rounds import Coordinator, Participant, RoundReport
from lowbit_ext.federated.wire import CompressedUpdate

_NAME = "message"


def _to_record(packed: CompressedUpdate, number: int) -> ArrayRecord:
    # An array and not a configuration's bytes: Flower sends arrays in chunks. Its shape would be in 32 bits.
    array = Array(dtype="uint8", shape=(), stype="lowbit_ext.federated.wire", data=wire.to_bytes(packed, number))
    return ArrayRecord({_NAME: array})


def _from_record(record: Any, like: State | None, exact: Collection[str]) -> tuple[CompressedUpdate, int]:
    if not isinstance(record, ArrayRecord) or _NAME not in record:
        raise ValueError(f"from_content: the content must be an ArrayRecord with {_NAME!r}")
    return wire.from_bytes(record[_NAME].data, like, exact)


def to_content(packed: CompressedUpdate, number: int) -> RecordDict:
    """A message of a round as the content of one of Flower's."""
    return RecordDict({_NAME: _to_record(packed, number)})


def from_content(
    content: RecordDict, like: State | None = None, exact: Collection[str] = ()
) -> tuple[CompressedUpdate, int]:
    """Inverse of to_content. like, exact: see wire.from_bytes.

    Raises:
        TypeError, ValueError: the content is not that of to_content.
    """
    return _from_record(content.get(_NAME), like, exact)


class GroupedAveraging(FedAvg):
    """Flower strategy: each round every group's average goes to its users, and the server trains while they do.

    Args:
        state: the first state of everyone.
        server: the server's own training in each round.
        minimum: nodes to wait for before the first round. Later ones go on with those that are left.
        timeout: seconds for the replies of a round; later ones are lost.
        on_round: called with each round's report.
        options: groups, participants, seed, bits, statistics, skip, recompute, exact, max_norm_ratio,
            max_failed_rounds: see Coordinator.

    Attributes:
        coordinator: holds the averaged state and what each node holds.
        reports: one of each round.
    """

    def __init__(
        self, state: State, server: LocalTraining, *, minimum: int = 2, timeout: float = 3600,
        on_round: Callable[[RoundReport[int]], None] | None = None, **options: Any,
    ) -> None:
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
        self.start(grid, _to_record(wire.compress(self.coordinator.state, 32)[0], 0), rounds, self.timeout)
        self._worker.shutdown()
        return self.coordinator.state

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages. The server's training begins beside them."""
        self.coordinator.meet(self._wait_for_nodes(grid))
        drawn = self.coordinator.begin()
        number = self.coordinator.report.round
        messages = [
            Message(to_content(self.coordinator.send(node), number), dst_node_id=node, message_type=MessageType.TRAIN)
            for node in drawn
        ]
        self._training = self._worker.submit(self.server, dict(self.coordinator.state), number)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Averages what came."""
        assert self._training is not None
        for message in replies:
            self._take(message)
        trained = self._training.result()
        if trained is None:
            raise RuntimeError(f"round {self.coordinator.report.round}: the server's training returned nothing")
        report = self.coordinator.finish(trained)
        self.reports.append(report)
        if self.on_round is not None:
            self.on_round(report)
        measures = {"diversity": report.diversity, "normalised_diversity": report.normalised_diversity}
        counts = {"lost": len(report.lost), "bytes_up": report.bytes_up, "bytes_down": report.bytes_down}
        return None, MetricRecord({**measures, **counts})

    def _take(self, message: Message) -> None:
        """Hands a reply to the coordinator; whatever is wrong with it loses its user alone."""
        node = message.metadata.src_node_id
        try:
            if message.has_error():
                raise ValueError(message.error.reason or "the client failed")
            packed, number = from_content(message.content, self.coordinator.state, self.coordinator.exact)
        except Exception as error:
            self.coordinator.lose(node, str(error) or type(error).__name__)
        else:
            self.coordinator.receive(node, packed, number)

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        """The nodes of a round; none where all have gone and nobody comes in time."""
        minimum = 1 if self.reports else self.minimum
        deadline = time.monotonic() + self.timeout
        while True:
            nodes = sorted(grid.get_node_ids())
            if len(nodes) >= minimum:
                return nodes
            if time.monotonic() > deadline:
                if self.reports:
                    return nodes
                raise RuntimeError(
                    f"GroupedAveraging: {len(nodes)} of at least {minimum} nodes came within {self.timeout:g} s"
                )
            time.sleep(0.2)


def client_app(
    training: Callable[[Context], LocalTraining], *, bits: int = 32, error_feedback: bool = True,
    statistics: str = "average", exact: Collection[str] = (),
) -> ClientApp:
    """Flower app of a user. What it holds between rounds is in the node's context.

    Args:
        training: makes the local training of a node; context.node_config has what the node was started with, in a
            simulation "partition-id" and "num-partitions".
        bits, error_feedback, statistics, exact: see Participant; bits and exact must be the server's.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        participant = Participant(bits, error_feedback, statistics, exact)
        _restore(participant, context)
        packed, number = from_content(message.content)
        state = training(context)(participant.receive(packed), number)
        if state is None:
            raise RuntimeError("no answer")
        reply = to_content(participant.reply(state), number)
        _store(participant, context)
        return Message(reply, reply_to=message)

    return app


_HELD = ("received", "residual", "own")


def _store(participant: Participant, context: Context) -> None:
    for name in _HELD:
        state = getattr(participant, name)
        if state is not None and not (name == "own" and participant.statistics != "local"):
            context.state[name] = _to_record(wire.compress(state, 32)[0], 0)


def _restore(participant: Participant, context: Context) -> None:
    for name in _HELD:
        if name in context.state:
            packed, _ = _from_record(context.state[name], None, ())
            setattr(participant, name, wire.decompress(packed))


def server_app(
    strategy: Callable[[Context], GroupedAveraging], rounds: int,
    on_end: Callable[[GroupedAveraging], None] | None = None,
) -> ServerApp:
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
