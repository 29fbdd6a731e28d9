"""A file from the web is whole and right or not there, whatever server and network do.

All on this machine: against a server that breaks off, lies, stalls and changes its mind.
"""

import hashlib
import random
from email.utils import formatdate
from pathlib import Path
from urllib.request import Request

import pytest
from hostile_server import Answer, HostileServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minibert.data import fetch as module
from minibert.data import web
from minibert.data.fetch import Proof, RemoteFile, fetch, learn_from_headers, learn_md5
from minibert.data.web import (
    Abandoned,
    Hitch,
    Patience,
    Redirects,
    Unreachable,
    fetch_text,
    patiently,
)
from minibert.errors import InputError

CONTENT = random.Random(0).randbytes(200_003)  # three times what counts as progress, and some
OTHER = random.Random(1).randbytes(200_003)
TRIES = 5
DATES = [formatdate(day * 86_400, usegmt=True) for day in (20_000, 20_001)]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def server():
    with HostileServer() as running:
        yield running


@pytest.fixture
def waits():
    return []


@pytest.fixture
def patience(waits, server):
    server.requests.clear()
    server.files.clear()
    return Patience(tries=TRIES, timeout=0.25, sleep=waits.append)


def wanted(server, folder: Path, content: bytes = CONTENT, kind: str = "md5") -> RemoteFile:
    """The file /f, to be proved by the MD5 (or the length) of `content`."""
    value = hashlib.md5(content).hexdigest() if kind == "md5" else str(len(content))
    return RemoteFile(server.url + "f", folder / "f", Proof(kind, value))


def ranges(server) -> list[str | None]:
    return [request.headers.get("Range") for request in server.asked("/f")]


def only_the_file(folder: Path, content: bytes = CONTENT) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {"f": content}


HALF = Answer(stop_after=100_000)
TO_THE_END = "bytes=100000-"


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ([], [None]),
        ([Answer(length="chunked")], [None]),
        ([Answer(length="none")], [None]),
        ([HALF], [None, TO_THE_END]),
        ([HALF, Answer(stop_after=50_000)], [None, TO_THE_END, "bytes=150000-"]),
        ([HALF, Answer(length="chunked")], [None, TO_THE_END]),
        ([Answer(length="chunked", stop_after=100_000)], [None, TO_THE_END]),
        ([Answer(stop_after=100_000, stalls=True)], [None, TO_THE_END]),
        ([Answer(stop_after=0)], [None, None]),
        ([Answer(status=503)], [None, None]),
        ([HALF, Answer(status=503)], [None, TO_THE_END, TO_THE_END]),
        ([HALF, Answer(status=204)], [None, TO_THE_END, TO_THE_END]),
        ([HALF, Answer(ranges=False)], [None, TO_THE_END]),
        ([HALF, Answer(ranges=False, stop_after=10)], [None, TO_THE_END, "bytes=10-"]),
        ([HALF, Answer(shift=7)], [None, TO_THE_END, None]),
        ([HALF, Answer(shift=-7)], [None, TO_THE_END, None]),
        ([HALF, Answer(told=9)], [None, TO_THE_END, None]),
        ([HALF, Answer(told=-9)], [None, TO_THE_END, None]),
        ([HALF, Answer(status=416)], [None, TO_THE_END, None]),
        ([HALF, Answer(status=206)], [None, TO_THE_END, None]),
        ([Answer(told=9)], [None, "bytes=200003-"]),  # whole but for a length that is not so
        ([Answer(length="none", stop_after=100_000)], [None, None]),  # MD5 tells, at the end
        ([Answer(told=-9)], [None, None]),
        ([Answer(content=OTHER)], [None, None]),  # a wrong MD5, once
        ([Answer(content=CONTENT[:-1])], [None, None]),
        ([Answer(content=OTHER, stop_after=100_000)], [None, TO_THE_END, None]),  # the same tag
    ],
)
def test_what_goes_wrong_is_made_good(server, patience, tmp_path, answers, asked):
    server.put("/f", CONTENT, *answers)
    file = wanted(server, tmp_path)
    fetch(file, patience)
    assert only_the_file(tmp_path)
    assert ranges(server) == asked
    assert file.here == len(CONTENT) <= file.received


def test_a_reset_is_made_good(server, patience, tmp_path):
    """Of what was under way some is lost with the connection."""
    server.put("/f", CONTENT, Answer(stop_after=100_000, reset=True))
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
    assert len(ranges(server)) == 2


