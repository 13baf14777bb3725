"""Scores songs in a process of its own, separate from the evaluator and the submission."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from evaluator.metrics import Metric, named
from evaluator.sandbox import die_with_parent
from evaluator.scoring import SongScore, score_song
from kmdx.errors import KmdxError

LIMIT = 3600.0  # seconds for a song, or LIMIT_FACTOR times its duration if that is longer
LIMIT_FACTOR = 100.0
T = TypeVar("T")


class ScoringError(KmdxError):
    """Scoring a song did not finish."""


class ScoringProcess:
    """One process that scores; use it with ``with``. It is restarted if the system kills it."""

    def __init__(self) -> None:
        self._pool = _pool()
        self._run(LIMIT, os.getpid)  # starts its threads now: a submission may use up all later ones

    def __enter__(self) -> ScoringProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def score(
        self,
        references: Mapping[str, Path],
        estimates: Mapping[str, Path],
        metrics: Sequence[Metric],
        mixture: Path | None = None,
        limit: float = LIMIT,
    ) -> SongScore:
        """Score a song's files within ``limit`` seconds; see :func:`evaluator.scoring.score_song`.

        A metric that cannot be pickled or unpickled is looked up in the process's own table.

        Raises
        ------
        KmdxError
            If a file is unusable, a metric fails, scoring takes longer, or the process cannot be started or
            was killed twice.
        """
        sent = [(metric.name, _pickled(metric)) for metric in metrics]
        return self._run(limit, _score, references, estimates, sent, mixture)

    def _run(self, limit: float, work: Callable[..., T], *arguments: Any) -> T:
        cause: Exception | None = None
        for _ in range(2):
            try:
                return self._submit(work, *arguments).result(limit)
            except TimeoutError as error:
                for process in list(self._pool._processes.values()):  # shutdown would wait for it
                    process.kill()
                self._pool = _pool()
                raise ScoringError(f"scoring took more than {limit:.0f} s") from error
            except BrokenProcessPool as error:
                self._pool, cause = _pool(), error
        raise ScoringError("the scoring process was killed twice: the system may be out of memory") from cause

    def _submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        try:
            return self._pool.submit(work, *arguments)
        except BrokenProcessPool:
            raise
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            self._pool = _pool()  # the old one is only partly started
            raise ScoringError(f"the scoring process cannot be started: {error}") from error


def _score(
    references: Mapping[str, Path],
    estimates: Mapping[str, Path],
    sent: Sequence[tuple[str, bytes]],
    mixture: Path | None,
) -> SongScore:
    metrics = [_unpickled(name, content) for name, content in sent]
    return score_song(references, estimates, metrics, mixture)


def _pickled(metric: Metric) -> bytes:
    """The pickled metric; empty if it cannot be pickled."""
    try:
        return pickle.dumps(metric)
    except Exception:  # of any class, depending on the function
        return b""


def _unpickled(name: str, content: bytes) -> Metric:
    """The pickled metric, or the one with this name in the table if it cannot be unpickled here."""
    try:
        metric: Metric = pickle.loads(content)
    except Exception:
        return named([name])[0]
    return metric


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)


def _start() -> None:
    """Let the evaluator handle Ctrl-C, and die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before this process asked for the signal
        os._exit(1)
