"""Three short songs, and the evaluator's command run on them in the tests' process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import soundfile
import submissions
from conftest import noise
from in_process import Result

from evaluator import command

ROOT = Path(__file__).parents[1]
STEMS = ("bass", "drums", "other", "vocals")
NAMES = ("A – één", "b & <b>", "c")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three songs of a second in MUSDB18-HQ's layout, the second with a silent stem."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(NAMES):
        song = folder / "test" / name
        song.mkdir(parents=True)
        stems = {stem: noise(44_100 + 100 * seed, seed=10 * seed + index) for index, stem in enumerate(STEMS)}
        if seed == 1:
            stems["bass"][:] = 0
        stems = {stem: np.round(samples * 32767) / 32768 for stem, samples in stems.items()}
        for stem, samples in {**stems, "mixture": sum(stems.values())}.items():
            soundfile.write(song / f"{stem}.wav", samples, 44100)
    return folder


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run the command in this process into ``tmp_path / "run"``, with a submission that does one thing."""

    def evaluate(
        *options: object, what: str = "works", output: Path = tmp_path / "run", data: Path = data
    ) -> Result:
        folder = tmp_path / what
        if not folder.exists():
            submissions.write(folder, what)
        arguments = [data, "-o", output, "--submission", folder, "--time-limit-factor", 60, *options]
        return in_process.run(capsys, command.main, "local_evaluation.py", *arguments)

    return evaluate


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text("utf-8"))


def scores(run: Path) -> list[dict[str, Any]]:
    """Songs' records without what differs from run to run: times and peaks."""
    keys = (
        "song",
        "status",
        "reason",
        "scores",
        "means",
        "frames",
        "envelopes",
    )
    return [{key: record.get(key) for key in keys} for record in results(run)["songs"]]
