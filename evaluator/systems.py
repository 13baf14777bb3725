"""Loads what can be compared: runs, folders of museval's JSON files, and published results.

Each becomes a :class:`System`: the scored songs, and what is known about how they were scored.

References
----------
Stöter, Liutkus and Ito 2018, "The 2018 Signal Separation Evaluation Campaign", arXiv 1804.06267, whose
JSON files are laid out as ``METHOD/test/SONG.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluator import published
from evaluator.records import RecordError, SchemaError, SongRecord
from evaluator.run_folder import RunError, read_json
from kmdx import documents
from kmdx.errors import DocumentError, KmdxError, listed, quoted, shown

MUSEVAL = {"SDR": "museval_sdr", "ISR": "museval_isr", "SIR": "museval_sir", "SAR": "museval_sar"}
"""Metrics of museval's JSON files, and their names in this package."""

SUBSETS = ("test", "train")
"""Folders of a method's songs; the first that exists is used."""


@dataclass(frozen=True)
class System:
    """A separation system that was scored on songs."""

    name: str  # name in tables
    place: str  # the argument that it was loaded from
    kind: Literal["run", "museval", "published"]
    songs: Mapping[str, SongRecord] = field(default_factory=dict)  # record of every scored song, by name
    failed: tuple[str, ...] = ()  # songs that failed
    planned: int = 0  # number of songs that the run should have
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # fingerprints of songs, if known
    run: Mapping[str, Any] = field(default_factory=dict)  # the run's description, if known
    row: published.Row | None = None
    table: published.PublishedTable | None = None
    """``row`` and ``table``: the published result and its table."""
    notes: tuple[str, ...] = ()  # notes for the reader

    @property
    def stems(self) -> tuple[str, ...]:
        """The scored stems, in order."""
        if self.row is not None:
            return tuple(self.row.scores)
        return tuple(dict.fromkeys(stem for record in self.songs.values() for stem in record.stems))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its metrics."""
        if self.table is not None:
            return (self.table.metric,)
        return tuple(dict.fromkeys(name for record in self.songs.values() for name in record.scores))


def load_all(places: Sequence[str]) -> list[System]:
    """Load the systems that the arguments name; systems with the same name are numbered.

    Raises
    ------
    KmdxError
        If there are fewer than two, or one cannot be loaded.
    """
    if len(places) < 2:
        raise KmdxError(f"expected two or more runs to compare, found {len(places)}")
    systems = [load(place) for place in places]
    names = [system.name for system in systems]
    counts: dict[str, int] = {}
    unique = []
    for system in systems:
        counts[system.name] = number = counts.get(system.name, 0) + 1
        again = names.count(system.name) > 1
        unique.append(replace(system, name=f"{system.name} ({number})") if again else system)
    return unique


def load(place: str | Path) -> System:
    """Load a run's folder, a folder of museval's JSON files, or ``published:NAME``.

    Raises
    ------
    KmdxError
        If the argument is none of these, or is damaged.
    """
    text = str(place)
    if text.startswith(published.PREFIX):
        table, row = published.find(text.removeprefix(published.PREFIX))
        return System(row.name, text, "published", row=row, table=table)
    path = Path(place)
    if path.name == "results.json" and path.is_file():
        path = path.parent
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise KmdxError(f"{shown(path)} {what}; expected a run's folder, or a folder of museval's JSON files")
    is_run = any((path / name).exists() for name in ("results.json", "run.json", "songs"))
    return _load_run(path) if is_run else _load_museval(path)


def _load_run(folder: Path) -> System:
    identity = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    # A run that was killed may have more records than its last results.json.
    contents = [read_json(path) for path in sorted((folder / "songs").glob("*.json"))] or results.get("songs")
    if not isinstance(contents, list):
        raise KmdxError(f"{folder} is not a run; expected results.json or songs/<song>.json")
    records = [_record(folder, number, contents) for number in range(len(contents))]
    known, fingerprints = results.get("run", identity), identity.get("songs", {})
    if not (isinstance(known, dict) and isinstance(fingerprints, dict)):
        raise KmdxError(f"{folder}: its run.json or results.json is damaged; run it again")
    return System(
        folder.resolve().name,
        str(folder),
        "run",
        {record.song: record for record in records if record.ok},
        tuple(record.song for record in records if not record.ok),
        max(len(fingerprints), len(records)),
        fingerprints,
        known,
    )


def _record(folder: Path, number: int, contents: Sequence[Any]) -> SongRecord:
    try:
        return SongRecord.from_json(contents[number])
    except RecordError as error:
        what = f": {error}" if isinstance(error, SchemaError) else f" is damaged: {quoted(contents[number])}"
        raise RunError(f"{folder}: record {number + 1} of {len(contents)}{what}") from error


def _load_museval(folder: Path) -> System:
    """Read a method's folder; if it has test and training songs, only test songs are used."""
    subsets = [folder / name for name in SUBSETS if any((folder / name).glob("*.json"))]
    used = subsets[0] if subsets else folder
    paths = sorted(used.glob("*.json"))
    if not paths:
        below = sorted({path.parent.parent for path in folder.glob("*/*/*.json")} | _holders(folder))
        more = f"; or name one of its folders {listed([path.name for path in below])}" if below else ""
        raise KmdxError(
            f"{shown(folder)} contains neither a run nor museval's results; expected results.json, "
            f"songs/<song>.json or <song>.json{more}"
        )
    records = [_museval_record(path) for path in paths]
    notes = [
        f"the songs in {other} are left out; name that folder to compare them"
        for other in map(str, subsets[1:])
    ]
    name = folder.resolve()
    return System(
        name.parent.name if name.name in SUBSETS else name.name,
        str(folder),
        "museval",
        {record.song: record for record in records},
        planned=len(records),
        run={"data": {"split": used.name if used != folder else None}},
        notes=tuple(notes),
    )


