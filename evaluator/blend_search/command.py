"""The command: ``python -m evaluator.blend_search collect | solve | members | stages``."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from evaluator import dataset
from evaluator.blend_search import collecting, collection, tables, writing
from evaluator.blend_search.collecting import How
from evaluator.blend_search.search import Options, Result, search
from evaluator.blend_search.signals import flatten
from evaluator.blend_search.solving import Constraints
from evaluator.dataset import Track
from evaluator.store import Store, write_json
from evaluator.survey import Survey, survey
from kmdx import plan_file, terminal
from kmdx.errors import KmdxError, KmdxWarning

PIPE_WIDTH = 160  # columns where there is no terminal to ask
out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)
HELP_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="The best blend of an ensemble's signals, found from their inner products.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP_SETTINGS,
)

EVERY_SPLIT = "all"

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="An ensemble, or a plan's path (.yaml).")]
DataArgument = Annotated[
    Path, typer.Argument(metavar="DATA", help="MUSDB18-HQ, or any folder in its layout.")
]
CollectionArgument = Annotated[
    Path, typer.Argument(metavar="COLLECTION", help="Folder that `collect` filled.")
]
SplitOption = Annotated[
    str, typer.Option(help=f"Subfolder of DATA, where it has one; {EVERY_SPLIT!r} takes every one.")
]
TracksOption = Annotated[str | None, typer.Option(metavar="GLOB", help="Only songs whose names match.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or any torch device.")]
PrecisionOption = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")]
SpeedOption = Annotated[str, typer.Option(help="leaderboard, balanced or fast.")]
FolderOption = Annotated[
    Path | None, typer.Option("--weights", metavar="DIR", help="Where weight files lie, if elsewhere.")
]
SumOption = Annotated[bool, typer.Option("--sum-to-one", help="Weights of a stem sum to one.")]
NonNegativeOption = Annotated[bool, typer.Option("--non-negative", help="No weight is below 0.")]
PriorOption = Annotated[
    str,
    typer.Option(
        metavar="auto|NUMBER",
        help="Pull to the published weights, dB for a distance of 1; auto chooses by cross-validation.",
    ),
]
JointOption = Annotated[
    bool, typer.Option("--joint", help="One prior for all stems, and all their weights or none.")
]
FoldsOption = Annotated[int | None, typer.Option(help="Of the cross-validation; by default one a song.")]
AnywayOption = Annotated[
    bool, typer.Option("--anyway", help="Take weights that gain nothing on songs held out, too.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON.")]


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    warnings.showwarning = _show_warning
    terminal.run(app, err)


@app.command()
def collect(
    plan: PlanArgument,
    data: DataArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="COLLECTION", help="A folder; the same one goes on.")
    ],
    all_estimates: Annotated[
        bool,
        typer.Option(
            "--all-estimates", help="Also what any other network run says of a stem, with weight 0."
        ),
    ] = False,
    split: SplitOption = "test",
    tracks: TracksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    speed: SpeedOption = "leaderboard",
    folder: FolderOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the signals, as float32 wav files in COLLECTION/signals.")
    ] = False,
) -> None:
    """Run each network once on each song and keep the inner products of the signals that meet in stems.

    A few hundred numbers a song are all that the other commands need. The same command goes on after any
    interruption. Exit code: 0 when every song was collected, 1 when some were not, 2 for a mistake.
    """
    flat = flatten(plan_file.load(plan), all_estimates)
    songs = _songs(data, split, tracks)
    store = Store(output)
    try:
        with store.locked():
            found = _survey(songs, store.folder)
            collecting.collect(
                flat,
                all_estimates,
                songs,
                found,
                store,
                How(device, precision, speed, folder),
                keep,
                lambda line: err.print(escape(line)),
            )
            failed = {track.name: (store.record(track.name) or {}).get("reason") for track in songs}
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on where this one ended")
        raise typer.Exit(130) from None
    failed = {song: reason for song, reason in failed.items() if reason}
    out.print(f"{len(songs) - len(failed)} of {len(songs)} songs are in {escape(str(output))}")
    if failed:
        raise typer.Exit(1)


@app.command()
def solve(
    folder: CollectionArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Write a plan (.yaml).")
    ] = None,
    sum_to_one: SumOption = False,
    non_negative: NonNegativeOption = False,
    prior: PriorOption = "auto",
    joint: JointOption = False,
    folds: FoldsOption = None,
    anyway: AnywayOption = False,
    json: JsonOption = None,
) -> None:
    """Find the weights with the best mean over songs of global SDR, and say what they do on songs held out.

    A stem whose cross-validated gain is not above 0 keeps the published weights in the plan. Exit code: 0,
    or 1 when that is so of all stems and no plan is written, or 2 for a mistake.
    """
    options = Options(Constraints(sum_to_one, non_negative), _prior(prior), joint, folds, anyway)
    if output is not None:
        writing.check(output)
    found = _load(folder)
    result = search(found, options)
    out.print(tables.scores(result))
    out.print(tables.weights(result))
    _print_notes(result)
    if json is not None:
        write_json(json, tables.as_json(found, result))
    if not any(each.recommended for each in result.found):
        out.print(
            "no weights are recommended: none gain on songs held out; the published ones stand, and no plan "
            "is written (--anyway overrides)"
        )
        raise typer.Exit(1)
    if output is not None:
        weights = {
            each.stem.name: dict(zip(each.stem.signals, each.taken.tolist(), strict=True))
            for each in result.found
        }
        plan = writing.reweighted(found.plan, weights)
        _write(output, plan, [*tables.origin(found, result)])


def _write(path: Path, plan: Any, origin: list[str]) -> None:
    """Write a plan whose description begins with where it came from."""
    title = f"{plan.title}, blended anew"
    writing.write(path, replace(plan, title=title, description=f"{origin[0]} {plan.description}"), origin)
    out.print(f"written: {escape(str(path))}")


def _songs(data: Path, split: str, tracks: str | None) -> list[Track]:
    return dataset.find_tracks(data, None if split == EVERY_SPLIT else split, tracks)


def _survey(songs: list[Track], folder: Path) -> Survey:
    """Look at the data, tell of what is wrong with it, and go on if there is a song left."""
    with err.status(f"checking {len(songs)} songs, every sample of them unless that was done before"):
        found = survey(songs, folder)
    for line in [*found.warnings, *(f"{song}: {why}, left out" for song, why in found.unusable.items())]:
        _warn(line)
    if len(found.unusable) == len(songs):
        song, why = next(iter(found.unusable.items()))
        raise KmdxError(f"none of {len(songs)} songs can be used; {song}: {why}")
    return found


def _load(folder: Path) -> collection.Collection:
    found = collection.load(folder)
    for song, reason in found.failed.items():
        _warn(f"{song} is left out: {reason}")
    for line in found.warnings:
        _warn(line)
    return found


def _prior(text: str) -> float | None:
    """Strength of the prior; ``None`` to choose it."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise KmdxError(f"--prior {text}: expected auto, or a number from 0 (none) up to inf (published)")
    return value


def _print_notes(result: Result) -> None:
    for stem in result.silent:
        _warn(f"{stem}: the true stem is silent in every song; the published weights stand")
    for each in result.found:
        for note in each.notes:
            err.print(f"[bold]note:[/bold] {escape(note)}")


def _warn(message: str) -> None:
    err.print(f"[bold yellow]warning:[/bold yellow] {escape(message)}")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print warnings of this package in one line, and nobody else's."""
    if issubclass(category, KmdxWarning):
        _warn(str(message))
