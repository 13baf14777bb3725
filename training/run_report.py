"""The report of a run: its curves, its scores, and excerpts of validation songs."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
import soundfile as sf
import torch
from markupsafe import Markup
from numpy.typing import NDArray

from evaluator import plots
from kmdx import files
from kmdx.challenge import RATE
from training import config as configs
from training import sampling, trainer, validation
from training.config import Config
from training.losses import LOSSES
from training.run import Run
from training.songs import Songs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.jinja"
EXCERPTS = 3  # songs
SECONDS = 10.0  # of each excerpt, where the true stem is loudest
POINTS = 400  # most points of a curve
SMOOTHING = 0.95  # factor by which a value's weight in the running mean decreases per point
NOT_DRAWN = ("step", "skipped", "seconds")  # columns of steps.csv
TITLES = {"gradient": "norm of the gradient"}  # of columns whose names are not descriptive
VALIDATED = "validation SDR in dB"
WIDTH, HEIGHT = 440, 180  # pixels of a diagram
VARIABLES = {plots.TEXT: "--soft", plots.LINE: "--line", plots.BLUE: "--curve"}  # the page's colors


class Curve(NamedTuple):
    """Values by step."""

    steps: Sequence[float]
    values: Sequence[float]


def write(run: Run, songs: Songs, device: str = "cpu") -> Path:
    """Write the report of a run, and the excerpts that it plays, computed on ``device``; return its path."""
    config = run.config()
    steps, scores = _read(run.steps), _read(run.validation)
    by_step: dict[float, list[float]] = defaultdict(list)
    last: dict[str, str] = {}
    for row in scores:
        by_step[float(row["step"])].append(float(row["sdr"]))
        last[row["song"]] = row["sdr"]
    means = {step: sum(values) / len(values) for step, values in by_step.items()}
    validated = diagram(VALIDATED, Curve([*means], [*means.values()]), dots=True)
    data = run.data() if run.data_file.is_file() else {}
    best = max(means.items(), key=lambda entry: entry[1]) if means else None
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template(TEMPLATE).render(
        config=config,
        settings=configs.dump(config),
        best=best,
        diagrams={title: Markup(svg) for title, svg in (_of_steps(steps) | {VALIDATED: validated}).items()},
        steps=int(float(steps[-1]["step"])) if steps else 0,
        skipped=int(float(steps[-1]["skipped"])) if steps else 0,
        pace=_pace(steps),
        scores=sorted(last.items()),
        songs={"training": len(songs.training), "validation": len(songs.validation)},
        excerpts=_excerpts(run, config, songs, torch.device(device)),
        start=data.get("start"),
        extensions=data.get("extensions", []),
        warnings=data.get("warnings", []),
    )
    files.write_text(run.page, text)
    return run.page


def _of_steps(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """A diagram for each column of ``steps.csv`` that has values, by title."""
    columns = dict.fromkeys(column for row in rows for column in row if column)
    diagrams = {}
    for column in columns:
        if column in NOT_DRAWN:
            continue
        curve = _curve(rows, column)
        title = LOSSES[column].title if column in LOSSES else TITLES.get(column, column.replace("_", " "))
        plain = column == "learning_rate"
        positive = all(value > 0 for value in curve.values if math.isfinite(value))
        diagrams[title] = diagram(title, curve, logarithmic=positive and not plain, smooth=not plain)
    return diagrams


def diagram(
    title: str, curve: Curve, logarithmic: bool = False, dots: bool = False, smooth: bool = False
) -> str:
    """Draw a curve as SVG, without values that are not finite or that have no logarithm.

    With ``smooth``, the curve is faint, and its running mean is drawn over it.
    """
    points = [
        (step, value)
        for step, value in zip(curve.steps, curve.values, strict=True)
        if math.isfinite(value) and (value > 0 or not logarithmic)
    ]
    if not points:
        return ""
    thinned = points[:: max(1, len(points) // POINTS)]
    if thinned[-1] != points[-1]:
        thinned.append(points[-1])
    steps, values = zip(*thinned, strict=True)
    low, high = min(values), max(values)
    if high - low <= 1e-12 * abs(high):
        margin = 0.5 * abs(high) or 0.5
        low, high = low - margin, high + margin

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot(yscale="log" if logarithmic else "linear", ylim=(low, high))
        mean = np.exp(_running_mean(np.log(values).tolist())) if logarithmic else _running_mean(values)
        if smooth:
            axes.plot(steps, values, alpha=0.3, linewidth=1, color=plots.BLUE)
        axes.plot(steps, mean if smooth else values, color=plots.BLUE)
        for step, value in thinned if dots else ():
            (dot,) = axes.plot(step, value, "o", markersize=6, clip_on=False, color=plots.BLUE)
            plots.set_title(dot, f"step {step:.0f}: {value:.3f}")
        places = np.unique(np.linspace(steps[0], steps[-1], 5))
        heights = (np.geomspace if logarithmic else np.linspace)(low, high, 5)
        axes.set_xticks(places, [f"{place:.0f}" for place in places])
        axes.set_yticks(heights, [f"{height:.3g}" for height in heights])
        axes.minorticks_off()

    drawn = plots.svg(draw, WIDTH, HEIGHT, title)
    for color, name in VARIABLES.items():
        drawn = drawn.replace(color, f"var({name})")
    return drawn


def _running_mean(values: Sequence[float]) -> list[float]:
    """The running mean of values, with exponentially decreasing weights for older ones."""
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHING * mean + value, SMOOTHING * weight + 1
        means.append(mean / weight)
    return means


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _curve(rows: Sequence[dict[str, str]], column: str) -> Curve:
    filled = [row for row in rows if row.get(column)]
    return Curve([float(row["step"]) for row in filled], [float(row[column]) for row in filled])


def _pace(rows: Sequence[dict[str, str]]) -> float | None:
    """Median seconds per step."""
    seconds = [float(row["seconds"]) for row in rows if row.get("seconds")]
    return float(np.median(seconds)) if seconds else None


def _excerpts(run: Run, config: Config, songs: Songs, device: torch.device) -> list[dict[str, Any]]:
    """Write the loudest seconds of some songs: the network's input, the true stem, and the estimate."""
    network, vocals = trainer.trained(run).to(device), trainer.vocals_network(config)
    if isinstance(vocals, torch.nn.Module):
        vocals.to(device)
    with_source = [song for song in songs.validation if config.source in song.stems]
    folder = run.folder / "excerpts"
    folder.mkdir(exist_ok=True)
    made = []
    for number, song in enumerate(with_source[:EXCERPTS]):
        part = _loudest(sampling.read(song.stems[config.source], 0, song.samples))
        found = validation.excerpt(config, network, vocals, song, part, device)
        written = {}
        for what, signal in zip(
            ("heard", "true", "estimated"), (found.input, found.truth, found.estimate), strict=True
        ):
            path = folder / f"{number} {what}.flac"
            with files.atomic(path) as partial:
                sf.write(partial, np.clip(signal.T, -1, 1), RATE, format="FLAC")
            written[what] = path.relative_to(run.folder).as_posix()
        made.append({"song": song.name, "files": written})
    return made


def _loudest(signal: NDArray[np.float32]) -> slice:
    """The :data:`SECONDS` of a signal ``(2, samples)`` with the most energy."""
    length = min(int(SECONDS * RATE), signal.shape[1])
    energy = np.concatenate([[0.0], np.cumsum(np.square(signal, dtype=np.float64).sum(0))])
    start = int(np.argmax(energy[length:] - energy[:-length])) if length < signal.shape[1] else 0
    return slice(start, start + length)