@pytest.mark.parametrize("burst", [0, 10_000])
def test_a_trickle_is_dropped(server, patience, tmp_path, burst):
    """Each byte comes in time, but all of them would not; even where it began well."""
    content = CONTENT[: burst + 400]
    server.put("/f", content, Answer(pause=0.02, burst=burst))
    fetch(wanted(server, tmp_path, content), patience)
    assert only_the_file(tmp_path, content)
    first, second = ranges(server)
    assert first is None and second.startswith("bytes=")


@pytest.mark.parametrize("by_date", [False, True])
def test_a_file_that_changes_is_not_spliced(server, patience, tmp_path, by_date):
    """Told by its length alone, so that a splice would pass for right."""
    tags = [{"modified": date, "etag": ""} for date in DATES] if by_date else [{}, {}]
    server.put("/f", OTHER, HALF, **tags[0])
    changing = Patience(TRIES, 0.25, lambda _: server.put("/f", CONTENT, **tags[1]))
    fetch(wanted(server, tmp_path, kind="length"), changing)
    assert only_the_file(tmp_path)
    assert ranges(server) == [None, TO_THE_END]  # which the server answers with the whole


def test_a_server_that_heeds_no_if_range_is_seen_through(server, patience, tmp_path):
    """It sends a part of the new version, and says by its ETag that it does."""
    server.put("/f", CONTENT, Answer(content=OTHER, etag='"1"', stop_after=100_000))
    part = (("Content-Range", "bytes 100000-200002/200003"), ("ETag", '"2"'))
    server.files["/f"].answers.append(Answer(status=206, content=CONTENT[100_000:], headers=part))
    fetch(wanted(server, tmp_path, kind="length"), patience)
    assert only_the_file(tmp_path)
    assert ranges(server) == [None, TO_THE_END, None]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_version_nothing_is_resumed(server, patience, tmp_path, etag):
    server.put("/f", CONTENT, HALF, etag=etag)
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
    assert ranges(server) == [None, None]


def test_the_next_process_goes_on(server, patience, tmp_path):
    server.put("/f", CONTENT, HALF, *[Answer(status=500)] * 9)
    with pytest.raises(InputError, match=r"500 Internal Server Error; tried 5 times"):
        fetch(wanted(server, tmp_path), patience)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.partial", "f.partial.tag"]
    server.files["/f"].answers.clear()
    server.requests.clear()
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
    assert ranges(server) == [TO_THE_END]


@pytest.mark.parametrize("tag", [b"", b"\xff", b"a\r\nX-Header: b", b'"' + b"a" * 300 + b'"', None])
def test_a_damaged_tag_is_not_used(server, patience, tmp_path, tag):
    server.put("/f", CONTENT)
    (tmp_path / "f.partial").write_bytes(OTHER[:1000])
    if tag is not None:
        (tmp_path / "f.partial.tag").write_bytes(tag)
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
    assert ranges(server) == [None]


def test_what_was_whole_before_the_kill_is_not_fetched_again(server, patience, tmp_path):
    file = server.put("/f", CONTENT)
    (tmp_path / "f.partial").write_bytes(CONTENT)
    (tmp_path / "f.partial.tag").write_text(file.etag)
    wish = wanted(server, tmp_path)
    fetch(wish, patience)
    assert only_the_file(tmp_path)
    assert wish.received == 0


@pytest.mark.parametrize(
    ("answer", "complaint", "asked"),
    [
        (Answer(status=404), r"f: 404 Not Found$", 1),
        (Answer(status=403), r"f: 403 Forbidden$", 1),
        (Answer(status=503), r"f: 503 Service Unavailable; tried 5 times$", TRIES),
        (Answer(status=416), r"f: 416 Req.*; tried 5 times$", TRIES),
        (Answer(stop_after=10), r"the connection ended after 50 of 200,003 bytes; tried 5", TRIES),
        (Answer(stalls=True, stop_after=10), r"\(timed out\); tried 5 times", TRIES),
        (Answer(content=OTHER), r"f: md5 [0-9a-f]{32}, twice; expected [0-9a-f]{32}$", 2),
        (Answer(content=CONTENT[:-1]), r"md5 .* twice", 2),
        (Answer(told=-1), r"md5 .* twice", 2),
        (Answer(ranges=False, told=1), r"after 200,003 of 200,004 bytes; tried 5 times", TRIES),
        (Answer(headers=(("Content-Length", f"{10**13}"),)), r"10,000,000,000,000 bytes; exp", 1),
    ],
)
def test_what_stays_wrong_ends_in_one_line(server, patience, tmp_path, answer, complaint, asked):
    server.put("/f", CONTENT, *[answer] * 20)
    with pytest.raises(InputError, match=complaint) as caught:
        fetch(wanted(server, tmp_path), patience)
    assert not (tmp_path / "f").exists()
    assert "\n" not in str(caught.value)
    assert server.url + "f" in str(caught.value)
    assert len(server.asked("/f")) == asked


