"""Federated learning in one process: the driver of rounds, and the training of server and users on images."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_ext.federated import augment
from lowbit_ext.federated.checkpoint import Checkpoint, fingerprint
from lowbit_ext.federated.core import State, consistency_loss, norm_parameters, recompute_statistics
from lowbit_ext.federated.rounds import Coordinator, Participant, RoundReport

OBJECTIVES = ("consistency", "self_training")

# The local training of one participant: (state, round) to the new state, None where it never answers.
LocalTraining = Callable[[dict[str, Tensor], int], "State | None"]


def run_round(
    coordinator: Coordinator[int], participants: Mapping[int, Participant], server: LocalTraining,
    users: Mapping[int, LocalTraining], *, groups: Sequence[Sequence[int]] | None = None,
    deadline: float | None = None,
) -> RoundReport[int]:
    """One round in this process: users one after another, then the server, then the average.

    A user that returns None, raises an exception, takes longer than `deadline` seconds or returns a state that must not
    be averaged (see Coordinator) is put down as lost, and the round goes on; without any user the model stays.

    Raises:
        RuntimeError: no user's update could be used in as many rounds in a row as the coordinator allows; or the
            server's training returned nothing.
    """
    number = coordinator.report.round + 1
    for user in coordinator.begin(groups):
        message = coordinator.send(user)
        began = time.monotonic()
        try:
            state = users[user](participants[user].receive(message), number)
            reply = None if state is None else participants[user].reply(state)
        except Exception as error:  # whatever a user's code does must not end the round
            coordinator.lose(user, f"{type(error).__name__}: {error}")
            continue
        if reply is None:
            coordinator.lose(user, "no answer")
        elif deadline is not None and time.monotonic() - began > deadline:
            coordinator.lose(user, f"later than {deadline:g} s")
        else:
            coordinator.receive(user, reply, number)
    trained = server(dict(coordinator.state), number)
    if trained is None:
        raise RuntimeError(f"round {number}: the server's training returned nothing")
    return coordinator.finish(trained)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a simulation trains.

    Attributes:
        rounds, steps: communication rounds, and local SGD steps of everyone in each.
        groups: S, 1 for FedAvg with server; None: about ten participants in a group.
        participants: users drawn each round; None: all.
        objective: of users: "consistency" (strong against weak augmentation) or "self_training" (weak against itself).
        threshold: tau, confidence from which a label counts.
        learning_rate, momentum, weight_decay: Nesterov SGD, begun anew every round; the rate falls as a cosine.
        batch: samples a step.
        warm_up: supervised steps of the server before the first round.
        alternate: supervised steps of the server on each averaged model before it is sent (alternate training).
        statistics: of batch normalisation: "average", "local" (users keep their own) or "recompute" (measured on the
            server's images after every average).
        bits: of every message: 32, 4 or 1. error_feedback: of the users' updates.
        flip: whether augmentation may mirror images.
        drop: part of the users' replies that are lost, for rehearsing.
        deadline: seconds for a user's reply, or None.
        max_norm_ratio: how many times the usual norm of a change a user's may be and still be used; see Coordinator.
        max_failed_rounds: rounds in a row without any user's update that end the run.
        seed: of everything that is drawn.
    """

    rounds: int
    steps: int = 16
    groups: int | None = None
    participants: int | None = None
    objective: str = "consistency"
    threshold: float = 0.95
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 64
    warm_up: int = 0
    alternate: int = 0
    statistics: str = "average"
    bits: int = 32
    error_feedback: bool = True
    flip: bool = True
    drop: float = 0.0
    deadline: float | None = None
    max_norm_ratio: float | None = 10.0
    max_failed_rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Settings: objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        for name in ("rounds", "steps", "warm_up", "alternate"):
            if getattr(self, name) < 0:
                raise ValueError(f"Settings: {name} must not be negative, got {getattr(self, name)}")
        if self.batch < 1:
            raise ValueError(f"Settings: batch must be at least 1, got {self.batch}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"Settings: drop must be from 0 to below 1, got {self.drop}")


class Trainer:
    """Local training of server and users on images; the model is one that all of them borrow in turn."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.labels_kept = self.labels_right = self.labels_seen = 0

    def generator(self, *names: object) -> torch.Generator:
        """One for a purpose, the same in every run and on every side."""
        seed = hash_of(self.settings.seed, *names)
        return torch.Generator().manual_seed(seed)

    def rate(self, number: int) -> float:
        """Learning rate of a round."""
        return self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * number / max(self.settings.rounds, 1)))

    def train(
        self, state: State, rate: float, steps: int, generator: torch.Generator, samples: int,
        loss_of: Callable[[Tensor, torch.Generator], Tensor],
    ) -> dict[str, Tensor]:
        """Steps of SGD from a state. loss_of: of the samples of these indices."""
        settings = self.settings
        self.model.load_state_dict(state)
        self.model.train()
        optimizer = torch.optim.SGD(
            self.model.parameters(), rate, settings.momentum, weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        for _ in range(steps):
            index = torch.randint(samples, (settings.batch,), generator=generator, device="cpu")
            optimizer.zero_grad()
            loss_of(index, generator).backward()
            optimizer.step()
        return copy_of(self.model.state_dict())

    def supervised(
        self, state: State, images: Tensor, labels: Tensor, rate: float, steps: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The server's training: cross entropy of weakly augmented images."""

        def loss_of(index: Tensor, generator: torch.Generator) -> Tensor:
            x = augment.weak(images[index], generator, flip=self.settings.flip)
            return F.cross_entropy(self.model(x), labels[index])

        return self.train(state, rate, steps, generator, len(images), loss_of)

    def unsupervised(
        self, state: State, images: Tensor, labels: Tensor | None, rate: float, steps: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A user's training. Its true labels only measure the labels that it makes."""

        def loss_of(index: Tensor, generator: torch.Generator) -> Tensor:
            chosen, flip = images[index], self.settings.flip
            weak = augment.weak(chosen, generator, flip=flip)
            if self.settings.objective == "consistency":
                # One pass over both, so that batch normalisation sees both.
                both = self.model(torch.cat([weak, augment.strong(chosen, generator, flip=flip)]))
                logits, trained = both.chunk(2)
            else:
                logits = trained = self.model(weak)
            if labels is not None:
                confidence, made = logits.detach().softmax(1).max(1)
                kept = confidence >= self.settings.threshold
                self.labels_seen += len(index)
                self.labels_kept += int(kept.sum())
                self.labels_right += int((made == labels[index])[kept].sum())
            return consistency_loss(logits, trained, self.settings.threshold)

        return self.train(state, rate, steps, generator, len(images), loss_of)

    def recompute(self, state: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """A state with the statistics of batch normalisation that these images have."""
        self.model.load_state_dict(state)
        recompute_statistics(self.model, images.split(500))
        return copy_of(self.model.state_dict())

    def label_measures(self) -> dict[str, float]:
        """How many labels users made, of the images since the last call, and how many of them are right."""
        seen, kept, right = self.labels_seen, self.labels_kept, self.labels_right
        self.labels_kept = self.labels_right = self.labels_seen = 0
        return {"labels_kept": kept / seen, "label_accuracy": right / max(kept, 1)} if seen else {}

    @torch.no_grad()
    def accuracy(self, state: State, images: Tensor, labels: Tensor) -> float:
        """Part of the images that a state classifies correctly."""
        self.model.load_state_dict(state)
        self.model.eval()
        right = sum(
            int((self.model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
        return right / max(len(images), 1)


def hash_of(*names: object) -> int:
    """63 bits from names, the same in every process."""
    import hashlib

    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def copy_of(state: State) -> dict[str, Tensor]:
    """A state that later training does not change."""
    return {key: tensor.detach().clone() for key, tensor in state.items()}


@dataclasses.dataclass
class Simulation:
    """Result of simulate: the final state of the averaged model, and a report a round."""

    state: dict[str, Tensor]
    history: list[RoundReport[int]]


def simulate(
    model: nn.Module,
    server: tuple[Tensor, Tensor],
    users: Sequence[Tensor],
    settings: Settings,
    *,
    user_labels: Sequence[Tensor] | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    test_every: int = 1,
    checkpoint: str | Path | None = None,
    on_round: Callable[[RoundReport[int]], None] | None = None,
) -> Simulation:
    """Semi-supervised federated learning of server and users, one after another in this process.

    The same settings give the same states, bit for bit, on one machine and number of threads.

    Args:
        model: where everyone starts. It is not changed.
        server: images (N, C, H, W) in [0, 1] and labels of the server.
        users: images of each user.
        settings: see Settings.
        user_labels: true labels of the users' images, only to measure the labels that users make.
        test: images and labels; every test_every rounds and at the end the averaged model's accuracy on them is added
            to the report as "accuracy".
        checkpoint: file that is written after every round, and read at the start: a run that was interrupted goes on
            from there, and one that was finished is extended to `rounds` if these are more. The rate of the rounds
            still to come falls as that of all `rounds`. The file holds the run of this model's tensors, these users
            and images, and these settings, and is refused for any other.
        on_round: called with each new report, for a progress bar.

    Returns:
        Simulation. Measures of a report: "accuracy"; "label_accuracy" and "labels_kept", of the users' labels.

    Raises:
        ValueError: settings out of range, no users; a checkpoint that is damaged, another run's, or of more rounds.
        RuntimeError: max_failed_rounds in a row in which no user's update could be used; a checkpoint that another run
            writes.
        OSError: the checkpoint cannot be written; the one before is left as it was.
    """
    _check_users(users, user_labels)
    trainer = Trainer(copy.deepcopy(model), settings)
    first = copy_of(model.state_dict())
    exact = {name for name, _ in model.named_buffers()}
    recompute = functools.partial(trainer.recompute, images=server[0])
    coordinator = Coordinator(
        first, range(len(users)), groups=settings.groups, participants=settings.participants, seed=settings.seed,
        bits=settings.bits, statistics=settings.statistics, skip=norm_parameters(model),
        recompute=recompute if settings.statistics == "recompute" else None, exact=exact,
        max_norm_ratio=settings.max_norm_ratio, max_failed_rounds=settings.max_failed_rounds,
    )
    participants = {
        user: Participant(settings.bits, settings.error_feedback, settings.statistics, exact)
        for user in range(len(users))
    }
    server_training = _server_training(trainer, server)
    user_trainings = {
        user: _user_training(trainer, user, images, None if user_labels is None else user_labels[user])
        for user, images in enumerate(users)
    }
    history: list[RoundReport[int]] = []
    with contextlib.ExitStack() as stack:
        file = None
        if checkpoint is not None:
            identity = fingerprint(first, server, users, dataclasses.asdict(settings))
            file = stack.enter_context(Checkpoint(checkpoint, identity))
        if file is not None and file.load(coordinator, participants, history):
            if len(history) > settings.rounds:
                raise ValueError(
                    f"simulate: {checkpoint} holds {len(history)} rounds, more than {settings.rounds} of the settings"
                )
        elif settings.warm_up:
            _warm_up(coordinator, trainer, server)
        for number in range(len(history), settings.rounds):
            report = run_round(coordinator, participants, server_training, user_trainings, deadline=settings.deadline)
            if settings.alternate and not report.failed:
                _alternate(coordinator, trainer, server)
            report.measures.update(trainer.label_measures())
            if test is not None and ((number + 1) % test_every == 0 or number + 1 == settings.rounds):
                report.measures["accuracy"] = trainer.accuracy(coordinator.state, *test)
            history.append(report)
            if file is not None:
                file.save(coordinator, participants, history)
            if on_round is not None:
                on_round(report)
    return Simulation(coordinator.state, history)


def _check_users(users: Sequence[Tensor], user_labels: Sequence[Tensor] | None) -> None:
    if not users or any(len(images) == 0 for images in users):
        raise ValueError("simulate: there must be users, and each must have images")
    if user_labels is not None and [len(x) for x in users] != [len(y) for y in user_labels]:
        raise ValueError("simulate: user_labels must have one label an image of each user")


def _server_training(trainer: Trainer, server: tuple[Tensor, Tensor]) -> LocalTraining:
    """Of a round, on the server's images and labels."""

    def run(state: dict[str, Tensor], number: int) -> State:
        generator = trainer.generator("server", number)
        return trainer.supervised(state, *server, trainer.rate(number), trainer.settings.steps, generator)

    return run


def _user_training(trainer: Trainer, user: int, images: Tensor, labels: Tensor | None) -> LocalTraining:
    """Of a round, on one user's images; None where the reply is to be lost."""

    def run(state: dict[str, Tensor], number: int) -> State | None:
        settings, generator = trainer.settings, trainer.generator("user", user, number)
        if settings.drop:
            drawn = torch.rand((), generator=generator, dtype=torch.float32, device="cpu")
            if float(drawn) < settings.drop:
                return None
        return trainer.unsupervised(state, images, labels, trainer.rate(number), settings.steps, generator)

    return run


def _warm_up(coordinator: Coordinator[int], trainer: Trainer, server: tuple[Tensor, Tensor]) -> None:
    """Trains the first model on the server, before anyone starts from it."""
    settings, generator = trainer.settings, trainer.generator("warm-up")
    warm = trainer.supervised(coordinator.state, *server, settings.learning_rate, settings.warm_up, generator)
    coordinator.state = warm
    coordinator.starts = dict.fromkeys(coordinator.users, warm)


def _alternate(coordinator: Coordinator[int], trainer: Trainer, server: tuple[Tensor, Tensor]) -> None:
    """Trains what a round gave on the server: the average of all and, of several groups, each group's."""
    number, groups = coordinator.report.round, coordinator.report.groups
    averages = [coordinator.state, *([coordinator.starts[group[0]] for group in groups] if len(groups) > 1 else [])]
    tuned = [
        trainer.supervised(
            state, *server, trainer.rate(number), trainer.settings.alternate,
            trainer.generator("alternate", number, i),
        )
        for i, state in enumerate(averages)
    ]
    coordinator.state = tuned[0]
    for group, state in zip(groups, tuned[1:] or tuned, strict=True):
        coordinator.starts.update(dict.fromkeys(group, state))
