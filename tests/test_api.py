"""The public names: what they accept, how they are shown and pickled, and what they cost to import."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mypy.api
import numpy as np
import pytest
import separator_cases
import soundfile
import tiny
import torch
from conftest import noise
from weight_cases import CONTENT, published, server  # noqa: F401

import kmdx
from kmdx import Separation, Separator, weights
from kmdx.errors import AudioError, DeviceError, DocumentError, KmdxError, KmdxWarning, WeightsError
from kmdx.weights import Weight
from kmdx.weights.pulling import _NotPulled

separator = separator_cases.separator
ROOT = Path(__file__).parents[1]


@pytest.fixture
def song(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "song.wav", noise(20_000), 44100, subtype="FLOAT")
    return tmp_path / "song.wav"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_every_public_name_exists_and_is_listed() -> None:
    for name in kmdx.__all__:
        assert getattr(kmdx, name) is not None
        assert name in dir(kmdx)
    assert kmdx.Separator is Separator
    assert kmdx.KmdxWarning is KmdxWarning
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        kmdx.Nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_imports_nothing_else_and_only_the_separator_imports_torch() -> None:
    code = (
        "import sys; before = set(sys.modules); import kmdx\n"
        "new = {name for name in set(sys.modules) - before if name.partition('.')[0] not in sys.stdlib_module_names}\n"
        "assert new == {'kmdx'}, new\n"
        "kmdx.read, kmdx.write, kmdx.ensembles(), kmdx.pull, kmdx.KmdxError, kmdx.__version__\n"
        "assert 'torch' not in sys.modules"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_version_is_that_of_the_package_and_the_newest_one_in_the_changelog() -> None:
    assert kmdx.__version__ == version("kmdx-net")
    (stated,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    released = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert stated == released[0]


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "kmdx"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"kmdx-net {kmdx.__version__}\n"
    assert (
        "Usage: python -m kmdx"
        in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.slow
def test_a_type_checker_knows_every_public_name_and_no_others(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    names = ", ".join(name for name in kmdx.__all__ if name != "__version__")
    program.write_text(
        f"import kmdx\nfrom kmdx import {names}\n"
        "separator = Separator('mini')\n"
        "stems, rate = separator.separate_file('song.wav')\n"
        "samples, rate = read('song.wav')\n"
        "reveal_type(stems)\nreveal_type(rate)\nreveal_type(kmdx.__version__)\nkmdx.nothing\n"
    )
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nstrict = True\nfollow_imports = silent\nignore_missing_imports = True\n")
    out, _, _ = mypy.api.run(
        ["--config-file", str(config), "--cache-dir", str(ROOT / ".mypy_cache" / "strict"), str(program)]
    )
    found = [line.partition(": ")[2] for line in out.splitlines()]
    assert 'note: Revealed type is "int"' in found, out
    assert 'note: Revealed type is "str"' in found, out
    assert any("Revealed type is" in line and "ndarray" in line for line in found), out
    assert [line for line in found if line.startswith("error")] == [
        'error: Module has no attribute "nothing"  [attr-defined]'
    ], out


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto"])
@pytest.mark.parametrize("kind", [str, Path])
def test_devices_ensembles_and_folders_are_accepted_in_each_form(
    small: Path, device: str | torch.device, kind: type
) -> None:
    separator = Separator(kind(small), device=device, stems="vocals", folder=kind(small.parent))
    assert separator.device == torch.device(
        "cuda:0" if torch.cuda.is_available() and device == "auto" else "cpu"
    )
    assert separator.stems == ("vocals",)
    assert separator.folder == small.parent
    with pytest.raises(DeviceError, match=r"device 0: expected a torch\.device, or a name such as auto"):
        Separator(kind(small), device=0)  # type: ignore[arg-type]


def test_a_torch_device_that_does_not_exist_is_refused(small: Path) -> None:
    with pytest.raises(DeviceError, match="device 'meta' is not available"):
        Separator(small, device=torch.device("meta"))


class Source:
    """An object with only a method to read; it may fail in the middle, as a download does."""

    def __init__(self, content: bytes, failure: Exception | None = None) -> None:
        self.content, self.failure = io.BytesIO(content), failure

    def read(self, size: int) -> bytes:
        if self.failure is not None and self.content.tell():
            raise self.failure
        return self.content.read(min(size, 1000))


def at_the_end(content: bytes) -> io.BytesIO:
    file = io.BytesIO(content)
    file.seek(0, os.SEEK_END)
    return file


@pytest.mark.parametrize("kind", ["str", "path", "open", "memory", "written", "pipe", "zip", "object"])
def test_a_song_is_read_from_a_path_and_from_files_of_any_kind(
    separator: Separator, song: Path, kind: str
) -> None:
    content = song.read_bytes()
    expected = separator.separate(noise(20_000), 44100, stems=["vocals"])["vocals"]
    process = None
    if kind == "pipe":
        process = subprocess.Popen([sys.executable, "-c", f"import sys, pathlib; sys.stdout.buffer.write(pathlib.Path({str(song)!r}).read_bytes())"], stdout=subprocess.PIPE)  # fmt: skip
    if kind == "zip":
        with zipfile.ZipFile(song.with_suffix(".zip"), "w") as archive:
            archive.write(song, "song.wav")
    source = {
        "str": lambda: str(song),
        "path": lambda: song,
        "open": lambda: song.open("rb"),
        "memory": lambda: io.BytesIO(content),
        "written": lambda: at_the_end(content),
        "pipe": lambda: process.stdout,
        "zip": lambda: zipfile.ZipFile(song.with_suffix(".zip")).open("song.wav"),  # noqa: SIM115
        "object": lambda: Source(content),
    }[kind]()
    stems, rate = separator.separate_file(source, stems=["vocals"])
    assert rate == 44100
    assert np.array_equal(stems["vocals"], expected)
    if hasattr(source, "close"):
        assert not source.closed
        source.close()
    if process is not None:
        process.wait()


def test_a_part_of_an_mp3_in_memory_is_read(song: Path) -> None:
    kmdx.write(song.with_suffix(".mp3"), noise(44_100), 44100, "mp3")
    file = io.BytesIO(song.with_suffix(".mp3").read_bytes())
    for part in ({}, {"start": 0.25, "duration": 0.5}):
        samples, rate = kmdx.read(file, **part)
        expected = kmdx.read(song.with_suffix(".mp3"), **part)
        assert rate == expected.rate
        assert np.array_equal(samples, expected.samples)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (io.StringIO("song"), "^the song: the file is open in text mode; open it in binary mode"),
        (io.BytesIO(), "^the song: expected a sound file, found an empty file$"),
        (b"RIFF", "^the song: expected a path or a binary file, found bytes; wrap the content .* io.BytesIO$"),
        (17, "^the song: expected a path or a binary file, found int$"),
        (io.BytesIO(b"no song" * 99), "^the song: not a sound file"),
        (Source(b"x" * 9999, OSError(5, "Input/output error")), "^the song: cannot be read: input/output error$"),
    ],
    ids=["text", "empty", "bytes", "number", "no sound", "unreadable"],
)  # fmt: skip
def test_what_is_not_a_file_of_sound_is_a_one_line_error(
    separator: Separator, source: object, message: str
) -> None:
    with pytest.raises(AudioError, match=message):
        separator.separate_file(source)  # type: ignore[arg-type]


def test_a_closed_file_and_a_file_open_for_writing_are_refused_by_name(song: Path) -> None:
    with song.open("rb") as closed:
        pass
    with pytest.raises(AudioError, match=r"song\.wav: the file is closed"):
        kmdx.read(closed)
    with (song.parent / "new.wav").open("wb") as writing, pytest.raises(AudioError, match=r"new\.wav: "):
        kmdx.read(writing)


def test_another_librarys_error_while_reading_reaches_the_caller(separator: Separator, song: Path) -> None:
    failure = LookupError("the server is gone")
    with pytest.raises(LookupError) as caught:
        separator.separate_file(Source(song.read_bytes(), failure))  # type: ignore[arg-type]
    assert caught.value is failure


@pytest.mark.parametrize("format", ["wav16", "float32", "flac", "mp3"])
def test_a_file_that_cannot_seek_gets_the_same_bytes_as_a_path(tmp_path: Path, format: str) -> None:
    class Sink:
        def __init__(self) -> None:
            self.content = b""

        def write(self, data: bytes) -> int:
            self.content += data
            return len(data)

    sink = Sink()
    kmdx.write(sink, noise(9000), 44100, format)  # type: ignore[arg-type]
    kmdx.write(str(tmp_path / "a"), noise(9000), 44100, format)
    assert sink.content == (tmp_path / "a").read_bytes()


def test_nothing_is_written_to_a_file_if_the_samples_are_wrong(tmp_path: Path) -> None:
    file = io.BytesIO()
    with pytest.raises(AudioError, match="NaN"):
        kmdx.write(file, np.full((100, 2), np.nan), 44100)
    assert not file.getvalue()
    with pytest.raises(AudioError, match="expected a path or a file open in binary mode, found StringIO"):
        kmdx.write(io.StringIO(), noise(100), 44100)  # type: ignore[arg-type]


def test_a_separation_is_saved_whole_and_described(separator: Separator, song: Path, tmp_path: Path) -> None:
    made = separator.separate_file(song, stems=["vocals", "drums"])
    assert repr(made) == "<Separation: 0.454 s of vocals, drums at 44100 Hz>"
    paths = made.save(str(tmp_path / "new" / "stems"), "float32")
    assert paths == {name: tmp_path / "new" / "stems" / f"{name}.wav" for name in ("vocals", "drums")}
    for stem, path in paths.items():
        assert np.array_equal(kmdx.read(path).samples, made.stems[stem])
    with pytest.raises(AudioError, match="unknown format 'wave'"):
        made.save(tmp_path / "none", "wave")
    broken = Separation({**made.stems, "drums": np.full((10, 2), np.nan, np.float32)}, 44100)
    with pytest.raises(AudioError, match="NaN"):
        broken.save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_objects_are_shown_in_one_short_line(separator: Separator, song: Path) -> None:
    assert repr(separator) == (
        "Separator('small', device='cpu', stems=('bass', 'drums', 'other', 'vocals', 'accompaniment'), "
        "precision='fp32', speed='leaderboard', engine='tuned')"
    )
    assert repr(separator.plan) == "<Plan small: bass, drums, other, vocals>"
    assert repr(kmdx.read(song)) == "<Audio: 20000 samples of 2 channels at 44100 Hz>"


def test_an_unpickled_separator_gives_the_same_stems(small: Path) -> None:
    options = {"stems": ["vocals"], "precision": "fp32", "speed": "balanced", "engine": "plain"}
    separator = Separator(small, device=torch.device("cpu"), folder=small.parent, **options)
    data = pickle.dumps(separator)
    assert len(data) < 10_000, "the weights are loaded again"
    again = pickle.loads(data)
    assert repr(again) == repr(separator)
    assert again.folder == separator.folder
    song = noise(20_000)
    assert np.array_equal(again.separate(song, 44100)["vocals"], separator.separate(song, 44100)["vocals"])


def test_a_separator_of_another_plan_shares_the_networks_and_pickles_that_plan(separator: Separator) -> None:
    changed = replace(separator.plan, title="Another plan of the same networks")
    other = separator.with_plan(changed)
    assert other.networks is separator.networks
    assert pickle.loads(pickle.dumps(other)).plan == changed


def test_unpickling_without_the_weights_names_them(tmp_path: Path) -> None:
    data = pickle.dumps(Separator(tiny.write_htdemucs(tmp_path), device="cpu"))
    (tmp_path / "small.ckpt").unlink()
    with pytest.raises(WeightsError, match=r"small\.ckpt"):
        pickle.loads(data)


def test_every_plan_of_the_package_and_every_error_can_be_pickled(tmp_path: Path) -> None:
    for name, plan in kmdx.ensembles().items():
        assert pickle.loads(pickle.dumps(plan)) == plan, name
    own = _NotPulled(weights.get("htdemucs"), [], tmp_path)
    for error in (
        own,
        DocumentError("wrong", 3),
        *(kind("wrong") for kind in KmdxError.__subclasses__()[:3]),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.args) == (type(error), str(error), error.args)
        assert vars(again).keys() == vars(error).keys()


def test_ensembles_are_listed_by_name_and_a_broken_one_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"leaderboard_c", "mini", "htdemucs"} <= set(kmdx.ensembles())
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))
    (tmp_path / "broken.yaml").write_text("networks: 5")
    with pytest.warns(KmdxWarning, match=r"broken\.yaml is not an ensemble: line 1"):
        found = kmdx.ensembles()
    assert "broken" not in found
    assert found["mini"].stems == ("bass", "drums", "other", "vocals")


def test_a_weight_is_pulled_by_name_with_its_steps_in_the_log_and_none_on_the_terminal(
    published: Weight,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(weights, "get", {published.name: published}.__getitem__)
    seen: list[tuple[int, int | None]] = []
    with caplog.at_level(logging.INFO, "kmdx"):
        paths = kmdx.pull(published.name, folder=str(tmp_path), progress=lambda *step: seen.append(step))
    assert paths == {published.name: tmp_path / published.sources[0].file}
    assert paths[published.name].read_bytes() == CONTENT
    assert seen[-1][0] == len(CONTENT)
    assert caplog.messages[0].startswith(f"{published.name}: trying ")
    assert caplog.messages[-1].startswith(f"license of {published.name}: ")
    assert capfd.readouterr() == ("", "")
    assert kmdx.pull([published.name], folder=tmp_path) == paths


def test_pulling_an_unknown_name_suggests_one(tmp_path: Path) -> None:
    with pytest.raises(KmdxError, match="unknown weight or ensemble 'htdemuc' [(]did you mean 'htdemucs'"):
        kmdx.pull("htdemuc", folder=tmp_path)


def test_loading_and_separating_are_logged_for_debugging(
    small: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "kmdx"):
        Separator(small, device="cpu").separate(noise(1000), 44100)
    assert [line.split(" in ")[0].split("(")[0] for line in caplog.messages] == [
        "loaded Separator",
        "separated 0.0 s on cpu",
    ]
    assert capfd.readouterr() == ("", "")
