"""Requests to the web app that are hostile or mistaken: each gets one clear answer, and leaves nothing."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import web_cases
from web_cases import Site, encoded, serving, sound

from kmdx.web.jobs import MAX_TITLE, Limits, title_of

models = web_cases.models
TOKEN = "a token of some length"
LIMITS = Limits(size=3_000_000, length=20.0, queue=4, patience=0.5)
ID = "0" * 24


@pytest.fixture(scope="module")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("jobs"), LIMITS, works=False) as made:
        yield made


@pytest.fixture(scope="module")
def private(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server that needs a token."""
    with serving(tmp_path_factory.mktemp("private"), LIMITS, TOKEN, works=False) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(site: Site) -> Iterator[None]:
    """Nothing is left of a request that is refused."""
    yield
    for job in site.queue.all():
        site.queue.delete(job.id)
    assert site.left() == []


def detail(reply: Any) -> str:
    text = reply.json()["detail"]
    assert "\n" not in text
    assert str(Path.home()) not in text
    return text


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot"),
        ("C:\\Music\\song.mp3", "song"),
        ("/", "song"),
        ("..", "song"),
        (".mp3", "mp3"),
        ("a\0b.wav", "a b"),
        ("a\r\nSet-Cookie: x.wav", "a Set-Cookie: x"),
        ("evil\u202egpj.wav", "evilgpj"),
        ("\u2066x\u2069\u200f.wav", "x"),
        ("a" * 300 + ".wav", "a" * MAX_TITLE),
        ("<img src=x onerror=alert(1)>.wav", "<img src=x onerror=alert(1)>"),
        ("Mr. Blue Sky.flac", "Mr. Blue Sky"),
        ("no. 5 in d. minor", "no. 5 in d. minor"),
        ("\ud800.wav", "?"),
        ("   ", "song"),
        ("CON.wav", "CON"),
    ],
)
def test_a_strangers_file_name_is_only_a_title(site: Site, name: str, title: str) -> None:
    assert title_of(name) == title
    job = site.queue.add(io.BytesIO(sound()), name, web_cases.app._wish("small", "", "wav16"))
    assert job.title == title
    assert site.left() == [job.id]


def test_a_title_keeps_its_quotes_in_the_interface(site: Site) -> None:
    name = 'it\'s "<b>quoted" & 歌 \u202e.wav'
    job = site.submit(sound(), name).json()
    assert job["title"] == 'it\'s "<b>quoted" & 歌'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "song"),
        (b"This is not music.\n" * 50, "song"),
        (bytes(10_000), "song"),
        (b"RIFF\xff\xff\xff\x7fWAVEfmt ", "song"),
        (b"PK\x03\x04" + bytes(500), "song"),
        (b"<?xml version='1.0'?><svg/>", "song"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "song"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "song"),
        (sound(21, rate=8000), "longer than 0.333 minutes"),
        (sound(0.00003), "song"),
    ],
)
def test_what_is_not_a_song_of_at_most_the_longest_length_is_refused(
    site: Site, content: bytes, message: str
) -> None:
    reply = site.submit(content, "song.mp3")
    assert reply.status_code == 422
    assert message in detail(reply)


def test_a_small_file_with_an_hour_of_silence_is_refused(site: Site) -> None:
    hour = encoded(np.zeros((8000 * 3600, 1), np.int16), "FLAC", 8000)
    assert len(hour) < LIMITS.size
    reply = site.submit(hour, "silence.flac")
    assert reply.status_code == 422
    assert "longer than" in detail(reply)


def test_a_file_at_one_hertz_is_too_long(site: Site) -> None:
    slow = bytearray(sound(0.1))
    slow[24:28] = (1).to_bytes(4, "little")
    assert "longer than" in detail(site.submit(bytes(slow)))


def test_uploads_that_are_too_large_are_refused_however_they_are_sent(site: Site) -> None:
    large = bytes(LIMITS.size + 100_000)
    reply = site.submit(large)
    assert reply.status_code == 413
    assert "larger than 3 MB" in detail(reply)
    slightly = bytes(LIMITS.size + 1)
    assert site.submit(slightly).status_code == 413


