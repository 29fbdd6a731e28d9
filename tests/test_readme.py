"""README.md tells the truth: its commands run, its file map is complete, its flags exist."""

import dataclasses
import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import commands
import pytest
import torch
from conftest import ROOT, SPECIAL_TOKENS, TOY_CONFIG

import convert_weights
from minibert import download
from minibert.folder import save_model
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
FLAGS = {f"--{entry.name.replace('_', '-')}" for entry in dataclasses.fields(RunConfig)}


def run(command: list[str], folder, **options) -> subprocess.CompletedProcess:
    """A command of the README, without a network."""
    assert command[0] == "python"
    environment = {"HF_HUB_OFFLINE": "1"}
    return commands.run(*command[1:], cwd=folder, environment=environment, **options)


def test_the_file_map_is_complete():
    mapped = set(re.findall(r"^\| `([\w/]+\.py)` \|", README, flags=re.MULTILINE))
    folders = ("minibert/**/*.py", "benchmarks/*.py")
    there = {path.relative_to(ROOT).as_posix() for name in folders for path in ROOT.glob(name)}
    there |= {path.name for path in ROOT.glob("*.py")}
    assert mapped == {path for path in there if not path.endswith("__init__.py")}


COMMANDS = [
    "train.py",
    "convert_weights.py",
    "-m minibert.prepare",
    "-m minibert.download",
    "-m minibert.audit",
    "-m minibert.report",
    "-m minibert.evaluate",
    "-m minibert.fill_mask",
    "-m minibert.finetune",
]
OF_OTHERS = {"--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-id", "--rdzv-backend"}
OF_OTHERS |= {"--rdzv-endpoint", "--nodes", "--ntasks-per-node", "--gpus-per-node"}
OF_OTHERS |= {"--cpus-per-task", "--time", "--index-url"}  # torchrun's, sbatch's and pip's


@cache
def help_of(command: str) -> str:
    script = [str(ROOT / part) if part.endswith(".py") else part for part in command.split()]
    printed = run(["python", *script, "--help"], ROOT)
    assert printed.returncode == 0
    return printed.stdout


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_every_flag_exists():
    """In the text, of any of our commands; of the commands shown, tests below run each."""
    ours = set().union(*(flags_in(help_of(each)) for each in [*COMMANDS, "benchmarks/losses.py"]))
    assert flags_in(README) <= ours | OF_OTHERS
    assert not ours & OF_OTHERS


def test_the_flags_of_train_are_frozen():
    """Whoever adds, renames or removes a flag changes this line, and the README where it counts."""
    assert sorted(FLAGS) == [
        "--attention-weight", "--batch-size", "--compile", "--data", "--device", "--dtype",
        "--eval-documents", "--eval-every", "--hidden-weight", "--keep", "--learning-rate",
        "--log-every", "--max-hours", "--max-length", "--micro-batch-tokens", "--mlm-weight",
        "--model", "--ops", "--out", "--output-weight", "--recipe", "--resume", "--save-every",
        "--save-minutes", "--seed", "--skip-nonfinite", "--steps", "--teacher", "--teacher-layers",
        "--temperature", "--warmup-steps", "--weight-decay",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(command):
    entries = re.findall(r"^  (--[a-z-]+.*(?:\n {10,}.*)*)", help_of(command), flags=re.MULTILINE)
    assert entries
    for entry in entries:
        assert len(re.sub(r"^--[a-z-]+( [A-Z{][\w,.{}-]*)?", "", entry).split()) >= 2, entry


@pytest.fixture
def workplace(tmp_path):
    """A folder in which BioBERT's commands can be run, on a model and a text of toy size."""
    words = ["gene", "drug", "the", "of", "in", "a", ".", ",", "and", "cell", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS + words) + "\n")
    config = dataclasses.replace(TOY_CONFIG, vocab_size=16, max_position_embeddings=512)
    torch.manual_seed(0)
    save_model(tmp_path / "ours", BertForMaskedLM(config), tokenizer_from=tmp_path)
    convert_weights.to_hugging_face(tmp_path / "ours", tmp_path / "biobert-hf")
    citations = "".join(
        f"<PubmedArticle><MedlineCitation><PMID>{number}</PMID><Article><ArticleTitle>The gene."
        f"</ArticleTitle><Abstract><AbstractText>{'the drug of a cell, ' * number}</AbstractText>"
        f"</Abstract></Article></MedlineCitation></PubmedArticle>"
        for number in range(1, 41)
    )
    (tmp_path / "pubmed").mkdir()
    with gzip.open(tmp_path / "pubmed" / "pubmed21n0001.xml.gz", "wt") as file:
        file.write(f"<PubmedArticleSet>{citations}</PubmedArticleSet>")
    return tmp_path


def test_the_commands_for_biobert_run(workplace):
    (block,) = [block for block in BLOCKS if "minibert.download biobert" in block]
    lines = [shlex.split(line, comments=True) for line in block.splitlines() if line]
    for command in lines[2:]:  # after the downloads
        if command[1].endswith(".py"):
            command[1] = str(ROOT / command[1])
        if command[1].endswith("train.py"):  # what must be small here
            command += ["--steps", "2", "--batch-size", "5"]
        command = [str(path) for part in command for path in expanded(part, workplace)]
        done = run(command, workplace)
        assert done.returncode == 0, (command, done.stderr)
    assert (workplace / "compact-biobert-hf" / "model.safetensors").is_file()
    assert {path.name for path in (workplace / "runs" / "compact").iterdir()} == {
        "config.json", "lock", "metrics.jsonl", "step_000002", "student",
    }  # fmt: skip
    (block,) = [block for block in BLOCKS if "minibert.report" in block]
    for line in block.splitlines()[1:]:  # after the installation
        done = run(shlex.split(line), workplace)
        assert done.returncode == 0, (line, done.stderr)
    pictures = {"losses.png", "held_out_by_time.png", "attention_maps.png", "nearness.png"}
    assert pictures < {path.name for path in (workplace / "report").iterdir()}


