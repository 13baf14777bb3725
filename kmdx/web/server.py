"""Runs the web app: its folder, address, token and worker."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kmdx import files, terminal
from kmdx.errors import KmdxError, reason, shown
from kmdx.web.jobs import Limits, Queue

try:
    import fastapi_offline  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn

    from kmdx.web.app import create
    from kmdx.web.guard import OWN_NAMES, Access
    from kmdx.web.worker import Machine, Worker, length_of
except ModuleNotFoundError as error:
    raise KmdxError(f"{error.name} is missing; install it with: pip install 'kmdx-net[web]'") from error

SHORTEST_TOKEN = 16  # characters
END_TIMEOUT = 20.0  # seconds to wait for the current window of a song, when the server ends


@dataclass(frozen=True)
class Options:
    """The options of ``kmdx serve``."""

    host: str = "127.0.0.1"
    port: int = 8000
    folder: Path | None = None
    """Folder of the jobs; by default in the user's folder for data."""
    token: str | None = None
    """By default, one is generated if the server can be reached from other machines."""
    limits: Limits = field(default_factory=Limits)
    machine: Machine = field(default_factory=Machine)


def serve(options: Options) -> None:
    """Answer requests until Ctrl-C.

    Raises :class:`KmdxError` if an option is wrong, the address or the folder is in use, or the device or the
    cluster is not available.
    """
    token = options.token or None
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise KmdxError(
            f"a token of {len(token)} characters is easy to guess: expected at least {SHORTEST_TOKEN}"
        )
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(options.host, options.port))
        address, port = listener.getsockname()[:2]
        is_local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        if token is None and not is_local:
            token = secrets.token_urlsafe(24)
        folder = options.folder or _default_folder()
        stack.enter_context(_alone(folder))
        _prepare(options.machine, stack)
        queue = Queue(folder, options.limits, partial(length_of, longest=options.limits.length))
        access = Access(token, OWN_NAMES | {options.host.lower()})
        app = create(queue, access, partial(_start, queue, options.machine))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        _announce(options.host if is_local else address, port, token)
        uvicorn.Server(config).run(sockets=[listener])


def _start(queue: Queue, machine: Machine) -> Callable[[], None]:
    """Start the worker; return what ends it."""
    worker = Worker(queue, machine)
    worker.start()
    return partial(worker.stop, END_TIMEOUT)


def _prepare(machine: Machine, stack: ExitStack) -> None:
    """Check the device, or connect to the cluster."""
    if machine.cluster is not None:
        from kmdx import cluster

        stack.enter_context(cluster.connected(machine.cluster))
    else:
        from kmdx import devices

        devices.choose(machine.device)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address; raises :class:`KmdxError` if it cannot be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        why = reason(error).partition(" (")[0]
        raise KmdxError(f"{shown(host)}:{port} cannot be used: {why}; choose another --port, or 0") from error
    with listener:
        yield listener


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other servers from using a folder, which is made."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.locked(folder / ".lock"):
            yield
    except files.Locked as error:
        raise KmdxError(f"another kmdx serve uses {folder}; choose another --folder") from error


def _default_folder() -> Path:
    import platformdirs

    return platformdirs.user_data_path("kmdx") / "serve"


def _announce(host: str, port: int, token: str | None) -> None:
    """Print the address to open."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    where = f"[{host}]" if ":" in host else host
    secret = f"#token={token}" if token else ""
    terminal.say(f"open http://{where}:{port}/{secret} in a browser; Ctrl-C ends the server")
