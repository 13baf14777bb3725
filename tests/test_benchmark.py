"""The benchmark on small networks: its numbers, files, scripts and error messages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process
import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import decibels, noise
from in_process import Result

from kmdx import benchmark, cli, host, plan_file, stand_in, synthetic
from kmdx.benchmark import NetworkSpeed
from kmdx.build import load_network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.separator import Separator

CPU = torch.device("cpu")


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little: the tests check how the results are used."""
    monkeypatch.setattr(benchmark, "BUDGET", 0.0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], small: Path) -> Run:
    """Run ``kmdx benchmark`` on the small ensemble in this process."""

    def kmdx(*arguments: object, ensemble: object = small) -> Result:
        command = ["kmdx", "benchmark", "-e", ensemble, "--device", "cpu", *arguments]
        return in_process.run(capsys, cli.main, *command)

    return kmdx


def test_everything_is_measured_and_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "peak_memory", lambda: 1234)
    result = run("--seconds", 0.4, "--precision", "fp32", "--engine", "plain", "--json", tmp_path)
    assert result.code == 0, result.err
    (file,) = tmp_path.glob("*.json")
    assert file.name.endswith("-small-fp32-plain.json")
    assert f"written: {file}" in result.out
    report = json.loads(file.read_text("utf-8"))
    assert report["ensemble"] == "small"
    assert (report["device"], report["precision"], report["speed"]) == ("cpu", "fp32", "leaderboard")
    assert report["engine"] == "plain"
    assert not report["stand_in"]
    assert report["machine"]["cores"] >= 1
    network = report["networks"]["htdemucs"]
    assert (network["precision"], network["window_seconds"]) == ("fp32", 0.5)
    assert network["gflops"] is None, "this network's entry does not state it"
    assert network["throughput"] == pytest.approx(0.5 / network["seconds"], rel=1e-2)
    plan = report["plan"]
    assert plan["factor"] == pytest.approx(plan["seconds"] / 0.4, rel=1e-2)
    assert plan["peak_memory"] == 1234
    assert report["prediction"]["song_seconds"] == 240
    for shown in ("htdemucs", "0.5 s", "× its duration", "a song of 4 minutes: about"):
        assert shown in result.out


def test_one_network_is_measured_without_a_song(run: Run, tmp_path: Path) -> None:
    result = run("--network", "htdemucs", "--json", tmp_path / "one.json")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "one.json").read_text("utf-8"))
    assert list(report["networks"]) == ["htdemucs"]
    assert (report["plan"], report["prediction"]) == (None, None)


def test_networks_are_timed_in_exact_float32(small: Path, tf32: list[bool]) -> None:
    network = benchmark.TimedNetwork(Separator(small, device="cpu", precision="fp32"), "htdemucs")
    assert network.seconds() > 0
    assert network.estimate.shape == (1, len(network.sources), 2, network.window.shape[-1])
    assert tf32 == [False, False]


def test_throughput_is_computed_from_the_stated_gflops(small: Path) -> None:
    separator = Separator(small, device="cpu", precision="fp32")
    use = separator.plan.networks["htdemucs"]
    stated = replace(use, weight=replace(use.weight, architecture={**use.weight.architecture, "gflops": 3.0}))
    separator.plan = replace(separator.plan, networks={"htdemucs": stated})
    speed = benchmark.speed_of(separator, "htdemucs", 1, 0.25)
    assert speed.throughput == pytest.approx(2)
    assert speed.gflops == pytest.approx(6)


