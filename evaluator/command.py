"""The evaluator's command: from its options to a run's folder and its report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from evaluator import dataset, report, results, visible
from evaluator.dataset import STEMS, Track
from evaluator.process import Limits, Submission, SubmissionError, check_submission
from evaluator.replay import Record, Stopped, replay
from evaluator.scorer import Scorer
from evaluator.store import Store
from evaluator.survey import survey
from kmdx import engine as engines
from kmdx import plan_file, terminal
from kmdx.errors import KmdxError
from kmdx.plan import Plan
from kmdx.terminal import err, out

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}

logger = logging.getLogger("evaluator")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    """Run the command; a user's mistake ends it with one line and exit code 2."""
    terminal.run(app)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def evaluate(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="MUSDB18-HQ, or any folder in its layout.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="RUN", help="The run's folder; the same one goes on.")
    ],
    split: Annotated[str, typer.Option(help="Subfolder of DATA, where it has one.")] = "test",
    tracks: Annotated[str | None, typer.Option(metavar="GLOB", help="Only songs whose names match.")] = None,
    ensemble: Annotated[str | None, typer.Option(help="In place of the one in user_config.py.")] = None,
    submission: Annotated[Path, typer.Option(metavar="DIR", help="Any entrant's folder.")] = ROOT,
    python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The submission's interpreter; this one by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="In place of the one in user_config.py.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="tuned or plain, in place of the one in user_config.py.")
    ] = None,
    time_limit_factor: Annotated[float, typer.Option(help="Wall time of a song, × its duration.")] = 1.57,
    memory_limit: Annotated[str, typer.Option(help="Host memory, such as 16GB or 8GiB.")] = "16GB",
    enforce_limits: Annotated[
        bool, typer.Option("--enforce-limits", help="Kill a song that goes over.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End where the challenge would; enforces limits.")
    ] = False,
    keep_stems: Annotated[
        bool, typer.Option("--keep-stems", help="Keep predictions, for the report's players.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the log, too.")] = False,
) -> None:
    """Score a submission on DATA by the challenge's own rules.

    The model is made once in a process of its own; each song's mixture goes through the wrapper, its
    stems are written as 16-bit wav and scored from disk in another process. Results, also of failed
    songs, are on disk as soon as they are known. Exit code: 0 when every song was scored, 1 when some
    failed, 2 for a mistake.
    """
    if not 0 < time_limit_factor < math.inf:
        raise KmdxError(f"--time-limit-factor {time_limit_factor:g}: expected a number above 0")
    if engine is not None:
        engines.check(engine)
    limits = Limits(time_limit_factor, parse_size(memory_limit), enforced=enforce_limits or strict)
    submission = submission.resolve()
    check_submission(submission)
    if python is not None:
        python = visible.find_python(python)
    if ensemble is not None and Path(ensemble).is_file():
        ensemble = str(Path(ensemble).resolve())  # the submission runs in another folder
    plan = _plan(submission, ensemble)
    songs = dataset.find_tracks(data, split, tracks)
    store = Store(output)
    try:
        with store.locked():
            _log_to(store.folder / "evaluation.log", verbose)
            with err.status(f"checking {len(songs)} songs, every sample of them unless that was done before"):
                found = survey(songs, store.folder)
                code, used_weights = (
                    (results.code_digest(submission), results.describe_weights(plan))
                    if plan
                    else results.describe_foreign(submission)
                )
            for warning in [*found.warnings, *(f"{song}: {why}" for song, why in found.unusable.items())]:
                logger.warning("%s", warning)
            if len(found.unusable) == len(songs):
                song, why = next(iter(found.unusable.items()))
                raise KmdxError(f"none of {len(songs)} songs can be scored; {song}: {why}")
            on, computed_in, by = _computation(plan, device, engine)
            run = results.describe_run(
                submission=submission,
                code=code,
                plan=plan,
                ensemble=ensemble,
                used_weights=used_weights,
                device=on,
                precision=computed_in,
                engine=by,
                limits=limits,
                data=data,
                split=split if (data / split).is_dir() else None,
                tracks=songs,
                data_warnings=found.warnings,
            )
            run["started"] = store.begin(results.identity(run, found.fingerprints))

            def make(folder: Path, shared: Path) -> Submission:
                log = store.folder / "submission.log"
                started = Submission(
                    submission, folder.resolve(), shared.resolve(), limits, log, ensemble, device, engine,
                    python=python, readable=_named_weights(plan),
                    hidden=_out_of_reach(data, store.folder, songs),
                )  # fmt: skip
                made.append(started)
                return started

            made: list[Submission] = []
            records: list[Record] = []
            stopped: Stopped | None = None
            broken: SubmissionError | None = None
            options: dict[str, Any] = {"strict": strict, "keep_stems": keep_stems, "unusable": found.unusable}
            with Scorer() as scorer, _meter(songs) as meter:
                try:
                    for record in replay(songs, store, make, scorer, meter, **options):
                        records.append(record)
                except Stopped as error:
                    stopped = error
                except SubmissionError as error:
                    broken = error
                    logger.error("%s", error)
                finally:
                    run |= _of_process(made, broken)
                    content = results.summarize(run, plan, records)
                    results.write(content, store.folder)
            page = _report(content, store.folder, songs)
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on where this one ended")
        raise typer.Exit(130) from None
    if broken is not None:
        out.print(f"report: {escape(str(page))}")
        raise broken
    _print(content, page)
    if stopped is not None:
        err.print(f"[bold red]strict:[/bold red] {escape(str(stopped))}")
    if content["summary"]["failed"] or stopped is not None:
        raise typer.Exit(1)


