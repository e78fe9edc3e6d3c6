"""Training by epochs, which goes on from its checkpoint."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
from inference import accuracy_percent, predict


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, sets: tuple[data.Set, data.Set], *,
    epochs: int, batch: int, orders: Iterable[Tensor], checkpoint: Path, on_step: Callable[[int], None],
    on_epoch: Callable[[list[float]], None],
) -> dict[str, Any]:
    """Trains a classifier on cross-entropy, from the checkpoint if there is one.

    Args:
        schedule: of the learning rate, stepped after every batch.
        sets: images and labels for training and for test.
        orders: the order of the training images in every epoch; a last batch that is not full is left out, for one
            image would leave batch norm without a variance.
        checkpoint: written after every epoch. Its name must tell it from those of other trainings.
        on_step, on_epoch: called with the number of steps that were done, those of the checkpoint as one call, and
            with the test accuracies so far.

    Returns:
        seconds, and for every epoch train_loss, the mean, and test_accuracy_percent.
    """
    (images, labels), (test_images, test_labels) = sets
    steps = len(images) // batch
    history: dict[str, Any] = {"seconds": 0.0, "train_loss": [], "test_accuracy_percent": []}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        history = state.pop("history")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        on_step(steps * len(history["train_loss"]))
    for order in itertools.islice(orders, len(history["train_loss"]), epochs):
        start = time.perf_counter()
        model.train()
        total = 0.0
        for chosen in order.split(batch)[:steps]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            on_step(1)
        history["train_loss"].append(total / steps)
        history["test_accuracy_percent"].append(accuracy_percent(predict(model, test_images), test_labels))
        history["seconds"] += time.perf_counter() - start
        with common.whole_file(checkpoint) as unfinished:
            torch.save({**{name: part.state_dict() for name, part in parts.items()}, "history": history}, unfinished)
        on_epoch(history["test_accuracy_percent"])
    return history
