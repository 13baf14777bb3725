"""The evaluator's command: evaluates a submission or existing stems, and writes a run's folder and report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from evaluator import comparison_page, dataset, report, results, submission_files, visible
from evaluator import estimates as estimates_of
from evaluator import metrics as metrics_table
from evaluator.comparison import compare
from evaluator.comparison_command import show_tables
from evaluator.data_check import DataCheck, check_data
from evaluator.dataset import Track, grouped
from evaluator.estimates import Estimates
from evaluator.layouts import parts_of_accompaniment, reference_of
from evaluator.process import Limits, Submission, SubmissionError, SubmissionOptions, check_submission
from evaluator.progress import Lines, bars_of
from evaluator.protocol import (
    Evaluation,
    Setup,
    Stopped,
    Task,
    score_existing,
    separate_and_score,
)
from evaluator.records import SongRecord, columns
from evaluator.results import EvaluatedSystem
from evaluator.run_folder import RunFolder
from evaluator.scoring_process import ScoringProcess
from evaluator.systems import load_all
from kmdx import engines, plan_file, terminal, urls
from kmdx.challenge import ACCOMPANIMENT, MEMORY, TIME_FACTOR
from kmdx.errors import KmdxError, counted, shown, suggest
from kmdx.file_names import key
from kmdx.plan import Plan
from kmdx.terminal import ClusterOption, Engine, Precision, SplitOption, TracksOption, err, out
from kmdx.urls import Url

_PACKAGED = Path(__file__).resolve().with_name("submission")  # in an installed evaluator
ROOT = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parents[1]
"""The folder of this package's own submission."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
BY_NODE = "that of each node"
MIN_MEMORY = 10**6  # bytes; a smaller number is probably a missing unit

logger = logging.getLogger("evaluator")
SUBMISSION_OPTIONS = (
    "submission", "python", "ensemble", "device", "precision", "engine", "cluster", "time_limit_factor",
    "memory_limit", "enforce_limits", "strict", "keep_stems",
)  # fmt: skip
"""Options that have no effect on existing stems."""
app = terminal.app()


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command()
def evaluate(
    context: typer.Context,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Data set with songs and their stems, such as MUSDB18-HQ.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="RUN",
            help="Folder for results. Repeat the command to resume a run.",
        ),
    ],
    split: SplitOption = None,
    tracks: TracksOption = None,
    stems: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Stems to score, such as vocals or bass,drums.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Metrics to compute, such as global_sdr,si_sdr, or all."),
    ] = None,
    accept_incomplete: Annotated[
        bool, typer.Option("--accept-incomplete", help="Also score songs with missing stems.")
    ] = False,
    estimates: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Score existing stems instead of running a submission. Repeatable."),
    ] = None,
    submission: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the submission.")] = ROOT,
    python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Python interpreter that runs the submission.")
    ] = None,
    ensemble: Annotated[str | None, typer.Option(help="Ensemble; overrides user_config.py.")] = None,
    device: Annotated[str | None, typer.Option(help="Device; overrides user_config.py.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(case_sensitive=False, help="Precision; overrides user_config.py.")
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(case_sensitive=False, help="Engine; overrides user_config.py.")
    ] = None,
    cluster: ClusterOption = None,
    time_limit_factor: Annotated[
        float, typer.Option(help="Time limit of a song, as a multiple of its duration.")
    ] = TIME_FACTOR,
    memory_limit: Annotated[
        str, typer.Option(help="Memory limit, such as 16GB or 8GiB.")
    ] = f"{MEMORY // 10**9}GB",
    enforce_limits: Annotated[
        bool, typer.Option("--enforce-limits", help="Kill the submission when it exceeds a limit.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Enforce limits, and stop at the first failure that would end the challenge."
        ),
    ] = False,
    keep_stems: Annotated[
        bool, typer.Option("--keep-stems", help="Keep the stems, so that the report can play them.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print the log to the terminal.")
    ] = False,
) -> None:
    """Score a submission or existing stems on DATA with the challenge's protocol.

    The submission loads its model once, in its own process. It separates one song at a time and
    writes the stems as 16-bit wav files, which another process scores. Each song's result is saved
    immediately, even if the song failed. Exit codes: 0 if all songs were scored, 1 if some failed, 2 for
    a user error.
    """
    if not 0 < time_limit_factor < math.inf:
        raise KmdxError(f"--time-limit-factor {time_limit_factor:g}: expected a number above 0")
    if estimates:
        _reject_submission_options(context)
    options = _submission_options(ensemble, device, precision, engine)
    limits = Limits(time_limit_factor, parse_size(memory_limit), enforced=enforce_limits or strict)
    if cluster is not None:  # workers run in other folders
        data, output = data.absolute(), output.absolute()
    songs = dataset.find_tracks(data, split, tracks)
    task = Task(data, songs, choose_stems(songs, stems), metrics_table.choose(metrics), accept_incomplete)
    try:
        if estimates:
            failed = _score_folders(task, estimates, output, verbose)
        else:
            options = replace(options, python=python)
            setup = Setup(submission.resolve(), limits, options, strict, keep_stems)
            failed = _run_submission(task, setup, output, cluster, verbose)
    except KeyboardInterrupt:
        err.print("stopped; repeat the command to resume the run")
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


