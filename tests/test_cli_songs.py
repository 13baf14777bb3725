"""``kmdx separate`` on many songs: their folders, their order, and songs that fail."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import cli_cases
import numpy as np
import pytest
import soundfile
import torch
from cli_cases import Run, files_in, write
from conftest import noise

from kmdx import Separator, audio, cli, manifest
from kmdx.errors import AudioError, DeviceError
from kmdx.networks.demucs import DemucsNetwork

run, separate = cli_cases.run, cli_cases.separate


def test_a_folder_is_mirrored(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "album" / "one.wav", noise(5_000))
    write(tmp_path / "album" / "live" / "two.flac", noise(5_000))
    write(tmp_path / "album" / "three" / "mixture.wav", noise(5_000))
    write(tmp_path / "album" / "three" / "vocals.wav", noise(5_000))
    (tmp_path / "album" / "cover.jpg").write_bytes(b"not sound")
    assert separate("album", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == ["live/two/vocals.wav", "one/vocals.wav", "three/vocals.wav"]


def test_stems_in_a_folder_are_not_separated_as_songs(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "one.wav", noise(5_000))
    assert separate(".", "--stems", "vocals").code == 0
    assert separate(".", "--stems", "vocals", "--overwrite").code == 0
    assert files_in(tmp_path / "out") == ["one/vocals.wav"]


def test_songs_with_the_same_name_do_not_overwrite_each_other(separate: Run, tmp_path: Path) -> None:
    for number, folder in enumerate(("x", "y")):
        write(tmp_path / folder / "cd" / "01.wav", noise(5_000 + number))
    assert separate("x/cd", "y/cd/01.wav", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == ["x/cd/01/vocals.wav", "y/cd/01/vocals.wav"]
    frames = [soundfile.info(tmp_path / "out" / name / "cd" / "01" / "vocals.wav").frames for name in "xy"]
    assert frames == [5_000, 5_001]


def test_two_songs_that_share_a_folder_are_refused_before_any_work(separate: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "m" / f"{name}.wav", noise(5_000))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "b").symlink_to("a")
    result = separate("m", "--stems", "vocals")
    assert result.code == 2
    assert "would both be written to out/b" in result.errors[0]
    assert files_in(tmp_path / "out") == []


def test_a_song_that_cannot_be_read_does_not_stop_the_rest(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identify = manifest.identify

    def refused(path: Path, copy: Path | None = None) -> manifest.SourceFile:
        if path.name == "b.wav":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return identify(path, copy)

    monkeypatch.setattr(manifest, "identify", refused)
    for name in "abc":
        write(tmp_path / "m" / f"{name}.wav", noise(5_000))
    result = separate("m", "--stems", "vocals")
    assert (result.code, result.errors) == (1, ["error: m/b.wav: cannot be read: permission denied"])
    assert files_in(tmp_path / "out") == ["a/vocals.wav", "c/vocals.wav"]


def test_one_bad_song_does_not_stop_the_rest(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "good.wav", noise(5_000))
    write(tmp_path / "good too.wav", noise(5_000))
    (tmp_path / "bad.wav").write_text("la la la")
    result = separate("good.wav", "bad.wav", "missing.wav", "good too.wav", "--stems", "vocals")
    assert result.code == 1
    assert files_in(tmp_path / "out") == ["good too/vocals.wav", "good/vocals.wav"]
    assert [("bad.wav" in line, "missing.wav" in line) for line in result.errors] == [
        (False, True),
        (True, False),
    ]


def test_the_result_of_each_song_is_printed_in_order(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in reading, in separating and in writing, and a song after each."""
    separate_one, write_all = Separator.separate, audio.write_all

    def separated(self: Separator, samples: np.ndarray, rate: int, **options: Any) -> Any:
        if len(samples) == 5_003:
            raise DeviceError("too long for this device")
        return separate_one(self, samples, rate, **options)

    def written(files: dict[Path, np.ndarray], *arguments: Any) -> Any:
        if "5 unwritable" in str(next(iter(files))):
            raise AudioError("no space left on device")
        return write_all(files, *arguments)

    monkeypatch.setattr(Separator, "separate", separated)
    monkeypatch.setattr(audio, "write_all", written)
    for number, name in enumerate(["0", "1 unreadable", "2", "3 inseparable", "4", "5 unwritable", "6"]):
        write(tmp_path / "album" / f"{name}.wav", noise(5_000 + number))
    (tmp_path / "album" / "1 unreadable.wav").write_text("la la la")
    monkeypatch.setattr(cli.err, "print", print)  # both kinds of lines in one place
    result = separate("album", "--stems", "vocals")
    lines = [line for line in result.out.splitlines() if "error" in line or "→" in line]
    assert [line for line in lines if "→" in line] == [
        f"album/{number}.wav → out/{number} (vocals)" for number in (0, 2, 4, 6)
    ]
    assert [next(i for i, line in enumerate(lines) if text in line) for text in (
        "0.wav →", "unreadable.wav", "2.wav →", "too long", "4.wav →", "no space", "6.wav →")] == list(range(7))  # fmt: skip
    assert result.code == 1
    assert files_in(tmp_path / "out") == [f"{number}/vocals.wav" for number in (0, 2, 4, 6)]


