"""Replays the hidden-set protocol: song by song through the submission, scored in another process."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from evaluator import estimates, song_warnings
from evaluator.dataset import Track, as_wav
from evaluator.estimates import Estimates
from evaluator.layouts import parts_of_accompaniment
from evaluator.metrics import Metric, named, show
from evaluator.predictions import PREDICTIONS, Predictions
from evaluator.process import Limits, Outcome, Submission
from evaluator.records import RecordError, SongRecord, finite
from evaluator.run_folder import Store
from evaluator.scoring import SongScore
from evaluator.scoring_process import LIMIT, LIMIT_FACTOR, Scorer
from kmdx.challenge import ACCOMPANIMENT
from kmdx.errors import KmdxError
from kmdx.files import remove_tree

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
    _remove_left_overs(store)
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=store.folder))
    try:
        desk = Desk(work)
        with make(desk.dataset, desk.shared) as submission:
            for track in tracks:
                record = stored(store, track.name)
                if record is None:
                    meter.song(track)
                    reason = (unusable or {}).get(track.name)
                    if reason is None:
                        record = _play(track, submission, desk, scorer, meter, stems, metrics)
                        if submission.interpreter is not None:
                            store.begin_process(submission.interpreter.identity())
                    else:
                        record = unplayed(track, f"its data: {reason}")
                    record = replace(
                        record,
                        isolation=tuple(submission.isolation),
                        load_seconds=submission.load_seconds,
                        load_peak_memory=submission.load_peak_memory,
                    )
                    if keep_stems and record.ok:
                        _keep(desk.taken, predictions / track.name)
                    store.add(record.to_json())
                    logger.info("%s: %s", track.name, record.reason or headline(record, metrics[0]))
                meter.finished(track, record)
                yield record
                if strict and record.ends_challenge:
                    raise Stopped(f"{track.name}: {record.reason}; the challenge would have ended here")
    finally:
        remove_tree(work)


class Desk:
    """Where one song at a time is laid out.

    Parameters
    ----------
    work : Path
        An empty folder.

    Attributes
    ----------
    dataset, shared : Path
        All that the submission sees: the song's mixture, and where it writes its stems.
    taken, references : Path
        Stems that were taken from it, and decoded true stems; out of its reach.
    """

    def __init__(self, work: Path) -> None:
        self.dataset, self.shared = work / "dataset", work / "shared"
        own = work / secrets.token_hex(8)
        self.taken, self.references, self._next = own / "taken", own / "references", own / "next"
        trash = own / "trash"
        for folder in (self.dataset, self.shared / PREDICTIONS, self.taken, self.references, trash):
            folder.mkdir(parents=True)
        self.predictions = Predictions(self.shared, trash)

    def lay_out(self, track: Track) -> Callable[[], object]:
        """Prepare a song's mixture; what is returned puts it where the submission sees it.

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
        """A message that says whose its files are, and not where these lie for the moment."""
        for folder, whose in ((self.taken, "the submission's"), (self.references, "the data set's")):
            text = text.replace(f"{folder}{os.sep}", f"{whose} ")
        return text

    def clear(self) -> None:
        """Remove everything of the last song but what the submission has in its hands."""
        remove_tree(self._next)
        for folder in (self.taken, self.references):
            remove_tree(folder)
            folder.mkdir()
        for song in self.dataset.iterdir():  # the folder itself is what the submission sees
            remove_tree(song)


def score_existing(
    tracks: Sequence[Track],
    store: Store,
    found: Estimates,
    scorer: Scorer,
    meter: Meter,
    stems: Sequence[str],
    metrics: Sequence[Metric],
    *,
    unusable: Mapping[str, str] | None = None,
) -> Iterator[SongRecord]:
    """Give each song's record, from the store where it is there, else by scoring stems that exist.

    Parameters are those of :func:`replay`; ``found`` is the folder's stems by song.
    """
    _remove_left_overs(store)
    for track in tracks:
        record = stored(store, track.name)
        if record is None:
            meter.song(track)
            reason = (unusable or {}).get(track.name)
            if reason is None:
                with tempfile.TemporaryDirectory(prefix=".work-", dir=store.folder) as work:
                    record = _score_existing(track, found, scorer, Path(work), stems, metrics)
            else:
                record = unplayed(track, f"its data: {reason}")
            store.add(record.to_json())
            logger.info("%s: %s", track.name, record.reason or headline(record, metrics[0]))
        meter.finished(track, record)
        yield record


