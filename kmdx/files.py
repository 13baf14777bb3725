"""Write files completely or not at all, and make folders that do not stay behind empty."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a file while it is being written; its name also starts with a dot."""


def sha256(path: Path) -> str:
    """Return the checksum of a file's content; raises :class:`OSError` if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def partial_name(path: Path) -> Path:
    """A new hidden name next to a file, for writing it until it is complete."""
    # 50 characters: the result must fit into the 255 bytes that a file name may have.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}{PARTIAL}")


def is_partial_of(partial: Path, path: Path) -> bool:
    """Whether a file has a name that :func:`partial_name` gives for a path."""
    begin = f".{path.name[:50]}."
    name = partial.name
    return name.startswith(begin) and name.endswith(PARTIAL) and len(name) == len(begin) + 8 + len(PARTIAL)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write a file under; when the block ends, the file is renamed to ``path``.

    The content is flushed to disk first. After an exception, a kill or a power loss at any moment, ``path``
    is either unchanged or complete. Raises :class:`OSError` if the file cannot be written, or ``path`` is a
    device or a pipe, which a new file would replace.
    """
    if not path.name:
        raise OSError(errno.EISDIR, "a folder, not a file", str(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a device or a pipe, not a file", str(path))
    partial = partial_name(path)
    try:
        yield partial
        commit(partial, path)
    finally:  # after success, the partial file no longer exists
        with suppress(OSError):
            partial.unlink()


def commit(partial: Path, path: Path) -> None:
    """Rename a complete file to its own name; flush its content to disk before, and its name after.

    Raises :class:`OSError` if the file cannot be flushed or renamed.
    """
    with partial.open("rb" if os.name == "posix" else "rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


class Locked(OSError):
    """Another process holds a lock."""


@contextmanager
def locked(
    path: Path,
    timeout: float = 0.0,
    on_wait: Callable[[], None] = lambda: None,
    patience: float = 0.0,
) -> Iterator[None]:
    """Hold a lock file, which ends with its process, however that ends.

    Parameters
    ----------
    timeout : float
        Seconds to wait while another process holds it.
    on_wait : callable
        Called once, after ``patience`` seconds of waiting.

    Raises
    ------
    Locked
        If another process still holds it after ``timeout`` seconds.
    OSError, NotImplementedError
        If the file cannot be made, or its file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=min(timeout, patience))
        except Timeout:
            if timeout <= patience:
                raise
            on_wait()
            lock.acquire(timeout=timeout - patience, poll_interval=0.2)
    except Timeout as error:
        raise Locked from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    r"""Write a text file in UTF-8, completely or not at all; see :func:`atomic`.

    In a file name, a byte that is not UTF-8 becomes ``\udc…``, which JSON reads back as that byte.
    """
    with atomic(path) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Make a folder and its parents; after an exception, remove the new ones that are empty.

    Raises :class:`OSError` if a folder cannot be made.
    """
    missing = [part for part in (path, *path.parents) if not part.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # a file has this name
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
        yield
    except BaseException:
        for part in missing:
            with suppress(OSError):
                part.rmdir()
        raise


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to disk, if the system supports that."""
    if os.name == "posix":
        with suppress(OSError):  # some network file systems do not
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _open_up(folder: Path) -> None:
    """Let the owner list and change a folder."""
    with suppress(OSError):
        if not folder.is_symlink():
            folder.chmod(0o700)


def remove_tree(folder: Path) -> None:
    """Remove a folder and everything in it, as far as possible, at any depth; links are not followed."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.is_dir() and not folder.is_symlink():  # folders without permissions in it
            _open_up(folder)
            for place, folders, _ in os.walk(folder):
                for name in folders:
                    _open_up(Path(place, name))
            shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # before Python 3.13, rmtree is recursive
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True, timeout=600, check=False)
