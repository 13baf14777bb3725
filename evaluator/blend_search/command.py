"""The command: ``python -m evaluator.blend_search collect | solve | members | stages``."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from evaluator.blend_search import ablation as worth
from evaluator.blend_search import (
    collecting,
    collection,
    cost_plot,
    plan_writer,
    stage_moves,
    stage_search,
    tables,
)
from evaluator.blend_search.ablation import Ensemble, within
from evaluator.blend_search.collecting import Running
from evaluator.blend_search.console import (
    AnywayOption,
    CollectionArgument,
    DataArgument,
    EngineOption,
    FolderOption,
    FoldsOption,
    ForceOption,
    JointOption,
    NonNegativeOption,
    PlanArgument,
    PrecisionOption,
    PriorOption,
    SpeedOption,
    SplitOption,
    SumOption,
    check_songs,
    find_songs,
    load_collection,
    parse_prior,
    print_notes,
    write_plan,
)
from evaluator.blend_search.flat_plan import flatten, runs
from evaluator.blend_search.search import SearchOptions, search, taken_weights
from evaluator.blend_search.solving import Constraints
from evaluator.run_folder import Store, write_json, write_text
from kmdx import engine as engines
from kmdx import plan_file, terminal
from kmdx import speed as speeds
from kmdx.challenge import TIME_FACTOR
from kmdx.errors import KmdxError
from kmdx.terminal import DeviceOption, JsonOption, TracksOption, err, out

MOST_TIMES = 1e9  # the duration, that a budget may be
HELP_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="The best blend of an ensemble's signals, found from their inner products.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP_SETTINGS,
)


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command()
def collect(
    plan: PlanArgument,
    data: DataArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="COLLECTION", help="A folder; the same command continues it."),
    ],
    all_estimates: Annotated[
        bool,
        typer.Option("--all-estimates", help="Add every other network's estimate of a stem, with weight 0."),
    ] = False,
    split: SplitOption = None,
    tracks: TracksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    speed: SpeedOption = "leaderboard",
    engine: EngineOption = engines.DEFAULT,
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
    songs = find_songs(data, split, tracks)
    store = Store(output)
    try:
        with store.locked():
            found = check_songs(songs, store.folder)
            with err.status("loading the weights") as status:
                failed = collecting.collect(
                    flat,
                    all_estimates,
                    songs,
                    found,
                    store,
                    Running(device, precision, speed, folder, engine),
                    keep,
                    lambda line: err.print(escape(line)),
                    lambda line: status.update(escape(line)),
                )
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on where this one ended")
        raise typer.Exit(130) from None
    there = sum((store.record(track.name) or {}).get("status") == "ok" for track in songs)
    out.print(f"{there} of {len(songs)} songs are in {escape(str(output))}")
    if there > len(songs) - len(failed):
        terminal.warn("not all signals are kept, as --keep asked for; the same command tries again")
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
    force: ForceOption = False,
    json: JsonOption = None,
) -> None:
    """Find the weights with the best mean global SDR, and show what they do on held-out songs.

    A stem whose cross-validated gain is not above 0 keeps the published weights in the plan. Exit code: 0,
    or 1 when that is so of all stems and no plan is written, or 2 for a mistake.
    """
    options = SearchOptions(Constraints(sum_to_one, non_negative), parse_prior(prior), joint, folds, anyway)
    plan_writer.check_distinct(output, json)
    if json is not None:
        plan_writer.check_report(json, folder)
    found = load_collection(folder)
    if output is not None:
        plan_writer.check_plan(output, found.plan.digest, folder, force)
    with err.status("finding weights, and validating them on songs held out"):
        result = search(found, options)
    out.print(tables.scores(result))
    out.print(tables.weights(result))
    print_notes(result)
    if json is not None:
        write_json(json, tables.as_json(found, result))
    if not any(each.recommended for each in result.found):
        out.print(
            "no weights are recommended: none gain on songs held out; the published ones stand, and no plan "
            "is written (--anyway overrides)"
        )
        raise typer.Exit(1)
    if output is not None:
        plan = plan_writer.reweighted(found.plan, taken_weights(found, result))
        write_plan(output, plan, [*tables.origin(found, result)])


@app.command()
def members(
    folder: CollectionArgument,
    by_run: Annotated[
        bool, typer.Option("--runs", help="Leave out single runs of networks instead of networks.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR", help=f"Find the best set within this real-time factor, such as {TIME_FACTOR:g}."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Write that set's plan (.yaml).")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw scores against costs to this file.")] = None,
    sum_to_one: SumOption = False,
    non_negative: NonNegativeOption = False,
    prior: PriorOption = "auto",
    folds: FoldsOption = None,
    force: ForceOption = False,
    json: JsonOption = None,
) -> None:
    """Say of each network what it adds to the cross-validated score and what it costs.

    The weights of what is left are found anew. Real-time factors are what the networks took while songs
    were collected; reading and writing files come on top.
    """
    if budget is None and output is not None:
        raise KmdxError("--output is for the plan within a budget: give --budget, too")
    if budget is not None and not 0 < budget <= MOST_TIMES:
        raise KmdxError(
            f"--budget {budget:g}: expected a real-time factor above 0 and up to {MOST_TIMES:g}, such as "
            f"{TIME_FACTOR:g}"
        )
    plan_writer.check_distinct(output, svg, json)
    for file in filter(None, (svg, json)):
        plan_writer.check_report(file, folder)
    found = load_collection(folder)
    if output is not None:
        plan_writer.check_plan(output, found.plan.digest, folder, force)
    ensemble = Ensemble(
        found, SearchOptions(Constraints(sum_to_one, non_negative), parse_prior(prior), folds=folds), by_run
    )
    with err.status("leaving out one member after another"):
        without = {name: ensemble.without(name) for name in ensemble.members}
    out.print(worth.table(ensemble, without))
    sets = []
    with err.status("trying sets of members") as status:
        for each in ensemble.sets() if budget is not None else ():
            sets.append(each)
            status.update(f"trying sets of members: {len(sets)} that can make every stem")
    if svg is not None:
        possible = {name: each for name, each in without.items() if each is not None}
        write_text(svg, cost_plot.svg(ensemble.whole, possible, sets, budget))
        out.print(f"drawn: {escape(str(svg))}")
    if json is not None:
        write_json(json, worth.as_json(ensemble, without))
    if budget is not None:
        chosen = within(sets, budget)
        line = worth.chosen(ensemble, chosen, budget)
        out.print(escape(line))
        with err.status("validating the weights of this set on songs held out"):
            part, result = ensemble.validated(chosen)
        out.print(tables.scores(result, "of this set, prior chosen inside each fold; published: its share"))
        print_notes(result)
        if not any(each.recommended for each in result.found):
            out.print(
                "no weights gain on songs held out over the set's share of the published ones, which stand"
            )
        if output is not None:
            plan = plan_writer.reweighted(part.plan, taken_weights(part, result))
            write_plan(output, plan, [line, worth.CAVEAT, *tables.origin(part, result)])


@app.command("stages")
def search_stages(
    plan: PlanArgument,
    data: DataArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Write the plan found (.yaml).")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="Only weights of this sum; can be repeated.")
    ] = None,
    step: Annotated[float, typer.Option(help="Change of a weight in the first round.")] = 0.1,
    rounds: Annotated[int, typer.Option(help="How often all weights are tried.", min=1)] = 1,
    count: Annotated[
        int | None,
        typer.Option("--search", help="Songs to search on; by default half, the others are held out."),
    ] = None,
    collected: Annotated[
        Path | None, typer.Option(metavar="COLLECTION", help="Estimate the time from a collection.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cost and stop.")] = False,
    split: SplitOption = None,
    tracks: TracksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    speed: SpeedOption = "leaderboard",
    engine: EngineOption = engines.DEFAULT,
    folder: FolderOption = None,
    scratch: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for estimates during the search; by default TMPDIR."),
    ] = None,
    anyway: AnywayOption = False,
    force: ForceOption = False,
) -> None:
    """Search the weights of sums that later networks hear, running again only what hears the change.

    Tells its cost first. Exit code: 0, or 1 when songs held out gain nothing and no plan is written, or 2
    for a mistake.
    """
    if not 0 < step <= 1:
        raise KmdxError(f"--step {step:g}: expected a number above 0 and up to 1")
    published = plan_file.load(plan)
    if output is not None:
        plan_writer.check_plan(output, published.digest, collected, force)
    tried = stage_moves.moves(published, only or ())
    songs = find_songs(data, split, tracks)
    costs = None if collected is None else collection.load(collected).costs
    if costs is not None and not costs.keys() >= {*runs(published, published.stems)}:
        raise KmdxError(f"--collected {collected}: that is a collection of another plan")
    if scratch is not None and not scratch.is_dir():
        raise KmdxError(f"--scratch {scratch}: no such folder")
    with stage_search.room_in(scratch or Path(tempfile.gettempdir())):
        made = tempfile.TemporaryDirectory(prefix="kmdx-", dir=scratch, ignore_cleanup_errors=True)
    with made as temporary:
        unusable = {} if dry_run else check_songs(songs, Path(temporary)).unusable
        chosen, held = stage_moves.chosen_songs([song for song in songs if song.name not in unusable], count)
        capped = published.capped(speeds.get(speed).overlap)
        search = stage_moves.Search(capped, chosen, held, tried, step, rounds)
        out.print(stage_search.cost(search, search.cost(costs)))
        if dry_run:
            return
        stage_search.check_room(search, Path(temporary))
        separator = Running(device, precision, speed, folder, engine).separator(Path(plan))
        try:
            found = stage_search.tune(
                search, separator, Path(temporary), lambda line: err.print(escape(line))
            )
        except KeyboardInterrupt:
            err.print("stopped; nothing was written")
            raise typer.Exit(130) from None
    tuned = replace(published, nodes=found.plan.nodes)
    out.print(stage_search.weights(published, tuned))
    out.print(stage_search.scores(found))
    if tuned.nodes == published.nodes:
        out.print("no other weights are better; nothing is written")
        raise typer.Exit(1)
    if not (found.recommended or anyway):
        why = "songs held out gain nothing" if held else "no song was held out"
        out.print(f"the weights found are not recommended: {why}; no plan is written (--anyway overrides)")
        raise typer.Exit(1)
    if output is not None:
        write_plan(output, tuned, [*stage_search.origin(search, published, tuned, found)])
