"""Trains variational autoencoders with Bernoulli latents by several gradient estimators and compares them.

Every estimator gets the same number of decoder evaluations a step, the same data and the same seeds. Reported are the
bound, the variance of the gradient while training, its variance on one and the same trained model, and the time a
step. `python examples/discrete_vae.py` takes about four minutes on two cores; `--full` is the whole experiment. JSON
and plots go to --out, after every run; runs that are there already, made with the same options, are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data
from lowbit_ext import antithetic
from lowbit_ext.models import BernoulliVAE

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as error:
    sys.exit(f'examples/discrete_vae.py needs {error.name}: pip install "lowbit-ext[examples]"')

HIDDEN = {"linear": (), "nonlinear": (200, 200)}
LABELS = {
    "reinforce": "REINFORCE", "loorf": "LOORF", "disarm": "DisARM", "arms_d": "ARMS-D", "arms_n": "ARMS-N",
    "arms_s": "ARMS-S", "vimco": "VIMCO", "straight_through": "straight-through", "double_cv": "Double CV",
}  # fmt: skip
COLOURS = {
    "reinforce": "#999999", "loorf": "#7f8c9a", "disarm": "#d1863a", "arms_d": "#1f5fa8", "arms_n": "#8fbbe0",
    "arms_s": "#2a8f5b", "vimco": "#8a4fa3", "straight_through": "#c0504d", "double_cv": "#b8a12e",
}  # fmt: skip
BOUND_ESTIMATORS = ("vimco", "disarm", "arms_d", "arms_s")  # of the importance-weighted bound
CURVE_POINTS, CURVE_IMAGES = 25, 1000  # evaluations along a run, of as many images
EVALUATION_SAMPLES = 16  # of the bounds in the tables
VARIANCE_DATA, VARIANCE_REPEATS = 50, 400  # images, and estimates of each one's gradient, on the trained model
MOMENT_DECAY = 0.99  # of the running moments of the gradient


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training run."""

    data: str
    model: str
    objective: str  # "elbo", or "bound": the importance-weighted bound
    estimator: str
    n: int  # samples of the elbo; coupled samples of the bound
    importance_samples: int  # of the bound; vimco takes n more, to have as many evaluations as the others
    seed: int

    @property
    def evaluations(self) -> int:
        """Decoder evaluations a datum and step."""
        return self.importance_samples + self.n

    @property
    def group(self) -> str:
        """What the runs of one table share."""
        if self.objective == "elbo":
            return f"{self.data}, {self.model}, n = {self.n}"
        return f"{self.data}, {self.model}, bound of {self.importance_samples} samples"


@dataclasses.dataclass
class Result:
    """What one run gave: bounds in nats a datum."""

    setting: Setting
    steps: list[int]
    train_curve: list[float]
    test_curve: list[float]
    running_variance: float
    milliseconds_per_step: float


# --- one run ----------------------------------------------------------------------------------------------------------


def binarized(images: Tensor, generator: torch.Generator) -> Tensor:
    """Dynamic binarization: each pixel is 1 with its grey value as probability, drawn anew at every use."""
    return torch.bernoulli(images, generator=generator)


