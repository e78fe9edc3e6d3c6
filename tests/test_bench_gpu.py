"""bench/gpu.py by the kernels compiled for the host: its rows are complete, whatever the times are."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import host_cuda
from lowbit_ext import _native

BENCH = Path(__file__).parent.parent / "bench"
needs_host_cuda = pytest.mark.skipif(
    "LOWBIT_HOST_CUDA" not in os.environ, reason="needs the CUDA module built for the host"
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def bench(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(BENCH)
    import gpu

    monkeypatch.setattr(gpu, "GRAPH_CALLS", 1)
    return gpu


def host_gpu(bench, engines=_native.CUDA_ENGINES):
    return bench.Gpu("cpu", {name: host_cuda(name) for name in engines}, lambda: None, lambda call: call)


@pytest.mark.host_cuda
@needs_host_cuda
def test_rows_by_host_cuda(bench, capsys):
    gpu = host_gpu(bench)
    rows = list(bench.peak_rows(gpu, 0.0))
    assert [row.case for row in rows] == [name for name in gpu.kernels if name != "popcount"]
    peak = bench.Peak(gpu, rows[0].case)
    for engine in gpu.kernels:
        rows.append(bench.conv_row(bench.Case(64, 6, 1), engine, gpu, peak, 0.0))
    rows.append(bench.conv_row(bench.Case(128, 1, 17, 1), "popcount", gpu, peak, 0.0))
    rows += bench.memory_rows(gpu, 0.0, (2, 64, 4, 4))
    rows += bench.code_rows(gpu, 0.0, (2, 64, 4, 4))
    for row in rows:
        bench.print_row(row, heading=True)
        assert all(value is not None for value in dataclasses.asdict(row).values()), row
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(rows)


@pytest.mark.host_cuda
@needs_host_cuda
def test_command_by_host_cuda(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "current_gpu", lambda engines: host_gpu(bench, engines))
    monkeypatch.setattr(bench, "machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(bench, "conv_cases", lambda: [bench.Case(64, 1, 1, 1)])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "popcount_peak", "binary_conv2d", "--engines", "mma",
                                      "--seconds", "0", "--out", str(tmp_path)])
    bench.main()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["machine"] == {"gpu": "none"}
    assert [row["case"] for row in written["results"]["popcount_peak"]] == ["mma"]
    (row,) = written["results"]["binary_conv2d"]
    assert row["case"] == "linear 64 N=1 mma"
    assert row["torch_int8_graph_us"] is None  # torch's product refuses fewer than 17 rows
    assert row["percent_of_peak"] > 0


def test_cases_are_distinct(bench):
    assert {case.batch for case in bench.conv_cases()} == {1, 16, 64, 256}
    assert len({str(case) for case in bench.conv_cases()}) == len(bench.conv_cases())


@without_gpu
def test_commands_without_a_gpu(tmp_path):
    for command, message in (
        ([sys.executable, BENCH / "gpu.py"], "bench/gpu.py: torch finds no GPU here"),
        ([BENCH / "gpu_check.sh"], f"bench/gpu_check.sh: torch of {sys.executable} finds no GPU here; "
                                   "set PYTHON to one that does"),
    ):
        done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
                              capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == message + "\n"
        assert done.stdout == ""
    assert not (tmp_path / "out").exists()
