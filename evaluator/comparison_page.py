"""The page of a comparison: one self-contained HTML file with styles, script and numbers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from evaluator import significance
from evaluator.bootstrap import COVERAGE
from evaluator.comparison import Comparison, Difference, p_text
from evaluator.metrics import show, signed
from evaluator.records import SONG, finite
from evaluator.report import embedded_json, environment, script, style
from evaluator.results import STATISTICS, statistic_title
from evaluator.run_folder import write_text
from evaluator.systems import System, matching
from kmdx.errors import counted, listed

GENERATOR = "kmdx-net comparison"
"""The page's generator, by which this module recognizes its own pages."""


def write(comparison: Comparison, path: Path) -> Path:
    """Write the page atomically; return its path.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    # File names may contain bytes that are not text; they become "?".
    write_text(path, page(comparison).encode("utf-8", "replace").decode("utf-8"))
    return path


def is_own(path: Path) -> bool:
    """Whether this module wrote a file, so that it may be overwritten."""
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(2000)
    except OSError:
        return False


def page(comparison: Comparison) -> str:
    """The page as text."""
    names = comparison.names
    return _template().render(
        title=" and ".join(names) if len(names) == 2 else f"{names[0]} and {len(names) - 1} others",
        generator=GENERATOR,
        comparison=comparison,
        systems=[_facts(system) for system in comparison.systems],
        pairs=list(dict.fromkeys((each.a, each.b) for each in comparison.differences)),
        metric=comparison.metrics[0],
        columns=comparison.columns,
        first=[
            each
            for each in comparison.differences
            if each.metric == comparison.metrics[0].name and each.stem in comparison.rows[:1]
        ],
        statistics=list(STATISTICS),
        statistic_title=statistic_title,
        show=show,
        signed=signed,
        p_text=p_text,
        counted=counted,
        listed=listed,
        coverage=f"{COVERAGE:.0%}",
        level=f"{significance.LEVEL:.0%}",
        fewest=significance.min_songs(),
        style=style("report.css", "comparison.css"),
        script=script("comparison.js"),
        data=embedded_json(finite(_data(comparison))),
    )


@cache
def _template() -> jinja2.Template:
    return environment().get_template("comparison.html.jinja")


def _facts(system: System) -> dict[str, Any]:
    """Facts about a system for the page."""
    run, row = system.run, system.row
    facts: dict[str, Any] = {}
    if system.kind == "run":
        keys = ("title", "device", "precision", "engine", "cpu")
        facts = {key: run[key] for key in keys if run.get(key) not in (None, "", "not known")}
        data = run.get("data")
        if isinstance(data, dict) and data.get("path"):
            facts["data"] = data["path"]
    if row is not None:
        facts = {"measured on": row.tested, "trained with": row.training, "source": row.source}
    return {
        "name": system.name,
        "place": system.place,
        "kind": {"run": "run", "museval": "museval’s files", "published": "published"}[system.kind],
        "songs": len(system.songs),
        "failed": len(system.failed),
        "facts": {key: value for key, value in facts.items() if value},
        "aside": "" if row is None else row.source,
    }


def _data(comparison: Comparison) -> dict[str, Any]:
    """Data for the page's script: every song's scores, every mean and every verdict."""
    match = matching(comparison.systems)
    names = list(dict.fromkeys(match(name) for system in comparison.systems for name in system.songs))
    return {
        "songs": names,
        "systems": [_scores(system, comparison, names) for system in comparison.systems],
        "metrics": [
            {
                "name": metric.name,
                "title": metric.title,
                "label": metric.label,
                "unit": metric.unit,
                "higher": metric.higher_is_better,
                "statistic": metric.over_songs,
                "titles": {way: statistic_title(metric, way) for way in STATISTICS},
            }
            for metric in comparison.metrics
        ],
        "columns": comparison.columns,
        "song": SONG,
        "meanStems": comparison.mean_stems,
        "values": comparison.values,
        "differences": [_difference(each, comparison) for each in comparison.differences],
    }


def _scores(system: System, comparison: Comparison, keys: list[str]) -> dict[str, Any]:
    """A system's value for each song, by metric and stem."""
    match = matching(comparison.systems)
    songs = {match(name): record for name, record in system.songs.items()}

    def value(key: str, metric: str, stem: str) -> float | None:
        found = songs[key].scores.get(metric, {}).get(stem) if key in songs else None
        return None if found is None else round(found, 4)

    return {
        "name": system.name,
        "tested": system.kind != "published",
        "aside": "" if system.row is None else system.row.source,
        "scores": {
            metric.name: {stem: [value(key, metric.name, stem) for key in keys] for stem in comparison.stems}
            for metric in comparison.metrics
            if songs
        },
    }


def _difference(each: Difference, comparison: Comparison) -> dict[str, Any]:
    names = ("metric", "stem", "a", "b", "difference", "low", "high", "wins", "losses", "better")
    found = {name: getattr(each, name) for name in names}
    return {**found, "p": p_text(each.corrected), "verdict": each.verdict(comparison.names)}
