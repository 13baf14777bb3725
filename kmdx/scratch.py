"""Arrays that lie in memory, or beyond a size in scratch files that are mapped into it.

A scratch file has no name and is gone when the last view of its array is, or when the process ends.
It lies in the folder for temporary files: ``$TMPDIR`` where that is set, else the system's choice, such
as ``/tmp``. That should be a disk: where it is kept in memory (tmpfs), nothing is saved.

What is touched of a mapped file counts as resident memory until :func:`release` says that it is not
needed for now. Nothing is lost by it: what was written is read again from the file.
"""

from __future__ import annotations

import errno
import itertools
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError

LIMIT = 2**28  # bytes; a larger array lies in a file: 12.7 min of stereo at 44.1 kHz fit
BLOCK = 2**16  # samples of a long array that are worked on at a time
ROWS = 64  # sources times channels; fewer rows of an array are released one by one

GRAIN = 2**20
"""Bytes: what is released is rounded outwards to these.

A page that is touched brings its neighbours (on Linux 64 KiB) into memory, released ones too.
"""

_mapped: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Scratch files that are in use, by their address."""


def empty(shape: tuple[int, ...], limit: int | None = None) -> NDArray[np.float32]:
    """Make a float32 array whose values are not set, in a scratch file if it is large.

    Parameters
    ----------
    shape : tuple of int
    limit : int, optional
        Bytes beyond which it lies in a file; :data:`LIMIT` if not given.

    Raises
    ------
    AudioError
        If the folder for temporary files has no room for it: now, and not when it is written to.
    """
    size = 4 * math.prod(shape)
    if size <= _limit(limit):
        return np.empty(shape, np.float32)
    with _room_for(size), tempfile.TemporaryFile() as file:
        _reserve(file, size)
        return _map(file, size).reshape(shape)


def join(
    blocks: Iterable[NDArray[np.float32]], limit: int | None = None, *, expected: float = 0
) -> NDArray[np.float32]:
    """Join blocks along their first axis, in a scratch file if they are many; none are ``(0,)``.

    Parameters
    ----------
    blocks : iterable of ndarray
        Float32, alike in their other axes; beyond ``limit``, each is let go before the next is taken.
    limit : int, optional
        Bytes beyond which the array lies in a file; :data:`LIMIT` if not given.
    expected : float
        Bytes that they are expected to be: beyond the limit, not even the first of them are held.

    Raises
    ------
    AudioError
        If the folder for temporary files has no room for it.
    """
    remaining = iter(blocks)
    held: deque[NDArray[np.float32]] = deque()
    size = 0
    for block in remaining:
        held.append(block)
        size += block.nbytes
        if max(size, expected) > _limit(limit):
            break
    else:
        return np.concatenate(list(held)) if held else np.empty(0, np.float32)

    others = held[0].shape[1:]
    with _room_for(size):
        file = tempfile.TemporaryFile()  # noqa: SIM115
    size = 0
    with file:
        for block in itertools.chain(_taken(held), remaining):
            size += block.nbytes
            with _room_for(size):
                file.write(np.ascontiguousarray(block).data)
        with _room_for(size):
            file.flush()
            return _map(file, size).reshape(-1, *others) if size else np.empty((0, *others), np.float32)


def release(array: NDArray[Any]) -> None:
    """Let a scratch array, or a part of one, leave this process's resident memory; others are left alone.

    Its values stay. Any view will do, also one that went through torch.
    """
    if array.size == 0 or (found := _mapping_of(array)) is None:
        return
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        rows = np.moveaxis(array, int(np.argmax(np.abs(array.strides))), 0)
        if len(rows) <= ROWS:
            for row in rows:
                release(row)
            return
    address, mapping = found
    first, end = (place - address for place in _bounds(array))
    begin = first // GRAIN * GRAIN
    end = min(-(-end // GRAIN) * GRAIN, len(mapping))
    if hasattr(mapping, "madvise"):  # Windows has no such call
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def blocks(array: NDArray[Any], length: int = BLOCK) -> Iterator[NDArray[Any]]:
    """Views of ``length`` along the first axis, one behind the other, each released after its use."""
    for begin in range(0, len(array), length):
        block = array[begin : begin + length]
        yield block
        release(block)


def _limit(limit: int | None) -> int:
    return LIMIT if limit is None else limit


def _taken(held: deque[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The blocks of a queue, each let go before the next."""
    while held:
        yield held.popleft()


@contextmanager
def _room_for(size: int) -> Iterator[None]:
    """Say of an error of the system where room for scratch files is wanted, and how much."""
    try:
        yield
    except OSError as error:
        words = error.strerror or str(error)
        folder = tempfile.tempdir or "any folder for temporary files"
        raise AudioError(
            f"{words[:1].lower()}{words[1:]} in {folder}, where at least {size / 1e9:.2f} GB of scratch space"
            " are needed: free some, or set TMPDIR to another folder"
        ) from error


def _reserve(file: IO[bytes], size: int) -> None:
    """Give a file its size and its room on the disk, for want of which a write would end the process."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > free:  # not tried, since it would take all there is from others for a moment
        raise OSError(errno.ENOSPC, f"only {free / 1e9:.2f} GB are free")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(BLOCK)
    for begin in range(0, size, BLOCK):
        file.write(zeros[: size - begin])
    file.flush()


def _map(file: IO[bytes], size: int) -> NDArray[np.float32]:
    mapped = mmap.mmap(file.fileno(), size)
    array = np.frombuffer(mapped, np.float32)
    _mapped[_bounds(array)[0]] = mapped
    return array


def _mapping_of(array: NDArray[Any]) -> tuple[int, mmap.mmap] | None:
    """The address of the scratch file that an array lies in, and its mapping.

    The address tells, since an array that torch made does not say whose memory it has.
    """
    first, end = _bounds(array)
    for reference in _mapped.valuerefs():
        mapping, address = reference(), reference.key
        if mapping is not None and address <= first and end <= address + len(mapping):
            return address, mapping
    return None


def _bounds(array: NDArray[Any]) -> tuple[int, int]:
    """Address of an array's first byte, and of the byte behind its last."""
    first = end = array.__array_interface__["data"][0]
    for length, stride in zip(array.shape, array.strides, strict=True):
        reach = (length - 1) * stride
        first, end = first + min(reach, 0), end + max(reach, 0)
    return first, end + array.itemsize
