"""A submission's process: its replies, its resources, and its end."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import process_cases
import psutil
import pytest
import submissions
import torch
from conftest import noise
from process_cases import LINUX, SECONDS

from evaluator import submission_worker
from evaluator.process import Limits, SubmissionError, check_submission

start = process_cases.start
EVERYTHING = ["mount", "PID", "network", "IPC", "UTS", "user", "Landlock"]
"""Every kind of isolation that a system may not allow."""


def test_songs_become_files_and_the_model_is_made_once(start, tmp_path: Path) -> None:
    submission = start("works")
    for name in ("one", "zwei Ö"):
        outcome = submission.separate(name, SECONDS)
        assert outcome.failure is None
        assert outcome.seconds > 0
        assert 10**7 < outcome.peak_memory < 10**9
        assert outcome.peak_gpu_memory is None
        assert len(list((tmp_path / "shared" / "predictions" / name).glob("*.wav"))) == 4
    assert (tmp_path / "log").read_text().count("made") == 1, "what it prints is in the log"


def test_a_submission_may_print_anything(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setitem(submissions.BODIES, "prints", "print('a → \\udcff', flush=True)")
    assert start("prints").separate("one", SECONDS).failure is None
    assert "a → \\udcff" in (tmp_path / "log").read_text("utf-8")


@pytest.mark.parametrize(
    ("what", "reason", "ends", "made"),
    [
        ("raises", "RuntimeError: out of ideas", True, 2),
        ("returns NaN", "NaN in drums", False, 1),
        ("returns infinity", "infinity in drums; NaN in vocals", False, 1),
        ("returns lists", "NaN in drums", False, 1),
        ("returns three stems", "wrong stems: bass is missing; KeyError", True, 2),
        ("returns a wrong length", "wrong length: other has 22049 samples, the mixture 22050", True, 1),
        ("exits", "SystemExit: 3", True, 2),
        ("crashes", "the process exited unexpectedly (SIGABRT)", True, 2),
    ],
)
def test_failures_are_reported_and_the_model_is_loaded_again_after_an_exception(
    start, tmp_path: Path, what: str, reason: str, ends: bool, made: int
) -> None:
    submission = start(what)
    for name in ("one", "zwei Ö"):
        outcome = submission.separate(name, SECONDS)
        assert outcome.failure is not None
        assert outcome.failure.startswith(reason)
        assert outcome.ends_challenge is ends
    assert (tmp_path / "log").read_text().count("made") == made


@pytest.mark.parametrize("what", ["sleeps", "loops in native code"])
def test_a_song_over_the_time_limit_is_killed(start, what: str) -> None:
    submission = start(what, Limits(time_factor=2, enforced=True))
    submission.start()
    running = submission._running.all()
    assert len(running) >= 3, "the launcher, the guard and the submission"
    outcome = submission.separate("one", SECONDS)
    place = "my_submission/user_config.py"
    assert outcome.failure.startswith(f"time limit: more than 2 × 0.5 s (it was at {place}:")
    assert 1.0 <= outcome.seconds < 300, "by itself it would go on for longer"
    assert not any(each.is_running() for each in running)


def test_a_device_is_known_even_if_torch_is_imported_late(start, tmp_path: Path) -> None:
    submission = start("imports late")
    torch = "class cuda:\n    is_available = staticmethod(lambda: True)\n    get_device_name = staticmethod(lambda _: 'a GPU')\n"
    (tmp_path / "submission" / "torch.py").write_text(torch)
    devices = [
        (submission.separate(name, SECONDS), submission.interpreter.device)[1] for name in ("one", "zwei Ö")
    ]
    assert devices == [None, "a GPU"]


def test_a_device_that_changes_fails_the_song(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(submissions.BODIES, "changes", "import torch\ntorch.number = self.count")
    submission = start("changes")
    torch = "number = 0\nclass cuda:\n    is_available = staticmethod(lambda: True)\n    get_device_name = staticmethod(lambda _: f'GPU {number}')\n"
    (tmp_path / "submission" / "torch.py").write_text(torch)
    assert submission.separate("one", SECONDS).failure is None
    outcome = submission.separate("zwei Ö", SECONDS)
    assert outcome.failure == "its device changed from GPU 1 to GPU 2"
    assert submission.interpreter.device == "GPU 1"


@LINUX
def test_a_submission_has_no_network(start, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("KMDX_PORT", str(server.getsockname()[1]))
        submission = start("opens a socket")
        outcome = submission.separate("one", SECONDS)
        if notes := [note for note in submission.isolation if "network" in note]:
            pytest.skip(notes[0])
        assert outcome.failure is not None
        assert "Network is unreachable" in outcome.failure


@pytest.mark.parametrize(
    ("what", "load", "reason"),
    [
        ("works", "raise ValueError('no weights')", "ValueError: no weights"),
        ("works", "os._exit(7)", "the process exited unexpectedly (exit code 7)"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_run(start, what: str, load: str, reason: str) -> None:
    with pytest.raises(SubmissionError) as caught:
        start(what, load=load).separate("one", SECONDS)
    assert reason in str(caught.value)


def test_a_model_that_takes_too_long_to_load_ends_the_run(start) -> None:
    with pytest.raises(SubmissionError, match="loading the model took more than 1 s"):
        start("works", Limits(enforced=True, load_seconds=1), load="time.sleep(60)").start()


def test_overriding_a_setting_that_a_submission_lacks_is_refused(start) -> None:
    submission = start("works")
    submission.options = replace(submission.options, ensemble="htdemucs")
    with pytest.raises(SubmissionError, match="user_config.py has no ENSEMBLE"):
        submission.start()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[psutil.Process]]:
    """Find the processes that a submission leaves behind by their unique number of seconds to sleep."""
    seconds = f"600.{secrets.randbelow(10**9):09}"
    monkeypatch.setenv("KMDX_NAP", seconds)

    def find() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if seconds in (each.info["cmdline"] or [])]

    return find


@LINUX
@pytest.mark.parametrize("without", [[], EVERYTHING], ids=["contained", "not contained"])
@pytest.mark.parametrize(("what", "stays"), [("", "0"), ("", "60"), (" and crashes", "0")])
def test_no_process_of_a_submission_survives(
    start, naps, monkeypatch: pytest.MonkeyPatch, what: str, stays: str, without: list[str]
) -> None:
    monkeypatch.setenv("KMDX_STAYS", stays)
    with start(f"leaves processes behind{what}", Limits(2, enforced=True)) as submission:
        submission.without = without
        submission.separate("one", SECONDS)
        if not what and stays == "0":
            assert len(naps()) == 2, "a song's processes may go on while the model is there"
    assert not naps()


CHAIN = """
import os, sys
file = os.open(os.environ["AICROWD_PUBLIC_SHARED_DIR"] + "/alive", os.O_CREAT | os.O_WRONLY)
while True:
    os.pwrite(file, b"%9d" % os.getpid(), 0)
    if os.fork():
        os._exit(0)
    {each}