def _out_of_reach(data: Path, folder: Path, songs: Sequence[Track]) -> list[Path]:
    """What no submission may see: the data set, also where links lead, and the run's folder."""
    files = {path.resolve() for track in songs for path in track.files.values()}
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
    if not 1 <= size < 2**63:
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


def _computation(plan: Plan | None, device: str | None, engine: str | None) -> tuple[str, str, str]:
    """Device, precision and engine in words: of this package's own submission what ``auto`` comes to."""
    if plan is None:
        own = "the submission's own"
        return device or own, own, engine or own
    import torch

    from kmdx import precision
    from kmdx.separator import choose_device
    from my_submission import user_config

    chosen = choose_device(device or user_config.DEVICE)
    name = f"{chosen} ({torch.cuda.get_device_name(chosen)})" if chosen.type == "cuda" else str(chosen)
    return name, precision.in_words(user_config.PRECISION, chosen), engine or user_config.ENGINE


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

    def __init__(self, bar: Progress, songs: Sequence[Track]) -> None:
        self.bar = bar
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

    def finished(self, track: Track, record: Record) -> None:
        if self.began is not None and record["seconds"] is not None:
            self.played += track.duration
            self.took += time.monotonic() - self.began
        fresh, self.began, self.current = self.began is not None, None, 0.0
        self.number += 1
        self.before += track.duration if track.rate else 0.0
        self.bar.update(self.whole, completed=self.before, text=f"{self.number} of {self.count}")
        self.bar.update(self.one, visible=False)
        if fresh:
            failed = record["status"] != "ok"
            result = f"failed: {record['reason']}" if failed else f"{record['song_sdr']:.2f} dB"
            left = f", {self.time_left()} left" if self.number < self.count else ""
            audio = f"{record['duration']:.0f} s of audio{left}"
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

    def render(self, task: Task) -> Text:
        shown = self.bars is not None and task.id == self.bars.whole
        return Text(f"{self.bars.time_left()} left" if self.bars and shown else "")


@contextmanager
def _meter(songs: Sequence[Track]) -> Iterator[_Bars]:
    left = _TimeLeft()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), left)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        left.bars = _Bars(bar, songs)
        yield left.bars


def _report(content: dict[str, Any], folder: Path, songs: Sequence[Track]) -> Path:
    """Write the page; references are played from the data set where they are files of their own."""
    references = {
        track.name: {stem: track.files[stem] for stem in STEMS}
        for track in songs
        if not track.lossy and set(STEMS) <= set(track.files)
    }
    predictions = folder / "predictions"
    return report.write(content, folder, predictions if predictions.is_dir() else None, references)


def _print(content: dict[str, Any], page: Path) -> None:
    """Print the terminal's report."""
    run, summary = content["run"], content["summary"]
    scored = f"{summary['scored']} of {summary['songs']} songs scored"
    out.print(f"[bold]{escape(run['ensemble'])}[/bold] on {run['device']}, {scored}")
    table = Table("SDR in dB", "song", *STEMS, box=None, pad_edge=False, header_style="bold")
    for measure, name in (("global_sdr", "global SDR"), ("museval_sdr", "museval BSSEval v4 SDR")):
        for how, values in summary[measure].items():
            table.add_row(f"{name}, {how}", *(_decibels(values[key]) for key in ("song", *STEMS)))
    out.print(table)
    factor, memory = summary["real_time_factor"], summary["peak_memory"]
    if summary["scored"]:
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


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
