"""Finds which file in the models folder contains which weight, and whether it is intact.

A weight's file is identified by, in this order:

1. its content, whatever its name, if its checksum is published or was verified when it was pulled;
2. a name with Meta's signature: ``d12395a8-e57c48e6.th``, ``d12395a8.th``, ``d12395a8.safetensors``;
3. the name under which the published submission loads it. In that submission, the bass network is in
   ``demucs_other.ckpt`` and the other network is in ``demucs_bass.ckpt``.

A file that is known to contain another weight is never identified by its name. ``pulled.json`` records which
files were pulled into the folder, so that a damaged file can be distinguished from an intact one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kmdx import files
from kmdx.documents import read_json
from kmdx.errors import DocumentError, KmdxWarning, WeightsError
from kmdx.weights.folder import described, models_folder, rewrite
from kmdx.weights.loading import load
from kmdx.weights.registry import LARGEST, Weight, published

if TYPE_CHECKING:
    from torch import Tensor

_RECORDS = "pulled.json"
_CHECKSUM_IN_NAME = re.compile(r"-([0-9a-f]{8})\.th$")
_SUFFIXES = frozenset({".ckpt", ".th", ".pt", ".safetensors", ".onnx"})


class MissingWeights(WeightsError):
    """A weight that is not in the models folder."""


@dataclass(frozen=True)
class FoundWeight:
    """The file that was found for a weight."""

    path: Path
    known: bool  # whether its content is known to be that weight
    how: str  # how it was identified: ``content``, ``signature``, ``file name`` or ``plan``


@dataclass(frozen=True)
class WeightStatus:
    """What is known about the file of a weight."""

    weight: Weight
    path: Path | None  # the file, if there is one
    message: str  # a description of the status
    known: bool = False  # whether its content is known to be that published weight
    intact: bool = False
    """Whether it is complete: as published, pulled or exported, or at least readable from end to end."""
    mismatch: bool = False
    """Whether it contains another weight, or its metadata states that it was tuned for another source."""

    @property
    def ok(self) -> bool:
        """Whether the file can be used as this weight."""
        return self.intact and not self.mismatch


@dataclass(frozen=True)
class PulledFile:
    """The record of a pulled file.

    ``known`` means that its content was verified with a checksum that the publisher states.
    """

    weight: str
    sha256: str
    bytes: int
    source: str
    date: str
    known: bool


def find(weight: Weight, folder: Path | None = None) -> FoundWeight:
    """Find the file of a weight. It is not opened, except to compute its checksum.

    Warns once per folder if files are identified only by their names.

    Raises
    ------
    MissingWeights
        If there is none; the message names the files and the folder searched, and the command to run.
    WeightsError
        If the file differs from what was pulled or exported, or from the checksum in its name.
    """
    folder = models_folder(folder)
    found = _find(weight, folder)
    if found is None:
        raise MissingWeights(_missing_message(weight, folder))
    if problem := _damage(weight, found, folder):
        raise WeightsError(f"{found.path} is {problem}")
    if found.how == "file name" and weight.published:
        _warn_of_names(folder)
    return found


def find_all(wanted: Iterable[Weight], folder: Path | None = None) -> Mapping[str, FoundWeight | None]:
    """Find the file of each weight (None if there is none) without warnings or errors."""
    folder = models_folder(folder)
    return {weight.name: _find(weight, folder) for weight in wanted}


def verify(folder: Path | None = None, weights: Iterable[Weight] | None = None) -> list[WeightStatus]:
    """Return the status of each weight, by default of the whole registry."""
    chosen = published().values() if weights is None else weights
    return [status(weight, folder) for weight in chosen]


def status(weight: Weight, folder: Path | None = None) -> WeightStatus:
    """Return the status of one weight; a file of unknown content is read from end to end."""
    folder = models_folder(folder)
    found = _find(weight, folder)
    if found is None:
        return WeightStatus(weight, None, _missing_message(weight, folder))
    if problem := _damage(weight, found, folder):
        return WeightStatus(weight, found.path, problem)
    if found.known:
        return WeightStatus(weight, found.path, "known content, intact", known=True, intact=True)
    if weight.sha256:
        message = "intact, verified by its sha256 in trained.yaml"
        return WeightStatus(weight, found.path, message, intact=True)
    if record := _record_of(found.path, folder):
        message = f"unknown content, intact: as pulled on {record.date}"
        return WeightStatus(weight, found.path, message, intact=True)
    try:
        return _status_by_reading(weight, found)
    except WeightsError as error:
        return WeightStatus(weight, found.path, str(error))


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, cached while its size and modification time stay the same."""
    stat = path.stat()
    return _file_sha256(path, stat.st_size, stat.st_mtime_ns)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict; it is the same for float16 values stored as float32.

    It covers the sorted names, the shapes, and the values, in float16 if that is lossless.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        if tensor.is_floating_point() and (half := tensor.half()).to(tensor.dtype).equal(tensor):
            tensor = half
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def records(folder: Path) -> Mapping[str, PulledFile]:
    """Return the records of a folder by relative file name; none if ``pulled.json`` is not readable."""
    try:
        entries = read_json(folder / _RECORDS)
        return {file: PulledFile(**entry) for file, entry in entries.items()}
    except (DocumentError, TypeError, AttributeError):  # the last two if it is not a table of records
        return {}


def add_record(folder: Path, file: str, record: PulledFile) -> None:
    """Write the record of a file, replacing its previous one.

    Raises :class:`WeightsError` if the folder cannot be written to.
    """

    def text() -> str:
        entries = {**records(folder), file: record}
        return json.dumps({name: asdict(entry) for name, entry in sorted(entries.items())}, indent=2) + "\n"

    rewrite(folder / _RECORDS, text)


