"""Runs a submission in its own process, monitors its time and memory, and kills it if necessary.

Every wait for the submission has a timeout. Nothing that it sends is trusted: the evaluator measures times
itself, and :mod:`evaluator.replies` checks the replies. :mod:`evaluator.sandbox` restricts the submission to
its folder, its interpreter, the weights, the mixture and a folder to write to.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from evaluator import replies, sandbox, visible
from evaluator.replies import BadReply, EndOfReplies, clean
from evaluator.watch import (
    INTERVAL,
    PROCESS_GONE,
    Limits,
    Watch,
    is_paused,
    open_shared_memory,
    processor_time,
)
from kmdx import host
from kmdx.challenge import STEMS
from kmdx.errors import KmdxError
from kmdx.files import remove_tree

KILL_TIMEOUT = 10.0  # seconds until killed processes must be gone
START_TIMEOUT = 120.0  # seconds for an interpreter to start and list its packages
MAX_FILE_SIZE = 16 * 10**9  # bytes of one file that the submission writes
MAX_PAUSED_WORK = 1.0  # seconds of processor time between two songs after which the process is replaced
OLDEST_PYTHON = (3, 8)
WORKER = Path(__file__).with_name("submission_worker.py")
STARTUP = Path(__file__).with_name("startup")
SANDBOX = Path(__file__).with_name("sandbox.py")
WRAPPER = Path("my_submission", "aicrowd_wrapper.py")
SCORED = ("NaN in ", "infinity in ")
"""Prefixes of findings that would not have ended the challenge: it scores such stems anyway."""
POINTER = b"version https://git-lfs.github.com/spec/v1"
POINTER_SIZE = 1024  # bytes; pointers are shorter
STACK_TIMEOUT = 2.0  # seconds for a submission to print its stack
STACK_LINES = 500  # lines at the end of the log that are searched for the stack
STACK_WIDTH = 5000  # characters of such a line: long paths
MAX_ENTRIES = 20_000  # entries of a submission's folder that are searched for pointers and links


class SubmissionError(KmdxError):
    """A submission could not be started."""


@dataclass(frozen=True)
class Outcome:
    """Result of separating one song."""

    seconds: float  # wall time, from the request to its reply
    peak_memory: int  # peak host memory in bytes
    peak_gpu_memory: int | None = None
    """Peak GPU memory in bytes, as the submission reports it; None if torch used no GPU."""
    failure: str | None = None  # why the song failed
    returned_true: bool = True  # whether the wrapper returned True, as the starter kit's does
    ends_challenge: bool = False
    """Whether this failure would have ended the challenge. The challenge converts NaN and infinity to 16-bit
    numbers and scores them; every other failure ends it."""


COMPUTING = (
    "torch", "torchaudio", "demucs", "onnxruntime", "onnxruntime-gpu", "openunmix", "asteroid", "spleeter",
    "tensorflow", "jax", "numpy", "soundfile", "librosa",
)  # fmt: skip
"""Packages whose version may change a submission's stems or times."""


@dataclass(frozen=True)
class Interpreter:
    """The interpreter that a submission runs in, as it describes itself."""

    executable: str
    version: str
    packages: dict[str, str]  # versions of its packages
    device: str | None = None  # torch's GPU, or ``cpu``; None if the submission does not use torch

    def identity(self) -> dict[str, Any]:
        """The properties that must be the same for all songs of a run."""
        packages = {name: self.packages[name] for name in COMPUTING if name in self.packages}
        return {"version": self.version, "device": self.device, "packages": packages}


def check_submission(folder: Path) -> None:
    """Check that a folder contains a submission.

    Raises
    ------
    SubmissionError
        If it does not contain ``my_submission/aicrowd_wrapper.py``.
    """
    if not (folder / WRAPPER).is_file():
        raise SubmissionError(f"{folder} is not a submission: it does not contain {WRAPPER.as_posix()}")


