"""Copies stems out of a folder that the submission can change at any moment.

Nothing in that folder is trusted. Every path is opened one folder at a time, without following links, so
replacing a name by a link has no effect. Each stem is copied to a folder that the submission cannot reach
before anything reads its sound.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluator.layouts import NAMES, parts_of_accompaniment
from kmdx.challenge import ACCOMPANIMENT
from kmdx.errors import KmdxError
from kmdx.files import remove_tree

PREDICTIONS = "predictions"
INSTRUMENTAL = "instrumental"
SAMPLE = 8  # bytes at most: float64
HEADER_ALLOWANCE = 10**6  # bytes of a file besides its samples
BLOCK = 2**20  # bytes copied at a time
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
ONLY_FOLDERS = getattr(os, "O_DIRECTORY", 0)
BY_FOLDER = os.open in os.supports_dir_fd  # not on Windows


class PredictionError(KmdxError):
    """A stem is missing, is not a regular file, or is too large."""


class Predictions:
    """The folder that a submission writes its stems to.

    Parameters
    ----------
    shared : Path
        The value of ``AICROWD_PUBLIC_SHARED_DIR``; stems are in its ``predictions/<song>/<stem>.wav``.
    trash : Path
        A folder on the same disk that the submission cannot reach.
    """

    def __init__(self, shared: Path, trash: Path) -> None:
        self.shared = shared
        self.trash = trash

    def clear(self, everything: bool = False) -> None:
        """Create an empty ``predictions`` in place of whatever the submission put there.

        With ``everything``, also remove the rest of the shared folder, even folders whose permissions the
        submission removed. Its processes must have ended.
        """
        if everything:
            _restore_permissions(self.shared)
        with _folder(self.shared, None) as shared:
            names = [path.name for path in self.shared.iterdir()] if everything else [PREDICTIONS]
            for name in names:
                if everything:  # a folder without permissions cannot be moved
                    _restore_permissions(self.shared / name)
                with contextlib.suppress(FileNotFoundError):
                    self._move_to_trash(shared, name)
            os.mkdir(PREDICTIONS if shared is not None else self.shared / PREDICTIONS, dir_fd=shared)
        for path in self.trash.iterdir():
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                path.unlink()

    def copy(
        self, song: str, stems: Sequence[str], samples: int, channels: int, target: Path
    ) -> dict[str, Path]:
        """Copy a song's stems into ``target``.

        Parameters
        ----------
        song : str
        stems : sequence of str
        samples, channels : int
            Size of the mixture. A stem may be as large as that in float64, plus a megabyte.
        target : Path
            An existing folder.

        Returns
        -------
        dict of str to Path
            The copy of each stem. If the submission wrote no accompaniment, the stems that sum to it instead.

        Raises
        ------
        PredictionError
            If a stem is missing, is not a regular file, has hard links, or is too large.
        """
        most = samples * channels * SAMPLE + HEADER_ALLOWANCE
        copies = {}
        with contextlib.ExitStack() as stack:
            folder: int | None = None
            path = self.shared
            for name in (None, PREDICTIONS, song):
                path = path / name if name else path
                try:
                    folder = stack.enter_context(_folder(path, folder))
                except OSError as error:
                    here = path.relative_to(self.shared.parent).as_posix()
                    raise PredictionError(f"no stems: {here} {_why_no_folder(error)}") from error
            for stem in _with_parts(stems, path, folder):
                copies[stem] = target / f"{stem}.wav"
                _copy(path, folder, f"{_name(stem, path, folder)}.wav", most, copies[stem])
        return copies

    def _move_to_trash(self, shared: int | None, name: str) -> None:
        """Move a file or folder out of the submission's reach."""
        source = name if shared is not None else self.shared / name
        os.rename(source, self.trash / secrets.token_hex(8), src_dir_fd=shared)


def _restore_permissions(path: Path) -> None:
    """Make a folder usable again. A process that still runs could replace it with a link at this moment."""
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)


@contextlib.contextmanager
def _folder(path: Path, parent: int | None) -> Iterator[int | None]:
    """Open a folder by its name in an open parent; None if the system cannot open folders."""
    if not BY_FOLDER:
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(20, "Not a directory", str(path))
        yield None
        return
    name = path if parent is None else path.name
    opened = os.open(name, os.O_RDONLY | NO_LINKS | ONLY_FOLDERS, dir_fd=parent)
    try:
        yield opened
    finally:
        os.close(opened)


def _why_no_folder(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "does not exist"
    if error.errno in (errno.ENOTDIR, errno.ELOOP):  # a file; a link
        return "is not a folder"
    return f"cannot be opened ({error.strerror})"


def _with_parts(stems: Sequence[str], path: Path, folder: int | None) -> list[str]:
    """The stems to copy; a missing accompaniment is replaced by the stems that sum to it."""
    if ACCOMPANIMENT not in stems or _exists(_name(ACCOMPANIMENT, path, folder), path, folder):
        return [*stems]
    parts = parts_of_accompaniment([name for name in NAMES if _exists(name, path, folder)])
    names = [stem for stem in stems if stem != ACCOMPANIMENT or not parts]
    return [*dict.fromkeys([*names, *parts])]


def _name(stem: str, path: Path, folder: int | None) -> str:
    """The name that a submission gave a stem's file: the accompaniment's may be ``instrumental``."""
    if stem == ACCOMPANIMENT and not _exists(stem, path, folder) and _exists(INSTRUMENTAL, path, folder):
        return INSTRUMENTAL
    return stem


def _exists(stem: str, path: Path, folder: int | None) -> bool:
    """Whether an open folder contains anything with a stem's name."""
    name = f"{stem}.wav"
    try:
        os.stat(name if folder is not None else path / name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _copy(path: Path, folder: int | None, name: str, most: int, target: Path) -> None:
    """Copy one stem if it is a regular file of an acceptable size."""
    irregular = f"{name} is not a regular file, as a stem must be"
    flags = os.O_RDONLY | NO_LINKS | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if folder is None and (path / name).is_symlink():
            raise PredictionError(irregular)
        opened = os.open(name if folder is not None else path / name, flags, dir_fd=folder)
    except FileNotFoundError as error:
        raise PredictionError(f"{name} is missing") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise PredictionError(irregular) from error
        raise PredictionError(f"{name} cannot be read ({error.strerror})") from error
    found = os.fstat(opened)
    if not stat.S_ISREG(found.st_mode):
        os.close(opened)
        raise PredictionError(irregular)
    with os.fdopen(opened, "rb") as file:
        if found.st_nlink != 1:
            raise PredictionError(f"{name} has {found.st_nlink} hard links, expected a file of its own")
        if found.st_size > most:
            raise PredictionError(
                f"{name} has {found.st_size} bytes, expected at most {most} for a song of this length"
            )
        left = most
        with target.open("xb") as copy:
            while left > 0 and (block := file.read(min(BLOCK, left))):
                copy.write(block)
                left -= len(block)
