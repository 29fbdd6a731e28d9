"""`python -m minibert.download` brings what it was asked for, or says in a line what it lacks.

All on this machine: mirrors are `hostile_server.HostileServer`. The real hosts are not tried.
"""

import gzip
import hashlib
import os
import random
import resource
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import HTTPSHandler

import pytest
from conftest import ROOT
from hostile_server import Answer, HostileServer

import minibert.download as module
from minibert.data import web
from minibert.data.fetch import RemoteFile
from minibert.data.web import Patience
from minibert.download import ENTRY, file_numbers, in_ranges, in_threads, main, progress
from minibert.errors import InputError, run_command

RANDOM = random.Random(0)
CONTENTS = {number: RANDOM.randbytes(10_000 + number) for number in (1, 2, 3, 4, 7)}
NAMES = {number: f"pubmed25n{number:04}.xml.gz" for number in CONTENTS}
BIOBERT = {name: RANDOM.randbytes(size) for name, size in
           (("config.json", 313), ("pytorch_model.bin", 90_001), ("vocab.txt", 2_111))}  # fmt: skip


def listing(*names: str, size: str = "") -> bytes:
    rows = (f'<a href="{name}">{name}</a>  2025-01-10 15:08  {size}  \n' for name in names)
    return ("<html><pre>" + "".join(rows) + "</pre></html>\n").encode()


@pytest.fixture
def server(monkeypatch):
    """A mirror with five files of PubMed, and one with BioBERT's three."""
    monkeypatch.setenv("no_proxy", "*")
    with HostileServer() as running:
        every = [file for name in NAMES.values() for file in (name, name + ".md5")]
        running.put("/pubmed/", listing("README.txt", *every), Answer())
        for number, name in NAMES.items():
            running.put(f"/pubmed/{name}", CONTENTS[number])
            md5 = hashlib.md5(CONTENTS[number]).hexdigest()
            running.put(f"/pubmed/{name}.md5", f"MD5({name})= {md5}\n".encode())
        for name, content in BIOBERT.items():
            running.put(f"/biobert/{name}", content)
        yield running


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "new" / "folder"


Ended = namedtuple("Ended", ("status", "out", "err"))


@pytest.fixture
def command(server, out, monkeypatch, capsys):
    """Run the command in this process, without a wait, from the mirror."""
    monkeypatch.setattr(module, "Patience", lambda: Patience(3, 0.25, sleep=lambda _: None))

    def run(source: str, *flags: str) -> Ended:
        where = ("--out", str(out), "--base-url", f"{server.url}{source}")
        monkeypatch.setattr(sys, "argv", ["download", source, *where, *flags])
        status = run_command(main)
        return Ended(status, *capsys.readouterr())

    return run


def lying_in(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.pop("lock")
    return files


def those(*numbers: int) -> dict[str, bytes]:
    return {NAMES[number]: CONTENTS[number] for number in numbers}


def fetched(server) -> list[str]:
    """The files of PubMed that were asked for, apart from listing and MD5 files."""
    paths = (Path(request.path).name for request in server.requests)
    return sorted(name for name in paths if name.endswith(".gz"))


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        ((), (1, 2, 3, 4, 7)),
        (("--files", "2-3"), (2, 3)),
        (("--files", "7,1,2-3,2", "--parallel", "1"), (1, 2, 3, 7)),
    ],
)
def test_the_files_asked_for_are_there(command, server, out, flags, numbers):
    ended = command("pubmed", *flags)
    assert (ended.status, ended.err) == (0, "")
    assert lying_in(out) == those(*numbers)
    assert f"fetched     {len(numbers)} files, " in ended.out
    prepare = f"python -m minibert.prepare {out}/pubmed*.xml.gz --tokenizer models/biobert"
    assert f"next        {prepare} --out data/pubmed\n" in ended.out


def test_biobert_is_there(command, out):
    ended = command("biobert")
    assert (ended.status, ended.err) == (0, "")
    assert lying_in(out) == BIOBERT
    assert f"next        python convert_weights.py {out} models/biobert\n" in ended.out


def test_biobert_is_proved_by_sha256_where_it_is_told(command, server, out):
    """As Hugging Face tells it, passing on to a store; the first answer of the store is wrong."""
    content = BIOBERT["pytorch_model.bin"]
    sha256 = hashlib.sha256(content).hexdigest()
    headers = (("Location", "/store"), ("X-Linked-ETag", f'"{sha256}"'),
               ("X-Linked-Size", str(len(content))))  # fmt: skip
    moved = Answer(status=302, headers=headers)
    server.put("/biobert/pytorch_model.bin", b"", moved, moved, head=moved)
    server.put("/store", content, Answer(content=content[::-1]))
    assert command("biobert").status == 0
    assert lying_in(out) == BIOBERT


