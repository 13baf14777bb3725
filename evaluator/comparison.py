"""Compares systems song by song: which one is better?

Songs are paired by name, so a song that is hard for all systems has no influence. The test uses the statistic
that is usually quoted for a metric: the mean over songs for global SDR, the median for museval's ratios.

- Mean: a sign-flip test of the mean of the paired differences.
- Median: Wilcoxon's signed-rank test of the paired differences; their median is shown.

A difference is significant if the test's p value is below 5 % *and* the bootstrap's 95 % interval of the
statistic does not contain 0. Fewer than six songs are never significant, because a p value below 5 % needs at
least six differences of the same sign. With more than two systems, Holm's method corrects the p values of all
pairs for each metric and stem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluator import bootstrap, significance
from evaluator.bootstrap import Statistic
from evaluator.caveats import caveats
from evaluator.metrics import METRICS, Metric, named
from evaluator.records import AVERAGE, DERIVED, SONG, SongRecord, stems_of_mean
from evaluator.systems import System, matching
from kmdx.errors import KmdxError, shown, suggest

TIE = 0.005  # smaller differences are invisible with two decimals
MIN_SAMPLES = 1000  # with fewer, the ends of an interval depend on the seed
MAX_SAMPLES = 100_000  # fits in memory for any realistic number of songs


@dataclass(frozen=True)
class Difference:
    """The difference between systems A and B in one metric and stem, over the songs that both have."""

    metric: str
    stem: str
    """``metric`` and ``stem``: the stem may be ``song``, the mean of the stems."""
    a: int
    b: int
    """``a`` and ``b``: indices of the two systems."""
    songs: tuple[str, ...]  # songs for which both systems have a value
    values_a: tuple[float, ...]
    values_b: tuple[float, ...]
    """``values_a`` and ``values_b``: the systems' values for these songs."""
    statistic: Statistic  # the statistic that is tested
    value_a: float | None = None
    value_b: float | None = None
    difference: float | None = None
    """``value_a``, ``value_b`` and ``difference``: the statistic of A, of B, and of the differences B − A."""
    low: float | None = None
    high: float | None = None
    """``low`` and ``high``: ends of the 95 % interval of ``difference``; None for fewer than two songs."""
    wins: int = 0
    losses: int = 0
    ties: int = 0
    """``wins``, ``losses`` and ``ties``: number of songs in which B is better, A is better, or the difference
    is below 0.005."""
    signed_rank: float | None = None  # p value of Wilcoxon's test
    p: float | None = None
    corrected: float | None = None
    """``p`` and ``corrected``: p value of the test for ``statistic``, without and with correction for the
    number of pairs."""
    in_common: int = 0  # number of songs that both systems have, with or without a value
    pairs: int = 1  # number of pairs for which p values are corrected, including this one
    better: str | None = None  # the better system, if the difference is significant

    def verdict(self, names: Sequence[str]) -> str:
        """The result in words, with the systems' names."""
        if self.better is not None:
            return f"{names[self.a if self.better == 'a' else self.b]} is better"
        found, expected = len(self.songs), significance.min_songs(self.pairs)
        with_values = " with values" if found < self.in_common else ""
        if not found:
            return "no song in common with values" if self.in_common else "no song in common"
        if found >= significance.min_songs() and self.corrected is None:
            return "no difference"
        if found < expected:
            pairs = f" for {self.pairs} pairs" if self.pairs > 1 else ""
            return f"too few songs{with_values}{pairs}: {found}, expected at least {expected}"
        if self.low is not None and self.high is not None and self.low <= 0 <= self.high:
            return "may be chance: the interval contains 0"
        return f"may be chance: p = {p_text(self.corrected)}"


def p_text(p: float | None) -> str:
    """A p value as text with two digits; a dash if there is none."""
    return "–" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.2g}"


