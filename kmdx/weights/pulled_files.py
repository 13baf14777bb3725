"""What was pulled into a models folder: ``pulled.json`` tells a file that is whole from a damaged one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from kmdx.documents import read_json
from kmdx.errors import DocumentError
from kmdx.weights.folder import rewriting

_NAME = "pulled.json"


@dataclass(frozen=True)
class PulledFile:
    """One pulled file.

    ``known`` says that the content was proven to be the weight's, by a checksum that its publisher
    states; a file without one is recorded as it came.
    """

    weight: str
    sha256: str
    bytes: int
    source: str
    date: str
    known: bool


def records(folder: Path) -> Mapping[str, PulledFile]:
    """The records of a folder by relative file name; none where there is no readable ``pulled.json``."""
    try:
        entries = read_json(folder / _NAME)
        return {file: PulledFile(**entry) for file, entry in entries.items()}
    except (DocumentError, TypeError, AttributeError):  # the latter two of a file that is no table of records
        return {}


def record_of(path: Path, folder: Path) -> PulledFile | None:
    """The record of one file; None for a file that was not pulled or lies elsewhere."""
    return records(folder).get(path.relative_to(folder).as_posix()) if folder in path.parents else None


def add_record(folder: Path, file: str, record: PulledFile) -> None:
    """Write one record, replacing the file's former one.

    Raises
    ------
    WeightsError
        If the folder cannot be written to.
    """
    with rewriting(folder / _NAME) as write:
        entries = {**records(folder), file: record}
        content = {name: asdict(entry) for name, entry in sorted(entries.items())}
        write(json.dumps(content, indent=2) + "\n")


def today() -> str:
    """The date that a record carries."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")
