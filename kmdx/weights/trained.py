"""Weights that were trained here: ``trained.yaml`` in a models folder, beside the files it names.

Those of the small ensemble come with the package, in a folder of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmdx.documents import read_yaml
from kmdx.errors import DocumentError, WeightsError, quoted, shown
from kmdx.networks.architecture import MAX_NAME
from kmdx.weights.folder import models_folder, rewriting, shipped_folder
from kmdx.weights.registry import Weight, check_path, own, registry
from kmdx.weights.registry import get as published

_NAME = "trained.yaml"


def trained(folder: Path | None = None) -> Mapping[str, Weight]:
    """The weights of a models folder that were trained here, by name.

    Raises
    ------
    WeightsError
        If its ``trained.yaml`` is malformed.
    """
    folder = models_folder(folder)
    return {name: _weight(folder, name, entry) for name, entry in _entries(folder).items()}


def shipped() -> Mapping[str, Weight]:
    """The weights that come with the package, by name.

    Raises
    ------
    WeightsError
        If their ``trained.yaml`` is malformed.
    """
    note = "Comes with the package; trained on rendered songs and on songs in the public domain (CC0)."
    return {
        name: replace(weight, license="MIT", license_note=note)
        for name, weight in trained(shipped_folder()).items()
    }


def get(name: str) -> Weight:
    """The weight of that name or signature: published, come with the package, or trained here.

    Raises
    ------
    WeightsError
        If there is none; the message lists what comes close.
    """
    try:
        return published(name)
    except WeightsError:
        others = {**trained(), **shipped()}
    return others[name] if name in others else published(name, others)


def known() -> Mapping[str, Weight]:
    """Every weight that plans can name: published, come with the package, trained here, in this order.

    Of two with one name the first is meant.
    """
    named = {**trained(), **shipped(), **registry()}
    order = dict.fromkeys((*registry(), *shipped(), *trained()))
    return {name: named[name] for name in order}


def register(
    folder: Path,
    name: str,
    *,
    title: str,
    file: str,
    architecture: Mapping[str, Any],
    trained: str,
    started_from: Mapping[str, Any] | None = None,
    trained_with: str | None = None,
) -> None:
    """Record a trained weight in a models folder, replacing one of the same name, in one step.

    Parameters
    ----------
    folder : Path
    name : str
        What plans call it.
    title : str
    file : str
        Relative to the folder.
    architecture : mapping
        As in a plan.
    trained : str
        The date.
    started_from : mapping, optional
        The path and the sha256 of the weights that its training started from.
    trained_with : str, optional
        As in :class:`Weight`: also what those weights were trained with.

    Raises
    ------
    WeightsError
        If ``trained.yaml`` is malformed or cannot be written.
    """
    import yaml

    entry: dict[str, Any] = {"title": title, "file": file, "trained": trained}
    if started_from is not None:
        entry["started_from"] = dict(started_from)
    if trained_with is not None:
        entry["trained_with"] = trained_with
    entry["architecture"] = dict(architecture)
    with rewriting(folder / _NAME) as write:
        write(yaml.safe_dump({**_entries(folder), name: entry}, sort_keys=False, allow_unicode=True))


def _weight(folder: Path, name: str, entry: Any) -> Weight:
    """One entry as a weight."""
    where = f"{folder / _NAME}: the entry {shown(name)}"
    if not isinstance(entry, dict) or not isinstance(entry.get("architecture"), dict):
        raise WeightsError(f"{where}: expected a mapping with a file and an architecture")
    if not isinstance(entry.get("file"), str):
        raise WeightsError(f"{where}: expected the name of its file, not {quoted(entry.get('file'))}")
    if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME:
        raise WeightsError(f"{where}: expected a name of 1 to {MAX_NAME} bytes")
    try:
        weight = own(folder / check_path(entry["file"]), entry["architecture"])
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error
    trained_with = entry.get("trained_with")
    start = entry.get("started_from")
    origin = f", from {shown(Path(str(start.get('path'))).name)}" if isinstance(start, dict) else ""
    return replace(
        weight,
        name=name,
        title=shown(entry.get("title", weight.title)),
        license_note=f"Trained here on {shown(entry.get('trained', 'an unknown day'))}{origin}.",
        trained_with=None if trained_with is None else shown(trained_with),
    )


def _entries(folder: Path) -> dict[str, Any]:
    path = folder / _NAME
    if not path.is_file():
        return {}
    try:
        content = read_yaml(path)
    except DocumentError as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise WeightsError(f"{path}: expected weights by their names")
    return content
