"""Which member of an ensemble earns its time: the score without it, and the compute that it takes.

A member is a network, or one run of a network. Without it go all signals that need it: its estimates, what
hears residuals of them, and so on. The weights of what is left are found anew, near to the published ones
scaled up to the same sum, with the strength of the prior that does best on songs held out. That choice is
made anew for each set of members, so that sets are alike; scores are a little too good in the same way.
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
from evaluator.blend_search.flat_plan import runs
from evaluator.blend_search.inner_products import Weights
from evaluator.blend_search.plan_writer import reweighted
from evaluator.blend_search.search import DIGITS, Result, SearchOptions, search
from kmdx.errors import KmdxError
from kmdx.nodes import Estimate
from kmdx.plan import Plan

MOST = 12  # members of which all sets are tried
CANCELLED = 0.1  # sum of weights, as a share of the sum of their sizes, below which they all but cancel

CAVEAT = (
    "The set is the best of many, by scores whose priors were chosen by the same songs, a little too good. "
    "What follows was validated for it anew; published are its shares of the published weights."
)


@dataclass(frozen=True)
class Candidate:
    """An ensemble of some of the members.

    Attributes
    ----------
    members : frozenset of str
    plan : Plan
        With the weights that were found; it has nothing that they do not need.
    sdr : mapping of str to float
        Cross-validated score of each stem: dB, mean over songs.
    real_time_factor : float
        Seconds that its networks take for a second of audio, as measured while collecting.
    gflops : float or None
        Arithmetic in GFLOP per second of audio, where all networks state it.
    """

    members: frozenset[str]
    plan: Plan
    sdr: Mapping[str, float]
    real_time_factor: float
    gflops: float | None

    @property
    def score(self) -> float:
        """The mean over stems, in dB."""
        return float(np.mean([*self.sdr.values()]))


class Ensemble:
    """All that sets of members are compared with.

    Parameters
    ----------
    collection : Collection
    options : SearchOptions
        Of which constraints, prior and folds count.
    by_run : bool
        Whether members are network runs, not networks.

    Attributes
    ----------
    members : mapping of str to frozenset of str
        Names, and the network runs of each.
    whole : Candidate
        Of all members.

    Raises
    ------
    KmdxError
        If no stem has songs to hold out.
    """

    def __init__(self, collection: Collection, options: SearchOptions, by_run: bool = False) -> None:
        self.collection = collection
        self.options = options
        self.folds = check_folds(options.folds, len(collection.songs))
        self.members = _members(collection.plan, by_run)
        self._needs = {
            signal: frozenset(runs(collection.plan, [signal]))
            for stem in collection.stems
            for signal in stem.signals
        }
        self._found: dict[tuple[str, tuple[int, ...]], tuple[Weights, float | None]] = {}
        whole = self.candidate(self.members)
        if whole is None or not whole.sdr:
            raise KmdxError(
                f"{collection.folder}: too few songs to hold one out, so that nothing says what members are "
                "worth on other songs; collect more"
            )
        self.whole = whole

    def without(self, name: str) -> Candidate | None:
        """The ensemble without one member; ``None`` if a stem cannot be made without it."""
        return self.candidate(self.members.keys() - {name})

    def candidate(self, members: Names[str]) -> Candidate | None:
        """The ensemble of these members; ``None`` if a stem cannot be made of them."""
        plan = self.collection.plan
        left = frozenset[str]().union(*(self.members[name] for name in members))
        able = set(self._signals(members))
        scored = {stem.name for stem in self.collection.stems}
        others = [stem for stem in plan.stems if stem not in scored]
        if not left.issuperset(runs(plan, others)):
            return None
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
            real_time_factor=sum(self.collection.costs[run] for run in runs(small, small.stems)),
            gflops=small.gflops(small.stems),
        )

    def sets(self) -> Iterator[Candidate]:
        """The ensembles of all sets of members that can make every stem.

        Raises
        ------
        KmdxError
            If there are too many.
        """
        if len(self.members) > MOST:
            raise KmdxError(f"{len(self.members)} members have too many sets; expected {MOST} at most")
        seen = set()
        for count in range(1, len(self.members) + 1):
            for members in combinations(self.members, count):
                candidate = self.candidate(members)
                if candidate is None:
                    continue
                needed = runs(candidate.plan, candidate.plan.stems)
                if needed not in seen:  # else a member lacks what it hears, or has no weight
                    seen.add(needed)
                    yield candidate

    def validated(self, candidate: Candidate) -> tuple[Collection, Result]:
        """The collection of what a candidate runs, and the weights found for it as for any collection.

        What stands there as published is the share of the published weights that the set has. These are
        the weights of a stem whose own gain nothing on songs held out.
        """
        left = {*runs(candidate.plan, candidate.plan.stems)}
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
        return part, search(part, replace(self.options, joint=False, anyway=False))

    def _signals(self, members: Names[str]) -> Iterator[str]:
        """The signals that some members can make."""
        left = frozenset[str]().union(*(self.members[name] for name in members))
        return (signal for signal, needed in self._needs.items() if needed <= left)

    def _blend(self, stem: StemProducts, kept: tuple[int, ...]) -> tuple[Weights, float | None]:
        """Weights of some of a stem's signals, and their cross-validated score where there is one."""
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
    """The best ensemble whose real-time factor is within a budget; of equally good ones the fastest.

    Raises
    ------
    KmdxError
        If none is.
    """
    if not candidates:
        raise KmdxError(f"--budget {budget:g}: no set of members can make every stem")
    affordable = [each for each in candidates if each.real_time_factor <= budget]
    if not affordable:
        fastest = min(candidates, key=lambda each: each.real_time_factor)
        raise KmdxError(
            f"--budget {budget:g}: the fastest set that makes every stem, "
            f"{', '.join(sorted(fastest.members))}, takes {fastest.real_time_factor:.2f} × the duration here"
        )
    return max(affordable, key=lambda each: (round(each.score, 9), -each.real_time_factor))


