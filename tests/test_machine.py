"""What machine this is: told on every system, and measured."""

from __future__ import annotations

import mmap
import os
import sys

import pytest
import torch

from kmdx import processor
from kmdx.benchmark import machine

CPU = torch.device("cpu")


def test_the_machine_is_described() -> None:
    here = machine.describe()
    assert here.cpu
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__
    assert here.onnxruntime
    assert (here.gpu, here.gpu_memory, here.compute_capability) == (None, None, None)
    assert here.name.startswith(here.cpu)
    if sys.platform.startswith("linux"):
        assert here.memory
        assert here.memory > 2**28


def test_what_a_system_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: no /proc, no sysconf, no affinity; and a torch that knows nothing of the CPU."""
    monkeypatch.setattr(processor, "field", lambda *_: None)
    monkeypatch.setattr(processor, "capabilities", dict)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    here = machine.describe()
    assert here.cpu
    assert here.cores >= 1
    assert here.memory is None
    assert machine.peak_memory() is None
    assert here.features == ()


@pytest.mark.parametrize(
    ("halves", "expected"),
    [
        ((), ["fp32"]),
        ((torch.bfloat16,), ["fp32", "bf16"]),
        ((torch.bfloat16, torch.float16), ["fp32", "fp16", "bf16"]),
    ],
)
def test_half_precision_is_measured_where_the_device_is_fast_at_it(
    monkeypatch: pytest.MonkeyPatch, halves: tuple[torch.dtype, ...], expected: list[str]
) -> None:
    monkeypatch.setattr(machine, "fast_halves", lambda device: halves)
    monkeypatch.setattr(machine, "CPU_SIZE", 64)
    peaks = machine.peak_gflops()
    assert list(peaks) == expected
    assert all(peak > 0 for peak in peaks.values())


def test_peak_memory_is_that_since_the_last_reset() -> None:
    """The block is a mapping of its own: what malloc gives back, and when, depends on what ran before."""
    if not machine.reset_peaks(CPU):
        pytest.skip("this system does not let a process reset its peak")
    before = machine.peak_memory()
    with mmap.mmap(-1, 2**28) as block:
        for _ in range(2**8):
            block.write(bytes(2**20))
        during = machine.peak_memory()
    assert machine.reset_peaks(CPU)
    after = machine.peak_memory()
    assert before
    assert during
    assert after
    assert during - before > 0.9 * 2**28
    assert after < during - 2**27
    assert machine.peak_device_memory(CPU) is None
