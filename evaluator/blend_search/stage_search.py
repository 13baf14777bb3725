"""Searches, one move at a time, the weights of sums that later networks take as input.

Only the networks that depend on a changed sum run again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from evaluator import dataset, metrics
from evaluator.blend_search import tables
from evaluator.blend_search.collecting import as_16_bit, blended, run_networks
from evaluator.blend_search.inner_products import is_silent
from evaluator.blend_search.search import MIN_GAIN
from evaluator.blend_search.stage_moves import TRIES, Search, SearchCost, changes
from evaluator.bootstrap import COVERAGE
from evaluator.dataset import Track
from evaluator.layouts import reference_of
from kmdx.challenge import MIXTURE
from kmdx.errors import KmdxError, counted
from kmdx.plan import Plan, node_of
from kmdx.separator import Separator, Stems
from kmdx.signals import blocks, join

Report = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """Result of a search. Scores are global SDR in dB, ``(songs,)``, means over stems."""

    plan: Plan
    before: np.ndarray  # scores of the searched songs
    after: np.ndarray
    held_out_before: np.ndarray  # scores of the held-out songs; empty if no better weights were found
    held_out_after: np.ndarray
    scored: tuple[str, ...]  # names of the held-out songs that were scored

    @property
    def gains(self) -> np.ndarray:
        """Gains of the held-out songs in dB: ``(songs,)``."""
        return self.held_out_after - self.held_out_before

    @property
    def recommended(self) -> bool:
        """Whether held-out songs gained on average."""
        return bool(len(self.gains)) and float(self.gains.mean()) > MIN_GAIN


def tune(search: Search, separator: Separator, on_done: Report = lambda line: None) -> Tuned:
    """Search, then score the result on the held-out songs.

    The separator is for the search's plan. ``on_done`` is called with a line after each try. Estimates are
    kept in unnamed temporary files. Raises :class:`KmdxError` if a song cannot be read or separated, or its
    estimates do not fit on the disk.
    """
    _check_disk(search)
    plan, before, after = _try_moves(search, separator, on_done)
    found = _score_held_out(search, separator, plan, on_done) if plan.nodes != search.plan.nodes else {}
    held = np.array([*found.values()]).reshape(-1, 2)
    return Tuned(plan, before, after, held[:, 0], held[:, 1], tuple(found))


def _try_moves(search: Search, separator: Separator, on_done: Report) -> tuple[Plan, np.ndarray, np.ndarray]:
    """Try all moves in each round; return the best plan, and scores before and after, ``(songs,)`` each."""
    songs = [_Song(track) for track in search.songs]
    before = np.array([song.score(separator, search.stems) for song in songs])
    for song in songs:
        song.accept()
    on_done(f"before: {before.mean():.3f} dB")
    plan, best, step = search.plan, before, search.step
    for number in range(search.rounds):
        score = best.mean()
        for move in search.moves:
            direction = step
            for _ in range(TRIES):
                tried = move.applied(plan, direction)
                again = search.dependent_runs(move)
                sdr = np.array(
                    [song.score(separator.with_plan(tried), search.stems, again) for song in songs]
                )
                better = sdr.mean() > best.mean() + MIN_GAIN
                terms = tried.nodes[move.node].terms
                values = ", ".join(f"{name} {terms[name]:g}" for name, _ in move.changes)
                on_done(f"{move.node}: {values}: {sdr.mean():.3f} dB{', accepted' if better else ''}")
                if not better:
                    direction = -direction
                    continue
                plan, best = tried, sdr
                for song in songs:
                    song.accept()
        if best.mean() <= score + MIN_GAIN:
            step /= 2
        on_done(f"round {number + 1} of {search.rounds}: {best.mean():.3f} dB")
    return plan, before, best


def _score_held_out(
    search: Search, separator: Separator, plan: Plan, on_done: Report
) -> dict[str, tuple[float, float]]:
    """SDR in dB of each held-out song, before and after the search."""
    changed = [move for move in search.moves if plan.nodes[move.node] != search.plan.nodes[move.node]]
    again = list({run for move in changed for run in search.dependent_runs(move)})
    scores = {}
    for track in search.held_out:
        song = _Song(track)
        try:
            before = song.score(separator, search.stems)
            song.accept()
            after = song.score(separator.with_plan(plan), search.stems, again)
        except KmdxError as error:  # must not lose the result of the search
            on_done(f"held out, {track.name}: left out: {error}")
            continue
        scores[track.name] = before, after
        on_done(f"held out, {track.name}: {before:.3f} dB before, {after:.3f} dB after")
    return scores


class _Song:
    """A song and its networks' estimates, which are kept in scratch files."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.accepted: Stems = {}
        self.tried: Stems = {}

    def score(self, separator: Separator, stems: Sequence[str], again: Sequence[str] = ()) -> float:
        """Mean SDR over stems whose true stem is not silent.

        Only the network runs in ``again`` run again; for all others the accepted estimates are used.
        """
        mixture = dataset.read(self.track, MIXTURE)
        known = {name: samples for name, samples in self.accepted.items() if node_of(name) not in again}
        self.tried = {}  # frees its file
        estimates, _ = run_networks(separator, mixture, stems, known)
        names = [name for name in estimates if name not in known]
        # One file per song: a file for each estimate could be more than a process may open.
        stored = join((estimates[name] for name in names), limit=0)
        self.tried = dict(zip(names, stored.reshape(len(names), *mixture.samples.shape), strict=True))
        found = blended(separator, mixture, stems, estimates)
        truths = {
            stem: dataset.read(self.track, reference_of(stem, separator.plan.stems)).samples for stem in stems
        }
        sdr = [
            metrics.global_sdr(truth, as_16_bit(found[stem]))
            for stem, truth in truths.items()
            if not is_silent(np.square(truth, dtype=np.float64).sum(), np.asarray(truth.size, np.float64))
        ]
        if not sdr:
            raise KmdxError(f"{self.track.name}: every true stem is silent; leave the song out")
        return float(np.mean(sdr))

    def accept(self) -> None:
        """Replace accepted estimates with the last tried ones."""
        if not self.accepted:
            self.accepted, self.tried = self.tried, {}
        for name, samples in self.tried.items():
            for target, source in zip(blocks(self.accepted[name]), blocks(samples), strict=True):
                target[:] = source
        self.tried = {}


