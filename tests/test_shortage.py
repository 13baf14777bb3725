"""A submission that uses up memory, threads or disk space: it fails, and the evaluator goes on."""

from __future__ import annotations

import errno
import textwrap
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import evaluation_cases
import process_cases
import pytest
import submissions
from evaluation_cases import STEMS, results
from process_cases import LINUX, SECONDS

from evaluator import metrics, protocol, watch
from evaluator.predictions import PredictionError, Predictions
from evaluator.process import Limits, _Running
from evaluator.protocol import Workspace
from evaluator.scoring_process import ScoringError, ScoringProcess
from evaluator.watch import Room, Watch
from kmdx.errors import AudioError

data, evaluate, start = evaluation_cases.data, evaluation_cases.evaluate, process_cases.start


def no_thread(*_: Any, **__: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_scoring_starts_no_thread_once_the_submission_may_have_used_them_up(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {stem: data / "test" / "c" / f"{stem}.wav" for stem in STEMS}
    with ScoringProcess() as scorer:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            first = scorer.score(files, files, metrics.choose(None))
            for process in scorer._pool._processes.values():
                process.kill()
                process.join()
            with pytest.raises(ScoringError, match="cannot be started: can't start new thread"):
                scorer.score(files, files, metrics.choose(None))
        assert scorer.score(files, files, metrics.choose(None)) == first


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("prepare", BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")),
        ("_score_predictions", OSError(errno.ENOSPC, "No space left on device")),
        ("_score_predictions", RuntimeError("can't start new thread")),
        ("_score_predictions", BrokenProcessPool("killed twice")),
    ],
)
def test_the_evaluator_ends_the_submission_when_it_lacks_resources_and_tries_again(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    owner: Any = Workspace if name == "prepare" else protocol
    work, calls = getattr(owner, name), []

    def scarce(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            try:
                raise error
            except RuntimeError as cause:
                raise ScoringError("the scoring process cannot be started") from cause
        return work(*arguments)

    monkeypatch.setattr(owner, name, scarce)
    assert evaluate().code == 0
    assert [record["status"] for record in results(tmp_path / "run")["songs"]] == ["ok"] * 3
    assert len(calls) == 4
    assert (tmp_path / "run" / "submission.log").read_text("utf-8").count("made") == 2


def test_a_scoring_process_that_was_killed_counts_as_a_lack_of_resources(monkeypatch) -> None:
    def killed(*_: Any) -> None:
        raise BrokenProcessPool("out of memory")

    with ScoringProcess() as scorer:
        monkeypatch.setattr(scorer, "_submit", killed)
        with pytest.raises(ScoringError, match="killed twice") as caught:
            scorer.score({}, {}, metrics.choose(None))
    assert isinstance(caught.value.__cause__, BrokenProcessPool)


def test_other_errors_do_not_end_the_submission(evaluate, tmp_path: Path, monkeypatch) -> None:
    def damaged(*_: Any) -> None:
        raise AudioError("bass.wav is damaged") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(protocol, "_score_predictions", damaged)
    assert evaluate().code == 1
    assert (tmp_path / "run" / "submission.log").read_text("utf-8").count("made") == 1


@pytest.mark.parametrize(
    ("before", "after", "failure"),
    [
        (Room(10**12, 10**7), Room(10**12, 10**4), "it filled the disk: only 10000 more files fit on it"),
        (Room(10**12, 10**4), Room(10**12, 4000), "it filled the disk: only 4000 more files fit on it"),
        (Room(10**8, 10**7), Room(4 * 10**7, 10**7), "it filled the disk: only 0.0 GB are free"),
        (Room(10**12, 10**7), Room(9 * 10**8, 10**7), "it filled the disk: only 0.9 GB are free"),
        (Room(10**12, 0), Room(10**12, 0), None),
        (Room(0, 10**7), Room(0, 10**7), None),
        (Room(10**8, 10**4), Room(8 * 10**7, 8000), None),
    ],
)
def test_a_submission_leaves_room_for_bytes_and_files_on_any_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Room, after: Room, failure: str | None
) -> None:
    monkeypatch.setattr(watch, "_free", lambda _: before)
    watched = Watch(lambda: [watch.psutil.Process()], 0, None, tmp_path, Limits(), 600, "late")
    monkeypatch.setattr(watch, "_free", lambda _: after)
    assert watched.check() == failure


def test_what_a_killed_submission_wrote_is_removed(evaluate, tmp_path: Path, monkeypatch) -> None:
    """What a running one wrote for its later songs is not."""
    body = """
        shared = Path(os.environ["AICROWD_PUBLIC_SHARED_DIR"])
        print("sees", sorted(path.name for path in shared.iterdir()), flush=True)
        (shared / "own").mkdir()
        (shared / "own" / "file").touch()
        assert self.count < 2 or os.abort()
    """
    code = "from pathlib import Path\n" + textwrap.dedent(body).replace(".mkdir()", ".mkdir(exist_ok=True)")
    monkeypatch.setitem(submissions.BODIES, "keeps", code)
    assert evaluate(what="keeps").code == 1
    log = (tmp_path / "run" / "submission.log").read_text("utf-8").splitlines()
    assert [line for line in log if line.startswith("sees")] == [
        "sees ['predictions']",
        "sees ['own', 'predictions']",
        "sees ['predictions']",
    ]


@LINUX
def test_too_many_threads_end_a_submission(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_THREADS", 40)
    body = "import threading\nfor _ in range(60): threading.Thread(target=time.sleep, args=(600,)).start()"
    monkeypatch.setitem(submissions.BODIES, "threads", f"{body}\ntime.sleep(600)")
    assert start("threads").separate("one", SECONDS).failure.startswith("it started more than 40 threads")


@LINUX
def test_memory_that_a_process_hides_is_a_failure(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system answers only an ordinary user's evaluator in this way."""
    listed = Path.iterdir

    def denied(path: Path):
        if path.name == "fd" and path.parts[1] == "proc" and (path.parent / "comm").read_text() == "hider\n":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    body = "import ctypes\nctypes.CDLL(None).prctl(15, b'hider')\ntime.sleep(600)"
    monkeypatch.setitem(submissions.BODIES, "hides", body)
    failure = start("hides").separate("one", SECONDS).failure
    assert failure.startswith("one of its processes hides its memory from the evaluator")


@LINUX
def test_a_process_that_has_just_ended_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    (tmp_path / "status").write_text("State:\tZ (zombie)\n")
    monkeypatch.setattr(watch, "_folder", lambda _: tmp_path)
    assert watch._memory_files([1], None) == 0


@LINUX
def test_shared_memory_counts_after_the_first_thread_has_ended(
    start, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"""
        import ctypes, threading
        def work():
            with open("/dev/shm/x", "wb") as file:
                file.write(bytes(2 * 10**8))
            hoard = np.ones(2 * 10**8 // 8)
            time.sleep(600)
        threading.Thread(target=work).start()
        ctypes.CDLL(None).syscall({process_cases.EXIT}, 0)
    """
    monkeypatch.setitem(submissions.BODIES, "hides", textwrap.dedent(body))
    submission = start("hides", Limits(600, memory=3 * 10**8, enforced=True))
    outcome = submission.separate("one", SECONDS)
    if submission.isolation:
        pytest.skip(submission.isolation[0])
    assert outcome.failure.startswith("memory limit: more than 0.3 GB")


@pytest.mark.skipif(watch.os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("locked", ["shared", "shared/predictions", "shared/own"])
def test_a_folder_without_permissions_is_removed_when_its_processes_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    """Only an ordinary user needs the permissions of a folder to open or move it."""
    for folder in ("shared/predictions", "shared/own", "trash"):
        (tmp_path / folder).mkdir(parents=True)
    moved, opened, folder = watch.os.rename, watch.os.open, tmp_path / locked

    def denied(path: Any, *arguments: Any, **named: Any) -> Any:
        if Path(path).name == folder.name and not folder.stat().st_mode & 0o700:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return (opened if isinstance(arguments[0], int) else moved)(path, *arguments, **named)

    monkeypatch.setattr("evaluator.predictions.os.open", denied)
    monkeypatch.setattr("evaluator.predictions.os.rename", denied)
    folder.chmod(0)
    Predictions(tmp_path / "shared", tmp_path / "trash").clear(everything=True)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["predictions"]


@LINUX
def test_too_many_open_files_end_a_submission(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_FILES", 50)
    monkeypatch.setitem(submissions.BODIES, "files", "for _ in range(60): os.dup(0)\ntime.sleep(600)")
    assert start("files").separate("one", SECONDS).failure.startswith("it opened more than 50 files")


def test_a_disk_that_is_filled_after_the_reply_is_noticed(start, monkeypatch: pytest.MonkeyPatch) -> None:
    pause, rooms = _Running.pause, [Room(10**12, 0)]
    monkeypatch.setattr(watch, "_free", lambda _: rooms[-1])
    monkeypatch.setattr(_Running, "pause", lambda self: rooms.append(Room(10**5, 0)) or pause(self))
    submission = start("works")
    assert submission.separate("one", SECONDS).failure == "it filled the disk: only 0.0 GB are free"
    assert not submission.is_running


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOENT, "no stems: shared/predictions/song does not exist"),
        (errno.ENOTDIR, "no stems: shared/predictions/song is not a folder"),
        (errno.EACCES, "no stems: shared/predictions/song cannot be opened (Permission denied)"),
    ],
)
def test_the_reason_for_missing_stems_is_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    (tmp_path / "shared/predictions/song").mkdir(parents=True)
    opened = watch.os.open

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if path == "song":
            raise OSError(number, watch.os.strerror(number))
        return opened(path, *arguments, **named)

    monkeypatch.setattr("evaluator.predictions.os.open", failing)
    with pytest.raises(PredictionError) as caught:
        Predictions(tmp_path / "shared", tmp_path).copy("song", STEMS, 1, 2, tmp_path)
    assert str(caught.value) == reason
