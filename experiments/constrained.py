"""Networks whose outputs satisfy A x <= b by construction: a projection, a variational autoencoder, a regression.

`python experiments/constrained.py` takes under three minutes on two cores. Records and plots go to --out.

projection: the experiment of Frerix et al. (2020): a layer learns the projection of MNIST digits onto a checkerboard,
tiles that are by turns dark and bright on average. Its time against solvers.
vae: a variational autoencoder of Fashion-MNIST whose every reconstruction and sample has that checkerboard.
regression: progression of diabetes, predicted so that it never falls where only the body mass index rises.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import data
from common import console, plt
from lowbit_ext import cone

with common.optional_packages():
    from sklearn.datasets import load_diabetes
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.isotonic import IsotonicRegression
    from sklearn.model_selection import KFold

PIXELS = 784
BATCH = 256
OURS, GREY, RED, LIGHT = "#1f5fa8", "#7f8c9a", "#c8553d", "#8fbbe0"


@dataclasses.dataclass(frozen=True)
class Images:
    """Training and test images of a data set as rows of pixels between -1 and 1."""

    name: str
    train: Tensor
    test: Tensor


def images_in_range(name: str, sets: tuple[data.Set, data.Set]) -> Images:
    """The images of a data set, scaled by its training set's least and largest value."""
    (train, _), (test, _) = sets
    low, high = train.min(), train.max()
    return Images(name, *(2 * (part.flatten(1) - low) / (high - low) - 1 for part in (train, test)))


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], ours: Sequence[int]) -> common.Table:
    """A table; the rows numbered in `ours` are bold."""
    result = common.table(title, *headings)
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
                     np.full(len(matrix), -np.inf), np.zeros(len(matrix)), verbose=False)

        def by_osqp() -> np.ndarray:
            found = []
            for point in points[:16]:
                solver.update(q=-point)
                found.append(solver.solve(raise_error=False).x)
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


def projection_layers(constraints: cone.Cone, seed: int) -> dict[str, nn.Module]:
    """The layers that learn."""
    layers: dict[str, nn.Module] = {}
    for name, build in {
        "paper: |.|, doubled lines": lambda: PaperLayer(constraints),
        "ConeLinear, |.|": lambda: cone.ConeLinear(PIXELS, constraints, "abs"),
        "ConeLinear, relu": lambda: cone.ConeLinear(PIXELS, constraints, "relu"),
    }.items():
        torch.manual_seed(seed)
        layers[name] = build()
    return layers


@torch.no_grad()
def projection_times(layers: dict[str, nn.Module], constraints: cone.Cone, test: Tensor) -> dict[str, dict[str, float]]:
    """Seconds a sample of layers and solvers, and the solvers' largest violation."""
    batch = test[:BATCH]
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        name: (lambda layer=layer: layer(batch), BATCH) for name, layer in layers.items()
    }
    calls["Cone.project, exact"] = lambda: constraints.project(batch), BATCH
    calls |= solvers(constraints._a, batch.double().numpy())
    rows: dict[str, dict[str, float]] = {}
    for name, (call, samples) in calls.items():
        rows[name] = {"seconds": seconds_per_sample(call, samples)}
        if name not in layers:
            rows[name]["violation"] = float(constraints.violation(torch.as_tensor(call())).max())
    return rows


