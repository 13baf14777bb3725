"""Training: configs, songs, windows, whole runs on the CPU, what is exported, what is predicted."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from conftest import decibels, noise
from rich.console import Console

from kmdx import Separator, weights
from kmdx.errors import KmdxWarning, WeightsError
from kmdx.networks.tfc_tdf import TfcTdf
from training import (
    budget,
    command,
    decoded_songs,
    export,
    losses,
    module,
    run_report,
    sampling,
    songs,
    trainer,
    validation,
)
from training import config as configs
from training.config import Config, Loss, TrainingError
from training.run import Run
from training.sampling import Windows

ROOT = Path(__file__).parents[1]
STEMS = ("bass", "drums", "other", "vocals")
NETWORK = {
    "n_fft": 512, "hop": 256, "bins": 64, "frames": 32, "layers": 3, "convolutions": 1, "growth": 4,
    "norm_groups": 2, "trim": 256,
}  # fmt: skip
CHUNK = 256 * 31
CONFIG = {
    "title": "A small network", "source": "vocals", "network": NETWORK, "steps": 6, "epoch": 2, "batch": 2,
    "validation": ["song 0"], "optimizer": {"rate": 0.01, "warm_up": 2}, "loss": {"l1": 1, "spectral": 0.5, "windows": [256]},
}  # fmt: skip


def small(**changes: object) -> Config:
    return configs.parse({**CONFIG, **changes}, "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three songs of two seconds, in wav, flac and Ogg; one without bass."""
    folder = tmp_path_factory.mktemp("songs")
    for number, ending in enumerate(("wav", "flac", "ogg")):
        song = folder / f"song {number}"
        song.mkdir()
        for place, stem in enumerate(STEMS):
            if (number, stem) != (2, "bass"):
                soundfile.write(
                    song / f"{stem}.{ending}", 0.3 * noise(88_200, seed=10 * number + place), 44100
                )
    return folder


def found(data: Path, config: Config) -> songs.Songs:
    return songs.find([data], config.source, config.network.chunk, config.validation)


@pytest.fixture
def fit(data: Path, tmp_path: Path) -> Callable[..., Run]:
    """Train in this process, in a folder of that name."""

    def run(name: str = "run", folder: Path = data, **changes: object) -> Run:
        config = small(**changes)
        console = Console(stderr=True)
        output = tmp_path / name
        return trainer.fit(
            config, [folder], output, console=console, decoded=tmp_path / "decoded", device="cpu", workers=0
        )

    return run


def state(run: Run) -> dict[str, torch.Tensor]:
    """What training goes on with, and the averaged weights."""
    checkpoint = torch.load(run.last, weights_only=True)
    averaged = {f"average.{name}": value for name, value in checkpoint["state_dict"].items()}
    return {**checkpoint["current_model_state"], **averaged}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)
        ]


# Configs


@pytest.mark.parametrize("name", configs.names())
def test_configs_that_come_with_it_are_sound(name: str) -> None:
    assert configs.load(name).steps > 0


