"""Submissions that are started in a process of their own, for tests of that process."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile
import submissions
from conftest import noise

from evaluator.process import Limits, Submission

SECONDS = 0.5
EXIT = 93 if platform.machine() == "aarch64" else 60
"""Number of the system call that ends one thread."""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are Linux's")
SHARES = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="Linux reports what is shared"
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Submission]]:
    """Make a submission that does one thing, with two songs to separate."""
    for name in ("one", "zwei Ö"):
        (tmp_path / "dataset" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "dataset" / name / "mixture.wav", noise(int(SECONDS * 44100)), 44100)
    (tmp_path / "shared" / "predictions").mkdir(parents=True)
    made: list[Submission] = []

    def start(what: str, limits: Limits = Limits(time_factor=60), load: str = "") -> Submission:  # noqa: B008
        folder = submissions.write(tmp_path / "submission", what, load)
        submission = Submission(folder, tmp_path / "dataset", tmp_path / "shared", limits, tmp_path / "log")
        made.append(submission)
        return submission

    yield start
    for submission in made:
        submission.kill()
