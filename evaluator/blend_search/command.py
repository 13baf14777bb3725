"""The command: ``python -m evaluator.blend_search collect | solve | members | stages``."""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from evaluator import dataset
from evaluator.blend_search import collecting, collection, picture, stages, tables, writing
from evaluator.blend_search.collecting import How
from evaluator.blend_search.members import Ensemble, within
from evaluator.blend_search.search import Options, Result, search
from evaluator.blend_search.signals import flatten
from evaluator.blend_search.solving import Constraints
from evaluator.dataset import Track
from evaluator.store import Store, write_json, write_text
from evaluator.survey import Survey, survey
from kmdx import plan_file, terminal
from kmdx import speed as speeds
from kmdx.errors import KmdxError, KmdxWarning
from kmdx.plan import Plan

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


@app.command()
def members(
    folder: CollectionArgument,
    by_run: Annotated[
        bool, typer.Option("--runs", help="Leave out single runs of networks, not networks.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(metavar="FACTOR", help="Find the best set within this real-time factor, such as 1.57."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Write that set's plan (.yaml).")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw scores against costs into this file.")] = None,
    sum_to_one: SumOption = False,
    non_negative: NonNegativeOption = False,
    prior: PriorOption = "auto",
    folds: FoldsOption = None,
    json: JsonOption = None,
) -> None:
    """Say of each network what it adds to the cross-validated score and what it costs.

    The weights of what is left are found anew. Real-time factors are what the networks took while songs
    were collected; reading and writing files come on top.
    """
    if budget is None and output is not None:
        raise KmdxError("--output is for the plan within a budget: give --budget, too")
    if budget is not None and not budget > 0:
        raise KmdxError(f"--budget {budget:g}: expected a real-time factor above 0, such as 1.57")
    if output is not None:
        writing.check(output)
    found = _load(folder)
    ensemble = Ensemble(
        found, Options(Constraints(sum_to_one, non_negative), _prior(prior), folds=folds), by_run
    )
    without = {name: ensemble.without(name) for name in ensemble.members}
    out.print(tables.members(ensemble, without))
    sets = [] if budget is None else [*ensemble.sets()]
    if svg is not None:
        possible = {name: each for name, each in without.items() if each is not None}
        write_text(svg, picture.svg(ensemble.whole, possible, sets, budget))
        out.print(f"drawn: {escape(str(svg))}")
    if json is not None:
        write_json(json, tables.members_as_json(ensemble, without))
    if budget is not None:
        chosen = within(sets, budget)
        line = tables.chosen(ensemble, chosen, budget)
        out.print(escape(line))
        if output is not None:
            _write(output, chosen.plan, [line, *tables.members_origin(found, ensemble, chosen)])


@app.command("stages")
def search_stages(
    plan: PlanArgument,
    data: DataArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Write the plan found (.yaml).")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="Only weights of this sum; may be repeated.")
    ] = None,
    step: Annotated[float, typer.Option(help="Change of a weight in the first round.")] = 0.1,
    rounds: Annotated[int, typer.Option(help="Times that all weights are tried.", min=1)] = 1,
    count: Annotated[
        int | None, typer.Option("--search", help="Songs to search on, half by default; others are held out.")
    ] = None,
    collected: Annotated[
        Path | None, typer.Option(metavar="COLLECTION", help="Estimate the time by what networks took there.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and end.")] = False,
    split: SplitOption = "test",
    tracks: TracksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    speed: SpeedOption = "leaderboard",
    folder: FolderOption = None,
    anyway: AnywayOption = False,
) -> None:
    """Search the weights of sums that later networks hear, running again only what hears the change.

    Tells its cost first. Exit code: 0, or 1 when songs held out gain nothing and no plan is written, or 2
    for a mistake.
    """
    if not 0 < step <= 1:
        raise KmdxError(f"--step {step:g}: expected a number above 0 and up to 1")
    if output is not None:
        writing.check(output)
    published = plan_file.load(plan)
    moves = stages.moves(published, only or ())
    songs = _songs(data, split, tracks)
    costs = None if collected is None else collection.load(collected).costs
    with tempfile.TemporaryDirectory(prefix="kmdx-", ignore_cleanup_errors=True) as temporary:
        unusable = {} if dry_run else _survey(songs, Path(temporary)).unusable
        chosen, held = stages.chosen_songs([song for song in songs if song.name not in unusable], count)
        capped = published.capped(speeds.get(speed).overlap)
        search = stages.Search(capped, chosen, held, moves, step, rounds)
        out.print(tables.cost(search, search.cost(costs)))
        if dry_run:
            return
        separator = How(device, precision, speed, folder).separator(Path(plan))
        try:
            found = stages.tune(search, separator, Path(temporary), lambda line: err.print(escape(line)))
        except KeyboardInterrupt:
            err.print("stopped; nothing was written")
            raise typer.Exit(130) from None
    tuned = replace(published, nodes=found.plan.nodes)
    out.print(tables.stage_weights(published, tuned))
    out.print(tables.stage_scores(found))
    if tuned.nodes == published.nodes:
        out.print("no other weights are better; nothing is written")
        raise typer.Exit(1)
    if not (found.recommended or anyway):
        why = "songs held out gain nothing" if held else "no song was held out"
        out.print(f"the weights found are not recommended: {why}; no plan is written (--anyway overrides)")
        raise typer.Exit(1)
    if output is not None:
        _write(output, tuned, [*tables.stage_origin(search, published, tuned, found)])


def _write(path: Path, plan: Plan, origin: list[str]) -> None:
    """Write a plan whose description begins with where it came from."""
    title = f"{plan.title}, with other weights"
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
