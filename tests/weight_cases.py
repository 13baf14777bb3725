"""Weights that a server on the loopback publishes, and weight files with their errors."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from demucs.htdemucs import HTDemucs

from kmdx import weights
from kmdx.errors import WeightsError
from kmdx.weights import Weight, download, pulling
from kmdx.weights.registry import DownloadSource, HttpSource

CONTENT = bytes(range(256)) * 8192  # 2 MB: several blocks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


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


STATE = {"linear.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}
METADATA = {
    "klass": "demucs.htdemucs.HTDemucs",
    "args": '[["drums", "bass"]]',
    "kwargs": json.dumps({"segment": {"_type": "fraction", "numerator": 39, "denominator": 5}, "depth": 4}),
}


def package(**more: Any) -> dict[str, Any]:
    """A package as Meta publishes them."""
    return {
        "klass": HTDemucs,
        "args": (["drums", "bass"],),
        "kwargs": {"segment": Fraction(39, 5), "depth": 4},
        "state": {name: tensor.half() for name, tensor in STATE.items()},
        "training_args": {"weights": [0, 1, 0, 0], "dset": {"name": "musdb"}},
        **more,
    }


def same(state: dict[str, torch.Tensor] | None) -> bool:
    return state is not None and all(torch.equal(state[name].float(), STATE[name].float()) for name in STATE)


def refused(path: Path, reason: str) -> None:
    with pytest.raises(WeightsError, match=reason) as caught:
        weights.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
