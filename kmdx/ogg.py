"""Read the pages of an Ogg file: where each link of a chain begins, and where its sound ends.

A page has a position in samples (its granule) and a checksum (RFC 3533). Decoders drop a page with a wrong
checksum. The last page is marked.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from .errors import AudioError
from .parts import FileWindow, Part, View

MAX_STREAMS = 2000  # of a file; a decoder is opened for each link
MAX_PAGES = 500_000  # of a file: more than two hours with one packet per page
HEADER = struct.Struct("<4sBBqIIIB")
BEGINS, ENDS = 2, 4  # flags of a page
MAX_OTHER = 2**16  # bytes between two pages that a decoder may search
SEARCHED = 2**14  # bytes to search at a time for the next page
PAGE = b"OggS\0"  # beginning of a page: its name and version
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class _Page:
    position: int
    flags: int
    granule: int
    serial: int
    body: int  # position after the header
    end: int


@dataclass
class _Stream:
    """The state of one audio stream while its pages are read."""

    pre_skip: int
    is_vorbis: bool
    intact: bool = True  # so far, no bytes between pages, and all checksums are correct
    started: bool = False  # a page with sound was found
    lead: bool = False  # damaged bytes come before that page
    granules: list[int] = field(default_factory=lambda: [0])  # the last few
    last: _Page | None = None


def links(file: BinaryIO, size: int) -> list[Part]:
    """The links of an Ogg file, to be decoded one after the other.

    Raises :class:`AudioError` if there are more than :data:`MAX_STREAMS` streams, or :data:`MAX_PAGES` pages.
    """
    parts: list[Part] = []
    streams: dict[int, _Stream] = {}
    begin, sound = 0, False  # of the current link
    expected = 0  # where a page should begin
    others: list[range] = []  # bytes outside pages
    headers = 0  # number of first pages of streams
    for page in _pages(file, size):
        if page.position > expected + MAX_OTHER:
            others.append(range(expected, page.position))
        skipped, expected = page.position > expected, page.end
        if page.flags & BEGINS:
            headers += 1
            if headers > MAX_STREAMS:
                raise AudioError(f"contains more than {MAX_STREAMS} Ogg streams: cut it into several files")
            if sound:
                parts.append(_part(file, begin, page.position, size, streams))
                begin, sound, streams = page.position, False, {}
            if (stream := _stream(file, page)) is not None:
                streams[page.serial] = stream
            continue
        sound = True
        if (stream := streams.get(page.serial)) is not None:
            _follow(file, size, stream, page, skipped)
    if not expected:
        raise AudioError("expected a sound file, found no intact Ogg page")
    if size > expected + MAX_OTHER:
        others.append(range(expected, size))
    parts.append(_part(file, begin, size, size, streams))
    return [replace(part, view=part.view.without(others)) for part in parts] if others else parts


def _part(file: BinaryIO, begin: int, end: int, size: int, streams: dict[int, _Stream]) -> Part:
    view = View(file, [range(begin, end)])
    marked = all(stream.last is not None and stream.last.flags & ENDS for stream in streams.values())
    cut = not marked and any(
        stream.last is not None and stream.last.end > size for stream in streams.values()
    )
    exact = len(streams) == 1 and all(stream.is_vorbis and stream.intact for stream in streams.values())
    return Part(
        view,
        "vorbis" if exact and marked else "ogg",
        ends=() if cut else tuple(stream.granules[-1] - stream.pre_skip for stream in streams.values()),
        lead=tuple(stream.lead for stream in streams.values()),
        cut=cut,
        notes=("no page is marked as its last, so its end may be missing",)
        if not marked and not cut and end == size
        else (),
    )


def _follow(file: BinaryIO, size: int, stream: _Stream, page: _Page, skipped: bool) -> None:
    """Update the state of a stream with its next page."""
    stream.last = page
    if stream.is_vorbis:
        stream.intact = stream.intact and not skipped and _is_sound(file, page, size)
    if not stream.started:  # headers have granule 0
        stream.lead = stream.lead or skipped or not _is_sound(file, page, size)
        stream.started = page.granule > 0
    if page.granule >= 0:
        step = max(2**16, 4 * max(stream.granules[-1] - stream.granules[0], 0))
        likely = stream.granules[-1] <= page.granule <= stream.granules[-1] + step
        if likely or _is_sound(file, page, size):
            stream.granules = [*stream.granules[-8:], page.granule]


def _pages(file: BinaryIO, size: int) -> Iterator[_Page]:
    """The pages of a file, which may have other bytes between them.

    Raises :class:`AudioError` if there are more than :data:`MAX_PAGES`.
    """
    window = FileWindow(file)
    position = 0
    for _ in range(MAX_PAGES):
        position = _find(window, position, size)
        header = window(position, HEADER.size)
        if len(header) < HEADER.size:
            return
        _, _, flags, granule, serial, _, _, count = HEADER.unpack(header)
        body = position + HEADER.size + count
        lacing = window(position + HEADER.size, count)
        if len(lacing) < count:
            position += 1
            continue
        yield _Page(position, flags, granule, serial, body, body + sum(lacing))
        position = body + sum(lacing)
    raise AudioError(f"contains more than {MAX_PAGES} Ogg pages: cut it into several files")


def _find(window: FileWindow, position: int, size: int) -> int:
    """The position of the next page, which must have version 0; `size` if there is none."""
    while position < size:
        data = window(position, min(SEARCHED, size - position))
        found = data.find(PAGE)
        if found >= 0:
            return position + found
        position += max(1, len(data) - len(PAGE) + 1)
    return size


def _stream(file: BinaryIO, page: _Page) -> _Stream | None:
    """The audio stream that begins with a page; None if it does not begin one."""
    file.seek(page.body)
    head = file.read(12)
    if head.startswith(b"OpusHead") and len(head) == 12:
        return _Stream(int.from_bytes(head[10:], "little"), is_vorbis=False)
    if head.startswith((b"\x01vorbis", b"\x7fFLAC", b"fLaC", b"Speex   ")):
        return _Stream(0, head.startswith(b"\x01vorbis"))
    return None


def _is_sound(file: BinaryIO, page: _Page, size: int) -> bool:
    """Whether a page is complete and its checksum is correct.

    Ogg's CRC-32 processes the bits of a byte in the opposite order to zlib's, without inverting the value.
    """
    if page.end > size:
        return False
    file.seek(page.position)
    data = bytearray(file.read(page.end - page.position))
    declared = int.from_bytes(data[22:26], "little")
    data[22:26] = bytes(4)
    found = zlib.crc32(data.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{found:032b}"[::-1], 2) == declared
