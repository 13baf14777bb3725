"""The process that scores: it survives kills and time limits."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import evaluation_cases
import pytest
from evaluation_cases import STEMS

from evaluator import metrics, scoring_process
from evaluator.metrics import Metric
from evaluator.scoring import MetricError
from evaluator.scoring_process import ScoringError, ScoringProcess
from kmdx.errors import KmdxError

data = evaluation_cases.data


def test_a_scoring_process_that_is_killed_is_started_again(data: Path) -> None:
    files = {stem: data / "test" / "c" / f"{stem}.wav" for stem in STEMS}
    with ScoringProcess() as scorer:
        first = scorer.score(files, files, metrics.choose(None))
        (process,) = scorer._pool._processes.values()
        process.kill()
        process.join()
        assert scorer.score(files, files, metrics.choose(None)) == first


def test_a_scoring_process_that_cannot_start_is_reported(monkeypatch) -> None:
    def broken() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=os._exit, initargs=(1,))

    monkeypatch.setattr(scoring_process, "_pool", broken)
    with pytest.raises(ScoringError, match="was killed twice"):
        ScoringProcess()


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


@pytest.mark.parametrize("size", [0, 3])
def test_a_metric_may_be_a_lambda_or_a_closure(data: Path, monkeypatch, size: int) -> None:
    def closure(reference: object, estimate: object) -> float:
        return size

    files = {"bass": data / "test" / "c" / "bass.wav"}
    entry = Metric("size", "Size", "", True, closure if size else lambda reference, estimate: 0)
    unknown = "size of bass cannot be computed: it is not in the table METRICS"
    with ScoringProcess() as scorer, pytest.raises(KmdxError, match=unknown):  # in the process's own table
        scorer.score(files, files, [entry])
    monkeypatch.setitem(metrics.METRICS, "size", entry)
    monkeypatch.setattr(scoring_process, "_pool", lambda: ThreadPoolExecutor(1))
    with ScoringProcess() as scorer:
        assert scorer.score(files, files, [entry]).scores == {"size": {"bass": size}}


def test_every_metric_of_the_table_has_a_value_of_every_stem(data: Path) -> None:
    song = data / "test" / "c"
    files = {stem: song / f"{stem}.wav" for stem in STEMS}
    with ScoringProcess() as scorer:
        scores = scorer.score(files, files, metrics.choose("all"), song / "mixture.wav").scores
    assert scores.keys() == metrics.METRICS.keys()
    assert all([*values] == [*STEMS] for values in scores.values())


class OnlyHere:
    """A function that the scoring process cannot unpickle."""

    def __call__(self, *_: object) -> float:
        return 1.0

    def __reduce__(self) -> tuple[object, ...]:
        return divides_by_zero, ()


def test_a_metric_that_cannot_be_unpickled_fails_and_the_next_song_is_scored(data: Path, capfd) -> None:
    files = {"bass": data / "test" / "c" / "bass.wav"}
    with ScoringProcess() as scorer:
        with pytest.raises(MetricError, match="only of bass cannot be computed: it is not in the table"):
            scorer.score(files, files, [Metric("only", "", "", True, OnlyHere())])
        assert scorer.score(files, files, metrics.choose(None)).scores
    assert "Traceback" not in capfd.readouterr().err


def divides_by_zero(*_: object) -> float:
    return 1 / 0


def has_no_text(*_: object) -> float:
    raise RuntimeError


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            Metric("ratio", "", "", True, divides_by_zero),
            "ratio of bass cannot be computed: ZeroDivisionError: division by zero",
        ),
        (Metric("ratio", "", "", True, has_no_text), "ratio of bass cannot be computed: RuntimeError"),
        (Metric("ratio", "", "", True, lambda *_: sys.exit(3)), "ratio of bass .*: SystemExit: 3"),
        (Metric("ratio", "", "", True, lambda *_: None), "ratio of bass .*: TypeError: "),
        (Metric("ratio", "", "", True, lambda *_: {"other": 1.0}), "ratio of bass .*: KeyError: 'ratio'"),
        (
            Metric("ratio", "", "", True, together=divides_by_zero, frames=True),
            "ratio of bass, drums .*: ZeroDivisionError: ",
        ),
        (
            Metric("ratio", "", "", True, together=lambda *_: {"bass": {"ratio": [1.0]}}, frames=True),
            "ratio of bass, drums .*: KeyError: 'drums'",
        ),
    ],
)
def test_a_metric_that_fails_is_named_with_its_stem(
    data: Path, monkeypatch, entry: Metric, message: str
) -> None:
    monkeypatch.setitem(metrics.METRICS, "ratio", entry)
    monkeypatch.setattr(scoring_process, "_pool", lambda: ThreadPoolExecutor(1))
    files = {stem: data / "test" / "c" / f"{stem}.wav" for stem in ("bass", "drums")}
    with ScoringProcess() as scorer, pytest.raises(MetricError, match=message) as caught:
        scorer.score(files, files, [entry])
    assert "\n" not in str(caught.value)
