"""The public class: any rate and channel count, subsets of stems, files, silence, devices, missing weights."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from conftest import decibels, is_scratch, noise

import kmdx
from kmdx import Separator, audio, chunking, ensemble, host, plan_file, precision, signals
from kmdx import device as devices
from kmdx.device import NetworkCache
from kmdx.errors import (
    AudioError,
    DeviceError,
    KmdxError,
    KmdxWarning,
    NetworkError,
    PlanError,
    WeightsError,
)
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.fast import FAST
from kmdx.networks.tfc_tdf import TfcTdf
from kmdx.plan import Plan
from kmdx.windows import OverlapAdd

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def separator(small: Path) -> Separator:
    stems = ["bass", "drums", "other", "vocals", "accompaniment"]
    return Separator(small, device="cpu", stems=stems, precision="fp32")


@pytest.fixture(scope="module")
def whole(leaderboard: Path) -> Separator:
    """A separator with all of leaderboard C."""
    return Separator(leaderboard, device="cpu", precision="fp32")


def test_the_public_names() -> None:
    assert set(kmdx.__all__) == {"KmdxError", "Separator"}
    assert kmdx.Separator is Separator
    assert kmdx.KmdxError is KmdxError
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        kmdx.Nothing  # noqa: B018


def test_stems_come_as_the_song_came_and_the_song_is_left_alone(separator: Separator) -> None:
    song = noise(40_000)
    before = song.copy()
    stems = separator.separate(song, 44100)
    assert list(stems) == ["bass", "drums", "other", "vocals", "accompaniment"]
    for stem in stems.values():
        assert stem.shape == song.shape
        assert stem.dtype == np.float32
        assert stem.flags.c_contiguous
    assert np.array_equal(song, before)


def test_stems_of_the_staged_plan_and_the_accompaniment_add_up(separator: Separator) -> None:
    song = noise(40_000)
    stems = separator.separate(song, 44100)
    mean = song.mean(1).mean()
    four = sum(stems[name] - mean for name in ("bass", "drums", "other", "vocals"))
    assert decibels(song - mean, four) > 90, "what is left is what is left"
    assert np.array_equal(stems["accompaniment"], song - stems["vocals"])


def test_the_same_song_gives_the_same_stems(separator: Separator) -> None:
    song = noise(30_000)
    first, second = (separator.separate(song, 44100, stems=["vocals"])["vocals"] for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000, 192_000])
def test_other_rates_keep_rate_and_length(separator: Separator, rate: int) -> None:
    song = noise(rate // 2 + 7)
    stems = separator.separate(song, rate, stems=["vocals", "accompaniment"])
    assert stems["vocals"].shape == song.shape
    assert decibels(song, stems["vocals"] + stems["accompaniment"]) > 120


def test_resampling_both_ways_is_what_a_user_would_do_by_hand(separator: Separator) -> None:
    song = noise(24_000)
    by_hand = separator.separate(audio.resample(song, 48_000, 44_100), 44_100, stems=["drums"])["drums"]
    direct = separator.separate(song, 48_000, stems=["drums"])["drums"]
    assert np.array_equal(direct, audio.resample(by_hand, 44_100, 48_000, len(song)))


@pytest.mark.parametrize("shape", [(30_000,), (30_000, 1)])
def test_mono_is_two_equal_channels_folded_back(separator: Separator, shape: tuple[int, ...]) -> None:
    mono = noise(30_000, 1)
    stems = separator.separate(mono.reshape(shape), 44100)
    stereo = separator.separate(np.repeat(mono, 2, 1), 44100)
    for name, stem in stems.items():
        assert stem.shape == (30_000, 1)
        if name != "accompaniment":
            assert np.allclose(stem, stereo[name].mean(1, keepdims=True), atol=1e-7)


def test_silence_gives_silence(separator: Separator) -> None:
    for stem in separator.separate(np.zeros((30_000, 2)), 44100).values():
        assert stem.shape == (30_000, 2)
        assert not stem.any()


@pytest.mark.parametrize("samples", [2, 3, 100, 22_049, 22_050, 22_051, 2 * 22_050])
def test_songs_shorter_than_a_segment_or_just_as_long(separator: Separator, samples: int) -> None:
    stems = separator.separate(noise(samples), 44100)
    assert all(stem.shape == (samples, 2) and np.isfinite(stem).all() for stem in stems.values())


@pytest.mark.parametrize("samples", [2, tiny.CHUNK, tiny.CHUNK - 2 * 109, 2 * (tiny.CHUNK - 2 * 93)])
def test_songs_of_whole_chunks_and_hardly_any(whole: Separator, samples: int) -> None:
    stems = whole.separate(noise(samples), 44100)
    assert all(stem.shape == (samples, 2) and np.isfinite(stem).all() for stem in stems.values())


def test_a_separator_loads_only_what_its_stems_need(leaderboard: Path) -> None:
    vocals = Separator(leaderboard, device="cpu", stems=["vocals"])
    assert set(vocals.networks) == {"mdx_vocals", "ft_vocals", "mmi", "extra"}
    with pytest.raises(PlanError, match="unknown stem 'bass'"):
        vocals.separate(noise(1000), 44100, stems=["bass"])
    with pytest.raises(PlanError, match="did not load"):
        vocals.signals(noise(1000), 44100, ["demucs_bass"])


def test_any_signal_of_the_plan_can_be_had(whole: Separator) -> None:
    song = noise(20_000)
    signals = whole.signals(song, 44100, ["mdx_vocals", "demucs_vocals", "vocals", "M.bass"])
    assert decibels(signals["vocals"], 0.88 * signals["mdx_vocals"] + 0.12 * signals["demucs_vocals"]) > 120
    assert signals["M.bass"].shape == song.shape


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((0, 2)), "no samples"),
        (np.zeros((1, 2)), "1 sample, expected at least 2"),
        (np.full((100, 2), np.nan), "NaN"),
        (np.zeros((100, 3)), "3 channels"),
        (np.zeros((2, 44100)), "transpose"),
        ("song", "samples are"),
    ],
)
def test_arrays_that_are_no_song(separator: Separator, samples: object, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        separator.separate(samples, 44100)  # type: ignore[arg-type]


def test_a_part_of_a_file(separator: Separator, tmp_path: Path) -> None:
    song = noise(44_100)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    stems, rate = separator.separate_file(tmp_path / "song.wav", start=0.25, duration=0.5, stems=["vocals"])
    assert rate == 44100
    expected = separator.separate(song[11_025 : 11_025 + 22_050], 44100, stems=["vocals"])
    assert np.array_equal(stems["vocals"], expected["vocals"])


def test_devices() -> None:
    with pytest.raises(DeviceError, match="^unknown device 'toaster'; use auto, cpu, cuda or cuda:N$"):
        Separator("htdemucs", device="toaster")
    with pytest.raises(DeviceError, match="device 'meta' is not available"):
        Separator("htdemucs", device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="device 'cuda:0' is not available"):
            Separator("htdemucs", device="cuda:0")


def test_missing_weights_are_named_with_what_gets_them_and_their_size(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        Separator("leaderboard_c", folder=tmp_path)
    message = str(caught.value)
    assert "10 of the weights that leaderboard_c needs are not in" in message
    assert "kmdx models pull leaderboard_c" in message
    assert "MB" in message
    with pytest.raises(WeightsError, match="htdemucs is missing: looked for .*kmdx models pull htdemucs"):
        Separator("htdemucs", folder=tmp_path)


def test_what_is_missing_is_what_is_to_be_pulled(leaderboard: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        Separator("leaderboard_c", folder=tmp_path, stems=["vocals"])
    assert "`kmdx models pull mdx_vocals htdemucs_ft_vocals hdemucs_mmi mdx_extra_a1d90b5c`" in str(
        caught.value
    )
    assert "(about 486 MB)" in str(caught.value)
    with pytest.raises(WeightsError, match=r"`kmdx models pull htdemucs` gets it \(about 84 MB\)"):
        Separator("htdemucs", folder=tmp_path)


def test_networks_of_the_same_weights_are_loaded_once(tmp_path: Path) -> None:
    path = tiny.write_htdemucs(tmp_path)
    content = yaml.safe_load(path.read_text("utf-8"))
    twin = copy.deepcopy(content["networks"]["htdemucs"])
    twin["overlap_add"]["overlap"] = 0.5
    content["networks"]["twin"] = twin
    content["signals"]["D"]["network"] = "twin"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    networks = Separator(path, device="cpu").networks
    assert networks["htdemucs"] is networks["twin"]


def test_a_network_of_another_rate_than_the_plan_is_refused(tmp_path: Path) -> None:
    path = tiny.write_htdemucs(tmp_path)
    path.write_text(path.read_text("utf-8").replace("sample_rate: 44100", "sample_rate: 48000"), "utf-8")
    with pytest.raises(PlanError, match="needs 44100 Hz, but the plan's sample rate is 48000 Hz"):
        Separator(path, device="cpu")


# Out of memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate\nmuch"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    MemoryError(),
]


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, when: Callable[[int], bool]) -> list[int]:
    """Let networks fail, by the number of the batch; return the batches' sizes."""
    sizes: list[int] = []
    forward = DemucsNetwork.forward

    def fails(network: DemucsNetwork, batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        if when(len(sizes)):
            raise error
        return forward(network, batch)

    monkeypatch.setattr(DemucsNetwork, "forward", fails)
    return sizes


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_song_is_finished_although_memory_runs_out_in_the_middle(
    separator: Separator, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separator, "cache", NetworkCache(separator.networks, CPU))
    song = noise(75_000)  # five windows
    expected = separator.separate(song, 44100, stems=["vocals"])["vocals"]
    monkeypatch.setattr(devices, "CPU_BATCH", 2)
    sizes = failing(monkeypatch, error, lambda call: call == 2)
    assert decibels(expected, separator.separate(song, 44100, stems=["vocals"])["vocals"]) > 110
    assert sizes == [2, 2, 1, 1, 1], (
        "the second of two batches is done again, and the next one window at a time"
    )
    separator.separate(song, 44100, stems=["vocals"])
    assert sizes[5:] == [2, 2, 1], "the next song is as if it was the first"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_window_too_big_for_the_memory_is_one_line(
    separator: Separator, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error, lambda call: True)
    with pytest.raises(
        DeviceError, match="out of memory on cpu with a song of 1 s; separate it in parts"
    ) as caught:
        separator.separate(noise(44_100), 44_100)
    assert "\n" not in str(caught.value)
    assert str(error).partition("\n")[0] in str(caught.value), "which may be of another kind after all"
    assert caught.value.__cause__ is error


def test_a_failure_of_another_kind_is_not_about_memory(
    separator: Separator, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("the matrices do not fit each other")
    failing(monkeypatch, error, lambda call: True)
    with pytest.raises(RuntimeError) as caught:
        separator.separate(noise(1000), 44_100)
    assert caught.value is error


@pytest.mark.parametrize("fails", [False, True])
def test_the_heap_is_warm_while_the_cpu_computes(
    separator: Separator, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def warm_heap() -> Iterator[None]:
        events.append("warm")
        try:
            yield
        finally:
            events.append("cold")

    def run(plan: Plan, cache: NetworkCache, mixture: torch.Tensor, names: list[str], *_: object) -> dict:
        events.append("run")
        if fails:
            raise RuntimeError("the matrices do not fit each other")
        return dict.fromkeys(names, mixture)

    monkeypatch.setattr(host, "warm_heap", warm_heap)
    monkeypatch.setattr(ensemble, "run", run)
    with pytest.raises(RuntimeError) if fails else nullcontext():
        separator.separate(noise(1000), 44_100)
    assert events == ["warm", "run", "cold"]


def test_a_song_runs_in_exact_float32_and_within_the_devices_limit(
    separator: Separator, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple] = []

    @contextmanager
    def limited(*given: object) -> Iterator[None]:
        limits.append(given)
        yield
        limits.clear()

    def run(plan: Plan, cache: NetworkCache, mixture: torch.Tensor, names: list[str], *_: object) -> dict:
        assert limits == [(CPU, 7)]
        assert not torch.backends.cudnn.allow_tf32
        return dict.fromkeys(names, mixture)

    monkeypatch.setattr(devices, "memory_limit", lambda device, own: 7)  # now, not when it was made
    monkeypatch.setattr(devices, "memory_budget", lambda device, own: None)
    monkeypatch.setattr(devices, "limited", limited)
    monkeypatch.setattr(ensemble, "run", run)
    assert torch.backends.cudnn.allow_tf32
    separator.separate(noise(1000), 44_100)
    assert not limits
    assert torch.backends.cudnn.allow_tf32


# Precision and speed


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
def test_each_network_gets_the_precision_that_it_bears(
    leaderboard: Path, options: dict, demucs: torch.dtype, mdx: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    separator = Separator(leaderboard, device="cpu", stems=["vocals"], **options)
    networks = separator.networks
    found = {(type(network), network.dtype) for network in networks.values()}
    assert found == {(DemucsNetwork, demucs), (TfcTdf, mdx)}
    assert separator.precisions == {
        name: precision.NAMES[mdx if name == "mdx_vocals" else demucs] for name in networks
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
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
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
    assert len(steps) == OverlapAdd(overlap, 0.5, 22_050).windows(60_000)
    published = plan_file.load(path)
    assert {**vars(separator.plan), "networks": None} == {**vars(published), "networks": None}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp8"}, DeviceError, "precision 'fp8': expected one of auto, fp32, fp16, bf16"),
        ({"precision": None}, DeviceError, "precision None: expected one of auto, fp32, fp16, bf16"),
        (
            {"speed": "balance"},
            PlanError,
            "unknown speed 'balance'; did you mean 'balanced'?; available: leaderboard, balanced, fast",
        ),
        ({"speed": None}, PlanError, "unknown speed None; available: leaderboard, balanced, fast"),
        ({"engine": "plane"}, PlanError, "unknown engine 'plane'; available: tuned, plain"),
        ({"engine": None}, PlanError, "unknown engine None; available: tuned, plain"),
    ],
)
def test_unknown_precisions_speeds_and_engines_are_one_line(
    options: dict, error: type[KmdxError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:  # before any weights are looked for
        Separator("htdemucs", device="cpu", folder=tmp_path, **options)
    assert str(caught.value) == message


# Long songs


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (44_100, 1), (32_000, 2), (48_000, 1)])
def test_a_long_song_gives_the_same_stems(
    separator: Separator, rate: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = noise(rate // 3, channels)
    before = song.copy()
    monkeypatch.setattr(signals, "BLOCK", 1000)
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", 7000)
    expected = separator.separate(song, rate)
    monkeypatch.setattr(signals, "LIMIT", 4096)
    monkeypatch.setattr(chunking, "SPAN", 30_000)
    gc.collect()
    open_before = len(signals._mapped)
    stems = separator.separate(song, rate)
    assert list(stems) == list(expected)
    for name, stem in stems.items():
        assert stem.shape == song.shape
        assert stem.flags.c_contiguous
        assert is_scratch(stem)
        assert np.array_equal(stem, expected[name]), name
    assert np.array_equal(song, before)
    assert np.array_equal(stems["accompaniment"], song - stems["vocals"])
    gc.collect()
    assert len(signals._mapped) == open_before + len(stems), "files are left of signals that nobody asked for"
    del stems, stem
    gc.collect()
    assert len(signals._mapped) == open_before


def test_long_silence(separator: Separator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LIMIT", 4096)
    for stem in separator.separate(np.zeros((30_000, 1)), 48_000).values():
        assert stem.shape == (30_000, 1)
        assert not stem.any()


def test_a_part_of_a_long_file(separator: Separator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    song = noise(30_000)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    expected = separator.separate(song[4410:], 44100, stems=["vocals"])["vocals"]
    monkeypatch.setattr(signals, "LIMIT", 4096)
    stems, _ = separator.separate_file(tmp_path / "song.wav", start=0.1, stems=["vocals"])
    assert is_scratch(stems["vocals"])
    assert np.array_equal(stems["vocals"], expected)


@pytest.mark.parametrize(
    ("peak", "words"),
    [
        (8.5, "peaks at 8.5, expected about 1; its stems may be wrong; scale it to a peak of 1"),
        (32767, "peaks at 32767, expected about 1; its stems may be wrong; if it contains 16-bit values stored as floats,"),
        (33000, "divide it by 32768"),
        (-8388608, "24-bit values stored as floats, divide it by 8388608"),
        (2e9, "32-bit values stored as floats, divide it by 2147483648"),
        (1e12, "scale it to a peak of 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("limit", [1, signals.LIMIT])  # in a scratch file, and in memory
def test_a_song_far_beyond_full_scale_is_one_warning(
    separator: Separator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: float, words: str, limit: int
) -> None:
    monkeypatch.setattr(signals, "LIMIT", limit)
    song = np.zeros((9000, 1), np.float32)
    song[4321] = peak
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    with pytest.warns(KmdxWarning) as of_array:
        separator.separate(song, 44100, stems=["vocals"])
    with pytest.warns(KmdxWarning) as of_file:
        separator.separate_file(tmp_path / "song.wav", stems=["vocals"])
    for caught, name in ((of_array, "the song"), (of_file, tmp_path / "song.wav")):
        (warning,) = caught
        assert str(warning.message).startswith(f"{name}: peaks at ")
        assert words in str(warning.message)


def test_a_song_of_eight_times_full_scale_and_any_integers_are_no_warning(
    separator: Separator, recwarn: pytest.WarningsRecorder
) -> None:
    separator.separate(np.full((9000, 1), -8.0), 44100, stems=["vocals"])
    separator.separate(np.full((9000, 1), -(2**15), np.int16), 44100, stems=["vocals"])
    assert not recwarn.list


@pytest.mark.parametrize("how", ["truncated", "empty", "another network's", "text", "an attack"])
def test_bad_weights_are_one_line_and_run_nothing(tmp_path: Path, how: str) -> None:
    plan = tiny.write_htdemucs(tmp_path)
    message = tiny.spoil(tmp_path / "small.ckpt", how)
    with pytest.raises(WeightsError, match=message) as caught:
        Separator(plan, device="cpu")
    assert "\n" not in str(caught.value)
    assert "small.ckpt" in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let networks in half precision overflow; notes the batches of each song that they heard."""
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


def test_a_song_that_overflows_in_half_precision_is_done_again_in_fp32(
    small: Path, overflowing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    separator = Separator(small, device="cpu", precision="bf16")
    other = separator.under(separator.plan)
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


def test_a_song_after_one_that_overflowed_is_as_if_it_was_the_first(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    separator = Separator(small, device="cpu", precision="bf16", stems=["vocals"])
    song = noise(30_000)
    expected = separator.separate(song, 44100)["vocals"]
    forward = DemucsNetwork.forward
    monkeypatch.setattr(
        DemucsNetwork,
        "forward",
        lambda network, batch: forward(network, batch) / (network.dtype == torch.float32),
    )
    for run in (separator, separator.under(separator.plan)):
        with pytest.warns(KmdxWarning, match="overflowed"):
            run.separate(noise(20_000, seed=1), 44100)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(separator.separate(song, 44100)["vocals"], expected)


@pytest.mark.parametrize("options", [{}, {"engine": "plain"}, {"precision": "bf16"}], ids=str)
def test_a_song_gives_the_same_bits_whatever_songs_came_before(small: Path, options: dict) -> None:
    song = noise(25_000)
    separator = Separator(small, device="cpu", stems=["vocals", "drums"], **options)
    alone = separator.separate(song, 44100)
    separator.separate(noise(40_000, 1, seed=1), 32_000)
    separator.separate(np.zeros((5000, 2)), 44100)
    with pytest.raises(AudioError):
        separator.separate(np.full((100, 2), np.nan), 44100)
    after = separator.separate(song, 44100)
    assert all(np.array_equal(alone[name], after[name]) for name in alone)


def test_the_plain_engine_is_the_tuned_one_but_for_the_last_bits(leaderboard: Path) -> None:
    song = noise(8000)
    tuned = Separator(leaderboard, device="cpu", stems=["vocals"]).separate(song, 44100)["vocals"]
    separator = Separator(leaderboard, device="cpu", stems=["vocals"], engine="plain")
    assert separator.engine == "plain"
    for network in separator.networks.values():
        assert not any(isinstance(module, FAST) for module in network.modules())  # type: ignore[attr-defined]
    assert decibels(tuned, separator.separate(song, 44100)["vocals"]) > 100


# NaN and infinity


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
def test_nan_of_a_network_names_it_and_its_weights(
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


def test_a_song_too_loud_for_float32_is_told_as_such(separator: Separator) -> None:
    song = noise(10_000).astype(np.float64)
    with pytest.raises(KmdxError, match=r"too loud.* peaks at 3e\+38"):
        separator.separate(3e38 * song / np.abs(song).max(), 44100)


@pytest.mark.parametrize("level", [1e-20, 1e-38, 1e-44])
def test_the_faintest_songs_give_finite_stems(separator: Separator, level: float) -> None:
    for stem in separator.separate(noise(10_000, level=level), 44100).values():
        assert np.isfinite(stem).all()
