"""The public class in each precision, speed and engine, and estimates that are not finite."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import numpy as np
import pytest
import separator_cases
import soundfile
import tiny
import torch
import yaml
from conftest import decibels, noise

from kmdx import Separator, ensemble, plan_file, precisions, signals
from kmdx.errors import (
    DeviceError,
    KmdxError,
    KmdxWarning,
    NetworkError,
    PlanError,
)
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.fast import FAST
from kmdx.networks.tfc_tdf import TfcTdf
from kmdx.windows import OverlapAdd

separator = separator_cases.separator


@pytest.mark.parametrize(
    ("options", "demucs", "mdx"),
    [
        ({}, torch.float32, torch.float32),
        ({"precision": "bf16"}, torch.bfloat16, torch.float32),
        ({"speed": "balanced"}, torch.bfloat16, torch.float32),
        ({"speed": "fast"}, torch.bfloat16, torch.bfloat16),
        ({"speed": "fast", "precision": "fp16"}, torch.float16, torch.float16),
    ],
    ids=["as published", "bf16", "balanced", "fast", "fp16"],
)
def test_each_network_gets_a_precision_that_it_supports(
    leaderboard: Path, options: dict, demucs: torch.dtype, mdx: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    separator = Separator(leaderboard, device="cpu", stems=["vocals"], **options)
    networks = separator.networks
    found = {(type(network), network.dtype) for network in networks.values()}
    assert found == {(DemucsNetwork, demucs), (TfcTdf, mdx)}
    assert separator.precisions == {
        name: precisions.NAMES[mdx if name == "mdx_vocals" else demucs] for name in networks
    }


def test_half_precision_changes_the_stems_a_little(small: Path, separator: Separator) -> None:
    song = noise(20_000)
    expected = separator.separate(song, 44100, stems=["vocals"])["vocals"]
    half = Separator(small, device="cpu", precision="bf16", stems=["vocals"]).separate(song, 44100)["vocals"]
    assert half.dtype == np.float32
    assert 25 < decibels(expected, half) < 80


def test_the_default_is_as_published(
    small: Path, separator: Separator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    default = Separator(small, device="cpu")
    assert (default.speed, default.engine, default.precisions) == (
        "leaderboard",
        "tuned",
        {"htdemucs": "fp32"},
    )
    assert default.plan == plan_file.load(small)
    song = noise(20_000)
    expected = separator.separate(song, 44100, stems=["vocals"])["vocals"]
    assert np.array_equal(default.separate(song, 44100, stems=["vocals"])["vocals"], expected)


@pytest.mark.parametrize(("name", "overlap"), [("leaderboard", 0.8), ("balanced", 0.5), ("fast", 0.1)])
def test_a_speed_level_has_less_overlap_and_changes_nothing_else(
    tmp_path: Path, name: str, overlap: float
) -> None:
    path = tiny.write_htdemucs(tmp_path)
    path.write_text(path.read_text("utf-8").replace("overlap: 0.25", "overlap: 0.8"), "utf-8")
    separator = Separator(path, device="cpu", precision="fp32", stems=["vocals"], speed=name)
    steps: list[float] = []
    separator.separate(noise(60_000), 44100, progress=lambda done, total: steps.append(done))
    assert len([done for done in steps if done]) == OverlapAdd(overlap, 0.5, 22_050).windows(60_000)
    published = plan_file.load(path)
    assert {**vars(separator.plan), "networks": None} == {**vars(published), "networks": None}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp8"}, DeviceError, "unknown precision 'fp8'; available: auto, fp32, fp16, bf16"),
        ({"precision": None}, DeviceError, "unknown precision None; available: auto, fp32, fp16, bf16"),
        (
            {"speed": "balance"},
            PlanError,
            "unknown speed 'balance' (did you mean 'balanced'?); available: leaderboard, balanced, fast",
        ),
        ({"speed": None}, PlanError, "unknown speed None; available: leaderboard, balanced, fast"),
        (
            {"engine": "plane"},
            PlanError,
            "unknown engine 'plane' (did you mean 'plain'?); available: tuned, plain, compiled, graphs",
        ),
        ({"engine": None}, PlanError, "unknown engine None; available: tuned, plain, compiled, graphs"),
    ],
)
def test_unknown_precisions_speeds_and_engines_are_one_line_errors(
    options: dict, error: type[KmdxError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:  # before any weights are looked for
        Separator("htdemucs", device="cpu", folder=tmp_path, **options)
    assert str(caught.value) == message


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make networks in half precision overflow; records the batches of each song."""
    batches: list[int] = []
    plain = DemucsNetwork.forward

    def forward(network: DemucsNetwork, batch: torch.Tensor) -> torch.Tensor:
        estimate = plain(network, batch)
        if network.dtype == torch.float32:
            return estimate
        batches.append(len(batch))
        return estimate / 0 if len(batches) > 1 else estimate  # in the second network's turn or window

    monkeypatch.setattr(DemucsNetwork, "forward", forward)
    return batches


