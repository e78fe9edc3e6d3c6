"""Networks whose outputs satisfy A x <= b by construction: a projection, a variational autoencoder, a regression.

`python examples/constrained.py` takes under three minutes on two cores. Tables on the terminal; JSON, plots in --out.

projection: the experiment of Frerix et al. (2020): a layer learns the projection of MNIST digits onto a checkerboard,
tiles that are by turns dark and bright on average. Its time against solvers.
vae: a variational autoencoder of Fashion-MNIST whose every reconstruction and sample has that checkerboard.
regression: progression of diabetes, predicted so that it never falls where only the body mass index rises.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from lowbit_ext import cone

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_diabetes
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.isotonic import IsotonicRegression
    from sklearn.model_selection import KFold
except ImportError as error:
    sys.exit(f'examples/constrained.py needs {error.name}: pip install "lowbit-ext[examples]"')

PIXELS = 784
BATCH = 256
OURS, GREY, RED, LIGHT = "#1f5fa8", "#7f8c9a", "#c8553d", "#8fbbe0"


def images_in_range(name: str, root: Path | None) -> tuple[Tensor, Tensor]:
    """Training and test images as rows of pixels between -1 and 1."""
    (train, _), (test, _) = data.load(name, root)
    low, high = train.min(), train.max()
    return 2 * (train.flatten(1) - low) / (high - low) - 1, 2 * (test.flatten(1) - low) / (high - low) - 1


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], ours: Sequence[int]) -> Table:
    """A table; the rows numbered in `ours` are bold."""
    result = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for index, row in enumerate(rows):
        result.add_row(*row, style="bold" if index in ours else "")
    return result


def show(row: Sequence[Any], name: str, images: Any) -> None:
    """A row of images, white on black, under a heading."""
    for axes, image in zip(row, images, strict=True):
        axes.imshow(np.reshape(image, (28, 28)), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    row[0].set_title(name, fontsize=9, loc="left")


# --- projection -------------------------------------------------------------------------------------------------------


class PaperLayer(nn.Module):
    """The layer as the paper has it: every line as two rays, |affine map| times the dense generators."""

    def __init__(self, constraints: cone.Cone) -> None:
        super().__init__()
        lines = constraints.lines
        self.register_buffer("generators", torch.cat([constraints.rays, lines, -lines]).float())
        self.linear = nn.Linear(PIXELS, len(self.generators))
        for parameter in self.linear.parameters():
            nn.init.uniform_(parameter, -1 / PIXELS, 1 / PIXELS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 784) -> (N, 784)."""
        return self.linear(x).abs() @ self.generators


def seconds_per_sample(call: Callable[[], Any], samples: int, limit_s: float = 0.7) -> float:
    """Median time a sample of repeated calls."""
    call()
    times: list[float] = []
    end = time.perf_counter() + limit_s
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) / samples)
    return statistics.median(times)


def solvers(matrix: np.ndarray, points: np.ndarray) -> dict[str, tuple[Callable[[], Any], int]]:
    """Projections of points by solvers, of those that are installed: calls and how many points each projects."""
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    try:
        import osqp
        import scipy.sparse

        solver = osqp.OSQP()
        solver.setup(scipy.sparse.identity(PIXELS, format="csc"), -points[0], scipy.sparse.csc_matrix(matrix),
                     np.full(len(matrix), -np.inf), np.zeros(len(matrix)), verbose=False)  # fmt: skip

        def by_osqp() -> np.ndarray:
            found = []
            for point in points[:16]:
                solver.update(q=-point)
                found.append(solver.solve().x)
            return np.stack(found)

        calls["OSQP, set up once"] = by_osqp, 16
    except ImportError:
        print("osqp is not installed, its row is left out: pip install osqp")
    try:
        import cvxpy
        from cvxpylayers.torch import CvxpyLayer

        variable, parameter = cvxpy.Variable(PIXELS), cvxpy.Parameter(PIXELS)
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(variable - parameter)), [matrix @ variable <= 0])

        def by_cvxpy() -> np.ndarray:
            found = []
            for point in points[:4]:
                parameter.value = point
                problem.solve(solver=cvxpy.OSQP)
                found.append(variable.value.copy())
            return np.stack(found)

        layer, batch = CvxpyLayer(problem, parameters=[parameter], variables=[variable]), torch.from_numpy(points)
        calls["OSQP through cvxpy"] = by_cvxpy, 4
        calls["cvxpylayers"] = lambda: layer(batch)[0], len(points)
    except ImportError as error:
        print(f"{error.name} is not installed, its row is left out: pip install cvxpy cvxpylayers")
    return calls


