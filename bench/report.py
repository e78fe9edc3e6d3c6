"""What a run leaves behind: tables on the terminal, a JSON file with every number, a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lowbit_ext
from harness import POPCOUNT_FORMS, Row, popcount_level

# --- the machine ------------------------------------------------------------------------------------------------------

# Environment that changes what runs: shown with the results where set.
SETTINGS = ("LOWBIT_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")


def machine(openvino_version: str | None) -> dict[str, Any]:
    """What the results depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "isa": lowbit_ext.active_isa(),
        "available_isas": lowbit_ext.available_isas(),
        "popcount_limit": POPCOUNT_FORMS[popcount_level()],
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "lowbit_ext": lowbit_ext.__version__,
        "torch": torch.__version__,
        "openvino": openvino_version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _cpu_name() -> str:
    """Name of the processor with family, model and stepping: virtual machines give all of one maker the same name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    keys = ("model name", "cpu family", "model", "stepping")
    found = (re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in keys)
    name, family, model, stepping = (match.group(1).strip() if match else "?" for match in found)
    return f"{name} (family {family}, model {model}, stepping {stepping})"


def file_stem(facts: dict[str, Any]) -> str:
    """Name of a run's files: date, processor, level."""
    cpu = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\(family.*", "", facts["cpu"].lower())
    return "_".join([facts["date"][:10], re.sub(r"[^a-z0-9]+", "-", cpu).strip("-"), facts["isa"]])


# --- tables -----------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Three significant digits, never fewer than the whole number."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def _cell(name: str, value: Any) -> Text:
    """One value, formatted by what the field's name says of its unit."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, bool):
        return Text("yes" if value else "NO", style="" if value else "bold red")
    if name.startswith("speedup_over_"):
        return Text(f"{_number(value)}x", style="green" if value >= 1 else "red")
    if name.endswith("_ratio"):
        return Text(f"{_number(value)}x")
    if name.startswith("percent_of_"):
        return Text(f"{value:.0f} %")
    if name.endswith("_bytes"):
        return Text(f"{value / 2**20:.2f} MiB")
    return Text(_number(value) if isinstance(value, float) else str(value))


def table(title: str, rows: Sequence[Row], width: int) -> Table:
    """A table no wider than `width`; optional columns are left out, last first, until it fits. * marks disturbed rows.

    Args:
        title: heads the table.
        rows: rows of one class.
        width: characters.
    """
    fields = [field for field in dataclasses.fields(rows[0]) if "heading" in field.metadata]
    while True:
        result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
        for field in fields:
            # Headings break between words; the widest word or value sets the width.
            heading = "\n".join(field.metadata["heading"].split())
            result.add_column(heading, justify="left" if field.name == "case" else "right", no_wrap=True)
        for row in rows:
            cells = [_cell(field.name, getattr(row, field.name)) for field in fields]
            if row.disturbed():
                cells[0].append(" *")
            result.add_row(*cells)
        optional = [field for field in fields if field.metadata.get("optional")]
        if not optional or Console(width=10 * width).measure(result).maximum <= width:
            return result
        fields.remove(optional[-1])


# What the summary shows, a line each: benchmark, what it is, the field of our time, of the speed-ups over peers that do
# the same, and of the share of a limit, with the limit's name.
_SUMMARY = (
    ("binary_conv2d", "binary convolution", "ours_float32_us",
     ("speedup_over_openvino_call", "speedup_over_torch_float32", "speedup_over_torch_bfloat16",
      "speedup_over_torch_int8"), ("percent_of_popcount_limit", "popcounts")),
    ("binary_conv2d_grad", "its training step", "ours_us", ("speedup_over_torch",), None),
    ("group_quantize", "activations to 4 bits", "pack_us",
     ("pack_speedup_over_torch_compiled", "pack_speedup_over_torchao", "pack_speedup_over_bitsandbytes"),
     ("percent_of_copy_bandwidth_pack", "copy")),
    ("batch_norm_relu", "batch norm and ReLU, trained", "step_us", ("speedup_over_torch_step",),
     ("percent_of_copy_bandwidth_gradient", "copy")),
    ("antithetic_sample", "antithetic samples", "ours_us",
     ("speedup_over_torch", "speedup_over_torch_compiled"), ("percent_of_independent", "independent")),
)


def summary(tables: dict[str, list[Row]]) -> Table | None:
    """One row a method, its first case on the fewest threads: time, the fastest peer, and the limit; None: no rows."""
    result = Table(title="Summary", title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in ("what", "case", "ours µs", "fastest peer", "faster", "limit"):
        result.add_column(heading, justify="left" if heading in ("what", "case") else "right",
                          no_wrap=heading not in ("what", "case"))
    for name, what, time_field, peers, limit in _SUMMARY:
        if not tables.get(name):
            continue
        row = tables[name][0]
        measured = [(value, peer) for peer in peers if (value := getattr(row, peer)) is not None]
        least, peer = min(measured, default=(None, ""))
        peer = peer.partition("speedup_over_")[2].removesuffix("_step").replace("_", " ")
        share = None if limit is None else getattr(row, limit[0])
        result.add_row(
            what, row.case, _cell(time_field, getattr(row, time_field)), peer or "-", _cell("speedup_over_", least),
            "-" if limit is None or share is None else f"{share:.0f} % of {limit[1]}",
        )
    return result if result.row_count else None


# --- files ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, facts: dict[str, Any], threads: Sequence[int], tables: dict[str, list[Row]]) -> None:
    """Every row with every field."""
    results = {name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}
    path.write_text(json.dumps({"machine": facts, "threads": list(threads), "results": results}, indent=1) + "\n")


_SPEEDUP, _PERCENT = "speedup_over_", "percent_of_"


def _names(rows: Sequence[Row], prefix: str) -> list[str]:
    """Fields with the prefix that hold a number in some row."""
    fields = dataclasses.fields(rows[0]) if rows else ()
    names = [field.name for field in fields if field.name.startswith(prefix)]
    return [name for name in names if any(getattr(row, name) is not None for row in rows)]


# One colour for a peer in every panel.
_COLOURS = {
    "openvino kernel": "#7b4ea3",
    "openvino call": "#b795d2",
    "torch": "#e0632b",
    "torch float32": "#e0632b",
    "torch bfloat16": "#f2a65e",
    "torch int8": "#f7d59c",
}
_LIMIT_COLOURS = ("#2f6c9e", "#9cc4e0")


def _bars(axes: Any, rows: Sequence[Row], prefix: str, origin: float) -> None:
    """Groups of horizontal bars from `origin` on: one group a row, one bar a field with the prefix."""
    names = _names(rows, prefix)
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        values = [getattr(row, name) for row in rows]
        positions = [position + (index - (len(names) - 1) / 2) * height for position in range(len(rows))]
        label = name.removeprefix(prefix).replace("_", " ")
        colour = _COLOURS.get(label, _LIMIT_COLOURS[index % len(_LIMIT_COLOURS)])
        widths = [0 if value is None else value - origin for value in values]
        bars = axes.barh(positions, widths, left=origin, height=0.9 * height, label=label, color=colour)
        axes.bar_label(bars, ["" if value is None else _number(value) for value in values], padding=2, fontsize=6)
    axes.set_yticks(range(len(rows)), [row.case for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def plot(path: Path, facts: dict[str, Any], threads: int, tables: dict[str, list[Row]]) -> None:
    """Speed-ups over peers and percent of limits, for the rows that ran on `threads` threads."""
    chosen = {name: [row for row in rows if row.threads == threads] for name, rows in tables.items()}
    panels = [
        (name, rows) for name, rows in chosen.items() if any(_names(rows, prefix) for prefix in (_SPEEDUP, _PERCENT))
    ]
    if not panels:
        return
    heights = [1.2 + 0.45 * len(rows) for _, rows in panels]
    figure, grid = plt.subplots(
        len(panels), 2, figsize=(15, sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    figure.suptitle(
        f"lowbit_ext {facts['lowbit_ext']}, level {facts['isa']}, {threads} thread{'s' if threads > 1 else ''}\n"
        f"{facts['cpu']}, torch {facts['torch']}, {facts['date'][:10]}",
        fontsize=11,
    )
    for (name, rows), (left, right) in zip(panels, grid, strict=True):
        for axes, prefix in ((left, _SPEEDUP), (right, _PERCENT)):
            if not _names(rows, prefix):
                axes.set_axis_off()
                continue
            _bars(axes, rows, prefix, origin=1 if prefix == _SPEEDUP else 0)
            axes.set_title(name, fontsize=10, loc="left")
            if prefix == _SPEEDUP:
                axes.set_xscale("log")
                axes.set_xlim(min(0.5, 0.8 * axes.get_xlim()[0]), max(4, 1.3 * axes.get_xlim()[1]))
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}x")
                axes.xaxis.set_minor_locator(NullLocator())
                axes.axvline(1, color="black", linewidth=0.8)
                axes.set_xlabel("ours is so many times as fast (logarithmic; below 1 the peer is faster)", fontsize=8)
            else:
                axes.axvline(100, color="black", linewidth=0.8)
                axes.set_xlabel("percent of the limit measured in the same run", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
