"""What is known of the data before any work: problems and fingerprints, remembered in the run's folder.

Every sample of a data set is read for it, so it is done once: ``checked.json`` says of which files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evaluator import dataset
from evaluator.dataset import Track
from evaluator.run_folder import RunError, read_json, write_json
from kmdx.errors import AudioError

VERSION = 2
"""Of what is checked: a check by other rules is done again."""


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes
    ----------
    warnings : list of str
        What a reader of the scores must know.
    unusable : dict of str to str
        Songs that cannot be scored, and why.
    fingerprints : dict of str to str
        sha256 of each song's content.
    """

    warnings: list[str]
    unusable: dict[str, str]
    fingerprints: dict[str, str]


def survey(tracks: Sequence[Track], folder: Path, accept_incomplete: bool = False) -> Survey:
    """Check songs, or say again what was found when these same files were checked before.

    Parameters
    ----------
    tracks : sequence of Track
    folder : Path
        The run's folder.
    accept_incomplete : bool
        Whether songs of which a stem is missing can be scored.
    """
    path = folder / "checked.json"
    files = {track.name: _stamps(track) for track in tracks}
    rules = {"version": VERSION, "accept_incomplete": accept_incomplete}
    try:
        known = read_json(path) if path.exists() else {}
    except RunError:
        known = {}
    same = known.get("files") == files and known.get("rules") == rules
    if not same or not known.keys() >= {field.name for field in fields(Survey)}:
        known = {"files": files, "rules": rules, **_look(tracks, accept_incomplete)}
        write_json(path, known)
    return Survey(known["warnings"], known["unusable"], known["fingerprints"])


def _look(tracks: Sequence[Track], accept_incomplete: bool) -> dict[str, Any]:
    """Read everything."""
    problems = dataset.check(tracks, accept_incomplete=accept_incomplete)
    unusable: dict[str, str] = {}
    for problem in problems:
        if problem.fatal and problem.track is not None:
            unusable.setdefault(problem.track, problem.message)
    return asdict(
        Survey(
            warnings=[str(problem) for problem in problems if not problem.fatal],
            unusable=unusable,
            fingerprints={track.name: _fingerprint(track) for track in tracks},
        )
    )


def _fingerprint(track: Track) -> str:
    try:
        return dataset.fingerprint(track)
    except AudioError as error:
        return f"unreadable: {error}"


def _stamps(track: Track) -> dict[str, list[int]]:
    """Size and time of each of a song's files, those included that are not used."""
    named = [(name, part.path) for name, parts in track.sources.items() for part in parts]
    named += [("extra", path) for path in track.extra]
    if track.layout is not None and (described := track.layout.place / "data.json").is_file():
        named.append(("data.json", described))
    stamps = {}
    for name, path in sorted(named):
        try:
            stat = path.stat()
        except OSError:  # a link to nothing, which the check reports
            stamps[f"{name}: {path}"] = [0, 0]
        else:
            stamps[f"{name}: {path.resolve()}"] = [stat.st_size, stat.st_mtime_ns]
    return stamps
