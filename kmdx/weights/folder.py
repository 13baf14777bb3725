"""The models folder, where weight files are, and the locks that processes hold while they write there."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


def where() -> ModelsFolder:
    """Return the usual models folder and the reason for it.

    ``$KMDX_MODELS`` comes first, then ``models/`` of a checkout, then the user's cache. Raises
    :class:`WeightsError` if ``$KMDX_MODELS`` is the path of a file.
    """
    named = os.environ.get("KMDX_MODELS")
    if named:
        folder = Path(named).expanduser()
        if folder.exists() and not folder.is_dir():
            raise WeightsError(f"KMDX_MODELS is set to {folder}, which is not a folder")
        return ModelsFolder(folder, "KMDX_MODELS names it")
    if checkout := _of_checkout():
        return ModelsFolder(checkout, "it belongs to this checkout")
    import platformdirs

    return ModelsFolder(platformdirs.user_cache_path("kmdx") / "models", "it is in the user's cache")


def shipped_folder() -> Path:
    """Return the folder of the weights that come with the package: ``models/mini``, or in the wheel."""
    return (_of_checkout() or _PACKAGE) / "mini"


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


def _of_checkout() -> Path | None:
    checkout = _PACKAGE.parent
    models = checkout / "models"
    return models if (checkout / "pyproject.toml").is_file() and models.is_dir() else None
