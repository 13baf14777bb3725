"""Evaluates a submission on a cluster: each worker runs it on one song at a time.

A worker has a whole GPU, or a whole machine without GPUs, so that times stay honest. It separates and scores
a song as :mod:`evaluator.protocol` does on one machine; only this process writes the records.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from evaluator import protocol
from evaluator.dataset import Track
from evaluator.process import SubmissionError
from evaluator.protocol import Evaluation, Setup, SubmissionRun, Task
from evaluator.records import SongRecord
from evaluator.run_folder import RunError, RunFolder
from evaluator.scoring_process import ScoringProcess
from kmdx import cluster_console, weights
from kmdx.cluster import ClusterError, ClusterOptions, Finished, Pool, Progress
from kmdx.plan import Plan
from kmdx.weights import Weight

AT_ONCE = 1  # songs of a worker


@dataclass(frozen=True)
class Answer:
    """What a worker found out about a song."""

    record: SongRecord | None
    """None if the submission could not be started."""
    process: dict[str, Any]
    """What :meth:`evaluator.process.Submission.describe` returned."""
    identity: dict[str, Any] | None
    """That of the submission's interpreter, if it started."""


@dataclass(frozen=True)
class _MakeWorker:
    """Makes a worker in its process."""

    task: Task
    folder: Path  # the run's folder
    setup: Setup
    weights: tuple[Weight, ...]

    def __call__(self) -> Callable[[Track, Progress], Answer]:
        weights.pull_missing(self.weights)  # a submission cannot reach the network
        return _Worker(self).answer


class _Worker:
    """Runs a submission in the process of a worker."""

    def __init__(self, made: _MakeWorker) -> None:
        log = made.folder / f"submission.{socket.gethostname()}.{os.getpid()}.log"
        run = Evaluation(made.task, RunFolder(made.folder), ScoringProcess())
        start = partial(made.setup.start, log=log)
        self._separating = SubmissionRun(run, start, made.setup.keep_stems)

    def answer(self, track: Track, progress: Progress) -> Answer:
        """Separate and score a song."""
        submission = self._separating.submission
        record, failure = None, None
        try:
            record = self._separating.record(track, progress)
        except SubmissionError as error:
            failure = str(error)
        interpreter = submission.interpreter
        identity = None if interpreter is None else interpreter.identity()
        return Answer(record, submission.describe(failure), identity)


def evaluate(
    task: Task,
    folder: RunFolder,
    unusable: Mapping[str, str],
    setup: Setup,
    plan: Plan | None,
    options: ClusterOptions,
    progress: protocol.Progress,
    on_answer: Callable[[Mapping[str, Any]], None],
) -> Iterator[SongRecord]:
    """Yield each song's record: the saved ones, then new ones as they arrive.

    Parameters
    ----------
    task : Task
    folder : RunFolder
    unusable : mapping
        Songs whose data cannot be scored, and why.
    setup : Setup
        The data, the run's folder and everything that the submission needs are absolute paths that every
        node must see.
    plan : Plan, optional
        That of this package's own submission; a worker pulls its weights if its machine lacks them.
    options : ClusterOptions
    progress : Progress
    on_answer : callable
        Called with a description of the submission's process after each song.

    Raises
    ------
    Stopped
        In a strict run, at the first failure that would end the challenge.
    SubmissionError
        If a worker cannot start the submission.
    ClusterError
        If no node can be used, or a node's interpreter differs from that of earlier songs.
    """
    protocol.remove_leftovers(folder)

    def done(track: Track, record: SongRecord) -> SongRecord:
        progress.song(track)
        protocol.save(folder, record, task.metrics[0])
        progress.finished(track, record)
        return record

    try:
        left: list[Track] = []
        for track in task.songs:
            if record := protocol.load_record(folder, track.name):
                progress.finished(track, record)
                yield record
            elif track.name in unusable:
                yield done(track, protocol.failed_record(track, f"data problem: {unusable[track.name]}"))
            else:
                left.append(track)
        if not left:
            return
        used = [use.weight for use in plan.networks.values()] if plan else []
        make = _MakeWorker(replace(task, songs=()), folder.path, setup, tuple(used))
        needed = [task.data, *_needed(setup)]
        pool: Pool[Track, Answer] = Pool(left, make, folder.path, needed, options, AT_ONCE)
        for finished in cluster_console.run(pool, _name, _seconds):
            track = left[finished.number]
            record = done(track, record_of(finished, track, folder, on_answer))
            yield record
            protocol.stop_if_strict(record, setup.strict)
    finally:
        protocol.remove_leftovers(folder)


def _needed(setup: Setup) -> list[Path]:
    """Files and folders of a submission that every node must see."""
    options = setup.options
    plan = [Path(options.ensemble)] if options.ensemble and Path(options.ensemble).is_absolute() else []
    python = [options.python] if options.python is not None else []
    return [setup.submission, *python, *plan, *options.readable]


def _name(track: Track) -> str:
    return track.name


def _seconds(answer: Answer) -> float:
    return answer.record.duration if answer.record else 0.0


def record_of(
    finished: Finished[Track, Answer],
    track: Track,
    folder: RunFolder,
    on_answer: Callable[[Mapping[str, Any]], None],
) -> SongRecord:
    """The record of a finished task."""
    answer = finished.value
    if answer is None:
        record = protocol.failed_record(track, str(finished.failure))
    else:
        on_answer(answer.process)
        if answer.record is None:
            raise SubmissionError(f"{finished.node}: {answer.process['failure']}")
        record = answer.record
        if answer.identity is not None:
            try:
                folder.record_interpreter(answer.identity)
            except RunError as error:
                raise ClusterError(f"{finished.node} differs from earlier nodes: {error}") from error
    return replace(record, node=finished.node, warnings=(*record.warnings, *finished.warnings))
