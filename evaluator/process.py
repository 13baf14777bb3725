"""A submission in a process of its own: asked for songs, watched for time and memory, killed if need be."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kmdx.errors import KmdxError

LOOK = 0.1  # seconds between two looks at the memory and the clock
PATIENCE = 10.0  # seconds for the guard to end all that was started
WORKER = Path(__file__).with_name("worker.py")
WRAPPER = Path("my_submission", "aicrowd_wrapper.py")
END = object()


class SubmissionError(KmdxError):
    """A submission that could not be started."""


@dataclass(frozen=True)
class Limits:
    """What a song may take.

    Attributes
    ----------
    time_factor : float
        Wall time, as a multiple of the song's duration.
    memory : int
        Host memory in bytes, of the process and all that it starts.
    enforced : bool
        Whether a song that takes more is killed; it is measured in any case.
    load_seconds : float
        What loading the model may take where limits are enforced.
    """

    time_factor: float = 1.57
    memory: int = 16 * 10**9
    enforced: bool = False
    load_seconds: float = 900.0


@dataclass(frozen=True)
class Outcome:
    """What became of a song.

    Attributes
    ----------
    seconds : float
        Wall time.
    peak_memory : int
        Bytes of host memory at most.
    peak_gpu_memory : int or None
        Bytes of GPU memory at most, where torch used one.
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
        Where what it prints is appended.
    ensemble, device, engine : str, optional
        Put in place of the submission's own settings.

    Attributes
    ----------
    load_seconds : float
        Wall time that making the model took, when it was last made.
    load_peak_memory : int
        Bytes of host memory at most while it was made.
    isolation : list of str
        What the submission is not kept from.
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
    ) -> None:
        self.folder = folder
        self.environment = {
            "AICROWD_DATASET_DIR": str(dataset),
            "AICROWD_PUBLIC_SHARED_DIR": str(shared),
            "PYTHONIOENCODING": "utf-8:backslashreplace",  # the log takes all that a submission prints
        }
        if models := os.environ.get("KMDX_MODELS"):  # the process has another current folder
            self.environment["KMDX_MODELS"] = str(Path(models).expanduser().absolute())
        self.limits = limits
        self.log = log
        self.options = {"ensemble": ensemble, "device": device, "engine": engine, "cut_network": True}
        self.load_seconds = 0.0
        self.load_peak_memory = 0
        self.isolation: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._worker = 0  # the process that the submission runs in: on Linux below _process, the guard
        self._replies: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the process and wait until the model is made.

        Raises
        ------
        SubmissionError
            If there is none, or it cannot be made, or not within the limits where they are enforced.
        """
        check_submission(self.folder)
        self._replies = queue.Queue()
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=self.folder,
                    env={**os.environ, **self.environment},
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,
                )
            except OSError as error:
                raise SubmissionError(
                    f"the submission in {self.folder} cannot be started: {error}"
                ) from error
        self._worker = self._process.pid
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        self._send(self.options)
        seconds = self.limits.load_seconds
        words = f"loading the model took more than {seconds:.0f} s"
        reply, self.load_peak_memory, failure = self._wait(seconds, words, None)
        if failure is not None:
            self.kill()
            raise SubmissionError(f"the submission in {self.folder} cannot be made: {failure}")
        self.load_seconds = reply["seconds"]
        network = reply["network"]
        self.isolation = [] if network == "cut" else [f"it could reach the network: {network}"]

    def separate(
        self, song: str, duration: float, progress: Callable[[float, float], None] | None = None
    ) -> Outcome:
        """Have a song separated; starts the process where it is not running.

        After an exception or a passed limit the process is ended, since a broken CUDA context, say, would
        fail all later songs. What is only found in the returned stems leaves it running.

        Parameters
        ----------
        song : str
            Name of its folder in the data set.
        duration : float
            Seconds, which the time limit is a multiple of.
        progress : callable, optional
            Called with seconds of audio done and in all, where the submission tells.
        """
        if self._process is None:
            self.start()
        assert self._process is not None
        _reset_peak(self._worker)
        began = time.perf_counter()
        self._send({"song": song})
        limit = self.limits.time_factor * duration
        words = f"time limit: more than {self.limits.time_factor:g} × {duration:.1f} s"
        reply, peak, failure = self._wait(limit, words, progress)
        seconds = reply.get("seconds", time.perf_counter() - began)
        if failure is not None:
            self.kill()
            return Outcome(seconds, peak, failure=failure, ends_challenge=True)
        failure = "; ".join(reply["findings"]) or None
        return Outcome(seconds, peak, reply["peak_gpu_memory"], failure, reply["ends_challenge"])

    def kill(self) -> None:
        """End the process and all that it started, at once; does nothing where it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._worker != process.pid:
            process.terminate()  # the guard ends all the others
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        if process.poll() is None:
            for each in reversed(_tree(process.pid)):
                with _gone():
                    each.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with _gone():
                    stream.close()

    def _send(self, content: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with _gone():  # it died: the wait that follows says so
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def _wait(
        self, seconds: float, words: str, progress: Callable[[float, float], None] | None
    ) -> tuple[dict[str, Any], int, str | None]:
        """Wait for a reply: it, the peak of memory in bytes, and why the submission failed."""
        assert self._process is not None
        peak = 0
        began = look = time.perf_counter()
        while True:
            now = time.perf_counter()
            if now >= look:
                peak, look = max(peak, self._memory()), now + LOOK
            if failure := self._over(peak, now - began, seconds, words):
                return {}, peak, failure
            try:
                reply = self._replies.get(timeout=max(0.0, look - time.perf_counter()))
            except queue.Empty:
                continue
            if reply is END:
                code = self._process.wait()
                return {}, peak, f"the process ended by itself ({_ending(code)})"
            if "pid" in reply:
                self._worker = reply["pid"]
            elif "progress" in reply:
                if progress is not None:
                    progress(*reply["progress"])
            else:
                peak = max(peak, _peak(self._worker))
                over = self._over(peak, reply["seconds"], seconds, words)
                return reply, peak, over or reply.get("failed")

    def _over(self, peak: int, seconds: float, limit: float, words: str) -> str | None:
        """Say which limit was passed, where limits are enforced."""
        if self.limits.enforced and peak > self.limits.memory:
            return f"memory limit: more than {self.limits.memory / 1e9:g} GB of host memory"
        return words if self.limits.enforced and seconds > limit else None

    def _memory(self) -> int:
        """Bytes of host memory that the submission and all that it started hold now."""
        assert self._process is not None
        pids = [each.pid for each in _tree(self._process.pid)]
        if self._worker != self._process.pid:
            pids = pids[1:]  # the guard is ours
        # What forked processes share counts once; for one alone, that would be a slow way to the same.
        return sum(map(_share if len(pids) > 1 else _resident, pids))


class _gone:
    """Passes over that a process or its pipe is gone."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        return isinstance(error, (OSError, psutil.Error, ValueError))


def _read(stream: Any, replies: queue.Queue[Any]) -> None:
    """Pass lines of JSON on until there are no more."""
    with _gone():  # the last line of a process that crashed may be cut short
        for line in stream:
            replies.put(json.loads(line))
    replies.put(END)


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    with _gone():
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _resident(pid: int) -> int:
    """Bytes of host memory that a process holds, shared or not."""
    with _gone():
        return psutil.Process(pid).memory_info().rss
    return 0


def _share(pid: int) -> int:
    """Bytes of host memory that a process holds, with its share of what it shares where Linux tells."""
    with _gone():
        return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")
    return _resident(pid)


def _reset_peak(pid: int) -> None:
    """Have Linux begin to measure the peak of a process anew."""
    with _gone():
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak(pid: int) -> int:
    """Bytes that Linux saw a process hold at most since then; 0 elsewhere."""
    with _gone():
        return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:")
    return 0


def _kilobytes(file: Path, name: str) -> int:
    """Bytes that a line ``name 123 kB`` of a file of Linux tells."""
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{file} has no {name}")


def _ending(code: int) -> str:
    """Say how a process ended by its exit code; the guard's is 128 + the signal, as a shell's is."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}" if code < 0 else f"exit code {code}"