def projection(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Trains layers to project onto the checkerboard; times them and solvers."""
    train, test = images_in_range("mnist5k", None)
    constraints = cone.checkerboard()
    exact = constraints.project(test)
    models: dict[str, nn.Module] = {}
    for name, build in {
        "paper: |.|, doubled lines": lambda: PaperLayer(constraints),
        "ConeLinear, |.|": lambda: cone.ConeLinear(PIXELS, constraints, "abs"),
        "ConeLinear, relu": lambda: cone.ConeLinear(PIXELS, constraints, "relu"),
    }.items():
        torch.manual_seed(options.seed)
        models[name] = build()
    batch = test[:BATCH]
    rows: dict[str, Any] = {}
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        name: (lambda model=model: model(batch), BATCH) for name, model in models.items()
    }
    calls["Cone.project, exact"] = lambda: constraints.project(batch), BATCH
    calls |= solvers(constraints._a, batch.double().numpy())
    task = progress.add_task("projection: times", total=len(calls))
    with torch.no_grad():
        for name, (call, samples) in calls.items():
            rows[name] = {"seconds": seconds_per_sample(call, samples)}
            if name not in models:
                rows[name]["violation"] = float(constraints.violation(torch.as_tensor(call())).max())
            progress.advance(task)

    epochs = 60 if options.quick else 400
    curves: dict[str, list[float]] = {}
    for name, model in models.items():
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        steps = epochs * math.ceil(len(train) / BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.Generator().manual_seed(options.seed)
        task = progress.add_task(f"projection: {name}", total=epochs)
        start = time.perf_counter()
        curve = []
        for _ in range(epochs):
            for chosen in torch.randperm(len(train), generator=order).split(BATCH):
                optimizer.zero_grad()
                F.mse_loss(model(train[chosen]), train[chosen]).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                x = model(test)
            curve.append(float((x - test).square().mean()))
            progress.advance(task)
        curves[name] = curve
        rows[name] |= {"mse": curve[-1], "violation": float(constraints.violation(x).max()),
                       "training_s": time.perf_counter() - start}  # fmt: skip
    rows["Cone.project, exact"]["mse"] = optimum = float((exact - test).square().mean())
    chosen = torch.arange(8) * (len(test) // 8)
    with torch.no_grad():
        learned = models["ConeLinear, relu"](test[chosen])
    pictures = {"input": test[chosen], "exact projection": exact[chosen], "ConeLinear, relu": learned}
    pictures = {name: images.tolist() for name, images in pictures.items()}
    return {"optimum_mse": optimum, "rows": rows, "curves": curves, "pictures": pictures}


def projection_table(result: dict[str, Any]) -> Table:
    """Accuracy, violation and time."""
    ours_s = result["rows"]["ConeLinear, |.|"]["seconds"]
    lines = [
        [name, f"{row['mse']:.4f}" if "mse" in row else "", f"{row['violation']:.1e}", f"{1e6 * row['seconds']:,.1f}",
         f"{row['seconds'] / ours_s:.3g}x", f"{row['training_s']:.0f}" if "training_s" in row else ""]
        for name, row in result["rows"].items()
    ]  # fmt: skip
    headings = ("", "test MSE", "largest A x", "µs a sample", "of ConeLinear |.|", "training s")
    title = f"Projection of MNIST digits onto the checkerboard, batch {BATCH}"
    return table(title, headings, lines, [i for i, line in enumerate(lines) if line[0].startswith("Cone")])


def projection_plot(path: Path, result: dict[str, Any]) -> None:
    """Error over epochs, time a sample, and pictures."""
    figure = plt.figure(figsize=(11.5, 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    curves, bars = top.subplots(1, 2)
    for (name, curve), colour in zip(result["curves"].items(), (GREY, LIGHT, OURS), strict=True):
        curves.plot(range(1, len(curve) + 1), curve, color=colour, label=f"{name}, {curve[-1]:.3f}")
    optimum = result["optimum_mse"]
    curves.axhline(optimum, color=RED, linestyle="--", label=f"optimum: exact projection, {optimum:.3f}")
    top_of_axis = 2 * max(curve[-1] for curve in result["curves"].values())
    curves.set(xlabel="epoch", ylabel="mean squared error, test", ylim=(0.9 * optimum, top_of_axis))
    curves.set_title("Learning the projection")
    curves.legend(frameon=False)
    times = sorted((row["seconds"], name) for name, row in result["rows"].items())
    colours = [OURS if name.startswith("Cone") else GREY for _, name in times]
    drawn = bars.barh([name for _, name in times], [1e6 * value for value, _ in times], color=colours)
    bars.bar_label(drawn, [f"{1e6 * value:,.3g}" if value < 1e-3 else f"{1e6 * value:,.0f}" for value, _ in times],
                   padding=3)  # fmt: skip
    bars.set(xscale="log", xlabel="µs a sample (log scale)", title=f"Time at batch {BATCH}, ours in blue")
    bars.invert_yaxis()
    bars.set_xlim(right=4e6 * times[-1][0])
    grid = bottom.subplots(len(result["pictures"]), 8)
    for row, (name, images) in zip(grid, result["pictures"].items(), strict=True):
        show(row, name, images)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- variational autoencoder ------------------------------------------------------------------------------------------

LATENT = 16
SAMPLES = 2000


class Vae(nn.Module):
    """Gaussian decoder with one learned variance; `head` maps 256 features to 784 pixels."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 256), nn.ReLU(), head)
        self.log_variance = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction; evidence lower bound and its Kullback-Leibler part in nats, for every image."""
        mean, log_scale = self.encoder(x).chunk(2, 1)
        reconstruction = self.decoder(mean + torch.randn_like(mean) * log_scale.exp())
        divergence = 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(1)
        return reconstruction, self.likelihood(x, reconstruction) - divergence, divergence

    def likelihood(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """Logarithm of the Gaussian density."""
        error = (x - reconstruction).square().sum(1)
        return -0.5 * (error / self.log_variance.exp() + PIXELS * (self.log_variance + math.log(2 * math.pi)))


def vae(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Trains autoencoders with and without the constraint."""
    train, test = images_in_range("fashion", options.root)
    if options.quick:
        train, test = train[:20000], test[:2000]
    constraints = cone.checkerboard()
    rows = torch.from_numpy(constraints._a).float()
    epochs = 8 if options.quick else 40
    heads: dict[str, tuple[Callable[[], nn.Module], float]] = {
        "unconstrained": (lambda: nn.Linear(256, PIXELS), 0.0),
        "penalty, weight 1": (lambda: nn.Linear(256, PIXELS), 1.0),
        "penalty, weight 100": (lambda: nn.Linear(256, PIXELS), 100.0),
        "ConeLinear": (lambda: cone.ConeLinear(256, constraints), 0.0),
    }
    results: dict[str, Any] = {}
    pictures: dict[str, Any] = {"test image": test[:8].tolist()}
    samples: dict[str, Any] = {}
    for name, (head, weight) in heads.items():
        torch.manual_seed(options.seed)
        model = Vae(head())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        task = progress.add_task(f"vae: {name}", total=epochs)
        start = time.perf_counter()
        for _ in range(epochs):
            for part in train[torch.randperm(len(train))].split(128):
                optimizer.zero_grad()
                reconstruction, bound, _ = model(part)
                penalty = F.relu(reconstruction @ rows.T).square().sum(1)
                (weight * penalty - bound).mean().backward()
                optimizer.step()
            progress.advance(task)
        seconds = time.perf_counter() - start

        def report(x: Tensor, generated: Tensor, bound: Tensor, seconds: float = seconds) -> dict[str, float]:
            return {
                "bound_nats": float(bound.mean()), "mse": float((x - test).square().mean()),
                "violation": float(constraints.violation(x).max()),
                "sample_violation": float(constraints.violation(generated).max()),
                "valid_percent": 100 * float(constraints.contains(generated).double().mean()), "training_s": seconds,
            }  # fmt: skip

        with torch.no_grad():
            torch.manual_seed(options.seed)
            reconstruction, bound, divergence = model(test)
            sampled = model.decoder(torch.randn(SAMPLES, LATENT))
            results[name] = report(reconstruction, sampled, bound)
            if name == "unconstrained":
                projected = constraints.project(reconstruction)
                after = copy.deepcopy(model)
                # The variance that suits the projected reconstructions, which are farther from the images.
                after.log_variance.fill_(float((projected - test).square().mean().log()))
                bound = after.likelihood(test, projected) - divergence
                results["..., projected afterwards"] = report(projected, constraints.project(sampled), bound)
        if name in ("unconstrained", "penalty, weight 1", "ConeLinear"):
            pictures[name], samples[name] = reconstruction[:8].tolist(), sampled[:8].tolist()
    return {"results": results, "reconstructions": pictures, "samples": samples}


def vae_table(result: dict[str, Any]) -> Table:
    """Bound and violations."""
    rows = [
        [name, f"{run['bound_nats']:.1f}", f"{run['mse']:.4f}", f"{run['violation']:.1e}",
         f"{run['sample_violation']:.1e}", f"{run['valid_percent']:.1f} %", f"{run['training_s']:.0f}"]
        for name, run in result["results"].items()
    ]  # fmt: skip
    headings = ("", "bound (nats)", "MSE", "largest A x", "... of samples", "valid samples", "training s")
    title = f"Variational autoencoder of Fashion-MNIST with a checkerboard: test set and {SAMPLES} samples"
    return table(title, headings, rows, [len(rows) - 1])


def vae_plot(path: Path, result: dict[str, Any]) -> None:
    """Reconstructions on the left, samples on the right."""
    figure = plt.figure(figsize=(14, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.04)
    left.suptitle("Reconstructions of test images", fontsize=11)
    right.suptitle("Samples", fontsize=11)
    grid = left.subplots(len(result["reconstructions"]), 8)
    for row, (name, images) in zip(grid, result["reconstructions"].items(), strict=True):
        show(row, name, images)
    grid = right.subplots(len(result["samples"]), 8)
    for row, (name, images) in zip(grid, result["samples"].items(), strict=True):
        show(row, name, images)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- regression -------------------------------------------------------------------------------------------------------

BODY_MASS = 2  # column of the body mass index
KNOTS = 12
PATIENTS = 12  # drawn in the plot


class CurveRegression(nn.Module):
    """Piecewise linear in the body mass index, with values at the knots that depend on the other features.

    Args:
        knots: positions, increasing.
        features: size of the input.
        head: 32 numbers -> values at the knots; a ConeLinear over monotone sequences makes every curve monotone.
    """

    def __init__(self, knots: Tensor, features: int, head: nn.Module) -> None:
        super().__init__()
        self.register_buffer("knots", knots)
        self.body = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), head)

    def forward(self, x: Tensor) -> Tensor:
        """(N, features) -> (N,)."""
        others = x.index_fill(1, torch.tensor([BODY_MASS]), 0)
        position = x[:, BODY_MASS].clamp(float(self.knots[0]), float(self.knots[-1])).contiguous()
        right = torch.searchsorted(self.knots, position).clamp(1, len(self.knots) - 1)
        share = (position - self.knots[right - 1]) / (self.knots[right] - self.knots[right - 1])
        values = self.body(others)
        low, high = (values.gather(1, index.unsqueeze(1)).squeeze(1) for index in (right - 1, right))
        return low + share * (high - low)


