"""Ways to pass a signal of any length through a network that accepts only a few seconds.

Each way is one class: how to read it from a plan, its cost, and how to run it. Plans can use every class
defined here by its ``key``. torch is imported only when one runs; the algorithms are in :mod:`kmdx.chunking`.
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
    from kmdx.devices import Runner
    from kmdx.signals import Signal

MAX_OVERLAP = 101  # chunks that process each sample

WINDOWS: dict[str, type[Window]] = {}
"""All classes by their key in a plan."""


class Window(ABC):
    """A way to pass a signal through a network."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    key: ClassVar[str]  # its name in plans
    read: ClassVar[Callable[..., Window]]
    """Makes one from a weight, the plan's sample rate, and its keys in a plan as keyword arguments."""
    length: int  # samples of one window, the network's input
    segment: float | None = None
    """Seconds of a window, for a network that accepts windows of different lengths."""

    def __init_subclass__(cls) -> None:
        WINDOWS[cls.key] = cls

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The plan entry from which ``read`` makes the same window."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Samples between the starts of two windows."""

    @abstractmethod
    def windows(self, samples: int) -> int:
        """The number of windows of a signal."""

    @abstractmethod
    def run(
        self, runner: Runner, signal: Signal, estimates: Sequence[Signal], advance: Callable[[], None]
    ) -> None:
        """Fill ``estimates``, ``(2, samples)`` per source; call ``advance`` after each window."""

    def capped(self, overlap: float) -> Window:
        """A copy with at most this overlap, if the overlap can be chosen."""
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
    """Overlapping segments, added with triangular weights as in Demucs."""

    key: ClassVar[str] = "overlap_add"
    overlap: float  # fraction of a segment that the next one repeats, in [0, 1)
    segment: float = field()  # seconds of one segment
    length: int = field()  # samples of one segment

    @classmethod
    def read(
        cls,
        weight: Weight,
        rate: int,
        overlap: Annotated[float, Number(0, 1)],
        segment: Annotated[float, Number(0, 3600)] | None = None,
    ) -> OverlapAdd:
        """Make one from the overlap, and from the segment if the network does not define its own."""
        fixed = _fixed_length(weight)
        own = weight.architecture.get("segment")
        if segment is None and fixed is not None:
            segment = fixed / rate
        elif segment is None and own is not None:
            segment = float(own)
        if segment is None:
            raise ValueError("the key 'segment' is missing, and the network does not define a segment")
        if fixed is not None and abs(segment * rate - fixed) >= 1:
            raise ValueError(f"{weight.name} accepts only windows of {fixed} samples; leave 'segment' out")
        made = cls(overlap, segment, int(segment * rate) if fixed is None else fixed)
        if made.length < 2 or made.stride < 1:
            raise ValueError(f"an overlap of {overlap:g} of {segment:g} s leaves no stride; overlap less")
        return made

    def settings(self) -> dict[str, Any]:
        """The segment and the overlap."""
        return {"segment": self.segment, "overlap": self.overlap}

    @property
    def stride(self) -> int:
        """Samples between the starts of two segments, rounded as in the published run."""
        return int((1 - self.overlap) * self.length)

    def windows(self, samples: int) -> int:
        """The number of segments of a signal."""
        return math.ceil(samples / self.stride)

    def capped(self, overlap: float) -> OverlapAdd:
        """A copy with at most this overlap."""
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
    """Chunks that are trimmed at both ends and joined, as in MDX-Net."""

    key: ClassVar[str] = "trim_and_join"
    chunk: int  # samples of one chunk
    trim: int  # samples dropped at both ends

    @classmethod
    def read(
        cls,
        weight: Weight,
        rate: int,
        chunk: Annotated[int, Number(1, MAX_LENGTH + 1)],
        trim: Annotated[int, Number(0, MAX_LENGTH)],
    ) -> TrimAndJoin:
        """Make one from the samples of a chunk and a trim."""
        if 2 * trim >= chunk:
            raise ValueError(f"two trims of {trim} samples leave nothing of a chunk of {chunk}")
        _check_chunk(weight, chunk)
        return cls(chunk, trim)

    def settings(self) -> dict[str, Any]:
        """The chunk and the trim."""
        return {"chunk": self.chunk, "trim": self.trim}

    @property
    def length(self) -> int:  # type: ignore[override]
        """Samples of one window, the network's input."""
        return self.chunk

    @property
    def stride(self) -> int:
        """Samples of a chunk that become part of the result."""
        return self.chunk - 2 * self.trim

    def windows(self, samples: int) -> int:
        """The number of chunks of a signal; one more than needed if they divide it evenly."""
        return samples // self.stride + 1

    def run(
        self, runner: Runner, signal: Signal, estimates: Sequence[Signal], advance: Callable[[], None]
    ) -> None:
        """See :func:`kmdx.chunking.trim_and_join`."""
        from kmdx import chunking

        chunking.trim_and_join(runner, signal, estimates, self.chunk, self.trim, advance)

    def __str__(self) -> str:
        return f"chunks of {self.chunk} samples, trim {self.trim}"


