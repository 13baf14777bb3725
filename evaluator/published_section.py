"""The report's section that shows published results next to those of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluator import published
from evaluator.metrics import Metric, named
from evaluator.published import PublishedTable, Row
from evaluator.records import AVERAGE


@dataclass(frozen=True)
class ShownRow:
    """A published row with the values of its table's columns; None if a value was not published."""

    name: str
    facts: str
    ours: bool
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class ShownTable:
    """A table of published results, and the run's own values."""

    title: str
    lead: str
    caution: str
    own_songs: str
    """``title``, ``lead``, ``caution`` and ``own_songs``: texts about the songs, and whether the run used the
    same ones."""
    sources: Mapping[str, Sequence[str]]  # the names of the rows from each source
    metric: Metric
    statistic: str
    columns: tuple[str, ...]  # ``average`` if it can be compared, and stems
    rows: tuple[ShownRow, ...]
    own: tuple[float | None, ...]  # the run's value for each column


def published_next_to(
    summary: Mapping[str, Any], run: Mapping[str, Any], songs: Sequence[str]
) -> list[ShownTable]:
    """The tables for a run's report; those on the run's songs come first.

    Parameters
    ----------
    summary, run : mapping
        Parts of the run's ``results.json``.
    songs : sequence of str
        The scored songs.
    """
    found = [
        _shown(table, summary, run, songs) for table in published.tables() if table.metric in run["metrics"]
    ]
    return sorted(
        (table for table in found if table is not None), key=lambda table: table.own_songs != SAME_SONGS
    )


SAME_SONGS = "on the same songs"


def _shown(
    table: PublishedTable, summary: Mapping[str, Any], run: Mapping[str, Any], songs: Sequence[str]
) -> ShownTable | None:
    known = {stem for row in table.rows for stem in row.scores}
    stems = [stem for stem in run["stems"] if stem in known]
    if not stems:
        return None
    whole = set(run["stems"]) == known
    columns = (*([AVERAGE] if whole else []), *stems)
    values = summary["scores"][table.metric][table.statistic]
    own = [values[stem] for stem in stems]
    average = statistics.fmean(own) if whole and None not in own else None
    (metric,) = named([table.metric])
    lead, caution, own_songs = _songs(table, songs)
    rows: list[ShownRow] = []
    sources: dict[str, list[str]] = {}
    for row in table.rows:
        shown = _row(row, columns)
        if any(value is not None for value in shown.values):
            rows.append(shown)
            sources.setdefault(row.source, []).append(row.name)
    return ShownTable(
        table.title,
        lead,
        caution,
        own_songs,
        sources,
        metric,
        table.statistic,
        columns,
        tuple(rows),
        tuple([average, *own] if whole else own),
    )


def _row(row: Row, columns: Sequence[str]) -> ShownRow:
    facts = f"trained with {row.training}" if row.training else ""
    if row.training and row.tested and row.tested not in row.training.split():
        facts += f", measured on {row.tested}"
    values = tuple(row.average if column == AVERAGE else row.scores.get(column) for column in columns)
    return ShownRow(row.name, facts, row.ours, values)


def _songs(table: PublishedTable, songs: Sequence[str]) -> tuple[str, str, str]:
    """Texts about the published songs, whether the run can be compared, and the run's songs."""
    lead = f"The published results were measured on {table.tested}."
    total, shared = len(table.songs), table.shared(songs)
    if shared and shared == total == len(songs):
        return lead, "This run used the same songs.", SAME_SONGS
    if shared:
        others = len(songs) - shared
        also = f" and {others} other {'song' if others == 1 else 'songs'}" if others else ""
        caution = f"This run used {shared} of these {total} songs{also}, so compare the results with caution."
        return lead, caution, f"on {shared} of these songs{also}"
    return lead, "This run used other songs, so the results cannot be compared directly.", "on other songs"
