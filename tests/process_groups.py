"""Two processes in a gloo group, for the tests of distributed data parallel training."""

import os
import tempfile

import pytest
import torch

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)


def _process(rank, folder, function, arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # Something of DistributedDataParallel keeps the group, whose threads may hold the last reference to a Python
    # tensor: one that is dropped while the interpreter ends aborts the process (pytorch/pytorch#179291). So it does
    # not end in Python's way.
    os._exit(0)


def run_in_two_processes(function, *arguments):
    """The results of `function(rank, *arguments)`, rank 0 and 1, each in a process of one thread.

    `function` is of a module's top level. Raises what a process raised, and after a minute of silence.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(_process, (folder, function, arguments), nprocs=2, join=False)
        # join() is True when all are done, False when one is.
        assert any(processes.join(timeout=60) for _ in range(2)), "the processes hang"
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
