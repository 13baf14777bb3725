"""Pulling: each kind of source, from a server on the loopback or a stand-in for the client library."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import gdown
import pytest
import torch
import weight_cases as cases
from weight_cases import CONTENT, SHA256, STATE, Server, http_source, sha256, weight_from

from kmdx import terminal, weights
from kmdx.errors import DownloadError, WeightsError
from kmdx.weights import Weight, download, pulling
from kmdx.weights.local import records
from kmdx.weights.registry import DriveSource, HttpSource, HubSource

server, alone, published = cases.server, cases.alone, cases.published


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
    assert lines[1] == f"htdemucs_ft_bass: {path} (sha256 {SHA256})"
    assert lines[2:] == [f"license of htdemucs_ft_bass: research only. {published.licence_note}"]


def test_a_download_without_a_published_checksum_is_announced(server: Server, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "state.pt")
    content = (tmp_path / "state.pt").read_bytes()
    server.files["/state.pt"] = content
    weight = weight_from(HttpSource(url=f"{server.url}/state.pt", file="pulled.pt"))
    lines: list[str] = []
    path = weights.pull(weight, tmp_path, lines.append)
    announced = f"no checksum is published; its sha256 is {sha256(content)}"
    assert lines[1] == f"htdemucs_ft_bass: {path} ({announced})"
    assert not weights.find(weight, tmp_path).known


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


def test_an_interrupted_pull_is_resumed_where_it_stopped(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    path = f"/{SHA256[:8]}.th"
    server.cut[path] = 1_500_000
    with pytest.raises(DownloadError, match=r"http://.*incomplete, received 1,500,000 of 2,097,152 bytes"):
        weights.pull(published, tmp_path)
    assert not (tmp_path / published.sources[0].file).exists()
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("GET", path, "bytes=1500000-")


def test_a_broken_connection_is_resumed_at_once(
    published: Weight, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LIMITS", download.DownloadLimits(retries=1, pause=0))
    server.cut[f"/{SHA256[:8]}.th"] = 1_000_000
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT
    assert [asked[2] for asked in server.asked] == [None, "bytes=1000000-"]


def test_a_server_without_ranges_restarts_the_download(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    server.ranges = False
    server.cut[f"/{SHA256[:8]}.th"] = 1_000_000
    with pytest.raises(DownloadError):
        weights.pull(published, tmp_path)
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT


def test_wrong_content_is_deleted_and_the_next_source_is_tried(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    server.files["/wrong.th"] = b"?" * len(CONTENT)
    wrong = dataclasses.replace(http_source(server), url=f"{server.url}/wrong.th")
    lines: list[str] = []
    path = weights.pull(weight_from(wrong, http_source(server)), tmp_path, lines.append)
    assert path.read_bytes() == CONTENT
    assert f"failed, wrong content: sha256 {sha256(b'?' * len(CONTENT))[:8]}…" in lines[1]


def test_only_weight_files_are_accepted_without_a_published_checksum(server: Server, tmp_path: Path) -> None:
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


def test_a_read_only_folder_is_reported_before_any_request(
    published: Weight, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="the models folder .* cannot be written to"):
        weights.pull(published, tmp_path / "file" / "models")
    assert server.asked == []


def test_a_full_disk_is_reported_before_the_download(
    published: Weight, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"needs 2 MB, but .* has only 1 MB free"):
        weights.pull(published, tmp_path)
    assert server.asked == []


def test_an_interrupt_leaves_only_a_part_to_resume(published: Weight, server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.pull(published, tmp_path, progress=interrupt)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".locks", ".partial"]
    assert weights.pull(published, tmp_path).read_bytes() == CONTENT
    assert (server.asked[-1][2] or "").startswith("bytes=")


def test_a_users_own_weight_is_not_pulled(tmp_path: Path) -> None:
    own = weights.own(tmp_path / "mine.pt", {"type": "hdemucs", "sources": ["vocals"]})
    with pytest.raises(DownloadError, match=r"mine\.pt is not published anywhere"):
        weights.pull(own, tmp_path)


def test_a_command_prints_the_steps_of_a_pull_and_draws_no_bar_if_that_is_not_a_terminal(
    published: Weight, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    terminal.run(lambda: weights.pull(published, tmp_path))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 3
    weights.pull(published, tmp_path)
    assert capsys.readouterr().err == "", "a program that uses the library sees nothing"


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


def test_a_file_that_cannot_be_written_is_reported(published: Weight, tmp_path: Path) -> None:
    source = dataclasses.replace(published.sources[0], file="sub/a.th")
    (tmp_path / "sub").write_text("")
    with pytest.raises(WeightsError, match=r"sub/a\.th cannot be written: "):
        weights.pull(weight_from(source), tmp_path)


def test_an_intact_weight_in_a_read_only_folder_is_not_an_error(
    published: Weight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights.pull(published, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "touch", None)
    monkeypatch.setattr(Path, "mkdir", None)
    assert weights.pull(published, tmp_path) == path
    assert sorted(tmp_path.rglob("*")) == before


def test_the_record_is_json_that_people_can_read(published: Weight, tmp_path: Path) -> None:
    path = weights.pull(published, tmp_path)
    (entry,) = json.loads((tmp_path / "pulled.json").read_text()).items()
    assert entry[0] == path.name
    assert entry[1]["source"].startswith("http://")


# ---- several weights


def ten() -> list[Weight]:
    """Ten weights, each with two sources that no server offers."""
    return [
        dataclasses.replace(
            weight,
            sources=(
                HttpSource(url="http://127.0.0.1:1/a", file=f"{weight.name}.a"),
                HttpSource(url="http://127.0.0.2:1/b", file=f"{weight.name}.b"),
                HttpSource(url="http://127.0.0.1:1/c", file=f"{weight.name}.c"),
            ),
        )
        for weight in list(weights.published().values())[:10]
    ]


def test_ten_weights_without_a_connection_are_a_one_line_error(server: Server, tmp_path: Path) -> None:
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
    assert lines[4] == f"{first}: not tried again, no connection to 127.0.0.1"
    assert lines[5:] == [f"{name}: not tried again, no connection to 127.0.0.1, 127.0.0.2" for name in others]


def test_failed_weights_are_named_and_the_others_are_pulled(
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
    third = dataclasses.replace(other, name="third", licence="none", licence_note="Ask the author.")
    lines: list[str] = []
    list(weights.pull_all([published, other, third], tmp_path, lines.append))
    assert [line for line in lines if line.startswith("license")] == [
        f"license of htdemucs_ft_bass, other: research only. {published.licence_note}",
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


def test_a_hub_file_with_a_published_checksum_is_pulled_at_its_revision(
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


def test_an_offline_hub_is_not_contacted(
    hub: Weight, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        weights.pull(hub, tmp_path)
    assert server.asked == []


def test_the_hubs_mirror_is_used(hub: Weight, server: Server, tmp_path: Path) -> None:
    """``$HF_ENDPOINT`` is read when the client is imported, so this needs its own process."""
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


def test_a_file_missing_on_the_hub_is_reported(hub: Weight, server: Server, tmp_path: Path) -> None:
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


def test_only_weight_files_are_accepted_from_the_drive(author: dict[str, bytes], tmp_path: Path) -> None:
    author["/demucs_other.ckpt"] = b"quota exceeded"
    with pytest.raises(DownloadError, match=r"the author's Google Drive folder .* is not a weight file"):
        weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_page_that_asks_for_confirmation_is_answered(author: dict[str, bytes], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    author["/there"] = buffer.getvalue()
    base = pulling.DRIVE
    form = f'<form id="download-form" action="{base}/there"><input type="hidden" name="id" value="1"></form>'
    author["/demucs_other.ckpt"] = f"<html>{form}</html>".encode()
    author["/there?id=1"] = buffer.getvalue()
    path = weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)
    assert path.read_bytes() == buffer.getvalue()


def test_the_page_that_refuses_a_download_is_named(author: dict[str, bytes], tmp_path: Path) -> None:
    author["/demucs_other.ckpt"] = b"<html><title>Google Drive - Quota exceeded</title></html>"
    with pytest.raises(DownloadError, match=r"sent a web page \('Google Drive - Quota exceeded'\)"):
        weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)


def test_a_file_of_the_drive_is_limited_by_what_the_weight_may_have(
    author: dict[str, bytes], tmp_path: Path
) -> None:
    author["/demucs_other.ckpt"] = CONTENT
    weight = dataclasses.replace(drive_weight("htdemucs_ft_bass"), estimated_bytes=1000)
    with pytest.raises(DownloadError, match=r"has a file of 2,097,152 bytes; at most 4,000 are accepted"):
        weights.pull(weight, tmp_path)


def test_a_file_missing_on_the_drive_is_reported(author: dict[str, bytes], tmp_path: Path) -> None:
    author["/readme.txt"] = b""
    with pytest.raises(DownloadError, match=r"no demucs_other\.ckpt among the 1 files there"):
        weights.pull(drive_weight("htdemucs_ft_bass"), tmp_path)
