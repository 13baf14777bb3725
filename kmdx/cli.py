"""The ``kmdx`` command: separate songs, download weights, show ensembles."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from kmdx import familiar, terminal
from kmdx.challenge import ACCOMPANIMENT, TIME_FACTOR
from kmdx.errors import KmdxError, counted, listed, quoted
from kmdx.song_log import song_log
from kmdx.terminal import (
    ClusterOption,
    DeviceOption,
    Engine,
    EngineOption,
    EnsembleOption,
    FormatName,
    FormatOption,
    OutputOption,
    OverwriteOption,
    Precision,
    PrecisionOption,
    SpeedName,
    SpeedOption,
    err,
    out,
)

if TYPE_CHECKING:
    from rich.table import Table

    from kmdx.msst import Imported
    from kmdx.plan import Plan
    from kmdx.weights import FoundWeight, Weight, WeightStatus

FOOTNOTE = "*: on songs that may be part of its training data."

app = terminal.app(
    "Music source separation with the ensemble of MDX23's leaderboard C.\n\n"
    "`kmdx SONG` means `kmdx separate SONG`.",
    no_args_is_help=True,
    completion=True,
)
models_app = terminal.app(
    "List, download and check weight files. The models folder is the first of: $KMDX_MODELS; models/ of the "
    "checkout that contains the current folder, or kmdx itself; the user's cache.",
    no_args_is_help=True,
)
ensembles_app = terminal.app("List and show ensembles.")
app.add_typer(models_app, name="models")
app.add_typer(ensembles_app, name="ensembles")


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app, quiet=True, arguments=_arguments)


def _arguments() -> list[str]:
    """The arguments of the command line, in own options even if it has those of other programs."""
    names = [
        *(command.name for command in app.registered_commands),
        *(group.name for group in app.registered_groups),
    ]
    line = familiar.translate(sys.argv[1:], [name for name in names if name])
    for note in line.notes:
        err.print(escape(f"note: {note}"))
    return line.arguments


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Handle options that do not belong to a subcommand."""
    if show:
        from kmdx import __version__

        out.print(f"kmdx-net {__version__}")
        raise typer.Exit


