"""From NLM's files to tokens: how fast, in how much memory, beside pubmed-parser.

    python benchmarks/corpus.py pubmed21n1298.xml.gz --tokenizer vocab.txt [--peer PYTHON]

Every measurement is a process of its own, and all take turns, so that a noisy machine is noisy for
each. --peer is a Python that can import pubmed_parser (pip install pubmed-parser); without it only
ours is measured. Seconds are those of the processor unless "wall" is said; the last line is JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from machine import circumstances

from minibert.errors import ArgumentParser, run_command
from minibert.flags import number

ALL_CITATIONS = 36_000_000  # of PubMed's baseline
CORES = 16

PEAK = """
print()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
PARSE = """
from pathlib import Path; import sys
from minibert.data.pubmed import read_documents
for path in sys.argv[1:]:
    documents = sum(1 for document in read_documents(Path(path)))
"""
PEER = """
import sys, pubmed_parser
for path in sys.argv[1:]:
    citations = sum(1 for citation in pubmed_parser.parse_medline_xml(path))
"""
TOKENIZE = """
import sys, time; from pathlib import Path
from minibert.data.pubmed import read_documents
from minibert.data.shards import in_batches
from minibert.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
batches = [texts for _, texts in in_batches(read_documents(Path(sys.argv[2])))]
began = time.process_time()
tokens = sum(len(ids) for texts in batches for ids in tokenizer.encode_batch(texts))
print(time.process_time() - began, tokens)
"""
PREPARE = """
from minibert import prepare
prepare.main()
"""


def measured(python: Path | str, code: str, *words: str, **environment: str) -> dict[str, Any]:
    """Run a program to its end: seconds of processor and wall, peak MB of the first process (what
    the system tells afterwards begins with this one's), and what it printed first.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(python), "-c", code + PEAK, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{python} {' '.join(words)} ended with {status}")
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - began,
        "peak_mb": int(printed.split()[-1]) / 1024,
        "printed": printed.split("\n")[0],
    }


def one_round(flags: argparse.Namespace, copies: list[Path], folder: Path) -> dict[str, Any]:
    """Each measurement once. `copies` are ten copies of the file."""
    python, path = sys.executable, str(flags.file)
    one_thread = {"RAYON_NUM_THREADS": "1"}
    tokenizer = str(flags.tokenizer)
    found = {"parse": measured(python, PARSE, path)}
    if flags.peer:
        found["pubmed_parser"] = measured(flags.peer, PEER, path)
    found["tokenize"] = measured(python, TOKENIZE, tokenizer, path, **one_thread)
    found["tokenize"]["cpu_s"] = float(found["tokenize"]["printed"].split()[0])
    for workers in (1, 2):
        out = folder / "corpus"
        files = [str(copy) for copy in copies[:2]]
        words = [*files, "--tokenizer", tokenizer, "--out", str(out), "--workers", str(workers)]
        found[f"prepare {workers}"] = measured(python, PREPARE, *words, **one_thread)
        found["meta"] = json.loads((out / "meta.json").read_text())
        shutil.rmtree(out)
    return found


def medians(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The median of each figure of each measurement."""
    return {
        name: {
            figure: median(each[name][figure] for each in rounds)
            for figure in ("cpu_s", "wall_s", "peak_mb")
        }
        for name in rounds[0]
        if name != "meta"
    }


def projection(figures: dict[str, Any], meta: dict[str, Any], gz_bytes: int) -> dict[str, float]:
    """All of PubMed, by arithmetic from two copies of one file: it has 36 million citations."""
    citations = meta["totals"]["citations"]
    share = ALL_CITATIONS / citations
    tokens = sum(part["tokens"] for part in meta["inputs"])  # the second copy replaces the first
    return {
        "hours_on_16_cores": share * figures["prepare 1"]["cpu_s"] / CORES / 3600,
        "input_gb": share * 2 * gz_bytes / 1e9,
        "corpus_gb": share * 2 * tokens * 2 / 1e9,
        "billion_tokens": share * 2 * tokens / 1e9,
    }


def tell(figures: dict[str, Any], citations: int, gz_bytes: int) -> None:
    """The table, for people."""
    print(f"{'':16}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}{'MB/s':>8}{'citations/s':>13}")
    for name, values in figures.items():
        files = 2 if name.startswith("prepare") else 1
        seconds = values["wall_s"] if name == "prepare 2" else values["cpu_s"]
        print(
            f"{name:16}{values['cpu_s']:8.2f}{values['wall_s']:8.2f}{values['peak_mb']:9.0f}"
            f"{files * gz_bytes / seconds / 1e6:8.1f}{files * citations / seconds:13,.0f}"
        )
    print("MB are those of the compressed file; rates by CPU, of two workers by wall")


def main() -> None:
    parser = ArgumentParser(prog="python benchmarks/corpus.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a .xml.gz of PubMed")
    parser.add_argument("--tokenizer", type=Path, required=True, help="vocab.txt or its folder")
    parser.add_argument("--peer", type=Path, help="a Python that has pubmed_parser")
    parser.add_argument("--runs", type=number(int, 1), default=5, help="rounds (default: 5)")
    flags = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copies = [folder / f"copy{number}.xml.gz" for number in range(10)]
        for copy in copies:
            shutil.copyfile(flags.file, copy)
        rounds = [one_round(flags, copies, folder) for _ in range(flags.runs)]
        ten = measured(sys.executable, PARSE, *map(str, copies))
    figures, meta, gz_bytes = medians(rounds), rounds[0]["meta"], flags.file.stat().st_size
    tell(figures, meta["inputs"][0]["citations"], gz_bytes)
    result = {"medians": figures, "peak_mb_of_ten_files": ten["peak_mb"]}
    result |= {"projection": projection(figures, meta, gz_bytes)}
    print(f"peak of parsing: one file {figures['parse']['peak_mb']:.0f} MB, ten in one process "
          f"{ten['peak_mb']:.0f} MB")  # fmt: skip
    if flags.peer:
        ratios = [each["pubmed_parser"]["cpu_s"] / each["parse"]["cpu_s"] for each in rounds]
        result["times_faster_than_pubmed_parser"] = sorted(ratios)
        print(f"pubmed_parser takes {median(ratios):.2f} times as long ({min(ratios):.2f} to "
              f"{max(ratios):.2f})")  # fmt: skip
    sums = ", ".join(f"{name} {value:.2f}" for name, value in result["projection"].items())
    print(f"all of PubMed, by arithmetic: {sums}")
    print(json.dumps(result | circumstances("corpus", torch.device("cpu"))))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
