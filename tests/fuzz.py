"""Runs the fuzzers, tests/fuzz_*.py, in processes that may crash or hang.

`python tests/fuzz.py --calls 500000 --seed 1` makes that many calls of each and prints what they found, `--replay 17`
makes call 17 of a seed again.

A fuzzer is a module with `run(seed, count, start, on_call, only)`, which makes calls start .. start + count - 1, tells
`on_call` the number of each before it is made, and yields a Finding for each that did what it must not; the first
result of `drawn(seed, index, only)` names a call's target. Where a process ends by a signal or stays in a call for too
long, that call is a finding, and another process goes on behind it.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

HANG_SECONDS = 60  # the slowest call takes well under one, the first also imports torch
SHARE = 10_000  # calls of a process, which then makes room for one with a fresh memory
MEMORY = 6 << 30  # bytes beyond those of torch itself, so that a call for 2^40 elements fails and harms nobody


def fuzzers() -> list[str]:
    """Names of the fuzzers: NAME of fuzz_NAME.py."""
    return sorted(path.stem.removeprefix("fuzz_") for path in Path(__file__).parent.glob("fuzz_*.py")
                  if "def run(" in path.read_text())


def work(fuzzer: str, seed: int, start: int, count: int, only: str, current: Any, results: Connection) -> None:
    """A process: makes calls and sends what it finds, and at the end None."""
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    module = importlib.import_module(f"fuzz_{fuzzer}")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, resource.RLIM_INFINITY))

    def on_call(index: int) -> None:
        current.value = index

    for finding in module.run(seed, count, start, on_call, only):
        results.send(finding)
    results.send(None)


class Run:
    """One process and the calls it still has to make."""

    def __init__(self, fuzzer: str, seed: int, start: int, stop: int, only: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop, self.current = stop, context.Value("q", start - 1, lock=False)
        self.results, sender = context.Pipe(duplex=False)
        arguments = (fuzzer, seed, start, stop - start, only, self.current, sender)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        sender.close()
        self.start, self.seen, self.moved = start, start - 1, time.monotonic()

    def poll(self, found: Callable[[Any], None]) -> str | None:
        """Takes what was sent. None while the process is at work; then how it ended: "done", a signal or "hang"."""
        try:
            while self.results.poll():
                finding = self.results.recv()
                if finding is None:
                    self.process.join()
                    return "done"
                found(finding)
        except (EOFError, OSError):
            self.process.join()
            return f"exit code {self.process.exitcode}"
        if self.current.value != self.seen:
            self.seen, self.moved = self.current.value, time.monotonic()
        if time.monotonic() - self.moved > HANG_SECONDS:
            self.process.kill()
            self.process.join()
            return f"no end within {HANG_SECONDS} s"
        return None


def fuzz(
    fuzzer: str, calls: int, seed: int, jobs: int = 1, only: str = "", seconds: float = float("inf"),
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Any], int]:
    """All findings and the number of calls made: `calls`, or as many as there is time for."""
    module = importlib.import_module(f"fuzz_{fuzzer}")
    found: list[Any] = []
    step = min(SHARE, -(-calls // jobs))
    shares = collections.deque((start, min(start + step, calls)) for start in range(0, calls, step))
    runs: list[Run] = []
    end, done = time.monotonic() + seconds, 0

    def made() -> int:
        return done + sum(run.current.value + 1 - run.start for run in runs)

    try:
        while (shares or runs) and time.monotonic() < end:
            while shares and len(runs) < jobs:
                runs.append(Run(fuzzer, seed, *shares.popleft(), only))
            wait([run.results for run in runs], timeout=0.2)
            for run in list(runs):
                ended = run.poll(found.append)
                if ended is None:
                    continue
                runs.remove(run)
                last = run.current.value
                if ended == "done":
                    done += run.stop - run.start
                    continue
                target, _ = module.drawn(seed, last, only)
                found.append(module.Finding(seed, last, target, ended, "the process ended in this call", ""))
                done += last + 1 - run.start
                if last + 1 < run.stop:
                    shares.appendleft((last + 1, run.stop))
            on_progress(made())
        return found, made()
    finally:
        for run in runs:
            run.process.kill()


def table(found: list[Any]) -> Table:
    """Findings of one kind in a row."""
    groups = collections.defaultdict(list)
    for finding in found:
        groups[finding.target, finding.kind].append(finding)
    made = Table("count", "target", "kind", "first", "seed:call", show_lines=True)
    for (target, kind), members in sorted(groups.items()):
        first = members[0]
        text = escape(f"{first.detail[:300]}\n{first.arguments[:300]}")
        places = ", ".join(f"{member.seed}:{member.index}" for member in members[:3])
        made.add_row(str(len(members)), target, escape(kind), text, places)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fuzzer", choices=[*fuzzers(), "all"], default="all")
    parser.add_argument("--calls", type=int, default=5000, help="of each fuzzer (default: 5000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--only", default="", help="targets whose name has this")
    parser.add_argument("--replay", metavar="CALL", type=int, help="make this one call of --fuzzer, in this process")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    chosen = fuzzers() if options.fuzzer == "all" else [options.fuzzer]
    if options.replay is not None:
        module = importlib.import_module(f"fuzz_{chosen[0]}")
        console.print(*module.run(options.seed, 1, options.replay, only=options.only), markup=False)
        return 0
    failed = False
    for fuzzer in chosen:
        columns = (TextColumn(fuzzer), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(fuzzer, total=options.calls)
            found, made = fuzz(
                fuzzer, options.calls, options.seed, options.jobs, options.only,
                on_progress=lambda done, progress=progress, task=task: progress.update(task, completed=done),
            )
        if found:
            console.print(table(found))
        console.print(f"{fuzzer}: seed {options.seed}, {made} calls, {len(found)} findings")
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
