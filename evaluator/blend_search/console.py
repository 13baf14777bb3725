"""Arguments, options and messages that the commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from evaluator.blend_search import collection, plan_writer
from evaluator.blend_search.search import Result
from evaluator.data_check import DataCheck, check_data
from evaluator.dataset import Track
from evaluator.layouts import reference_of
from kmdx import terminal
from kmdx.challenge import CHANNELS, RATE
from kmdx.errors import KmdxError
from kmdx.plan import Plan
from kmdx.terminal import err, out

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="An ensemble, or a plan's path (.yaml).")]
DataArgument = Annotated[
    Path, typer.Argument(metavar="DATA", help="MUSDB18-HQ, or any folder in its layout.")
]
CollectionArgument = Annotated[Path, typer.Argument(metavar="COLLECTION", help="Output folder of `collect`.")]
FolderOption = Annotated[
    Path | None,
    typer.Option("--weights", metavar="DIR", help="Folder of weight files; by default the models folder."),
]
SumOption = Annotated[bool, typer.Option("--sum-to-one", help="Make the weights of a stem sum to one.")]
NonNegativeOption = Annotated[bool, typer.Option("--non-negative", help="Do not allow negative weights.")]
PriorOption = Annotated[
    str,
    typer.Option(
        metavar="auto|NUMBER",
        help="Strength of the pull toward the published weights, in dB at a distance of 1. "
        "auto chooses it by cross-validation.",
    ),
]
JointOption = Annotated[
    bool,
    typer.Option("--joint", help="Use one prior for all stems, and use new weights for all stems or none."),
]
FoldsOption = Annotated[
    int | None, typer.Option(help="Number of cross-validation folds; by default one per song.")
]
AnywayOption = Annotated[
    bool, typer.Option("--anyway", help="Also use weights that do not improve held-out songs.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Let --output overwrite a plan that this command did not write.")
]


def write_plan(path: Path, plan: Plan, origin: list[str]) -> None:
    """Write a plan whose description begins with its origin."""
    title = f"{plan.title}, with other weights"
    plan_writer.write(path, replace(plan, title=title, description=f"{origin[0]} {plan.description}"), origin)
    out.print(f"written: {escape(str(path))}")


def check_songs(songs: list[Track], folder: Path, stems: Sequence[str]) -> DataCheck:
    """Check the data, which must have all of these stems, and print all problems.

    Raises :class:`KmdxError` if no song can be used.
    """
    with err.status(f"checking the audio of {len(songs)} songs (only once per collection)"):
        found = check_data(songs, folder, accept_incomplete=True)
    unsuitable = {song.name: why for song in songs if (why := _unsuitable(song, stems)) is not None}
    found = replace(found, unusable={**unsuitable, **found.unusable})
    for line in [*found.warnings, *(f"{song}: {why}, left out" for song, why in found.unusable.items())]:
        terminal.warn(line)
    if len(found.unusable) == len(songs):
        song, why = next(iter(found.unusable.items()))
        raise KmdxError(f"none of {len(songs)} songs can be used; {song}: {why}")
    return found


def _unsuitable(song: Track, stems: Sequence[str]) -> str | None:
    """Why a song lacks what plans need; ``None`` if it lacks nothing or cannot be read at all."""
    missing = [stem for stem in stems if reference_of(stem, stems) not in song.available]
    if missing:
        return f"no {', '.join(missing)} among its stems"
    if song.rate and (song.rate, song.channels) != (RATE, CHANNELS):
        return f"{song.channels} channels at {song.rate} Hz; expected {CHANNELS} channels at {RATE} Hz"
    return None


def load_collection(folder: Path) -> collection.Collection:
    """Read a collection and print its problems."""
    found = collection.load(folder)
    for song, reason in found.failed.items():
        terminal.warn(f"{song} is left out: {reason}")
    for line in found.warnings:
        terminal.warn(line)
    return found


def parse_prior(text: str) -> float | None:
    """The strength of the prior; ``None`` for auto."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise KmdxError(
            f"--prior {text}: expected auto, or a number from 0 (no prior) to inf (published weights)"
        )
    return value


def print_notes(result: Result) -> None:
    """Print warnings and notes about a result."""
    for stem in result.silent:
        terminal.warn(f"{stem}: the true stem is silent in every song; its published weights are kept")
    for each in result.found:
        for note in each.notes:
            err.print(f"[bold]note:[/bold] {escape(note)}")
