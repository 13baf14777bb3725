"""How weights that later stages hear may change, and what trying that costs.

A move changes one estimate's weight in a sum, or hands weight from one estimate to another. What a network
makes of another sum cannot be told from inner products, so each try runs networks again: those behind the
changed sum and no others. Each move is tried twice in a round, which makes the cost known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from evaluator.blend_search.flat_plan import published, runs, source_of
from evaluator.dataset import Track
from kmdx.challenge import CHANNELS, RATE, STEMS
from kmdx.errors import KmdxError
from kmdx.nodes import Estimate, Sum
from kmdx.plan import Plan

TRIES = 2  # of each move in a round: up and down, or twice in the direction that helps
DIGITS = 6  # of a weight


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
    disk : int
        Bytes of estimates that lie on the disk at a time.
    """

    runs: int
    audio: float
    gflop: float | None
    seconds: float | None
    disk: int


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
            disk=self._disk(),
        )

    def _disk(self) -> int:
        """Bytes of what is known and what is tried: of all searched songs, then of one that is held out."""
        sources = {run: len(used) for run, used in self.plan.sources_used(self.stems).items()}
        again = [sum(sources[run] for run in self.behind(move)) for move in self.moves]
        moved = {run for move in self.moves for run in self.behind(move)}
        searched = sum(track.duration for track in self.songs) * (
            sum(sources.values()) + max(again, default=0)
        )
        longest = max((track.duration for track in self.held_out), default=0.0)
        held = longest * (sum(sources.values()) + sum(sources[run] for run in moved))
        return math.ceil(max(searched, held) * RATE * CHANNELS * np.dtype(np.float32).itemsize)

    def behind(self, move: Move) -> list[str]:
        """The network runs that a move makes again."""
        return [run for run in runs(self.plan, self.stems) if move.node in self.plan.order([run])]


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
    # Sums above the signals that meet in a stem are blends, whose weights inner products settle.
    meeting = {signal.reference for stem in STEMS if stem in plan.stems for signal in published(plan, stem)}
    found: dict[str, list[Move]] = {}
    for name in plan.order(sorted(meeting)):
        node = plan.nodes[name]
        if not isinstance(node, Sum):
            continue
        estimates = [reference for reference in node.terms if source_of(plan, reference) is not None]
        if estimates:
            found[name] = [
                *(Move(name, ((reference, 1.0),)) for reference in estimates),
                *(Move(name, ((one, 1.0), (other, -1.0))) for one, other in combinations(estimates, 2)),
            ]
    for name in only:
        if name not in found:
            raise KmdxError(
                f"{plan.name}: {name!r} is not a sum that later stages take as input; "
                f"available: {', '.join(found)}"
            )
    chosen = [move for name, each in found.items() if name in (only or found) for move in each]
    if not chosen:
        raise KmdxError(
            f"{plan.name}: no later stage hears a sum of estimates; `solve` finds all its weights"
        )
    return tuple(chosen)


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


def changes(before: Plan, after: Plan) -> Iterator[tuple[str, str, float, float]]:
    """Weights that differ: sum, signal, before and after."""
    for name, node in before.nodes.items():
        if isinstance(node, Sum) and after.nodes[name] != node:
            for reference, old in node.terms.items():
                if (new := weight(after, name, reference)) != old:
                    yield name, reference, old, new


def weight(plan: Plan, name: str, reference: str) -> float:
    """The weight of a signal in a sum."""
    node = plan.nodes[name]
    assert isinstance(node, Sum)
    return node.terms[reference]


def _network(plan: Plan, run: str) -> str:
    node = plan.nodes[run]
    assert isinstance(node, Estimate)
    return node.network
