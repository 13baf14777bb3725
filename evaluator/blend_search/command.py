"""The command: ``python -m evaluator.blend_search collect | solve | members | stages``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from evaluator import dataset
from evaluator.blend_search import (
    ablation,
    collecting,
    collection,
    cost_plot,
    plan_writer,
    stage_moves,
    stage_search,
    tables,
)
from evaluator.blend_search.ablation import Candidate, Ensemble, within
from evaluator.blend_search.collecting import Running
from evaluator.blend_search.console import (
    AnywayOption,
    CollectionArgument,
    DataArgument,
    FolderOption,
    FoldsOption,
    ForceOption,
    JointOption,
    NonNegativeOption,
    PlanArgument,
    PriorOption,
    SumOption,
    check_songs,
    load_collection,
    parse_prior,
    print_notes,
    write_plan,
)
from evaluator.blend_search.flat_plan import flatten, indivisible
from evaluator.blend_search.search import SearchOptions, find_weights, weights_to_use
from evaluator.blend_search.solving import Constraints
from evaluator.run_folder import RunFolder, write_json, write_text
from kmdx import plan_file, speeds, terminal, weights
from kmdx.challenge import TIME_FACTOR
from kmdx.errors import KmdxError
from kmdx.plan import Plan
from kmdx.terminal import (
    ClusterOption,
    DeviceOption,
    Engine,
    EngineOption,
    JsonOption,
    Precision,
    PrecisionOption,
    SpeedName,
    SpeedOption,
    SplitOption,
    TracksOption,
    err,
    out,
)

MAX_BUDGET = 1e9  # real-time factor
app = terminal.app(
    "Find the best blend of an ensemble's signals from their inner products.", no_args_is_help=True
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
        typer.Option("--output", "-o", metavar="COLLECTION", help="Output folder. Repeat to resume."),
    ],
    all_estimates: Annotated[
        bool,
        typer.Option("--all-estimates", help="Also add other networks' estimates of a stem, with weight 0."),
    ] = False,
    split: SplitOption = None,
    tracks: TracksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.auto,
    speed: SpeedOption = SpeedName.leaderboard,
    engine: EngineOption = Engine.tuned,
    cluster: ClusterOption = None,
    folder: FolderOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the signals as float32 wav files in COLLECTION/signals.")
    ] = False,
) -> None:
    """Run each network once on each song and save the inner products of each stem's signals.

    The other commands need only these few hundred numbers per song. After an interruption, repeat the
    command to resume. Exit codes: 0 if every song was collected, 1 if some were not, 2 for a user error.
    """
    if cluster is not None:  # workers run in other folders
        data, output, folder = data.absolute(), output.absolute(), folder and folder.absolute()
    if Path(plan).is_file():  # the collection has the paths of its weights
        plan = str(Path(plan).absolute())
    flat = flatten(plan_file.load(plan), all_estimates)
    weights.pull_from_urls((use.weight for use in flat.plan.networks.values()), folder)
    for formula in indivisible(flat.plan):
        terminal.warn(f"{formula} is one signal of the blend: blend search finds no weights inside it")
    songs = dataset.find_tracks(data, split, tracks)
    collected = RunFolder(output)
    running = Running(device, precision.value, speed.value, folder, engine.value)
    try:
        with collected.locked():
            checked = check_songs(songs, collected.path, flat.plan.stems)
            show = partial(_show, err.print)
            if cluster is None:
                with err.status("loading the weights") as status:
                    run = partial(
                        collecting.run_here, flat, running, collected, partial(_show, status.update)
                    )
                    failed = collecting.collect(songs, checked, collected, run, keep, show)
            else:
                from evaluator.blend_search import cluster_run
                from kmdx.cluster import ClusterOptions

                run = partial(cluster_run.run, flat, running, collected, data, ClusterOptions(cluster))
                failed = collecting.collect(songs, checked, collected, run, keep, show)
    except KeyboardInterrupt:
        err.print("stopped; repeat the command to resume")
        raise typer.Exit(130) from None
    done = sum((collected.record(track.name) or {}).get("status") == "ok" for track in songs)
    out.print(f"{done} of {len(songs)} songs are in {escape(str(output))}")
    if done > len(songs) - len(failed):
        terminal.warn("not all signals were kept, although --keep was given; repeat the command to try again")
    if failed:
        raise typer.Exit(1)


def _show(show: Callable[[str], object], line: str) -> None:
    show(escape(line))


@app.command()
def solve(
    folder: CollectionArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Write the plan to this .yaml file.")
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
    """Find the weights with the best mean global SDR, and cross-validate them.

    A stem whose cross-validated score does not improve keeps its published weights. Exit codes: 0 for
    success, 1 if no stem improves and no plan is written, 2 for a user error.
    """
    options = SearchOptions(Constraints(sum_to_one, non_negative), parse_prior(prior), joint, folds, anyway)
    plan_writer.check_distinct(output, json)
    if json is not None:
        plan_writer.check_report(json, folder)
    found = load_collection(folder)
    if output is not None:
        plan_writer.check_plan(output, found.plan.digest, folder, force)
    with err.status("finding the weights and validating them on held-out songs"):
        result = find_weights(found, options)
    out.print(tables.scores(result))
    out.print(tables.weights(result))
    print_notes(result)
    if json is not None:
        write_json(json, tables.as_json(found, result))
    if not any(each.recommended for each in result.found):
        out.print(
            "no weights are recommended, because none improve held-out songs; no plan is written "
            "(--anyway overrides this)"
        )
        raise typer.Exit(1)
    if output is not None:
        plan = plan_writer.reweighted(found.plan, weights_to_use(found, result))
        write_plan(output, plan, [*tables.origin(found, result)])


@app.command()
def members(
    folder: CollectionArgument,
    by_run: Annotated[
        bool, typer.Option("--runs", help="Leave out individual runs instead of whole networks.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR", help=f"Find the best set within this real-time factor, such as {TIME_FACTOR:g}."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PLAN", help="Write the plan of that set to this .yaml file."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Plot scores against costs into this SVG file.")] = None,
    sum_to_one: SumOption = False,
    non_negative: NonNegativeOption = False,
    prior: PriorOption = "auto",
    folds: FoldsOption = None,
    force: ForceOption = False,
    json: JsonOption = None,
) -> None:
    """Show for each network how much it adds to the cross-validated score and how much time it takes.

    For each network, the weights of the remaining ones are solved again without it. Real-time factors were
    measured during collection, without reading and writing files.
    """
    if budget is None and output is not None:
        raise KmdxError("--output needs a --budget: it writes the plan of the best set within the budget")
    if budget is not None and not 0 < budget <= MAX_BUDGET:
        raise KmdxError(
            f"--budget {budget:g}: expected a real-time factor above 0 and up to {MAX_BUDGET:g}, such as "
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
    with err.status("leaving out one member at a time"):
        without = {name: ensemble.without(name) for name in ensemble.members}
    out.print(ablation.table(ensemble, without))
    sets = []
    with err.status("trying sets of members") as status:
        for each in ensemble.sets() if budget is not None else ():
            sets.append(each)
            status.update(f"trying sets of members: {len(sets)} can estimate every stem")
    if svg is not None:
        possible = {name: each for name, each in without.items() if each is not None}
        write_text(svg, cost_plot.svg(ensemble.whole, possible, sets, budget))
        out.print(f"drawn: {escape(str(svg))}")
    if json is not None:
        write_json(json, ablation.as_json(ensemble, without))
    if budget is not None:
        _choose_set(ensemble, sets, budget, output)


def _choose_set(ensemble: Ensemble, sets: Sequence[Candidate], budget: float, output: Path | None) -> None:
    """Print the best set of members within a budget, and write its plan."""
    chosen = within(sets, budget)
    line = ablation.chosen(ensemble, chosen, budget)
    out.print(escape(line))
    with err.status("validating the weights of this set on held-out songs"):
        part, result = ensemble.validated(chosen)
    out.print(tables.scores(result, "of this set, prior chosen inside each fold; published: its share"))
    print_notes(result)
    if not any(each.recommended for each in result.found):
        out.print("no new weights improve held-out songs; the set keeps its published weights, rescaled")
    if output is not None:
        plan = plan_writer.reweighted(part.plan, weights_to_use(part, result))
        write_plan(output, plan, [line, ablation.CAVEAT, *tables.origin(part, result)])


@app.command("stages")
def search_stages(
    plan: PlanArgument,
    data: DataArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PLAN", help="Write the plan to this .yaml file.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="Search only this sum's weights. Repeatable.")
    ] = None,
    step: Annotated[float, typer.Option(help="Change of a weight in the first round.")] = 0.1,
    rounds: Annotated[int, typer.Option(help="Number of passes over all weights.", min=1)] = 1,
    count: Annotated[
        int | None,
        typer.Option(
            "--search", help="Number of songs to search on; default: half. The others are held out."
        ),
    ] = None,
    collected: Annotated[
        Path | None,
        typer.Option(
            metavar="COLLECTION", help="Collection of this plan; its times are used to estimate the cost."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cost and exit.")] = False,
    split: SplitOption = None,
    tracks: TracksOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.auto,
    speed: SpeedOption = SpeedName.leaderboard,
    engine: EngineOption = Engine.tuned,
    folder: FolderOption = None,
    scratch: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for temporary files; by default TMPDIR."),
    ] = None,
    anyway: AnywayOption = False,
    force: ForceOption = False,
) -> None:
    """Search for better weights of sums that later networks take as input. Only affected networks run again.

    The command shows its cost before it starts. Exit codes: 0 for success, 1 if held-out songs do not improve
    and no plan is written, 2 for a user error.
    """
    if not 0 < step <= 1:
        raise KmdxError(f"--step {step:g}: expected a number above 0 and up to 1")
    published = plan_file.load(plan)
    if output is not None:
        plan_writer.check_plan(output, published.digest, collected, force)
    tried = stage_moves.moves(published, only or ())
    songs = dataset.find_tracks(data, split, tracks)
    costs = None if collected is None else _costs(collected, published)
    _check_scratch(scratch)
    if not dry_run:
        with tempfile.TemporaryDirectory(prefix="kmdx-") as temporary:
            unusable = check_songs(songs, Path(temporary), published.stems).unusable
        songs = [song for song in songs if song.name not in unusable]
    chosen, held = stage_moves.chosen_songs(songs, count)
    capped = published.capped(speeds.get(speed.value).overlap)
    search = stage_moves.Search(capped, chosen, held, tried, step, rounds)
    out.print(stage_search.cost(search, search.cost(costs)))
    if dry_run:
        return
    separator = Running(device, precision.value, speed.value, folder, engine.value).separator(Path(plan))
    try:
        found = stage_search.tune(search, separator, lambda line: err.print(escape(line)))
    except KeyboardInterrupt:
        err.print("stopped; nothing was written")
        raise typer.Exit(130) from None
    _finish_search(search, published, found, output, anyway)


def _costs(collected: Path, plan: Plan) -> Mapping[str, float]:
    """The seconds that each network run of a plan took per second of audio while it was collected."""
    costs = collection.load(collected).costs
    if not costs.keys() >= {*plan.runs(plan.stems)}:
        raise KmdxError(f"--collected {collected} is a collection of another plan; collect this plan first")
    return costs


def _check_scratch(folder: Path | None) -> None:
    """Make temporary files in a folder, if one is given; raise KmdxError if none can be made."""
    if folder is not None:
        if not folder.is_dir():
            raise KmdxError(f"--scratch {folder}: no such folder")
        tempfile.tempdir = str(folder)
    try:
        tempfile.TemporaryFile().close()
    except OSError as error:
        place = tempfile.gettempdir()
        raise KmdxError(
            f"{place} cannot be written: {error.strerror}; name another folder with --scratch"
        ) from error


def _finish_search(
    search: stage_moves.Search, published: Plan, found: stage_search.Tuned, output: Path | None, anyway: bool
) -> None:
    """Print the result of a search, and write its plan if it is recommended."""
    tuned = replace(published, nodes=found.plan.nodes)
    out.print(stage_search.weights(published, tuned))
    out.print(stage_search.scores(found))
    if tuned.nodes == published.nodes:
        out.print("no better weights were found; no plan is written")
        raise typer.Exit(1)
    if not (found.recommended or anyway):
        why = "they do not improve held-out songs" if search.held_out else "no song was held out"
        out.print(f"the new weights are not recommended: {why}; no plan is written (--anyway overrides this)")
        raise typer.Exit(1)
    if output is not None:
        write_plan(output, tuned, [*stage_search.origin(search, published, tuned, found)])