@dataclass(frozen=True)
class SubmissionOptions:
    """How a submission runs."""

    ensemble: str | None = None
    device: str | None = None
    precision: str | None = None
    engine: str | None = None
    """``ensemble``, ``device``, ``precision`` and ``engine``: override the submission's own settings; None
    keeps its setting."""
    python: Path | None = None  # the interpreter that runs it; by default the evaluator's own
    readable: Sequence[Path] = ()
    """More files and folders that it may read, such as weights that a plan names by path."""
    hidden: Sequence[Path] = ()
    """Files and folders that it must not see, even if they are in a folder that it may read."""
    stems: Sequence[str] = STEMS  # the stems that the model must return
    user: int | None = None
    """Id of the user that it runs as, if the system allows it; by default the evaluator's own user."""


class Submission:
    """The process of a submission, as a context manager.

    Parameters
    ----------
    folder : Path
        The folder that contains ``my_submission/aicrowd_wrapper.py``.
    dataset, shared : Path
        Values of ``AICROWD_DATASET_DIR`` and ``AICROWD_PUBLIC_SHARED_DIR``.
    limits : Limits
    log : Path
        What the submission prints is appended to this file, up to :data:`evaluator.replies.LOG` bytes.
    options : SubmissionOptions

    Attributes
    ----------
    load_seconds : float
        Wall time of the last load of the model.
    load_peak_memory : int
        Peak host memory of the last load, in bytes.
    isolation : list of str
        What the sandbox could not prevent; empty if the isolation is complete.
    interpreter : Interpreter or None
        None until the process has started.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Path,
        shared: Path,
        limits: Limits,
        log: Path,
        options: SubmissionOptions = SubmissionOptions(),
    ) -> None:
        self.folder = folder.resolve()
        self.dataset = dataset.absolute()
        self.shared = shared.absolute()
        self.limits = limits
        self.log = log
        self.options = options
        self.python = visible.find_python(options.python or sys.executable)
        self.hidden = [path.resolve() for path in options.hidden]
        self.load_seconds = 0.0
        self.load_peak_memory = 0
        self.isolation: list[str] = []
        self.interpreter: Interpreter | None = None
        self.without: list[str] = []  # namespaces that the sandbox must not use; set by tests
        self._running: _Running | None = None
        self._watch: Watch | None = None  # of the last request

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the process and wait until the model is loaded.

        Raises
        ------
        SubmissionError
            If the folder is not a submission, or the model cannot be loaded within the limits.
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
        options = self.options
        request = {
            "make": token,
            "folder": str(self.folder),
            "ensemble": options.ensemble,
            "device": options.device,
            "engine": options.engine,
            "precision": options.precision,
            "stems": list(options.stems),
        }
        began = time.perf_counter()
        reply, self.load_peak_memory, failure = self._ask(request, "made", limit, words)
        failure = failure or self._note_device(reply)
        if failure is not None:
            raise SubmissionError(
                f"the submission in {self.folder} cannot be loaded: {self._end(failure, reply)}"
            )
        self.load_seconds = time.perf_counter() - began

    def _start_interpreter(self, running: _Running) -> None:
        """Wait for the sandbox, then for the interpreter in it."""
        words = f"it took more than {START_TIMEOUT:.0f} s to start"
        found, _, failure = self._ask(None, "isolation", START_TIMEOUT, words)
        if failure is None:
            self.isolation = list(found["isolation"])
            running.release(found["contained"])
            found, _, failure = self._ask({"hello": secrets.token_hex(8)}, "hello", START_TIMEOUT, words)
        if failure is None:
            running.find_worker()
            packages = {clean(name, 60): clean(version, 40) for name, version in found["packages"].items()}
            if self.interpreter is None:  # a restart does not change it
                executable, version = clean(found["executable"]), clean(found["version"], 40)
                self.interpreter = Interpreter(executable, version, packages)
            return
        self.kill()
        oldest = ".".join(map(str, OLDEST_PYTHON))
        last = "".join(f"; it printed {line}" for line in self.log_tail(1))
        advice = ""
        if self.python.is_relative_to(self.folder):
            advice = "; use an environment outside of the submission's folder: this one is not trusted"
        raise SubmissionError(
            f"{self.python} did not start as Python {oldest} or newer: {failure}{last}; "
            f"see {self.log.name}{advice}"
        )

    def separate(
        self,
        song: str,
        duration: float,
        progress: Callable[[float, float], None] | None = None,
        begin: Callable[[], object] | None = None,
    ) -> Outcome:
        """Make the submission separate a song; start its process first if it is not running.

        The process is killed after an exception or an exceeded limit, because its state may be broken (a
        CUDA context, for example), and all later songs would fail. Otherwise it is paused until the next
        song, because nothing monitors it between songs.

        Parameters
        ----------
        song : str
            Name of its folder in the data set.
        duration : float
            Seconds of audio; the time limit is a multiple of it.
        progress : callable, optional
            Called with the seconds of audio done and in total when the submission reports them.
        begin : callable, optional
            Called when the clock starts; moves the mixture to where the submission can read it.

        Raises
        ------
        SubmissionError
            If its process cannot be started.
        """
        if self._running is not None and self._running.worked_while_paused():
            self.kill()
        if self._running is None:
            self.start()
        assert self._running is not None
        host.reset_peak_memory(self._running.worker)
        limits = self.limits
        longest = max(limits.longest, limits.longest_factor * duration)
        words = f"it took more than {longest:.0f} s"
        if limits.enforced and limits.time_factor * duration <= longest:
            longest = limits.time_factor * duration
            words = f"time limit: more than {limits.time_factor:g} × {duration:.1f} s"
        token = secrets.token_hex(8)
        began = time.perf_counter()
        if begin is not None:
            begin()
        self._running.resume()
        reply, peak, failure = self._ask({"song": song, "token": token}, "done", longest, words, progress)
        if failure is None:
            failure, reply = self._pause(reply)
        seconds = time.perf_counter() - began  # until all its processes have stopped: none works on unseen
        if failure is not None:
            return Outcome(seconds, peak, failure=self._end(failure, reply), ends_challenge=True)
        findings = [text for finding in reply["findings"][:20] if (text := clean(finding))]
        failure = clean("; ".join(findings)) or None
        ends = not all(finding.startswith(SCORED) for finding in findings)
        return Outcome(seconds, peak, reply["peak_gpu_memory"], failure, reply["returned_true"], ends)

    def _note_device(self, reply: Mapping[str, Any]) -> str | None:
        """Remember the first device that a reply names; return a failure if a later reply names another.

        A submission may import torch at any time, so early replies may name no device.
        """
        assert self.interpreter is not None
        device, before = clean(reply["device"] or "", 100), self.interpreter.device
        if device and before not in (None, device):
            return f"its device changed from {before} to {device}"
        self.interpreter = replace(self.interpreter, device=device or before)
        return None

    def _pause(self, reply: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Pause its processes until the next song; return what is wrong, and the reply that belongs to it."""
        assert self._running is not None
        assert self._watch is not None
        if not self._running.pause():
            return "some of its processes kept running after its reply", {}
        failure = self._watch.check(last=True) or self._note_device(reply)
        return failure, {} if failure else reply

    def log_tail(self, lines: int = 20, width: int = 300) -> list[str]:
        """The last lines that the submission printed, cleaned for display."""
        return replies.tail(self.log, lines, width)

    def describe(self, failure: str | None) -> dict[str, Any]:
        """What the report shows about its process, and why it could not be started, if so."""
        return {
            "interpreter": None if self.interpreter is None else asdict(self.interpreter),
            "isolation": list(self.isolation),
            "failure": failure,
            "log_tail": self.log_tail(),
        }

    @property
    def is_running(self) -> bool:
        """Whether its process has been started and not killed."""
        return self._running is not None

    def kill(self) -> None:
        """Kill the process, if it is running, and everything that it started."""
        running, self._running = self._running, None
        if running is not None:
            running.kill()

    def _end(self, failure: str, reply: Mapping[str, Any]) -> str:
        """Kill the process; return the failure with its location in the code and the name of the log."""
        running = self._running
        if "limit" in reply and running is not None:
            running.print_stack()
        self.kill()
        stack_top = (
            replies.place_of(self.log_tail(STACK_LINES, STACK_WIDTH), self.folder)
            if "limit" in reply
            else None
        )
        if where := clean(reply.get("where") or "", 200):
            place = f" ({where}; the full traceback is in {self.log.name})"
        elif stack_top is not None:
            place = f" (it was at {stack_top}; see {self.log.name})"
        elif "failed" in reply or "limit" in reply or failure.startswith("the process"):
            place = f" (see {self.log.name})"
        else:
            place = ""
        return self.explain(f"{failure}{place}")

    def _unreachable_link(self) -> str | None:
        """The first link in its folder to something that the sandbox hides; None if there is no such link."""
        if any(note.startswith(sandbox.NO_FILES) for note in self.isolation):
            return None
        shown = [Path(path) for path in (*_spec(self, Path()).readable, *sandbox.SYSTEM)]
        return find_outside_link(self.folder, [path.resolve() for path in shown])

    def explain(self, failure: str) -> str:
        """A failure, followed by a likely cause if the submission's folder shows one."""
        if pointer := find_pointer(self.folder):
            problem = f"{pointer} is a Git LFS pointer, not the file itself: run git lfs pull in its folder"
            return f"{failure}; {problem}"
        if link := self._unreachable_link():
            return f"{failure}; {link} links to a file outside the submission's folder: copy the file there"
        return failure

    def _ask(
        self,
        request: Mapping[str, Any] | None,
        kind: str,
        limit: float,
        words: str,
        progress: Callable[[float, float], None] | None = None,
    ) -> tuple[dict[str, Any], int, str | None]:
        """Send a request and wait for its reply; return the reply, the peak memory in bytes and a failure."""
        assert self._running is not None
        running = self._running
        token = None if request is None else request.get("token", request.get(kind, request.get("make")))
        if request is not None:
            running.send(request)
        self._watch = watch = Watch(
            running.below,
            running.worker,
            running.shared_memory,
            running.scratch,
            self.limits,
            limit,
            words,
        )
        while True:
            if failure := watch.check():
                return {"limit": failure}, watch.peak, failure
            try:
                found, reply = running.reader.next(watch.until_next_check())
            except queue.Empty:
                continue
            except EndOfReplies:
                code = running.exit_code()
                ending = (
                    "closed its reply pipe but kept running"
                    if code is None
                    else f"exited unexpectedly ({_exit_reason(code)})"
                )
                return {}, watch.peak, f"the process {ending}{watch.shortage()}"
            except BadReply as error:
                return {}, watch.peak, f"the submission sent an invalid reply: {error}"
            if found == "progress" and kind == "done":
                watch.progressed()
                if progress is not None:
                    progress(*reply["progress"])
            elif found == kind and (kind == "isolation" or reply[kind] == token):
                failure = watch.check(last=True)  # updates the peak
                return reply, watch.peak, failure
            elif found == "failed" and kind in ("made", "done") and reply["failed"] == token:
                failure = watch.check(last=True) or clean(reply["reason"]) or "it failed without a message"
                return reply, watch.peak, failure
            elif found == "unstarted" and kind == "hello":
                return {}, watch.peak, clean(reply["unstarted"])
            else:
                return {}, watch.peak, f"the submission sent an unexpected reply ({found})"


