"""Hostile submissions: each is ended with a reason, and nothing outside its reach changes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import soundfile
import submissions
from conftest import noise

from evaluator import process, replies, sandbox, watch
from evaluator.predictions import PredictionError, Predictions
from evaluator.process import SANDBOX, Limits, Outcome, Submission, SubmissionOptions
from evaluator.replies import BadReply, clean, parse
from evaluator.sandbox import Spec

STEMS = ("bass", "drums", "other", "vocals")
LANDLOCK = ["mount", "PID", "network", "IPC", "UTS", "user"]  # what is left without these
EVERYTHING = [*LANDLOCK, "Landlock"]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces and Landlock are Linux's")
SAMPLES = 22_050
SAY = """
def say(line):
    for descriptor in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                os.write(descriptor, line)
        except OSError:
            pass
frame = sys._getframe()
while "request" not in frame.f_locals:
    frame = frame.f_back
token = frame.f_locals["request"]["token"]
assert token
done = b'{"done": "%s", "findings": [], "returned_true": true, "peak_gpu_memory": null, "device": null}\\n'
"""


class Played(NamedTuple):
    """The outcome of a song."""

    outcome: Outcome
    submission: Submission
    folder: Path


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Played]]:
    """Play one song through a submission that runs this code, next to a data set that it must not see."""
    for folder in ("dataset/song", "shared/predictions", "truth/test/song", "run/songs"):
        (tmp_path / folder).mkdir(parents=True)
    soundfile.write(tmp_path / "dataset/song/mixture.wav", noise(SAMPLES), 44100)
    (tmp_path / "truth/test/song/vocals.wav").write_text("the truth")
    (tmp_path / "run/songs/earlier.json").write_text("{}")
    made: list[Submission] = []

    def play(body: str, without: Sequence[str] = (), hidden: Sequence[Path] = (), **limits: float) -> Played:
        monkeypatch.setitem(submissions.BODIES, "is hostile", SAY + body)
        chosen = Limits(**{"time_factor": 120, "stall": 5, "longest": 30, "longest_factor": 1, **limits})
        submission = Submission(
            submissions.write(tmp_path / "submission", "is hostile"),
            tmp_path / "dataset", tmp_path / "shared", chosen, tmp_path / "submission.log",
            SubmissionOptions(hidden=hidden),
        )  # fmt: skip
        submission.without = list(without)
        made.append(submission)
        return Played(submission.separate("song", 0.5), submission, tmp_path)

    yield play
    for submission in made:
        submission.kill()


@LINUX
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("say(b'not json\\n')\ntime.sleep(600)", "not JSON: not json"),
        ("say(b'5\\n')\ntime.sleep(600)", "unknown form: 5"),
        ("say(b'{}\\n')\ntime.sleep(600)", "unknown form: {}"),
        ("say(b'{\"progress\": [NaN, null]}\\n')\ntime.sleep(600)", "not JSON"),
        ("while True: say(b'x' * 65536)", "longer than 64 kB"),
        ("say(done % b'other')\ntime.sleep(600)", "unexpected reply (done)"),
        ("say(b'{\"hello\": \"\", \"executable\": \"\", \"version\": \"\", \"packages\": {}}\\n')\ntime.sleep(9)", "unexpected reply (hello)"),
        ("while True: say(b'{\"progress\": [1, 2]}\\n')", "it took more than 3 s"),
        ("while True: pass", "it took more than 3 s"),
        ("while True: os.write(2, b'x' * 65536)", "it took more than 3 s"),
        ("import signal\nos.kill(os.getpid(), signal.SIGSTOP)", "stalled: no progress and no processor time for 2 s"),
        ("time.sleep(600)", "stalled: no progress and no processor time for 2 s"),
        ("os.execv('/bin/sh', ['sh', '-c', 'echo 5; exit 4'])", "the process exited unexpectedly (exit code 4)"),
        ("raise RuntimeError('x' * 50_000_000)", "RuntimeError: xxx"),
        ("raise RuntimeError('\\udcff is no letter \\x1b[2J')", "RuntimeError: \\udcff is no letter [2J ("),
        (r"""say(b'{"failed": "%s", "reason": "\\u0000", "where": "\\u0000"}\n' % token.encode())""", "it failed without a message (see submission.log)"),
        ("class Wordless(Exception):\n    def __str__(self): raise self\nraise Wordless", "Wordless ("),
    ],
)  # fmt: skip
def test_every_hostile_submission_is_ended_with_its_reason_within_a_limit(
    play, body: str, reason: str
) -> None:
    played = play(body, longest=3, stall=2)
    assert played.outcome.failure is not None
    assert reason in played.outcome.failure
    assert len(played.outcome.failure) < 1500
    assert played.outcome.ends_challenge
    assert (played.folder / "submission.log").stat().st_size <= replies.LOG + 100
    assert not list(played.folder.glob(".private-*"))


@LINUX
@pytest.mark.skipif(platform.machine() not in sandbox.SYSTEM_CALLS, reason="its system calls are not listed")
@pytest.mark.parametrize("without", [[], LANDLOCK, EVERYTHING], ids=["namespaces", "Landlock", "nothing"])
def test_memory_that_nothing_shows_is_forbidden(play, without: list[str]) -> None:
    clone = sandbox.SYSTEM_CALLS[platform.machine()][3]
    body = f"""
