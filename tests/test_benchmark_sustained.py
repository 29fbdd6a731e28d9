"""The sustained run is train.py's, ends in time, and its pace is told as logged."""

import json
import sys

import pytest
from conftest import ROOT, TOY_CONFIG

sys.path.insert(0, str(ROOT / "benchmarks"))
import sustained

from minibert.errors import InputError


def told(toy_world, tmp_path, monkeypatch, *flags: str) -> dict:
    monkeypatch.setattr(sustained, "BIOBERT", TOY_CONFIG)
    monkeypatch.setattr(sys, "argv", [
        "sustained.py", "--data", f"{toy_world}/corpus", "--batch-size", "5", "--max-length", "19",
        "--device", "cpu", "--log-every", "1", "--json", f"{tmp_path}/found.json", *flags,
    ])  # fmt: skip
    sustained.main()
    return json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_a_run_of_seconds(toy_world, tmp_path, monkeypatch, capsys):
    found = told(toy_world, tmp_path, monkeypatch, "--minutes", "0.1", "--dtype", "float32")
    assert found["updates"] >= 10 and 6 <= found["seconds"] < 60
    assert found["seconds_of_updates"] <= found["seconds"]
    assert len(found["tokens_per_second"]) == 10 and min(found["tokens_per_second"]) > 0
    hours = found["seconds_an_update"] * 100_000 / 3600
    assert found["projected_hours"] == pytest.approx(hours)
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == found


def test_too_short_a_run_tells_nothing(toy_world, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="too few to tell a pace"):
        told(toy_world, tmp_path, monkeypatch, "--minutes", "0.0001")
