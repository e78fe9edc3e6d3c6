"""Trains variational autoencoders with Bernoulli latents by several gradient estimators and compares them.

Every estimator gets the same number of decoder evaluations a step, the same data and the same seeds. Reported are the
bound, the variance of the gradient while training, its variance on one and the same trained model, and the time a
step. `python experiments/discrete_vae.py` takes about four minutes on two cores; `--full` is the whole experiment. A
record of all runs and plots go to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import common
from common import console, plt, spread
from lowbit_ext import antithetic
from lowbit_ext.models import BernoulliVAE

HIDDEN = {"linear": (), "nonlinear": (200, 200)}
LABELS = {
    "reinforce": "REINFORCE", "loorf": "LOORF", "disarm": "DisARM", "arms_d": "ARMS-D", "arms_n": "ARMS-N",
    "arms_s": "ARMS-S", "vimco": "VIMCO", "straight_through": "straight-through", "double_cv": "Double CV",
}
COLOURS = {
    "reinforce": "#999999", "loorf": "#7f8c9a", "disarm": "#d1863a", "arms_d": "#1f5fa8", "arms_n": "#8fbbe0",
    "arms_s": "#2a8f5b", "vimco": "#8a4fa3", "straight_through": "#c0504d", "double_cv": "#b8a12e",
}
# Runs of the importance-weighted bound: estimator, K, samples n of each of the K. VIMCO has one; it runs with as many
# evaluations as the others and with their K.
BOUND_RUNS = (
    ("vimco", 9, 1), ("vimco", 10, 1), ("vimco", 3, 1), ("loorf", 3, 3), ("disarm", 5, 2), ("arms_d", 3, 3),
    ("arms_s", 3, 3),
)
BOUND_COUNTS = (1, 5, 10, 100)  # samples of the bounds in the table
BOUND_BASE = BOUND_RUNS[0]
CURVE_POINTS, CURVE_IMAGES = 25, 1000  # evaluations along a run, of as many images
EVALUATION_SAMPLES = 16  # of the bounds in the tables
VARIANCE_DATA, VARIANCE_REPEATS = 50, 400  # images, and estimates of each one's gradient, on the trained model
SHAPING = ("steps", "batch", "latents", "learning_rate", "prior_learning_rate")  # options that change every run
MOMENT_DECAY = 0.99  # of the running moments of the gradient


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training run."""

    data: str
    model: str
    objective: str  # "elbo", or "bound": the importance-weighted bound
    estimator: str
    n: int  # samples of the elbo, or of each of the bound's K
    importance_samples: int  # K of the bound; 1 of the elbo
    seed: int

    @property
    def evaluations(self) -> int:
        """Decoder evaluations a datum and step."""
        return self.importance_samples * self.n

    @property
    def group(self) -> str:
        """What the runs of one table share."""
        return f"{self.data}, {self.model}, " + (f"n = {self.n}" if self.objective == "elbo" else "importance-weighted")

    @property
    def label(self) -> str:
        """Name within the table."""
        name = LABELS[self.estimator]
        if self.objective == "elbo":
            return name
        return f"{name}, K = {self.importance_samples}" + (f", n = {self.n}" if self.n > 1 else "")


@dataclasses.dataclass
class Result:
    """What one run gave: bounds in nats a datum."""

    setting: Setting
    steps: list[int]
    train_curve: list[float]
    test_curve: list[float]
    bounds: dict[str, float]  # on the test set, by the number of samples, of runs of the bound
    running_variance: float
    milliseconds_per_step: float
    variances: dict[str, dict[str, float]]  # variances_on the trained model, for the first run on a data set and model


# --- one run ----------------------------------------------------------------------------------------------------------


def binarized(images: Tensor, generator: torch.Generator) -> Tensor:
    """Dynamic binarization: each pixel is 1 with its grey value as probability, drawn anew at every use."""
    return torch.bernoulli(images, generator=generator)


