"""An ensemble as data: networks, their inputs, and the sums that make residuals, blends and stems.

Each network has weights and a window (:mod:`kmdx.windows`). Nodes (:mod:`kmdx.nodes`) form a graph that
starts at the mixture; some of its sums are the stems. :mod:`kmdx.plan_file` reads plans from YAML. This
module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from kmdx.challenge import ACCOMPANIMENT, MIXTURE, WITHOUT, WITHOUT_VOCALS
from kmdx.errors import PlanError, listed, quoted, suggest
from kmdx.nodes import Node
from kmdx.weights import Weight
from kmdx.windows import Window

MAX_SHIFTS = 100


@dataclass(frozen=True)
class NetworkUse:
    """A network of the plan: its weights, and how signals pass through it."""

    weight: Weight
    chunking: Window
    shifts: int = 1
    """Passes, each with the song rotated by another fraction of its length; the estimates are averaged."""
    tta: bool = False  # test-time augmentation: also passes with swapped channels and with inverted polarity

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that the network can estimate."""
        return tuple(self.weight.architecture["sources"])

    @property
    def gflops(self) -> float | None:
        """Arithmetic in GFLOP per second of audio; None if the weights' entry does not state it."""
        per_second = self.weight.architecture.get("gflops")
        return None if per_second is None else per_second * self.load

    @property
    def passes(self) -> int:
        """The number of times that the network processes the song."""
        return self.shifts * (3 if self.tta else 1)

    @property
    def load(self) -> float:
        """Seconds of signal that the network processes per second of a long song."""
        return self.passes * self.chunking.load

    def windows(self, samples: int) -> int:
        """The number of windows of a signal in all passes."""
        return self.passes * self.chunking.windows(samples)

    def windows_per_second(self, rate: int) -> float:
        """Windows per second of audio in all passes."""
        return self.passes * self.chunking.per_second(rate)

    def settings(self) -> dict[str, Any]:
        """The entries of a plan from which the same use is made, without its weights."""
        shifts = {"shifts": self.shifts} if self.shifts > 1 else {}
        return {self.chunking.key: self.chunking.settings(), **shifts, **({"tta": True} if self.tta else {})}

    def how(self) -> str:
        """How signals pass through the network, as text."""
        shifts = f", {self.shifts} shifts" if self.shifts > 1 else ""
        return f"{self.chunking}{shifts}{', test-time augmentation' if self.tta else ''}"


def node_of(reference: str) -> str:
    """Return the node that produces a signal: ``V`` for ``V.vocals``."""
    return reference.partition(".")[0]


