"""Replies of a submission: limited in size, parsed strictly, and never trusted.

A reply is one line of JSON of at most 64 kB in one of these forms. ``token`` repeats the request's token.

``{"isolation", "contained"}``
    From the sandbox, before the interpreter starts: what it could not isolate, and whether killing one
    process kills all.
``{"unstarted"}``
    From the sandbox: why the interpreter could not be started.
``{"hello": token, "executable", "version", "packages"}``
    The interpreter is running.
``{"made": token, "device"}``
    The model is loaded.
``{"progress": [done, total]}``
    Seconds of audio; any number of these may arrive.
``{"done": token, "findings", "returned_true", "peak_gpu_memory", "device"}``
    The song is separated; the wrapper returned True, or something else.
``{"failed": token, "reason", "where"}``
    The submission raised an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

LINE = 64 * 1024  # bytes of a reply
TEXT = 1000  # characters of a reason or another text
LOG = 10 * 10**6  # bytes of a run's log
QUEUE = 100  # replies that are queued; after that the submission has to wait
TAIL = 100_000  # bytes of a process's last output that are kept when the log is full
FIRST = LOG - 20 * TAIL  # bytes of the log for all output; the rest is reserved for tails
FRAME = re.compile(r' *File "(.+)", line (\d+) in .*')
TRUNCATED = b"\n[output left out; its last part follows]\n"


class BadReply(Exception):
    """A reply does not have a documented form."""


class EndOfReplies(Exception):
    """The process has ended or closed its end of the pipe."""


def clean(text: str, limit: int = TEXT) -> str:
    """A submission's text on one line, without control characters and lone surrogates, cut to ``limit``."""
    text = text[: 2 * limit].encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(" " if letter in "\n\r\t" else letter for letter in text)
    text = "".join(
        letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")
    )
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_seconds(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < 1e9


def _is_bytes(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value < 2**60)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_seconds, value))


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


FORMS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "isolation": {"isolation": _is_texts, "contained": _is_truth},
    "unstarted": {"unstarted": _is_text},
    "hello": {"hello": _is_text, "executable": _is_text, "version": _is_text, "packages": _is_versions},
    "made": {"made": _is_text, "device": _is_text_or_none},
    "progress": {"progress": _is_pair},
    "done": {
        "done": _is_text,
        "findings": _is_texts,
        "returned_true": _is_truth,
        "peak_gpu_memory": _is_bytes,
        "device": _is_text_or_none,
    },
    "failed": {"failed": _is_text, "reason": _is_text, "where": _is_text_or_none},
}
"""The keys of each kind of reply, with a check of each value. The first key names the kind."""


def parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """Parse a reply; return its kind and content.

    Raises
    ------
    BadReply
        If it does not have a documented form.
    """
    try:
        content = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadReply(f"not JSON: {shown(line)}") from error
    kind = next(iter(content), None) if isinstance(content, dict) else None
    form = FORMS.get(kind) if isinstance(kind, str) else None
    if form is None or content.keys() != form.keys() or not all(form[k](v) for k, v in content.items()):
        raise BadReply(f"unknown form: {shown(line)}")
    assert kind is not None
    return kind, content


def shown(line: bytes) -> str:
    """The beginning of a line, for a message."""
    return clean(line[:400].decode("utf-8", "backslashreplace"), 80)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


