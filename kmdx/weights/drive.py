"""Pull from the author's Google Drive folder, where nobody publishes checksums."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from kmdx.weights.download import TIMEOUT, Progress, SourceError, download
from kmdx.weights.fetched import Fetched
from kmdx.weights.loading import load
from kmdx.weights.registry import DriveSource, Weight


def fetch(weight: Weight, source: DriveSource, workspace: Path, progress: Progress) -> Fetched:
    """Download the file and read it from end to end, the only check there is."""
    url = f"https://drive.google.com/uc?id={_identifier(source)}"
    path = workspace / Path(source.file).name
    sha256 = download(url, path, progress)
    try:
        load(path)
    except ValueError:
        path.unlink()
        raise
    return Fetched(path, sha256, known=False)


def _identifier(source: DriveSource) -> str:
    listing = _listing(source.folder)
    for path, identifier in listing.items():
        if f"/{path}".endswith(f"/{source.file}"):
            return identifier
    raise SourceError(f"no {source.file} among the {len(listing)} files there")


@functools.cache
def _listing(folder: str) -> Mapping[str, str]:
    """The folder's files with their identifiers; asked for once in a process."""
    import gdown

    files: Any = gdown.download_folder(
        url=folder, skip_download=True, quiet=True, use_cookies=False, timeout=TIMEOUT
    )
    return {PurePath(file.path).as_posix(): file.id for file in files}
