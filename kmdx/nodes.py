"""The kinds of nodes of a plan. Each is one class: its inputs, its formula, and how it is read and runs.

Plans can use every class that is defined, by the keys in its ``forms``. A reference names a signal: ``NODE``,
or ``NODE.SOURCE`` for an estimate of a network. Nothing here needs torch until a node runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kmdx.errors import quoted, suggest

if TYPE_CHECKING:
    import yaml
    from torch import Tensor

    from kmdx.ensemble import SongSignals
    from kmdx.plan import NetworkUse
    from kmdx.plan_file import PlanReader
    from kmdx.signals import Signal

MAX_WEIGHT = 1e6  # of a signal in a sum

KINDS: list[type[Node]] = []
"""Every kind of node, in the order of definition."""


class Node(ABC):
    """A node of a plan.

    Attributes
    ----------
    forms : tuple of tuple of str
        Sets of keys that such a node has in a plan.
    kind : str
        What checksums of plans call it; never change it, or finished stems count as made by another plan.
    network : str or None
        Name of the network that runs in it.
    terms : mapping of str to float, or None
        References and weights of a weighted sum.
    can_be_given : bool
        Whether its signal may come from an earlier run.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    forms: ClassVar[tuple[tuple[str, ...], ...]]
    kind: ClassVar[str]
    can_be_given: ClassVar[bool] = True
    network: str | None = None
    terms: Mapping[str, float] | None = None

    def __init_subclass__(cls) -> None:
        KINDS.append(cls)

    @classmethod
    @abstractmethod
    def read(
        cls,
        reader: PlanReader,
        entries: Mapping[str, yaml.Node],
        key: str,
        networks: Mapping[str, NetworkUse],
    ) -> Node:
        """Read one from the entries of a plan; ``key`` is its place, for messages.

        Raises
        ------
        PlanError
            If something is wrong with it.
        """

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """References to the signals it needs."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What :meth:`read` reads."""

    @abstractmethod
    def formula(self) -> str:
        """The node in words, such as ``x − 0.8·V.vocals``."""

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Node:
        """The same node with new names for some references."""

    @abstractmethod
    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Compute its signals ``(2, samples)``, by reference."""

    def outputs(self, name: str, networks: Mapping[str, NetworkUse]) -> tuple[str, ...]:
        """References to the signals it gives under a name."""
        return (name,)

    def fault(self, nodes: Mapping[str, Node]) -> tuple[str, str] | None:
        """What is wrong with it among the other nodes: a key of its own, and a message."""
        return None

    def level(self, name: str, below: set[str | None]) -> set[str | None]:
        """Normalized signals whose level it has, given those of its inputs; ``None`` is the mixture's."""
        return below


