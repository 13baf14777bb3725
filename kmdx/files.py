"""Files that appear whole or not at all, and folders that exist only if they contain something."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
"""How the name of a file ends while it is written; it begins with a dot."""


def sha256(path: Path) -> str:
    """Return the checksum of a file's content; raises :class:`OSError` if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def partial_name(path: Path) -> Path:
    """A new hidden name next to a file, under which it is written until it is complete."""
    # 50 characters of the name: with the rest they fit in the 255 bytes a file name may have.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}{PARTIAL}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write a file under; it gets its own name when the block ends.

    The content is forced to the disk first. After an exception, a kill or a power loss at any moment, the
    file is what it was before, or complete.

    Raises
    ------
    OSError
        If the file cannot be written, or is a device or a pipe: a new file would replace it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a device or a pipe, not a file", str(path))
    partial = partial_name(path)
    try:
        yield partial
        commit(partial, path)
    finally:  # after a success there is none
        with suppress(OSError):
            partial.unlink()


def commit(partial: Path, path: Path) -> None:
    """Give a complete file its own name; its content is forced to the disk before, and its name after.

    Raises
    ------
    OSError
        If either cannot be done.
    """
    with partial.open("rb" if os.name == "posix" else "rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    r"""Write a text file in UTF-8, whole or not at all; see :func:`atomic`.

    A file name that is not UTF-8 becomes ``\udc…``, which JSON reads back as that name.
    """
    with atomic(path) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it; after an exception, those that were made and are empty are removed.

    Raises
    ------
    OSError
        If a folder cannot be made.
    """
    missing = [part for part in (path, *path.parents) if not part.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # by a file
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
        yield
    except BaseException:
        for part in missing:
            with suppress(OSError):
                part.rmdir()
        raise


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk, where the system can do that."""
    if os.name == "posix":
        with suppress(OSError):  # some network file systems cannot
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it, however deep, as far as possible; links are not followed."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # Python before 3.13 calls itself for each level
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True, timeout=600, check=False)
