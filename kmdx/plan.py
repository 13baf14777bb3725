"""An ensemble as data: which network has which input, what is subtracted and what is blended.

Networks have weights and a window (:mod:`kmdx.windows`). Nodes (:mod:`kmdx.nodes`) form a graph that begins
at the mixture; some of its sums are the stems. :mod:`kmdx.plan_file` reads one from YAML. Nothing here needs
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from kmdx.challenge import ACCOMPANIMENT, MIXTURE
from kmdx.errors import PlanError, listed, quoted, suggest
from kmdx.nodes import Node
from kmdx.weights import Weight
from kmdx.windows import Window


@dataclass(frozen=True)
class NetworkUse:
    """A network of the plan: its weights and how signals go through it."""

    weight: Weight
    chunking: Window

    @property
    def sources(self) -> tuple[str, ...]:
        """What the network can estimate."""
        return tuple(self.weight.architecture["sources"])

    @property
    def gflops(self) -> float | None:
        """Arithmetic in GFLOP per second of audio, where the weights' entry states it."""
        per_second = self.weight.architecture.get("gflops")
        return None if per_second is None else per_second * self.chunking.load


def node_of(reference: str) -> str:
    """Return the node that gives a signal: ``V`` for ``V.vocals``."""
    return reference.partition(".")[0]


@dataclass(frozen=True)
class Plan:
    """A checked ensemble.

    Attributes
    ----------
    name : str
        The file's name without its ending.
    title, description : str
        For people.
    sample_rate : int
        Rate in Hz that all its networks work at.
    networks : mapping of str to NetworkUse
    nodes : mapping of str to Node
        Signals and stems by name; a stem is a :class:`Sum`.
    stems : tuple of str
        Names of the nodes that are its result, in the file's order.
    digest : str
        sha256 of the file's text, which tells two plans apart.
    """

    name: str
    title: str
    description: str
    sample_rate: int
    networks: Mapping[str, NetworkUse]
    nodes: Mapping[str, Node]
    stems: tuple[str, ...]
    digest: str = field(repr=False)

    def order(self, wanted: Iterable[str], known: Collection[str] = ()) -> list[str]:
        """Names of the nodes that ``wanted`` need, each after those that it needs itself.

        Everything else is pruned, also what only ``known`` signals need. Both are references: stems,
        signals or ``NODE.SOURCE``.
        """
        ordered: dict[str, None] = {}
        for reference in wanted:
            pending = [(reference, False)]  # the last one next, and whether all that it needs is in order
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
        """References to all signals that are at hand, or made, on the way to ``wanted``; these included."""
        order = self.order(wanted, known)
        return {*wanted, *(reference for name in order for reference in self.nodes[name].inputs)}

    def sources_used(
        self, wanted: Collection[str], known: Collection[str] = ()
    ) -> dict[str, tuple[str, ...]]:
        """For each node with a network that ``wanted`` need, the sources that anything uses, in order."""
        references = self.needed(wanted, known).difference(known)
        used = {}
        for name in self.order(wanted, known):
            network = self.nodes[name].network
            if network is not None:
                sources = self.networks[network].sources
                used[name] = tuple(source for source in sources if f"{name}.{source}" in references)
        return used

    def networks_used(self, wanted: Iterable[str], known: Collection[str] = ()) -> list[str]:
        """Names of the networks that ``wanted`` need, in the order in which they run first."""
        return list(dict.fromkeys(self.runs(wanted, known).values()))

    def runs(self, wanted: Iterable[str], known: Collection[str] = ()) -> dict[str, str]:
        """For each node with a network that ``wanted`` need, that network, in the order in which they run."""
        networks = {name: self.nodes[name].network for name in self.order(wanted, known)}
        return {name: network for name, network in networks.items() if network is not None}

    def stage(self, reference: str) -> int:
        """How many networks lie one behind the other on the longest way to a signal; the mixture is 0."""
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
        """How many signals are held at once, at the most, on the way to ``wanted``; these included."""
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
        """How many windows all networks together take for a second of audio."""
        runs = self.runs(wanted).values()
        return sum(self.networks[network].chunking.per_second(self.sample_rate) for network in runs)

    def load(self, wanted: Iterable[str]) -> float:
        """Seconds of signal that all networks together work through for each second of a long song."""
        return sum(self.networks[network].chunking.load for network in self.runs(wanted).values())

    def gflops(self, wanted: Iterable[str]) -> float | None:
        """Arithmetic of ``wanted`` in GFLOP per second of audio; ``None`` where a network states none."""
        costs = [self.networks[network].gflops for network in self.runs(wanted).values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def checksum(self, wanted: Collection[str]) -> str:
        """Checksum of all that ``wanted`` depend on in the plan, apart from the content of weight files."""
        order = self.order(wanted)
        uses = {name: self.networks[name] for name in self.networks_used(wanted)}
        parts = {
            "sample_rate": self.sample_rate,
            "nodes": [(name, self.nodes[name].kind, asdict(self.nodes[name])) for name in order],
            "networks": {
                name: (use.weight.architecture, type(use.chunking).__name__, asdict(use.chunking))
                for name, use in uses.items()
            },
        }
        return hashlib.sha256(json.dumps(parts, default=dict).encode()).hexdigest()

    def capped(self, overlap: float) -> Plan:
        """Return the same plan with no network's segments overlapping more than this share of them."""
        networks = {
            name: replace(use, chunking=use.chunking.capped(overlap)) for name, use in self.networks.items()
        }
        return replace(self, networks=networks)

    def check_stems(
        self, stems: Iterable[str] | None, allowed: Collection[str] | None = None
    ) -> tuple[str, ...]:
        """Return the stems asked for, all of the plan's for ``None``, each once.

        Raises
        ------
        PlanError
            If one is not in ``allowed``: by default the plan's stems and, where there are vocals, the
            accompaniment.
        """
        if stems is None:
            return self.stems
        if allowed is None:
            allowed = (*self.stems, ACCOMPANIMENT) if "vocals" in self.stems else self.stems
        names = tuple(dict.fromkeys((stems,) if isinstance(stems, str) else stems))
        for name in names:
            if name not in allowed:
                hint = suggest(str(name), allowed)
                raise PlanError(f"unknown stem {quoted(name)}{hint}; available: {listed(allowed)}")
        if not names:
            raise PlanError(f"no stem selected; available: {listed(allowed)}")
        return names

    def signals_of(self, stems: Iterable[str]) -> tuple[str, ...]:
        """Return the signals that stems are made of: the accompaniment is made of the vocals."""
        return tuple(dict.fromkeys("vocals" if stem == ACCOMPANIMENT else stem for stem in stems))

    def check_wanted(self, wanted: Iterable[str]) -> None:
        """Raise :class:`PlanError` if one of ``wanted`` is no signal of this plan."""
        known = dict.fromkeys([MIXTURE, *self._references()])
        for reference in wanted:
            if reference not in known:
                raise PlanError(f"{self.name}: no signal {quoted(reference)}{suggest(reference, known)}")

    def check_known(self, known: Iterable[str]) -> None:
        """Raise :class:`PlanError` if one of ``known`` is no signal, or one that must be made anew.

        Those are normalized signals: with them goes the level that other sums are brought back to.
        """
        known = list(known)
        self.check_wanted(known)
        for reference in known:
            if reference == MIXTURE or not self.nodes[node_of(reference)].can_be_given:
                raise PlanError(f"{self.name}: {quoted(reference)} cannot be given, only sums and estimates")

    def _references(self) -> Iterator[str]:
        for name, node in self.nodes.items():
            yield from node.outputs(name, self.networks)
