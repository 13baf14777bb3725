"""The command ``python -m evaluator.compare RUN…``, which compares runs song by song.

:mod:`evaluator.systems` describes what can be compared, :mod:`evaluator.comparison` how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from evaluator import comparison_page
from evaluator.bootstrap import COVERAGE
from evaluator.comparison import Comparison, Difference, compare, p_text
from evaluator.metrics import Metric, show, signed
from evaluator.results import statistic_title
from evaluator.run_folder import write_json
from evaluator.systems import load, load_all
from kmdx import terminal
from kmdx.errors import KmdxError, counted, listed
from kmdx.terminal import JsonOption, out

__all__ = ["compare", "load", "load_all"]

PAGE = Path("compare.html")
MANY = 4
"""The terminal shows each stem of every pair only for up to this many systems. The page always shows it."""

app = terminal.app()


@app.command()
def command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Folder of a run, folder of museval's JSON files such as SiSEC 2018's METHOD/test, or "
            "published:NAME for a result in evaluator/published.yaml.",
            show_default=False,
        ),
    ],
    metrics: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Metrics to compare, comma-separated.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of bootstrap samples.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    output: JsonOption = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the page to this file.", show_default=str(PAGE)),
    ] = None,
) -> None:
    """Compare runs song by song: which one is better, and could the difference be chance?"""
    if html is None and PAGE.exists() and not comparison_page.is_own(PAGE):
        raise KmdxError(f"{PAGE} exists, and this command did not write it; name another file with --html")
    found = compare(load_all(runs), samples, seed, _names(metrics))
    show_tables(found)
    page = comparison_page.write(found, html or PAGE)
    if output is not None:
        write_json(output, {**content(found), "samples": samples, "seed": seed})
    out.print(escape(f"page: {page}"))


def show_tables(found: Comparison) -> None:
    """Print a comparison: systems, warnings, and the values and verdicts of each metric."""
    letters = [_letter(place) for place in range(len(found.systems))]
    for letter, system in zip(letters, found.systems, strict=True):
        out.print(escape(f"{letter}: {system.name}, {system.place}"))
    for warning in found.warnings:
        terminal.warn(warning, out)
    for name, songs in found.alone.items():
        be = "is" if len(songs) == 1 else "are"
        out.print(escape(f"{counted(len(songs), 'song')} of {name} {be} not in all runs: {listed(songs)}"))
    for metric in found.metrics:
        if len(found.systems) > 2 or len(found.tested) < 2:
            out.print(_values(found, metric, letters))
        if len(found.tested) > 1:
            out.print(_differences(found, metric, letters))
    if len(found.tested) > 2:
        out.print("the p values of a metric and stem are corrected for its number of pairs (Holm)")


def content(found: Comparison) -> dict[str, Any]:
    """A comparison as JSON content."""
    return {
        "systems": [
            {"name": system.name, "place": system.place, "kind": system.kind, "songs": len(system.songs)}
            for system in found.systems
        ],
        "songs": list(found.songs),
        "stems": list(found.stems),
        "mean_stems": list(found.mean_stems),
        "values": found.values,
        "differences": [
            {
                **asdict(each),
                "a": found.names[each.a],
                "b": found.names[each.b],
                "verdict": each.verdict(found.names),
            }
            for each in found.differences
        ],
        "alone": {name: list(songs) for name, songs in found.alone.items()},
        "warnings": list(found.warnings),
    }


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _letter(place: int) -> str:
    """A, B, …, Z, AA, AB, …."""
    before = place // len(ascii_uppercase)
    return (_letter(before - 1) if before else "") + ascii_uppercase[place % len(ascii_uppercase)]


def _title(metric: Metric) -> str:
    direction = "" if metric.higher_is_better else "; lower is better"
    return f"{metric.label}, {statistic_title(metric, metric.over_songs)}{direction}"


def _values(found: Comparison, metric: Metric, letters: Sequence[str]) -> Table:
    """Every system's value for each stem, over the songs that all systems have."""
    over = f" ({len(found.songs)} in common)" if found.songs and len(found.tested) > 1 else ""
    table = Table(title=f"{_title(metric)}{over}", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in found.columns:
        table.add_column(column, justify="right")
    for letter, name, values in zip(
        letters, found.names, found.values[metric.name][metric.over_songs], strict=True
    ):
        if any(value is not None for value in values.values()):
            table.add_row(
                escape(f"{letter} {name}"), *(show(metric, values[column]) for column in found.columns)
            )
    return table


def _differences(found: Comparison, metric: Metric, letters: Sequence[str]) -> Table:
    """The verdict of each pair and stem."""
    two = len(found.tested) == 2
    table = Table(title=_title(metric), title_justify="left", box=None, pad_edge=False)
    table.add_column("stem" if two else "pair, stem")
    a, b = (letters[place] for place in found.tested[:2]) if two else ("first", "second")
    for heading in (
        a,
        b,
        f"{b} − {a}",
        f"{COVERAGE:.0%} interval",
        "p",
        f"{b} wins",
        "loses",
        "ties",
        "songs",
    ):
        table.add_column(heading, justify="right")
    table.add_column("")
    rows = found.rows if len(found.tested) <= MANY else found.rows[:1]
    for each in found.differences:
        if each.metric == metric.name and each.stem in rows:
            pair = "" if two else f"{letters[each.a]} {letters[each.b]}, "
            table.add_row(f"{pair}{escape(each.stem)}", *_cells(each, metric, letters))
    return table


def _cells(each: Difference, metric: Metric, letters: Sequence[str]) -> list[str]:
    return [
        show(metric, each.value_a),
        show(metric, each.value_b),
        signed(each.difference),
        "–" if each.low is None else f"{signed(each.low)} … {signed(each.high)}",
        p_text(each.corrected),
        *map(str, (each.wins, each.losses, each.ties, len(each.songs))),
        each.verdict(letters),
    ]


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)
