"""bench/networks.py on small networks, the twins not compiled: its rows are complete, whatever the times are."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lowbit_ext import binary, models

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The module with two small families."""
    monkeypatch.syspath_prepend(BENCH)
    pytest.importorskip("matplotlib")
    import networks

    def small(name, **options):
        return networks.Family(lambda stage: getattr(models, name)(stage, **options), 16, (1, 2))

    families = {
        "quicknet": small("quicknet", widths=(4, 4, 4, 4), stem="cifar"),
        "resnet20": small("resnet20", widths=(4, 4, 4)),
    }
    monkeypatch.setattr(networks, "FAMILIES", families)
    monkeypatch.setattr(networks.peers, "compiled_network", lambda model, x, dtype: lambda: model(x))
    return networks


def test_rows_are_complete_and_written(bench, monkeypatch, tmp_path, capsys):
    arguments = ["networks.py", "--threads", "1", "--seconds", "0", "--no-openvino", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("networks_*.json")
    document = json.loads(path.read_text())
    rows = document["results"]["networks"]
    assert document["machine"]["isa"]
    assert [(row["case"], row["threads"]) for row in rows] == [
        ("quicknet N1", 1), ("quicknet N2", 1), ("resnet20 N1", 1), ("resnet20 N2", 1),
    ]
    absent = {"openvino_ms", "openvino_int8_ms"}
    for row in rows:
        assert absent <= {name for name, value in row.items() if value is None} <= absent | {"packed_bf16_ms"}
        assert 0 < row["percent_of_time_in_convolutions"] < 100
        assert row["stored_bytes"] < row["float32_bytes"]
        assert row["fastest_twin"] in ("fp32", "bf16")
    lines = capsys.readouterr().out.splitlines()
    assert sum("packed takes" in line for line in lines) == len(rows)


def test_packs_in_bfloat16_where_pack_can(bench, monkeypatch):
    asked = []

    def pack(model, example, float_dtype=None):
        asked.append(float_dtype)
        return made(model, example)

    made = binary.pack
    monkeypatch.setattr(bench.binary, "pack", pack)
    network = bench.Network("resnet20", use_openvino=False)
    assert asked == [None, torch.bfloat16]
    assert list(network.packed) == ["packed", "packed_bf16"]


def test_settled_statistics_are_those_of_activations(bench):
    model = bench.FAMILIES["quicknet"].build("binary")
    seen = []
    model.stem.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    bench.settled(model, 16)
    mean = torch.stack(seen).mean((0, 1, 3, 4))
    torch.testing.assert_close(model.stem.bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert not model.training
    assert model.stem.bn.momentum == 0.1


def test_a_wrong_packed_network_is_not_measured(bench):
    network = bench.Network("resnet20", use_openvino=False)
    with torch.no_grad():
        network.model.fc.bias.add_(1)
    with pytest.raises(RuntimeError, match="nothing was measured"):
        bench.row("resnet20", network, 1, 1, 0.0)


def test_every_family_is_named_as_in_models(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    pytest.importorskip("matplotlib")
    import networks

    for name, family in networks.FAMILIES.items():
        assert family.build is getattr(models, name)
    fields = {field.name for field in dataclasses.fields(networks.NetworkRow)}
    assert fields >= {f"{twin}_ms" for twin in networks.TWINS}
