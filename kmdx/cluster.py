"""Separate songs on many GPUs and machines, with Ray.

There is one idea: independent tasks, workers that are expensive to make, and results on disk. A worker is a
Ray actor. Each node gets as many workers as fit, also a node that joins late. A worker separates two songs
at a time, so that it reads and writes files while it computes. It has OMP_NUM_THREADS threads if that is set
where the command runs, else as many as the cores that it is given, else as many as a single process would
have on its machine, because oneDNN's last bits depend on them.

A task whose worker dies goes to another worker, where it runs alone. If that one dies, too, the task has
failed. The loss of a node is not blamed on its tasks, unless it happens five times. What counts as finished
is decided by the records next to the stems (:mod:`kmdx.manifest`), so a command that is repeated continues.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kmdx import files, host, inputs, urls
from kmdx.errors import KmdxError, KmdxWarning, first_line, reason, shown
from kmdx.inputs import InputSong
from kmdx.mirror import Mirror
from kmdx.urls import Url, UrlError

if TYPE_CHECKING:  # they import torch, which a worker may only do after it has set the number of threads
    from kmdx.batch import Job, SeparateOptions, SongResult

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # prints nothing; the pool reports what matters
}
"""Ray's settings that keep its own messages and reports quiet; it reads them when it is imported."""
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
try:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError as error:
    raise KmdxError(f"{error.name} is missing; install it with: pip install 'kmdx-net[cluster]'") from error

Task = TypeVar("Task")
Value = TypeVar("Value")
Progress = Callable[[float, float], None]
"""Called with seconds of audio done and in total."""
Work = Callable[[Task, Progress], Value]
"""What a worker does. It raises :class:`kmdx.files.Locked` for a task that another process is working on."""

AT_ONCE = 2  # songs that a worker separates at a time: one is read or written during the other
DEATHS = 2  # workers that a task may end before it has failed
LOST_NODES = 5  # nodes that may be lost during a task before it has failed
GRACE = 15.0  # seconds after a worker's end in which the loss of its node explains it
PROOF = 2.0  # seconds after which an answer of another worker shows that the node was not lost
POLL_INTERVAL = 0.2  # seconds between two looks at the workers
NODE_INTERVAL = 2.0  # seconds between two looks at the nodes
RETRY_DELAY = 2.0  # seconds until a task that another process works on is tried again
WORKER_TIMEOUT = 60.0  # seconds without any worker after which the wait is explained
CONNECT_TIMEOUT = 10.0  # seconds until the head node must answer
MAX_CHECKED = 1000  # folders that each node is asked for, at most


class ClusterError(KmdxError):
    """A cluster cannot be reached or used."""


@dataclass(frozen=True)
class ClusterOptions:
    """Where the workers run, and what each gets."""

    address: str | None = None
    """Address of a Ray cluster, or ``auto`` for that of this machine; None starts Ray here."""
    workers: int | None = None
    """Maximum number of workers; None for as many as fit."""
    gpus: float | None = None
    """GPUs of a worker; None for one if there are GPUs."""
    cpus: int | None = None
    """CPU cores and threads of a worker. By default, the workers of a node share its cores."""


@dataclass(frozen=True)
class Finished(Generic[Task, Value]):
    """A task that was done, or that failed because it ended its workers."""

    number: int
    """Index of the task."""
    node: str
    value: Value | None
    failure: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Notice:
    """Something that happened to a worker or a node."""

    text: str
    is_warning: bool = True


