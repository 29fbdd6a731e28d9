"""PubMed's files, or BioBERT's, whole and proved right.

    python -m minibert.download pubmed --files 1-3 --out DIR [--update]
    python -m minibert.download biobert --out DIR

pubmed: NLM's yearly baseline, all of it or the --files of those numbers; with --update, what has
been added, revised and deleted since. Each file is proved by the MD5 beside it. biobert: the three
files of dmis-lab/biobert-base-cased-v1.2, proved by SHA-256 where the server tells it, else by
length. What is there and right stays; what was broken off goes on: give the same command again.
"""

import re
import shlex
import shutil
import sys
import time
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit

from minibert.data.fetch import RemoteFile, fetch, learn_from_headers, learn_md5
from minibert.data.web import Patience, Unreachable, fetch_text
from minibert.errors import (
    INTERRUPTED_STATUS,
    ArgumentParser,
    InputError,
    Stopped,
    in_one_line,
    run_command,
)
from minibert.files import file_size, locked
from minibert.flags import number
from minibert.progress import ProgressLine, duration

NLM = "https://ftp.ncbi.nlm.nih.gov/pubmed/"
BIOBERT = "https://huggingface.co/dmis-lab/biobert-base-cased-v1.2/resolve/main/"
BIOBERT_FILES = ("config.json", "pytorch_model.bin", "vocab.txt")
LARGEST_LISTING = 1 << 24  # bytes; NLM's has a third of a million
MOST_AT_ONCE = 16  # files: the servers serve others too
MOMENT = 0.5  # seconds in which threads that are told to stop can do so

# A link to a file, and the size that may follow it in the same line: 19M is about 19 MiB. What lies
# between is bounded, so that no listing takes long.
ENTRY = re.compile(
    r"""href=["'](pubmed([0-9]{2})n([0-9]{4})\.xml\.gz)["']"""
    r"(?:[^<\n]{0,99}</a>[^<\n]{0,99}?[ \t]([0-9]{1,12}(?:\.[0-9])?)([KMG]?)[ \t\r]{0,9}$)?",
    flags=re.MULTILINE,
)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Errors = dict[str, InputError]  # what went wrong with the file of that name


def pubmed_files(
    base_url: str, numbers: Sequence[int] | None, out: Path, patience: Patience
) -> list[RemoteFile]:
    """The files of those numbers, or all (None), that the listing at `base_url` has."""
    listing = fetch_text(base_url, LARGEST_LISTING, patience)
    entries = [entry.groups() for entry in ENTRY.finditer(listing)]
    newest = max((year for _, year, *_ in entries), default="")  # years must not be mixed
    files = {}
    for name, year, digits, size, unit in entries:
        if year == newest:
            known = round(float(size) * UNITS[unit]) if size else None
            files[int(digits)] = RemoteFile(base_url + name, out / name, size=known)
    if not files:
        raise InputError(f"{base_url}: a listing without any pubmedYYnNNNN.xml.gz")
    if lacking := sorted(set(numbers or ()) - set(files)):
        has = in_ranges(sorted(files))
        raise InputError(f"--files: {base_url} lacks {in_ranges(lacking)}; it has {has}")
    return [files[number] for number in sorted(numbers or files)]


def download(
    files: Sequence[RemoteFile],
    learn: Callable[[RemoteFile, Patience], None],
    out: Path,
    parallel: int,
    patience: Patience,
) -> tuple[list[RemoteFile], Errors]:
    """Fetch those files that are not there or not right; return them, and the errors of others.

    Args:
        learn: sets a file's proof, and its size if it can.
        parallel: how many files at a time.

    Raises InputError where no server answers, or where the files do not fit on the disk.
    """
    wanted: list[RemoteFile] = []

    def look(file: RemoteFile, patience: Patience) -> None:
        learn(file, patience)
        if file.path.exists() and file_size(file.path) and file.proof.holds(file.path):
            return
        file.kept()
        wanted.append(file)

    def show_looking(done: int) -> None:
        line.show(f"looking at {done}/{len(files)} files")

    def show_fetching(done: int) -> None:
        line.show(progress(wanted, done, time.monotonic() - begun))

    line = ProgressLine()
    try:
        errors = in_threads(look, files, parallel, patience, show_looking)
        if len(errors) == len(files) and all(isinstance(e, Unreachable) for e in errors.values()):
            raise errors[files[0].path.name]
        wanted.sort(key=lambda file: file.path.name)
        check_room(wanted, out)
        begun = time.monotonic()
        errors |= in_threads(fetch, wanted, parallel, patience, show_fetching)
    finally:
        line.clear()
    return [file for file in wanted if file.path.name not in errors], errors


