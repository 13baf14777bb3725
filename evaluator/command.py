"""The evaluator's command: evaluates a submission or existing stems, and writes a run's folder and report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from evaluator import comparison_page, dataset, report, results, visible
from evaluator import estimates as estimates_of
from evaluator import metrics as metrics_table
from evaluator.comparison import compare
from evaluator.comparison_command import show_tables
from evaluator.data_check import DataCheck, check_data
from evaluator.dataset import Track, grouped
from evaluator.estimates import Estimates
from evaluator.layouts import parts_of_accompaniment, reference_of
from evaluator.metrics import Metric
from evaluator.process import Limits, Submission, SubmissionError, SubmissionOptions, check_submission
from evaluator.protocol import Evaluation, Stopped, Task, headline, score_existing, separate_and_score
from evaluator.records import SongRecord
from evaluator.results import EvaluatedSystem
from evaluator.run_folder import RunFolder
from evaluator.scoring_process import ScoringProcess
from evaluator.systems import load_all
from kmdx import plan_file, terminal
from kmdx.challenge import ACCOMPANIMENT, MEMORY, TIME_FACTOR
from kmdx.errors import KmdxError, counted, shown
from kmdx.file_names import key
from kmdx.plan import Plan
from kmdx.terminal import Engine, Precision, SplitOption, TracksOption, err, out

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
MAX_TIME_LEFT = 1000 * 3600.0  # seconds; a submission may report any progress
MIN_MEMORY = 10**6  # bytes; a smaller number is probably a missing unit

logger = logging.getLogger("evaluator")
SUBMISSION_OPTIONS = (
    "submission", "python", "ensemble", "device", "precision", "engine", "time_limit_factor", "memory_limit",
    "enforce_limits", "strict", "keep_stems",
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
    songs = dataset.find_tracks(data, split, tracks)
    task = Task(data, songs, choose_stems(songs, stems), metrics_table.choose(metrics), accept_incomplete)
    try:
        if estimates:
            failed = _score_folders(task, estimates, output, verbose)
        else:
            options = replace(options, python=python)
            failed = _run_submission(
                task, submission.resolve(), options, limits, output, strict, keep_stems, verbose
            )
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


def _run_submission(
    task: Task,
    submission: Path,
    options: SubmissionOptions,
    limits: Limits,
    output: Path,
    strict: bool,
    keep_stems: bool,
    verbose: bool,
) -> bool:
    """Run a submission on the songs; return whether any failed."""
    check_submission(submission)
    if options.python is not None:
        options = replace(options, python=visible.find_python(options.python))
    plan = _plan(submission, options.ensemble)
    if plan is not None:
        _check_stems(plan, task)
    hidden = _hidden_paths(task.data, output, task.songs)
    options = replace(options, readable=_weights_by_path(plan), hidden=hidden, stems=task.stems)
    _check_visible(submission, options)
    started: list[Submission] = []
    with _open_run(task, output, verbose) as (folder, checked):
        system = _describe_submission(submission, plan, options, limits, (output, task.data))
        description = results.describe_run(system, task, checked.warnings)
        if options.python is not None:
            description["interpreter_path"] = str(options.python)
        description["started"] = folder.start(results.identity(description, checked.fingerprints))

        def start(dataset: Path, shared: Path) -> Submission:
            log = folder.path / "submission.log"
            started.append(Submission(submission, dataset.resolve(), shared.resolve(), limits, log, options))
            return started[-1]

        with ScoringProcess() as scorer, _progress(task.songs, task.metrics[0]) as bars:
            run = Evaluation(task, folder, scorer, bars, checked.unusable)
            records = separate_and_score(run, start, strict=strict, keep_stems=keep_stems)
            content, ended = _finish(description, plan, records, folder.path, started)
        page = _report(content, folder.path, task.songs)
    if isinstance(ended, SubmissionError):
        out.print(f"report: {escape(str(page))}")
        raise ended
    _print(content, page)
    if ended is not None:
        err.print(f"[bold red]strict:[/bold red] {escape(str(ended))}")
    return bool(content["summary"]["failed"]) or ended is not None


def _finish(
    run: dict[str, Any],
    plan: Plan | None,
    songs: Iterator[SongRecord],
    folder: Path,
    started: Sequence[Submission] = (),
) -> tuple[dict[str, Any], KmdxError | None]:
    """Run the songs and write the results; return them and the error that ended the run early, if any."""
    records: list[SongRecord] = []
    ended: KmdxError | None = None
    try:
        records.extend(songs)
    except (Stopped, SubmissionError) as error:
        logger.error("%s", error)
        ended = error
    finally:
        # records.extend() keeps the records before an exception
        run |= _describe_process(started, ended if isinstance(ended, SubmissionError) else None)
        if started and run["interpreter"] is None:  # no song was left to run: keep the earlier value
            run["interpreter"] = results.interpreter_of(folder)
        content = results.summarize(run, plan, records)
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
    with _open_run(task, output, verbose) as (folder, checked):
        lossy = stems.lossy > 0
        system = EvaluatedSystem(name, f"Stems in {stems.folder}", stems.digest(), lossy_estimates=lossy)
        problems = grouped(problem for problem in stems.problems() if not problem.fatal)
        description = results.describe_run(system, task, [*checked.warnings, *problems])
        description["estimates"] = str(stems.folder)
        description["started"] = folder.start(results.identity(description, checked.fingerprints))
        with ScoringProcess() as scorer, _progress(task.songs, task.metrics[0]) as bars:
            records = score_existing(Evaluation(task, folder, scorer, bars, checked.unusable), stems)
            content, _ = _finish(description, None, records, folder.path)
        page = _report(content, folder.path, task.songs)
    _print(content, page)
    return content


@contextmanager
def _open_run(task: Task, output: Path, verbose: bool) -> Iterator[tuple[RunFolder, DataCheck]]:
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
        yield folder, checked


def _describe_submission(
    submission: Path,
    plan: Plan | None,
    options: SubmissionOptions,
    limits: Limits,
    without: Sequence[Path],
) -> EvaluatedSystem:
    """Describe a submission; ``without`` lists folders in it that are not part of it."""
    if plan is None:
        name, title = submission.name, f"the submission in {submission}"
        digest, weights = results.describe_foreign(submission, without)
    else:
        name, title = plan.name, plan.title
        digest, weights = results.code_digest(submission), results.describe_weights(plan)
    device, precision, engine = _computation(plan, options)
    return EvaluatedSystem(
        name, title, digest, submission, plan, options.ensemble, weights, device, precision, engine, limits
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


def _describe_process(started: Sequence[Submission], error: SubmissionError | None) -> dict[str, Any]:
    """What the report shows about the submission's process, even if no song was separated."""
    if not started:
        return {}
    submission = started[-1]
    interpreter = submission.interpreter
    return {
        "interpreter": None if interpreter is None else asdict(interpreter),
        "isolation": list(submission.isolation),
        "failure": None if error is None else str(error),
        "log_tail": submission.log_tail(),
    }


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
            raise KmdxError(f"--stems {shown(name)}: no song has this stem; available: {available}")
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
        from my_submission import user_config

        ensemble = user_config.ENSEMBLE
    return plan_file.load(ensemble)


