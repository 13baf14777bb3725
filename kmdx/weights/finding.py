"""Which file in the models folder plays which role.

In this order:

1. a file whose content is known, by a published checksum or because it was pulled and proven,
   whatever it is called;
2. a file named after Meta's signature: ``d12395a8-e57c48e6.th``, ``d12395a8.th``, ``d12395a8.safetensors``;
3. the file that the published submission loads for the role. There the bass network lies in
   ``demucs_other.ckpt`` and the other network in ``demucs_bass.ckpt``.

A file that is known to hold another weight never takes a role by its name.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kmdx.errors import KmdxWarning, WeightsError
from kmdx.weights.checksum import file_sha256
from kmdx.weights.folder import models_folder
from kmdx.weights.pulled_files import record_of, records
from kmdx.weights.registry import LARGEST, Weight, registry

_CHECKSUM_IN_NAME = re.compile(r"-([0-9a-f]{8})\.th$")
_SUFFIXES = frozenset({".ckpt", ".th", ".pt", ".safetensors", ".onnx"})


class MissingWeights(WeightsError):
    """A weight that the models folder does not hold."""


@dataclass(frozen=True)
class FoundWeight:
    """The file that plays a role.

    Attributes
    ----------
    path : Path
    known : bool
        Whether its content is known to be that weight.
    how : str
        What gave it the role: ``content``, ``signature``, ``file name`` or ``plan``.
    """

    path: Path
    known: bool
    how: str


def find(weight: Weight, folder: Path | None = None) -> FoundWeight:
    """The file that holds a weight; it is not opened, except to take its checksum.

    Warns once for each folder that holds files of unknown content under the author's names.

    Raises
    ------
    MissingWeights
        If there is none; the message says what was looked for, where, and how to get it.
    WeightsError
        If the file is not what was pulled, or contradicts the checksum that its name stands for.
    """
    folder = models_folder(folder)
    found = find_quietly(weight, folder)
    if found is None:
        raise MissingWeights(missing_message(weight, folder))
    if problem := contradiction(weight, found, folder):
        raise WeightsError(f"{found.path} is {problem}")
    if found.how == "file name" and weight.published:
        _warn_of_names(folder)
    return found


def find_quietly(weight: Weight, folder: Path) -> FoundWeight | None:
    """What :func:`find` finds, but None where that is nothing, and without a warning."""
    if weight.path:
        return FoundWeight(weight.path, known=False, how="plan") if weight.path.is_file() else None
    known = _known_contents(weight, folder)
    named = dict(_named(weight, folder))
    wanted = {content: name for content, name in known.items() if name == weight.name}
    for path in (*named, *_weight_files(weight, folder)):
        if _content(path, wanted):
            return FoundWeight(path, known=True, how="content")
    for path, how in named.items():
        if _content(path, known) is None:
            return FoundWeight(path, known=False, how=how)
    return None


def find_all(wanted: Iterable[Weight], folder: Path | None = None) -> Mapping[str, FoundWeight | None]:
    """What plays the role of each weight, None where nothing does; nothing is warned of or raised."""
    folder = models_folder(folder)
    return {weight.name: find_quietly(weight, folder) for weight in wanted}


def missing_message(weight: Weight, folder: Path) -> str:
    """That a weight is missing: what was looked for, where, and how to get it."""
    if weight.path:
        what = "is not a file" if os.path.exists(weight.path) else "is missing"  # noqa: PTH110 - Path.exists raises of a long name
        return f"{weight.path} {what}: expected the file of {weight.title[:1].lower()}{weight.title[1:]}"
    known = _known_contents(weight, folder)
    names = _names(weight)
    if not names:
        return f"{weight.name} is missing: nothing says which file holds it"
    there = [name for name in names if (folder / name).is_file()]
    others = "".join(f" ({name} is known to hold {_content(folder / name, known)})" for name in there)
    size = f" (about {weight.bytes / 1e6:.0f} MB)" if weight.bytes else ""
    *most, last = names
    looked_for = f"{', '.join(most)} or {last}" if most else last
    return (
        f"{weight.name} is missing: looked for {looked_for} in {folder}{others}; "
        f"`kmdx models pull {weight.name}` gets it{size}"
    )


def contradiction(weight: Weight, found: FoundWeight, folder: Path) -> str | None:
    """What is wrong with a file that is not what its name or its record says; None if nothing is."""
    if found.known or weight.path:
        return None
    record = record_of(found.path, folder)
    if record and file_sha256(found.path) != record.sha256:
        return f"damaged: not what was pulled on {record.date}; delete it and pull {weight.name} again"
    file = found.path.relative_to(folder).as_posix()
    published = next((source.sha256 for source in weight.published if source.file == file), None)
    hexadecimal = _CHECKSUM_IN_NAME.search(file)
    expected = published or (hexadecimal and hexadecimal[1])
    if not expected or file_sha256(found.path).startswith(expected):
        return None
    return f"damaged: its sha256 does not begin with {expected[:8]}; delete it and pull {weight.name} again"


def _named(weight: Weight, folder: Path) -> Iterator[tuple[Path, str]]:
    """The files there are under one of the weight's names, and which kind of name it is."""
    for name in _names(weight):
        if (folder / name).is_file():
            by_signature = weight.signature and name.startswith(weight.signature)
            yield folder / name, "signature" if by_signature else "file name"
    if weight.signature:
        for path in sorted(folder.glob(f"{weight.signature}-{'[0-9a-f]' * 8}.th")):
            yield path, "signature"


def _names(weight: Weight) -> list[str]:
    """The names that a weight's file can have, relative to the folder, the most telling first."""
    names = [source.file for source in weight.published]
    if weight.signature:
        names += [f"{weight.signature}.th", f"{weight.signature}.safetensors"]
    return list(dict.fromkeys([*names, *(source.file for source in weight.sources)]))


def _weight_files(weight: Weight, folder: Path) -> list[Path]:
    """The files that may hold a weight: at the top, and where the author's layout puts it."""
    places = {folder, (folder / (weight.author_file or "")).parent}
    files = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path for path in files if path.suffix in _SUFFIXES and path.is_file())


def _known_contents(weight: Weight, folder: Path) -> dict[tuple[int | None, str | None], str]:
    """The weight's name by size and sha256, for every content that is published or was pulled and proven."""
    pulled = records(folder).values()
    return {(record.bytes, record.sha256): record.weight for record in pulled if record.known} | {
        (source.bytes, source.sha256): any_weight.name
        for any_weight in (*registry().values(), weight)
        for source in any_weight.contents
    }


def _content(path: Path, known: Mapping[tuple[int | None, str | None], str]) -> str | None:
    """The weight that a file is known to hold; its checksum is taken only where its form fits one.

    Of the hub's files the size is not published: each safetensors file may be one.
    """
    size = path.stat().st_size
    sizes = {known_size for known_size, _ in known}
    if size not in sizes and not (None in sizes and size <= LARGEST and _is_safetensors(path)):
        return None
    sha256 = file_sha256(path)
    return known.get((size, sha256)) or known.get((None, sha256))


def _is_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"  # the size of the header is before it
    except OSError:
        return False


@functools.cache
def _warn_of_names(folder: Path) -> None:
    """Warn, once for each folder, that file names and not contents decide."""
    warnings.warn(
        f"{folder} holds demucs files of unknown content: they play the roles that the published submission "
        "gives their names (bass from demucs_other.ckpt, other from demucs_bass.ckpt); "
        "`kmdx models verify` lists them",
        KmdxWarning,
        stacklevel=3,
    )
