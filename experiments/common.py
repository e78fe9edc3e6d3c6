"""What the experiments share: arguments, data, records, the terminal, plots, and how they end.

An experiment is made of runs. A Record finds those that were made before under everything that shapes them, and is
written after each new one: an interruption costs the run under way, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import data
import lowbit_ext


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """Imports of what only the experiments need: one that is missing ends the process with the command that helps."""
    try:
        yield
    except ImportError as error:
        sys.exit(f'{Path(sys.argv[0]).name} needs {error.name}: pip install "lowbit-ext[examples]"')


with optional_packages():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)

# --- start and end ----------------------------------------------------------------------------------------------------


def start(main: Callable[[], None]) -> None:
    """Runs an experiment. Ctrl-C and what the system refuses, such as a full disk, end it with one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except OSError as error:
        sys.exit(str(error))


def load(
    names: Sequence[str], root: Path | None, *, asked: bool, normalise: bool = True
) -> dict[str, tuple[data.Set, data.Set]]:
    """Training and test set of every name, before any work is done.

    Args:
        names: see data.load.
        root: folder of the files of fashion or CIFAR.
        asked: whether the user named the data sets. Where they are the experiment's choice and Fashion-MNIST's files
            are not on the machine, mnist5k takes its place and a line says so; what else is missing or corrupt ends the
            process with one.
        normalise: see data.load.
    """
    sets = {}
    for name in names:
        try:
            sets[name] = data.load(name, root, normalise=normalise)
        except (ImportError, OSError, ValueError) as error:
            if asked or root is not None or name != "fashion" or not isinstance(error, FileNotFoundError):
                sys.exit(str(error))
            console.print(f"{error}. Here mnist5k takes its place.", soft_wrap=True)
            sets |= load(["mnist5k"], None, asked=True, normalise=normalise)
    return sets


# --- arguments --------------------------------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive(text: str) -> int:
    """Type of an argument: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def arguments(document: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that every experiment has; its description is the docstring's first paragraph."""
    parser = argparse.ArgumentParser(description=(document or "").split("\n\n")[0], formatter_class=_Help)
    parser.add_argument("--root", type=Path, help="folder of the files of fashion or CIFAR")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of torch and the kernels")
    parser.add_argument("--out", type=Path, default=Path("experiments_out"), help="folder of records and plots")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options. Sets the number of threads and makes the folder."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to. It takes the place of `path` at the end; an exception leaves `path` as it was."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Writes a document as a whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """What may change a result beside the options."""
    return {
        "lowbit_ext": lowbit_ext.__version__, "torch": torch.__version__, "isa": lowbit_ext.active_isa(),
        "threads": torch.get_num_threads(),
    }


class Record:
    """All runs ever made with a file, each under its key: all that shapes it, this environment included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                self._entries = {_canonical(entry["key"]): entry for entry in json.loads(path.read_text())}
            except (ValueError, KeyError, TypeError):
                sys.exit(f"{path} is no record of runs: remove it, or choose another folder with --out")

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return _canonical({**key, **environment()}) in self._entries

    def run(
        self, key: Mapping[str, Any], make: Callable[[], Any], on_found: Callable[[], None] = lambda: None
    ) -> Any:
        """The result under a key as JSON gives it back; made, and the file written, where it is not there yet."""
        whole = {**key, **environment()}
        place = _canonical(whole)
        if place not in self._entries:
            self._entries[place] = json.loads(json.dumps({"key": whole, "result": make()}))
            write_json(self.path, list(self._entries.values()))
        else:
            on_found()
        return copy.deepcopy(self._entries[place]["result"])


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def checkpoint(folder: Path, name: str, key: Mapping[str, Any]) -> Path:
    """Where the checkpoint of a training under a key is: trainings that differ have files of their own."""
    folder = folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    digest = hashlib.sha256(_canonical({**key, **environment()}).encode()).hexdigest()
    return folder / f"{name}_{digest[:12]}.pt"


# --- terminal and plots -----------------------------------------------------------------------------------------------


class Bar:
    """A progress bar with a label that changes."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def label(self, text: str) -> None:
        """What is done now."""
        self._progress.update(self._task, description=text)

    def advance(self, amount: float = 1) -> None:
        """Counts what was done."""
        self._progress.advance(self._task, amount)


@contextlib.contextmanager
def progress(total: float) -> Iterator[Bar]:
    """A bar that disappears at the end."""
    columns = (TextColumn("{task.description:52}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        yield Bar(bar, bar.add_task("", total=total))


def table(title: str, *headings: str) -> Table:
    """An empty table whose first column names the lines."""
    result = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return result


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and, of several values, the standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def save(figure: Figure, path: Path) -> None:
    """Writes and closes a figure."""
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
    plt.close(figure)