def test_what_is_there_and_right_stays(command, server, out):
    """What is wrong is fetched again: other bytes, too few, none."""
    out.mkdir(parents=True)
    for number, content in zip((1, 2, 3, 4), (CONTENTS[1], b"\0" * 10_002, b"1", b""), strict=True):
        (out / NAMES[number]).write_bytes(content)
    before = (out / NAMES[1]).stat().st_mtime_ns
    ended = command("pubmed", "--files", "1-4")
    assert ended.status == 0
    assert lying_in(out) == those(1, 2, 3, 4)
    assert fetched(server) == [NAMES[2], NAMES[3], NAMES[4]]
    assert (out / NAMES[1]).stat().st_mtime_ns == before
    assert "were there  1 files" in ended.out
    server.requests.clear()
    assert command("pubmed", "--files", "1-4").status == 0
    assert fetched(server) == []


def test_biobert_that_is_there_stays(command, server, out):
    command("biobert")
    server.requests.clear()
    (out / "vocab.txt").write_bytes(b"half")
    assert command("biobert").status == 0
    assert lying_in(out) == BIOBERT
    assert [entry.path for entry in server.requests if entry.method == "GET"] == [
        "/biobert/vocab.txt"
    ]


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda s: s.files.pop(f"/pubmed/{NAMES[2]}"), "404 Not Found"),
        (lambda s: s.files.pop(f"/pubmed/{NAMES[2]}.md5"), ".md5: 404 Not Found"),
        (lambda s: s.put(f"/pubmed/{NAMES[2]}", CONTENTS[1]), ", twice; expected "),
        (lambda s: s.put(f"/pubmed/{NAMES[2]}.md5", b"\x1b[2J\n<p>"), "but '\\x1b[2J\\n<p>'"),
        (lambda s: s.put(f"/pubmed/{NAMES[2]}.md5", b" " * 9_999), ".md5: more than 4,096 bytes"),
        (lambda s: s.files[f"/pubmed/{NAMES[2]}"].answers.extend([Answer(status=503)] * 3),
         "503 Service Unavailable; tried 3 times"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parallel", ["1", "3"])
def test_one_file_that_cannot_be_had_does_not_stop_others(
    command, server, out, break_it, complaint, parallel
):
    break_it(server)
    ended = command("pubmed", "--parallel", parallel)
    assert ended.status == 1
    assert ended.err.startswith(f"error: {server.url}pubmed/{NAMES[2]}")
    assert complaint in ended.err
    assert ended.err.count("\n") == 1
    assert lying_in(out) == those(1, 3, 4, 7)
    assert "failed      1 files\n" in ended.out
    assert "next        the same command again" in ended.out


def test_of_biobert_too(command, server, out):
    del server.files["/biobert/vocab.txt"]
    ended = command("biobert")
    assert ended.status == 1
    assert ended.err == f"error: {server.url}biobert/vocab.txt: 404 Not Found\n"
    assert set(lying_in(out)) == {"config.json", "pytorch_model.bin"}


def test_a_server_that_has_none_of_the_files_has_answered(command, server):
    for name in BIOBERT:
        del server.files[f"/biobert/{name}"]
    ended = command("biobert")
    assert (ended.status, ended.err.count("404 Not Found\n")) == (1, 3)


def test_a_wrong_file_that_could_not_be_replaced_is_told(command, server, out):
    out.mkdir(parents=True)
    (out / NAMES[1]).write_bytes(b"half")
    server.put(f"/pubmed/{NAMES[1]}", CONTENTS[2])
    ended = command("pubmed", "--files", "1")
    assert ended.status == 1
    assert ended.err.endswith("; the file of that name is not proved right\n")
    assert lying_in(out) == {NAMES[1]: b"half"}


def test_all_that_fail_are_listed_in_order(command, server, out):
    for number in (7, 3):
        del server.files[f"/pubmed/{NAMES[number]}"]
    ended = command("pubmed")
    assert ended.status == 1
    assert [line.split("/")[-1] for line in ended.err.splitlines()] == [
        f"{NAMES[3]}: 404 Not Found",
        f"{NAMES[7]}: 404 Not Found",
    ]


def refused(ended: Ended) -> str:
    assert ended.status == 2
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert ended.out == ""
    return ended.err


def test_numbers_that_the_listing_lacks_are_told(command, server, out):
    complaint = refused(command("pubmed", "--files", "3-9,20"))
    told = f"--files: {server.url}pubmed/ lacks 5-6, 8-9, 20; it has 1-4, 7"
    assert complaint == f"error: {told}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("source", "flags", "complaint"),
    [
        ("pubmed", ("--files", "3-1"), "'3-1' is no range of files"),
        ("pubmed", ("--files", "0"), "'0' is no range of files"),
        ("pubmed", ("--files", "1-99999999999"), "is not a list of files such as 1-3,7"),
        ("pubmed", ("--files", "all"), "is not a list of files such as 1-3,7"),
        ("pubmed", ("--files", ""), "is not a list of files such as 1-3,7"),
        ("pubmed", ("--parallel", "0"), "'0' is not a whole number from 1 up"),
        ("pubmed", ("--parallel", "99"), "--parallel 99: expected at most 16"),
        ("pubmed", ("--base-url", "ftp://a/"), "'ftp://a/' is not a folder's URL"),
        ("pubmed", ("--base-url", "file:///etc/"), "is not a folder's URL"),
        ("pubmed", ("--base-url", "http://"), "is not a folder's URL"),
        ("pubmed", ("--base-url", "http://[::1"), "is not a folder's URL"),
        ("pubmed", ("--base-url", "http://a:b/"), "is not a folder's URL"),
        ("pubmed", ("--base-url", "http://a/\r\nb"), "is not a folder's URL"),
        ("pubmed", ("--base-url", "http://me:secret@a/"), "is not a folder's URL"),
        ("pubmed", ("--base-url", "http://a/?b"), "is not a folder's URL"),
        ("biobert", ("--files", "1"), "--files and --update are for pubmed"),
        ("biobert", ("--update",), "--files and --update are for pubmed"),
        ("bert", (), "invalid choice: 'bert'"),
    ],
)
def test_wrong_flags_are_refused(command, server, out, source, flags, complaint):
    assert complaint in refused(command(source, *flags))
    assert server.requests == []
    assert not out.exists()


