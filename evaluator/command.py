"""The evaluator's command: from its options to a run's folder and its report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from evaluator.data_check import Survey, survey
from evaluator.dataset import Track
from evaluator.estimates import Estimates
from evaluator.layouts import parts_of_accompaniment
from evaluator.metrics import Metric
from evaluator.process import Limits, Submission, SubmissionError, check_submission
from evaluator.protocol import Stopped, headline, replay, score_existing
from evaluator.records import SongRecord
from evaluator.run_folder import Store
from evaluator.scoring_process import Scorer
from evaluator.systems import load_all
from kmdx import engine as engines
from kmdx import plan_file, terminal
from kmdx.challenge import ACCOMPANIMENT, MEMORY, TIME_FACTOR
from kmdx.errors import KmdxError, shown
from kmdx.plan import Plan
from kmdx.terminal import TracksOption, err, out

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
LEAST_MEMORY = 10**6

logger = logging.getLogger("evaluator")
OF_SUBMISSIONS = ("submission", "python", "ensemble", "device", "precision", "engine", "time_limit_factor",
                  "memory_limit", "enforce_limits", "strict", "keep_stems")  # fmt: skip
"""Options that do nothing where existing stems are scored."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def evaluate(
    context: typer.Context,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Songs with their stems: MUSDB18-HQ or any other data set.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="RUN", help="The run's folder; the same command continues it."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Subfolder of DATA: by default test if it exists; all for all of them.")
    ] = None,
    tracks: TracksOption = None,
    stems: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Score only these, such as vocals or bass,drums.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Metrics, such as global_sdr,si_sdr, or all."),
    ] = None,
    accept_incomplete: Annotated[
        bool, typer.Option("--accept-incomplete", help="Also score songs with missing stems.")
    ] = False,
    estimates: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Score existing stems and run nothing; several make a leaderboard."),
    ] = None,
    submission: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the submission.")] = ROOT,
    python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The submission's Python; by default this one.")
    ] = None,
    ensemble: Annotated[str | None, typer.Option(help="Overrides user_config.py.")] = None,
    device: Annotated[str | None, typer.Option(help="Overrides user_config.py.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, fp16 or bf16; overrides user_config.py.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="tuned or plain; overrides user_config.py.")] = None,
    time_limit_factor: Annotated[
        float, typer.Option(help="Time limit of a song, as a multiple of its duration.")
    ] = TIME_FACTOR,
    memory_limit: Annotated[
        str, typer.Option(help="Memory limit, such as 16GB or 8GiB.")
    ] = f"{MEMORY // 10**9}GB",
    enforce_limits: Annotated[
        bool, typer.Option("--enforce-limits", help="End a song that exceeds a limit.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop where the challenge would; enforces limits.")
    ] = False,
    keep_stems: Annotated[
        bool, typer.Option("--keep-stems", help="Keep the stems, so that the report can play them.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print the log.")] = False,
) -> None:
    """Score a submission or existing stems on DATA with the challenge's protocol.

    The model is made once in a process of its own; each song's mixture goes through the wrapper, its
    stems are written as 16-bit wav and scored from disk in another process. Results, also of failed
    songs, are on disk as soon as they are known. Exit code: 0 when every song was scored, 1 when some
    failed, 2 for a mistake.
    """
    if not 0 < time_limit_factor < math.inf:
        raise KmdxError(f"--time-limit-factor {time_limit_factor:g}: expected a number above 0")
    if estimates:
        _refuse_of_submissions(context)
    settings = SubmissionSettings(ensemble, device, precision, engine)
    limits = Limits(time_limit_factor, parse_size(memory_limit), enforced=enforce_limits or strict)
    songs = dataset.find_tracks(data, split, tracks)
    task = Task(data, songs, choose_stems(songs, stems), metrics_table.choose(metrics), accept_incomplete)
    try:
        if estimates:
            failed = _score_folders(task, estimates, output, verbose)
        else:
            failed = _run_submission(
                task, submission.resolve(), python, settings, limits, output, strict, keep_stems, verbose
            )
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on where this one ended")
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


def _refuse_of_submissions(context: typer.Context) -> None:
    """Raise KmdxError where an option was given that would do nothing without a submission."""
    for name in OF_SUBMISSIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise KmdxError(f"{option}: --estimates runs no submission; leave out one of the two")


@dataclass(frozen=True)
class Task:
    """What is scored, and how."""

    data: Path
    songs: Sequence[Track]
    stems: tuple[str, ...]
    metrics: tuple[Metric, ...]
    accept_incomplete: bool


@dataclass(frozen=True)
class SubmissionSettings:
    """What replaces a submission's own settings; None leaves one as it is.

    Raises
    ------
    KmdxError
        For a setting that does not exist.
    """

    ensemble: str | None
    device: str | None
    precision: str | None
    engine: str | None

    def __post_init__(self) -> None:
        if self.engine is not None:
            engines.check(self.engine)
        if self.precision is not None:
            from kmdx import precision

            object.__setattr__(self, "precision", precision.check(self.precision.lower()))

    def for_process(self) -> dict[str, str | None]:
        """The same for a process in another folder."""
        own = asdict(self)
        if self.ensemble is not None and Path(self.ensemble).is_file():
            own["ensemble"] = str(Path(self.ensemble).resolve())
        return own


def _run_submission(
    task: Task,
    submission: Path,
    python: Path | None,
    settings: SubmissionSettings,
    limits: Limits,
    output: Path,
    strict: bool,
    keep_stems: bool,
    verbose: bool,
) -> bool:
    """Run a submission over the songs; return whether any failed."""
    check_submission(submission)
    if python is not None:
        python = visible.find_python(python)
    replaced = settings.for_process()
    plan = _plan(submission, replaced["ensemble"])
    if plan is not None:
        _check_stems(plan, task)
    made: list[Submission] = []
    with _begun(task, output, verbose) as (store, found):
        code, used_weights = (
            (results.code_digest(submission), results.describe_weights(plan))
            if plan
            else results.describe_foreign(submission, (output, task.data))
        )
        on, computed_in, by = _computation(plan, settings)
        run = results.describe_run(
            name=plan.name if plan else submission.name,
            title=plan.title if plan else f"the submission in {submission}",
            submission=submission,
            code=code,
            plan=plan,
            ensemble=replaced["ensemble"],
            used_weights=used_weights,
            device=on,
            precision=computed_in,
            engine=by,
            limits=limits,
            **_of_task(task, found),
        )
        if python is not None:
            run["interpreter_path"] = str(python)
        run["started"] = store.begin(results.identity(run, found.fingerprints))

        def make(folder: Path, shared: Path) -> Submission:
            log = store.folder / "submission.log"
            started = Submission(
                submission, folder.resolve(), shared.resolve(), limits, log, **replaced,
                python=python, readable=_named_weights(plan), stems=task.stems,
                hidden=_out_of_reach(task.data, store.folder, task.songs),
            )  # fmt: skip
            made.append(started)
            return started

        with Scorer() as scorer, _meter(task.songs, task.metrics[0]) as meter:
            records = replay(
                task.songs, store, make, scorer, meter, task.stems, task.metrics,
                strict=strict, keep_stems=keep_stems, unusable=found.unusable,
            )  # fmt: skip
            content, ended = _finish(run, plan, records, store.folder, made)
        page = _report(content, store.folder, task.songs)
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
    made: Sequence[Submission] = (),
) -> tuple[dict[str, Any], KmdxError | None]:
    """Go through the songs and write the results, also of a run that ended early; return why it did."""
    records: list[SongRecord] = []
    ended: KmdxError | None = None
    try:
        records.extend(songs)
    except (Stopped, SubmissionError) as error:
        logger.error("%s", error)
        ended = error
    finally:
        # extend() keeps what came before an exception
        run |= _of_process(made, ended if isinstance(ended, SubmissionError) else None)
        if made and run["interpreter"] is None:  # nothing was left to run: what was found before stays
            run["interpreter"] = results.interpreter_of(folder)
        content = results.summarize(run, plan, records)
        results.write(content, folder)
    return content, ended