@pytest.mark.parametrize("length", ["none", "chunked"])
def test_a_file_without_end_is_refused(server, patience, tmp_path, monkeypatch, length):
    monkeypatch.setattr(module, "LARGEST_FILE", 300_000)
    endless = b"3e8\r\n" + bytes(1000) + b"\r\n"
    server.put("/f", CONTENT, Answer(length=length, endless=endless))
    with pytest.raises(InputError, match="more than 300,000 bytes"):
        fetch(wanted(server, tmp_path), patience)
    assert list(tmp_path.iterdir()) == []


def test_a_part_longer_than_told_is_dropped(server, patience, tmp_path):
    told = (("Content-Range", "bytes 100000-100009/100010"),)
    server.put("/f", CONTENT, HALF, Answer(length="chunked", headers=told))
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
    assert ranges(server) == [None, TO_THE_END, None]


def test_many_small_steps_are_progress(server, patience, tmp_path):
    """Ten times as many breaks as tries, but each brings something."""
    content = CONTENT * 20
    server.put("/f", content, *[Answer(stop_after=70_000)] * 50)
    fetch(wanted(server, tmp_path, content), patience)
    assert only_the_file(tmp_path, content)
    assert len(server.asked("/f")) == 51


def test_beginning_anew_is_no_progress(server, patience, tmp_path):
    """A server whose file changes with every try does not keep us for ever."""
    answers = [Answer(stop_after=150_000, etag=f'"{number}"') for number in range(99)]
    server.put("/f", CONTENT, *answers)
    with pytest.raises(InputError, match="tried 5 times"):
        fetch(wanted(server, tmp_path), patience)
    assert len(server.asked("/f")) == TRIES


def test_waits_grow_and_are_not_alike(server, patience, waits, tmp_path):
    server.put("/f", CONTENT, *[Answer(status=503)] * 9)
    with pytest.raises(InputError):
        fetch(wanted(server, tmp_path), patience)
    assert len(waits) == TRIES - 1
    for number, wait in enumerate(waits):
        assert 0.5 * 2**number <= wait <= 2**number
    assert all(wait != 2**number for number, wait in enumerate(waits))


def test_waits_do_not_grow_for_ever(waits):
    def attempt():
        raise Hitch("no")

    with pytest.raises(Unreachable):
        patiently(attempt, Patience(tries=50, sleep=waits.append))
    assert max(waits) <= web.LONGEST_WAIT


def test_who_gives_up_is_asked_no_more(patience):
    patience.stopped.set()
    with pytest.raises(Abandoned):
        patiently(lambda: pytest.fail("tried"), patience)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0.5, 1),
        ("in a while", 0.5, 1),
        ("in 20 seconds", 18, 20),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.5, 1),
        ("9" * 40, 0.5, 1),
    ],
)
def test_a_server_says_when_to_come_again(
    server, patience, waits, tmp_path, status, told, least, most
):
    if told == "in 20 seconds":
        told = formatdate(web.time.time() + 20, usegmt=True)
    server.put("/f", CONTENT, Answer(status=status, headers=(("Retry-After", told),)))
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
    (wait,) = waits
    assert least <= wait <= most


def test_a_server_that_asks_for_too_long_a_wait_is_left(server, patience, waits, tmp_path):
    server.put("/f", CONTENT, Answer(status=429, headers=(("Retry-After", "86400"),)))
    with pytest.raises(InputError, match=r"429 .* come again in 86,400 s"):
        fetch(wanted(server, tmp_path), patience)
    assert waits == []


# Redirects.


def moved(to: str) -> Answer:
    return Answer(status=302, headers=(("Location", to),))


def test_redirects_are_followed_with_the_range(server, patience, tmp_path):
    server.put("/g", CONTENT, HALF)
    server.put("/f", b"", *[moved("/g")] * 3)
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
    assert [request.headers.get("Range") for request in server.asked("/g")] == [None, TO_THE_END]