def test_the_published_configs_are_the_published_networks() -> None:
    for stem in STEMS:
        config = configs.load(stem)
        published = weights.get(f"mdx_{stem}").architecture
        own = config.network.architecture(stem)
        sizes = own.keys() & published.keys() - {"type"}
        assert {key: own[key] for key in sizes} == {key: published[key] for key in sizes}
        assert config.hears == ("mixture" if stem == "vocals" else "rest")
        plan = yaml.safe_load(tiny.LEADERBOARD_C.read_text("utf-8"))
        assert plan["networks"][f"mdx_{stem}"]["trim_and_join"] == {
            "chunk": config.network.chunk,
            "trim": config.network.trim,
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "vocals"}, "test: stem: extra inputs are not permitted"),
        ({"source": "guitar"}, "source: input should be 'bass', 'drums', 'other' or 'vocals', not 'guitar'"),
        ({"steps": 0}, "steps: input should be greater than 0, not 0"),
        ({"hears": "rest"}, "what is left without vocals has none to estimate"),
        ({"batch": 4, "at_once": 3}, "a batch of 4 cannot go through by 3"),
        ({"loss": {"l1": 0}}, "loss: every term has the weight 0"),
        ({"network": {**NETWORK, "norm_groups": 3}}, "network: growth 4 does not divide into 3 groups"),
        ({"network": {**NETWORK, "bins": 60}}, "network: 1 levels need bins that divide by 16"),
        ({"data": {"gain": [6, -6]}}, "data.gain: the first value must not be above the second, not [6, -6]"),
        (
            {"loss": {"spectral": 1}, "network": {**NETWORK, "trim": 3000}},
            "4096 samples are more than the 1936",
        ),
        (
            {"validate_every": 2},
            "6 steps are 3 epochs of 2, and validate_every: 2 would leave the last without a validation; "
            "try a multiple of 4 steps, or another validate_every",
        ),
        ({"network": {**NETWORK, "trim": 4000}}, "network: two trims of 4000 leave nothing of 7936 samples"),
    ],
)
def test_a_wrong_config_is_one_line(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        small(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_can_be_set_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG), "utf-8")
    config = configs.load(str(path), {"optimizer.rate": 0.5, "steps": 9})
    assert (config.optimizer.rate, config.optimizer.warm_up, config.steps) == (0.5, 2, 9)
    assert configs.parse(yaml.safe_load(configs.dump(config)), "again") == config
    with pytest.raises(TrainingError, match="expected a YAML file, or one of .*vocals"):
        configs.load("nothing")


# Songs


def test_songs_are_found_and_split(data: Path) -> None:
    with pytest.warns(KmdxWarning, match="song 2: no bass: taken as silent"):
        both = songs.find([data], "bass", 1000, ["song 0"])
    assert [song.name for song in both.training] == ["song 1", "song 2"]
    assert [song.name for song in both.validation] == ["song 0"]
    assert set(both.training[1].stems) == {"drums", "other", "vocals"}


def test_splits_of_a_data_set(data: Path, tmp_path: Path) -> None:
    for split, song in (("train", "song 1"), ("valid", "song 0"), ("test", "song 2")):
        shutil.copytree(data / song, tmp_path / split / song)
    both = songs.find([tmp_path], "vocals", 1000)
    assert [song.name for song in (*both.training, *both.validation)] == ["song 1", "song 0"], (
        "never the test songs"
    )


def test_musdb18s_own_validation_songs(data: Path, tmp_path: Path) -> None:
    for name in ("Meaxic - Take A Step", "Another"):
        shutil.copytree(data / "song 1", tmp_path / "train" / name)
    assert [song.name for song in songs.find([tmp_path], "drums", 1000).validation] == [
        "Meaxic - Take A Step"
    ]


