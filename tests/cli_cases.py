"""Run ``kmdx`` in the tests' process, and read what it wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile

from kmdx import cli, manifest


class Result(NamedTuple):
    """The result of a run of the command."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``kmdx`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def kmdx(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["kmdx", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return kmdx


@pytest.fixture
def separate(run: Run, small: Path) -> Run:
    """Run ``kmdx separate`` with the small ensemble into ``out``."""
    return lambda *arguments: run("separate", *arguments, "--ensemble", small, "-o", "out", "--device", "cpu")


def write(path: Path, samples: np.ndarray, rate: int = 44100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


def files_in(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if manifest.FOLDER not in path.parts)