def _score(
    track: Track, guesses: Mapping[str, Path], folder: Path, scorer: Scorer, metrics: Sequence[Metric]
) -> SongScore:
    """Score a song's estimates; true stems are decoded into a folder where they must be."""
    # What else is in the song can leak into an estimate.
    whole = any(metric.together for metric in metrics) and {*guesses} <= {*track.summands}
    references = {stem: as_wav(track, stem, folder) for stem in (track.summands if whole else guesses)}
    uses_mixture = any(metric.uses_mixture for metric in metrics)
    mixture = as_wav(track, "mixture", folder) if uses_mixture else None
    limit = max(LIMIT, LIMIT_FACTOR * track.duration)
    return scorer.score(references, guesses, metrics, mixture, limit)


def _remove_left_overs(store: Store) -> None:
    """Remove the working folders of processes that were killed."""
    for folder in store.folder.glob(".work-*"):
        remove_tree(folder)


def _score_existing(
    track: Track,
    found: Estimates,
    scorer: Scorer,
    work: Path,
    stems: Sequence[str],
    metrics: Sequence[Metric],
) -> SongRecord:
    """Score the stems of one song that exist."""
    record = SongRecord(track.name, "ok", None, track.duration)
    own = found.files.get(track.name, {})
    scored = [stem for stem in stems if stem in track.available and stem in own]
    missing = [stem for stem in stems if stem in track.available and stem not in own]
    if not scored:
        return unplayed(track, f"no stem of it in {found.folder}")
    try:
        (work / "references").mkdir()
        (work / "estimates").mkdir()
        guesses = {stem: estimates.as_wav(found, track, stem, work / "estimates") for stem in scored}
        record = with_scores(record, _score(track, guesses, work / "references", scorer, metrics))
    except (KmdxError, OSError) as error:
        return record.failed(str(error))
    notes = [song_warnings.NO_ESTIMATE.of(stem=stem) for stem in missing]
    return replace(record, warnings=(*record.warnings, *notes))


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
    desk: Desk,
    scorer: Scorer,
    meter: Meter,
    stems: Sequence[str],
    metrics: Sequence[Metric],
) -> SongRecord:
    """Separate and score one song."""
    try:
        desk.predictions.clear()
    except OSError:  # something of the submission works against it
        submission.kill()
        try:
            desk.predictions.clear()
        except OSError as error:
            reason = f"the submission's predictions cannot be cleared: {error.strerror}"
            return replace(unplayed(track, reason), ends_challenge=True)
    try:
        begin = desk.lay_out(track)
    except (KmdxError, OSError) as error:
        return unplayed(track, f"its data: {error}")
    outcome = submission.separate(track.name, track.duration, meter.audio, begin)
    record = _measured(track, outcome, submission.limits)
    if outcome.failure is not None:
        return record
    try:
        # Before the true stems are decoded, and to where the submission cannot change them any more.
        scored = [stem for stem in stems if stem in track.available]
        taken = desk.predictions.take(track.name, scored, track.samples, track.channels, desk.taken)
        if ACCOMPANIMENT in scored and ACCOMPANIMENT not in taken:
            parts = [taken[stem] for stem in parts_of_accompaniment(taken)]
            taken[ACCOMPANIMENT] = estimates.sum_as_wav(parts, track, desk.taken / f"{ACCOMPANIMENT}.wav")
        guesses = {stem: taken[stem] for stem in scored}
        return with_scores(record, _score(track, guesses, desk.references, scorer, metrics))
    except KmdxError as error:
        reason = submission.explained(desk.without_paths(str(error)))
        return record.failed(reason, ends_challenge=True)
    except OSError as error:  # of this machine: a full disk, say
        return record.failed(f"it could not be scored: {error.strerror or error}")


def unplayed(track: Track, reason: str) -> SongRecord:
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
        song_warnings.PERFECT.of(metric=named([name])[0].title, stem=stem)
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
    remove_tree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        shutil.move(source, target)