class ReplyReader:
    """Reads replies from a pipe in a thread of its own and queues them."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._found: queue.Queue[tuple[str, dict[str, Any]] | Exception] = queue.Queue(QUEUE)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def begin_with(self, content: dict[str, Any]) -> None:
        """Queue a reply that no process sends, for systems without a sandbox."""
        self._found.put((next(iter(content)), content))

    def next(self, timeout: float) -> tuple[str, dict[str, Any]]:
        """The next reply.

        Raises
        ------
        queue.Empty
            If there is none within ``timeout`` seconds.
        BadReply
            If it does not have a documented form.
        EndOfReplies
            If there are no more.
        """
        found = self._found.get(timeout=timeout)
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self, timeout: float) -> None:
        """Stop reading; the process at the other end is dead."""
        self._stopped.set()
        self._thread.join(timeout)

    def _read(self) -> None:
        try:
            held = b""
            while part := os.read(self._pipe, LINE):
                *lines, held = (held + part).split(b"\n")
                for line in lines:
                    if len(line) > LINE:
                        raise BadReply(f"longer than {LINE // 1024} kB: {shown(line)}")
                    self._put(parse(line))
                if len(held) > LINE:
                    raise BadReply(f"longer than {LINE // 1024} kB: {shown(held)}")
            raise EndOfReplies
        except OSError:
            self._put(EndOfReplies())
        except Exception as error:
            self._put(error)

    def _put(self, found: tuple[str, dict[str, Any]] | Exception) -> None:
        while not self._stopped.is_set():
            try:
                return self._found.put(found, timeout=0.1)
            except queue.Full:
                continue
        return None


class LogWriter:
    """Appends a process's output to a file, in a thread of its own, until the file has :data:`FIRST` bytes.

    If there is more, its last :data:`TAIL` bytes are appended when the process ends, because they may contain
    a traceback.
    """

    def __init__(self, pipe: int, path: Path) -> None:
        self._pipe = pipe
        self._path = path
        self.read = 0  # bytes so far
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Wait until everything is copied; the process at the other end is dead."""
        self._thread.join(timeout)

    def _copy(self) -> None:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._path.open("ab", buffering=0))
            except OSError:  # it belongs to another user, or is a folder
                file = stack.enter_context(Path(os.devnull).open("ab", buffering=0))
            size = file.seek(0, os.SEEK_END)
            last = b""
            while part := self._read():
                self.read += len(part)
                room = max(0, FIRST - size)
                size += len(part)
                last = (last + part[room:])[-TAIL:]  # read everything, so that the process never blocks
                with contextlib.suppress(OSError):  # a full disk must not end the run because of its log
                    file.write(part[:room])
            with contextlib.suppress(OSError):
                if last and file.tell() + len(TRUNCATED + last) <= LOG:
                    file.write(TRUNCATED + last)

    def _read(self) -> bytes:
        """The next bytes; empty at the end."""
        try:
            return os.read(self._pipe, LINE)
        except OSError:
            return b""


def tail(path: Path, lines: int = 20, width: int = 300) -> list[str]:
    """The last lines of a log, cleaned for display; empty if the file does not exist."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**17))
            content = file.read().decode("utf-8", "backslashreplace")
    except OSError:
        return []
    cleaned = [_printable(line, width) for line in content.splitlines()]
    return [line for line in cleaned if line][-lines:]


def place_of(lines: Sequence[str], folder: Path) -> str | None:
    """Where the last stack printed by :mod:`faulthandler` was in a folder's code, such as ``a.py:10``.

    This is the innermost line in the folder, first of the interrupted thread, then of the others.
    """
    start = str(folder).encode("ascii", "backslashreplace").decode("ascii").rstrip("/") + "/"
    threads: list[list[str]] = []
    current: list[list[str]] = []
    for line in lines:
        if line.endswith("(most recent call first):"):
            threads.append([])
            if line.startswith("Current thread"):
                current = threads[-1:]
        elif threads and (found := FRAME.fullmatch(line)) and found[1].startswith(start):
            path = found[1][len(start) :]
            if "-packages" not in path:
                threads[-1].append(f"{path}:{found[2]}")
    return next((places[0] for places in [*current, *reversed(threads)] if places), None)


def _printable(line: str, width: int) -> str:
    """A cleaned line that keeps its indentation."""
    body = line.lstrip(" ")
    indent = len(line) - len(body)
    return " " * min(indent, 40) + clean(body, width) if body.strip() else ""


__all__ = ["BadReply", "EndOfReplies", "LogWriter", "ReplyReader", "clean", "parse", "place_of", "tail"]
