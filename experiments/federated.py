"""Semi-supervised federated learning on real images: labels on the server, unlabelled images on ten users.

Compares consistency with self-training, group with batch normalisation, grouping with FedAvg, alternate training, and
messages of 32, 4 and 1 bits, each beside the server trained alone on its labels for as many steps.
`python experiments/federated.py` takes about four minutes on two cores; `--full` is the whole comparison. A record of
all runs and a plot go to --out. `--engine flower` sends one configuration through Flower and Ray.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common
import data
from common import console, plt, spread
from lowbit_ext import federated
from lowbit_ext.federated._simulate import Trainer, copy_of

USERS = 10
SERVER_ONLY = "server alone"
# Options that change every run.
SHAPING = ("data", "labelled", "non_iid", "rounds", "steps", "warm_up", "batch", "learning_rate", "threshold",
           "test_every")
MIRRORED = {"fashion", "cifar10"}  # whose mirror images are of the same class
NORMS = {"BN": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(8, channels)}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to train."""

    objective: str = "consistency"
    norm: str = "GN"
    groups: int = 2
    alternate: int = 0
    bits: int = 32

    def __str__(self) -> str:
        parts = ["CRL" if self.objective == "consistency" else "self-training", self.norm]
        parts.append("FedAvg" if self.groups == 1 else f"{self.groups} groups")
        if self.alternate:
            parts.append("alternate")
        if self.bits != 32:
            parts.append(f"{self.bits}-bit")
        return ", ".join(parts)


QUICK = [Configuration(), Configuration(groups=1), Configuration(bits=4), Configuration(groups=1, alternate=8)]
FULL = [
    *(Configuration(objective, norm, groups)
      for objective in ("consistency", "self_training") for norm in ("GN", "BN") for groups in (2, 1)),
    Configuration(groups=1, alternate=8), Configuration(alternate=8), Configuration(bits=4), Configuration(bits=1),
]


def network(channels: int, size: int, norm: str) -> nn.Sequential:
    """Three convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), NORMS[norm](width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels, size = width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, data.CLASSES))


@dataclasses.dataclass
class Problem:
    """What a seed and a data set give every configuration."""

    server: tuple[Tensor, Tensor]
    users: list[Tensor]
    user_labels: list[Tensor]
    test: tuple[Tensor, Tensor]
    level: float


def problem(sets: tuple[data.Set, data.Set], options: argparse.Namespace, seed: int) -> Problem:
    """Draws the split of a data set."""
    (images, labels), test = sets
    split = federated.partition(
        labels, USERS, options.non_iid, labelled=options.labelled, generator=torch.Generator().manual_seed(seed)
    )
    return Problem(
        (images[split.server], labels[split.server]),
        [images[user] for user in split.users],
        [labels[user] for user in split.users],
        test,
        federated.non_iid_level(split.counts(labels)),
    )


def settings_of(configuration: Configuration, options: argparse.Namespace, seed: int) -> federated.Settings:
    """The simulation's settings of a configuration."""
    return federated.Settings(
        rounds=options.rounds, steps=options.steps, groups=configuration.groups, objective=configuration.objective,
        threshold=options.threshold, learning_rate=options.learning_rate, batch=options.batch, warm_up=options.warm_up,
        alternate=configuration.alternate, bits=configuration.bits, flip=options.data in MIRRORED, seed=seed,
    )


def model_of(given: Problem, norm: str, seed: int) -> nn.Sequential:
    """The first state of a seed."""
    torch.manual_seed(seed)
    return network(given.server[0].shape[1], given.server[0].shape[2], norm)


def run(
    configuration: Configuration, given: Problem, options: argparse.Namespace, seed: int, on_round: Callable[[], None]
) -> dict[str, Any]:
    """One simulation, as JSON."""
    began = time.perf_counter()
    result = federated.simulate(
        model_of(given, configuration.norm, seed), given.server, given.users,
        settings_of(configuration, options, seed), user_labels=given.user_labels, test=given.test,
        test_every=options.test_every, on_round=lambda report: on_round(),
    )
    return {
        "name": str(configuration), "seed": seed, "seconds": time.perf_counter() - began,
        "rounds": [dataclasses.asdict(report) for report in result.history],
    }


