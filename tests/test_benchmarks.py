"""The scripts behind the figures: what they compute, print and refuse."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import decibels, noise

from benchmarks import against_demucs, baseline, engines, gpu, hour, kernels, length, plain_ensemble, table
from benchmarks.baseline import EQUAL
from kmdx import benchmark, host, plan_file
from kmdx.build import load_network
from kmdx.errors import KmdxError
from kmdx.separator import Separator

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little: the tests check how the results are used."""
    monkeypatch.setattr(baseline, "CPU_SIZE", 128)
    monkeypatch.setattr(benchmark, "BUDGET", 0.0)


def test_a_baseline_is_compared_network_by_network_and_as_a_whole(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline.main(
        [
            "--ensemble",
            str(small),
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--seconds",
            "0.4",
            "--json",
            str(tmp_path),
        ]
    )
    (file,) = tmp_path.glob("*-small-fp32.json")
    report = json.loads(file.read_text("utf-8"))
    assert report["peak_gflops"]["fp32"] > 0
    assert report["digest"] == plan_file.load(small).digest[:16]
    network, plan, prediction = report["networks"]["htdemucs"], report["plan"], report["prediction"]
    assert network["ratio"] > 0
    assert network["difference"] > 80
    assert plan["ratio"] == pytest.approx(plan["baseline_seconds"] / plan["seconds"], rel=1e-2)
    assert set(plan["difference"]) == {"bass", "drums", "other", "vocals"}
    assert min(plan["difference"].values()) > 80
    expected = network["baseline_seconds"] / network["seconds"]
    assert prediction["ratio"] == pytest.approx(expected, rel=1e-2), "there is one network"
    assert prediction["passes"] == (prediction["factor"] < 1.57)

    lines = list(table.plans(table.load(tmp_path)))
    assert len(lines) == 3
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "`small`" in lines[2]
    assert len(list(table.networks(report))) == 3


def test_stand_ins_are_compared_without_weights(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "small.yaml"
    plan.write_text(small.read_text("utf-8"), "utf-8")
    baseline.main(
        ["--ensemble", str(plan), "--device", "cpu", "--precision", "fp32", "--seconds", "0.2", "--stand-in"]
    )
    first, *stems = capsys.readouterr().out.splitlines()
    assert "small on cpu" in first
    assert all(float(line.split()[1]) > 80 for line in stems)
    assert list(tmp_path.iterdir()) == [plan]


def test_the_baseline_computes_in_exact_float32(small: Path, tf32: list[bool]) -> None:
    chosen = plan_file.load(small)
    use = chosen.networks["htdemucs"]
    window = torch.from_numpy(noise(use.chunking.length).T.copy())
    plain_ensemble._window(str(small), "cpu", None, "htdemucs", ["vocals"], window[None].numpy())
    network = load_network(use, chosen.sample_rate, CPU)
    plain_ensemble.run(chosen, {"htdemucs": network}, window[:, :1000], CPU)
    assert len(tf32) > 1
    assert not any(tf32)


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
    monkeypatch.setattr(baseline, "fast_halves", lambda device: halves)
    peaks = baseline.peak_gflops(CPU)
    assert list(peaks) == expected
    assert all(peak > 0 for peak in peaks.values())


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (kernels, ["--json", "none"], "none is not a folder"),
        (engines, ["mini", "--json", "none"], "none is not a folder"),
        (engines, ["mini", "--networks", "none"], "unknown network 'none' of mini"),
        (baseline, ["--json", "none"], "none is not a folder"),
        (gpu, ["mini", "--device", "cpu", "--json", "none/file.json"], "folder none does not exist"),
        (gpu, ["mini", "--device", "cpu", "--json", "."], "is a folder; name a file in it"),
    ],
)
def test_what_stops_a_report_is_found_before_measuring(
    script: Any, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    for name in {"measure_all", "Separator", "stand_in"} & {*vars(script)}:
        monkeypatch.delattr(script, name)  # it would fail otherwise
    with pytest.raises(KmdxError, match=message):
        script.main()


def test_differences_from_the_baseline_are_bounded() -> None:
    song = noise(1000)
    assert baseline.decibels(song, song) == EQUAL
    assert baseline.decibels(song, 0.9 * song) == pytest.approx(20, abs=1e-3)
    assert baseline.decibels(song, np.nan * song) == -EQUAL
    assert baseline.decibels(0 * song, song) == -EQUAL


def test_the_baseline_script_compares_one_song(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "song.wav", noise(20_000, 1), 22_050)
    baseline.main(
        [str(tmp_path / "song.wav"), "--ensemble", str(small), "--seconds", "0.3", "--precision", "fp32"]
    )
    first, *stems = capsys.readouterr().out.splitlines()
    assert "small on cpu, fp32, 0.3 s of song" in first
    assert [line.split()[0] for line in stems] == ["bass", "drums", "other", "vocals"]
    assert all(float(line.split()[1]) > 80 for line in stems)


def test_the_table_names_a_file_that_is_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(KmdxError, match="no reports in"):
        table.load(tmp_path)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(KmdxError, match=r"other.json is not a report"):
        table.load(tmp_path)


def test_the_committed_results_are_in_the_documentation() -> None:
    rows = [*table.plans(table.load(table.RESULTS))]
    shown = Path(table.__file__).parents[1].joinpath("docs", "speed.md").read_text("utf-8").splitlines()
    assert len(rows) > 2
    assert [row for row in rows if row not in shown] == []


def test_cost_by_length_is_fitted_and_drawn() -> None:
    costs = [
        length.Cost(seconds, 0.5 * seconds**1.02, 400_000_000 + 1000 * seconds) for seconds in length.LENGTHS
    ]
    power, factor = length.exponent(costs)
    assert (power, factor) == (pytest.approx(1.02), pytest.approx(0.5))
    root = xml.etree.ElementTree.fromstring(length.svg(costs))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * len(costs)
    assert titles[0] == "30 s: 16.1"
    plan_file.parse(length.PLAN, "small")


def test_cost_by_length_is_not_measured_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KmdxError, match=r"matplotlib is missing; install it with: pip install '.\[plots\]'"):
        length.main([])


