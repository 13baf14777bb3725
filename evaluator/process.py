"""A submission in a process of its own: asked for songs, watched for time and memory, killed if need be.

Nothing that the submission controls is waited for without a limit, and nothing that it sends is trusted:
times are the evaluator's own, replies are checked by :mod:`evaluator.replies`. :mod:`evaluator.sandbox` keeps
it away from everything but its folder, its interpreter, the weights, the mixture and a place to write.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from evaluator import replies, sandbox, visible
from evaluator.replies import BadReply, End, clean
from evaluator.watch import GONE, INTERVAL, Limits, Watch
from kmdx import host
from kmdx.challenge import STEMS
from kmdx.errors import KmdxError
from kmdx.files import remove_tree

PATIENCE = 10.0  # seconds for killed processes to be gone
START = 120.0  # seconds for an interpreter to start and list its packages
FILE = 16 * 10**9  # bytes of one file that it writes
OLDEST_PYTHON = (3, 8)
WORKER = Path(__file__).with_name("submission_worker.py")
STARTUP = Path(__file__).with_name("startup")
SANDBOX = Path(__file__).with_name("sandbox.py")
WRAPPER = Path("my_submission", "aicrowd_wrapper.py")
SCORED = ("NaN in ", "infinity in ")
"""How findings begin that the challenge would have scored."""
POINTER = b"version https://git-lfs.github.com/spec/v1"
POINTER_SIZE = 1024  # bytes; pointers are shorter
STACK_WAIT = 2.0  # seconds for a submission to print where it is
STACK = 500  # lines of the log that are searched for the place where a submission stood
LOOKED_AT = 20_000  # files of a submission that are looked at for pointers


class SubmissionError(KmdxError):
    """A submission that could not be started."""


@dataclass(frozen=True)
class Outcome:
    """What became of a song.

    Attributes
    ----------
    seconds : float
        Wall time, from the request to its reply.
    peak_memory : int
        Bytes of host memory at most.
    peak_gpu_memory : int or None
        Bytes of GPU memory at most, where torch used one; by the submission's own account.
    failure : str or None
        What is wrong with it.
    ends_challenge : bool
        Whether the challenge would have ended there. NaN and infinity were written as 16-bit numbers and
        scored; all other failures would have ended it.
    """

    seconds: float
    peak_memory: int
    peak_gpu_memory: int | None = None
    failure: str | None = None
    ends_challenge: bool = False


COMPUTING = (
    "torch", "torchaudio", "demucs", "onnxruntime", "onnxruntime-gpu", "openunmix", "asteroid", "spleeter",
    "tensorflow", "jax", "numpy", "soundfile", "librosa",
)  # fmt: skip
"""Packages of a submission whose version may change its stems or its times."""


@dataclass(frozen=True)
class Interpreter:
    """The interpreter that a submission runs in, by its own account.

    Attributes
    ----------
    executable, version : str
    packages : dict of str to str
        Versions of its packages.
    device : str or None
        Torch's GPU, or ``cpu``; None where the submission does not use torch.
    """

    executable: str
    version: str
    packages: dict[str, str]
    device: str | None = None

    def identity(self) -> dict[str, Any]:
        """What must be the same for all songs of a run."""
        packages = {name: self.packages[name] for name in COMPUTING if name in self.packages}
        return {"version": self.version, "device": self.device, "packages": packages}


def check_submission(folder: Path) -> None:
    """See that a folder holds a submission.

    Raises
    ------
    SubmissionError
        If there is no ``my_submission/aicrowd_wrapper.py`` in it.
    """
    if not (folder / WRAPPER).is_file():
        raise SubmissionError(f"{folder} holds no {WRAPPER.as_posix()}")


class Submission:
    """The process of a submission; start it with ``with``.

    Parameters
    ----------
    folder : Path
        The submission: what holds ``my_submission/aicrowd_wrapper.py``.
    dataset, shared : Path
        What ``AICROWD_DATASET_DIR`` and ``AICROWD_PUBLIC_SHARED_DIR`` name.
    limits : Limits
    log : Path
        Where what it prints is appended, up to :data:`evaluator.replies.LOG` bytes in all.
    ensemble, device, engine : str, optional
        Put in place of the submission's own settings.
    python : Path, optional
        The interpreter that runs it; this one by default.
    readable : sequence of Path
        Files and folders that it may read, too: weights that a plan names by their paths.
    hidden : sequence of Path
        Files and folders that it must not see even where they are in a folder that it may see.
    stems : sequence of str
        What the model must return.

    Attributes
    ----------
    load_seconds : float
        Wall time that making the model took, when it was last made.
    load_peak_memory : int
        Bytes of host memory at most while it was made.
    isolation : list of str
        What it was not kept from, in words; empty where it was kept from everything.
    interpreter : Interpreter or None
        Known once it was started.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Path,
        shared: Path,
        limits: Limits,
        log: Path,
        ensemble: str | None = None,
        device: str | None = None,
        engine: str | None = None,
        *,
        precision: str | None = None,
        python: Path | None = None,
        readable: Sequence[Path] = (),
        hidden: Sequence[Path] = (),
        stems: Sequence[str] = STEMS,
    ) -> None:
        self.folder = folder.resolve()
        self.dataset = dataset.absolute()
        self.shared = shared.absolute()
        self.limits = limits
        self.log = log
        self.python = visible.find_python(python or sys.executable)
        self.readable = [path.absolute() for path in readable]
        self.hidden = [path.resolve() for path in hidden]
        self.options: dict[str, Any] = {
            "ensemble": ensemble,
            "device": device,
            "engine": engine,
            "precision": precision,
            "stems": list(stems),
        }
        self.load_seconds = 0.0
        self.load_peak_memory = 0
        self.isolation: list[str] = []
        self.interpreter: Interpreter | None = None
        self.without: list[str] = []  # namespaces that are not to be used: for tests
        self._running: _Running | None = None

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the process and wait until the model is made.

        Raises
        ------
        SubmissionError
            If there is none, or it cannot be made, or not within the limits.
        """
        check_submission(self.folder)
        try:
            self._running = running = _Running(self)
        except OSError as error:
            raise SubmissionError(f"the submission in {self.folder} cannot be started: {error}") from error
        self._start_interpreter(running)
        limits = self.limits
        limit = min(limits.load_seconds, limits.longest) if limits.enforced else limits.longest
        words = f"loading the model took more than {limit:.0f} s"
        token = secrets.token_hex(8)
        request = {"make": token, "folder": str(self.folder), **self.options}
        began = time.perf_counter()
        reply, self.load_peak_memory, failure = self._ask(request, "made", limit, words)
        if failure is not None:
            raise SubmissionError(
                f"the submission in {self.folder} cannot be made: {self._end(failure, reply)}"
            )
        self.load_seconds = time.perf_counter() - began
        assert self.interpreter is not None
        device = None if reply["device"] is None else clean(reply["device"], 100)
        self.interpreter = Interpreter(**{**asdict(self.interpreter), "device": device})

    def _start_interpreter(self, running: _Running) -> None:
        """Wait for the sandbox, then for the interpreter in it."""
        words = f"it took more than {START:.0f} s to start"
        found, _, failure = self._ask(None, "isolation", START, words)
        if failure is None:
            self.isolation = list(found["isolation"])
            running.know(found["contained"])
            found, _, failure = self._ask({"hello": secrets.token_hex(8)}, "hello", START, words)
        if failure is None:
            running.find_worker()
            packages = {clean(name, 60): clean(version, 40) for name, version in found["packages"].items()}
            self.interpreter = Interpreter(clean(found["executable"]), clean(found["version"], 40), packages)
            return
        self.kill()
        oldest = ".".join(map(str, OLDEST_PYTHON))
        last = "".join(f"; it printed {line}" for line in self.log_tail(1))
        raise SubmissionError(
            f"{self.python} did not start as Python, {oldest} or newer: {failure}{last}; see {self.log.name}"
        )

    def separate(
        self,
        song: str,
        duration: float,
        progress: Callable[[float, float], None] | None = None,
        begin: Callable[[], object] | None = None,
    ) -> Outcome:
        """Have a song separated; starts the process where it is not running.

        After an exception or an exceeded limit the process is ended, since a broken CUDA context, say, would
        fail all later songs. Otherwise it is paused until the next song: nothing watches it in between.

        Parameters
        ----------
        song : str
            Name of its folder in the data set.
        duration : float
            Seconds, which the time limit is a multiple of.
        progress : callable, optional
            Called with seconds of audio done and in all, where the submission reports them.
        begin : callable, optional
            Called when the time begins to count: puts the mixture where the submission sees it.
        """
        if self._running is None:
            self.start()
        assert self._running is not None
        host.reset_peak_memory(self._running.worker)
        if begin is not None:
            begin()
        self._running.resume()
        limits = self.limits
        longest = max(limits.longest, limits.longest_factor * duration)
        words = f"it took more than {longest:.0f} s"
        if limits.enforced and limits.time_factor * duration <= longest:
            longest = limits.time_factor * duration
            words = f"time limit: more than {limits.time_factor:g} × {duration:.1f} s"
        token = secrets.token_hex(8)
        began = time.perf_counter()
        reply, peak, failure = self._ask({"song": song, "token": token}, "done", longest, words, progress)
        seconds = time.perf_counter() - began
        if failure is not None:
            return Outcome(seconds, peak, failure=self._end(failure, reply), ends_challenge=True)
        self._rest()
        findings = reply["findings"]
        failure = clean("; ".join(map(clean, findings[:20]))) or None
        ends = not all(finding.startswith(SCORED) for finding in findings)
        return Outcome(seconds, peak, reply["peak_gpu_memory"], failure, ends)

    def _rest(self) -> None:
        """Pause its processes until the next song, or end them where that is not possible."""
        if self._running is not None and not self._running.pause():
            self.kill()

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of what it printed, fit to be shown."""
        return replies.tail(self.log, lines)

    def kill(self) -> None:
        """End the process and all that it started, at once; does nothing where it is not running."""
        running, self._running = self._running, None
        if running is not None:
            running.kill()

    def _end(self, failure: str, reply: Mapping[str, Any]) -> str:
        """End the process, and add the place of a failure and where to read on."""
        running = self._running
        if "limit" in reply and running is not None:
            running.print_stack()
        self.kill()
        stood = replies.place_of(self.log_tail(STACK), self.folder) if "limit" in reply else None
        if where := reply.get("where"):
            place = f" ({clean(where, 200)}; the whole traceback is in {self.log.name})"
        elif stood is not None:
            place = f" (it was at {stood}; see {self.log.name})"
        elif "failed" in reply or failure.startswith("the process"):
            place = f" (see {self.log.name})"
        else:
            place = ""
        return self.explained(f"{clean(failure) if 'failed' in reply else failure}{place}")

    def _unreachable_link(self) -> str | None:
        """The first link in its folder that leads to what the isolation hides; None without one."""
        if any(note.startswith(sandbox.NO_FILES) for note in self.isolation):
            return None
        shown = [Path(path) for path in (*_spec(self, Path()).readable, *sandbox.SYSTEM)]
        return find_way_out(self.folder, [path.resolve() for path in shown])

    def explained(self, failure: str) -> str:
        """A failure, with what in the submission's folder may have caused it."""
        if pointer := find_pointer(self.folder):
            problem = f"{pointer} is a Git LFS pointer, not the file itself: run git lfs pull in its folder"
            return f"{failure}; {problem}"
        if link := self._unreachable_link():
            return f"{failure}; {link} is a link to what is not in its folder, which it cannot reach"
        return failure

    def _ask(
        self,
        request: Mapping[str, Any] | None,
        kind: str,
        limit: float,
        words: str,
        progress: Callable[[float, float], None] | None = None,
    ) -> tuple[dict[str, Any], int, str | None]:
        """Send a request and wait for its reply: it, the peak of memory in bytes, and what went wrong."""
        assert self._running is not None
        running = self._running
        token = None if request is None else request.get("token", request.get(kind, request.get("make")))
        if request is not None:
            running.send(request)
        watch = Watch(running.below, running.worker, running.scratch, self.limits, limit, words)
        while True:
            if failure := watch.look():
                return {"limit": failure}, watch.peak, failure
            try:
                found, reply = running.reader.next(watch.until_next_look())
            except queue.Empty:
                continue
            except End:
                code = running.exit_code()
                ending = (
                    "closed its replies and did not end"
                    if code is None
                    else f"ended by itself ({_ending(code)})"
                )
                return {}, watch.peak, f"the process {ending}"
            except BadReply as error:
                return {}, watch.peak, f"the submission sent a reply that is {error}"
            if found == "progress" and kind == "done":
                watch.progressed()
                if progress is not None:
                    progress(*reply["progress"])
            elif found == kind and (kind == "isolation" or reply[kind] == token):
                failure = watch.look(last=True)  # before its peak is taken
                return reply, watch.peak, failure
            elif found == "failed" and kind in ("made", "done") and reply["failed"] == token:
                failure = watch.look(last=True) or reply["reason"] or "it failed without a reason"
                return reply, watch.peak, failure
            elif found == "unstarted" and kind == "hello":
                return {}, watch.peak, clean(reply["unstarted"])
            else:
                return {}, watch.peak, f"the submission sent a reply that nothing asked for ({found})"


