"""The kinds of nodes in a plan. Each kind is one class: its inputs, its formula, how to read and run it.

Plans can use every class defined here; the arguments of its ``read`` are its keys in a plan. A reference
names a signal: ``NODE``, or ``NODE.SOURCE`` for a network's estimate. torch is imported when a node runs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from kmdx.documents import Number
from kmdx.errors import quoted, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from kmdx.ensemble import SongSignals
    from kmdx.plan import NetworkUse
    from kmdx.signals import Signal

MAX_WEIGHT = 1e6  # largest weight of a signal in a sum
MAX_COMBINED = 50  # signals combined by one node
MODES = tuple(
    f"{reduction}_{domain}" for domain in ("wave", "fft") for reduction in ("avg", "median", "min", "max")
)
"""Ways to combine estimates: by sample or by spectrogram bin; min and max compare magnitudes."""

KINDS: list[type[Node]] = []
"""All kinds of nodes, in the order of definition."""


class Node(ABC):
    """A node of a plan. Each kind is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    read: ClassVar[Callable[..., Node]]
    """Makes a node from its keys in a plan, passed as keyword arguments; may raise ValueError."""
    kind: ClassVar[str]
    """Its name in checksums of plans. Never change it, or finished stems no longer match their plan."""
    can_be_given: ClassVar[bool] = True  # whether its signal may come from an earlier run
    can_be_stem: ClassVar[bool] = False
    network: str | None = None  # name of the network that it runs
    terms: Mapping[str, float] = MappingProxyType({})  # references and weights; empty if it is not a sum
    denormalize: str | None = None  # the normalized signal whose level it restores

    def __init_subclass__(cls) -> None:
        KINDS.append(cls)

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """References to its input signals."""

    @property
    def operands(self) -> tuple[str, ...]:
        """References to the signals that it adds or combines; it estimates a source if all of them do."""
        return ()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The plan entry from which ``read`` makes the same node."""

    @abstractmethod
    def formula(self) -> str:
        """The node as text, such as ``x − 0.8·V.vocals``."""

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Node:
        """A copy of the node with new names for some references."""

    @abstractmethod
    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Compute its signals ``(2, samples)``, by reference."""

    def outputs(self, name: str, networks: Mapping[str, NetworkUse]) -> tuple[str, ...]:
        """References to its output signals if the node has this name."""
        return (name,)

    def fault(self, nodes: Mapping[str, Node]) -> tuple[str, str] | None:
        """An error in its use of other nodes: its key, and a message; None if there is none."""
        return None

    def level(self, name: str, below: set[str | None]) -> set[str | None]:
        """The normalized signals whose level it has, given those of its inputs; ``None`` is the mixture."""
        return below