def broken(data: Path, tmp_path: Path, how: str) -> list[Path]:
    """A copy of the songs with one thing wrong."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    first = copy / "song 1"
    match how:
        case "rate":
            soundfile.write(first / "vocals.flac", noise(48_000), 48_000)
        case "short":
            for stem in STEMS:
                soundfile.write(first / f"{stem}.flac", noise(4000), 44_100)
        case "damaged":
            (first / "vocals.flac").write_bytes(b"no sound")
        case "source":
            for song in copy.iterdir():
                for file in song.glob("vocals.*"):
                    file.unlink()
        case "empty":
            shutil.rmtree(copy)
            copy.mkdir()
        case "missing":
            shutil.rmtree(copy)
        case "file":
            return [first / "vocals.flac"]
        case "twice":
            return [copy, data]
    return [copy]


@pytest.mark.filterwarnings("ignore::kmdx.errors.KmdxWarning")
@pytest.mark.parametrize(
    ("how", "validation", "message"),
    [
        ("rate", ["song 0"], "vocals.flac: 48000 Hz, expected 44100 Hz"),
        ("short", ["song 0"], "song 1 is shorter than a window: 0.1 s of 0.2 s"),
        ("damaged", ["song 0"], "vocals.flac: cannot be read"),
        ("source", ["song 0"], "none of 2 songs to train with has vocals"),
        ("empty", ["song 0"], "no songs: expected folders with bass, drums, other, vocals"),
        ("missing", ["song 0"], "copy: no such folder"),
        ("file", ["song 0"], "vocals.flac: not a folder"),
        ("twice", ["song 0"], "two songs are called 'song 0'"),
        ("", [], "no songs to validate with in"),
        ("", ["song 9"], "no validation song matches 'song 9'; available: song 0, song 1, song 2"),
        ("", ["song *"], "no songs to train with"),
    ],
)
def test_wrong_data_is_one_line_before_anything_begins(
    how: str, validation: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    folders = broken(data, tmp_path, how)
    with pytest.raises(TrainingError) as caught:
        songs.find(folders, "vocals", CHUNK, validation)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_compressed_stems_are_decoded_once_and_alike(data: Path, tmp_path: Path) -> None:
    config = small()
    before = found(data, config)
    told: list[tuple[int, int]] = []
    after = decoded_songs.decode(before, tmp_path / "decoded", lambda *count: told.append(count))
    assert told[-1] == (7, 7)
    assert after.validation[0].stems["bass"].path == data / "song 0" / "bass.wav", "wav is read in place"
    for song, other in zip(before.training, after.training, strict=True):
        for name, stem in song.stems.items():
            assert other.stems[name].path.suffix == ".wav"
            assert np.array_equal(sampling.read(stem, 0, 88_200), sampling.read(other.stems[name], 0, 88_200))
    told.clear()
    assert decoded_songs.decode(before, tmp_path / "decoded", lambda *count: told.append(count)) == after
    assert not told


def test_decoding_asks_for_room_first(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(TrainingError, match="are needed for 7 decoded stems, and 0.00 GB are free"):
        decoded_songs.decode(found(data, small()), tmp_path / "decoded")
    assert not list((tmp_path / "decoded").iterdir())


# Windows


def test_a_window_depends_on_seed_and_number_alone(data: Path) -> None:
    config = small()
    training = found(data, config).training
    first, again = Windows(config, training), Windows(config, training)
    assert torch.equal(first[7].heard, again[7].heard)
    assert not torch.equal(first[7].heard, first[8].heard)
    assert not torch.equal(first[7].heard, Windows(small(seed=1), training)[7].heard)
    assert first[7].heard.shape == first[7].target.shape == (2, CHUNK)


def test_an_unmixed_window_is_a_place_in_a_song(data: Path) -> None:
    plain = {"mixing": 0, "gain": [0, 0], "swap": 0, "invert": 0}
    config = small(data=plain)
    training = found(data, config).training
    window = Windows(config, training)[3]
    matches = []
    for song in training:
        stems = sampling.whole(song)
        mixture = sum(stems.values())
        place = np.flatnonzero(np.abs(stems["vocals"][0] - window.target[0, 0].numpy()) < 1e-9)
        matches += [
            np.abs(mixture[:, start : start + CHUNK] - window.heard.numpy()).max() < 1e-6
            for start in place
            if start + CHUNK <= song.samples
        ]
    assert any(matches)


def test_stems_vary_as_they_are_told_to(data: Path) -> None:
    still = {"mixing": 0, "gain": [0, 0], "swap": 0, "invert": 0}
    training = found(data, small()).training
    plain = Windows(small(data=still), training)[0].target
    swapped = Windows(small(data={**still, "swap": 1, "invert": 1}), training)[0].target
    assert torch.equal(swapped, -plain.flip(0))
    louder = Windows(small(data={**still, "gain": [6, 6]}), training)[0].target
    assert torch.allclose(louder, 10 ** (6 / 20) * plain)
    assert not Windows(small(data={**still, "silence": 1}), training)[0].target.any()


def test_mixed_windows_have_stems_of_different_songs(data: Path) -> None:
    config = small(source="bass", data={"mixing": 1, "gain": [0, 0], "swap": 0, "invert": 0})
    drawn = Windows(config, found(data, config).training)
    assert all(drawn[number].target.any() for number in range(20)), "the song without bass lends none"
    unmixed = Windows(small(source="bass", data={"mixing": 0}), drawn.songs)
    assert {bool(unmixed[number].target.any()) for number in range(20)} == {True, False}


@pytest.mark.parametrize(("weights", "share"), [({}, 0.5), ({"song 1": 0.25}, 0.8), ({"song *": 3}, 0.5)])
@pytest.mark.parametrize("mixing", [0, 1])
def test_songs_are_drawn_as_often_as_they_weigh(
    data: Path, monkeypatch: pytest.MonkeyPatch, weights: dict, share: float, mixing: float
) -> None:
    config = small(data={"mixing": mixing, "weights": weights})
    one, two = (song for song in found(data, config).training if song.name != "song 0")
    read: list[Path] = []

    def note(stem: songs.TrainingStem | None, start: int, length: int) -> np.ndarray:
        read.extend([] if stem is None else [stem.path])
        return np.zeros((2, length), np.float32)

    monkeypatch.setattr(sampling, "read", note)
    drawn = Windows(config, [one, two])
    for number in range(500):
        drawn[number]
    vocals = [path for path in read if path.stem == "vocals"]
    assert len(vocals) == 500
    assert abs(vocals.count(two.stems["vocals"].path) / 500 - share) < 0.07  # three standard deviations


def test_a_weight_of_no_song_is_told(data: Path) -> None:
    config = small(data={"weights": {"sogn *": 2}})
    with pytest.warns(KmdxWarning, match="no song is called 'sogn "):
        Windows(config, found(data, config).training)


def test_what_is_left_of_the_vocals_has_the_error_that_was_asked_for(data: Path) -> None:
    still = {"mixing": 0, "gain": [0, 0], "swap": 0, "invert": 0}
    training = found(data, small()).training
    whole = Windows(small(source="drums", data=still), training)
    rest = Windows(small(source="drums", hears="rest", rest={"error": [-12, -12]}, data=still), training)
    vocals = Windows(small(data=still), training)
    for number in range(3):
        estimated = whole[number].heard - rest[number].heard
        assert decibels(vocals[number].target.numpy(), estimated.numpy()) == pytest.approx(12, abs=0.3)


def test_a_step_hears_the_same_windows_however_they_are_shared(data: Path) -> None:
    config = small(batch=4, steps=5, epoch=3)

    def numbers(epoch: int, at_once: int, ranks: int) -> list[set[int]]:
        shares = [list(sampling._numbers(config, 3 * epoch, at_once, rank, ranks)) for rank in range(ranks)]
        per_step = len(shares[0]) // (min(5, 3 * (epoch + 1)) - 3 * epoch)
        return [
            {number for share in shares for part in share[begin : begin + per_step] for number in part}
            for begin in range(0, len(shares[0]), per_step)
        ]

    whole = [set(range(0, 4)), set(range(4, 8)), set(range(8, 12))]
    assert numbers(0, 4, 1) == numbers(0, 1, 1) == numbers(0, 2, 2) == numbers(0, 1, 2) == whole
    assert numbers(1, 2, 1) == [set(range(12, 16)), set(range(16, 20))]


def test_a_variant_is_drawn_like_the_song(data: Path, tmp_path: Path) -> None:
    for stem in STEMS:
        (tmp_path / "song 1").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "song 1" / f"{stem}.wav", np.full((50_000, 2), 0.25), 44100)
    both = songs.find([data], "vocals", CHUNK, ["song 0", "song 2"], [tmp_path])
    (song,) = both.training
    assert len(song.versions) == 2
    drawn = Windows(small(data={"mixing": 0, "gain": [0, 0], "invert": 0}), both.training)
    variants = [bool((drawn[number].target == 0.25).all()) for number in range(30)]
    assert 5 < sum(variants) < 25


# Losses


def test_losses() -> None:
    torch.manual_seed(0)
    target = torch.randn(2, 2, 8000)
    config = Loss(mse=1, l1=1, spectral=1)
    perfect = losses.terms(config, target, target)
    assert {name: float(value) for name, value in perfect.items()} == {"mse": 0, "l1": 0, "spectral": 0}
    error = torch.randn_like(target)
    found_terms = losses.terms(config, target + error, target)
    assert float(found_terms["mse"]) == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert float(found_terms["l1"]) == pytest.approx(float(error.abs().mean()), rel=1e-5)
    twice = losses.terms(config, target + 2 * error, target)
    assert float(twice["spectral"]) == pytest.approx(2 * float(found_terms["spectral"]), rel=1e-4)
    weighted = Loss(mse=2, l1=0, spectral=3)
    total = losses.total(weighted, losses.terms(weighted, target + error, target))
    assert float(total) == pytest.approx(
        2 * float(found_terms["mse"]) + 3 * float(found_terms["spectral"]), rel=1e-5
    )


# Runs


def test_a_run_learns_and_leaves_what_it_should(fit: Callable[..., Run], data: Path) -> None:
    run = fit(steps=40, epoch=10, loss={"l1": 1}, data={"mixing": 0.5})
    steps, scores = rows(run.steps), rows(run.validation)
    assert [int(row["step"]) for row in steps] == [10, 20, 30, 40]
    assert all(0 < float(row["loss"]) < 1 for row in steps)  # of other windows each
    assert [int(row["step"]) for row in scores] == [10, 20, 30, 40]
    assert float(scores[-1]["sdr"]) > float(scores[0]["sdr"])
    assert float(steps[-1]["learning_rate"]) < 0.01
    best = torch.load(run.best, weights_only=True)
    score, step = max((float(row["sdr"]), int(row["step"])) for row in scores)
    assert best["global_step"] == step
    validated = validation.score(
        run.config(), trainer.trained(run), None, found(data, run.config()).validation[0], torch.device("cpu")
    )
    assert validated == pytest.approx(score, abs=1e-4), "what is exported is what was validated"
    written = run_report.write(run, found(data, run.config()))
    text = written.read_text("utf-8")
    assert text.count("<polyline") == 8
    assert "song 0" in text
    for file in re.findall(r'src="([^"]+)"', text):
        sound, rate = soundfile.read(run.folder / file.replace("%20", " "))
        assert rate == 44100
        assert sound.shape == (88_200, 2)


def test_a_noisy_curve_has_its_running_mean_drawn_over_it() -> None:
    curve = run_report.Curve([*range(100)], [1.0, 3.0] * 50)
    drawn = run_report.diagram(curve, smooth=True)
    heights = {
        kind: np.array([float(point.split(",")[1]) for point in points.split()])
        for kind, points in re.findall(r'<polyline class="(\w+)" points="([^"]+)"', drawn)
    }
    assert heights.keys() == {"faint", "curve"}
    middle = heights["faint"].mean()
    assert np.abs(heights["faint"] - middle).min() > 50
    assert np.abs(heights["curve"][20:] - middle).max() < 10
    assert run_report.diagram(curve).count("<polyline") == 1


def test_the_same_seed_gives_the_same_weights(fit: Callable[..., Run]) -> None:
    first, second, other = fit("a"), fit("b"), fit("c", seed=1)
    assert same(state(first), state(second))
    assert not same(state(first), state(other))
    assert rows(first.steps) == rows(second.steps)
    assert rows(first.validation) == rows(second.validation)


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(
    data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    changes = {"network": {**NETWORK, "norm_groups": None}, "steps": 60, "epoch": 10, "patience": 50}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = fit("whole", **changes)
    finally:
        torch.set_num_threads(threads)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, **changes}), "utf-8")
    output = tmp_path / "killed"
    arguments = [sys.executable, "-m", "training", "run", str(config), "--data", str(data), "-o", str(output)]
    arguments += ["--decoded", str(tmp_path / "decoded"), "--device", "cpu", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for epochs in (1, 3):  # killed when so many are done, in the middle of the next
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            path = output / "steps.csv"
            if (
                path.is_file()
                and len(path.read_bytes().splitlines()) > epochs
                and (output / "checkpoints" / "last.ckpt").is_file()
            ):
                break
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = Run(output)
    assert same(state(killed), state(whole))
    assert rows(killed.steps) == rows(whole.steps)
    scores, expected = rows(killed.validation), rows(whole.validation)
    assert [(row["step"], row["song"]) for row in scores] == [(row["step"], row["song"]) for row in expected]
    assert [float(row["sdr"]) for row in scores] == pytest.approx(
        [float(row["sdr"]) for row in expected], abs=1e-6
    )
    assert killed.page.is_file()


def test_accumulated_gradients_are_those_of_the_batch(fit: Callable[..., Run]) -> None:
    whole, parts = fit("whole", batch=4), fit("parts", batch=4, at_once=1)
    first, second = state(whole), state(parts)
    for name, value in first.items():
        if value.is_floating_point():
            assert torch.allclose(value, second[name], atol=2e-4), name


def test_two_processes_learn_what_one_learns(data: Path, tmp_path: Path, fit: Callable[..., Run]) -> None:
    alone = fit("alone", batch=4)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "batch": 4}), "utf-8")
    output = tmp_path / "both"
    arguments = [
        "run",
        str(config),
        "--data",
        str(data),
        "-o",
        str(output),
        "--devices",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "training", *arguments, "--workers", "0", "--decoded", str(tmp_path / "decoded")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    together = state(Run(output))
    for name, value in state(alone).items():
        if value.is_floating_point():
            assert torch.allclose(value, together[name], atol=2e-4), name
    assert [row["song"] for row in rows(Run(output).validation)] == ["song 0"] * 3


def poisoned(data: Path, tmp_path: Path) -> Path:
    """The songs, one of which is NaN throughout."""
    copy = tmp_path / "poisoned"
    shutil.copytree(data, copy)
    (copy / "song 1" / "vocals.flac").unlink()
    soundfile.write(
        copy / "song 1" / "vocals.wav", np.full((88_200, 2), np.nan, np.float32), 44100, subtype="FLOAT"
    )
    return copy


@pytest.mark.parametrize("norm_groups", [None, 2])
def test_what_is_not_finite_is_stepped_over(
    norm_groups: int | None, data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    network = {**NETWORK, "norm_groups": norm_groups}
    run = fit(folder=poisoned(data, tmp_path), steps=20, epoch=10, network=network, batch=1)
    skipped = int(rows(run.steps)[-1]["skipped"])
    assert 3 < skipped < 17
    assert all(value.isfinite().all() for value in state(run).values())


def test_or_the_run_stops(data: Path, tmp_path: Path, fit: Callable[..., Run]) -> None:
    with pytest.raises(TrainingError, match=r"not finite at step \d+: lower optimizer.rate"):
        fit(folder=poisoned(data, tmp_path), steps=20, batch=2, nan="stop")


def test_a_run_is_what_it_was_begun_as(fit: Callable[..., Run], data: Path) -> None:
    fit()
    with pytest.raises(TrainingError, match="begun with seed 0, not 1"):
        fit(seed=1)
    with pytest.raises(TrainingError, match="begun with validation"):
        fit(validation=["song 1"])


def test_a_run_that_ended_early_has_ended(fit: Callable[..., Run]) -> None:
    """With a rate of next to nothing, no validation is better than the first."""
    still = {"optimizer": {"rate": 1e-30}, "patience": 1, "steps": 20, "average": None}
    run = fit(**still)
    before = rows(run.steps), rows(run.validation), run.last.read_bytes()
    assert int(before[1][-1]["step"]) < 20
    fit(**still)
    assert (rows(run.steps), rows(run.validation), run.last.read_bytes()) == before


def test_fewer_windows_at_once_may_be_asked_for_later(fit: Callable[..., Run]) -> None:
    assert fit(batch=4).at_once() == 4
    assert fit(batch=4, at_once=2).at_once() == 2
    assert fit(batch=4).at_once() == 2


def test_a_gradient_that_is_never_finite_ends_the_run(
    fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SKIPPED", 5)
    monkeypatch.setattr(losses, "total", lambda config, terms: terms["l1"] * float("nan"))
    with pytest.raises(TrainingError, match="5 steps in a row up to step 5 were not finite"):
        fit(steps=20)


def test_a_full_disk_is_told_before_the_first_step(
    fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(TrainingError, match="checkpoints and logs need 0.13 GB, and 0.00 GB are free"):
        fit()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_file_that_vanishes_is_one_line(
    data: Path, tmp_path: Path, fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    decode = decoded_songs.decode

    def and_then_it_vanishes(*arguments: object) -> songs.Songs:
        decoded = decode(*arguments)
        shutil.rmtree(tmp_path / "decoded")
        return decoded

    monkeypatch.setattr(decoded_songs, "decode", and_then_it_vanishes)
    with pytest.raises(TrainingError, match="cannot be read any more"):
        fit(folder=copy)


def test_only_one_process_works_on_a_run(fit: Callable[..., Run], tmp_path: Path) -> None:
    with (
        Run(tmp_path / "run").locked(),
        pytest.raises(TrainingError, match="another process works on this run"),
    ):
        fit()


# The network in training


@pytest.mark.parametrize("norm_groups", [None, 2])
def test_recomputed_activations_change_nothing(norm_groups: int | None) -> None:
    spectrum = torch.randn(2, 4, 128, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for recomputed in (False, True):
        network = tiny.unet("vocals", norm_groups, seed=3).train()
        if recomputed:
            module.recompute(network)
        network.unet(spectrum).square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append({**gradients, **dict(network.named_buffers())})
    assert same(*results)


@pytest.mark.parametrize("norm_groups", [None, 2, 4])
def test_an_exported_network_separates_as_before(
    norm_groups: int | None,
    fit: Callable[..., Run],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tmp_path / "models"
    run = fit(network={**NETWORK, "norm_groups": norm_groups}, steps=8)
    made = export.export(run, "mine", models)
    assert made.difference < 1e-4
    stored = torch.load(made.state, weights_only=True)
    assert stored["window"].shape == (512,)
    assert stored["freq_pad"].shape == (1, 4, 193, 32)

    monkeypatch.setenv("KMDX_MODELS", str(models))
    assert weights.get("mine").title == "A small network"
    text = """
    networks:
      state: {weights: mine, trim_and_join: {chunk: 7936, trim: 256}}
      graph:
        weights: {file: models/mine.onnx, architecture: {type: onnx, sources: [vocals], n_fft: 512, hop: 256, bins: 64, frames: 32}}
        trim_and_join: {chunk: 7936, trim: 256}
    signals:
      S: {network: state, hears: mixture}
      G: {network: graph, hears: mixture}
    stems:
      vocals: {sum: {S.vocals: 1}}
      other: {sum: {G.vocals: 1}}
    """
    plan = tmp_path / "plan.yaml"
    plan.write_text(text, "utf-8")
    mixture = sum(sampling.whole(found(data, run.config()).validation[0]).values())
    stems = Separator(plan, device="cpu", precision="fp32").separate(mixture.T, 44100)
    network = trainer.trained(run)
    with torch.inference_mode():
        first = network(torch.from_numpy(np.pad(mixture, ((0, 0), (256, 0)))[:, :CHUNK])[None])[
            0, 0, :, 256:-256
        ]
    assert decibels(first.numpy().T, stems["vocals"][: CHUNK - 512]) > 90
    assert decibels(stems["vocals"], stems["other"]) > 80


def test_names_that_cannot_be_exported(fit: Callable[..., Run], tmp_path: Path) -> None:
    run = fit(steps=2)
    with pytest.raises(TrainingError, match="expected small letters"):
        export.export(run, "My Net", tmp_path)
    with pytest.raises(TrainingError, match="a weight that is known has that name"):
        export.export(run, "mdx_vocals", tmp_path)
    with pytest.raises(TrainingError, match="not a training run"):
        Run.existing(tmp_path)


def test_a_malformed_list_of_trained_weights_is_one_line(tmp_path: Path) -> None:
    for text, message in (
        ("mine: {file: 3}", "the entry mine: expected a mapping with a file and an architecture"),
        ("mine: {file: 3, architecture: {}}", "the entry mine: expected the name of its file, not 3"),
        ('mine: {file: "a\\0", architecture: {}}', r"expected the path of a file, not 'a\\x00'"),
        (
            "mine: {file: a, architecture: {type: x}}",
            "the entry mine: the architecture of a: the type is 'x'",
        ),
        ('"a\\nb": {file: a, architecture: {}}', r"the entry 'a\\nb': expected a name of 1 to 100 bytes"),
        ("1: {}", "expected weights by their names"),
        ("- 1", "expected weights by their names"),
        ("a: &a [*a]", "trained.yaml: cannot be read: line 1: an anchor that holds itself"),
    ):
        (tmp_path / "trained.yaml").write_text(text, "utf-8")
        with pytest.raises(WeightsError, match=message) as caught:
            weights.trained(tmp_path)
        assert str(caught.value).isprintable()
    assert weights.trained(tmp_path / "nowhere") == {}


def test_a_trained_vocals_network_is_taken_out(fit: Callable[..., Run], data: Path) -> None:
    vocals = fit("vocals", steps=4)
    run = fit("drums", source="drums", hears="rest", rest={"vocals": str(vocals.folder)}, steps=4)
    assert rows(run.validation)
    other = {**NETWORK, "frames": 64}
    with pytest.raises(TrainingError, match="expected vocals in windows of 16128"):
        fit("longer", source="drums", hears="rest", rest={"vocals": str(vocals.folder)}, network=other)


# Memory


@pytest.mark.parametrize("norm_groups", [None, 2])
def test_the_budget_counts_what_autograd_keeps(norm_groups: int | None) -> None:
    config = small(network={**NETWORK, "norm_groups": norm_groups}, average=None)
    needed = budget.measure(config)
    network = TfcTdf(config.network.unet(), "vocals")
    kept: dict[int, int] = {}
    own = {
        parameter.untyped_storage().data_ptr() for parameter in (*network.parameters(), *network.buffers())
    }
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.unet(torch.randn(1, 4, 64, 32))
    assert needed.window - 2 * max(kept.values()) == sum(kept.values())
    assert needed.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert needed.fixed == 4 * 4 * needed.parameters


def test_recomputing_takes_less_memory() -> None:
    plain, recomputed = (budget.measure(small(checkpointing=value)) for value in (False, True))
    assert recomputed.window < plain.window
    assert recomputed.gflop == pytest.approx(plain.gflop * 4 / 3)


@pytest.mark.parametrize("stem", STEMS)
def test_published_networks_train_on_a_t4_as_documented(stem: str) -> None:
    config = configs.load(stem)
    needed = budget.measure(config)
    assert needed.most(budget.SPARE * (budget.T4 - budget.OVERHEAD)) >= 1
    manual = (Path(__file__).parents[1] / "docs" / "training.md").read_text("utf-8")
    assert f"| `{stem}` | {' | '.join(budget.row(config, needed))} |" in manual


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing", "--data", "x", "-o", "y"], "no config 'nothing'"),
        (
            ["run", "vocals", "--data", "nowhere", "-o", "y", "--set", "precision=fp32"],
            "nowhere: no such folder",
        ),
        (["run", "vocals", "--data", "x", "-o", "y", "--set", "batch"], "--set batch: expected KEY=VALUE"),
        (
            ["run", "vocals", "--data", "x", "-o", "y", "--set", "batch=many"],
            "batch: input should be a valid integer",
        ),
        (
            ["run", "vocals", "--data", "x", "-o", "y", "--device", "tpu"],
            "device 'tpu': expected auto, cpu or cuda",
        ),
        (
            ["run", "vocals", "--data", "x", "-o", "y", "--device", "cuda", "--devices", "99"],
            "--devices 99: this machine has",
        ),
        (["run", "drums", "--data", "x", "-o", "y", "--device", "cpu"], "precision fp16 needs a GPU"),
        (["export", "nowhere"], "nowhere: not a training run"),
        (["report", "nowhere"], "nowhere: not a training run"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_table_of_budgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG), "utf-8")
    monkeypatch.setattr(sys, "argv", ["training", "budget", str(path), "--measure"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert not caught.value.code
    table = capsys.readouterr().out
    assert "2 of 2" in table
    config = configs.load("drums")
    needed = budget.measure(config)
    minutes = 1000 * 8 * needed.gflop / 20e3 / 60
    assert budget.epoch_on_t4(config, needed) / 60 == pytest.approx(minutes)
    assert 10 < minutes < 20