def _reject_submission_options(context: typer.Context) -> None:
    """Raise KmdxError if an option was given that has no effect on existing stems."""
    for name in SUBMISSION_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise KmdxError(f"{option} has no effect with --estimates; use only one of them")


def _submission_options(
    ensemble: str | None, device: str | None, precision: Precision | None, engine: Engine | None
) -> SubmissionOptions:
    """The options that replace a submission's settings."""
    if ensemble is not None and Path(ensemble).is_file():
        ensemble = str(Path(ensemble).resolve())  # the submission runs in another folder
    return SubmissionOptions(ensemble, device, precision and precision.value, engine and engine.value)


@dataclass(frozen=True)
class _OpenRun:
    """A run whose folder is locked, and whose data are checked."""

    task: Task
    folder: RunFolder
    checked: DataCheck
    description: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

    def started(self, description: Mapping[str, Any], plan: Plan | None = None) -> _OpenRun:
        """Record the run's settings, or check that they have not changed."""
        began = self.folder.start(results.identity(description, self.checked.fingerprints))
        return replace(self, description={**description, "started": began}, plan=plan)


def _run_submission(task: Task, setup: Setup, output: Path, cluster: str | None, verbose: bool) -> bool:
    """Run a submission on the songs; return whether any failed."""
    submission, options = setup.submission, setup.options
    check_submission(submission)
    if options.python is not None:
        options = replace(options, python=visible.find_python(options.python))
    plan = _plan(submission, options.ensemble)
    if plan is not None:
        _check_stems(plan, task)
    hidden = _hidden_paths(task.data, output, task.songs)
    options = replace(options, readable=_weights_by_path(plan), hidden=hidden, stems=task.stems)
    _check_visible(submission, options)
    setup = replace(setup, options=options)
    with _open_run(task, output, verbose) as opened:
        system = _describe_submission(setup, plan, (output, task.data))
        if cluster is not None:
            system = replace(system, device=options.device or BY_NODE, precision=options.precision or BY_NODE)
        description = results.describe_run(system, task, opened.checked.warnings)
        if cluster is not None:
            description["cpu"] = BY_NODE
        if options.python is not None:
            description["interpreter_path"] = str(options.python)
        opened = opened.started(description, plan)
        if cluster is None:
            content, ended = _evaluate_here(opened, setup)
        else:
            content, ended = _evaluate_on(cluster, opened, setup)
        page = _report(content, opened.folder.path, task.songs)
    if isinstance(ended, SubmissionError):
        out.print(f"report: {escape(str(page))}")
        raise ended
    _print(content, page)
    if ended is not None:
        err.print(f"[bold red]strict:[/bold red] {escape(str(ended))}")
    return bool(content["summary"]["failed"]) or ended is not None


def _evaluate_here(opened: _OpenRun, setup: Setup) -> tuple[dict[str, Any], KmdxError | None]:
    """Run a submission on this machine; return what :func:`_finish` does."""
    task, folder = opened.task, opened.folder
    process: list[Submission] = []

    def start(dataset: Path, shared: Path) -> Submission:
        process.append(setup.start(dataset, shared, folder.path / "submission.log"))
        return process[0]

    def describe(failure: str | None) -> dict[str, Any]:
        return process[0].describe(failure) if process else {}

    with ScoringProcess() as scorer, bars_of(task) as bars:
        run = Evaluation(task, folder, scorer, bars, opened.checked.unusable)
        records = separate_and_score(run, start, strict=setup.strict, keep_stems=setup.keep_stems)
        return _finish(opened, records, describe)


