"""Compare the length that a sound file declares with the sound that it contains.

If a file is cut short, decoders return less sound than declared, usually without an error. The structure of
the file reveals this: sizes of chunks, positions of Ogg pages, the number of mp3 frames. :func:`inspect`
reads this structure, but not the sound.

If a header is known to be wrong, it also gives decoders a corrected view of the file: for a wav written to a
pipe, a wav longer than its 32-bit sizes can express, or an mp3 with damaged frames.
"""

from __future__ import annotations

import io
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

from . import frames, ogg, rare
from .errors import AudioError
from .parts import Part, View

MAX_CHUNKS = 2000  # a file with more chunks before its sound is refused
INCOMPLETE = "its last packet is incomplete, so its end may be missing"
SYNCS = 20  # packets of a transport stream to check
PACK, PROGRAM_END = 0xBA, 0xB9  # start codes of a program stream
MAX_BLOCKS = 500_000  # of a Matroska file
MAX_INDEX = 500_000  # chunks in the index of an avi file
BETWEEN = 64  # bytes allowed between two of these chunks
MAX_DAMAGED = 0.1  # share of damaged chunks; with more, the index is of another kind
MAX_BOXES = 200_000  # of an mp4 file; a fragmented one has two for every few seconds
UNKNOWN_32 = 0x7FFFE000  # a 32-bit size of at least this that does not fit into the file means "unknown"
UNKNOWN_64 = 2**63 - 2**13
AMBIGUOUS = 2**30  # bytes of sound; with at least this much, such a size could also be the true one
WRAP = 2**32
MAX_LAST = 2**20  # bytes at the end of a wav of unknown size to search for other chunks
FARTHEST = 2**43  # bytes: file systems refuse to seek further


@dataclass(frozen=True)
class _Chunks:
    """The layout of a format that consists of chunks, each with a name and a size."""

    begin: int  # position of the first chunk
    name: int  # bytes
    size: str  # struct's format
    sound: bytes  # name of the chunk with the samples
    form: bytes  # name of the chunk that describes them
    align: int = 2
    includes_header: bool = False

    @property
    def header(self) -> int:
        return self.name + struct.calcsize(self.size)


_LAST_CHUNKS = re.compile(rb"(?s)(?:LIST|id3 |ID3 |bext|iXML|_PMX|axml|cue |smpl|PEAK|fact|acid|JUNK)....")
_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"sidx", b"wide", b"free", b"skip"}
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # end of the names in a W64 file
_WAV = _Chunks(12, 4, "<I", b"data", b"fmt ")
_AVI = _Chunks(12, 4, "<I", b"movi", b"")
_RIFX = _Chunks(12, 4, ">I", b"data", b"fmt ")
_AIFF = _Chunks(12, 4, ">I", b"SSND", b"COMM")
_SVX = _Chunks(12, 4, ">I", b"BODY", b"VHDR")
_CAF = _Chunks(8, 4, ">Q", b"data", b"desc", align=1)
_W64 = _Chunks(40, 16, "<Q", b"data" + _GUID, b"fmt " + _GUID, align=8, includes_header=True)