@dataclass(frozen=True)
class Comparison:
    """A comparison of systems."""

    systems: tuple[System, ...]
    metrics: tuple[Metric, ...]
    stems: tuple[str, ...]
    """``metrics`` and ``stems``: metrics and stems that at least two systems have."""
    mean_stems: tuple[str, ...]  # the stems whose mean is ``song``; empty if there is no such mean
    songs: tuple[str, ...]
    """Songs that all systems with songs have. ``values`` are computed over these songs."""
    values: Mapping[str, Mapping[str, Sequence[Mapping[str, float | None]]]]
    """The value of each stem and of ``average``, for each metric, statistic and system."""
    differences: tuple[Difference, ...]  # one for each metric, stem and pair of systems
    alone: Mapping[str, tuple[str, ...]]  # for each system the songs that not all systems have
    warnings: tuple[str, ...] = ()  # what makes the systems hard to compare

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the systems."""
        return tuple(system.name for system in self.systems)

    @property
    def tested(self) -> tuple[int, ...]:
        """Indices of the systems with songs."""
        return tuple(place for place, system in enumerate(self.systems) if system.kind != "published")

    @property
    def columns(self) -> tuple[str, ...]:
        """``average`` if a system has it, and the stems."""
        tables = (row for ways in self.values.values() for rows in ways.values() for row in rows)
        return (*([AVERAGE] if any(row[AVERAGE] is not None for row in tables) else []), *self.stems)

    @property
    def rows(self) -> tuple[str, ...]:
        """``song`` if it exists, and the stems."""
        return (*([SONG] if self.mean_stems else []), *self.stems)


def compare(
    systems: Sequence[System], samples: int = 10_000, seed: int = 0, only: Sequence[str] | None = None
) -> Comparison:
    """Compare each pair of systems that have songs.

    Parameters
    ----------
    systems : sequence of System
        Two or more, from :func:`evaluator.systems.load_all`.
    samples : int
        Number of bootstrap samples, and of random sign flips. More are used if there are so many pairs that
        no corrected p value could be below 5 % otherwise.
    seed : int
        Seed of the random numbers.
    only : sequence of str, optional
        Names of the metrics to compare; by default all that at least two systems have.

    Raises
    ------
    KmdxError
        If the systems have no metric, stem or song in common, or an option is out of range.
    """
    if not MIN_SAMPLES <= samples <= MAX_SAMPLES:
        raise KmdxError(f"--samples {samples}: expected {MIN_SAMPLES} to {MAX_SAMPLES}")
    match = matching(systems)
    songs = [{match(name): record for name, record in system.songs.items()} for system in systems]
    tested = [place for place, system in enumerate(systems) if system.kind != "published"]
    samples = max(samples, math.ceil(math.comb(len(tested), 2) / significance.LEVEL))
    _check_songs(systems, songs, tested)
    metrics, stems = _metrics(systems, only), _stems(systems)
    mean_stems = _mean_stems([systems[place] for place in tested], stems)
    common = (
        [key for key in songs[tested[0]] if all(key in songs[place] for place in tested)] if tested else []
    )
    differences: list[Difference] = []
    for metric in metrics:
        for stem in (*([SONG] if mean_stems else []), *stems):
            values = {
                place: _values(songs[place], metric.name, stem, mean_stems)
                for place in tested
                if _has(systems[place], metric.name, mean_stems if stem == SONG else [stem])
            }
            differences += _pairs(metric, stem, values, samples, seed)
    return Comparison(
        tuple(systems),
        tuple(metrics),
        tuple(stems),
        mean_stems,
        tuple(common),
        _statistics(systems, songs, common, metrics, stems),
        tuple(differences),
        {
            systems[place].name: alone
            for place in tested
            if (alone := tuple(record.song for key, record in songs[place].items() if key not in common))
        },
        tuple(caveats(systems)),
    )


def _check_songs(
    systems: Sequence[System], songs: Sequence[Mapping[str, SongRecord]], tested: Sequence[int]
) -> None:
    """Raise KmdxError if no two systems have a song in common."""
    pairs = list(itertools.combinations(tested, 2))
    if pairs and not any(songs[a].keys() & songs[b].keys() for a, b in pairs):
        counts = ", ".join(f"{len(songs[place])} in {systems[place].name}" for place in tested)
        raise KmdxError(f"no two runs have a song in common: {counts}")


def _metrics(systems: Sequence[System], only: Sequence[str] | None) -> list[Metric]:
    """The requested metrics that at least two systems have, in the order of the table."""
    found = list(dict.fromkeys(name for system in systems for name in system.metrics))
    shared = [name for name in found if sum(name in system.metrics for system in systems) > 1]
    if not shared:
        what = "; ".join(f"{system.name}: {', '.join(system.metrics) or 'none'}" for system in systems)
        raise KmdxError(f"no two runs have a metric in common: {what}")
    if only is not None:
        for name in only:
            if name not in shared:
                available = ", ".join(shared)
                hint = suggest(name, shared)
                raise KmdxError(f"no two runs have the metric {shown(name)}{hint}; available: {available}")
        shared = [name for name in shared if name in only]
        if not shared:
            raise KmdxError("--metrics is empty; name a metric, or leave out the option")
    order = {name: place for place, name in enumerate(METRICS)}
    return named(sorted(shared, key=lambda name: order.get(name, len(order))))


def _stems(systems: Sequence[System]) -> list[str]:
    """The stems that at least two systems have; a table that has only averages counts as having all."""
    found = list(dict.fromkeys(stem for system in systems for stem in system.stems))
    shared = [stem for stem in found if sum(stem in system.stems for system in systems) > 1]
    averages = any(system.kind == "published" and not system.stems for system in systems)
    if not shared and not averages:
        what = "; ".join(f"{system.name}: {', '.join(system.stems) or 'none'}" for system in systems)
        raise KmdxError(f"no two runs have a stem in common: {what}")
    return sorted(shared or found, key=lambda stem: (stem in DERIVED, stem))


def _mean_stems(systems: Sequence[System], stems: Sequence[str]) -> tuple[str, ...]:
    """The stems of a song's mean: those that every system with several stems has."""
    several = [system for system in systems if len(system.stems) > 1]
    shared = [stem for stem in stems if all(stem in system.stems for system in several)] if several else []
    kept = stems_of_mean(shared)
    return kept if len(kept) > 1 else ()