@pytest.mark.parametrize(
    ("update", "url"),
    [((), module.NLM + "baseline/"), (("--update",), module.NLM + "updatefiles/")],
)
def test_without_a_mirror_nlm_is_asked(monkeypatch, out, update, url):
    def fetch_text(asked, limit, patience):
        raise InputError(f"asked: {asked}")

    monkeypatch.setattr(module, "fetch_text", fetch_text)
    monkeypatch.setattr(sys, "argv", ["download", "pubmed", "--out", str(out), *update])
    with pytest.raises(InputError, match=f"^asked: {url}$"):
        main()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (Answer(status=404), "404 Not Found"),
        (Answer(content=b"<html>nothing"), "a listing without any pubmedYYnNNNN.xml.gz"),
        (Answer(content=b"", length="chunked", endless=b"a\r\n<a href=  \r\n"), "more than"),
        (Answer(length="none"), "sent without its length"),
    ],
)
def test_a_listing_that_is_none_is_refused(command, server, out, monkeypatch, answer, complaint):
    monkeypatch.setattr(module, "LARGEST_LISTING", 1 << 20)
    server.files["/pubmed/"].answers[0] = answer
    assert f"{server.url}pubmed/: {complaint}" in refused(command("pubmed"))
    assert not out.exists()


def test_a_listing_that_breaks_off_is_asked_for_again(command, server, out):
    answers = [Answer(stop_after=300), Answer(status=503)]
    server.files["/pubmed/"].answers.extendleft(answers)
    assert command("pubmed").status == 0
    assert len(lying_in(out)) == 5


HOSTILE = [
    "../../pubmed25n0001.xml.gz", "/etc/pubmed25n0001.xml.gz", "pubmed25n0001.xml.gz/../../x",
    "pubmed25n0001.xml.gz.sh", "pubmed25n00001.xml.gz", "Pubmed25n0001.xml.gz", "x.xml.gz",
    "pubmed25n٠٠٠١.xml.gz", "pubmed25n0001.xml.gz\x00", "http://a/pubmed25n0001.xml.gz",
    "..%2fpubmed25n0001.xml.gz", "pubmed25n0001.xml.gz?a", "pubmed25n0001\nxml.gz",
]  # fmt: skip


def test_hostile_names_are_not_names(command, server, tmp_path, out):
    server.put("/pubmed/", listing(*HOSTILE, NAMES[2], NAMES[2]))
    assert command("pubmed").status == 0
    assert lying_in(out) == those(2)
    every = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert every == {NAMES[2], "lock"}
    assert fetched(server) == [NAMES[2]]


