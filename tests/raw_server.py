"""A local server that sends whatever a test specifies, valid or not."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CONTENT = bytes(range(256)) * 1200  # 300 kB: several blocks


SHA256 = hashlib.sha256(CONTENT).hexdigest()


OK = "HTTP/1.1 200 OK"
LENGTH = f"Content-Length: {len(CONTENT)}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the server's function, with what is sent as it is: no header is made up."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        with contextlib.suppress(OSError):  # the client has gone
            self.server.answer(self)

    do_HEAD = do_CONNECT = do_GET

    def send(self, *lines: str, body: bytes = b"") -> None:
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def hold(self) -> None:
        """Keep the connection open until the test is over."""
        self.server.over.wait(30)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[Handler], None] = whole
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def whole(handler: Handler) -> None:
    """The file, or what is asked for of it."""
    if asked := handler.headers.get("Range"):
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        stated = f"Content-Range: bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        length = f"Content-Length: {len(CONTENT) - start}"
        handler.send("HTTP/1.1 206 Partial Content", stated, length, 'ETag: "v1"', body=CONTENT[start:])
    else:
        handler.send("HTTP/1.1 200 OK", f"Content-Length: {len(CONTENT)}", 'ETag: "v1"', body=CONTENT)


def answer(*lines: str, body: bytes = b"", hold: bool = False) -> Callable[[Handler], None]:
    """The same answer to every request."""

    def send(handler: Handler) -> None:
        handler.send(*lines, body=body)
        if hold:
            handler.hold()

    return send


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)
