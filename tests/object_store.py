"""An S3 store on loopback whose answers a test can replace."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec
import pytest

pytest.importorskip("s3fs", reason="the object store needs s3fs and moto")
pytest.importorskip("moto.server", reason="the object store needs s3fs and moto")

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

Request = dict[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]
Fault = Callable[[Request, Start], Iterable[bytes] | None]
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Store:
    """The store; ``fault`` answers a request itself, or returns None."""

    def __init__(self) -> None:
        app = DomainDispatcherApplication(create_backend_app)
        self.fault: Fault | None = None
        self.asked: list[str] = []
        self.over = threading.Event()

        def answer(request: Request, start: Start) -> Iterable[bytes]:
            self.asked.append(f"{request['REQUEST_METHOD']} {request['PATH_INFO']}")
            faulty = self.fault(request, start) if self.fault else None
            return app(request, start) if faulty is None else faulty

        self.server = make_server("127.0.0.1", 0, answer, True, request_handler=MotoRequestHandler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def files(self) -> Any:
        """Its content."""
        return fsspec.filesystem("s3", use_listings_cache=False)

    def content(self, folder: str) -> dict[str, bytes]:
        """Every file below a folder by its relative name, except records."""
        found = self.files.find(folder)
        return {
            name.removeprefix(f"{folder}/"): self.files.cat_file(name)
            for name in found
            if "/.kmdx/" not in name
        }

    def denies(self, request: Request, start: Start) -> Iterable[bytes]:
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        start("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(DENIED)))])
        return [b"" if request["REQUEST_METHOD"] == "HEAD" else DENIED]

    def holds(self, request: Request, start: Start) -> Iterable[bytes] | None:
        """Answers reads of a file only when the test is over."""
        if request["REQUEST_METHOD"] == "GET" and request["PATH_INFO"].endswith(".wav"):
            self.over.wait(60)
        return None

    def cuts(self, times: int) -> Fault:
        """Closes the connection in the middle of reads of a file, so many times."""
        left = iter(range(times))

        def fault(request: Request, start: Start) -> Iterable[bytes] | None:
            is_read = request["REQUEST_METHOD"] == "GET" and request["PATH_INFO"].endswith(".wav")
            if not is_read or next(left, None) is None:
                return None
            start("206 Partial Content", [("Content-Length", "100000")])
            return [b"RIFF"]

        return fault


@functools.cache
def started() -> Store:
    """The only store of this process, because clients keep its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store()
    threading.Thread(target=store.server.serve_forever, daemon=True).start()
    return store


@pytest.fixture(scope="session")
def running() -> Iterator[Store]:
    """The store, which clients find in the environment."""
    store = started()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", store.address)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield store


@pytest.fixture
def store(running: Store) -> Iterator[Store]:
    """An S3 store with an empty bucket named music."""
    running.fault = None
    running.over.clear()
    running.files.mkdir("music")
    running.asked.clear()
    yield running
    running.fault = None
    running.over.set()
    running.files.rm("music", recursive=True)
