"""Both ends of a round, whatever carries the messages between them: the coordinator's and the participant's."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from statistics import median_low
from typing import Generic

from torch import Tensor

from lowbit_ext.federated import wire
from lowbit_ext.federated.core import (
    STATISTICS_POLICIES,
    State,
    User,
    assign_groups,
    change,
    change_norm,
    check_reply,
    default_groups,
    gradient_diversity,
    group_average,
    is_statistic,
    keep_statistics,
)
from lowbit_ext.federated.wire import CompressedUpdate

LONGEST_REASON = 500  # characters, half from either end; a client's text may be of any length


@dataclasses.dataclass
class RoundReport(Generic[User]):
    """What happened in one round.

    Attributes:
        round: its number, from 0.
        groups: the users drawn, by group.
        lost: of those, the ones whose update was not used, and why.
        dropped: senders of messages that were none of this round's, and why: a user who was not drawn, a second answer,
            one to another round.
        diversity: Equation 8, of the changes of the server and of the users that arrived; by group, averaged.
        normalised_diversity: the same as in the paper's figures.
        bytes_down, bytes_up: of the messages to and from users.
        measures: what the driver adds, such as accuracies.
    """

    round: int
    groups: list[list[User]]
    lost: dict[User, str] = dataclasses.field(default_factory=dict)
    dropped: dict[User, str] = dataclasses.field(default_factory=dict)
    diversity: float = 0.0
    normalised_diversity: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    measures: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def drawn(self) -> list[User]:
        """All users drawn."""
        return [user for group in self.groups for user in group]

    @property
    def failed(self) -> bool:
        """Whether no user's update was used, so that the model stayed what it was."""
        return self.lost.keys() >= set(self.drawn)


class Participant:
    """A user's end: what it holds between rounds.

    Args:
        bits: of the updates it sends: 32, 4 or 1.
        error_feedback: whether what the coding loses is sent with the next update.
        statistics: of batch normalisation; "local": its own are kept.
        exact: names of tensors that are not coded; the coordinator's must be the same.
    """

    def __init__(
        self, bits: int = 32, error_feedback: bool = True, statistics: str = "average", exact: Collection[str] = ()
    ) -> None:
        self.bits, self.error_feedback, self.statistics, self.exact = bits, error_feedback, statistics, exact
        self.received: dict[str, Tensor] | None = None
        self.residual: dict[str, Tensor] | None = None
        self.own: State | None = None

    def receive(self, packed: CompressedUpdate) -> dict[str, Tensor]:
        """The state to train from.

        Raises:
            ValueError: a message that does not fit what the participant holds.
        """
        update = wire.decompress(packed)
        wire.check_layout("Participant: the message", packed.layout, wire.layout_of(update, packed.bits, self.exact))
        if packed.bits == 32:
            self.received = update
        elif self.received is None:
            raise ValueError("Participant: got a difference before any whole state")
        else:
            self.received = wire.apply(update, self.received, self.exact)
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
        update = wire.difference(state, self.received, self.exact)
        packed, self.residual = wire.compress(update, self.bits, self.error_feedback, self.residual, self.exact)
        return packed