def run_server_alone(
    given: Problem, options: argparse.Namespace, seed: int, on_round: Callable[[], None]
) -> dict[str, Any]:
    """The baseline: the server's steps without users."""
    settings = settings_of(Configuration(), options, seed)
    trainer = Trainer(model_of(given, "GN", seed), settings)
    began = time.perf_counter()
    state = copy_of(trainer.model.state_dict())

    def train(rate: float, steps: int, *names: object) -> dict[str, Tensor]:
        return trainer.supervised(state, *given.server, rate, steps, trainer.generator(*names))

    state = train(settings.learning_rate, settings.warm_up, "warm-up")
    rounds = []
    for number in range(settings.rounds):
        state = train(trainer.rate(number), settings.steps, "server", number)
        report = federated.RoundReport(number, [])
        if (number + 1) % options.test_every == 0 or number + 1 == settings.rounds:
            report.measures["accuracy"] = trainer.accuracy(state, *given.test)
        rounds.append(dataclasses.asdict(report))
        on_round()
    return {"name": SERVER_ONLY, "seed": seed, "seconds": time.perf_counter() - began, "rounds": rounds}


def run_flower(given: Problem, options: argparse.Namespace) -> None:
    """The first configuration through Flower: ten nodes, the server training beside them."""
    from flwr.app import Context
    from flwr.simulation import run_simulation

    configuration, seed = QUICK[0], options.seeds[0]
    settings = settings_of(configuration, options, seed)
    model = model_of(given, configuration.norm, seed)
    trainer = Trainer(model, settings)
    start = copy_of(model.state_dict())
    if settings.warm_up:
        start = trainer.supervised(
            start, *given.server, settings.learning_rate, settings.warm_up, trainer.generator("warm-up")
        )

    def server(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        generator = trainer.generator("server", number)
        return trainer.supervised(state, *given.server, trainer.rate(number), settings.steps, generator)

    def training(context: Context) -> Any:
        user = int(context.node_config["partition-id"])
        own = Trainer(model_of(given, configuration.norm, seed), settings)

        def step(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
            torch.set_num_threads(1)
            generator = own.generator("user", user, number)
            return own.unsupervised(state, given.users[user], None, own.rate(number), settings.steps, generator)

        return step

    def strategy(context: Context) -> federated.GroupedAveraging:
        return federated.GroupedAveraging(
            start, server, minimum=USERS, groups=configuration.groups, seed=seed, bits=configuration.bits,
            skip=federated.norm_parameters(model), on_round=show,
        )

    def show(report: federated.RoundReport[int]) -> None:
        print(f"round {report.round}: diversity {report.normalised_diversity:.2f}, lost {len(report.lost)}, "
              f"{report.bytes_down + report.bytes_up:,} bytes", flush=True)

    def end(strategy: federated.GroupedAveraging) -> None:
        tested = Trainer(model_of(given, configuration.norm, seed), settings)
        accuracy = tested.accuracy(strategy.coordinator.state, *given.test)
        print(f"{configuration} through Flower: accuracy {accuracy:.4f}")

    run_simulation(
        federated.server_app(strategy, settings.rounds, end), federated.client_app(training, bits=configuration.bits),
        num_supernodes=USERS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


# --- report -----------------------------------------------------------------------------------------------------------


def last_accuracy(run: dict) -> float:
    """Final accuracy in percent."""
    return 100 * next(r["measures"]["accuracy"] for r in reversed(run["rounds"]) if "accuracy" in r["measures"])


def mean_of(run: dict, key: str, measure: bool = False) -> float | None:
    """Mean over the second half of the rounds, of a report's field or measure."""
    half = run["rounds"][len(run["rounds"]) // 2 :]
    values = [(r["measures"] if measure else r).get(key) for r in half]
    known = [value for value in values if value]
    return statistics.fmean(known) if known else None


def by_name(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Runs of each configuration."""
    groups: dict[str, list[dict]] = {}
    for one in runs:
        groups.setdefault(one["name"], []).append(one)
    return groups


def shown(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and spread; nothing where nothing was measured."""
    known = [value for value in values if value is not None]
    return spread(known, digits) if known else ""


def print_table(title: str, runs: Sequence[dict]) -> None:
    """A line a configuration."""
    headings = ("test, %", "labels right, %", "kept, %", "D", "n D", "MB a round", "s a round")
    table = common.table(title, "training", *headings)
    for name, group in by_name(runs).items():
        traffic = [(r["rounds"][-1]["bytes_down"] + r["rounds"][-1]["bytes_up"]) / 1e6 for r in group]
        right, kept = ([mean_of(r, key, True) for r in group] for key in ("label_accuracy", "labels_kept"))
        table.add_row(
            name,
            shown([last_accuracy(r) for r in group]),
            shown([None if x is None else 100 * x for x in right], 1),
            shown([None if x is None else 100 * x for x in kept], 1),
            shown([mean_of(r, "diversity") for r in group]),
            shown([mean_of(r, "normalised_diversity") for r in group]),
            "" if traffic[0] == 0 else f"{statistics.fmean(traffic):.2f}",
            f"{statistics.fmean(r['seconds'] / len(r['rounds']) for r in group):.2f}",
        )
    console.print(table)
    console.print(
        "test: accuracy of the averaged model. Labels: what confident users make of their own images. D: gradient "
        "diversity, n participants; the last three and the labels are means over the second half of the rounds.\n"
    )


def print_comparisons(runs: Sequence[dict]) -> None:
    """Pairs that differ in one thing, seed by seed."""
    found = {(one["name"], one["seed"]): one for one in runs}
    names = list(by_name(runs))
    pairs = [(name, name.replace("2 groups", "FedAvg"), "grouping against FedAvg") for name in names]
    pairs += [(name, name.replace("GN", "BN"), "group against batch norm") for name in names]
    pairs += [(name, name.replace("CRL", "self-training"), "consistency against self-training") for name in names]
    pairs += [(f"{name}, 4-bit", name, "4 bits against 32") for name in names]
    pairs += [(f"{name}, 1-bit", name, "1 bit against 32") for name in names]
    pairs += [(name, SERVER_ONLY, "against the server alone") for name in names]
    for first, second, what in pairs:
        seeds = [seed for name, seed in found if name == first and (second, seed) in found]
        if first == second or not seeds:
            continue
        gains = [last_accuracy(found[first, seed]) - last_accuracy(found[second, seed]) for seed in seeds]
        line = f"{first}: {what}: {shown(gains)} points, better {sum(g > 0 for g in gains)} of {len(gains)}"
        diverse = [(mean_of(found[n, s], "normalised_diversity") for n in (first, second)) for s in seeds]
        if "FedAvg" in what:
            lower = sum(a < b for a, b in diverse)
            line += f"; diversity lower {lower} of {len(seeds)}"
        console.print(line)


def plot(path: Path, title: str, runs: Sequence[dict]) -> None:
    """Accuracy, diversity in both scalings, and accuracy of the users' labels over the rounds."""
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.4))
    panels = (
        ("test accuracy", "accuracy", True), ("gradient diversity", "diversity", False),
        ("n x gradient diversity", "normalised_diversity", False),
        ("accuracy of users' labels", "label_accuracy", True),
    )
    colours = plt.get_cmap("tab20").colors
    for axis, (heading, key, measure) in zip(axes, panels, strict=True):
        for i, (name, group) in enumerate(by_name(runs).items()):
            picked = [(r["measures"] if measure else r).get(key) for r in group[0]["rounds"]]
            steps = [j for j, value in enumerate(picked) if value]
            if not steps:
                continue
            chosen = [[r["rounds"][j]["measures"] if measure else r["rounds"][j] for j in steps] for r in group]
            curves = np.array([[point.get(key) or 0 for point in one] for one in chosen])
            axis.plot([j + 1 for j in steps], curves.mean(0), label=name, color=colours[i % 20], linewidth=1.3)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("round")
    axes[0].legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    common.save(figure, path)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="every configuration, three seeds, more rounds")
    parser.add_argument("--engine", choices=("process", "flower"), default="process", help="one process, or Flower")
    parser.add_argument("--data", choices=data.DATASETS, default="mnist5k", help="dataset")
    parser.add_argument("--labelled", type=common.positive, default=200, help="labelled images of the server")
    parser.add_argument("--non-iid", type=float, default=0.4, help="R of the users")
    parser.add_argument("--rounds", type=common.positive, help="default 30, with --full 60")
    parser.add_argument("--steps", type=common.positive, default=8, help="local steps of everyone in a round")
    parser.add_argument("--warm-up", type=int, default=200, help="supervised steps before the first round")
    parser.add_argument("--batch", type=common.positive, default=32, help="images in a step")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of everyone")
    parser.add_argument("--threshold", type=float, default=0.95, help="confidence from which users take their label")
    parser.add_argument("--test-every", type=common.positive, default=5, help="rounds")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0, with --full 0 1 2")
    names = [SERVER_ONLY, *map(str, FULL)]
    parser.add_argument("--only", nargs="+", choices=names, metavar="TRAINING", help="of " + "; ".join(names))
    options = common.parse(parser)
    options.rounds = options.rounds or (60 if options.full else 30)
    options.seeds = options.seeds or ([0, 1, 2] if options.full else [0])
    return options


def make_runs(
    problems: dict[int, Problem], options: argparse.Namespace, record: common.Record
) -> list[dict[str, Any]]:
    """The server alone and every configuration with every seed."""
    configurations = [None, *(FULL if options.full or options.only else QUICK)]
    if options.only:
        configurations = [c for c in configurations if (SERVER_ONLY if c is None else str(c)) in options.only]
    shaping = {key: getattr(options, key) for key in SHAPING}
    runs = []
    with common.progress(len(configurations) * len(options.seeds) * options.rounds) as bar:
        for seed, given in problems.items():
            for configuration in configurations:

                def make(
                    configuration: Configuration | None = configuration, seed: int = seed, given: Problem = given
                ) -> dict[str, Any]:
                    if configuration is None:
                        return run_server_alone(given, options, seed, bar.advance)
                    return run(configuration, given, options, seed, bar.advance)

                name = SERVER_ONLY if configuration is None else str(configuration)
                bar.label(f"{name}, seed {seed}")
                key = {"training": name, "seed": seed, **shaping}
                runs.append(record.run(key, make, on_found=lambda: bar.advance(options.rounds)))
    return runs


def main() -> None:
    """Command line entry."""
    options = parse_arguments()
    sets = common.load([options.data], options.root, asked=True, normalise=False)[options.data]
    problems = {seed: problem(sets, options, seed) for seed in options.seeds}
    if options.engine == "flower":
        return run_flower(problems[options.seeds[0]], options)
    record = common.Record(options.out / "federated.json")
    runs = make_runs(problems, options, record)
    level = statistics.fmean(given.level for given in problems.values())
    title = (
        f"{options.data}: {options.labelled} labelled, {USERS} users at non-iid level {level:.2f}, {options.rounds} "
        f"rounds of {options.steps} steps, {len(options.seeds)} seeds"
    )
    print_table(title, runs)
    print_comparisons(runs)
    picture = options.out / f"federated_{options.data}.png"
    plot(picture, title, runs)
    console.print(f"written: {record.path}, {picture}")


if __name__ == "__main__":
    common.start(main)
