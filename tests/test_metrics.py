"""The challenge's measure by hand, museval's against museval, both from files on disk."""

from __future__ import annotations

import importlib.util
import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from conftest import noise, shared

from evaluator.metrics import DELTA, METRICS, Metric, global_sdr, show, signed
from evaluator.scoring import BINS, SongScore, score_song
from evaluator.song_warnings import SILENT_FRAMES
from kmdx.errors import KmdxError

STEMS = ("bass", "drums", "other", "vocals")
RATE = 4000
Stems = Mapping[str, np.ndarray]


def test_global_sdr_matches_the_formula() -> None:
    truth = noise(5_000)
    energy = float(np.square(truth, dtype=np.float64).sum())
    assert global_sdr(truth, truth) == pytest.approx(10 * math.log10((energy + DELTA) / DELTA))
    assert global_sdr(truth, 0.5 * truth) == pytest.approx(10 * math.log10(4), abs=1e-5)
    assert global_sdr(truth, np.zeros_like(truth)) == pytest.approx(0, abs=1e-6)
    assert global_sdr(np.zeros((9, 2)), np.zeros((9, 2))) == 0


def test_arrays_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        global_sdr(np.zeros((9, 2)), np.zeros((8, 2)))


def write(
    folder: Path, stems: Stems, rate: int = RATE, subtype: str = "PCM_16", extension: str = "wav"
) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {stem: folder / f"{stem}.{extension}" for stem in stems}
    for stem, samples in stems.items():
        sf.write(files[stem], samples, rate, subtype)
    return files


def score(folder: Path, references: Stems, estimates: Stems, block: float = 2.0, **form: object) -> SongScore:
    """Score arrays through files."""
    truths = write(folder / "references", references, **form)  # type: ignore[arg-type]
    return score_song(truths, write(folder / "estimates", estimates, **form), block=block)  # type: ignore[arg-type]


def song(samples: int, channels: int = 2, stems: tuple[str, ...] = STEMS) -> dict[str, np.ndarray]:
    """int16 stems, whose files hold exactly what is written."""
    return {stem: integers(noise(samples, channels, seed=seed)) for seed, stem in enumerate(stems)}


def integers(samples: np.ndarray) -> np.ndarray:
    return np.round(16000 * samples).astype(np.int16)


