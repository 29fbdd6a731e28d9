"""`minibert.report`: what the pictures show is what was logged, and what the models compute."""

import base64
import dataclasses
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from recipe_toys import run_of

import minibert.report as command
from minibert.errors import InputError, run_command
from minibert.folder import load_model, save_model
from minibert.model import BertForMaskedLM
from minibert.pictures.compared import (
    attention_maps,
    held_out_documents,
    load_pair,
    nearness,
    sentence,
)
from minibert.pictures.maps import of_heads
from minibert.pictures.page import report_page
from minibert.pictures.runs import labels, read_run, read_runs, table
from minibert.pictures.series import (
    held_out_panels,
    layer_panels,
    loss_panels,
    passed_over,
    trend,
    update_panels,
)
from minibert.run_config import RunConfig
from minibert.student import student_from_teacher
from minibert.training.runlog import read_metrics
from train import train

TEXT = "w03 w17 w17 unheard w40 w41"
OF_RUNS = ("losses", "losses_by_layer", "updates", "held_out_by_updates", "held_out_by_time")


@pytest.fixture(scope="module")
def trained(toy_world, tmp_path_factory) -> RunConfig:
    """A real run of 6 updates, with its student."""
    run = RunConfig(
        teacher=toy_world / "teacher",
        data=toy_world / "corpus",
        out=tmp_path_factory.mktemp("runs") / "compact",
        steps=6,
        batch_size=7,
        max_length=19,
        learning_rate=1e-2,
        warmup_steps=2,
        log_every=1,
        eval_every=3,
        device="cpu",
    ).resolved()
    train(run)
    return run


