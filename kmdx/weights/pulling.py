"""Pull a weight: try its sources in turn until one delivers a file that passes its check."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from kmdx.errors import DownloadError, WeightsError
from kmdx.weights import direct, drive, hub, npm
from kmdx.weights.download import Progress, reason
from kmdx.weights.fetched import Fetched
from kmdx.weights.folder import models_folder
from kmdx.weights.progress import progress_bar
from kmdx.weights.records import Record, add_record, today
from kmdx.weights.registry import Source, Weight
from kmdx.weights.verifying import status

_FETCH: Mapping[str, Callable[..., Fetched]] = {
    "hub": hub.fetch,
    "http": direct.fetch,
    "drive": drive.fetch,
    "npm": npm.fetch,
}


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr)


def pull(
    weight: Weight,
    folder: Path | None = None,
    report: Callable[[str], None] = _to_standard_error,
    progress: Progress | None = None,
) -> Path:
    """Get a weight's file into the models folder, unless an intact one is there.

    A download that was cut off goes on where it stopped, also in a later process. The file comes to
    lie under its final name only when it is whole and checked.

    Parameters
    ----------
    weight : Weight
        What to get.
    folder : Path, optional
        The models folder, the usual one if not given.
    report : callable, optional
        Called with a line for each step; printed to standard error if not given.
    progress : callable, optional
        Called with the bytes so far and the bytes in all; a bar on standard error, where that is a
        terminal, if not given.

    Raises
    ------
    WeightsError
        If the models folder cannot be written to.
    DownloadError
        If no source could deliver; the message gives each one's reason.
    """
    folder = models_folder(folder)
    present = status(weight, folder)
    if present.path and present.ok:
        report(f"{weight.name}: already there ({present.path})")
        return present.path
    if not weight.sources:
        raise DownloadError(f"{weight.name} is no published weight: nothing says where to pull it from")
    _check_writable(folder)
    workspace = folder / ".partial" / weight.name
    failures = []
    for source in weight.sources:
        report(f"{weight.name}: trying {source}")
        try:
            fetched = _fetch(weight, source, workspace / source.kind, progress)
        except Exception as error:  # any failure of a source makes room for the next one
            failures.append(f"{source}: {reason(error)}")
            report(f"{weight.name}: failed, {reason(error)}")
            continue
        path = _place(weight, source, fetched, folder)
        _remove(workspace)
        report(f"{weight.name}: {path} (sha256 {fetched.sha256})")
        return path
    _remove_empty(workspace)
    raise DownloadError(
        f"{weight.name} could not be pulled: {'; '.join(failures)}; a file that you have may be put into "
        f"{folder} as {weight.sources[0].file}"
    )


def _check_writable(folder: Path) -> None:
    """Raise before anything is asked for if the models folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WeightsError(f"the models folder {folder} cannot be written to: {error.strerror}") from error


def _remove_empty(workspace: Path) -> None:
    """Remove the folders of sources that delivered nothing; what was begun stays, to go on from."""
    for place in (*workspace.glob("*"), workspace, workspace.parent):
        with contextlib.suppress(OSError):
            place.rmdir()


def _fetch(weight: Weight, source: Source, workspace: Path, progress: Progress | None) -> Fetched:
    if progress:
        return _FETCH[source.kind](weight, source, workspace, progress)
    with progress_bar(weight.name) as bar:
        return _FETCH[source.kind](weight, source, workspace, bar)


def _remove(workspace: Path) -> None:
    shutil.rmtree(workspace, ignore_errors=True)
    with contextlib.suppress(OSError):  # other weights' downloads are waiting there
        workspace.parent.rmdir()


def _place(weight: Weight, source: Source, fetched: Fetched, folder: Path) -> Path:
    path = folder / source.file
    path.parent.mkdir(parents=True, exist_ok=True)
    fetched.path.replace(path)
    record = Record(
        weight=weight.name,
        sha256=fetched.sha256,
        bytes=path.stat().st_size,
        source=str(source),
        date=today(),
        known=fetched.known,
    )
    add_record(folder, source.file, record)
    return path
