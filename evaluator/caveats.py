"""Finds what makes systems hard to compare: different data, settings, songs or programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evaluator.metrics import named
from evaluator.process import COMPUTING
from evaluator.published import PublishedTable
from evaluator.records import SongRecord
from evaluator.systems import MUSEVAL, System, matching
from kmdx.errors import counted, joined

SETTINGS = {
    "device": "device",
    "precision": "precision",
    "engine": "engine",
    "time_limit_factor": "time limit",
    "memory_limit": "memory limit",
    "enforced": "enforcement of limits",
}
"""Settings of a run that can change its scores or times."""

TOLERANCE = {"run": 0.01, "museval": 2.0}
"""Seconds by which a song's length may differ; museval's files give it in whole frames."""


def caveats(systems: Sequence[System]) -> list[str]:
    """Everything that a reader must know before reading the numbers, one sentence each."""
    tested = [system for system in systems if system.kind != "published"]
    lines = [f"{system.name}: {note}" for system in systems for note in system.notes]
    lines += _same_runs(systems)
    lines += _songs(tested)
    lines += _settings(tested)
    lines += _measures(tested)
    for system in systems:
        if system.table is not None:
            lines += _other_songs(system, system.table, tested)
    for system in tested:
        done = len(system.songs) + len(system.failed)
        if done < system.planned:
            lines.append(f"{system.name} is unfinished: {done} of {counted(system.planned, 'song')}")
        if failed := len(system.failed):
            be = "is" if failed == 1 else "are"
            lines.append(
                f"{counted(failed, 'song')} failed in {system.name} and {be} not included in any mean"
            )
    return lines


def _same_runs(systems: Sequence[System]) -> Iterator[str]:
    """Runs that were given more than once."""
    by_place: dict[str, list[str]] = {}
    for system in systems:
        by_place.setdefault(system.place, []).append(system.name)
    yield from (f"{joined(names)} are the same run" for names in by_place.values() if len(names) > 1)


def _songs(systems: Sequence[System]) -> Iterator[str]:
    """Report songs with the same name but different data."""
    match = matching(systems)
    by_key: dict[str, list[tuple[System, SongRecord]]] = {}
    for system in systems:
        for name, record in system.songs.items():
            by_key.setdefault(match(name), []).append((system, record))
    changed = [found[0][1].song for found in by_key.values() if _differ(found)]
    if changed:
        differ = "differs" if len(changed) == 1 else "differ"
        yield (
            f"the data of {counted(len(changed), 'song')} {differ}, such as {changed[0]}: their scores "
            "cannot be compared"
        )


def _differ(found: Sequence[tuple[System, SongRecord]]) -> bool:
    """Whether a song's known fingerprints or lengths differ."""
    prints = {
        system.fingerprints[record.song] for system, record in found if record.song in system.fingerprints
    }
    lengths = [record.duration for _, record in found if record.duration]
    tolerance = max((TOLERANCE[system.kind] for system, _ in found), default=0.0)
    return len(prints) > 1 or (bool(lengths) and max(lengths) - min(lengths) > tolerance)


def _settings(systems: Sequence[System]) -> Iterator[str]:
    for key, what in SETTINGS.items():
        if line := _differing([(system.name, system.run.get(key)) for system in systems]):
            yield f"the {what} differs: {line}"
    for key, what in (("device", "submission's device"), ("version", "submission's Python")):
        values = [(system.name, _inside(system.run, "interpreter", key)) for system in systems]
        if line := _differing(values):
            yield f"the {what} differs: {line}"
    packages = {system.name: _inside(system.run, "interpreter", "packages") or {} for system in systems}
    for package in COMPUTING:
        if line := _differing([(name, own.get(package)) for name, own in packages.items()]):
            yield f"the submission's version of {package} differs: {line}"
    versions = [(system.name, _inside(system.run, "versions", "kmdx-net")) for system in systems]
    if line := _differing(versions):
        yield f"the evaluator's version differs: {line}"
    yield from _lossy("true stems", {each.name: _inside(each.run, "data", "lossy") for each in systems})
    yield from _lossy("estimates", {each.name: each.run.get("lossy_estimates") for each in systems})


def _lossy(what: str, lossy: Mapping[str, bool | None]) -> Iterator[str]:
    """Report that some systems have files in a lossy format and others do not; None means unknown."""
    some, others = ([name for name, value in lossy.items() if value is known] for known in (True, False))
    if some and others:
        yield f"the {what} of {joined(some)} are in a lossy format; those of {joined(others)} are not"


def _inside(run: Mapping[str, Any], key: str, inner: str) -> Any:
    content = run.get(key)
    return content.get(inner) if isinstance(content, Mapping) else None


def _differing(values: Sequence[tuple[str, Any]]) -> str:
    """Each system's value, if the known values differ; else an empty text."""
    groups: dict[str, list[str]] = {}
    for name, value in values:
        if value not in (None, "not known"):
            groups.setdefault(str(value), []).append(name)
    return (
        ", ".join(f"{value} in {joined(names)}" for value, names in groups.items()) if len(groups) > 1 else ""
    )


def _measures(systems: Sequence[System]) -> Iterator[str]:
    """Report stems and metrics that only some have, and metrics computed by different programs."""
    for what, of in (
        ("stems", {system.name: system.stems for system in systems}),
        ("metrics", {each.name: [metric.title for metric in named(each.metrics)] for each in systems}),
    ):
        sets = {frozenset(each) for each in of.values() if each}
        if len(sets) > 1:
            shown = "; ".join(f"{name} has {joined(each)}" for name, each in of.items() if each)
            yield f"the {what} differ: {shown}"
            if what == "stems" and any(set(system.metrics) & set(MUSEVAL.values()) for system in systems):
                yield "museval's values of a stem depend slightly on which other stems were scored"
    own = [system.name for system in systems if system.kind == "run" and "museval_sdr" in system.metrics]
    foreign = [system.name for system in systems if system.kind == "museval"]
    if own and foreign:
        yield (
            f"museval computed the scores of {joined(foreign)}, and this evaluator those of {joined(own)}; "
            "their values agree if museval used BSSEval v4"
        )


def _other_songs(system: System, table: PublishedTable, tested: Sequence[System]) -> Iterator[str]:
    """Report runs that were not scored on the songs of published results."""
    shared = {run.name: table.shared(run.songs) for run in tested}
    total = len(table.songs)
    if others := [name for name, number in shared.items() if not number]:
        were = "was" if len(others) == 1 else "were"
        yield (
            f"{system.name} was measured on {table.tested}, but {joined(others)} {were} not: the results "
            "cannot be compared"
        )
    parts = [f"{name} has {number}" for name, number in shared.items() if 0 < number < total]
    if parts:
        yield (
            f"of the {total} songs that {system.name} was measured on, {joined(parts)}: compare these only "
            "roughly"
        )
    for run in tested:
        if 0 < shared[run.name] < len(run.songs):
            more = counted(len(run.songs) - shared[run.name], "song")
            yield f"{run.name} has {more} that {system.name} was not measured on"
