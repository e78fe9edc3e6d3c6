"""Runs the microbenchmarks: `python bench/run.py --quick`. Tables on the terminal; JSON and a plot in --out."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The modules beside this file that make rows. Found by their text: torch, which they import, must not be loaded yet.
BENCHMARKS = tuple(
    sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef rows(" in path.read_text("utf-8"))
)

# What holds the peers to the instructions of a forced level. Read by their libraries when they are loaded.
PEER_LIMITS = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the small set, three to four minutes (default)")
    size.add_argument("--full", action="store_true", help="every case")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME",
                        help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N",
                        help="thread counts to run with (default: 1; with --full 1 and all cores)")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), metavar="DIR", help="default: bench_out")
    parser.add_argument("--no-peers", action="store_true", help="only ours and the limits")
    options = parser.parse_args(arguments)
    options.threads = options.threads or (sorted({1, cores}) if options.full else [1])
    return options


def limit_peers() -> None:
    """Holds the peers to the level that LOWBIT_ISA forces. Before torch or OpenVINO is imported."""
    limits = PEER_LIMITS.get(os.environ.get("LOWBIT_ISA", ""), {})
    for name, value in limits.items():
        os.environ.setdefault(name, value)
    if limits:
        print("peers held to the forced level:", " ".join(f"{name}={os.environ[name]}" for name in limits))


def run(options: argparse.Namespace, console: Any) -> dict[str, list[Any]]:
    """Runs the chosen benchmarks on each number of threads; returns rows by benchmark."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from harness import Config

    modules = {name: importlib.import_module(name) for name in options.only}
    tables: dict[str, list[Any]] = {name: [] for name in modules}
    quick = not options.full
    count = sum(len(module.cases(quick)) * getattr(module, "ROWS_PER_CASE", 1) for module in modules.values())
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=count * len(options.threads))
        for name, module in modules.items():
            for threads in options.threads:
                torch.set_num_threads(threads)
                progress.update(task, description=f"{name}, {threads} thread{'s' if threads > 1 else ''}")
                config = Config(quick, threads, not options.no_peers, 0.8 if quick else 4.0)
                for row in module.rows(config):
                    tables[name].append(row)
                    progress.advance(task)
    return tables


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    limit_peers()
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        sys.exit(f'bench/run.py needs {error.name}: pip install "lowbit-ext[bench]"')
    import warnings

    import peers
    import report

    # torch announces that its quantised tensors will be replaced; they are the int8 peer that exists today.
    warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor")
    # A file or a pipe has no width of its own: there the tables are given room for their main columns.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    openvino = None if options.no_peers else peers.openvino()
    facts = report.machine(None if openvino is None else openvino.__version__.split("-")[0])
    tables = run(options, console)

    settings = " ".join(f"{name}={value}" for name, value in facts["settings"].items())
    console.print(
        f"\n{facts['cpu']}\nlevel {facts['isa']} (of {', '.join(facts['available_isas'])})"
        f"{', ' + settings if settings else ''}; torch {facts['torch']}, OpenVINO {facts['openvino'] or 'not used'}\n"
        f"popcount limit: {facts['popcount_limit']}; a kernel with fewer operations a bit can pass it\n",
        highlight=False,
    )
    if (first := report.summary(tables)) is not None:
        console.print(first)
    for name, rows in tables.items():
        console.print(report.table(f"{name}, level {facts['isa']}", rows, console.width))
        console.print(importlib.import_module(name).CAPTION + "\n", style="dim", highlight=False)
    all_rows = [row for rows in tables.values() for row in rows]
    disturbed = sum(row.disturbed() for row in all_rows)
    if disturbed:
        console.print(f"* {disturbed} of {len(all_rows)} rows were disturbed by other work on this machine")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / report.file_stem(facts)
    report.write_json(stem.with_suffix(".json"), facts, options.threads, tables)
    report.plot(stem.with_suffix(".png"), facts, options.threads[0], tables)
    console.print(f"written: {stem}.json, {stem}.png", highlight=False)


if __name__ == "__main__":
    main()
