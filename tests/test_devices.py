"""The choice of a device, out-of-memory errors, and the budget of a GPU."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kmdx import devices
from kmdx.errors import DeviceError, KmdxWarning

GIB = 2**30


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of devices."), True),
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
def test_out_of_memory_errors_are_recognized(error: Exception, expected: bool) -> None:
    assert devices.is_out_of_memory(error) is expected


def test_torchs_out_of_memory_error_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert devices.is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("total", "free", "held", "used", "budget"),
    [
        (24, 20, 0, 0, 11),
        (24, 10, 15, 5, 11),  # by the rest of the program
        (24, 0, 20, 0, 11),  # what this process holds already is its own
        (12, 11.7, 0, 0, 9.6),  # a smaller card
        (12, 11.2, 0, 0, 9.6),  # next to a desktop's windows
        (80, 70, 0, 0, 32),  # a larger card
        (80, 40, 0, 0, 32),  # next to another such process
        (24, 10, 0, 0, 5.5),  # next to another program: half
        (24, 3.2, 0, 0, 2.75),
        (24, 5, 5, 6.5, 2.75),
        (24, 0, 0, 0, 11 / 64),  # the smallest that is tried
    ],
)
def test_the_budget_of_a_gpu_follows_from_its_memory(
    total: float, free: float, held: int, used: int, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, total * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: used * GIB)
    gpu = torch.device("cuda:0")
    assert devices.memory_budget(gpu) == int(budget * GIB)
    assert devices.memory_budget(gpu, used * GIB) >= devices.memory_budget(gpu)
    allowed = 32 if total == 80 else 11
    assert devices.memory_limit(gpu) == (allowed + used) * GIB
    assert devices.memory_limit(gpu, used * GIB) == allowed * GIB


@pytest.mark.parametrize("total", [24, 32, 48, 80, 141])
def test_two_processes_fit_on_a_large_card(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total * GIB, total * GIB))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    assert 11 * GIB <= devices.memory_limit(torch.device("cuda:0")) <= 0.46 * total * GIB


@pytest.mark.parametrize(("total", "part", "budget"), [(80, "0.5", 32), (80, "1", 64), (16, "0.25", 3.2)])
def test_a_process_keeps_to_its_stated_part_of_the_gpu(
    total: int, part: str, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.PART, part)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total * GIB, total * GIB))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    assert devices.memory_budget(torch.device("cuda:0")) == int(budget * GIB)
    assert devices.memory_limit(torch.device("cuda:0")) == float(part) * total * GIB


@pytest.mark.parametrize("part", ["0", "-1", "1.5", "half", "nan"])
def test_a_stated_part_that_is_no_part_is_an_error(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.PART, part)
    with pytest.raises(DeviceError, match=f"above 0 and at most 1, not '{part}'"):
        devices.stated_part()


@pytest.mark.parametrize(
    ("total", "before", "inside"),
    [
        (80 * GIB, 1.0, 11 / 80),
        (8 * GIB, 1.0, 1.0),  # the card itself is smaller
        (80 * GIB, 0.05, 0.05),  # as the program has set it
        (80 * GIB, None, 11 / 80),  # of a torch that does not report it
    ],
)
def test_torch_is_limited_to_the_gpu_budget_temporarily(
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
    with suppress(MemoryError), devices.limited(gpu, 11 * GIB):
        assert fractions[1:] == [inside]
        raise MemoryError
    assert fractions[1:] == [inside, fractions[0]]


def test_other_devices_have_no_limit() -> None:
    assert devices.memory_limit(torch.device("cpu")) is None
    with devices.limited(torch.device("cpu"), None):
        pass


@pytest.mark.parametrize("name", ["cpu", "mps", "meta"])
def test_other_devices_have_no_budget(name: str) -> None:
    assert devices.memory_budget(torch.device(name)) is None


@pytest.mark.parametrize(("name", "times"), [("cuda:0", 1), ("cpu", 0)])
def test_only_a_gpu_has_a_cache_to_empty(name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(name))
    devices.empty_cache(torch.device(name))
    assert len(calls) == times


@pytest.mark.parametrize(("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0)])
def test_a_gpu_name_always_has_its_number(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    assert devices.choose(name) == torch.device("cuda", index)


def test_a_driver_without_cuda_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can use CUDA here")
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path)
    with pytest.warns(KmdxWarning, match="has an NVIDIA driver, but torch .* cannot use CUDA"):
        assert devices.choose("auto") == torch.device("cpu")
