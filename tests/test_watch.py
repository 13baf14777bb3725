"""What a submission's processes may take: memory, time, and nothing between songs."""

from __future__ import annotations

import stat
import textwrap
import time
from pathlib import Path

import process_cases
import pytest
import submissions
from process_cases import LINUX, SECONDS, SHARES

from evaluator import process, watch
from evaluator.process import Limits, SubmissionError

start = process_cases.start


def test_a_song_over_the_memory_limit_is_killed_with_that_reason(start) -> None:
    outcome = start("takes memory", Limits(600, memory=5 * 10**8, enforced=True)).separate("one", SECONDS)
    assert outcome.failure.startswith(
        "memory limit: more than 0.5 GB of host memory (it was at my_submission/"
    )
    assert outcome.peak_memory > 5 * 10**8


def test_memory_is_measured_without_enforced_limits(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMDX_HOARD", str(3 * 10**8))
    monkeypatch.setitem(submissions.BODIES, "takes memory", "x = np.ones(3 * 10**8 // 8)\ndel x")
    submission = start("takes memory", Limits(600, memory=10**8))
    outcome = submission.separate("one", SECONDS)
    assert outcome.failure is None
    assert outcome.peak_memory > 3 * 10**8, "also a peak between two looks"


@pytest.mark.parametrize(
    ("limits", "what", "words"),
    [
        (Limits(0.5, enforced=True), "takes a moment", "time limit: more than 0.5 × 0.5 s"),
        (
            Limits(600, 2 * 10**8, enforced=True),
            "forgets memory",
            "memory limit: more than 0.2 GB of host memory",
        ),
    ],
)
def test_limits_hold_between_two_checks(
    start, monkeypatch: pytest.MonkeyPatch, limits: Limits, what: str, words: str
) -> None:
    monkeypatch.setitem(submissions.BODIES, "forgets memory", "x = np.ones(3 * 10**8 // 8)\ndel x")
    monkeypatch.setattr(watch, "INTERVAL", 600.0)
    began = time.perf_counter()
    outcome = start(what, limits).separate("one", SECONDS)
    assert (outcome.failure.partition(" (")[0], outcome.ends_challenge) == (words, True)
    assert time.perf_counter() - began < 500, "a reply is not waited for until the next look"
    monkeypatch.undo()


def test_memory_is_checked_at_most_ten_times_per_second(start, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = start("talks")
    submission.start()
    looks: list[int] = []
    progress: list[float] = []
    monkeypatch.setattr(submission._running, "below", lambda: looks.append(0) or [])
    monkeypatch.setattr(submission._running, "pause", lambda: True)
    monkeypatch.setattr(submission._running, "worked_while_paused", lambda: False)
    monkeypatch.setattr(submission._running, "resume", lambda: None)
    began = time.perf_counter()
    assert submission.separate("one", SECONDS, lambda done, _: progress.append(done)).failure is None
    assert len(progress) == 50
    assert 2 <= len(looks) <= 1 + (time.perf_counter() - began) / watch.INTERVAL


def test_loading_has_a_memory_peak_and_a_limit(start) -> None:
    load = "x = np.ones(3 * 10**8 // 8); del x"
    submission = start("works", load=load)
    submission.start()
    assert 3 * 10**8 < submission.load_peak_memory < 5 * 10**8
    assert submission.separate("one", SECONDS).peak_memory < 2 * 10**8
    submission.kill()
    submission.limits = Limits(600, 2 * 10**8, enforced=True)
    with pytest.raises(SubmissionError, match="memory limit: more than 0.2 GB of host memory"):
        submission.start()
    assert submission.load_peak_memory > 2 * 10**8


@SHARES
def test_forked_processes_share_their_memory(start) -> None:
    outcome = start("forks").separate("one", SECONDS)
    assert outcome.failure is None
    assert 3 * 10**8 < outcome.peak_memory < 5 * 10**8


@SHARES
def test_many_processes_share_their_memory(start, monkeypatch: pytest.MonkeyPatch) -> None:
    forks = submissions.FORKS.replace("range(4)", "range(120)")
    monkeypatch.setitem(submissions.BODIES, "forks", "self.hoard = np.ones(3 * 10**8 // 8)\n" + forks)
    outcome = start("forks").separate("one", SECONDS)
    assert outcome.failure is None
    assert 3 * 10**8 < outcome.peak_memory < 10**9


@LINUX
@pytest.mark.parametrize(
    "take",
    [
        "os.ftruncate(f := os.memfd_create('x'), 0)\nos.write(f, bytes(3 * 10**8))\ntime.sleep(0.5)\nos.close(f)",
        "f = open('/dev/shm/x', 'wb')\nf.write(bytes(3 * 10**8))\nf.close()\ntime.sleep(0.5)\nos.remove('/dev/shm/x')",
        "import mmap\nm = mmap.mmap(-1, 3 * 10**8)\nm.write(bytes(3 * 10**8))\ntime.sleep(0.5)\nm.close()",
    ],
    ids=["memfd", "dev-shm", "mapped"],
)
def test_memory_shared_through_files_counts_once(start, monkeypatch: pytest.MonkeyPatch, take: str) -> None:
    monkeypatch.setitem(submissions.BODIES, "takes", take)
    submission = start("takes", Limits(600, memory=10**12))
    outcome = submission.separate("one", SECONDS)
    assert outcome.failure is None
    if submission.isolation and "dev" in take:
        pytest.skip(submission.isolation[0])
    assert 3 * 10**8 < outcome.peak_memory < 8 * 10**8  # writing it takes its bytes in memory once more


@pytest.mark.parametrize("folder", ["submission", "ü [b] é"])
def test_an_exceeded_limit_reports_the_line_that_was_running(
    tmp_path: Path, start, folder: str, monkeypatch
) -> None:
    body = "def wait():\n    time.sleep(600)\nimport threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\nwait()"
    monkeypatch.setitem(submissions.BODIES, "waits", body)
    submission = start("waits", Limits(enforced=False, stall=0.5))
    submission.folder = submission.folder.rename(tmp_path / folder)
    outcome = submission.separate("one", SECONDS)
    code = (tmp_path / folder / "my_submission" / "user_config.py").read_text().splitlines()
    line = next(number for number, text in enumerate(code, 1) if "time.sleep(600)" in text)
    assert outcome.failure.endswith(f"(it was at my_submission/user_config.py:{line}; see log)")
    assert "Current thread" in (tmp_path / "log").read_text("utf-8")


def test_nothing_runs_between_songs(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = """
        import subprocess, threading
        file = Path(os.environ["AICROWD_PUBLIC_SHARED_DIR"]) / "count"
        def work():
            while True:
                with file.open("a") as f: f.write("x")
                time.sleep(0.01)
        if self.count == 1:
            threading.Thread(target=work, daemon=True).start()
            subprocess.Popen(f"while true; do printf y >> '{file}'; sleep 0.01; done", shell=True)
        time.sleep(0.3)
    """
    monkeypatch.setitem(submissions.BODIES, "counts", "from pathlib import Path\n" + textwrap.dedent(count))
    submission = start("counts")
    assert submission.separate("one", SECONDS).failure is None
    file = tmp_path / "shared" / "count"
    before = file.read_text()
    assert "x" in before
    assert "y" in before
    time.sleep(0.3)
    assert file.read_text() == before
    assert submission.separate("zwei Ö", SECONDS).failure is None
    after = file.read_text()
    assert after.count("x") > before.count("x")
    assert after.count("y") > before.count("y")


WORKS_ON = """
import ctypes, threading
if os.fork() == 0:
    if {traced} and os.fork() == 0:  # a child in a tracing stop
        ctypes.CDLL(None).ptrace(0, 0, 0, 0)
        os.kill(os.getpid(), 5)
        os._exit(0)
    def work():
        end = time.monotonic() + 3
        while time.monotonic() < end:
            pass
        Path(os.environ["AICROWD_PUBLIC_SHARED_DIR"], "worked").touch()
        time.sleep(600)
    threading.Thread(target=work).start()
    ctypes.CDLL(None).syscall({exit}, 0)  # the first thread ends, the other works on
time.sleep(0.3)
"""


@LINUX
@pytest.mark.parametrize("traced", [False, True])
def test_a_process_whose_first_thread_has_ended_is_paused_too(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: bool
) -> None:
    body = "from pathlib import Path\n" + WORKS_ON.format(traced=traced, exit=process_cases.EXIT)
    monkeypatch.setitem(submissions.BODIES, "works on", body)
    outcome = start("works on").separate("one", SECONDS)
    assert outcome.failure is None
    assert outcome.seconds < 3
    time.sleep(4)
    assert not (tmp_path / "shared" / "worked").exists()


@LINUX
def test_work_that_cannot_be_paused_counts_and_fails_the_song(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "KILL_TIMEOUT", 1.0)
    submission = start("works")
    submission.start()
    monkeypatch.setattr(process, "is_paused", lambda _: False)
    outcome = submission.separate("one", SECONDS)
    assert outcome.failure == "some of its processes kept running after its reply"
    assert outcome.ends_challenge
    assert outcome.seconds >= 1.0


@LINUX
def test_a_pause_that_takes_the_song_over_its_limit_fails_it(start, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = start("works", Limits(2, enforced=True))
    submission.start()
    pause = submission._running.pause
    monkeypatch.setattr(submission._running, "pause", lambda: (time.sleep(2), pause())[1])
    assert submission.separate("one", SECONDS).failure == "time limit: more than 2 × 0.5 s"


@LINUX
def test_a_process_that_wakes_itself_between_songs_is_replaced(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes = """
        import signal
        if self.count == 1 and os.fork() == 0:
            signal.signal(signal.SIGCONT, lambda *_: None)
            os.setsid()
            while True:
                sum(range(10**5))
    """
    monkeypatch.setitem(submissions.BODIES, "wakes", textwrap.dedent(wakes))
    submission = start("wakes")
    assert submission.separate("one", SECONDS).failure is None
    for each in submission._running.below():
        each.resume()  # as a timer of its own would
    while not submission._running.worked_while_paused():
        time.sleep(0.05)
    assert submission.separate("zwei Ö", SECONDS).failure is None
    assert (tmp_path / "log").read_text().count("made") == 2


@LINUX
def test_memory_of_a_process_whose_first_thread_has_ended_counts(
    start, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"""
        import ctypes, threading
        if os.fork() == 0:
            def work():
                x = np.ones(3 * 10**8 // 8)
                time.sleep(600)
            threading.Thread(target=work).start()
            ctypes.CDLL(None).syscall({process_cases.EXIT}, 0)
        time.sleep(1.5)
    """
    monkeypatch.setitem(submissions.BODIES, "hides", textwrap.dedent(body))
    assert start("hides").separate("one", SECONDS).peak_memory > 3 * 10**8


@LINUX
def test_devices_keep_their_permissions(start, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
        open('/dev/null', 'w').write('x')
        try:
            os.chmod('/dev/full', 0o600)
        except OSError:
            pass
    """
    before = stat.S_IMODE(Path("/dev/full").stat().st_mode)
    monkeypatch.setitem(submissions.BODIES, "chmod", textwrap.dedent(body))
    submission = start("chmod")
    outcome = submission.separate("one", SECONDS)
    if submission.isolation:
        pytest.skip(submission.isolation[0])
    assert outcome.failure is None
    assert stat.S_IMODE(Path("/dev/full").stat().st_mode) == before


@pytest.mark.parametrize("what", ["folder", "closed"])
def test_a_log_that_cannot_be_opened_changes_nothing(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "folder":
        (tmp_path / "log").mkdir()
    else:
        monkeypatch.setattr(Path, "open", refuse(tmp_path / "log", Path.open))
    monkeypatch.setitem(submissions.BODIES, "chats", "print('x' * 10**6, flush=True)")
    assert start("chats", Limits(60, stall=5)).separate("one", SECONDS).failure is None


def refuse(path: Path, opened):
    def open_file(self: Path, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *arguments, **options)

    return open_file


def test_a_submission_that_uses_nearly_all_memory_is_ended_without_limits_too(
    start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.host, "memory", lambda: 10**9)
    outcome = start("takes memory").separate("one", SECONDS)
    assert outcome.failure.startswith("it used nearly all memory of this machine: ")


@LINUX
def test_a_crash_in_native_code_has_its_stack_in_the_log(start, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(submissions.BODIES, "segfaults", "import ctypes\nctypes.string_at(0)")
    outcome = start("segfaults").separate("one", SECONDS)
    assert outcome.failure == "the process exited unexpectedly (SIGSEGV) (see log)"
    assert "user_config.py" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "body",
    [
        "import types\nclass Lazy(types.ModuleType):\n    def __getattr__(self, name):\n        raise ImportError(name)\n"
        "sys.modules['lazy'] = Lazy('lazy')",
        "here = os.environ['TMPDIR'] + '/gone'\nos.mkdir(here)\nos.chdir(here)\nsys.path.append('.')\nos.rmdir(here)\nimport colorsys",
    ],
    ids=["lazy module", "no current folder"],
)
def test_odd_but_honest_modules_are_no_failure(start, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setitem(submissions.BODIES, "odd", body)
    assert start("odd").separate("one", SECONDS).failure is None
