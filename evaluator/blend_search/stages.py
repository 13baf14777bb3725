"""The weights that later stages hear: which residuals they are given, searched by coordinates.

What a network makes of another residual cannot be told from inner products, so each try runs networks
again: those behind the changed sum and no others. A move changes one estimate's weight in a sum, or hands
weight from one estimate to another; each is tried up and down in every round, which makes the cost known
before the search begins.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluator import dataset, metrics
from evaluator.blend_search.collecting import Samples, as_16_bit, blended, run_networks
from evaluator.blend_search.search import NOTHING
from evaluator.blend_search.signals import runs, source_of
from evaluator.dataset import STEMS, Track
from kmdx.errors import KmdxError
from kmdx.plan import Hear, Plan, Sum, node_of
from kmdx.separator import Separator

TRIES = 2  # of each move in a round: up and down, or twice in the direction that helps
DIGITS = 6  # of a weight

Told = Callable[[str], None]


class Move(NamedTuple):
    """What is added to weights of one sum."""

    node: str
    changes: tuple[tuple[str, float], ...]

    def applied(self, plan: Plan, step: float) -> Plan:
        """The plan after so many of this move."""
        node = plan.nodes[self.node]
        assert isinstance(node, Sum)
        terms = dict(node.terms)
        for reference, change in self.changes:
            terms[reference] = round(terms[reference] + step * change, DIGITS)
        return replace(plan, nodes={**plan.nodes, self.node: replace(node, terms=terms)})


@dataclass(frozen=True)
class Cost:
    """What a search takes at most.

    Attributes
    ----------
    runs : int
        Network runs over a song.
    audio : float
        Seconds of audio that go through networks.
    gflop : float or None
        Arithmetic, where all networks state it.
    seconds : float or None
        Estimated time, where it is known what runs take.
    """

    runs: int
    audio: float
    gflop: float | None
    seconds: float | None


@dataclass(frozen=True)
class Search:
    """What is searched, and on which songs.

    Attributes
    ----------
    plan : Plan
    songs : sequence of Track
        That tries are scored on.
    held_out : sequence of Track
        That only the result is scored on.
    moves : tuple of Move
    step : float
        Change of a weight in the first round; halved when a round brings nothing.
    rounds : int
    """

    plan: Plan
    songs: Sequence[Track]
    held_out: Sequence[Track]
    moves: tuple[Move, ...]
    step: float = 0.1
    rounds: int = 1

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems that are scored."""
        return tuple(stem for stem in STEMS if stem in self.plan.stems)

    def cost(self, costs: Mapping[str, float] | None = None) -> Cost:
        """What the search takes at most.

        Parameters
        ----------
        costs : mapping of str to float, optional
            Seconds that runs of the plan's nodes take for a second of audio.
        """
        every = runs(self.plan, self.stems)
        tried = [*every]
        for move in self.moves:
            tried += self.behind(move) * (TRIES * self.rounds)
        moved = {run for move in self.moves for run in self.behind(move)}
        last = [*every, *moved]
        searched = sum(track.duration for track in self.songs)
        held = sum(track.duration for track in self.held_out)
        per_second = [self.plan.networks[_network(self.plan, run)].gflops for run in every]
        gflops = dict(zip(every, per_second, strict=True))

        def total(of: Mapping[str, float]) -> float:
            return searched * sum(of[run] for run in tried) + held * sum(of[run] for run in last)

        known = {run: value for run, value in gflops.items() if value is not None}
        return Cost(
            runs=len(tried) * len(self.songs) + len(last) * len(self.held_out),
            audio=total(dict.fromkeys(every, 1.0)),
            gflop=total(known) if len(known) == len(every) else None,
            seconds=None if costs is None else total(costs),
        )

    def behind(self, move: Move) -> list[str]:
        """The network runs that a move makes again."""
        return [run for run in runs(self.plan, self.stems) if move.node in self.plan.order([run])]


@dataclass(frozen=True)
class Tuned:
    """What a search came to: SDR in dB, ``(songs,)``, means over stems.

    Attributes
    ----------
    plan : Plan
    before, after : ndarray
        Of the songs that were searched.
    held_out_before, held_out_after : ndarray
        Of the songs that were held out.
    """

    plan: Plan
    before: np.ndarray
    after: np.ndarray
    held_out_before: np.ndarray
    held_out_after: np.ndarray

    @property
    def gains(self) -> np.ndarray:
        """What held-out songs gained, in dB: ``(songs,)``."""
        return self.held_out_after - self.held_out_before

    @property
    def recommended(self) -> bool:
        """Whether held-out songs gained."""
        return bool(len(self.gains)) and float(self.gains.mean()) > NOTHING


def moves(plan: Plan, only: Sequence[str] = ()) -> tuple[Move, ...]:
    """The moves of a plan's residuals, and of sums that networks hear.

    Parameters
    ----------
    plan : Plan
    only : sequence of str
        Sums to move; all if none are given.

    Raises
    ------
    KmdxError
        If one of them is no such sum, or there is none.
    """
    stems = [stem for stem in STEMS if stem in plan.stems]
    order = plan.order(stems)
    heard = {name for run in runs(plan, stems) for name in plan.order([run])}
    found: dict[str, list[Move]] = {}
    for name in order:
        node = plan.nodes[name]
        if not isinstance(node, Sum) or (name not in heard and source_of(plan, name) is not None):
            continue
        estimates = [reference for reference in node.terms if source_of(plan, reference) is not None]
        if estimates:
            found[name] = [
                *(Move(name, ((reference, 1.0),)) for reference in estimates),
                *(Move(name, ((one, 1.0), (other, -1.0))) for one, other in combinations(estimates, 2)),
            ]
    for name in only:
        if name not in found:
            raise KmdxError(f"{plan.name}: {name!r} is no sum that stages hear; there are {', '.join(found)}")
    chosen = [move for name, each in found.items() if name in (only or found) for move in each]
    if not chosen:
        raise KmdxError(
            f"{plan.name}: no later stage hears a sum of estimates; `solve` finds all its weights"
        )
    return tuple(chosen)


