"""Runs each network once on each song and saves the inner products of each stem's signals."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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


def collect(
    flat: Flat,
    tracks: Sequence[Track],
    checked: DataCheck,
    collection: RunFolder,
    running: Running,
    keep: bool = False,
    on_done: Report = lambda line: None,
    on_begin: Report = lambda line: None,
) -> dict[str, str]:
    """Add a record of each song to a locked collection, unless it already has one.

    A song that failed, or whose data have changed, is collected again. Returns the songs without a record,
    or whose signals could not be kept, and why.

    Parameters
    ----------
    checked : DataCheck
        Result of checking these songs.
    keep : bool
        Also write the signals to ``signals/<song>/<stem>/<signal>.wav`` in float32.
    on_done, on_begin : callable
        Called with a line when a song is done, and when one begins.

    Raises
    ------
    RunError
        If the folder is a collection of another plan, other weights or other settings.
    KmdxError
        If the plan cannot run on this machine.
    """
    collection.start(_identity(flat, running))  # also reports all missing weights at once
    path = collection.path / PLAN
    write_text(path, plan_file.dump(flat.plan))
    separator = cache(lambda: running.separator(path))
    failed: dict[str, str] = {}
    for number, track in enumerate(tracks, 1):
        fingerprint = checked.fingerprints[track.name]
        signals = collection.path / SIGNALS / track.name if keep else None
        old = collection.record(track.name)
        collected = _is_collected(old, fingerprint)
        if collected and (signals is None or _are_kept(old, signals)):
            on_done(f"[{number}/{len(tracks)}] {track.name}: already collected")
            continue
        record: Record | None = None
        reason = checked.unusable.get(track.name)
        if reason is None:
            on_begin(f"song {number} of {len(tracks)}: {track.name}, {track.duration:.0f} s")
            record, reason = _collect_song(separator(), flat.own, track, fingerprint, collection, signals)
        collected = collected or record is not None
        if not collected:
            failure = {"status": "failed", "reason": reason, "fingerprint": fingerprint}
            collection.add({"song": track.name, **failure})
        if reason is not None:
            failed[track.name] = reason
        on_done(f"[{number}/{len(tracks)}] {track.name}: {_result(record, collected, reason)}")
    return failed


def _result(record: Record | None, collected: bool, reason: str | None) -> str:
    """The result of a song, in words."""
    if record is None or reason is not None:
        return f"collected, but its signals could not be kept: {reason}" if collected else str(reason)
    return f"{record['duration']:.1f} s of audio, networks {sum(record['seconds'].values()):.1f} s"


def _identity(flat: Flat, running: Running) -> Record:
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


def _collect_song(
    separator: Separator,
    own: Mapping[str, str],
    track: Track,
    fingerprint: str,
    collection: RunFolder,
    signals: Path | None,
) -> tuple[Record | None, str | None]:
    """Save a song's record and its signals; return the saved record and the error, if any."""
    saved: Record | None = None
    try:
        measured, estimates = measure_song(separator, own, track)
        record = {"song": track.name, "status": "ok", "reason": None, "fingerprint": fingerprint, **measured}
        old = collection.record(track.name)
        if old is not None and old["fingerprint"] != fingerprint:  # delete signals of the old data
            shutil.rmtree(collection.path / SIGNALS / track.name, ignore_errors=True)
        collection.add(record)
        saved = record
        if signals is not None:
            keep_signals(separator, own, track, estimates, signals)
    except KmdxError as error:
        return saved, str(error)
    return saved, None


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
