"""The GPU benchmark: what it prints and sends in, and how it keeps to its time. It runs on the CPU here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import baseline, gpu, table
from benchmarks.gpu import Budget, Measured, Task
from kmdx import benchmark, plan_file, stand_in
from kmdx.errors import DeviceError, PlanError
from kmdx.separator import Separator

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, small: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the benchmark with little work; returns the lines that it prints."""
    monkeypatch.setattr(baseline, "CPU_SIZE", 128)
    monkeypatch.setattr(gpu, "COPIED", 2**20)
    monkeypatch.setattr(gpu, "SONG", 0.3)
    monkeypatch.setattr(gpu, "RUNS", 1)

    def run(*arguments: object) -> list[str]:
        gpu.main([str(small), "--device", "cpu", *map(str, arguments)])
        return capsys.readouterr().out.splitlines()

    return run


def test_the_last_line_is_the_report_and_becomes_a_row_of_the_table(run: Run, tmp_path: Path) -> None:
    lines = run("--json", tmp_path / "card.json", "--engine", "plain")
    report = json.loads(lines[-1])
    assert report == json.loads((tmp_path / "card.json").read_text("utf-8"))
    assert lines[-2].startswith("to share these figures, paste this line into a new issue")
    rows = [*table.plans(table.load(tmp_path))]
    assert len(rows) == 3
    assert all(row in lines for row in rows)
    assert [*table.networks(report)][2].startswith("| `htdemucs` |")
    assert report["peak_gflops"]["fp32"] > 0
    assert report["ensemble"] == "small"
    assert report["stand_in"]
    assert report["engine"] == "plain"
    speed, timed = report["networks"]["htdemucs"], report["gpu"]["measured"]["auto"]
    assert timed["batches"]["htdemucs"]["1"]["ms"] == pytest.approx(1e3 * speed["seconds"], rel=1e-2)
    assert timed["song"]["factor"] == report["plan"]["factor"] > 0
    assert report["gpu"]["copies"]["memory"] > 0


def test_every_part_is_printed_and_those_that_need_a_gpu_are_left_out(run: Run) -> None:
    lines = run()
    for begin in (
        "matrix products, TFLOP/s",
        "copies, GB/s: memory",
        "a song of 0 s in auto: ",
        "HTDemucs (",
    ):
        assert sum(line.startswith(begin) for line in lines) == 1, begin
    assert any(line.startswith("htdemucs in fp32, ms per window: 1 at once ") for line in lines)
    operations = [line.split() for line in lines if line.startswith("  ")]
    assert len(operations) == gpu.SHOWN
    assert any("conv" in line[-1] for line in operations)
    assert lines.count("left out copies from and to the host: the device is cpu") == 1


def test_what_does_not_fit_into_the_time_is_left_out_with_a_reason(run: Run) -> None:
    lines = run("--minutes", 0)
    report = json.loads(lines[-1])
    assert report["networks"] == {}
    assert report["plan"] is None
    assert not any(line.startswith("| ") for line in lines)
    left_out = report["gpu"]["left_out"]
    assert "htdemucs in auto: it may take 0 s, and 0 s are left for it" in left_out
    assert "operations of HTDemucs: it may take 20 s, and 0 s are left for it" in left_out
    assert [f"left out {each}" for each in left_out] == [each for each in lines if each.startswith("left")]


def test_a_part_may_take_a_share_of_the_time_that_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    budget = Budget(1)
    assert budget.allows("all", 50)
    assert not budget.allows("a batch", 50, share=0.1)
    assert budget.allows("a batch", 5, share=0.1)
    assert len(budget.left_out) == 1
    assert "left out a batch: it may take 50 s, and 6 s are left for it" in capsys.readouterr().out


def test_some_networks_are_measured_without_a_song(run: Run) -> None:
    lines = run("--networks", "htdemucs")
    assert not any("a song of" in line for line in lines)
    assert json.loads(lines[-1])["networks"].keys() == {"htdemucs"}
    with pytest.raises(PlanError, match="unknown network 'other' of small"):
        run("--networks", "other")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(small: Path) -> None:
    with pytest.raises(
        DeviceError, match=r"^device 'cuda' is not available .*; use auto, cpu, cuda or cuda:N$"
    ):
        gpu.main([str(small)])


def test_networks_of_the_same_sizes_are_measured_once(
    leaderboard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_file.load(leaderboard)
    names: list[str] = []

    def time_network(separator: Separator, measured: Measured, name: str, budget: Budget) -> None:
        names.append(name)
        measured.networks[name] = benchmark.speed_of(separator, name, 1, len(names))

    monkeypatch.setattr(gpu, "time_network", time_network)
    task = Task(plan, CPU, benchmark.check_networks(plan, ()), False, Budget(10))
    measured, _ = gpu.measure(task, "fp32")
    assert set(measured.networks) == set(plan.networks)
    sizes = {
        name: json.dumps([{**use.weight.architecture, "sources": 0}, use.chunking.length], default=list)
        for name, use in plan.networks.items()
    }
    assert len(names) == len(set(names)) == len(set(sizes.values())) < len(plan.networks)
    for name, speed in measured.networks.items():
        twin = next(other for other in names if sizes[other] == sizes[name])
        assert speed == measured.networks[twin]


def test_batches_grow_up_to_the_engines_own(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmdx.devices.CPU_BATCH", 6)
    monkeypatch.setattr(gpu, "RUNS", 1)
    separator = Separator(stand_in.write(small, tmp_path), device="cpu", precision="fp32")
    measured = Measured(separator.precisions, 0.0)
    gpu.time_network(separator, measured, "htdemucs", Budget(100))
    assert list(measured.batches["htdemucs"]) == [1, 4, 6]
    speed = measured.networks["htdemucs"]
    assert speed.windows_at_once == 6
    assert 1e3 * speed.seconds == pytest.approx(measured.batches["htdemucs"][6]["ms"])


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([5.0, 90.0, 7.0])
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return next(times)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    took = gpu.milliseconds(lambda: calls.append("work"), torch.device("cuda"))
    assert took == 7.0, "the median"
    assert calls == ["work", *["record", "work", "record", "wait"] * 3]