def _evaluate_on(cluster: str, opened: _OpenRun, setup: Setup) -> tuple[dict[str, Any], KmdxError | None]:
    """Run a submission on a cluster; return what :func:`_finish` does."""
    from evaluator import cluster_run
    from kmdx.cluster import ClusterOptions

    process: dict[str, Any] = {"interpreter": None, "isolation": [], "log_tail": []}

    def describe(failure: str | None) -> dict[str, Any]:
        return {**process, "failure": failure}

    gpus = 0.0 if setup.options.device == "cpu" else None
    records = cluster_run.evaluate(
        opened.task,
        opened.folder,
        opened.checked.unusable,
        setup,
        opened.plan,
        ClusterOptions(cluster, gpus=gpus),
        Lines(opened.task),
        process.update,
    )
    return _finish(opened, records, describe)


def _finish(
    opened: _OpenRun,
    songs: Iterator[SongRecord],
    describe: Callable[[str | None], Mapping[str, Any]] = lambda failure: {},
) -> tuple[dict[str, Any], KmdxError | None]:
    """Run the songs and write the results; return them and the error that ended the run early, if any.

    ``describe`` returns what is known of the submission's process, given why it could not be started.
    """
    records: list[SongRecord] = []
    ended: KmdxError | None = None
    run, folder = dict(opened.description), opened.folder.path
    try:
        records.extend(songs)
    except (Stopped, SubmissionError) as error:
        logger.error("%s", error)
        ended = error
    finally:
        # records.extend() keeps the records before an exception
        run |= describe(str(ended) if isinstance(ended, SubmissionError) else None)
        if "interpreter" in run and run["interpreter"] is None:  # no song was left to run
            run["interpreter"] = results.interpreter_of(folder)
        order = {track.name: number for number, track in enumerate(opened.task.songs)}
        records.sort(key=lambda record: order[record.song])
        content = results.summarize(run, opened.plan, records)
        results.write(content, folder)
    return content, ended


def _score_folders(task: Task, folders: Sequence[Path], output: Path, verbose: bool) -> bool:
    """Score folders of existing stems; several make a leaderboard. Return whether any song failed."""
    names = _distinct_names(folders)
    contents = []
    for folder, name in names.items():
        found = estimates_of.find(folder, task.songs, task.stems)
        own = output / name if len(names) > 1 else output
        contents.append(_score_folder(task, found, name, own, verbose))
    if len(names) > 1:
        board = compare(load_all([str(output / name) for name in names.values()]))
        show_tables(board)
        out.print(f"comparison: {escape(str(comparison_page.write(board, output / 'compare.html')))}")
    return any(content["summary"]["failed"] for content in contents)


def _score_folder(task: Task, stems: Estimates, name: str, output: Path, verbose: bool) -> dict[str, Any]:
    """Score one folder of existing stems; write and print the results."""
    with _open_run(task, output, verbose) as opened:
        lossy = stems.lossy > 0
        system = EvaluatedSystem(name, f"Stems in {stems.folder}", stems.digest(), lossy_estimates=lossy)
        problems = grouped(problem for problem in stems.problems() if not problem.fatal)
        description = results.describe_run(system, task, [*opened.checked.warnings, *problems])
        description["estimates"] = str(stems.folder)
        opened = opened.started(description)
        with ScoringProcess() as scorer, bars_of(task) as bars:
            run = Evaluation(task, opened.folder, scorer, bars, opened.checked.unusable)
            content, _ = _finish(opened, score_existing(run, stems))
        page = _report(content, opened.folder.path, task.songs)
    _print(content, page)
    return content


@contextmanager
def _open_run(task: Task, output: Path, verbose: bool) -> Iterator[_OpenRun]:
    """Lock a run's folder and check the data.

    Raises
    ------
    KmdxError
        If no song can be scored.
    """
    folder = RunFolder(output)
    with folder.locked():
        _log_to(folder.path / "evaluation.log", verbose)
        count = counted(len(task.songs), "song")
        with err.status(f"checking the audio of {count} (only once per run)"):
            checked = check_data(task.songs, folder.path, task.accept_incomplete)
        for warning in [*checked.warnings, *(f"{song}: {why}" for song, why in checked.unusable.items())]:
            logger.warning("%s", warning)
        if len(checked.unusable) == len(task.songs):
            song, why = next(iter(checked.unusable.items()))
            raise KmdxError(f"none of {count} can be scored; {song}: {why}")
        yield _OpenRun(task, folder, checked)


