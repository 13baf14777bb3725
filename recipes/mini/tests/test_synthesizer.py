"""The synthesizer: what is drawn, how it is mixed, and two rendered songs."""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import yaml

from evaluator import dataset
from kmdx.challenge import MIXTURE, RATE, STEMS
from kmdx.errors import KmdxError
from recipes.mini.synthesizer import command, mixing, requirements, song_set, voice
from recipes.mini.synthesizer.score import SCALES, Score, compose
from recipes.mini.synthesizer.song_set import SongSpec


def composed(seed: int, **drawn) -> Score:
    options = {"tempo": 110, "beats": 4, "seconds": 28.0, "center": 66, **drawn}
    return compose(np.random.default_rng(seed), **options)


def noise(*levels: float, samples: int = RATE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        stem: (level * rng.standard_normal((samples, 2))).astype(np.float32)
        for stem, level in zip(STEMS, levels, strict=True)
    }


# --- the score


@pytest.mark.parametrize("beats", [3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_melody_fits_the_bars(seed, beats):
    score = composed(seed, beats=beats)
    assert score.melody
    previous = 0
    for note in score.melody:
        assert note.length >= 1
        assert note.start >= previous, "notes overlap"
        assert note.start // score.bar == (note.end - 1) // score.bar, "across a bar line"
        previous = note.end
    assert previous <= len(score.chords) * score.bar
    assert score.seconds == pytest.approx(28, abs=score.beats * 60 / score.tempo)


@pytest.mark.parametrize("seed", range(5))
def test_melody_is_near_its_centre_and_on_the_beat_in_the_chord(seed):
    score = composed(seed)
    for note in score.melody:
        assert 66 - 14 <= note.pitch <= 66 + 17
        within = note.start % score.bar
        if within in (0, 8):
            assert note.pitch % 12 in score.chords[note.start // score.bar].tones


def test_phrases_end_in_a_rest():
    for seed in range(5):
        score = composed(seed)
        sung = {step for note in score.melody for step in range(note.start, note.end)}
        for end in range(2 * score.bar, len(score.chords) * score.bar + 1, 2 * score.bar):
            assert not {end - 2, end - 1} & sung


def test_a_repeated_section_repeats_its_melody():
    score = next(score for seed in range(50) if (score := composed(seed, seconds=60)).sections[4] == "A")
    bars = [
        [
            (note.start % score.bar, note.pitch, note.syllable)
            for note in score.melody
            if note.start // score.bar == bar
        ]
        for bar in range(8)
    ]
    assert bars[2:4] == bars[6:8]  # the first bars are an intro


def test_seeds_decide_the_song():
    assert composed(1) == composed(1)
    assert composed(1) != composed(2)
    assert len({composed(seed).key for seed in range(100)}) == 12
    assert {composed(seed).mode for seed in range(20)} == set(SCALES)


def test_pitches_move_by_degrees_of_the_scale():
    score = Score(100, 4, 0, "major", (), (), ())
    assert [score.in_scale(60, degrees) for degrees in (-1, 0, 1, 2, 7)] == [59, 60, 62, 64, 72]


def test_music_xml_has_full_bars_within_the_voice_s_range():
    from xml.etree import ElementTree

    score = composed(3, center=50)
    measures = ElementTree.fromstring(voice.music_xml(score)).findall("part/measure")
    assert len(measures) == len(score.chords) + 1
    for measure in measures:
        assert sum(int(note.findtext("duration")) for note in measure.findall("note")) == score.bar
    lyrics = [text.text for measure in measures for text in measure.iter("text")]
    assert lyrics == [note.syllable for note in score.melody]
    semitones = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))
    for pitch in ElementTree.fromstring(voice.music_xml(score)).iter("pitch"):
        step, alter, octave = (pitch.findtext(name) for name in ("step", "alter", "octave"))
        number = 12 * (int(octave) + 1) + semitones[step] + int(alter)
        assert voice.SUNG[0] <= number <= voice.SUNG[1]


def test_a_stretched_envelope_keeps_its_shape():
    envelope = np.zeros((2, 101))
    envelope[:, 40] = 1
    assert voice._stretched(envelope, 1.0) == pytest.approx(envelope)
    assert voice._stretched(envelope, 1.25).argmax(axis=1).tolist() == [50, 50]
    assert voice._stretched(envelope, 0.75).argmax(axis=1).tolist() == [30, 30]


# --- the band


def test_a_part_s_notes_decide_its_stem():
    pytest.importorskip("mido")
    from recipes.mini.synthesizer.accompaniment import InstrumentPart

    def part(name, channel, program, *pitches):
        return InstrumentPart(name, channel, program, tuple((0, 96, pitch, 90) for pitch in pitches))

    assert part("Drum-Kick", 9, 0, 36).stem == "drums"
    assert part("Bass", 1, 33, 36, 40).stem == "bass"
    assert part("Bass-7", 1, 29, 57, 64).stem == "other", "a guitar that MMA calls bass"
    assert part("Walk", 1, 0, 40, 43).stem == "bass"
    assert part("Chord", 1, 0, 40, 43).stem == "other"


def test_a_driving_beat_has_kicks_and_snares():
    pytest.importorskip("mido")
    from recipes.mini.synthesizer.accompaniment import TICKS, InstrumentPart, drives

    score = composed(0)
    bar, bars = score.beats * TICKS, len(score.chords)

    def beat(*pitches, bars):
        notes = tuple(
            (start, start + 9, pitch, 90) for start in range(0, bars * bar, bar) for pitch in pitches
        )
        return InstrumentPart("Drum", 9, 0, notes)

    assert drives([beat(36, bars=bars), beat(38, 42, bars=bars)], score)
    assert not drives([beat(36, 38, bars=bars // 2)], score)
    assert not drives([beat(36, 42, bars=bars)], score)


def test_a_midi_file_keeps_its_parts():
    mido = pytest.importorskip("mido")
    from recipes.mini.synthesizer.accompaniment import InstrumentPart, _part, midi

    notes = ((0, 96, 60, 90), (96, 192, 60, 80), (192, 400, 64, 70))
    file = midi([(InstrumentPart("Chord", 3, 27, notes), 5, 100, 20)], composed(0))
    read = _part(file.tracks[0])
    assert (read.channel, read.program, read.notes) == (5, 27, notes)
    assert [message.tempo for message in file.tracks[0] if message.type == "set_tempo"] == [
        mido.bpm2tempo(110)
    ]


def test_the_library_leaves_out_intros_and_mixed_meters(tmp_path):
    pytest.importorskip("mido")
    from recipes.mini.synthesizer.accompaniment import Style, library

    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "rock.mma").write_text(
        "Time 4\nDefGroove Rock\nDefGroove RockIntro\nDefGroove Rock\n"
    )
    (tmp_path / "lib" / "mixed.mma").write_text("Time 4\nDefGroove A\nTime 3\nDefGroove B\n")
    (tmp_path / "lib" / "five.mma").write_text("Time 5\nDefGroove Five\n")
    assert library(tmp_path) == (Style("lib/rock", 4, ("Rock",)),)


# --- levels


@pytest.mark.parametrize("loudness", [1e-4, 0.1, 0.5, 3.0])
def test_quantized_stems_sum_exactly(loudness):
    stems, mixture = mixing.quantize(noise(*(loudness * level for level in (0.5, 1, 0.3, 0.8))))
    assert all(stem.dtype == np.int16 for stem in (*stems.values(), mixture))
    assert np.array_equal(sum(stem.astype(np.int64) for stem in stems.values()), mixture)
    assert mixture.any()


def test_quantizing_scales_rather_than_clips():
    loud = np.full((100, 2), 0.9, np.float32)
    stems, mixture = mixing.quantize({"bass": loud, "drums": loud, "other": -loud, "vocals": loud})
    assert mixture.max() <= 32767
    assert mixture[0, 0] > 32700
    assert stems["bass"][0, 0] == pytest.approx(mixture[0, 0] / 2, abs=1)
    # Stems that cancel in the mixture must not clip either.
    stems, mixture = mixing.quantize({"bass": 5 * loud, "other": -5 * loud})
    assert stems["bass"].min() > 32700
    assert not mixture.any()


def test_the_limiter_applies_one_gain_to_all_stems():
    before = noise(0.3, 0.3, 0.3, 0.3)
    after = mixing.master(before, 0.8)
    mixture = np.sum(list(after.values()), axis=0)
    assert np.abs(mixture).max() <= 0.8 + 1e-5
    gain = after["bass"] / before["bass"]
    assert gain.min() < 0.7
    for stem in STEMS:
        assert after[stem] == pytest.approx(gain * before[stem], abs=1e-5)
    quiet = noise(0.01, 0.01, 0.01, 0.01)
    assert np.array_equal(mixing.master(quiet, 0.8)["drums"], quiet["drums"])


def test_levels_ignore_silence():
    stem = noise(0.1, 1, 1, 1, samples=10 * RATE)["bass"]
    stem[: 5 * RATE] = 0
    assert mixing.level(stem) == pytest.approx(0.1, rel=0.02)
    assert mixing.silence(stem) == pytest.approx(0.5, abs=0.02)
    balanced = mixing.balance({"bass": stem}, {"bass": -26.0})
    assert 20 * np.log10(mixing.level(balanced["bass"])) == pytest.approx(-26, abs=0.01)


# --- the data set


class StandIn:
    """A stand-in for a rendered song."""

    def __init__(self, song: SongSpec) -> None:
        self.stems, self.mixture = mixing.quantize(noise(0.1, 0.1, 0.1, 0.1, samples=4410))
        self.description = {"tempo": 100 + song.number}


def fill(output: Path, planned: list[SongSpec]) -> None:
    for song in planned:
        song_set.write(output, song, StandIn)


def test_asking_for_more_songs_keeps_the_first_ones():
    few, many = song_set.plan(0, 12, 2, 30), song_set.plan(0, 24, 4, 30)
    assert set(few) < set(many)
    assert len({song.name for song in many}) == 24
    assert [song.split for song in few].count("test") == 2


def test_an_interrupted_data_set_is_continued(tmp_path):
    planned = song_set.plan(0, 4, 1, 30)
    assert song_set.missing(tmp_path, planned) == planned
    fill(tmp_path, planned[:2])
    assert song_set.missing(tmp_path, planned) == planned[2:]
    fill(tmp_path, planned[2:])
    assert song_set.missing(tmp_path, planned) == []
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")) == [
        "test/synthetic test 001",
        *(f"train/synthetic {number:03d}" for number in (1, 2, 3)),
    ]
    tracks = dataset.find_tracks(tmp_path, "train")
    assert [problem for problem in dataset.check(tracks) if problem.fatal] == []
    description = yaml.safe_load((tmp_path / "train/synthetic 002/song.yaml").read_text())
    assert description == {"seed": 0, "split": "train", "number": 2, "seconds": 30, "tempo": 102}


@pytest.mark.parametrize("planned", [song_set.plan(1, 1, 0, 30), song_set.plan(0, 1, 0, 20)])
def test_songs_of_another_data_set_are_refused(tmp_path, planned):
    fill(tmp_path, song_set.plan(0, 1, 0, 30))
    with pytest.raises(KmdxError, match="synthetic 001: expected a complete song with seed"):
        song_set.missing(tmp_path, planned)


def test_a_damaged_song_is_refused(tmp_path):
    planned = song_set.plan(0, 1, 0, 30)
    fill(tmp_path, planned)
    (tmp_path / "train/synthetic 001/bass.wav").unlink()
    with pytest.raises(KmdxError, match="expected a complete song with seed 0 and --seconds 30"):
        song_set.missing(tmp_path, planned)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), KmdxError("no bass"), OSError(28, "No space left on device")]
)
def test_a_failed_song_leaves_no_files(tmp_path, error):
    def fail(song):
        raise error

    (song,) = song_set.plan(0, 1, 0, 30)
    expected = KmdxError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        song_set.write(tmp_path, song, fail)
    assert list((tmp_path / "train").iterdir()) == []


