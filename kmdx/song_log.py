"""Reports what became of each song, on the terminal and as lines of JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.markup import escape

from kmdx import terminal
from kmdx.errors import KmdxError, counted
from kmdx.terminal import err

if TYPE_CHECKING:
    from kmdx.batch import SongResult


FEW = 10  # finished songs that the terminal names


class SongLog:
    """A log of songs.

    Each line of the file is an object with ``time`` (ISO 8601) and ``event``. A ``song`` has ``status``
    (``separated``, ``finished before`` or ``failed``) and the fields of :class:`kmdx.batch.SongResult`. A
    ``notice`` has a ``text``, about a worker or a machine. The terminal names the first finished songs and
    counts the rest.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self._finished = 0  # songs finished before

    def song(self, result: SongResult) -> None:
        """Report a song."""
        if result.error is not None:
            status = "failed"
            terminal.complain(result.error)
        elif result.stems:
            status = "separated"
            terminal.say(f"{result.song} → {result.folder} ({', '.join(result.stems)})")
        else:
            status = "finished before"
            self._finished += 1
            if self._finished <= FEW:
                where = f"{result.song}: already in {result.folder}; {_again('it')}"
                err.print(escape(terminal.one_line(where)))
        for warning in result.warnings:
            terminal.warn(warning)
        content = asdict(result)
        self._write(
            "song", status=status, **{**content, "song": str(result.song), "folder": str(result.folder)}
        )

    def count_finished(self) -> None:
        """Print how many more songs were finished before than have been named, once."""
        if self._finished > FEW:
            more = self._finished - FEW
            err.print(f"already separated, too: {counted(more, 'more song')}; {_again('them')}")
            self._finished = FEW

    def notice(self, text: str, is_warning: bool) -> None:
        """Report something about a worker or a machine; only a warning is shown on the terminal."""
        if is_warning:
            terminal.warn(text)
        self._write("notice", text=text)

    def _write(self, event: str, **content: Any) -> None:
        if self.file is not None:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self.file.write(json.dumps({"time": now, "event": event, **content}) + "\n")


def _again(songs: str) -> str:
    return f"use --overwrite to separate {songs} again"


@contextmanager
def song_log(path: Path | None) -> Iterator[SongLog]:
    """A log that is also appended to a file, if a path is given.

    Raises :class:`KmdxError` if the file cannot be opened.
    """
    if path is None:
        yield SongLog()
        return
    try:
        file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:
        raise KmdxError(f"--log-json {path}: {error.strerror}") from error
    with file:
        yield SongLog(file)
