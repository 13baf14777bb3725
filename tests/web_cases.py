"""The web app on a real socket, in the tests' process."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import soundfile
import tiny
from conftest import noise

pytest.importorskip("fastapi", reason="the web app needs the extra web")

import uvicorn

from kmdx.web import app
from kmdx.web.guard import Access
from kmdx.web.jobs import Limits, Queue
from kmdx.web.worker import Machine, Worker, length_of

RATE = 44100
TIMEOUT = 120.0  # seconds
LIMITS = Limits()


@dataclass
class Site:
    """A running web app."""

    url: str
    queue: Queue
    session: requests.Session

    def __call__(self, method: str, path: str, **options: Any) -> requests.Response:
        """Answer of the server to a request."""
        return self.session.request(method, f"{self.url}{path}", timeout=TIMEOUT, **options)

    def submit(self, sound: bytes, name: str = "song.wav", **fields: str) -> requests.Response:
        fields = {"ensemble": "small", **fields}
        return self("POST", "/api/jobs", files={"song": (name, sound)}, data=fields)

    def job(self, id: str) -> dict[str, Any]:
        return self("GET", f"/api/jobs/{id}").json()

    def wait(self, id: str, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until a job is in a state."""
        end = time.monotonic() + TIMEOUT
        while not is_reached(job := self.job(id)):
            assert time.monotonic() < end, job
            time.sleep(0.02)
        return job

    def finished(self, id: str) -> dict[str, Any]:
        return self.wait(id, lambda job: job["state"] in ("done", "failed", "cancelled"))

    def left(self) -> list[str]:
        """What is in the server's folder."""
        return sorted(path.name for path in self.queue.folder.iterdir() if path.is_dir())


@contextmanager
def serving(
    folder: Path,
    limits: Limits = LIMITS,
    token: str | None = None,
    works: bool = True,
) -> Iterator[Site]:
    """Run the web app; with ``works=False``, songs only wait."""
    queue = Queue(folder, limits, partial(length_of, longest=limits.length))

    def start() -> Callable[[], object]:
        if not works:
            return lambda: None
        worker = Worker(queue, Machine(device="cpu"))
        worker.start()
        return lambda: worker.stop(TIMEOUT)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app.create(queue, Access(token), start), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with requests.Session() as session:
            if token is not None:
                session.headers["authorization"] = f"Bearer {token}"
            try:
                yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", queue, session)
            finally:
                server.should_exit = True
                thread.join(TIMEOUT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A models folder with the ensemble ``small``."""
    folder = tmp_path_factory.mktemp("web models")
    tiny.write_htdemucs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KMDX_MODELS", str(folder))
        yield folder


def sound(seconds: float = 1.0, seed: int = 0, format: str = "WAV", rate: int = RATE) -> bytes:
    """A file of noise."""
    return encoded(noise(round(seconds * rate), seed=seed), format, rate)


def encoded(samples: np.ndarray, format: str = "WAV", rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()
