"""The file that a simulation goes on from: one run's, whole, and written by one process at a time.

A magic number, the SHA-256 of the rest, and the rest: a document of torch.save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_ext.federated.core import State
from lowbit_ext.federated.rounds import Coordinator, Participant, RoundReport
from lowbit_ext.federated.wire import memory_of

_MAGIC = b"lowbit federated checkpoint 2\n"

Fingerprint = dict[str, dict[str, Any]]


def _digest(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} sha256 {hashlib.sha256(memory_of(tensor)).hexdigest()}"


def fingerprint(
    state: State, server: tuple[Tensor, Tensor], users: Sequence[Tensor], settings: Mapping[str, Any]
) -> Fingerprint:
    """What makes a run the same run: its model's tensors, the data of server and users, its settings.

    The number of rounds is not part of it: a run may be extended.
    """
    images = {f"images of user {user}": _digest(data) for user, data in enumerate(users)}
    return {
        "settings": {name: value for name, value in settings.items() if name != "rounds"},
        "model": {key: f"{tensor.dtype} {tuple(tensor.shape)}" for key, tensor in state.items()},
        "users": {"number": len(users)},
        "data": {"images of the server": _digest(server[0]), "labels of the server": _digest(server[1]), **images},
    }


def _differences(theirs: Fingerprint, ours: Fingerprint) -> Iterator[str]:
    """The first difference of each part, in words."""
    for part, own in ours.items():
        found = theirs[part]
        for key in {**own, **found}:
            if own.get(key) != found.get(key):
                there, here = (str(values.get(key, "nothing")) for values in (found, own))
                yield f"{part}: {key} is {there} there and {here} here"
                break


class Checkpoint:
    """A run's file. Within a `with` block no other process has it.

    Args:
        path: of the file. Beside it lies `<path>.lock`, which stays, and `<path>.part` while it is written.
        identity: the run's fingerprint.

    Raises:
        RuntimeError: on entering, when another run has the file.
    """

    def __init__(self, path: str | Path, identity: Fingerprint) -> None:
        self.path, self.identity = Path(path), identity
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Checkpoint:
        self._held.enter_context(_locked(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def save(
        self, coordinator: Coordinator[int], participants: Mapping[int, Participant], history: list[RoundReport[int]]
    ) -> None:
        """Replaces the file as a whole: a failure leaves the older one, and nothing else.

        Raises:
            OSError: it cannot be written, for example because the disk is full.
        """
        document = {
            "identity": self.identity,
            "state": coordinator.state,
            "starts": coordinator.starts,
            "held": coordinator.held,
            "failed_rounds": coordinator.failed_rounds,
            "participants": {user: (p.received, p.residual, p.own) for user, p in participants.items()},
            "history": [dataclasses.asdict(report) for report in history],
        }
        buffer = io.BytesIO()
        torch.save(document, buffer)
        content = buffer.getbuffer()
        unfinished = self.path.with_name(self.path.name + ".part")
        try:
            with open(unfinished, "wb") as file:
                file.writelines((_MAGIC, hashlib.sha256(content).digest(), content))
                file.flush()
                os.fsync(file.fileno())  # before the name points to it: a loss of power leaves the older one too
            os.replace(unfinished, self.path)
        except OSError as error:
            reason = f"simulate: the checkpoint cannot be written: {error.strerror}"
            raise OSError(error.errno, reason, str(self.path)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def load(
        self, coordinator: Coordinator[int], participants: Mapping[int, Participant], history: list[RoundReport[int]]
    ) -> bool:
        """Takes up the run that the file holds; False where there is none.

        Raises:
            ValueError: the file is damaged, of another version, or another run's; the message says what differs.
        """
        if not self.path.exists():
            return False
        document = self._read()
        differences = list(_differences(document["identity"], self.identity))
        if differences:
            raise ValueError(
                f"simulate: {self.path} holds a run of other {', '.join(d.partition(':')[0] for d in differences)}; "
                f"remove it or name another checkpoint ({'; '.join(differences)})"
            )
        coordinator.state, coordinator.starts = document["state"], document["starts"]
        coordinator.held, coordinator.failed_rounds = document["held"], document["failed_rounds"]
        for user, (received, residual, own) in document["participants"].items():
            participants[user].received, participants[user].residual, participants[user].own = received, residual, own
        history += [RoundReport(**report) for report in document["history"]]
        if history:
            coordinator.report = history[-1]
        return True

    def _read(self) -> dict[str, Any]:
        content = memoryview(self.path.read_bytes())
        start = len(_MAGIC) + hashlib.sha256().digest_size
        if content[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"simulate: {self.path} is no checkpoint of this version; remove it or name another")
        if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
            raise ValueError(f"simulate: {self.path} is damaged, its checksum is wrong; remove it or name another")
        document: dict[str, Any] = torch.load(io.BytesIO(content[start:]), weights_only=True)
        return document


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds `<path>.lock`, which the system frees when the process ends, however it ends."""
    name = path.with_name(path.name + ".lock")
    with open(name, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"simulate: {path} is the checkpoint of a run that goes on in process {file.read() or 'unknown'}; wait "
                "for it or name another checkpoint"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
