"""One download: what servers may do, and how each case ends."""

from __future__ import annotations

import functools
import gzip
import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import raw_server
from raw_server import CONTENT, LENGTH, OK, SHA256, Handler, Server, answer, chunk, whole

from kmdx.weights.download import DownloadLimits, SourceError, Unreachable, check_redirect, download, head

server = raw_server.server
QUICK = DownloadLimits(retries=0, silence=20, answer=20)


def get(server: Server, folder: Path, **options: Any) -> str:
    stated = {"bytes": len(CONTENT), "sha256": SHA256, "limits": QUICK, **options}
    return download(server.url, folder / "file", lambda done, total: None, **stated)


def reason(server: Server, folder: Path, **options: Any) -> str:
    """Why a download failed; no file may count as finished or exceed the published size."""
    with pytest.raises(SourceError) as caught:
        get(server, folder, **options)
    assert not (folder / "file").exists()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= len(CONTENT) + 100
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


def left(folder: Path, part: bytes, version: str = "") -> None:
    """What an earlier download left."""
    (folder / "file.part").write_bytes(part)
    if version:
        (folder / "file.version").write_text(version)


# ---- valid answers


@pytest.mark.parametrize(
    "send",
    [
        whole,
        answer(OK, body=CONTENT),  # no length: the body ends with the connection
        answer(OK, "Transfer-Encoding: chunked", body=chunk(CONTENT[:7]) + chunk(CONTENT[7:]) + chunk(b"")),
        answer("HTTP/1.1 203 Non-Authoritative Information", LENGTH, body=CONTENT),
        answer(OK, "Content-Length: nonsense", body=CONTENT),
        answer(OK, LENGTH, "Content-Encoding: identity", "Content-Type: text/plain", body=CONTENT),
        answer(OK, LENGTH, body=CONTENT + b"more"),  # never read: the length is kept to
    ],
)
def test_a_file_comes_in_any_form_that_http_allows(send: Any, server: Server, tmp_path: Path) -> None:
    server.answer = send
    assert get(server, tmp_path) == SHA256
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_redirects_are_followed_without_sending_secrets_to_other_hosts(
    server: Server, tmp_path: Path
) -> None:
    def send(handler: Handler) -> None:
        if handler.path == "/file":
            handler.send("HTTP/1.1 302 Found", "Location: /here", "Content-Length: 0")
        elif handler.path == "/here":
            target = f"http://localhost:{server.server_port}/there"
            handler.send("HTTP/1.1 307 Temporary Redirect", f"Location: {target}", "Content-Length: 0")
        else:
            whole(handler)

    server.answer = send
    assert get(server, tmp_path, headers={"authorization": "Bearer secret"}) == SHA256
    assert [(path, "authorization" in headers) for _, path, headers in server.asked] == [
        ("/file", True),
        ("/here", True),
        ("/there", False),
    ]


def test_a_site_that_sets_a_cookie_and_redirects_to_itself_is_not_a_loop(
    server: Server, tmp_path: Path
) -> None:
    def send(handler: Handler) -> None:
        if "Cookie" in handler.headers:
            whole(handler)
        else:
            handler.send("HTTP/1.1 302 Found", "Location: /file", "Set-Cookie: seen=1", "Content-Length: 0")

    server.answer = send
    assert get(server, tmp_path) == SHA256


def test_a_complete_download_is_not_requested_again(server: Server, tmp_path: Path) -> None:
    left(tmp_path, CONTENT)
    assert get(server, tmp_path) == SHA256
    assert server.asked == []


# ---- too much, too slow, endless


def flood(*lines: str, pack: Callable[[bytes], bytes] = bytes) -> Callable[[Handler], None]:
    def send(handler: Handler) -> None:
        handler.send(*lines)
        for piece in itertools.repeat(bytes(65536), 2000):
            handler.wfile.write(pack(piece))

    return send


