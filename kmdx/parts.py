"""Parts of a sound file: the bytes that a decoder reads, and what the file declares about its sound."""

from __future__ import annotations

import bisect
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

WINDOW = 2**18  # bytes to read at a time


class View(io.RawIOBase):
    """A read-only file composed of ranges of another file and replacement bytes.

    C libraries read it. They cannot pass on an exception (they print it, or worse). Therefore the file seems
    to end at the first exception, which is kept for :meth:`raise_failure`.

    Parameters
    ----------
    pieces : sequence of range or bytes
        Ranges of positions in the file, and bytes, in order.
    """

    def __init__(self, file: BinaryIO, pieces: Sequence[range | bytes]) -> None:
        self.name = ""
        # Remaining calls and bytes of the reading library; after them, the file seems to end.
        self.calls_left: float = math.inf
        self.bytes_left: float = math.inf
        self._file = file
        self._pieces = [piece for piece in pieces if len(piece)]
        self._starts = [0]
        for piece in self._pieces:
            self._starts.append(self._starts[-1] + len(piece))
        self._position = 0
        self._failure: OSError | None = None

    @property
    def size(self) -> int:
        """Total number of bytes."""
        return self._starts[-1]

    def limit(self, calls: float, count: float = math.inf) -> None:
        """Limit the calls that a library makes, and the bytes that it reads, from now on."""
        self.calls_left, self.bytes_left = calls, count

    def replaced(self, changes: Mapping[int, bytes]) -> View:
        """A view with other bytes at some positions of the file; replacements must not overlap."""
        places = sorted(changes)
        pieces: list[range | bytes] = []
        for piece in self._pieces:
            if isinstance(piece, bytes):
                pieces.append(piece)
                continue
            begin = piece.start
            for at in places[bisect.bisect_left(places, begin) :]:
                if not begin <= at <= piece.stop - len(changes[at]):
                    continue
                pieces += [range(begin, at), changes[at]]
                begin = at + len(changes[at])
            pieces.append(range(begin, piece.stop))
        return View(self._file, pieces)

    def without(self, others: Sequence[range]) -> View:
        """A view without some ranges of the file, which must be in order."""
        pieces: list[range | bytes] = []
        for piece in self._pieces:
            if isinstance(piece, range):
                begin = piece.start
                for other in others:
                    if begin <= other.start and other.stop <= piece.stop:
                        pieces.append(range(begin, other.start))
                        begin = other.stop
                piece = range(begin, piece.stop)
            pieces.append(piece)
        return View(self._file, pieces)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.calls_left -= 1
        base = {os.SEEK_CUR: self._position, os.SEEK_END: self.size}.get(whence, 0)
        self._position = min(max(0, base + offset), 2**62)  # C code computes with it
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(target) and (data := self._read_piece(len(target) - filled)):
            target[filled : filled + len(data)] = data
            filled += len(data)
            self._position += len(data)
            self.bytes_left -= len(data)
        return filled

    def raise_failure(self) -> None:
        """Raise the system error, if any, that ended the file early."""
        if self._failure is not None:
            raise self._failure

    def _read_piece(self, count: int) -> bytes:
        self.calls_left -= 1
        if self.bytes_left <= 0:
            self.calls_left = -1
        if self.calls_left < 0 or self._position >= self.size:
            return b""
        number = bisect.bisect_right(self._starts, self._position) - 1
        piece, inside = self._pieces[number], self._position - self._starts[number]
        if isinstance(piece, bytes):
            return piece[inside : inside + count]
        try:
            self._file.seek(piece.start + inside)
            return self._file.read(min(count, len(piece) - inside))
        except OSError as error:
            self._failure = self._failure or error
            return b""


class FileWindow:
    """Random access to the bytes of a file, read in large blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._start, self._data = 0, b""
        self._ended = False  # whether these bytes reach the end of the file

    def __call__(self, position: int, count: int) -> bytes:
        inside = position - self._start
        if inside < 0 or (inside + count > len(self._data) and not self._ended):
            self._file.seek(position)
            wanted = max(WINDOW, count)
            self._start, self._data, inside = position, self._file.read(wanted), 0
            self._ended = len(self._data) < wanted
        return self._data[inside : inside + count]


@dataclass(frozen=True)
class Part:
    """A part of a file that is decoded from beginning to end, and what the file declares about it.

    Most files have one part; a chained Ogg file has one for each link.
    """

    view: View
    family: str = ""
    """"wav", "chunks" (similar formats), "flac", "vorbis" (one undamaged stream), "ogg", "mp3", "adts",
    "matroska", "mp4", "fragments" (of an mp4 file), "avi", "asf", or "" for others."""
    share: float = 1.0  # share of the declared bytes of sound that the file contains
    ends: tuple[float | None, ...] = ()  # timestamps at which the audio streams end, in ticks (avi: seconds)
    duration: float | None = None  # seconds at which the longest stream ends
    delays: tuple[float, ...] = ()  # seconds before each stream that a Matroska file's durations include
    begin: int = 0  # position after the headers of a Matroska file
    lead: tuple[bool, ...] = ()  # whether sound is missing before the first packet of a stream
    missing: int = 0  # declared samples that are missing at the end
    is_counted: bool = False  # the file declares its number of frames, and some are missing
    mute: tuple[range, ...] = ()  # timestamps, in samples, of frames that replace damaged ones
    marks: tuple[int, ...] = ()  # timestamps, in samples, of damage without missing sound
    cut: bool = False  # the file ends in the middle of its structure
    stops: bool = False  # decoders stop before its end without an error
    notes: tuple[str, ...] = ()  # information for the user when no sound is lost