@app.command("separate")
def separate(
    context: typer.Context,
    songs: Annotated[
        list[str], typer.Argument(metavar="SONG…", help="Files, folders, glob patterns or URLs.")
    ],
    output: OutputOption = "separated",
    ensemble: EnsembleOption = "leaderboard_c",
    stems: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated stems, such as vocals,drums; no_drums is the mixture minus the drums. "
            "Default: all.",
            autocompletion=terminal.complete_stems,
        ),
    ] = None,
    accompaniment: Annotated[
        bool, typer.Option("--accompaniment", help="Also write the mixture minus the vocals.")
    ] = False,
    device: DeviceOption = "auto",
    speed: SpeedOption = SpeedName.leaderboard,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="Measure this machine and choose the slowest --speed that takes at most this many times a "
            "song's duration. Finished stems of the songs keep their speed.",
        ),
    ] = None,
    precision: PrecisionOption = Precision.auto,
    engine: EngineOption = Engine.tuned,
    shifts: Annotated[
        int,
        typer.Option(help="Average over this many rotations of the song; multiplies the time."),
    ] = 1,
    tta: Annotated[
        bool,
        typer.Option("--tta", help="Average with swapped channels and inverted polarity; triples the time."),
    ] = False,
    format: FormatOption = FormatName.wav16,
    output_template: Annotated[
        str,
        typer.Option(
            help="Paths of the stems in OUTPUT. {track} is the song's path, {trackext} its extension."
        ),
    ] = familiar.TEMPLATE,
    start: Annotated[
        str, typer.Option(metavar="TIME", help="Where separation starts: seconds, m:ss or h:mm:ss.")
    ] = "0",
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", help="Separate only this much: seconds, m:ss or h:mm:ss.")
    ] = None,
    downmix: Annotated[
        bool, typer.Option("--downmix", help="Mix songs of more than two channels down to stereo.")
    ] = False,
    overwrite: OverwriteOption = False,
    page: Annotated[
        bool, typer.Option("--page", help="Also write a page for each song, to listen to its stems.")
    ] = False,
    cluster: ClusterOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of workers; without --cluster, on this machine.")
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs per worker, such as 0.5; default: 1 if there are any."),
    ] = None,
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores per worker; by default, the workers of a node share its cores."),
    ] = None,
    log_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a line of JSON for each song to this file.")
    ] = None,
) -> None:
    """Separate songs into stems with the rate, channels and length of each song.

    The stems of a file are written to OUTPUT/<name>; a folder is mirrored in OUTPUT. A song whose stems are
    all finished is skipped; missing stems and other formats are added. If a song has stems made with
    different settings, it is an error and nothing is replaced, unless --overwrite is given. Exit code: 0 if
    all songs are separated, 1 if some failed, 2 if all failed.
    """
    from kmdx import audio, inputs, mirror, plan_file
    from kmdx import output_template as templates

    if budget is not None:
        _check_budget(context, budget, is_here=cluster is None and workers is None)
    begin = terminal.seconds(start, "--start")
    length = None if duration is None else terminal.seconds(duration, "--duration")
    audio.check_part(begin, length)
    loaded = plan_file.load(ensemble).augmented(shifts, tta)
    _refuse_stems_as_songs(loaded, songs, stems)
    wanted = _stems(loaded, stems, accompaniment)
    template = templates.parse(output_template)
    folder, uploads = mirror.opened(output)
    if template and uploads:
        raise KmdxError("--output-template needs an output folder on this machine")
    records = templates.records_folder(folder) if template else None
    found = inputs.collect(songs, folder, uploads.url if uploads else None, records)
    for complaint in found.problems:
        terminal.complain(complaint)
    if found.skipped:
        names = listed([path.name for path in found.skipped], most=3)
        err.print(escape(f"{counted(len(found.skipped), 'file')} skipped that cannot be songs: {names}"))
    from kmdx import batch  # only now, because torch takes a second

    options = batch.SeparateOptions(
        ensemble=ensemble,
        device=device,
        speed=speed.value,
        precision=precision.value,
        engine=engine.value,
        start=begin,
        duration=length,
        downmix=downmix,
        format=format.value,
        overwrite=overwrite,
        page=page,
    )
    job = batch.Job(records or folder, loaded, wanted, options, uploads, template)
    if budget is not None:
        from kmdx import budget as budgets

        job.check_places(found.songs)  # before networks are measured
        job = budgets.with_speed(job, found.songs, budget)
    with song_log(log_json) as log:
        if cluster is None and workers is None:
            failed = batch.separate(found.songs, job, log)
        else:
            from kmdx import cluster_console
            from kmdx.cluster import ClusterOptions

            settings = ClusterOptions(cluster, workers, gpus_per_worker, cpus_per_worker)
            failed = cluster_console.separate(found.songs, job, settings, log) if found.songs else 0
    if page:
        _show_page(folder, [song.folder(folder) for song in found.songs])
    failed += len(found.problems)
    if failed:
        raise typer.Exit(2 if failed == len(found.songs) + len(found.problems) else 1)


@app.command("page")
def pages(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER…", help="Folders of stems, or folders of such folders.")
    ],
) -> None:
    """Write a page for each song whose stems exist, to listen to them in a browser.

    The page is FOLDER/listen.html. A folder of several songs also gets an index.html. Pages that are up to
    date are kept. Exit code: 0 if all pages are written, 1 if some are not, 2 if none is.
    """
    from kmdx import listening

    made: list[Path] = []
    failed: list[str] = []

    def on_page(path: Path) -> None:
        made.append(path)
        terminal.say(str(path))

    def on_error(message: str) -> None:
        failed.append(message)
        terminal.complain(message)

    for folder in folders:
        listening.make_all(folder, on_page, on_error)
    if failed:
        raise typer.Exit(1 if made else 2)


@app.command("benchmark")
def benchmark(
    ensemble: EnsembleOption = "leaderboard_c",
    device: DeviceOption = "auto",
    speed: SpeedOption = SpeedName.leaderboard,
    precision: PrecisionOption = Precision.auto,
    engine: EngineOption = Engine.tuned,
    seconds: Annotated[float, typer.Option(help="Length of the synthetic song.")] = 12.0,
    network: Annotated[
        list[str] | None, typer.Option(help="Measure only this network; can be repeated.")
    ] = None,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Use random weights, which take the same time.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Also write the results as JSON to this file, or into this folder.")
    ] = None,
) -> None:
    """Measure an ensemble's speed on this machine: each network, and a whole synthetic song."""
    from kmdx import files, weights
    from kmdx.benchmark import Settings, as_json, check_place, measure, tables

    check_place(json)
    try:
        report = measure(
            ensemble,
            Settings(device, precision.value, speed.value, engine.value),
            seconds=seconds,
            networks=network or (),
            with_stand_in=stand_in,
            on_step=lambda message: err.print(escape(f"{message} …")),
        )
    except weights.MissingWeights as error:
        raise KmdxError(f"{error}; --stand-in measures with random weights instead") from error
    for part in tables(report):
        out.print(part)
    if json is not None:
        file = json / report.file_name if json.is_dir() else json
        try:
            files.write_text(file, as_json(report))
        except OSError as error:
            raise KmdxError(f"{file} cannot be written: {error.strerror}") from error
        out.print(f"written: {escape(str(file))}")


