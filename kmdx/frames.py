"""Files that consist only of frames: mp3 and similar formats, and AAC in ADTS.

Such a file has no timestamps, so after lost bytes, all sound would come too early. This module counts frames
by their headers. It replaces damaged frames with copies of their neighbors, to be muted after decoding.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from .errors import AudioError
from .parts import WINDOW, FileWindow, Part, View

CHAIN = 3  # consecutive frames that identify a beginning
LONG_CHAIN = 16  # the same after other data: other formats may contain a few frames in a row
NO_SOUND = "its last frame is followed by data that is not sound, so its end may be damaged"
FEW = 0.1  # share of a frame
LEAD = 2**16  # bytes of other data allowed before the first frame
MAX_TAGS = 100  # before the first frame
MAX_FRAMES = 1_000_000  # of a file: some hours
MAX_OTHERS = 5000  # tags and damaged places between frames; each joined file adds some
MAX_ATTEMPTS = 2**18  # positions to search for frames: enough for any song, and about a second of work
SEARCHED = 2**14  # bytes to search for a frame at a time

# kbit/s by the header's index, from 1: MPEG 1 layers I, II and III, then MPEG 2 layers I, and II and III.
BIT_RATES = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
SAMPLE_RATES = (44100, 48000, 32000)
AC3_BIT_RATES = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
AAC_FRAME, AC3_FRAME = 1024, 1536  # samples


class _Header(NamedTuple):
    length: int  # bytes of the whole frame
    samples: int
    kind: tuple[int, ...]  # the same in all frames of a file


_Parse = Callable[[bytes], _Header | None]
_MPEG_SYNC = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]|ID3|APETAGEX|TAG|LYRICSBEGIN")
_AC3_SYNC = re.compile(rb"\x0bw|ID3|APETAGEX|TAG")
_ADTS_SYNC = re.compile(rb"\xff[\xf0\xf1\xf8\xf9]|ID3|APETAGEX|TAG")


@dataclass
class _Frames:
    """The intact frames of a file, and the bytes between them."""

    samples: int  # of each frame
    good: list[range] = field(default_factory=list)
    gaps: dict[int, int] = field(default_factory=dict)  # lost bytes, by the number of good frames before them
    cut: bool = False  # the last frame ends beyond the file
    tail: range = range(0)  # data after the last good frame, except tags
    change: int | None = None  # position after which frames are of another kind


def after_tags(file: BinaryIO, position: int) -> int:
    """The position after the ID3v2 tags that begin at `position`.

    Raises :class:`AudioError` if there are more than :data:`MAX_TAGS`.
    """
    for _ in range(MAX_TAGS):
        file.seek(position)
        size = _id3_size(file.read(10))
        if not size:
            return position
        position += size
    raise AudioError(f"contains more than {MAX_TAGS} ID3 tags before its sound: export it again")


def scan(file: BinaryIO, begin: int, size: int, searched: int = 0, padded: bool = True) -> Part | None:
    """A file of frames that begins at `begin`; None for other files.

    In the part's view, damaged or missing frames are replaced with copies of their neighbors, to be muted.

    Parameters
    ----------
    begin, size : int
        Where the frames begin and end.
    searched : int
        Bytes to search for the first frame after other data.
    padded : bool
        Whether zeros before and after the frames are padding.
    """
    window = FileWindow(file)
    start = _skip_zeros(window, begin)
    if searched and (after := _after_other(window, start)) != start:
        begin = start = after
    for family, parse, sync in KINDS:
        first = _chain(window, start, size, parse, None)
        if first is None and searched:
            start, first = _search(window, begin, begin + searched, size, parse, sync)
        if first is not None:
            is_lead = bool(searched or not padded) and start > begin
            frames = _count(window, start, size, parse, sync, first)
            if is_lead:
                frames.gaps[0] = frames.gaps.get(0, 0) + start - begin
            return _part(file, window, range(start if is_lead else begin, size), family, frames, padded)
    return None


def _search(
    window: FileWindow, position: int, end: int, size: int, parse: _Parse, sync: re.Pattern[bytes]
) -> tuple[int, _Header | None]:
    """The position of a long chain of frames, and the header of the first frame."""
    begin = position
    while position < min(end, size - 10):
        data = window(position, SEARCHED)
        found = sync.search(data)
        if found is None:
            position += max(1, len(data) - 9)
            continue
        position += found.start()
        if (first := _chain(window, position, size, parse, None, LONG_CHAIN)) is not None:
            return position, first
        position += 1
    return begin, None


def _part(
    file: BinaryIO, window: FileWindow, inside: range, family: str, frames: _Frames, padded: bool
) -> Part:
    good = frames.good
    counts = _declared_counts(window, good) if family == "mp3" else {}
    declared = counts.get(0)
    is_declared = declared is not None
    if is_declared:
        frames.gaps.pop(0, None)  # nothing is missing before the info frame, which declares the number
    total = len(good) - is_declared  # without the info frame
    is_joined = any(counts.keys() - {0})
    if is_joined or (declared is not None and declared < total):  # it counts only the first file's frames
        declared = None
    damaged_end = _is_end_damaged(window, frames, padded)
    lost = _lost(frames, None if declared is None else declared - total, damaged_end)
    missing, notes = _missing(window, frames, declared, total + sum(lost.values()), damaged_end)
    if is_joined:
        for index, count in _shortages(counts, len(good), lost).items():
            if index < len(good):
                lost[index] = lost.get(index, 0) + count
            else:
                missing = max(missing, count)
    stop = inside.stop if frames.cut or frames.change else good[-1].stop  # without the tags after it
    whole: list[range | bytes] = [range(inside.start, stop)]
    mute, marks = [], []
    gapless = sum(map(len, good)) == good[-1].stop - good[0].start
    if lost or not gapless:  # tags and other bytes between frames would confuse the decoder
        whole, number = [range(inside.start, good[0].start)], 0
        for index, frame in enumerate(good):
            copies = lost.get(index, 0)
            whole += [good[max(0, index - 1)]] * copies + [frame]
            first = (index + number - is_declared) * frames.samples
            mute += [range(first, first + copies * frames.samples)] if copies else []
            number += copies
        whole += [range(frames.change, stop)] if frames.change else []
    for index in frames.gaps:
        if index < len(good) and not lost.get(index):
            before = sum(count for place, count in lost.items() if place < index)
            marks.append((index + before - is_declared) * frames.samples)
    return Part(
        View(file, whole),
        family,
        missing=missing * frames.samples,
        is_counted=declared is not None and bool(missing or lost),
        mute=tuple(mute),
        marks=tuple(marks),
        notes=notes,
    )


def _declared_counts(window: FileWindow, good: Sequence[range]) -> dict[int, int]:
    """The declared number of frames after each info frame, by its position among the frames.

    Files that were joined have one info frame each.
    """
    found = ((index, _declared(window, frame)) for index, frame in enumerate(good))
    return {index: count for index, count in found if count is not None}


def _shortages(counts: Mapping[int, int], total: int, lost: Mapping[int, int]) -> dict[int, int]:
    """The number of frames missing at the end of each of several joined files, by the frame that follows."""
    ends = [*list(counts)[1:], total]
    short = {}
    for (begin, declared), end in zip(counts.items(), ends, strict=True):
        known = end - begin - 1 + sum(count for index, count in lost.items() if begin < index <= end)
        if declared - known > 1:  # some encoders also count the info frame
            short[end] = declared - known
    return short


def _missing(
    window: FileWindow, frames: _Frames, declared: int | None, total: int, damaged_end: bool
) -> tuple[int, tuple[str, ...]]:
    """The number of frames missing at the end, and notes for the user."""
    tail = frames.tail
    if declared is not None:
        missing = max(0, declared - total)
        if missing == 1 and not frames.cut and not damaged_end and not frames.gaps:
            missing = 0  # some encoders also count the info frame
        if len(tail) > LEAD and damaged_end:
            return missing, (NO_SOUND,)
    elif damaged_end and not window(tail.start, min(len(tail), WINDOW)).strip(b"\0"):
        mean = sum(map(len, frames.good)) / len(frames.good)
        missing = max(1, round(len(tail) / mean))
    elif damaged_end:
        return 0, (NO_SOUND,)
    else:
        missing = 0
    if frames.cut and not missing:
        return 0, ("its last frame is incomplete, so its end may be missing",)
    return missing, ()


def _is_end_damaged(window: FileWindow, frames: _Frames, padded: bool) -> bool:
    """Whether the data after the last good frame was sound, and not a tag or padding with zeros.

    If the end was overwritten with zeros, they begin in the middle of a frame.
    """
    tail, good = frames.tail, frames.good
    if not tail or frames.change is not None:
        return False
    data = window(tail.start, min(len(tail), WINDOW))
    if data.startswith(b"LYRICSBEGIN"):
        return False
    if data.strip(b"\0") or not padded:
        return True
    ends = [window(frame.stop - 8, 8) for frame in good[-2:]]
    return ends[-1] == bytes(8) and ends[0] != bytes(8)


def _lost(frames: _Frames, total: int | None, damaged_end: bool) -> dict[int, int]:
    """The number of frames lost in each gap, estimated from its bytes; at most `total`, if known.

    If bytes were removed, less than a frame may be left of many frames, so at least one is lost. A gap of a
    few bytes comes from a header with a wrong length.
    """
    mean = sum(map(len, frames.good)) / len(frames.good)
    lost = {
        index: max(round(count / mean), int(index > 0 and count > FEW * mean))
        for index, count in frames.gaps.items()
        if index < len(frames.good)
    }
    lost = {index: count for index, count in lost.items() if count}
    found = sum(lost.values())
    is_at_end = frames.cut or damaged_end
    if total is None or not lost or (is_at_end and total > found + len(lost)):
        return lost
    shares = {index: 0 for index in lost}
    passed = given = 0
    for index, count in lost.items():
        passed += count
        shares[index] = round(passed * total / found) - given
        given += shares[index]
    return {index: count for index, count in shares.items() if count}


def _skip_zeros(window: FileWindow, position: int) -> int:
    """The position of the first nonzero byte: some programs pad a tag beyond its size."""
    data = window(position, WINDOW)
    return position + len(data) - len(data.lstrip(b"\0"))


def _chain(
    window: FileWindow,
    position: int,
    size: int,
    parse: _Parse,
    kind: tuple[int, ...] | None,
    length: int = CHAIN,
) -> _Header | None:
    """The header of a frame that is followed by others of its kind, or by the end of the file."""
    first = header = parse(window(position, 10))
    for number in range(length):
        if header is None or header.kind != (kind or first.kind):  # type: ignore[union-attr]
            return None
        position += header.length
        if position > size - 10:
            return first if number or kind else None
        header = parse(window(position, 10))
    return first


def _count(
    window: FileWindow, position: int, size: int, parse: _Parse, sync: re.Pattern[bytes], first: _Header
) -> _Frames:
    """Find all frames of a file whose first frame is at `position`."""
    frames = _Frames(first.samples)
    attempts, others = iter(range(MAX_ATTEMPTS)), 0
    while position < size:
        header = parse(window(position, 10))
        if header is not None and header.kind == first.kind:
            end = position + header.length
            frames.cut, frames.tail = end > size, range(0)
            if not frames.cut:
                frames.good.append(range(position, end))
                if len(frames.good) > MAX_FRAMES:
                    raise AudioError(f"contains more than {MAX_FRAMES} frames: cut it into several files")
            position = end
            continue
        others += 1
        if others > MAX_OTHERS:
            raise AudioError(f"damaged: more than {MAX_OTHERS} places without sound: export it again")
        after = _after_other(window, position)
        if after == position:
            other = _chain(window, position, size, parse, None)
            if other is not None and frames.good:
                frames.change = position
                break
            after = _resync(window, position + 1, size, parse, sync, first.kind, attempts)
            frames.tail = range(position, min(after, size))
            index = len(frames.good)
            frames.gaps[index] = frames.gaps.get(index, 0) + min(after, size) - position
        position = after
    return frames


def _id3_size(data: bytes) -> int:
    """The size of the ID3v2 tag that begins with `data`, with its header and footer; 0 if there is none."""
    if len(data) < 10 or not data.startswith(b"ID3") or max(data[6:10]) > 127:
        return 0
    size = sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    return 10 + size + (10 if data[5] & 0x10 else 0)  # a footer


def _after_other(window: FileWindow, position: int) -> int:
    """The position after a tag (ID3, APE or Lyrics3) between joined files or at the end."""
    data = window(position, 32)
    if size := _id3_size(data):
        return position + size
    if data.startswith(b"TAG"):
        return position + 128
    if data.startswith(b"LYRICSBEGIN"):
        found = re.search(rb"LYRICS200|LYRICSEND", window(position, LEAD))
        return position + (found.end() if found else 0)
    if data.startswith(b"APETAGEX") and len(data) == 32:
        size, _, flags = struct.unpack_from("<III", data, 12)
        return position + size + (32 if flags & 0x20000000 else 0)  # the size excludes the header
    return position


def _resync(
    window: FileWindow,
    position: int,
    size: int,
    parse: _Parse,
    sync: re.Pattern[bytes],
    kind: tuple[int, ...],
    attempts: Iterator[int],
) -> int:
    """The position of the next frames or tag; the end of the file if there are none."""
    for _ in attempts:
        data = window(position, SEARCHED)
        found = sync.search(data)
        if found is None:
            position += max(1, len(data) - 9)
        else:
            position += found.start()
            if found[0][:1] in b"IATL" or _chain(window, position, size, parse, kind):
                return position
            if _chain(window, position, size, parse, None, LONG_CHAIN):  # of another kind
                return position
            position += 1
        if position + 10 > size:
            break
    return size


def _mpeg(data: bytes) -> _Header | None:
    """The header of a frame of MPEG audio, layer I, II or III (ISO 11172-3, 13818-3)."""
    if len(data) < 4 or data[0] != 0xFF or data[1] < 0xE2:
        return None
    version, layer = data[1] >> 3 & 3, 4 - (data[1] >> 1 & 3)  # versions 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate_index, padding = data[2] >> 2 & 3, data[2] >> 1 & 1
    if version == 1 or layer == 4 or rate_index == 3 or not 0 < data[2] >> 4 < 15:
        return None
    table = layer - 1 if version == 3 else min(layer + 2, 4)
    bit_rate = 1000 * BIT_RATES[table][(data[2] >> 4) - 1]
    rate = SAMPLE_RATES[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    slot = 4 if layer == 1 else 1
    length = (samples // 8 // slot * bit_rate // rate + padding) * slot
    mono = data[3] >> 6 == 3
    return _Header(length, samples, (version, layer, rate, mono))


def _adts(data: bytes) -> _Header | None:
    """The header of an AAC frame in ADTS (ISO 13818-7)."""
    if len(data) < 7 or data[0] != 0xFF or data[1] & 0xF6 != 0xF0 or data[2] >> 2 & 15 > 12:
        return None
    length = (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
    blocks = 1 + (data[6] & 3)
    channels = (data[2] & 1) << 2 | data[3] >> 6
    return _Header(length, blocks * AAC_FRAME, (data[2] >> 2, channels, blocks)) if length > 7 else None


def _ac3(data: bytes) -> _Header | None:
    """The header of an AC-3 frame (ATSC A/52)."""
    if len(data) < 7 or data[:2] != b"\x0bw" or data[4] >> 6 == 3 or data[4] & 63 > 37 or data[5] >> 3 > 8:
        return None
    rate, bit_rate = (48000, 44100, 32000)[data[4] >> 6], 1000 * AC3_BIT_RATES[(data[4] & 63) >> 1]
    words = AC3_FRAME * bit_rate // rate // 16 + (data[4] & 1 if rate == 44100 else 0)
    return _Header(2 * words, AC3_FRAME, (rate, data[5] >> 3, data[6] >> 5))


def _eac3(data: bytes) -> _Header | None:
    """The header of an E-AC-3 frame (ATSC A/52, annex E)."""
    if len(data) < 6 or data[:2] != b"\x0bw" or not 11 <= data[5] >> 3 <= 16:
        return None
    code, second = data[4] >> 6, data[4] >> 4 & 3
    if code == second == 3:
        return None
    rate = (24000, 22050, 16000)[second] if code == 3 else (48000, 44100, 32000)[code]
    blocks = 6 if code == 3 else (1, 2, 3, 6)[second]
    length = 2 * (((data[2] & 7) << 8 | data[3]) + 1)
    return _Header(length, 256 * blocks, (data[2] >> 3, rate, blocks, data[4] & 15)) if length > 6 else None


KINDS = (
    ("mp3", _mpeg, _MPEG_SYNC),
    ("adts", _adts, _ADTS_SYNC),
    ("ac3", _ac3, _AC3_SYNC),
    ("ac3", _eac3, _AC3_SYNC),
)


def _declared(window: FileWindow, frame: range) -> int | None:
    """The number of frames declared in the first frame (Xing, Info or VBRI), without that frame."""
    data = window(frame.start, min(len(frame), 200))
    if data[36:40] == b"VBRI" and len(data) >= 54:
        return int(struct.unpack_from(">I", data, 50)[0])
    mpeg_1, mono = data[1] >> 3 & 3 == 3, data[3] >> 6 == 3
    side = (17 if mono else 32) if mpeg_1 else (9 if mono else 17)
    at = 4 + side
    if data[at : at + 4] not in (b"Xing", b"Info") or len(data) < at + 12:
        return None
    flags, count = struct.unpack_from(">II", data, at + 4)
    return int(count) if flags & 1 else None
