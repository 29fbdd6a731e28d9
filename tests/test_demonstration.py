"""A bare `python train.py` runs the whole way on text of its own, and the second time faster."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from minibert.training.runlog import read_metrics


def demonstrate(folder) -> str:
    """Run the README's first command (less the installation); returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_student_ends_clearly_nearer_its_teacher(tmp_path):
    first = demonstrate(tmp_path)
    demo = tmp_path / "runs" / "demo"
    evaluations = [
        line
        for line in read_metrics(demo / "compact" / "metrics.jsonl")
        if "held_out_teacher_kl" in line
    ]
    before, after = evaluations[0], evaluations[-1]
    assert after["held_out_teacher_kl"] < 0.3 * before["held_out_teacher_kl"]
    assert after["held_out_teacher_agreement"] > before["held_out_teacher_agreement"] + 0.2
    # The teacher has learnt from context: the commonest words alone would give it some 10 %.
    assert after["held_out_teacher_mlm_accuracy"] > 0.5
    for words in ("teacher", "student before", "student after 300 steps", "BioBERT"):
        assert words in first

    weights = (demo / "teacher" / "model" / "model.safetensors").stat()
    second = demonstrate(tmp_path)
    assert (demo / "teacher" / "model" / "model.safetensors").stat() == weights
    assert len(second) < len(first)
    config = json.loads((demo / "compact" / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
