"""The experiments: every one runs, finds again what it made, ends as it should, and checks its data before it works."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
TIMEOUT_S = 600  # generous: other work may share the machine
# The smallest run of each.
SMALLEST = {
    "binary_vgg": "--data digits --epochs 1 --width 8",
    "binaryduo": "--data digits --epochs 2 --width 0.1",
    "cone_sweep": "--families cube --largest 4",
    "constrained": "--only projection regression --epochs 1",  # vae has no smaller run than a minute
    "discrete_vae": "--data digits --steps 26 --latents 8 --estimators loorf arms_s",
    "federated": "--data digits --rounds 1 --steps 1 --warm-up 1",
    "gradient_mismatch": "--data digits --samples 20 --students 1 --images 20 --weights 1",
    "helstrom": "--data digits --samples 100 --gram-samples 50 --prices 2",
    "packed_networks": "--data digits --families quicknet resnet20 binary_vit --steps 12 --batch 32 --width 0.25",
    "lowmem_models": "--networks gpt2 --sequences 2 --length 32 --rows",
    "lowmem": "--data digits --network vgg --variants convert4 --steps 2 --batch 8 --widths 8 8 8 --seeds 0",
}
# What takes time and is not what is tested here.
SHORTER = {
    "binary_vgg": {"TIMING_S": 0.0},
    "binaryduo": {"TIMING_S": 0.0, "PAPER_WIDTHS": (16, 16, 16, 16, 16, 16)},
    "cone_sweep": {"LIMIT_S": 0.0},
    "constrained": {"METHODS": {name: (lambda x, y, seed: lambda points: points[:, 2]) for name in ("a", "b", "c")}},
    "discrete_vae": {"VARIANCE_REPEATS": 2, "VARIANCE_DATA": 2},
    "gradient_mismatch": {"WINDOWS": (0.1,), "FEATURES": 4},
}


@pytest.fixture
def experiment(monkeypatch):
    """Imports a module of the experiments."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module


@pytest.fixture
def common(experiment):
    """experiments/common.py."""
    return experiment("common")


def documents(folder):
    return {path.name: path.read_text() for path in folder.glob("*.json")}


@pytest.mark.parametrize("name", SMALLEST)
def test_runs_and_makes_nothing_twice(name, experiment, monkeypatch, tmp_path, capsys):
    if name == "lowmem_models":
        try:
            importlib.import_module("transformers.models.gpt2.modeling_gpt2")
        except (ImportError, RuntimeError) as error:  # a torchvision that does not go with this torch raises either
            pytest.skip(str(error))
    module = experiment(name)
    for constant, value in SHORTER.get(name, {}).items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *SMALLEST[name].split(), "--threads", "1", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        module.main()
        made = documents(tmp_path)
        assert made
        if name == "binary_vgg" or name == "binaryduo":  # their checkpoints are what is found again
            monkeypatch.setattr(torch.Tensor, "backward", None)
        else:
            monkeypatch.setattr(module.common, "write_json", None)
        module.main()
    finally:
        torch.set_num_threads(threads)
    assert documents(tmp_path).keys() == made.keys()
    assert list(tmp_path.glob("*.png"))
    assert not list(tmp_path.rglob("*.part"))
    assert "written: " in capsys.readouterr().out


def test_record_finds_runs_under_all_that_shapes_them(common, tmp_path):
    path, calls = tmp_path / "runs.json", []

    def make():
        calls.append(1)
        return {"values": (1, 2), "by count": {3: 0.5}}

    first = common.Record(path).run({"steps": 5, "widths": (1, 2)}, make)
    assert first == {"values": [1, 2], "by count": {"3": 0.5}}  # what is made looks like what is found
    first["values"].append(3)  # a caller's own copy
    found = []
    record = common.Record(path)
    again = record.run({"widths": (1, 2), "steps": 5}, make, on_found=lambda: found.append(1))
    assert again == {"values": [1, 2], "by count": {"3": 0.5}}
    assert ({"steps": 5, "widths": (1, 2)} in record, {"steps": 6, "widths": (1, 2)} in record) == (True, False)
    assert (calls, found) == ([1], [1])
    record.run({"steps": 6, "widths": (1, 2)}, make)
    torch.set_num_threads((threads := torch.get_num_threads()) + 1)
    try:
        record.run({"steps": 5, "widths": (1, 2)}, make)  # in another environment
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == len(json.loads(path.read_text())) == 3


