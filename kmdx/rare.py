"""Read the declared length of the sound from headers of rare formats that libsndfile supports.

Each function returns the position of the sound and its declared bytes, or None if the file has another
format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from .errors import AudioError
from .parts import Part, View

HEADER = 1024  # bytes
MAX_ELEMENTS = 100  # of a MAT file
SDS_HEADER, SDS_BLOCK, SDS_DATA = 21, 127, 120  # bytes of a sample dump, of a block of it, and of its sound


def inspect(file: BinaryIO, size: int) -> Part | None:
    """The sound of a file in a rare format; None for other formats.

    Raises :class:`AudioError` if blocks are missing that libsndfile would not miss.
    """
    file.seek(0)
    head = file.read(HEADER).ljust(HEADER, b"\0")
    whole = View(file, [range(size)])
    if head[:2] == b"\xf0\x7e" and head[3] == 1:
        _check_dump(head, size)
        return Part(whole, "chunks")
    if head[8:12] == b"\0\2\0\0" and 2 * int.from_bytes(head[:4], "big") + 12 == size:  # HTK
        return Part(whole, "chunks")
    found = _matlab_4(head) or _matlab_5(file, head) or _mpc(head) or _fixed(head)
    if found is None:
        return None
    begin, declared = found
    held = max(0, size - begin)
    return Part(whole, "chunks", share=min(1.0, held / declared) if declared else 1.0)


def _check_dump(head: bytes, size: int) -> None:
    """MIDI Sample Dump Standard: blocks of 120 bytes, each with 7 bits of a sample."""
    width = head[6]
    count = head[10] | head[11] << 7 | head[12] << 14
    in_block = SDS_DATA // max(1, -(-width // 7))
    declared = -(-count // in_block)
    held = max(0, size - SDS_HEADER) // SDS_BLOCK
    if held < declared:
        raise AudioError(
            f"cut short or damaged: found {held} of {declared} declared blocks of sound:"
            " copy or export it again"
        )


def _matlab_4(head: bytes) -> tuple[int, int] | None:
    """MAT 4: one matrix with the rate, and one with the sound."""
    order = "<" if head[4:12] == b"\1\0\0\0\1\0\0\0" else ">"
    if head[20:30] != b"samplerate":
        return None
    (length,) = struct.unpack_from(order + "I", head, 16)
    at = 20 + length + 8
    if at + 20 > len(head):
        return None
    kind, rows, columns, _, length = struct.unpack_from(order + "5I", head, at)
    return at + 20 + length, rows * columns * {0: 8, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}.get(kind // 10 % 10, 1)


def _matlab_5(file: BinaryIO, head: bytes) -> tuple[int, int] | None:
    """MAT 5: a list of elements; the last contains the sound. libsndfile declares 8 bytes too many."""
    if not head.startswith(b"MATLAB 5.0 MAT-file"):
        return None
    last = max(_elements(file, "<" if head[126:128] == b"IM" else ">"), default=None)
    return None if last is None else (last[0], last[1] - 8)


def _elements(file: BinaryIO, order: str) -> Iterator[tuple[int, int]]:
    position = 128
    for _ in range(MAX_ELEMENTS):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return
        _, length = struct.unpack(order + "II", header)
        yield position + 8, length
        position += 8 + length


def _mpc(head: bytes) -> tuple[int, int] | None:
    """The sound of an Akai MPC 2000."""
    if head[:2] != b"\1\4" or head[21] > 1:
        return None
    (count,) = struct.unpack_from("<I", head, 30)
    return 42, 2 * (1 + head[21]) * count


def _fixed(head: bytes) -> tuple[int, int] | None:
    """WVE of the Psion Series 3, AVR of the Atari, XI of FastTracker."""
    if head.startswith(b"ALawSoundFile**\0"):
        return 32, int.from_bytes(head[18:22], "big")
    if head.startswith(b"2BIT"):
        stereo, width = head[12:14] != b"\0\0", int.from_bytes(head[14:16], "big")
        return 128, (1 + stereo) * width // 8 * int.from_bytes(head[26:30], "big")
    if head.startswith(b"Extended Instrument: "):
        return 338, int.from_bytes(head[298:302], "little")  # 0: not declared
    return None