def test_redirects_without_end_are_refused(server, patience, tmp_path):
    server.put("/f", b"", *[moved("/f")] * 99)
    with pytest.raises(InputError, match="302 Found"):
        fetch(wanted(server, tmp_path), patience)


def test_the_body_of_a_redirect_is_not_read(server, patience, tmp_path):
    headers = (("Location", "/g"), ("Content-Length", str(10**12)))
    server.put("/f", b"", Answer(status=302, headers=headers, endless=bytes(1000)))
    server.put("/g", CONTENT)
    fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/f", "file:///etc/hosts", "http://[::1", "//:x/"])
def test_redirects_to_elsewhere_are_refused(server, patience, tmp_path, to):
    server.put("/f", b"", moved(to))
    with pytest.raises(InputError) as caught:
        fetch(wanted(server, tmp_path), patience)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("old", "new", "followed"),
    [("https", "https", True), ("http", "https", True), ("https", "http", False)],
)
def test_a_redirect_does_not_give_up_https(old, new, followed):
    class Body:
        def close(self):
            pass

    def redirect():
        request = Request(f"{old}://a/f", method="HEAD")
        return Redirects().redirect_request(request, Body(), 302, "", {}, f"{new}://b/f")

    if followed:
        assert (redirect().full_url, redirect().get_method()) == (f"{new}://b/f", "HEAD")
    else:
        with pytest.raises(InputError, match="a redirect from https to http is not followed"):
            redirect()


