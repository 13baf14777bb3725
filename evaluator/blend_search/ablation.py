"""Measures what each member of an ensemble is worth: the score without it, and the time that it takes.

A member is a network, or one run of a network. Leaving it out removes all signals that need it: its own
estimates, estimates made from them, and so on. The weights of the remaining signals are then found again,
close to the published weights scaled up to the same sum. Each set of members gets the prior that does best
on held-out songs, so sets can be compared. All scores are slightly optimistic for the same reason.
"""

from __future__ import annotations

from collections.abc import Collection as Names
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from evaluator.blend_search import tables
from evaluator.blend_search.collection import Collection, StemProducts
from evaluator.blend_search.cross_validation import (
    UNCHOSEN,
    BlendProblem,
    can_choose,
    can_validate,
    check_folds,
    choose,
    deal,
    held_out,
)
from evaluator.blend_search.inner_products import Weights
from evaluator.blend_search.plan_writer import reweighted
from evaluator.blend_search.search import DIGITS, Result, SearchOptions, find_weights
from kmdx.errors import KmdxError
from kmdx.plan import Plan

MAX_MEMBERS = 12  # for trying all sets
CANCELLED = 0.1  # weights nearly cancel if their sum is below this share of the sum of their absolute values

CAVEAT = (
    "The set is the best of many, and its prior was chosen on the same songs, so its score is slightly "
    "optimistic. The scores below were validated again for this set; published weights are its share of them."
)


@dataclass(frozen=True)
class Candidate:
    """An ensemble of some of the members."""

    members: frozenset[str]
    plan: Plan  # with the weights found, without unused nodes
    sdr: Mapping[str, float]  # cross-validated score of each stem in dB, mean over songs
    real_time_factor: float  # seconds that its networks take per second of audio, measured during collection
    gflops: float | None  # arithmetic per second of audio in GFLOP, if known for all networks

    @property
    def score(self) -> float:
        """The mean over stems, in dB."""
        return float(np.mean([*self.sdr.values()]))


class Ensemble:
    """An ensemble whose members can be left out: networks, or network runs if ``by_run`` is true.

    Only the constraints, prior and folds of ``options`` are used. Raises :class:`KmdxError` if no stem has
    enough songs to hold one out.
    """

    def __init__(self, collection: Collection, options: SearchOptions, by_run: bool = False) -> None:
        self.collection = collection
        self.options = options
        self.folds = check_folds(options.folds, len(collection.songs))
        self.members = _members(collection.plan, by_run)  # the network runs of each member
        self._needs = {
            signal: frozenset(collection.plan.runs([signal]))
            for stem in collection.stems
            for signal in stem.signals
        }
        self._found: dict[tuple[str, tuple[int, ...]], tuple[Weights, float | None]] = {}
        whole = self.candidate(self.members)
        if whole is None or not whole.sdr:
            raise KmdxError(
                f"{collection.folder}: too few songs to hold one out, so members cannot be compared on "
                "unseen songs; collect more"
            )
        self.whole = whole  # the ensemble with all members

    def without(self, name: str) -> Candidate | None:
        """The ensemble without one member; ``None`` if a stem cannot be estimated without it."""
        return self.candidate(self.members.keys() - {name})

    def candidate(self, members: Names[str]) -> Candidate | None:
        """The ensemble of some members; ``None`` if they cannot estimate every stem."""
        plan = self.collection.plan
        able = set(self._signals(members))
        weights, sdr = {}, {}
        for stem in self.collection.stems:
            kept = tuple(number for number, signal in enumerate(stem.signals) if signal in able)
            if not kept:
                return None
            found, score = self._blend(stem, kept)
            names = [stem.signals[number] for number in kept]
            weights[stem.name] = dict(zip(names, found.tolist(), strict=True))
            if score is not None:
                sdr[stem.name] = score
        small = reweighted(plan, weights)
        return Candidate(
            members=frozenset(members),
            plan=small,
            sdr=sdr,
            real_time_factor=sum(self.collection.costs[run] for run in small.runs(small.stems)),
            gflops=small.gflops(small.stems),
        )

    def sets(self) -> Iterator[Candidate]:
        """The ensembles of all sets of members that can estimate every stem.

        Raises :class:`KmdxError` if there are too many members.
        """
        if len(self.members) > MAX_MEMBERS:
            raise KmdxError(
                f"{len(self.members)} members have too many sets; expected at most {MAX_MEMBERS} members"
            )
        seen = set()
        for count in range(1, len(self.members) + 1):
            for members in combinations(self.members, count):
                candidate = self.candidate(members)
                if candidate is None:
                    continue
                needed = tuple(candidate.plan.runs(candidate.plan.stems))
                if needed not in seen:  # else a member has weight 0 or lacks its input
                    seen.add(needed)
                    yield candidate

    def validated(self, candidate: Candidate) -> tuple[Collection, Result]:
        """The part of the collection that a candidate uses, and the weights found for that part.

        See :func:`share` for its published weights. A stem keeps them if new weights gain nothing on held-out
        songs.
        """
        left = {*candidate.plan.runs(candidate.plan.stems)}
        stems = []
        for stem in self.collection.stems:
            kept = np.array([n for n, signal in enumerate(stem.signals) if self._needs[signal] <= left])
            stems.append(
                replace(
                    stem,
                    signals=tuple(stem.signals[number] for number in kept),
                    published=share(stem.published, kept),
                    products=stem.products.of_signals(kept),
                )
            )
        part = replace(self.collection, stems=tuple(stems))
        return part, find_weights(part, replace(self.options, joint=False, anyway=False))

    def _signals(self, members: Names[str]) -> Iterator[str]:
        """The signals that some members can compute."""
        left = frozenset[str]().union(*(self.members[name] for name in members))
        return (signal for signal, needed in self._needs.items() if needed <= left)

    def _blend(self, stem: StemProducts, kept: tuple[int, ...]) -> tuple[Weights, float | None]:
        """Weights of some of a stem's signals, and their cross-validated score if there are enough songs."""
        key = stem.name, kept
        if key not in self._found:
            signals = np.array(kept)
            published = share(stem.published, signals)
            songs = stem.counted
            problem = BlendProblem(stem.products.of_songs(songs).of_signals(signals), published, songs)
            self._found[key] = self._solved(problem)
        return self._found[key]

    def _solved(self, problem: BlendProblem) -> tuple[Weights, float | None]:
        constraints, prior = self.options.constraints, self.options.prior
        (fold_of,) = deal([problem], self.folds)
        if not can_validate(fold_of):
            return constraints.nearby(problem.published), None
        if prior is None:
            able = can_choose([problem], self.folds)
            prior = choose([problem], constraints) if able else UNCHOSEN
        score = held_out(problem, fold_of, constraints, [prior]).mean()
        return np.round(problem.weights(constraints, prior), DIGITS), float(score)