@app.command("serve")
def serve(
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; other machines can only reach another one, and need a token."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8000,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of uploads and stems; default: in the user's folder for data.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="KMDX_TOKEN",
            help="Secret that users need; default: none on this machine alone, else a new one.",
        ),
    ] = None,
    max_size: Annotated[float, typer.Option(metavar="MB", min=0.001, help="Largest upload.")] = 500,
    max_length: Annotated[
        str, typer.Option(metavar="TIME", help="Longest song: seconds, m:ss or h:mm:ss.")
    ] = "20:00",
    max_queue: Annotated[int, typer.Option(min=1, help="Most songs that wait.")] = 50,
    keep: Annotated[
        float, typer.Option(metavar="HOURS", min=0.001, help="Results are deleted after this time.")
    ] = 24,
    device: DeviceOption = "auto",
    speed: SpeedOption = SpeedName.leaderboard,
    precision: PrecisionOption = Precision.auto,
    engine: EngineOption = Engine.tuned,
    cluster: ClusterOption = None,
) -> None:
    """Serve a page and an HTTP interface to separate songs in a browser, until Ctrl-C.

    Songs wait in a queue, which survives a restart. On this machine alone no token is needed.
    """
    from kmdx import audio
    from kmdx.web import server
    from kmdx.web.jobs import Limits
    from kmdx.web.worker import Machine

    length = terminal.seconds(max_length, "--max-length")
    audio.check_part(0.0, length)
    options = None
    if cluster is not None:
        from kmdx.cluster import ClusterOptions

        options = ClusterOptions(cluster)
    limits = Limits(round(max_size * 1e6), length, max_queue, keep * 3600)
    machine = Machine(device, speed.value, precision.value, engine.value, options)
    server.serve(server.Options(host, port, folder, token, limits, machine))


@app.command("doctor")
def doctor() -> None:
    """Show versions, devices, folders and weights, and what will run where; for a bug report, too.

    Exit code: 0, or 2 if something is broken; the last lines then explain what to do.
    """
    from kmdx.doctor import Report

    report = Report()
    out.print(report.text, markup=False)
    if report.broken:
        raise typer.Exit(2)


@models_app.command("list")
def models_list() -> None:
    """List all weights: size, whether the file is on this machine, license, and description."""
    from kmdx import weights

    table = _table("name", "size", "here", "license", "description")
    try:
        listed = weights.known()
    except KmdxError as error:  # in the file of the weights that were trained here
        terminal.warn(str(error))
        listed = {**weights.published(), **weights.shipped()}
    found = weights.find_all(listed.values())
    for weight in listed.values():
        signature = f" ({weight.signature})" if weight.signature else ""
        table.add_row(*_row(weight, found[weight.name]), escape(weight.title + signature))
    out.print(table)
    out.print()
    table = _table("community checkpoint", "size", "here", "license", "stems and published score")
    checkpoints = weights.checkpoints().values()
    found = weights.find_all(each.weight() for each in checkpoints)
    for each in checkpoints:
        facts = f"cannot be run: {each.unsupported}" if each.unsupported else each.marked_score
        about = "; ".join(filter(None, (", ".join(each.stems), facts)))
        table.add_row(*_row(each.weight(), found[each.name]), escape(about))
    out.print(table)
    out.print(FOOTNOTE)
    out.print(
        "A name in parentheses can replace the name. `kmdx models pull` also imports community checkpoints."
    )
    out.print(escape(f"folder: {weights.described()}"))


@models_app.command("pull")
def models_pull(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME…", help="Weights, community checkpoints or ensembles."),
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML file of a community checkpoint, instead of the published one.")
    ] = None,
) -> None:
    """Download weights from their publishers, check them and store them in the models folder.

    A community checkpoint is also imported as an ensemble. Exit code: 2 if any download failed.
    """
    from kmdx import catalog, weights

    community = [name for name in dict.fromkeys(names) if name in weights.checkpoints()]
    chosen = catalog.weights_of([name for name in names if name not in community])
    if config and (len(community) != 1 or chosen):
        raise KmdxError("--config belongs to one community checkpoint: name it, and nothing else")
    failed = [name for name in community if not _pull_checkpoint(name, config)]
    for weight, path in weights.pull_all(chosen):
        out.print(escape(f"{weight.name}: {path} (license: {weight.licence})"))
    if failed:
        raise typer.Exit(2)