def raw(site: Site, head: str, *body: bytes, waits: float = 10.0, ends: bool = False) -> bytes:
    """Send bytes as they are; return the answer."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=waits) as connection:
        lines = [*head.strip().splitlines(), f"Host: {host}:{port}", "", ""]
        found = b""
        try:
            connection.sendall("\r\n".join(lines).encode() + b"".join(body[:1]))
            for each in body[1:]:
                connection.sendall(each)
        except ConnectionError:  # the server has answered, and does not read on
            pass
        if ends:
            return b""
        try:
            while block := connection.recv(65536):
                found += block
        except (ConnectionError, TimeoutError):
            pass
        return found


MULTIPART = "Content-Type: multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="song"; filename="a.wav"\r\n\r\n'


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_a_chunked_body_that_exceeds_the_limit_is_refused(site: Site) -> None:
    blocks = [chunk(PART), *[chunk(bytes(100_000))] * 60]
    found = raw(
        site, f"POST /api/jobs HTTP/1.1\nTransfer-Encoding: chunked\nConnection: close\n{MULTIPART}", *blocks
    )
    assert found.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_stops_is_not_waited_for(site: Site) -> None:
    head = f"POST /api/jobs HTTP/1.1\nContent-Length: 5000\nConnection: close\n{MULTIPART}"
    assert raw(site, head, PART, b"half").startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("length", ["10", "99999999999999999999999999", "-1", "abc", "0x10"])
def test_a_body_whose_length_is_a_lie_is_refused(site: Site, length: str) -> None:
    head = f"POST /api/jobs HTTP/1.1\nContent-Length: {length}\nConnection: close\n{MULTIPART}"
    status = int(raw(site, head, PART + b"sound\r\n--x--\r\n").split()[1])
    assert status in (400, 413, 422)


def test_nothing_is_left_of_an_upload_whose_sender_leaves(site: Site) -> None:
    head = f"POST /api/jobs HTTP/1.1\nContent-Length: 2000000\n{MULTIPART}"
    for _ in range(LIMITS.queue):
        raw(site, head, PART, bytes(100_000), ends=True)
    for _ in range(100):
        if site.queue._reserved == 0:
            break
        time.sleep(0.05)
    assert site.submit(sound()).status_code == 201


def test_the_queue_is_limited_before_an_upload_is_read(site: Site) -> None:
    for _ in range(LIMITS.queue):
        assert site.submit(sound()).status_code == 201
    reply = site.submit(sound())
    assert reply.status_code == 429
    assert "queue is full (4 songs waiting)" in detail(reply)
    assert reply.headers["retry-after"]
    head = f"POST /api/jobs HTTP/1.1\nContent-Length: 2000000\nConnection: close\n{MULTIPART}"
    assert raw(site, head).startswith(b"HTTP/1.1 429 ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ensemble": "nope"}, "unknown ensemble 'nope'"),
        ({"ensemble": "minni"}, "did you mean 'mini'"),
        ({"ensemble": "/etc/passwd.yaml"}, "unknown ensemble"),
        ({"ensemble": "https://example.org/plan.yaml"}, "unknown ensemble"),
        ({"ensemble": "../small"}, "unknown ensemble"),
        ({"stems": "vocal"}, "did you mean 'vocals'"),
        ({"stems": "../x"}, "unknown stem"),
        ({"format": "exe"}, "unknown format 'exe'"),
        ({"stems": "x" * 5000}, ""),
    ],
)
def test_wishes_that_the_server_does_not_offer_are_refused(
    site: Site, fields: dict[str, str], message: str
) -> None:
    reply = site.submit(sound(), **fields)
    assert reply.status_code in (400, 422)
    assert message in detail(reply)


@pytest.mark.parametrize(
    "options",
    [
        {"json": {"song": "x"}},
        {"data": b"\xff\xfe", "headers": {"content-type": "multipart/form-data"}},
        {"data": b"--x", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"data": {"song": "text"}},
        {"files": [("song", ("a.wav", b"1")), ("song", ("b.wav", b"2"))]},
        {"files": {"song": ("a.wav", b"1")}, "data": {f"field{number}": "x" for number in range(100)}},
        {"data": b"sound", "headers": {"content-type": "audio/wav"}},
    ],
)
def test_bodies_that_are_not_a_form_with_one_song_are_refused(site: Site, options: dict[str, Any]) -> None:
    reply = site("POST", "/api/jobs", **options)
    assert reply.status_code in (400, 422)
    detail(reply)


@pytest.mark.parametrize(
    "path",
    [
        f"/api/jobs/{ID}",
        f"/api/jobs/{ID}/zip",
        f"/api/jobs/{ID}/stems/vocals",
        "/static/../app.py",
        "/static/%2e%2e%2fapp.py",
        "/static/app.py",
        "/nope",
    ],
)
def test_what_does_not_exist_is_not_found(site: Site, path: str) -> None:
    assert site("GET", path).status_code == 404


@pytest.mark.parametrize("id", ["..", "%2e%2e%2f", "x", "A" * 24, ID + "0"])
def test_ids_are_never_paths(site: Site, id: str) -> None:
    assert site("DELETE", f"/api/jobs/{id}").status_code in (404, 405, 422)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "a@127.0.0.1", "[::1"])
def test_a_request_for_another_host_is_refused_on_this_machine(site: Site, host: str) -> None:
    assert site("GET", "/api/jobs", headers={"host": host}).status_code in (400, 403)


def test_own_names_are_accepted(site: Site) -> None:
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000"):
        assert site("GET", "/api/jobs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://[evil"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_site_cannot_submit_or_delete(site: Site, headers: dict[str, str]) -> None:
    job = site.submit(sound()).json()
    assert site("POST", "/api/jobs", files={"song": sound()}, headers=headers).status_code == 403
    assert site("DELETE", f"/api/jobs/{job['id']}", headers=headers).status_code == 403
    assert len(site.queue.all()) == 1


def test_the_own_page_may_submit(site: Site) -> None:
    headers = {"origin": site.url, "sec-fetch-site": "same-origin"}
    reply = site(
        "POST", "/api/jobs", files={"song": ("a.wav", sound())}, data={"ensemble": "small"}, headers=headers
    )
    assert reply.status_code == 201


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff"]
)
def test_without_the_token_nothing_is_answered(private: Site, given: str) -> None:
    headers = {"authorization": given.encode("latin-1")}
    for method, path in (
        ("GET", "/api/jobs"),
        ("GET", "/api/openapi.json"),
        ("DELETE", f"/api/jobs/{ID}"),
        ("POST", "/api/jobs"),
    ):
        reply = private(method, path, headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
    assert private("GET", "/", headers=headers).status_code == 200


def test_the_token_is_given_by_header_or_by_cookie(private: Site) -> None:
    assert private("GET", "/api/jobs", headers={"host": "music.example"}).status_code == 200
    del private.session.headers["authorization"]
    assert private("POST", "/api/login", json={"token": "wrong"}).status_code == 401
    assert private("GET", "/api/jobs").status_code == 401
    reply = private("POST", "/api/login", json={"token": TOKEN})
    assert reply.status_code == 204
    assert "HttpOnly" in reply.headers["set-cookie"]
    assert "samesite=strict" in reply.headers["set-cookie"].lower()
    assert private("GET", "/api/jobs").status_code == 200


def test_every_answer_forbids_what_the_page_does_not_need(site: Site) -> None:
    for path in ("/", "/api/jobs", "/nope", "/static/app.js"):
        headers = site("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "unsafe" not in headers["content-security-policy"]
    assert (
        "unsafe" not in site("GET", "/", headers={"host": "evil.example"}).headers["content-security-policy"]
    )


def test_a_large_body_of_another_request_is_refused(site: Site) -> None:
    reply = site("POST", "/api/login", data=b" " * 100_000, headers={"content-type": "application/json"})
    assert reply.status_code == 413


def test_messages_are_json_whatever_is_sent(site: Site) -> None:
    found = raw(
        site,
        "POST /api/login HTTP/1.1\nContent-Type: application/json\nContent-Length: 9\nConnection: close",
        b'{"token":',
    )
    assert json.loads(found.partition(b"\r\n\r\n")[2])["detail"]
