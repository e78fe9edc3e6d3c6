"""Compares the quantum-inspired classifier with others: does it recall more of every category, and at what price?

Every classifier tells each category from all others on the same bits: pixels above half of white, or words in a text.
`python examples/helstrom.py` takes under four minutes on two cores. Tables go to the terminal, JSON and plots to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data
import lowbit_ext

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import precision_recall_fscore_support, recall_score
    from sklearn.model_selection import train_test_split
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.naive_bayes import BernoulliNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC
    from sklearn.tree import DecisionTreeClassifier
    from threadpoolctl import threadpool_limits

    from lowbit_ext.helstrom import HelstromClassifier
except ImportError as error:
    sys.exit(f'examples/helstrom.py needs {error.name}: pip install "lowbit-ext[examples]"')

try:
    from bornrule import BornClassifier
except ImportError:
    BornClassifier = None

IMAGES = ("digits", "mnist5k", "fashion")
GREY_THRESHOLD = {"digits": 7.5 / 16, "mnist5k": 0.5, "fashion": 0.5}  # 8 of 16 and more; 128 of 255 and more
HEADINGS = {"precision": "prec.", "recall": "recall", "F1": "F1", "balanced accuracy": "b.acc."}
METRICS = tuple(HEADINGS)
OURS = "Helstrom"  # mixed states, equal priors
PAPERS_PEERS = ("kNN", "decision tree", "naive Bayes", "linear SVM")  # what the paper's table has
WEIGHTED = "logistic, balanced"  # it weighs the categories as equal priors do
SEED = 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """Bits and labels of a training and a test set."""

    name: str
    train: Any  # (N, d) float32 of 0 and 1: an array, or a scipy matrix for texts
    labels: np.ndarray
    test: Any
    test_labels: np.ndarray
    features: Sequence[str] | None = None  # words

    @property
    def categories(self) -> np.ndarray:
        """Names of the categories."""
        return np.unique(self.labels)

    def part(self, count: int) -> Problem:
        """The same with at most `count` training samples, the categories in proportion."""
        if count >= len(self.labels):
            return self
        chosen, _ = train_test_split(
            np.arange(len(self.labels)), train_size=count, stratify=self.labels, random_state=SEED
        )
        return dataclasses.replace(self, train=self.train[chosen], labels=self.labels[chosen])


@dataclasses.dataclass(frozen=True)
class Contender:
    """A classifier, and the most training samples it is given."""

    name: str
    build: Callable[[], Any]
    samples: int


def image_problem(name: str, root: Path | None) -> Problem:
    """Binarized images."""
    (images, labels), (test, test_labels) = data.load(name, root, normalise=False)
    threshold = GREY_THRESHOLD[name]
    bits, test_bits = ((part.flatten(1) > threshold).float().numpy() for part in (images, test))
    return Problem(name, bits, labels.numpy(), test_bits, test_labels.numpy())


def text_problem(path: Path | None, words: int) -> Problem:
    """Which of the most frequent words a text has."""
    texts, labels = data.load_texts(path)
    train, test, labels, test_labels = train_test_split(
        texts, labels, test_size=0.3, stratify=labels, random_state=SEED
    )
    vectorizer = CountVectorizer(binary=True, max_features=words, dtype=np.float32)
    bits = vectorizer.fit_transform(train)
    return Problem("text", bits, labels, vectorizer.transform(test), test_labels, vectorizer.get_feature_names_out())


def contenders(problem: Problem, options: argparse.Namespace) -> list[Contender]:
    """Ours and the others. Methods whose work grows with the cube of the samples, or whose libraries are slow on many,
    get fewer; each table says how many."""
    most, some, few = len(problem.labels), options.samples, options.gram_samples

    def one_against_others(build: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: OneVsRestClassifier(build())

    chosen = [
        Contender(OURS, HelstromClassifier, some),
        Contender("Helstrom, own priors", lambda: HelstromClassifier(prior="empirical"), some),
        Contender("Helstrom, pure", lambda: HelstromClassifier(state="pure"), some),
        Contender("Helstrom, 2 copies", lambda: HelstromClassifier(copies=2, solver="gram"), few),
        Contender("Helstrom, pgm", lambda: HelstromClassifier(multi_class="pgm"), some),
        Contender("kNN", lambda: KNeighborsClassifier(5, metric="cosine"), some),
        Contender("decision tree", one_against_others(lambda: DecisionTreeClassifier(random_state=SEED)), some),
        Contender("naive Bayes", one_against_others(lambda: BernoulliNB(binarize=None)), some),
        Contender("linear SVM", one_against_others(lambda: LinearSVC(random_state=SEED)), some),
        Contender("logistic", one_against_others(lambda: LogisticRegression(max_iter=300)), some),
        Contender(WEIGHTED, one_against_others(
            lambda: LogisticRegression(max_iter=300, class_weight="balanced")), some),
    ]  # fmt: skip
    if BornClassifier is not None:
        chosen.append(Contender("Born", one_against_others(BornClassifier), some))
    if most > some:
        chosen.append(Contender("Helstrom, all", HelstromClassifier, most))
        chosen.append(Contender("naive Bayes, all", one_against_others(lambda: BernoulliNB(binarize=None)), most))
    return chosen


# --- measurements -----------------------------------------------------------------------------------------------------


def decisions(model: Any, problem: Problem) -> np.ndarray:
    """Whether each test sample is put into each category (M, K)."""
    if not isinstance(model, HelstromClassifier):
        return np.asarray(model.predict(problem.test)).astype(bool)
    if model.multi_class == "pgm":
        return model.predict(problem.test)[:, None] == problem.categories
    decision = model.decision_function(problem.test)
    return (decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1)) > 0


def scores(predicted: np.ndarray, problem: Problem) -> dict[str, list[float]]:
    """Each metric in each category."""
    actual = problem.test_labels[:, None] == problem.categories
    precision, recall, f1, _ = precision_recall_fscore_support(actual, predicted, zero_division=0.0)
    specificity = recall_score(~actual, ~predicted, average=None, zero_division=0.0)
    return dict(zip(METRICS, (list(map(float, m)) for m in (precision, recall, f1, (recall + specificity) / 2)),
                    strict=True))  # fmt: skip


def measure(contender: Contender, problem: Problem) -> dict[str, Any]:
    """Trains and tests a contender."""
    problem = problem.part(contender.samples)
    model = contender.build()
    ours = isinstance(model, HelstromClassifier)
    start = time.perf_counter()
    model.fit(problem.train, problem.labels if ours else (problem.labels[:, None] == problem.categories).astype(int))
    fitted = time.perf_counter()
    predicted = decisions(model, problem)
    end = time.perf_counter()
    result = {
        "name": contender.name, "samples": len(problem.labels), "fit_s": fitted - start, "predict_s": end - fitted,
        "model_mb": len(pickle.dumps(model)) / 1e6, "scores": scores(predicted, problem),
    }  # fmt: skip
    if ours and contender.name == OURS and problem.features is not None:
        result["explanation"] = model.explain(top=8, feature_names=problem.features)
    return result


def price_sweep(problem: Problem, options: argparse.Namespace, advance: Callable[[], None]) -> list[dict[str, float]]:
    """Mean metrics by the price p0 / p1 of a wrong "yes"."""
    problem = problem.part(options.samples)
    rows = []
    for ratio in np.geomspace(1 / 4, 4, options.prices):
        model = HelstromClassifier(prior=float(ratio)).fit(problem.train, problem.labels)
        means = {name: float(np.mean(values)) for name, values in scores(decisions(model, problem), problem).items()}
        rows.append({"ratio": float(ratio), **means})
        advance()
    return rows


# --- results ----------------------------------------------------------------------------------------------------------


def _table(title: str, headings: Sequence[str]) -> Table:
    style = dict(title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table = Table(title=f"\n{title}", **style)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def mean_table(result: dict[str, Any]) -> Table:
    """Means over the categories, "least" being the lowest recall; time and the size of the model."""
    count = len(result["categories"])
    table = _table(
        f"{result['problem']}, {result['features']} bits: each of {count} categories against the others, means",
        ["classifier", "train", *HEADINGS.values(), "least", "fit s", "test s", "MB"],
    )
    best = {metric: max(np.mean(row["scores"][metric]) for row in result["rows"]) for metric in METRICS}
    for row in result["rows"]:
        means = {metric: np.mean(row["scores"][metric]) for metric in METRICS}
        cells = [f"[bold]{means[m]:.3f}[/]" if means[m] >= best[m] - 5e-4 else f"{means[m]:.3f}" for m in METRICS]
        table.add_row(
            row["name"], f"{row['samples']:,}", *cells, f"{min(row['scores']['recall']):.3f}", f"{row['fit_s']:.2f}",
            f"{row['predict_s']:.2f}", f"{row['model_mb']:.1f}",
            style="cyan" if row["name"].startswith("Helstrom") else "",
        )  # fmt: skip
    return table


def others(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The other classifiers trained on the same samples, each as it comes: without weights for the categories."""
    ours = named(result, OURS)
    return [
        row for row in result["rows"]
        if not row["name"].startswith("Helstrom") and row["name"] != WEIGHTED and row["samples"] == ours["samples"]
    ]  # fmt: skip


