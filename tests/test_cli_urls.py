"""``kmdx separate`` with songs, plans, weights and stems at URLs."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cli_cases
import object_store
import pytest
import raw_server
import soundfile
import yaml
from cli_cases import Run, files_in, write
from conftest import noise
from object_store import Store
from raw_server import Handler, Server

from kmdx import Separator, plan_file, urls

run, separate = cli_cases.run, cli_cases.separate
server, running, store = raw_server.server, object_store.running, object_store.store
OUT = "s3://music/out"


@pytest.fixture
def album(store: Store, tmp_path: Path) -> Path:
    """An album, on disk and in the store."""
    for number, name in enumerate(("a.wav", "CD1/b.flac", "song/mixture.wav", "song/vocals.wav")):
        write(tmp_path / "album" / name, noise(5_000, seed=number))
    store.files.put(str(tmp_path / "album"), "music/album", recursive=True)
    return tmp_path / "album"


def to(run: Run, small: Path) -> Run:
    """``kmdx separate`` with the small ensemble, and an output of one's own."""
    return lambda *arguments: run("separate", *arguments, "--ensemble", small, "--device", "cpu")


def at_rest(store: Store) -> None:
    """Nothing but songs, stems and records is in the store, and nothing in the scratch folder."""
    assert not [name for name in store.files.find("music") if "partial" in name or ".bak" in name]
    assert not [*urls.scratch().glob("tmp*")]
    assert not [path for path in urls.scratch().rglob("*.wav") if path.stat().st_blocks]


@pytest.mark.parametrize("options", [[], ["--stems", "vocals", "--format", "flac"]])
def test_an_album_in_a_store_is_separated_as_on_disk_and_skipped_when_repeated(
    run: Run, small: Path, store: Store, album: Path, tmp_path: Path, options: list[str]
) -> None:
    command = to(run, small)
    local = command("album", "-o", "out", *options)
    remote = command("s3://music/album", "-o", OUT, "--log-json", "log", *options)
    assert (local.code, remote.code) == (0, 0), remote.err
    assert remote.out == local.out.replace("album/", "s3://music/album/").replace("→ out", f"→ {OUT}")
    content = store.content("music/out")
    assert sorted(content) == files_in(tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == content[name] for name in content)
    at_rest(store)
    store.asked.clear()
    again = command("s3://music/album", "-o", OUT, "--log-json", "log", *options)
    assert (again.code, again.out) == (0, "")
    assert again.err.count("use --overwrite to separate it again") == 3
    assert not [line for line in store.asked if line.startswith("GET") and line.endswith((".wav", ".flac"))]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text("utf-8").splitlines()]
    assert [line["status"] for line in lines] == ["separated"] * 3 + ["finished before"] * 3
    assert {line["folder"] for line in lines} == {f"{OUT}/a", f"{OUT}/CD1/b", f"{OUT}/song"}


def test_songs_in_a_store_can_be_separated_next_to_themselves(run: Run, small: Path, store: Store) -> None:
    file = io.BytesIO()
    soundfile.write(file, noise(5_000), 44100, format="wav")
    store.files.pipe_file("music/album/a.wav", file.getvalue())
    command = to(run, small)
    for output in ("s3://music/album", "s3://music/album/stems"):
        assert command("s3://music/album", "-o", output, "--stems", "vocals").code == 0
        again = command("s3://music/album", "-o", output, "--stems", "vocals")
        assert (again.code, again.out, again.err.count("already in")) == (0, "", 1)


def test_a_changed_song_or_setting_is_a_conflict_until_it_is_overwritten(
    run: Run, small: Path, store: Store, album: Path
) -> None:
    command = to(run, small)
    song = ("s3://music/album/a.wav", "-o", OUT, "--stems", "vocals")
    assert command(*song).code == 0
    (line,) = command(*song, "--speed", "fast").errors
    assert f"{OUT}/a has stems made with different settings (vocals.wav: " in line
    assert "speed leaderboard, not fast" in line
    store.files.cp_file("music/album/song/mixture.wav", "music/album/a.wav")
    (line,) = command(*song).errors
    assert f"{OUT}/a has stems made with different settings (vocals.wav: another song" in line
    first = store.content("music/out")
    assert command(*song, "--overwrite").code == 0
    assert store.content("music/out").keys() == first.keys()
    assert store.content("music/out") != first
    at_rest(store)


def test_each_problem_is_one_line_and_other_songs_are_separated(
    run: Run, small: Path, store: Store, album: Path
) -> None:
    store.files.pipe_file("music/bad.wav", b"no sound")
    store.files.pipe_file("music/empty/readme.txt", b"x")
    songs = ["s3://music/no.wav", "s3://music/bad.wav", "s3://music/empty", "foo://x/a.wav", "s3://music/album/a.wav"]  # fmt: skip
    result = to(run, small)(*songs, "-o", OUT, "--stems", "vocals")
    assert result.code == 1
    assert result.errors == [
        "error: s3://music/no.wav: no such file, folder or bucket",
        "error: s3://music/empty: no songs there",
        "error: foo://x/a.wav: protocol not known: foo",
        next(
            line for line in result.errors if line.startswith("error: s3://music/bad.wav: not a sound file")
        ),
    ]
    assert [*store.content("music/out")] == ["a/vocals.wav"]
    at_rest(store)


def test_an_output_that_cannot_be_written_is_reported_before_any_work(
    run: Run, small: Path, store: Store, album: Path
) -> None:
    def read_only(request: object_store.Request, start: object_store.Start) -> object:
        return store.denies(request, start) if request["REQUEST_METHOD"] == "PUT" else None

    store.fault = read_only  # type: ignore[assignment]
    result = to(run, small)("album/a.wav", "-o", OUT)
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {OUT}: access denied; check the credentials in the environment\n"