class Coordinator(Generic[User]):
    """The server's end: draws users and groups, sends, receives, averages.

    Below 32 bits both directions carry differences to what the user holds, which the server follows: what one message
    loses is in the next difference. A user whose reply was lost gets the whole state next time.

    Whatever a user sends can only lose that user's update, never end the round: a message that cannot be read, other
    tensors than the model's, numbers that are not finite, variances below 0, and a change whose norm is more than
    `max_norm_ratio` times what is usual in the round. Usual is the norm of the server's own change, or the median of
    the server's and the users' where that is greater (of those that are not 0, the lower one of an even number); the
    running statistics of batch normalisation are compared apart. Such an update is left out as a whole rather than
    scaled down: nothing says that its direction is any better than its length.

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
        exact: names of tensors that travel uncoded, beside running statistics and integers, such as other buffers that
            must keep their sign.
        max_norm_ratio: see above; None: any finite update is used.
        max_failed_rounds: rounds in a row without any usable update that end the run; before, the model stays and the
            next round is begun.

    Attributes:
        state: of the averaged model.
        starts: from which each user begins its next round.
        report: of the present round.
        failed_rounds: how many there were in a row.

    Raises:
        ValueError: no users, more participants than users, or another setting out of range.
    """

    def __init__(
        self, state: State, users: Iterable[User], *, groups: int | None = None, participants: int | None = None,
        seed: int = 0, bits: int = 32, statistics: str = "average", skip: Collection[str] = (),
        recompute: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, exact: Collection[str] = (),
        max_norm_ratio: float | None = 10.0, max_failed_rounds: int = 3,
    ) -> None:
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
        if max_norm_ratio is not None and not max_norm_ratio > 0:
            raise ValueError(f"Coordinator: max_norm_ratio must be above 0 or None, got {max_norm_ratio}")
        if max_failed_rounds < 1:
            raise ValueError(f"Coordinator: max_failed_rounds must be at least 1, got {max_failed_rounds}")
        self.seed, self.bits, self.statistics, self.skip, self.recompute = seed, bits, statistics, skip, recompute
        self.exact, self.max_norm_ratio, self.max_failed_rounds = exact, max_norm_ratio, max_failed_rounds
        self.state: dict[str, Tensor] = dict(state)
        self.starts: dict[User, State] = dict.fromkeys(self.users, self.state)
        self.held: dict[User, State] = {}  # what each user is known to hold
        self.replies: dict[User, State] = {}
        self.report: RoundReport[User] = RoundReport(-1, [])
        self.failed_rounds = 0

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
            groups = assign_groups(drawn, min(self.groups, len(drawn)), rng) if drawn else []
        self.report = RoundReport(number, [list(group) for group in groups])
        self.replies = {}
        return self.report.drawn

    def send(self, user: User) -> CompressedUpdate:
        """The message that starts a user's round."""
        target = self.starts[user]
        if self.bits == 32 or user not in self.held:
            packed = wire.compress(target, 32)[0]
            self.held[user] = dict(target)
        else:
            update = wire.difference(target, self.held[user], self.exact)
            packed, _ = wire.compress(update, self.bits, error_feedback=False, exact=self.exact)
            self.held[user] = wire.apply(wire.decompress(packed), self.held[user], self.exact)
        self.report.bytes_down += packed.nbytes
        return packed

    def receive(self, user: User, packed: CompressedUpdate, number: int | None = None) -> None:
        """Takes a user's reply to the round of that number; one that must not be averaged is put down as lost."""
        if number is not None and number != self.report.round:
            self._drop(user, f"answers round {number} instead of {self.report.round}")
            return
        if not self._is_awaited(user):
            return
        try:
            state = self._state_of(user, packed)
        except Exception as error:  # whatever is in a reply must not end the round
            self._lose(user, str(error) or type(error).__name__)
            return
        self.report.bytes_up += packed.nbytes
        self.replies[user] = state

    def _state_of(self, user: User, packed: CompressedUpdate) -> State:
        """The state that a reply stands for, checked, where the server's is."""
        name = f"user {user}"
        wire.check_layout(name, packed.layout, wire.layout_of(self.state, packed.bits, self.exact))
        update = wire.decompress(packed)
        state = update if packed.bits == 32 else wire.apply(update, self.held[user], self.exact)
        check_reply(name, state, self.state)
        return {key: tensor.to(self.state[key].device) for key, tensor in state.items()}

    def lose(self, user: User, reason: str) -> None:
        """Puts down that a user's update did not come or cannot be used."""
        if self._is_awaited(user):
            self._lose(user, reason)

    def _is_awaited(self, user: User) -> bool:
        """Whether the first message of a user of this round is still to come; otherwise names who sent one."""
        if user not in self.report.drawn:
            self._drop(user, "was not drawn")
        elif user in self.replies or user in self.report.lost:
            self._drop(user, "answered before")
        else:
            return True
        return False

    def _drop(self, user: User, reason: str) -> None:
        self.report.dropped[user] = reason

    def _lose(self, user: User, reason: str) -> None:
        half = LONGEST_REASON // 2
        self.report.lost[user] = reason if len(reason) <= 2 * half else f"{reason[:half]} ... {reason[-half:]}"
        self.replies.pop(user, None)
        self.held.pop(user, None)

    def finish(self, server: State) -> RoundReport[User]:
        """Averages what arrived with the server's state. Where nothing did, all states stay what they were.

        Raises:
            RuntimeError: no update could be used in `max_failed_rounds` rounds in a row.
            ValueError: the server's state is not finite or of other tensors.
        """
        check_reply("the server's state", server, self.state)
        for user in self.report.drawn:
            if user not in self.replies and user not in self.report.lost:
                self._lose(user, "no answer")
        self._lose_outliers(server)
        if not self.replies:
            self._count_failure()
            return self.report
        self.failed_rounds = 0
        arrived = [[user for user in group if user in self.replies] for group in self.report.groups]
        groups = [group for group in arrived if group]
        self._measure_diversity(server, groups)
        total, means = group_average(server, self.replies, groups, self.statistics)
        if self.recompute is not None:
            total, means = self.recompute(total), [self.recompute(mean) for mean in means]
        self.state = total
        # A group of which nobody arrived goes on from the average of all.
        self.starts.update(dict.fromkeys(self.report.drawn, total))
        for group, mean in zip(groups, means, strict=True):
            whole = next(drawn for drawn in self.report.groups if group[0] in drawn)
            self.starts.update(dict.fromkeys(whole, mean))
        return self.report

    def _lose_outliers(self, server: State) -> None:
        """Puts down as lost whose change is too long."""
        if self.max_norm_ratio is None:
            return
        floats = [key for key, tensor in self.state.items() if tensor.is_floating_point()]
        kinds = {"change": [key for key in floats if not is_statistic(key)]}
        if self.statistics == "average":  # otherwise they are the user's own affair
            kinds["change of the running statistics"] = [key for key in floats if is_statistic(key)]
        for what, keys in kinds.items():
            own = change_norm(server, self.state, keys)
            norms = {user: change_norm(state, self.held[user], keys) for user, state in self.replies.items()}
            changed = [norm for norm in (own, *norms.values()) if 0 < norm < math.inf]
            usual = max(own, median_low(changed)) if changed else 0.0
            for user, norm in norms.items():
                if norm > self.max_norm_ratio * usual:
                    self._lose(user, f"its {what} has the norm {norm:.3g}, where {usual:.3g} is usual in the round")

    def _count_failure(self) -> None:
        self.failed_rounds += 1
        if self.failed_rounds < self.max_failed_rounds:
            return
        reasons = "; ".join(f"{user}: {reason}" for user, reason in list(self.report.lost.items())[:3])
        raise RuntimeError(
            f"round {self.report.round}: no user's update could be used, {self.failed_rounds} rounds in a row "
            f"({reasons or 'no users'})"
        )

    def _measure_diversity(self, server: State, groups: Sequence[Sequence[User]]) -> None:
        diversities = []
        for group in groups:
            changes = [change(server, self.state), *(change(self.replies[user], self.held[user]) for user in group)]
            diversities.append([gradient_diversity(changes, norm, self.skip) for norm in ("paper", "figures")])
        self.report.diversity, self.report.normalised_diversity = (
            sum(values) / len(values) for values in zip(*diversities, strict=True)
        )