def test_files_are_read_and_written_during_the_separation(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write_all, separate_one = audio.read, audio.write_all, Separator.separate
    second_read, second_begun, first_written = (threading.Event() for _ in range(3))
    threads = []

    def reading(path: Path, *arguments: Any, **options: Any) -> audio.Audio:
        if path.name == "b.wav":
            second_read.set()
        return read(path, *arguments, **options)

    def separated(self: Separator, samples: np.ndarray, rate: int, **options: Any) -> Any:
        threads.append(threading.current_thread())
        if len(samples) == 5_000:
            assert second_read.wait(120)
        else:
            second_begun.set()
            assert first_written.wait(120)
        return separate_one(self, samples, rate, **options)

    def writing(*arguments: Any) -> Any:
        assert second_begun.wait(120) or first_written.is_set()
        peaks = write_all(*arguments)
        first_written.set()
        return peaks

    monkeypatch.setattr(audio, "read", reading)
    monkeypatch.setattr(audio, "write_all", writing)
    monkeypatch.setattr(Separator, "separate", separated)
    write(tmp_path / "a.wav", noise(5_000))
    write(tmp_path / "b.wav", noise(6_000))
    assert separate("a.wav", "b.wav", "--stems", "vocals").code == 0
    assert threads == [threading.main_thread()] * 2


def test_a_song_in_which_a_network_returns_nan_does_not_stop_the_rest(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network and its weights are named, and not the user's file."""
    forward, calls = DemucsNetwork.forward, []

    def damaged(network: DemucsNetwork, batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))  # three in each song
        return forward(network, batch) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(DemucsNetwork, "forward", damaged)
    for number in range(3):
        write(tmp_path / f"{number}.wav", noise(9000))
    result = separate("0.wav", "1.wav", "2.wav", "--format", "float32")
    assert result.code == 1
    assert len(result.errors) == 1
    assert "network htdemucs returned NaN or infinity in fp32; its weights, " in result.errors[0]
    assert "small.ckpt" in result.errors[0]
    assert "1.wav" not in result.errors[0].partition("network")[2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "2"]


def test_ctrl_c_reports_the_song_that_it_stopped(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kmdx.Separator.separate", interrupt)
    write(tmp_path / "song.wav", noise(5_000))
    result = separate("song.wav")
    assert result.code == 130
    assert result.errors == ["error: stopped in song; finished songs are kept"]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_finished_songs(separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separate_one, write_all = Separator.separate, audio.write_all
    interrupted = threading.Event()

    def interrupt(self: Separator, samples: np.ndarray, rate: int, **options: Any) -> Any:
        if len(samples) == 6_000:
            interrupted.set()
            raise KeyboardInterrupt
        return separate_one(self, samples, rate, **options)

    def slow(*arguments: Any) -> Any:
        assert interrupted.wait(120)
        return write_all(*arguments)

    monkeypatch.setattr(Separator, "separate", interrupt)
    monkeypatch.setattr(audio, "write_all", slow)
    for name, samples in (("a", 5_000), ("b", 6_000), ("c", 7_000)):
        write(tmp_path / f"{name}.wav", noise(samples))
    result = separate("a.wav", "b.wav", "c.wav", "--stems", "vocals")
    assert result.code == 130
    assert result.out == "a.wav → out/a (vocals)\n"
    assert result.errors == ["error: stopped in b; finished songs are kept"]
    assert files_in(tmp_path / "out") == ["a/vocals.wav"]


def test_circular_links_and_overlong_names_are_handled(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "album" / "one.wav", noise(5_000))
    for name in ("up", "again"):
        (tmp_path / "album" / name).symlink_to(tmp_path / "album", target_is_directory=True)
    assert separate("album", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == ["one/vocals.wav"]
    too_long = separate("x" * 300)
    assert too_long.code == 2
    assert len(too_long.errors) == 1
