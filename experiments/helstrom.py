"""Compares the quantum-inspired classifier with others: does it recall more of every category, and at what price?

Every classifier tells each category from all others on the same bits: pixels above half of white, or words in a text.
`python experiments/helstrom.py` takes under four minutes on two cores, `--quick` under one. A record and a plot go to
--out.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import common
import data
from common import console, plt

with common.optional_packages():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import (
        average_precision_score,
        fbeta_score,
        make_scorer,
        precision_recall_curve,
        precision_recall_fscore_support,
        recall_score,
    )
    from sklearn.model_selection import GridSearchCV, train_test_split
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.naive_bayes import BernoulliNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC
    from sklearn.tree import DecisionTreeClassifier
    from threadpoolctl import threadpool_limits

    from lowbit_ext.helstrom import HelstromClassifier

try:
    from bornrule import BornClassifier
except ImportError:
    BornClassifier = None

IMAGES = ("digits", "mnist5k", "fashion")
GREY_THRESHOLD = {"digits": 7.5 / 16, "mnist5k": 0.5, "fashion": 0.5}  # 8 of 16 and more; 128 of 255 and more
HEADINGS = {"precision": "prec.", "recall": "recall", "F1": "F1", "balanced accuracy": "b.acc."}
METRICS = tuple(HEADINGS)
OURS = "Helstrom"  # mixed states, equal priors
PURE = "Helstrom, pure"  # as the paper's texts are
PAPERS_PEERS = ("kNN", "decision tree", "naive Bayes", "linear SVM")  # what the paper's table has
WEIGHTED = "logistic, balanced"  # it weighs the categories as equal priors do
BALANCED = (WEIGHTED, "SVM, balanced")
RANKINGS = {"average precision": "AP", "recall at equal precision": "recall="}  # of the scores, whatever the threshold
CHOICE_OF_PRIORS = tuple(map(float, np.geomspace(1 / 8, 8, 7)))  # p0 / p1
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


def image_problem(name: str, sets: tuple[data.Set, data.Set]) -> Problem:
    """Binarized images."""
    (images, labels), (test, test_labels) = sets
    threshold = GREY_THRESHOLD[name]
    bits, test_bits = ((part.flatten(1) > threshold).float().numpy() for part in (images, test))
    return Problem(name, bits, labels.numpy(), test_bits, test_labels.numpy())


def text_problem(path: Path, words: int) -> Problem:
    """Which of the most frequent words a text has."""
    try:
        texts, labels = data.load_texts(path)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    train, test, labels, test_labels = train_test_split(
        texts, labels, test_size=0.3, stratify=labels, random_state=SEED
    )
    vectorizer = CountVectorizer(binary=True, max_features=words, dtype=np.float32)
    bits = vectorizer.fit_transform(train)
    names = vectorizer.get_feature_names_out()
    return Problem(path.name.removesuffix(".tar.gz"), bits, labels, vectorizer.transform(test), test_labels, names)


def with_prior_chosen(state: str, beta: float) -> Any:
    """Each category's price of a wrong yes is the one of the largest F_beta in cross-validation."""
    scoring = make_scorer(fbeta_score, beta=beta, zero_division=0.0)
    search = GridSearchCV(HelstromClassifier(state=state), {"prior": CHOICE_OF_PRIORS}, scoring=scoring, cv=3)
    return OneVsRestClassifier(search)


