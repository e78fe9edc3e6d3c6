"""Semi-supervised federated learning: labels on the server alone, images without labels on ten users.

Users are averaged in groups, and their messages have 4 bits a weight. `pip install ".[examples]"` in the repository's
folder brings what this needs. A plot goes to examples_out/. experiments/federated.py compares ways to train;
flower_app/ is the same on Flower, for users on machines of their own.
"""

import dataclasses
import signal
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from lowbit_ext import federated

OUT = Path("examples_out")
USERS = 10
SETTINGS = federated.Settings(
    rounds=8, steps=8, groups=2, batch=32, learning_rate=0.05, threshold=0.9, warm_up=100, flip=False
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )


def main() -> None:
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    is_test = torch.arange(len(images)) % 5 == 0
    test = images[is_test], labels[is_test]
    images, labels = images[~is_test], labels[~is_test]
    split = federated.partition(labels, USERS, non_iid=0.4, labelled=100, generator=torch.Generator().manual_seed(0))
    server = images[split.server], labels[split.server]
    print(f"{len(split.server)} labelled images on the server, {[len(user) for user in split.users]} on the users")

    def show(report: federated.RoundReport[int]) -> None:
        sent = (report.bytes_down + report.bytes_up) / 1e6
        accuracy = 100 * report.measures["accuracy"]
        print(f"{report.round + 1:5} {USERS - len(report.lost):13} {sent:9.2f} {accuracy:13.1f} %", flush=True)

    for bits in (32, 4):
        print(f"\nmessages of {bits} bits a weight\nround   users heard   MB sent   test accuracy", flush=True)
        result = federated.simulate(
            network(), server, [images[user] for user in split.users], dataclasses.replace(SETTINGS, bits=bits),
            test=test, test_every=1, on_round=show,
        )
        curve = [100 * report.measures["accuracy"] for report in result.history]
        plt.plot(range(1, len(curve) + 1), curve, "o-", label=f"messages of {bits} bits")
    plt.xlabel("round")
    plt.ylabel("test accuracy, %")
    plt.legend()
    OUT.mkdir(exist_ok=True)
    plt.savefig(OUT / "federated.png")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