def test_a_song_that_overflows_in_half_precision_is_repeated_in_fp32(
    small: Path, overflowing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    separator = Separator(small, device="cpu", precision="bf16")
    other = separator.with_plan(separator.plan)
    song = noise(40_000)
    exact = Separator(small, device="cpu", precision="fp32")
    expected = exact.separate(song, 44100)
    loads: list[str] = []
    load, run = separator._load, ensemble.run
    files: list[int] = []

    def noted(*arguments: object) -> dict[str, torch.Tensor]:
        files.append(len(signals._mapped))
        return run(*arguments)

    monkeypatch.setattr(separator, "_load", lambda precision: loads.append(precision) or load(precision))
    monkeypatch.setattr(ensemble, "run", noted)
    monkeypatch.setattr(signals, "LIMIT", 4096)
    gc.collect()
    with pytest.warns(KmdxWarning, match="this song is separated again in fp32") as caught:
        stems = separator.separate(song, 44100)
    assert caught[0].filename == __file__
    assert all(np.array_equal(stems[name], expected[name]) for name in expected)
    assert files[1] == files[0] > 0, "signals of the run that failed are still there"
    assert loads == ["fp32"]
    assert separator.precisions == other.precisions == {"htdemucs": "bf16"}


def test_an_overflow_does_not_affect_the_next_song(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separator = Separator(small, device="cpu", precision="bf16", stems=["vocals"])
    song = noise(30_000)
    expected = separator.separate(song, 44100)["vocals"]
    forward = DemucsNetwork.forward
    monkeypatch.setattr(
        DemucsNetwork,
        "forward",
        lambda network, batch: forward(network, batch) / (network.dtype == torch.float32),
    )
    for run in (separator, separator.with_plan(separator.plan)):
        with pytest.warns(KmdxWarning, match="overflowed"):
            run.separate(noise(20_000, seed=1), 44100)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(separator.separate(song, 44100)["vocals"], expected)


def test_the_plain_engine_differs_from_the_tuned_one_only_in_the_last_bits(leaderboard: Path) -> None:
    song = noise(8000)
    tuned = Separator(leaderboard, device="cpu", stems=["vocals"]).separate(song, 44100)["vocals"]
    separator = Separator(leaderboard, device="cpu", stems=["vocals"], engine="plain")
    assert separator.engine == "plain"
    for network in separator.networks.values():
        assert not any(isinstance(module, FAST) for module in network.modules())  # type: ignore[attr-defined]
    assert decibels(tuned, separator.separate(song, 44100)["vocals"]) > 100


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, np.nan),
        ({}, -np.inf),
        ({"engine": "plain"}, np.nan),
        ({"precision": "bf16"}, np.inf),
        ({"speed": "fast"}, np.nan),
    ],
)
@pytest.mark.filterwarnings("ignore::kmdx.errors.KmdxWarning")
def test_nan_from_a_network_is_an_error_that_names_it_and_its_weights(
    small: Path, options: dict, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DemucsNetwork.forward

    def damaged(network: DemucsNetwork, batch: torch.Tensor) -> torch.Tensor:
        estimate = forward(network, batch)
        estimate[..., 0, 11_000] = value  # in the middle of a window
        return estimate

    monkeypatch.setattr(DemucsNetwork, "forward", damaged)
    separator = Separator(small, device="cpu", **options)
    song = noise(15_000)
    for call in (
        lambda: separator.separate(song, 44100),
        lambda: separator.separate(song, 44100, stems=["vocals"]),
        lambda: separator.signals(song, 44100, ["V.vocals"]),
    ):
        with pytest.raises(NetworkError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith("network htdemucs returned NaN or infinity in fp32; its weights, ")
        assert str(small.parent / "small.ckpt") in message
        assert "\n" not in message
        assert "too loud" not in message


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_nan_from_onnx_runtime_names_the_network_too(leaderboard: Path, tmp_path: Path) -> None:
    network = tiny.unet("vocals", 2, seed=3)
    network.final_conv[0].bias.data[1] = 3e38  # finite in the file, and infinite when it is transformed back
    tiny.export(network, tmp_path / "vocals.onnx")
    plan = {
        "networks": {
            "mdx": {
                "weights": {
                    "file": "vocals.onnx",
                    "architecture": {"type": "onnx", "sources": ["vocals"], **tiny.TRANSFORM},
                },
                "trim_and_join": {"chunk": tiny.CHUNK, "trim": 109},
            }
        },
        "signals": {"V": {"network": "mdx", "hears": "mixture"}},
        "stems": {"vocals": {"sum": {"V.vocals": 1}}},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), "utf-8")
    separator = Separator(tmp_path / "plan.yaml", device="cpu")
    assert separator.providers == {"mdx": ("CPUExecutionProvider",)}
    soundfile.write(tmp_path / "song.wav", noise(10_000), 44100, subtype="FLOAT")
    with pytest.raises(NetworkError, match=r"network mdx returned NaN .*vocals\.onnx"):
        separator.separate_file(tmp_path / "song.wav")


def test_a_song_too_loud_for_float32_is_reported_as_such(separator: Separator) -> None:
    song = noise(10_000).astype(np.float64)
    with pytest.raises(KmdxError, match=r"too loud.* peaks at 3e\+38"):
        separator.separate(3e38 * song / np.abs(song).max(), 44100)


@pytest.mark.parametrize("level", [1e-20, 1e-38, 1e-44])
def test_the_faintest_songs_give_finite_stems(separator: Separator, level: float) -> None:
    for stem in separator.separate(noise(10_000, level=level), 44100).values():
        assert np.isfinite(stem).all()
