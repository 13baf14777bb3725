"""Published results of other systems, read from ``published.yaml``.

They are means or medians over songs, with their source.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evaluator.bootstrap import Statistic
from kmdx.documents import load_yaml
from kmdx.errors import KmdxError, shown, suggest
from kmdx.file_names import key

FILE = Path(__file__).with_name("published.yaml")
PREFIX = "published:"
"""Prefix of a row's identifier in arguments that name runs."""


@dataclass(frozen=True)
class Row:
    """Published results of one method."""

    id: str
    name: str
    """``id`` and ``name``: its identifier in options, and its usual name."""
    scores: Mapping[str, float]  # published value of each stem; some papers give only the average over stems
    average: float | None  # average over stems, as published or else computed from the stems' values
    source: str  # authors, year and publication
    training: str | None = None
    tested: str | None = None
    """``training`` and ``tested``: the music that it was trained with, and the data set that it was measured
    on."""
    ours: bool = False  # whether this project reproduces the method


@dataclass(frozen=True)
class PublishedTable:
    """Published results that can be compared with each other."""

    title: str
    metric: str  # a name of :data:`evaluator.metrics.METRICS`
    statistic: Statistic  # the statistic over songs
    tested: str  # the songs, in words
    songs: frozenset[str]  # the songs' names, normalized by :func:`name_key`; empty if they are secret
    rows: tuple[Row, ...]

    @property
    def hidden(self) -> bool:
        """Whether the songs are secret, so that no run can use the same ones."""
        return not self.songs

    def shared(self, songs: Iterable[str]) -> int:
        """How many of these songs a run has."""
        return len(self.songs & {name_key(name) for name in songs})


def name_key(name: str) -> str:
    """A song's name in Unicode normal form and without case, so that variants are equal."""
    return key(name).strip()


@cache
def tables() -> tuple[PublishedTable, ...]:
    """Every table of ``published.yaml``."""
    content = load_yaml(FILE.read_text(encoding="utf-8"))
    songs = {data: frozenset(map(name_key, names)) for data, names in content["songs"].items()}
    return tuple(
        PublishedTable(
            each["title"],
            each["metric"],
            each["statistic"],
            each["tested"],
            songs[each["songs"]] if "songs" in each else frozenset(),
            tuple(_row(row, each) for row in each["rows"]),
        )
        for each in content["tables"]
    )


def find(name: str) -> tuple[PublishedTable, Row]:
    """The row with an identifier (case is ignored), and its table.

    Raises
    ------
    KmdxError
        If there is no such row.
    """
    known = {row.id: (table, row) for table in tables() for row in table.rows}
    identifier = name.strip().casefold()
    if identifier not in known:
        available = ", ".join(known)
        hint = suggest(identifier, known)
        raise KmdxError(f"unknown published results {shown(name)}{hint}; available: {available}")
    return known[identifier]


FACTS = ("id", "name", "average", "source", "training", "tested", "ours")


def _row(content: Mapping[str, Any], table: Mapping[str, Any]) -> Row:
    facts = {key: content.get(key, table.get(key)) for key in FACTS}
    scores = {key: float(value) for key, value in content.items() if key not in FACTS}
    if facts["average"] is None:
        facts["average"] = statistics.fmean(scores.values())
    return Row(scores=scores, **{**facts, "ours": bool(facts["ours"])})
