"""Errors of memory told from others, the budget of a device, and a heap that keeps its blocks."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from kmdx import memory

GIB = 2**30


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_errors_of_memory(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected


def test_torchs_own_error_of_memory_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("total", "free", "held", "used", "budget"),
    [
        (80, 70, 0, 0, 11),
        (80, 50, 20, 15, 11),  # by the rest of the program
        (80, 0, 20, 0, 11),  # what this process holds already is its own
        (12, 11.7, 0, 0, 9.6),  # a smaller card
        (12, 11.2, 0, 0, 9.6),  # beside a desktop's windows
        (80, 10, 0, 0, 5.5),  # beside another program: half
        (80, 3.2, 0, 0, 2.75),
        (80, 20, 20, 35, 2.75),
        (80, 0, 0, 0, 11 / 64),  # the smallest that is tried
    ],
)
def test_the_budget_of_a_gpu(
    total: float, free: float, held: int, used: int, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, total * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: used * GIB)
    gpu = torch.device("cuda:0")
    assert memory.device_budget(gpu) == int(budget * GIB)
    assert memory.device_budget(gpu, used * GIB) >= memory.device_budget(gpu)
    assert memory.device_limit(gpu) == memory.DEVICE_BUDGET + used * GIB
    assert memory.device_limit(gpu, used * GIB) == memory.DEVICE_BUDGET


@pytest.mark.parametrize(
    ("total", "before", "inside"),
    [
        (80 * GIB, 1.0, 11 / 80),
        (8 * GIB, 1.0, 1.0),  # the card itself is smaller
        (80 * GIB, 0.05, 0.05),  # as the program has set it
        (80 * GIB, None, 11 / 80),  # of a torch that does not tell
    ],
)
def test_torch_is_held_to_a_gpus_limit_for_a_while(
    total: int, before: float | None, inside: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda:0")
    fractions = [1.0 if before is None else before]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, _: fractions.append(part))
    tell = "get_per_process_memory_fraction"
    if before is None:
        monkeypatch.delattr(torch.cuda, tell, raising=False)
    else:
        monkeypatch.setattr(torch.cuda, tell, lambda device: fractions[-1], raising=False)
    with suppress(MemoryError), memory.limited(gpu, 11 * GIB):
        assert fractions[1:] == [inside]
        raise MemoryError
    assert fractions[1:] == [inside, fractions[0]]


def test_other_devices_have_no_limit() -> None:
    assert memory.device_limit(torch.device("cpu")) is None
    with memory.limited(torch.device("cpu"), None):
        pass


@pytest.mark.parametrize("name", ["cpu", "mps", "meta"])
def test_other_devices_have_no_budget(name: str) -> None:
    assert memory.device_budget(torch.device(name)) is None


@pytest.mark.parametrize(("name", "times"), [("cuda:0", 1), ("cpu", 0)])
def test_only_a_gpu_has_a_cache_to_empty(name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(name))
    memory.empty_cache(torch.device(name))
    assert len(calls) == times


# The heap


class Libc:
    """Notes what malloc is told."""

    def __init__(self) -> None:
        self.options: dict[int, int] = {}
        self.trims: list[dict[int, int]] = []

    def gnu_get_libc_version(self) -> bytes:
        return b"2.36"

    def mallopt(self, option: int, value: int) -> int:
        self.options[option] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trims.append(dict(self.options))
        return 1


KEPT = {-1: 2**31 - 1, -3: 2**31 - 1}  # trim and mmap thresholds
DEFAULT = {
    memory.M_MMAP_THRESHOLD: 32 * 2**20,
    memory.M_TRIM_THRESHOLD: 64 * 2**20,
}  # what malloc adapts itself to


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_the_heap_keeps_its_blocks_for_a_while_only(
    error: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)

    def work() -> None:
        with memory.warm_heap():
            assert libc.options == KEPT
            assert not libc.trims
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)) as caught:
            work()
        assert caught.value is error
    assert libc.options == DEFAULT
    assert libc.trims == [DEFAULT], "given back once, when blocks are no longer kept"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_another_c_library_is_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    musl = SimpleNamespace(malloc_trim=calls.append, mallopt=lambda *_: calls.append(_))
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "linux":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: musl)
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("there is none"))
    with memory.warm_heap():
        pass
    assert not calls
    with pytest.raises(RuntimeError, match="passed on"), memory.warm_heap():
        raise RuntimeError("passed on")


MALLOC = """
import ctypes
from kmdx import memory

libc = memory._glibc()
if libc is None or not libc.mallopt(memory.M_MMAP_THRESHOLD, memory.KEEP):
    raise SystemExit("no glibc, or one that takes no such threshold")
libc.mallopt(memory.M_MMAP_THRESHOLD, 128 * 1024)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]

def is_mapping(size):
    block = libc.malloc(size)
    # A bit before the block tells whether the system was asked for fresh pages.
    before = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    libc.free(block)
    return bool(before & 2)

print(is_mapping(2**26))
with memory.warm_heap():
    print(is_mapping(2**26))
print(is_mapping(2**26), is_mapping(2**24))
"""


def test_glibc_does_as_it_is_told() -> None:
    """In a process of its own: after an error of memory, malloc turns away from the heap for good."""
    run = subprocess.run([sys.executable, "-c", MALLOC], capture_output=True, text=True)
    if "no glibc" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.stdout.split() == ["True", "False", "True", "False"], run.stderr
