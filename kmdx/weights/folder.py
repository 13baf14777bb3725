"""Where weight files lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import kmdx
from kmdx.errors import WeightsError


class ModelsFolder(NamedTuple):
    """The models folder and why it is that one."""

    path: Path
    reason: str


def models_folder(folder: Path | None = None) -> Path:
    """The folder that holds the weight files: the given one, else the usual one; it need not exist yet."""
    return folder or where().path


def where() -> ModelsFolder:
    """The usual models folder and the reason for it.

    ``$KMDX_MODELS`` comes first, then ``models/`` of a checkout, then the user's cache.

    Raises
    ------
    WeightsError
        If ``$KMDX_MODELS`` names a file.
    """
    named = os.environ.get("KMDX_MODELS")
    if named:
        folder = Path(named).expanduser()
        if folder.exists() and not folder.is_dir():
            raise WeightsError(f"KMDX_MODELS names {folder}, which is no folder")
        return ModelsFolder(folder, "KMDX_MODELS names it")
    if checkout := _of_checkout():
        return ModelsFolder(checkout, "it belongs to this checkout")
    import platformdirs

    return ModelsFolder(platformdirs.user_cache_path("kmdx") / "models", "it is in the user's cache")


def shipped_folder() -> Path:
    """The folder of the weights that come with the package: a checkout's ``models/mini``, or in the wheel."""
    return (_of_checkout() or Path(kmdx.__file__).parent) / "mini"


def _of_checkout() -> Path | None:
    checkout = Path(kmdx.__file__).parents[1]
    models = checkout / "models"
    return models if (checkout / "pyproject.toml").is_file() and models.is_dir() else None