def _check_stems(plan: Plan, task: Task) -> None:
    """Raise KmdxError if a plan does not separate a stem that would be scored."""
    given = {reference_of(stem, plan.stems) for stem in plan.stems}
    given |= {ACCOMPANIMENT} if parts_of_accompaniment(plan.stems) else set()
    lacking = [stem for stem in task.stems if stem not in given]
    if lacking:
        common = ",".join(stem for stem in task.stems if stem in given)
        advice = f"; use --stems {common}" if common else ""
        raise KmdxError(f"{shown(plan.name)} does not separate {', '.join(lacking)}{advice}")


def _computation(plan: Plan | None, options: SubmissionOptions) -> tuple[str, str, str]:
    """Device, precision and engine in words; ``auto`` is resolved for this package's own submission."""
    if plan is None:
        own = "as the submission chooses"
        return options.device or own, options.precision or own, options.engine or own
    from kmdx import devices, precisions
    from my_submission import user_config

    chosen = devices.choose(options.device or user_config.DEVICE)
    gpu = devices.gpu_properties(chosen)
    name = f"{chosen} ({gpu.name})" if gpu else str(chosen)
    in_words = precisions.in_words(options.precision or user_config.PRECISION, chosen)
    return name, in_words, options.engine or user_config.ENGINE


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


