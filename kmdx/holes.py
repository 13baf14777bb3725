"""The song that is being decoded: its wanted part, its holes, and whether they are too many.

A hole is a time for which the file has no sound, although the sound around it, or the length that the file
declares, shows that there was some: damaged packets, lost pages, a missing end. It becomes silence of the
same length. Beyond :data:`MAX_HOLES` or :data:`MAX_SHARE` the file is refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import signals
from .errors import AudioError, KmdxWarning

MAX_HOLES = 5.0  # seconds of a song that may be missing
ABSURD = 3600.0  # seconds: a longer hole is a damaged time
MAX_SHARE = 0.02  # of a song that may be missing


@dataclass(frozen=True)
class Request:
    """What is to be read of which file; see :func:`kmdx.audio.read`."""

    path: Path
    start: float = 0.0
    duration: float | None = None
    downmix: bool = False
    stream: int = 0
    accept_holes: bool = True


class DecodedSong:
    """Where the decoded blocks go: the wanted part of the song, and its holes.

    Positions are samples from the beginning of the song, whatever part of it is wanted.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.rate = 0
        self.position = 0
        self.declared = 0  # length of the song, if it is known
        self.shape = 0
        self.holes: list[range] = []
        self.damaged: list[int] = []  # positions at which something was damaged, and nothing is missing
        self.notes: list[str] = []

    @property
    def path(self) -> Path:
        return self.request.path

    @property
    def first(self) -> int:
        """The first wanted sample."""
        return round(self.request.start * self.rate)

    def end(self, rate: int | None = None) -> float:
        """The sample after the last wanted one; infinite without a duration."""
        rate = rate or self.rate
        if self.request.duration is None:
            return math.inf
        return round(self.request.start * rate) + round(self.request.duration * rate)

    @property
    def complete(self) -> bool:
        """Whether all that is wanted was decoded."""
        return self.position >= self.end()

    def seconds(self, position: float) -> float:
        return position / self.rate

    def add(self, block: np.ndarray) -> Iterator[np.ndarray]:
        """The wanted samples of the next block."""
        begin = min(max(0, self.first - self.position), len(block))
        end = min(max(begin, self.end() - self.position), len(block))
        self.position += len(block)
        if begin < end:
            yield block[begin : int(end)]

    def silence(self, count: int, channels: int, is_hole: bool = True) -> Iterator[np.ndarray]:
        """Silence of the next `count` samples, which are missing.

        Raises
        ------
        AudioError
            If too much is missing.
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
        """Find out whether the song may lack the next `count` samples, before they are known exactly.

        Raises
        ------
        AudioError
            If too much is missing.
        """
        begin, end = max(self.position, self.first), int(min(self.position + count, self.end()))
        if sum(map(len, self.holes)) + max(0, end - begin) > MAX_HOLES * self.rate:
            self.holes.append(range(begin, max(begin, end)))
            raise self._too_damaged()

    def mark(self) -> None:
        """Something is damaged here, and nothing is missing."""
        if self.first <= self.position <= self.end():
            self.damaged.append(self.position)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        """Warn of what was damaged.

        Raises
        ------
        AudioError
            If too much is missing, or the song ended before its wanted part.
        """
        length = max(self.position, self.declared)
        if self.position <= self.first and self.end() > self.first:
            start = self.request.start
            raise AudioError(
                f"{self.path}: start {start:g} s is past its end, it lasts {self.seconds(length):.3f} s"
            )
        if sum(map(len, self.holes)) > MAX_SHARE * length:
            raise self._too_damaged()
        if not self.request.accept_holes and (self.damaged or self.notes):
            found = self.notes[0] if self.notes else f"damaged at {time_text(self.seconds(self.damaged[0]))}"
            raise AudioError(f"{self.path}: {found}: copy or export it again")
        for text in [*self._damages(), *self.notes]:
            warnings.warn(f"{self.path}: {text}", KmdxWarning, stacklevel=2)

    def _damages(self) -> Iterator[str]:
        if self.holes:
            total = self.seconds(sum(map(len, self.holes)))
            places = [
                f"at {time_text(self.seconds(hole.start))} for {self.seconds(len(hole)):.3g} s"
                for hole in self.holes[:5]
            ]
            more = f" and {len(self.holes) - 5} more" if len(self.holes) > 5 else ""
            yield f"damaged or incomplete, {total:.3g} s of it replaced by silence: {', '.join(places)}{more}"
        if self.damaged:
            places = [time_text(self.seconds(position)) for position in self.damaged[:5]]
            more = f" and {len(self.damaged) - 5} more" if len(self.damaged) > 5 else ""
            yield f"damaged at {', '.join(places)}{more}, though no sound is missing"

    def _too_damaged(self) -> AudioError:
        total = self.seconds(sum(map(len, self.holes)))
        first = time_text(self.seconds(self.holes[0].start))
        limit = (
            f"at most {MAX_SHARE:.0%} and {MAX_HOLES:g} s may be missing"
            if self.request.accept_holes
            else "none may be missing here"
        )
        lost = (
            f"at least {total:.3g} s of sound are"
            if total < ABSURD
            else "much of its sound or of its times is"
        )
        return AudioError(
            f"{self.path}: cut short or damaged: {lost} missing, the first at"
            f" {first}; {limit}: copy or export it again, or read a part that is whole"
        )


def time_text(seconds: float) -> str:
    """A time in a song, in seconds and, where it is long, also in minutes."""
    minutes = f" ({int(seconds) // 60}:{int(seconds) % 60:02d})" if seconds >= 60 else ""
    return f"{seconds:.3f} s{minutes}"


def changed(song: DecodedSong) -> AudioError:
    """The error where what follows has another rate or other channels."""
    where = time_text(song.seconds(song.position))
    return AudioError(
        f"{song.path}: its rate or its channels change at {where}: convert it to one rate, or cut it into"
        " several files"
    )
