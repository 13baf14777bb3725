"""Listening pages: what they contain, when they are written, and what they refuse."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_cases
import numpy as np
import pytest
import soundfile
from cli_cases import Run, files_in, write
from conftest import decibels, noise

from kmdx import audio, encoding, listening, spectrograms
from kmdx.errors import KmdxError

run, separate = cli_cases.run, cli_cases.separate

RATE = 44100
NASTY = "<b>R&D 'n' \"q\" Ärger 歌"


def stems(folder: Path, *names: str, seconds: float = 7.0, rate: int = RATE, channels: int = 2) -> Path:
    """A folder with a file of noise for each stem."""
    for number, name in enumerate(names):
        write(folder / f"{name}.wav", noise(round(seconds * rate), channels, seed=number), rate)
    return folder


def data_of(page: Path) -> dict[str, Any]:
    """What the player of a page gets."""
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S
    )
    assert match is not None
    return json.loads(match[1])


def sound_of(page: Path, track: int) -> np.ndarray:
    """A track of a page as the player joins it: its segments without their margins."""
    data, text = data_of(page), page.read_text("utf-8")
    parts = []
    for address in data["tracks"][track]["segments"]:
        match = re.search(f'id="{address[1:]}">(.*?)</script>', text)
        assert match is not None
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(match[1])), always_2d=True)
        assert rate == data["rate"]
        margin = round(data["margin"] * rate)
        parts.append(samples[margin : len(samples) - margin])
    return np.concatenate(parts)


def test_a_page_has_the_sound_of_every_stem_and_of_the_mixture(tmp_path: Path) -> None:
    folder = stems(tmp_path / "song", "drums", "vocals", "mixture")
    page = listening.make(folder)
    data = data_of(page)
    assert [track["name"] for track in data["tracks"]] == ["vocals", "drums", "Original"]
    assert data["duration"] == pytest.approx(7.0)
    for track, name in enumerate(("vocals", "drums", "mixture")):
        truth = audio.read(folder / f"{name}.wav").samples
        found = sound_of(page, track)
        assert found.shape == truth.shape
        assert decibels(truth, found) > 3  # mp3 of noise; the wrong place in it would be below -2 dB
        peak = max(data["tracks"][track]["peaks"])
        assert peak == pytest.approx(np.abs(truth).max(), abs=0.001)
        assert data["tracks"][track]["picture"].startswith("data:image/png;base64,")


def test_a_page_names_nothing_outside_itself(tmp_path: Path) -> None:
    text = listening.make(stems(tmp_path / "song", "vocals", seconds=1)).read_text("utf-8")
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^">)]*)', markup) == ["data:,"]
    assert "BSD 3-Clause License" in text
    assert "default-src 'none'" in text


def test_names_stay_text(tmp_path: Path) -> None:
    page = listening.make(stems(tmp_path / NASTY, "<i>a & b", seconds=1))
    assert data_of(page)["tracks"][0]["name"] == "<i>a & b"
    assert "<i>" not in page.read_text("utf-8")
    assert "<title>&lt;b&gt;R&amp;D" in page.read_text("utf-8")


def test_a_page_is_written_again_only_if_its_stems_change(tmp_path: Path) -> None:
    folder = stems(tmp_path / "song", "vocals", seconds=1)
    page = listening.make(folder)
    before = page.stat().st_ino
    assert listening.make(folder).stat().st_ino == before
    stems(folder, "vocals", seconds=2)
    assert listening.make(folder).stat().st_ino != before
    assert data_of(page)["duration"] == pytest.approx(2.0)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_file_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    folder = stems(tmp_path / "song", "vocals", seconds=1)
    (folder / "listen.html").write_text("mine")
    with pytest.raises(KmdxError, match=r"listen\.html is not a listening page of kmdx: rename it"):
        listening.make(folder)
    assert (folder / "listen.html").read_text() == "mine"


def test_songs_of_an_album_are_not_taken_for_stems(tmp_path: Path) -> None:
    folder = stems(tmp_path / "album", "one", seconds=1)
    stems(folder, "two", seconds=3)
    with pytest.raises(KmdxError, match=r"one\.wav lasts 1\.0 s and two\.wav 3\.0 s"):
        listening.make(folder)
    assert not (folder / "listen.html").exists()


def test_a_page_that_no_browser_could_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "LONGEST", 180)
    folder = stems(tmp_path / "song", *map(str, range(4)), seconds=60, rate=8000, channels=1)
    with pytest.raises(
        KmdxError, match="4 tracks of 1 min are 4 min of sound, and a page holds at most 3 min"
    ):
        listening.make(folder)


def test_long_songs_are_compressed_more_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stems(tmp_path / "song", "vocals", "drums", seconds=4)
    page = listening.make(folder)
    size = page.stat().st_size
    page.unlink()
    monkeypatch.setattr(listening, "LONG", 7)
    assert listening.make(folder).stat().st_size < size
    assert "lower quality" in page.read_text("utf-8")


@pytest.mark.parametrize(("rate", "expected"), [(8000, 8000), (48000, 48000), (96000, 48000), (88200, 44100)])
def test_rates_that_mp3_lacks_are_converted(tmp_path: Path, rate: int, expected: int) -> None:
    data = data_of(listening.make(stems(tmp_path, "vocals", seconds=1.5, rate=rate, channels=1)))
    assert data["rate"] == expected
    assert data["duration"] == pytest.approx(1.5, abs=1 / expected)


def test_a_sum_of_stems_is_muted_next_to_its_parts_only(tmp_path: Path) -> None:
    folder = stems(tmp_path / "song", "vocals", "accompaniment", seconds=1)
    muted = [track["muted"] for track in data_of(listening.make(folder))["tracks"]]
    assert muted == [False, False]
    pair = stems(tmp_path / "pair", "drums", "no_drums", seconds=1)
    assert not any(track["muted"] for track in data_of(listening.make(pair))["tracks"])
    four = stems(tmp_path / "four", "bass", "drums", "no_drums", "vocals", seconds=1)
    muted = {track["name"]: track["muted"] for track in data_of(listening.make(four))["tracks"]}
    assert muted == {"vocals": False, "drums": False, "bass": False, "no_drums": True}
    stems(folder, "drums", seconds=1)
    tracks = data_of(listening.make(folder))["tracks"]
    assert {track["name"]: track["muted"] for track in tracks} == {
        "vocals": False,
        "drums": False,
        "accompaniment": True,
    }


def test_fifty_three_stems_fit_on_a_page(tmp_path: Path) -> None:
    names = [f"stem {number}" for number in range(53)]
    page = listening.make(stems(tmp_path, *names, seconds=0.2, rate=8000, channels=1))
    assert [track["name"] for track in data_of(page)["tracks"]] == names  # 2 before 10


def test_a_spectrogram_shows_pitch_and_level() -> None:
    moment = np.arange(2 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * moment).astype(np.float32)[:, None]
    power = spectrograms.spectrogram(audio.Audio(tone, RATE))
    row = int(spectrograms.height(1000) * spectrograms.ROWS)
    assert abs(int(power[:, 100].argmax()) - row) <= 1
    png = spectrograms.png(spectrograms.levels(power, power.max()))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert zlib.crc32(png[12:29]) == int.from_bytes(png[29:33], "big")  # of the header
    assert int.from_bytes(png[20:24], "big") == spectrograms.ROWS


def test_an_mp3_in_memory_keeps_its_length_and_place() -> None:
    samples = noise(3 * RATE)
    samples[50_000:50_100] = 5.0  # far beyond full scale
    decoded, rate = soundfile.read(io.BytesIO(encoding.mp3(samples, RATE, 0.0)))
    assert rate == RATE
    assert len(decoded) == len(samples)
    assert decibels(samples.clip(-1, 1), decoded) > 6


# ------------------------------------------------------------------------------------------ the commands


def test_separate_writes_a_page_with_the_original(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(30_000))
    result = separate("song.wav", "--page", "--format", "mp3", "--stems", "vocals,drums")
    assert result.code == 0
    assert files_in(tmp_path / "out") == ["song/drums.mp3", "song/listen.html", "song/vocals.mp3"]
    page = tmp_path / "out" / "song" / "listen.html"
    assert [track["name"] for track in data_of(page)["tracks"]] == ["vocals", "drums", "Original"]
    assert "to listen, open out/song/listen.html" in result.err


def test_a_page_is_added_without_separating_again(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmdx import batch

    write(tmp_path / "song.wav", noise(30_000))
    assert separate("song.wav").code == 0
    monkeypatch.setattr(batch, "load_separator", None)  # cannot be called
    assert separate("song.wav", "--page").code == 0
    page = tmp_path / "out" / "song" / "listen.html"
    assert len(data_of(page)["tracks"]) == 5
    page.unlink()
    assert separate("song.wav").code == 0
    assert not page.exists()


def test_the_original_is_the_part_that_was_separated(separate: Run, run: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(3 * RATE))
    assert separate("song.wav", "--start", "1", "--duration", "0.5", "--page").code == 0
    page = tmp_path / "out" / "song" / "listen.html"
    assert data_of(page)["duration"] == pytest.approx(0.5)
    truth = audio.read(tmp_path / "song.wav", 1, 0.5).samples
    assert decibels(truth, sound_of(page, 4)) > 3
    page.unlink()
    assert run("page", "out").code == 0  # which learns it from the records
    assert decibels(truth, sound_of(page, 4)) > 3


def test_several_songs_get_an_index(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "album" / "CD 1" / "a#1.wav", noise(20_000))
    write(tmp_path / "album" / "b.wav", noise(20_000, seed=1))
    result = separate("album", "--page", "--stems", "vocals")
    assert result.code == 0
    index = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert 'href="CD%201/a%231/listen.html">CD 1 / a#1<' in index
    assert 'href="b/listen.html">b<' in index
    assert "to listen, open out/index.html" in result.err


@pytest.mark.slow
def test_workers_write_pages_too(separate: Run, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write(tmp_path / "song.wav", noise(30_000))
    result = separate("song.wav", "--page", "--workers", "1", "--cpus-per-worker", "1")
    assert result.code == 0, result.err
    assert "out/song/listen.html" in result.err


def test_a_page_that_cannot_be_written_is_a_warning(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(30_000))
    (tmp_path / "out" / "song" / "listen.html").mkdir(parents=True)
    result = separate("song.wav", "--page", "--stems", "vocals")
    assert result.code == 0
    assert "warning: " in result.err
    assert "listen.html" in result.err
    assert (tmp_path / "out" / "song" / "vocals.wav").is_file()


def test_pages_of_an_output_at_a_url_are_refused(run: Run, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    write(tmp_path / "song.wav", noise(30_000))
    result = run("separate", "song.wav", "--page", "-o", "memory://stems", "-e", small, "--device", "cpu")
    assert result.code == 2
    assert "--page needs an output folder on this machine, not memory://stems" in result.err


def test_the_songs_of_an_index_are_in_natural_order(tmp_path: Path) -> None:
    names = ["Track 1", "track 2", "Track 10", "x"]
    for name in names:
        listening.make(stems(tmp_path / name, "vocals", seconds=0.2, rate=8000, channels=1))
    index = listening.write_index(tmp_path)
    assert index is not None
    assert re.findall(r'/listen.html">(.*?)<', index.read_text("utf-8")) == names


def test_a_folder_that_cannot_be_read_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        stems(tmp_path / name, "vocals", seconds=0.2, rate=8000, channels=1)
    readable = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder.name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return readable(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    pages: list[Path] = []
    errors: list[str] = []
    listening.make_all(tmp_path, pages.append, errors.append)
    assert pages == [tmp_path / "b" / "listen.html"]
    assert errors == [f"{tmp_path / 'a'}: Permission denied"]


def test_page_makes_pages_of_stems_from_elsewhere(run: Run, tmp_path: Path) -> None:
    stems(tmp_path / "all" / "one", "vocals", "drums", "mixture", seconds=1)
    stems(tmp_path / "all" / "two", "guitar", seconds=1)
    (tmp_path / "all" / "bad").mkdir()
    (tmp_path / "all" / "bad" / "vocals.wav").write_bytes(b"RIFF of nothing")
    result = run("page", "all")
    assert result.code == 1
    assert result.out.splitlines() == ["all/one/listen.html", "all/two/listen.html", "all/index.html"]
    assert "bad/vocals.wav" in result.err
    names = [track["name"] for track in data_of(tmp_path / "all" / "two" / "listen.html")["tracks"]]
    assert names == ["guitar"]


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_a_folder_without_stems_is_one_line(run: Run, tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = run("page", what)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert what in result.err
