"""The plans that are compared: an ensemble as published, and with one setting changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluator.blend_search.ablation import share
from evaluator.blend_search.flat_plan import flatten, pruned
from evaluator.blend_search.plan_writer import reweighted
from kmdx.errors import KmdxError
from kmdx.plan import MAX_SHIFTS, Plan
from kmdx.windows import FadeAndAdd, OverlapAdd, Window

PUBLISHED = "as published"


@dataclass(frozen=True)
class Changes:
    """The settings to try, each on its own."""

    overlaps: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.85)
    """Overlaps of all networks' segments, as a fraction of their length."""
    shifts: Sequence[int] = (2, 4)
    tta: bool = True
    members: bool = True
    """Whether to leave out each network, and each run of a network."""

    def __post_init__(self) -> None:
        for overlap in self.overlaps:
            if not 0 <= overlap < 1:
                raise KmdxError(f"an overlap of {overlap:g}: expected a number from 0 to below 1")
        for shifts in self.shifts:
            if not 2 <= shifts <= MAX_SHIFTS:
                raise KmdxError(f"{shifts} shifts: expected 2 to {MAX_SHIFTS}")


@dataclass(frozen=True)
class Variant:
    """A plan to measure."""

    name: str
    kind: str
    """What it changes: ``overlap``, ``shifts``, ``tta`` or ``members``; empty for the published plan."""
    plan: Plan


def variants(plan: Plan, changes: Changes) -> list[Variant]:
    """The published plan, and one plan for each change that makes a difference."""
    found: dict[str, Variant] = {}
    for variant in (Variant(PUBLISHED, "", plan), *_changed(plan, changes)):
        found.setdefault(variant.plan.checksum(variant.plan.stems), variant)
    return [*found.values()]


def with_overlap(plan: Plan, overlap: float) -> Plan:
    """The plan with another overlap of its segments; chunks that are trimmed and joined stay as they are.

    Raises :class:`KmdxError` if a segment is too short for it.
    """
    networks = {
        name: replace(use, chunking=_overlapping(use.chunking, overlap))
        for name, use in plan.networks.items()
    }
    return replace(plan, networks=networks)


def without(plan: Plan, runs: frozenset[str]) -> Plan | None:
    """The plan without some runs of its networks; ``None`` if a stem cannot be estimated without them.

    Signals that need them are removed as well. The weights of a stem's remaining signals are scaled to the
    same sum; a stem without any is the mean of the estimates by other networks.
    """
    flat = flatten(plan, all_estimates=True).plan
    weights = {}
    for stem in plan.stems:
        terms = flat.nodes[stem].terms
        kept = [number for number, signal in enumerate(terms) if runs.isdisjoint(flat.runs([signal]))]
        if not kept:
            return None
        names, published = [*terms], np.array([*terms.values()])
        shares = share(published, np.array(kept)).tolist()
        weights[stem] = {names[number]: weight for number, weight in zip(kept, shares, strict=True)}
    return pruned(reweighted(flat, weights), plan.stems)


def _changed(plan: Plan, changes: Changes) -> Iterator[Variant]:
    for overlap in changes.overlaps:
        yield Variant(f"overlap {overlap:g}", "overlap", with_overlap(plan, overlap))
    for shifts in changes.shifts:
        yield Variant(f"{shifts} shifts", "shifts", plan.augmented(shifts=shifts))
    if changes.tta:
        yield Variant("tta", "tta", plan.augmented(tta=True))
    for name, left_out in _members(plan).items() if changes.members else ():
        changed = without(plan, left_out)
        if changed is not None:
            yield Variant(f"without {name}", "members", changed)


def _members(plan: Plan) -> dict[str, frozenset[str]]:
    """The runs of each network, and each run of a network that has several."""
    runs = plan.runs(plan.stems)
    networks = {
        name: frozenset(run for run, network in runs.items() if network == name)
        for name in dict.fromkeys(runs.values())
    }
    single = {run: frozenset([run]) for run, network in runs.items() if len(networks[network]) > 1}
    return networks | single


def _overlapping(window: Window, overlap: float) -> Window:
    if isinstance(window, OverlapAdd):
        changed = replace(window, overlap=overlap)
        if changed.stride < 1:
            raise KmdxError(
                f"an overlap of {overlap:g} of {window.segment:g} s leaves no stride; overlap less"
            )
        return changed
    if isinstance(window, FadeAndAdd):  # chunks that do not overlap would not fade
        return replace(window, overlap=max(2, round(1 / (1 - overlap))))
    return window