@pytest.fixture
def logged(toy_run, tmp_path):
    """Write a run folder with these lines of metrics.jsonl."""

    def write(name: str, lines: list[dict], config: RunConfig | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = config or dataclasses.replace(toy_run, teacher_layers=(1, 3))
        text = json.dumps({"run": config.to_dict(), "identity": {}})
        (folder / "config.json").write_text(text)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


@pytest.fixture
def report(monkeypatch, capsys):
    """Run the command; what it prints, one line each. With `fails`, its one line of complaint."""

    def run(*arguments, fails: bool = False):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        status = run_command(command.main)
        told = capsys.readouterr()
        assert status == (2 if fails else 0), told.err
        if fails:
            assert told.err.startswith("error: ") and told.err.count("\n") == 1
            return told.err
        return told.out.splitlines()

    return run


def line_of(step: int, **figures) -> dict:
    return {"step": step, "loss": 9.0 / step, "mlm_loss": 4.0 / step} | figures


def evaluation_of(step: int, loss: float, **figures) -> dict:
    return {"step": step, "held_out_mlm_loss": loss, **figures}


# From logs to curves.


def test_the_curves_of_a_real_run_are_its_lines(trained):
    (run,) = read_runs([trained.out])
    lines = read_metrics(trained.out / "metrics.jsonl")
    told = [line for line in lines if "loss" in line]
    names = ("loss", "mlm_loss", "hidden_loss", "attention_loss", "output_loss")
    panels = loss_panels([run])
    assert [panel.title.split(" ")[0] for panel in panels] == [
        "loss,", "MLM", "hidden-state", "attention", "output",
    ]  # fmt: skip
    for name, panel in zip(names, panels, strict=True):
        assert panel.curves == {0: ([1, 2, 3, 4, 5, 6], [line[name] for line in told])}
    names = ("learning_rate", "grad_norm", "tokens_per_second")
    for name, panel in zip(names, update_panels([run]), strict=True):
        assert panel.curves[0].y == [line[name] for line in told]
    ((hidden, attention),) = layer_panels([run])
    for panel, name in (hidden, "hidden_loss"), (attention, "attention_loss"):
        assert list(panel.curves) == ["0 ← 1", "1 ← 3"]
        for i, curve in enumerate(panel.curves.values()):
            assert curve.y == [line[f"{name}_per_layer"][i] for line in told]
    evaluated = [line for line in lines if "held_out_mlm_loss" in line]
    names = ("mlm_loss", "mlm_accuracy", "teacher_kl", "teacher_agreement")
    for name, panel in zip(names, held_out_panels([run]), strict=True):
        assert panel.curves[0] == ([0, 3, 6], [line[f"held_out_{name}"] for line in evaluated])
        own = evaluated[-1].get(f"held_out_teacher_{name}")
        assert panel.teacher == (() if own is None else (own,))
    for panel in held_out_panels([run], "seconds"):
        assert panel.curves[0].x == [0.0, told[2]["seconds"], told[5]["seconds"]]


def test_an_evaluation_has_the_seconds_of_the_updates_before_it(logged):
    lines = [
        evaluation_of(0, 5.0),
        line_of(2, seconds=1.5),
        evaluation_of(3, 4.0),
        line_of(4, seconds=2.5),
        evaluation_of(4, 3.0),
        line_of(6, seconds=9.0),
    ]
    run = read_run(logged("a", lines), "a")
    (panel,) = held_out_panels([run], "seconds")
    assert panel.curves == {0: ([0.0, 1.5, 2.5], [5.0, 4.0, 3.0])}
    late = read_run(logged("b", [evaluation_of(1, 5.0), *lines[1:]]), "b")
    (panel,) = held_out_panels([late], "seconds")
    assert panel.curves[0].x == [1.5, 2.5]  # what no line precedes has no place


def test_an_old_log_has_no_picture_against_time(logged, report, tmp_path):
    """Nor one that was gone on with: its seconds do not count from the beginning."""
    old = [evaluation_of(0, 5.0), line_of(1), evaluation_of(1, 4.0)]
    new = [*old, line_of(2, seconds=1.0), evaluation_of(2, 3.0)]
    runs = read_runs([logged("old", old), logged("mixed", new)])
    assert held_out_panels(runs, "seconds") == []
    assert held_out_panels(runs)[0].curves.keys() == {0, 1}
    written = report(tmp_path / "old", "--out", tmp_path / "out")
    assert [Path(line).stem for line in written] == [
        "losses", "held_out_by_updates", "report",
    ]  # fmt: skip


def test_nulls_are_gaps(logged):
    lines = [
        line_of(1, grad_norm=2.0, hidden_loss_per_layer=[0.5, None]),
        line_of(2, loss=None, grad_norm=None, hidden_loss_per_layer=[None, None]),
        line_of(3, grad_norm=1.0, hidden_loss_per_layer=[0.25, 0.125]),
    ]
    run = read_run(logged("a", lines), "a")
    loss, _ = loss_panels([run])
    assert loss.curves[0].y == pytest.approx([9.0, math.nan, 3.0], nan_ok=True)
    (norm,) = update_panels([run])
    assert norm.curves[0].y == pytest.approx([2.0, math.nan, 1.0], nan_ok=True)
    ((panel,),) = layer_panels([run])
    assert panel.curves["1 ← 3"].y == pytest.approx([math.nan, math.nan, 0.125], nan_ok=True)


def test_a_panel_without_data_is_left_out(logged, toy_run):
    lines = [line_of(1, output_loss=None, seconds=1.0)]
    run = read_run(logged("mlm", lines, run_of("mlm", toy_run)), "mlm")
    assert [panel.title for panel in loss_panels([run])] == ["loss, weighted sum", "MLM loss, nats"]
    assert layer_panels([run]) == update_panels([run]) == held_out_panels([run]) == []
    both = read_runs([logged("with", [line_of(1, output_loss=0.5)]), logged("out", lines)])
    assert loss_panels(both)[-1].curves == {0: ([1], [0.5])}


def test_updates_passed_over_are_marked_once(logged):
    counts = [None, 1, 1, 3]
    lines = [line_of(n, **({"skipped_updates": c} if c else {})) for n, c in enumerate(counts, 1)]
    assert passed_over(read_run(logged("a", lines), "a")) == [2, 4]


def test_levels_are_named_as_the_recipe_compares_them(logged, toy_run):
    levels = {"hidden_loss_per_layer": [3.0, 2.0, 1.0], "attention_loss_per_layer": [5.0, 4.0]}
    lines = [line_of(1, hidden_loss=6.0, attention_loss=9.0, **levels)]
    config = dataclasses.replace(run_of("tinybiobert", toy_run), teacher_layers=(1, 3))
    ((hidden, attention),) = layer_panels([read_run(logged("tiny", lines, config), "tiny")])
    assert list(hidden.curves) == ["embeddings", "0 ← 1", "1 ← 3"]
    assert hidden.curves["0 ← 1"].y == [2.0] and attention.curves["1 ← 3"].y == [4.0]
    assert hidden.title == "hidden-state loss, mean square"


def test_a_trend_is_the_mean_of_neighbours():
    values = [float(n % 7) for n in range(180)]  # windows of 7
    assert trend(values)[3:-3] == pytest.approx([3.0] * 174)
    values[90] = math.nan
    smooth = trend(values)
    assert math.isnan(smooth[90])
    neighbours = values[88:90] + values[91:95]
    assert smooth[91] == pytest.approx(sum(neighbours) / 6)
    assert trend([4.0, 2.0]) == [4.0, 2.0]


def test_labels_distinguish():
    paths = [Path(p) for p in ("/x/a/run", "/x/b/run", "/y/b/run", "/run", "/x/other")]
    assert labels(paths) == ["a/run", "x/b/run", "y/b/run", "//run", "other"]


def test_the_table_tells_what_differs(logged, toy_run):
    config = dataclasses.replace(toy_run, teacher_layers=(1, 3))
    lines = [line_of(n, tokens_per_second=speed) for n, speed in enumerate([7, None, 9, 800], 1)]
    lines.append(evaluation_of(4, 0.25, held_out_teacher_mlm_loss=0.125))
    runs = [
        read_run(logged("a", lines, config), "a"),
        read_run(logged("b", lines[:1], dataclasses.replace(config, seed=3, max_length=17)), "b"),
    ]
    assert table(runs) == {
        "recipe": ["compactbiobert", "compactbiobert"],
        "updates": ["4 of 10", "1 of 10"],
        "dtype": ["float32", "float32"],
        "seed": ["0", "3"],
        "held-out MLM loss, nats": ["0.2500", ""],
        "held-out MLM loss, nats: teacher's own": ["0.1250", ""],
        "held out after updates": ["4", ""],
        "tokens a second, median": ["9", "7"],
        "max length": ["19", "17"],
    }


# From models to maps.


def direct(model: BertForMaskedLM, ids: list[int], layers) -> tuple[list, list]:
    """Maps (N, S, S) and hidden states (S, H) of the layers, one head after the other."""
    output = model(torch.tensor([ids]), torch.ones(1, len(ids)), keep=tuple(layers))
    maps = []
    for layer in layers:
        query, key = output.queries[layer][0], output.keys[layer][0]  # (N, S, D)
        heads = [q @ k.T / math.sqrt(q.shape[1]) for q, k in zip(query, key, strict=True)]
        maps.append(torch.stack([head.exp() / head.exp().sum(1, keepdim=True) for head in heads]))
    return maps, [output.hidden_states[layer][0] for layer in layers]


def test_maps_are_the_softmax_of_queries_and_keys(trained):
    pair = load_pair(trained.out / "student")
    assert pair.layers == (1, 3)
    tokens, words = sentence(pair, TEXT)
    assert words == ["[CLS]", "w03", "w17", "w17", "[UNK]", "w40", "w41", "[SEP]"]
    maps = attention_maps(pair.teacher, tokens, pair.layers)
    expected, _ = direct(pair.teacher, tokens[0][0].tolist(), pair.layers)
    assert maps.shape == (2, 3, 8, 8)
    torch.testing.assert_close(maps, torch.stack(expected))
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 8))
    torch.testing.assert_close(of_heads(maps, None, "teacher"), sum(maps.unbind(1)) / 3)
    assert torch.equal(of_heads(maps, 2, "teacher"), maps[:, 2])


