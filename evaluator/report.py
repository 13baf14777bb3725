"""The report of a run: one self-contained HTML page with styles, script and numbers.

The page loads nothing from the network. For songs whose stems were kept, it links to pictures in ``media/``
next to it, and to the sounds that its player plays: predictions in the run's folder and true stems in the
data set. The page also works without these files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from evaluator import pictures
from evaluator import results as results_of
from evaluator.metrics import Metric, named, show, signed
from evaluator.process import COMPUTING
from evaluator.published_section import published_next_to
from evaluator.records import SongRecord, columns, finite
from kmdx import files, listening, spectrograms
from kmdx.errors import AudioError

HERE = Path(__file__).parent
FREQUENCIES = {100: "100 Hz", 1000: "1 kHz", 10_000: "10 kHz"}
"""Frequencies with a label on the axis of a picture."""

logger = logging.getLogger("evaluator")


@dataclass(frozen=True)
class Media:
    """Relative addresses of the files for a stem of a song; None if a file does not exist."""

    picture: str | None = None
    estimate: str | None = None
    reference: str | None = None


def write(
    results: Mapping[str, Any],
    run: Path,
    predictions: Path | None = None,
    references: Mapping[str, Mapping[str, Path]] | None = None,
) -> Path:
    """Write a run's ``report.html``, and pictures of the stems that were kept; return the page's path.

    Parameters
    ----------
    results : mapping
        The content of the run's ``results.json``.
    run : Path
        The run's folder. The page is written atomically.
    predictions : Path, optional
        Folder of kept stems, ``<song>/<stem>.wav``.
    references : mapping, optional
        The data set's file of each song and stem; files that do not exist are left out.

    Notes
    -----
    Drawing takes about one second for a stem of four minutes. Pictures that are newer than both of their
    files are not drawn again. A stem that cannot be read gets no picture, and the reason is logged.
    """
    media = _media(results["songs"], results["run"]["stems"], run, predictions, references or {})
    path = run / "report.html"
    # File names may contain bytes that are not text; they become "?".
    files.write_text(path, page(results, media).encode("utf-8", "replace").decode("utf-8"))
    return path


def page(results: Mapping[str, Any], media: Mapping[str, Mapping[str, Media]] | None = None) -> str:
    """The page as text.

    Parameters
    ----------
    results : mapping
        The content of a run's ``results.json``.
    media : mapping, optional
        Files that the page links to, by song and stem.
    """
    results = finite(results)
    run = {"failure": None, "log_tail": [], "interpreter": None, "isolation": [], **results["run"]}
    songs = [SongRecord.from_json(content) for content in results["songs"]]
    unit = "GiB" if run["memory_limit"] and run["memory_limit"] % 2**30 == 0 else "GB"
    metrics = named(run["metrics"])
    return _template().render(
        results=results,
        run=run,
        summary=results["summary"],
        songs=[_row(song, metrics[0].name, run["stems"]) for song in songs],
        nodes=sorted({song.node for song in songs if song.node}),
        published=published_next_to(results["summary"], run, [song.song for song in songs if song.ok]),
        started=_date(run["started"]),
        metrics=metrics,
        statistics=list(results_of.STATISTICS),
        statistic_title=results_of.statistic_title,
        stems=run["stems"],
        columns=columns(run["stems"]),
        unit=unit,
        size=lambda count: _size(count, unit),
        versions=_versions(run),
        interpreter_packages=_packages(run),
        style=style("report.css"),
        script=Markup(listening.script()) + script("report.js"),
        data=embedded_json(_data(run, songs, media or {}, unit)),
    )


def script(name: str) -> Markup:
    """The script of a page, preceded by what all pages share."""
    return Markup("".join((HERE / each).read_text(encoding="utf-8") for each in ("page.js", name)))


def style(*names: str) -> Markup:
    """The style of a page, preceded by that of the player, which defines the colors of all pages."""
    return Markup(listening.style() + "".join((HERE / name).read_text(encoding="utf-8") for name in names))


def environment() -> jinja2.Environment:
    """The environment of page templates: values are escaped, and a missing value is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _template() -> jinja2.Template:
    pages = environment()
    pages.filters |= {"value": _value, "factor": _factor, "clock": _clock, "pad": _padded}
    return pages.get_template("report.html.jinja")


def _row(song: SongRecord, metric: str, stems: Sequence[str]) -> dict[str, Any]:
    """A song's row in the table before the script runs."""
    scores = song.scores.get(metric, {})
    return {
        "name": song.song,
        "link": f"#song={quote(song.song, safe='', errors='replace')}",
        "scores": {"song": song.mean(metric), **{stem: scores.get(stem) for stem in stems}},
        "flags": _flags(song),
        "reason": _reason(song),
        "failed": not song.ok,
        "over_time": song.over_time,
        "over_memory": song.over_memory,
        "duration": song.duration,
        "factor": song.real_time_factor,
        "memory": song.peak_memory,
        "node": song.node,
    }


def _reason(song: SongRecord) -> str | None:
    return song.reason or (None if song.ok else "unknown reason")


def _flags(song: SongRecord) -> list[str]:
    """Short labels for a song's problems."""
    flags = [] if song.ok else ["failed"]
    flags += ["over time"] if song.over_time else []
    flags += ["over memory"] if song.over_memory else []
    return flags + [f"silent {stem}" for stem in song.silent_references]


