"""Collects songs on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluator.blend_search.collecting import (
    Collected,
    Record,
    Running,
    SongTask,
    collect_song,
    identity,
    write_plan,
)
from evaluator.blend_search.flat_plan import Flat
from evaluator.run_folder import UNKNOWN, RunError, RunFolder
from kmdx import cluster_console, weights
from kmdx.cluster import ClusterError, ClusterOptions, Pool, Progress

ON_NODES = ("device", "precision")
"""Settings of a collection that only the nodes know."""


@dataclass(frozen=True)
class _Answer:
    """What a worker found out about a song, and the settings on its node."""

    collected: Collected
    identity: Record


@dataclass(frozen=True)
class _MakeWorker:
    """Makes a worker in its process; it pulls weights that its machine lacks."""

    flat: Flat
    running: Running
    plan: Path

    def __call__(self) -> Callable[[SongTask, Progress], _Answer]:
        weights.pull_missing((use.weight for use in self.flat.plan.networks.values()), self.running.folder)
        separator = self.running.separator(self.plan)
        settings = identity(self.flat, self.running)

        def work(task: SongTask, progress: Progress) -> _Answer:
            progress(0.0, task.track.duration)
            return _Answer(collect_song(separator, self.flat.own, task), settings)

        return work


def run(
    flat: Flat,
    running: Running,
    collection: RunFolder,
    data: Path,
    options: ClusterOptions,
    tasks: Sequence[SongTask],
) -> Iterator[tuple[SongTask, Collected]]:
    """Collect songs; see :data:`evaluator.blend_search.collecting.Run`.

    Every node must see ``data`` and the collection, which are absolute paths.

    Raises
    ------
    RunError
        If the folder is a collection of another plan, other weights or other settings.
    ClusterError
        If no node can be used, or a node's device or weights differ from those of earlier songs.
    """
    settings = identity(flat, replace(running, device="cpu"))
    known = collection.settings()
    collection.start({**settings, **{key: known.get(key, UNKNOWN) for key in ON_NODES}})
    plan = write_plan(flat, collection)
    if running.device == "cpu":
        options = replace(options, gpus=0.0)
    needed = [data, *(path for use in flat.plan.networks.values() if (path := use.weight.path) is not None)]
    make = _MakeWorker(flat, running, plan)
    return _results(Pool(tasks, make, collection.path, needed, options, at_once=1), collection)


def _results(pool: Pool[SongTask, _Answer], collection: RunFolder) -> Iterator[tuple[SongTask, Collected]]:
    if not pool.tasks:
        return
    for finished in cluster_console.run(pool, lambda task: task.track.name, _seconds):
        task = pool.tasks[finished.number]
        if finished.value is None:
            yield task, Collected(None, finished.failure)
            continue
        try:
            collection.start(finished.value.identity)
        except RunError as error:
            raise ClusterError(f"{finished.node} differs from earlier nodes: {error}") from error
        yield task, finished.value.collected


def _seconds(answer: _Answer) -> float:
    record = answer.collected.record
    return record["duration"] if record else 0.0