def test_the_commands_for_downloads_are_understood(monkeypatch):
    commands = re.findall(r"python -m (minibert\.download .*)", "".join(BLOCKS))
    assert len(commands) == 3
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        download.parse_flags()


def test_the_commands_for_text_run(workplace):
    (workplace / "models").mkdir()
    (workplace / "ours").rename(workplace / "models" / "biobert")
    shutil.copytree(workplace / "pubmed", workplace / "pubmed-updates")
    (block,) = [block for block in BLOCKS if "--stdin-format" in block]
    _, files, piped = block.splitlines()
    command = [str(path) for part in shlex.split(files) for path in expanded(part, workplace)]
    done = run(command, workplace)
    assert done.returncode == 0 and "replaced    40" in done.stdout, done
    notes = "a gene\nthe drug\n" * 20
    command = shlex.split(piped.split("| ")[1])
    done = run([*command, "--held-out", "0"], workplace, stdin=notes)
    assert done.returncode == 0 and "documents   2, 0 of them held out" in done.stdout, done


def test_the_two_ways_to_use_a_model_run(workplace):
    (workplace / "models").mkdir()
    (workplace / "ours").rename(workplace / "models" / "biobert")
    (workplace / "sentences.txt").write_text("a gene of [MASK]\n[MASK] cells\n")
    (block,) = [block for block in BLOCKS if "minibert.fill_mask" in block]
    first, second = (line.split(" < ") for line in block.splitlines())
    words = run(shlex.split(first[0]), workplace)
    assert words.returncode == 0, words.stderr
    assert len(words.stdout.splitlines()) == 6
    done = run(shlex.split(second[0]), workplace, stdin=(workplace / "sentences.txt").read_text())
    assert [len(json.loads(line)["masks"][0]) for line in done.stdout.splitlines()] == [3, 3]
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (example,) = [block for block in blocks if "minibert.load" in block]
    done = run(["python", "-c", example], workplace)
    assert done.stdout.startswith("[[[Guess(token="), done.stderr


def test_the_commands_for_the_audit_run(workplace):
    (workplace / "models").mkdir()
    (workplace / "ours").rename(workplace / "models" / "biobert")
    (block,) = [block for block in BLOCKS if "minibert.audit" in block]
    for line in block.splitlines():
        command = shlex.split(line, comments=True)
        if "--model" not in command:  # what must be small here
            command += ["--model", "models/biobert"]
        done = run(command, workplace)
        assert done.returncode == 0, (command, done.stderr)
    assert "<html" in (workplace / "audit.html").read_text()[:200]


def test_the_commands_for_tasks_run(workplace):
    (workplace / "runs" / "compact").mkdir(parents=True)
    (workplace / "ours").rename(workplace / "runs" / "compact" / "student")
    ner = "the\tO\ngene\tB-Gene\n\ncells\tO\n"
    relation = '{"text": "<< gene >>", "label": "UP"}\n{"text": "a drug", "label": "false"}\n'
    entry = {"id": "1", "question": "a", "answers": [{"text": "drug", "answer_start": 4}]}
    qa = json.dumps({"data": [{"paragraphs": [{"context": "the drug", "qas": [entry]}]}]})
    data = {"NCBI-disease": ("tsv", ner), "ChemProt": ("jsonl", relation), "BioASQ": ("json", qa)}
    for name, (ending, content) in data.items():
        (workplace / name).mkdir()
        for split in ("train", "devel", "test"):
            (workplace / name / f"{split}.{ending}").write_text(content)
    (block,) = [block for block in BLOCKS if "minibert.finetune" in block]
    for command in map(shlex.split, block.splitlines()):
        if command[1].endswith(".py"):
            command[1] = str(ROOT / command[1])
        else:  # what must be small here
            command += ["--epochs", "1"]
        done = run(command, workplace)
        assert done.returncode == 0, (command, done.stderr)
    assert (workplace / "ncbi-hf" / "model.safetensors").is_file()
    assert len(list((workplace / "runs" / "chemprot").glob("seed_*"))) == 5
    assert {path.name for path in (workplace / "runs" / "ncbi").iterdir()} == {
        "config.json", "lock", "metrics.jsonl", "step_000001", "model", "scores.json",
        "predictions_devel.tsv", "predictions_test.tsv",
    }  # fmt: skip


def expanded(part: str, folder) -> list[str]:
    """File names for a pattern, as a shell would put them."""
    return sorted(folder.glob(part)) if "*" in part else [part]


def test_the_install_commands_are_those_of_ci():
    install, tests = (block.strip() for block in BLOCKS[:2])
    assert install == "python -m pip install -c constraints.txt -e . && python train.py"
    install = 'python -m pip install -c constraints.txt -e ".[test]"'
    assert tests == f"{install} && python -m pytest -n auto"
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
