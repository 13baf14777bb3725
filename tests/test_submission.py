"""The challenge's interface: its methods, the files it writes, and its errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import noise

from kmdx.errors import KmdxError
from my_submission import aicrowd_wrapper, user_config
from my_submission.aicrowd_wrapper import AIcrowdWrapper
from my_submission.music_separation_model import MusicSeparationModel

ROOT = Path(__file__).parents[1]
FOUR = ["bass", "drums", "other", "vocals"]


@pytest.fixture(scope="module")
def model(leaderboard: Path) -> MusicSeparationModel:
    return MusicSeparationModel(leaderboard, device="cpu")


@pytest.fixture
def wrapper(model: MusicSeparationModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AIcrowdWrapper:
    """The wrapper over two songs, as the server sets it up."""
    for seed, name in enumerate(("Ünï cödé", "b song")):
        (tmp_path / "data" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "data" / name / "mixture.wav", noise(20_000, seed=seed), 44100)
    monkeypatch.setenv("AICROWD_DATASET_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("AICROWD_PUBLIC_SHARED_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(aicrowd_wrapper, "MySeparationModel", lambda: model)
    return AIcrowdWrapper()


def test_run_by_hand_without_a_data_set_it_is_a_one_line_error(
    model: MusicSeparationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AICROWD_DATASET_DIR", "nowhere")
    monkeypatch.setattr(aicrowd_wrapper, "MySeparationModel", lambda: model)
    with pytest.raises(KmdxError, match="no data set at nowhere; set AICROWD_DATASET_DIR"):
        aicrowd_wrapper.main()


def test_the_model_has_the_challenges_interface(model: MusicSeparationModel) -> None:
    assert model.instruments == FOUR
    song = noise(20_000).astype(np.float64)
    stems, rates = model.separate_music_file(song, 44100)
    assert sorted(stems) == FOUR
    assert rates == dict.fromkeys(stems, 44100)
    assert all(stem.shape == song.shape for stem in stems.values())
    with pytest.raises(NameError, match="for the log"):
        model.raise_aicrowd_error("for the log")


def test_one_line_of_user_config_selects_the_ensemble(
    monkeypatch: pytest.MonkeyPatch, leaderboard: Path
) -> None:
    assert user_config.ENSEMBLE == "leaderboard_c"
    monkeypatch.setattr(user_config, "ENSEMBLE", leaderboard)
    monkeypatch.setattr(user_config, "ENGINE", "plain")
    separator = user_config.MySeparationModel().separator
    assert (separator.plan.name, separator.engine) == (leaderboard.stem, "plain")


def test_predictions_are_16_bit_files_of_the_stems(wrapper: AIcrowdWrapper, tmp_path: Path) -> None:
    assert wrapper.separate_music_file("b song") is True
    wrapper.evaluate()
    for name in ("Ünï cödé", "b song"):
        mixture, rate = soundfile.read(tmp_path / "data" / name / "mixture.wav")
        stems, _ = wrapper.model.separate_music_file(mixture, rate)
        for stem, samples in stems.items():
            path = tmp_path / "shared" / "predictions" / name / f"{stem}.wav"
            assert soundfile.info(path).subtype == "PCM_16"
            written, written_rate = soundfile.read(path, dtype="float32")
            assert written_rate == rate
            assert np.abs(written - np.clip(samples, -1, 1)).max() <= 1 / 32768


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda stems, rates: (stems.pop("bass"), rates), "stems for"),
        (lambda stems, rates: stems.update(guitar=stems["bass"]), "stems for"),
        (lambda stems, rates: rates.pop("bass"), "sample rates for"),
        (lambda stems, rates: stems.update(bass=stems["bass"][:-1]), "bass has shape"),
        (lambda stems, rates: rates.update(bass=48000), "bass is at 48000 Hz"),
    ],
)
def test_wrong_results_are_refused_and_nothing_is_written(
    wrapper: AIcrowdWrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil, message: str
) -> None:
    class Spoilt:
        def separate_music_file(self, samples, rate):
            stems = {name: samples.copy() for name in FOUR}
            rates = dict.fromkeys(FOUR, rate)
            spoil(stems, rates)
            return stems, rates

    monkeypatch.setattr(wrapper, "model", Spoilt())
    with pytest.raises(NameError, match=message):
        wrapper.separate_music_file("b song")
    assert not (tmp_path / "shared").exists()


def test_a_missing_data_set_is_reported(wrapper: AIcrowdWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "dataset_dir", Path("nowhere"))
    with pytest.raises(NameError, match="no data set at nowhere"):
        wrapper.get_all_music_names()


def test_an_empty_data_set_is_reported(
    wrapper: AIcrowdWrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrapper, "dataset_dir", tmp_path)
    (tmp_path / "song").mkdir()
    with pytest.raises(NameError, match=r"has no song folders with a mixture\.wav"):
        wrapper.evaluate()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_files_that_the_challenge_reads_are_valid() -> None:
    import tomllib

    config = json.loads((ROOT / "aicrowd.json").read_text("utf-8"))
    assert config["challenge_id"] == "music-demixing-track-mdx-23"
    assert config["authors"]
    assert config["gpu"] is True
    assert config["external_dataset_used"] is True
    assert config["labelnoise"] is False
    assert config["bleeding"] is False
    pins = [
        line
        for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert "torch==2.13.0" in pins
    assert all("==" in pin for pin in pins)
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = (*project["dependencies"], *project["optional-dependencies"]["gpu"])
    needed = {re.split(r"[<>=]", line)[0].lower() for line in wanted}
    assert {pin.partition("==")[0].lower() for pin in pins} == needed
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert "--uid 1001" in dockerfile
    assert "USER aicrowd" in dockerfile
    assert "requirements.txt" in dockerfile
    assert "LANG=C.UTF-8" in dockerfile


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs a shell")
@pytest.mark.parametrize("cuda", ["13.0.1", "12.8.1"])
def test_the_image_installs_torch_and_onnx_runtime_for_its_cuda(tmp_path: Path, cuda: str) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    (step,) = re.findall(r"^RUN (python3\.12 -m venv .*?[^\\])$", dockerfile, re.MULTILINE | re.DOTALL)
    for name in ("requirements.txt", "requirements-cuda12.txt"):
        shutil.copy(ROOT / name, tmp_path)
    step = step.replace("python3.12 -m venv .venv", "true").replace("pip install --requirement", "cat")
    installed = subprocess.run(
        ["/bin/sh", "-c", step],
        cwd=tmp_path,
        env={**os.environ, "CUDA": cuda},
        check=True,
        capture_output=True,
    ).stdout.decode()
    pins = [line for line in installed.splitlines() if line and not line.startswith("#")]
    usual = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    changed = {pin for pin in pins if pin not in usual}
    expected = {"onnxruntime-gpu==1.26.0", "torch==2.10.0"} if cuda.startswith("12") else set()
    assert changed == expected
    names = [pin.partition("==")[0] for pin in pins]
    assert sorted(names) == sorted({line.partition("==")[0] for line in usual if not line.startswith("#")})