"""
"""A process that constantly replaces itself, so that a search finds only one that has ended."""
LEFT_BEHIND = {
    "one": "i=0; while :; do i=$((i + 1)); echo $i > $AICROWD_PUBLIC_SHARED_DIR/alive; sleep 0.01; done",
    "chain": f"exec '{sys.executable}' -I -S -c '{CHAIN.format(each='pass')}'",
    "chain of sessions": f"exec '{sys.executable}' -I -S -c '{CHAIN.format(each='os.setsid()')}'",
}
ENDS = {
    "evaluator killed": "os.kill(os.getpid(), 9)",
    "ended": "s.kill()",
    "guard killed": "s._running.guard.kill(); time.sleep(0.3); s.kill()",
}


@LINUX
@pytest.mark.parametrize("without", [[], EVERYTHING], ids=["contained", "not contained"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("left", LEFT_BEHIND)
def test_no_process_outlives_the_evaluator(tmp_path: Path, without: list[str], end: str, left: str) -> None:
    alive = tmp_path / "shared" / "alive"
    (tmp_path / "shared").mkdir()
    load = f"import subprocess; subprocess.Popen(['sh', '-c', {LEFT_BEHIND[left]!r}], start_new_session=True)"
    folder = submissions.write(tmp_path / "other", "works", load)
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom evaluator.process import Limits, Submission\n"
        f"here = Path({str(tmp_path)!r})\n(here / 'shared/predictions').mkdir()\n(here / 'dataset').mkdir()\n"
        f"s = Submission(Path({str(folder)!r}), here / 'dataset', here / 'shared', Limits(), here / 'log')\n"
        f"s.without = {without!r}\ns.start()\nprint('started', flush=True)\nsys.stdin.readline()\n{ENDS[end]}"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    below = psutil.Process(parent.pid).children(recursive=True)
    assert len(below) >= 3, "the launcher, the guard and the submission"
    assert wait_for(lambda: changes(alive)), "what it left behind"
    parent.communicate("\n")
    assert not psutil.wait_procs(below, timeout=60)[1]
    assert wait_for(lambda: not changes(alive))


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until something is true, for a minute at most."""
    deadline = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < deadline:
        pass
    return found