@pytest.mark.parametrize("content", ["", "{}x", '{"key": 1}', '[{"result": 1}]'])
def test_a_file_that_is_no_record_is_refused_and_kept(common, tmp_path, content):
    path = tmp_path / "runs.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"runs\.json is no record of runs: remove it"):
        common.Record(path)
    assert path.read_text() == content


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_is_replaced_as_a_whole_or_left(common, tmp_path, error):
    path = tmp_path / "file"
    common.write_json(path, [1])

    def fail():
        with common.whole_file(path) as unfinished:
            unfinished.write_text("half of")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_mnist_stands_in_for_fashion_that_is_not_there(common, experiment, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiment("data"), "FASHION_ROOT", tmp_path)
    sets = common.load(["digits", "fashion"], None, asked=False)
    assert list(sets) == ["digits", "mnist5k"]
    assert len(sets["mnist5k"][0][0]) == 4000
    said = capsys.readouterr().out
    assert "apt-get install dataset-fashion-mnist" in said
    assert "mnist5k takes its place" in said


def test_what_was_asked_for_is_not_replaced(common, experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(experiment("data"), "FASHION_ROOT", tmp_path)
    for root, asked in ((None, True), (tmp_path, False)):
        with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
            common.load(["fashion"], root, asked=asked)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"no idx file")
    with pytest.raises(SystemExit, match="is not an idx file"):  # there, and corrupt
        common.load(["fashion"], None, asked=False)


def test_a_missing_package_is_one_line(common, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/lowmem.py"])
    with pytest.raises(SystemExit) as end, common.optional_packages():
        import no_such_package  # noqa: F401
    assert end.value.code == 'lowmem.py needs no_such_package: pip install "lowbit-ext[examples]"'


def test_a_full_disk_is_one_line(common):
    def main():
        raise OSError(28, "No space left on device", "runs.json")

    with pytest.raises(SystemExit, match=r"No space left on device: 'runs\.json'"):
        common.start(main)


def test_an_interrupted_experiment_goes_on(tmp_path):
    command = [sys.executable, EXPERIMENTS / "federated.py", "--data", "digits", "--rounds", "2", "--steps", "1",
               "--warm-up", "1", "--threads", "1", "--out", tmp_path, "--seeds"]
    many = [str(seed) for seed in range(1000)]
    record = tmp_path / "federated.json"
    with subprocess.Popen([*command, *many], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not record.is_file():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert errors == "interrupted: what is done is kept, and the same command goes on from there\n"
    kept = json.loads(record.read_text())
    subprocess.run([*command, "0"], check=True, capture_output=True, timeout=TIMEOUT_S)
    finished = json.loads(record.read_text())
    assert len(finished) >= 5  # the server alone and four configurations
    assert finished[: len(kept)] == kept  # times included: not made again


def test_texts(experiment, tmp_path):
    """Fortune's files: the largest are the categories; and a folder for each category."""
    load = experiment("data").load_texts
    fortunes, folders = tmp_path / "fortunes", tmp_path / "folders"
    fortunes.mkdir()
    for index in range(22):
        texts = [f"text {number} of {index}\n    -- somebody" for number in range(index + 1)]
        (fortunes / f"topic{index}").write_text("\n%\n".join(texts) + "\n%\n")
        (fortunes / f"topic{index}.dat").touch()
    (fortunes / "topic3.u8").symlink_to(fortunes / "topic3")
    texts, categories = load(fortunes)
    assert set(categories) == {f"topic{index}" for index in range(2, 22)}
    assert len(texts) == len(categories) == sum(range(3, 23))
    assert texts[list(categories).index("topic2")] == "text 0 of 2\n    -- somebody"
    for name in ("b", "a"):
        (folders / name).mkdir(parents=True)
        (folders / name / "1.txt").write_text(f"a text of {name}")
    texts, categories = load(folders)
    assert texts == ["a text of a", "a text of b"]
    assert categories.tolist() == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="apt-get install fortunes"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="texts of two categories or more"):
        load(folders / "a")