def inspect(file: BinaryIO, size: int) -> list[Part]:
    """Read the structure of a sound file of ``size`` bytes.

    Raises :class:`OSError` if it cannot be read, and :class:`AudioError` if it is a wav or similar file
    without sound among its first chunks, or if it has too many tags, or too many links or pages of Ogg. The
    message does not name the file.
    """
    begin = frames.after_tags(file, 0)
    magic = _at(file, begin, 16)
    if magic[:4] == b"fLaC":
        return _flac_files(file, begin, size)
    if found := frames.scan(file, begin, size):
        return [found]
    magic = _at(file, 0, 16)
    if magic[:4] == b"OggS":
        return ogg.links(file, size)
    if magic[:4] in (b".snd", b"dns."):
        return [_au(file, size)]
    if (kind := _kind(magic)) is not None:
        return [_chunked(file, size, kind)]
    if magic[:4] == b"\x1aE\xdf\xa3":
        return [_matroska(file, size)]
    whole = View(file, [range(size)])
    if magic[:4] == b"RIFF" and magic[8:12] == b"AVI ":
        return [_avi(file, size)]
    if magic[:4] == b"FORM" and magic[8:12] in (b"8SVX", b"16SV"):
        return [Part(whole, share=_share(_walk(file, size, _SVX), {b"BODY"}, size))]
    if magic[:16] == b"Creative Voice F":
        return [Part(whole, share=_share(_voice_blocks(file, size), {1, 2, 9}, size))]
    if magic == _ASF_HEADER:
        return [_asf(file, size)]
    if magic[4:8] in _BOXES:
        return [_mp4(file, size)]
    if (found := rare.inspect(file, size)) is not None:
        return [found]
    if (packet := _packet_size(file)) and (size - begin) % packet:
        return [Part(whole, notes=(INCOMPLETE,))]
    if magic[:4] != b"\0\0\1\xba":  # an MPEG program stream has many frames in each of its packets
        whole_frames = frames.scan(file, begin, size, frames.LEAD)
        return [whole_frames or Part(whole)]
    return [Part(whole, notes=(INCOMPLETE,) if _is_pack_cut(file, size) else ())]


def _packet_size(file: BinaryIO) -> int:
    """The size of the packets of an MPEG transport stream; 0 for another file."""
    data = _at(file, 0, 204 * SYNCS + 8)
    for packet, first in ((188, 0), (192, 4), (204, 0)):
        syncs = data[first::packet][:SYNCS]
        if len(syncs) > 2 and not syncs.strip(b"G"):
            return packet
    return 0


def _is_pack_cut(file: BinaryIO, size: int) -> bool:
    """Whether the last packet of an MPEG program stream ends beyond the file."""
    begin = max(0, size - 2**18)
    position = _at(file, begin, 2**18).rfind(b"\0\0\1\xba")
    if position < 0:
        return False
    position += begin
    while position < size:
        header = _at(file, position, 14).ljust(14, b"\xff")
        if header[:3] != b"\0\0\1" or header[3] == PROGRAM_END:
            return False
        if header[3] == PACK:
            position += 14 + (header[13] & 7) if header[4] >> 6 == 1 else 12
        else:
            position += 6 + int.from_bytes(header[4:6], "big")
    return position > size


def _flac_files(file: BinaryIO, begin: int, size: int) -> list[Part]:
    """The parts of one flac file or several joined files; each begins with a marker and its STREAMINFO."""
    begins, position, step = [begin], begin + 8, 2**20
    while position < size:
        data = _at(file, position, step)
        begins += [position + found.start() for found in re.finditer(rb"fLaC[\0\x80]\0\0\x22", data)]
        if len(begins) > MAX_CHUNKS:
            raise AudioError(f"contains more than {MAX_CHUNKS} flac files: cut it into several files")
        position += step - 7 if len(data) == step else step
    return [
        Part(View(file, [range(first, last)]), "flac") for first, last in itertools.pairwise([*begins, size])
    ]


def _kind(magic: bytes) -> _Chunks | None:
    if magic[8:12] == b"WAVE":
        return {b"RIFF": _WAV, b"RF64": _WAV, b"BW64": _WAV, b"RIFX": _RIFX}.get(magic[:4])
    if magic[:4] == b"FORM" and magic[8:12] in (b"AIFF", b"AIFC"):
        return _AIFF
    return {b"caff": _CAF, b"riff": _W64}.get(magic[:4])


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    """Bytes at a position that the file declares, which may be invalid."""
    if not 0 <= position <= FARTHEST or count <= 0:
        return b""
    file.seek(position)
    return file.read(count)


