"""``--output-template``: where stems go, what is refused, and that finished stems are still recognized."""

from __future__ import annotations

from pathlib import Path

import cli_cases
import pytest
from cli_cases import Run, files_in, write
from conftest import noise

from kmdx import file_names, output_template
from kmdx.errors import KmdxError
from kmdx.inputs import InputSong

run, separate = cli_cases.run, cli_cases.separate
FLAT, BY_STEM = "{track}_{stem}.{ext}", "{stem}/{track}.{ext}"


def path_of(template: str, place: str = "CD1/01", stem: str = "vocals") -> str:
    found = output_template.parse(template)
    assert found is not None
    return found.path(InputSong(Path("01.mp3"), place), stem, ".wav")


@pytest.mark.parametrize(
    ("template", "path"),
    [
        (FLAT, "CD1/01_vocals.wav"),
        (BY_STEM, "vocals/CD1/01.wav"),
        ("{track} ({trackext})/a {stem}.{ext}", "CD1/01 (mp3)/a vocals.wav"),
        ("con/{track}: {stem}?.{ext}", "con_/CD1/01_ vocals_.wav"),
        (".{stem}/{track}.{ext}", "_.vocals/CD1/01.wav"),
        ("{{{track}}}{stem}.{ext}", "{CD1/01}vocals.wav"),
    ],
)
def test_a_template_gives_paths_that_are_valid_on_every_system(template: str, path: str) -> None:
    assert path_of(template) == path


def test_a_long_name_is_cut_before_its_extension() -> None:
    name = path_of(FLAT, "x" * 250)
    assert len(name) == file_names.LONGEST
    assert name.endswith(".wav")


def test_the_default_template_is_the_usual_layout() -> None:
    assert output_template.parse("{track}/{stem}.{ext}") is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("../{track}/{stem}.{ext}", "a path below the output folder"),
        ("/tmp/{stem}.{ext}", "a path below the output folder"),
        ("{track}/../../{stem}.{ext}", "a path below the output folder"),
        ("a\\..\\{stem}.{ext}", "a path below the output folder"),
        ("C:/{stem}.{ext}", "a path below the output folder"),
        ("{track}//{stem}.{ext}", "a path below the output folder"),
        ("{track}/{stem}", "must end with .{ext}"),
        ("{track}/{stem}.wav", "must end with .{ext}"),
        ("", "must end with .{ext}"),
        ("{stem.__class__}.{ext}", "unknown field"),
        ("{}.{ext}", "unknown field"),
        ("{0}.{ext}", "unknown field"),
        ("{stem!r}.{ext}", "takes no format"),
        ("{stem:>99999999}.{ext}", "takes no format"),
        ("{stem.{ext}", "expected"),
    ],
)
def test_an_unsafe_or_malformed_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(KmdxError, match=r"^--output-template ") as caught:
        output_template.parse(template)
    assert message in str(caught.value)


@pytest.mark.parametrize("template", [FLAT, BY_STEM])
def test_finished_stems_are_kept_and_missing_ones_are_made(
    separate: Run, tmp_path: Path, template: str
) -> None:
    write(tmp_path / "album" / "one.wav", noise(5_000))
    write(tmp_path / "album" / "live" / "two.wav", noise(6_000))
    arguments = ("album", "--output-template", template)
    first = separate(*arguments, "--stems", "vocals")
    assert (first.code, first.err.count("already in out")) == (0, 0)
    names = {
        FLAT: ["live/two_vocals.wav", "one_vocals.wav"],
        BY_STEM: ["vocals/live/two.wav", "vocals/one.wav"],
    }[template]
    assert files_in(tmp_path / "out") == names
    again = separate(*arguments, "--stems", "vocals")
    assert again.err.count("already in out") == 2
    before = [(tmp_path / "out" / name).stat().st_mtime_ns for name in names]
    assert separate(*arguments, "--stems", "vocals,bass").code == 0
    assert [(tmp_path / "out" / name).stat().st_mtime_ns for name in names] == before
    assert len(files_in(tmp_path / "out")) == 4