@dataclass(frozen=True)
class Estimate(Node):
    """The estimates of ``network`` from ``signal``: one signal ``NODE.SOURCE`` per source."""

    kind: ClassVar[str] = "Hear"
    network: str = field()
    signal: str

    @classmethod
    def read(cls, network: str, hears: str) -> Estimate:
        """Make one from the names of the network and its input."""
        return cls(network, hears)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The network's input."""
        return (self.signal,)

    def settings(self) -> dict[str, Any]:
        """The names of the network and its input."""
        return {"network": self.network, "hears": self.signal}

    def formula(self) -> str:
        """``network(signal)``."""
        return f"{self.network}({self.signal})"

    def renamed(self, names: Mapping[str, str]) -> Estimate:
        """A copy with a new name for its input."""
        return Estimate(self.network, names.get(self.signal, self.signal))

    def outputs(self, name: str, networks: Mapping[str, NetworkUse]) -> tuple[str, ...]:
        """One reference per source of the network."""
        return tuple(f"{name}.{source}" for source in networks[self.network].sources)

    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Run the network."""
        return song.estimate(name, self.network, self.signal)


@dataclass(frozen=True)
class Sum(Node):
    """A weighted sum of signals; ``denormalize`` names a node whose removed level is restored."""

    kind: ClassVar[str] = "Sum"
    can_be_stem: ClassVar[bool] = True
    terms: Mapping[str, float] = field()
    denormalize: str | None = None

    @classmethod
    def read(
        cls, sum: dict[str, Annotated[float, Number(-MAX_WEIGHT, MAX_WEIGHT)]], denormalize: str | None = None
    ) -> Sum:
        """Make one from the weights and the name of the normalized signal."""
        if not sum:
            raise ValueError("a sum needs at least one signal")
        return cls(sum, denormalize)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Its terms, and the normalized signal."""
        return (*self.terms, *([self.denormalize] if self.denormalize else []))

    @property
    def operands(self) -> tuple[str, ...]:
        """Its terms."""
        return (*self.terms,)

    def settings(self) -> dict[str, Any]:
        """The weights and the normalized signal."""
        restored = {} if self.denormalize is None else {"denormalize": self.denormalize}
        return {"sum": dict(self.terms), **restored}

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
        """A copy with new names for its terms."""
        return Sum({names.get(term, term): weight for term, weight in self.terms.items()}, self.denormalize)

    def fault(self, nodes: Mapping[str, Node]) -> tuple[str, str] | None:
        """An error if ``denormalize`` does not name a normalized signal."""
        if self.denormalize is None or isinstance(nodes.get(self.denormalize), Normalize):
            return None
        return "denormalize", f"{quoted(self.denormalize)} is not a normalized signal"

    def level(self, name: str, below: set[str | None]) -> set[str | None]:
        """The mixture's level if it is restored, else that of its inputs."""
        return below if self.denormalize is None else {None}

    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Add the signals and restore the level."""
        import torch

        first, *others = self.terms.values()
        level = None if self.denormalize is None else song.levels[self.denormalize]

        def blend(target: Tensor, *signals: Tensor) -> None:
            torch.mul(signals[0], first, out=target)
            for weight, signal in zip(others, signals[1:], strict=True):
                target.add_(signal, alpha=weight)
            if level is not None:
                target.mul_(level.std).add_(level.mean)

        return {name: song.make(blend, [*self.terms])}


@dataclass(frozen=True)
class Normalize(Node):
    """``(signal − mean) / std``, with the mean and unbiased std of the signal's mono sum."""

    kind: ClassVar[str] = "Normalize"
    can_be_given: ClassVar[bool] = False  # other nodes also need its level
    unbiased: ClassVar[bool] = True
    signal: str

    @classmethod
    def read(cls, normalize: str) -> Normalize:
        """Make one from the name of the signal."""
        return cls(normalize)

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
        """A copy with a new name for its signal."""
        return type(self)(names.get(self.signal, self.signal))

    def level(self, name: str, below: set[str | None]) -> set[str | None]:
        """Its own level instead of the mixture's."""
        return {name, *below - {None}}

    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Measure the level and remove it."""
        import torch

        level = song.measure(name, self.signal, self.unbiased)

        def normalize(target: Tensor, signal: Tensor) -> None:
            torch.sub(signal, level.mean, out=target)
            # A tensor on the device: CUDA multiplies by a number's reciprocal, which changes the last bits.
            target.div_(signal.new_tensor(level.std))

        return {name: song.make(normalize, [self.signal])}


@dataclass(frozen=True)
class Standardize(Normalize):
    """Like :class:`Normalize`, but with the biased deviation that Music-Source-Separation-Training uses."""

    kind: ClassVar[str] = "Standardize"
    unbiased: ClassVar[bool] = False

    @classmethod
    def read(cls, standardize: str) -> Standardize:
        """Make one from the name of the signal."""
        return cls(standardize)

    def settings(self) -> dict[str, Any]:
        """The name of the signal."""
        return {"standardize": self.signal}


@dataclass(frozen=True)
class Combine(Node):
    """Several estimates combined sample by sample or bin by bin; ``mode`` is one of :data:`MODES`."""

    kind: ClassVar[str] = "Combine"
    can_be_stem: ClassVar[bool] = True
    signals: tuple[str, ...]
    mode: str

    @classmethod
    def read(cls, combine: list[str], mode: str) -> Combine:
        """Make one from the names of the signals and the mode."""
        if mode not in MODES:
            raise ValueError(
                f"unknown mode {quoted(mode)}{suggest(mode, MODES)}; available: {', '.join(MODES)}"
            )
        if not 2 <= len(combine) <= MAX_COMBINED:
            raise ValueError(f"expected 2 to {MAX_COMBINED} signals to combine, found {len(combine)}")
        return cls(tuple(combine), mode)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The signals."""
        return self.signals

    @property
    def operands(self) -> tuple[str, ...]:
        """The signals."""
        return self.signals

    def settings(self) -> dict[str, Any]:
        """The names of the signals and the mode."""
        return {"combine": [*self.signals], "mode": self.mode}

    def formula(self) -> str:
        """``max_fft(A.vocals, B.vocals)``."""
        return f"{self.mode}({', '.join(self.signals)})"

    def renamed(self, names: Mapping[str, str]) -> Combine:
        """A copy with new names for its signals."""
        return Combine(tuple(names.get(signal, signal) for signal in self.signals), self.mode)

    def run(self, name: str, song: SongSignals) -> dict[str, Signal]:
        """Combine the signals."""
        from kmdx import combining

        return {name: combining.run(self.mode, [song.signals[signal] for signal in self.signals])}


def forms() -> dict[tuple[str, ...], type[Node]]:
    """The kinds of nodes by the sets of keys that they can have in a plan: the arguments of ``read``."""
    found: dict[tuple[str, ...], type[Node]] = {}
    for kind in KINDS:
        keys = inspect.signature(kind.read).parameters
        needed = tuple(name for name, key in keys.items() if key.default is key.empty)
        found |= {needed: kind, tuple(keys): kind}
    return found
