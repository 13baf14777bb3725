"""Command lines of demucs and audio-separator: each does the same, or one line explains what to type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cli_cases
import numpy as np
import pytest
import soundfile
import typer
from cli_cases import Run, files_in, write
from conftest import noise

from kmdx import cli, familiar
from kmdx.errors import KmdxError

run = cli_cases.run

COMMANDS = ("separate", "benchmark", "models", "ensembles", "doctor")
CHANNELS = ["bass.wav", "drums.wav", "other.wav", "vocals.wav"]

# What users type after `demucs` or `audio-separator`, and the same in own options, or the explanation.
SAME = {
    "song.mp3": "separate song.mp3",
    "album/": "separate album/",
    "*.flac": "separate *.flac",
    "https://example.com/song.mp3": "separate https://example.com/song.mp3",
    "-n htdemucs song.mp3": "separate --ensemble htdemucs song.mp3",
    "-nhtdemucs song.mp3": "separate --ensemble htdemucs song.mp3",
    "--name=htdemucs_ft song.mp3": "separate --ensemble htdemucs_ft song.mp3",
    "separate song.mp3 -n htdemucs": "separate song.mp3 --ensemble htdemucs",
    "-d cpu song.mp3": "separate --device cpu song.mp3",
    "--device cuda song.mp3": "separate --device cuda song.mp3",
    "--two-stems vocals song.mp3": "separate --stems vocals,no_vocals song.mp3",
    "--two-stems=drums song.mp3": "separate --stems drums,no_drums song.mp3",
    "--two-stems vocals --other-method none song.mp3": "separate --stems vocals song.mp3",
    "yes,no_doubt.mp3 --two-stems vocals --other-method none": "separate yes,no_doubt.mp3 --stems vocals",
    "--int24 --out float32 song.mp3": "separate --format wav24 --output float32 song.mp3",
    "--two-stems vocals --other-method minus song.mp3": "separate --stems vocals,no_vocals song.mp3",
    "--mp3 song.mp3": "separate --format mp3 song.mp3",
    "--mp3 --mp3-bitrate 320 song.mp3": "separate --format mp3 song.mp3",
    "--flac --int24 song.mp3": "separate --format wav24 --format flac song.mp3",
    "--int24 song.mp3": "separate --format wav24 song.mp3",
    "--float32 song.mp3": "separate --format float32 song.mp3",
    "-o out song.mp3": "separate -o out song.mp3",
    "--out out song.mp3": "separate --output out song.mp3",
    "--filename {track}-{stem}.{ext} song.mp3": "separate --output-template {track}-{stem}.{ext} song.mp3",
    "--shifts 5 song.mp3": "separate --shifts 5 song.mp3",
    "--overlap 0.25 song.mp3": "separate song.mp3",
    "--clip-mode clamp song.mp3": "separate song.mp3",
    "--list-models": "ensembles list",
    "--list_models": "models list",
    "-l": "models list",
    "--env_info": "doctor",
    "-m htdemucs_ft.yaml song.mp3": "separate --ensemble htdemucs_ft song.mp3",
    "song.mp3 --model_filename MelBandRoformer.ckpt": "separate song.mp3 --ensemble vocals",
    "song.mp3 --model_filename model_bs_roformer_ep_317_sdr_12.9755.ckpt": (
        "separate song.mp3 --ensemble bs_viperx_1297"
    ),
    "song.mp3 --output_format FLAC": "separate song.mp3 --format flac",
    "song.mp3 --output_format=WAV": "separate song.mp3 --format wav16",
    "song.mp3 --output_dir out": "separate song.mp3 --output out",
    "song.mp3 --single_stem Instrumental": "separate song.mp3 --stems instrumental",
    "song.mp3 --use_autocast": "separate song.mp3 --precision auto",
    "song.mp3 --demucs_shifts 0": "separate song.mp3 --shifts 1",
    "song.mp3 --demucs_shifts 2": "separate song.mp3 --shifts 2",
    "song.mp3 --vr_enable_tta": "separate song.mp3 --tta",
    "-m htdemucs.yaml --download_model_only": "models pull htdemucs",
    "-- -n.wav": "separate -- -n.wav",
}
LEFT_OUT = {
    "-v song.mp3": "every message is always shown",
    "-j 4 song.mp3": "--workers N separates N songs at once",
    "--segment 7 song.mp3": "adapt to the memory",
    "song.mp3 --mdx_batch_size 4": "adapt to the memory",
    "song.mp3 --log_level debug": "every message is always shown",
    "song.mp3 --use_soundfile": "files of any size are written",
}
EXPLAINED = {
    "--overlap 0.5 song.mp3": "--speed balanced",
    "--no-split song.mp3": "of any length are processed in windows",
    "--mp3 --mp3-bitrate 128 song.mp3": "320 kbit/s",
    "--clip-mode rescale song.mp3": "--format float32",
    "-s 955717e8 song.mp3": "-e NAME",
    "--repo models song.mp3": "KMDX_MODELS",
    "-n htdemucs_6s song.mp3": "htdemucs_6s is a weight, not an ensemble",
    "-m Kim_Vocal_1.onnx song.mp3": "kim_vocal_1 is a weight",
    "-m UVR-MDX-NET-Inst_HQ_3.onnx song.mp3": "kmdx models add",
    "-m Kim_Vocal_3.onnx song.mp3": "did you mean",
    "song.mp3 --output_format M4A": "wav, flac, mp3",
    "song.mp3 --model_file_dir models": "KMDX_MODELS",
    "song.mp3 --normalization 0.9": "--format float32",
    "song.mp3 --sample_rate 48000": "-ar RATE",
    "song.mp3 --invert_spect": "exact mixture minus the stem",
    "song.mp3 --ensemble_preset vocal_balanced": "docs/ensembles.md",
    'song.mp3 --custom_output_names {"Vocals":"v"}': "--output-template",
    "song.mp3 --vr_aggression 10": "VR networks are not supported",
    "song.mp3 --mdxc_pitch_shift 2": "does not shift the pitch",
    "--two-stems": "needs a value",
    "--download_model_only": "kmdx models pull",
}


@pytest.fixture
def mini(run: Run, tmp_path: Path) -> Run:
    """Run ``kmdx`` on a short song, with the ensemble that needs no download."""
    write(tmp_path / "song.wav", noise(30_000))
    return run


@pytest.mark.parametrize("typed", SAME)
def test_an_option_of_the_same_meaning_is_replaced(typed: str) -> None:
    line = familiar.translate(typed.split(), COMMANDS)
    assert " ".join(line.arguments) == SAME[typed]
    assert line.notes == ()


@pytest.mark.parametrize("typed", LEFT_OUT)
def test_an_option_that_changes_no_stem_is_left_out_with_a_note(typed: str) -> None:
    line = familiar.translate(typed.split(), COMMANDS)
    assert line.arguments == ["separate", "song.mp3"]
    assert LEFT_OUT[typed] in line.notes[0]


@pytest.mark.parametrize("typed", EXPLAINED)
def test_one_line_explains_what_to_type_instead_of_other_options(typed: str) -> None:
    with pytest.raises(KmdxError, match=re.escape(EXPLAINED[typed])) as caught:
        familiar.translate(typed.split(), COMMANDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "typed",
    ["", "--help", "--version", "models list", "models pull -m", "benchmark -e mini", "separte x.wav"],
)
def test_other_command_lines_stay_as_they_are(typed: str) -> None:
    assert familiar.translate(typed.split(), COMMANDS) == familiar.Line(typed.split())


def test_every_option_of_the_table_has_one_meaning_and_does_not_hide_an_own_option() -> None:
    names = [name for option in familiar.OPTIONS for name in option.names.split()]
    assert len(names) == len({*names})
    for option in familiar.OPTIONS:
        meanings = (option.own, option.command, option.note, option.refusal)
        assert sum(meaning is not None for meaning in meanings) == 1, option.names
    command = typer.main.get_command(cli.app).commands["separate"]  # type: ignore[attr-defined]
    own = {name for param in command.params for name in param.opts}
    assert not own & {*names}


def test_two_stems_are_the_stem_and_exactly_the_rest_of_the_song(mini: Run, tmp_path: Path) -> None:
    assert mini("--two-stems", "vocals", "-n", "mini", "--float32", "song.wav", "-o", "out").code == 0
    assert files_in(tmp_path / "out") == ["song/no_vocals.wav", "song/vocals.wav"]
    song = soundfile.read(tmp_path / "song.wav", dtype="float32")[0]
    stem, rest = (
        soundfile.read(tmp_path / "out/song" / f"{name}.wav", dtype="float32")[0]
        for name in ("vocals", "no_vocals")
    )
    np.testing.assert_array_equal(rest, song - stem)
    assert np.abs(stem).max() > 0


@pytest.mark.parametrize("name", ["instrumental", "accompaniment", "no_vocals"])
def test_the_song_without_vocals_has_the_name_that_was_asked_for(
    mini: Run, tmp_path: Path, name: str
) -> None:
    assert mini("song.wav", "-e", "mini", "--single_stem", name.title(), "-o", "out").code == 0
    assert files_in(tmp_path / "out") == [f"song/{name}.wav"]


def test_a_song_alone_is_separated(mini: Run, tmp_path: Path) -> None:
    assert mini("song.wav", "-e", "mini").code == 0
    assert files_in(tmp_path / "separated") == [f"song/{name}" for name in CHANNELS]


def test_karaoke_is_explained(mini: Run) -> None:
    result = mini("song.wav", "-e", "mini", "--single_stem", "Karaoke")
    assert result.code == 2
    assert "kmdx models pull karaoke_anvuew" in result.errors[0]


def test_a_note_is_printed_and_the_song_is_separated(mini: Run, tmp_path: Path) -> None:
    result = mini("-j", "4", "-n", "mini", "song.wav", "-o", "out")
    assert (result.code, len(files_in(tmp_path / "out"))) == (0, 4)
    assert result.err.startswith("note: -j has no effect: ")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["separte", "x.wav"], "unknown command 'separte' (did you mean 'separate'?)"),
        (["it's"], 'unknown command "it\'s"; available: '),
        (["separate", "song.wav", "--speed", "'fa\\st"], " (did you mean 'fast'?); available: leaderboard"),
        (["models", "lsit"], "unknown command 'lsit' (did you mean 'list'?)"),
        (["song.wav", "-e", "minni"], "unknown ensemble 'minni' (did you mean 'mini'?)"),
        (["song.wav", "--speed", "fats"], "unknown speed 'fats' (did you mean 'fast'?)"),
        (["song.wav", "--precision", "fp61"], "unknown precision 'fp61' (did you mean 'fp16'?)"),
        (["song.wav", "--engine", "plian"], "unknown engine 'plian' (did you mean 'plain'?)"),
        (["song.wav", "--format", "flak"], "unknown format 'flak' (did you mean 'flac'?)"),
        (["song.wav", "-e", "mini", "--device", "cdua"], "unknown device 'cdua' (did you mean 'cuda'?)"),
        (["song.wav", "-e", "mini", "--stems", "vocal"], "unknown stem 'vocal' (did you mean 'vocals'?)"),
        (["song.wav", "-e", "mini", "--stems", "no_drum"], "unknown stem 'no_drum' (did you mean 'no_drums'?)"),
        (["song.wav", "--ensembel", "mini"], "unknown option '--ensembel' (did you mean '--ensemble'?)"),
        (["models", "pull", "htdemucz"], "unknown weight or ensemble 'htdemucz' (did you mean 'htdemucs'?)"),
        (["song.wav", "--output-template", "{trak}.{ext}"], "unknown field {trak} (did you mean 'track'?)"),
    ],
)  # fmt: skip
def test_every_kind_of_mistyped_name_gets_a_suggestion(mini: Run, arguments: list[str], hint: str) -> None:
    result = mini(*arguments)
    assert (result.code, len(result.errors)) == (2, 1)
    assert hint in result.errors[0]
    assert "?;" not in result.errors[0]


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        (["--stems", "vocals", "drums"], "--stems vocals,drums"),
        (["--stems", "vocals,", "drums"], "--stems vocals,drums"),
        (["vocals"], "--stems vocals"),
        (["--stems", "bass", "no_vocals", "other"], "--stems bass,no_vocals,other"),
    ],
)
def test_stems_separated_by_spaces_get_the_correct_form(mini: Run, arguments: list[str], form: str) -> None:
    result = mini("song.wav", "-e", "mini", *arguments)
    assert result.code == 2
    assert result.errors[0].endswith(f": {form}")


def test_a_file_with_the_name_of_a_stem_is_a_song(mini: Run, tmp_path: Path) -> None:
    write(tmp_path / "vocals.wav", noise(5_000)).rename(tmp_path / "vocals")
    assert mini("song.wav", "vocals", "-e", "mini", "--stems", "bass", "-o", "out").code == 0
    assert files_in(tmp_path / "out") == ["song/bass.wav", "vocals/bass.wav"]


def test_the_first_error_of_a_newcomer_names_the_ensemble_that_needs_no_download(
    mini: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    result = mini("song.wav")
    assert (result.code, len(result.errors)) == (2, 1)
    assert result.errors[0].endswith("--ensemble mini needs no download")


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["--start", "0:00.5"], 0.5),
        (["--duration", "0:00:00.25"], 0.25),
        (["--start", "0.25", "--duration", "00:00.5"], 0.5),
    ],
)
def test_times_may_have_minutes_and_hours(
    mini: Run, tmp_path: Path, arguments: list[str], seconds: float
) -> None:
    write(tmp_path / "song.wav", noise(44_100))
    assert mini("song.wav", "-e", "mini", "--stems", "bass", "-o", "out", *arguments).code == 0
    assert soundfile.info(tmp_path / "out/song/bass.wav").frames == round(44_100 * seconds)


@pytest.mark.parametrize("text", ["1:60", "1:2:3:4", "1:-1", "soon", "", "1:00:61", ":30", "1h"])
def test_another_form_of_time_is_a_one_line_error(mini: Run, text: str) -> None:
    result = mini("song.wav", "-e", "mini", f"--start={text}")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "expected seconds, m:ss or h:mm:ss" in result.errors[0]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("kmdx separate -e mi", "mini"),
        ("kmdx separate -e mini --stems dr", "drums"),
        ("kmdx separate -e mini --stems drums,vo", "drums,vocals"),
        ("kmdx separate --speed bal", "balanced"),
        ("kmdx ensem", "ensembles"),
    ],
)
def test_the_shell_completes_commands_and_values(words: str, completed: str) -> None:
    code = (
        "import atexit, sys; sys.argv = ['kmdx']; from kmdx.cli import main\n"
        "atexit.register(lambda: print('torch' if 'torch' in sys.modules else '')); main()"
    )
    asked = {"_KMDX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [completed]


def test_the_documentation_lists_every_familiar_option() -> None:
    text = (Path(cli.__file__).parents[1] / "docs" / "separate.md").read_text("utf-8")
    section = text.partition("## Coming from")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(--?[a-z][\w-]*)`", section.replace("_", "-")))
    names = {name.replace("_", "-") for option in familiar.OPTIONS for name in option.names.split()}
    assert names - documented == set()
