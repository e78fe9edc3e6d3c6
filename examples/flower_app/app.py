"""A Flower application: digits, labels on the server alone, users that learn from consistency."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Context
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lowbit_ext import federated
from lowbit_ext.federated._simulate import Trainer, copy_of

BITS = 4
SETTINGS = federated.Settings(rounds=5, steps=8, groups=2, batch=32, learning_rate=0.2, threshold=0.8, flip=False)


def digits(users: int) -> tuple[Tensor, Tensor, federated.Partition]:
    """Images, labels and who has which."""
    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16, torch.from_numpy(bunch.target).long()
    split = federated.partition(labels, users, 0.4, labelled=100, generator=torch.Generator().manual_seed(0))
    return images, labels, split


def network() -> nn.Module:
    """The same first state everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))


def training(context: Context) -> Any:
    """A user's local training, on the part of the data that its node stands for."""
    user, users = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    images, _, split = digits(users)
    trainer = Trainer(network(), SETTINGS)

    def step(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        generator = trainer.generator("user", user, number)
        return trainer.unsupervised(state, images[split.users[user]], None, trainer.rate(number), 8, generator)

    return step


def strategy(context: Context) -> federated.GroupedAveraging:
    """The server: 300 supervised steps first, then rounds."""
    users = int(context.run_config["users"])
    images, labels, split = digits(users)
    trainer = Trainer(network(), SETTINGS)

    def supervise(state: dict[str, Tensor], number: int, steps: int = 8) -> dict[str, Tensor]:
        generator = trainer.generator("server", number)
        own, known = images[split.server], labels[split.server]
        return trainer.supervised(state, own, known, trainer.rate(max(number, 0)), steps, generator)

    def show(report: federated.RoundReport[int]) -> None:
        traffic = report.bytes_down + report.bytes_up
        print(f"round {report.round}: {traffic:,} bytes, lost {len(report.lost)}", flush=True)

    start = supervise(copy_of(trainer.model.state_dict()), -1, 300)
    return federated.GroupedAveraging(start, supervise, minimum=users, groups=2, bits=BITS, on_round=show)


def end(strategy: federated.GroupedAveraging) -> None:
    """Says what came of it."""
    images, labels, split = digits(len(strategy.coordinator.users))
    theirs = torch.cat(split.users)
    accuracy = Trainer(network(), SETTINGS).accuracy(strategy.coordinator.state, images[theirs], labels[theirs])
    print(f"accuracy on the users' images: {accuracy:.3f}", flush=True)


server = federated.server_app(strategy, SETTINGS.rounds, end)
client = federated.client_app(training, bits=BITS)
