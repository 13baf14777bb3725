"""Runs each network once on each song and saves the inner products of each stem's signals."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluator import dataset, metrics
from evaluator.blend_search import inner_products
from evaluator.blend_search.flat_plan import Flat
from evaluator.data_check import DataCheck
from evaluator.dataset import Track
from evaluator.layouts import reference_of
from evaluator.results import describe_weights
from evaluator.run_folder import RunFolder, write_text
from kmdx import audio, devices, engines, plan_file
from kmdx.challenge import MIXTURE
from kmdx.errors import KmdxError
from kmdx.precisions import in_words
from kmdx.separator import Separator, Stems

FORM = 1
"""Version of the records: a collection of another version cannot be resumed."""

PLAN = "plan.yaml"
SIGNALS = "signals"

Record = dict[str, Any]
Report = Callable[[str], None]
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Running:
    """How networks run: arguments of :class:`kmdx.separator.Separator`, which checks them."""

    device: str = "auto"
    precision: str = "auto"
    speed: str = "leaderboard"
    folder: Path | None = None
    engine: str = engines.DEFAULT

    def separator(self, plan: Path) -> Separator:
        """A separator for a plan's file with these arguments."""
        return Separator(plan, **vars(self))


@dataclass(frozen=True)
class SongTask:
    """A song to collect."""

    track: Track
    fingerprint: str
    signals: Path | None  # where its signals are kept


@dataclass(frozen=True)
class Collected:
    """The record of a song, if it could be measured, and what failed."""

    record: Record | None
    failure: str | None = None


Run = Callable[[Sequence[SongTask]], Iterator[tuple[SongTask, Collected]]]
"""Checks and records the settings of the collection, and returns an iterator that collects songs."""


def collect(
    tracks: Sequence[Track],
    checked: DataCheck,
    collection: RunFolder,
    run: Run,
    keep: bool = False,
    on_done: Report = lambda line: None,
) -> dict[str, str]:
    """Add a record of each song to a locked collection, unless it already has one.

    A song that failed, or whose data have changed, is collected again. Returns the songs without a record,
    or whose signals could not be kept, and why.

    Parameters
    ----------
    checked : DataCheck
        Result of checking these songs.
    run : callable
        :func:`run_here` with its other arguments, or the same on a cluster.
    keep : bool
        Also write the signals to ``signals/<song>/<stem>/<signal>.wav`` in float32.
    on_done : callable
        Called with a line when a song is done.

    Raises
    ------
    RunError
        If the folder is a collection of another plan, other weights or other settings.
    KmdxError
        If the plan cannot run on this machine.
    """
    failed: dict[str, str] = {}
    before: dict[str, Record | None] = {track.name: collection.record(track.name) for track in tracks}
    tasks = [
        SongTask(
            track,
            checked.fingerprints[track.name],
            collection.path / SIGNALS / track.name if keep else None,
        )
        for track in tracks
    ]
    left = [task for task in tasks if not _is_finished(before[task.track.name], task)]
    names_left = {task.track.name for task in left}
    results = run([task for task in left if task.track.name not in checked.unusable])
    number = 0

    def done(task: SongTask, result: str) -> None:
        nonlocal number
        number += 1
        on_done(f"[{number}/{len(tracks)}] {task.track.name}: {result}")

    def add(task: SongTask, collected: Collected) -> None:
        name, record, reason = task.track.name, collected.record, collected.failure
        has_record = record is not None or _is_collected(before[name], task.fingerprint)
        if record is not None:
            collection.add(record)
        elif not has_record:
            failure = {"status": "failed", "reason": reason, "fingerprint": task.fingerprint}
            collection.add({"song": name, **failure})
        if reason is not None:
            failed[name] = reason
        done(task, _result(record, has_record, reason))

    for task in tasks:
        if task.track.name not in names_left:
            done(task, "already collected")
        elif (reason := checked.unusable.get(task.track.name)) is not None:
            add(task, Collected(None, reason))
    for task, collected in results:
        add(task, collected)
    return failed


def run_here(
    flat: Flat, running: Running, collection: RunFolder, on_begin: Report, tasks: Sequence[SongTask]
) -> Iterator[tuple[SongTask, Collected]]:
    """Collect songs on this machine; see :data:`Run`. ``on_begin`` is called with a line for each song."""
    collection.start(identity(flat, running))  # also reports all missing weights at once
    plan = write_plan(flat, collection)
    return _collect_all(flat, running, plan, on_begin, tasks)


def _collect_all(
    flat: Flat, running: Running, plan: Path, on_begin: Report, tasks: Sequence[SongTask]
) -> Iterator[tuple[SongTask, Collected]]:
    separator: Separator | None = None
    for number, task in enumerate(tasks, 1):
        on_begin(f"song {number} of {len(tasks)}: {task.track.name}, {task.track.duration:.0f} s")
        separator = separator or running.separator(plan)
        yield task, collect_song(separator, flat.own, task)


def write_plan(flat: Flat, collection: RunFolder) -> Path:
    """Write the plan of a collection into its folder; return the file."""
    path = collection.path / PLAN
    write_text(path, plan_file.dump(flat.plan))
    return path


def _result(record: Record | None, has_record: bool, failure: str | None) -> str:
    """The result of a song, in words."""
    if record is None or failure is not None:
        return f"collected, but its signals could not be kept: {failure}" if has_record else str(failure)
    return f"{record['duration']:.1f} s of audio, networks {sum(record['seconds'].values()):.1f} s"