def within(candidates: Sequence[Candidate], budget: float) -> Candidate:
    """The best ensemble whose real-time factor is within a budget; the fastest if several are equally good.

    Raises :class:`KmdxError` if no ensemble is within the budget.
    """
    if not candidates:
        raise KmdxError(f"--budget {budget:g}: no set of members can estimate every stem")
    affordable = [each for each in candidates if each.real_time_factor <= budget]
    if not affordable:
        fastest = min(candidates, key=lambda each: each.real_time_factor)
        raise KmdxError(
            f"--budget {budget:g}: the fastest set that estimates every stem "
            f"({', '.join(sorted(fastest.members))}) has a real-time factor of "
            f"{fastest.real_time_factor:.2f}; raise the budget"
        )
    return max(affordable, key=lambda each: (round(each.score, 9), -each.real_time_factor))


def _members(plan: Plan, by_run: bool) -> dict[str, frozenset[str]]:
    members: dict[str, set[str]] = {}
    for run, network in plan.runs(plan.stems).items():
        members.setdefault(run if by_run else network, set()).add(run)
    return {name: frozenset(owned) for name, owned in members.items()}


def share(published: Weights, kept: NDArray[np.intp]) -> Weights:
    """The published weights of some signals, changed to have the sum of all published weights.

    They are scaled, unless they nearly cancel, have the opposite sign or are all 0. In these cases the same
    number is added to each.
    """
    left = published[kept]
    total, rest = float(published.sum()), float(left.sum())
    if total * rest > 0 and abs(rest) > CANCELLED * np.abs(left).sum():
        return left * (total / rest)
    return left + (total - rest) / len(left)


def table(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> Table:
    """The score lost and the time saved by leaving out each member."""
    whole = ensemble.whole
    title = "leaving out one member: loss of cross-validated global SDR (dB), and savings"
    rows = tables.empty(title, [""], ["runs", *whole.sdr, "mean", "real-time factor", "GFLOP"])
    rows.add_row(
        "none (scores)",
        str(sum(map(len, ensemble.members.values()))),
        *(f"{sdr:.3f}" for sdr in whole.sdr.values()),
        f"{whole.score:.3f}",
        f"{whole.real_time_factor:.2f}",
        _gflops(whole.gflops),
    )
    for name, candidate in without.items():
        number = str(len(ensemble.members[name]))
        if candidate is None:
            rows.add_row(name, number, *["–"] * len(whole.sdr), "needed", "", "")
            continue
        lost = [whole.sdr[stem] - candidate.sdr[stem] for stem in whole.sdr]
        both = None not in (whole.gflops, candidate.gflops)
        rows.add_row(
            name,
            number,
            *(f"{loss:+.3f}" for loss in lost),
            f"{whole.score - candidate.score:+.3f}",
            f"{whole.real_time_factor - candidate.real_time_factor:.2f}",
            _gflops((whole.gflops or 0) - (candidate.gflops or 0) if both else None),
        )
    return rows


def chosen(ensemble: Ensemble, candidate: Candidate, budget: float) -> str:
    """A line that describes the set chosen for a budget."""
    lost = ensemble.whole.score - candidate.score
    return (
        f"Within a real-time factor of {budget:g}: {', '.join(sorted(candidate.members))}. Cross-validated: "
        f"{candidate.score:.3f} dB, {lost:.3f} dB less than all members. Real-time factor: "
        f"{candidate.real_time_factor:.2f} instead of {ensemble.whole.real_time_factor:.2f}."
    )


def as_json(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> dict[str, Any]:
    """The content of :func:`table` for JSON, with the runs of each member."""
    return {
        "whole": _candidate(ensemble.whole),
        "members": {name: sorted(runs) for name, runs in ensemble.members.items()},
        "without": {name: each and _candidate(each) for name, each in without.items()},
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "members": sorted(candidate.members),
        "score": candidate.score,
        "sdr": dict(candidate.sdr),
        "real_time_factor": candidate.real_time_factor,
        "gflops": candidate.gflops,
    }


def _gflops(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"
