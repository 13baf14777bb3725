"""Separates the songs of the queue: one after another on this machine, or several at a time on a cluster."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmdx import plan_file, speeds, weights
from kmdx.errors import AudioError, KmdxError, KmdxWarning, first_line
from kmdx.inputs import InputSong
from kmdx.plan import Plan
from kmdx.web.jobs import STEMS, Job, Progress, Queue, State, Wish

if TYPE_CHECKING:  # they import torch, which takes a second
    from kmdx import batch
    from kmdx.cluster import ClusterOptions

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.5  # seconds between two looks at whether the server ends
_local = threading.local()


class Stopped(BaseException):
    """The song is cancelled, or the server ends. No library catches it as one of its own errors."""


@dataclass(frozen=True)
class Machine:
    """Where and how songs are separated: options of ``kmdx separate``."""

    device: str = "auto"
    speed: str = speeds.DEFAULT
    precision: str = "auto"
    engine: str = "tuned"
    cluster: ClusterOptions | None = None


class Worker(threading.Thread):
    """The thread that separates the songs of a queue.

    :meth:`stop` ends it; a song that is running is queued again.
    """

    def __init__(self, queue: Queue, machine: Machine) -> None:
        super().__init__(name="kmdx separation", daemon=True)
        self.queue, self.machine = queue, machine
        self._ending = threading.Event()
        self._loaded: tuple[tuple[Wish, str], batch.SongWorker] | None = None

    def stop(self, timeout: float) -> None:
        """End, after the current window of the current song; wait for at most ``timeout`` seconds."""
        self._ending.set()
        if self.ident is not None:
            self.join(timeout)

    def run(self) -> None:
        """Separate songs until the end."""
        while not self._ending.is_set():
            if group := self.queue.take(POLL_INTERVAL, alike=self.machine.cluster is not None):
                self._separate(group)

    def _separate(self, group: Sequence[Job]) -> None:
        """Separate jobs with the same wish, and store what became of each."""
        left = {job.id: job for job in group}
        fault = None
        try:
            with noted() as remarks:
                work = self._here(group[0]) if self.machine.cluster is None else self._on_cluster(group)
                for job, result, seconds in work:
                    self._end(job, result, seconds, remarks)
                    del left[job.id]
                    remarks.clear()
        except Stopped:
            pass
        except KmdxError as error:
            fault = str(error)
        except Exception as error:  # a fault of the program: the other songs go on
            log.exception("a song could not be separated")
            fault = f"{type(error).__name__}: {first_line(error)}"
        for job in left.values():
            if self.queue.is_stopping(job):
                self.queue.end(job, State.cancelled)
            elif fault is not None:
                self.queue.end(job, State.failed, error=self._named(fault, job))
            else:
                self.queue.put_back(job)

    def _end(
        self, job: Job, result: batch.SongResult, seconds: float | None, remarks: Sequence[str] = ()
    ) -> None:
        """Make the listening page of a separated song, and store the result."""
        from kmdx import audio, listening

        if self.queue.is_stopping(job):
            self.queue.end(job, State.cancelled)
            return
        if result.error is not None:
            self.queue.end(job, State.failed, error=self._named(result.error, job))
            return
        self.queue.report(job, Progress("making the page"))
        found = [*result.warnings, *remarks]
        has_page = True
        try:
            listening.make(self.queue.stems(job), listening.Song(self.queue.song(job)), title=job.title)
        except KmdxError as error:  # the stems are finished nevertheless
            has_page = False
            found.append(str(error))
        extension = audio.FORMATS[job.format].extension
        self.queue.end(
            job,
            State.done,
            worked=seconds,
            files={stem: f"{stem}{extension}" for stem in job.stems},
            has_page=has_page,
            warnings=tuple(dict.fromkeys(self._named(each, job) for each in found)),
        )

    def _here(self, job: Job) -> Iterator[tuple[Job, batch.SongResult, float | None]]:
        """Separate one song on this machine, with the networks of the last one if they are the same."""
        from kmdx import batch

        plan = plan_file.load(job.ensemble)
        self._download(plan, job)
        key = (job.wish, plan.digest)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # frees the memory first
            self._loaded = key, batch.SongWorker(self._batch(plan, job.wish))
        watch = _Watch()

        def progress(done: float, total: float) -> None:
            self._check(job)
            watch.look()
            self.queue.report(job, Progress("separating", done / total if total else None))

        result = self._loaded[1].separate(self._song(job), progress)
        yield job, result, watch.seconds

    def _on_cluster(self, group: Sequence[Job]) -> Iterator[tuple[Job, batch.SongResult, float | None]]:
        """Separate songs on a cluster, which is connected. It ends only if nobody waits for any of them."""
        from kmdx import cluster

        assert self.machine.cluster is not None
        songs = [self._song(job) for job in group]
        work = self._batch(plan_file.load(group[0].ensemble), group[0].wish)
        pool = cluster.pool_of(songs, work, self.machine.cluster)
        left = {job.id: job for job in group}
        watches = [_Watch() for _ in group]

        def look() -> None:
            for worker in pool.workers:
                for number, (done, total) in worker.progress.items():
                    watches[number].look()
                    share = done / total if total else None
                    self.queue.report(group[number], Progress(f"separating on {worker.node}", share))
            if self._ending.is_set() or all(map(self.queue.is_stopping, left.values())):
                raise Stopped

        for event in pool.run(look):
            if isinstance(event, cluster.Finished):
                job = group[event.number]
                del left[job.id]
                yield job, cluster.result_of(event, songs, work), watches[event.number].seconds
            else:
                log.log(logging.WARNING if event.is_warning else logging.INFO, "%s", event.text)

    def _download(self, plan: Plan, job: Job) -> None:
        """Download the weights that are missing here, if they have sources."""
        uses = {use.weight.name: use.weight for use in plan.uses(job.stems).values()}
        found = weights.find_all(uses.values())
        missing = [weight for name, weight in uses.items() if found[name] is None and weight.sources]

        def progress(done: int, total: int | None) -> None:
            self._check(job)
            amount = f"{done / 1e6:.0f}" + (f" of {total / 1e6:.0f}" if total else "")
            self.queue.report(
                job, Progress(f"downloading weights, {amount} MB", done / total if total else None)
            )

        if missing:
            self.queue.report(job, Progress("downloading weights"))
        for _ in weights.pull_all(missing, progress=progress):
            self._check(job)

    def _batch(self, plan: Plan, wish: Wish) -> batch.Job:
        from kmdx import batch

        options = batch.SeparateOptions(
            ensemble=wish.ensemble,
            device=self.machine.device,
            speed=self.machine.speed,
            precision=self.machine.precision,
            engine=self.machine.engine,
            downmix=True,
            format=wish.format,
        )
        return batch.Job(self.queue.folder.absolute(), plan, wish.stems, options)

    def _song(self, job: Job) -> InputSong:
        return InputSong(self.queue.song(job).absolute(), f"{job.id}/{STEMS}")

    def _check(self, job: Job) -> None:
        """Raise :class:`Stopped` if nobody waits for a song any more."""
        if self._ending.is_set() or self.queue.is_stopping(job):
            raise Stopped

    def _named(self, text: str, job: Job) -> str:
        """A message with the song's title instead of paths on the server."""
        for folder in (self.queue.folder.absolute(), self.queue.folder):
            text = text.replace(f"{folder / job.id / STEMS}/", "")
            text = text.replace(str(folder / job.id / STEMS), job.title)
            text = text.replace(str(folder / job.id / "song"), job.title)
        return text