def _score_folders(task: Task, folders: Sequence[Path], output: Path, verbose: bool) -> bool:
    """Score folders of existing stems; several make a leaderboard. Return whether any song failed."""
    names = _names_apart(folders)
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
    """Score one folder of existing stems, and print and write what came of it."""
    with _begun(task, output, verbose) as (store, found):
        run = results.describe_run(
            name=name,
            title=f"Stems in {stems.folder}",
            submission=None,
            code=stems.digest(),
            plan=None,
            ensemble=None,
            used_weights=[],
            device="not known",
            precision="not known",
            engine="not known",
            limits=None,
            **_of_task(task, found),
        )
        run["data"]["warnings"] += [str(problem) for problem in stems.problems() if not problem.fatal]
        run["estimates"] = str(stems.folder)
        run["started"] = store.begin(results.identity(run, found.fingerprints))
        with Scorer() as scorer, _meter(task.songs, task.metrics[0]) as meter:
            records = score_existing(
                task.songs, store, stems, scorer, meter, task.stems, task.metrics, unusable=found.unusable
            )
            content, _ = _finish(run, None, records, store.folder)
        page = _report(content, store.folder, task.songs)
    _print(content, page)
    return content


@contextmanager
def _begun(task: Task, output: Path, verbose: bool) -> Iterator[tuple[Store, Survey]]:
    """A run's folder, held by this process, and what is known of the data.

    Raises
    ------
    KmdxError
        If no song can be scored.
    """
    store = Store(output)
    with store.locked():
        _log_to(store.folder / "evaluation.log", verbose)
        count = "1 song" if len(task.songs) == 1 else f"{len(task.songs)} songs"
        with err.status(f"checking {count}, every sample of them unless that was done before"):
            found = survey(task.songs, store.folder, task.accept_incomplete)
        for warning in [*found.warnings, *(f"{song}: {why}" for song, why in found.unusable.items())]:
            logger.warning("%s", warning)
        if len(found.unusable) == len(task.songs):
            song, why = next(iter(found.unusable.items()))
            raise KmdxError(f"none of {count} can be scored; {song}: {why}")
        yield store, found