def test_nearness_is_that_of_each_token(trained):
    """Batches of several lengths count by their real tokens; padding does not."""
    pair = load_pair(trained.out / "student")
    batches = held_out_documents(pair, trained.data, 5, max_length=19)
    found = nearness(pair.after, pair.teacher, pair.layers, batches)
    cosines, kls = [[], []], [[], []]
    for input_ids, mask in batches:
        for row, real in zip(input_ids, mask, strict=True):
            ids = row[real.bool()].tolist()
            (maps, states), (own_maps, own_states) = (
                direct(pair.after, ids, (0, 1)), direct(pair.teacher, ids, (1, 3)),
            )  # fmt: skip
            for i in (0, 1):
                cosines[i] += torch.cosine_similarity(states[i], own_states[i]).tolist()
                kl = own_maps[i] * (own_maps[i].log() - maps[i].log())
                kls[i] += kl.sum(-1).flatten().tolist()
    assert found.num_tokens == len(cosines[0]) > 5
    assert found.cosine == pytest.approx([sum(c) / len(c) for c in cosines], abs=1e-5)
    assert found.attention_kl == pytest.approx([sum(k) / len(k) for k in kls], abs=1e-5)


def test_before_is_the_student_as_it_started(trained):
    pair = load_pair(trained.out / "student")
    start = student_from_teacher(load_model(trained.teacher), (1, 3))
    assert not pair.before.training
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, pair.before.state_dict()[name])
    tokens, _ = sentence(pair, TEXT)
    before, after = (
        nearness(model, pair.teacher, pair.layers, [tokens]) for model in (pair.before, pair.after)
    )
    again = nearness(start.eval(), pair.teacher, pair.layers, [tokens])
    assert before == again != after
    assert nearness(pair.teacher, pair.teacher, range(4), [tokens]).cosine == pytest.approx([1] * 4)