def changes(file: Path) -> bool:
    """Whether any process is writing to a file."""
    before = file.read_bytes() if file.exists() else b""
    time.sleep(0.5)
    return file.exists() and file.read_bytes() != before


def test_a_folder_without_a_submission_is_refused(start, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path / "shared"):
        with pytest.raises(SubmissionError, match=r"does not contain my_submission/aicrowd_wrapper\.py$"):
            check_submission(folder)
    submission = start("works")
    check_submission(submission.folder)
    submission.folder = tmp_path / "missing"
    with pytest.raises(SubmissionError, match="is not a submission"):
        submission.start()


@pytest.mark.parametrize(
    ("named", "absolute"), [("weights", "{here}/weights"), ("~/weights", "{here}/weights"), ("/w", "/w")]
)
def test_the_models_folder_is_the_same_from_the_submissions_folder(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, absolute: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KMDX_MODELS", named)
    monkeypatch.setitem(submissions.BODIES, "tells", "raise ValueError(os.environ['KMDX_MODELS'])")
    outcome = start("tells").separate("one", SECONDS)
    assert outcome.failure is not None
    assert outcome.failure.startswith(f"ValueError: {absolute.format(here=tmp_path)} (")


@LINUX
def test_a_submission_can_run_as_another_user(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tells = "raise ValueError(f'{os.getuid()} {os.getgid()} {os.getgroups()} {os.access(\"/tmp\", os.W_OK)}')"
    monkeypatch.setitem(submissions.BODIES, "tells", tells)
    submission = start("tells")
    submission.options = replace(submission.options, user=1001)
    outcome = submission.separate("one", SECONDS)
    assert outcome.failure is not None
    if "user" in " ".join(submission.isolation):
        pytest.skip("this system does not allow another user")
    assert outcome.failure.startswith("ValueError: 1001 1001 "), outcome.failure
    assert " True (" in outcome.failure


@LINUX
def test_another_user_writes_stems_that_the_evaluator_can_read(start, tmp_path: Path) -> None:
    submission = start("works")
    submission.options = replace(submission.options, user=1001)
    assert submission.separate("one", SECONDS).failure is None
    assert len(list((tmp_path / "shared" / "predictions" / "one").glob("*.wav"))) == 4


@LINUX
def test_without_a_view_of_its_own_a_submission_runs_as_the_evaluators_user(start, tmp_path: Path) -> None:
    submission = start("works")
    submission.options = replace(submission.options, user=1001)
    submission.without = EVERYTHING
    assert submission.separate("one", SECONDS).failure is None
    assert "the submission ran as the evaluator's user: the system does not allow another one" in (
        submission.isolation
    )


class Waits:
    progress = None


class HasMethod:
    def progress(self) -> str:
        return "mine"


class HasProperty:
    asked = 0

    @property
    def progress(self) -> None:
        self.asked += 1

    @progress.setter
    def progress(self, _: object) -> None:
        raise AssertionError


class HasValue:
    progress = 0.0


@pytest.mark.parametrize("kind", [Waits, HasMethod, HasProperty, HasValue])
def test_progress_is_passed_only_to_models_that_accept_it(kind: type) -> None:
    model, before = kind(), dict(vars(kind))
    model.separate_music_file = lambda samples, rate: ({}, {})
    submission_worker.wrap_model(model, {}, print)
    assert vars(model).get("progress") is (print if kind is Waits else None)
    assert "asked" not in vars(model)
    assert dict(vars(kind)) == before


def test_a_wrapper_may_call_the_model_with_keyword_arguments() -> None:
    model = types.SimpleNamespace(separate_music_file=lambda mixed, rate: ({"bass": mixed[1:]}, {}))
    findings: dict[str, bool] = {}
    submission_worker.wrap_model(model, findings, print)
    model.separate_music_file(mixed=noise(8), rate=44100)
    assert "wrong length: bass has 7 samples, the mixture 8" in findings


def test_each_check_of_the_stems_is_independent() -> None:
    mixture = noise(4)

    class OnlyLength:
        def __len__(self) -> int:
            return 3

    stems = {
        "bass": OnlyLength(),
        "drums": [[np.inf, 0], [0, np.nan], [0, 0], [0, 0]],
        "other": None,
        7: np.zeros((4, 2), np.int16),
        "vocals": torch.full((4, 2), -torch.inf),
    }
    assert submission_worker.check_stems(stems, mixture) == {
        "wrong stems: 7 is extra": True,
        "wrong length: bass has 3 samples, the mixture 4": True,
        "NaN in drums": False,
        "infinity in drums": False,
        "infinity in vocals": False,
    }