def learn_projection(
    layer: nn.Module, constraints: cone.Cone, images: Images, epochs: int, seed: int, bar: common.Bar
) -> dict[str, Any]:
    """Trains a layer; its test error by epoch, largest violation, time, and pictures."""
    train, test = images.train, images.test
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(train) / BATCH))
    order = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    curve = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(train), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.mse_loss(layer(train[chosen]), train[chosen]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            x = layer(test)
        curve.append(float((x - test).square().mean()))
        bar.advance()
    with torch.no_grad():
        pictures = layer(test[shown(test)]).tolist()
    return {"curve": curve, "violation": float(constraints.violation(x).max()),
            "training_s": time.perf_counter() - start, "pictures": pictures}


def shown(test: Tensor) -> Tensor:
    """Numbers of the test images in the plot."""
    return torch.arange(8) * (len(test) // 8)


def projection(options: argparse.Namespace, images: Images, record: common.Record) -> dict[str, Any]:
    """Layers that learn to project onto the checkerboard, and their times beside solvers'."""
    constraints = cone.checkerboard()
    epochs = options.epochs or (60 if options.quick else 400)
    layers = projection_layers(constraints, options.seed)
    test, exact = images.test, constraints.project(images.test)
    learned: dict[str, Any] = {}
    with common.progress(len(layers) * epochs) as bar:
        bar.label("projection: times")
        rows = record.run({"what": "times", "data": images.name},
                          lambda: projection_times(layers, constraints, test))
        for name, layer in layers.items():
            bar.label(f"projection: {name}")
            key = {"what": "learning", "layer": name, "data": images.name, "epochs": epochs, "seed": options.seed}
            learned[name] = record.run(
                key, lambda layer=layer: learn_projection(layer, constraints, images, epochs, options.seed, bar),
                on_found=lambda: bar.advance(epochs),
            )
    curves = {name: found["curve"] for name, found in learned.items()}
    reached = max(curve[-1] for curve in curves.values())  # what every layer reaches
    for name, found in learned.items():
        passed = next(epoch for epoch, error in enumerate(found["curve"], 1) if error <= reached)
        rows[name]["equal_s"] = found["training_s"] * passed / epochs
        rows[name] |= {"mse": found["curve"][-1], "violation": found["violation"], "training_s": found["training_s"]}
    rows["Cone.project, exact"]["mse"] = optimum = float((exact - test).square().mean())
    chosen = shown(test)
    pictures = {"input": test[chosen], "exact projection": exact[chosen]}
    pictures = {name: images.tolist() for name, images in pictures.items()}
    pictures["ConeLinear, relu"] = learned["ConeLinear, relu"]["pictures"]
    return {"optimum_mse": optimum, "rows": rows, "curves": curves, "pictures": pictures}


def projection_table(result: dict[str, Any]) -> common.Table:
    """Accuracy, violation and time."""
    ours_s = result["rows"]["ConeLinear, |.|"]["seconds"]
    lines = []
    for name, row in result["rows"].items():
        error = f"{row['mse']:.4f}" if "mse" in row else ""
        times = [f"{1e6 * row['seconds']:,.1f}", f"{row['seconds'] / ours_s:.3g}x"]
        training = [f"{row['training_s']:.0f}", f"{row['equal_s']:.0f}"] if "training_s" in row else ["", ""]
        lines.append([name, error, f"{row['violation']:.1e}", *times, *training])
    headings = ("", "test MSE", "A x <=", "µs a sample", "relative", "training s", "to equal MSE s")
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
                   padding=3)
    bars.set(xscale="log", xlabel="µs a sample (log scale)", title=f"Time at batch {BATCH}, ours in blue")
    bars.invert_yaxis()
    bars.set_xlim(right=4e6 * times[-1][0])
    grid = bottom.subplots(len(result["pictures"]), 8)
    for row, (name, images) in zip(grid, result["pictures"].items(), strict=True):
        show(row, name, images)
    common.save(figure, path)


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


def train_vae(
    head: Callable[[], nn.Module], weight: float, constraints: cone.Cone, images: Images, epochs: int, seed: int,
    bar: common.Bar,
) -> tuple[Vae, float]:
    """An autoencoder, trained with a penalty of this weight on violations; and the seconds that took."""
    rows = torch.from_numpy(constraints._a).float()
    torch.manual_seed(seed)
    model = Vae(head())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    start = time.perf_counter()
    for _ in range(epochs):
        for part in images.train[torch.randperm(len(images.train))].split(128):
            optimizer.zero_grad()
            reconstruction, bound, _ = model(part)
            penalty = F.relu(reconstruction @ rows.T).square().sum(1)
            (weight * penalty - bound).mean().backward()
            optimizer.step()
        bar.advance()
    return model, time.perf_counter() - start


@torch.no_grad()
def vae_report(
    model: Vae, constraints: cone.Cone, test: Tensor, seed: int, seconds: float, *, projects: bool
) -> dict[str, Any]:
    """Bound, error, violations and pictures of a trained model as it is and, if asked, with its outputs projected."""

    def measures(x: Tensor, generated: Tensor, bound: Tensor) -> dict[str, float]:
        return {
            "bound_nats": float(bound.mean()), "mse": float((x - test).square().mean()),
            "violation": float(constraints.violation(x).max()),
            "sample_violation": float(constraints.violation(generated).max()),
            "valid_percent": 100 * float(constraints.contains(generated).double().mean()), "training_s": seconds,
        }

    torch.manual_seed(seed)
    reconstruction, bound, divergence = model(test)
    sampled = model.decoder(torch.randn(SAMPLES, LATENT))
    result = {"as it is": measures(reconstruction, sampled, bound), "reconstructions": reconstruction[:8].tolist(),
              "samples": sampled[:8].tolist()}
    if projects:
        projected = constraints.project(reconstruction)
        # The variance that suits the projected reconstructions, which are farther from the images.
        model.log_variance.fill_(float((projected - test).square().mean().log()))
        bound = model.likelihood(test, projected) - divergence
        result["projected"] = measures(projected, constraints.project(sampled), bound)
    return result


def vae(options: argparse.Namespace, images: Images, record: common.Record) -> dict[str, Any]:
    """Autoencoders with and without the constraint."""
    if options.quick:
        images = dataclasses.replace(images, train=images.train[:20000], test=images.test[:2000])
    constraints = cone.checkerboard()
    epochs = options.epochs or (8 if options.quick else 40)
    heads: dict[str, tuple[Callable[[], nn.Module], float]] = {
        "unconstrained": (lambda: nn.Linear(256, PIXELS), 0.0),
        "penalty, weight 1": (lambda: nn.Linear(256, PIXELS), 1.0),
        "penalty, weight 100": (lambda: nn.Linear(256, PIXELS), 100.0),
        "ConeLinear": (lambda: cone.ConeLinear(256, constraints), 0.0),
    }
    results: dict[str, Any] = {}
    pictures: dict[str, Any] = {"test image": images.test[:8].tolist()}
    samples: dict[str, Any] = {}
    with common.progress(len(heads) * epochs) as bar:
        for name, (head, weight) in heads.items():
            bar.label(f"vae: {name}")

            def make(
                name: str = name, head: Callable[[], nn.Module] = head, weight: float = weight
            ) -> dict[str, Any]:
                model, seconds = train_vae(head, weight, constraints, images, epochs, options.seed, bar)
                return vae_report(
                    model, constraints, images.test, options.seed, seconds, projects=name == "unconstrained"
                )

            key = {"what": "vae", "head": name, "data": images.name, "images": len(images.train), "epochs": epochs,
                   "seed": options.seed}
            found = record.run(key, make, on_found=lambda: bar.advance(epochs))
            results[name] = found["as it is"]
            if name == "unconstrained":
                results["..., projected afterwards"] = found["projected"]
            if name != "penalty, weight 100":
                pictures[name], samples[name] = found["reconstructions"], found["samples"]
    return {"data": images.name, "results": results, "reconstructions": pictures, "samples": samples}


def vae_table(result: dict[str, Any]) -> common.Table:
    """Bound and violations."""
    rows = [
        [name, f"{run['bound_nats']:.1f}", f"{run['mse']:.4f}", f"{run['violation']:.1e}",
         f"{run['sample_violation']:.1e}", f"{run['valid_percent']:.1f} %", f"{run['training_s']:.0f}"]
        for name, run in result["results"].items()
    ]
    headings = ("", "bound (nats)", "MSE", "largest A x", "... of samples", "valid samples", "training s")
    title = f"Variational autoencoder of {result['data']} with a checkerboard: test set and {SAMPLES} samples"
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
    common.save(figure, path)


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


def regression(options: argparse.Namespace, images: None, record: common.Record) -> dict[str, Any]:
    """Cross-validated error, and the largest fall of a prediction where only the body mass index rises."""
    bunch = load_diabetes()
    x, y = bunch.data / bunch.data.std(0), bunch.target
    repeats = 1 if options.quick else 10
    grid = np.linspace(x[:, BODY_MASS].min(), x[:, BODY_MASS].max(), 80)

    def fold(name: str, repeat: int, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
        predict = METHODS[name](x[train], y[train], options.seed + repeat)
        patients = np.repeat(x[test], len(grid), axis=0)
        patients[:, BODY_MASS] = np.tile(grid, len(test))
        predicted = predict(patients).reshape(len(test), -1)
        return {"mse": float(np.mean((predict(x[test]) - y[test]) ** 2)),
                "fall": float(-np.diff(predicted, axis=1).min()), "curves": predicted[:PATIENTS].tolist()}

    results: dict[str, Any] = {name: {"mse": [], "fall": 0.0} for name in METHODS}
    curves: dict[str, Any] = {}
    with common.progress(5 * repeats * len(METHODS)) as bar:
        for repeat in range(repeats):
            for number, parts in enumerate(KFold(5, shuffle=True, random_state=repeat).split(x)):
                for name in METHODS:
                    bar.label(f"regression: {name}")
                    key = {"what": "regression", "method": name, "repeat": repeat, "fold": number, "seed": options.seed}
                    arguments = name, repeat, *parts
                    found = record.run(key, lambda arguments=arguments: fold(*arguments))
                    results[name]["mse"].append(found["mse"])
                    results[name]["fall"] = max(results[name]["fall"], found["fall"])
                    curves.setdefault(name, found["curves"])
                    bar.advance()
    return {"results": results, "variance": float(y.var()), "curves": curves, "grid": grid.tolist()}


def regression_table(result: dict[str, Any]) -> common.Table:
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
    common.save(figure, path)


# --- the run ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[..., Any], Callable[..., common.Table], Callable[..., None]]] = {
    "projection": (projection, projection_table, projection_plot),
    "vae": (vae, vae_table, vae_plot),
    "regression": (regression, regression_table, regression_plot),
}
IMAGES = {"projection": "mnist5k", "vae": "fashion"}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", default=True, help="under three minutes")
    size.add_argument("--full", dest="quick", action="store_false", help="all images, more epochs and folds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--epochs", type=common.positive, help="of projection and vae, in place of their own")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    return common.parse(parser)


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    warnings.filterwarnings("ignore", module="cvxpy.*|diffcp.*")
    start = time.perf_counter()
    images = {}
    for part in IMAGES.keys() & options.only:
        ((name, sets),) = common.load([IMAGES[part]], options.root, asked=False).items()
        images[part] = images_in_range(name, sets)
    for part in options.only:
        make, make_table, make_plot = PARTS[part]
        record = common.Record(options.out / f"constrained_{part}.json")
        result = make(options, images.get(part), record)
        picture = options.out / f"constrained_{part}.png"
        make_plot(picture, result)
        console.print(make_table(result))
        console.print(f"written: {record.path}, {picture}\n", style="dim")
    console.print(f"{time.perf_counter() - start:.0f} s on {options.threads} threads")


if __name__ == "__main__":
    common.start(main)
