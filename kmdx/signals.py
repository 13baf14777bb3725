"""Signals of any length: on a device, in memory, or in memory-mapped scratch files if they are large.

Networks and ensembles work on :class:`Signal`: torch, ``(channels, samples)``. Sound files are read into and
written from numpy arrays, ``(samples, channels)``; :func:`empty`, :func:`join` and :func:`blocks` handle
these without importing torch.

A scratch file has no name. It is deleted with the last view of its array, or when the process ends. It is in
the folder for temporary files: ``$TMPDIR`` if set, else the system's default, such as ``/tmp``. This folder
should be on a disk; a folder in memory (tmpfs) saves nothing. Pages of a mapped file count as resident memory
from their first use until :func:`release`. Releasing loses no values, because the pages are read again.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LIMIT = 2**28  # bytes; a larger array is stored in a file: 12.7 min of stereo at 44.1 kHz fit
BLOCK = 2**16  # samples of a long array processed at a time
ROWS = 64  # sources times channels; up to this number, rows of an array are released one by one

SIGNAL_BLOCK = 2**20  # samples of a signal processed at a time
# The same for a short signal on the CPU: small enough to stay in its cache, and for torch to use one thread.
# On a busy machine, threads that wait for each other need up to 40 ms per operation, and a plan may have
# 2,000 sums.
CACHED_BLOCK = 2**13

GRAIN = 2**20
"""Bytes; a released range is rounded outward to a multiple of this.

Using a page also loads its neighbors (64 KiB on Linux), even if they were released.
"""

_mapped: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Scratch files in use, by address."""


def empty(shape: tuple[int, ...], limit: int | None = None) -> NDArray[np.float32]:
    """Make an uninitialized float32 array, in a scratch file if it is large.

    Raises :class:`AudioError` if the folder for temporary files has no room for it; raised here, not on later
    writes.

    Parameters
    ----------
    limit : int, optional
        Largest size in memory, in bytes; :data:`LIMIT` by default.
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
    """Join blocks along their first axis, in a scratch file if they are large; without blocks, ``(0,)``.

    Raises :class:`AudioError` if the folder for temporary files has no room for it.

    Parameters
    ----------
    blocks : iterable of ndarray
        Float32, of the same shape except for the first axis. Beyond ``limit``, each is freed before the next.
    limit : int, optional
        Largest size in memory, in bytes; :data:`LIMIT` by default.
    expected : float
        Expected size in bytes; if it is above the limit, even the first blocks are written to the file.
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
        for block in itertools.chain(_drain(held), remaining):
            size += block.nbytes
            with _room_for(size):
                file.write(np.ascontiguousarray(block).data)
        with _room_for(size):
            file.flush()
            return _map(file, size).reshape(-1, *others) if size else np.empty((0, *others), np.float32)


