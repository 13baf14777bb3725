"""The training command reports mistakes in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from training import command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing", "--data", "x", "-o", "y"], "unknown config 'nothing'"),
        (
            ["run", "vocals", "--data", "nowhere", "-o", "y", "--set", "precision=fp32"],
            "nowhere: no such folder",
        ),
        (["run", "vocals", "--data", "x", "-o", "y", "--set", "batch"], "--set batch: expected KEY=VALUE"),
        (
            ["run", "vocals", "--data", "x", "-o", "y", "--set", "batch=many"],
            "batch: input should be a valid integer",
        ),
        (
            ["run", "vocals", "--data", "x", "-o", "y", "--device", "tpu"],
            "device 'tpu': expected auto, cpu or cuda",
        ),
        (
            ["run", "vocals", "--data", "x", "-o", "y", "--device", "cuda", "--devices", "99"],
            "--devices 99: this machine has",
        ),
        (["run", "drums", "--data", "x", "-o", "y", "--device", "cpu"], "precision fp16 needs a GPU"),
        (["export", "nowhere"], "nowhere: not a training run"),
        (["report", "nowhere"], "nowhere: not a training run"),
    ],
)
def test_mistakes_are_one_line_errors(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