def contenders(problem: Problem, options: argparse.Namespace) -> list[Contender]:
    """Ours and the others. Methods whose work grows with the cube of the samples, or whose libraries are slow on many,
    get fewer; each table says how many."""
    most, some, few = len(problem.labels), options.samples, options.gram_samples

    def one_against_others(build: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: OneVsRestClassifier(build())

    chosen = [
        Contender(OURS, HelstromClassifier, some),
        Contender("Helstrom, own priors", lambda: HelstromClassifier(prior="empirical"), some),
        Contender(f"Helstrom, by F{options.beta:g}", lambda: with_prior_chosen("mixed", options.beta), some),
        Contender(PURE, lambda: HelstromClassifier(state="pure"), some),
        Contender(f"{PURE}, by F{options.beta:g}", lambda: with_prior_chosen("pure", options.beta), some),
        Contender("Helstrom, 2 copies", lambda: HelstromClassifier(copies=2, solver="gram"), few),
        Contender("Helstrom, pgm", lambda: HelstromClassifier(multi_class="pgm"), some),
        Contender("kNN", lambda: KNeighborsClassifier(5, metric="cosine"), some),
        Contender("decision tree", one_against_others(lambda: DecisionTreeClassifier(random_state=SEED)), some),
        Contender("naive Bayes", one_against_others(lambda: BernoulliNB(binarize=None)), some),
        Contender("linear SVM", one_against_others(lambda: LinearSVC(random_state=SEED)), some),
        Contender("SVM, balanced", one_against_others(
            lambda: LinearSVC(random_state=SEED, class_weight="balanced")), some),
        Contender("logistic", one_against_others(lambda: LogisticRegression(max_iter=300)), some),
        Contender(WEIGHTED, one_against_others(
            lambda: LogisticRegression(max_iter=300, class_weight="balanced")), some),
    ]
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
                    strict=True))


def ranking(model: Any, problem: Problem) -> np.ndarray:
    """The larger (M, K), the sooner a test sample is put into each category."""
    if hasattr(model, "decision_function"):
        decision = np.asarray(model.decision_function(problem.test))
        return decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1)
    probabilities = model.predict_proba(problem.test)  # an array, or for each category one of "no" and "yes"
    if isinstance(probabilities, list):
        return np.stack([part[:, 1] for part in probabilities], axis=1)
    return probabilities


def ranking_scores(ranks: np.ndarray, problem: Problem, precisions: Sequence[float]) -> dict[str, list[float]]:
    """Average precision in each category, and the largest recall at a precision that is not below a given one."""
    averages, recalls = [], []
    for category, column, least in zip(problem.categories, ranks.T, precisions, strict=True):
        actual = problem.test_labels == category
        averages.append(float(average_precision_score(actual, column)))
        precision, recall, _ = precision_recall_curve(actual, column)
        recalls.append(float(recall[precision >= least].max()))
    return dict(zip(RANKINGS, (averages, recalls), strict=True))


def measure(contender: Contender, problem: Problem, precisions: Sequence[float] | None) -> dict[str, Any]:
    """Trains and tests a contender; recall is also taken where it is as precise as `precisions` (None: as itself)."""
    problem = problem.part(contender.samples)
    model = contender.build()
    ours = isinstance(model, HelstromClassifier)
    start = time.perf_counter()
    model.fit(problem.train, problem.labels if ours else (problem.labels[:, None] == problem.categories).astype(int))
    fitted = time.perf_counter()
    predicted = decisions(model, problem)
    end = time.perf_counter()
    own = scores(predicted, problem)
    result = {
        "name": contender.name, "samples": len(problem.labels), "fit_s": fitted - start, "predict_s": end - fitted,
        "model_mb": len(pickle.dumps(model)) / 1e6, "scores": own,
        "rankings": ranking_scores(ranking(model, problem), problem, precisions or own["precision"]),
    }
    if ours and contender.name == OURS and problem.features is not None:
        result["explanation"] = model.explain(top=8, feature_names=problem.features)
    return result


def prices_of(ratio: float, problem: Problem, options: argparse.Namespace) -> dict[str, float]:
    """Mean metrics at a price p0 / p1 of a wrong "yes"."""
    problem = problem.part(options.samples)
    model = HelstromClassifier(prior=ratio).fit(problem.train, problem.labels)
    means = {name: float(np.mean(values)) for name, values in scores(decisions(model, problem), problem).items()}
    return {"ratio": ratio, **means}


# --- results ----------------------------------------------------------------------------------------------------------


def mean_table(result: dict[str, Any]) -> common.Table:
    """Means over the categories, "recall=" at the precision that ours has, "least" the lowest recall; time and size."""
    count = len(result["categories"])
    table = common.table(
        f"{result['problem']}, {result['features']} bits: each of {count} categories against the others, means",
        "classifier", "train", *HEADINGS.values(), *RANKINGS.values(), "least", "fit s", "test s", "MB",
    )
    columns = (*METRICS, *RANKINGS)
    rows = [{name: np.mean(values) for name, values in (row["scores"] | row["rankings"]).items()}
            for row in result["rows"]]
    best = {name: max(means[name] for means in rows) for name in columns}
    for row, means in zip(result["rows"], rows, strict=True):
        cells = [f"[bold]{means[n]:.3f}[/]" if means[n] >= best[n] - 5e-4 else f"{means[n]:.3f}" for n in columns]
        table.add_row(
            row["name"], f"{row['samples']:,}", *cells, f"{min(row['scores']['recall']):.3f}", f"{row['fit_s']:.2f}",
            f"{row['predict_s']:.2f}", f"{row['model_mb']:.1f}",
            style="cyan" if row["name"].startswith("Helstrom") else "",
        )
    return table