def _describe_submission(setup: Setup, plan: Plan | None, without: Sequence[Path]) -> EvaluatedSystem:
    """Describe a submission; ``without`` lists folders in it that are not part of it."""
    submission, options = setup.submission, setup.options
    if plan is None:
        name, title = submission.name, f"the submission in {submission}"
        digest, weights = results.describe_foreign(submission, without)
    else:
        name, title = plan.name, plan.title
        digest, weights = results.code_digest(submission), results.describe_weights(plan)
    device, precision, engine = _computation(plan, options)
    return EvaluatedSystem(
        name,
        title,
        digest,
        submission,
        plan,
        options.ensemble,
        weights,
        device,
        precision,
        engine,
        setup.limits,
    )


def _distinct_names(folders: Sequence[Path]) -> dict[Path, str]:
    """A name for each folder: its own, preceded by enough parent folders to make all names different."""
    whole = {folder: folder.resolve() for folder in folders}
    if len({*whole.values()}) < len(folders):
        raise KmdxError("--estimates names the same folder twice; name each folder once")
    depth, longest = 1, max(len(path.parts) for path in whole.values())
    while True:
        names = {folder: " - ".join(path.parts[1:][-depth:]) for folder, path in whole.items()}
        if len({*names.values()}) == len(names) or depth >= longest:
            return names
        depth += 1


def _hidden_paths(data: Path, folder: Path, songs: Sequence[Track]) -> list[Path]:
    """Files that a submission must not see: the data set, including linked files, and the run's folder."""
    files = {path.resolve() for track in songs for path in track.paths}
    return [data, folder, *{path.parent for path in files}, *files]


def _check_visible(submission: Path, options: SubmissionOptions) -> None:
    """Raise KmdxError if something that a submission needs is in a folder that it must not see."""
    plan = [Path(options.ensemble)] if options.ensemble and Path(options.ensemble).is_file() else []
    python = [options.python] if options.python is not None else []
    for path in (submission, *python, *plan, *options.readable):
        for folder in options.hidden:
            if any(hop.absolute().is_relative_to(folder.resolve()) for hop in visible.links(path)):
                raise KmdxError(
                    f"{path} is in {folder}, which a submission must not see: move it to another folder"
                )


def _weights_by_path(plan: Plan | None) -> list[Path]:
    """Weight files that a plan names by path."""
    weights = [use.weight.path for use in plan.networks.values()] if plan else []
    return [Path(path) for path in weights if path is not None]


def choose_stems(songs: Sequence[Track], text: str | None) -> tuple[str, ...]:
    """The stems to score, in the songs' order: those in ``text``, or all.

    Raises
    ------
    KmdxError
        If no song has one of the requested stems.
    """
    if text is None:
        return tuple(dict.fromkeys(stem for track in songs for stem in track.summands))
    known = {key(stem): stem for track in songs for stem in track.available}
    available = ", ".join(known.values())
    chosen = set()
    for name in filter(None, map(str.strip, text.split(","))):
        stem = known.get(key(name)) or known.get(key(reference_of(name)))
        if stem is None:
            hint = suggest(name, known.values())
            raise KmdxError(f"--stems {shown(name)}: no song has this stem{hint}; available: {available}")
        chosen.add(stem)
    if not chosen:
        raise KmdxError(f"--stems is empty; available: {available}")
    return tuple(stem for stem in known.values() if stem in chosen)


def parse_size(text: str) -> int:
    """Convert a size such as ``16GB`` or ``8 GiB`` to bytes.

    Raises
    ------
    KmdxError
        If the text is not a size.
    """
    number = text.strip().upper()
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if number.endswith(unit)), "")
    try:
        size = float(number.removesuffix(unit)) * UNITS.get(unit, 1)
    except ValueError:
        size = 0
    if not MIN_MEMORY <= size < 2**63:
        raise KmdxError(f"--memory-limit {text}: expected a size such as 16GB or 8GiB")
    return int(size)