@torch.no_grad()
def bound(model: BernoulliVAE, images: Tensor, count: int, seed: int) -> float:
    """Mean bound of `count` independent samples over a set, in nats; of 1 sample from EVALUATION_SAMPLES of them."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for part in images.split(500):
        x = binarized(part, generator)
        logits = model.encode(x)
        drawn = EVALUATION_SAMPLES if count == 1 else count
        p = torch.sigmoid(logits).expand(drawn, *logits.shape)
        log_w = model.log_weight(x, torch.bernoulli(p, generator=generator), logits).double()
        rows = log_w.mean(0) if count == 1 else log_w.logsumexp(0) - math.log(count)
        total += float(rows.sum())
    return total / len(images)


def objective(model: BernoulliVAE, x: Tensor, setting: Setting, generator: torch.Generator) -> Tensor:
    """The quantity that training maximises."""
    if setting.objective == "elbo":
        return model.evidence_lower_bound(x, setting.n, setting.estimator, generator=generator).mean()
    count, n = setting.importance_samples, setting.n
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


def train(
    setting: Setting, sets: tuple[Tensor, Tensor], options: argparse.Namespace, bar: common.Bar
) -> tuple[BernoulliVAE, Result]:
    """Trains one model."""
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
    result = Result(setting, [], [], [], {}, 0.0, 0.0, {})
    count = 1 if setting.objective == "elbo" else 10
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
            result.train_curve.append(bound(model, probe, count, 1))
            result.test_curve.append(bound(model, test_images[:CURVE_IMAGES], count, 2))
            bar.advance(every)
    result.train_curve[-1] = bound(model, train_images[:10000], count, 1)
    result.test_curve[-1] = bound(model, test_images, count, 2)
    if setting.objective == "bound":
        result.bounds = {str(count): bound(model, test_images, count, 2) for count in BOUND_COUNTS}
    result.running_variance = running.mean()
    result.milliseconds_per_step = elapsed / options.steps * 1e3
    return model, result


# --- variance on one model --------------------------------------------------------------------------------------------


def variances_on(model: BernoulliVAE, images: Tensor, estimators: Sequence[str], counts: Sequence[int]) -> Any:
    """Variance of each estimator's gradient with respect to the logits, on one model: by n, as text, and estimator.

    Averaged over images, summed over latents, from repeated estimates for the same images.
    """
    generator = torch.Generator().manual_seed(3)
    x = binarized(images[:VARIANCE_DATA], generator)
    table: dict[str, dict[str, float]] = {}
    for n in counts:
        row = table[str(n)] = {}
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
            variance = (second / VARIANCE_REPEATS - mean.square()) * VARIANCE_REPEATS / (VARIANCE_REPEATS - 1)
            row[estimator] = float(variance.sum(1).mean())
    return table


# --- report -----------------------------------------------------------------------------------------------------------


def identity(setting: Setting) -> tuple[str, int, int]:
    """A row of BOUND_RUNS."""
    return setting.estimator, setting.importance_samples, setting.n


def groups_of(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """Results by group and label."""
    groups: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.setting.group, {}).setdefault(result.setting.label, []).append(result)
    return groups


def print_group(group: str, runs: dict[str, list[Result]]) -> None:
    """One table: a line an estimator."""
    counts = list(next(iter(runs.values()))[0].bounds)
    tests = [f"test bound of {count}" for count in counts] or ["test bound"]
    table = common.table(group, "estimator", "evaluations", "train bound", *tests, "running variance", "ms a step")
    base = runs.get(LABELS["loorf"]) or next((r for r in runs.values() if identity(r[0].setting) == BOUND_BASE), None)
    base_variance = statistics.fmean(run.running_variance for run in base) if base else None
    for label, results in runs.items():
        variance = statistics.fmean(run.running_variance for run in results)
        relative = f"{variance / base_variance:.3f}" if base_variance else f"{variance:.3g}"
        table.add_row(
            label,
            str(results[0].setting.evaluations),
            spread([run.train_curve[-1] for run in results]),
            *(spread([run.bounds[count] for run in results]) for count in counts),
            *([] if counts else [spread([run.test_curve[-1] for run in results])]),
            relative,
            f"{statistics.fmean(run.milliseconds_per_step for run in results):.2f}",
        )
    console.print(table)
    wins = []
    for label, results in runs.items():
        if base is None or results is base:
            continue
        better = sum(mine.test_curve[-1] > theirs.test_curve[-1] for mine, theirs in zip(results, base, strict=True))
        wins.append(f"{label} {better} of {len(base)}")
    if wins and base is not None:
        name = base[0].setting.label
        console.print(f"better test bound than {name} with the same seed: {', '.join(wins)}\n", style="dim")


def print_variances(pair: str, table: dict[str, dict[str, float]]) -> None:
    """Variance of the estimators on one trained model, relative to LOORF or the first."""
    estimators = list(next(iter(table.values())))
    base = "loorf" if "loorf" in estimators else estimators[0]
    title = f"{pair}: variance of the gradient on one trained model, {LABELS[base]} with the same n = 1"
    lines = common.table(title, "n", *(LABELS[estimator] for estimator in estimators))
    for n, row in table.items():
        lines.add_row(n, *(f"{row[estimator] / row[base]:.3f}" for estimator in estimators))
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
        for label, results in runs.items():
            setting = results[0].setting
            colour, dashed = COLOURS[setting.estimator], ":" if setting.evaluations < BOUND_BASE[1] else "-"
            curves = np.array([run.test_curve for run in results])
            steps, mean = results[0].steps, curves.mean(0)
            axis.plot(steps, mean, label=label, color=colour, linestyle=dashed, linewidth=1.5)
            axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            best = max(best, float(mean.max()))
            start = float(mean[len(mean) // 8])
        axis.set_ylim(start, best + 0.06 * (best - start))
        axis.set_title(group, fontsize=10)
        axis.set_xlabel("steps")
        axis.set_ylabel("test bound, nats")
    for axis in axes.flat[: len(groups)]:
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    common.save(figure, path)


def plot_images(path: Path, model: BernoulliVAE, images: Tensor, title: str) -> None:
    """Images, their reconstructions, and draws from the prior."""
    count = 12
    side = round(images.shape[1] ** 0.5)
    x = binarized(images[:count], torch.Generator().manual_seed(4))
    lines = {
        "image": images[:count], "reconstruction": model.reconstruct(x),
        "drawn from the prior": model.generate(count, generator=torch.Generator().manual_seed(5)),
    }
    figure, axes = plt.subplots(len(lines), 1, figsize=(count * 0.8, len(lines) * 1.05))
    for axis, (name, pictures) in zip(axes, lines.items(), strict=True):
        strip = pictures.reshape(count, side, side).permute(1, 0, 2).reshape(side, count * side).numpy()
        axis.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(name, fontsize=9, loc="left")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    common.save(figure, path)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; what is not given depends on --full."""
    parser = common.arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="both data sets and models, n = 2 and 4, three seeds")
    parser.add_argument("--data", nargs="+", choices=("digits", "mnist5k", "fashion"),
                        help="default mnist5k, with --full fashion too")
    parser.add_argument("--model", nargs="+", choices=tuple(HIDDEN), help="default nonlinear, with --full both")
    parser.add_argument("--estimators", nargs="+", choices=tuple(antithetic.ESTIMATORS), metavar="NAME",
                        default=["loorf", "disarm", "arms_d", "arms_s"],
                        help=f"of {', '.join(antithetic.ESTIMATORS)}")
    parser.add_argument("--samples", nargs="+", type=common.positive, metavar="N",
                        help="samples n of each estimator: default 4, with --full 2 and 4")
    parser.add_argument("--objectives", nargs="+", choices=("elbo", "bound"), default=["elbo", "bound"],
                        help="the evidence lower bound, the importance-weighted one, or both (default)")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0, with --full 0 1 2")
    parser.add_argument("--steps", type=common.positive, help="of every run: default 3000, with --full 5000")
    parser.add_argument("--batch", type=common.positive, default=50, help="images in a step")
    parser.add_argument("--latents", type=common.positive, default=200, help="Bernoulli variables of a model")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Adam; the papers train longer with 1e-4")
    parser.add_argument("--prior-learning-rate", type=float, default=1e-2, help="SGD on the prior's logits")
    options = common.parse(parser)
    options.asked = options.data is not None
    options.data = options.data or (["mnist5k", "fashion"] if options.full else ["mnist5k"])
    options.model = options.model or (["linear", "nonlinear"] if options.full else ["nonlinear"])
    options.samples = options.samples or ([2, 4] if options.full else [4])
    options.seeds = options.seeds or ([0, 1, 2] if options.full else [0])
    options.steps = options.steps or (5000 if options.full else 3000)
    return options


