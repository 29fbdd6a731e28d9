"""The GPU's benchmark, on any machine: what it makes of what its parts have found."""

import json
import sys
import types

import pytest
import torch
from conftest import ROOT

pytest.importorskip("transformers", reason="the authors' side is made of transformers models")
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import step


def test_a_gpus_report_projects_the_papers_steps(monkeypatch, tmp_path, capsys):
    row = {"seconds": [0.06, 0.08], "median_seconds": 0.072, "useful_gflops": 300_000.0}
    rows = {"ours": row | {"failure": None}}
    measured = {"matrix_gflops": {"bfloat16": 600_000.0}, "variants": rows}
    monkeypatch.setattr(step, "measure", lambda *given: measured)
    monkeypatch.setattr(step, "table", lambda report: "")
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    report = gpu.Report(tmp_path / "gpu.json", {}, 60.0)
    gpu.measure_step(report, [], 192, tmp_path, torch.device("cpu"))
    told = json.loads((tmp_path / "gpu.json").read_text())
    ours = told["step"]["variants"]["ours"]
    assert ours["share_of_bfloat16_rate"] == 0.5
    assert ours["projected_hours"] == pytest.approx(2.0)  # 100,000 of 0.072 s
    assert "1 of 3 rounds" in capsys.readouterr().err + json.dumps(told)


def test_where_anything_is_wrong_nothing_is_timed(monkeypatch, tmp_path):
    rows = [{"what": "a", "error": 0.1, "allowed": 0.2, "right": True}]
    rows.append({"what": "b", "error": 0.3, "allowed": 0.2, "right": False})
    kernels_right = types.SimpleNamespace(check_all=lambda device: rows)
    monkeypatch.setitem(sys.modules, "correctness", kernels_right)
    for check in ("check_step", "check_resume"):
        monkeypatch.setattr(gpu, check, lambda device: [])
    report = gpu.Report(tmp_path / "gpu.json", {}, 60.0)
    with pytest.raises(SystemExit, match="1 of 2 results are wrong"):
        gpu.check_correctness(report, torch.device("cpu"))
    assert json.loads((tmp_path / "gpu.json").read_text())["correctness"] == rows


def test_a_check_that_cannot_go_on_is_wrong_and_the_others_are_done(monkeypatch, tmp_path):
    right = {"what": "a", "error": 0.1, "allowed": 0.2, "right": True}

    def check_all(device):
        yield right
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setitem(sys.modules, "correctness", types.SimpleNamespace(check_all=check_all))
    for check in ("check_step", "check_resume"):
        monkeypatch.setattr(gpu, check, lambda device: [right])
    report = gpu.Report(tmp_path / "gpu.json", {}, 60.0)
    with pytest.raises(SystemExit, match="1 of 4 results are wrong"):
        gpu.check_correctness(report, torch.device("cpu"))
    told = json.loads((tmp_path / "gpu.json").read_text())["correctness"]
    assert told[1]["what"] == "check_all ended with RuntimeError (out of resource: shared memory)"
    assert [row["right"] for row in told] == [True, False, True, True]
