"""Changes of the weights in sums that later networks take as input, and the cost of trying them.

A move changes one estimate's weight in a sum, or transfers weight from one estimate to another. Inner
products cannot predict what a network makes of a changed sum, so each try reruns all networks that depend on
the sum. Each move is tried twice per round, so the maximum cost is known in advance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from evaluator.blend_search.flat_plan import published, scored_stems, source_of
from evaluator.dataset import Track
from kmdx.challenge import CHANNELS, RATE
from kmdx.errors import KmdxError, quoted, suggest
from kmdx.plan import Plan

TRIES = 2  # of each move in a round: up and down, or twice in the direction that helps
DIGITS = 6  # of a weight


class Move(NamedTuple):
    """A change of the weights of one sum."""

    node: str
    changes: tuple[tuple[str, float], ...]

    def applied(self, plan: Plan, step: float) -> Plan:
        """The plan after this move, scaled by ``step``."""
        node = plan.nodes[self.node]
        terms = dict(node.terms)
        for reference, change in self.changes:
            terms[reference] = round(terms[reference] + step * change, DIGITS)
        return replace(plan, nodes={**plan.nodes, self.node: replace(node, terms=terms)})


@dataclass(frozen=True)
class SearchCost:
    """Maximum cost of a search."""

    runs: int  # runs of a network on a song
    audio: float  # seconds of audio that networks process
    gflop: float | None  # arithmetic in GFLOP, if known for all networks
    seconds: float | None  # estimated time, if the duration of all runs is known
    disk: int  # bytes of estimates on the disk at the same time


@dataclass(frozen=True)
class Search:
    """The settings of a search."""

    plan: Plan
    songs: Sequence[Track]  # on which each try is scored
    held_out: Sequence[Track]  # on which only the result is scored
    moves: tuple[Move, ...]
    step: float = 0.1  # change of a weight in the first round; halved after a round without a gain
    rounds: int = 1

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems that are scored."""
        return scored_stems(self.plan)

    def cost(self, costs: Mapping[str, float] | None = None) -> SearchCost:
        """Maximum cost of the search, given the seconds that each network run takes per second of audio."""
        every = self.plan.runs(self.stems)
        tried = [*every]
        for move in self.moves:
            tried += self.dependent_runs(move) * (TRIES * self.rounds)
        last = [*every, *self._moved()]
        searched = sum(track.duration for track in self.songs)
        held = sum(track.duration for track in self.held_out)
        gflops = {run: self.plan.networks[network].gflops for run, network in every.items()}

        def total(of: Mapping[str, float]) -> float:
            return searched * sum(of[run] for run in tried) + held * sum(of[run] for run in last)

        known = {run: value for run, value in gflops.items() if value is not None}
        return SearchCost(
            runs=len(tried) * len(self.songs) + len(last) * len(self.held_out),
            audio=total(dict.fromkeys(every, 1.0)),
            gflop=total(known) if len(known) == len(every) else None,
            seconds=None if costs is None else total(costs),
            disk=self._disk(),
        )

    def _disk(self) -> int:
        """Bytes of accepted and tried estimates: first of all searched songs, then of one held-out song."""
        sources = {run: len(used) for run, used in self.plan.sources_used(self.stems).items()}
        again = [sum(sources[run] for run in self.dependent_runs(move)) for move in self.moves]
        searched = sum(track.duration for track in self.songs) * (
            sum(sources.values()) + max(again, default=0)
        )
        longest = max((track.duration for track in self.held_out), default=0.0)
        held = longest * (sum(sources.values()) + sum(sources[run] for run in self._moved()))
        return math.ceil(max(searched, held) * RATE * CHANNELS * np.dtype(np.float32).itemsize)

    def _moved(self) -> set[str]:
        """The network runs that depend on any move."""
        return {run for move in self.moves for run in self.dependent_runs(move)}

    def dependent_runs(self, move: Move) -> list[str]:
        """The network runs that depend on the sum that a move changes."""
        return [run for run in self.plan.runs(self.stems) if move.node in self.plan.order([run])]


def moves(plan: Plan, only: Sequence[str] = ()) -> tuple[Move, ...]:
    """The moves of a plan's residuals and of sums that networks take as input.

    ``only`` names the sums to change; if it is empty, all are changed. Raises :class:`KmdxError` if one of
    them is not such a sum, or the plan has none.
    """
    # Sums of a stem's signals are blends, whose weights `solve` finds from inner products.
    signals = {signal.reference for stem in plan.stems for signal in published(plan, stem)}
    found: dict[str, list[Move]] = {}
    for name in plan.order(sorted(signals)):
        terms = plan.nodes[name].terms
        estimates = [reference for reference in terms if source_of(plan, reference) is not None]
        if estimates:
            found[name] = [
                *(Move(name, ((reference, 1.0),)) for reference in estimates),
                *(Move(name, ((one, 1.0), (other, -1.0))) for one, other in combinations(estimates, 2)),
            ]
    for name in only:
        if name not in found:
            raise KmdxError(
                f"{plan.name}: {quoted(name)} is not a sum that later stages take as input"
                f"{suggest(name, found)}; available: {', '.join(found)}"
            )
    chosen = [move for name, each in found.items() if name in (only or found) for move in each]
    if not chosen:
        raise KmdxError(
            f"{plan.name}: no later stage takes a sum of estimates as input; use `solve` to find its weights"
        )
    return tuple(chosen)


def chosen_songs(tracks: Sequence[Track], count: int | None) -> tuple[list[Track], list[Track]]:
    """Songs to search on, evenly spread and by default half of them, and songs to hold out.

    Raises :class:`KmdxError` if ``count`` is not from 1 to the number of songs.
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
        for reference, old in node.terms.items():
            if (new := after.nodes[name].terms[reference]) != old:
                yield name, reference, old, new
