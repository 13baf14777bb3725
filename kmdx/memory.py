"""Memory of the host and of the device: how much there is, when there is none left, how to keep it warm."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICE_BUDGET = (
    11 * 2**30
)  # bytes of a GPU's memory that are used at most: a 12 GB card, and room for its driver
CARD_SHARE = 0.8  # of a smaller card's memory
FREE_SHARE = 0.9  # of what is free when a song begins
SMALLEST_BUDGET = 2**28  # bytes that are tried whatever is free

OUT_OF_MEMORY = (  # what torch's other errors of memory say
    "allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",  # of cuBLAS and cuFFT
    "ALLOCATION_FAILED",  # of cuDNN, on the device and on the host
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle did not fit
    "valid cuDNN algorithm",  # no algorithm's workspace fitted
    "unable to find an engine",  # the same, of GET and FIND; rarely there really is none
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 2**31 - 1
MMAP_THRESHOLD = 32 * 2**20  # bytes: what glibc itself arrives at once large blocks have been freed;
TRIM_THRESHOLD = 2 * MMAP_THRESHOLD  # with mallopt it stops adapting them, and its first values are far lower


def is_out_of_memory(error: BaseException) -> bool:
    """Tell errors of memory from others; on the CPU torch has no class for them."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def device_budget(device: torch.device, own: int = 0) -> int | None:
    """Bytes of a GPU's memory for the library; None elsewhere.

    It is :data:`DEVICE_BUDGET` or a share of a smaller card, halved until it is free. So what else is on the
    card changes it in steps, and the few megabytes that always come and go do not change which windows are
    computed together. ``own`` bytes of what is allocated are the caller's.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    others = torch.cuda.memory_allocated(device) - own
    available = FREE_SHARE * (free + torch.cuda.memory_reserved(device) - others)
    budget = min(DEVICE_BUDGET, int(CARD_SHARE * total))
    while budget > max(available, SMALLEST_BUDGET):
        budget //= 2
    return budget


def device_limit(device: torch.device, own: int = 0) -> int | None:
    """Bytes of a GPU's memory beyond which nothing may go: :data:`DEVICE_BUDGET`, beside what others use."""
    return DEVICE_BUDGET + torch.cuda.memory_allocated(device) - own if device.type == "cuda" else None


@contextmanager
def limited(device: torch.device, limit: int | None) -> Iterator[None]:
    """Let torch take no more than so many bytes of a GPU's memory, with what it keeps for later.

    Without, it would keep ever more pieces of what was freed on a large GPU. At the limit it gives back what
    it keeps, and where that does not suffice raises the error of memory that it would on a smaller GPU.
    """
    if limit is None:
        yield
        return
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # torch before 2.8
    before = tell(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def empty_cache(device: torch.device) -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def warm_heap() -> Iterator[None]:
    """Let glibc keep large blocks between uses instead of asking the system for fresh pages each time.

    A network makes and frees blocks of hundreds of megabytes; with malloc's defaults every one is a fresh
    mapping whose pages are zeroed when they are first touched. Measured on HDemucs (two cores of an AMD
    EPYC): 4.5 s instead of 5.3 s for ten seconds of signal. Afterwards all is given back, and glibc
    keeps blocks of up to 32 MiB, as it does in any process that has freed some. Works in the main thread,
    and does nothing with another C library.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, KEEP)
    libc.mallopt(M_TRIM_THRESHOLD, KEEP)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