Predict = Callable[[np.ndarray], np.ndarray]


def fit_network(x: np.ndarray, y: np.ndarray, monotone: bool, seed: int) -> Predict:
    """Trains a network on standardised targets; returns its prediction function."""
    torch.manual_seed(seed)
    inputs, mean, deviation = torch.from_numpy(x).float(), y.mean(), y.std()
    targets = torch.from_numpy((y - mean) / deviation).float()
    knots = torch.unique(torch.quantile(inputs[:, BODY_MASS], torch.linspace(0, 1, KNOTS)))
    head = cone.ConeLinear(32, cone.monotone(len(knots))) if monotone else nn.Linear(32, len(knots))
    model = CurveRegression(knots, x.shape[1], head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1.0)
    for _ in range(80):
        for part in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            F.mse_loss(model(inputs[part]), targets[part]).backward()
            optimizer.step()

    @torch.no_grad()
    def predict(points: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(points).float()).double().numpy() * deviation + mean

    return predict


def fit_isotonic(x: np.ndarray, y: np.ndarray, seed: int) -> Predict:
    """Isotonic regression on the body mass index alone."""
    model = IsotonicRegression(out_of_bounds="clip").fit(x[:, BODY_MASS], y)
    return lambda points: model.predict(points[:, BODY_MASS])


