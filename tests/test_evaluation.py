"""The evaluator as a whole: what it scores, and what it writes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import evaluation_cases
import in_process
import numpy as np
import pytest
import soundfile
import submissions
from evaluation_cases import NAMES, ROOT, STEMS, results

from evaluator import command, metrics
from evaluator.comparison_command import compare, load
from evaluator.metrics import global_sdr

data, evaluate = evaluation_cases.data, evaluation_cases.evaluate


def test_any_submission_folder_is_scored_unchanged(evaluate, data: Path, tmp_path: Path) -> None:
    result = evaluate("--keep-stems")
    run = tmp_path / "run"
    assert result.code == 0, result.err
    content = results(run)
    assert [record["song"] for record in content["songs"]] == list(NAMES)
    for record in content["songs"]:
        for stem, weight in zip(STEMS, (0.1, 0.2, 0.3, 0.4), strict=True):
            truth, mixture = (
                soundfile.read(data / "test" / record["song"] / f"{name}.wav")[0]
                for name in (stem, "mixture")
            )
            kept = soundfile.read(run / "predictions" / record["song"] / f"{stem}.wav")[0]
            assert np.abs(kept - weight * mixture).max() <= 1 / 32768
            assert record["scores"]["global_sdr"][stem] == pytest.approx(global_sdr(truth, kept), abs=1e-4)
        values = list(record["scores"]["global_sdr"].values())
        assert record["means"]["global_sdr"] == pytest.approx(np.mean(values))
        assert record["real_time_factor"] == pytest.approx(record["seconds"] / record["duration"])
        assert record["peak_memory"] > 10**7
    means = content["summary"]["scores"]["global_sdr"]
    songs = content["songs"]
    assert means["mean"]["song"] == pytest.approx(np.mean([r["means"]["global_sdr"] for r in songs]))
    vocals = [r["scores"]["global_sdr"]["vocals"] for r in songs]
    assert means["median"]["vocals"] == pytest.approx(np.median(vocals))
    assert content["songs"][1]["silent_references"] == ["bass"]
    assert any("silent" in warning for warning in content["warnings"])
    assert any("3 songs" in warning and "50" in warning for warning in content["warnings"])
    assert content["run"]["ensemble"] == "works"
    with (run / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["song"] for row in rows] == list(NAMES)
    assert float(rows[2]["global_sdr vocals"]) == content["songs"][2]["scores"]["global_sdr"]["vocals"]
    page = (run / "report.html").read_text("utf-8")
    assert "b & <b>" not in page
    assert "global SDR, dB, mean over songs" in result.out
    assert not list(run.glob(".work-*"))
    assert "made" in (run / "submission.log").read_text("utf-8")


def loudness(reference: np.ndarray, estimate: np.ndarray) -> float:
    """A metric of two arrays: how much louder the estimate is, in dB."""
    return float(10 * np.log10((np.square(estimate).sum() + 1e-9) / (np.square(reference).sum() + 1e-9)))


def test_one_entry_in_the_table_shows_a_metric_everywhere(
    evaluate, data: Path, tmp_path: Path, monkeypatch
) -> None:
    entry = metrics.Metric("loudness", "Added loudness", "dB", False, loudness)
    monkeypatch.setitem(metrics.METRICS, "loudness", entry)
    run = tmp_path / "run"
    result = evaluate("--metrics", "loudness,global_sdr", "--stems", "vocals")
    assert result.code == 0, result.err
    (name, *_) = NAMES
    read = {kind: soundfile.read(data / "test" / name / f"{kind}.wav")[0] for kind in ("vocals", "mixture")}
    expected = pytest.approx(loudness(read["vocals"], 0.4 * read["mixture"]), abs=1e-3)
    (first, *_) = results(run)["songs"]
    assert first["scores"]["loudness"] == {"vocals": expected}
    with (run / "results.csv").open(newline="", encoding="utf-8") as file:
        assert float(next(csv.DictReader(file))["loudness vocals"]) == expected
    assert "Added loudness, dB, mean over songs" in result.out
    assert "Added loudness, mean over songs" in (run / "report.html").read_text("utf-8")
    differences = compare([load(run), load(run)]).differences
    assert ("loudness", "vocals") in {(each.metric, each.stem) for each in differences}


def of_loud_songs(reference: np.ndarray, estimate: np.ndarray) -> float:
    """A metric that fails for some songs."""
    if not reference.any():
        raise RuntimeError("a silent reference")
    return 1.0


def test_a_metric_that_fails_fails_only_its_song(evaluate, tmp_path: Path, monkeypatch) -> None:
    entry = metrics.Metric("loud", "Loud", "", True, of_loud_songs)
    monkeypatch.setitem(metrics.METRICS, "loud", entry)
    result = evaluate("--metrics", "global_sdr,loud", "--strict")
    assert result.code == 1, result.err
    reasons = [record["reason"] for record in results(tmp_path / "run")["songs"]]
    assert reasons == [None, "loud of bass cannot be computed: RuntimeError: a silent reference", None]


def test_lossy_estimates_and_repeated_problems_are_reported_once(capsys, data: Path, tmp_path: Path) -> None:
    for ending in ("wav", "ogg"):
        for name in NAMES:
            (tmp_path / ending / name).mkdir(parents=True)
            vocals, rate = soundfile.read(data / "test" / name / "vocals.wav")
            soundfile.write(tmp_path / ending / name / f"vocals.{ending}", 0.5 * vocals, rate)
    folders = ("--estimates", tmp_path / "wav", "--estimates", tmp_path / "ogg")
    options = (data, "-o", tmp_path / "board", *folders, "--stems", "vocals,bass")
    result = in_process.run(capsys, command.main, "local_evaluation.py", *options)
    assert result.code == 0, result.err
    assert "the estimates of ogg are in a lossy format; those of wav are not" in result.out
    lines = [line for line in results(tmp_path / "board" / "wav")["warnings"] if "of bass" in line]
    assert lines == [f"no estimate of bass in 3 songs: {', '.join(NAMES)}"]


@pytest.fixture
def two_stems(data: Path, tmp_path: Path) -> Path:
    """The first song with vocals and accompaniment."""
    source, song = data / "test" / NAMES[0], tmp_path / "two" / NAMES[0]
    song.mkdir(parents=True)
    for name in ("vocals", "mixture"):
        shutil.copy(source / f"{name}.wav", song)
    rest = sum(soundfile.read(source / f"{name}.wav")[0] for name in ("bass", "drums", "other"))
    soundfile.write(song / "accompaniment.wav", rest, 44100)
    return tmp_path / "two"


def test_four_stems_are_scored_as_vocals_and_accompaniment(evaluate, two_stems: Path, tmp_path: Path) -> None:
    result = evaluate(data=two_stems)
    assert result.code == 0, result.err
    song = two_stems / NAMES[0]
    truth, mixture = (soundfile.read(song / f"{name}.wav")[0] for name in ("accompaniment", "mixture"))
    (record,) = results(tmp_path / "run")["songs"]
    assert set(record["scores"]["global_sdr"]) == {"vocals", "accompaniment"}
    expected = global_sdr(truth, (0.1 + 0.2 + 0.3) * mixture)
    assert record["scores"]["global_sdr"]["accompaniment"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("rest", ["instrumental", "other"])
def test_the_rest_of_an_ensemble_for_vocals_is_scored_as_the_accompaniment(
    evaluate, two_stems: Path, tmp_path: Path, rest: str
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "networks: {v: {weights: mini_vocals, trim_and_join: {chunk: 130048, trim: 2048}}}\n"
        "signals: {V: {network: v, hears: mixture}}\n"
        f"stems: {{vocals: {{sum: {{V.vocals: 1}}}}, {rest}: {{sum: {{mixture: 1, V.vocals: -1}}}}}}\n"
    )
    result = evaluate("--submission", ROOT, "--ensemble", plan, "--device", "cpu", data=two_stems)
    assert result.code == 0, result.err
    (record,) = results(tmp_path / "run")["songs"]
    assert set(record["scores"]["global_sdr"]) == {"vocals", "accompaniment"}


def test_a_part_of_the_accompaniment_of_another_length_fails_the_song(
    evaluate, two_stems: Path, tmp_path: Path
) -> None:
    result = evaluate(data=two_stems, what="returns a wrong length")
    assert result.code == 1
    (record,) = results(tmp_path / "run")["songs"]
    assert "wrong length: other has 44099 samples" in record["reason"]


def test_extra_stems_fail_a_song_only_under_the_challenges_rules(
    evaluate, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(submissions.BODIES, "adds a guitar", "stems['guitar'] = stems['bass']")
    assert evaluate(what="adds a guitar").code == 1
    (first, *_) = results(tmp_path / "run")["songs"]
    assert first["reason"] == "wrong stems: guitar is extra"
    assert evaluate("--stems", "vocals", what="adds a guitar", output=tmp_path / "vocals").code == 0


def test_predictions_are_deleted_unless_kept(evaluate, tmp_path: Path) -> None:
    assert evaluate().code == 0
    assert not (tmp_path / "run" / "predictions").exists()
