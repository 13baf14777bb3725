"""The queue of uploaded songs, on disk, so that it survives a restart.

``FOLDER/<id>/`` belongs to a job: ``job.json`` is its state, ``song`` the upload, and ``stems/`` has what was
made of it. A folder without ``job.json`` is an upload that was interrupted, or a job that was being deleted;
it is removed at the next start. A job that was running when the server ended is queued again. Names from
outside are never part of a path: an id is random, and only ids of known jobs are looked up.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kmdx import files
from kmdx.errors import KmdxError, KmdxWarning, counted, reason

log = logging.getLogger(__name__)

RECORD, SONG, STEMS = "job.json", "song", "stems"
MAX_TITLE = 150  # characters
MAX_ATTEMPTS = 3  # times that the server may end while it separates a song, before the song has failed
BLOCK = 2**20  # bytes copied at a time
# Marks that change the direction of the text after them: they can disguise a name's ending.
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class QueueFull(KmdxError):
    """As many songs are waiting as may wait."""


class TooLarge(KmdxError):
    """The upload has more bytes than one may have."""


class NoSuchJob(KmdxError):
    """There is no job of this id, or it was deleted."""


class NotNow(KmdxError):
    """The job's state does not allow this."""


class State(str, Enum):
    """What a job is doing."""

    queued = "queued"
    running = "running"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to the job."""
        return self in (State.done, State.failed, State.cancelled)


@dataclass(frozen=True)
class Limits:
    """What the server accepts, and for how long it keeps results."""

    size: int = 500_000_000
    """Bytes of an upload."""
    length: float = 1200.0
    """Seconds of a song."""
    queue: int = 50
    """Songs that wait."""
    keep: float = 24 * 3600.0
    """Seconds for which results are kept."""
    patience: float = 60.0
    """Seconds to wait for the next bytes of a request."""


@dataclass(frozen=True)
class Wish:
    """What to make of a song."""

    ensemble: str
    stems: tuple[str, ...]
    format: str
    """A name in :data:`kmdx.audio.FORMATS`."""


class Job(BaseModel):
    """A song, what to make of it, and its state. Times are in seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    number: int
    """Jobs are separated in the order of their numbers."""
    title: str
    ensemble: str
    stems: tuple[str, ...]
    format: str
    bytes: int
    seconds: float
    """Length of the song."""
    submitted: float
    state: State = State.queued
    attempts: int = 0
    """How often its separation was begun and not ended by the server itself."""
    ended: float | None = None
    worked: float | None = None
    """Seconds that the networks took."""
    files: dict[str, str] = Field(default_factory=dict)
    """The file name of each stem, when the job is done."""
    has_page: bool = False
    error: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def wish(self) -> Wish:
        """What to make of the song; jobs with equal wishes can share networks."""
        return Wish(self.ensemble, self.stems, self.format)


@dataclass(frozen=True)
class Progress:
    """How far a running job is."""

    doing: str = "preparing"
    share: float | None = None
    """From 0 to 1; None if it is not known."""


class Status(NamedTuple):
    """A job, its place in the queue (from 1) if it waits, and how far it is if it is running."""

    job: Job
    position: int | None
    progress: Progress | None