def _of_task(task: Task, found: Survey) -> dict[str, Any]:
    """What a run's description takes from the data and the options."""
    return {
        "data": task.data,
        "split": task.songs[0].split,
        "tracks": task.songs,
        "stems": task.stems,
        "metrics": task.metrics,
        "data_warnings": found.warnings,
        "accept_incomplete": task.accept_incomplete,
    }


def _names_apart(folders: Sequence[Path]) -> dict[Path, str]:
    """A name for each folder: its own, with as many of those above as tell it from the others."""
    whole = {folder: folder.resolve() for folder in folders}
    if len({*whole.values()}) < len(folders):
        raise KmdxError("--estimates names a folder twice")
    depth, longest = 1, max(len(path.parts) for path in whole.values())
    while True:
        names = {folder: " - ".join(path.parts[1:][-depth:]) for folder, path in whole.items()}
        if len({*names.values()}) == len(names) or depth >= longest:
            return names
        depth += 1


def _out_of_reach(data: Path, folder: Path, songs: Sequence[Track]) -> list[Path]:
    """What no submission may see: the data set, also where links lead, and the run's folder."""
    files = {path.resolve() for track in songs for path in track.paths}
    return [data, folder, *{path.parent for path in files}, *files]


def _named_weights(plan: Plan | None) -> list[Path]:
    """Weight files that a plan names by their paths."""
    weights = [use.weight.path for use in plan.networks.values()] if plan else []
    return [Path(path) for path in weights if path is not None]


def _of_process(made: Sequence[Submission], broken: SubmissionError | None) -> dict[str, Any]:
    """What a run's page reports of the submission's process, also where no song was played."""
    if not made:
        return {}
    submission = made[-1]
    interpreter = submission.interpreter
    return {
        "interpreter": None if interpreter is None else asdict(interpreter),
        "isolation": list(submission.isolation),
        "failure": None if broken is None else str(broken),
        "log_tail": submission.log_tail(),
    }