@dataclass
class Worker:
    """A Ray actor, and what it is doing."""

    actor: Any
    node: str
    node_id: str
    is_ready: bool = False
    tasks: dict[Any, int] = field(default_factory=dict)
    """The number of the task behind each pending reference."""
    progress: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds of audio done and in total of each task."""
    asked: Any = None  # the pending reference of its progress


@dataclass(frozen=True)
class _Death:
    """The end of a worker during a task."""

    number: int
    worker: Worker
    why: str
    when: float


class _Actor:
    """The process of a worker."""

    def __init__(self, make: bytes, threads: str | None, shared: bool, gpus: float) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)  # set by Ray to the cores that it reserves
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        if shared:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if 0 < gpus < 1:
            os.environ.setdefault("KMDX_GPU_PART", str(gpus))  # kmdx.devices.PART
        self._work = cloudpickle.loads(make)()  # imports torch
        self._progress: dict[int, tuple[float, float]] = {}
        self._local = threading.local()
        warnings.simplefilter("always", KmdxWarning)
        warnings.showwarning = self._note

    def ready(self, program: str, token: Path | Url, folders: Sequence[Path | Url]) -> str | None:
        """Why this node cannot be used; None if it can."""
        own = version("kmdx-net")
        if own != program:
            return f"it has kmdx-net {own}, not {program}"
        if isinstance(token, Path) and not token.exists():
            return f"it does not see the output folder {token.parent}"
        for place in (token, *folders):
            if isinstance(place, Path):
                if not os.path.exists(place):  # noqa: PTH110 (any text)
                    return f"it does not see {place}"
            elif fault := place.fault():
                return f"it cannot access {fault}"
        return None

    def do(self, number: int, task: Any) -> tuple[str, Any, tuple[str, ...]]:
        """Do a task; return whether it is ``done``, ``busy`` or has ``failed``, the result, and warnings."""
        noted: list[str] = []
        self._local.warnings = noted

        def progress(done: float, total: float) -> None:
            self._progress[number] = (done, total)

        try:
            return "done", self._work(task, progress), tuple(noted)
        except files.Locked:
            return "busy", None, ()
        except Exception as error:  # a fault of the program: the other tasks go on
            return "failed", f"{type(error).__name__}: {first_line(error)}", tuple(noted)
        finally:
            self._progress.pop(number, None)

    def progress(self) -> dict[int, tuple[float, float]]:
        """Progress of the current tasks."""
        return dict(self._progress)

    def _note(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        noted = getattr(self._local, "warnings", None)
        if issubclass(category, KmdxWarning) and noted is not None:
            noted.append(str(message))


class Pool(Generic[Task, Value]):
    """Does tasks with as many workers as the cluster has room for.

    Parameters
    ----------
    tasks : sequence
        They are sent to workers, so they can be pickled.
    make : callable
        Called in each worker's process; returns what does a task there.
    output : Path or Mirror
        A folder that every node must see, or of a URL that every node must be able to access.
    folders : sequence of Path or Url
        More folders and files that every node must see.
    options : ClusterOptions
    at_once : int
        Tasks that a worker handles at a time.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        make: Callable[[], Work[Task, Value]],
        output: Path | Mirror,
        folders: Sequence[Path | Url],
        options: ClusterOptions,
        at_once: int = AT_ONCE,
    ) -> None:
        self.tasks = tasks
        self.options = options
        self.at_once = at_once
        self.workers: list[Worker] = []
        self.left = len(tasks)
        self._make = cloudpickle.dumps(make)
        self._threads = os.environ.get("OMP_NUM_THREADS") or (str(options.cpus) if options.cpus else None)
        self._folders = folders[:MAX_CHECKED]
        self._output = output
        self._waiting = deque(range(len(tasks)))
        self._later: list[tuple[float, int]] = []  # when to try a busy task again
        self._deaths: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._unsettled: list[_Death] = []  # whose nodes may turn out to be lost
        self._alive: set[str] = set()  # ids of nodes
        self._heard: dict[str, float] = {}  # when a worker of a node answered last
        self._refused: set[str] = set()  # ids of unusable nodes
        self._starts: Counter[str] = Counter()  # workers of a node that died before they were ready
        self._looked = self._usable = time.monotonic()

    def run(self, on_look: Callable[[], None] = lambda: None) -> Iterator[Finished[Task, Value] | Notice]:
        """Yield each task as it is finished, and notices about workers and nodes.

        ``on_look`` is called several times a second, when the workers' progress is known.

        Raises
        ------
        ClusterError
            If no node can be used.
        """
        with _token(self._output) as self._token:
            self._start_workers()
            if self.left and not self.workers and self.options.address is None:
                raise ClusterError("a worker needs more cores or GPUs than this machine has")
            try:
                while self.left:
                    yield from self._step()
                    on_look()
            finally:
                for worker in self.workers:
                    with suppress(Exception):
                        ray.kill(worker.actor)

    def _step(self) -> Iterator[Finished[Task, Value] | Notice]:
        now = time.monotonic()
        if now - self._looked > NODE_INTERVAL:
            self._start_workers()
            yield from self._settle(now)
        self._waiting.extend(number for when, number in self._later if when <= now)
        self._later = [(when, number) for when, number in self._later if when > now]
        self._assign_tasks()
        pending = {
            ref: worker for worker in self.workers for ref in (*worker.tasks, worker.asked) if ref is not None
        }
        if any(worker.is_ready for worker in self.workers):
            self._usable = now
        elif now - self._usable > WORKER_TIMEOUT:
            self._usable = now
            yield self._explain_wait()
        if not pending:
            time.sleep(POLL_INTERVAL)
            return
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=POLL_INTERVAL)
        for ref in done:
            yield from self._handle_answer(pending[ref], ref)

    def _explain_wait(self) -> Notice:
        """Why no worker has been ready for a while; raises ClusterError if waiting cannot help."""
        if not self.workers and self._refused and not self._later:
            raise ClusterError(f"no node of the cluster could be used for {WORKER_TIMEOUT:.0f} s")
        why = "other programs may use the cluster's cores or GPUs"
        if not self.workers:
            why = "a worker needs more cores or GPUs than any node has"
        return Notice(f"no worker has started for {WORKER_TIMEOUT:.0f} s: {why}")

    def _start_workers(self) -> None:
        """Start workers where there is room for them."""
        self._looked = time.monotonic()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._alive = {node["NodeID"] for node in nodes}
        names = _names(nodes)
        share = _shares(nodes, self.options)
        for node in nodes:
            id = node["NodeID"]
            own = sum(worker.node_id == id for worker in self.workers)
            room = 0 if id in self._refused else share.room(node["Resources"])
            most = min(self.left, self.options.workers or self.left)
            for _ in range(min(room - own, most - len(self.workers))):
                self.workers.append(self._start(id, names[id], share.resources(node["Resources"]), room > 1))

    def _start(self, id: str, name: str, resources: Mapping[str, float], is_shared: bool) -> Worker:
        remote: Any = ray.remote(_Actor)
        actor = remote.options(
            **resources,
            max_concurrency=self.at_once + 1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False),
        ).remote(self._make, self._threads, is_shared, resources["num_gpus"])
        worker = Worker(actor, name, id)
        worker.asked = actor.ready.remote(version("kmdx-net"), self._token, self._folders)
        return worker

    def _assign_tasks(self) -> None:
        """Give waiting tasks to workers."""
        for worker in self.workers:
            while worker.is_ready and len(worker.tasks) < self.at_once:
                number = self._next(worker)
                if number is None:
                    break
                self._waiting.remove(number)
                worker.tasks[worker.actor.do.remote(number, self.tasks[number])] = number
            if worker.is_ready and worker.asked is None:
                worker.asked = worker.actor.progress.remote()

    def _next(self, worker: Worker) -> int | None:
        """The next task for a worker, if any.

        A task that may have ended a worker runs alone there, and no two of them on one node: Ray ends several
        workers of a node whose memory is full.
        """
        suspects = self._deaths.keys()
        if not suspects.isdisjoint(worker.tasks.values()):
            return None
        near = (each for each in self.workers if each.node_id == worker.node_id)
        is_free = not worker.tasks and all(suspects.isdisjoint(each.tasks.values()) for each in near)
        return next((number for number in self._waiting if is_free or number not in suspects), None)

    def _handle_answer(self, worker: Worker, ref: Any) -> Iterator[Finished[Task, Value] | Notice]:
        """What a worker's answer means."""
        if worker not in self.workers:  # it died, and another reference showed this
            return
        try:
            found = ray.get(ref)
        except ray.exceptions.RayError as error:
            yield from self._reassign_tasks(worker, error)
            return
        self._heard[worker.node_id] = time.monotonic()
        if ref is worker.asked:
            worker.asked = None
            if worker.is_ready:
                worker.progress = found
            elif found is None:
                worker.is_ready = True
                yield Notice(f"worker on {worker.node}", is_warning=False)
            else:
                yield from self._refuse(worker, found)
            return
        number = worker.tasks.pop(ref)
        kind, value, noted = found
        if kind == "busy":
            self._later.append((time.monotonic() + RETRY_DELAY, number))
            return
        self.left -= 1
        failure = value if kind == "failed" else None
        yield Finished(number, worker.node, None if failure else value, failure, noted)

    def _refuse(self, worker: Worker, why: str) -> Iterator[Notice]:
        """Start no more workers on a node; those that are already working go on."""
        self._refused.add(worker.node_id)
        for each in [each for each in self.workers if each.node_id == worker.node_id and not each.is_ready]:
            self.workers.remove(each)
            ray.kill(each.actor)
        yield Notice(f"{worker.node} is not used: {why}")
        if not self.workers and not self._later:
            raise ClusterError(f"no node can be used; {worker.node}: {why}")

    def _reassign_tasks(self, worker: Worker, error: Exception) -> Iterator[Finished[Task, Value] | Notice]:
        """Give the tasks of a dead worker to others, or give them up."""
        self.workers.remove(worker)
        ray.kill(worker.actor)  # in case that only the connection broke
        lost = "node has died" in str(error) or not _is_alive(worker.node_id)
        why = f"{worker.node} was lost" if lost else f"a worker on {worker.node} ended: {_why(error)}"
        yield Notice(why)
        if not worker.is_ready and not lost:
            self._starts[worker.node_id] += 1
            if self._starts[worker.node_id] >= DEATHS:
                yield from self._refuse(worker, f"its workers do not start: {_why(error)}")
        for number in worker.tasks.values():
            death = _Death(number, worker, why, time.monotonic())
            if lost:
                yield from self._blame_node(death)
                continue
            self._deaths[number] += 1
            self._unsettled.append(death)
            if self._deaths[number] < DEATHS:
                self._waiting.appendleft(number)

    def _settle(self, now: float) -> Iterator[Finished[Task, Value]]:
        """Decide whether workers ended because of their tasks or because their nodes were lost.

        The end of a process may be known before that of its node. A task that has ended DEATHS workers waits
        until this is decided.
        """
        unsettled, self._unsettled = self._unsettled, []
        settled: dict[int, _Death] = {}
        for death in unsettled:
            number, id = death.number, death.worker.node_id
            if id not in self._alive:
                is_held = self._deaths[number] >= DEATHS
                self._deaths -= Counter([number])
                yield from self._blame_node(death, is_held)
            elif self._heard.get(id, 0.0) < death.when + PROOF and now < death.when + GRACE:
                self._unsettled.append(death)
            else:
                settled[number] = death
        open_cases = {death.number for death in self._unsettled}
        for number, death in settled.items():
            if self._deaths[number] >= DEATHS and number not in open_cases:
                yield self._give_up(death, "twice")

    def _blame_node(self, death: _Death, is_held: bool = True) -> Iterator[Finished[Task, Value]]:
        """Count the loss of a node; give its task, if it is held, to another worker or up."""
        self._losses[death.number] += 1
        if not is_held:
            return
        if self._losses[death.number] < LOST_NODES:
            self._waiting.appendleft(death.number)
        else:
            yield self._give_up(death, f"{LOST_NODES} times")

    def _give_up(self, death: _Death, times: str) -> Finished[Task, Value]:
        self.left -= 1
        why = f"it was given up, because its worker ended {times}; {death.why}"
        return Finished(death.number, death.worker.node, None, why)