def test_a_student_that_lies_in_no_run(trained, tmp_path):
    shutil.copytree(trained.out / "student", tmp_path / "alone")
    with pytest.raises(InputError, match="--teacher is needed"):
        load_pair(tmp_path / "alone")
    assert load_pair(tmp_path / "alone", trained.teacher).layers == (1, 3)


def test_another_teacher_is_refused(trained, tmp_path):
    other = load_model(trained.teacher)
    other.head.decoder_bias.data += 1
    save_model(tmp_path / "other", other, tokenizer_from=trained.teacher)
    with pytest.raises(InputError, match="not the teacher that"):
        load_pair(trained.out / "student", tmp_path / "other")


def test_a_student_of_another_width_has_maps_alone(trained, tmp_path):
    config = dataclasses.replace(load_model(trained.teacher).config, hidden_size=18)
    student = BertForMaskedLM(dataclasses.replace(config, num_hidden_layers=2))
    save_model(tmp_path / "narrow", student, tokenizer_from=trained.teacher)
    pair = load_pair(tmp_path / "narrow", trained.teacher)
    tokens, _ = sentence(pair, TEXT)
    found = nearness(pair.after, pair.teacher, pair.layers, [tokens])
    assert pair.before is None and found.cosine is None and len(found.attention_kl) == 2


# The page and the command.


