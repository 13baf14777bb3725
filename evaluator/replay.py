"""Replays the hidden-set protocol: song by song through the submission, scored in another process."""

from __future__ import annotations

import logging
import math
import secrets
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from evaluator import metrics
from evaluator.dataset import STEMS, Track, as_wav
from evaluator.predictions import PREDICTIONS, Predictions
from evaluator.process import Limits, Outcome, Submission
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
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=store.folder))
    try:
        desk = Desk(work)
        with make(desk.dataset, desk.shared) as submission:
            for track in tracks:
                record = store.record(track.name)
                if record is None:
                    meter.song(track)
                    reason = (unusable or {}).get(track.name)
                    if reason is None:
                        record = _play(track, submission, desk, scorer, meter)
                    else:
                        record = _failed(track, f"its data: {reason}")
                    record |= {
                        "network": submission.network,
                        "isolation": list(submission.isolation),
                        "load_seconds": submission.load_seconds,
                        "load_peak_memory": submission.load_peak_memory,
                    }
                    if keep_stems and record["status"] == "ok":
                        _keep(desk.taken, predictions / track.name)
                    store.add(record)
                    logger.info("%s: %s", track.name, record["reason"] or f"{record['song_sdr']:.3f} dB")
                meter.finished(track, record)
                yield record
                if strict and record["ends_challenge"]:
                    raise Stopped(f"{track.name}: {record['reason']}; the challenge would have ended here")
    finally:
        shutil.rmtree(work, ignore_errors=True)


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

    def clear(self) -> None:
        """Remove everything of the last song."""
        self.predictions.clear()
        shutil.rmtree(self._next, ignore_errors=True)
        for folder in (self.taken, self.references):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for song in self.dataset.iterdir():  # the folder itself is what the submission sees
            shutil.rmtree(song, ignore_errors=True)


def _play(track: Track, submission: Submission, desk: Desk, scorer: Scorer, meter: Meter) -> Record:
    """Separate and score one song."""
    try:
        show = desk.lay_out(track)
    except (KmdxError, OSError) as error:
        return _failed(track, f"its data: {error}")
    outcome = submission.separate(track.name, track.duration, meter.audio, show)
    record = _measured(track, outcome, submission.limits)
    if outcome.failure is not None:
        return record
    try:
        # Before the true stems are decoded, and to where the submission cannot change them any more.
        estimates = desk.predictions.take(track.name, STEMS, track.samples, track.channels, desk.taken)
        references = {stem: as_wav(track, stem, desk.references) for stem in STEMS}
        return record | _scored(scorer.score(references, estimates))
    except KmdxError as error:
        return record | {"status": "failed", "reason": str(error), "ends_challenge": True}


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
