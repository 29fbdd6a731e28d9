"""A bare `python train.py` runs the whole way on text of its own; a second keeps its teacher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from minibert.demonstration import DEMO_TEACHER, demonstration
from minibert.folder import save_model
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig
from minibert.training.runlog import read_metrics


def demonstrated(folder: Path) -> subprocess.Popen:
    """The README's first command (less the installation)."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def newest_step(metrics: Path) -> int | None:
    """The update of the last line; None where there is none."""
    try:
        return read_metrics(metrics)[-1]["step"]
    except (OSError, IndexError):
        return None


def test_a_finished_demonstration_keeps_its_teacher_and_begins_its_student_anew(
    monkeypatch, tmp_path
):
    """With a stand-in for training, which writes what a run leaves in the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minibert.demonstration.DEMO_DOCUMENTS", 2_000)
    runs = []

    def train(run: RunConfig) -> None:
        assert not run.out.exists()
        run.out.mkdir()
        result = run.out / ("model" if run.teacher is None else "student")
        save_model(result, BertForMaskedLM(DEMO_TEACHER), tokenizer_from=run.data)
        runs.append(run.out.name)

    demonstration(train)
    demonstration(train)
    assert runs == ["teacher", "compact", "compact"]


@pytest.mark.slow
def test_the_student_ends_clearly_nearer_its_teacher(tmp_path):
    first = demonstrated(tmp_path)
    told, complaint = first.communicate(timeout=1200)
    assert first.returncode == 0, complaint
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
        assert words in told

    config = json.loads((demo / "compact" / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6

    weights = (demo / "teacher" / "model" / "model.safetensors").stat()
    second = demonstrated(tmp_path)
    try:
        deadline = time.monotonic() + 300
        while newest_step(demo / "compact" / "metrics.jsonl") in (None, 0, 300):
            assert second.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        second.send_signal(signal.SIGINT)
        told, complaint = second.communicate(timeout=60)
    finally:
        second.kill()
    assert second.returncode == 130, complaint
    assert told.startswith("3. A student")
    assert "goes on" in told
    assert (demo / "teacher" / "model" / "model.safetensors").stat() == weights
