"""Replays the hidden-set protocol: song by song through the submission, scored in another process."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from evaluator import metrics
from evaluator.dataset import STEMS, Track, as_wav
from evaluator.process import Limits, Outcome, Submission, SubmissionError
from evaluator.scorer import Scorer
from evaluator.store import Store
from kmdx.errors import KmdxError

logger = logging.getLogger("evaluator")

Record = dict[str, Any]


class Meter(Protocol):
    """What is told of a run's progress."""

    def song(self, track: Track) -> None:
        """A song begins."""

    def audio(self, done: float, total: float) -> None:
        """So many seconds of the song are done, of so many."""

    def finished(self, track: Track, record: Record) -> None:
        """A song is done, or was done before."""


class Stopped(KmdxError):
    """A strict run that ended where the challenge would have."""


def replay(
    tracks: Sequence[Track],
    store: Store,
    make: Callable[[Path, Path], Submission],
    scorer: Scorer,
    meter: Meter,
    *,
    unusable: Mapping[str, str] | None = None,
    strict: bool = False,
    keep_stems: bool = False,
) -> Iterator[Record]:
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
                record = store.record(track.name)
                if record is None:
                    meter.song(track)
                    reason = (unusable or {}).get(track.name)
                    if reason is None:
                        record = _play(track, submission, dataset, shared / "predictions", scorer, meter)
                    else:
                        record = _failed(track, f"its data: {reason}")
                    record |= {
                        "network": submission.network,
                        "load_seconds": submission.load_seconds,
                        "load_peak_memory": submission.load_peak_memory,
                    }
                    if keep_stems and record["status"] == "ok":
                        _keep(shared / "predictions" / track.name, predictions / track.name)
                    store.add(record)
                    shutil.rmtree(shared / "predictions" / track.name, ignore_errors=True)
                    logger.info("%s: %s", track.name, record["reason"] or f"{record['song_sdr']:.3f} dB")
                meter.finished(track, record)
                yield record
                if strict and record["ends_challenge"]:
                    raise Stopped(f"{track.name}: {record['reason']}; the challenge would have ended here")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _play(
    track: Track, submission: Submission, dataset: Path, predictions: Path, scorer: Scorer, meter: Meter
) -> Record:
    """Separate and score one song."""
    song = dataset / track.name
    try:
        song.mkdir()
        mixture = as_wav(track, "mixture", song)
        if mixture != song / "mixture.wav":
            shutil.copyfile(mixture, song / "mixture.wav")
    except (KmdxError, OSError) as error:
        shutil.rmtree(song, ignore_errors=True)
        return _failed(track, f"its data: {error}")
    try:
        outcome = submission.separate(track.name, track.duration, meter.audio)
        record = _measured(track, outcome, submission.limits)
        if outcome.failure is None:
            references = {stem: as_wav(track, stem, song) for stem in STEMS}
            estimates = {stem: predictions / track.name / f"{stem}.wav" for stem in STEMS}
            record |= _scored(scorer.score(references, estimates))
        return record
    except SubmissionError:
        raise
    except KmdxError as error:
        return record | {"status": "failed", "reason": str(error), "ends_challenge": True}
    finally:
        shutil.rmtree(song, ignore_errors=True)


def _failed(track: Track, reason: str) -> Record:
    """The record of a song that was not played."""
    return {
        "song": track.name,
        "status": "failed",
        "reason": reason,
        "duration": track.duration if track.rate else 0.0,
        "seconds": None,
        "real_time_factor": None,
        "peak_memory": None,
        "peak_gpu_memory": None,
        "over_time": False,
        "over_memory": False,
        "ends_challenge": False,
        "warnings": [],
    }


def _measured(track: Track, outcome: Outcome, limits: Limits) -> Record:
    """The record of a song before it is scored."""
    factor = outcome.seconds / track.duration
    return {
        **_failed(track, ""),
        "status": "ok" if outcome.failure is None else "failed",
        "reason": outcome.failure,
        "seconds": outcome.seconds,
        "real_time_factor": factor,
        "peak_memory": outcome.peak_memory,
        "peak_gpu_memory": outcome.peak_gpu_memory,
        "over_time": factor > limits.time_factor,
        "over_memory": outcome.peak_memory > limits.memory,
        "ends_challenge": outcome.ends_challenge,
    }


def _scored(score: metrics.SongScore) -> Record:
    """What scoring adds to a record; JSON has no NaN and no infinity, so they become null."""
    frames = {stem: [_number(value) for value in values] for stem, values in score.museval_frames.items()}
    perfect = [stem for stem, value in score.museval_sdr.items() if value == math.inf]
    warnings = [f"museval SDR of {stem} is infinite: a perfect estimate" for stem in perfect]
    return {
        "global_sdr": dict(score.global_sdr),
        "song_sdr": statistics.fmean(score.global_sdr[stem] for stem in STEMS),
        "museval_sdr": {stem: _number(value) for stem, value in score.museval_sdr.items()},
        "museval_frames": frames,
        "silent_references": list(score.silent_references),
        "envelopes": score.envelopes,
        "warnings": [*warnings, *score.warnings],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _keep(source: Path, target: Path) -> None:
    """Move a song's predictions to where they stay."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        shutil.move(source, target)