def test_a_hostile_listing_is_read_at_once():
    begun = time.process_time()
    link = f'href="{NAMES[1]}"'
    for text in (link, f"<a {link}", f"<a {link}></a>", f"<a {link}></a> 1", f"{link}</a>", " 1"):
        list(ENTRY.finditer(f"<a {link}>{text * 20_000}</a>{text * 20_000}"))
    assert time.process_time() - begun < 2


def test_of_two_years_the_newest_counts(command, server, out):
    server.put("/pubmed/", listing(NAMES[1], "pubmed24n0001.xml.gz", "pubmed24n0009.xml.gz"))
    assert command("pubmed").status == 0
    assert lying_in(out) == those(1)


@pytest.mark.parametrize(("size", "needed"), [("19M", 3 * 19 << 20), ("4.5K", 13_824), ("77", 231)])
def test_files_that_do_not_fit_are_not_begun(command, server, out, monkeypatch, size, needed):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(needed - 1))
    server.put("/pubmed/", listing(*NAMES.values(), size=size))
    assert f"{out}: " in refused(command("pubmed", "--files", "1-3"))
    assert fetched(server) == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(needed))
    assert command("pubmed", "--files", "1-3").status == 0


def test_what_is_there_needs_no_room(command, server, out, monkeypatch):
    command("biobert")
    free = len(BIOBERT["vocab.txt"]) - 100
    usage = namedtuple("usage", "free")(free)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    (out / "vocab.txt").rename(out / "vocab.txt.partial")
    os.truncate(out / "vocab.txt.partial", 99)
    (out / "vocab.txt.partial.tag").write_text(server.files["/biobert/vocab.txt"].etag)
    assert "0.00 GB to come" in refused(command("biobert"))
    os.truncate(out / "vocab.txt.partial", 100)
    (out / "vocab.txt.partial").write_bytes(BIOBERT["vocab.txt"][:100])
    assert command("biobert").status == 0
    assert lying_in(out) == BIOBERT


@contextmanager
def full_disk(largest: int):
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(command, out):
    """And once there is room the same command goes on."""
    with full_disk(50_000):
        complaint = refused(command("biobert"))
    assert complaint == f"error: {out / 'pytorch_model.bin.partial'}: File too large\n"
    assert not (out / "pytorch_model.bin").exists()
    assert command("biobert").status == 0
    assert lying_in(out) == BIOBERT


def test_when_all_ends_nothing_more_is_written(command, server, out, monkeypatch):
    """A file that was on its way beside the one that ended it is left where it was."""
    monkeypatch.setattr(web, "SLOWEST", 0)
    server.files["/biobert/vocab.txt"].answers.append(Answer(pause=0.02))
    with full_disk(50_000):
        refused(command("biobert"))
    assert "download" not in [thread.name for thread in threading.enumerate()]
    assert command("biobert").status == 0
    assert lying_in(out) == BIOBERT


def test_progress_is_over_all_files(tmp_path):
    """1 MB and 3 MB are known of three files: 6 MB in all, of which 1.5 came in 3 s, 0.5 before."""
    files = [RemoteFile("", tmp_path, size=size) for size in (1_000_000, 3_000_000, None)]
    files[0].here = files[0].received = 1_000_000
    files[1].here, files[1].received = 1_000_000, 500_000
    told = " 33%  1/3 files  2.0 MB  0.50 MB/s  0:00:08 left"
    assert progress(files, 1, 3.0) == told
    assert progress(files[2:], 0, 0.0) == "0/1 files  0.0 MB  0.00 MB/s"


def test_a_folder_in_a_files_place_is_told(command, out):
    (out / "vocab.txt").mkdir(parents=True)
    ended = command("biobert")
    assert ended.status == 1
    assert ended.err.startswith(f"error: {out / 'vocab.txt'}: not a file")


def test_a_file_in_the_folders_place_is_told(command, out):
    out.parent.mkdir()
    out.write_text("")
    assert refused(command("pubmed")) == f"error: {out}: File exists\n"


def test_so_many_come_at_a_time_and_no_more(tmp_path):
    """None is done before three have begun."""
    meet, lock, under_way = threading.Barrier(3), threading.Lock(), [0, 0]

    def work(file: RemoteFile, patience: Patience) -> None:
        with lock:
            under_way[0] += 1
            under_way[1] = max(under_way)
        meet.wait(10)
        with lock:
            under_way[0] -= 1

    files = [RemoteFile("", tmp_path / str(number)) for number in range(6)]
    shown = []
    assert in_threads(work, files, 3, Patience(), shown.append) == {}
    assert under_way == [0, 3]
    assert shown[-1] == 6 and shown == sorted(shown)


