"""Whole runs on the CPU: what they learn, how they continue, what stops them."""

from __future__ import annotations

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
import torch
import training_cases as cases
import yaml

from training import decoded_songs, losses, module, run_report, songs, trainer, validation
from training.config import TrainingError
from training.run import Run

data, fit = cases.data, cases.fit


def test_a_run_learns_and_writes_its_files(fit: Callable[..., Run], data: Path) -> None:
    run = fit(steps=40, epoch=10, loss={"l1": 1}, data={"mixing": 0.5})
    steps, scores = cases.rows(run.steps), cases.rows(run.validation)
    assert [int(row["step"]) for row in steps] == [10, 20, 30, 40]
    assert all(0 < float(row["loss"]) < 1 for row in steps)  # of other windows each
    assert [int(row["step"]) for row in scores] == [10, 20, 30, 40]
    assert float(scores[-1]["sdr"]) > float(scores[0]["sdr"])
    assert float(steps[-1]["learning_rate"]) < 0.01
    best = torch.load(run.best, weights_only=True)
    score, step = max((float(row["sdr"]), int(row["step"])) for row in scores)
    assert best["global_step"] == step
    validated = validation.score(
        run.config(),
        trainer.trained(run),
        None,
        cases.found(data, run.config()).validation[0],
        torch.device("cpu"),
    )
    assert validated == pytest.approx(score, abs=1e-4), "what is exported is what was validated"
    written = run_report.write(run, cases.found(data, run.config()))
    text = written.read_text("utf-8")
    assert text.count("<svg") == text.count("<figcaption") == 5
    assert "song 0" in text
    for file in re.findall(r'src="([^"]+)"', text):
        sound, rate = soundfile.read(run.folder / file.replace("%20", " "))
        assert rate == 44100
        assert sound.shape == (88_200, 2)


def test_the_same_seed_gives_the_same_weights(fit: Callable[..., Run]) -> None:
    first, second, other = fit("a"), fit("b"), fit("c", seed=1)
    assert cases.same(cases.state(first), cases.state(second))
    assert not cases.same(cases.state(first), cases.state(other))
    assert cases.rows(first.steps) == cases.rows(second.steps)
    assert cases.rows(first.validation) == cases.rows(second.validation)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(
    data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    changes = {"network": {**cases.NETWORK, "norm_groups": None}, "steps": 60, "epoch": 10, "patience": 50}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = fit("whole", **changes)
    finally:
        torch.set_num_threads(threads)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**cases.CONFIG, **changes}), "utf-8")
    output = tmp_path / "killed"
    arguments = [sys.executable, "-m", "training", "run", str(config), "--data", str(data), "-o", str(output)]
    arguments += ["--decoded", str(tmp_path / "decoded"), "--device", "cpu", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for epochs in (1, 3):  # killed in the middle of the epoch after these
        process = subprocess.Popen(
            arguments, cwd=cases.ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True
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
    done = subprocess.run(arguments, cwd=cases.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = Run(output)
    assert cases.same(cases.state(killed), cases.state(whole))
    assert cases.rows(killed.steps) == cases.rows(whole.steps)
    scores, expected = cases.rows(killed.validation), cases.rows(whole.validation)
    assert [(row["step"], row["song"]) for row in scores] == [(row["step"], row["song"]) for row in expected]
    assert [float(row["sdr"]) for row in scores] == pytest.approx(
        [float(row["sdr"]) for row in expected], abs=1e-6
    )
    assert killed.page.is_file()


def test_accumulated_gradients_equal_those_of_the_batch(fit: Callable[..., Run]) -> None:
    whole, parts = fit("whole", batch=4), fit("parts", batch=4, at_once=1)
    first, second = cases.state(whole), cases.state(parts)
    for name, value in first.items():
        if value.is_floating_point():
            assert torch.allclose(value, second[name], atol=2e-4), name


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(
    data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    alone = fit("alone", batch=4)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**cases.CONFIG, "batch": 4}), "utf-8")
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
        cwd=cases.ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    together = cases.state(Run(output))
    for name, value in cases.state(alone).items():
        if value.is_floating_point():
            assert torch.allclose(value, together[name], atol=2e-4), name
    assert [row["song"] for row in cases.rows(Run(output).validation)] == ["song 0"] * 3


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
def test_steps_that_are_not_finite_are_skipped(
    norm_groups: int | None, data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    network = {**cases.NETWORK, "norm_groups": norm_groups}
    run = fit(folder=poisoned(data, tmp_path), steps=20, epoch=10, network=network, batch=1)
    skipped = int(cases.rows(run.steps)[-1]["skipped"])
    assert 3 < skipped < 17
    assert all(value.isfinite().all() for value in cases.state(run).values())


def test_steps_that_are_not_finite_stop_the_run_on_request(
    data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    with pytest.raises(TrainingError, match=r"not finite at step \d+: lower optimizer.rate"):
        fit(folder=poisoned(data, tmp_path), steps=20, batch=2, nan="stop")


def test_a_run_cannot_be_resumed_with_another_config(fit: Callable[..., Run], data: Path) -> None:
    fit()
    with pytest.raises(TrainingError, match="started with seed 0, not 1"):
        fit(seed=1)
    with pytest.raises(TrainingError, match="started with validation"):
        fit(validation=["song 1"])


def test_a_run_that_ended_early_is_not_continued(fit: Callable[..., Run]) -> None:
    """With a learning rate near 0, no validation is better than the first."""
    still = {"optimizer": {"rate": 1e-30}, "patience": 1, "steps": 20, "average": None}
    run = fit(**still)
    before = cases.rows(run.steps), cases.rows(run.validation), run.last.read_bytes()
    assert int(before[1][-1]["step"]) < 20
    fit(**still)
    assert (cases.rows(run.steps), cases.rows(run.validation), run.last.read_bytes()) == before


def test_fewer_windows_at_once_are_allowed_when_a_run_is_resumed(fit: Callable[..., Run]) -> None:
    assert fit(batch=4).at_once() == 4
    assert fit(batch=4, at_once=2).at_once() == 2
    assert fit(batch=4).at_once() == 2


def test_a_gradient_that_is_never_finite_ends_the_run(
    fit: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SKIPPED", 5)
    monkeypatch.setattr(losses, "total", lambda config, terms: terms["l1"] * float("nan"))
    with pytest.raises(TrainingError, match="5 consecutive steps up to step 5 were not finite"):
        fit(steps=20)


def test_a_full_disk_is_reported_before_the_first_step(
    fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(TrainingError, match="checkpoints and logs need 0.13 GB, but only 0.00 GB are free"):
        fit()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_file_that_disappears_is_a_one_line_error(
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
    with pytest.raises(TrainingError, match="can no longer be read"):
        fit(folder=copy)


def test_the_estimate_of_a_trained_vocals_network_is_subtracted(fit: Callable[..., Run], data: Path) -> None:
    vocals = fit("vocals", steps=4)
    run = fit("drums", source="drums", hears="rest", rest={"vocals": str(vocals.folder)}, steps=4)
    assert cases.rows(run.validation)
    other = {**cases.NETWORK, "frames": 64}
    with pytest.raises(TrainingError, match="expected vocals in windows of 16128"):
        fit("longer", source="drums", hears="rest", rest={"vocals": str(vocals.folder)}, network=other)