def test_a_long_song_equals_its_pieces(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hour, "WINDOWS", 8)
    song = tmp_path / "song.wav"
    soundfile.write(tmp_path / "part.wav", 0.1 + 0.3 * noise(44_100), 44100)
    hour.write(song, [tmp_path / "part.wav"], 1_500_000)
    monkeypatch.setattr(sys, "argv", [])
    seconds, peak = length.separate(song, tmp_path, str(small), *hour.OPTIONS)
    assert seconds > 0
    assert peak <= (host.peak_memory() or 0)
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


def test_later_stages_take_the_residual_as_input() -> None:
    song = noise(100)
    stems = {"vocals": 0.5 * song, "drums": 0.25 * song, "bass": 0 * song}
    heard = against_demucs.stages_of(song, stems)
    assert list(heard) == ["song", "without_vocals", "nor_drums"]
    assert decibels(0.25 * song, heard["nor_drums"]) > 100


def test_the_docs_list_every_ensemble_with_its_size_and_arithmetic() -> None:
    page = Path(table.__file__).parents[1].joinpath("docs/choose.md").read_text("utf-8")
    for name in plan_file.names():
        loaded = plan_file.load(name)
        downloaded = {use.weight.name: use.weight for use in loaded.networks.values() if use.weight.sources}
        size = sum(weight.bytes or 0 for weight in downloaded.values())
        download = f"{size / 1e6:.0f} MB" if size else "none"
        row = f"| {len(loaded.networks)} | {download} | {loaded.gflops(loaded.stems):.0f} |"
        assert any(line.startswith(f"| `{name}`") and row in line for line in page.splitlines()), name
