"""The models folder, where weight files are, and the locks that processes hold while they write there."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kmdx import files
from kmdx.errors import KmdxWarning, WeightsError

_PACKAGE = Path(__file__).parents[1]
_PATIENCE = 2  # seconds to wait for a file that is written in an instant before reporting it


class ModelsFolder(NamedTuple):
    """The models folder and why it is that one."""

    path: Path
    reason: str


def models_folder(folder: Path | None = None) -> Path:
    """Return the given folder of weight files, or else the usual one, which may not exist yet."""
    return folder or where().path


def where(start: Path | None = None) -> ModelsFolder:
    """Return the usual models folder and the reason for it.

    It is the first of ``$KMDX_MODELS``, ``models/`` of the checkout that contains ``start``, ``models/`` of
    the checkout that contains this package, and the user's cache. So commands and submissions that run in a
    checkout use the same folder, whichever copy of this package they import. A checkout is a folder with
    ``aicrowd.json``, ``my_submission/`` and ``models/``. Raises :class:`WeightsError` if ``$KMDX_MODELS`` is
    the path of a file.

    Parameters
    ----------
    start : Path, optional
        By default the current folder.
    """
    named = os.environ.get("KMDX_MODELS")
    if named:
        folder = Path(named).expanduser()
        if folder.exists() and not folder.is_dir():
            raise WeightsError(f"KMDX_MODELS is set to {folder}, which is not a folder")
        return ModelsFolder(folder, "KMDX_MODELS names it")
    with suppress(FileNotFoundError):  # the current folder has been deleted
        if checkout := _checkout(start or Path.cwd()):
            what = "the current folder" if start is None else str(start)
            return ModelsFolder(checkout / "models", f"it belongs to the checkout that contains {what}")
    if checkout := _checkout(_PACKAGE):
        return ModelsFolder(checkout / "models", "it belongs to the checkout that contains kmdx")
    import platformdirs

    return ModelsFolder(platformdirs.user_cache_path("kmdx") / "models", "it is in the user's cache")


def described(folder: Path | None = None) -> str:
    """Return the path of a models folder for a message, with the reason for it if it is the usual one."""
    with suppress(WeightsError):
        usual = where()
        if folder in (None, usual.path):
            return f"{usual.path} ({usual.reason})"
    return str(folder)


def shipped_folder() -> Path:
    """Return the folder of the weights that come with the package: in the wheel, or in a checkout."""
    packaged = _PACKAGE / "mini"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "models" / "mini"


@contextmanager
def locked(folder: Path, name: str, on_wait: Callable[[], None], patience: float = 0) -> Iterator[bool]:
    """Hold a lock in a models folder; waits for as long as another process holds it.

    Its file stays in ``.locks``: removing it could let
    two processes hold the same lock.

    Parameters
    ----------
    folder : Path
        Must exist.
    on_wait : callable
        Called once if the lock is not free within ``patience`` seconds.

    Yields
    ------
    bool
        Whether it is locked; some network file systems have no locks.
    """
    file = folder / ".locks" / f"{name}.lock"
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(file, math.inf, on_wait, patience))
            held = True
        except (OSError, NotImplementedError):
            held = False
        yield held


def rewrite(path: Path, text: Callable[[], str]) -> None:
    """Replace a text file of a models folder; no other process does the same meanwhile.

    Raises :class:`WeightsError` if the file cannot be written.

    Parameters
    ----------
    text : callable
        Returns the new text, which may depend on the old one.
    """

    def on_wait() -> None:
        warnings.warn(f"waiting for another process that writes {path}", KmdxWarning, stacklevel=7)

    with locked(path.parent, path.name, on_wait, _PATIENCE):
        content = text()
        try:
            files.write_text(path, content)
        except OSError as error:
            raise WeightsError(f"{path} cannot be written: {error.strerror}") from error


def _checkout(start: Path) -> Path | None:
    """The innermost checkout that contains a folder; None if there is none."""
    start = start.absolute()
    for folder in (start, *start.parents):
        # os.path, because these functions return False for folders that this user may not enter
        if (
            os.path.isfile(folder / "aicrowd.json")  # noqa: PTH113
            and os.path.isdir(folder / "my_submission")  # noqa: PTH112
            and os.path.isdir(folder / "models")  # noqa: PTH112
        ):
            return folder
    return None
