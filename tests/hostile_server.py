"""A web server on this machine that answers as it is told to: rightly, wrongly, or not at all.

    with HostileServer() as server:
        server.put("/a.gz", content, Answer(stop_after=10), Answer(status=503))
        ... server.url + "a.gz" ...

The first two requests for /a.gz are answered so, all others rightly. `server.requests` tells what
was asked.
"""

import re
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """How one request is answered; with nothing given: as it should be."""

    status: int | None = None  # instead of 200 or 206, and without the file
    headers: tuple[tuple[str, str], ...] = ()  # besides the usual ones
    content: bytes | None = None  # instead of the file's
    etag: str | None = None  # instead of the file's; "" for none
    stop_after: int | None = None  # bytes of the body; then the connection ends
    reset: bool = False  # it ends by a reset
    stalls: bool = False  # then nothing comes, but it stays open
    pause: float = 0.0  # seconds after each byte
    burst: int = 0  # bytes before those
    ranges: bool = True  # whether Range is heeded
    shift: int = 0  # the part that is sent begins so many bytes elsewhere, and says so
    told: int = 0  # is added to the Content-Length
    length: str = "told"  # or "chunked", or "none": the body ends with the connection
    endless: bytes = b""  # sent again and again after the content


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class File:
    content: bytes
    etag: str  # of every strong kind but 64 hexadecimal digits
    modified: str
    answers: deque[Answer] = field(default_factory=deque)
    head: Answer = Answer()


class HostileServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, File] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def put(self, path: str, content: bytes, *answers: Answer, **about) -> File:
        """The file at `path`, and how the first GETs for it are answered."""
        tag = f'"{md5(content).hexdigest()}"'
        self.files[path] = File(
            content, about.pop("etag", tag), about.pop("modified", ""), deque(answers), **about
        )
        return self.files[path]

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        return [entry for entry in self.requests if (entry.method, entry.path) == (method, path)]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients go away, which is theirs to do


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HostileServer

    def do_HEAD(self):
        self.reply()

    def do_GET(self):
        self.reply()

    def log_message(self, *_):
        pass

    def reply(self):
        path = urlsplit(self.path).path  # a proxy is asked for a whole URL
        self.server.requests.append(Request(self.command, path, dict(self.headers)))
        self.close_connection = True
        if (file := self.server.files.get(path)) is None:
            return self.begin(404, {"Content-Length": "0"})
        answer = file.head
        if self.command == "GET":
            answer = file.answers.popleft() if file.answers else Answer()
        if answer.status is not None:
            body = answer.content or b""
            self.begin(answer.status, {"Content-Length": str(len(body))} | dict(answer.headers))
            return self.send(answer, body)
        self.send_file(file, answer)

    def send_file(self, file: File, answer: Answer):
        body = file.content if answer.content is None else answer.content
        etag = file.etag if answer.etag is None else answer.etag
        headers = {"ETag": etag, "Last-Modified": file.modified, "Accept-Ranges": "bytes"}
        status, size, first = 200, len(body), 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) in (etag, file.modified)
        if asked and same and answer.ranges:
            if (first := int(asked[1])) >= size:
                headers = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
                return self.begin(416, headers)
            first = min(max(0, first + answer.shift), size - 1)
            status, body = 206, body[first:]
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        if answer.length == "told":
            headers["Content-Length"] = str(len(body) + answer.told)
        elif answer.length == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        self.begin(status, headers | dict(answer.headers))
        if self.command == "GET":
            self.send(answer, body)

    def begin(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def send(self, answer: Answer, body: bytes):
        chunked = answer.length == "chunked"
        part = body[: answer.stop_after]
        burst = answer.burst if answer.pause else len(part)
        pieces = [part[:burst], *(bytes([byte]) for byte in part[burst:])]
        for piece in pieces:
            if piece:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                self.server.closing.wait(answer.pause)
        while answer.endless and not self.server.closing.is_set():
            self.wfile.write(answer.endless)
        if answer.stalls:
            self.server.closing.wait()
        elif answer.reset:
            linger = struct.pack("ii", 1, 0)  # close sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        elif chunked and answer.stop_after is None:
            self.wfile.write(b"0\r\n\r\n")
