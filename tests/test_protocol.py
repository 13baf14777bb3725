"""The challenge's protocol: what a submission sees, and how songs fail."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation_cases
import numpy as np
import pytest
import soundfile
import submissions
from evaluation_cases import NAMES, results

from evaluator.predictions import Predictions
from evaluator.process import Submission
from evaluator.protocol import Workspace, with_scores
from evaluator.records import SongRecord
from evaluator.scoring import SongScore, score_song
from kmdx.errors import KmdxError

data, evaluate = evaluation_cases.data, evaluation_cases.evaluate


def test_a_full_disk_fails_the_song_and_the_run_continues(evaluate, tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluator.protocol.as_wav", full)
    monkeypatch.setattr(Workspace, "prepare", lambda workspace, track: prepare(workspace, track))
    assert evaluate("--tracks", NAMES[0]).code == 1
    (record,) = results(tmp_path / "run")["songs"]
    assert record["reason"] == "it could not be scored: No space left on device"


def prepare(workspace: Workspace, track: Any) -> Callable[[], object]:
    """What :meth:`Workspace.prepare` does, with the mixture copied."""
    workspace.predictions.clear()
    workspace.clear()
    workspace._next.mkdir()
    shutil.copyfile(track.files["mixture"], workspace._next / "mixture.wav")
    return lambda: workspace._next.rename(workspace.dataset / track.name)


def test_the_submission_sees_one_mixture_and_no_stems(evaluate, tmp_path: Path, monkeypatch) -> None:
    spy = "import pathlib\nfor p in pathlib.Path(os.environ['AICROWD_DATASET_DIR']).rglob('*'): print('sees', p.name)"
    monkeypatch.setitem(submissions.BODIES, "looks around", spy)
    assert evaluate(what="looks around").code == 0
    seen = [
        line
        for line in (tmp_path / "run" / "submission.log").read_text("utf-8").splitlines()
        if "sees" in line
    ]
    assert seen == [f"sees {name}" for song in NAMES for name in (song, "mixture.wav")]


@pytest.mark.parametrize("what", ["raises", "returns NaN", "returns three stems", "crashes"])
def test_failed_songs_are_recorded_and_the_run_continues(evaluate, tmp_path: Path, what: str) -> None:
    result = evaluate(what=what)
    assert result.code == 1
    content = results(tmp_path / "run")
    assert [record["status"] for record in content["songs"]] == ["failed"] * 3
    assert all(record["reason"] for record in content["songs"])
    assert content["summary"]["scored"] == 0
    assert content["summary"]["scores"]["global_sdr"]["mean"]["song"] is None
    assert (tmp_path / "run" / "report.html").exists()


def test_strict_ends_as_the_challenge_would(evaluate, tmp_path: Path) -> None:
    result = evaluate("--strict", what="fails at its second song")
    assert result.code == 1
    reason = r"AssertionError: no second song \(my_submission/user_config\.py:\d+; .* submission\.log\)"
    assert re.search(f"{NAMES[1]}: {reason}; the challenge would have ended here", result.err)
    content = results(tmp_path / "run")
    assert [record["status"] for record in content["songs"]] == ["ok", "failed"]
    assert content["run"]["enforced"] is True
    assert any("unfinished: 2 of 3 songs" in warning for warning in content["warnings"])


def test_enforced_limits_end_a_run_in_time(evaluate, tmp_path: Path) -> None:
    result = evaluate(
        "--enforce-limits", "--time-limit-factor", "1", "--tracks", "c", what="loops in native code"
    )
    assert result.code == 1
    (record,) = results(tmp_path / "run")["songs"]
    assert record["reason"].startswith("time limit: more than 1 ×")
    assert record["over_time"] is True


def test_limits_that_are_not_enforced_are_reported(evaluate, tmp_path: Path) -> None:
    assert evaluate("--time-limit-factor", "0.001", "--memory-limit", "10MB").code == 0
    content = results(tmp_path / "run")
    assert all(record["over_time"] and record["over_memory"] for record in content["songs"])
    assert any("3 songs over the time limit" in warning for warning in content["warnings"])
    assert any("3 songs over the memory limit" in warning for warning in content["warnings"])


def test_songs_with_bad_data_fail_and_the_others_are_scored(evaluate, data: Path, tmp_path: Path) -> None:
    songs = shutil.copytree(data, tmp_path / "bad data")
    (songs / "test" / NAMES[0] / "bass.wav").unlink()
    result = evaluate("--submission", submissions.write(tmp_path / "s", "works"), "--strict", data=songs)
    assert result.code == 1
    records = results(tmp_path / "run")["songs"]
    assert [record["status"] for record in records] == ["failed", "ok", "ok"]
    assert "bass" in records[0]["reason"]
    for name in NAMES[1:]:
        (songs / "test" / name / "mixture.wav").write_text("no sound")
    result = evaluate(output=tmp_path / "other", data=songs)
    assert result.code == 2
    assert "none of 3 songs can be scored" in result.err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of files are text elsewhere")
def test_a_song_whose_name_is_not_utf_8_fails_alone(
    evaluate, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest-xdist sends no such name
    songs = shutil.copytree(data, tmp_path / "copied")
    name = os.fsdecode(b"caf\xe9")
    (songs / "test" / NAMES[0]).rename(songs / "test" / name)
    result = evaluate(data=songs)
    assert result.code == 1
    assert re.search(r"failed: caf\\udce9: .*\.wav: the file name is not UTF-8: rename the file", result.out)
    records = {record["song"]: record["status"] for record in results(tmp_path / "run")["songs"]}
    assert records == {name: "failed", **dict.fromkeys(NAMES[1:], "ok")}


def test_nan_fails_a_song_and_does_not_end_a_strict_run(evaluate, tmp_path: Path) -> None:
    assert evaluate("--strict", what="returns NaN").code == 1
    records = results(tmp_path / "run")["songs"]
    assert [record["reason"] for record in records] == ["NaN in drums"] * 3


def test_a_reason_names_the_owner_of_a_file_and_not_its_temporary_folder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for folder in (workspace.stems, workspace.references):
        soundfile.write(folder / "bass.wav", np.full((9, 2), np.nan), 44100, "FLOAT")
    soundfile.write(workspace.references / "short.wav", np.zeros((8, 2)), 44100)
    for truth, reason in (
        ("bass", "the data set's bass.wav: NaN or infinity"),
        ("short", "the submission's bass.wav: 9 samples .*, but the data set's short.wav: 8 samples"),
    ):
        with pytest.raises(KmdxError) as caught:
            score_song(
                {"bass": workspace.references / f"{truth}.wav"}, {"bass": workspace.stems / "bass.wav"}
            )
        assert re.match(reason, workspace.without_paths(str(caught.value)))


@pytest.mark.parametrize("times", [1, 2])
def test_predictions_that_cannot_be_cleared_are_cleared_after_a_kill(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Those of the second song: a process of the submission may write while they are cleared."""
    clear, kill = Predictions.clear, Submission.kill
    calls: list[str] = []

    def resisted(predictions: Predictions, everything: bool = False) -> None:
        calls.append("clear")
        if 2 <= calls.count("clear") < 2 + times:
            raise OSError(39, "Directory not empty")
        clear(predictions, everything)

    def killed(submission: Submission) -> None:
        calls.append("kill")
        kill(submission)

    monkeypatch.setattr(Predictions, "clear", resisted)
    monkeypatch.setattr(Submission, "kill", killed)
    code = evaluate().code
    assert calls[:4] == ["clear", "clear", "kill", "clear"]
    first, second, third = results(tmp_path / "run")["songs"]
    assert (first["status"], third["status"]) == ("ok", "ok")
    if times == 1:
        assert (code, second["status"]) == (0, "ok")
    else:
        reason = "the submission's predictions cannot be cleared: Directory not empty"
        assert (code, second["status"], second["reason"]) == (1, "failed", reason)


def test_an_estimate_without_artifacts_is_not_called_perfect() -> None:
    infinite = {"vocals": float("inf")}
    scores = {"museval_sdr": infinite, "museval_sar": infinite, "si_sdr": {"vocals": 3.0}}
    record = with_scores(SongRecord("a", "ok"), SongScore(scores, {}, [], {}, []))
    assert record.warnings == ("museval SDR of vocals is infinite: a perfect estimate",)
