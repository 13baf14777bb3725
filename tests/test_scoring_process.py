"""The process that scores: it survives kills and time limits."""

from __future__ import annotations

from pathlib import Path

import evaluation_cases
import pytest
from evaluation_cases import STEMS

from evaluator import metrics
from evaluator.scoring_process import ScoringError, ScoringProcess

data = evaluation_cases.data


def test_a_scoring_process_that_is_killed_is_started_again(data: Path) -> None:
    files = {stem: data / "test" / "c" / f"{stem}.wav" for stem in STEMS}
    with ScoringProcess() as scorer:
        first = scorer.score(files, files, metrics.choose(None))
        (process,) = scorer._pool._processes.values()
        process.kill()
        process.join()
        assert scorer.score(files, files, metrics.choose(None)) == first


def test_scoring_that_takes_too_long_is_ended_and_the_next_song_is_scored(data: Path) -> None:
    files = {stem: data / "test" / "c" / f"{stem}.wav" for stem in STEMS}
    with ScoringProcess() as scorer:
        first = scorer.score(files, files, metrics.choose(None))
        (process,) = scorer._pool._processes.values()
        with pytest.raises(ScoringError, match="scoring took more than 0 s"):
            scorer.score(files, files, metrics.choose(None), limit=0)
        process.join()
        assert process.exitcode != 0
        assert scorer.score(files, files, metrics.choose(None)) == first
