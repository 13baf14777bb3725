"""The benchmark on small networks: its numbers, its files, its scripts, and what it says of mistakes."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from conftest import decibels, noise
from demucs.htdemucs import HTDemucs

from benchmarks import against_demucs, hour, length, levels, table
from benchmarks import baseline as against_baseline
from kmdx import cli, plan_file
from kmdx.benchmark import baseline, machine, measuring, plain, stand_in, synthetic
from kmdx.benchmark.report import EQUAL, NetworkSpeed
from kmdx.errors import KmdxError
from kmdx.loading import load_network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.separator import Separator

CPU = torch.device("cpu")


class Result(NamedTuple):
    """What a run of the command came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little: what is tested is what becomes of it."""
    monkeypatch.setattr(machine, "CPU_SIZE", 128)
    monkeypatch.setattr(measuring, "BUDGET", 0.0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: Path) -> Run:
    """Run ``kmdx benchmark`` on the small ensemble in this process."""

    def kmdx(*arguments: object, ensemble: object = small) -> Result:
        command = ["kmdx", "benchmark", "-e", ensemble, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return kmdx


def test_everything_is_measured_and_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "peak_memory", lambda: 1234)
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
    assert report["peak_gflops"]["fp32"] > 0
    assert report["machine"]["cores"] >= 1
    network = report["networks"]["htdemucs"]
    assert (network["precision"], network["window_seconds"]) == ("fp32", 0.5)
    assert network["gflops"] is None, "this network's entry does not state it"
    assert network["throughput"] == pytest.approx(0.5 / network["seconds"], rel=1e-2)
    assert network["ratio"] > 0
    assert network["difference"] > 80
    plan = report["plan"]
    assert plan["factor"] == pytest.approx(plan["seconds"] / 0.4, rel=1e-2)
    assert plan["ratio"] == pytest.approx(plan["baseline_seconds"] / plan["seconds"], rel=1e-2)
    assert set(plan["difference"]) == {"bass", "drums", "other", "vocals"}
    assert min(plan["difference"].values()) > 80
    assert plan["peak_memory"] == 1234
    prediction = report["prediction"]
    assert prediction["song_seconds"] == 240
    assert prediction["ratio"] == pytest.approx(network["baseline_seconds"] / network["seconds"], rel=1e-2), (
        "one network: that of its medians"
    )
    assert prediction["ratio"] == pytest.approx(
        prediction["baseline_seconds"] / prediction["seconds"], rel=1e-2
    )
    for shown in ("htdemucs", "0.5 s", "baseline", "the challenge's limit of 1.57 ×"):
        assert shown in result.out

    lines = list(table.plans(table.load(tmp_path)))
    assert len(lines) == 3
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "`small`" in lines[2]
    assert len(list(table.networks(report))) == 3


def test_one_network_without_a_baseline(run: Run, tmp_path: Path) -> None:
    result = run("--network", "htdemucs", "--no-baseline", "--json", tmp_path / "one.json")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "one.json").read_text("utf-8"))
    assert report["plan"] is None
    assert report["prediction"] is None
    assert report["networks"]["htdemucs"]["ratio"] is None
    assert list(table.plans([report]))[2:] == []


def test_stand_ins_need_no_weights(run: Run, small: Path, tmp_path: Path) -> None:
    plan = tmp_path / "small.yaml"
    plan.write_text(small.read_text("utf-8"), "utf-8")
    missing = run("--seconds", 0.2, ensemble=plan)
    assert missing.code == 2
    assert "--stand-in measures without" in missing.err
    result = run("--network", "htdemucs", "--no-baseline", "--stand-in", ensemble=plan)
    assert result.code == 0, result.err
    assert "stand-in weights" in result.out
    assert list(tmp_path.iterdir()) == [plan]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "htdemuc"], "did you mean 'htdemucs'?"),
        (["--seconds", 0], "a song of 0 s: expected"),
        (["--seconds", "nan"], "a song of nan s: expected"),
        (["--device", "cuda:7"], "no device"),
        (["--json", "nowhere/file.json"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: list[object], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    (line,) = (line for line in result.err.splitlines() if line.startswith("error:"))
    assert message in line


def test_the_engine_and_the_baseline_are_measured_in_exact_float32(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    forward = HTDemucs.forward

    def noted(model: HTDemucs, batch: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(model, batch)

    monkeypatch.setattr(HTDemucs, "forward", noted)
    chosen = plan_file.load(small)
    use = chosen.networks["htdemucs"]
    window = torch.from_numpy(noise(use.chunking.length).T.copy())
    engine = measuring.Engine(small, "cpu", "fp32", "leaderboard", None)
    engine.network("htdemucs", ["vocals"]).run(window[None])
    assert seen == [False]
    plain._window(str(small), "cpu", None, "htdemucs", ["vocals"], window[None].numpy())
    assert seen == [False, False]
    baseline.run(chosen, {"htdemucs": load_network(use, chosen.sample_rate, CPU)}, window[:, :1000], CPU)
    assert len(seen) > 2
    assert not any(seen)


def test_arithmetic_is_counted_where_it_is_stated(small: Path) -> None:
    engine = measuring.Engine(small, "cpu", "fp32", "leaderboard", None)
    use = engine.plan.networks["htdemucs"]
    stated = replace(use, weight=replace(use.weight, architecture={**use.weight.architecture, "gflops": 3.0}))
    engine.plan = replace(engine.plan, networks={"htdemucs": stated})
    speed = measuring.compare_network(engine, "htdemucs", {"fp32": 10.0})
    assert speed.gflops == pytest.approx(3.0 * speed.throughput)
    assert speed.peak_share == pytest.approx(speed.gflops / 10.0)


def test_the_prediction_counts_windows_not_the_short_songs_overhead(small: Path) -> None:
    plan = plan_file.load(small)
    how = plan.networks["htdemucs"].chunking
    speed = NetworkSpeed("fp32", 0.5, 1, 0.1, 5.0, None, None, None, None, None)
    prediction = measuring.predict(plan, {"htdemucs": speed}, seconds=100.0)
    assert prediction.seconds == pytest.approx(3 * 0.1 * how.windows(4_410_000)), "three nodes hear with it"
    assert prediction.factor == pytest.approx(prediction.seconds / 100)
    assert prediction.passes == (prediction.factor < 1.57)


def test_differences_have_bounds() -> None:
    song = noise(1000)
    assert measuring.decibels(song, song) == EQUAL
    assert measuring.decibels(song, 0.9 * song) == pytest.approx(20, abs=1e-3)
    assert measuring.decibels(song, np.nan * song) == -EQUAL
    assert measuring.decibels(0 * song, song) == -EQUAL


def test_the_synthetic_song_is_the_same_each_time_and_as_long_as_asked() -> None:
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


def test_a_stand_in_graph_is_the_network_at_its_full_length(stood_in: Path) -> None:
    """It is traced with few frames."""
    plan = plan_file.load(stood_in)
    use = plan.networks["mdx_vocals"]
    network = load_network(use, plan.sample_rate, CPU)
    assert isinstance(network, OnnxNetwork)
    heard = torch.from_numpy(noise(use.chunking.length).T.copy())[None]
    with torch.no_grad():
        unet = stand_in._unet({**use.weight.architecture, "norm_groups": None}, "mdx_vocals")
        assert decibels(unet(heard), network(heard)) > 90


def test_the_script_for_one_song(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "song.wav", noise(20_000, 1), 22_050)
    against_baseline.main(
        [str(tmp_path / "song.wav"), "--ensemble", str(small), "--seconds", "0.3", "--precision", "fp32"]
    )
    first, *stems = capsys.readouterr().out.splitlines()
    assert "small on cpu, fp32, 0.3 s of song" in first
    assert [line.split()[0] for line in stems] == ["bass", "drums", "other", "vocals"]
    assert all(float(line.split()[1]) > 80 for line in stems)


def test_the_table_says_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(KmdxError, match="no reports in"):
        table.load(tmp_path)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(KmdxError, match=r"other.json is no report"):
        table.load(tmp_path)


def test_the_committed_results_stand_in_the_readme() -> None:
    rows = [*table.plans(table.load(table.RESULTS))]
    shown = Path(table.__file__).parents[1].joinpath("README.md").read_text("utf-8").splitlines()
    assert len(rows) > 2
    assert [row for row in rows if row not in shown] == []


def test_cost_by_length_is_fitted_and_drawn() -> None:
    costs = [
        length.Cost(seconds, 0.5 * seconds**1.02, 400_000_000 + 1000 * seconds) for seconds in length.LENGTHS
    ]
    power, factor = length.exponent(costs)
    assert (power, factor) == (pytest.approx(1.02), pytest.approx(0.5))
    root = xml.etree.ElementTree.fromstring(length.svg(costs))
    assert len(root.findall(".//{*}circle")) == 2 * len(costs)
    plan_file.parse(length.PLAN, "small")


def test_a_long_song_is_as_its_pieces(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hour, "WINDOWS", 8)
    song = tmp_path / "song.wav"
    soundfile.write(tmp_path / "part.wav", 0.1 + 0.3 * noise(44_100), 44100)
    hour.write(song, [tmp_path / "part.wav"], 1_500_000)
    monkeypatch.setattr(sys, "argv", [])
    seconds, peak = length.separate(song, tmp_path, str(small), *hour.OPTIONS)
    assert seconds > 0
    assert peak <= (machine.peak_memory() or 0)
    separator = Separator(small, device="cpu", speed="fast")
    _, middle, _ = hour.pieces(separator.plan, 1_500_000)
    assert max(hour.compare(song, tmp_path, separator).values()) < 1e-6

    stem = tmp_path / "song" / "bass.wav"
    samples, rate = soundfile.read(stem, dtype="float32")
    samples[(middle.first + middle.last) // 2] += 0.01
    soundfile.write(stem, samples, rate, "FLOAT")
    found = hour.compare(song, tmp_path, separator)
    assert found["bass"] == pytest.approx(0.01, rel=0.01)
    assert found["drums"] < 1e-6


def test_stages_hear_what_is_left() -> None:
    song = noise(100)
    stems = {"vocals": 0.5 * song, "drums": 0.25 * song, "bass": 0 * song}
    heard = against_demucs.stages_of(song, stems)
    assert list(heard) == ["song", "without_vocals", "nor_drums"]
    assert decibels(0.25 * song, heard["nor_drums"]) > 100


def test_the_script_for_speed_levels(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, stem in enumerate(("mixture", "bass", "drums", "other", "vocals")):
        (tmp_path / "song").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "song" / f"{stem}.wav", noise(40_000, seed=number), 44100)
    levels.measure(small, tmp_path, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["leaderboard", "balanced", "fast"]
    assert lines[0].count("(+0.00)") == 4
    written = plan_file.load(levels.overlapping("htdemucs", 0.85, tmp_path))
    published = plan_file.load("htdemucs")
    assert written.networks["htdemucs"].chunking == replace(
        published.networks["htdemucs"].chunking, overlap=0.85
    )
    assert (written.nodes, written.stems) == (published.nodes, published.stems)
    with pytest.raises(KmdxError, match="no song folders"):
        levels.measure(small, tmp_path / "song" / "none", None)