class _Bars:
    """Progress bars for all songs and the current one; the time left is estimated from finished songs."""

    def __init__(self, bar: Progress, songs: Sequence[Track], metric: Metric) -> None:
        self.bar = bar
        self.metric = metric
        self.total = sum(track.duration for track in songs if track.rate)
        self.count = len(songs)
        self.number = 0
        self.before = 0.0  # seconds of audio in finished songs
        self.current = 0.0  # and in the current one
        self.played = 0.0  # seconds of audio separated by this command
        self.took = 0.0  # and the wall time for them
        self.began: float | None = None
        self.whole = bar.add_task("songs", total=self.total, text=f"0 of {self.count}")
        self.one = bar.add_task("", total=None, text="", visible=False)

    def song(self, track: Track) -> None:
        self.began = time.monotonic()
        self.bar.reset(self.one, description=escape(track.name), total=track.duration, visible=True)
        self.audio(0.0, track.duration)

    def audio(self, done: float, total: float) -> None:
        self.current = done
        self.bar.update(self.one, completed=done, text=f"{done:.0f} of {total:.0f} s")
        self.bar.update(self.whole, completed=self.before + done)

    def finished(self, track: Track, record: SongRecord) -> None:
        # A song that failed before it was separated says nothing about the speed.
        if self.began is not None and (record.ok or record.seconds is not None):
            self.played += track.duration
            self.took += time.monotonic() - self.began
        fresh, self.began, self.current = self.began is not None, None, 0.0
        self.number += 1
        self.before += track.duration if track.rate else 0.0
        self.bar.update(self.whole, completed=self.before, text=f"{self.number} of {self.count}")
        self.bar.update(self.one, visible=False)
        if fresh:
            result = headline(record, self.metric) if record.ok else f"failed: {record.reason}"
            left = f", {self.time_left()} left" if self.number < self.count and self.played else ""
            audio = f"{record.duration:.0f} s of audio{left}"
            line = f"[{self.number}/{self.count}] {track.name}: {result} ({audio})"
            err.print(escape(terminal.one_line(line)))

    def time_left(self) -> str:
        """Hours, minutes and seconds until all songs are done, at the speed so far."""
        elapsed = time.monotonic() - self.began if self.began is not None else 0.0
        played, took = self.played + self.current, self.took + (elapsed if self.current else 0.0)
        if not played:
            return "-:--:--"
        pace = took / played
        remaining = self.total - self.before
        done = self.current or min(elapsed / pace, remaining)
        left = pace * max(remaining - done, 0.0)
        return str(timedelta(seconds=round(left))) if left < MAX_TIME_LEFT else "-:--:--"


class _TimeLeft(ProgressColumn):
    """The time left until all songs are done, next to the bar of all songs."""

    bars: _Bars | None = None

    def render(self, task: progress.Task) -> Text:
        shown = self.bars is not None and task.id == self.bars.whole
        return Text(f"{self.bars.time_left()} left" if self.bars and shown else "")


@contextmanager
def _progress(songs: Sequence[Track], metric: Metric) -> Iterator[_Bars]:
    left = _TimeLeft()
    with terminal.progress_bar(TextColumn("{task.fields[text]}"), left) as bar:
        left.bars = _Bars(bar, songs, metric)
        yield left.bars


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
    on = "" if run["submission"] is None else f" on {run['device']}"
    out.print(f"[bold]{escape(run['ensemble'])}[/bold]{escape(on)}, {scored}")
    stems = run["stems"]
    table = Table("", "song", *stems, box=None, pad_edge=False, header_style="bold")
    for metric in metrics_table.named(run["metrics"]):
        for how, values in summary["scores"][metric.name].items():
            table.add_row(
                f"{metric.label}, {results.statistic_title(metric, how)}",
                *(metrics_table.show(metric, values[key]) for key in ("song", *stems)),
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
