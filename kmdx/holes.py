"""The song being decoded: its requested part, and its holes.

A hole is a stretch of missing sound: damaged packets, lost pages, or a missing end. It is detected from the
sound around it, or from the length that the file declares, and replaced with silence of the same length. A
file whose holes exceed :data:`MAX_HOLES` or :data:`MAX_SHARE` is refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kmdx.errors import listed

from . import signals
from .errors import AudioError, KmdxWarning

MAX_HOLES = 5.0  # most missing seconds of a song
ABSURD = 3600.0  # seconds: a longer hole means a damaged timestamp
MAX_SHARE = 0.02  # largest missing share of a song


@dataclass(frozen=True)
class Request:
    """The file and the part of it to read; see :func:`kmdx.audio.read`."""

    name: str
    start: float = 0.0
    duration: float | None = None
    downmix: bool = False
    stream: int = 0
    accept_holes: bool = True


class DecodedSong:
    """Collects decoded blocks: the requested part of the song, and its holes.

    Positions are in samples from the beginning of the song, not of the requested part.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.rate = 0
        self.position = 0
        self.declared = 0  # length of the song, if known
        self.shape = 0
        self.holes: list[range] = []
        self.damaged: list[int] = []  # positions of damage without missing sound
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def first(self) -> int:
        """The first sample of the requested part."""
        return round(self.request.start * self.rate)

    def end(self, rate: int | None = None) -> float:
        """The sample after the requested part; infinite without a duration."""
        rate = rate or self.rate
        if self.request.duration is None:
            return math.inf
        return round(self.request.start * rate) + round(self.request.duration * rate)

    @property
    def complete(self) -> bool:
        """Whether the requested part is completely decoded."""
        return self.position >= self.end()

    def seconds(self, position: float) -> float:
        return position / self.rate

    def add(self, block: np.ndarray) -> Iterator[np.ndarray]:
        """The requested samples of the next block."""
        begin = min(max(0, self.first - self.position), len(block))
        end = min(max(begin, self.end() - self.position), len(block))
        self.position += len(block)
        if begin < end:
            yield block[begin : int(end)]

    def silence(self, count: int, channels: int, is_hole: bool = True) -> Iterator[np.ndarray]:
        """Silence in place of the next `count` samples, which are missing.

        Raises :class:`AudioError` if too much is missing.
        """
        wanted = range(max(self.position, self.first), int(min(self.position + count, self.end())))
        self.position += count
        if is_hole and wanted:
            if self.holes and self.holes[-1].stop == wanted.start:
                wanted_hole = range(self.holes.pop().start, wanted.stop)
            else:
                wanted_hole = wanted
            self.holes.append(wanted_hole)
            if not self.request.accept_holes or sum(map(len, self.holes)) > MAX_HOLES * self.rate:
                raise self._too_damaged()
        for begin in range(0, len(wanted), signals.BLOCK):
            yield np.zeros((min(signals.BLOCK, len(wanted) - begin), channels), np.float32)

    def check_missing(self, count: int) -> None:
        """Check whether the next `count` samples may be missing, before their exact number is known.

        Raises :class:`AudioError` if too much is missing.
        """
        begin, end = max(self.position, self.first), int(min(self.position + count, self.end()))
        if sum(map(len, self.holes)) + max(0, end - begin) > MAX_HOLES * self.rate:
            self.holes.append(range(begin, max(begin, end)))
            raise self._too_damaged()

    def mark(self) -> None:
        """Record damage at the current position without missing sound."""
        if self.first <= self.position <= self.end():
            self.damaged.append(self.position)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        """Warn about damage.

        Raises :class:`AudioError` if too much is missing, or the song ends before the requested part.
        """
        length = max(self.position, self.declared)
        if self.position <= self.first and self.end() > self.first:
            start = self.request.start
            raise AudioError(
                f"{self.name}: start {start:g} s is past the end at {self.seconds(length):.3f} s"
            )
        if sum(map(len, self.holes)) > MAX_SHARE * length:
            raise self._too_damaged()
        if not self.request.accept_holes and (self.damaged or self.notes):
            found = self.notes[0] if self.notes else f"damaged at {time_text(self.seconds(self.damaged[0]))}"
            raise AudioError(f"{self.name}: {found}: copy or export it again")
        for text in [*self._damages(), *self.notes]:
            warnings.warn(f"{self.name}: {text}", KmdxWarning, stacklevel=2)

    def _damages(self) -> Iterator[str]:
        if self.holes:
            total = self.seconds(sum(map(len, self.holes)))
            places = [
                f"at {time_text(self.seconds(hole.start))} for {self.seconds(len(hole)):.3g} s"
                for hole in self.holes
            ]
            yield f"damaged or incomplete, {total:.3g} s replaced with silence: {listed(places, most=5)}"
        if self.damaged:
            places = [time_text(self.seconds(position)) for position in self.damaged]
            yield f"damaged at {listed(places, most=5)}, but no sound is missing"

    def _too_damaged(self) -> AudioError:
        total = self.seconds(sum(map(len, self.holes)))
        first = time_text(self.seconds(self.holes[0].start))
        limit = (
            f"expected at most {MAX_SHARE:.0%} and {MAX_HOLES:g} s"
            if self.request.accept_holes
            else "expected a complete file"
        )
        lost = (
            f"at least {total:.3g} s of sound are missing"
            if total < ABSURD
            else "much of its sound is missing, or its timestamps are damaged"
        )
        return AudioError(
            f"{self.name}: cut short or damaged: {lost}, first at {first}; {limit}: copy or export it again,"
            " or read a part that is intact"
        )


def time_text(seconds: float) -> str:
    """A time in a song in seconds and, from one minute on, also in minutes."""
    minutes = f" ({int(seconds) // 60}:{int(seconds) % 60:02d})" if seconds >= 60 else ""
    return f"{seconds:.3f} s{minutes}"


def changed(song: DecodedSong) -> AudioError:
    """The error for a song whose rate or channels change."""
    where = time_text(song.seconds(song.position))
    return AudioError(
        f"{song.name}: its sample rate or channels change at {where}: convert it to a single form, or cut it"
        " into several files"
    )