@dataclass(frozen=True)
class _Shares:
    """What a worker gets of a node."""

    gpus: float
    cpus: int | None

    def room(self, resources: Mapping[str, float]) -> int:
        """Number of workers that a node has room for."""
        by_gpu = int(resources.get("GPU", 0) / self.gpus + 1e-6) if self.gpus else None
        by_cpu = int(resources.get("CPU", 0)) // self.cpus if self.cpus else None
        fitting = [room for room in (by_gpu, by_cpu) if room is not None]
        return min(fitting) if fitting else int(resources.get("CPU", 0) >= 1)

    def resources(self, resources: Mapping[str, float]) -> dict[str, float]:
        """The resources that Ray reserves for a worker of a node."""
        cpus = self.cpus or int(resources.get("CPU", 0)) // max(1, self.room(resources))
        return {"num_cpus": cpus, "num_gpus": self.gpus}


def _shares(nodes: Sequence[Mapping[str, Any]], options: ClusterOptions) -> _Shares:
    """What a worker gets: by default a GPU if any node has one, else a node's cores or a share of them."""
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    cpus = sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
    each = options.gpus
    if each is None:
        each = min(1.0, gpus / options.workers) if options.workers and gpus else float(gpus > 0)
    own = options.cpus
    if own is None and not each and options.workers and len(nodes) == 1:
        own = max(1, cpus // options.workers)
    return _Shares(each, own)


def separate(
    songs: Iterable[str | Path | InputSong],
    output: str | Path,
    ensemble: str = "leaderboard_c",
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: int | None = None,
    stems: Sequence[str] | None = None,
    options: SeparateOptions | None = None,
) -> Iterator[SongResult]:
    """Separate songs on a cluster, or with several workers on this machine.

    Parameters
    ----------
    songs : iterable
        Files, folders, glob patterns and URLs, as for ``kmdx separate``.
    output : path
        Parent of the songs' folders, or its URL. Every node must see it and the songs under the same paths.
    ensemble : str
        Name of an ensemble, or path or URL of a plan.
    address : str, optional
        Address of a Ray cluster, or ``auto``; by default Ray is started on this machine.
    workers : int, optional
        Maximum number of workers; by default as many as fit.
    gpus_per_worker, cpus_per_worker : number, optional
        What a worker gets; by default one GPU if there are any, and an equal share of its node's cores.
    stems : sequence of str, optional
        By default all stems of the ensemble.
    options : SeparateOptions, optional
        Device, speed, precision, format, …; by default those of ``kmdx separate``.

    Yields
    ------
    SongResult
        Each song as it arrives, with the node that did it. Songs that were finished before have no ``stems``.

    Raises
    ------
    KmdxError
        If an option is wrong, a song does not exist, two songs would share a folder, or no node can be used.
    """
    from kmdx import batch, mirror, plan_file

    folder, uploads = mirror.opened(output)
    found = inputs.collect([str(song) for song in songs], folder, uploads.url if uploads else None)
    if found.problems:
        raise KmdxError("; ".join(found.problems))
    plan = plan_file.load(ensemble)
    chosen = options or batch.SeparateOptions(ensemble)
    job = batch.Job(folder, plan, plan.check_stems(stems), chosen, uploads)
    settings = ClusterOptions(address, workers, gpus_per_worker, cpus_per_worker)
    pool = pool_of(found.songs, job, settings)
    with connected(settings):
        for event in pool.run():
            if isinstance(event, Finished):
                yield result_of(event, found.songs, job)


def pool_of(songs: Sequence[InputSong], job: Job, options: ClusterOptions) -> Pool[InputSong, SongResult]:
    """The pool that separates songs; run it while Ray is connected.

    Raises
    ------
    KmdxError
        If two songs would share a folder, or the output folder cannot be made.
    """
    job.check_places(songs)
    if job.options.device not in ("auto", "cpu", "cuda"):
        raise KmdxError(f"--device {job.options.device}: Ray chooses the GPU of each worker; leave this out")
    if job.options.device == "cpu":
        options = replace(options, gpus=0.0)
    remote = replace(job, output=job.output.absolute())
    tasks = [replace(song, path=song.path.absolute()) for song in songs]
    weights = [path for use in job.plan.networks.values() if (path := use.weight.path) is not None]
    folders = [*_folders(tasks), *(path.absolute() for path in weights)]
    return Pool(tasks, _Separating(remote), job.mirror or remote.output, folders, options)


def _folders(songs: Sequence[InputSong]) -> list[Path | Url]:
    """What a node must see to read songs: each folder, and one place at each server or in each bucket."""
    local = dict.fromkeys(song.path.parent for song in songs if isinstance(song.path, Path))
    urls = [song.path for song in songs if isinstance(song.path, Url)]
    remote = {url.location.parts[:2]: url if url.is_web else url.parent for url in urls}
    return [*local, *remote.values()]


@dataclass(frozen=True)
class _Separating:
    """Makes a worker that separates songs."""

    job: Job

    def __call__(self) -> Work[InputSong, SongResult]:
        from kmdx.batch import SongWorker

        return SongWorker(self.job).separate


def result_of(finished: Finished[InputSong, SongResult], songs: Sequence[InputSong], job: Job) -> SongResult:
    """The result of a song, with its node and with the paths that the user gave."""
    from kmdx.batch import SongResult

    song = songs[finished.number]
    found = finished.value or SongResult(song.path, Path(), error=f"{song.path}: {finished.failure}")
    return replace(
        found,
        song=song.path,
        folder=job.folder_of(song),
        node=finished.node,
        warnings=(*found.warnings, *finished.warnings),
    )


@contextmanager
def connected(options: ClusterOptions) -> Iterator[str | None]:
    """Connect to a Ray cluster, or start Ray on this machine; yield the address of Ray's dashboard, if any.

    Raises
    ------
    ClusterError
        If the cluster cannot be reached.
    """
    own: dict[str, Any] = {"address": options.address}
    if options.address is None:
        cores = max(host.usable_cores(), (options.workers or 1) * (options.cpus or 1))
        own = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    else:
        _check_reachable(options.address)
    try:
        context = ray.init(**own, log_to_driver=False, logging_level=logging.ERROR, namespace="kmdx")
    except Exception as error:  # Ray raises errors of many classes
        if options.address is None:
            raise ClusterError(f"Ray cannot be started: {first_line(error)}") from error
        why = first_line(error)
        if "InvalidAuthToken" in "".join(traceback.format_exception(error)):
            why = "it needs a token: set RAY_AUTH_MODE=token, and copy ~/.ray/auth_token of its head node"
        raise ClusterError(f"--cluster {options.address}: {why}") from error
    if threading.current_thread() is threading.main_thread():  # Ray replaced it by one that also prints
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ClusterError if nothing answers at an address; Ray itself would wait forever."""
    option = f"--cluster {shown(address)}"
    if address == "auto":  # from RAY_ADDRESS, or a file that `ray start` wrote and a crash left
        try:
            address = ray._private.services.canonicalize_bootstrap_address_or_die(address)
        except ConnectionError as error:
            raise ClusterError(f"{option}: no Ray, or more than one, runs on this machine") from error
        except ValueError as error:
            raise ClusterError(f"{option}: {first_line(error)}") from error
        option += f" ({shown(address)})"
    name, _, port = address.rpartition(":")
    if not name or not port.isdecimal():
        raise ClusterError(f"{option}: expected auto, or the address of a head node, HOST:PORT")
    try:
        socket.create_connection((name.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"{option} cannot be reached: {reason(error)}") from error


@contextmanager
def _token(folder: Path | Mirror) -> Iterator[Path | Url]:
    """A hidden file, named after this process, by which other nodes recognize a folder."""
    start = f".kmdx-{socket.gethostname()}-"
    if isinstance(folder, Mirror):
        with folder.marked(f"{start}{os.getpid()}{files.PARTIAL}") as url:
            with suppress(UrlError):
                urls.remove([folder.at(left) for left in _abandoned(folder.folder, start)])
            yield url
        return
    path = folder / f"{start}{os.getpid()}{files.PARTIAL}"
    try:
        with files.folder(folder):
            for left in _abandoned(folder, start):
                left.unlink(missing_ok=True)
            path.touch()
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ClusterError(f"{folder} cannot be written: {error.strerror or error}") from error


def _abandoned(folder: Path, start: str) -> Iterator[Path]:
    """The hidden files of processes that were killed."""
    for left in folder.glob(f"{start}*{files.PARTIAL}"):
        pid = left.name.removeprefix(start).removesuffix(files.PARTIAL)
        if pid.isdecimal() and not host.is_running(int(pid)):
            yield left


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A short name for each node: its host's, with a port if several nodes have the same host."""
    count = Counter(node["NodeManagerHostname"] for node in nodes)
    return {
        node["NodeID"]: node["NodeManagerHostname"]
        + (f":{node['NodeManagerPort']}" if count[node["NodeManagerHostname"]] > 1 else "")
        for node in nodes
    }


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def _why(error: Exception) -> str:
    """Why a worker died, in a few words."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "the node's memory was full"
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return first_line(cause)
    return "its process crashed or was killed, for example because memory was full"