class Queue:
    """The jobs of a folder. Every method may be called by any thread.

    Parameters
    ----------
    folder : Path
        Made if it does not exist; only one process may use it at a time.
    limits : Limits
    check : callable
        Called with the path of an upload, and its title for messages; returns the song's seconds, or raises
        :class:`KmdxError` if it cannot be separated.
    clock : callable
        Returns the seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        check: Callable[[Path, str], float],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.limits = folder, limits
        self._check, self._clock = check, clock
        self._jobs: dict[str, Job] = {}
        self._progress: dict[str, Progress] = {}
        self._stopping: set[str] = set()  # running jobs that are to be cancelled
        self._reserved = 0  # uploads that are being received
        self._changed = threading.Condition()
        with self._changed:
            self._load()

    # ------------------------------------------------------------------------------ what is in it

    def all(self) -> list[Job]:
        """All jobs, the oldest first."""
        with self._changed:
            return [*self._jobs.values()]

    def get(self, id: str) -> Job:
        """A job; raises :class:`NoSuchJob`."""
        with self._changed:
            if id not in self._jobs:
                raise NoSuchJob("there is no such job; results are deleted after a while")
            return self._jobs[id]

    def status(self, id: str) -> Status:
        """A job, and where it is; raises :class:`NoSuchJob`."""
        with self._changed:
            job = self.get(id)
            waiting = [each.id for each in self._jobs.values() if each.state is State.queued]
            place = waiting.index(id) + 1 if job.state is State.queued else None
            is_running = job.state is State.running
            return Status(job, place, self._progress.get(id, Progress()) if is_running else None)

    def song(self, job: Job) -> Path:
        """The uploaded file, which exists until the job is over."""
        return self.folder / job.id / SONG

    def stems(self, job: Job) -> Path:
        """The folder of what was made of it."""
        return self.folder / job.id / STEMS

    def expires(self, job: Job) -> float | None:
        """When a job that is over is deleted, in seconds since 1970."""
        return None if job.ended is None else job.ended + self.limits.keep

    # ------------------------------------------------------------------------------ from outside

    @contextmanager
    def room(self) -> Iterator[None]:
        """Keep a place in the queue for an upload that is being received.

        Raises :class:`QueueFull` if there is none.
        """
        with self._changed:
            self._check_room()
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1

    def add(self, file: BinaryIO, name: str, wish: Wish) -> Job:
        """Queue an uploaded song, whose file name is ``name``.

        Raises :class:`TooLarge`, and :class:`KmdxError` if it is not a song or too long. Then, and after any
        other error, nothing of it is left.
        """
        id, title = secrets.token_hex(12), title_of(name)
        folder = self.folder / id
        folder.mkdir()
        try:
            with files.atomic(folder / SONG) as partial:
                size = _copy(file, partial, self.limits.size)
            job = Job(
                id=id,
                number=0,
                title=title,
                ensemble=wish.ensemble,
                stems=wish.stems,
                format=wish.format,
                bytes=size,
                seconds=self._check(folder / SONG, title),
                submitted=self._clock(),
            )
            with self._changed:
                last = max((each.number for each in self._jobs.values()), default=0)
                self._put(job.model_copy(update={"number": last + 1}))
                return self._jobs[id]
        except BaseException:
            files.remove_tree(folder)
            raise

    def cancel(self, id: str) -> Job:
        """Take a job out of the queue, or stop it soon; raises :class:`NoSuchJob` and :class:`NotNow`."""
        with self._changed:
            job = self.get(id)
            if job.state.is_over:
                raise NotNow(f"this job is {job.state.value} already")
            if job.state is State.queued:
                return self._end(job, State.cancelled)
            self._stopping.add(id)
            return job

    def delete(self, id: str) -> None:
        """Delete a job that is not running; raises :class:`NoSuchJob` and :class:`NotNow`."""
        with self._changed:
            job = self.get(id)
            if job.state is State.running:
                raise NotNow("this job is running: cancel it first")
            self._remove(job)

    def expire(self) -> None:
        """Delete the jobs whose results are too old."""
        with self._changed:
            now = self._clock()
            for job in self.all():
                if (end := self.expires(job)) is not None and end <= now:
                    self._remove(job)

    # ------------------------------------------------------------------------------ for the worker

    def take(self, timeout: float, alike: bool = False) -> list[Job]:
        """Begin the next job, or with ``alike`` all waiting jobs with the same wish; none after ``timeout``.

        ``timeout`` is in seconds.
        """
        with self._changed:

            def waiting() -> list[Job]:
                return [job for job in self._jobs.values() if job.state is State.queued]

            self._changed.wait_for(waiting, timeout)
            group = waiting()
            group = [job for job in group if alike and job.wish == group[0].wish] or group[:1]
            return [
                self._put(job.model_copy(update={"state": State.running, "attempts": job.attempts + 1}))
                for job in group
            ]

    def is_stopping(self, job: Job) -> bool:
        """Whether a running job is to be cancelled."""
        return job.id in self._stopping

    def report(self, job: Job, progress: Progress) -> None:
        """Note how far a running job is."""
        self._progress[job.id] = progress

    def end(self, job: Job, state: State, **facts: Any) -> None:
        """End a running job; ``facts`` are fields of :class:`Job`. Only a done job keeps its stems."""
        with self._changed:
            self._end(self.get(job.id), state, **facts)

    def put_back(self, job: Job) -> None:
        """Queue a running job again, at its old place, because the server ends."""
        with self._changed:
            job = self.get(job.id)
            self._put(job.model_copy(update={"state": State.queued, "attempts": job.attempts - 1}))

    # ------------------------------------------------------------------------------ on disk

    def _check_room(self) -> None:
        waiting = sum(job.state is State.queued for job in self._jobs.values())
        if waiting + self._reserved >= self.limits.queue:
            raise QueueFull(f"the queue is full ({counted(waiting, 'song')} waiting); try again later")

    def _end(self, job: Job, state: State, **facts: Any) -> Job:
        ended = job.model_copy(update={"state": state, "ended": self._clock(), **facts})
        self._put(ended)
        self._stopping.discard(job.id)
        self._progress.pop(job.id, None)
        with suppress(OSError):
            self.song(job).unlink(missing_ok=True)
        if state is not State.done:
            files.remove_tree(self.stems(job))
        return ended

    def _put(self, job: Job) -> Job:
        """Store a job's new state.

        If the disk is full, a known job's state is only kept in memory: after a restart, it is done again.
        """
        try:
            files.write_text(self.folder / job.id / RECORD, job.model_dump_json())
        except OSError as error:
            if job.id not in self._jobs:
                raise
            log.warning("%s cannot be written: %s", self.folder / job.id / RECORD, reason(error))
        self._jobs[job.id] = job
        self._changed.notify_all()
        return job

    def _remove(self, job: Job) -> None:
        del self._jobs[job.id]
        with suppress(OSError):  # the record first: without it, the rest is removed at the next start, too
            (self.folder / job.id / RECORD).unlink(missing_ok=True)
        files.remove_tree(self.folder / job.id)

    def _load(self) -> None:
        """Read the jobs of an earlier run, remove what an interrupted upload left, and queue what ran."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found: list[Job] = []
        for folder in sorted(self.folder.iterdir()):
            if not folder.is_dir() or not re.fullmatch("[0-9a-f]{24}", folder.name):
                continue
            try:
                job = Job.model_validate_json((folder / RECORD).read_bytes())
                if job.id != folder.name:
                    raise ValueError("it belongs to another job")
                found.append(job)
            except FileNotFoundError:
                files.remove_tree(folder)
            except (OSError, ValidationError, ValueError) as error:
                warnings.warn(f"{folder / RECORD} cannot be used: {error}", KmdxWarning, stacklevel=2)
        for job in sorted(found, key=lambda job: job.number):
            self._jobs[job.id] = job
            if job.state is not State.running:
                continue
            if job.attempts < MAX_ATTEMPTS:
                self._put(job.model_copy(update={"state": State.queued}))
            else:
                why = f"the server ended {job.attempts} times while it separated this song"
                self._end(job, State.failed, error=why)
        self.expire()


