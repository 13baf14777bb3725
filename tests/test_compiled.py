"""The engine whose kernels are made by torch's compiler."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import decibels

from kmdx import Separator, chunking, devices, engines
from kmdx.devices import BatchProfile, NetworkCache, Runner
from kmdx.errors import DeviceError
from kmdx.signals import Signal

CPU = torch.device("cpu")


class Shaper(torch.nn.Module):
    """A network of one activation, because compiling takes long."""

    sources, length = ("bass",), None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(batch)[:, None] * 2

    def narrow(self, sources: Sequence[str]) -> Shaper:
        return self


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("engine", engines.COMPILING)  # on a CPU, torch accepts the option for graphs
def test_a_compiled_network_gives_the_same_estimates(engine: str) -> None:
    networks = {"net": Shaper()}
    windows = torch.randn(2, 2, 50, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = NetworkCache(networks, CPU).runner("net", ["bass"])(windows)
        runner = NetworkCache(networks, CPU, engine=engine).runner("net", ["bass"])
        counts = torch._dynamo.utils.counters
        counts.clear()
        torch._dynamo.reset()
        assert decibels(expected, runner(windows)) > 100
        assert counts["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_the_engine_decides_how_networks_are_compiled(engine: str) -> None:
    options: list[dict[str, Any]] = []

    class Noted(Shaper):
        def compile(self, **given: Any) -> None:
            options.append(given)

    NetworkCache({"net": Noted()}, CPU, engine=engine).runner("net", ["bass"])
    assert len(options) == (engine in ("compiled", "graphs"))
    assert all(each["dynamic"] is False for each in options)
    assert [each["options"] for each in options if "options" in each] == (
        [{"triton.cudagraphs": True}] if engine == "graphs" else []
    )


def test_a_separator_compiles_its_networks(small: Path) -> None:
    assert Separator(small, device="cpu", engine="compiled").cache.engine == "compiled"


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="needs a newer torch"
)
def test_each_of_many_networks_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(Shaper):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch[:, None] * self.weight.sum()

    plain = devices._compiler_options
    monkeypatch.setattr(devices, "_compiler_options", lambda name: {**plain(name), "backend": "eager"})
    cache = NetworkCache({f"net{size}": Layer(size) for size in range(1, 13)}, CPU, engine="compiled")
    counts = torch._dynamo.utils.counters
    counts.clear()
    torch._dynamo.reset()
    with torch.inference_mode():
        for name in cache.networks:
            cache.runner(name, ["bass"])(torch.ones(1, 2, 10))
    assert counts["stats"]["unique_graphs"] == 12


class Static(Shaper):
    """Returns the same memory at each call, as a CUDA graph does; notes the shapes that are compiled."""

    length = None

    def __init__(self, most: int = 100) -> None:
        super().__init__()
        self.most = most
        self.output = torch.empty(100, 1, 2, 10)
        self.shapes: list[tuple[int, int]] = []
        self.plain: list[int] = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.shapes.append((len(batch), batch.shape[-1]))
        if len(batch) > self.most:
            raise torch.OutOfMemoryError
        return self.output[: len(batch)].copy_(3 * batch[:, None])

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.plain.append(batch.shape[-1])
        return 3 * batch[:, None]


def song(network: Static, samples: int, size: int, engine: str = "compiled") -> None:
    """Send a song through a network, and check the result."""
    profile = BatchProfile(sizes=dict.fromkeys(range(1, 11), size))
    signal = torch.arange(2.0 * samples).reshape(2, samples)
    estimate = Signal(torch.full_like(signal, torch.nan))
    chunking.overlap_add(
        Runner(network, CPU, profile, longest=10, engine=engine), Signal(signal), [estimate], 10, 10
    )
    torch.testing.assert_close(estimate.tensor, 3 * signal)


@pytest.mark.parametrize(("windows", "shapes"), [(1, [1]), (3, [5]), (6, [10]), (12, [10, 2]), (15, [10, 5])])
def test_batches_are_filled_up_to_one_of_few_sizes(windows: int, shapes: list[int]) -> None:
    network = Static()
    song(network, 10 * windows, 10)
    assert network.shapes == [(size, 10) for size in shapes]
    assert network.plain == []


def test_other_engines_do_not_fill_batches_up() -> None:
    network = Static()
    song(network, 60, 10, "tuned")
    assert network.shapes == [(6, 10)]


def test_windows_that_are_shorter_than_others_are_not_compiled() -> None:
    network = Static()
    song(network, 37, 4)
    assert network.shapes == [(4, 10)]
    assert network.plain == [7]


@pytest.mark.parametrize("most", [100, 5, 1])
def test_estimates_of_a_graph_outlive_its_next_run(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(len(network.shapes))
    )
    network = Static(most)
    song(network, 230, 10, "graphs")
    assert steps == [*range(len(network.shapes))], "each run begins a step"
    run = Runner(network, CPU, longest=10, engine="graphs")
    first, second = (run(torch.full((1, 2, 10), value)) for value in (1.0, 2.0))
    assert (first.unique().item(), second.unique().item()) == (3, 6)


def test_graphs_need_a_gpu(small: Path) -> None:
    with pytest.raises(DeviceError, match="^engine graphs needs an NVIDIA GPU, but the device is cpu; use "):
        Separator(small, device="cpu", engine="graphs")


@pytest.mark.parametrize(
    ("device", "missing"), [("cpu", "C[+][+] compiler, and none-such"), ("cuda", "triton")]
)
def test_a_missing_compiler_is_one_line(device: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "none-such")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for engine in ("compiled", "graphs") if device == "cuda" else ("compiled",):
        with pytest.raises(DeviceError, match=f"engine {engine} needs (a )?{missing}"):
            engines.check_compiler(engine, device)
    engines.check_compiler("tuned", device)
