"""Scores songs in a process apart from the evaluator's and from the submission's."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from evaluator.metrics import Metric
from evaluator.sandbox import die_with_parent
from evaluator.scoring import SongScore, score_song
from kmdx.errors import KmdxError

LIMIT = 3600.0  # seconds for a song, or LIMIT_FACTOR times its duration where that is more
LIMIT_FACTOR = 100.0


class ScoringError(KmdxError):
    """A song whose scoring did not come to an end."""


class Scorer:
    """One process that scores; use it with ``with``. It is started anew when the system killed it."""

    def __init__(self) -> None:
        self._pool = _pool()

    def __enter__(self) -> Scorer:
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

        Raises
        ------
        KmdxError
            If a file is unusable, it takes longer, or the process was killed twice.
        """
        for _ in range(2):
            try:
                return self._pool.submit(score_song, references, estimates, metrics, mixture).result(limit)
            except TimeoutError as error:
                for process in list(self._pool._processes.values()):  # shutdown would wait for it
                    process.kill()
                self._pool = _pool()
                raise ScoringError(f"scoring took more than {limit:.0f} s") from error
            except BrokenProcessPool:
                self._pool = _pool()
        raise ScoringError("the scoring process was killed twice: the system may be short of memory")


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)


def _start() -> None:
    """Leave Ctrl-C to the evaluator, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before this process could ask to be told
        os._exit(1)
