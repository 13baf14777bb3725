"""The ways in which a signal of any length passes through a network that accepts a few seconds.

Each way is one class: how it is read from a plan, what it costs, and how it runs. Plans can use every class
that is defined, by its ``key``. Nothing here needs torch until it runs; :mod:`kmdx.chunking` has the code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from kmdx.documents import Number
from kmdx.networks.architecture import MAX_LENGTH
from kmdx.weights import Weight

if TYPE_CHECKING:
    from kmdx.device import Runner
    from kmdx.signals import Signal

WINDOWS: dict[str, type[Window]] = {}
"""Every way, by its key in a plan."""


class Window(ABC):
    """A way for a signal to pass through a network.

    Attributes
    ----------
    key : str
        What a plan calls it.
    length : int
        Samples that the network takes as input at once.
    segment : float or None
        Seconds of a window, for a network whose length can be chosen.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    key: ClassVar[str]
    read: ClassVar[Callable[..., Window]]
    """Makes one of a weight, the plan's sample rate and its entries, which are keyword arguments."""
    length: int
    segment: float | None = None

    def __init_subclass__(cls) -> None:
        WINDOWS[cls.key] = cls

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The entry of a plan from which ``read`` makes the same."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Samples between the starts of two windows."""

    @abstractmethod
    def windows(self, samples: int) -> int:
        """How many windows a signal of that many samples takes."""

    @abstractmethod
    def run(
        self, runner: Runner, signal: Signal, estimates: Sequence[Signal], advance: Callable[[], None]
    ) -> None:
        """Fill ``estimates``, ``(2, samples)`` per source, from ``signal``; call ``advance`` per window."""

    def capped(self, overlap: float) -> Window:
        """The same with at most this share of overlap, if overlap can be chosen."""
        return self

    def per_second(self, rate: int) -> float:
        """Windows per second of audio."""
        return rate / self.stride

    @property
    def load(self) -> float:
        """Seconds of signal that the network processes per second of a long song."""
        return self.length / self.stride


@dataclass(frozen=True)
class OverlapAdd(Window):
    """Overlapping segments, summed under a triangular window as in Demucs.

    Attributes
    ----------
    overlap : float
        Share of a segment that the next one repeats, in [0, 1).
    segment : float
        Seconds of one segment.
    length : int
        Samples of one segment.
    """

    key: ClassVar[str] = "overlap_add"
    overlap: float
    segment: float = field()
    length: int = field()

    @classmethod
    def read(
        cls,
        weight: Weight,
        rate: int,
        overlap: Annotated[float, Number(0, 1)],
        segment: Annotated[float, Number(0, 3600)] | None = None,
    ) -> OverlapAdd:
        """From the share of overlap, and the segment where the network has none of its own."""
        fixed = _fixed_length(weight)
        own = weight.architecture.get("segment")
        if segment is None and fixed is not None:
            segment = fixed / rate
        elif segment is None and own is not None:
            segment = float(own)
        if segment is None:
            raise ValueError("the key 'segment' is missing, and the network has none of its own")
        if fixed is not None and abs(segment * rate - fixed) >= 1:
            raise ValueError(f"{weight.name} takes {fixed} samples at once; leave 'segment' out")
        made = cls(overlap, segment, int(segment * rate) if fixed is None else fixed)
        if made.length < 2 or made.stride < 1:
            raise ValueError(f"an overlap of {overlap:g} of {segment:g} s leaves no stride")
        return made

    def settings(self) -> dict[str, Any]:
        """Segment and overlap."""
        return {"segment": self.segment, "overlap": self.overlap}

    @property
    def stride(self) -> int:
        """Samples between the starts of two segments, in the float arithmetic of the published run."""
        return int((1 - self.overlap) * self.length)

    def windows(self, samples: int) -> int:
        """How many segments a signal of that many samples takes."""
        return math.ceil(samples / self.stride)

    def capped(self, overlap: float) -> OverlapAdd:
        """The same with at most this share of overlap."""
        return self if self.overlap <= overlap else replace(self, overlap=overlap)

    def run(
        self, runner: Runner, signal: Signal, estimates: Sequence[Signal], advance: Callable[[], None]
    ) -> None:
        """See :func:`kmdx.chunking.overlap_add`."""
        from kmdx import chunking

        chunking.overlap_add(runner, signal, estimates, self.length, self.stride, advance)

    def __str__(self) -> str:
        return f"segments of {self.segment:g} s, overlap {self.overlap:g}"


@dataclass(frozen=True)
class TrimAndJoin(Window):
    """Chunks that are trimmed at both ends and joined, as in MDX-Net.

    Attributes
    ----------
    chunk : int
        Samples of one chunk.
    trim : int
        Samples dropped at both ends.
    """

    key: ClassVar[str] = "trim_and_join"
    chunk: int
    trim: int

    @classmethod
    def read(
        cls,
        weight: Weight,
        rate: int,
        chunk: Annotated[int, Number(1, MAX_LENGTH + 1)],
        trim: Annotated[int, Number(0, MAX_LENGTH)],
    ) -> TrimAndJoin:
        """From the samples of a chunk and of a trim."""
        if 2 * trim >= chunk:
            raise ValueError(f"two trims of {trim} leave nothing of {chunk} samples")
        fixed = _fixed_length(weight)
        if fixed is not None and chunk != fixed:
            raise ValueError(f"{weight.name} takes {fixed} samples at once, not {chunk}")
        return cls(chunk, trim)

    def settings(self) -> dict[str, Any]:
        """Chunk and trim."""
        return {"chunk": self.chunk, "trim": self.trim}

    @property
    def length(self) -> int:  # type: ignore[override]
        """Samples that the network takes as input at once."""
        return self.chunk

    @property
    def stride(self) -> int:
        """Samples of a chunk that reach the result."""
        return self.chunk - 2 * self.trim

    def windows(self, samples: int) -> int:
        """How many chunks a signal of that many samples takes; one more when they divide evenly."""
        return samples // self.stride + 1

    def run(
        self, runner: Runner, signal: Signal, estimates: Sequence[Signal], advance: Callable[[], None]
    ) -> None:
        """See :func:`kmdx.chunking.trim_and_join`."""
        from kmdx import chunking

        chunking.trim_and_join(runner, signal, estimates, self.chunk, self.trim, advance)

    def __str__(self) -> str:
        return f"chunks of {self.chunk} samples, trim {self.trim}"


def _fixed_length(weight: Weight) -> int | None:
    """Samples of the only window that a network between spectrograms of fixed size accepts."""
    sizes = weight.architecture
    return sizes["hop"] * (sizes["frames"] - 1) if "frames" in sizes else None
