"""Runs each network once on each song, and keeps the inner products of the signals that meet in stems."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluator import dataset, metrics
from evaluator.blend_search import inner_products
from evaluator.blend_search.flat_plan import Flat
from evaluator.data_check import Survey
from evaluator.dataset import Track
from evaluator.results import describe_weights
from evaluator.run_folder import Store, write_text
from kmdx import audio, plan_file
from kmdx import device as devices
from kmdx import engine as engines
from kmdx.challenge import MIXTURE
from kmdx.errors import KmdxError
from kmdx.precision import in_words
from kmdx.separator import Separator, Stems

logger = logging.getLogger("evaluator")

FORM = 1
"""Of the records: a collection of another form is not gone on with."""

PLAN = "plan.yaml"
SIGNALS = "signals"

Record = dict[str, Any]
Report = Callable[[str], None]
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Running:
    """How networks run: as for :class:`kmdx.separator.Separator`, which also checks it."""

    device: str = "auto"
    precision: str = "auto"
    speed: str = "leaderboard"
    folder: Path | None = None
    engine: str = engines.DEFAULT

    def separator(self, plan: Path) -> Separator:
        """The separator that runs a plan's file so."""
        return Separator(
            plan,
            device=self.device,
            precision=self.precision,
            speed=self.speed,
            folder=self.folder,
            engine=self.engine,
        )


def collect(
    flat: Flat,
    all_estimates: bool,
    tracks: Sequence[Track],
    survey: Survey,
    store: Store,
    running: Running,
    keep: bool = False,
    on_done: Report = lambda line: None,
    on_begin: Report = lambda line: None,
) -> dict[str, str]:
    """Put a record of each song into a store, but of those whose record is there.

    Parameters
    ----------
    flat : Flat
        Plan whose stems are flat sums.
    all_estimates : bool
        Whether it was made so; noted.
    tracks : sequence of Track
    survey : Survey
        What is known of these songs.
    store : Store
        Locked. A song whose data has changed, or that failed, is done again.
    running : Running
    keep : bool
        Also write the signals, ``signals/<song>/<stem>/<signal>.wav`` in float32.
    on_done, on_begin : callable
        Called with a line when a song is done, and when one begins.

    Returns
    -------
    dict of str to str
        Songs that have no record, or whose signals were not kept though they were to be, and why.

    Raises
    ------
    RunError
        If the store holds a collection of another plan, other weights or other settings.
    KmdxError
        If the plan cannot run here.
    """
    weights = describe_weights(flat.plan, running.folder)  # before the networks: it names all that is missing
    path = store.folder / PLAN
    device = devices.choose(running.device)
    identity = {
        "form": FORM,
        "ensemble": flat.plan.name,
        "plan_sha256": flat.plan.digest,
        "all_estimates": all_estimates,
        "own": dict(flat.own),
        "device": device.type,
        "precision": in_words(running.precision, device, running.speed),
        "speed": running.speed,
        "engine": engines.check(running.engine),
        "weights": {weight["name"]: weight["sha256"] for weight in weights},
    }
    store.begin(identity)
    write_text(path, plan_file.dump(flat.plan))
    separator: Separator | None = None
    failed: dict[str, str] = {}
    for number, track in enumerate(tracks, 1):
        fingerprint = survey.fingerprints[track.name]
        kept = store.folder / SIGNALS / track.name if keep else None
        old = store.record(track.name)
        collected = _is_collected(old, fingerprint)
        if collected and (kept is None or _are_kept(old, kept)):
            on_done(f"[{number}/{len(tracks)}] {track.name}: collected before")
            continue
        record: Record = {
            "song": track.name,
            "status": "failed",
            "reason": survey.unusable.get(track.name),
            "fingerprint": fingerprint,
        }
        if record["reason"] is None:
            on_begin(f"song {number} of {len(tracks)}: {track.name}, {track.duration:.0f} s")
            separator = separator or running.separator(path)
            try:
                measured, estimates = measure_song(separator, flat.own, track)
                record |= {"status": "ok", **measured}
                before = store.record(track.name)
                if before is not None and before["fingerprint"] != fingerprint:  # its signals are another's
                    shutil.rmtree(store.folder / SIGNALS / track.name, ignore_errors=True)
                store.add(record)
                collected = True
                if kept is not None:
                    keep_signals(separator, flat.own, track, estimates, kept)
            except KmdxError as error:
                record["reason"] = str(error)
        reason = record["reason"]
        if not collected:
            store.add(record)
        if reason is not None:
            failed[track.name] = reason
            what = f"collected, but its signals are not kept: {reason}" if collected else reason
        else:
            what = f"{record['duration']:.1f} s of audio, networks {_total(record):.1f} s"
        on_done(f"[{number}/{len(tracks)}] {track.name}: {what}")
    return failed


def measure_song(separator: Separator, own: Mapping[str, str], track: Track) -> tuple[Record, Stems]:
    """A song's record, and the estimates that it is made of.

    The record has the seconds that each network run took, and of each stem the inner products.

    Parameters
    ----------
    separator : Separator
        Of a plan whose stems are flat sums.
    own : mapping of str to str
        Stems, and the nodes that are these stems as the ensemble's own plan has them.
    track : Track

    Raises
    ------
    KmdxError
        If a file cannot be read, or a signal is not finite.
    """
    plan = separator.plan
    mixture = dataset.read(track, MIXTURE)
    estimates, seconds = run_networks(separator, mixture, [*own, *own.values()])
    stems = {}
    for stem, node in own.items():
        names = plan.nodes[stem].inputs
        signals = blended(separator, mixture, {*names, node}, estimates)
        truth = dataset.read(track, stem).samples
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
    """Write a song's signals, ``<stem>/<signal>.wav`` in float32, those of a stem together or not at all.

    Raises
    ------
    AudioError
        If one cannot be written.
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
    """Run networks one by one, those apart whose estimates are known.

    Parameters
    ----------
    separator : Separator
    mixture : Audio
    wanted : collection of str
        References to the signals that the estimates are for.
    known : mapping of str to ndarray, optional
        Estimates ``NODE.SOURCE`` of this song that are there.

    Returns
    -------
    estimates : dict of str to ndarray
        Those that are known, and those made.
    seconds : dict of str to float
        What each run took.
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
    """Signals of a plan from the estimates that they are made of."""
    return separator.signals(mixture.samples, mixture.rate, names, known=estimates)


def _is_collected(record: Record | None, fingerprint: str) -> bool:
    """Whether a song need not be measured again."""
    return record is not None and (record.get("status"), record.get("fingerprint")) == ("ok", fingerprint)


def _are_kept(record: Record | None, folder: Path) -> bool:
    """Whether a song's signals lie there."""
    stems = (record or {}).get("stems", {}).items()
    return all(_file(folder, stem, name).exists() for stem, found in stems for name in found["signals"])


def _file(folder: Path, stem: str, signal: str) -> Path:
    return folder / stem / f"{signal}.wav"


def _total(record: Record) -> float:
    return sum(record["seconds"].values())


def as_16_bit(samples: Samples) -> Samples:
    """What a 16-bit file holds of a signal, as it is read back."""
    steps = np.floor(samples * np.float32(32768)).clip(-32768, 32767)
    return np.divide(steps, 32768, dtype=np.float32)
