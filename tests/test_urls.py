"""Files at URLs: what a text means, what is shown of it, and every way in which a transfer ends."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import object_store
import pytest
import raw_server
from object_store import Store
from raw_server import CONTENT, LENGTH, OK, Handler, Server, answer

from kmdx import manifest, urls
from kmdx.errors import DocumentError
from kmdx.urls import Facts, Url, UrlError
from kmdx.weights import download

server, running, store = raw_server.server, object_store.running, object_store.store


@pytest.mark.parametrize("text", ["song.wav", "a/b", "C:\\a", "s3:/a/b", "://a", ""])
def test_a_text_without_a_scheme_is_a_path(text: str) -> None:
    assert urls.parse(text) == Path(text)


def test_a_local_file_with_the_name_of_a_url_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:/music").mkdir(parents=True)
    Path("s3:/music/a.wav").touch()
    assert urls.parse("s3://music/a.wav") == Path("s3:/music/a.wav")
    assert urls.parse("s3://music/b.wav") == Url("s3://music/b.wav")


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    assert urls.parse(f"file://{tmp_path}/a%20song.wav") == tmp_path / "a song.wav"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://music/a b.wav", "s3://music/a b.wav"),
        ("sftp://me:secret@host/a.wav", "sftp://host/a.wav"),
        ("abfs://container@account/a.wav", "abfs://container@account/a.wav"),
        ("hf://datasets/user/songs@main/a.wav", "hf://datasets/user/songs@main/a.wav"),
        ("https://secret@host/a.wav", "https://host/a.wav"),
        ("https://me:secret@host/a.wav?X-Signature=secret", "https://host/a.wav?…e2e41220"),
        ("https://no host/a.wav?key=(a)secret", "https://no host/a.wav?…2a194de1"),
    ],
)
def test_a_url_is_shown_without_secrets(text: str, shown: str) -> None:
    assert str(Url(text)) == shown
    assert "secret" not in repr(Url(text))
    assert "secret" not in urls.without_secrets(f"cannot open '{text}': no")


def test_a_url_has_a_place_like_a_path() -> None:
    assert Url("https://me:b@host/my%20songs/a.wav?x=1").location == PurePosixPath("/host/my songs/a.wav")
    assert Url("s3://music/what?.wav").location == PurePosixPath("/music/what?.wav")
    assert Url("s3://music/plans/a.yaml").parent / "../weights/a b.pt" == Url("s3://music/weights/a b.pt")
    assert Url("https://host/plans/a.yaml?x=1").parent / "a b.pt" == Url("https://host/plans/a%20b.pt")


def test_fsspec_is_imported_only_for_a_url_that_needs_it() -> None:
    code = (
        "import sys; from kmdx import inputs, plan_file; from pathlib import Path\n"
        "inputs.collect(['no.wav', 'https://127.0.0.1/a.wav'], Path('out')); plan_file.load('mini')\n"
        "assert not {'fsspec', 'requests', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- an object store


def test_a_file_is_stored_listed_fetched_and_removed(store: Store, tmp_path: Path) -> None:
    content = os.urandom(2 * urls.BLOCK + 5)
    (tmp_path / "a").write_bytes(content)
    url = Url("s3://music/x/a.wav")
    urls.store(tmp_path / "a", url)
    (listed,) = urls.below(Url("s3://music/x")).values()
    assert listed == url
    assert listed.facts is not None
    assert listed.facts.size == len(content)
    assert urls.matches(url) == [(url, False)]
    assert urls.matches(url)[0][0].facts == listed.facts
    assert urls.matches(Url("s3://music/x/")) == [(Url("s3://music/x/"), True)]
    assert urls.matches(Url("s3://music/*/a.*")) == [(url, False)]
    with urls.local(url) as path:
        assert path.read_bytes() == content
        assert path.suffix == ".wav"
    assert not path.exists()
    urls.remove([url, url])
    assert urls.below(Url("s3://music/x")) == {}


@pytest.mark.parametrize("name", ["a [1] {b}", "*", "?", "d%20e#f+g&h", "e\u0301 é", "back\\slash", "~ '\""])
def test_a_name_in_a_store_is_never_a_pattern(store: Store, tmp_path: Path, name: str) -> None:
    url = Url("s3://music/x") / name
    for file, content in ((url, name), (Url("s3://music/x/1"), "other")):
        (tmp_path / "a").write_text(content, "utf-8")
        urls.store(tmp_path / "a", file)
    listed = urls.below(Url("s3://music/x"))
    assert dict(urls.read_small([listed[name]])) == {url: name.encode()}
    assert urls.matches(url) == [(url, False)]
    urls.fetch(url, tmp_path / "b")
    assert (tmp_path / "b").read_text("utf-8") == name
    urls.remove([url])
    assert [*urls.below(Url("s3://music/x"))] == ["1"]


def test_a_file_is_new_when_its_content_changes_and_only_then(store: Store) -> None:
    song = Url("s3://music/a.wav")

    def version() -> tuple[int, int, int]:
        return urls.matches(song)[0][0].stat()

    store.files.pipe_file("music/a.wav", b"one")
    first = version()
    assert version() == first
    store.files.pipe_file("music/a.wav", b"two")
    assert version() != first


def reason(url: str) -> str:
    """Why a URL cannot be fetched; nothing of it is left in the scratch folder."""
    with pytest.raises(UrlError) as caught, urls.local(Url(url)):
        pass
    assert [*urls.scratch().glob("tmp*")] == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_with_an_object_is_one_line(store: Store) -> None:
    missing = "no such file, folder or bucket"
    assert reason("s3://music/a.wav") == f"s3://music/a.wav: {missing}"
    assert reason("s3://nothing/a.wav") == f"s3://nothing/a.wav: {missing}"
    store.fault = store.denies
    denied = "access denied; check the credentials in the environment"
    assert reason("s3://music/a.wav") == f"s3://music/a.wav: {denied}"
    with pytest.raises(UrlError, match=rf"^s3://music/a.wav: {denied}$"):
        urls.store(Path(__file__), Url("s3://music/a.wav"))
    assert Url("s3://music/a.wav").fault() == f"s3://music/a.wav: {denied}"


def test_a_missing_backend_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert reason("gs://a/b.wav") == "gs://a/b.wav: gcsfs is missing; install it with: pip install gcsfs"
    assert reason("foo://a/b.wav") == "foo://a/b.wav: protocol not known: foo"
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert "pip install 'kmdx-net[urls]'" in reason("gs://a/b.wav")


def test_a_read_that_is_cut_once_is_repeated(store: Store) -> None:
    store.files.pipe_file("music/a.wav", CONTENT)
    store.fault = store.cuts(1)
    with urls.local(Url("s3://music/a.wav")) as path:
        assert path.read_bytes() == CONTENT


def test_a_read_that_is_always_cut_fails(store: Store) -> None:
    store.files.pipe_file("music/a.wav", CONTENT)
    store.fault = store.cuts(1000)
    assert reason("s3://music/a.wav").startswith("s3://music/a.wav: the connection failed (")


def test_a_store_that_sends_nothing_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.files.pipe_file("music/a.wav", CONTENT)
    store.fault = store.holds
    monkeypatch.setattr(download, "LIMITS", replace(download.LIMITS, answer=0.5))
    assert reason("s3://music/a.wav") == "s3://music/a.wav: the server sent nothing for 0.5 s"


def test_a_file_that_changes_while_it_is_read_is_refused(store: Store) -> None:
    store.files.pipe_file("music/a.wav", CONTENT)
    seen = iter([b"other", None])

    def changes(request: object_store.Request, start: object_store.Start) -> None:
        if request["REQUEST_METHOD"] == "GET" and (content := next(seen, None)):
            store.files.pipe_file("music/a.wav", content * (len(CONTENT) // 5))

    store.fault = changes
    assert reason("s3://music/a.wav").endswith("no longer exists")


# ---- web servers


@pytest.mark.parametrize(
    ("send", "why"),
    [
        (answer("HTTP/1.1 404 Not Found"), "127.0.0.1: HTTP 404 Not Found"),
        (answer("HTTP/1.1 403 Forbidden"), "127.0.0.1: HTTP 403 Forbidden"),
        (answer(OK, LENGTH, body=CONTENT[:-1]), "incomplete, received 307,199 of 307,200 bytes"),
        (answer(OK, LENGTH, body=CONTENT[:-1], hold=True), "127.0.0.1 sent nothing for 0.5 s"),
        (answer(OK, "Content-Type: text/html", body=b"<html>"), "sent a web page"),
    ],
)
def test_what_is_wrong_with_a_web_server_is_one_line_without_secrets(
    server: Server, monkeypatch: pytest.MonkeyPatch, send: Callable[[Handler], None], why: str
) -> None:
    limits = replace(download.LIMITS, answer=20, silence=0.5, retries=0)
    monkeypatch.setattr(download, "LIMITS", limits)
    server.answer = send
    url = server.url.replace("://", "://me:secret@") + ".wav?token=secret"
    line = reason(url)
    assert line.startswith(f"{server.url}.wav?…")
    assert why in line
    assert "secret" not in line


@pytest.mark.parametrize(
    "address", ["http://[::1/a?secret", "http://no host/a?(b)secret", "https://h:99999/?secret"]
)
def test_a_malformed_address_is_one_line_without_secrets(address: str) -> None:
    text = reason(address)
    assert text.startswith(f"{Url(address)}: ")
    assert "secret" not in text
    Url(address).fault()


def test_a_login_in_a_web_address_is_sent_to_its_server(server: Server) -> None:
    with urls.local(Url(server.url.replace("://", "://me:my%20word@"))) as path:
        assert path.read_bytes() == CONTENT
    login = base64.b64encode(b"me:my word").decode()
    assert {headers["Authorization"] for _, _, headers in server.asked} == {f"Basic {login}"}


def test_a_file_of_unknown_version_is_recognized_by_its_content(server: Server) -> None:
    server.answer = answer(OK, body=CONTENT)
    song = Url(server.url)
    with urls.local(song) as path:
        found = manifest.identify(song, path)
    assert (found.path, found.bytes) == (server.url, len(CONTENT))
    assert found.is_content_of(song)
    server.answer = answer(OK, body=CONTENT[::-1])
    assert not found.is_content_of(song)


def test_a_file_of_known_version_is_recognized_without_fetching_it(server: Server) -> None:
    song = Url(f"{server.url}?id=3")
    with urls.local(song) as path:
        found = manifest.identify(song, path)
    server.asked.clear()
    assert found.is_content_of(song)
    assert server.asked == []
    assert not found.is_at(Url(f"{server.url}?id=4"))


def test_a_file_larger_than_accepted_is_refused(server: Server, store: Store) -> None:
    store.files.pipe_file("music/plan.yaml", b"#" * 2**21)
    for url in (Url(server.url), Url("s3://music/plan.yaml")):
        server.answer = answer(OK, f"Content-Length: {2**21}", body=b"#" * 2**21)
        with pytest.raises(UrlError, match="at most 1,048,576 are accepted"):
            urls.read_text(url)
    store.files.pipe_file("music/plan.yaml", b"\xff\xfe")
    with pytest.raises(DocumentError):
        urls.read_text(Url("s3://music/plan.yaml"))


def test_scratch_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    code = "from kmdx import urls; print(urls.scratch()); {}"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def scratch(end: str) -> Path:
        command = [sys.executable, "-c", code.format(end)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return Path(done.stdout.strip())

    killed = scratch("import os, sys, signal; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.is_dir()
    ended = scratch("")
    assert not killed.exists()
    assert not ended.exists()


def test_facts_of_a_listing_are_not_part_of_a_url() -> None:
    assert Url("s3://a/b", Facts(1, "x")) == Url("s3://a/b")