def _plan(submission: Path, ensemble: str | None) -> Plan | None:
    """The plan of this package's own submission; None for any other submission."""
    if submission != ROOT:
        return None
    if ensemble is None:
        ensemble = submission_files.ensemble(ROOT)
    if ensemble is None:
        raise KmdxError("my_submission/user_config.py: expected a string as ENSEMBLE, or use --ensemble")
    if isinstance(url := urls.parse(ensemble), Url):
        raise KmdxError(f"{url}: a submission cannot reach the network; download the plan and its weights")
    return plan_file.load(ensemble)


def _check_stems(plan: Plan, task: Task) -> None:
    """Raise KmdxError if a plan does not separate a stem that would be scored."""
    own = {reference_of(stem, plan.stems) for stem in plan.stems}
    given = own | ({ACCOMPANIMENT} if parts_of_accompaniment(plan.stems) else set())
    lacking = [stem for stem in task.stems if stem not in given]
    if lacking:
        scored = dict.fromkeys([*task.stems, *(own & {ACCOMPANIMENT})])
        common = ",".join(stem for stem in scored if stem in given)
        advice = f"; use --stems {common}" if common else ""
        why = " (its other is the accompaniment)" if "other" in {*plan.stems} & {*lacking} else ""
        raise KmdxError(f"{shown(plan.name)} does not separate {', '.join(lacking)}{why}{advice}")


def _computation(plan: Plan | None, options: SubmissionOptions) -> tuple[str, str, str]:
    """Device, precision and engine in words; ``auto`` is resolved for this package's own submission."""
    if plan is None:
        own = "as the submission chooses"
        return options.device or own, options.precision or own, options.engine or own
    from kmdx import devices, precisions

    device, precision, engine = (
        getattr(options, name) or submission_files.setting(ROOT, name.upper()) or default
        for name, default in (("device", "auto"), ("precision", "auto"), ("engine", engines.DEFAULT))
    )
    chosen = devices.choose(device)
    gpu = devices.gpu_properties(chosen)
    name = f"{chosen} ({gpu.name})" if gpu else str(chosen)
    return name, precisions.in_words(precision, chosen), engine


def _log_to(path: Path, verbose: bool) -> None:
    """Log to a file, and with ``verbose`` also to the terminal."""
    logger.setLevel(logging.INFO)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    if verbose:
        logger.addHandler(RichHandler(console=err, show_path=False))


def _report(content: dict[str, Any], folder: Path, songs: Sequence[Track]) -> Path:
    """Write the report. It plays references from the data set if they are separate files."""
    references = {
        track.name: {stem: track.files[stem] for stem in track.stems if track.is_one_file(stem)}
        for track in songs
        if not track.lossy
    }
    predictions = folder / "predictions"
    return report.write(content, folder, predictions if predictions.is_dir() else None, references)


def _print(content: dict[str, Any], page: Path) -> None:
    """Print the results to the terminal."""
    run, summary = content["run"], content["summary"]
    scored = f"{summary['scored']} of {counted(summary['songs'], 'song')} scored"
    device = "a cluster" if run["device"] == BY_NODE else run["device"]
    on = "" if run["submission"] is None else f" on {device}"
    out.print(f"[bold]{escape(run['ensemble'])}[/bold]{escape(on)}, {scored}")
    shown_columns = columns(run["stems"])
    table = Table("", *shown_columns, box=None, pad_edge=False, header_style="bold")
    for metric in metrics_table.named(run["metrics"]):
        for how, values in summary["scores"][metric.name].items():
            table.add_row(
                f"{metric.label}, {results.statistic_title(metric, how)}",
                *(metrics_table.show(metric, values[key]) for key in shown_columns),
            )
    out.print(table)
    factor, memory = summary["real_time_factor"], summary["peak_memory"]
    if summary["scored"] and factor["mean"] is not None:
        out.print(
            f"real-time factor: mean {factor['mean']:.2f}, worst {factor['max']:.2f} "
            f"(limit {run['time_limit_factor']:g}); peak host memory {memory / 1e9:.2f} GB "
            f"(limit {run['memory_limit'] / 1e9:g} GB)"
        )
    for record in content["songs"]:
        if record["status"] != "ok":
            out.print(escape(terminal.one_line(f"failed: {record['song']}: {record['reason']}")))
    for warning in content["warnings"]:
        terminal.warn(warning)
    out.print(f"report: {escape(str(page))}")