def in_threads(
    work: Callable[[RemoteFile, Patience], None],
    files: Sequence[RemoteFile],
    threads: int,
    patience: Patience,
    show: Callable[[int], None],
) -> Errors:
    """Do `work` on each file, a few at a time; `show` gets the number done, several times a second.

    Returns the InputErrors: the other files go on. All else ends the work, and the threads are not
    waited for longer than a moment: one may hang on a server that says nothing, as long as it does.
    """
    waiting: SimpleQueue[RemoteFile] = SimpleQueue()
    finished: SimpleQueue[tuple[RemoteFile, BaseException | None]] = SimpleQueue()

    def worker() -> None:
        with suppress(Empty):
            while not patience.stopped.is_set():
                file, error = waiting.get_nowait(), None
                try:
                    work(file, patience)
                except BaseException as caught:  # the main thread tells it
                    error = caught
                finished.put((file, error))

    for file in files:
        waiting.put(file)
    count = min(threads, len(files))
    workers = [Thread(target=worker, name="download", daemon=True) for _ in range(count)]
    try:
        for thread in workers:
            thread.start()
        return collected(finished, len(files), show)
    except BaseException:
        patience.stopped.set()
        until = time.monotonic() + MOMENT
        for thread in workers:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        raise


def collected(finished: SimpleQueue, expected: int, show: Callable[[int], None]) -> Errors:
    """The InputErrors of so many files, as they are finished; any other error is raised."""
    errors: Errors = {}
    done = 0
    while done < expected:
        with suppress(Empty):
            file, error = finished.get(timeout=0.2)  # Ctrl-C is heard between
            done += 1
            if isinstance(error, InputError):
                errors[file.path.name] = error
            elif error is not None:
                raise error
        show(done)
    return errors


def check_room(files: Sequence[RemoteFile], out: Path) -> None:
    """Refuse to begin what cannot end: the disk must hold what is still to come."""
    needed = sum(max(0, (file.size or 0) - file.here) for file in files)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise InputError(f"{out}: {needed / 1e9:,.2f} GB to come, but {free / 1e9:,.2f} GB free")


def progress(files: Sequence[RemoteFile], done: int, seconds: float) -> str:
    """How far all files are together, how fast, and for how long still."""
    here, received = sum(file.here for file in files), sum(file.received for file in files)
    sizes = [file.size for file in files if file.size]
    total = sum(sizes) / len(sizes) * len(files) if sizes else 0  # the others as large as these
    rate = received / max(seconds, 1e-3)
    text = f"{done}/{len(files)} files  {here / 1e6:,.1f} MB  {rate / 1e6:.2f} MB/s"
    if not received or not total:
        return text
    left = duration(max(0, total - here) / rate)
    return f"{min(1, here / total):4.0%}  {text}  {left} left"


def summary(fetched: Sequence[RemoteFile], there: int, errors: Errors, seconds: float) -> str:
    """What came of it, for people."""
    received = sum(file.received for file in fetched)
    return "\n".join(
        (
            f"fetched     {len(fetched):,} files, {received / 1e6:,.1f} MB "
            f"in {duration(seconds)}, {received / max(seconds, 1e-3) / 1e6:.2f} MB/s",
            f"were there  {there:,} files",
            f"failed      {len(errors):,} files",
        )
    )