def release(array: NDArray[Any]) -> None:
    """Remove a scratch array, or part of one, from resident memory; other arrays are not affected.

    Its values are kept. ``array`` may be any view, even one that came from torch.
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
    if hasattr(mapping, "madvise"):  # not on Windows
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def blocks(array: NDArray[Any], length: int | None = None) -> Iterator[NDArray[Any]]:
    """Consecutive views along the first axis, by default of :data:`BLOCK`; each is released after its use."""
    length = length or BLOCK
    for begin in range(0, len(array), length):
        block = array[begin : begin + length]
        yield block
        release(block)


@dataclass(frozen=True, eq=False)
class Signal:
    """A signal on a device, in memory, or in a scratch file."""

    tensor: Tensor  # float32 ``(channels, samples)``
    long: bool = False
    """Whether it stays on the CPU, and each block is released after its use. If it is also large for the
    host, it is in a scratch file. Signals made from it behave in the same way."""

    @property
    def length(self) -> int:
        """Samples per channel."""
        return self.tensor.shape[-1]

    @classmethod
    def from_samples(cls, samples: NDArray[np.float32]) -> Signal:
        """A stereo signal from an array ``(samples, channels)``; one channel becomes two equal ones."""
        import torch

        channels = empty((2, len(samples)))
        for target, source in zip(blocks(channels.T), blocks(samples), strict=True):
            target[:] = source
        return cls(torch.from_numpy(channels))

    def to_samples(self, channels: int) -> NDArray[np.float32]:
        """A stereo signal as an array ``(samples, channels)``; for one channel, their mean."""
        from kmdx.transfers import host_blocks

        samples = empty((self.length, channels))
        step = BLOCK if self.tensor.device.type == "cpu" else SIGNAL_BLOCK
        for target, block in zip(blocks(samples, step), host_blocks(self.tensor, step), strict=True):
            source = block.numpy().T
            target[:] = source if channels == 2 else source.mean(1, keepdims=True)
            release(source)
        return samples

    def to(self, device: torch.device, limit: float | None = None) -> Signal:
        """The signal on a device, or a long signal if it is larger than ``limit`` or :data:`LIMIT`."""
        if self.tensor.nbytes > (LIMIT if limit is None else min(LIMIT, limit)):
            return Signal(self.tensor, long=True)
        return Signal(self.tensor.to(device))

    def new_empty(self) -> Signal:
        """An uninitialized signal of the same shape, stored in the same way."""
        import torch

        if self.long:
            return Signal(torch.from_numpy(empty(tuple(self.tensor.shape))), long=True)
        return Signal(torch.empty(self.tensor.shape, device=self.tensor.device))

    def new_zeros(self) -> Signal:
        """Silence of the same shape, stored in the same way."""
        silence = self.new_empty()
        for block in silence.blocks():
            block.zero_()
        return silence

    def span(self, first: int, end: int, device: torch.device) -> Tensor:
        """Samples ``first`` to ``end`` on a device, ``(channels, end - first)``, zero outside the signal."""
        import torch

        from kmdx.transfers import to_device

        inside = to_device(self.tensor[:, max(first, 0) : min(end, self.length)], device)
        return torch.nn.functional.pad(inside, (max(-first, 0), max(end - self.length, 0)))

    def put(self, start: int, values: Tensor) -> None:
        """Write ``(channels, n)``, beginning at sample ``start``."""
        from kmdx.transfers import host_blocks

        is_here = values.device == self.tensor.device
        for block in [values] if is_here else host_blocks(values, SIGNAL_BLOCK):
            self.tensor[:, start : start + block.shape[-1]] = block
            start += block.shape[-1]

    def add(self, other: Signal) -> None:
        """Add another signal of the same length, in place."""
        for block, part in zip(self.blocks(), other.blocks(), strict=True):
            block.add_(part)

    def scale(self, factor: float) -> None:
        """Multiply all samples by a factor, in place."""
        for block in self.blocks():
            block.mul_(factor)

    def release(self) -> None:
        """Remove it from resident memory if it is in a scratch file."""
        if self.tensor.device.type == "cpu":
            release(self.tensor.numpy())

    def blocks(self, step: int | None = None) -> Iterator[Tensor]:
        """Consecutive views ``(channels, step)``; for a long signal, each is released after its use."""
        step = step or SIGNAL_BLOCK
        for start in range(0, self.length, step):
            block = self.tensor[:, start : start + step]
            yield block
            if self.long:
                release(block.numpy())

    @property
    def _step(self) -> int:
        """Block length for elementwise operations; their result does not depend on it."""
        return CACHED_BLOCK if self.tensor.device.type == "cpu" and not self.long else SIGNAL_BLOCK

    def is_silent(self) -> bool:
        """Whether all samples are zero."""
        return not any(block.any() for block in self.blocks())

    def is_finite(self) -> bool:
        """Whether it contains neither NaN nor infinity."""
        return all(bool(block.isfinite().all()) for block in self.blocks(self._step))

    def peak(self) -> float:
        """The largest absolute sample."""
        return max(block.abs().max().item() for block in self.blocks())

    def level(self, unbiased: bool = True) -> Level:
        """Mean and standard deviation, unbiased or not, of the mono sum.

        If the mono sum is constant, for example because the channels cancel, the deviation is that of both
        channels. A constant signal keeps its level.
        """
        mean, std = self._moments(lambda block: block.mean(0), unbiased)
        if std == 0:
            _, std = self._moments(lambda block: block.flatten(), unbiased)
        return Level(mean, std or 1.0)

    def _moments(self, values: Callable[[Tensor], Tensor], unbiased: bool) -> tuple[float, float]:
        """Mean and standard deviation, which is exactly 0 if all values are equal in float32."""
        import torch

        exact = torch.float32 if self.tensor.device.type == "mps" else torch.float64  # MPS has no float64
        count, total, low, high = 0, 0.0, math.inf, -math.inf
        for block in self.blocks():
            found = values(block)
            count += found.numel()
            total += found.sum(dtype=exact).item()
            low, high = min(low, found.min().item()), max(high, found.max().item())
        mean = total / count
        if low == high:
            return mean, 0.0
        squares = sum((values(block).to(exact) - mean).square().sum().item() for block in self.blocks())
        std = math.sqrt(squares / (count - unbiased))
        return mean, std if std >= torch.finfo(torch.float32).tiny else 0.0


@dataclass(frozen=True)
class Level:
    """The mean and standard deviation with which a signal was normalized."""

    mean: float
    std: float


def combine(function: Callable[..., None], signals: Sequence[Signal]) -> Signal:
    """Make a signal whose samples depend only on the same samples of other signals.

    ``function`` is called for each block with a block of the new signal, to be filled, and the same blocks of
    the others.
    """
    made = signals[0].new_empty()
    step = made._step
    for block, *parts in zip(*(signal.blocks(step) for signal in (made, *signals)), strict=True):
        function(block, *parts)
    return made


def _limit(limit: int | None) -> int:
    return LIMIT if limit is None else limit


def _drain(held: deque[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Remove and yield the blocks of a queue."""
    while held:
        yield held.popleft()


@contextmanager
def _room_for(size: int) -> Iterator[None]:
    """Turn a full disk into an error that names the scratch folder and the space needed."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
        folder = tempfile.tempdir or "any folder for temporary files"
        raise AudioError(
            f"{problem[:1].lower()}{problem[1:]} in {folder}; at least {size / 1e9:.2f} GB of scratch space"
            " are needed: free some, or set TMPDIR to another folder"
        ) from error


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve a file's space on disk; without it, a write to the mapping could kill the process."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > free:  # checked first, because trying would fill the disk for a moment
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
    """The address and mapping of the scratch file that an array is in; None if it is not in one.

    It is found by address, because an array that came from torch does not know the owner of its memory.
    """
    first, end = _bounds(array)
    for reference in _mapped.valuerefs():
        mapping, address = reference(), reference.key
        if mapping is not None and address <= first and end <= address + len(mapping):
            return address, mapping
    return None


def _bounds(array: NDArray[Any]) -> tuple[int, int]:
    """The addresses of an array's first byte, and of the byte after its last."""
    first = end = array.__array_interface__["data"][0]
    for length, stride in zip(array.shape, array.strides, strict=True):
        reach = (length - 1) * stride
        first, end = first + min(reach, 0), end + max(reach, 0)
    return first, end + array.itemsize