class Page(HTMLParser):
    """What stands in a page: pictures, text, tags that were opened and closed."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.words, self.open, self.policy = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        elif attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        elif tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_command_writes_pictures_and_a_page_that_holds_them(trained, report, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    files = report(
        trained.out, "--maps", TEXT, "--data", trained.data, "--documents", 3, "--head", 2,
        "--out", tmp_path / "out",
    )  # fmt: skip
    names = [*(f"{name}.png" for name in OF_RUNS), "attention_maps.png", "nearness.png"]
    assert files == [str(tmp_path / "out" / name) for name in [*names, "report.html"]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *names, "report.html", "notes.txt",
    }  # fmt: skip
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    for name, image in zip(names, page.images, strict=True):
        png = (tmp_path / "out" / name).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert image["src"] == "data:image/png;base64," + base64.b64encode(png).decode()
        assert image["alt"] and int(image["width"]) > 800
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-[\w+/]{43}='", page.policy
    )
    assert "compactbiobert" in page.words


def test_a_hostile_name_is_only_text(logged, report, tmp_path):
    name = "_<script>alert(1)<$x^{2}$\n\"'&amp;"
    folder = logged(name.replace("/", "|"), [line_of(1)])
    report(folder, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert name.replace("\n", "?") in Page(text).words
    page = Page(report_page("<b>", ["<i>"], {"<u>": ["<s>"]}, [], {"<p>": "1"}))
    assert {"<b>", "<i>", "<u>", "<s>", "<p> 1"} <= set(page.words)


def test_without_matplotlib_one_line_says_what_to_install(trained, report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    complaint = report(trained.out, "--out", tmp_path / "out", fails=True)
    assert 'pip install "minibert[report]"' in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "nothing logged yet"),
        ([{"step": 1.5}], "a line of step 1.5; expected a whole number"),
        ([{"step": 1, "loss": "low"}], "step 1: 'loss' is no number"),
        ([{"step": 1, "loss": [1.0]}], "step 1: 'loss' is no number"),
        ([{"step": 1, "hidden_loss_per_layer": 1.0}], "is no list of numbers"),
        ([line_of(1, hidden_loss_per_layer=[1.0])], "is not one number for each of the 2 levels"),
        ([{"loss": 1.0}], "line 1 is not of a run's log"),
    ],
)
def test_a_damaged_log_is_told(logged, report, tmp_path, lines, complaint):
    assert complaint in report(logged("bad", lines), "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


def test_wrong_runs_are_told(logged, report, tmp_path):
    good = logged("good", [line_of(1)])
    bad = logged("bad", [line_of(1)])
    (bad / "config.json").write_text("{")
    for arguments, complaint in (
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "no run of train.py (no config.json in it)"),
        ([bad], "not readable as JSON"),
        ([good, good / "." / ""], "given twice"),
        ([], "no RUN"),
        ([good, "--head", 1], "--head goes with --maps TEXT"),
        ([good, "--out", good / "config.json"], "a file; expected a folder to write"),
        ([good, "--out", good / "config.json" / "x"], "Not a directory"),
        ([good, "--maps", TEXT], "no such folder; a run has it when it is at its end"),
        ([good, good, "--maps", TEXT], "--maps shows one student"),
    ):
        assert complaint in report("--out", tmp_path / "out", *arguments, fails=True)
    assert not (tmp_path / "out").exists()


def test_wrong_maps_are_told(trained, report, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained.teacher, other)
    words = (other / "vocab.txt").read_text().split("\n")
    words[7], words[8] = words[8], words[7]
    (other / "vocab.txt").write_text("\n".join(words))
    for arguments, complaint in (
        (["--maps", "w01 " * 28], "a text of 30 tokens with [CLS] and [SEP]; the models have 29"),
        (["--maps", " "], "a text without any token"),
        (["--maps", TEXT, "--head", 3], "--head 3: the teacher has 3 heads"),
        (["--maps", TEXT, "--teacher", other], "has another vocabulary than"),
        (["--maps", TEXT, "--teacher", tmp_path / "none"], "none"),
        (["--maps", TEXT, "--data", tmp_path], "meta.json"),
    ):
        assert complaint in report(trained.out, "--out", tmp_path / "out", *arguments, fails=True)
    assert not (tmp_path / "out").exists()