def _walk(file: BinaryIO, size: int, kind: _Chunks) -> Iterator[tuple[bytes, int, int]]:
    """The name of each chunk, and the position and declared size of its content."""
    position = kind.begin
    for _ in range(MAX_CHUNKS):
        header = _at(file, position, kind.header)
        if len(header) < kind.header:
            return
        (length,) = struct.unpack_from(kind.size, header, kind.name)
        if kind.includes_header:
            length = max(0, length - kind.header)
        yield header[: kind.name], position + kind.header, length
        end = position + kind.header + length
        position = -(-end // kind.align) * kind.align
        if position >= size:
            return
    raise AudioError(f"no sound in its first {MAX_CHUNKS} chunks, expected a '{_text(kind.sound)}' chunk")


def _text(name: bytes) -> str:
    return name[:4].decode("ascii")


def _chunked(file: BinaryIO, size: int, kind: _Chunks) -> Part:
    """A wav file, or another file of chunks."""
    form, long_size, table = b"", None, None
    for name, position, declared in _walk(file, size, kind):
        if name == kind.form:
            form = _at(file, position, min(declared, 2**16))
        elif name == b"pakt":
            table = position
        elif name == b"ds64" and kind is _WAV:
            long_size = struct.unpack("<8xQ", _at(file, position, 16).ljust(16, b"\0"))[0]
        elif name == kind.sound:
            break
    else:
        return Part(View(file, [range(size)]))
    if long_size is not None and declared == 0xFFFFFFFF:
        declared = long_size
        unknown = _unknown(declared, UNKNOWN_64) or declared == 0xFFFFFFFF
    else:
        long_size = None
        unknown = _unknown(declared, UNKNOWN_64 if kind.size[1] == "Q" else UNKNOWN_32)
    held = max(0, size - position)
    if declared == 0 and _chunk_follows(file, position, size, kind):
        unknown = False  # the file really has no sound
    if unknown and kind is _WAV and (declared == 0 or declared > held):
        held = _without_last_chunks(file, position, size) - position
    length, share, notes = _length(file, kind, position, declared, held, unknown and declared != held)
    end = position + length
    needed = range(size) if kind is _CAF or not form else range(end)  # caf may need data after the sound
    magic = _at(file, 0, 4)
    if kind is _WAV and (declared != length or magic == b"BW64"):
        view = View(file, [_rf64(form, length), range(position, end)])
    elif declared != length:
        at = position - struct.calcsize(kind.size)
        field = struct.pack(kind.size, length + (kind.header if kind.includes_header else 0))
        view = View(file, [range(at), field, range(position, needed.stop)])
    else:
        view = View(file, [needed])
    if kind is _CAF and form[8:12] == b"alac":
        return _alac(file, size, position + length, table, Part(view, "alac", share, notes=notes))
    is_mpeg = kind is _WAV and form[:2] in (b"\x50\0", b"\x55\0", b"\0\x20")
    if is_mpeg and (found := frames.scan(file, position, end, frames.LEAD, padded=False)) is not None:
        return replace(found, share=share, notes=(*notes, *found.notes))
    family = "wav" if kind in (_WAV, _RIFX, _W64) else "chunks"
    return Part(view, family, share, notes=notes)


def _alac(file: BinaryIO, size: int, end: int, table: int | None, part: Part) -> Part:
    """ALAC in CAF, whose sound ends at `end`: its table states the number of samples.

    FFmpeg subtracts the remainder in the table from the last packet, which is already shorter by it.
    """
    for name, position, _ in _walk(file, size, replace(_CAF, begin=end)) if table is None else ():
        if name == b"pakt":
            table = position
            break
    if table is None:
        return part
    valid, _, remainder = struct.unpack(">8xqii", _at(file, table, 24).ljust(24, b"\0"))
    view = part.view.replaced({table + 20: bytes(4)}) if remainder else part.view
    return replace(part, view=view, ends=(valid,) if valid > 0 else ())


def _length(
    file: BinaryIO, kind: _Chunks, position: int, declared: int, held: int, unknown: bool
) -> tuple[int, float, tuple[str, ...]]:
    """The bytes of sound to read, their share of the declared bytes, and notes."""
    if unknown and (declared == 0 or declared > held):
        if declared and held > AMBIGUOUS:
            return (
                held,
                1.0,
                (f"its header declares {declared} bytes of sound, but it contains {held}; reading all",),
            )
        return held, 1.0, ()
    if declared > held:
        return held, held / declared, ()
    wraps = (held - declared) // WRAP if kind is _WAV else 0
    end = position + declared
    if wraps and not _chunk_follows(file, end + end % 2, position + held, kind):
        length = declared + wraps * WRAP
        return (
            length,
            1.0,
            (f"its header declares {declared} bytes of sound; reading {length}: the size wrapped at 4 GiB",),
        )
    return declared, 1.0, ()


def _unknown(declared: int, limit: int) -> bool:
    return declared == 0 or declared >= limit


def _chunk_follows(file: BinaryIO, position: int, size: int, kind: _Chunks) -> bool:
    """Whether the file ends here, or a chunk begins that fits into it."""
    header = _at(file, position, kind.header)
    if len(header) < kind.header:
        return not header
    (length,) = struct.unpack_from(kind.size, header, kind.name)
    printable = all(32 <= byte < 127 for byte in header[:4])
    return printable and length <= size - position - (0 if kind.includes_header else kind.header)


def _without_last_chunks(file: BinaryIO, position: int, size: int) -> int:
    """The end of sound of unknown size that begins at `position`: before the last chunks of the file."""
    begin = max(position, size - MAX_LAST)
    data = _at(file, begin, size - begin)
    end = len(data)
    for found in reversed([*_LAST_CHUNKS.finditer(data)]):
        (length,) = struct.unpack_from("<I", found[0], 4)
        if end - found.end() in (length, length + length % 2):
            end = found.start()
    return begin + end


def _rf64(form: bytes, length: int) -> bytes:
    """The header of a wav file of any length, up to its first sample."""
    form_chunk = b"fmt " + struct.pack("<I", len(form)) + form + b"\0" * (len(form) % 2)
    sizes = struct.pack("<QQQI", 4 + 36 + len(form_chunk) + 8 + length, length, 0, 0)
    return (
        b"RF64\xff\xff\xff\xffWAVEds64"
        + struct.pack("<I", len(sizes))
        + sizes
        + form_chunk
        + b"data\xff\xff\xff\xff"
    )


def _avi(file: BinaryIO, size: int) -> Part:
    """An avi file, with the headers of its chunks restored from its index.

    A decoder counts chunks: if the header of one is damaged, later sound would come too early.
    """
    (length,) = struct.unpack("<4xI", _at(file, 0, 8))
    movie = index = None
    ends: tuple[float | None, ...] = ()
    for name, position, declared in _walk(file, size, _AVI):
        if name == b"LIST" and _at(file, position, 4) == b"hdrl":
            ends = tuple(_declared_streams(_at(file, position + 4, min(declared, 2**20))))
        if name == b"LIST" and _at(file, position, 4) == _AVI.sound:
            movie = range(position, position + declared)
        elif name == b"idx1" and movie:
            index = _at(file, position, min(declared, 16 * MAX_INDEX))
            break
        elif movie and position > movie.stop + 2**16:
            break
    share = min(1.0, size / (8 + length)) if length < UNKNOWN_32 else 1.0
    view = View(file, [range(size)])
    if movie is None or not index:
        return Part(view, "avi", ends=ends, cut=share < 1)
    chunks, is_damaged = _indexed(file, movie, index)
    complete = bool(chunks) and len(chunks) == len(index) // 16 and movie.stop - chunks[-1].end < BETWEEN
    sound = [chunk for chunk in chunks if chunk.header[2:4] == b"wb"]
    if complete and len({chunk.header[:2] for chunk in sound}) == 1:
        together = View(file, [range(chunk.at + 8, chunk.end) for chunk in sound])
        found = frames.scan(io.BufferedReader(together), 0, together.size)
        if found is not None:
            return replace(found, share=share)
    headers = {chunk.at: chunk.header for chunk in chunks if chunk.damaged}
    notes = ("its index is damaged, so some sound may be missing",) if is_damaged else ()
    return Part(view.replaced(headers), "avi", ends=ends, cut=share < 1, notes=notes)


def _declared_streams(headers: bytes) -> Iterator[float | None]:
    """The length in seconds that an avi file declares for each audio stream; None if it does not."""
    for found in re.finditer(b"strh", headers):
        if headers[found.end() + 4 : found.end() + 8] != b"auds" or len(headers) < found.end() + 40:
            continue
        scale, rate, begin, length = struct.unpack_from("<4I", headers, found.end() + 24)
        yield (begin + length) * scale / rate if rate and 0 < length < UNKNOWN_32 else None


class _Indexed(NamedTuple):
    """A chunk listed in the index of an avi file."""

    header: bytes
    at: int
    end: int
    damaged: bool  # the header in the file differs


def _indexed(file: BinaryIO, movie: range, index: bytes) -> tuple[list[_Indexed], bool]:
    """The chunks of an avi file, none if the index is of another kind; and whether it is damaged."""
    entries = [*struct.iter_unpack("<4sIII", index[: len(index) // 16 * 16])]
    if not entries:
        return [], False
    for base in (movie.start, 0):  # offsets are relative to the list, or to the beginning of the file
        chunks, wrong = [], 0
        ends = [base + offset for _, _, offset, _ in entries[1:]] + [movie.stop]
        for (name, _, offset, length), next_at in zip(entries, ends, strict=True):
            at, header = base + offset, name + struct.pack("<I", length)
            end = at + 8 + length
            if at in movie and end <= next_at <= end + BETWEEN:
                chunks.append(_Indexed(header, at, end, _at(file, at, 8) != header))
            else:
                wrong += at not in movie or _at(file, at, 8) != header
        if chunks and sum(chunk.damaged for chunk in chunks) <= len(chunks) * MAX_DAMAGED:
            return chunks, 0 < wrong < len(entries) / 2
    return [], False


def _asf(file: BinaryIO, size: int) -> Part:
    """An asf file (wma, wmv), with the duration and size from its properties.

    Decoders derive the duration from the size of the file. In a recorded live stream, neither is known.
    """
    whole = View(file, [range(size)])
    length, count = struct.unpack("<QI", _at(file, 16, 12).ljust(12, b"\0"))
    position, duration, is_sent = 30, None, False
    for _ in range(min(count, MAX_CHUNKS)):
        header = _at(file, position, 24).ljust(24, b"\0")
        (inside,) = struct.unpack_from("<Q", header, 16)
        if header[:16] == _ASF_PROPERTIES:
            ticks, _, preroll, flags = struct.unpack("<QQQI", _at(file, position + 64, 28).ljust(28, b"\0"))
            is_sent = bool(flags & 1)
            duration = ticks / 1e7 - preroll / 1e3
        if inside < 24 or position + inside >= length:
            break
        position += inside
    header = _at(file, length, 24).ljust(24, b"\0")
    (inside,) = struct.unpack_from("<Q", header, 16)
    is_known = not is_sent and duration is not None and duration > 0
    cut = not is_sent and header[:16] == _ASF_DATA and length + inside > size
    return Part(whole, "asf", duration=duration if is_known else None, cut=cut)


def _share(chunks: Iterator[tuple[Any, int, int]], sounds: set[Any], size: int) -> float:
    """The share of the declared sound in the file, from the name, position and size of its chunks."""
    held = declared = 0
    for name, position, length in chunks:
        if name in sounds:
            declared += length
            held += min(length, max(0, size - position))
    return held / declared if declared else 1.0


def _voice_blocks(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """The kind, position and declared size of each block of a VOC file."""
    position = int.from_bytes(_at(file, 20, 2), "little")
    for _ in range(MAX_CHUNKS):
        header = _at(file, position, 4)
        if len(header) < 4 or not header[0]:  # 0 ends the file
            return
        length = int.from_bytes(header[1:], "little")
        yield header[0], position + 4, length
        position += 4 + length
        if position >= size:
            return


def _au(file: BinaryIO, size: int) -> Part:
    magic = _at(file, 0, 12)
    order = ">" if magic[:4] == b".snd" else "<"
    begin, declared = struct.unpack(order + "4xII", magic.ljust(12, b"\0"))
    held = max(0, size - begin)
    unknown = _unknown(declared, UNKNOWN_32) and declared != held
    length, share, notes = _length(file, _AIFF, begin, declared, held, unknown)
    field = struct.pack(order + "I", min(length, 0xFFFFFFFF))
    pieces: list[range | bytes] = [range(8), field, range(12, begin + length)]
    return Part(View(file, pieces if length != declared else [range(size)]), "chunks", share, notes=notes)


def _mp4(file: BinaryIO, size: int) -> Part:
    """An mp4 or mov file.

    The table in its header lists all sound, unless it consists of fragments. A decoder of fragments reads
    from box to box, stops where it finds none, and uses what it has found as the declared length.
    """
    whole = View(file, [range(size)])
    position, end = 0, 0
    is_fragmented, duration = False, None
    for _ in range(MAX_BOXES):
        header = _at(file, position, 16)
        length, name = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1 and len(header) == 16:
            (length,) = struct.unpack_from(">Q", header, 8)
        if length < 8 or len(header) < 8:
            is_last = len(header) < 8 or (not length and _is_name(name))  # 0: to the end of the file
            stops = not is_last and not _is_zeros(file, position, size)
            break
        is_fragmented = is_fragmented or name == b"moof"
        if not is_fragmented and not _is_name(name):
            return Part(whole, "mp4")
        if name == b"moov":
            duration = _movie_duration(file, position + (16 if header[:4] == b"\0\0\0\1" else 8), length)
        if name == b"sidx":
            end = max(end, _indexed_end(_at(file, position, min(length, 2**20)), position + length))
        position += length
        if position >= size:
            is_tag = header[:3] == b"TAG" or header[:8] == b"APETAGEX"
            stops = position > size and name != b"mdat" and not is_tag
            break
    else:
        raise AudioError(f"expected a sound file, found more than {MAX_BOXES} mp4 boxes")
    if is_fragmented:  # there are no edits, so a gap between timestamps is a hole
        # If one index lists all fragments, a decoder finds those after the damage.
        indexed = position < end <= size and _at(file, end, 8)[4:] in (b"", b"mfra")
        ended = name == b"mdat" and position > size
        return Part(
            whole,
            "fragments",
            duration=duration,
            stops=end > size or (stops and not indexed),
            notes=("its last fragment is incomplete, so its end may be missing",) if ended else (),
        )
    return Part(whole, "mp4", cut=position > size)


def _movie_duration(file: BinaryIO, position: int, length: int) -> float | None:
    """The duration in seconds that an mp4 file's header declares, with fragments; None if it does not."""
    rate, ticks = 0, 0
    for name, begin in [*_boxes(file, range(position, position + length))]:
        content = _at(file, begin, 36)
        wide = content[:1] == b"\1"
        if name == b"mvhd" and len(content) == 36:
            rate, ticks = struct.unpack_from(">IQ" if wide else ">II", content, 20 if wide else 12)
            ticks = 0 if ticks >= (2**64 if wide else 2**32) - 1 else ticks
        elif name == b"mehd" and len(content) == 36:
            (ticks,) = struct.unpack_from(">Q" if wide else ">I", content, 4)
    return ticks / rate if rate and ticks else None


def _boxes(file: BinaryIO, inside: range) -> Iterator[tuple[bytes, int]]:
    """The name and content position of each box inside another box, including those inside its "mvex"."""
    position = inside.start
    for _ in range(MAX_CHUNKS):
        header = _at(file, position, 8)
        length, name = int.from_bytes(header[:4], "big"), header[4:]
        if length < 8 or position + length > inside.stop:
            return
        yield name, position + 8
        position += 8 if name == b"mvex" else length


def _is_name(name: bytes) -> bool:
    return all(32 <= byte < 127 or byte == 0xA9 for byte in name)


def _is_zeros(file: BinaryIO, position: int, size: int) -> bool:
    """Whether the rest of the file is zeros, as far as 1 MiB shows."""
    rest = _at(file, position, min(size - position, 2**20))
    return rest.count(0) == len(rest)


def _indexed_end(box: bytes, end: int) -> int:
    """The end of the last fragment listed in an index (sidx), which itself ends at `end`."""
    at = 8 if int.from_bytes(box[:4], "big") != 1 else 16
    wide = box[at : at + 1] != b"\0"
    at += 16 if not wide else 20  # version, track, scale and first time; then the first offset
    offset = int.from_bytes(box[at : at + (8 if wide else 4)], "big")
    at += (8 if wide else 4) + 2
    count = int.from_bytes(box[at : at + 2], "big")
    sizes = (
        int.from_bytes(box[i : i + 4], "big") & 0x7FFFFFFF for i in range(at + 2, at + 2 + 12 * count, 12)
    )
    return end + offset + sum(sizes)


_SEGMENT, _CLUSTER, _INFO = 0x18538067, 0x1F43B675, 0x1549A966
_SCALE, _DURATION = 0x2AD7B1, 0x4489
_TRACKS, _TRACK, _TRACK_TYPE, _DELAY, AUDIO_TRACK = 0x1654AE6B, 0xAE, 0x83, 0x56AA, 2


def _matroska(file: BinaryIO, size: int) -> Part:
    """A Matroska or WebM file, with its segment's size and the duration of its longest stream."""
    whole = View(file, [range(size)])
    position, end = 0, size
    cut, duration = False, None
    delays: tuple[float, ...] = ()
    for _ in range(MAX_CHUNKS):
        identifier, content, length = _element(file, position)
        if identifier == _SEGMENT:
            position = content
            if length is not None:
                end, cut = content + length, content + length > size
            continue
        if identifier == _INFO and length is not None:
            duration = _info_duration(_at(file, content, min(length, 2**16)))
        if identifier == _TRACKS and length is not None:
            delays = tuple(_delays(file, range(content, content + length)))
        if identifier in (0, _CLUSTER) or length is None or content + length >= min(end, size):
            break
        position = content + length
    ended = duration is None and not cut and _is_block_cut(file, position, size)
    notes = (INCOMPLETE,) if ended else ()
    return Part(whole, "matroska", duration=duration, delays=delays, begin=position, cut=cut, notes=notes)


def _info_duration(info: bytes) -> float | None:
    """The duration of a segment in seconds."""
    scale, duration = 1_000_000, None
    content = io.BytesIO(info)
    for identifier, begin, length in _elements(content, range(len(info))):
        if identifier == _DURATION and length in (4, 8) and begin + length <= len(info):
            duration = float(struct.unpack_from(">f" if length == 4 else ">d", info, begin)[0])
        elif identifier == _SCALE:
            scale = int.from_bytes(info[begin : begin + length], "big")
    return None if duration is None else duration * scale / 1e9


def _delays(file: BinaryIO, tracks: range) -> Iterator[float]:
    """The encoder delay of each audio track in seconds; timestamps include it, and decoders drop it."""
    for identifier, begin, length in _elements(file, tracks):
        if identifier == _TRACK:
            values = {
                name: int.from_bytes(_at(file, at, count), "big")
                for name, at, count in _elements(file, range(begin, begin + length))
                if name in (_TRACK_TYPE, _DELAY) and count <= 8
            }
            if values.get(_TRACK_TYPE) == AUDIO_TRACK:
                yield values.get(_DELAY, 0) / 1e9


def _elements(file: BinaryIO, inside: range) -> Iterator[tuple[int, int, int]]:
    """The identifier, and the position and size of the content, of each EBML element inside another."""
    position = inside.start
    for _ in range(MAX_CHUNKS):
        identifier, begin, length = _element(file, position)
        if length is None or identifier == 0 or position >= inside.stop:
            return
        yield identifier, begin, length
        position = begin + length


def _is_block_cut(file: BinaryIO, position: int, size: int) -> bool:
    """Whether the last element after this position, such as a live stream's block, ends beyond the file."""
    for _ in range(MAX_BLOCKS):
        identifier, begin, length = _element(file, position)
        if position >= size:
            return position > size
        if identifier == 0:
            return False
        position = begin if length is None or identifier == _CLUSTER else begin + length
    return False


def _element(file: BinaryIO, position: int) -> tuple[int, int, int | None]:
    """An EBML element: its identifier (0 if there is none), and the position and size of its content."""
    header = _at(file, position, 12)
    if not header or header[0] == 0:
        return 0, position, None
    name = 9 - header[0].bit_length()
    if name > 4 or len(header) <= name or header[name] == 0:
        return 0, position, None
    width = 9 - header[name].bit_length()
    value = int.from_bytes(header[name : name + width], "big") & (2 ** (7 * width) - 1)
    known = value != 2 ** (7 * width) - 1 and len(header) >= name + width
    return int.from_bytes(header[:name], "big"), position + name + width, value if known else None