def named(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of a contender."""
    return next(row for row in result["rows"] if row["name"] == name)


def category_table(result: dict[str, Any]) -> Table:
    """Our metrics in each category, beside the best of the others."""
    table = _table(
        f"{result['problem']}: {OURS} by category, and the best of the others",
        ["category", *HEADINGS.values(), "best recall", "best F1"],
    )
    ours = named(result, OURS)["scores"]
    for index, category in enumerate(result["categories"]):
        cells = [f"{ours[metric][index]:.3f}" for metric in METRICS]
        for metric in ("recall", "F1"):
            best = max(others(result), key=lambda row, metric=metric, index=index: row["scores"][metric][index])
            cells.append(f"{best['scores'][metric][index]:.3f} {best['name']}")
        table.add_row(str(category), *cells)
    return table


def verdict(result: dict[str, Any]) -> str:
    """The paper's claim, recall above the others' in every category, beside its price."""
    ours = named(result, OURS)["scores"]
    peers = others(result)
    counts = {}
    in_paper = [row for row in peers if row["name"] in PAPERS_PEERS]
    for who, rows in (("the paper's peers", in_paper), ("all unweighted others", peers)):
        best = np.max([row["scores"]["recall"] for row in rows], axis=0)
        counts[who] = f"above {who} in {(ours['recall'] > best).sum()} (level in {(ours['recall'] == best).sum()})"
    top = {metric: max(peers, key=lambda row, metric=metric: np.mean(row["scores"][metric])) for metric in METRICS}

    def mean(row: dict[str, Any], metric: str) -> str:
        return f"{np.mean(row['scores'][metric]):.3f}"

    own = {metric: f"{np.mean(values):.3f}" for metric, values in ours.items()}
    weighted, empirical = named(result, WEIGHTED), named(result, "Helstrom, own priors")
    return (
        f"[bold]{result['problem']}[/]: of {len(result['categories'])} categories recall is "
        f"{' and '.join(counts.values())}; mean {own['recall']} against {mean(top['recall'], 'recall')} "
        f"({top['recall']['name']}). The price: precision {own['precision']} against "
        f"{mean(top['precision'], 'precision')} ({top['precision']['name']}), F1 {own['F1']} against "
        f"{mean(top['F1'], 'F1')} ({top['F1']['name']}). Balanced accuracy {own['balanced accuracy']} against "
        f"{mean(top['balanced accuracy'], 'balanced accuracy')} ({top['balanced accuracy']['name']}). With the "
        f"categories' own shares as priors its recall is {mean(empirical, 'recall')} at precision "
        f"{mean(empirical, 'precision')}. Logistic regression with the same equal weights: recall "
        f"{mean(weighted, 'recall')}, precision {mean(weighted, 'precision')}."
    )


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """For each problem the metrics by price, and recall against precision of all contenders."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(results), 2, figsize=(11, 3.6 * len(results)), layout="constrained", squeeze=False)
    for (sweep, plane), result in zip(axes, results, strict=True):
        rows = result["prices"]
        ratios = [row["ratio"] for row in rows]
        for metric, colour in zip(METRICS, ("#c0504d", "#1f5fa8", "#2a8f5b", "#7f8c9a"), strict=True):
            sweep.plot(ratios, [row[metric] for row in rows], "o-", ms=3, c=colour, label=metric)
        sweep.axvline(1, color="#cccccc", zorder=0)
        sweep.set_xscale("log", base=2)
        sweep.set(xlabel="p0 / p1: price of a wrong yes (1: equal priors)", ylabel="mean", ylim=(0, 1.02))
        sweep.set_title(f"{result['problem']}: mixed states by price")
        sweep.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.36))
        plane.plot([row["recall"] for row in rows], [row["precision"] for row in rows], "-", c="#8fbbe0", zorder=0)
        points = sorted((*(float(np.mean(row["scores"][m])) for m in ("precision", "recall")), row["name"])
                        for row in result["rows"])  # fmt: skip
        for rank, (y, x, name) in enumerate(points):
            colour = "#1f5fa8" if name.startswith("Helstrom") else "#7f8c9a"
            plane.plot(x, y, "o", ms=5, c=colour)
            # Names stand beside the axes in the order of the points, so that none covers another.
            plane.annotate(
                name, (x, y), xytext=(1.06, (rank + 0.5) / len(points)), textcoords="axes fraction", fontsize=8,
                color=colour, va="center",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "relpos": (0, 0.5)},
            )  # fmt: skip
        plane.set(xlabel="mean recall", ylabel="mean precision", title="recall and precision (line: by price)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits and mnist5k alone, fewer samples, under a minute")
    parser.add_argument("--data", nargs="+", choices=(*IMAGES, "text"), help="default: all, text with --texts only")
    parser.add_argument("--texts", type=Path, help="vaderSentiment-3.3.2.tar.gz, or a folder with a folder for each "
                        "category, such as 20 Newsgroups")  # fmt: skip
    parser.add_argument("--root", type=Path, help="folder of the files of fashion")
    parser.add_argument("--samples", type=positive, default=6000, help="most training samples for most classifiers")
    parser.add_argument("--gram-samples", type=positive, default=800, help="most training samples for 2 copies, whose "
                        "work grows with their cube")  # fmt: skip
    parser.add_argument("--words", type=positive, default=1000, help="words of the texts that are features")
    parser.add_argument("--prices", type=positive, default=9, help="prior ratios in the sweep from 1/4 to 4")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="of torch, numpy and the kernels")
    parser.add_argument("--out", type=Path, default=Path("examples_out"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.samples, options.gram_samples = min(options.samples, 2000), min(options.gram_samples, 400)
        options.prices = min(options.prices, 5)
    if options.data is None:
        options.data = ["digits", "mnist5k"] if options.quick else list(IMAGES)
        options.data += ["text"] * (options.texts is not None)
    return options


def run(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Trains and tests every contender on every problem."""
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        for name in options.data:
            is_text = name == "text"
            problem = text_problem(options.texts, options.words) if is_text else image_problem(name, options.root)
            field = contenders(problem, options)
            task = progress.add_task(name, total=len(field) + options.prices)
            rows = []
            for contender in field:
                progress.update(task, description=f"{name}: {contender.name}")
                rows.append(measure(contender, problem))
                progress.advance(task)
            progress.update(task, description=f"{name}: prices")
            prices = price_sweep(problem, options, lambda task=task: progress.advance(task))
            results.append({
                "problem": name, "categories": problem.categories.tolist(), "features": problem.train.shape[1],
                "test_samples": len(problem.test_labels), "rows": rows, "prices": prices,
            })  # fmt: skip
    return results


def main() -> None:
    """Command line entry."""
    start = time.perf_counter()
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    console = Console()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with threadpool_limits(options.threads):
            results = run(options, console)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(str(error))
    stem = options.out / "helstrom"
    report = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "threads": options.threads, "isa": lowbit_ext.active_isa(), "versions": {
            "lowbit_ext": lowbit_ext.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "results": results,
    }  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    plot(stem.with_suffix(".png"), results)
    for result in results:
        console.print(mean_table(result), category_table(result))
        for category, words in named(result, OURS).get("explanation", {}).items():
            console.print(f"  {category}: {', '.join(word for word, _ in words)}", style="dim", highlight=False)
    console.rule('"Recall above the others\' in every category"')
    for result in results:
        console.print(verdict(result), highlight=False)
    console.print(
        "Equal priors weigh a category as much as all others together, so a wrong yes costs little: that buys recall, "
        "and pays in precision. Compare with classifiers of the same weights, and choose the price by p0 / p1.",
        style="dim", highlight=False,
    )  # fmt: skip
    if BornClassifier is None:
        console.print("Not installed, so not compared: bornrule (pip install bornrule)", style="dim", highlight=False)
    if "text" not in options.data:
        console.print("Texts are compared with --texts: see --help", style="dim", highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s; written: {stem}.json, {stem}.png", highlight=False)


if __name__ == "__main__":
    main()