@torch.no_grad()
def bound(model: BernoulliVAE, images: Tensor, setting: Setting, seed: int) -> float:
    """Mean bound over a set in nats, from independent samples."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for part in images.split(500):
        x = binarized(part, generator)
        if setting.objective == "elbo":
            rows = model.evidence_lower_bound(x, EVALUATION_SAMPLES, "loorf", generator=generator)
        else:
            count = setting.importance_samples
            rows = model.multi_sample_bound(x, count, "vimco", generator=generator)
        total += float(rows.double().sum())
    return total / len(images)


def objective(model: BernoulliVAE, x: Tensor, setting: Setting, generator: torch.Generator) -> Tensor:
    """The quantity that training maximises."""
    if setting.objective == "elbo":
        return model.evidence_lower_bound(x, setting.n, setting.estimator, generator=generator).mean()
    count, n = setting.importance_samples, setting.n
    if setting.estimator == "vimco":
        count += n
    return model.multi_sample_bound(x, count, setting.estimator, n=n, generator=generator).mean()


class RunningVariance:
    """Variance of a gradient along training, from exponentially decaying first and second moments."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.variances: list[float] = []

    def add(self, gradient: Tensor) -> None:
        """Takes one gradient."""
        if self.first is None or self.second is None:
            self.first, self.second = gradient.clone(), gradient.square()
            return
        self.first.lerp_(gradient, 1 - MOMENT_DECAY)
        self.second.lerp_(gradient.square(), 1 - MOMENT_DECAY)
        self.variances.append(float((self.second - self.first.square()).sum()))

    def mean(self) -> float:
        """Over the second half of training."""
        return statistics.fmean(self.variances[len(self.variances) // 2 :])


def train(setting: Setting, sets: tuple[Tensor, Tensor], options: argparse.Namespace, progress: Any) -> Any:
    """Trains one model; returns it and its Result."""
    train_images, test_images = sets
    torch.manual_seed(setting.seed)
    generator = torch.Generator().manual_seed(setting.seed)
    model = BernoulliVAE(train_images.shape[1], options.latents, HIDDEN[setting.model], train_images.mean(0))
    networks = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizers = [
        torch.optim.Adam(networks, lr=options.learning_rate),
        torch.optim.SGD([model.prior_logits], lr=options.prior_learning_rate),
    ]
    running = RunningVariance()
    result = Result(setting, [], [], [], 0.0, 0.0)
    every = max(1, options.steps // CURVE_POINTS)
    batch = options.batch
    probe = train_images[:CURVE_IMAGES]
    elapsed = 0.0
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(train_images), (batch,), generator=generator)
        x = binarized(train_images[rows], generator)
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (-objective(model, x, setting, generator)).backward()
        for optimizer in optimizers:
            optimizer.step()
        elapsed += time.perf_counter() - start
        running.add(model.encoder[-1].weight.grad)  # type: ignore[arg-type]
        if step % every == 0:
            result.steps.append(step)
            result.train_curve.append(bound(model, probe, setting, 1))
            result.test_curve.append(bound(model, test_images[:CURVE_IMAGES], setting, 2))
            progress.advance(every)
    result.train_curve[-1] = bound(model, train_images[:10000], setting, 1)
    result.test_curve[-1] = bound(model, test_images, setting, 2)
    result.running_variance = running.mean()
    result.milliseconds_per_step = elapsed / options.steps * 1e3
    return model, result


# --- runs made before ------------------------------------------------------------------------------------------------


class Record:
    """The JSON document of the experiment, written after every run, and what it held before with the same options."""

    _SHAPING = ("steps", "batch", "latents", "learning_rate", "prior_learning_rate")  # options that change a run

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self.facts = {"torch": torch.__version__, "options": {key: getattr(options, key) for key in self._SHAPING}}
        self.runs: dict[Setting, Result] = {}
        self.variances: dict[str, dict[int, dict[str, float]]] = {}
        if not path.is_file():
            return
        document = json.loads(path.read_text())
        if {key: document.get(key) for key in self.facts} != self.facts:
            return
        for run in document["runs"]:
            setting = Setting(**run.pop("setting"))
            self.runs[setting] = Result(setting, **run)
        for pair, table in document["variances"].items():
            self.variances[pair] = {int(n): row for n, row in table.items()}

    def write(self) -> None:
        """Replaces the file as a whole, so that an interruption leaves the older one."""
        runs = [dataclasses.asdict(run) for run in self.runs.values()]
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps({**self.facts, "runs": runs, "variances": self.variances}, indent=1))
        unfinished.replace(self.path)


# --- variance on one model --------------------------------------------------------------------------------------------


def variances_on(model: BernoulliVAE, images: Tensor, estimators: Sequence[str], counts: Sequence[int]) -> dict:
    """Variance of each estimator's gradient with respect to the logits, on one model: by n and estimator.

    Averaged over images, summed over latents, from repeated estimates for the same images.
    """
    generator = torch.Generator().manual_seed(3)
    x = binarized(images[:VARIANCE_DATA], generator)
    table: dict[int, dict[str, float]] = {}
    for n in counts:
        table[n] = {}
        for estimator in estimators:
            first = torch.zeros(len(x), model.prior_logits.numel(), dtype=torch.float64)
            second = torch.zeros_like(first)
            for _ in range(VARIANCE_REPEATS):
                logits = model.encode(x).detach().requires_grad_()
                constant = logits.detach()

                def value(b: Tensor, constant: Tensor = constant) -> Tensor:
                    return model.log_weight(x, b, constant)

                antithetic.expectation(value, logits, n, estimator, generator=generator).sum().backward()
                assert logits.grad is not None
                first += logits.grad
                second += logits.grad.double().square()
            mean = first / VARIANCE_REPEATS
            spread = (second / VARIANCE_REPEATS - mean.square()) * VARIANCE_REPEATS / (VARIANCE_REPEATS - 1)
            table[n][estimator] = float(spread.sum(1).mean())
    return table


# --- report -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Mean and, over several seeds, the standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def groups_of(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """Results by group and estimator."""
    groups: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.setting.group, {}).setdefault(result.setting.estimator, []).append(result)
    return groups


