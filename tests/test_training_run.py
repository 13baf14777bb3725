"""Runs that are interrupted, moved or watched, and what stops them."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import training_cases as cases
from rich.console import Console

from training import sampling, trainer, validation
from training.config import TrainingError
from training.hardware import Hardware
from training.run import Run, checkpoint_size

data, fit = cases.data, cases.fit


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Make validations return these scores, and stop the run after the last one."""
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


def test_a_run_resumes_after_the_run_of_its_vocals_has_moved_too(
    fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocals = fit("vocals").folder
    rest: dict = {"hears": "rest", "source": "drums"}
    scripted(monkeypatch, 5.0)
    with pytest.raises(TrainingError, match="interrupted"):
        fit(rest={"vocals": str(vocals)}, **rest)
    vocals.rename(tmp_path / "singing")
    scripted(monkeypatch, 1.0, 2.0)
    run = fit(rest={"vocals": str(tmp_path / "singing")}, **rest)
    assert len(cases.rows(run.validation)) == 3
    assert run.config().rest.vocals == str(tmp_path / "singing")
    best = torch.load(tmp_path / "singing" / "checkpoints" / "best.ckpt", weights_only=True)
    torch.save({**best, "global_step": 99}, tmp_path / "singing" / "checkpoints" / "best.ckpt")
    with pytest.raises(TrainingError, match="the weights of the vocals network's run have changed"):
        fit(rest={"vocals": str(tmp_path / "singing")}, **rest)


@pytest.mark.parametrize("patience", [None, 1])
def test_a_score_that_is_not_finite_ends_the_run(
    patience: int | None, fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 5.0, float("nan"), 6.0)
    with pytest.raises(TrainingError, match="the score of song 0 is not finite at step 4"):
        fit(patience=patience)


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_progress_bar_every_epoch_prints_a_line(
    terminal: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200)
    config = cases.small(steps=8, validate_every=2)
    options: dict = {"decoded": tmp_path / "decoded", "hardware": cases.HERE}
    trainer.fit(config, [data], tmp_path / "run", console=console, **options)
    lines = re.findall(
        r"step (\d+) of 8: (SDR \S+ dB on 1 song, )?loss \S+, \d+:\d\d:\d\d left", written.getvalue()
    )
    assert [(int(step), bool(score)) for step, score in lines] == [
        (step, step % 4 == 0) for step in (2, 4, 6, 8) if not terminal or step % 4 == 0
    ]


@pytest.mark.parametrize("changes", [{}, {"average": None}, {"optimizer": {"kind": "rmsprop"}}])
def test_the_size_of_a_checkpoint_is_predicted(changes: dict, fit: Callable[..., Run]) -> None:
    run = fit(network={**cases.NETWORK, "growth": 32}, steps=2, **changes)
    network = trainer.trained(run)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    size = checkpoint_size(run.config(), parameters)
    assert run.last.stat().st_size == pytest.approx(size, rel=0.1)


def test_disk_space_is_required_only_for_files_not_yet_written(
    fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 5.0)
    with pytest.raises(TrainingError, match="interrupted"):
        fit()
    scripted(monkeypatch, 5.0, 6.0, 7.0)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, size))

    monkeypatch.setattr("training.run.MARGIN", 0)
    monkeypatch.setattr("training.run.checkpoint_size", lambda config, parameters: 10**6)
    held = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").iterdir())
    free(3 * 10**6 - held - 1)
    with pytest.raises(TrainingError, match="are free"):
        fit()
    free(3 * 10**6 - held)
    fit()
    free(0)
    fit()  # it has ended


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"workers": -1}, "--workers -1: expected 0 or more"),
        ({"batch": 4}, {"devices": 3}, r"batch must be a multiple of --devices \(3\), not 4"),
        (
            {"batch": 12, "at_once": 4},
            {"devices": 2},
            r"the batch per device must be a multiple of at_once \(4\), not 6",
        ),
    ],
)
def test_impossible_options_leave_nothing_behind(
    changes: dict, options: dict, message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer.fit(
            cases.small(**changes),
            [data],
            tmp_path / "run",
            console=Console(),
            hardware=Hardware("cpu", **options),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_reading_process_is_a_one_line_error(
    number: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getpid()

    def killed(*arguments: object) -> None:
        assert os.getpid() != own
        os.kill(os.getpid(), number)

    monkeypatch.setattr(sampling, "read", killed)
    options: dict = {"decoded": tmp_path / "decoded", "hardware": Hardware("cpu", workers=1)}
    with pytest.raises(
        TrainingError, match="was killed, probably for lack of memory or, in Docker, .*--shm-size"
    ):
        trainer.fit(cases.small(), [data], tmp_path / "run", console=Console(), **options)


def test_an_error_in_a_reading_process_is_not_reported_as_lack_of_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(sampling, "read", wrong)
    options: dict = {"decoded": tmp_path / "decoded", "hardware": Hardware("cpu", workers=1)}
    with pytest.raises(RuntimeError, match="a mistake"):
        trainer.fit(cases.small(), [data], tmp_path / "run", console=Console(), **options)


def test_only_one_process_works_on_a_run(fit: Callable[..., Run], tmp_path: Path) -> None:
    with (
        Run(tmp_path / "run").locked(),
        pytest.raises(TrainingError, match="another process is using this run"),
    ):
        fit()