import ctypes, errno, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def is_forbidden(result):
    return result == -1 and ctypes.get_errno() == errno.ENOSYS
assert is_forbidden(libc.shmget(0, 10**6, 0o1600)), "shmget"
assert is_forbidden(libc.unshare({sandbox.NEW_USER | sandbox.NEW_MOUNT})), "unshare"
assert is_forbidden(libc.unshare({sandbox.NEW_USER | sandbox.NEW_IPC})), "unshare IPC"
libc.unshare({sandbox.NEW_IPC})
assert is_forbidden(libc.shmget(0, 10**6, 0o1600)), "shmget in another IPC namespace"
assert is_forbidden(libc.syscall({clone}, {sandbox.NEW_USER} | 17, 0, 0, 0, 0)), "clone"
thread = threading.Thread(target=subprocess.run, args=(["true"],))
thread.start()
thread.join()
"""
    assert play(body, without).outcome.failure is None


@LINUX
@pytest.mark.parametrize(
    ("findings", "failure", "ends"),
    [
        (r'["\\u0000", "\\u200b"]', None, False),
        (r'["\\u0000", "NaN in bass"]', "NaN in bass", False),
        (r'["\\u0007out of tune"]', "out of tune", True),
    ],
)
def test_findings_without_visible_text_are_none(play, findings: str, failure: str | None, ends: bool) -> None:
    body = f"say(done.replace(b'[]', b'{findings}') % token.encode())\ntime.sleep(0.2)"
    outcome = play(body).outcome
    assert (outcome.failure, outcome.ends_challenge) == (failure, ends)


@LINUX
def test_a_fork_bomb_is_ended_early(play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_PROCESSES", 20)
    body = "for _ in range(100):\n    os.fork() or time.sleep(600)\ntime.sleep(600)"
    assert "it started more than 20 processes" in str(play(body).outcome.failure)


@LINUX
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("without", [[], LANDLOCK, EVERYTHING], ids=["namespaces", "Landlock", "nothing"])
def test_a_guard_that_is_killed_or_frozen_ends_the_song_and_all_processes(
    play, without: list[str], number: str
) -> None:
    body = f"""
import contextlib, ctypes, signal
ctypes.CDLL(None).prctl(1, 0)
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
with contextlib.suppress(PermissionError):  # newer versions of Landlock keep it from that
    os.kill(os.getppid(), signal.{number})
time.sleep(600)
"""
    seen: set[psutil.Process] = set()
    with pytest.MonkeyPatch.context() as patch:
        below = process._Running.below
        patch.setattr(process._Running, "below", lambda running: seen.update(running.all()) or below(running))
        outcome = play(body, without, stall=2).outcome
    assert outcome.failure is not None
    assert len(seen) >= 4, "the launcher, the guard, the submission and what it started"
    assert not [each for each in seen if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@LINUX
@pytest.mark.parametrize("without", [[], LANDLOCK], ids=["namespaces", "Landlock"])
def test_nothing_but_its_own_folders_can_be_read_or_changed(play, tmp_path: Path, without: list[str]) -> None:
    body = f"""