@pytest.mark.parametrize(
    "send",
    [flood(OK), flood(OK, "Transfer-Encoding: chunked", pack=chunk)],
    ids=["without length", "chunked"],
)
@pytest.mark.parametrize(
    "stated", [{}, {"bytes": None, "sha256": None, "largest": len(CONTENT)}], ids=["size", "no size"]
)
def test_an_endless_body_is_abandoned_at_the_published_size_or_at_the_limit(
    send: Any, stated: dict, server: Server, tmp_path: Path
) -> None:
    server.answer = send
    assert "sends more than the expected 307,200 bytes: gave up" in reason(server, tmp_path, **stated)
    assert list(tmp_path.iterdir()) == []


def test_an_endless_body_after_a_resume_is_abandoned(server: Server, tmp_path: Path) -> None:
    left(tmp_path, CONTENT[:1000])
    stated = f"Content-Range: bytes 1000-{len(CONTENT) - 1}/{len(CONTENT)}"
    server.answer = flood("HTTP/1.1 206 Partial Content", stated)
    assert "sends more than the expected 307,200 bytes" in reason(server, tmp_path)


@pytest.mark.parametrize("length", [len(CONTENT) + 50_000_000, len(CONTENT) + 1, len(CONTENT) - 1, 0, 10**15])
def test_another_length_than_the_published_one_is_refused_before_the_body(
    length: int, server: Server, tmp_path: Path
) -> None:
    server.answer = answer(OK, f"Content-Length: {length}", body=CONTENT)
    assert "instead of the published 307,200" in reason(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_length_beyond_the_limit_is_refused_if_none_is_published(server: Server, tmp_path: Path) -> None:
    problem = reason(server, tmp_path, bytes=None, sha256=None, largest=1000)
    assert "has a file of 307,200 bytes; at most 1,000 are accepted" in problem


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each wait takes 70 s."""
    monkeypatch.setattr("kmdx.weights.download._clock", functools.partial(next, itertools.count(step=70)))


@pytest.mark.usefixtures("slow")
def test_a_download_below_the_minimum_rate_over_a_window_is_too_slow(server: Server, tmp_path: Path) -> None:
    server.answer = answer(OK, LENGTH, body=b"x" * 60, hold=True)
    problem = reason(server, tmp_path)
    assert "too slow: 127.0.0.1 sent 60 bytes in 70 s; the minimum is 1000 bytes per second" in problem


@pytest.mark.usefixtures("slow")
def test_a_slow_download_above_the_minimum_rate_continues(server: Server, tmp_path: Path) -> None:
    limits = DownloadLimits(retries=0, slowest=0.01)
    assert get(server, tmp_path, limits=limits) == SHA256


@pytest.mark.usefixtures("slow")
def test_a_slow_web_page_is_abandoned_too(server: Server, tmp_path: Path) -> None:
    server.answer = answer(OK, "Content-Type: text/html", body=b"<html>", hold=True)
    assert "too slow" in reason(server, tmp_path)


def drip(*lines: str, end: str = "") -> Callable[[Handler], None]:
    """Lines at once, then an occasional byte that never completes a line."""

    def send(handler: Handler) -> None:
        handler.wfile.write(("\r\n".join(lines) + end).encode())
        while not handler.server.over.wait(0.02):
            handler.wfile.write(b"a")

    return send


@pytest.mark.parametrize(
    "send",
    [
        lambda handler: handler.hold(),
        drip("HTTP/1.1 200"),
        drip(OK, "X-Header: "),
        answer(OK, LENGTH, hold=True),
        drip(OK, "Transfer-Encoding: chunked", end="\r\n\r\n5; name="),
    ],
    ids=["no answer", "status without end", "header without end", "no body", "chunk size without end"],
)
def test_a_server_that_stays_silent_or_completes_nothing_is_abandoned(
    send: Any, server: Server, tmp_path: Path
) -> None:
    answers = []
    server.answer = lambda handler: answers.append(send) or send(handler)
    limits = DownloadLimits(retries=3, silence=0.2, answer=0.3)
    assert "127.0.0.1 sent nothing for 0." in reason(server, tmp_path, limits=limits)
    assert len(answers) == 1, "it was tried again, though nothing had come"


def test_endless_trailers_are_abandoned(server: Server, tmp_path: Path) -> None:
    def send(handler: Handler) -> None:
        handler.send(OK, "Transfer-Encoding: chunked", body=chunk(CONTENT) + b"0\r\n")
        while not handler.server.over.wait(0.02):
            handler.wfile.write(b"X-Trailer: more\r\n")

    server.answer = send
    limits = DownloadLimits(retries=0, silence=0.3, answer=20)
    assert "sent nothing for 0.3 s" in reason(server, tmp_path, limits=limits)


# ---- redirects


def redirect(*locations: str) -> Callable[[Handler], None]:
    numbers = itertools.count()

    def send(handler: Handler) -> None:
        number = next(numbers)
        target = locations[number % len(locations)].format(number)
        handler.send("HTTP/1.1 302 Found", f"Location: {target}", "Content-Length: 0")

    return send


@pytest.mark.parametrize(
    ("locations", "expected"),
    [
        (["/file"], "a redirect loop: 127.0.0.1 leads back"),
        (["/a", "/b"], "a redirect loop: 127.0.0.1 leads back"),
        (["/file?{}"], "a redirect loop: 127.0.0.1 leads back"),
        (["/{}"], "too many redirects: 127.0.0.1 leads from one address to the next (11 followed)"),
        (["file:///etc/passwd"], "127.0.0.1 redirects to a file address, which is refused"),
        (["ftp://127.0.0.1/file"], "127.0.0.1 redirects to a ftp address, which is refused"),
        (["data:text/plain,x"], "redirects to a data address, which is refused"),
        (["http://[::1/file"], "malformed address or response of http://127.0.0.1"),
        (["http://127.0.0.1:1/"], "no connection to 127.0.0.1 (Connection refused)"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_named(
    locations: list[str], expected: str, server: Server, tmp_path: Path
) -> None:
    server.answer = redirect(*locations)
    assert expected in reason(server, tmp_path)
    assert len(server.asked) <= 11


def test_a_redirect_from_https_to_http_is_refused() -> None:
    check_redirect("http://here/file", "https://there/file")
    with pytest.raises(SourceError, match="here redirects from https to http, which is refused"):
        check_redirect("https://here/file", "http://there/file")


# ---- something other than the file


@pytest.mark.parametrize(
    ("send", "expected"),
    [
        (answer("HTTP/1.1 404 Not Found", "Content-Length: 0"), "127.0.0.1: HTTP 404 Not Found"),
        (answer("HTTP/1.1 503 Busy\x07", "Content-Length: 0"), "127.0.0.1: HTTP 503 Busy"),
        (answer("HTTP/1.1 204 No Content"), "HTTP 204 No Content"),
        (answer("HTTP/1.1 302 Found", "Content-Length: 0"), "HTTP 302 Found"),
        (answer("HTTP/1.1 206 Partial Content", LENGTH, body=CONTENT), "HTTP 206 Partial Content"),
        (answer("HTTP/1.1 416 Range Not Satisfiable", "Content-Length: 0"), "HTTP 416"),
        (answer("SSH-2.0-OpenSSH_9.6"), "the connection to 127.0.0.1 broke"),
        (answer(), "the connection to 127.0.0.1 broke"),
        (
            answer(OK, "Content-Type: text/html; charset=utf-8", body=b"<title> Log in\nhere </title>"),
            "127.0.0.1 sent a web page ('Log in here') instead of the file",
        ),
        (answer(OK, "Content-Type: TEXT/HTML", LENGTH, body=CONTENT), "sent a web page instead of the file"),
        (answer(OK, LENGTH, body=b" \n<!DOCTYPE html>" + CONTENT), "sent a web page instead of the file"),
        (
            answer(OK, "Content-Encoding: gzip", body=gzip.compress(bytes(30_000_000))),
            "127.0.0.1 sent compressed content (gzip), not the plain bytes requested",
        ),
        (
            answer(OK, "Content-Encoding: br, gzip", LENGTH, body=CONTENT),
            "sent compressed content (br, gzip)",
        ),
        (answer(OK, LENGTH, body=CONTENT[:-1] + b"?"), "wrong content: sha256"),
        (answer(OK), "127.0.0.1 sent an empty file"),
        (
            answer(OK, LENGTH, body=CONTENT[:1000]),
            "incomplete, received 1,000 of 307,200 bytes: the connection to 127.0.0.1 broke",
        ),
        (answer(OK, body=CONTENT[:1000]), "incomplete, received 1,000 of 307,200 bytes"),
        (
            answer(OK, "Transfer-Encoding: chunked", body=chunk(CONTENT[:1000])),
            "incomplete, received 1,000 of 307,200 bytes",
        ),
        (answer(OK, "Content-Length: 5", "Content-Length: 6", body=CONTENT), "127.0.0.1"),
    ],
)
def test_a_response_other_than_the_file_ends_with_the_reason(
    send: Any, expected: str, server: Server, tmp_path: Path
) -> None:
    server.answer = send
    assert expected in reason(server, tmp_path)


def test_a_reset_is_named(server: Server, tmp_path: Path) -> None:
    def reset(handler: Handler) -> None:
        handler.send(OK, LENGTH, body=CONTENT[:1000])
        linger = b"\1\0\0\0\0\0\0\0"
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()

    server.answer = reset
    assert "broke" in reason(server, tmp_path)


def test_no_connection_names_the_host_and_why(server: Server, tmp_path: Path) -> None:
    for url, why in (
        ("http://127.0.0.1:1/file", r"127\.0\.0\.1 \(Connection refused\)"),
        ("http://no-such-host.invalid/file", r"no-such-host\.invalid \(its name was not found\)"),
    ):
        with pytest.raises(Unreachable, match=f"^no connection to {why}$"):
            download(url, tmp_path / "file", lambda done, total: None, limits=QUICK)
    for url in (server.url.replace("http", "https"), "nonsense", "file:///etc/passwd"):
        with pytest.raises(SourceError):
            download(url, tmp_path / "file", lambda done, total: None, limits=QUICK)


def test_a_proxy_that_refuses_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = answer("HTTP/1.1 407 Proxy Authentication Required", "Content-Length: 0")
    proxy = f"http://name:secret@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    for scheme, expected in (
        ("https", "no connection to files.invalid through the proxy .*407 Proxy Authentication Required"),
        ("http", "files.invalid: HTTP 407 Proxy Authentication Required"),
    ):
        with pytest.raises(SourceError, match=expected) as caught:
            download(f"{scheme}://files.invalid/x", tmp_path / "file", lambda done, total: None, limits=QUICK)
        assert "secret" not in str(caught.value)


def test_a_proxy_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    url = "http://files.invalid/file"
    assert download(url, tmp_path / "file", lambda done, total: None, limits=QUICK) == SHA256
    assert server.asked[0][1] == url


# ---- resuming


def test_a_broken_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    def send(handler: Handler) -> None:
        if len(server.asked) < 3:
            start = 1000 * (len(server.asked) - 1)
            status = "206 Partial Content" if start else "200 OK"
            stated = f"Content-Range: bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
            length = f"Content-Length: {len(CONTENT) - start}"
            handler.send(f"HTTP/1.1 {status}", stated, length, body=CONTENT[start : start + 1000])
        else:
            whole(handler)

    server.answer = send
    assert get(server, tmp_path, limits=DownloadLimits(retries=2, pause=0)) == SHA256
    assert [headers.get("Range") for _, _, headers in server.asked] == [None, "bytes=1000-", "bytes=2000-"]


def test_silence_in_the_middle_is_resumed_from(server: Server, tmp_path: Path) -> None:
    def send(handler: Handler) -> None:
        if len(server.asked) == 1:
            handler.send(OK, LENGTH, body=CONTENT[:1000])
            handler.hold()
        else:
            whole(handler)

    server.answer = send
    assert get(server, tmp_path, limits=DownloadLimits(retries=1, pause=0, silence=0.5, answer=20)) == SHA256


@pytest.mark.parametrize(
    "content_range",
    [
        "Content-Range: bytes 0-307199/307200",
        "Content-Range: bytes 999-307199/307200",
        "Content-Range: bytes 1000-5000/307200",
        "Content-Range: bytes 1000-307299/307300",
        "Content-Range: nonsense",
        "X-No-Range: here",
    ],
)
def test_a_wrong_range_restarts_the_download(content_range: str, server: Server, tmp_path: Path) -> None:
    def send(handler: Handler) -> None:
        if "Range" in handler.headers:
            length = f"Content-Length: {len(CONTENT) - 1000}"
            handler.send("HTTP/1.1 206 Partial Content", content_range, length, body=CONTENT[1000:])
        else:
            whole(handler)

    server.answer = send
    left(tmp_path, CONTENT[:1000])
    assert get(server, tmp_path) == SHA256
    assert len(server.asked) == 2


def test_a_server_without_ranges_sends_it_whole_again(server: Server, tmp_path: Path) -> None:
    server.answer = answer(OK, LENGTH, body=CONTENT)
    left(tmp_path, b"?" * 1000)
    assert get(server, tmp_path) == SHA256
    assert len(server.asked) == 1


def test_an_unavailable_range_restarts_the_download(server: Server, tmp_path: Path) -> None:
    def send(handler: Handler) -> None:
        if "Range" in handler.headers:
            handler.send("HTTP/1.1 416 Range Not Satisfiable", "Content-Length: 0")
        else:
            whole(handler)

    server.answer = send
    left(tmp_path, CONTENT[:1000])
    assert get(server, tmp_path) == SHA256


def test_a_part_that_is_wrong_or_too_long_is_not_kept(server: Server, tmp_path: Path) -> None:
    for part in (b"?" * 1000, b"?" * len(CONTENT), CONTENT + b"?"):
        (tmp_path / "file").unlink(missing_ok=True)
        left(tmp_path, part)
        assert get(server, tmp_path) == SHA256


def test_an_error_leaves_the_part_to_resume_from(server: Server, tmp_path: Path) -> None:
    left(tmp_path, CONTENT[:1000])
    server.answer = answer("HTTP/1.1 503 Service Unavailable", "Content-Length: 0")
    reason(server, tmp_path)
    server.answer = answer(OK, "Content-Type: text/html", body=b"<html>Welcome to our network")
    reason(server, tmp_path)
    server.answer = whole
    assert get(server, tmp_path) == SHA256
    assert server.asked[-1][2]["Range"] == "bytes=1000-"


def test_without_a_checksum_only_the_same_version_is_resumed(server: Server, tmp_path: Path) -> None:
    left(tmp_path, b"?" * 1000)
    get(server, tmp_path, sha256=None)
    assert "Range" not in server.asked[-1][2], "nothing shows that the part belongs to the file"
    (tmp_path / "file").unlink()
    left(tmp_path, CONTENT[:1000], '"v1"')
    assert get(server, tmp_path, sha256=None) == SHA256
    assert server.asked[-1][2]["If-Range"] == '"v1"'
    assert server.asked[-1][2]["Range"] == "bytes=1000-"


def test_the_version_that_a_server_states_is_kept_with_the_part(server: Server, tmp_path: Path) -> None:
    for header, kept in (
        ('ETag: "v1"', '"v1"'),
        ('ETag: W/"weak"', ""),
        ("Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT", "Thu, 01 Jan 2026 00:00:00 GMT"),
    ):
        server.answer = answer(OK, LENGTH, header, body=CONTENT[:1000])
        reason(server, tmp_path)
        assert (tmp_path / "file.version").read_text() == kept
        (tmp_path / "file.part").unlink()


def test_headers_alone_are_not_followed_to_another_host(server: Server) -> None:
    target = "http://elsewhere.invalid/file"
    server.answer = answer(
        "HTTP/1.1 302 Found", f"Location: {target}", "X-Linked-Size: 5", "Content-Length: 0"
    )
    assert head(server.url, {}, QUICK)["x-linked-size"] == "5"
    server.answer = answer("HTTP/1.1 401 Unauthorized", "Content-Length: 0")
    with pytest.raises(SourceError, match="HTTP 401 Unauthorized"):
        head(server.url, {}, QUICK)
