"""The quantum-inspired classifier on digits: recall and precision of every class against all others, at several prices.

`pip install ".[examples]"` in the repository's folder brings what this needs. A plot goes to examples_out/.
experiments/helstrom.py compares more classifiers on more data.
"""

import signal
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from sklearn.model_selection import train_test_split
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import BernoulliNB
from sklearn.neighbors import KNeighborsClassifier

from lowbit_ext.helstrom import HelstromClassifier

OUT = Path("examples_out")
PRICES = (0.5, 0.7, 1, 1.4, 2)  # of a wrong yes: p0 / p1. At 1 a class weighs as much as all others together


def show(name: str, truth: np.ndarray, judged: np.ndarray) -> tuple[float, float, float]:
    """Prints and returns precision, recall and F1 of answers (N, 10), means over the classes."""
    precision, recall, f1, _ = precision_recall_fscore_support(truth, judged, average="macro", zero_division=0)
    print(f"{name:28} {precision:13.3f} {recall:8.3f} {f1:7.3f}", flush=True)
    return precision, recall, f1


def main() -> None:
    x, y = load_digits(return_X_y=True)
    bits = (x > 7).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(bits, y, test_size=0.3, stratify=y, random_state=0)
    classes = np.unique(y)
    truth, train_truth = test_y[:, None] == classes, train_y[:, None] == classes

    print("one class against the others     precision   recall      F1")
    curve = []
    for price in PRICES:
        judged = HelstromClassifier(prior=price).fit(train_x, train_y).decision_function(test_x) > 0
        curve.append(show(f"Helstrom, price {price:g}", truth, judged))
    pretty_good = HelstromClassifier(multi_class="pgm").fit(train_x, train_y)
    show("pretty good measurement", truth, pretty_good.predict(test_x)[:, None] == classes)
    for name, model in {
        "5 nearest neighbours": KNeighborsClassifier(5, metric="cosine"),
        "naive Bayes": OneVsRestClassifier(BernoulliNB()),
        "logistic regression": OneVsRestClassifier(LogisticRegression()),
    }.items():
        show(name, truth, model.fit(train_x, train_truth).predict(test_x))

    plt.plot(PRICES, curve, "o-", label=("precision", "recall", "F1"))
    plt.xscale("log", base=2)
    plt.xlabel("price of a wrong yes, p0 / p1")
    plt.legend()
    OUT.mkdir(exist_ok=True)
    plt.savefig(OUT / "helstrom.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