def _has(system: System, metric: str, stems: Sequence[str]) -> bool:
    return metric in system.metrics and set(stems) <= set(system.stems)


Values = Mapping[str, float | None]
"""A system's value for each of its songs; None if the song has none."""


def _values(songs: Mapping[str, SongRecord], metric: str, stem: str, mean_stems: Sequence[str]) -> Values:
    found = {}
    for key, record in songs.items():
        scores = record.scores.get(metric, {})
        found[key] = _mean([scores.get(each) for each in (mean_stems if stem == SONG else [stem])])
    return found


def _pairs(
    metric: Metric, stem: str, values: Mapping[int, Values], samples: int, seed: int
) -> list[Difference]:
    """The differences of every pair in one metric and stem, with corrected p values."""
    found = [
        _difference(metric, stem, a, b, values[a], values[b], samples, seed)
        for a, b in itertools.combinations(values, 2)
    ]
    corrected = significance.holm([each.p for each in found])
    tested = sum(p is not None for p in corrected)
    return [
        _decided(replace(each, corrected=p, pairs=tested if p is not None else tested + 1), metric)
        for each, p in zip(found, corrected, strict=True)
    ]


def _difference(
    metric: Metric, stem: str, a: int, b: int, of_a: Values, of_b: Values, samples: int, seed: int
) -> Difference:
    in_common = [name for name in of_a if name in of_b]
    names = [name for name in in_common if None not in (of_a[name], of_b[name])]
    values_a, values_b = (np.array([values[name] for name in names], np.float64) for values in (of_a, of_b))
    statistic = metric.over_songs
    found = Difference(
        metric.name,
        stem,
        a,
        b,
        tuple(names),
        tuple(map(float, values_a)),
        tuple(map(float, values_b)),
        statistic,
        in_common=len(in_common),
    )
    if not names:
        return found
    steps = np.round(values_b - values_a, 9)  # so that equal differences are equal
    better = steps if metric.higher_is_better else -steps
    low, high = bootstrap.interval(steps, samples, seed, statistic) or (None, None)
    ranks = significance.signed_rank(steps) if len(names) >= significance.min_songs() else None
    flips = significance.sign_flip(steps, samples, seed) if ranks is not None else None
    reduce = _reduce(statistic)
    return replace(
        found,
        value_a=reduce(values_a),
        value_b=reduce(values_b),
        difference=reduce(steps),
        low=low,
        high=high,
        wins=int(np.sum(better >= TIE)),
        losses=int(np.sum(better <= -TIE)),
        ties=int(np.sum(np.abs(steps) < TIE)),
        signed_rank=ranks,
        p=ranks if statistic == "median" else flips,
    )


def _decided(difference: Difference, metric: Metric) -> Difference:
    """The difference with its better system, if both the test and the interval are significant."""
    low, high = difference.low, difference.high
    if difference.corrected is None or low is None or high is None or low <= 0 <= high:
        return difference
    if difference.corrected >= significance.LEVEL:
        return difference
    return replace(difference, better="b" if (low > 0) == metric.higher_is_better else "a")


def _reduce(statistic: Statistic) -> Callable[[NDArray[np.float64]], float]:
    return lambda values: float(np.mean(values) if statistic == "mean" else np.median(values))


def _statistics(
    systems: Sequence[System],
    songs: Sequence[Mapping[str, SongRecord]],
    common: Sequence[str],
    metrics: Sequence[Metric],
    stems: Sequence[str],
) -> dict[str, dict[str, list[dict[str, float | None]]]]:
    """Means and medians of every system over the common songs, or over its own if there are none."""
    ways: tuple[Statistic, ...] = ("mean", "median")
    return {
        metric.name: {
            way: [
                _published(system, metric.name, way, stems)
                if system.kind == "published"
                else _measured(of, common or list(of), metric.name, way, stems)
                for system, of in zip(systems, songs, strict=True)
            ]
            for way in ways
        }
        for metric in metrics
    }


def _measured(
    songs: Mapping[str, SongRecord], keys: Sequence[str], metric: str, way: Statistic, stems: Sequence[str]
) -> dict[str, float | None]:
    chosen = {key: songs[key] for key in keys}
    found: dict[str, float | None] = {}
    for stem in stems:
        values = [value for value in _values(chosen, metric, stem, ()).values() if value is not None]
        found[stem] = _reduce(way)(np.array(values)) if values else None
    counted = stems_of_mean(stems)
    return {AVERAGE: _mean([found[each] for each in counted]) if len(counted) > 1 else None, **found}


def _published(system: System, metric: str, way: Statistic, stems: Sequence[str]) -> dict[str, float | None]:
    table, row = system.table, system.row
    if table is None or row is None or (table.metric, table.statistic) != (metric, way):
        return dict.fromkeys((AVERAGE, *stems))
    same = not row.scores or set(stems_of_mean(stems)) == set(row.scores)
    return {AVERAGE: row.average if same else None, **{stem: row.scores.get(stem) for stem in stems}}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if a value is missing."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None