class _Running:
    """The running processes of a submission: launcher, guard, worker, and the worker's child processes."""

    def __init__(self, submission: Submission) -> None:
        self.contained = False
        self._processor_time = 0.0  # seconds, when it was paused
        self.worker = 0  # process ids, once they are known
        self.guard: psutil.Process | None = None
        self.shared_memory: int | None = None  # a descriptor of its /dev/shm
        self.scratch = Path(tempfile.mkdtemp(prefix=".private-", dir=submission.shared.parent))
        for name in ("root", "tmp", "home"):
            (self.scratch / name).mkdir()
        spec = _spec(submission, self.scratch)
        direct = os.name != "posix"
        if spec.user is not None and not direct and os.geteuid() == 0:
            for folder in spec.writable:
                _give(Path(folder), spec.user)
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
        LAUNCHERS.add(self.process.pid)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.reader = replies.ReplyReader(self.process.stdout.fileno())
        self.writer = replies.LogWriter(self.process.stderr.fileno(), submission.log)
        if direct:
            self.reader.begin_with({"isolation": [UNKNOWN_SYSTEM], "contained": False})
        else:
            self.send(asdict(spec))

    def send(self, content: Mapping[str, Any]) -> None:
        """Send a line of JSON; give up after a timeout, because the submission may not read its pipe.

        A request that was not sent gets no reply, so the wait for it times out.
        """
        assert self.process.stdin is not None
        line = json.dumps(content).encode("ascii") + b"\n"
        pipe = self.process.stdin.fileno()
        with contextlib.suppress(*PROCESS_GONE):  # the wait that follows reports it
            if os.name != "posix":
                os.write(pipe, line)
                return
            os.set_blocking(pipe, False)
            deadline = time.monotonic() + KILL_TIMEOUT
            while line and time.monotonic() < deadline:
                if select.select([], [pipe], [], INTERVAL)[1]:
                    with contextlib.suppress(BlockingIOError):  # the pipe has room for only a part
                        line = line[os.write(pipe, line) :]

    def release(self, contained: bool) -> None:
        """Let the guard start the interpreter, once nothing of the submission can escape observation.

        ``contained`` is whether the guard is the first process of a PID namespace.
        """
        self.contained = contained
        self.guard = _first_child(self.process.pid)
        if self.guard is not None:
            self.shared_memory = open_shared_memory(self.guard.pid)
        if not contained:
            sandbox.adopt_orphans()  # so that the submission's processes cannot leave this process's tree
        if os.name == "posix":
            self.send({})

    def find_worker(self) -> None:
        """Find the process that the submission runs in."""
        worker = _first_child(self.guard.pid) if self.guard is not None else None
        self.worker = worker.pid if worker is not None else self.process.pid

    def below(self) -> list[psutil.Process]:
        """The submission's own processes: all except the launcher and the guard."""
        ours = {self.process.pid} if self.worker != self.process.pid else set()
        if self.guard is not None:
            ours.add(self.guard.pid)
        return [process for process in self.all() if process.pid not in ours]

    def all(self) -> list[psutil.Process]:
        """All processes that were started for the submission, including orphans.

        A process can leave its session only by starting a new one. So a descendant of this process that is
        in another session, and not part of another submission, belongs to this submission.
        """
        found = {process.pid: process for process in _tree(self.process.pid)}
        if not self.contained and hasattr(os, "getsid"):
            others = {each.pid for pid in LAUNCHERS - {self.process.pid} for each in _tree(pid)}
            for process in _tree(os.getpid())[1:]:
                if process.pid in self._before | others | found.keys():
                    continue
                with contextlib.suppress(OSError):
                    if os.getsid(process.pid) != os.getsid(0):
                        found[process.pid] = process
        return list(found.values())

    def pause(self) -> bool:
        """Pause the submission's processes; False if some of them kept running."""
        deadline = time.monotonic() + KILL_TIMEOUT
        stopped: set[int] = set()
        while awake := [each for each in self.below() if each.pid not in stopped or not is_paused(each)]:
            if time.monotonic() > deadline:
                return False
            stopped |= {process.pid for process in awake}
            for process in awake:
                with contextlib.suppress(*PROCESS_GONE):
                    process.suspend()
        self._processor_time = sum(map(processor_time, self.below()))
        return True

    def worked_while_paused(self) -> bool:
        """Whether its processes used the processor since they were paused: a timer can wake one."""
        return sum(map(processor_time, self.below())) - self._processor_time > MAX_PAUSED_WORK

    def resume(self) -> None:
        """Resume the submission's processes."""
        for process in self.below():
            with contextlib.suppress(*PROCESS_GONE):
                process.resume()

    def print_stack(self) -> None:
        """Make the worker print the stacks of all its threads, with :mod:`faulthandler`."""
        if self.worker and hasattr(signal, "SIGUSR1"):
            with contextlib.suppress(*PROCESS_GONE):
                before = self.writer.read
                psutil.Process(self.worker).send_signal(signal.SIGUSR1)
                deadline = time.monotonic() + STACK_TIMEOUT
                while self.writer.read == before and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(INTERVAL)  # wait for the rest of the output

    def exit_code(self) -> int | None:
        """The launcher's exit code; None if it keeps running although its reply pipe is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(KILL_TIMEOUT)
        return None

    def kill(self) -> None:
        """Kill all processes; return when they are gone, or after a timeout if Linux cannot kill one."""
        if self.guard is not None:
            with contextlib.suppress(*PROCESS_GONE):
                if self.contained:
                    self.guard.kill()  # kills everything in its namespace; then the launcher exits
                else:
                    self.guard.terminate()  # it kills its children faster than they can start others
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_TIMEOUT / 2)
        deadline = time.monotonic() + KILL_TIMEOUT
        if not self.contained and sandbox.LINUX:
            sandbox.end_children(self._is_unrelated, KILL_TIMEOUT)
        while time.monotonic() < deadline:
            alive = [process for process in self.all() if not self._reap(process)]
            if not alive:
                break
            for process in alive:
                with contextlib.suppress(*PROCESS_GONE):
                    process.kill()
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_TIMEOUT)
        LAUNCHERS.discard(self.process.pid)
        for thread in (self.reader, self.writer):
            thread.stop(KILL_TIMEOUT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(*PROCESS_GONE):
                    stream.close()
        if self.shared_memory is not None:
            os.close(self.shared_memory)
        remove_tree(self.scratch)

    def _is_unrelated(self, pid: int) -> bool:
        """Whether a child of this process does not come from the submission."""
        with contextlib.suppress(*PROCESS_GONE):
            return pid in self._before | LAUNCHERS or os.getsid(pid) == os.getsid(0)
        return False

    def _reap(self, process: psutil.Process) -> bool:
        """Whether a process has ended; orphans that this process adopted are reaped."""
        if process.pid == self.process.pid:
            return self.process.poll() is not None
        with contextlib.suppress(ChildProcessError):
            if os.name == "posix" and os.waitpid(process.pid, os.WNOHANG)[0]:
                return True
        with contextlib.suppress(*PROCESS_GONE):
            return process.status() == psutil.STATUS_ZOMBIE
        return True


LAUNCHERS: set[int] = set()
"""Process ids of the launchers of all submissions of this process."""
UNKNOWN_SYSTEM = f"{sandbox.NO_FILES}: {sys.platform} has no namespaces"


def _spec(submission: Submission, scratch: Path) -> sandbox.Spec:
    """What the sandbox runs, and which files it shows."""
    python, folder = submission.python, submission.folder
    home, temporary = scratch / "home", scratch / "tmp"
    environment = {
        **visible.environment(os.environ, folder),
        "AICROWD_DATASET_DIR": str(submission.dataset),
        "AICROWD_PUBLIC_SHARED_DIR": str(submission.shared),
        "HOME": str(home),
        "TMPDIR": str(temporary),
    }
    readable = [
        folder,
        python,
        *visible.interpreter_folders(python, os.environ, folder, submission.hidden),
        *visible.weights(os.environ, folder),
    ]
    options = submission.options
    readable += [WORKER.resolve(), STARTUP.resolve(), submission.dataset]
    readable += [path.absolute() for path in options.readable]
    if (plan := options.ensemble) and Path(plan).is_file():
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
        file_size=MAX_FILE_SIZE,
        without=submission.without,
        user=options.user,
    )


def _give(folder: Path, user: int) -> None:
    """Make a user the owner of a folder and of the folders in it."""
    for path in (folder, *(entry for entry in folder.rglob("*") if entry.is_dir())):
        os.chown(path, user, user, follow_symlinks=False)


def find_pointer(folder: Path) -> str | None:
    """Relative path of the first Git LFS pointer in a folder; None if there is none."""
    for path in itertools.islice(visible.entries_of(folder), MAX_ENTRIES):
        with contextlib.suppress(OSError):
            if not path.is_symlink() and path.is_file() and path.stat().st_size < POINTER_SIZE:
                with path.open("rb") as file:
                    if file.read(len(POINTER)) == POINTER:
                        return clean(path.relative_to(folder).as_posix(), 200)
    return None


def find_outside_link(folder: Path, shown: Sequence[Path] = ()) -> str | None:
    """Relative path of the first link in a folder to a target outside the folder and ``shown``; or None."""
    inside = [folder.resolve(), *shown]
    for path in itertools.islice(visible.entries_of(folder), MAX_ENTRIES):
        with contextlib.suppress(OSError, RuntimeError):
            if path.is_symlink() and not any(map(path.resolve().is_relative_to, inside)):
                return clean(path.relative_to(folder).as_posix(), 200)
    return None


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    with contextlib.suppress(*PROCESS_GONE):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _first_child(pid: int) -> psutil.Process | None:
    """The oldest child of a process."""
    with contextlib.suppress(*PROCESS_GONE):
        return min(psutil.Process(pid).children(), key=lambda child: child.create_time(), default=None)
    return None


def _exit_reason(code: int) -> str:
    """Describe an exit code; the guard's is 128 + the signal, as in a shell."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}" if code < 0 else f"exit code {code}"