@models_app.command("add")
def models_add(
    name: Annotated[str, typer.Argument(help="Name of the new ensemble.")],
    checkpoint: Annotated[
        Path, typer.Option(help="File with the weights: .ckpt, .pt, .th, .bin or .safetensors.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="The checkpoint's YAML file from Music-Source-Separation-Training.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Link to the checkpoint instead of copying it.")
    ] = False,
) -> None:
    """Import a community checkpoint: BS-RoFormer, Mel-Band RoFormer, MDX23C or SCNet.

    Writes an ensemble that separates like Music-Source-Separation-Training, for `kmdx separate -e NAME`.
    """
    from kmdx import msst

    _report(msst.add(name, checkpoint, config, link=link))


@models_app.command("verify")
def models_verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…]", help="Weights, community checkpoints or ensembles; default: all weights."
        ),
    ] = None,
) -> None:
    """Show the file of each weight, whether its checksum is known, and whether it is intact.

    Exit code: 2 if any weight is missing, damaged or belongs to another network.
    """
    from kmdx import catalog, weights

    statuses = weights.verify(weights=catalog.weights_of(names) if names else weights.known().values())
    for status in statuses:
        message = status.message.removeprefix(f"{status.weight.name} is ")
        what = f"{status.path.name}: {message}" if status.path else message
        out.print(escape(f"{status.weight.name:20} {what}"))
    if problem := _describe_problems(statuses):
        raise KmdxError(problem)
    err.print(f"all {len(statuses)} weights are present and intact")


@models_app.command("where")
def models_where() -> None:
    """Print the models folder, and why it is that one."""
    from kmdx import weights

    folder = weights.where()
    out.print(escape(str(folder.path)))
    err.print(escape(folder.reason))


@ensembles_app.callback(invoke_without_command=True)
def ensembles_list(context: typer.Context) -> None:
    """List the ensembles that come with the package, and those in the models folder."""
    if context.invoked_subcommand is None:
        list_ensembles()


@ensembles_app.command("list")
def list_ensembles() -> None:
    """List the ensembles that come with the package, and those in the models folder."""
    from kmdx import catalog, drawing

    table = _table("name", "download", "GFLOP", "license", "published score", "description")
    for each in catalog.summaries():
        table.add_row(
            escape(each.name),
            "none" if each.is_here else terminal.megabytes(each.download),
            drawing.gflops(each.gflops),
            escape(each.license),
            escape(each.score or "not yet measured"),
            escape(each.title),
        )
    out.print(table)
    out.print(
        "download: size of the weights that are not on this machine. GFLOP: arithmetic per second of audio."
    )
    out.print(FOOTNOTE)
    out.print("To use your own plan, give its path.")


