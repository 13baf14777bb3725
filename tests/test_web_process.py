"""``kmdx serve`` as a process: its options, its messages, and what survives its end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cli_cases
import pytest
import requests
import web_cases
from cli_cases import Run
from web_cases import TIMEOUT, sound

from kmdx import Separator

pytestmark = pytest.mark.slow

models, run = web_cases.models, cli_cases.run
Start = Callable[..., "Server"]


class Server:
    """A process that serves."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "kmdx", "serve", "--port", "0", "--folder", str(folder), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        match = re.match(r"open (http://\S+?)/(?:#token=(\S+))? in a browser", self.line)
        assert match, self.line
        self.url, self.token = match.groups()

    def submit(self, content: bytes, **fields: str) -> str:
        fields = {"ensemble": "small", **fields}
        reply = requests.post(
            f"{self.url}/api/jobs", files={"song": ("song.wav", content)}, data=fields, timeout=TIMEOUT
        )
        assert reply.status_code == 201, reply.text
        return reply.json()["id"]

    def job(self, id: str) -> dict:
        return requests.get(f"{self.url}/api/jobs/{id}", timeout=TIMEOUT).json()

    def wait(self, id: str, is_reached: Callable[[dict], bool]) -> dict:
        end = time.monotonic() + TIMEOUT
        while not is_reached(job := self.job(id)):
            assert time.monotonic() < end, job
            time.sleep(0.05)
        return job

    def end(self, how: int) -> int:
        self.process.send_signal(how)
        return self.process.wait(TIMEOUT)


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Start]:
    made: list[Server] = []

    def start(*options: str) -> Server:
        made.append(Server(tmp_path / "jobs", *options))
        return made[-1]

    yield start
    for server in made:
        server.process.kill()
        server.process.wait(TIMEOUT)


def test_songs_survive_the_kill_of_the_server(start: Start, tmp_path: Path) -> None:
    first = start("--device", "cpu")
    songs = [sound(12, 0), sound(1, 1), sound(2, 2)]
    ids = [first.submit(song, stems="vocals") for song in songs]
    first.wait(ids[0], lambda job: bool(job["progress"]))
    first.end(signal.SIGKILL)
    second = start("--device", "cpu")
    separator = Separator("small", device="cpu", stems=["vocals"])
    for id, song in zip(ids, songs, strict=True):
        job = second.wait(id, lambda job: job["state"] not in ("queued", "running"))
        assert job["state"] == "done", job
        (tmp_path / "song.wav").write_bytes(song)
        made = separator.separate_file(tmp_path / "song.wav").save(tmp_path)
        found = requests.get(f"{second.url}{job['files']['vocals']}", timeout=TIMEOUT).content
        assert found == made["vocals"].read_bytes()


def test_a_song_waits_while_the_server_is_stopped(start: Start, tmp_path: Path) -> None:
    first = start("--device", "cpu")
    id = first.submit(sound(60), stems="vocals")
    first.wait(id, lambda job: bool(job["progress"]))
    assert first.end(signal.SIGTERM) == -signal.SIGTERM
    record = json.loads((tmp_path / "jobs" / id / "job.json").read_text())
    assert (record["state"], record["attempts"]) == ("queued", 0)


def test_a_token_is_made_where_other_machines_can_connect(start: Start) -> None:
    server = start("--host", "0.0.0.0")
    url = f"http://127.0.0.1:{server.url.rpartition(':')[2]}/api/jobs"
    assert len(server.token) >= 32
    assert requests.get(url, timeout=TIMEOUT).status_code == 401
    headers = {"authorization": f"Bearer {server.token}"}
    assert requests.get(url, headers=headers, timeout=TIMEOUT).json() == []
    assert server.end(signal.SIGINT) == 130


def test_one_folder_has_one_server(start: Start, run: Run, tmp_path: Path) -> None:
    start()
    result = run("serve", "--port", "0", "--folder", tmp_path / "jobs")
    assert result.code == 2
    assert result.errors == [f"error: another kmdx serve uses {tmp_path}/jobs; choose another --folder"]


def test_mistakes_in_options_are_one_line(run: Run, tmp_path: Path) -> None:
    folder = ("--folder", tmp_path / "jobs", "--port", "0")
    assert "is easy to guess" in run("serve", *folder, "--token", "secret").errors[0]
    assert "unknown device" in run("serve", *folder, "--device", "toaster").errors[0]
    assert "--max-length 'x'" in run("serve", *folder, "--max-length", "x").errors[0]
    assert "cannot be used" in run("serve", *folder, "--host", "no.such.host.invalid").errors[0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        errors = run("serve", "--folder", tmp_path / "jobs", "--port", port).errors
    assert errors[0].startswith(f"error: 127.0.0.1:{port} cannot be used: address already in use; choose")


def test_a_missing_extra_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("kmdx.web")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run("serve").errors == ["error: uvicorn is missing; install it with: pip install 'kmdx-net[web]'"]