def others(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The other classifiers trained on the same samples, each as it comes: without weights for the categories."""
    ours = named(result, OURS)
    return [
        row for row in result["rows"]
        if not row["name"].startswith("Helstrom") and row["name"] not in BALANCED and row["samples"] == ours["samples"]
    ]


def named(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of a contender."""
    return next(row for row in result["rows"] if row["name"] == name)


def category_table(result: dict[str, Any]) -> common.Table:
    """Our metrics in each category, beside the best of the others."""
    table = common.table(
        f"{result['problem']}: {OURS} by category, and the best of the others",
        "category", *HEADINGS.values(), "best recall", "best F1",
    )
    ours = named(result, OURS)["scores"]
    for index, category in enumerate(result["categories"]):
        cells = [f"{ours[metric][index]:.3f}" for metric in METRICS]
        for metric in ("recall", "F1"):
            best = max(others(result), key=lambda row, metric=metric, index=index: row["scores"][metric][index])
            cells.append(f"{best['scores'][metric][index]:.3f} {best['name']}")
        table.add_row(str(category), *cells)
    return table


def verdict(result: dict[str, Any], name: str) -> str:
    """The paper's claim of one of ours, recall above the others' in every category, beside its price."""
    row, peers = named(result, name), others(result)
    ours = row["scores"]
    counts = []
    for who, rows in (
        ("the paper's peers", [peer for peer in peers if peer["name"] in PAPERS_PEERS]),
        ("all unweighted others", peers),
    ):
        best = np.max([peer["scores"]["recall"] for peer in rows], axis=0)
        counts.append(f"above {who} in {(ours['recall'] > best).sum()} (level in {(ours['recall'] == best).sum()})")

    def against(metric: str) -> str:
        best = max(peers, key=lambda peer: np.mean(peer["scores"][metric]))
        return f"{np.mean(ours[metric]):.3f} against {np.mean(best['scores'][metric]):.3f} ({best['name']})"

    weighted = named(result, WEIGHTED)
    recalls = {r["name"]: np.array(r["rankings"]["recall at equal precision"]) for r in result["rows"]}
    ranked = max((peer["name"] for peer in [*peers, weighted]), key=lambda peer: recalls[peer].mean())
    return (
        f"[bold]{result['problem']}, {name}[/]: of {len(result['categories'])} categories recall is "
        f"{' and '.join(counts)}; mean {against('recall')}. The price: precision {against('precision')}, F1 "
        f"{against('F1')}. Balanced accuracy {against('balanced accuracy')}. Logistic regression with the same equal "
        f"weights: recall {np.mean(weighted['scores']['recall']):.3f}, precision "
        f"{np.mean(weighted['scores']['precision']):.3f}. At the precision of {OURS} in each category it recalls "
        f"{recalls[name].mean():.3f}, and {ranked} {recalls[ranked].mean():.3f}: ours more in "
        f"{(recalls[name] > recalls[ranked]).sum()} categories."
    )


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """For each problem the metrics by price, and recall against precision of all contenders."""
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
                        for row in result["rows"])
        for rank, (y, x, name) in enumerate(points):
            colour = "#1f5fa8" if name.startswith("Helstrom") else "#7f8c9a"
            plane.plot(x, y, "o", ms=5, c=colour)
            # Names stand beside the axes in the order of the points, so that none covers another.
            plane.annotate(
                name, (x, y), xytext=(1.06, (rank + 0.5) / len(points)), textcoords="axes fraction", fontsize=8,
                color=colour, va="center",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "relpos": (0, 0.5)},
            )
        plane.set(xlabel="mean recall", ylabel="mean precision", title="recall and precision (line: by price)")
    common.save(figure, path)