def test_files_of_a_killed_run_are_deleted(tmp_path):
    (song,) = song_set.plan(0, 1, 0, 30)
    rest = tmp_path / "train" / f".{song.name}.partial"
    rest.mkdir(parents=True)
    (rest / "bass.wav").write_text("half")
    assert song_set.missing(tmp_path, [song]) == [song]
    song_set.write(tmp_path, song, StandIn)
    assert [path.name for path in (tmp_path / "train").iterdir()] == [song.name]


# --- mistakes


def run(*arguments: str, monkeypatch, capsys) -> str:
    """The command's error line."""
    monkeypatch.setattr(sys, "argv", ["synthesizer", *arguments])
    with pytest.raises(SystemExit) as exit:
        command.main()
    assert exit.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1, printed
    return printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--songs", "0"], "--songs 0: expected 1 or more"),
        (["--songs", "3", "--test-songs", "4"], "--test-songs 4: expected 0 to 3"),
        (["--seconds", "nan"], "--seconds nan: expected 8 to 600"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys, options, expected):
    assert expected in run(str(tmp_path / "out"), *options, monkeypatch=monkeypatch, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(requirements, "check", lambda: None)
    (tmp_path / "out").write_text("")
    printed = run(str(tmp_path / "out"), monkeypatch=monkeypatch, capsys=capsys)
    assert "out: expected a folder" in printed


def test_missing_requirements_are_listed_with_their_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(requirements, "FILES", {tmp_path / "drums.sf2": "avldrums.lv2-soundfont"})
    monkeypatch.setattr(requirements, "MODULES", ("pysinsy_that_is_not_there",))
    printed = run(str(tmp_path / "out"), monkeypatch=monkeypatch, capsys=capsys)
    assert f"not installed: mma, fluidsynth, {tmp_path / 'drums.sf2'}" in printed
    assert "Python package pysinsy_that_is_not_there" in printed
    assert f"apt-get install avldrums.lv2-soundfont fluidsynth mma; {requirements.INSTALL_MODULES}" in printed
    assert not (tmp_path / "out").exists()


def test_a_program_s_failure_is_reported(tmp_path):
    with pytest.raises(KmdxError, match="failed with exit code 3: out of strings"):
        requirements.run([sys.executable, "-c", "import sys; print('out of strings'); sys.exit(3)"], tmp_path)
    with pytest.raises(KmdxError, match="fluidsynth: not found; install with: apt-get install fluidsynth"):
        requirements.run(["fluidsynth"], tmp_path / "nowhere")


# --- rendering


def missing_requirements() -> str:
    try:
        requirements.check()
    except KmdxError as error:
        return str(error)
    return ""


real = pytest.mark.skipif(bool(missing_requirements()), reason=missing_requirements())


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """Two songs, one in each split."""
    output = tmp_path_factory.mktemp("synthetic") / "out"
    options = ["--songs", "2", "--test-songs", "1", "--seconds", "12", "--jobs", "1"]
    subprocess.run([sys.executable, "-m", "recipes.mini.synthesizer", str(output), *options], check=True)
    return output


@real
def test_rendered_songs_are_complete(rendered):
    for split in ("train", "test"):
        (track,) = dataset.find_tracks(rendered, split)
        warnings = [str(problem) for problem in dataset.check([track]) if problem.track is not None]
        assert warnings == []
        sounds = {
            name: sf.read(path, dtype="int16")[0].astype(np.int64) for name, path in track.files.items()
        }
        assert set(sounds) == {MIXTURE, *STEMS}
        assert np.array_equal(sum(sounds[stem] for stem in STEMS), sounds[MIXTURE])
        assert track.duration == pytest.approx(12, abs=4)
        for stem in STEMS:
            sound = sounds[stem] / 32768
            assert 20 * np.log10(np.sqrt(np.mean(np.square(sound)))) > -40
            assert mixing.silence(sound) < 0.6


@real
def test_rendering_a_song_again_gives_the_same_bytes(rendered, tmp_path):
    folder = rendered / "train" / "synthetic 001"
    again = shutil.copytree(rendered, tmp_path / "again")
    shutil.rmtree(again / "train")
    options = ["--songs", "2", "--test-songs", "1", "--seconds", "12"]
    subprocess.run([sys.executable, "-m", "recipes.mini.synthesizer", str(again), *options], check=True)
    names = [f"{name}.wav" for name in (MIXTURE, *STEMS)] + ["song.yaml"]
    same, different, lost = filecmp.cmpfiles(folder, again / "train" / "synthetic 001", names, shallow=False)
    assert (sorted(same), different, lost) == (sorted(names), [], [])


@real
@pytest.mark.parametrize("font", ["FLUID", "TIM", "BLACK_PEARL", "RED_ZEPPELIN"])
def test_each_font_plays_drums_on_its_own_channel(tmp_path, font):
    from recipes.mini.synthesizer.accompaniment import DRUM_CHANNEL, InstrumentPart, midi
    from recipes.mini.synthesizer.fluidsynth import render
    from recipes.mini.synthesizer.song import KIT_FONTS

    path = getattr(requirements, font)
    channel = 0 if path in KIT_FONTS else DRUM_CHANNEL
    beat = InstrumentPart("Drum", DRUM_CHANNEL, 0, ((0, 96, 36, 120), (192, 288, 38, 120)))
    sound = render(midi([(beat, channel, 110, 64)], composed(0)), path, 2 * RATE, tmp_path)
    assert sound.shape == (2 * RATE, 2)
    assert np.abs(sound[: RATE // 2]).max() > 0.01
    assert np.abs(sound[RATE // 2 : RATE]).max() > 0.01


@real
def test_the_voice_sings_in_tune(tmp_path):
    score = composed(3, center=57, seconds=16)
    words = voice.pronounce(score, tmp_path)
    singer = voice.Singer(57, 0.85, 0.3, vibrato=0.0, rate=5.0, delay=0.3)
    sound = voice.sing(words, score, score.melody, singer, round(score.seconds * RATE))[:, 0]
    errors = []
    for note in score.melody:
        if note.length < 4:
            continue
        begin, end = (round((note.start + part * note.length) * score.step * RATE) for part in (0.4, 0.8))
        spectrum = np.abs(np.fft.rfft(sound[begin:end] * np.hanning(end - begin), 2**17))
        # The harmonic sum is largest at the pitch.
        candidates = 440 * 2 ** ((note.pitch - 69 + np.linspace(-3, 3, 61)) / 12)
        bins = np.round(candidates[:, None] * np.arange(1, 9) * 2**17 / RATE).astype(int)
        errors.append(abs(np.linspace(-3, 3, 61)[np.log(spectrum[bins] + 1e-3).sum(axis=1).argmax()]))
    assert len(errors) >= 5
    assert np.median(errors) < 0.3
