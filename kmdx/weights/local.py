"""Which file of the models folder is which weight, and is it intact?

A file is taken for a weight by, in this order:

1. its content, whatever its name: it has a published checksum, or was pulled and verified;
2. a name after Meta's signature: ``d12395a8-e57c48e6.th``, ``d12395a8.th``, ``d12395a8.safetensors``;
3. the name under which the published submission loads it. There the bass network is in
   ``demucs_other.ckpt`` and the other network in ``demucs_bass.ckpt``.

A file that is known to contain another weight is never chosen by its name. ``pulled.json`` records what was
pulled into the folder, so that an intact file can be distinguished from a damaged one.
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
from kmdx.weights.folder import models_folder, rewrite
from kmdx.weights.loading import load
from kmdx.weights.registry import LARGEST, Weight, registry

if TYPE_CHECKING:
    from torch import Tensor

_RECORDS = "pulled.json"
_CHECKSUM_IN_NAME = re.compile(r"-([0-9a-f]{8})\.th$")
_SUFFIXES = frozenset({".ckpt", ".th", ".pt", ".safetensors", ".onnx"})


class MissingWeights(WeightsError):
    """A weight that is not in the models folder."""


@dataclass(frozen=True)
class FoundWeight:
    """The file that was found for a weight.

    Attributes
    ----------
    path : Path
    known : bool
        Whether its content is known to be that weight.
    how : str
        What it was found by: ``content``, ``signature``, ``file name`` or ``plan``.
    """

    path: Path
    known: bool
    how: str


@dataclass(frozen=True)
class WeightStatus:
    """What is known about the file of a weight.

    Attributes
    ----------
    weight : Weight
    path : Path, optional
        The file, if there is one.
    message : str
        The same in words.
    known : bool
        Whether its content is known to be that published weight.
    intact : bool
        Whether it is complete: as published, pulled or exported, or at least readable from end to end.
    mismatch : bool
        Whether it contains another weight, or states that it was tuned for another source.
    """

    weight: Weight
    path: Path | None
    message: str
    known: bool = False
    intact: bool = False
    mismatch: bool = False

    @property
    def ok(self) -> bool:
        """Whether the file can be used as this weight."""
        return self.intact and not self.mismatch


@dataclass(frozen=True)
class PulledFile:
    """The record of a pulled file.

    ``known`` means that its content was verified to be the weight's, by a checksum that the publisher states.
    """

    weight: str
    sha256: str
    bytes: int
    source: str
    date: str
    known: bool


def find(weight: Weight, folder: Path | None = None) -> FoundWeight:
    """Find the file of a weight. It is not opened, except to compute its checksum.

    Warns once per folder if file names and not contents decide which file is used.

    Raises
    ------
    MissingWeights
        If there is none; the message says what was looked for, where, and how to get it.
    WeightsError
        If the file is not what was pulled or exported, or contradicts the checksum in its name.
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
    """Find the file of each weight, None if there is none, without warnings and errors."""
    folder = models_folder(folder)
    return {weight.name: _find(weight, folder) for weight in wanted}


def verify(folder: Path | None = None, weights: Iterable[Weight] | None = None) -> list[WeightStatus]:
    """Return the status of each weight, by default of the whole registry."""
    chosen = registry().values() if weights is None else weights
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
    """Return the sha256 of a file, remembered as long as its size and time stay the same."""
    stat = path.stat()
    return _file_sha256(path, stat.st_size, stat.st_mtime_ns)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state dict, the same for a network in float16 and widened to float32.

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
    except (DocumentError, TypeError, AttributeError):  # the latter two if it is not a table of records
        return {}


def add_record(folder: Path, file: str, record: PulledFile) -> None:
    """Write the record of a file, replacing its previous one.

    Raises
    ------
    WeightsError
        If the folder cannot be written to.
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
    """What was looked for, where, and how to get it."""
    if weight.path:
        what = "is not a file" if os.path.exists(weight.path) else "is missing"  # noqa: PTH110 - Path.exists fails for a long name
        return f"{weight.path} {what}: expected the file of {weight.title[:1].lower()}{weight.title[1:]}"
    names = _names(weight)
    if not names:
        return f"{weight.name} is missing: nothing says which file holds it"
    known = _known_contents(weight, folder)
    there = [name for name in names if (folder / name).is_file()]
    others = "".join(f" ({name} is known to hold {_content(folder / name, known)})" for name in there)
    size = f" (about {weight.bytes / 1e6:.0f} MB)" if weight.bytes else ""
    *most, last = names
    looked_for = f"{', '.join(most)} or {last}" if most else last
    return (
        f"{weight.name} is missing: looked for {looked_for} in {folder}{others}; "
        f"`kmdx models pull {weight.name}` gets it{size}"
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
        return f"damaged: not what was pulled on {record.date}; delete it and pull {weight.name} again"
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
    tuned_for, mismatch = checkpoint.tuned_for, f"mismatch: by {found.how} it plays"
    owners = [other.name for other in registry().values() if digest and other.state_sha256 == digest]
    if owners:
        message = f"{mismatch} {weight.name}, but its tensors are those of {owners[0]}"
        return WeightStatus(weight, found.path, message, intact=True, mismatch=True)
    if weight.tuned_for and tuned_for and tuned_for != weight.tuned_for:
        message = f"{mismatch} {weight.tuned_for}, but it says it was tuned for {tuned_for}"
        return WeightStatus(weight, found.path, message, intact=True, mismatch=True)
    evidence = f", tuned for {tuned_for} as it says itself" if tuned_for else ""
    message = f"unknown content, readable; role by {found.how}{evidence}"
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
    """The files that may contain a weight: at the top, and where the author's layout puts it."""
    places = {folder, (folder / (weight.author_file or "")).parent}
    paths = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path for path in paths if path.suffix in _SUFFIXES and path.is_file())


def _known_contents(weight: Weight, folder: Path) -> dict[tuple[int | None, str | None], str]:
    """The weight's name by size and sha256, for all contents that are published or were verified."""
    pulled = records(folder).values()
    return {(record.bytes, record.sha256): record.weight for record in pulled if record.known} | {
        (source.bytes, source.sha256): any_weight.name
        for any_weight in (*registry().values(), weight)
        for source in any_weight.contents
    }


def _content(path: Path, known: Mapping[tuple[int | None, str | None], str]) -> str | None:
    """The weight that a file is known to contain; its checksum is computed only if its size fits one.

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
    """Warn, once per folder, that file names and not contents decide."""
    warnings.warn(
        f"{folder} holds demucs files of unknown content: they play the roles that the published submission "
        "gives their names (bass from demucs_other.ckpt, other from demucs_bass.ckpt); "
        "`kmdx models verify` lists them",
        KmdxWarning,
        stacklevel=3,
    )


@functools.lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, modified: int) -> str:
    return files.sha256(path)
