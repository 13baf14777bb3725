"""Community checkpoints in the format of Music-Source-Separation-Training, which are imported when pulled.

They are listed in ``kmdx/checkpoints.yaml``. Their architecture is not: it comes from the checkpoint and its
config (:mod:`kmdx.msst`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from types import MappingProxyType

from kmdx.documents import YamlPart, parse
from kmdx.errors import DocumentError, WeightsError, suggest
from kmdx.networks import types
from kmdx.weights.registry import HttpSource, Weight, read_source

NOT_STATED = "a set that is not stated and may contain MUSDB18-HQ's test songs"
MIRROR = "https://huggingface.co/baicai1145/pymss/resolve/main"


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
    sources : tuple of HttpSource
        Where its publisher has it; empty only if it is not supported.
    mirror : str
        Path of a copy in :data:`MIRROR`; empty if there is none.
    config, config_sha256 : str
        URL of its config, and the published checksum of the config.
    trained_with : str
        Its training data.
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
    sources: tuple[HttpSource, ...]
    mirror: str = ""
    config: str = ""
    config_sha256: str | None = None
    trained_with: str = NOT_STATED
    score: str = ""
    score_source: str = ""
    unsupported: str = ""

    @property
    def marked_score(self) -> str:
        """Its score, with an asterisk if it is on songs that its training data may contain."""
        return self.score + ("*" if self.trained_with == NOT_STATED and "MUSDB18" in self.score else "")

    def weight(self) -> Weight:
        """The checkpoint as a weight that can be pulled."""
        copies = [
            replace(source, url=f"{MIRROR}/{self.mirror}") for source in self.sources[:1] if self.mirror
        ]
        return Weight(
            name=self.name,
            title=self.title,
            licence=self.licence,
            licence_note=f"Trained with {self.trained_with}.",
            trained_with=self.trained_with,
            architecture={"type": self.type, "sources": self.stems},
            sources=(*self.sources, *copies),
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
        hint = suggest(kind, types.TYPES)
        raise entries["type"].error(f"unknown type{hint}; available: {', '.join(types.TYPES)}")
    return part.read(
        CommunityCheckpoint,
        name=name,
        stems=tuple(stem.text() for stem in entries["stems"].elements()),
        sources=tuple(read_source(source) for source in entries["sources"].elements()),
    )
