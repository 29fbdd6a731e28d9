"""Asking web servers, with patience: answers that are whole, or one line that says what was wrong.

Standard library only; proxies are those of the environment (HTTPS_PROXY), as `urllib` reads it.
"""

import http.client
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from random import uniform
from threading import Event
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from minibert.errors import InputError

Result = TypeVar("Result")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries; each wait is twice the one before
LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait
PROGRESS = 1 << 16  # bytes after which earlier failures are forgotten
SLOWEST = 1000  # bytes a second; below it for as long as a time-out, and the connection is dropped
BLOCK = 1 << 18  # bytes read at once
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another try may not meet
NO_SUCH_RANGE = 416
LASTING = (ssl.SSLCertVerificationError, http.client.InvalidURL, ValueError, str)


class Unreachable(InputError):
    """There was no answer at all, the last time that one was asked for."""


class Hitch(Exception):
    """A try has failed, but another may do better, after `wait` seconds at least.

    `status` is that of the answer, None where there was none.
    """

    def __init__(self, reason: str, status: int | None = None, wait: float = 0.0):
        super().__init__(reason)
        self.status, self.wait = status, wait


class Abandoned(Exception):
    """Nobody wants the answer any more."""


class Linked(Exception):
    """Hugging Face passes on to its store, having told of the file all that HEAD was to tell.

    The store may refuse HEAD, and its ETag need not be the file's SHA-256.
    """

    def __init__(self, headers: Message):
        super().__init__()
        self.headers = headers


@dataclass(frozen=True)
class Patience:
    """How long to wait for servers, and how often to come back."""

    tries: int = 6  # in a row that bring next to nothing
    timeout: float = 60.0  # seconds without a byte, or with less than SLOWEST
    sleep: Callable[[float], None] = time.sleep
    stopped: Event = field(default_factory=Event)  # set by who gives up: then all is Abandoned


def patiently(
    attempt: Callable[[], Result], patience: Patience, position: Callable[[], int] = lambda: 0
) -> Result:
    """What `attempt` returns, tried again after each Hitch, with longer and longer waits.

    `position` tells how far a transfer has come. Only what lies beyond all earlier tries counts as
    progress: a server that begins anew for ever must not keep us for ever.
    """
    failures, furthest = 0, position()
    while not patience.stopped.is_set():
        try:
            return attempt()
        except Hitch as hitch:
            if position() >= furthest + PROGRESS:
                failures, furthest = 0, position()
            failures += 1
            if failures >= patience.tries:
                kind = InputError if hitch.status else Unreachable
                raise kind(f"{hitch}; tried {failures} times") from None
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
            patience.sleep(max(hitch.wait, wait * uniform(0.5, 1)))  # not all at the same moment
    raise Abandoned


def fetch_text(url: str, limit: int, patience: Patience) -> str:
    """The text of a small file; one of more than `limit` bytes is refused."""

    def attempt() -> str:
        with answer_to(url, patience) as response:
            length, content = response.length, bytearray()
            if length is None and not response.chunked:
                raise InputError(f"{url}: sent without its length, so that its end is uncertain")
            for block in blocks(url, response, patience):
                content += block
                if len(content) > limit:
                    raise InputError(f"{url}: more than {limit:,} bytes")
        if length is not None and len(content) < length:
            raise ended_early(url, len(content), length, response.status)
        return content.decode(errors="replace")

    return patiently(attempt, patience)


def fetch_headers(url: str, patience: Patience) -> Message:
    """What a server says of a file without sending it; of Hugging Face's, what it links to."""

    def attempt() -> Message:
        try:
            with answer_to(url, patience, "HEAD") as response:
                return response.headers
        except Linked as answer:
            return answer.headers

    return patiently(attempt, patience)


class Redirects(HTTPRedirectHandler):
    """Follows redirects, never to what is less safe than https was, and without reading them."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        method = req.get_method()
        fp.close()  # the base class would read it, however long it is
        if method == "HEAD" and "X-Linked-Size" in headers:
            raise Linked(headers)
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new != "https" and (old, new) != ("http", "http"):
            raise InputError(f"{req.full_url}: a redirect from {old} to {new} is not followed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        request.method = method  # HEAD would become GET
        return request


@contextmanager
def answer_to(
    url: str, patience: Patience, method: str = "GET", headers: dict[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """A server's answer of status 2xx; all else is a Hitch, or an InputError if it is to stay."""
    request = Request(url, headers={"User-Agent": "minibert"} | (headers or {}), method=method)
    try:
        response = build_opener(Redirects).open(request, timeout=patience.timeout)
    except InputError:
        raise
    except HTTPError as error:
        error.close()
        reason = f"{url}: {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        if error.code not in PASSING | {NO_SUCH_RANGE}:
            raise InputError(reason) from None
        raise Hitch(reason, error.code, _asked_to_wait(reason, error.headers)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, LASTING):
            raise Unreachable(f"{url}: {_in_words(cause)}") from None
        raise Hitch(f"{url}: no answer ({_in_words(cause)})") from None
    with response:
        yield response


def blocks(url: str, response: http.client.HTTPResponse, patience: Patience) -> Iterator[bytes]:
    """An answer's bytes as they come; a connection that breaks, stalls or crawls is a Hitch."""
    begun, came = time.monotonic(), 0
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            reason = f"{url}: the connection broke ({_in_words(error)})"
            raise Hitch(reason, response.status) from None
        if patience.stopped.is_set():
            raise Abandoned
        if not block:
            return
        yield block
        came += len(block)
        seconds = time.monotonic() - begun
        if seconds > patience.timeout:
            if came < SLOWEST * seconds:
                raise Hitch(f"{url}: slower than {SLOWEST} bytes/s", response.status)
            begun, came = time.monotonic(), 0


def ended_early(url: str, came: int, length: int, status: int) -> Hitch:
    return Hitch(f"{url}: the connection ended after {came:,} of {length:,} bytes", status)


def _asked_to_wait(reason: str, headers: Message) -> float:
    """The seconds of a Retry-After, a number or a date (it may be past); 0 if there is none."""
    text = headers.get("Retry-After", "")
    seconds = 0.0
    if re.fullmatch(r"[0-9]{1,9}", text):
        seconds = float(text)
    elif text:
        with suppress(ValueError, TypeError, OverflowError):
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
    if seconds > LONGEST_ASKED:
        raise InputError(f"{reason}; the server asks to come again in {seconds:,.0f} s")
    return seconds


def _in_words(error: object) -> str:
    """What went wrong between here and the server."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, http.client.IncompleteRead):
        return "it ended"
    return getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
