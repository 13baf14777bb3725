"""The command: ``python -m evaluator.tradeoff PLAN DATA… -o FOLDER``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape

from evaluator import dataset
from evaluator.blend_search.console import FolderOption, PlanArgument
from evaluator.dataset import Track
from evaluator.run_folder import RunFolder, write_json, write_text
from evaluator.tradeoff import curve as curves
from evaluator.tradeoff.measuring import Running, ScoreKeeper, measure, settings_of
from evaluator.tradeoff.variants import Changes, variants
from kmdx import benchmark, devices, plan_file, precisions, terminal, weights
from kmdx.challenge import TIME_FACTOR
from kmdx.errors import KmdxError, shown
from kmdx.plan import Plan
from kmdx.terminal import DeviceOption, Engine, EngineOption, SplitOption, TracksOption, err, out

Number = TypeVar("Number", int, float)
TABLE, PICTURE = "results.json", "results.svg"
app = terminal.app()


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command()
def tradeoff(
    plan: PlanArgument,
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA…", help="Data sets with songs and their stems.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for results. Repeat to resume."),
    ],
    overlaps: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Overlaps of segments to try; empty for none.")
    ] = ",".join(f"{overlap:g}" for overlap in Changes.overlaps),
    shifts: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Numbers of shifts to try; empty for none.")
    ] = ",".join(map(str, Changes.shifts)),
    tta: Annotated[bool, typer.Option(help="Try test-time augmentation.")] = Changes.tta,
    members: Annotated[
        bool, typer.Option(help="Try to leave out each network, and each run of one.")
    ] = Changes.members,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Precisions to try; default: fp32, and the one the device is fast at."
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR", help=f"Draw a line at this real-time factor, such as {TIME_FACTOR:g}."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Separate only the beginning of each song.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of times that each window is timed.")] = 5,
    split: SplitOption = None,
    tracks: TracksOption = None,
    device: DeviceOption = "auto",
    engine: EngineOption = Engine.tuned,
    folder: FolderOption = None,
) -> None:
    """Measure what overlap, precision, shifts, test-time augmentation and each network gain and cost.

    Each setting is tried alone, in each precision, and compared with the plan as published in the first one.
    FOLDER gets results.json and results.svg. Scores are kept in it, so that a repeated command measures only
    what is missing, and the times. Exit codes: 0 for success, 2 for a user error.
    """
    changes = Changes(
        _numbers("--overlaps", overlaps, float), _numbers("--shifts", shifts, int), tta, members
    )
    for option, value in (("--seconds", seconds), ("--budget", budget)):
        if value is not None and not 0 < value < math.inf:
            raise KmdxError(f"{option} {value:g}: expected a number above 0")
    running = Running(device, engine.value, folder)
    chosen = _precisions(precision, running)
    loaded = plan_file.load(plan)
    songs = _songs(data, split, tracks)
    settings = settings_of(variants(loaded, changes), chosen)
    weights.pull_from_urls((use.weight for use in loaded.networks.values()), folder)
    _warn_of_short_songs(loaded, songs, seconds)
    place = RunFolder(output)
    try:
        with place.locked(), err.status("reading the songs") as status:
            scores = ScoreKeeper(place, songs, seconds)
            scores.start(loaded, running)
            found = measure(settings, running, scores, rounds, lambda line: status.update(escape(line)))
    except KeyboardInterrupt:
        err.print("stopped; repeat the command to resume")
        raise typer.Exit(130) from None
    curve = curves.Curve(found)
    machine = benchmark.describe(devices.choose(device))
    out.print(curves.table(curve))
    out.print(escape(f"knee of the curve on {machine.name}: {curve.knee.name}"))
    content = {
        "ensemble": loaded.name,
        "plan_sha256": loaded.digest,
        "machine": vars(machine),
        "engine": engine.value,
        "songs": [track.name for track in songs],
        "seconds": seconds,
        "rounds": rounds,
        **curves.as_json(curve),
    }
    write_json(output / TABLE, content)
    write_text(output / PICTURE, curves.svg(curve, budget))
    out.print(f"written: {escape(str(output / TABLE))}, {escape(str(output / PICTURE))}")


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a comma-separated list."""
    try:
        return [kind(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise KmdxError(f"{option} {shown(text)}: expected numbers such as 2,4") from None


def _precisions(text: str | None, running: Running) -> tuple[str, ...]:
    if text is None:
        return running.precisions()
    names = tuple(dict.fromkeys(precisions.check(name.strip()) for name in text.split(",") if name.strip()))
    if not names:
        raise KmdxError(f"--precision is empty; available: {', '.join(precisions.PRECISIONS)}")
    return names


def _songs(data: Sequence[Path], split: str | None, tracks: str | None) -> list[Track]:
    """The songs of all data sets; their names must differ."""
    songs = [track for place in data for track in dataset.find_tracks(place, split, tracks)]
    names = [track.name for track in songs]
    for name in names:
        if names.count(name) > 1:
            raise KmdxError(f"two songs are named {shown(name)}; name each data set once")
    for problem in dataset.check(songs, content=False, accept_incomplete=True):
        if problem.fatal:
            raise KmdxError(str(problem))
        terminal.warn(str(problem))
    return songs


def _warn_of_short_songs(plan: Plan, songs: Sequence[Track], seconds: float | None) -> None:
    """Warn of songs that have no two whole windows, so that their scores hardly depend on the overlap."""
    window = max(use.chunking.length for use in plan.networks.values()) / plan.sample_rate
    short = [track for track in songs if min(track.duration, seconds or track.duration) < 2 * window]
    if short:
        terminal.warn(
            f"{len(short)} of {len(songs)} songs are shorter than two windows of {window:.1f} s, so "
            "their scores hardly depend on the overlap"
        )