def title_of(name: str) -> str:
    """What a song is called, from the file name that a stranger gave it: one line, without folders.

    Control characters, and marks that change the direction of text, are removed. Browsers send quotes and
    line breaks as ``%22``, ``%0A`` and ``%0D``, but percent signs as they are.
    """
    name = re.sub("%(22|0[AD])", lambda match: '"' if match[1] == "22" else " ", name)
    name = name.encode("utf-8", "replace").decode()
    name = name.replace("\\", "/").rpartition("/")[2]
    name = _DIRECTION.sub("", name)
    name = "".join(" " if unicodedata.category(each) in ("Cc", "Zl", "Zp") else each for each in name)
    stem, extension = os.path.splitext(" ".join(name.split()))  # noqa: PTH122 (not a path)
    if not re.fullmatch(r"\.[A-Za-z0-9]{1,5}", extension):
        stem += extension
    return stem.strip(". ")[:MAX_TITLE].strip() or "song"


def _copy(source: BinaryIO, target: Path, most: int) -> int:
    """Copy a file; return its bytes. Raises :class:`TooLarge` if they are more than ``most``."""
    size = 0
    with target.open("xb") as file:
        while block := source.read(BLOCK):
            size += len(block)
            if size > most:
                raise TooLarge(f"the file is larger than {most / 1e6:g} MB, the most that this server takes")
            file.write(block)
    return size