# --- the run ----------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="digits and mnist5k alone, fewer samples")
    parser.add_argument("--data", nargs="*", choices=IMAGES, help="images; default: all")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help=f"each of vaderSentiment-3.3.2.tar.gz, a "
                        f"folder of fortune's files ({data.FORTUNES}), a folder with a folder of texts for each "
                        "category, such as 20 Newsgroups")
    parser.add_argument("--samples", type=common.positive, default=6000,
                        help="most training samples for most classifiers")
    parser.add_argument("--gram-samples", type=common.positive, default=800, help="most training samples for 2 copies, "
                        "whose work grows with their cube")
    parser.add_argument("--words", type=common.positive, default=1000, help="words of the texts that are features")
    parser.add_argument("--beta", type=float, default=1.0, help="of the F measure by which one row chooses its priors")
    parser.add_argument("--prices", type=common.positive, default=9, help="prior ratios in the sweep from 1/4 to 4")
    options = common.parse(parser)
    if options.quick:
        options.samples, options.gram_samples = min(options.samples, 2000), min(options.gram_samples, 400)
        options.prices = min(options.prices, 5)
    options.asked = options.data is not None
    if options.data is None:
        options.data = ["digits", "mnist5k"] if options.quick else list(IMAGES)
    return options


def problems_of(options: argparse.Namespace) -> list[Problem]:
    """Everything that is to be learned."""
    sets = common.load(options.data, options.root, asked=options.asked, normalise=False)
    texts = [text_problem(path, options.words) for path in options.texts]
    return [*(image_problem(name, pair) for name, pair in sets.items()), *texts]


def compare(
    problem: Problem, options: argparse.Namespace, record: common.Record, bar: common.Bar
) -> dict[str, Any]:
    """Trains and tests every contender, and ours by price."""
    shape = {"data": problem.name, "size": problem.train.shape, "beta": options.beta, "priors": CHOICE_OF_PRIORS}
    rows: list[dict[str, Any]] = []
    for contender in contenders(problem, options):
        bar.label(f"{problem.name}: {contender.name}")
        precisions = rows[0]["scores"]["precision"] if rows else None  # of ours, which is the first
        key = {**shape, "classifier": contender.name, "samples": contender.samples, "precisions": precisions}
        rows.append(record.run(key, lambda args=(contender, problem, precisions): measure(*args)))
        bar.advance()
    bar.label(f"{problem.name}: prices")
    prices = []
    for ratio in map(float, np.geomspace(1 / 4, 4, options.prices)):
        key = {**shape, "price": ratio, "samples": options.samples}
        prices.append(record.run(key, lambda ratio=ratio: prices_of(ratio, problem, options)))
        bar.advance()
    return {
        "problem": problem.name, "categories": problem.categories.tolist(), "features": problem.train.shape[1],
        "rows": rows, "prices": prices,
    }


def main() -> None:
    """Command line entry."""
    start = time.perf_counter()
    options = parse_arguments()
    problems = problems_of(options)
    record = common.Record(options.out / "helstrom.json")
    total = sum(len(contenders(problem, options)) + options.prices for problem in problems)
    with threadpool_limits(options.threads), common.progress(total) as bar:
        results = [compare(problem, options, record, bar) for problem in problems]
    picture = options.out / "helstrom.png"
    plot(picture, results)
    for result in results:
        console.print(mean_table(result), category_table(result))
        for category, words in named(result, OURS).get("explanation", {}).items():
            console.print(f"  {category}: {', '.join(word for word, _ in words)}", style="dim")
    console.rule('"Recall above the others\' in every category"')
    for result in results:
        console.print(verdict(result, OURS), verdict(result, PURE), sep="\n")
    console.print(
        "Equal priors weigh a category as much as all others together, so a wrong yes costs little: that buys recall, "
        "and pays in precision. Compare with classifiers of the same weights, and choose the price by p0 / p1.",
        style="dim",
    )
    if BornClassifier is None:
        console.print("Not installed, so not compared: bornrule (pip install bornrule)", style="dim")
    if not options.texts:
        console.print("Texts are compared with --texts: see --help", style="dim")
    console.print(f"{time.perf_counter() - start:.0f} s; written: {record.path}, {picture}")


if __name__ == "__main__":
    common.start(main)
