"""Replays the hidden-set protocol: song by song through the submission, scored in another process."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from evaluator.dataset import Track, as_wav
from evaluator.metrics import Metric, named, show
from evaluator.process import Limits, Outcome, Submission, SubmissionError
from evaluator.records import RecordError, SongRecord, finite
from evaluator.scorer import Scorer
from evaluator.scoring import SongScore
from evaluator.store import Store
from kmdx.errors import KmdxError

logger = logging.getLogger("evaluator")


class Meter(Protocol):
    """What is told of a run's progress."""

    def song(self, track: Track) -> None:
        """A song begins."""

    def audio(self, done: float, total: float) -> None:
        """So many seconds of the song are done, of so many."""

    def finished(self, track: Track, record: SongRecord) -> None:
        """A song is done, or was done before."""


class Stopped(KmdxError):
    """A strict run that ended where the challenge would have."""


def replay(
    tracks: Sequence[Track],
    store: Store,
    make: Callable[[Path, Path], Submission],
    scorer: Scorer,
    meter: Meter,
    stems: Sequence[str],
    metrics: Sequence[Metric],
    *,
    unusable: Mapping[str, str] | None = None,
    strict: bool = False,
    keep_stems: bool = False,
) -> Iterator[SongRecord]:
    """Give each song's record, from the store where it is there, else by replaying it.

    Parameters
    ----------
    tracks : sequence of Track
    store : Store
        Gets each record as soon as it is known.
    make : callable
        Makes the submission, given the data set's folder and the shared folder.
    scorer : Scorer
    meter : Meter
    stems : sequence of str
        What is scored, of each song those that it has.
    metrics : sequence of Metric
    unusable : mapping of str to str, optional
        Songs whose data cannot be scored, and why; they fail without being played.
    strict : bool
        End at the first failure that the challenge would end at.
    keep_stems : bool
        Leave predictions in the run's ``predictions``; otherwise they are dropped once scored.

    Raises
    ------
    Stopped
        In a strict run, at the first song that the challenge would end at.
    SubmissionError
        If the submission cannot be made.
    """
    predictions = store.folder / "predictions"
    for left_over in store.folder.glob(".work-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    # Songs lie here one at a time and without their stems: the submission sees what the server shows.
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=store.folder))
    try:
        dataset, shared = work / "dataset", work / "shared"
        for folder in (dataset, shared / "predictions"):
            folder.mkdir(parents=True)
        with make(dataset, shared) as submission:
            for track in tracks:
                record = stored(store, track.name)
                if record is None:
                    meter.song(track)
                    reason = (unusable or {}).get(track.name)
                    if reason is None:
                        record = _play(
                            track, submission, dataset, shared / "predictions", scorer, meter, stems, metrics
                        )
                    else:
                        record = _unplayed(track, f"its data: {reason}")
                    record = replace(
                        record,
                        isolation=tuple(submission.isolation),
                        load_seconds=submission.load_seconds,
                        load_peak_memory=submission.load_peak_memory,
                    )
                    if keep_stems and record.ok:
                        _keep(shared / "predictions" / track.name, predictions / track.name)
                    store.add(record.to_json())
                    shutil.rmtree(shared / "predictions" / track.name, ignore_errors=True)
                    logger.info("%s: %s", track.name, record.reason or headline(record, metrics[0]))
                meter.finished(track, record)
                yield record
                if strict and record.ends_challenge:
                    raise Stopped(f"{track.name}: {record.reason}; the challenge would have ended here")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def stored(store: Store, song: str) -> SongRecord | None:
    """A song's record, or None if it is not done.

    Raises
    ------
    KmdxError
        If it is damaged.
    """
    content = store.record(song)
    try:
        return None if content is None else SongRecord.from_json(content)
    except RecordError as error:
        raise RecordError(
            f"{store.folder}: {error}; delete it from songs/, and {song} is done again"
        ) from error


def headline(record: SongRecord, metric: Metric) -> str:
    """A scored song's value of the run's first metric, in a few words."""
    return f"{show(metric, record.mean(metric.name))} {metric.unit}".rstrip()


def _play(
    track: Track,
    submission: Submission,
    dataset: Path,
    predictions: Path,
    scorer: Scorer,
    meter: Meter,
    stems: Sequence[str],
    metrics: Sequence[Metric],
) -> SongRecord:
    """Separate and score one song."""
    song = dataset / track.name
    try:
        song.mkdir()
        mixture = as_wav(track, "mixture", song)
        if mixture != song / "mixture.wav":
            shutil.copyfile(mixture, song / "mixture.wav")
    except (KmdxError, OSError) as error:
        shutil.rmtree(song, ignore_errors=True)
        return _unplayed(track, f"its data: {error}")
    try:
        outcome = submission.separate(track.name, track.duration, meter.audio)
        record = _measured(track, outcome, submission.limits)
        if outcome.failure is None:
            scored = [stem for stem in stems if stem in track.stems]
            references = {stem: as_wav(track, stem, song) for stem in scored}
            estimates = {stem: predictions / track.name / f"{stem}.wav" for stem in scored}
            record = with_scores(record, scorer.score(references, estimates, metrics))
        return record
    except SubmissionError:
        raise
    except KmdxError as error:
        return record.failed(str(error), ends_challenge=True)
    finally:
        shutil.rmtree(song, ignore_errors=True)


def _unplayed(track: Track, reason: str) -> SongRecord:
    """The record of a song that was not played."""
    return SongRecord(track.name, "failed", reason, track.duration)


def _measured(track: Track, outcome: Outcome, limits: Limits) -> SongRecord:
    """The record of a song before it is scored."""
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
    """A record with what scoring found; values that do not exist become None."""
    perfect = [
        f"{named([name])[0].title} of {stem} is infinite: a perfect estimate"
        for name, values in score.scores.items()
        for stem, value in values.items()
        if value == math.inf
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
    """Move a song's predictions to where they stay."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        shutil.move(source, target)