def _data(
    run: Mapping[str, Any],
    songs: Sequence[SongRecord],
    media: Mapping[str, Mapping[str, Media]],
    unit: str,
) -> dict[str, Any]:
    """Data for the page's script: every song with its curves and files."""
    metrics = named(run["metrics"])
    return {
        "stems": run["stems"],
        "columns": columns(run["stems"]),
        "metrics": [
            {"name": each.name, "title": each.title, "unit": each.unit, "higher": each.higher_is_better}
            for each in metrics
        ],
        "framed": next((each.name for each in metrics if each.frames), None),
        "timeLimit": run["time_limit_factor"],
        "memoryLimit": f"{_size(run['memory_limit'], unit)} {unit}",
        "unit": unit,
        "frequencies": [
            [label, round(spectrograms.height(hertz), 4)] for hertz, label in FREQUENCIES.items()
        ],
        "range": spectrograms.RANGE,
        "rows": [spectrograms.ROWS, pictures.GAP],
        "songs": [
            {
                "name": song.song,
                "reason": _reason(song),
                "flags": _flags(song),
                "warnings": song.warnings,
                "duration": song.duration,
                "seconds": song.seconds,
                "factor": song.real_time_factor,
                "memory": song.peak_memory,
                "memoryText": _size(song.peak_memory, unit),
                "gpuText": f"{_size(song.peak_gpu_memory, unit)} {unit}" if song.peak_gpu_memory else None,
                "silent": song.silent_references,
                "scores": {
                    each.name: {**_rounded(song.scores.get(each.name)), "song": song.mean(each.name)}
                    for each in metrics
                },
                "frames": {
                    name: {stem: [_short(value) for value in values] for stem, values in frames.items()}
                    for name, frames in song.frames.items()
                },
                "envelopes": song.envelopes,
                "media": {stem: vars(files) for stem, files in media.get(song.song, {}).items()},
            }
            for song in songs
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _rounded(values: Mapping[str, float | None] | None) -> dict[str, float | None]:
    return {key: None if value is None else round(value, 4) for key, value in (values or {}).items()}


def _media(
    songs: Iterable[Mapping[str, Any]],
    stems: Sequence[str],
    run: Path,
    predictions: Path | None,
    references: Mapping[str, Mapping[str, Path]],
) -> dict[str, dict[str, Media]]:
    """Draw pictures of kept stems, and find the files that can be played."""
    found: dict[str, dict[str, Media]] = {}
    for song in songs:
        name = song["song"]
        if predictions is None or Path(name).name != name:  # a name that leads out of the folder
            continue
        for stem in stems:
            estimate = predictions / name / f"{stem}.wav"
            reference = references.get(name, {}).get(stem)
            if not estimate.is_file():
                continue
            if reference is not None and not reference.is_file():
                reference = None
            picture = run / "media" / name / f"{stem}.png"
            found.setdefault(name, {})[stem] = Media(
                picture=_address(picture, run) if _drawn(reference, estimate, picture) else None,
                estimate=_address(estimate, run),
                reference=_address(reference, run) if reference else None,
            )
    return found


def _drawn(reference: Path | None, estimate: Path, picture: Path) -> bool:
    """Draw a picture unless it is up to date; return whether it exists."""
    if reference is None:
        return False
    newest = max(reference.stat().st_mtime, estimate.stat().st_mtime)
    if picture.is_file() and picture.stat().st_mtime > newest:
        return True
    try:
        pictures.write(reference, estimate, picture)
    except AudioError as error:
        logger.warning("%s", error)
        return False
    return True


def _address(path: Path, base: Path) -> str:
    """The address of a file for a page in ``base``: relative, or a URI if the file is on another drive."""
    try:
        relative = os.path.relpath(path.absolute(), base.absolute())
    except ValueError:
        return path.absolute().as_uri()
    return quote(Path(relative).as_posix().encode("utf-8", "surrogateescape"))


def embedded_json(data: Any) -> Markup:
    """JSON that is safe inside a script element: it cannot end the element or begin a comment."""
    return Markup(listening.script_json(data))


def _value(value: float | None, metric: Metric, digits: int = 2) -> str:
    return show(metric, value, digits)


def _padded(value: float | None, digits: int = 3) -> str:
    """A value with at least two decimals, padded with figure spaces to the width of ``digits`` decimals."""
    if value is None:
        return "–" + "\N{FIGURE SPACE}" * digits
    text = signed(value, digits).removeprefix("+").removesuffix("0")
    return text + "\N{FIGURE SPACE}" * (digits - len(text.partition(".")[2]))


def _factor(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _size(count: float | None, unit: str) -> str:
    """Bytes in the unit of the memory limit."""
    if count is None:
        return "–"
    value = count / (2**30 if unit == "GiB" else 10**9)
    return f"{value:.2f}" if value < 10 else f"{value:.1f}".removesuffix(".0")


def _date(text: str) -> str:
    """``2026-11-09T14:03:07+00:00`` as ``9 November 2026, 14:03 UTC``; other texts are not changed."""
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return text
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname() or ''}".rstrip()


def _packages(run: Mapping[str, Any]) -> str:
    packages = (run.get("interpreter") or {}).get("packages") or {}
    shown = [f"{name} {packages[name]}" for name in COMPUTING if name in packages]
    return ", ".join([*shown, f"{len(packages)} packages"])


def _versions(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items())