def test_other_settings_are_an_error_and_overwrite_replaces_the_stem(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "one.wav", noise(44_100))
    arguments = ("one.wav", "--stems", "vocals", "--output-template", FLAT)
    assert separate(*arguments).code == 0
    changed = separate(*arguments, "--start", "0.5")
    assert changed.code == 2
    assert (
        "out has stems made with different settings (one_vocals.wav: start 0.0, not 0.5)" in changed.errors[0]
    )
    assert separate(*arguments, "--start", "0.5", "--overwrite").code == 0
    assert files_in(tmp_path / "out") == ["one_vocals.wav"]


def test_a_file_of_another_program_is_kept(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "one.wav", noise(5_000))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one_vocals.wav").write_bytes(b"someone's work")
    assert separate("one.wav", "--stems", "vocals", "--output-template", FLAT).code == 0
    assert (tmp_path / "out" / "one_vocals.wav.bak").read_bytes() == b"someone's work"


def test_leftovers_of_a_killed_run_are_removed_but_not_those_of_other_songs(
    separate: Run, tmp_path: Path
) -> None:
    write(tmp_path / "one.wav", noise(5_000))
    (tmp_path / "out").mkdir()
    for name in ("one", "two"):
        (tmp_path / "out" / f".{name}_vocals.wav.01234567.partial").write_bytes(b"half")
    assert separate("one.wav", "--stems", "vocals", "--output-template", FLAT).code == 0
    assert files_in(tmp_path / "out") == [".two_vocals.wav.01234567.partial", "one_vocals.wav"]


def test_songs_of_the_same_name_keep_their_own_files_in_later_runs(separate: Run, tmp_path: Path) -> None:
    for folder in "ab":
        write(tmp_path / folder / "one.wav", noise(5_000, seed=ord(folder)))
        done = separate(f"{folder}/one.wav", "--stems", "vocals", "--output-template", FLAT)
        assert done.code == 0
    assert files_in(tmp_path / "out") == ["b/one_vocals.wav", "one_vocals.wav"]
    for folder in "ab":
        again = separate(f"{folder}/one.wav", "--stems", "vocals", "--output-template", FLAT)
        assert "already in out" in again.err


def test_stems_next_to_their_songs_are_not_separated_as_songs(run: Run, small: Path, tmp_path: Path) -> None:
    write(tmp_path / "one.wav", noise(5_000))
    for _ in range(2):
        done = run("separate", ".", "-o", ".", "-e", small, "--stems", "vocals", "--output-template", FLAT)
        assert done.code == 0
    assert files_in(tmp_path) == ["one.wav", "one_vocals.wav"]
    assert run("separate", ".", "-o", ".", "-e", small, "--stems", "vocals").code == 0  # without a template
    assert files_in(tmp_path) == ["one.wav", "one/vocals.wav", "one_vocals.wav"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{track}.{ext}", "would be written to the same path; use {stem}"),
        ("{stem}.{ext}", "must contain {track}"),
        ("x.{ext}", "must contain {track}"),
    ],
)
def test_two_stems_with_one_path_are_refused_before_anything_runs(
    separate: Run, tmp_path: Path, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmdx.Separator.separate", lambda *_, **__: pytest.fail("it was separated"))
    for name in ("one", "two"):
        write(tmp_path / f"{name}.wav", noise(5_000))
    result = separate("one.wav", "two.wav", "--output-template", template)
    assert (result.code, len(result.errors)) == (2, 1)
    assert message in result.errors[0]
    assert not (tmp_path / "out").exists()


def test_a_stem_may_not_be_the_folder_of_another() -> None:
    template = output_template.parse("{track}.{ext}")
    assert template is not None
    songs = [InputSong(Path("a"), "a"), InputSong(Path("b"), "a.wav/b")]
    with pytest.raises(KmdxError, match="the same path"):
        output_template.check(template, songs, ["vocals"], ".wav")


def test_a_template_needs_a_folder_on_this_machine(run: Run, small: Path, tmp_path: Path) -> None:
    write(tmp_path / "one.wav", noise(5_000))
    result = run("one.wav", "-e", small, "-o", f"memory://{tmp_path.name}", "--output-template", FLAT)
    assert result.errors == ["error: --output-template needs an output folder on this machine"]
