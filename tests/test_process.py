"""A submission's process: what it says, what it takes, how it ends."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import soundfile
import submissions
from conftest import noise

from evaluator.process import Limits, Submission, SubmissionError

SECONDS = 0.5
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")


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


def test_songs_become_files_and_the_model_is_made_once(start, tmp_path: Path) -> None:
    submission = start("works")
    for name in ("one", "zwei Ö"):
        outcome = submission.separate(name, SECONDS)
        assert outcome.failure is None
        assert 0 < outcome.seconds < 30
        assert 10**7 < outcome.peak_memory < 10**9
        assert outcome.peak_gpu_memory is None
        assert len(list((tmp_path / "shared" / "predictions" / name).glob("*.wav"))) == 4
    assert (tmp_path / "log").read_text().count("made") == 1, "what it prints is in the log"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raises", "RuntimeError: out of ideas"),
        ("returns NaN", "NaN in drums"),
        ("returns three stems", "wrong stems: bass is missing; KeyError"),
        ("returns a wrong length", "wrong length: other has 22049 samples, the mixture 22050"),
        ("exits", "SystemExit: 3"),
        ("crashes", "the process ended by itself (SIGABRT)"),
    ],
)
def test_failures_are_what_they_are_and_the_next_song_is_separated_all_the_same(
    start, what: str, reason: str
) -> None:
    submission = start(what)
    for name in ("one", "zwei Ö"):
        failure = submission.separate(name, SECONDS).failure
        assert failure is not None
        assert failure.startswith(reason)


@pytest.mark.parametrize("what", ["sleeps", "loops in native code"])
def test_a_song_over_its_time_is_killed_hard(start, what: str) -> None:
    submission = start(what, Limits(time_factor=2, enforced=True))
    submission.start()
    process = psutil.Process(submission._process.pid)
    began = time.perf_counter()
    outcome = submission.separate("one", SECONDS)
    assert outcome.failure == "time limit: more than 2 × 0.5 s"
    assert 1.0 <= outcome.seconds < 4
    assert time.perf_counter() - began < 8
    assert not process.is_running()


def test_a_song_over_its_memory_is_killed_and_says_so(start) -> None:
    outcome = start("takes memory", Limits(60, memory=5 * 10**8, enforced=True)).separate("one", SECONDS)
    assert outcome.failure == "memory limit: more than 0.5 GB of host memory"
    assert outcome.peak_memory > 5 * 10**8
    assert outcome.seconds < 5


def test_memory_is_measured_where_nothing_is_enforced(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOARD", str(3 * 10**8))
    monkeypatch.setitem(submissions.BODIES, "takes memory", "x = np.ones(3 * 10**8 // 8)\ndel x")
    submission = start("takes memory", Limits(60, memory=10**8))
    outcome = submission.separate("one", SECONDS)
    assert outcome.failure is None
    assert outcome.peak_memory > 3 * 10**8, "also a peak between two looks"


@LINUX
def test_the_network_is_cut(start, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PORT", str(server.getsockname()[1]))
        submission = start("opens a socket")
        outcome = submission.separate("one", SECONDS)
        if submission.network != "cut":
            pytest.skip(f"this system does not let it be cut: {submission.network}")
        assert outcome.failure is not None
        assert "Network is unreachable" in outcome.failure


@pytest.mark.parametrize(
    ("what", "load", "reason"),
    [
        ("works", "raise ValueError('no weights')", "ValueError: no weights"),
        ("works", "os._exit(7)", "the process ended by itself (exit code 7)"),
    ],
)
def test_a_model_that_cannot_be_made_ends_the_run(start, what: str, load: str, reason: str) -> None:
    with pytest.raises(SubmissionError) as caught:
        start(what, load=load).separate("one", SECONDS)
    assert reason in str(caught.value)


def test_a_model_that_takes_too_long_to_make(start) -> None:
    with pytest.raises(SubmissionError, match="loading the model took more than 1 s"):
        start("works", Limits(enforced=True, load_seconds=1), load="time.sleep(60)").start()


def test_settings_are_for_submissions_that_have_them(start) -> None:
    submission = start("works")
    submission.options["ensemble"] = "htdemucs"
    with pytest.raises(SubmissionError, match="user_config.py has no ENSEMBLE"):
        submission.start()


def test_no_process_outlives_its_parent(start, tmp_path: Path) -> None:
    import subprocess

    folder = submissions.write(tmp_path / "other", "sleeps")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom evaluator.process import Limits, Submission\n"
        f"here = Path({str(tmp_path)!r})\n"
        f"s = Submission(Path({str(folder)!r}), here / 'dataset', here / 'shared', Limits(), here / 'log')\n"
        "s.start()\nprint(s._process.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone
    assert not alive
