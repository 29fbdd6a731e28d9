"""The command `python -m minibert.audit` tells what its ledger holds: in tables, and as JSON."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, TOY_CONFIG
from hypothesis import given
from hypothesis import strategies as st

from minibert import audit, progress
from minibert.errors import run_command
from minibert.ledger import table
from minibert.recipes import RECIPES

COUNTS = ("flops", "bytes_read", "bytes_written", "saved_bytes")
PLACES = {"phases": "phase", "modules": "module"}


@pytest.fixture
def toy_model(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(TOY_CONFIG)))
    return path


@pytest.fixture
def command(toy_model, tmp_path, monkeypatch, capsys):
    """Run the command on the toy model; returns its status, its prints and its complaints."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*flags: str, model: Path | None = toy_model):
        given_model = [] if model is None else ["--model", str(model)]
        words = ["minibert.audit", *given_model, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        status = run_command(audit.main)
        return (status, *capsys.readouterr())

    yield run
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def ledger(command, tmp_path):
    """The JSON that the command writes."""

    def run(*flags: str, **options) -> dict:
        status, _, complaint = command(*flags, "--json", tmp_path / "ledger.json", **options)
        assert status == 0, complaint
        return json.loads((tmp_path / "ledger.json").read_text())

    return run


@pytest.mark.parametrize("flags", [("--meta",), (), ("--meta", "--forward")])
def test_the_sums_of_the_json_are_those_of_its_operations(ledger, flags):
    found = ledger(*flags, "--batch", 3, "--length", 7)
    operations = found["operations"]
    assert [operation["number"] for operation in operations] == list(range(len(operations)))
    for totals, key in PLACES.items():
        counted = Counter(operation[key] for operation in operations)
        assert {name: total["operations"] for name, total in found["totals"][totals].items()} == (
            counted
        )
    for name in COUNTS:
        whole = sum(operation[name] for operation in operations)
        assert whole > 0 or (name == "saved_bytes" and "--forward" in flags)
        for totals, key in PLACES.items():
            for place, total in found["totals"][totals].items():
                there = [entry[name] for entry in operations if entry[key] == place]
                assert total[name] == sum(there)
        lines = Counter()
        for operation in operations:
            lines[found["stacks"][operation["stack"]][0]] += operation[name]
        assert {line: total[name] for line, total in found["totals"]["lines"].items()} == lines
        assert lines.total() == whole


def test_the_json_is_as_its_description_says(ledger):
    found = ledger("--batch", 3, "--length", 7, "--seed", 5)
    described = audit.__doc__.split("--json FILE")[1]
    assert list(found) == re.findall(r"^  (\w+)  ", described, flags=re.MULTILINE)
    assert set(found["totals"]) == {"phases", "lines", "modules"}
    for operation in found["operations"]:
        for name in operation:
            assert re.search(rf"\b{name}\b", described), name
        assert operation["seconds"] >= 0
    for line in found["totals"]["lines"]:
        file, number = line.rsplit(":", 1)
        assert (Path(audit.__file__).parent.parent / file).is_file()
        assert int(number) > 0
    settings = found["settings"]
    assert (settings["batch"], settings["length"], settings["seed"]) == (3, 7, 5)
    assert settings["recipe"]["name"] == "compactbiobert"
    assert settings["recipe"]["hidden_weight"] == RECIPES["compactbiobert"].hidden_weight
    phases = {operation["phase"] for operation in found["operations"]}
    assert phases == {"teacher forward", "student forward", "losses", "backward", "update"}
    assert found["versions"]["torch"]


def test_shapes_only_counts_the_flops_of_a_step_and_knows_no_time(ledger):
    real, shapes = ledger(), ledger("--meta")

    def of(found):
        return {name: total["flops"] for name, total in found["totals"]["phases"].items()}

    assert of(real) == of(shapes)
    assert all(total["seconds"] > 0 for total in real["totals"]["phases"].values())
    assert {operation["seconds"] for operation in shapes["operations"]} == {None}


def test_every_flag_reaches_the_step(ledger):
    beginning = ledger()
    different = {
        ("--recipe", "distilbiobert"): "losses",
        ("--batch", "3"): "student forward",
        ("--length", "17"): "student forward",
        ("--micro-batch-tokens", "16"): "losses",
        ("--dtype", "bfloat16"): "student forward",
        ("--ops", "plain"): "losses",
    }
    for flags, phase in different.items():
        changed = ledger(*flags)
        before, after = (found["totals"]["phases"][phase] for found in (beginning, changed))
        assert any(before[name] != after[name] for name in ("operations", *COUNTS)), flags
        assert changed["settings"] != beginning["settings"]


def test_a_forward_pass_is_one_pass_of_the_model_however_large(ledger):
    found = ledger("--forward", "--batch", 150, "--length", 29)  # 4,350 tokens at once
    assert list(found["totals"]["phases"]) == ["forward"]
    assert found["settings"]["recipe"] is None
    products = [o for o in found["operations"] if o["name"] == "aten.addmm.default"]
    assert len(products) == 6 * TOY_CONFIG.num_hidden_layers + 1  # and the head's


def test_a_model_folder_and_recipe_mlm(ledger, toy_world):
    found = ledger("--recipe", "mlm", model=toy_world / "teacher")
    assert "teacher forward" not in found["totals"]["phases"]
    assert found["totals"]["phases"]["student forward"]["flops"] > 0


def test_a_recipe_of_ones_own(ledger, tmp_path):
    recipe = RECIPES["compactbiobert"].to_dict() | {"attention_weight": 0.0}
    (tmp_path / "own.json").write_text(json.dumps(recipe))
    functions = {
        operation["function"]
        for operation in ledger("--recipe", tmp_path / "own.json")["operations"]
    }
    assert "_HiddenStateLoss" in functions
    assert "_AttentionMapLoss" not in functions


def test_precision_tells_the_worst_lines_and_no_time(command, tmp_path):
    path = tmp_path / "ledger.json"
    status, printed, _ = command("--precision", "--dtype", "bfloat16", "--json", path)
    assert status == 0
    assert "where rounding shows most" in printed
    head, *rows = printed.split("where rounding shows most")[1].splitlines()[1:12]
    assert head.split() == ["line", "relative", "largest", "operation"]
    errors = [float(row.split()[1]) for row in rows]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    operations = json.loads(path.read_text())["operations"]
    known = [o["error"]["relative"] for o in operations if o["error"] is not None]
    finite = [error for error in known if error is not None]
    assert max(finite) == pytest.approx(next(e for e in errors if e < float("inf")), rel=0.01)
    assert {operation["seconds"] for operation in operations} == {None}


def rows_of(printed: str, title: str) -> dict[str, list[str]]:
    """The rows of a printed table: name -> what follows it."""
    (block,) = [part for part in printed.split("\n\n") if part.startswith(title)]
    head, *rows = block.splitlines()
    width = head.index("calls") - 2
    return {row[:width].strip(): row[width:].split() for row in rows}


def test_the_tables_add_up(command, ledger, monkeypatch):
    found = ledger()
    _, printed, _ = command()
    for title, name in (("phase", "phases"), ("line", "lines"), ("module", None)):
        rows = rows_of(printed, title)
        assert int(rows["the whole"][0].replace(",", "")) == len(found["operations"])
        if name == "phases":
            for phase, total in found["totals"][name].items():
                assert int(rows[phase][0].replace(",", "")) == total["operations"]
                if total["flops"]:
                    assert float(rows[phase][1]) == pytest.approx(total["flops"] / 1e6, abs=6e-4)
    assert all(len(line) <= 120 for line in printed.splitlines()[1:])
    shown = rows_of(printed, "line")
    left_out = len(found["totals"]["lines"]) - audit.LINES_SHOWN
    assert len(shown) == audit.LINES_SHOWN + 2
    assert f"and {left_out} more" in printed
    monkeypatch.setenv("COLUMNS", "100")
    _, printed, _ = command("--by", "line")
    assert max(map(len, printed.splitlines()[1:])) == 100


@pytest.mark.parametrize("by", ["phase", "line", "module"])
def test_one_table_in_full(command, ledger, by):
    found = ledger()
    _, printed, _ = command("--by", by)
    assert printed.count("\n\n") == 1
    rows = rows_of(printed, by)
    whole = rows.pop("the whole")
    assert not any(name.startswith("and ") for name in rows)
    calls = [int(row[0].replace(",", "")) for row in rows.values()]
    assert sum(calls) == int(whole[0].replace(",", "")) == len(found["operations"])
    if by == "line":
        assert set(rows) == set(found["totals"]["lines"])
        assert "return F.linear(" in printed  # the beginning of what stands there


def test_layers_of_a_kind_are_one_row(command):
    _, printed, _ = command("--by", "module")
    rows = rows_of(printed, "module")
    assert {"layers.*.query", "layers.*: _Attention", "_VocabularyLoss", "update"} <= set(rows)
    assert not any(re.search(r"layers\.\d", name) for name in rows)


def test_progress_is_told(command, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    _, _, told = command()
    assert re.search(r"^recording: [\d,]+ operations, backward$", told, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--meta", "--precision"], "--precision compares numbers, and --meta has none"),
        (["--forward", "--recipe", "mlm"], "--forward has no --recipe"),
        (["--forward", "--micro-batch-tokens", "8"], "no --micro-batch-tokens"),
        (["--recipe", "bert"], "'bert' is no file and none of compactbiobert"),
        (["--batch", "0"], "'0' is not a whole number from 1 up"),
        (["--length", "2"], "'2' is not a whole number from 3 up"),
        (["--length", "30"], "29 positions"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--by", "file"], "invalid choice: 'file'"),
        (["--js", "x"], "unrecognized arguments"),
        (["--json", "nowhere/x.json"], "nowhere: no such folder, to write x.json in"),
        (["--html", "."], ".: a folder; expected a file to write"),
        (["--html", "a.out", "--json", "./a.out"], "--json and --html are both a.out"),
    ],
)
def test_wrong_flags(command, flags, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    status, printed, told = command(*flags)
    assert status == 2
    assert printed == ""
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert complaint in told
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), ("{", "not readable as JSON"), ('{"vocab_size": 5}', "hidden_size")],
)
def test_wrong_models(command, tmp_path, content, complaint):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    status, _, told = command("--meta", model=path)
    assert status == 2
    assert told.count("\n") == 1
    assert str(path) in told
    assert complaint in told


@given(st.integers(0, 10**19), st.integers(1, 10**19))
def test_no_figure_looks_like_nothing_but_nothing(value, largest):
    divisor, name = table.unit(max(value, largest), "B")
    told = table.figure(value, divisor)
    assert (told == "") == (value == 0)
    assert not re.fullmatch(r"[0.,]+", told)
    assert max(value, largest) / divisor >= 1
    assert max(value, largest) / divisor < 1000 or name == "PB"
    if told and not told.startswith("<"):
        assert float(told.replace(",", "")) == pytest.approx(value / divisor, abs=0.00051)


def test_it_records_our_train_wherever_it_is_asked(toy_model, tmp_path):
    """And takes it quietly that nobody reads its table."""
    (tmp_path / "train.py").write_text("raise SystemExit('the train.py of somebody else')")
    command = f"'{sys.executable}' -m minibert.audit --meta --model '{toy_model}' | true"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stderr, done.stdout) == ("", "141\n")
