"""The annotated page: our source as it is, the ledger's figures, and nothing from anywhere else."""

import base64
import dataclasses
import hashlib
import html
import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT, TOY_CONFIG

from minibert import audit
from minibert.errors import run_command
from minibert.ledger.page import annotated_source, dtypes, highlighted, shapes
from minibert.ledger.precision import Error, PrecisionLedger
from minibert.ledger.record import Ledger, Operation

VOID = {"meta", "link", "input", "wbr"}
VERSIONS = {"python": "3", "torch": "2"}


class Page(HTMLParser):
    """What a page is made of: lines of source, ids, requests, the texts of style and script."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.sources: dict[str, list[str]] = {}
        self.texts: dict[str, str] = {}
        self.policy = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if "data-file" in attributes:
            self.sources[attributes["data-file"]] = []
        if tag == "code":
            list(self.sources.values())[-1].append("")
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag in ("script", "style", "title"):
            self.current = attributes.get("id", tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "code" in self.open:
            list(self.sources.values())[-1][-1] += data
        if self.open and self.open[-1] in ("script", "style", "title"):
            self.texts[self.current] = self.texts.get(self.current, "") + data


def written(tmp_path: Path, monkeypatch, *flags: str, config: Path | None = None) -> str:
    """The page that the command writes of a toy model."""
    if config is None:
        config = tmp_path / "config.json"
    config.write_text(json.dumps(dataclasses.asdict(TOY_CONFIG)))
    path = tmp_path / "audit.html"
    words = ["minibert.audit", "--model", str(config), "--html", str(path), *flags]
    monkeypatch.setattr(sys, "argv", words)
    assert run_command(audit.main) == 0
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def step_page(tmp_path_factory) -> tuple[str, dict]:
    """A page of a step, and the JSON of the same."""
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        text = written(folder, patch, "--json", str(folder / "ledger.json"))
    return text, json.loads((folder / "ledger.json").read_text())


def test_it_is_well_formed_and_ids_are_unique(step_page):
    page = Page(step_page[0])
    assert len(page.ids) == len(set(page.ids))
    ids = set(page.ids)
    for tag, name, value in page.attributes:
        if name in ("aria-labelledby", "aria-describedby", "for", "aria-controls"):
            assert set(value.split()) <= ids, (tag, name, value)


def test_the_source_is_ours_line_by_line(step_page):
    text, ledger = step_page
    page = Page(text)
    ran = {line for stack in ledger["stacks"] for line in stack}
    assert set(page.sources) == {line.rsplit(":", 1)[0] for line in ran}
    for name, lines in page.sources.items():
        assert lines == (ROOT / name).read_text(encoding="utf-8").splitlines(), name
    assert {entry for entry in page.ids if re.search(r"\.py:\d+$", entry)} == ran


def test_files_stand_in_the_order_of_the_readme(step_page):
    names = list(Page(step_page[0]).sources)
    assert names[0] == "train.py"
    readme = (ROOT / "README.md").read_text()
    mapped = re.findall(r"^\| `(minibert/(?:model|ops/\w+)\.py)` \|", readme, flags=re.MULTILINE)
    first = [name for name in mapped if name in names]
    assert names[1 : 1 + len(first)] == first
    rest = names[1 + len(first) :]
    assert rest == sorted(rest)


def test_the_rows_add_up_to_the_ledger(step_page):
    text, ledger = step_page
    data = json.loads(Page(text).texts["ledger"])
    assert sum(row[1] for row in data["rows"]) == len(ledger["operations"])
    sums = {phase: [0, 0, 0, 0] for phase in data["phases"]}
    for row in data["rows"]:
        for i, value in enumerate((1, *row[12:15])):
            sums[data["phases"][row[2]]][i] += row[1] * value
    expected = {
        phase: [
            total["operations"],
            total["flops"],
            total["bytes_read"] + total["bytes_written"],
            total["saved_bytes"],
        ]
        for phase, total in ledger["totals"]["phases"].items()
    }
    assert sums == expected
    first = data["rows"][0]
    one = ledger["operations"][first[0]]
    assert data["texts"][first[4]] == one["module"]
    assert data["stacks"][first[3]] == ledger["stacks"][one["stack"]]


def test_identical_calls_are_one_row(tmp_path, monkeypatch):
    length = ("--length", "5", "--micro-batch-tokens", "10")
    few = written(tmp_path, monkeypatch, "--batch", "4", *length)
    many = written(tmp_path, monkeypatch, "--batch", "16", *length)
    few, many = (json.loads(Page(text).texts["ledger"])["rows"] for text in (few, many))
    assert sum(row[1] for row in many) > 3 * sum(row[1] for row in few)
    assert len(many) < 1.5 * len(few)


def test_nothing_comes_from_elsewhere(step_page):
    page = Page(step_page[0])
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster"):
            assert value.startswith(("#", "data:,")), (tag, name, value)
        assert name != "style"
        assert not name.startswith("on")
    assert "url(" not in page.texts["style"]
    assert "@import" not in page.texts["style"]
    assert not re.search(r"fetch\(|XMLHttp|import\(|\beval\(|innerHTML", page.texts["script"])


def test_the_policy_allows_this_script_and_style_alone(step_page):
    page = Page(step_page[0])
    for kind in ("script", "style"):
        digest = hashlib.sha256(page.texts[kind].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in page.policy
    assert page.policy.startswith("default-src 'none'")
    assert "unsafe" not in page.policy


def test_what_comes_from_a_file_is_escaped(tmp_path, monkeypatch):
    folder = tmp_path / "<script>alert('1')<" / 'script>"&amp;<b>'
    folder.mkdir(parents=True)
    page = Page(written(tmp_path, monkeypatch, config=folder / "config.json"))
    assert str(folder) in page.texts["title"]
    assert not any(tag == "b" for tag, _, _ in page.attributes)


def operation(number: int, **changes) -> Operation:
    given = {
        "phase": "forward", "module": "model", "function": "", "name": "aten.mm.default",
        "lines": (("train.py", 145),), "inputs": (((3, 4), "float32"),), "flops": 24,
        "outputs": (((3, 5), "float32"),), "bytes_read": 48, "bytes_written": 60,
    }  # fmt: skip
    return Operation(number=number, **given | changes)


def data_of(ledger: Ledger) -> dict:
    return json.loads(Page(annotated_source(ledger, "title", VERSIONS)).texts["ledger"])


def test_names_in_the_data_do_not_end_it():
    ledger = Ledger({})
    ledger.operations = [operation(0, name="aten.</script><b>.default", module="<!--<script>")]
    assert "</script><b>.default" in data_of(ledger)["texts"]


def test_times_are_added_and_errors_are_the_worst():
    ledger = PrecisionLedger({})
    ledger.operations = [operation(n, seconds=0.5) for n in range(4)]
    ledger.errors = {0: Error(0.1, 0.01), 1: Error(0.2, 0.005), 3: Error(0.3, float("inf"))}
    data = data_of(ledger)
    assert data["timed"]
    assert data["precision"]
    ((_, count, *_, seconds, relative, largest),) = data["rows"]
    assert (count, seconds, relative, largest) == (4, 2.0, "infinite", 0.3)
    assert data["worst"][0]["line"] == "train.py:145"
    del ledger.errors[3]
    assert data_of(ledger)["rows"][0][-2:] == [0.01, 0.2]


def test_what_differs_is_not_one_row():
    changes = (
        {}, {"phase": "backward"}, {"module": "other"}, {"function": "_Loss"}, {"flops": 25},
        {"name": "aten.bmm.default"}, {"lines": (("train.py", 146),)}, {"bytes_read": 49},
        {"inputs": (((3, 4), "bfloat16"),)}, {"outputs": ()}, {"saved_bytes": 1},
        {"bytes_written": 61},
    )  # fmt: skip
    ledger = Ledger({})
    ledger.operations = [operation(number, **change) for number, change in enumerate(changes)]
    assert len(data_of(ledger)["rows"]) == len(changes)


def test_shapes_are_told_shortly():
    kinds = [((3, 4), "float32"), ((), "int64")]
    assert shapes(kinds) == "(3, 4) ()"
    assert dtypes(kinds) == "float32, int64"
    assert shapes(kinds * 150) == "(3, 4) () (3, 4) … 300 tensors"


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("*.py"), *ROOT.glob("minibert/**/*.py"), *ROOT.glob("tests/*.py")]),
    ids=lambda path: path.name,
)
def test_highlighting_changes_no_letter(path):
    source = path.read_text(encoding="utf-8")
    plain = [html.unescape(re.sub(r"</?i[^>]*>", "", line)) for line in highlighted(source)]
    assert plain == source.splitlines()


def test_highlighting():
    source = 'def f(x):\n    """Say < or >."""\n    return x < "&"  # & on\n'
    assert highlighted(source) == [
        '<i class="k">def</i> f(x):',
        '    <i class="c">"""Say &lt; or &gt;."""</i>',
        '    <i class="k">return</i> x &lt; <i class="s">"&amp;"</i>  <i class="c"># &amp; on</i>',
    ]


@pytest.mark.slow
def test_biobert_in_a_minute_and_4_gb(tmp_path):
    """A minute of this process' own work: others may be busy on the machine. Memory is that of the
    largest child so far, whichever that was."""
    path = tmp_path / "audit.html"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = ["--recipe", "compactbiobert", "--meta", "--html", str(path)]
    subprocess.run([sys.executable, "-m", "minibert.audit", *flags], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert after.ru_maxrss < 4 * 2**20  # kB
    assert path.stat().st_size < 3e6