def test_a_song_from_a_web_server_is_separated_as_from_disk(
    run: Run, small: Path, album: Path, server: Server, tmp_path: Path
) -> None:
    content = (album / "a.wav").read_bytes()

    def send(handler: Handler) -> None:
        if "a.wav" in handler.path:
            handler.send("HTTP/1.1 200 OK", f"Content-Length: {len(content)}", 'ETag: "1"', body=content)
        else:
            handler.send("HTTP/1.1 404 Not Found")

    server.answer = send
    command = to(run, small)
    url = server.url.replace("://", "://me:secret@").replace("/file", "")
    result = command(f"{url}/a.wav?token=secret", f"{url}/b.wav", "-o", "remote")
    assert result.code == 1
    assert "secret" not in result.out + result.err
    (error,) = result.errors
    assert error == f"error: {server.url.replace('/file', '/b.wav')}: 127.0.0.1: HTTP 404 Not Found"
    assert command("album/a.wav", "-o", "local").code == 0
    for name in files_in(tmp_path / "local"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    record = (tmp_path / "remote/a/.kmdx/.vocals.wav.json").read_text("utf-8")
    assert "secret" not in record
    server.asked.clear()
    again = command(f"{url}/a.wav?token=secret", "-o", "remote")
    assert (again.code, again.err.count("already in")) == (0, 1)
    assert [method for method, _, _ in server.asked if method == "GET"] == []


def test_a_plan_and_its_weights_are_fetched_once(
    run: Run, small: Path, store: Store, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    plan = yaml.safe_load(small.read_text("utf-8"))
    for network in plan["networks"].values():
        file = small.parent / network["weights"]["file"]
        network["weights"]["file"] = f"weights/{file.name}"
        store.files.put_file(str(file), f"music/plans/weights/{file.name}")
    store.files.pipe_file("music/plans/small.yaml", yaml.safe_dump(plan).encode())
    store.asked.clear()
    song = ("album/a.wav", "--device", "cpu", "-o")
    assert run("separate", *song, "local", "--ensemble", small).code == 0
    for output in ("one", "two"):
        result = run("separate", *song, output, "--ensemble", "s3://music/plans/small.yaml")
        assert result.code == 0, result.err
        for name in files_in(tmp_path / "local"):
            assert (tmp_path / output / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    gets = [line for line in store.asked if line.startswith("GET") and "weights" in line]
    assert len(gets) == len({*gets})
    record = json.loads((tmp_path / "one/a/.kmdx/.vocals.wav.json").read_text("utf-8"))
    assert None not in record["settings"]["weights"].values()
    loaded = plan_file.load("s3://music/plans/small.yaml")
    assert plan_file.parse(plan_file.dump(loaded), "small").networks == loaded.networks
    again = run("separate", *song, "one", "--ensemble", "s3://music/plans/small.yaml")
    assert again.err.count("already in") == 1
    stems, _ = Separator("s3://music/plans/small.yaml", device="cpu").separate_file("s3://music/album/a.wav")
    assert stems["vocals"].shape == (5_000, 2)


def test_weights_at_a_url_that_cannot_be_used_are_one_line(
    run: Run, small: Path, store: Store, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    text = small.read_text("utf-8")
    (name,) = {Path(use.weight.name).name for use in plan_file.load(small).networks.values()}
    (tmp_path / "own.yaml").write_text(text.replace(name, f"s3://music/{name}"), "utf-8")
    for content, why in (
        (None, "no such file, folder or bucket"),
        (b"import os", "not a"),
    ):
        if content:
            store.files.pipe_file(f"music/{name}", content)
        result = run("separate", "album/a.wav", "--ensemble", "own.yaml", "--device", "cpu")
        assert result.code == 2
        (error,) = result.errors
        assert f"s3://music/{name}: " in error
        assert why in error
    assert not [*(tmp_path / "models/urls").rglob("*.*")]


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_an_upload_is_continued(
    run: Run, small: Path, store: Store, album: Path, tmp_path: Path
) -> None:
    reached = threading.Event()

    def hold(request: object_store.Request, start: object_store.Start) -> object:
        if request["REQUEST_METHOD"] != "PUT" or not request["PATH_INFO"].endswith("CD1/b/drums.wav"):
            return None
        reached.set()
        store.over.wait(60)
        return store.denies(request, start)

    store.fault = hold  # type: ignore[assignment]
    command = [sys.executable, "-m", "kmdx.cli", "separate", "s3://music/album/CD1", "-o", f"{OUT}/CD1"]
    with subprocess.Popen([*command, "--ensemble", str(small), "--device", "cpu"], cwd=tmp_path) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
    store.fault = None
    half = store.content("music/out")
    assert "CD1/b/drums.wav" not in half
    result = to(run, small)("s3://music/album/CD1", "-o", f"{OUT}/CD1")
    assert result.code == 0
    assert to(run, small)("album/CD1", "-o", "out/CD1").code == 0
    content = store.content("music/out")
    assert sorted(content) == files_in(tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == content[name] for name in content)
    at_rest(store)


def test_a_budget_keeps_the_level_of_finished_stems_in_a_store(
    run: Run, small: Path, store: Store, album: Path
) -> None:
    command = to(run, small)
    assert command("album/a.wav", "-o", OUT, "--stems", "vocals", "--speed", "fast").code == 0
    result = command("album/a.wav", "-o", OUT, "--stems", "vocals,drums", "--budget", 1000)
    assert result.code == 0, result.err
    assert result.err.splitlines()[0] == f"speed fast, as finished stems in {OUT}"
    assert "a/drums.wav" in store.content("music/out")