def _find(weight: Weight, folder: Path) -> FoundWeight | None:
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


def _missing_message(weight: Weight, folder: Path) -> str:
    """The error for a missing weight: the names and the folder searched, and the command to get the file."""
    if weight.path:
        what = "is not a file" if os.path.exists(weight.path) else "is missing"  # noqa: PTH110 - Path.exists fails for a long name
        return f"{weight.path} {what}: the ensemble loads its weights from this file"
    names = _names(weight)
    if not names:
        return f"{weight.name} is missing: its file has no known name"
    known = _known_contents(weight, folder)
    there = [name for name in names if (folder / name).is_file()]
    others = "".join(f" ({name} is known to contain {_content(folder / name, known)})" for name in there)
    size = f" (about {weight.bytes / 1e6:.0f} MB)" if weight.bytes else ""
    *most, last = names
    looked_for = f"{', '.join(most)} or {last}" if most else last
    return (
        f"{weight.name} is missing: looked for {looked_for} in {described(folder)}{others}; "
        f"`kmdx models pull {weight.name}` downloads it{size}"
    )


def _damage(weight: Weight, found: FoundWeight, folder: Path) -> str | None:
    """How a file contradicts its name or its record; None if it does not."""
    if found.known:
        return None
    if weight.path:
        if not weight.sha256 or file_sha256(weight.path) == weight.sha256:
            return None
        return "damaged: its sha256 is not the one in trained.yaml; restore it or export it again"
    record = _record_of(found.path, folder)
    if record and file_sha256(found.path) != record.sha256:
        changed = f"it has changed since it was pulled on {record.date}"
        return f"damaged: {changed}; delete it and pull {weight.name} again"
    file = found.path.relative_to(folder).as_posix()
    published = next((source.sha256 for source in weight.published if source.file == file), None)
    hexadecimal = _CHECKSUM_IN_NAME.search(file)
    expected = published or (hexadecimal and hexadecimal[1])
    if not expected or file_sha256(found.path).startswith(expected):
        return None
    return f"damaged: its sha256 does not begin with {expected[:8]}; delete it and pull {weight.name} again"


def _status_by_reading(weight: Weight, found: FoundWeight) -> WeightStatus:
    checkpoint = load(found.path)
    digest = state_sha256(checkpoint.state) if checkpoint.state else None
    if digest and digest == weight.state_sha256:
        return WeightStatus(weight, found.path, "known tensors, intact", known=True, intact=True)
    tuned_for, mismatch = checkpoint.tuned_for, f"mismatch: identified by {found.how} as"
    owners = [other.name for other in published().values() if digest and other.state_sha256 == digest]
    if owners:
        message = f"{mismatch} {weight.name}, but its tensors are those of {owners[0]}"
        return WeightStatus(weight, found.path, message, intact=True, mismatch=True)
    if weight.tuned_for and tuned_for and tuned_for != weight.tuned_for:
        message = f"{mismatch} {weight.tuned_for}, but its metadata says it was tuned for {tuned_for}"
        return WeightStatus(weight, found.path, message, intact=True, mismatch=True)
    evidence = f"; its metadata says it was tuned for {tuned_for}" if tuned_for else ""
    message = f"unknown content, readable; identified by {found.how}{evidence}"
    return WeightStatus(weight, found.path, message, intact=True)


def _record_of(path: Path, folder: Path) -> PulledFile | None:
    """The record of a file; None if it was not pulled or is elsewhere."""
    return records(folder).get(path.relative_to(folder).as_posix()) if folder in path.parents else None


def _named(weight: Weight, folder: Path) -> Iterator[tuple[Path, str]]:
    """The existing files with one of the weight's names, and the kind of name."""
    for name in _names(weight):
        if (folder / name).is_file():
            by_signature = weight.signature and name.startswith(weight.signature)
            yield folder / name, "signature" if by_signature else "file name"
    if weight.signature:
        for path in sorted(folder.glob(f"{weight.signature}-{'[0-9a-f]' * 8}.th")):
            yield path, "signature"


def _names(weight: Weight) -> list[str]:
    """The possible names of a weight's file, relative to the folder, the most specific first."""
    names = [source.file for source in weight.published]
    if weight.signature:
        names += [f"{weight.signature}.th", f"{weight.signature}.safetensors"]
    return list(dict.fromkeys([*names, *(source.file for source in weight.sources)]))


def _weight_files(weight: Weight, folder: Path) -> list[Path]:
    """The files that may contain a weight: in the folder itself, and in the author's subfolder for it."""
    places = {folder, (folder / (weight.author_file or "")).parent}
    paths = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path for path in paths if path.suffix in _SUFFIXES and path.is_file())


def _known_contents(weight: Weight, folder: Path) -> dict[tuple[int | None, str | None], str]:
    """Names of weights by size and sha256, for all contents that are published or were verified."""
    pulled = records(folder).values()
    return {(record.bytes, record.sha256): record.weight for record in pulled if record.known} | {
        (source.bytes, source.sha256): any_weight.name
        for any_weight in (*published().values(), weight)
        for source in any_weight.contents
    }


def _content(path: Path, known: Mapping[tuple[int | None, str | None], str]) -> str | None:
    """The weight that a file is known to contain; its checksum is computed only if its size is a known one.

    The hub does not publish the size of its files, so each safetensors file may be one of them.
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
    """Warn, once per folder, that files are identified only by their names."""
    warnings.warn(
        f"{folder} contains demucs files of unknown content, which are identified by their names as in the "
        "published submission (bass from demucs_other.ckpt, other from demucs_bass.ckpt); "
        "`kmdx models verify` lists them",
        KmdxWarning,
        stacklevel=3,
    )


@functools.lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, modified: int) -> str:
    return files.sha256(path)