def identity(flat: Flat, running: Running) -> Record:
    """The settings that must be the same for all records of a collection."""
    weights = describe_weights(flat.plan, running.folder)
    device = devices.choose(running.device)
    return {
        "form": FORM,
        "ensemble": flat.plan.name,
        "plan_sha256": flat.plan.digest,
        "all_estimates": flat.all_estimates,
        "own": dict(flat.own),
        "device": device.type,
        "precision": in_words(running.precision, device, running.speed),
        "speed": running.speed,
        "engine": engines.check(running.engine),
        "weights": {weight["name"]: weight["sha256"] for weight in weights},
    }


def collect_song(separator: Separator, own: Mapping[str, str], task: SongTask) -> Collected:
    """Measure a song and keep its signals."""
    record: Record | None = None
    try:
        measured, estimates = measure_song(separator, own, task.track)
        song = {"song": task.track.name, "status": "ok", "reason": None, "fingerprint": task.fingerprint}
        record = {**song, **measured}
        if task.signals is not None:
            shutil.rmtree(task.signals, ignore_errors=True)  # leftovers of a kill, or those of other data
            keep_signals(separator, own, task.track, estimates, task.signals)
    except KmdxError as error:
        return Collected(record, str(error))
    return Collected(record)


def measure_song(separator: Separator, own: Mapping[str, str], track: Track) -> tuple[Record, Stems]:
    """Measure a song; return its record, and the estimates of its networks.

    The record contains the seconds that each network run took, and the inner products of each stem. The
    separator runs the plan of a :class:`Flat`, and ``own`` is from the same. Raises :class:`KmdxError` if a
    file cannot be read, or a signal is not finite.
    """
    plan = separator.plan
    mixture = dataset.read(track, MIXTURE)
    estimates, seconds = run_networks(separator, mixture, [*own, *own.values()])
    stems = {}
    for stem, node in own.items():
        names = plan.nodes[stem].inputs
        signals = blended(separator, mixture, {*names, node}, estimates)
        truth = dataset.read(track, reference_of(stem, plan.stems)).samples
        products = inner_products.measure(truth, [signals[name] for name in names])
        values = {name: value[0].tolist() for name, value in vars(products).items()}
        if not all(np.isfinite(value).all() for value in values.values()):
            raise KmdxError(f"NaN or infinity among the signals of {stem}")
        stems[stem] = {
            **values,
            "signals": list(names),
            "published_sdr": metrics.global_sdr(truth, as_16_bit(signals[node])),
        }
    return {"duration": track.duration, "seconds": seconds, "stems": stems}, estimates


def keep_signals(
    separator: Separator,
    own: Collection[str],
    track: Track,
    estimates: Mapping[str, Samples],
    folder: Path,
) -> None:
    """Write a song's signals to ``<stem>/<signal>.wav`` in float32, each stem's atomically.

    Raises :class:`AudioError` if a file cannot be written.
    """
    mixture = dataset.read(track, MIXTURE)
    for stem in own:
        names = separator.plan.nodes[stem].inputs
        signals = blended(separator, mixture, names, estimates)
        audio.write_all({_file(folder, stem, name): signals[name] for name in names}, mixture.rate, "float32")


def run_networks(
    separator: Separator,
    mixture: audio.Audio,
    wanted: Collection[str],
    known: Mapping[str, Samples] | None = None,
) -> tuple[Stems, dict[str, float]]:
    """Run the networks that the wanted signals need, one by one, except those whose estimates are known.

    Returns all estimates ``NODE.SOURCE``, known and new, and the seconds that each run took.
    """
    plan = separator.plan
    estimates: Stems = dict(known or {})
    seconds = {}
    for node, sources in plan.sources_used(wanted, estimates).items():
        began = time.perf_counter()
        estimates |= blended(separator, mixture, [f"{node}.{source}" for source in sources], estimates)
        seconds[node] = time.perf_counter() - began
    return estimates, seconds


def blended(
    separator: Separator, mixture: audio.Audio, names: Collection[str], estimates: Mapping[str, Samples]
) -> Stems:
    """Blend signals of a plan from estimates."""
    return separator.signals(mixture.samples, mixture.rate, names, known=estimates)


def _is_finished(record: Record | None, task: SongTask) -> bool:
    """Whether nothing of a song is left to collect."""
    return _is_collected(record, task.fingerprint) and (
        task.signals is None or _are_kept(record, task.signals)
    )


def _is_collected(record: Record | None, fingerprint: str) -> bool:
    """Whether a record is complete and belongs to the song's current data."""
    return record is not None and (record.get("status"), record.get("fingerprint")) == ("ok", fingerprint)


def _are_kept(record: Record | None, folder: Path) -> bool:
    """Whether all of a song's signals are in a folder."""
    stems = (record or {}).get("stems", {}).items()
    return all(_file(folder, stem, name).exists() for stem, found in stems for name in found["signals"])


def _file(folder: Path, stem: str, signal: str) -> Path:
    return folder / stem / f"{signal}.wav"


def as_16_bit(samples: Samples) -> Samples:
    """A signal as it is read back from a 16-bit file."""
    steps = np.floor(samples * np.float32(32768)).clip(-32768, 32767)
    return np.divide(steps, 32768, dtype=np.float32)