def test_numbers_and_ranges():
    assert file_numbers("7,1-3,2") == [1, 2, 3, 7]
    assert file_numbers("9999") == [9999]
    assert in_ranges([1, 2, 3, 7]) == "1-3, 7"
    assert in_ranges([5]) == "5"
    assert in_ranges(range(1, 99, 2)) == "1, 3, 5, 7, 9, ..."


# As a process of its own.

QUICK = "import runpy, minibert.data.web as web; web.FIRST_WAIT = 0.01; "
QUICK += "runpy.run_module('minibert.download', run_name='__main__', alter_sys=True)"


def process(*arguments: str, quick: bool = False) -> subprocess.Popen:
    how = ["-c", QUICK] if quick else ["-m", "minibert.download"]
    return subprocess.Popen(
        [sys.executable, *how, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "no_proxy": "*"},
    )  # fmt: skip


def ended(running: subprocess.Popen) -> Ended:
    printed, complaint = running.communicate(timeout=60)
    return Ended(running.returncode, printed, complaint)


def test_the_statuses_of_the_process(server, out):
    where = ("--out", str(out), "--base-url", server.url + "pubmed")
    done = ended(process("pubmed", *where, "--files", "1-2"))
    assert (done.status, done.err) == (0, "")
    del server.files[f"/pubmed/{NAMES[3]}"]
    done = ended(process("pubmed", *where, "--files", "2-4"))
    url = f"{server.url}pubmed/{NAMES[3]}"
    assert (done.status, done.err) == (1, f"error: {url}: 404 Not Found\n")
    assert lying_in(out) == those(1, 2, 4)
    assert refused(ended(process("pubmed"))).startswith("error: the following arguments are")


@pytest.mark.parametrize("source", ["pubmed", "biobert"])
def test_a_server_that_is_not_there_is_one_line(out, source):
    with HostileServer() as gone:
        url = gone.url
    complaint = refused(ended(process(source, "--out", str(out), "--base-url", url, quick=True)))
    told = "" if source == "pubmed" else "config.json"
    reason = "no answer (Connection refused); tried 6 times"
    assert complaint == f"error: {url}{told}: {reason}\n"


def test_a_server_that_is_not_who_it_says_is_one_line(out, monkeypatch, capsys):
    def refuse(*_):
        raise URLError(ssl.SSLCertVerificationError("certificate verify failed"))

    monkeypatch.setattr(HTTPSHandler, "https_open", refuse)
    arguments = ["download", "biobert", "--out", str(out), "--base-url", "https://a/"]
    monkeypatch.setattr(sys, "argv", arguments)
    complaint = refused(Ended(run_command(main), *capsys.readouterr()))
    assert complaint.startswith("error: https://a/config.json: ")
    assert "certificate verify failed" in complaint


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_goes_on(server, out, sent):
    """Ctrl-C does not wait for a server that says nothing."""
    path = "/biobert/pytorch_model.bin"
    server.files[path].answers.append(Answer(stop_after=60_000, stalls=True))
    flags = ("biobert", "--out", str(out), "--base-url", server.url + "biobert")
    first = process(*flags)
    partial = out / "pytorch_model.bin.partial"
    until = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size >= 50_000):
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.02)
    again = refused(ended(process(*flags)))  # not two at once
    assert again.startswith(f"error: {out}: in use by process {first.pid}")
    first.send_signal(sent)
    asked = time.monotonic()
    done = ended(first)
    assert time.monotonic() - asked < 5
    if sent == signal.SIGINT:
        assert done[::2] == (130, "interrupted: the same command goes on from here\n")
    assert not (out / "pytorch_model.bin").exists()
    length = partial.stat().st_size
    assert ended(process(*flags)).status == 0
    assert lying_in(out) == BIOBERT
    assert server.asked(path)[-1].headers["Range"] == f"bytes={length}-"


def test_what_comes_can_be_read(server, out):
    """A real file of gzip, unlike the random bytes above: it is not unpacked on its way."""
    content = gzip.compress(b"<PubmedArticleSet/>")
    server.put(f"/pubmed/{NAMES[1]}", content, Answer(headers=(("Content-Encoding", "x-gzip"),)))
    md5 = hashlib.md5(content).hexdigest()
    server.put(f"/pubmed/{NAMES[1]}.md5", f"{md5}  {NAMES[1]}\n".encode())
    where = ("--out", str(out), "--base-url", server.url + "pubmed")
    assert ended(process("pubmed", *where, "--files", "1")).status == 0
    assert gzip.decompress((out / NAMES[1]).read_bytes()) == b"<PubmedArticleSet/>"
