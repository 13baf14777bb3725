"""What a song can be read from: a path, a URL, or an open binary file."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import AudioError

Source = str | os.PathLike[str] | BinaryIO
COPIED = 2**20  # bytes copied at a time


def is_source(value: object) -> bool:
    """Whether a value is a path, a URL or a file, not samples."""
    return isinstance(value, str | bytes | os.PathLike) or hasattr(value, "read")


def name_of(source: object) -> str:
    """A name for messages: the path, the URL without secrets, an open file's name, or else ``the song``."""
    if isinstance(source, str) and "://" in source:
        from . import urls

        return str(urls.parse(source))
    if isinstance(source, str | os.PathLike):
        return str(Path(source))
    name = getattr(source, "name", None)
    return name if isinstance(name, str) and name else "the song"


@contextmanager
def opened(source: Source) -> Iterator[tuple[BinaryIO, int]]:
    """A file of the operating system, or one in memory, with the content of a source, and its size in bytes.

    A file is read from its beginning, wherever its position is, and stays open. If it is neither on disk nor
    a :class:`io.BytesIO`, what is left to read is first copied to a temporary file: C libraries read it, and
    cannot pass on what it might raise.

    Raises :class:`AudioError` if the source is not a sound file, :class:`kmdx.urls.UrlError` if a URL cannot
    be read, and :class:`OSError` if a file cannot be.
    """
    with ExitStack() as stack:
        if isinstance(source, str) and "://" in source:
            from . import urls

            source = stack.enter_context(urls.local(urls.parse(source)))
        if isinstance(source, str | os.PathLike):
            file: BinaryIO = stack.enter_context(_of_path(Path(source)))
        else:
            file = _of_file(source, stack)
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise AudioError("expected a sound file, found an empty file")
        yield file, size


def _of_path(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "pipe or a device"
        raise AudioError(f"expected a sound file, found a {kind}")
    return path.open("rb")


def _of_file(source: Any, stack: ExitStack) -> BinaryIO:
    """The file itself, or a temporary copy."""
    if not hasattr(source, "read"):
        hint = "; wrap the content of a file in io.BytesIO" if isinstance(source, bytes) else ""
        raise AudioError(f"expected a path or a binary file, found {type(source).__name__}{hint}")
    if getattr(source, "closed", False):
        raise AudioError("the file is closed")
    on_disk = isinstance(source, io.BufferedReader | io.BufferedRandom) and isinstance(source.raw, io.FileIO)
    if isinstance(source, io.BytesIO) or (on_disk and source.seekable()):
        return source
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
    while data := source.read(COPIED):
        if isinstance(data, str):
            raise AudioError("the file is open in text mode; open it in binary mode ('rb')")
        copy.write(data)
    copy.flush()
    return copy
