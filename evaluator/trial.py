"""Separates one song with the committed files of a submission, as AIcrowd's server does.

The submission runs offline, as another user, with an empty home folder and read-only files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import soundfile

from evaluator.predictions import PredictionError
from evaluator.process import Interpreter, Limits, Outcome, Submission, SubmissionError, SubmissionOptions
from evaluator.protocol import Workspace
from evaluator.repository import Repository, RepositoryError
from kmdx import files, synthetic
from kmdx.challenge import CHANNELS, MEMORY, RATE, STEMS
from kmdx.files import remove_tree

USER = 1001
"""Id of the user in the submission's image."""
SONG = "Ünï cödé - a song's name"
FOLDER = "kmdx-check"
"""Name of the temporary folder in git's own folder: on the same disk as the weights, and never committed."""
LOG = "kmdx-check.log"
"""Name of the file in git's own folder with what the submission printed."""


@dataclass(frozen=True)
class Trial:
    """What happened to the song."""

    failure: str | None  # why it failed
    seconds: float = 0.0  # wall time of the song
    load_seconds: float = 0.0  # wall time of loading the model
    peak_memory: int = 0  # peak host memory in bytes, of loading or of the song
    returned_true: bool = True  # whether the wrapper returned True
    interpreter: Interpreter | None = None  # None if it did not start
    isolation: tuple[str, ...] = ()  # what the sandbox could not prevent
    log_tail: tuple[str, ...] = ()  # the last lines that the submission printed


def run(
    repository: Repository,
    seconds: float,
    python: Path | None = None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Trial:
    """Separate a synthetic song with the submission in the current commit.

    Host memory and the time for loading are limited as in the challenge. The time of the song is only
    measured, because the challenge's limit is for its own machine.

    Parameters
    ----------
    repository : Repository
    seconds : float
        Duration of the song.
    python : Path, optional
        The interpreter that runs the submission; by default this one.
    progress : callable
        Called with the seconds of audio done and in total, if the submission reports them.

    Raises
    ------
    RepositoryError
        If the commit cannot be exported, or another process checks this repository.
    """
    work = repository.private / FOLDER
    try:
        with files.locked(work.with_name(f"{FOLDER}.lock")):
            remove_tree(work)
            try:
                return _run(repository, seconds, python, progress, work)
            finally:
                remove_tree(work)
    except files.Locked as error:
        raise RepositoryError("another process checks this submission; wait until it ends") from error


def _run(
    repository: Repository,
    seconds: float,
    python: Path | None,
    progress: Callable[[float, float], None],
    work: Path,
) -> Trial:
    folder = work / "submission"
    folder.mkdir(parents=True)
    repository.export(folder)
    (work / "run").mkdir()
    workspace = Workspace(work / "run")
    mixture = synthetic.song(seconds, RATE)
    (workspace.dataset / SONG).mkdir()
    soundfile.write(workspace.dataset / SONG / "mixture.wav", mixture, RATE)
    for path in (folder, *folder.rglob("*"), *workspace.dataset.rglob("*")):  # as a clone has them
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    limits = Limits(memory=MEMORY, time_factor=math.inf, enforced=True)
    options = SubmissionOptions(python=python, user=USER)
    log = repository.private / LOG
    log.unlink(missing_ok=True)
    with Submission(folder, workspace.dataset, workspace.shared, limits, log, options) as submission:
        try:
            outcome = submission.separate(SONG, seconds, progress)
        except SubmissionError as error:
            failure = str(error).replace(f"{folder}", ".")
            return _trial(submission, Outcome(0, 0, failure=failure))
        if outcome.failure is not None:
            return _trial(submission, outcome)
        try:
            stems = workspace.predictions.copy(SONG, STEMS, len(mixture), CHANNELS, workspace.stems)
        except PredictionError as error:
            return _trial(submission, outcome, str(error))
        return _trial(submission, outcome, _wrong_stem(stems, len(mixture)))


def _trial(submission: Submission, outcome: Outcome, failure: str | None = None) -> Trial:
    failure = failure or outcome.failure
    return Trial(
        failure and failure.replace(LOG, str(submission.log)),
        outcome.seconds,
        submission.load_seconds,
        max(outcome.peak_memory, submission.load_peak_memory),
        outcome.returned_true,
        submission.interpreter,
        tuple(submission.isolation),
        tuple(submission.log_tail(5)),
    )


def _wrong_stem(stems: Mapping[str, Path], samples: int) -> str | None:
    """What is wrong with the stems that a submission wrote; None if nothing is."""
    for stem, path in stems.items():
        try:
            found = soundfile.info(path)
        except soundfile.SoundFileError as error:
            return f"{stem}.wav is not a sound file: {error}"
        sizes = (found.frames, found.channels, found.samplerate)
        if sizes != (samples, CHANNELS, RATE):
            return (
                f"{stem}.wav has {sizes[0]} samples of {sizes[1]} channels at {sizes[2]} Hz, expected "
                f"{samples} of {CHANNELS} at {RATE} Hz"
            )
    return None
