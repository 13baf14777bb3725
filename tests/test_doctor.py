"""``kmdx doctor`` fits on a screen, has no secrets, and says what is broken and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import cli_cases
import pytest
from cli_cases import Run

from kmdx import devices, doctor

run = cli_cases.run


def test_a_report_has_versions_devices_folders_and_weights_on_one_screen(run: Run) -> None:
    result = run("doctor")
    assert result.code == 0
    lines = result.out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= doctor.WIDTH
    text = " ".join(result.out.split())
    for what in (
        "Python",
        "torch",
        "processor",
        "kernels",
        "CUDA",
        "ONNX",
        "models",
        "temporary",
        "runs on cpu",
    ):
        assert what in text
    assert "mini 4 of 4 runs on cpu" in text
    assert lines[-1] == "nothing is broken"


def test_a_report_hides_the_users_home_and_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "ada"
    (home / "models").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setenv("KMDX_MODELS", str(home / "models"))
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path / "scratch" / "ada" / "tmp"))
    (tmp_path / "scratch" / "ada" / "tmp").mkdir(parents=True)
    result = run("doctor")
    assert "~/models" in result.out
    assert "ada" not in result.out


def test_a_damaged_ensemble_is_named_with_what_to_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("no plan")
    result = run("doctor")
    assert result.code == 2
    broken = [line for line in result.out.splitlines() if line.startswith("broken: ")]
    assert len(broken) == 1
    assert broken[0].endswith("mine.yaml")
    assert "correct or delete" in broken[0]


def test_a_full_disk_and_an_unused_card_are_broken(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun")
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    result = run("doctor")
    assert result.code == 2
    assert "NVIDIA 580.65.06" in result.out
    broken = [line for line in result.out.splitlines() if line.startswith("broken: ")]
    assert len(broken) == 2
    assert "set TMPDIR" in broken[0]
    assert "install torch's CUDA build" in broken[1]


def test_a_device_that_fails_is_named_and_the_rest_is_shown(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unknown error\nmore lines")

    monkeypatch.setattr(devices, "gpu_count", fail)
    result = run("doctor")
    assert result.code == 2
    assert "broken: devices: CUDA error: unknown error" in result.out
    assert "runs on cpu" in " ".join(result.out.split())


def test_a_path_that_only_begins_like_the_home_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "ada")
    for path, shown in ((tmp_path / "ada" / "x", "~/x"), (tmp_path / "ada", "~")):
        assert doctor._anonymous(f"at {path}, here") == f"at {shown}, here"
    assert doctor._anonymous(f"{tmp_path}/adam/x") == f"{tmp_path}/adam/x"


def test_a_command_is_a_command_where_a_folder_has_its_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("doctor", "benchmark", "separate", "page"):
        (tmp_path / name).mkdir()
        assert "Usage" in run(name, "--help").out
    assert run("doctor").out.endswith("nothing is broken\n")