def print_group(console: Console, group: str, runs: dict[str, list[Result]]) -> None:
    """One table: a line an estimator."""
    table = Table("estimator", title=group, title_justify="left", title_style="bold")
    for heading in ("evaluations", "train bound", "test bound", "running variance", "ms a step"):
        table.add_column(heading, justify="right")
    base = runs.get("loorf") or runs.get("vimco")
    base_variance = statistics.fmean(run.running_variance for run in base) if base else None
    for estimator, results in runs.items():
        variance = statistics.fmean(run.running_variance for run in results)
        relative = f"{variance / base_variance:.3f}" if base_variance else f"{variance:.3g}"
        table.add_row(
            LABELS[estimator],
            str(results[0].setting.evaluations),
            spread([run.train_curve[-1] for run in results]),
            spread([run.test_curve[-1] for run in results]),
            relative,
            f"{statistics.fmean(run.milliseconds_per_step for run in results):.2f}",
        )
    console.print(table)
    wins = []
    for estimator in runs:
        if base is None or estimator in ("loorf", "vimco"):
            continue
        better = sum(
            mine.test_curve[-1] > theirs.test_curve[-1] for mine, theirs in zip(runs[estimator], base, strict=True)
        )
        wins.append(f"{LABELS[estimator]} {better} of {len(base)}")
    if wins and base is not None:
        name = LABELS[base[0].setting.estimator]
        console.print(f"better test bound than {name} with the same seed: {', '.join(wins)}\n", style="dim")


def print_variances(console: Console, pair: str, table: dict[int, dict[str, float]]) -> None:
    """Variance of the estimators on one trained model, relative to LOORF or the first."""
    estimators = list(next(iter(table.values())))
    base = "loorf" if "loorf" in estimators else estimators[0]
    title = f"{pair}: variance of the gradient on one trained model, {LABELS[base]} with the same n = 1"
    lines = Table("n", title=title, title_justify="left", title_style="bold")
    for estimator in estimators:
        lines.add_column(LABELS[estimator], justify="right")
    for n, row in table.items():
        lines.add_row(str(n), *(f"{row[estimator] / row[base]:.3f}" for estimator in estimators))
    console.print(lines)