@dataclass(frozen=True)
class Estimate(Node):
    """``network`` takes ``signal`` as input; gives one signal ``NODE.SOURCE`` per source."""

    forms: ClassVar = (("network", "hears"),)
    kind: ClassVar[str] = "Hear"
    network: str = field()
    signal: str

    @classmethod
    def read(
        cls,
        reader: PlanReader,
        entries: Mapping[str, yaml.Node],
        key: str,
        networks: Mapping[str, NetworkUse],
    ) -> Estimate:
        """Read the names of the network and of its input."""
        network = reader.text(entries["network"], f"{key}.network")
        if network not in networks:
            problem = f"no network {quoted(network)}{suggest(network, networks)}"
            raise reader.fail(entries["network"], f"{key}.network", problem)
        return cls(network, reader.text(entries["hears"], f"{key}.hears"))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The network's input."""
        return (self.signal,)

    def settings(self) -> dict[str, Any]:
        """The names of the network and of its input."""
        return {"network": self.network, "hears": self.signal}

    def formula(self) -> str:
        """``network(signal)``."""
        return f"{self.network}({self.signal})"

    def renamed(self, names: Mapping[str, str]) -> Estimate:
        """With a new name for its input."""
        return Estimate(self.network, names.get(self.signal, self.signal))

    def outputs(self, name: str, networks: Mapping[str, NetworkUse]) -> tuple[str, ...]:
        """One per source of the network."""
        return tuple(f"{name}.{source}" for source in networks[self.network].sources)

    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Run the network."""
        return song.estimate(name, self.network, self.signal)


@dataclass(frozen=True)
class Sum(Node):
    """A weighted sum of signals; with ``denormalize`` then at the level that node removed."""

    forms: ClassVar = (("sum",), ("sum", "denormalize"))
    kind: ClassVar[str] = "Sum"
    terms: Mapping[str, float] = field()
    denormalize: str | None = None

    @classmethod
    def read(
        cls,
        reader: PlanReader,
        entries: Mapping[str, yaml.Node],
        key: str,
        networks: Mapping[str, NetworkUse],
    ) -> Sum:
        """Read the weights, and the normalized signal."""
        terms = {
            name: reader.number(value, f"{key}.sum.{name}", -MAX_WEIGHT, MAX_WEIGHT)
            for name, value in reader.mapping(entries["sum"], f"{key}.sum").items()
        }
        if not terms:
            raise reader.fail(entries["sum"], f"{key}.sum", "a sum needs at least one signal")
        back = entries.get("denormalize")
        return cls(terms, None if back is None else reader.text(back, f"{key}.denormalize"))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Its terms, and the normalized signal."""
        return (*self.terms, *([self.denormalize] if self.denormalize else []))

    def settings(self) -> dict[str, Any]:
        """Weights, and the normalized signal."""
        back = {} if self.denormalize is None else {"denormalize": self.denormalize}
        return {"sum": dict(self.terms), **back}

    def formula(self) -> str:
        """``x − 0.8·V.vocals − 0.2·M.vocals``."""
        parts: list[str] = []
        for reference, weight in self.terms.items():
            sign = " − " if weight < 0 else " + " if parts else ""
            factor = "" if abs(weight) == 1 else f"{abs(weight):g}·"
            parts.append(f"{sign}{factor}{reference}")
        text = "".join(parts).strip()
        if self.denormalize is None:
            return text
        return f"{text if len(parts) == 1 else f'({text})'} · std + mean"

    def renamed(self, names: Mapping[str, str]) -> Sum:
        """With new names for its terms."""
        return Sum({names.get(term, term): weight for term, weight in self.terms.items()}, self.denormalize)

    def fault(self, nodes: Mapping[str, Node]) -> tuple[str, str] | None:
        """Whether ``denormalize`` names a normalized signal."""
        if self.denormalize is None or isinstance(nodes.get(self.denormalize), Normalize):
            return None
        return "denormalize", f"{quoted(self.denormalize)} is not a normalized signal"

    def level(self, name: str, below: set[str | None]) -> set[str | None]:
        """The mixture's, where it is restored."""
        return below if self.denormalize is None else {None}

    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Add up, and restore the level."""
        first, *others = self.terms.values()
        level = None if self.denormalize is None else song.levels[self.denormalize]

        def blend(target: Tensor, *signals: Tensor) -> None:
            target.copy_(signals[0]).mul_(first)
            for weight, signal in zip(others, signals[1:], strict=True):
                target.add_(signal, alpha=weight)
            if level is not None:
                target.mul_(level.std).add_(level.mean)

        return {name: song.make(blend, [*self.terms])}


@dataclass(frozen=True)
class Normalize(Node):
    """``(signal − mean) / std``, with mean and unbiased std of its mono sum."""

    forms: ClassVar = (("normalize",),)
    kind: ClassVar[str] = "Normalize"
    can_be_given: ClassVar[bool] = False  # its level goes with it
    signal: str

    @classmethod
    def read(
        cls,
        reader: PlanReader,
        entries: Mapping[str, yaml.Node],
        key: str,
        networks: Mapping[str, NetworkUse],
    ) -> Normalize:
        """Read the name of the signal."""
        return cls(reader.text(entries["normalize"], f"{key}.normalize"))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The signal."""
        return (self.signal,)

    def settings(self) -> dict[str, Any]:
        """The name of the signal."""
        return {"normalize": self.signal}

    def formula(self) -> str:
        """``(signal − mean) / std``."""
        return f"({self.signal} − mean) / std"

    def renamed(self, names: Mapping[str, str]) -> Normalize:
        """With a new name for its signal."""
        return Normalize(names.get(self.signal, self.signal))

    def level(self, name: str, below: set[str | None]) -> set[str | None]:
        """Its own."""
        return {name, *below - {None}}

    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Measure the level, and remove it."""
        level = song.measure(name, self.signal)

        def normalize(target: Tensor, signal: Tensor) -> None:
            target.copy_(signal).sub_(level.mean)
            # A tensor on the device: CUDA multiplies by a number's reciprocal, which gives other bits.
            target.div_(signal.new_tensor(level.std))

        return {name: song.make(normalize, [self.signal])}
