"""The engine whose kernels are made by torch's compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import decibels

from kmdx import Separator, engines
from kmdx.devices import NetworkCache
from kmdx.errors import DeviceError

CPU = torch.device("cpu")


class Shaper(torch.nn.Module):
    """A network of one activation, because compiling takes long."""

    sources, length = ("bass",), None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(batch)[:, None] * 2

    def narrow(self, sources: Sequence[str]) -> Shaper:
        return self


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_a_compiled_network_gives_the_same_estimates() -> None:
    networks = {"net": Shaper()}
    windows = torch.randn(2, 2, 50, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = NetworkCache(networks, CPU).runner("net", ["bass"])(windows)
        runner = NetworkCache(networks, CPU, is_compiled=True).runner("net", ["bass"])
        counts = torch._dynamo.utils.counters
        counts.clear()
        assert decibels(expected, runner(windows)) > 100
        assert counts["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(("engine", "compiled"), [("compiled", True), ("plain", False)])
def test_the_engine_decides_whether_networks_are_compiled(small: Path, engine: str, compiled: bool) -> None:
    assert Separator(small, device="cpu", engine=engine).cache.is_compiled == compiled


@pytest.mark.parametrize(
    ("device", "missing"), [("cpu", "C[+][+] compiler, and none-such"), ("cuda", "triton")]
)
def test_a_missing_compiler_is_one_line(device: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "none-such")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=f"engine compiled needs (a )?{missing}"):
        engines.check_compiler("compiled", device)
    engines.check_compiler("tuned", device)
