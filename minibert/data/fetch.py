"""One file from a web server: whole and right, or not there.

    NAME                 what was asked for, once it is proved right
    NAME.partial         what has come so far: the next try, or the next process, goes on from it
    NAME.partial.tag     which version of the file that is: the server's ETag or Last-Modified

Servers are not trusted: lengths, ranges and versions must agree with each other, and at last a
hash, or where there is none the length, tells whether the file is right.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPResponse
from pathlib import Path
from typing import NamedTuple

from minibert.data.web import (
    NO_SUCH_RANGE,
    Hitch,
    Patience,
    answer_to,
    blocks,
    ended_early,
    fetch_headers,
    fetch_text,
    patiently,
)
from minibert.errors import InputError
from minibert.files import naming

LARGEST_FILE = 1 << 32  # bytes; the largest that is wanted here has a tenth of it
LARGEST_MD5 = 1 << 12  # bytes of a file that holds one MD5
TAG = re.compile(r"[!-~][ -~]{0,199}")  # what may stand behind If-Range
RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class Proof(NamedTuple):
    """What a right file must have: of `kind` ("md5", "sha256" or "length") this `value`."""

    kind: str
    value: str

    def holds(self, path: Path) -> bool:
        return measured(path, self.kind) == self.value


def measured(path: Path, kind: str) -> str:
    """The hash of a file in hexadecimal, or its length."""
    if kind == "length":
        return str(path.stat().st_size)
    digest = hashlib.new(kind, usedforsecurity=False)  # against accidents; https is against foes
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class RemoteFile:
    """A file that is wanted, and how far it has come."""

    url: str
    path: Path
    proof: Proof | None = None  # must be known before it is fetched
    size: int | None = None  # bytes, perhaps roughly: for progress and for the room on the disk
    here: int = 0  # bytes that lie on the disk
    received: int = 0  # bytes that came over the network, some perhaps in vain

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def tag_file(self) -> Path:
        return self.path.with_name(self.path.name + ".partial.tag")

    def kept(self) -> str:
        """Count the bytes that can be built upon, and return the tag of their version."""
        tag = ""
        with suppress(OSError, UnicodeError):
            tag = self.tag_file.read_text(encoding="ascii")
        if not TAG.fullmatch(tag) or not self.partial.is_file():
            tag = ""
        self.here = self.partial.stat().st_size if tag else 0
        return tag

    def begin(self, tag: str = "") -> None:
        """Begin anew, with the version `tag`: the old bytes go before the new tag stands."""
        self.partial.unlink(missing_ok=True)
        self.tag_file.unlink(missing_ok=True)
        self.here = 0
        if tag:
            with naming(self.tag_file):
                self.tag_file.write_text(tag, encoding="ascii")

    def finish(self) -> None:
        """Put the partial file in its place."""
        with naming(self.partial), open(self.partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)
        self.tag_file.unlink(missing_ok=True)


def fetch(file: RemoteFile, patience: Patience) -> None:
    """Bring a file to its path, going on where an earlier try, or process, had come to.

    Raises InputError with what the server did wrong, OSError with what the disk did.
    """
    for _ in range(2):  # what proves to be wrong is fetched once more, from its first byte
        patiently(lambda: receive(file, patience), patience, lambda: file.here)
        if (found := measured(file.partial, file.proof.kind)) == file.proof.value:
            return file.finish()
        file.begin()
    raise InputError(f"{file.url}: {file.proof.kind} {found}, twice; expected {file.proof.value}")


def receive(file: RemoteFile, patience: Patience) -> None:
    """One try: ask for what the partial file lacks; on return it has all that there is."""
    tag = file.kept()
    asked = {"Range": f"bytes={file.here}-", "If-Range": tag} if file.here else {}
    try:
        with answer_to(file.url, patience, headers=asked) as response:
            end = place(file, response, tag)
            store(file, response, end, patience)
    except Hitch as hitch:
        if hitch.status != NO_SUCH_RANGE:
            raise
        if not (file.here and file.proof.holds(file.partial)):  # else nothing was lacking
            file.begin()
            raise


def place(file: RemoteFile, response: HTTPResponse, tag: str) -> int | None:
    """Make the partial file ready for an answer; return the whole length, None where not told."""
    if response.status == 200:  # the server knows no ranges, or has another version by now
        file.begin(tag_of(response.headers))
        whole = response.length
    elif response.status == 206 and file.here:
        whole = continued(file, response, tag)
    else:
        raise Hitch(f"{file.url}: an answer of status {response.status}", response.status)
    if whole is not None:
        check_size(file.url, whole)
        file.size = whole
    return whole


def continued(file: RemoteFile, response: HTTPResponse, tag: str) -> int:
    """The whole length of a file of which the answer is the part that was asked for."""
    told = RANGE.fullmatch(response.headers.get("Content-Range", ""))
    first, end = (int(told[1]), int(told[2]) + 1) if told else (0, 0)
    whole = end if not told or told[3] == "*" else int(told[3])
    if (
        first != file.here
        or response.length not in (None, end - first)
        or tag_of(response.headers) not in ("", tag)
    ):
        file.begin()
        raise Hitch(f"{file.url}: another part than was asked for", response.status)
    return whole


def store(file: RemoteFile, response: HTTPResponse, whole: int | None, patience: Patience) -> None:
    """Append what comes to the partial file, until it is `whole` bytes long."""
    most = LARGEST_FILE if whole is None else whole
    with naming(file.partial), open(file.partial, "ab") as partial:
        for block in blocks(file.url, response, patience):
            partial.write(block)
            file.here += len(block)
            file.received += len(block)
            if file.here > most:
                break
    if file.here > most:
        file.begin()
        reason = f"{file.url}: more than {most:,} bytes came"
        raise InputError(reason) if whole is None else Hitch(reason, response.status)
    if whole is not None and file.here < whole:
        raise ended_early(file.url, file.here, whole, response.status)


def learn_md5(file: RemoteFile, patience: Patience) -> None:
    """Learn a file's proof from the MD5 that lies beside it, as `openssl` or `md5sum` writes it."""
    url, name = f"{file.url}.md5", re.escape(file.path.name)
    text = fetch_text(url, LARGEST_MD5, patience)
    forms = rf"^MD5 ?\({name}\) ?= ?([0-9a-f]{{32}})\s*$|^([0-9a-f]{{32}}) [ *]{name}\s*$"
    if not (found := re.search(forms, text, flags=re.MULTILINE | re.IGNORECASE)):
        raise InputError(f"{url}: no MD5 of {file.path.name} in it, but {text[:60]!r}")
    file.proof = Proof("md5", (found[1] or found[2]).lower())


def learn_from_headers(file: RemoteFile, patience: Patience) -> None:
    """Learn a file's size and its proof: the SHA-256 if the server tells it, else the length."""
    headers = fetch_headers(file.url, patience)
    tag = headers.get("X-Linked-ETag") or headers.get("ETag", "")
    length = headers.get("X-Linked-Size") or headers.get("Content-Length", "")
    if re.fullmatch(r"[0-9]{1,18}", length):
        file.size = int(length)
        check_size(file.url, file.size)
        file.proof = Proof("length", str(file.size))
    if sha256 := re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag):
        file.proof = Proof("sha256", sha256[1])
    if file.proof is None:
        raise InputError(f"{file.url}: the server tells neither its length nor its SHA-256")


def check_size(url: str, size: int) -> None:
    """Refuse what nothing that is wanted here can be as large as."""
    if size > LARGEST_FILE:
        raise InputError(f"{url}: {size:,} bytes; expected at most {LARGEST_FILE:,}")


def tag_of(headers: Message) -> str:
    """What tells this version of a file from others: a strong ETag, or when it was modified."""
    for name in ("ETag", "Last-Modified"):
        tag = headers.get(name, "")
        if TAG.fullmatch(tag) and not tag.startswith("W/"):
            return tag
    return ""
