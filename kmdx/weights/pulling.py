"""Pull weights: try each one's sources in turn until one delivers a file that passes its check."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from kmdx import files
from kmdx.errors import DownloadError, WeightsError
from kmdx.weights.download import Fetched, Progress, Unreachable, one_line
from kmdx.weights.fetching import fetch
from kmdx.weights.folder import locked, models_folder
from kmdx.weights.pulled_files import PulledFile, add_record, today
from kmdx.weights.registry import DownloadSource, HttpSource, Weight
from kmdx.weights.verifying import status

Report = Callable[[str], None]


class _Failure(NamedTuple):
    """Why a source did not deliver; ``host`` is what no connection could be made to."""

    source: DownloadSource
    reason: str
    host: str = ""


class _NotPulled(DownloadError):
    """A weight that no source could deliver, and why."""

    def __init__(self, weight: Weight, failures: list[_Failure], folder: Path) -> None:
        self.weight, self.failures = weight, failures
        reasons = "; ".join(f"{failure.source}: {failure.reason}" for failure in failures)
        super().__init__(
            f"{weight.name} could not be pulled: {reasons}; if you have the file, put it into {folder} as "
            f"{weight.sources[0].file}"
        )


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr)


def pull(
    weight: Weight,
    folder: Path | None = None,
    report: Report = _to_standard_error,
    progress: Progress | None = None,
) -> Path:
    """Get a weight's file into the models folder, unless an intact one is there.

    A download that was cut off is resumed, also by a later process. The file appears under its final name
    only when it is complete and checked. Where another process is pulling the same weight, this one waits
    and then takes what it has pulled.

    Parameters
    ----------
    weight : Weight
        What to get.
    folder : Path, optional
        The models folder, the usual one if not given.
    report : callable, optional
        Called with a line for each step and with the license; printed to standard error if not given.
    progress : callable, optional
        Called with the bytes so far and the bytes in all; a bar on standard error, where that is a
        terminal, if not given.

    Returns
    -------
    Path
        Where the file is.

    Raises
    ------
    WeightsError
        If the models folder cannot be written to.
    DownloadError
        If no source could deliver; the message gives each one's reason.
    """
    path = _pull(weight, models_folder(folder), report, progress, {})
    report(_license([weight]))
    return path


def pull_all(
    weights: Iterable[Weight], folder: Path | None = None, report: Report = _to_standard_error
) -> Iterator[tuple[Weight, Path]]:
    """Pull several weights, and yield each with its path when it is there.

    What no connection could be made to is not tried again for the next weight. At the end each license is
    reported once, with the weights that it is of.

    Raises
    ------
    WeightsError
        If the models folder cannot be written to.
    DownloadError
        At the end, if any weight could not be pulled; its reasons have been reported.
    """
    folder, chosen = models_folder(folder), list(weights)
    there: list[Weight] = []
    failed: dict[str, DownloadError] = {}
    unreachable: dict[str, _Failure] = {}
    for weight in chosen:
        try:
            path = _pull(weight, folder, report, None, unreachable)
        except DownloadError as error:
            failed[weight.name] = error
        else:
            there.append(weight)
            yield weight, path
    for note in dict.fromkeys(weight.license_note for weight in there):
        report(_license([weight for weight in there if weight.license_note == note]))
    if len(failed) > 1:
        raise DownloadError(_summary(failed, len(chosen), folder))
    for only in failed.values():
        raise only


def _license(weights: list[Weight]) -> str:
    """The license of weights that share one, in a line."""
    names = ", ".join(weight.name for weight in weights)
    return f"license of {names}: {weights[0].license}. {weights[0].license_note}"


def _summary(failed: Mapping[str, DownloadError], count: int, folder: Path) -> str:
    """Why weights could not be pulled, in a line: each reason once, and not more than three."""
    hosts: dict[str, None] = {}
    reasons: dict[str, None] = {}
    for error in failed.values():
        for failure in error.failures if isinstance(error, _NotPulled) else ():
            (hosts if failure.host else reasons)[failure.host or failure.reason] = None
        if not isinstance(error, _NotPulled):
            reasons[str(error)] = None
    listed = ([f"no connection to {', '.join(hosts)}"] if hosts else []) + list(reasons)
    if len(listed) > 3:
        listed[2:] = [f"{len(listed) - 2} other reasons, given above"]
    which = "" if len(failed) == count else f" ({', '.join(failed)})"
    return (
        f"{len(failed)} of {count} weight files could not be pulled{which}: {'; '.join(listed)}; files that "
        f"you have go into {folder}, under the names that `kmdx models verify` shows"
    )


def _pull(
    weight: Weight,
    folder: Path,
    report: Report,
    progress: Progress | None,
    unreachable: dict[str, _Failure],
) -> Path:
    if path := _there(weight, folder, report):
        return path
    if not weight.sources:
        raise DownloadError(f"{weight.name} is not published anywhere: copy its file to the models folder")
    mode = _mode_of_new_files(folder)

    def on_wait() -> None:
        report(f"{weight.name}: waiting for another process that is pulling it")

    with locked(folder, weight.name, on_wait) as alone:
        if path := _there(weight, folder, report):  # another process has pulled it meanwhile
            return path
        if not alone:
            report(f"{weight.name}: {folder} cannot be locked; another process may pull the same at once")
        own = f"{weight.name}.{os.getpid()}.{threading.get_ident()}"
        workspace = folder / ".partial" / (weight.name if alone else own)
        try:
            source, fetched = _try_sources(weight, folder, workspace, report, progress, unreachable)
            path = _place(weight, source, fetched, folder, mode)
        except BaseException:
            _remove(workspace, only_empty=alone)  # what has begun to come stays, to be resumed
            raise
        _remove(workspace)
    report(f"{weight.name}: {path} (sha256 {fetched.sha256})")
    return path


def _there(weight: Weight, folder: Path, report: Report) -> Path | None:
    present = status(weight, folder)
    if not present.path or not present.ok:
        return None
    report(f"{weight.name}: already there ({present.path})")
    return present.path


def _try_sources(
    weight: Weight,
    folder: Path,
    workspace: Path,
    report: Report,
    progress: Progress | None,
    unreachable: dict[str, _Failure],
) -> tuple[DownloadSource, Fetched]:
    """The first source that delivers, and what it delivered."""
    from kmdx.terminal import download_bar  # which a program that has its weights does not need

    failures, skipped = [], []
    for source in weight.sources:
        place = urlsplit(source.url).netloc if isinstance(source, HttpSource) else source.kind
        if known := unreachable.get(place):
            failures.append(known._replace(source=source))
            skipped.append(known.host)
            continue
        report(f"{weight.name}: trying {source}")
        try:
            with contextlib.nullcontext(progress) if progress else download_bar(weight.name) as shown:
                return source, fetch(weight, source, workspace / source.kind, shown)
        except Exception as error:  # any failure of a source makes room for the next one
            host = error.host if isinstance(error, Unreachable) else ""
            failures.append(_Failure(source, one_line(error) or type(error).__name__, host))
            report(f"{weight.name}: failed, {failures[-1].reason}")
            if host:
                unreachable[place] = failures[-1]
    if skipped:
        report(f"{weight.name}: not tried again, no connection to {', '.join(skipped)}")
    raise _NotPulled(weight, failures, folder)


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that the umask gives a new file of the models folder.

    Raises
    ------
    WeightsError
        If it cannot be written to: better now than after a download.
    """
    probe = folder / f".probe.{secrets.token_hex(8)}"  # not the process: two of its threads may pull at once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
    except OSError as error:
        raise WeightsError(f"the models folder {folder} cannot be written to: {error.strerror}") from error
    return mode


def _place(weight: Weight, source: DownloadSource, fetched: Fetched, folder: Path, mode: int) -> Path:
    """Move a file to its final name, after its record: without one its content might be unknown."""
    path = folder / source.file
    record = PulledFile(
        weight=weight.name,
        sha256=fetched.sha256,
        bytes=fetched.path.stat().st_size,
        source=str(source),
        date=today(),
        known=fetched.known,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # where the file system has permissions of its own
            fetched.path.chmod(mode)
        add_record(folder, source.file, record)
        files.commit(fetched.path, path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _remove(workspace: Path, *, only_empty: bool = False) -> None:
    """Remove the workspace of a weight, or only what is empty in it."""
    if not only_empty:
        shutil.rmtree(workspace, ignore_errors=True)
    for place in (*workspace.glob("*"), workspace, workspace.parent):
        with contextlib.suppress(OSError):  # something is in it, or it is gone
            place.rmdir()
