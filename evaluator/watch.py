"""Watches a submission's processes during a request: time, memory, disk space and activity."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from kmdx import host
from kmdx.challenge import MEMORY, TIME_FACTOR

INTERVAL = 0.1  # seconds between two checks
MEASURING_SHARE = 0.25  # largest part of the time that measuring memory may take
BUSY = 0.02  # seconds of processor time between two checks that count as activity
MAX_PROCESSES = 500  # processes of a submission at once
MAX_THREADS = 1024 + 16 * (os.cpu_count() or 1)  # of all its processes; more would starve the evaluator
MAX_FILES = 20_000  # open files of all its processes
MAX_SHARE = 0.9  # of the machine's memory, whether limits are enforced or not
NEARLY_ALL = "; it had used nearly all memory of this machine"
MIN_FREE = 10**9  # bytes that a submission must leave free on the disk
MIN_FREE_FILES = 10**5  # files and folders that must still fit on the disk
PROCESS_GONE = (OSError, psutil.Error, ValueError)
"""Exceptions that mean that a process or its pipe no longer exists."""


@dataclass(frozen=True)
class Limits:
    """Time and memory that a submission may use."""

    time_factor: float = TIME_FACTOR  # wall time of a song, as a multiple of its duration
    memory: int = MEMORY  # host memory in bytes, of the process and everything that it starts
    enforced: bool = False
    """Whether the process is killed when it exceeds a limit. Time and memory are measured in any case."""
    load_seconds: float = 900.0  # seconds for loading the model if limits are enforced
    longest: float = 3600.0
    """Seconds for loading the model or for a song even if limits are not enforced. A song may take longer if
    ``longest_factor`` allows it."""
    longest_factor: float = 100.0
    """Wall time of a song even if limits are not enforced, as a multiple of its duration."""
    stall: float = 60.0
    """Seconds without progress and without processor time, after which the process is always killed."""


class Room(NamedTuple):
    """What is free on a disk: bytes, and the number of files and folders that still fit."""

    bytes: int
    files: int


class UnmeasurableError(Exception):
    """A submission's memory cannot be measured."""