def test_the_estimate_counts_windows_not_the_overhead_of_a_short_song(small: Path) -> None:
    plan = plan_file.load(small)
    windows = plan.networks["htdemucs"].chunking.windows(4_410_000)
    speed = NetworkSpeed("fp32", 0.5, 1, 0.1, 5.0, None)
    long = benchmark.predict(plan, {"htdemucs": speed}, seconds=100.0)
    assert long.seconds == pytest.approx(3 * 0.1 * windows), "the network runs three times"
    assert long.factor == pytest.approx(long.seconds / 100)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_machine_is_described(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="A GPU", total_memory=2**34, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    here = benchmark.describe(device)
    assert here.cpu
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__
    assert here.onnxruntime
    if device == "cpu":
        assert (here.gpu, here.gpu_memory, here.compute_capability) == (None, None, None)
        assert here.name.startswith(here.cpu)
    else:
        assert (here.name, here.gpu_memory, here.compute_capability) == ("A GPU", 2**34, "8.9")


def test_facts_that_a_system_does_not_report_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: no /proc, no sysconf, no affinity, and a torch without CPU information."""
    monkeypatch.setattr(host, "field", lambda *_: None)
    monkeypatch.setattr(host, "capabilities", dict)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    here = benchmark.describe()
    assert here.cpu
    assert here.cores >= 1
    assert here.memory is None
    assert host.peak_memory() is None
    assert here.features == ()


def test_stand_ins_need_no_weights(run: Run, small: Path, tmp_path: Path) -> None:
    plan = tmp_path / "small.yaml"
    plan.write_text(small.read_text("utf-8"), "utf-8")
    missing = run("--seconds", 0.2, ensemble=plan)
    assert missing.code == 2
    assert "--stand-in measures with random weights" in missing.err
    result = run("--network", "htdemucs", "--stand-in", ensemble=plan)
    assert result.code == 0, result.err
    assert "stand-in weights" in result.out
    assert list(tmp_path.iterdir()) == [plan]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "htdemuc"], "did you mean 'htdemucs'?"),
        (["--seconds", 0], "song length 0 s: expected"),
        (["--seconds", "nan"], "song length nan s: expected"),
        (["--device", "cuda:7"], "device 'cuda:7' is not available"),
        (["--json", "nowhere/file.json"], "folder nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_errors(run: Run, arguments: list[object], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    (line,) = (line for line in result.err.splitlines() if line.startswith("error:"))
    assert message in line


def test_the_synthetic_song_is_reproducible_and_has_the_requested_length() -> None:
    song = synthetic.song(12.5, 8000)
    assert song.shape == (100_000, 2)
    assert np.array_equal(song[:8000], synthetic.song(1, 8000))
    assert not np.array_equal(song[:8000], synthetic.song(1, 8000, seed=1))
    assert 0.03 < song.std() < 0.2
    assert np.abs(song).max() < 1
    assert not np.array_equal(song[:, 0], song[:, 1])


@pytest.fixture(scope="module")
def stood_in(tmp_path_factory: pytest.TempPathFactory, leaderboard: Path) -> Path:
    """Stand-ins for four networks, one of each kind, whose own weights are not there."""
    folder = tmp_path_factory.mktemp("stood in")
    tree: dict[str, Any] = yaml.safe_load(leaderboard.read_text("utf-8"))
    kinds = ("mdx_vocals", "mdx_drums", "ft_vocals", "extra")
    networks = {name: tree["networks"][name] for name in kinds}
    graph = networks["mdx_vocals"]["weights"]["architecture"]
    graph |= {key: tiny.UNET[key] for key in ("layers", "convolutions", "growth")}
    signals = {f"n{number}": {"network": name, "hears": "mixture"} for number, name in enumerate(kinds)}
    terms = {"n0.vocals": 1, "n1.drums": 1, "n2.vocals": 1, "n3.vocals": 1}
    tree = {"networks": networks, "signals": signals, "stems": {"all": {"sum": terms}}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), "utf-8")
    (folder / "weights").mkdir()
    return stand_in.write(folder / "plan.yaml", folder / "weights")


def test_stand_ins_are_as_loud_as_music(stood_in: Path) -> None:
    plan = plan_file.load(stood_in)
    assert plan.name == "plan"
    for name, use in plan.networks.items():
        network = load_network(use, plan.sample_rate, CPU)
        heard = torch.from_numpy(noise(use.chunking.length).T.copy())[None]
        with torch.no_grad():
            level = (network(heard).std() / heard.std()).item()
        assert 0.2 < level < 1.5, name


def test_a_stand_in_graph_equals_the_network_at_its_full_length(stood_in: Path) -> None:
    """The graph was traced with few frames."""
    plan = plan_file.load(stood_in)
    use = plan.networks["mdx_vocals"]
    network = load_network(use, plan.sample_rate, CPU)
    assert isinstance(network, OnnxNetwork)
    heard = torch.from_numpy(noise(use.chunking.length).T.copy())[None]
    with torch.no_grad():
        unet = stand_in.unet({**use.weight.architecture, "norm_groups": None}, "mdx_vocals")
        assert decibels(unet(heard), network(heard)) > 90
