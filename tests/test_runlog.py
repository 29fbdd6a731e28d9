"""metrics.jsonl holds every step once, also after a resumption."""

import json

import pytest
import torch

from minibert.errors import InputError
from minibert.progress import duration
from minibert.training.runlog import RunLog, read_metrics


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path, first_step=0, steps=9)
    for step in range(6):
        log.evaluation(step, {"mlm_loss": float(step)})
    RunLog(tmp_path, first_step=3, steps=9).evaluation(4, {"mlm_loss": 0.5})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1] == {"step": 4, "held_out_mlm_loss": 0.5}


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_durations_read_like_a_clock():
    assert [duration(seconds) for seconds in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


@pytest.mark.parametrize("line", ["", "[1]", '{"loss": 1}', '{"step": "one"}', "{"])
def test_a_line_that_is_none_is_refused_by_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 2 is not of a run's log"):
        read_metrics(path)


def test_throughput_counts_updates_alone(tmp_path, monkeypatch):
    """Two updates of 3 s each; 50 s of evaluating between them do not count."""
    clock = iter([0.0, 3.0, 53.0, 56.0])
    monkeypatch.setattr("minibert.training.runlog.time.perf_counter", lambda: next(clock))
    log = RunLog(tmp_path, first_step=0, steps=2)
    with log.apart():
        pass
    log.tokens += 1200
    value, none = torch.tensor(1.0), torch.zeros(0)
    terms = {"loss": value, "mlm_loss": value, "output_loss": value}
    terms |= {"hidden_loss": none, "attention_loss": none}
    log.update(2, **terms, learning_rate=0.1, grad_norm=value)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["tokens_per_second"] == 200
