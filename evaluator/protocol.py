"""The challenge's protocol: the submission separates each song, and another process scores the stems."""

from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from evaluator import estimates, song_warnings
from evaluator.dataset import Track, as_wav
from evaluator.estimates import Estimates
from evaluator.layouts import parts_of_accompaniment
from evaluator.metrics import Metric, named, show
from evaluator.predictions import PREDICTIONS, Predictions
from evaluator.process import Limits, Outcome, Submission, SubmissionOptions
from evaluator.records import RecordError, SongRecord, finite
from evaluator.run_folder import RunFolder
from evaluator.scoring import MetricError, SongScore
from evaluator.scoring_process import LIMIT, LIMIT_FACTOR, ScoringError, ScoringProcess
from kmdx.challenge import ACCOMPANIMENT
from kmdx.errors import KmdxError
from kmdx.files import remove_tree

logger = logging.getLogger("evaluator")
SCARCITY = {errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
"""Errors of a system that cannot start more processes, or has no memory, disk space or files left."""
T = TypeVar("T")


class Progress:
    """Is told about a run's progress; this one does nothing."""

    def song(self, track: Track) -> None:
        """A song starts."""

    def audio(self, done: float, total: float) -> None:
        """``done`` of the song's ``total`` seconds of audio are separated."""

    def finished(self, track: Track, record: SongRecord) -> None:
        """A song is done, now or in an earlier call."""


class Stopped(KmdxError):
    """A strict run reached a failure that would have ended the challenge."""


@dataclass(frozen=True)
class Task:
    """Which songs, stems and metrics are scored."""

    data: Path  # the data set
    songs: Sequence[Track]
    stems: tuple[str, ...]  # stems to score, if a song has them
    metrics: tuple[Metric, ...]
    accept_incomplete: bool  # whether songs with missing stems are scored

    def scored_stems(self, track: Track) -> list[str]:
        """The stems of a song that are scored."""
        return [stem for stem in self.stems if stem in track.available]


@dataclass(frozen=True)
class Setup:
    """A submission, and how it runs."""

    submission: Path  # its folder
    limits: Limits
    options: SubmissionOptions
    strict: bool = False  # whether to stop at the first failure that would end the challenge
    keep_stems: bool = False  # whether predictions are kept in the run's ``predictions``

    def start(self, dataset: Path, shared: Path, log: Path) -> Submission:
        """The submission with these folders; its process starts with the first song."""
        return Submission(
            self.submission, dataset.resolve(), shared.resolve(), self.limits, log, self.options
        )


@dataclass(frozen=True)
class Evaluation:
    """A task in progress."""

    task: Task
    folder: RunFolder  # receives each record as soon as it exists
    scorer: ScoringProcess
    progress: Progress = field(default_factory=Progress)
    unusable: Mapping[str, str] = field(default_factory=dict)
    """Songs whose data cannot be scored, and why. They fail without being separated."""


def separate_and_score(
    run: Evaluation,
    start: Callable[[Path, Path], Submission],
    *,
    strict: bool = False,
    keep_stems: bool = False,
) -> Iterator[SongRecord]:
    """Yield each song's record: the saved one, or a new one from running the submission.

    Parameters
    ----------
    run : Evaluation
    start : callable
        Creates the submission, given the data set's folder and the shared folder.
    strict : bool
        Stop at the first failure that would end the challenge.
    keep_stems : bool
        Keep predictions in the run's ``predictions``; otherwise they are deleted after scoring.

    Raises
    ------
    Stopped
        In a strict run, at the first failure that would end the challenge.
    SubmissionError
        If the submission cannot be started.
    """
    remove_leftovers(run.folder)
    with SubmissionRun(run, start, keep_stems) as separating:

        def process(track: Track) -> SongRecord:
            record = separating.record(track, run.progress.audio)
            if (interpreter := separating.submission.interpreter) is not None:
                run.folder.record_interpreter(interpreter.identity())
            return record

        for record in _records(run, process):
            yield record
            stop_if_strict(record, strict)


class SubmissionRun:
    """A submission with folders for one song at a time; use it with ``with``.

    Parameters
    ----------
    run : Evaluation
        Its run's folder gets the temporary folders, and the predictions that are kept.
    start : callable
    keep_stems : bool
        As for :func:`separate_and_score`.

    Attributes
    ----------
    submission : Submission
    """

    def __init__(
        self, run: Evaluation, start: Callable[[Path, Path], Submission], keep_stems: bool = False
    ) -> None:
        self._run, self._keep_stems = run, keep_stems
        self._work = Path(tempfile.mkdtemp(prefix=".work-", dir=run.folder.path))
        try:
            self._workspace = Workspace(self._work)
            self.submission = start(self._workspace.dataset, self._workspace.shared)
        except BaseException:
            remove_tree(self._work)
            raise

    def __enter__(self) -> SubmissionRun:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.submission.kill()
        finally:
            remove_tree(self._work)

    def record(self, track: Track, audio: Callable[[float, float], None]) -> SongRecord:
        """Separate and score a song; ``audio`` is called with the seconds done and in total.

        Raises
        ------
        SubmissionError
            If the submission cannot be started.
        """
        submission, workspace = self.submission, self._workspace
        record = _unusable(self._run, track)
        if record is None:
            record = _separate_and_score(self._run, track, submission, workspace, audio)
        if self._keep_stems and record.ok:
            _keep(workspace.stems, self._run.folder.path / "predictions" / track.name)
        return replace(
            record,
            isolation=tuple(submission.isolation),
            load_seconds=submission.load_seconds,
            load_peak_memory=submission.load_peak_memory,
        )


def stop_if_strict(record: SongRecord, strict: bool) -> None:
    """Raise :class:`Stopped` in a strict run if a song's failure would have ended the challenge."""
    if strict and record.ends_challenge:
        raise Stopped(f"{record.song}: {record.reason}; the challenge would have ended here")


def score_existing(run: Evaluation, found: Estimates) -> Iterator[SongRecord]:
    """Yield each song's record: the saved one, or a new one from scoring stems that exist.

    Parameters
    ----------
    run : Evaluation
    found : Estimates
        The stems of each song.
    """
    remove_leftovers(run.folder)

    def process(track: Track) -> SongRecord:
        if record := _unusable(run, track):
            return record
        with tempfile.TemporaryDirectory(prefix=".work-", dir=run.folder.path) as work:
            return _score_existing(run, track, found, Path(work))

    yield from _records(run, process)


def _records(run: Evaluation, process: Callable[[Track], SongRecord]) -> Iterator[SongRecord]:
    """Yield the songs' saved records; make and save those that are missing."""
    for track in run.task.songs:
        record = load_record(run.folder, track.name)
        if record is None:
            run.progress.song(track)
            record = process(track)
            save(run.folder, record, run.task.metrics[0])
        run.progress.finished(track, record)
        yield record


def save(folder: RunFolder, record: SongRecord, metric: Metric) -> None:
    """Save the record of a song that is done, and log its mean of a metric."""
    folder.add(record.to_json())
    logger.info("%s: %s", record.song, record.reason or headline(record, metric))


class Workspace:
    """Temporary folders for one song at a time.

    Parameters
    ----------
    work : Path
        An empty folder.

    Attributes
    ----------
    dataset, shared : Path
        Visible to the submission, which reads the mixture from the first and writes its stems to the second.
    stems, references : Path
        Copies of the submission's stems, and decoded true stems. The submission cannot reach them.
    """

    def __init__(self, work: Path) -> None:
        self.dataset, self.shared = work / "dataset", work / "shared"
        private = work / secrets.token_hex(8)
        self.stems, self.references, self._next = private / "stems", private / "references", private / "next"
        trash = private / "trash"
        for folder in (self.dataset, self.shared / PREDICTIONS, self.stems, self.references, trash):
            folder.mkdir(parents=True)
        self.predictions = Predictions(self.shared, trash)

    def prepare(self, track: Track) -> Callable[[], object]:
        """Decode a song's mixture; the returned function moves it to where the submission can read it.

        Raises
        ------
        KmdxError, OSError
            If it cannot be read or written.
        """
        self.clear()
        self._next.mkdir()
        mixture = as_wav(track, "mixture", self._next)
        if mixture != self._next / "mixture.wav":
            shutil.copyfile(mixture, self._next / "mixture.wav")
        return lambda: self._next.rename(self.dataset / track.name)

    def without_paths(self, text: str) -> str:
        """Replace each temporary folder in a message with the owner of its files."""
        for folder, owner in ((self.stems, "the submission's"), (self.references, "the data set's")):
            text = text.replace(f"{folder}{os.sep}", f"{owner} ")
        return text

    def clear(self) -> None:
        """Remove everything from the last song except the submission's own folder."""
        remove_tree(self._next)
        self.clear_private()
        for song in self.dataset.iterdir():  # the submission sees the folder itself, so it stays
            remove_tree(song)

    def clear_private(self) -> None:
        """Remove the copied and the true stems."""
        for folder in (self.stems, self.references):
            remove_tree(folder)
            folder.mkdir()


def _score(run: Evaluation, track: Track, guesses: Mapping[str, Path], folder: Path) -> SongScore:
    """Score a song's estimates. True stems that are not wav files are decoded into ``folder``."""
    metrics = run.task.metrics
    # Any other stem of the song can be interference.
    whole = any(metric.together for metric in metrics) and {*guesses} <= {*track.summands}
    references = {stem: as_wav(track, stem, folder) for stem in (track.summands if whole else guesses)}
    uses_mixture = any(metric.uses_mixture for metric in metrics)
    mixture = as_wav(track, "mixture", folder) if uses_mixture else None
    limit = max(LIMIT, LIMIT_FACTOR * track.duration)
    return run.scorer.score(references, guesses, metrics, mixture, limit)


def remove_leftovers(folder: RunFolder) -> None:
    """Remove the work folders of processes that were killed."""
    for leftover in folder.path.glob(".work-*"):
        remove_tree(leftover)


def _score_existing(run: Evaluation, track: Track, found: Estimates, work: Path) -> SongRecord:
    """Score the existing stems of one song."""
    own = found.files.get(track.name, {})
    scored = [stem for stem in run.task.scored_stems(track) if stem in own]
    missing = [stem for stem in run.task.scored_stems(track) if stem not in own]
    if not scored:
        return failed_record(track, f"no stem of this song in {found.folder}")
    record = SongRecord(track.name, "ok", None, track.duration)
    try:
        (work / "references").mkdir()
        (work / "estimates").mkdir()
        guesses = {stem: estimates.as_wav(found, track, stem, work / "estimates") for stem in scored}
        record = with_scores(record, _score(run, track, guesses, work / "references"))
    except (KmdxError, OSError) as error:
        return record.failed(str(error))
    notes = [song_warnings.NO_ESTIMATE.of(stem=stem) for stem in missing]
    return replace(record, warnings=(*record.warnings, *notes))


def load_record(folder: RunFolder, song: str) -> SongRecord | None:
    """A song's saved record, or None if the song is not done.

    Raises
    ------
    KmdxError
        If the record is damaged.
    """
    content = folder.record(song)
    try:
        return None if content is None else SongRecord.from_json(content)
    except RecordError as error:
        raise RecordError(
            f"{folder.path}: {error}; delete the record of {song} in songs/ to run that song again"
        ) from error


def headline(record: SongRecord, metric: Metric) -> str:
    """A scored song's mean of the run's first metric, with its unit."""
    return f"{show(metric, record.mean(metric.name))} {metric.unit}".rstrip()


def _separate_and_score(
    run: Evaluation,
    track: Track,
    submission: Submission,
    workspace: Workspace,
    audio: Callable[[float, float], None],
) -> SongRecord:
    """Separate and score one song."""
    try:
        workspace.predictions.clear(everything=not submission.is_running)
    except OSError:  # a process of the submission is still changing the folder
        submission.kill()
        try:
            workspace.predictions.clear(everything=True)
        except OSError as error:
            reason = f"the submission's predictions cannot be cleared: {error.strerror}"
            return replace(failed_record(track, reason), ends_challenge=True)
    try:
        show_mixture = _with_room(submission, partial(workspace.prepare, track))
    except (KmdxError, OSError) as error:
        return failed_record(track, f"data problem: {error}")
    outcome = submission.separate(track.name, track.duration, audio, show_mixture)
    record = _measured(track, outcome, submission.limits)
    if outcome.failure is not None:
        if not submission.is_running:  # it may have filled the disk
            with suppress(OSError):
                workspace.predictions.clear(everything=True)
        return record
    try:
        score = _with_room(submission, partial(_score_predictions, run, track, workspace))
        return with_scores(record, score)
    except (MetricError, ScoringError) as error:  # not a fault of the submission
        return record.failed(str(error))
    except KmdxError as error:
        reason = submission.explain(workspace.without_paths(str(error)))
        return record.failed(reason, ends_challenge=True)
    except OSError as error:  # the evaluator's own problem, such as a full disk
        return record.failed(f"it could not be scored: {error.strerror or error}")


def _score_predictions(run: Evaluation, track: Track, workspace: Workspace) -> SongScore:
    """Copy a song's stems out of the submission's reach, then decode the true stems and score the copies."""
    scored = run.task.scored_stems(track)
    workspace.clear_private()
    stems = workspace.predictions.copy(track.name, scored, track.samples, track.channels, workspace.stems)
    if ACCOMPANIMENT in scored and ACCOMPANIMENT not in stems:
        parts = [stems[stem] for stem in parts_of_accompaniment(stems)]
        target = workspace.stems / f"{ACCOMPANIMENT}.wav"
        stems[ACCOMPANIMENT] = estimates.sum_as_wav(parts, track, target)
    guesses = {stem: stems[stem] for stem in scored}
    return _score(run, track, guesses, workspace.references)


def _with_room(submission: Submission, work: Callable[[], T]) -> T:
    """Do the evaluator's own work; if the system lacks resources, kill the submission and try once more.

    A submission may have used up the processes, threads, memory or disk space of its user.
    """
    try:
        return work()
    except (KmdxError, OSError) as error:
        causes = [error, error.__cause__]
        if not any(isinstance(cause, RuntimeError) or _is_scarcity(cause) for cause in causes):
            raise
    submission.kill()
    return work()


def _is_scarcity(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in SCARCITY


def failed_record(track: Track, reason: str) -> SongRecord:
    """The record of a song that failed before it was separated."""
    return SongRecord(track.name, "failed", reason, track.duration)


def _unusable(run: Evaluation, track: Track) -> SongRecord | None:
    """The failed record of a song whose data cannot be scored; None if the data can be scored."""
    reason = run.unusable.get(track.name)
    return None if reason is None else failed_record(track, f"data problem: {reason}")


def _measured(track: Track, outcome: Outcome, limits: Limits) -> SongRecord:
    """The record of a separated song before it is scored."""
    factor = outcome.seconds / track.duration
    return SongRecord(
        track.name,
        "ok" if outcome.failure is None else "failed",
        outcome.failure,
        track.duration,
        seconds=outcome.seconds,
        real_time_factor=factor,
        peak_memory=outcome.peak_memory,
        peak_gpu_memory=outcome.peak_gpu_memory,
        over_time=factor > limits.time_factor,
        over_memory=outcome.peak_memory > limits.memory,
        ends_challenge=outcome.ends_challenge,
    )


def with_scores(record: SongRecord, score: SongScore) -> SongRecord:
    """Add a song's scores to its record; values that are not finite become None."""
    perfect = [
        song_warnings.PERFECT.of(metric=metric.title, stem=stem)
        for metric in named([*score.scores])
        for stem, value in score.scores[metric.name].items()
        if value == math.inf and metric.together is None  # infinite ISR, SIR or SAR means less
    ]
    return replace(
        record,
        stems=tuple(next(iter(score.scores.values()))),
        scores=finite(score.scores),
        frames=finite(score.frames),
        silent_references=tuple(score.silent_references),
        envelopes=score.envelopes,
        warnings=(*record.warnings, *perfect, *score.warnings),
    )


def _keep(source: Path, target: Path) -> None:
    """Move a song's predictions into the run's folder."""
    remove_tree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        shutil.move(source, target)
