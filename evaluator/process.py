"""A submission in a process of its own: asked for songs, watched for time and memory, killed if need be."""

from __future__ import annotations

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

POLL = 0.02  # seconds between two looks at the memory
WORKER = Path(__file__).with_name("worker.py")
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
        Why there is nothing to score.
    """

    seconds: float
    peak_memory: int
    peak_gpu_memory: int | None = None
    failure: str | None = None


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
    ensemble, device : str, optional
        Put in place of the submission's own settings.
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
    ) -> None:
        self.folder = folder
        self.environment = {"AICROWD_DATASET_DIR": str(dataset), "AICROWD_PUBLIC_SHARED_DIR": str(shared)}
        self.limits = limits
        self.log = log
        self.options = {"ensemble": ensemble, "device": device, "cut_network": True}
        self.load_seconds = 0.0
        self.network = "not known: it was never started"
        self._process: subprocess.Popen[str] | None = None
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
            If it cannot be made, or not within the limits where they are enforced.
        """
        self._replies = queue.Queue()
        with self.log.open("ab") as log:
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
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        self._send(self.options)
        seconds = self.limits.load_seconds
        reply, _, failure = self._wait(seconds, f"loading the model took more than {seconds:.0f} s", None)
        if failure is None:
            failure = reply.get("failed")
        if failure is not None:
            self.kill()
            raise SubmissionError(f"the submission in {self.folder} cannot be made: {failure}")
        self.load_seconds, self.network = reply["ready"]["seconds"], reply["ready"]["network"]

    def separate(
        self, song: str, duration: float, progress: Callable[[float, float], None] | None = None
    ) -> Outcome:
        """Have a song separated; starts the process where it is not running.

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
        _reset_peak(self._process.pid)
        began = time.perf_counter()
        self._send({"song": song})
        limit = self.limits.time_factor * duration
        words = f"time limit: more than {self.limits.time_factor:g} × {duration:.1f} s"
        reply, peak, failure = self._wait(limit, words, progress)
        seconds = time.perf_counter() - began
        if failure is not None:
            self.kill()
            return Outcome(seconds, peak, failure=failure)
        if "failed" in reply:
            return Outcome(reply["seconds"], peak, failure=reply["failed"])
        done = reply["done"]
        failure = "; ".join(done["findings"]) or None
        return Outcome(done["seconds"], peak, done["peak_gpu_memory"], failure)

    def kill(self) -> None:
        """End the process and all that it started, at once; does nothing where it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        for child in _tree(process.pid)[1:]:
            with _gone():
                child.kill()
        if hasattr(os, "killpg"):
            with _gone():
                os.killpg(process.pid, signal.SIGKILL)
        with _gone():
            process.kill()
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
        """Wait for a reply: it, the peak of memory in bytes, and why there is none."""
        assert self._process is not None
        pid = self._process.pid
        peak = 0
        began = time.perf_counter()
        while True:
            peak = max(peak, _memory(pid))
            if self.limits.enforced and peak > self.limits.memory:
                return {}, peak, f"memory limit: more than {self.limits.memory / 1e9:g} GB of host memory"
            if self.limits.enforced and time.perf_counter() - began > seconds:
                return {}, peak, words
            try:
                reply = self._replies.get(timeout=POLL)
            except queue.Empty:
                continue
            if reply is END:
                code = self._process.wait()
                return {}, peak, f"the process ended by itself ({_ending(code)})"
            if "progress" in reply:
                if progress is not None:
                    progress(*reply["progress"])
                continue
            return reply, max(peak, _peak(pid)), None


class _gone:
    """Passes over that a process or its pipe is gone."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        return isinstance(error, (OSError, psutil.Error, ValueError))


def _read(stream: Any, replies: queue.Queue[Any]) -> None:
    """Pass lines of JSON on until there are no more."""
    for line in stream:
        replies.put(json.loads(line))
    replies.put(END)


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    with _gone():
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _memory(pid: int) -> int:
    """Bytes of host memory that a process and all below it hold."""
    total = 0
    for process in _tree(pid):
        with _gone():
            total += process.memory_info().rss
    return total


def _reset_peak(pid: int) -> None:
    """Have Linux begin to measure the peak of a process anew."""
    with _gone():
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak(pid: int) -> int:
    """Bytes that Linux saw a process hold at most since then; 0 elsewhere."""
    with _gone():
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _ending(code: int) -> str:
    """Say how a process ended by its exit code."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