def _members(plan: Plan, by_run: bool) -> dict[str, frozenset[str]]:
    members: dict[str, set[str]] = {}
    for run in runs(plan, plan.stems):
        node = plan.nodes[run]
        assert isinstance(node, Estimate)
        members.setdefault(run if by_run else node.network, set()).add(run)
    return {name: frozenset(owned) for name, owned in members.items()}


def share(published: Weights, kept: NDArray[np.intp]) -> Weights:
    """The published weights of some signals, brought to the sum of all.

    They are scaled where they add up; where they all but cancel, or to the other sign, or are all 0, each
    is shifted by as much.
    """
    left = published[kept]
    total, rest = float(published.sum()), float(left.sum())
    if total * rest > 0 and abs(rest) > CANCELLED * np.abs(left).sum():
        return left * (total / rest)
    return left + (total - rest) / len(left)


def table(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> Table:
    """For each member the score lost by leaving it out and the compute saved."""
    whole = ensemble.whole
    title = "left out: cross-validated global SDR lost (dB), and what is saved"
    rows = Table(title=title, title_justify="left", box=None, pad_edge=False)
    rows.add_column("")
    for heading in ("runs", *whole.sdr, "mean", "real-time factor", "GFLOP"):
        rows.add_column(heading, justify="right")
    rows.add_row(
        "nothing: the score",
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
    """A line on the set that was chosen for a budget."""
    lost = ensemble.whole.score - candidate.score
    return (
        f"Within {budget:g} × the duration: {', '.join(sorted(candidate.members))}; cross-validated "
        f"{candidate.score:.3f} dB, {lost:.3f} less than all members, at {candidate.real_time_factor:.2f} × "
        f"instead of {ensemble.whole.real_time_factor:.2f} ×."
    )


def as_json(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> dict[str, Any]:
    """The same, and which runs are whose."""
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
    return "not stated" if value is None else f"{value:.0f}"
