"""The examples run as they are, quickly, say what they promise, and end with one line when they are interrupted."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MOST_LINES = 80
# Generous: other work may share the machine. Alone each takes 5 to 15 s on two cores.
TIMEOUT_S = 600
# What an example's last lines must say, by its name.
PROMISES = {
    "binary_vgg": r"predictions that packing changed: 0\n",
    "binaryduo": r"decoupled, fine-tuned +9 +(9\d\.\d) %\npacked +\1 %\n",
    "cone": r"ConeLinear +0\.2\d\d +0 +0 of 111\n",
    "discrete_vae": r"ARMS, systematic +0\.[6-9]\d\n",  # variance beside LOORF's
    "federated": r"messages of 4 bits(.*\n)+    8 +10 +0\.1\d +[6-9]\d\.\d %\n",
    "gradient_mismatch": r"ternary +0\.9[3-9]\d .*\nbinary +0\.(8\d|90)\d ",
    "helstrom": r"Helstrom, price 1 +0\.[67]\d\d +0\.9[5-9]\d ",
    "lowmem": r"convert, 4 bits +9\d\.\d % +0\.\d\d MB +0\.0\d\d\n",
}
LAST_LINES = '''

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    main()
'''


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_as_it_is(path, tmp_path):
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert re.search(PROMISES[path.stem], done.stdout), done.stdout
    assert (tmp_path / "examples_out" / f"{path.stem}.png").stat().st_size > 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_and_can_be_interrupted(path):
    source = path.read_text()
    assert source.count("\n") <= MOST_LINES
    assert source.endswith(LAST_LINES)


def test_an_interruption_is_one_line(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "lowmem")  # interrupted within autograd functions of Python
    with subprocess.Popen(
        [sys.executable, path], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while not process.stdout.readline().startswith("exact"):  # the second training has begun
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors) == (1, "interrupted\n")