class Watch:
    """Checks the limits of one request.

    Parameters
    ----------
    processes : callable
        Returns the submission's processes.
    worker : int
        Id of the process for which the operating system records the peak memory.
    shared_memory : int or None
        An open descriptor of the submission's own ``/dev/shm``; None if it has none.
    scratch : Path
        A folder on the disk that the submission writes to.
    limits : Limits
    limit : float
        Seconds until the reply must arrive.
    message : str
        The failure to report if it does not.

    Attributes
    ----------
    peak : int
        Peak host memory in bytes.
    """

    def __init__(
        self,
        processes: Callable[[], Sequence[psutil.Process]],
        worker: int,
        shared_memory: int | None,
        scratch: Path,
        limits: Limits,
        limit: float,
        message: str,
    ) -> None:
        self.processes, self.worker, self.scratch = processes, worker, scratch
        self.shared_memory = shared_memory
        self.limits, self.limit, self.message = limits, limit, message
        self.peak = 0
        self.began = self.next = self.active = time.perf_counter()
        self.processor = 0.0
        self.free = _free(scratch)
        self.least = Room(min(MIN_FREE, self.free.bytes // 2), min(MIN_FREE_FILES, self.free.files // 2))
        self.most = MAX_SHARE * (host.memory() or math.inf)

    def until_next_check(self) -> float:
        """Seconds until :meth:`check` is due."""
        return max(0.0, min(self.next, self.began + self.limit) - time.perf_counter())

    def progressed(self) -> None:
        """Record that the submission reported progress."""
        self.active = time.perf_counter()

    def check(self, last: bool = False) -> str | None:
        """Return which limit was exceeded, or None. ``last`` means that the reply has arrived."""
        now = time.perf_counter()
        measured = False
        if last:
            self.peak = max(self.peak, host.peak_memory(self.worker) or 0)
        elif now >= self.next:
            processes = self.processes()
            measured = bool(processes)
            if len(processes) > MAX_PROCESSES:  # measuring them all would take too long
                return f"it started more than {MAX_PROCESSES} processes"
            if sum(map(_threads, processes)) > MAX_THREADS:
                return f"it started more than {MAX_THREADS} threads"
            try:
                self.peak = max(self.peak, memory_of(processes, self.shared_memory, above=self.peak))
            except UnmeasurableError as error:
                return str(error)
            self._note_activity(processes, now)
            self.next = now + max(INTERVAL, (time.perf_counter() - now) / MEASURING_SHARE)
        if self.limits.enforced and self.peak > self.limits.memory:
            return f"memory limit: more than {self.limits.memory / 1e9:g} GB of host memory"
        if self._is_nearly_all():  # the system would soon kill any process
            return f"it used nearly all memory of this machine: {self.peak / 1e9:.1f} GB"
        if now - self.began > self.limit:
            return self.message
        if (measured or last) and (filled := self._filled_disk()):
            return filled
        if not last and now - self.active > self.limits.stall:
            return f"stalled: no progress and no processor time for {self.limits.stall:.0f} s"
        return None

    def shortage(self) -> str:
        """A remark if so much memory was used that the system may have killed the process."""
        return NEARLY_ALL if self._is_nearly_all() else ""

    def _is_nearly_all(self) -> bool:
        return self.peak > self.most

    def _filled_disk(self) -> str | None:
        """The failure if the submission filled its disk; None if enough is left, or it was full before."""
        left = _free(self.scratch)
        if left.bytes < self.least.bytes and self.free.bytes - left.bytes > self.least.bytes:
            return f"it filled the disk: only {left.bytes / 1e9:.1f} GB are free"
        if left.files < self.least.files and self.free.files - left.files > self.least.files:
            return f"it filled the disk: only {left.files} more files fit on it"
        return None

    def _note_activity(self, processes: Sequence[psutil.Process], now: float) -> None:
        processor = sum(map(processor_time, processes))
        if abs(processor - self.processor) > BUSY or any(map(_is_busy, processes)):
            self.processor, self.active = processor, now


def memory_of(processes: Sequence[psutil.Process], shared_memory: int | None, above: int = 0) -> int:
    """Bytes of host memory that processes use together, including files in shared memory.

    Memory that forked processes share counts once. Measuring this takes milliseconds per process, so it is
    only done if the simple sum, which counts shared memory for each process, exceeds ``above``.

    Raises
    ------
    UnmeasurableError
        If a process hides its open files, or if all have more than :data:`MAX_FILES` open.
    """
    pids = [process.pid for process in processes]
    files = _memory_files(pids, shared_memory)
    simple = [_resident(pid) for pid in pids]
    upper = sum(own + shared for own, shared in simple) + files
    if len(pids) <= 1 or upper <= above:
        found = simple
    else:
        found = [_proportional(pid) or _resident(pid) for pid in pids]  # of one that has exited by now: 0
    # A mapped page of a memory file is in both numbers.
    return sum(own for own, _ in found) + max(sum(shared for _, shared in found), files)


def _resident(pid: int) -> tuple[int, int]:
    """Bytes that a process uses, first without memory files, then in memory files."""
    status = _folder(pid) / "status"
    if (whole := host.kilobytes(status, "VmRSS")) is not None:
        shared = host.kilobytes(status, "RssShmem") or 0
        return whole - shared, shared
    with contextlib.suppress(*PROCESS_GONE):
        return psutil.Process(pid).memory_info().rss, 0
    return 0, 0


def _proportional(pid: int) -> tuple[int, int] | None:
    """The same with only a proportional share of shared memory; None if Linux does not report it."""
    rollup = _folder(pid) / "smaps_rollup"
    whole, shared = host.kilobytes(rollup, "Pss"), host.kilobytes(rollup, "Pss_Shmem") or 0
    return None if whole is None else (whole - shared, shared)


def _memory_files(pids: Sequence[int], shared_memory: int | None) -> int:
    """Bytes in files that exist only in memory: the submission's own ``/dev/shm`` and its memfds."""
    total = 0
    if shared_memory is not None:
        used = os.fstatvfs(shared_memory)
        total = (used.f_blocks - used.f_bfree) * used.f_frsize
    seen: set[tuple[int, int]] = set()
    for number, link in enumerate(link for pid in pids for link in _open_files(pid)):
        if number == MAX_FILES:  # looking at them all would take too long
            raise UnmeasurableError(f"it opened more than {MAX_FILES} files")
        with contextlib.suppress(*PROCESS_GONE):
            if str(link.readlink()).startswith("/memfd:"):
                found = link.stat()
                if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    total += found.st_blocks * 512
    return total


def _open_files(pid: int) -> Iterator[Path]:
    """The links in ``/proc`` to a process's open files; none if it has ended.

    Raises
    ------
    UnmeasurableError
        If it is alive but does not allow other processes of its user to see them.
    """
    folder = _folder(pid)
    with contextlib.suppress(*PROCESS_GONE):
        try:
            yield from (folder / "fd").iterdir()
        except PermissionError as error:  # also for a process that is just ending, which has no memory
            if host.kilobytes(folder / "status", "VmRSS") is not None:
                raise UnmeasurableError("one of its processes hides its memory from the evaluator") from error


def open_shared_memory(pid: int) -> int | None:
    """Open the ``/dev/shm`` that a process sees; None if it is the system's own or does not exist (Linux)."""
    with contextlib.suppress(*PROCESS_GONE):
        opened = os.open(f"/proc/{pid}/root/dev/shm", os.O_RDONLY | os.O_DIRECTORY)
        if os.fstat(opened).st_dev != Path("/dev/shm").stat().st_dev:
            return opened
        os.close(opened)
    return None


def processor_time(process: psutil.Process) -> float:
    """Seconds of processor time of a process and its ended children."""
    with contextlib.suppress(*PROCESS_GONE):
        times = process.cpu_times()
        return sum(times[:4])
    return 0.0


def is_paused(process: psutil.Process) -> bool:
    """Whether all threads of a process that got SIGSTOP are stopped or have ended.

    The first thread may end before the others. One that waits in the kernel (``D``) stops before it runs
    again; after ``vfork``, it waits for a child that is stopped.
    """
    with contextlib.suppress(*PROCESS_GONE):
        if states := _thread_states(process.pid):
            return all(state in "TtDZXx" for state in states.values())
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return True


def _thread_states(pid: int) -> dict[Path, str]:
    """Folder and state (``R``, ``T``, …) of each of a process's threads; empty if not listed."""
    states: dict[Path, str] = {}
    with contextlib.suppress(*PROCESS_GONE):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(*PROCESS_GONE):
                # "id (name) state …", where the name may contain anything
                states[thread] = (thread / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    return states


def _folder(pid: int) -> Path:
    """The folder of a process in ``/proc``, or of a thread of it that still runs if the first has ended."""
    folder = Path(f"/proc/{pid}")
    if host.kilobytes(folder / "status", "VmRSS") is None:
        states = _thread_states(pid)
        return next((thread for thread, state in states.items() if state not in "ZXx"), folder)
    return folder


def _is_busy(process: psutil.Process) -> bool:
    """Whether a process waits only for a processor or a disk, which a busy system may not give it."""
    with contextlib.suppress(*PROCESS_GONE):
        return process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return False


def _threads(process: psutil.Process) -> int:
    with contextlib.suppress(*PROCESS_GONE):
        return process.num_threads()
    return 0


def _free(folder: Path) -> Room:
    """What is free on a folder's disk; ``files`` is 0 if the disk does not limit their number."""
    with contextlib.suppress(*PROCESS_GONE):
        if hasattr(os, "statvfs"):
            found = os.statvfs(folder)
            return Room(found.f_bavail * found.f_frsize, found.f_favail)
        return Room(shutil.disk_usage(folder).free, 0)
    return Room(0, 0)
