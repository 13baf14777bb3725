"""The table alone decides which kernels run, so that the same command gives the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise

from kmdx import Separator
from kmdx.host import Processor
from kmdx.networks import attention, convolution, kernels, product

AVX512 = frozenset({"avx2", "avx512_f", "avx512_bf16"})
AVX2 = frozenset({"avx2"})


@pytest.mark.parametrize(
    ("found", "products", "winograd", "blocks"),
    [
        (Processor("x86_64", "amd", 26, AVX512), True, True, ("fp32", "bf16")),  # Zen 5
        (Processor("x86_64", "amd", 25, AVX512), True, True, ()),  # Zen 4
        (Processor("x86_64", "amd", 25, AVX2), False, True, ()),  # Zen 3
        (Processor("x86_64", "amd", 23, AVX2), False, True, ()),  # Zen 1
        (Processor("x86_64", "amd", 27, AVX512), False, True, ()),  # not known yet
        (Processor("x86_64", "amd", None, AVX512), False, True, ()),
        (Processor("x86_64", "intel", 6, AVX512 | {"amx_bf16"}), False, False, ()),
        (Processor("x86_64", "intel", 6, AVX2), False, True, ()),
        (Processor("x86_64", None, None, AVX2), False, True, ()),
        (Processor("x86_64", "intel", 6, frozenset()), False, False, ()),
        (Processor("arm64", None, None, frozenset({"neon", "bf16"})), False, False, ()),
        (Processor("riscv64", None, None, frozenset()), False, False, ()),
    ],
)
def test_every_processor_has_an_entry(
    found: Processor, products: bool, winograd: bool, blocks: tuple[str, ...]
) -> None:
    entry = kernels.choose(found)
    assert (entry.products, entry.winograd, entry.attention) == (products, winograd, blocks)


def test_entries_state_their_basis_and_the_last_one_is_the_default() -> None:
    *_, last = entries = kernels.table()
    assert len({entry.name for entry in entries}) == len(entries)
    assert all(entry.measured for entry in entries)
    assert (last.architecture, last.vendor, last.family, last.features) == (None, None, None, ())
    assert (last.products, last.winograd, last.attention) == (False, False, ())


def test_a_kernel_in_the_table_runs_only_if_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    zen5 = kernels.choose(Processor("x86_64", "amd", 26, AVX512))
    monkeypatch.setattr(kernels, "here", lambda: zen5)
    for works in (True, False):
        monkeypatch.setattr(product, "onednn_works", lambda works=works: works)
        monkeypatch.setattr(convolution, "winograd_works", lambda works=works: works)
        assert product.onednn_is_used.__wrapped__() is works
        assert convolution.winograd_is_used.__wrapped__() is works
    assert [dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            if attention.blocks_are_used(dtype)] == [torch.bfloat16, torch.float32]  # fmt: skip
    none = kernels.table()[-1]
    monkeypatch.setattr(kernels, "here", lambda: none)
    monkeypatch.setattr(product, "onednn_works", lambda: pytest.fail("it was tried"))
    monkeypatch.setattr(convolution, "winograd_works", lambda: pytest.fail("it was tried"))
    assert not product.onednn_is_used.__wrapped__()
    assert not convolution.winograd_is_used.__wrapped__()


# The same command gives the same bits


def test_kernels_are_never_chosen_by_timing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (kernels.here, product.onednn_is_used, convolution.winograd_is_used):
        cached.cache_clear()
    for clock in ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "process_time"):
        monkeypatch.setattr(time, clock, lambda clock=clock: pytest.fail(f"time.{clock} was asked"))
    stems = Separator(small, device="cpu", stems=["vocals"]).separate(noise(5000), 44100)
    assert stems["vocals"].any()


RERUN = """
import sys, kmdx
separator = kmdx.Separator(sys.argv[1], device="cpu", stems=["vocals", "accompaniment"])
stems, rate = separator.separate_file(sys.argv[2])
sys.stdout.buffer.write(b"".join(stem.tobytes() for stem in stems.values()))
"""


@pytest.mark.slow
def test_another_process_gives_the_same_bits(small: Path, tmp_path: Path) -> None:
    """Also with another hash seed, which changes the order of sets."""
    soundfile.write(tmp_path / "song.wav", noise(8000, 1), 32_000, subtype="FLOAT")
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", RERUN, str(small), str(tmp_path / "song.wav")]
        found.append(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
    assert len(found[0]) == 2 * 8000 * 4
    assert np.frombuffer(found[0], np.float32).any()
    assert found[0] == found[1]