class _Running:
    """The processes of a submission while they run: launcher, guard, worker, and what the worker starts."""

    def __init__(self, submission: Submission) -> None:
        self.contained = False
        self.worker = 0  # process ids, once they are known
        self.guard: psutil.Process | None = None
        self.scratch = Path(tempfile.mkdtemp(prefix=".private-", dir=submission.shared.parent))
        for name in ("root", "tmp", "home"):
            (self.scratch / name).mkdir()
        spec = _spec(submission, self.scratch)
        direct = os.name != "posix"
        self._before = {process.pid for process in _tree(os.getpid())}
        try:
            self.process = subprocess.Popen(
                spec.command if direct else [sys.executable, "-I", "-S", "-X", "utf8", str(SANDBOX)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=submission.folder,
                env=spec.environment,
                start_new_session=True,
            )
        except OSError:
            remove_tree(self.scratch)
            raise
        RUNNING.add(self.process.pid)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.reader = replies.ReplyReader(self.process.stdout.fileno())
        self.writer = replies.LogWriter(self.process.stderr.fileno(), submission.log)
        if direct:
            self.reader.begin_with({"isolation": [UNKNOWN_SYSTEM], "contained": False})
        else:
            self.send(asdict(spec))

    def send(self, content: Mapping[str, Any]) -> None:
        """Send a line of JSON; gives up after a while, since a submission can fill its own pipe.

        What was not sent gets no reply, so the wait that follows ends by its limit.
        """
        assert self.process.stdin is not None
        line = json.dumps(content).encode("ascii") + b"\n"
        pipe = self.process.stdin.fileno()
        with contextlib.suppress(*GONE):  # it died: the wait that follows finds out
            if os.name != "posix":
                os.write(pipe, line)
                return
            os.set_blocking(pipe, False)
            deadline = time.monotonic() + PATIENCE
            while line and time.monotonic() < deadline:
                if select.select([], [pipe], [], INTERVAL)[1]:
                    with contextlib.suppress(BlockingIOError):  # there is room, but for less
                        line = line[os.write(pipe, line) :]

    def know(self, contained: bool) -> None:
        """Note whether the guard is the first process of a namespace of its own."""
        self.contained = contained
        self.guard = _first_child(self.process.pid)
        if not contained:
            sandbox.adopt_orphans()  # what the submission starts cannot leave this process's tree

    def find_worker(self) -> None:
        """Find the process that the submission runs in."""
        worker = _first_child(self.guard.pid) if self.guard is not None else None
        self.worker = worker.pid if worker is not None else self.process.pid

    def below(self) -> list[psutil.Process]:
        """The submission's own processes: all but the launcher and the guard."""
        ours = {self.process.pid} if self.worker != self.process.pid else set()
        if self.guard is not None:
            ours.add(self.guard.pid)
        return [process for process in self.all() if process.pid not in ours]

    def all(self) -> list[psutil.Process]:
        """All processes that were started for the submission, also those that left their parents.

        A process can leave its session only for a new one, so what is below this process, in another session
        than this one and not another submission's, can only come from here.
        """
        found = {process.pid: process for process in _tree(self.process.pid)}
        if not self.contained and hasattr(os, "getsid"):
            others = {each.pid for pid in RUNNING - {self.process.pid} for each in _tree(pid)}
            for process in _tree(os.getpid())[1:]:
                if process.pid in self._before | others | found.keys():
                    continue
                with contextlib.suppress(OSError):
                    if os.getsid(process.pid) != os.getsid(0):
                        found[process.pid] = process
        return list(found.values())

    def pause(self) -> bool:
        """Stop the submission's processes; False where that cannot be done: they start new ones too fast."""
        deadline = time.monotonic() + PATIENCE
        while awake := [process for process in self.below() if not _is_paused(process)]:
            if time.monotonic() > deadline:
                return False
            for process in awake:
                with contextlib.suppress(*GONE):
                    process.suspend()
        return True

    def resume(self) -> None:
        """Let the submission's processes go on."""
        for process in self.below():
            with contextlib.suppress(*GONE):
                process.resume()

    def print_stack(self) -> None:
        """Have the worker print where all its threads are; it does so in :mod:`faulthandler`."""
        if self.worker and hasattr(signal, "SIGUSR1"):
            with contextlib.suppress(*GONE):
                before = self.writer.read
                psutil.Process(self.worker).send_signal(signal.SIGUSR1)
                deadline = time.monotonic() + STACK_WAIT
                while self.writer.read == before and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(INTERVAL)  # for the rest of it

    def exit_code(self) -> int | None:
        """How the launcher ended; None where it does not end though nothing can reply any more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(PATIENCE)
        return None

    def kill(self) -> None:
        """End all processes; returns when they are gone, or after a while where Linux cannot end one."""
        if self.guard is not None:
            with contextlib.suppress(*GONE):
                if self.contained:
                    self.guard.kill()  # ends everything in its namespace; the launcher ends when that is done
                else:
                    self.guard.terminate()  # it ends its children, faster than they can start others
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE / 2)
        deadline = time.monotonic() + PATIENCE
        if not self.contained and sandbox.LINUX:
            sandbox.end_children(self._is_not_its, PATIENCE)
        while time.monotonic() < deadline:
            alive = [process for process in self.all() if not self._reap(process)]
            if not alive:
                break
            for process in alive:
                with contextlib.suppress(*GONE):
                    process.kill()
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        RUNNING.discard(self.process.pid)
        for thread in (self.reader, self.writer):
            thread.stop(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(*GONE):
                    stream.close()
        remove_tree(self.scratch)

    def _is_not_its(self, pid: int) -> bool:
        """Whether a child of this process was not inherited from the submission."""
        with contextlib.suppress(*GONE):
            return pid in self._before | RUNNING or os.getsid(pid) == os.getsid(0)
        return False

    def _reap(self, process: psutil.Process) -> bool:
        """Whether a process has ended; what this process inherited is removed from the table."""
        if process.pid == self.process.pid:
            return self.process.poll() is not None
        with contextlib.suppress(ChildProcessError):
            if os.name == "posix" and os.waitpid(process.pid, os.WNOHANG)[0]:
                return True
        with contextlib.suppress(*GONE):
            return process.status() == psutil.STATUS_ZOMBIE
        return True


RUNNING: set[int] = set()
"""Process ids of the launchers of all submissions of this process."""
UNKNOWN_SYSTEM = f"{sandbox.NO_FILES}: {sys.platform} has no namespaces"


def _spec(submission: Submission, scratch: Path) -> sandbox.Spec:
    """What the sandbox runs, and what it shows."""
    python, folder = submission.python, submission.folder
    home, temporary = scratch / "home", scratch / "tmp"
    environment = {
        **visible.environment(os.environ),
        "AICROWD_DATASET_DIR": str(submission.dataset),
        "AICROWD_PUBLIC_SHARED_DIR": str(submission.shared),
        "HOME": str(home),
        "TMPDIR": str(temporary),
    }
    readable = [
        folder,
        python,
        *visible.interpreter_folders(python, os.environ, folder, submission.hidden),
        *visible.weights(os.environ),
    ]
    readable += [WORKER.resolve(), STARTUP.resolve(), submission.dataset, *submission.readable]
    if (plan := submission.options["ensemble"]) and Path(plan).is_file():
        readable.append(Path(plan).resolve())
    return sandbox.Spec(
        command=[str(python), str(WORKER.resolve())],
        environment=environment,
        folder=str(folder),
        readable=[str(path) for path in dict.fromkeys(readable) if path.exists()],
        hidden=[str(path) for path in dict.fromkeys(submission.hidden)],
        writable=[str(submission.shared), str(home), str(temporary)],
        scratch=str(scratch),
        memory=submission.limits.memory,
        file_size=FILE,
        without=submission.without,
    )


def find_pointer(folder: Path) -> str | None:
    """The first file in a folder that is a Git LFS pointer, by its path in the folder; None without any."""
    for path in itertools.islice(visible.entries_of(folder), LOOKED_AT):
        with contextlib.suppress(OSError):
            if not path.is_symlink() and path.is_file() and path.stat().st_size < POINTER_SIZE:
                with path.open("rb") as file:
                    if file.read(len(POINTER)) == POINTER:
                        return clean(path.relative_to(folder).as_posix(), 200)
    return None


def find_way_out(folder: Path, shown: Sequence[Path] = ()) -> str | None:
    """The first link in a folder that leads out of it and of what is ``shown``, by its path in the folder."""
    inside = [folder.resolve(), *shown]
    for path in itertools.islice(visible.entries_of(folder), LOOKED_AT):
        with contextlib.suppress(OSError, RuntimeError):
            if path.is_symlink() and not any(map(path.resolve().is_relative_to, inside)):
                return clean(path.relative_to(folder).as_posix(), 200)
    return None


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    with contextlib.suppress(*GONE):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _first_child(pid: int) -> psutil.Process | None:
    """The oldest child of a process."""
    with contextlib.suppress(*GONE):
        return min(psutil.Process(pid).children(), key=lambda child: child.create_time(), default=None)
    return None


def _is_paused(process: psutil.Process) -> bool:
    """Whether a process is stopped, or has ended."""
    with contextlib.suppress(*GONE):
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return True


def _ending(code: int) -> str:
    """Say how a process ended by its exit code; the guard's is 128 + the signal, as a shell's is."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}" if code < 0 else f"exit code {code}"
