"""Pull a file from a plain URL."""

from __future__ import annotations

from pathlib import Path

from kmdx.weights.download import Progress, download
from kmdx.weights.fetched import Fetched
from kmdx.weights.registry import HttpSource, Weight


def fetch(weight: Weight, source: HttpSource, workspace: Path, progress: Progress) -> Fetched:
    """Download the file and check it against its published checksum."""
    path = workspace / Path(source.file).name
    sha256 = download(source.url, path, progress, bytes=source.bytes, sha256=source.sha256)
    return Fetched(path, sha256, known=source.sha256 is not None)