here = {str(tmp_path)!r}
for path in (here + '/truth/test/song/vocals.wav', here + '/run/songs/earlier.json', '/proc/1/root' + here + '/truth/test/song/vocals.wav'):
    for mode in ('r', 'a'):
        try:
            open(path, mode)
            raise SystemExit(f'opened {{path}}')
        except OSError:
            pass
for folder in (os.getcwd(), os.environ['AICROWD_DATASET_DIR'], '/usr', sys.prefix, '/'):
    try:
        open(folder + '/hostile', 'w')
        raise SystemExit(f'wrote to {{folder}}')
    except OSError:
        pass
for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger'):
    try:
        os.close(os.open(path, os.O_WRONLY))
        raise SystemExit(f'opened {{path}}')
    except OSError:
        pass
for folder in (os.environ['AICROWD_PUBLIC_SHARED_DIR'], os.environ['HOME'], os.environ['TMPDIR'], '/dev/shm'):
    open(folder + '/own', 'w').close()
    os.unlink(folder + '/own')
"""
    played = play(body, without)
    if any("nor is Landlock" in note for note in played.submission.isolation):
        pytest.skip(f"this system isolates nothing: {played.submission.isolation}")
    assert played.outcome.failure is None
    assert (tmp_path / "truth/test/song/vocals.wav").read_text() == "the truth"


@LINUX
@pytest.mark.parametrize("without", [[], LANDLOCK], ids=["namespaces", "Landlock"])
def test_hidden_files_in_a_visible_folder_cannot_be_read(play, tmp_path: Path, without: list[str]) -> None:
    body = """
found = []
for path in ("data/vocals.wav", "data/inner/bass.wav", "song.wav", "seen.txt", "data2/seen.txt"):
    try:
        found.append(open(path).read())
    except OSError:
        found.append("")