def plot_curves(path: Path, groups: dict[str, dict[str, list[Result]]]) -> None:
    """Test bound over steps, one panel a group."""
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (group, runs) in zip(axes.flat, groups.items(), strict=False):
        best = -float("inf")
        for estimator, results in runs.items():
            curves = torch.tensor([run.test_curve for run in results])
            steps, mean = results[0].steps, curves.mean(0)
            axis.plot(steps, mean, label=LABELS[estimator], color=COLOURS[estimator], linewidth=1.5)
            axis.fill_between(steps, curves.amin(0), curves.amax(0), color=COLOURS[estimator], alpha=0.15, linewidth=0)
            best = max(best, float(mean.max()))
            start = float(mean[len(mean) // 8])
        axis.set_ylim(start, best + 0.06 * (best - start))
        axis.set_title(group, fontsize=10)
        axis.set_xlabel("steps")
        axis.set_ylabel("test bound, nats")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_images(path: Path, model: BernoulliVAE, images: Tensor, title: str) -> None:
    """Images, their reconstructions, and draws from the prior."""
    count = 12
    side = round(images.shape[1] ** 0.5)
    x = binarized(images[:count], torch.Generator().manual_seed(4))
    lines = {
        "image": images[:count], "reconstruction": model.reconstruct(x),
        "drawn from the prior": model.generate(count, generator=torch.Generator().manual_seed(5)),
    }  # fmt: skip
    figure, axes = plt.subplots(len(lines), 1, figsize=(count * 0.8, len(lines) * 1.05))
    for axis, (name, pictures) in zip(axes, lines.items(), strict=True):
        strip = pictures.reshape(count, side, side).permute(1, 0, 2).reshape(side, count * side)
        axis.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(name, fontsize=9, loc="left")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


class _Stepper:
    """Advances the progress bar's task."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, steps: int) -> None:
        """Counts steps done."""
        self._bar.advance(self._task, steps)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; what is not given depends on --full."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--full", action="store_true", help="both data sets and models, n = 2 and 4, three seeds")
    parser.add_argument("--data", nargs="+", choices=("digits", "mnist5k", "fashion"))
    parser.add_argument("--root", help="folder of Fashion-MNIST's files")
    parser.add_argument("--model", nargs="+", choices=tuple(HIDDEN))
    parser.add_argument("--estimators", nargs="+", choices=tuple(antithetic.ESTIMATORS), metavar="NAME",
                        default=["loorf", "disarm", "arms_d", "arms_s"],
                        help=f"of {', '.join(antithetic.ESTIMATORS)}")  # fmt: skip
    parser.add_argument("--samples", nargs="+", type=int, metavar="N", help="samples n of each estimator")
    parser.add_argument("--importance-samples", type=int, default=5, help="K of the importance-weighted bound")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Adam; the papers train longer with 1e-4")
    parser.add_argument("--prior-learning-rate", type=float, default=1e-2, help="SGD on the prior's logits")
    parser.add_argument("--out", type=Path, default=Path("examples_out"))
    options = parser.parse_args()
    options.data = options.data or (["mnist5k", "fashion"] if options.full else ["mnist5k"])
    options.model = options.model or (["linear", "nonlinear"] if options.full else ["nonlinear"])
    options.samples = options.samples or ([2, 4] if options.full else [4])
    options.seeds = options.seeds or (3 if options.full else 1)
    options.steps = options.steps or (5000 if options.full else 3000)
    return options


def settings_of(options: argparse.Namespace, name: str, model: str) -> list[Setting]:
    """The runs on one data set with one model, seeds outermost."""
    runs = []
    for seed in range(options.seeds):
        for n in options.samples:
            runs += [Setting(name, model, "elbo", estimator, n, 0, seed) for estimator in options.estimators]
        count = options.importance_samples
        n = options.samples[-1]
        runs += [Setting(name, model, "bound", estimator, n, count, seed) for estimator in BOUND_ESTIMATORS]
    return runs


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / "discrete_vae.json", options)
    pairs = [(name, model) for name in options.data for model in options.model]
    runs_per_pair = len(settings_of(options, "", ""))
    counters = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description:44}"), BarColumn(), *counters)
    results: list[Result] = []
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("", total=len(pairs) * runs_per_pair * options.steps)
        for name, model_name in pairs:
            try:
                (train_images, _), (test_images, _) = data.load(name, options.root, normalise=False)
            except (ImportError, OSError, ValueError) as error:
                sys.exit(str(error))
            sets = (train_images.flatten(1), test_images.flatten(1))
            pair = f"{name}, {model_name}"
            for index, setting in enumerate(settings_of(options, name, model_name)):
                bar.update(task, description=f"{setting.group}: {LABELS[setting.estimator]}, seed {setting.seed}")
                shown = index == 0  # whose pictures and variances stand for the pair
                if setting in record.runs and not (shown and pair not in record.variances):
                    bar.advance(task, options.steps)
                else:
                    model, record.runs[setting] = train(setting, sets, options, _Stepper(bar, task))
                    if shown:
                        bar.update(task, description=f"{pair}: variance on one model")
                        counts = sorted({*options.samples, 8})
                        record.variances[pair] = variances_on(model, sets[1], options.estimators, counts)
                        plot_images(options.out / f"discrete_vae_{name}_{model_name}.png", model, sets[1], pair)
                    record.write()
                results.append(record.runs[setting])
    groups = groups_of(results)
    for group, runs in groups.items():
        print_group(console, group, runs)
    for name, model_name in pairs:
        pair = f"{name}, {model_name}"
        print_variances(console, pair, record.variances[pair])
    plot_curves(options.out / "discrete_vae_curves.png", groups)
    console.print(f"written: {record.path} and its plots", highlight=False)


if __name__ == "__main__":
    main()