def _check_disk(search: Search) -> None:
    """Raise :class:`KmdxError` if the disk has too little space for a search's estimates."""
    needed, folder = search.cost().disk, tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise KmdxError(
            f"{folder}: the search needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "choose another folder (--scratch), or search fewer songs (--search)"
        )


def cost(search: Search, most: SearchCost) -> str:
    """The maximum cost of a search, in words."""
    parts = [
        f"at most {counted(most.runs, 'network run')} on {counted(len(search.songs), 'song')}"
        + (f", plus {len(search.held_out)} held out for the result" if search.held_out else ""),
        f"{most.audio:.0f} s of audio through networks",
    ]
    if most.gflop is not None:
        parts.append(f"{most.gflop:.0f} GFLOP")
    parts.append(f"{most.disk / 1e9:.2f} GB of disk")
    time = "time unknown (use --collected)" if most.seconds is None else f"about {_minutes(most.seconds)}"
    return "; ".join([*parts, time])


def weights(before: Plan, after: Plan) -> Table:
    """A table of the weights that changed."""
    table = tables.empty("weights", ["sum", "signal"], ["published", "found"])
    for name, reference, old, new in changes(before, after):
        table.add_row(name, reference, f"{old:g}", f"{new:g}")
    return table


def scores(tuned: Tuned) -> Table:
    """A table of the scores of searched and held-out songs."""
    headings = ["", "published", "found", "gain", f"{COVERAGE:.0%} interval"]
    table = tables.empty("global SDR (dB, mean over stems and songs)", ["songs"], headings)
    for name, before, after in (
        ("searched", tuned.before, tuned.after),
        ("held out", tuned.held_out_before, tuned.held_out_after),
    ):
        if len(before):
            table.add_row(
                name,
                str(len(before)),
                f"{before.mean():.3f}",
                f"{after.mean():.3f}",
                *tables.gain(after - before),
            )
    return table


def origin(search: Search, before: Plan, after: Plan, tuned: Tuned) -> Iterator[str]:
    """Lines about the origin and the scores of a plan's stage weights, for its comments."""
    yield (
        f"Weights of sums that later stages take as input were found by evaluator.blend_search on "
        f"{counted(len(search.songs), 'song')}, from {before.name} ({before.digest[:12]})."
    )
    yield "Songs: " + ", ".join(track.name for track in search.songs) + "."
    for name, reference, old, new in changes(before, after):
        yield f"{name}: {reference} {old:g}, now {new:g}."
    yield (
        f"Global SDR on these songs: {tuned.before.mean():.3f} dB published, {tuned.after.mean():.3f} dB now."
    )
    if len(tuned.gains):
        names = ", ".join(tuned.scored)
        mean, ends = tables.gain(tuned.gains)
        between = f" ({COVERAGE:.0%}: {ends})" if ends else ""
        yield (
            f"Held out: {names}: {tuned.held_out_before.mean():.3f} dB published, "
            f"{tuned.held_out_after.mean():.3f} dB now, gain {mean}{between}."
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