def test_a_proxy_of_the_environment_is_asked(server, patience, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    server.put("/f", CONTENT)
    file = wanted(server, tmp_path)
    file.url = "http://mirror.invalid/f"
    fetch(file, patience)
    assert only_the_file(tmp_path)
    assert server.requests[0].headers["Host"] == "mirror.invalid"


# What is known beforehand: texts, MD5 files, headers.


@pytest.mark.parametrize("answer", [Answer(), Answer(length="chunked")])
def test_texts_are_whole(server, patience, answer):
    server.put(
        "/t", b"a text", Answer(stop_after=3), Answer(length="chunked", stop_after=3), answer
    )
    assert fetch_text(server.url + "t", 6, patience) == "a text"
    assert len(server.asked("/t")) == 3


def test_a_text_of_unknown_length_is_refused(server, patience):
    server.put("/t", b"a text", Answer(length="none"))
    with pytest.raises(InputError, match="its end is uncertain"):
        fetch_text(server.url + "t", 6, patience)


def test_a_text_without_end_is_refused(server, patience):
    server.put("/t", b"", Answer(length="chunked", endless=b"3\r\nabc\r\n"))
    with pytest.raises(InputError, match="more than 5,000 bytes"):
        fetch_text(server.url + "t", 5_000, patience)


MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize(
    "text",
    [f"MD5(f)= {MD5}\n", f"MD5 (f) = {MD5}", f"{MD5}  f\n", f"{MD5} *f\r\n",
     f"MD5(f)= {MD5.upper()}", f"{'0' * 32}  ff\n{MD5}  f\n"],
)  # fmt: skip
def test_both_forms_of_an_md5_file_are_read(server, patience, tmp_path, text):
    server.put("/f.md5", text.encode())
    file = RemoteFile(server.url + "f", tmp_path / "f")
    learn_md5(file, patience)
    assert file.proof == ("md5", MD5)


@pytest.mark.parametrize(
    "text", ["", MD5[:-1] + "  f", f"MD5(g)= {MD5}", f"{MD5}0  f", "<html>\nsorry", f"{MD5}  ../f"]
)
def test_what_is_no_md5_of_the_file_is_refused(server, patience, tmp_path, text):
    server.put("/f.md5", text.encode())
    with pytest.raises(InputError, match=r"f\.md5: no MD5 of f in it"):
        learn_md5(RemoteFile(server.url + "f", tmp_path / "f"), patience)


SHA256 = hashlib.sha256(CONTENT).hexdigest()
LINKED = (("Location", "/store"), ("X-Linked-Size", "200003"), ("X-Linked-ETag", f'"{SHA256}"'))


@pytest.mark.parametrize(
    ("head", "proof"),
    [
        (Answer(), ("length", "200003")),
        (Answer(etag=f'"{SHA256}"'), ("sha256", SHA256)),
        (Answer(etag=f'W/"{SHA256}"', length="none"), ("sha256", SHA256)),
        (Answer(etag=f'"{SHA256[:40]}"'), ("length", "200003")),
        (Answer(status=302, headers=LINKED), ("sha256", SHA256)),
        (Answer(status=302, headers=LINKED[:2]), ("length", "200003")),
    ],
)
def test_headers_tell_how_a_file_is_proved(server, patience, tmp_path, head, proof):
    """Of one that is linked to, the store is asked for the bytes alone."""
    server.put("/store", CONTENT, etag=f'"{"0" * 64}"')
    server.put("/f", CONTENT, *[moved("/store")] * (head.status == 302), head=head)
    file = RemoteFile(server.url + "f", tmp_path / "f")
    learn_from_headers(file, patience)
    assert file.proof == proof
    assert server.asked("/store", "HEAD") == []
    fetch(file, patience)
    assert only_the_file(tmp_path)


def test_a_redirected_head_stays_one(server, patience, tmp_path):
    server.put("/g", CONTENT)
    server.put("/f", b"", head=moved("/g"))
    file = RemoteFile(server.url + "f", tmp_path / "f")
    learn_from_headers(file, patience)
    assert file.proof == ("length", "200003")
    assert [request.method for request in server.requests] == ["HEAD", "HEAD"]


def test_a_file_that_nothing_can_prove_is_refused(server, patience, tmp_path):
    server.put("/f", CONTENT, head=Answer(length="none"))
    with pytest.raises(InputError, match="neither its length nor its SHA-256"):
        learn_from_headers(RemoteFile(server.url + "f", tmp_path / "f"), patience)


def test_a_length_promised_before_is_held_to(server, patience, tmp_path):
    """HEAD told one length, GET another: what comes is not what was promised."""
    server.put("/f", CONTENT, *[Answer(content=CONTENT[:-1])] * 2)
    with pytest.raises(InputError, match="length 200002, twice; expected 200003"):
        fetch(wanted(server, tmp_path, kind="length"), patience)


# Any sequence of failures.

POSITIONS = st.integers(0, len(CONTENT))
# Another file is harmless while it does not come whole, from all tries together.
A_PART = st.integers(0, len(CONTENT) // TRIES)
HARMLESS = st.one_of(
    st.builds(Answer, stop_after=POSITIONS, ranges=st.booleans(), reset=st.booleans()),
    st.builds(Answer, stop_after=POSITIONS, length=st.just("chunked")),
    st.builds(Answer, stop_after=A_PART, content=st.just(OTHER), etag=st.just('"other"')),
    st.builds(Answer, status=st.sampled_from([204, 206, 408, 416, 429, 500, 502, 503, 504])),
    st.builds(Answer, told=st.integers(1, 300_000), ranges=st.booleans()),
    st.builds(Answer, shift=st.integers(-200_000, 200_000), stop_after=POSITIONS),
)
WRONG = st.one_of(  # these can only be told by the hash
    st.builds(Answer, content=st.just(OTHER), stop_after=POSITIONS),
    st.builds(Answer, content=st.just(OTHER), etag=st.just('"other"')),
    st.builds(Answer, told=st.integers(-len(CONTENT), -1)),
    st.builds(Answer, length=st.just("none"), stop_after=POSITIONS),
)
HERE = settings(max_examples=75, deadline=None, suppress_health_check=list(HealthCheck))


def afresh(server, folder: Path, answers: list[Answer]) -> RemoteFile:
    for path in folder.iterdir():
        path.unlink()
    server.put("/f", CONTENT, *answers)
    return wanted(server, folder)


@given(harmless=st.lists(HARMLESS, max_size=TRIES - 1), wrong=st.lists(WRONG, max_size=1),
       place=st.integers(0, TRIES))  # fmt: skip
@HERE
def test_whatever_fails_for_a_while_ends_well(server, patience, tmp_path, harmless, wrong, place):
    answers = (harmless[:place] + wrong + harmless[place:])[: TRIES - 1]
    fetch(afresh(server, tmp_path, answers), patience)
    assert only_the_file(tmp_path)


@given(answers=st.lists(HARMLESS | WRONG, max_size=25))
@HERE
def test_whatever_fails_the_file_is_right_or_absent(server, patience, tmp_path, answers):
    """And when the server has come to reason, the next command gets it."""
    file = afresh(server, tmp_path, answers)
    try:
        fetch(file, patience)
    except InputError:
        assert not file.path.exists()
        server.files["/f"].answers.clear()
        fetch(wanted(server, tmp_path), patience)
    assert only_the_file(tmp_path)