def museval() -> ModuleType:
    """The module of museval that computes: to import the whole package takes an ffmpeg on the system."""
    package = importlib.util.find_spec("museval")
    if package is None or package.origin is None:
        pytest.skip("museval is not installed")
    spec = importlib.util.spec_from_file_location(
        "museval_metrics", Path(package.origin).with_name("metrics.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def museval_frames(references: Stems, estimates: Stems, rate: int = RATE, filters: int = 16) -> np.ndarray:
    """SDR as ``museval.eval_mus_track`` asks for it, ``(stems, frames)``.

    The length of the distortion filters, 512 there, costs most of its time and is not in its SDR.
    """
    arrays = [np.array([stems[stem] for stem in references]) / 32768 for stems in (references, estimates)]
    with np.errstate(divide="ignore"):
        return museval().bss_eval(*arrays, window=rate, hop=rate, filters_len=filters)[0]


def assert_museval(
    score: SongScore, references: Stems, estimates: Stems, rate: int = RATE, filters: int = 16
) -> None:
    """Assert that every frame is museval's to five decimals, NaN where it is NaN."""
    expected = museval_frames(references, estimates, rate, filters)
    measured = np.array(list(score.frames["museval_sdr"].values()))
    np.testing.assert_allclose(measured, expected, rtol=0, atol=5e-6)
    for stem, frames in zip(references, expected, strict=True):
        assert score.scores["museval_sdr"][stem] == pytest.approx(np.nanmedian(frames), abs=5e-6)


def by_hand(truth: np.ndarray, guess: np.ndarray) -> float:
    """The formula in integer arithmetic, exact except for the logarithm."""
    full = 32768**2
    signal = sum(int(value) ** 2 for value in truth.ravel())
    distortion = sum((int(x) - int(y)) ** 2 for x, y in zip(truth.ravel(), guess.ravel(), strict=True))
    return 10 * math.log10((signal / full + DELTA) / (distortion / full + DELTA))


def test_global_sdr_of_files_matches_the_formula(tmp_path: Path) -> None:
    stems = {
        stem: 2 * (samples // 2) for stem, samples in song(3 * RATE + 77).items()
    }  # even, so half is exact
    mixture = sum(stems.values())
    swapped = {**stems, "bass": stems["drums"], "drums": stems["bass"]}
    cases: dict[str, Stems] = {
        "perfect": stems,
        "mixture": dict.fromkeys(stems, mixture),
        "silence": {stem: np.zeros_like(samples) for stem, samples in stems.items()},
        "swapped": swapped,
        "shifted": {stem: np.concatenate([samples[:1] * 0, samples[:-1]]) for stem, samples in stems.items()},
        "half": {stem: samples // 2 for stem, samples in stems.items()},
    }
    found = {
        case: score(tmp_path / case, stems, estimates).scores["global_sdr"]
        for case, estimates in cases.items()
    }
    for case, estimates in cases.items():
        for stem in STEMS:
            assert found[case][stem] == pytest.approx(by_hand(stems[stem], estimates[stem]), abs=1e-6), (
                case,
                stem,
            )

    assert min(found["perfect"].values()) > 80
    assert found["silence"] == pytest.approx(dict.fromkeys(STEMS, 0.0), abs=1e-6)
    assert found["half"] == pytest.approx(dict.fromkeys(STEMS, 10 * math.log10(4)), abs=1e-4)
    assert found["swapped"]["bass"] < 0 < found["swapped"]["vocals"]


def test_frames_match_museval(tmp_path: Path) -> None:
    references, errors = song(9 * RATE + 1234), song(9 * RATE + 1234)
    estimates = {
        stem: references[stem] + errors[other] // 4
        for stem, other in zip(STEMS, reversed(STEMS), strict=True)
    }
    frame = {number: slice(number * RATE, (number + 1) * RATE) for number in range(9)}
    references["drums"][frame[1]] = 0
    estimates["other"][frame[3]] = 0
    references["bass"][frame[4], 1] = -references["bass"][
        frame[4], 0
    ]  # sounds, but museval adds the channels
    references["vocals"][frame[6]] = 0
    references["vocals"][7 * RATE - 1] = 1  # one sample is no silence
    estimates["vocals"][frame[8].start : frame[8].start + 400] = 0

    result = score(tmp_path, references, estimates)
    assert_museval(result, references, estimates)
    missing = [
        number for number, value in enumerate(result.frames["museval_sdr"]["vocals"]) if math.isnan(value)
    ]
    assert missing == [1, 3, 4]
    assert result.silent_references == []
    assert result.warnings == [SILENT_FRAMES.of(stem="other", count=1, total=9)]


def test_musevals_filters_are_not_in_its_sdr(tmp_path: Path) -> None:
    references = song(3 * RATE, stems=("bass", "drums"))
    estimates = {stem: np.roll(samples, 5, axis=0) + 100 for stem, samples in references.items()}
    assert_museval(score(tmp_path, references, estimates), references, estimates, filters=512)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("samples", [700, RATE - 1, RATE, RATE + 1, 2 * RATE - 1, 2 * RATE, 3 * RATE + 1])
def test_the_number_of_frames_matches_museval(tmp_path: Path, samples: int, channels: int) -> None:
    references = song(samples, channels)
    estimates = {stem: references[stem] // 3 for stem in STEMS}
    result = score(tmp_path, references, estimates)
    assert len(result.frames["museval_sdr"]["bass"]) == max(1, samples // RATE)
    assert_museval(result, references, estimates)


def test_perfect_estimates_are_infinite(tmp_path: Path) -> None:
    stems = song(3 * RATE)
    result = score(tmp_path / "all", stems, stems)
    assert_museval(result, stems, stems)
    assert set(result.scores["museval_sdr"].values()) == {math.inf}

    estimates = {stem: samples // 2 for stem, samples in stems.items()}
    estimates["bass"][RATE : 2 * RATE] = stems["bass"][RATE : 2 * RATE]
    frames = score(tmp_path / "one", stems, estimates).frames["museval_sdr"]["bass"]
    # museval's rounding leaves hundreds of dB: the same place in the order, so the same median.
    assert frames[1] == math.inf
    assert museval_frames(stems, estimates)[0, 1] > 250


@pytest.mark.parametrize("which", ["reference", "estimate"])
def test_a_completely_silent_file_leaves_no_museval_value_for_any_stem(tmp_path: Path, which: str) -> None:
    references = song(2 * RATE + 5)
    estimates = {stem: samples // 2 for stem, samples in references.items()}
    silenced = references if which == "reference" else estimates
    silenced["drums"] = np.zeros_like(silenced["drums"])
    with pytest.raises(ValueError, match="non-silent"):
        museval_frames(references, estimates)

    result = score(tmp_path, references, estimates)
    assert all(math.isnan(value) for frames in result.frames["museval_sdr"].values() for value in frames)
    assert all(math.isnan(value) for value in result.scores["museval_sdr"].values())
    assert result.warnings == [
        f"drums: the {which} is silent in every frame",
        "museval has no value for any stem: in every frame one of the files is silent",
    ]
    assert result.silent_references == (["drums"] if which == "reference" else [])
    for stem in STEMS:
        assert result.scores["global_sdr"][stem] == pytest.approx(
            by_hand(references[stem], estimates[stem]), abs=1e-6
        )


def test_musevals_regression_values_are_reproduced(tmp_path: Path) -> None:
    """Random estimates of an excerpt, as museval's own regression test has them."""
    folder = shared("audio", "musdb18-excerpts", "train", "Music Delta - 80s Rock")
    parts = {stem: sf.read(folder / f"{stem}.wav", dtype="int16")[0].astype(np.int32) for stem in STEMS}
    # Not the mixture minus the vocals: after AAC that is another signal.
    accompaniment = (parts["bass"] + parts["drums"] + parts["other"]).astype(np.int16)
    np.random.seed(0)  # noqa: NPY002
    estimates = {stem: np.random.random(accompaniment.shape) for stem in ("vocals", "accompaniment")}  # noqa: NPY002
    references = {"vocals": parts["vocals"].astype(np.int16), "accompaniment": accompaniment}

    result = score(tmp_path, references, estimates, rate=44100)
    expected = {
        "vocals": [-16.89156, -15.90668, -12.74888, -14.10039, -15.33723, -16.37514],
        "accompaniment": [-13.29782, -12.55332, -13.42369, -14.13454, -12.84300, -13.28168],
    }
    for stem, frames in expected.items():
        assert result.frames["museval_sdr"][stem] == pytest.approx(frames, abs=1e-3)


def test_frames_of_real_music_match_museval(tmp_path: Path) -> None:
    folder = shared("audio", "musdb18-excerpts", "test", "The Easton Ellises - Falcon 69")
    read = {
        name: sf.read(folder / f"{name}.wav", 3 * 44100, dtype="int16")[0] for name in (*STEMS, "mixture")
    }
    references = {stem: read[stem] for stem in STEMS}
    estimates = {stem: (references[stem] // 2 + read["mixture"] // 3).astype(np.int16) for stem in STEMS}
    assert_museval(score(tmp_path, references, estimates, rate=44100), references, estimates, rate=44100)


def test_scores_do_not_depend_on_the_block_size(tmp_path: Path) -> None:
    references, estimates = song(7 * RATE + 3), song(7 * RATE + 3, stems=tuple(reversed(STEMS)))
    truths, guesses = write(tmp_path / "a", references), write(tmp_path / "b", estimates, extension="flac")
    whole = score_song(truths, guesses, block=100)
    for block in (0.1, 1, 3):
        parts = score_song(truths, guesses, block=block)
        assert parts.envelopes == whole.envelopes
        for stem in STEMS:
            assert parts.scores["global_sdr"][stem] == pytest.approx(
                whole.scores["global_sdr"][stem], abs=1e-9
            )
            assert parts.frames["museval_sdr"][stem] == pytest.approx(
                whole.frames["museval_sdr"][stem], abs=1e-9
            )


def test_envelopes_are_peaks(tmp_path: Path) -> None:
    length = 3 * RATE + 17
    truth, guess = np.full((2, length, 2), 0.001)
    truth[0, 1], truth[length // 2, 0], truth[-1, 1] = 0.5, -0.25, -1.0
    guess[:] = 0.3
    envelope = score(tmp_path, {"bass": truth}, {"bass": guess}).envelopes["bass"]
    assert envelope["estimate"] == [30] * BINS
    expected = [0] * BINS
    expected[0], expected[BINS // 2], expected[-1] = 50, 25, 100
    assert envelope["reference"] == expected


def test_clipped_estimates_are_reported(tmp_path: Path) -> None:
    truth = noise(RATE)
    loud = truth.copy()
    loud[:200] = np.where(np.arange(200)[:, None] % 2, 3.0, -3.0)
    result = score(tmp_path, {"bass": truth, "drums": loud}, {"bass": loud, "drums": truth})
    assert result.warnings == ["bass: 5.00% of the estimate's samples are at full scale (clipped)"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    truth = write(tmp_path, {"bass": noise(4000)})
    others = {
        "samples": write(tmp_path / "length", {"bass": noise(3999)}),
        "infinity in its": write(
            tmp_path / "inf", {"bass": np.full((4000, 2), [np.inf, -np.inf])}, subtype="FLOAT"
        ),
        "8001 Hz": write(tmp_path / "rate", {"bass": noise(4000)}, rate=8001),
        "1 channel": write(tmp_path / "channels", {"bass": noise(4000, 1)}),
        "no such file": {"bass": tmp_path / "missing.wav"},
        r"cannot be read: [^'/]+$": {"bass": tmp_path / "text.wav"},
        "no samples": write(tmp_path / "empty", {"bass": np.zeros((0, 2))}),
        "NaN or infinity": write(tmp_path / "nan", {"bass": np.full((4000, 2), np.nan)}, subtype="FLOAT"),
        "too large to be squared": write(
            tmp_path / "large", {"bass": np.full((4000, 2), 1e25)}, subtype="FLOAT"
        ),
        "flac: ": write(tmp_path / "flac", {"bass": noise(4000)}, extension="flac"),
    }
    (tmp_path / "text.wav").write_text("no sound")
    flac = others["flac: "]["bass"]
    flac.write_bytes(flac.read_bytes()[:9000])
    for message, guess in others.items():
        with pytest.raises(KmdxError, match=message) as caught:
            score_song(truth, guess)
        assert "\n" not in str(caught.value)
        assert guess["bass"].name in str(caught.value)
    with pytest.raises(ValueError, match="drums"):
        score_song(truth, {"drums": truth["bass"]})


def test_metrics_of_one_function_are_computed_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluator.measures import spectral

    calls: list[int] = []

    def both(reference: np.ndarray, estimate: np.ndarray, rate: int) -> dict[str, float]:
        calls.append(len(reference))
        return {"bleedless": 1.0, "fullness": 2.0}

    monkeypatch.setattr(spectral, "bleedless_and_fullness", both)
    stems = write(tmp_path, {"bass": integers(noise(900)), "drums": integers(noise(900, seed=1))})
    found = score_song(stems, stems, [METRICS["bleedless"], METRICS["fullness"]]).scores
    assert found == {"bleedless": {"bass": 1, "drums": 1}, "fullness": {"bass": 2, "drums": 2}}
    assert calls == [900, 900]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"frames": True},
        {"function": len, "frames": True},
        {"function": len, "together": len},
        {"function": len, "together": len, "frames": True},
        {"together": len},
        {"together": len, "frames": True, "uses_rate": True},
        {"together": len, "frames": True, "uses_mixture": True},
        {"function": len, "over_songs": "maximum"},
        {"name": "museval_sdr", "function": len},
        {"name": "museval_sdr"},
    ],
)
def test_a_metric_whose_attributes_contradict_each_other_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^metric '{fields.get('name', 'new')}': "):
        Metric(**{"name": "new", "title": "New", "unit": "", "higher_is_better": True, **fields})


@pytest.mark.parametrize(
    ("value", "shown", "difference"),
    [
        (-0.0004, "0.000", "+0.000"),
        (-0.0, "0.000", "+0.000"),
        (-0.0006, "−0.001", "−0.001"),
        (None, "–", "–"),
    ],
)
def test_zero_has_no_minus_sign(value: float | None, shown: str, difference: str) -> None:
    assert (show(METRICS["global_sdr"], value), signed(value)) == (shown, difference)


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    peaks = []
    for seconds in (5, 100):
        stems = {stem: np.tile(noise(RATE), (seconds, 1)) for stem in STEMS}
        files = write(tmp_path / str(seconds), stems)
        tracemalloc.start()
        score_song(files, files, block=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_the_manual_lists_every_metric() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    for metric in METRICS.values():
        facts = (f"`{metric.name}`", metric.title, metric.unit or "none", metric.over_songs, metric.source)
        assert f"| {' | '.join(facts)} | {metric.checked} |" in manual
        assert metric.higher_is_better, "the manual claims it of all"