raise SystemExit(repr(found))
"""
    for name in ("data/vocals.wav", "data/inner/bass.wav", "song.wav"):
        (tmp_path / "submission" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "submission" / name).write_text("the truth")
    (tmp_path / "submission/data2").mkdir()
    for name in ("seen.txt", "data2/seen.txt"):
        (tmp_path / "submission" / name).write_text("its own")
    hidden = [tmp_path / "submission/data", tmp_path / "submission/song.wav"]
    played = play(body, without, hidden=hidden)
    if any("nor is Landlock" in note for note in played.submission.isolation):
        pytest.skip(f"this system isolates nothing: {played.submission.isolation}")
    assert "SystemExit: ['', '', '', 'its own', 'its own']" in str(played.outcome.failure)


@LINUX
def test_what_the_system_does_not_isolate_is_listed(play) -> None:
    played = play("", EVERYTHING)
    assert played.outcome.failure is None
    first, *others = played.submission.isolation
    assert first.startswith(
        "the submission could read and write other files: mount namespaces are not allowed"
    )
    assert any("processes: PID" in note for note in others)
    assert any("network: network" in note for note in others)


@pytest.mark.parametrize(("version", "count"), [(1, 2), (2, 2), (3, 1), (7, 1)])
def test_what_landlock_does_not_prevent_is_listed(version: int, count: int) -> None:
    gaps = sandbox.landlock_gaps(version)
    assert len(gaps) == count
    assert "permissions" in gaps[0]
    assert all(gap.startswith("the submission could") for gap in gaps)


@LINUX
def test_the_report_lists_what_landlock_does_not_prevent(play) -> None:
    first, *others = play("", LANDLOCK).submission.isolation
    if "nor is Landlock" in first:
        pytest.skip(f"this system has no Landlock: {first}")
    assert sandbox.landlock_gaps(sandbox.landlock_version())[0] == others[0]


@LINUX
def test_the_environment_has_no_secrets(play, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AICROWD_API_KEY", "HF_TOKEN", "KMDX_PASSWORD", "EDITOR"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    body = "raise SystemExit('secret' in repr(os.environ) or os.environ['OMP_NUM_THREADS'] != '1')"
    assert "SystemExit: False" in str(play(body).outcome.failure)


@LINUX
def test_a_second_reply_does_not_count_for_the_next_song(play) -> None:
    played = play(
        "threading = __import__('threading')\nthreading.Timer(0.5, lambda t=token: say(done % t.encode())).start()"
    )
    assert played.outcome.failure is None
    time.sleep(1)
    assert "unexpected reply" in str(played.submission.separate("song", 0.5).failure)


@LINUX
def test_times_are_measured_by_the_evaluator(play) -> None:
    body = "time.sleep(1)\nfor clock in ('perf_counter', 'monotonic', 'time'):\n    setattr(time, clock, lambda: 0.0)"
    assert 1 <= play(body).outcome.seconds < 30


def test_the_time_of_a_song_begins_when_its_mixture_appears(play, tmp_path: Path) -> None:
    submission = play("").submission
    (tmp_path / "dataset/song").rename(tmp_path / "hidden")
    outcome = submission.separate(
        "song", 0.5, begin=lambda: (tmp_path / "hidden").rename(tmp_path / "dataset/song")
    )
    assert outcome.failure is None


@pytest.mark.parametrize(
    "line",
    [
        b"", b"5", b"null", b"[]", b"{}", b'"progress"', b"\xff", b"[" * 60_000, b'{"progress": [1e999, 2]}',
        b'{"progress": [true, 2]}', b'{"progress": [-1, 2]}', b'{"progress": [1, 2, 3]}', b'{"progress": {"0": 1}}',
        b'{"progress": [' + b"1" * 50_000 + b", 2]}", b'{"made": "x"}', b'{"made": "x", "device": 5}',
        b'{"failed": "x", "reason": null, "where": null}', b'{"isolation": "none", "network": "", "contained": 1}',
        b'{"done": "x", "findings": [], "returned_true": true, "device": null, "peak_gpu_memory": -1}',
        b'{"done": "x", "findings": [], "returned_true": true, "device": null, "peak_gpu_memory": 1e3}',
        b'{"done": "x", "findings": [], "returned_true": true, "device": null, "peak_gpu_memory": null, "seconds": 1}',
    ],
)  # fmt: skip
def test_malformed_replies_are_refused(line: bytes) -> None:
    with pytest.raises(BadReply) as caught:
        parse(line)
    assert len(str(caught.value)) < 200


def test_texts_are_cleaned_into_one_short_line() -> None:
    assert clean("a\nb\tc\x1b[2J\x00\u202e\udcff") == "a b c[2J\\udcff"
    assert len(clean("x" * 10**7)) == 1000


@pytest.fixture
def hands(tmp_path: Path) -> Predictions:
    """A submission's predictions of one song, whole and good."""
    for folder in ("shared/predictions/song", "trash", "taken", "truth/song"):
        (tmp_path / folder).mkdir(parents=True)
    for stem in STEMS:
        soundfile.write(tmp_path / "shared/predictions/song" / f"{stem}.wav", noise(1000), 44100, "DOUBLE")
        (tmp_path / "truth/song" / f"{stem}.wav").write_text("the truth")
    return Predictions(tmp_path / "shared", tmp_path / "trash")


def test_stems_are_copied_out_of_the_submissions_reach(hands: Predictions, tmp_path: Path) -> None:
    taken = hands.copy("song", STEMS, 1000, 2, tmp_path / "taken")
    own = tmp_path / "shared/predictions/song"
    (own / "vocals.wav").write_text("changed")
    assert soundfile.info(taken["vocals"]).frames == 1000


def test_the_parts_of_a_missing_accompaniment_are_copied(hands: Predictions, tmp_path: Path) -> None:
    song = tmp_path / "shared/predictions/song"
    soundfile.write(song / "guitar.wav", noise(1000), 44100)
    taken = hands.copy("song", ["vocals", "accompaniment"], 1000, 2, tmp_path / "taken")
    assert set(taken) == {*STEMS, "guitar"}
    (song / "guitar.wav").rename(song / "accompaniment.wav")
    for path in (tmp_path / "taken").iterdir():
        path.unlink()
    assert set(hands.copy("song", ["accompaniment"], 1000, 2, tmp_path / "taken")) == {"accompaniment"}