@dataclass(frozen=True)
class FadeAndAdd(Window):
    """Overlapping chunks with short linear fades, added; the song is reflected at both ends."""

    key: ClassVar[str] = "fade_and_add"
    chunk: int  # samples of one chunk
    overlap: int  # number of chunks that process each sample

    @classmethod
    def read(
        cls,
        weight: Weight,
        rate: int,
        chunk: Annotated[int, Number(1, MAX_LENGTH + 1)],
        overlap: Annotated[int, Number(1, MAX_OVERLAP)],
    ) -> FadeAndAdd:
        """Make one from the samples of a chunk and the number of chunks that process each sample."""
        if overlap > chunk:
            raise ValueError(f"a chunk of {chunk} samples is too short for an overlap of {overlap}")
        _check_chunk(weight, chunk)
        return cls(chunk, overlap)

    def settings(self) -> dict[str, Any]:
        """The chunk and the overlap."""
        return {"chunk": self.chunk, "overlap": self.overlap}

    @property
    def length(self) -> int:  # type: ignore[override]
        """Samples of one window, the network's input."""
        return self.chunk

    @property
    def stride(self) -> int:
        """Samples between the starts of two chunks."""
        return self.chunk // self.overlap

    def border(self, samples: int) -> int:
        """Samples by which both ends of a signal are extended; none for a signal of at most two borders."""
        border = self.chunk - self.stride
        return border if samples > 2 * border else 0

    def windows(self, samples: int) -> int:
        """The number of chunks of a signal."""
        return math.ceil((samples + 2 * self.border(samples)) / self.stride)

    def capped(self, overlap: float) -> FadeAndAdd:
        """A copy with at most this overlap as a fraction of a chunk, but at least 2: chunks still fade."""
        fewest = max(2, math.floor(1 / (1 - overlap))) if overlap < 1 else self.overlap
        return self if self.overlap <= fewest else replace(self, overlap=fewest)

    def run(
        self, runner: Runner, signal: Signal, estimates: Sequence[Signal], advance: Callable[[], None]
    ) -> None:
        """See :func:`kmdx.chunking.fade_and_add`."""
        from kmdx import chunking

        border = self.border(signal.length)
        chunking.fade_and_add(runner, signal, estimates, self.chunk, self.stride, border, advance)

    def __str__(self) -> str:
        return f"chunks of {self.chunk} samples, overlap {self.overlap}"


def _check_chunk(weight: Weight, chunk: int) -> None:
    """Raise ValueError if a network accepts only chunks of another length."""
    fixed = _fixed_length(weight)
    if fixed is not None and chunk != fixed:
        raise ValueError(f"{weight.name} accepts only chunks of {fixed} samples, not {chunk}")


def _fixed_length(weight: Weight) -> int | None:
    """The only window length, in samples, of a network that maps spectrograms of fixed size; else None."""
    sizes = weight.architecture
    return sizes["hop"] * (sizes["frames"] - 1) if "frames" in sizes else None