def tune(search: Search, separator: Separator, folder: Path, tell: Told = lambda line: None) -> Tuned:
    """Search.

    Parameters
    ----------
    search : Search
    separator : Separator
        Of the search's plan.
    folder : Path
        For the estimates of songs that are searched: 0.35 MB for each second of one.
    tell : callable
        Called with a line after each try.

    Raises
    ------
    KmdxError
        If a song cannot be read or separated.
    """
    songs = [_Song(track, folder / str(number)) for number, track in enumerate(search.songs)]
    plan = search.plan
    before = np.array([song.play(separator, search.stems) for song in songs])
    for song in songs:
        song.keep()
    best = before
    tell(f"as it is: {best.mean():.3f} dB")
    step = search.step
    for number in range(search.rounds):
        score = best.mean()
        for move in search.moves:
            direction = step
            for _ in range(TRIES):
                tried = move.applied(plan, direction)
                again = search.behind(move)
                sdr = np.array([song.play(separator.under(tried), search.stems, again) for song in songs])
                better = sdr.mean() > best.mean() + NOTHING
                said = ", ".join(f"{name} {_weight(tried, move.node, name):g}" for name, _ in move.changes)
                tell(f"{move.node}: {said}: {sdr.mean():.3f} dB{', taken' if better else ''}")
                if better:
                    plan, best = tried, sdr
                    for song in songs:
                        song.keep()
                else:
                    direction = -direction
        if best.mean() <= score + NOTHING:
            step /= 2
        tell(f"round {number + 1} of {search.rounds}: {best.mean():.3f} dB")
    pairs = []
    for number, track in enumerate(search.held_out):
        song = _Song(track, folder / f"held out {number}")
        first = song.play(separator, search.stems)
        song.keep()
        changed = [move for move in search.moves if plan.nodes[move.node] != search.plan.nodes[move.node]]
        again = list({run for move in changed for run in search.behind(move)})
        pairs.append((first, song.play(separator.under(plan), search.stems, again)))
        song.drop()
        tell(f"held out, {track.name}: {pairs[-1][0]:.3f} dB, now {pairs[-1][1]:.3f} dB")
    held = np.array(pairs).reshape(-1, 2)
    return Tuned(plan, before, best, held[:, 0], held[:, 1])


class _Song:
    """A song whose estimates lie in a folder, each until another is taken in its place."""

    def __init__(self, track: Track, folder: Path) -> None:
        self.track = track
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.tried: dict[str, Samples] = {}
        folder.mkdir()

    def play(self, separator: Separator, stems: Sequence[str], again: Sequence[str] = ()) -> float:
        """Mean SDR over stems that are not silent in truth; runs that are not made ``again`` are known."""
        mixture = dataset.read(self.track, dataset.MIXTURE)
        known = {
            name: np.load(path, mmap_mode="r")
            for name, path in self.files.items()
            if node_of(name) not in again
        }
        estimates, _ = run_networks(separator, mixture, stems, known)
        self.tried = {name: samples for name, samples in estimates.items() if name not in known}
        found = blended(separator, mixture, stems, estimates)
        truths = {stem: dataset.read(self.track, stem).samples for stem in stems}
        sdr = [
            metrics.global_sdr(truth, as_16_bit(found[stem])) for stem, truth in truths.items() if truth.any()
        ]
        if not sdr:
            raise KmdxError(f"{self.track.name}: every true stem is silent; leave the song out")
        return float(np.mean(sdr))

    def keep(self) -> None:
        """Take what was tried last for what is known."""
        for name, samples in self.tried.items():
            path = self.folder / f"{name}.{secrets.token_hex(4)}.npy"
            np.save(path, samples)
            if name in self.files:
                self.files[name].unlink()
            self.files[name] = path
        self.tried = {}

    def drop(self) -> None:
        """Let go of everything."""
        self.tried = {}
        for path in self.files.values():
            path.unlink()
        self.files = {}


def _network(plan: Plan, run: str) -> str:
    node = plan.nodes[run]
    assert isinstance(node, Hear)
    return node.network


def _weight(plan: Plan, name: str, reference: str) -> float:
    node = plan.nodes[name]
    assert isinstance(node, Sum)
    return node.terms[reference]


def changes(before: Plan, after: Plan) -> Iterator[tuple[str, str, float, float]]:
    """Weights that differ: sum, signal, before and after."""
    for name, node in before.nodes.items():
        if isinstance(node, Sum) and after.nodes[name] != node:
            for reference, weight in node.terms.items():
                if _weight(after, name, reference) != weight:
                    yield name, reference, weight, _weight(after, name, reference)


def chosen_songs(tracks: Sequence[Track], count: int | None) -> tuple[list[Track], list[Track]]:
    """Songs to search on, evenly spread, and those to hold out; half of them by default.

    Raises
    ------
    KmdxError
        If there are not so many.
    """
    number = (len(tracks) + 1) // 2 if count is None else count
    if not 1 <= number <= len(tracks):
        raise KmdxError(f"--search {number}: expected 1 to {len(tracks)}, the number of songs")
    places = {place * len(tracks) // number for place in range(number)}
    return (
        [track for place, track in enumerate(tracks) if place in places],
        [track for place, track in enumerate(tracks) if place not in places],
    )