def _holders(folder: Path) -> set[Path]:
    return {path.parent for path in folder.glob("*/*.json") if path.parent.name not in SUBSETS}


def _museval_record(path: Path) -> SongRecord:
    """A song's record from museval's file: the median over the frames that have a value."""
    try:
        targets = documents.read_json(path)["targets"]
        if not isinstance(targets, list):
            raise ValueError
        frames: dict[str, dict[str, list[float]]] = {}
        duration = 0.0
        for target in targets:
            for key, name in MUSEVAL.items():
                values = [_number(frame["metrics"].get(key)) for frame in target["frames"]]
                frames.setdefault(name, {})[str(target["name"])] = values
            ends = [_number(frame["time"]) + _number(frame["duration"]) for frame in target["frames"]]
            duration = max([duration, *ends])
    except DocumentError as error:
        raise KmdxError(f"{shown(path)} is damaged: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise KmdxError(
            f"{shown(path)} is not a museval file; expected targets with frames of SDR, ISR, SIR and SAR"
        ) from error
    scores = {
        name: {target: _median(values) for target, values in by_target.items()}
        for name, by_target in frames.items()
    }
    present = {
        name: of for name, of in scores.items() if any(value is not None for value in of.values())
    } or {"museval_sdr": scores.get("museval_sdr", {})}
    stems = tuple(scores.get("museval_sdr", {}))
    return SongRecord(path.stem, "ok", duration=duration, stems=stems, scores=present)


def _number(value: Any) -> float:
    """A frame's number; NaN if it is null."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _median(values: Iterable[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    median = float(np.median(known)) if known else float("nan")
    return median if np.isfinite(median) else None


def matching(systems: Sequence[System]) -> Callable[[str], str]:
    """The function that maps a song's name to its name in the first system that has it.

    It ignores case and the Unicode form of accents, unless two songs of a system differ only in these.
    """
    if all(len({published.name_key(name) for name in each.songs}) == len(each.songs) for each in systems):
        first: dict[str, str] = {}
        for name in (name for each in systems for name in each.songs):
            first.setdefault(published.name_key(name), name)
        return lambda name: first[published.name_key(name)]
    return str
