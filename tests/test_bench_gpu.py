"""bench/gpu.py by the kernels compiled for the host: its rows are complete, whatever the times are."""

import dataclasses
import os
from pathlib import Path

import pytest

from conftest import host_cuda
from lowbit_ext import _native


@pytest.fixture
def gpu_bench(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    import gpu

    monkeypatch.setattr(gpu, "GRAPH_CALLS", 1)
    return gpu


@pytest.mark.skipif("LOWBIT_HOST_CUDA" not in os.environ, reason="needs the CUDA module built for the host")
def test_rows_by_host_cuda(gpu_bench, capsys):
    kernels = {name: host_cuda(name) for name in reversed(_native.CUDA_ENGINES)}
    gpu = gpu_bench.Gpu("cpu", kernels, lambda: None, lambda call: call)
    rows = list(gpu_bench.peak_rows(gpu, 0.0))
    assert [row.case for row in rows] == [name for name in kernels if name != "popcount"]
    peak = gpu_bench.Peak(gpu, rows[0].case)
    for engine in kernels:
        rows.append(gpu_bench.conv_row(gpu_bench.Case(64, 6, 1), engine, gpu, peak, 0.0))
    rows.append(gpu_bench.conv_row(gpu_bench.Case(128, 1, 17, 1), "popcount", gpu, peak, 0.0))
    rows += gpu_bench.memory_rows(gpu, 0.0, (2, 64, 4, 4))
    for row in rows:
        gpu_bench.print_row(row, heading=True)
        assert all(value is not None for value in dataclasses.asdict(row).values()), row
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(rows)


def test_cases_are_distinct(gpu_bench):
    assert {case.batch for case in gpu_bench.conv_cases()} == {1, 16, 64, 256}
    assert len({str(case) for case in gpu_bench.conv_cases()}) == len(gpu_bench.conv_cases())