def choose_stems(songs: Sequence[Track], text: str | None) -> tuple[str, ...]:
    """The stems to score, in the order in which the songs have them.

    Raises
    ------
    KmdxError
        If no song has one that was asked for.
    """
    if text is None:
        return tuple(dict.fromkeys(stem for track in songs for stem in track.summands))
    known = tuple(dict.fromkeys(stem for track in songs for stem in track.available))
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise KmdxError(f"--stems {shown(name)}: no song has it; available: {', '.join(known)}")
    if not names:
        raise KmdxError(f"--stems names no stem; available: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``16GB`` or ``8 GiB``.

    Raises
    ------
    KmdxError
        If it is none.
    """
    number = text.strip().upper()
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if number.endswith(unit)), "")
    try:
        size = float(number.removesuffix(unit)) * UNITS.get(unit, 1)
    except ValueError:
        size = 0
    if not LEAST_MEMORY <= size < 2**63:  # a number without a unit is bytes, and hardly meant
        raise KmdxError(f"--memory-limit {text}: expected a size such as 16GB or 8GiB")
    return int(size)


def _plan(submission: Path, ensemble: str | None) -> Plan | None:
    """The plan of this package's own submission; of another's nothing is known."""
    if submission != ROOT:
        return None
    if ensemble is None:
        from my_submission import user_config

        ensemble = user_config.ENSEMBLE
    return plan_file.load(ensemble)


def _check_stems(plan: Plan, task: Task) -> None:
    """Raise KmdxError where a plan cannot give what would be scored."""
    given = {*plan.stems, *([ACCOMPANIMENT] if parts_of_accompaniment(plan.stems) else [])}
    lacking = [stem for stem in task.stems if stem not in given]
    if lacking:
        common = ",".join(stem for stem in task.stems if stem in given)
        advice = f"; use --stems {common}" if common else ""
        raise KmdxError(f"{shown(plan.name)} does not separate {', '.join(lacking)}{advice}")


def _computation(plan: Plan | None, settings: SubmissionSettings) -> tuple[str, str, str]:
    """Device, precision and engine in words: of this package's own submission what ``auto`` comes to."""
    if plan is None:
        own = "as the submission chooses"
        return settings.device or own, settings.precision or own, settings.engine or own
    import torch

    from kmdx import device as devices
    from kmdx import precision
    from my_submission import user_config

    chosen = devices.choose(settings.device or user_config.DEVICE)
    name = f"{chosen} ({torch.cuda.get_device_name(chosen)})" if chosen.type == "cuda" else str(chosen)
    in_words = precision.in_words(settings.precision or user_config.PRECISION, chosen)
    return name, in_words, settings.engine or user_config.ENGINE


def _log_to(path: Path, verbose: bool) -> None:
    """Log into a file, and with ``verbose`` to the terminal."""
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
    """Progress by song and by second of audio, with the time left by the songs that were played."""

    def __init__(self, bar: Progress, songs: Sequence[Track], metric: Metric) -> None:
        self.bar = bar
        self.metric = metric
        self.total = sum(track.duration for track in songs if track.rate)
        self.count = len(songs)
        self.number = 0
        self.before = 0.0  # seconds of audio in finished songs
        self.current = 0.0  # and in this one
        self.played = 0.0  # seconds of audio played by this process
        self.took = 0.0  # and the seconds that they took
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
        if self.began is not None and (record.ok or record.seconds is not None):  # stems take no seconds
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
            err.print(escape(f"[{self.number}/{self.count}] {track.name}: {result} ({audio})"))

    def time_left(self) -> str:
        """Hours, minutes and seconds until all songs are done, at the pace of those played so far."""
        elapsed = time.monotonic() - self.began if self.began is not None else 0.0
        played, took = self.played + self.current, self.took + (elapsed if self.current else 0.0)
        if not played:
            return "-:--:--"
        pace = took / played
        remaining = self.total - self.before
        done = self.current or min(elapsed / pace, remaining)
        return str(timedelta(seconds=round(pace * max(remaining - done, 0.0))))


class _TimeLeft(ProgressColumn):
    """The time left until all songs are done, beside the bar of all songs."""

    bars: _Bars | None = None

    def render(self, task: progress.Task) -> Text:
        shown = self.bars is not None and task.id == self.bars.whole
        return Text(f"{self.bars.time_left()} left" if self.bars and shown else "")


@contextmanager
def _meter(songs: Sequence[Track], metric: Metric) -> Iterator[_Bars]:
    left = _TimeLeft()
    with terminal.progress_bar(TextColumn("{task.fields[text]}"), left) as bar:
        left.bars = _Bars(bar, songs, metric)
        yield left.bars


def _report(content: dict[str, Any], folder: Path, songs: Sequence[Track]) -> Path:
    """Write the page; references are played from the data set where they are files of their own."""
    references = {
        track.name: {stem: track.files[stem] for stem in track.stems if track.is_one_file(stem)}
        for track in songs
        if not track.lossy
    }
    predictions = folder / "predictions"
    return report.write(content, folder, predictions if predictions.is_dir() else None, references)


def _print(content: dict[str, Any], page: Path) -> None:
    """Print the terminal's report."""
    run, summary = content["run"], content["summary"]
    scored = f"{summary['scored']} of {summary['songs']} songs scored"
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
            out.print(escape(f"failed: {record['song']}: {record['reason']}"))
    for warning in content["warnings"]:
        terminal.warn(warning)
    out.print(f"report: {escape(str(page))}")
