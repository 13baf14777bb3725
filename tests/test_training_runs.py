"""Runs that are interrupted, moved or watched, and what stops them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_training as cases
import torch

from training import validation
from training.config import TrainingError
from training.run import Run

data, fit = cases.data, cases.fit


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let validations say this, and stop the run where there is nothing more to say."""
    left: Iterator[float] = iter(scores)

    def score(*arguments: object) -> float:
        found = next(left, None)
        if found is None:
            raise TrainingError("interrupted")
        return found

    monkeypatch.setattr(validation, "score", score)


@pytest.mark.parametrize("name", ["run", "moved"])
def test_a_run_that_was_moved_keeps_its_best_checkpoint(
    name: str, fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 5.0)
    with pytest.raises(TrainingError, match="interrupted"):
        fit()
    (tmp_path / "run").rename(tmp_path / name)
    scripted(monkeypatch, 1.0, 2.0)
    run = fit(name)
    assert [float(row["sdr"]) for row in cases.rows(run.validation)] == [5, 1, 2]
    assert torch.load(run.best, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("patience", [None, 1])
def test_a_score_that_is_not_finite_ends_the_run(
    patience: int | None, fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 5.0, float("nan"), 6.0)
    with pytest.raises(TrainingError, match="the score of song 0 is not finite at step 4"):
        fit(patience=patience)
