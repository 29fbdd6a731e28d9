"""metrics.jsonl holds every step once, also after a resumption."""

import json
import math
from pathlib import Path

import pytest

from minibert.errors import InputError
from minibert.progress import duration
from minibert.run_config import RunConfig
from minibert.training.runlog import RunLog, named_figures, read_metrics


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path, first_step=0, steps=9)
    for step in range(6):
        log.evaluation(step, lambda step=step: {"mlm_loss": float(step)})
    RunLog(tmp_path, first_step=3, steps=9).evaluation(4, lambda: {"mlm_loss": 0.5})
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


@pytest.mark.parametrize(
    "line", ["", "[1]", '{"loss": 1}', '{"step": "one"}', '{"step": 1, "seconds": "s"}', "{"]
)
def test_a_line_that_is_none_is_refused_by_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 2 is not of a run's log"):
        read_metrics(path)


def test_throughput_counts_updates_alone(tmp_path, monkeypatch):
    """Two updates of 3 s each; 50 s of evaluating between them do not count.

    Nor does the time between a run's end and its next start: the seconds go on from its last line.
    """
    clock = iter([0.0, 3.0, 53.0, 56.0])
    monkeypatch.setattr("minibert.training.runlog.time.perf_counter", lambda: next(clock))
    log = RunLog(tmp_path, first_step=0, steps=2)
    with log.apart():
        pass
    log.tokens += 1200
    log.update(2, {"loss": 1.0, "grad_norm": 1.0}, learning_rate=0.1, skipped=0)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["tokens_per_second"] == 200
    assert line["seconds"] == 6
    assert "skipped_updates" not in line

    clock = iter([1000.0, 1004.0])
    log = RunLog(tmp_path, first_step=2, steps=3)
    log.update(3, {"loss": 1.0, "grad_norm": 1.0}, learning_rate=0.1, skipped=0)
    assert [line["seconds"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [6, 10]


def test_a_step_that_stands_there_is_not_evaluated_again(tmp_path):
    RunLog(tmp_path, first_step=0, steps=9).evaluation(3, lambda: {"mlm_loss": 0.5})
    log = RunLog(tmp_path, first_step=3, steps=9)
    log.evaluation(3, lambda: pytest.fail("evaluated twice"))
    log.evaluation(6, lambda: {"mlm_loss": 0.25})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6]


def of_recipe(name: str, **settings) -> RunConfig:
    nowhere = Path("none")
    source = {"model": nowhere} if name == "mlm" else {"teacher": nowhere, "teacher_layers": (1, 3)}
    return RunConfig(recipe=name, data=nowhere, out=nowhere, **source, **settings).resolved()


def test_figures_have_names():
    row = [7.0, 1.0, 0.25, 0.5, 0.125, 0.0625, 2.0, 3.0]
    assert named_figures(row, of_recipe("compactbiobert")) == {
        "loss": 7.0,
        "mlm_loss": 1.0,
        "hidden_loss": 0.75,
        "attention_loss": 0.1875,
        "output_loss": 2.0,
        "hidden_loss_per_layer": [0.25, 0.5],
        "attention_loss_per_layer": [0.125, 0.0625],
        "grad_norm": 3.0,
    }


def test_what_is_not_compared_has_no_figure():
    alone = {"loss": 7.0, "mlm_loss": 1.0, "grad_norm": 3.0}
    assert named_figures([7.0, 1.0, 0.0, 3.0], of_recipe("mlm")) == alone
    output = alone | {"output_loss": 2.0}
    nothing_else = of_recipe("distilbiobert", hidden_weight=0.0)
    assert named_figures([7.0, 1.0, 2.0, 3.0], nothing_else) == output
    last = output | {"hidden_loss": 0.5, "hidden_loss_per_layer": [0.5]}
    assert named_figures([7.0, 1.0, 0.5, 2.0, 3.0], of_recipe("distilbiobert")) == last
    row = [7.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.0, 3.0]  # 3 levels, 2 layers
    figures = named_figures(row, of_recipe("tinybiobert"))
    assert figures["hidden_loss_per_layer"] == [1.0, 2.0, 3.0]
    assert figures["attention_loss_per_layer"] == [4.0, 5.0]


def test_numbers_that_are_none_are_null_and_counted(tmp_path):
    """JSON has no NaN: strict readers would refuse the whole file."""
    figures = {"loss": math.nan, "hidden_loss_per_layer": [1.0, math.inf], "grad_norm": -math.inf}
    RunLog(tmp_path, first_step=0, steps=2).update(1, figures, learning_rate=0.1, skipped=4)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert line["loss"] is line["grad_norm"] is None
    assert line["hidden_loss_per_layer"] == [1.0, None]
    assert line["skipped_updates"] == 4
