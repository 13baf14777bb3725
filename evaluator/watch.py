"""Watches a submission's processes while a reply is awaited: clock, memory, disk, and whether they work."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from kmdx import host
from kmdx.challenge import MEMORY, TIME_FACTOR

INTERVAL = 0.1  # seconds between two looks at the memory and the clock
SHARE = 0.25  # of the time at most goes into measuring memory
BUSY = 0.02  # seconds of processor time between two looks that show that something goes on
PROCESSES = 500  # processes of a submission at once
FREE = 10**9  # bytes of the disk that it must leave free
GONE = (OSError, psutil.Error, ValueError)
"""What is raised when a process or its pipe no longer exists."""


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
    longest : float
        Seconds after which loading or a song is given up where limits are not enforced, or
    longest_factor : float
        this multiple of the song's duration where that is more.
    stall : float
        Seconds without progress and without processor time after which it is given up in any case.
    """

    time_factor: float = TIME_FACTOR
    memory: int = MEMORY
    enforced: bool = False
    load_seconds: float = 900.0
    longest: float = 3600.0
    longest_factor: float = 100.0
    stall: float = 60.0


class Watch:
    """Checks the limits of one request.

    Parameters
    ----------
    processes : callable
        Gives the submission's processes.
    worker : int
        Id of the process whose own peak the system records.
    scratch : Path
        A folder on the disk that the submission writes to.
    limits : Limits
    limit : float
        Seconds until the reply.
    message : str
        What to report when they have passed.

    Attributes
    ----------
    peak : int
        Bytes of host memory at most.
    """

    def __init__(
        self,
        processes: Callable[[], Sequence[psutil.Process]],
        worker: int,
        scratch: Path,
        limits: Limits,
        limit: float,
        message: str,
    ) -> None:
        self.processes, self.worker, self.scratch = processes, worker, scratch
        self.limits, self.limit, self.message = limits, limit, message
        self.peak = 0
        self.began = self.next = self.active = time.perf_counter()
        self.processor = 0.0
        self.free = _free(scratch)

    def until_next_look(self) -> float:
        """Seconds until :meth:`look` is due."""
        return max(0.0, min(self.next, self.began + self.limit) - time.perf_counter())

    def progressed(self) -> None:
        """Note that the submission reported progress."""
        self.active = time.perf_counter()

    def look(self, last: bool = False) -> str | None:
        """Return which limit was exceeded; None if none was. ``last``: the reply has arrived."""
        now = time.perf_counter()
        looked = False
        if last:
            self.peak = max(self.peak, host.peak_memory(self.worker) or 0)
        elif now >= self.next:
            processes = self.processes()
            looked = bool(processes)
            if len(processes) > PROCESSES:  # measuring so many takes long, and more follow
                return f"it started more than {PROCESSES} processes"
            self.peak = max(self.peak, memory_of(processes, self.worker, above=self.peak))
            self._note_activity(processes, now)
            self.next = now + max(INTERVAL, (time.perf_counter() - now) / SHARE)
        if self.limits.enforced and self.peak > self.limits.memory:
            return f"memory limit: more than {self.limits.memory / 1e9:g} GB of host memory"
        if now - self.began > self.limit:
            return self.message
        if looked and (free := _free(self.scratch)) < FREE and self.free - free > FREE:
            return f"it filled the disk: {free / 1e9:.1f} GB are free"
        if not last and now - self.active > self.limits.stall:
            return f"stalled: no progress and no processor time in {self.limits.stall:.0f} s"
        return None

    def _note_activity(self, processes: Sequence[psutil.Process], now: float) -> None:
        processor = sum(map(_processor_time, processes))
        if abs(processor - self.processor) > BUSY or any(map(_is_busy, processes)):
            self.processor, self.active = processor, now


def memory_of(processes: Sequence[psutil.Process], worker: int, above: int = 0) -> int:
    """Bytes of host memory that processes hold together, shared memory files included.

    What forked processes share counts once. Finding that out takes milliseconds per process, so a sum that
    counts it for each is returned where it does not exceed ``above``.
    """
    pids = [process.pid for process in processes]
    files = _memory_files(pids, worker)
    simple = [_resident(pid) for pid in pids]
    upper = sum(own + shared for own, shared in simple) + files
    if len(pids) <= 1 or upper <= above:
        found = simple
    else:
        found = [_proportional(pid) or held for pid, held in zip(pids, simple, strict=True)]
    # A page of a memory file that is mapped is in both.
    return sum(own for own, _ in found) + max(sum(shared for _, shared in found), files)


def _resident(pid: int) -> tuple[int, int]:
    """Bytes that a process holds: without memory files, and of those."""
    status = Path(f"/proc/{pid}/status")
    with contextlib.suppress(*GONE):
        shared = host.kilobytes(status, "RssShmem") or 0
        return psutil.Process(pid).memory_info().rss - shared, shared
    return 0, 0


def _proportional(pid: int) -> tuple[int, int] | None:
    """The same with the process's share of what it shares with others, where Linux reports it."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    whole, shared = host.kilobytes(rollup, "Pss"), host.kilobytes(rollup, "Pss_Shmem") or 0
    return None if whole is None else (whole - shared, shared)


def _memory_files(pids: Sequence[int], worker: int) -> int:
    """Bytes in files that exist in memory only: the submission's own ``/dev/shm``, and its memfds."""
    total = 0
    with contextlib.suppress(*GONE):
        shm = Path(f"/proc/{worker}/root/dev/shm")
        if shm.stat().st_dev != Path("/dev/shm").stat().st_dev:  # the system's is shared with other programs
            used = os.statvfs(shm)
            total = (used.f_blocks - used.f_bfree) * used.f_frsize
    seen: set[tuple[int, int]] = set()
    for pid in pids:
        with contextlib.suppress(*GONE):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(*GONE):
                    if str(link.readlink()).startswith("/memfd:"):
                        found = link.stat()
                        if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
                            seen.add((found.st_dev, found.st_ino))
                            total += found.st_blocks * 512
    return total


def _processor_time(process: psutil.Process) -> float:
    """Seconds of processor time of a process and of its children that have ended."""
    with contextlib.suppress(*GONE):
        times = process.cpu_times()
        return sum(times[:4])
    return 0.0


def _is_busy(process: psutil.Process) -> bool:
    """Whether a process waits for nothing but a processor or a disk: a busy system may leave it none."""
    with contextlib.suppress(*GONE):
        return process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return False


def _free(folder: Path) -> int:
    """Bytes that are free on a folder's disk."""
    with contextlib.suppress(*GONE):
        return shutil.disk_usage(folder).free
    return 0
