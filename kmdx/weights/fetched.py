"""What a source delivers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fetched:
    """A file that is ready to be moved into place, and whether its content is proven to be the weight's."""

    path: Path
    sha256: str
    known: bool
