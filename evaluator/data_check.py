"""Checks a run's data before any work: problems and fingerprints, saved in the run's folder.

The check reads every sample of the data set, so its result is kept in ``checked.json`` and used again while
the files and their description stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from evaluator import dataset
from evaluator.dataset import Track
from evaluator.run_folder import RunError, read_json, write_json
from kmdx.errors import AudioError

VERSION = 3
"""Version of the check: results of other versions are not used."""


@dataclass(frozen=True)
class DataCheck:
    """Result of a check."""

    warnings: list[str]  # problems that a reader of the scores must know about
    unusable: dict[str, str]  # songs that cannot be scored, and why
    fingerprints: dict[str, str]  # the sha256 of each song's content


def check_data(tracks: Sequence[Track], folder: Path, accept_incomplete: bool = False) -> DataCheck:
    """Check songs, or return the saved result if the same files were checked before.

    Parameters
    ----------
    tracks : sequence of Track
    folder : Path
        The run's folder.
    accept_incomplete : bool
        Whether songs with missing stems can be scored.
    """
    path = folder / "checked.json"
    files = {track.name: _stamps(track) for track in tracks}
    rules = {
        "version": VERSION,
        "accept_incomplete": accept_incomplete,
        "layouts": [[each.layout.uneven, *each.layout.declared] for each in tracks if each.layout],
        "strays": [str(path) for path in tracks[0].strays] if tracks else [],
    }
    try:
        known = read_json(path) if path.exists() else {}
    except RunError:
        known = {}
    same = known.get("files") == files and known.get("rules") == rules
    if not same or not known.keys() >= {field.name for field in fields(DataCheck)}:
        known = {"files": files, "rules": rules, **asdict(_check(tracks, accept_incomplete))}
        write_json(path, known)
    return DataCheck(known["warnings"], known["unusable"], known["fingerprints"])


def _check(tracks: Sequence[Track], accept_incomplete: bool) -> DataCheck:
    """Read and check every song."""
    problems = dataset.check(tracks, accept_incomplete=accept_incomplete)
    unusable: dict[str, str] = {}
    for problem in problems:
        if problem.fatal and problem.track is not None:
            unusable.setdefault(problem.track, problem.text)
    return DataCheck(
        warnings=dataset.grouped(problem for problem in problems if not problem.fatal),
        unusable=unusable,
        fingerprints={track.name: _fingerprint(track) for track in tracks},
    )


def _fingerprint(track: Track) -> str:
    try:
        return dataset.fingerprint(track)
    except AudioError as error:
        return f"unreadable: {error}"


def _stamps(track: Track) -> dict[str, list[int]]:
    """Size and modification time of each of a song's files, including unused ones."""
    named = [(name, part.path) for name, parts in track.sources.items() for part in parts]
    named += [("extra", path) for path in track.extra]
    if track.layout is not None and (described := track.layout.place / "data.json").is_file():
        named.append(("data.json", described))
    stamps = {}
    for name, path in sorted(named):
        try:
            stat = path.stat()
        except OSError:  # a broken link, which the check reports
            stamps[f"{name}: {path}"] = [0, 0]
        else:
            stamps[f"{name}: {path.resolve()}"] = [stat.st_size, stat.st_mtime_ns]
    return stamps