def next_command(source: str, out: Path, update: bool) -> str:
    folder = shlex.quote(str(out))
    if source == "biobert":
        return f"python convert_weights.py {folder} models/biobert"
    inputs, corpus = f"{folder}/pubmed*.xml.gz", "data/pubmed"
    if update:  # they revise and delete what stands in the baseline
        inputs, corpus = f"BASELINE/pubmed*.xml.gz {inputs}", "data/all"
    return f"python -m minibert.prepare {inputs} --tokenizer models/biobert --out {corpus}"


def in_ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> '1-3, 7'; of many ranges the first few."""
    ranges: list[list[int]] = []
    for value in numbers:
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    words = [f"{a}-{b}" if a < b else str(a) for a, b in ranges]
    return ", ".join(words[:5] + ["..."] * (len(words) > 5))


def file_numbers(text: str) -> list[int]:
    """An argparse type: `1-3,7` to [1, 2, 3, 7]."""
    numbers: set[int] = set()
    for part in text.split(","):
        if not (match := re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)):
            raise ArgumentTypeError(f"{text!r} is not a list of files such as 1-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last:
            raise ArgumentTypeError(f"{part!r} is no range of files: they are numbered from 1 up")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def web_folder(text: str) -> str:
    """An argparse type: the URL of a folder, to which names are appended."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        good = good and "@" not in parts.netloc  # urllib would take it for a port
    except ValueError:
        good = False
    if not good or not re.fullmatch(r"[!-~]+", text) or parts.query or parts.fragment:
        raise ArgumentTypeError(f"{text!r} is not a folder's URL such as https://HOST/PATH/")
    return text if text.endswith("/") else text + "/"


def parse_flags() -> Namespace:
    parser = ArgumentParser(
        prog="python -m minibert.download",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", choices=("pubmed", "biobert"), help="what to fetch")
    add("--out", metavar="DIR", type=Path, required=True, help="folder to write the files to")
    add("--files", metavar="1-3,7", type=file_numbers, help="numbers of files (default: all)")
    add("--update", action="store_true", help="update files instead of the baseline's")
    parallel = {"metavar": "N", "type": number(int, 1), "default": 3}
    add("--parallel", **parallel, help=f"files at a time, at most {MOST_AT_ONCE} (default: 3)")
    add("--base-url", metavar="URL", type=web_folder, help="folder of a mirror that has the files")
    flags = parser.parse_args()
    if flags.source == "biobert" and (flags.files or flags.update):
        parser.error("--files and --update are for pubmed")
    if flags.parallel > MOST_AT_ONCE:
        parser.error(f"--parallel {flags.parallel}: expected at most {MOST_AT_ONCE}")
    return flags


def run(flags: Namespace, patience: Patience) -> None:
    """Fetch what the flags ask for; raises Stopped(1) where a file could not be had."""
    if flags.source == "pubmed":
        base_url = flags.base_url or NLM + ("updatefiles/" if flags.update else "baseline/")
        files, learn = pubmed_files(base_url, flags.files, flags.out, patience), learn_md5
    else:
        base_url, learn = flags.base_url or BIOBERT, learn_from_headers
        files = [RemoteFile(base_url + name, flags.out / name) for name in BIOBERT_FILES]
    flags.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with locked(flags.out / "lock"):
        fetched, errors = download(files, learn, flags.out, flags.parallel, patience)
    there = len(files) - len(fetched) - len(errors)
    print(summary(fetched, there, errors, time.monotonic() - begun))
    print(f"written to  {flags.out}")
    if not errors:
        print(f"next        {next_command(flags.source, flags.out, flags.update)}", flush=True)
        return
    print("next        the same command again, for the files that failed", flush=True)
    for name, error in sorted(errors.items()):
        doubt = "; the file of that name is not proved right" if (flags.out / name).exists() else ""
        print(f"error: {in_one_line(error)}{doubt}", file=sys.stderr)
    raise Stopped(1)


def main() -> None:
    flags = parse_flags()
    try:
        run(flags, Patience())
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise Stopped(INTERRUPTED_STATUS) from None


if __name__ == "__main__":
    raise SystemExit(run_command(main))
