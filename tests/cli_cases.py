"""Run ``kmdx`` in the tests' process, and read what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import in_process
import numpy as np
import pytest
import soundfile
from in_process import Result

from kmdx import cli, manifest

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``kmdx`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: in_process.run(capsys, cli.main, "kmdx", *arguments)


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
