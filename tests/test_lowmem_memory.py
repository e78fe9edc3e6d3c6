"""Memory of many steps with lowmem is flat, and workspaces are given back.

`python tests/test_lowmem_memory.py --steps 10000` prints the process's memory on the way, for each way to keep less.
"""

import argparse
import contextlib
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_ext.lowmem import _stored, allocate_bits, convert, empty_cache, ledger, saved_tensors

BATCH, SIDE = 8, 16
STATUS = Path("/proc/self/status")
needs_linux = pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))


def network():
    """Batch norm, ReLU, a curve, a threshold, layer norm, dropout and a function without a rule."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(),
        nn.Conv2d(16, 8, 1), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(8 * SIDE**2 // 4, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 10),
    )


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


WAYS = {
    "convert": (lambda model, batch: convert(model), None),
    "convert, rest": (lambda model, batch: convert(model, rest="codes"), None),
    "saved_tensors": (lambda model, batch: model, lambda model, batch: lambda: saved_tensors(4)),
    "stochastic": (lambda model, batch: model, lambda model, batch: lambda: saved_tensors(2, stochastic=True)),
    "a plan": (lambda model, batch: model, lambda model, batch: (
        lambda plan: lambda: saved_tensors(plan))(allocate_bits(model, cross_entropy, batch))),
    "one context": (lambda model, batch: model, lambda model, batch: (
        lambda context: lambda: context)(saved_tensors(4))),
    "ledger": (lambda model, batch: convert(model), lambda model, batch: lambda: ledger(model)),
}


def train(way, steps, say=lambda step, bytes: None):
    """Resident memory after a tenth of the steps and after all."""
    make, enter = WAYS[way]
    torch.manual_seed(0)
    batch = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH)
    model = make(network(), batch)
    context = contextlib.nullcontext if enter is None else enter(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    seen = []
    for step in range(1, steps + 1):
        with context():
            loss = cross_entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del loss
        if step % max(steps // 10, 1) == 0:
            seen.append(resident())
            say(step, seen[-1])
    return seen[0], seen[-1]


@needs_linux
@pytest.mark.parametrize("way", WAYS)
def test_memory_of_many_steps_is_flat(way):
    """Would the codes of one activation of a step stay, 4 bits of 8x16x16x16, it were 3 MB in 180 steps."""
    first, last = train(way, 200)
    assert last - first < 180 * BATCH * 16 * SIDE**2 // 2 / 2


def workspace_bytes():
    """Bytes of the workspace after a step, and how many of the process's empty_cache gives back."""
    model = convert(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 1)))
    model(torch.randn(10, 16, 256, 256)).sum().backward()
    kept = _stored._workspace.memory.nbytes
    before = resident()
    empty_cache()
    assert _stored._workspace.memory.nbytes == 0
    return kept, before - resident()


@needs_linux
def test_workspaces_are_given_back():
    """A batch norm's 40 MB are unpacked into memory that stays for the next step, until empty_cache.

    In a process of its own: where a heap has such a gap from earlier work, malloc fills it and keeps it.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        kept, given_back = processes.submit(workspace_bytes).result(timeout=120)
    assert kept >= 4 * 10 * 16 * 256**2
    assert given_back > 0.9 * kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for chosen in options.ways:
        print(f"{chosen}:", end="", flush=True)
        train(chosen, options.steps, lambda step, bytes: print(f" {bytes / 1e6:.1f}", end="", flush=True))
        print(" MB")