def settings_of(options: argparse.Namespace, name: str, model: str) -> list[Setting]:
    """The runs on one data set with one model, seeds outermost."""
    runs = []
    for seed in options.seeds:
        for n in options.samples if "elbo" in options.objectives else ():
            runs += [Setting(name, model, "elbo", estimator, n, 1, seed) for estimator in options.estimators]
        if "bound" in options.objectives:
            runs += [Setting(name, model, "bound", estimator, n, count, seed) for estimator, count, n in BOUND_RUNS]
    return runs


def make_runs(
    name: str, model_name: str, sets: tuple[Tensor, Tensor], options: argparse.Namespace, record: common.Record,
    bar: common.Bar,
) -> list[Result]:
    """The runs on one data set with one model. The first one's stands for all: its variances and pictures."""
    results = []
    shaping = {key: getattr(options, key) for key in SHAPING}
    first = {"estimators": options.estimators, "counts": sorted({*options.samples, 8})}
    for setting in settings_of(options, name, model_name):
        analysis = None if results or setting.objective == "bound" else first
        bar.label(f"{setting.group}: {setting.label}, seed {setting.seed}")

        def make(setting: Setting = setting, analysis: dict[str, Any] | None = analysis) -> dict[str, Any]:
            model, result = train(setting, sets, options, bar)
            if analysis is not None:
                bar.label(f"{name}, {model_name}: variance on one model")
                result.variances = variances_on(model, sets[1], **analysis)
                plot_images(options.out / f"discrete_vae_{name}_{model_name}.png", model, sets[1],
                            f"{name}, {model_name}")
            return dataclasses.asdict(result)

        key = {**dataclasses.asdict(setting), **shaping, "analysis": analysis}
        found = record.run(key, make, on_found=lambda: bar.advance(options.steps))
        results.append(Result(**{**found, "setting": setting}))
    return results


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    loaded = common.load(options.data, options.root, asked=options.asked, normalise=False)
    record = common.Record(options.out / "discrete_vae.json")
    pairs = [(name, model) for name in loaded for model in options.model]
    results: list[Result] = []
    variances = {}
    with common.progress(len(pairs) * len(settings_of(options, "", "")) * options.steps) as bar:
        for name, model_name in pairs:
            (train_images, _), (test_images, _) = loaded[name]
            sets = (train_images.flatten(1), test_images.flatten(1))
            runs = make_runs(name, model_name, sets, options, record, bar)
            if runs[0].variances:
                variances[f"{name}, {model_name}"] = runs[0].variances
            results += runs
    groups = groups_of(results)
    for group, by_estimator in groups.items():
        print_group(group, by_estimator)
    for pair, table in variances.items():
        print_variances(pair, table)
    plot_curves(options.out / "discrete_vae_curves.png", groups)
    console.print(f"written: {record.path} and its plots")


if __name__ == "__main__":
    common.start(main)