@ensembles_app.command("show")
def ensembles_show(
    name: Annotated[str, typer.Argument(help="Name of an ensemble, or path of a plan (.yaml).")],
    stems: Annotated[
        str | None,
        typer.Option(help="Show only what these stems need.", autocompletion=terminal.complete_stems),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw the graph into this SVG file.")] = None,
) -> None:
    """Show an ensemble: its stages, weights, licenses, arithmetic per second of audio, and graph."""
    from kmdx import drawing, files, plan_file

    loaded = plan_file.load(name)
    wanted = _stems(loaded, stems, False)
    out.print(f"[bold]{escape(loaded.name)}[/bold]: {escape(loaded.title)}")
    out.print(escape(loaded.description))
    out.print()

    for row in drawing.stages(loaded, wanted):
        out.print(escape(row))
    used = loaded.networks_used(wanted)
    cost = loaded.gflops(wanted)
    gflops = drawing.gflops(cost) + (" GFLOP" if cost is not None else "")
    out.print(f"{counted(len(used), 'network')}; arithmetic per second of audio: {gflops}")
    out.print()
    out.print(drawing.mermaid(loaded, wanted), end="", markup=False)
    if svg is not None:
        try:
            files.write_text(svg, drawing.svg(loaded, wanted))
        except OSError as error:
            raise KmdxError(f"{svg} cannot be written: {error.strerror}") from error
        out.print(f"drawn: {escape(str(svg))}")


def _check_budget(context: typer.Context, budget: float, is_here: bool) -> None:
    """Raise KmdxError if ``--budget`` is impossible, or given with an option that it excludes."""
    if not 0 < budget < math.inf:
        raise KmdxError(
            f"--budget {budget:g}: expected seconds of work per second of song, such as {TIME_FACTOR:g}"
        )
    source = context.get_parameter_source("speed")
    if source is not None and source.name == "COMMANDLINE":
        raise KmdxError("--budget chooses the speed; leave out --speed or --budget")
    if not is_here:
        raise KmdxError(
            "--budget measures one process on this machine; with --cluster or --workers, choose a --speed"
        )


def _show_page(output: Path, folders: list[Path]) -> None:
    """Write the index of the songs' pages, if there are several; print the path of the page to open."""
    from kmdx import listening

    pages = [page for folder in folders if (page := folder / listening.PAGE).is_file()]
    try:
        index = listening.write_index(output)
    except KmdxError as error:
        terminal.warn(str(error))
        index = None
    if index or len(pages) == 1:
        err.print(escape(f"to listen, open {index if len(pages) != 1 else pages[0]}"))


def _stems(loaded: Plan, stems: str | None, accompaniment: bool) -> tuple[str, ...]:
    """The stems that the options request, checked against the plan."""
    names = loaded.stems if stems is None else _split(stems)
    if familiar.KARAOKE in names and familiar.KARAOKE not in loaded.stems:
        raise KmdxError(familiar.NO_KARAOKE)
    return loaded.check_stems([*names, *([ACCOMPANIMENT] if accompaniment else [])])


def _split(stems: str) -> list[str]:
    """The names in a comma-separated list."""
    return [stem.strip() for stem in stems.split(",") if stem.strip()]


def _refuse_stems_as_songs(loaded: Plan, songs: list[str], stems: str | None) -> None:
    """Raise KmdxError if a stem was given as a song, as in ``--stems vocals drums``."""
    meant: list[str] = []
    for words in map(_split, songs):
        are_stems = all(word in loaded.stems or loaded.subtracted(word) is not None for word in words)
        meant += words if are_stems and not Path(",".join(words)).exists() else []
    if meant:
        together = ",".join([*_split(stems or ""), *meant])
        raise KmdxError(
            f"{quoted(meant[0])} is a stem, not a song; separate stems by commas without spaces: "
            f"--stems {together}"
        )


def _table(*columns: str) -> Table:
    """A table whose first columns are never cut; the text in the others wraps."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in ("size", "download", "GFLOP") else "left"
        wraps = column in ("license", "published score", "description", "stems and published score")
        table.add_column(column, justify=justify, no_wrap=not wraps, overflow="fold")
    return table


def _row(weight: Weight, found: FoundWeight | None) -> tuple[str, str, str, str]:
    """A weight's name, size, whether its file is here, and license."""
    size = weight.bytes or (found.path.stat().st_size if found else None)
    return weight.name, terminal.megabytes(size), "yes" if found else "no", escape(weight.licence)


def _pull_checkpoint(name: str, config: Path | None) -> bool:
    """Pull a community checkpoint and import it, unless it was imported before; False after an error."""
    from kmdx import catalog

    try:
        made = catalog.pull_checkpoint(name, config)
    except KmdxError as error:
        terminal.complain(str(error))
        return False
    if made is None:
        err.print(f"{name}: already imported")
    else:
        _report(made)
    return True


def _report(made: Imported) -> None:
    """Print what was found in an imported checkpoint."""
    for line in made.found:
        out.print(escape(line))
    if made.assumed:
        terminal.warn(f"assumed, because the checkpoint does not state it: {'; '.join(made.assumed)}")
    out.print(escape(f"written: {made.plan}"))


def _describe_problems(statuses: list[WeightStatus]) -> str | None:
    """One line: the weights that are missing or unusable, and how to get them; None if all are intact."""
    missing = [status.weight for status in statuses if status.path is None]
    unusable = [status.weight for status in statuses if status.path is not None and not status.ok]
    counts = [
        f"{len(found)} {what} ({', '.join(weight.name for weight in found)})"
        for found, what in ((missing, "missing"), (unusable, "damaged or for another network"))
        if found
    ]
    if not counts:
        return None
    text = ("" if len(statuses) == 1 else f"of {len(statuses)} weights, ") + " and ".join(counts)
    if pullable := [weight for weight in missing if weight.sources]:
        names, size = (
            " ".join(weight.name for weight in pullable),
            sum(weight.bytes or 0 for weight in pullable),
        )
        text += f"; `kmdx models pull {names}` downloads the missing ones (about {terminal.megabytes(size)})"
    return text


if __name__ == "__main__":
    main()
