"""Community checkpoints in the format of Music-Source-Separation-Training, which are imported when pulled.

They are listed in ``kmdx/checkpoints.yaml``. Their architecture is not: it comes from the checkpoint and its
config (:mod:`kmdx.msst`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from kmdx.documents import YamlPart, parse
from kmdx.errors import DocumentError, WeightsError
from kmdx.networks import types
from kmdx.weights.registry import DownloadSource, Weight, read_source

TRAINED_ON_TRAIN = "MUSDB18-HQ's train songs only"


@dataclass(frozen=True, kw_only=True)
class CommunityCheckpoint:
    """A published checkpoint.

    Attributes
    ----------
    name, title : str
    type : str
        Type of its network.
    stems : tuple of str
        What it separates, in words.
    licence : str
        What is known about its license.
    sources : tuple of DownloadSource
        Where to pull it from, in the order to try; empty if it is not supported.
    trained_on : str
        Its training data.
    config : DownloadSource, optional
        Where its config is published.
    score, score_source : str
        Its published score and songs, and who published it; empty if there is none.
    unsupported : str
        Why it cannot be run; empty if it can.
    """

    name: str
    title: str
    type: str
    stems: tuple[str, ...]
    licence: str
    sources: tuple[DownloadSource, ...]
    trained_on: str
    config: DownloadSource | None = None
    score: str = ""
    score_source: str = ""
    unsupported: str = ""

    @property
    def may_know_test_songs(self) -> bool:
        """Whether its training data may include MUSDB18-HQ's test songs."""
        return self.trained_on != TRAINED_ON_TRAIN

    @property
    def bytes(self) -> int | None:
        """Size of the download."""
        return next((source.bytes for source in self.sources if source.bytes), None)

    def weight(self) -> Weight:
        """The checkpoint as a weight that can be pulled."""
        return Weight(
            name=self.name,
            title=self.title,
            licence=self.licence,
            licence_note=f"Trained on: {self.trained_on}.",
            architecture={"type": self.type, "sources": self.stems},
            sources=self.sources,
        )


@functools.cache
def checkpoints() -> Mapping[str, CommunityCheckpoint]:
    """Return all community checkpoints by name.

    Raises
    ------
    WeightsError
        If their file is malformed.
    """
    try:
        root = parse(resources.files("kmdx").joinpath("checkpoints.yaml").read_text("utf-8"))
        return MappingProxyType({name: _checkpoint(name, part) for name, part in root.entries().items()})
    except DocumentError as error:
        raise WeightsError(f"checkpoints: {error}") from error


def _checkpoint(name: str, part: YamlPart) -> CommunityCheckpoint:
    entries = part.entries()
    kind = entries["type"].text()
    if kind not in types.TYPES:
        raise entries["type"].error(f"unknown type; available: {', '.join(types.TYPES)}")
    return part.read(
        CommunityCheckpoint,
        name=name,
        stems=tuple(stem.text() for stem in entries["stems"].elements()),
        sources=tuple(read_source(source) for source in entries["sources"].elements()),
        config=read_source(entries["config"]) if "config" in entries else None,
    )