def fit_boosting(x: np.ndarray, y: np.ndarray, monotone: bool, seed: int) -> Predict:
    """Gradient boosting of trees."""
    constraint = [int(index == BODY_MASS) for index in range(x.shape[1])]
    model = HistGradientBoostingRegressor(
        monotonic_cst=constraint if monotone else None, learning_rate=0.05, max_iter=80, max_depth=3, random_state=seed
    )
    return model.fit(x, y).predict


METHODS: dict[str, Callable[[np.ndarray, np.ndarray, int], Predict]] = {
    "isotonic regression, 1 feature": fit_isotonic,
    "gradient boosting": lambda x, y, seed: fit_boosting(x, y, False, seed),
    "gradient boosting, monotone": lambda x, y, seed: fit_boosting(x, y, True, seed),
    "network": lambda x, y, seed: fit_network(x, y, False, seed),
    "network, ConeLinear": lambda x, y, seed: fit_network(x, y, True, seed),
}


def regression(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Cross-validated error, and the largest fall of a prediction where only the body mass index rises."""
    bunch = load_diabetes()
    x, y = bunch.data / bunch.data.std(0), bunch.target
    repeats = 1 if options.quick else 10
    grid = np.linspace(x[:, BODY_MASS].min(), x[:, BODY_MASS].max(), 80)
    results: dict[str, Any] = {name: {"mse": [], "fall": 0.0} for name in METHODS}
    curves: dict[str, Any] = {}
    task = progress.add_task("regression", total=5 * repeats * len(METHODS))
    for repeat in range(repeats):
        for train, test in KFold(5, shuffle=True, random_state=repeat).split(x):
            for name, fit in METHODS.items():
                predict = fit(x[train], y[train], options.seed + repeat)
                results[name]["mse"].append(float(np.mean((predict(x[test]) - y[test]) ** 2)))
                patients = np.repeat(x[test], len(grid), axis=0)
                patients[:, BODY_MASS] = np.tile(grid, len(test))
                predicted = predict(patients).reshape(len(test), -1)
                results[name]["fall"] = max(results[name]["fall"], float(-np.diff(predicted, axis=1).min()))
                curves.setdefault(name, predicted[:PATIENTS].tolist())
                progress.advance(task)
    return {"results": results, "variance": float(y.var()), "curves": curves, "grid": grid.tolist()}


def regression_table(result: dict[str, Any]) -> Table:
    """Errors and falls."""
    rows = []
    for name, run in result["results"].items():
        mean, error = statistics.fmean(run["mse"]), statistics.stdev(run["mse"]) / math.sqrt(len(run["mse"]))
        share = 1 - mean / result["variance"]
        rows.append([name, f"{mean:.0f} ± {error:.0f}", f"{share:.3f}", f"{run['fall']:.2g}"])
    headings = ("", "test MSE", "R²", "largest fall")
    title = "Progression of diabetes, monotone in the body mass index: five-fold cross-validation"
    return table(title, headings, rows, [len(rows) - 1])


def regression_plot(path: Path, result: dict[str, Any]) -> None:
    """Predictions for some test patients as their body mass index varies."""
    names = list(result["curves"])[1:]
    figure, grid = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.6), sharey=True, layout="constrained")
    for axes, name in zip(grid, names, strict=True):
        for curve in result["curves"][name]:
            falls = np.diff(curve).min() < -1e-3
            axes.plot(result["grid"], curve, color=RED if falls else OURS, linewidth=1.1)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("body mass index (standardised)")
    grid[0].set_ylabel("predicted progression")
    figure.suptitle(f"The same {PATIENTS} test patients, were their body mass index another (red: falls somewhere)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- the run ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[..., Any], Callable[..., Table], Callable[..., None]]] = {
    "projection": (projection, projection_table, projection_plot),
    "vae": (vae, vae_table, vae_plot),
    "regression": (regression, regression_table, regression_plot),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", default=True, help="under three minutes")
    size.add_argument("--full", dest="quick", action="store_false", help="all images, more epochs and folds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--root", type=Path, help="folder of the Fashion-MNIST files")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--out", type=Path, default=Path("examples_out"), help="folder for results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    torch.set_num_threads(max(1, options.threads))
    warnings.filterwarnings("ignore", module="cvxpy.*|diffcp.*")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    console = Console() if sys.stdout.isatty() else Console(width=120)
    start = time.perf_counter()
    columns = (TextColumn("{task.description:38}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            run, make_table, make_plot = PARTS[name]
            with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
                result = run(options, progress)
            stem = options.out / f"constrained_{name}"
            stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            make_plot(stem.with_suffix(".png"), result)
            console.print(make_table(result))
            console.print(f"written: {stem}.json, .png\n", style="dim", highlight=False)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(str(error))
    console.print(f"{time.perf_counter() - start:.0f} s on {options.threads} threads", highlight=False)


if __name__ == "__main__":
    main()