def test_the_instrumental_is_the_accompaniment(hands: Predictions, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "shared/predictions/song/instrumental.wav", noise(1000), 44100)
    assert set(hands.copy("song", ["accompaniment"], 1000, 2, tmp_path / "taken")) == {"accompaniment"}


def test_without_all_of_its_parts_the_accompaniment_is_missing(hands: Predictions, tmp_path: Path) -> None:
    (tmp_path / "shared/predictions/song/drums.wav").unlink()
    with pytest.raises(PredictionError, match=r"accompaniment\.wav is missing"):
        hands.copy("song", ["vocals", "accompaniment"], 1000, 2, tmp_path / "taken")


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
def test_a_part_of_the_accompaniment_that_is_a_link_is_refused(hands: Predictions, tmp_path: Path) -> None:
    replace(
        tmp_path / "shared/predictions/song/drums.wav",
        lambda path: path.symlink_to("../../../truth/song/drums.wav"),
    )
    with pytest.raises(PredictionError, match=r"drums\.wav is not a regular file"):
        hands.copy("song", ["accompaniment"], 1000, 2, tmp_path / "taken")


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.mark.skipif(os.name != "posix", reason="links and FIFOs are POSIX's")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to("../../../truth/song/bass.wav"), "bass.wav is not a regular file"),
        (lambda path: os.link(path.with_name("vocals.wav"), path), "has 2 hard links"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.open("wb").truncate(10**10), "has 10000000000 bytes, expected at most 1016000"),
        (lambda path: None, "bass.wav is missing"),
    ],
    ids=["link", "hard link", "FIFO", "folder", "device", "giant", "missing"],
)  # fmt: skip
def test_a_stem_must_be_a_regular_file(hands: Predictions, tmp_path: Path, make, reason: str) -> None:
    replace(tmp_path / "shared/predictions/song/bass.wav", make)
    with pytest.raises(PredictionError, match=reason):
        hands.copy("song", STEMS, 1000, 2, tmp_path / "taken")


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
@pytest.mark.parametrize("name", ["shared/predictions", "shared/predictions/song"])
def test_a_folder_that_became_a_link_leads_nowhere_and_deletes_nothing(
    hands: Predictions, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).rename(tmp_path / "aside")
    (tmp_path / name).symlink_to(tmp_path / "truth" / ("song" if name.endswith("song") else ""))
    with pytest.raises(PredictionError, match="is not a folder"):
        hands.copy("song", STEMS, 1000, 2, tmp_path / "taken")
    hands.clear()
    assert list((tmp_path / "shared/predictions").iterdir()) == []
    assert not (tmp_path / "shared/predictions").is_symlink()
    assert len(list((tmp_path / "truth/song").iterdir())) == 4
    assert not list((tmp_path / "trash").iterdir())


@LINUX
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only the super-user can become another"
)
def test_a_submission_of_an_ordinary_user_is_isolated_too() -> None:
    program = Path("/usr/bin/python3")
    if not program.exists():
        pytest.skip("no interpreter that all users may run")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        scratch = Path(folder)
        for each in (scratch, scratch / "root", scratch / "tmp"):
            each.mkdir(exist_ok=True)
            os.chown(each, 65534, 65534)
        spec = Spec(
            ["/bin/sh", "-c", "id -u; ls /; cat /etc/hostname; kill -9 1"], {"PATH": "/usr/bin:/bin"}, "/",
            [], [], [], folder, 10**7, 10**7, [],
        )  # fmt: skip
        done = subprocess.run(
            [program, "-I", "-S", "-c", SANDBOX.read_text("utf-8")], input=json.dumps(asdict(spec)) + "\n\n",
            user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False,
        )  # fmt: skip
    first, *others = done.stdout.splitlines()
    if notes := json.loads(first)["isolation"]:
        pytest.skip(f"this system does not isolate: {notes}")
    assert others[0] == "65534"
    assert "home" not in others
    assert "/etc/hostname" in done.stderr