class _Watch:
    """Measures the time from the first look to the last."""

    def __init__(self) -> None:
        self._began: float | None = None
        self.seconds: float | None = None

    def look(self) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began = now
        self.seconds = now - self._began


def length_of(path: Path, title: str, longest: float) -> float:
    """The seconds of an uploaded song, which is decoded up to the longest length.

    Raises :class:`AudioError` if it cannot be separated, or is longer.
    """
    from kmdx import audio

    with noted():  # the song is read again when it is separated; then its owner sees the warnings
        samples, rate = audio.read(path, duration=longest + 1, downmix=True, name=title)
    if len(samples) > longest * rate:
        minutes = f"{longest / 60:.3g} minutes"
        raise AudioError(f"{title}: longer than {minutes}, the most that this server takes")
    return len(samples) / rate


@contextmanager
def noted() -> Iterator[list[str]]:
    """Collect this package's warnings in this thread."""
    _install_hook()
    _local.remarks = []
    try:
        yield _local.remarks
    finally:
        _local.remarks = None


def _install_hook() -> None:
    """Let :func:`noted` collect warnings, from now on; those in other threads are shown as before.

    ``warnings.catch_warnings`` would not do: it changes what the warnings of all threads become.
    """
    before = warnings.showwarning
    if getattr(before, "is_hook", False):
        return

    def show(message: Warning | str, category: type[Warning], *more: Any, **others: Any) -> None:
        remarks = getattr(_local, "remarks", None)
        if remarks is not None and issubclass(category, KmdxWarning):
            remarks.append(str(message))
        else:
            before(message, category, *more, **others)

    show.is_hook = True  # type: ignore[attr-defined]
    warnings.simplefilter("always", KmdxWarning)
    warnings.showwarning = show