@dataclass(frozen=True)
class Plan:
    """A checked ensemble."""

    name: str  # the file's name without its extension
    title: str
    description: str
    """``title`` and ``description``: text for users."""
    sample_rate: int  # sample rate of all its networks, in Hz
    networks: Mapping[str, NetworkUse]
    nodes: Mapping[str, Node]
    """Signals and stems by name; a stem is a :class:`Sum`."""
    stems: tuple[str, ...]  # names of the nodes that are its result, in the file's order
    digest: str = field(repr=False)  # SHA-256 of the file's text
    score: str = ""  # its published score, and on which songs; empty if it was not measured

    def __repr__(self) -> str:
        return f"<Plan {self.name}: {', '.join(self.stems)}>"

    def order(self, wanted: Iterable[str], known: Collection[str] = ()) -> list[str]:
        """Names of the nodes that ``wanted`` need, each after its own inputs.

        All other nodes are pruned, including those that only ``known`` signals need. Both arguments are
        references: stems, signals or ``NODE.SOURCE``.
        """
        ordered: dict[str, None] = {}
        for reference in wanted:
            pending = [(reference, False)]  # a stack; True when all inputs of the reference are ordered
            while pending:
                reference, is_ready = pending.pop()
                name = node_of(reference)
                if is_ready:
                    ordered[name] = None
                elif name != MIXTURE and reference not in known and name not in ordered:
                    pending.append((reference, True))
                    pending += ((needed, False) for needed in reversed(self.nodes[name].inputs))
        return list(ordered)

    def needed(self, wanted: Collection[str], known: Collection[str] = ()) -> set[str]:
        """References to all signals that ``wanted`` need, directly or indirectly, and to ``wanted``."""
        order = self.order(wanted, known)
        return {*wanted, *(reference for name in order for reference in self.nodes[name].inputs)}

    def sources_used(
        self, wanted: Collection[str], known: Collection[str] = ()
    ) -> dict[str, tuple[str, ...]]:
        """For each network node that ``wanted`` need, the sources that are used, in the network's order."""
        references = self.needed(wanted, known).difference(known)
        used = {}
        for name in self.order(wanted, known):
            network = self.nodes[name].network
            if network is not None:
                sources = self.networks[network].sources
                used[name] = tuple(source for source in sources if f"{name}.{source}" in references)
        return used

    def networks_used(self, wanted: Iterable[str], known: Collection[str] = ()) -> list[str]:
        """Names of the networks that ``wanted`` need, in the order of their first runs."""
        return list(dict.fromkeys(self.runs(wanted, known).values()))

    def uses(self, stems: Iterable[str]) -> dict[str, NetworkUse]:
        """The networks that stems need, by name, in the order of their first runs."""
        return {name: self.networks[name] for name in self.networks_used(self.signals_of(stems))}

    def runs(self, wanted: Iterable[str], known: Collection[str] = ()) -> dict[str, str]:
        """The network of each network node that ``wanted`` need, in the order in which they run."""
        networks = {name: self.nodes[name].network for name in self.order(wanted, known)}
        return {name: network for name, network in networks.items() if network is not None}

    def stage(self, reference: str) -> int:
        """The number of networks on the longest path from the mixture to a signal; 0 for the mixture."""
        return self._stages[node_of(reference)]

    @cached_property
    def _stages(self) -> dict[str, int]:
        stages = {MIXTURE: 0}
        for name in self.order(self.nodes):
            node = self.nodes[name]
            below = max((stages[node_of(reference)] for reference in node.inputs), default=0)
            stages[name] = below + (node.network is not None)
        return stages

    def held(self, wanted: Collection[str]) -> int:
        """The largest number of signals in memory at once while ``wanted`` are computed, including them."""
        order = self.order(wanted)
        last = {reference: name for name in order for reference in self.nodes[name].inputs}
        used = self.sources_used(wanted)
        ends = Counter(last[reference] for reference in last if reference not in wanted)
        most = count = 1
        for name in order:
            count += len(used[name]) if name in used else 1
            most = max(most, count)
            count -= ends[name]
        return most

    def windows_per_second(self, wanted: Iterable[str]) -> float:
        """The number of windows that all networks together process per second of audio."""
        runs = self.runs(wanted).values()
        return sum(self.networks[network].windows_per_second(self.sample_rate) for network in runs)

    def load(self, wanted: Iterable[str]) -> float:
        """Seconds of signal that all networks together process per second of a long song."""
        return sum(self.networks[network].load for network in self.runs(wanted).values())

    def gflops(self, wanted: Iterable[str]) -> float | None:
        """Arithmetic for ``wanted`` in GFLOP per second of audio; ``None`` if it is unknown for a network."""
        costs = [self.networks[network].gflops for network in self.runs(wanted).values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def checksum(self, wanted: Collection[str]) -> str:
        """Checksum of the parts of the plan that ``wanted`` depend on, but not of the weight files."""
        order = self.order(wanted)
        uses = self.uses(wanted)
        parts = {
            "sample_rate": self.sample_rate,
            "nodes": [(name, self.nodes[name].kind, asdict(self.nodes[name])) for name in order],
            "networks": {
                name: (
                    use.weight.architecture,
                    type(use.chunking).__name__,
                    asdict(use.chunking),
                    *([use.shifts, use.tta] if use.passes > 1 else []),
                )
                for name, use in uses.items()
            },
        }
        return hashlib.sha256(json.dumps(parts, default=dict).encode()).hexdigest()

    def capped(self, overlap: float) -> Plan:
        """Return the plan with the overlap of all segments limited to this fraction of their length."""
        networks = {
            name: replace(use, chunking=use.chunking.capped(overlap)) for name, use in self.networks.items()
        }
        return replace(self, networks=networks)

    def augmented(self, shifts: int = 1, tta: bool = False) -> Plan:
        """Return the plan with more passes through each network, whose estimates are averaged.

        See :class:`NetworkUse`. What the plan states itself is kept if it is more. Raises :class:`PlanError`
        if ``shifts`` is not from 1 to :data:`MAX_SHIFTS`.
        """
        if not 1 <= shifts <= MAX_SHIFTS:
            raise PlanError(f"expected 1 to {MAX_SHIFTS} shifts, found {shifts}")
        networks = {
            name: replace(use, shifts=max(use.shifts, shifts), tta=use.tta or tta)
            for name, use in self.networks.items()
        }
        return replace(self, networks=networks)

    def check_stems(
        self, stems: Iterable[str] | None, allowed: Collection[str] | None = None
    ) -> tuple[str, ...]:
        """Return the requested stems without duplicates; all of the plan's stems for ``None``.

        Raises :class:`PlanError` if a stem is not in ``allowed``, by default the plan's stems and the mixture
        minus one of them.
        """
        if stems is None:
            return self.stems
        names = tuple(dict.fromkeys((stems,) if isinstance(stems, str) else stems))
        if allowed is None:
            allowed = (*self.stems, ACCOMPANIMENT) if "vocals" in self.stems else self.stems
            known = [*allowed, *(f"{WITHOUT}{stem}" for stem in self.stems), *WITHOUT_VOCALS]
            unknown = [name for name in names if name not in self.stems and self.subtracted(name) is None]
        else:
            known, unknown = [*allowed], [name for name in names if name not in allowed]
        for name in unknown:
            hint = suggest(str(name), known)
            raise PlanError(f"unknown stem {quoted(name)}{hint}; available: {listed(allowed)}")
        if not names:
            raise PlanError(f"no stem selected; available: {listed(allowed)}")
        return names

    def subtracted(self, name: str) -> str | None:
        """The stem that the mixture minus it has this name, such as ``no_drums``; None for other names."""
        if name in self.stems or not isinstance(name, str):
            return None
        stem = "vocals" if name in WITHOUT_VOCALS else name.removeprefix(WITHOUT)
        return stem if stem != name and stem in self.stems else None

    def signals_of(self, stems: Iterable[str]) -> tuple[str, ...]:
        """Return the signals that stems are computed from, such as the vocals for the accompaniment."""
        return tuple(dict.fromkeys(self.subtracted(stem) or stem for stem in stems))

    def check_wanted(self, wanted: Iterable[str]) -> None:
        """Raise :class:`PlanError` if one of ``wanted`` is not a signal of this plan."""
        known = dict.fromkeys([MIXTURE, *self._references()])
        for reference in wanted:
            if reference not in known:
                raise PlanError(
                    f"{self.name}: unknown signal {quoted(reference)}{suggest(reference, known)}; expected "
                    "a name of this plan, or NODE.SOURCE"
                )

    def check_known(self, known: Iterable[str]) -> None:
        """Raise :class:`PlanError` if one of ``known`` is not a signal, or cannot be passed in.

        The mixture and normalized signals cannot be passed in: sums also need a normalized signal's level.
        """
        known = list(known)
        self.check_wanted(known)
        for reference in known:
            if reference == MIXTURE or not self.nodes[node_of(reference)].can_be_given:
                raise PlanError(
                    f"{self.name}: {quoted(reference)} cannot be passed in; expected a sum or an estimate"
                )

    def _references(self) -> Iterator[str]:
        for name, node in self.nodes.items():
            yield from node.outputs(name, self.networks)
