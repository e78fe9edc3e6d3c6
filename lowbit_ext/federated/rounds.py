"""Both ends of a round, whatever carries the messages between them: the coordinator's and the participant's."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Generic

from torch import Tensor

from lowbit_ext.federated import wire
from lowbit_ext.federated.core import (
    STATISTICS_POLICIES,
    State,
    User,
    assign_groups,
    check_reply,
    default_groups,
    gradient_diversity,
    group_average,
    keep_statistics,
)
from lowbit_ext.federated.wire import CompressedUpdate


@dataclasses.dataclass
class RoundReport(Generic[User]):
    """What happened in one round.

    Attributes:
        round: its number, from 0.
        groups: the users drawn, by group.
        lost: of those, the ones whose update was not used, and why.
        diversity: Equation 8, of the changes of the server and of the users that arrived; by group, averaged.
        normalised_diversity: the same as in the paper's figures.
        bytes_down, bytes_up: of the messages to and from users.
        measures: what the driver adds, such as accuracies.
    """

    round: int
    groups: list[list[User]]
    lost: dict[User, str] = dataclasses.field(default_factory=dict)
    diversity: float = 0.0
    normalised_diversity: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    measures: dict[str, float] = dataclasses.field(default_factory=dict)


class Participant:
    """A user's end: what it holds between rounds.

    Args:
        bits: of the updates it sends: 32, 4 or 1.
        error_feedback: whether what the packing loses is sent with the next update.
        statistics: of batch normalisation; "local": its own are kept.
    """

    def __init__(self, bits: int = 32, error_feedback: bool = True, statistics: str = "average") -> None:
        self.bits, self.error_feedback, self.statistics = bits, error_feedback, statistics
        self.received: dict[str, Tensor] | None = None
        self.residual: dict[str, Tensor] | None = None
        self.own: State | None = None

    def receive(self, packed: CompressedUpdate) -> dict[str, Tensor]:
        """The state to train from."""
        update = wire.decompress(packed)
        if packed.bits == 32:
            self.received = update
        elif self.received is None:
            raise ValueError("Participant: got a difference before any whole state")
        else:
            self.received = wire.apply(update, self.received)
        if self.statistics == "local" and self.own is not None:
            return keep_statistics(self.received, self.own)
        return dict(self.received)

    def reply(self, state: State) -> CompressedUpdate:
        """The message about the state after training."""
        self.own = state
        if self.bits == 32:
            return wire.compress(state, 32)[0]
        if self.received is None:
            raise ValueError("Participant: trained before it received a state")
        packed, self.residual = wire.compress(
            wire.difference(state, self.received), self.bits, self.error_feedback, self.residual
        )
        return packed


class Coordinator(Generic[User]):
    """The server's end: draws users and groups, sends, receives, averages.

    Below 32 bits both directions carry differences to what the user holds, which the server follows: what one message
    loses is in the next difference. A user whose reply was lost gets the whole state next time.

    Args:
        state: the first state of the server and all users.
        users: all there are.
        groups: S; default: such that a group holds about ten participants.
        participants: users drawn each round; default all.
        seed: of the draws.
        bits: of both directions: 32, 4 or 1.
        statistics: of batch normalisation, as in group_average.
        skip: names that the diversity leaves out.
        recompute: for statistics "recompute": measures them for a state.

    Raises:
        ValueError: no users, more participants than users, or another setting out of range.
    """

    def __init__(
        self, state: State, users: Iterable[User], *, groups: int | None = None, participants: int | None = None,
        seed: int = 0, bits: int = 32, statistics: str = "average", skip: Collection[str] = (),
        recompute: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.users = list(users)
        self.participants = len(self.users) if participants is None else participants
        if not 1 <= self.participants <= len(self.users):
            raise ValueError(
                f"Coordinator: participants must be 1 to {len(self.users)}, the number of users, got {participants}"
            )
        self.groups = default_groups(self.participants) if groups is None else groups
        if not 1 <= self.groups <= self.participants:
            raise ValueError(f"Coordinator: groups must be 1 to {self.participants} participants, got {groups}")
        if bits not in wire.WIRE_BITS:
            raise ValueError(f"Coordinator: bits must be one of {', '.join(map(str, wire.WIRE_BITS))}, got {bits}")
        if statistics not in STATISTICS_POLICIES:
            raise ValueError(
                f"Coordinator: statistics must be one of {', '.join(STATISTICS_POLICIES)}, got {statistics!r}"
            )
        if (statistics == "recompute") != (recompute is not None):
            raise ValueError('Coordinator: recompute must be given for statistics "recompute" and for no other')
        self.seed, self.bits, self.statistics, self.skip, self.recompute = seed, bits, statistics, skip, recompute
        self.state: dict[str, Tensor] = dict(state)
        self.starts: dict[User, State] = dict.fromkeys(self.users, self.state)
        self.held: dict[User, State] = {}  # what each user is known to hold
        self.replies: dict[User, State] = {}
        self.report: RoundReport[User] = RoundReport(-1, [])

    def meet(self, users: Iterable[User]) -> None:
        """Takes these for all users there are; new ones start from the averaged state."""
        self.users = list(users)
        for user in self.users:
            self.starts.setdefault(user, self.state)

    def begin(self, groups: Sequence[Sequence[User]] | None = None) -> list[User]:
        """Starts the next round; returns the users to send to. groups: instead of drawn ones."""
        number = self.report.round + 1
        if groups is None:
            rng = random.Random(f"{self.seed} {number}")
            drawn = rng.sample(self.users, min(self.participants, len(self.users)))
            groups = assign_groups(drawn, min(self.groups, len(drawn)), rng)
        self.report = RoundReport(number, [list(group) for group in groups])
        self.replies = {}
        return [user for group in self.report.groups for user in group]

    def send(self, user: User) -> CompressedUpdate:
        """The message that starts a user's round."""
        target = self.starts[user]
        if self.bits == 32 or user not in self.held:
            packed = wire.compress(target, 32)[0]
            self.held[user] = dict(target)
        else:
            packed, _ = wire.compress(wire.difference(target, self.held[user]), self.bits, error_feedback=False)
            self.held[user] = wire.apply(wire.decompress(packed), self.held[user])
        self.report.bytes_down += packed.nbytes
        return packed

    def receive(self, user: User, packed: CompressedUpdate) -> None:
        """Takes a user's reply; one that must not be averaged is put down as lost."""
        try:
            update = wire.decompress(packed)
            state = update if packed.bits == 32 else wire.apply(update, self.held[user])
            check_reply(f"user {user}", state, self.state)
        except (KeyError, RuntimeError, ValueError) as error:
            self.lose(user, str(error))
            return
        self.report.bytes_up += packed.nbytes
        self.replies[user] = state

    def lose(self, user: User, reason: str) -> None:
        """Puts down that a user's update did not come or cannot be used."""
        self.report.lost[user] = reason
        self.replies.pop(user, None)
        self.held.pop(user, None)

    def finish(self, server: State) -> RoundReport[User]:
        """Averages what arrived with the server's state.

        Raises:
            RuntimeError: no update arrived. The states stay what they were.
            ValueError: the server's state is not finite or of other tensors.
        """
        check_reply("the server's state", server, self.state)
        for group in self.report.groups:
            for user in group:
                if user not in self.replies and user not in self.report.lost:
                    self.lose(user, "no answer")
        if not self.replies:
            reasons = "; ".join(f"{user}: {reason}" for user, reason in list(self.report.lost.items())[:3])
            raise RuntimeError(f"round {self.report.round}: no user's update could be used ({reasons})")
        arrived = [[user for user in group if user in self.replies] for group in self.report.groups]
        groups = [group for group in arrived if group]
        diversities = []
        for group in groups:
            changes = [wire.difference(server, self.state)]
            changes += [wire.difference(self.replies[user], self.held[user]) for user in group]
            diversities.append([gradient_diversity(changes, norm, self.skip) for norm in ("paper", "figures")])
        self.report.diversity, self.report.normalised_diversity = (
            sum(values) / len(values) for values in zip(*diversities, strict=True)
        )
        total, means = group_average(server, self.replies, groups, self.statistics)
        if self.recompute is not None:
            total, means = self.recompute(total), [self.recompute(mean) for mean in means]
        self.state = total
        for group in self.report.groups:  # a group of which nobody arrived goes on from the average of all
            self.starts.update(dict.fromkeys(group, total))
        for group, mean in zip(groups, means, strict=True):
            whole = next(drawn for drawn in self.report.groups if group[0] in drawn)
            self.starts.update(dict.fromkeys(whole, mean))
        return self.report
