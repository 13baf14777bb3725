"""The folder of a run: it continues, and never mixes with another run."""

from __future__ import annotations

import json
from pathlib import Path

import evaluation_cases
import numpy as np
import pytest
import submissions
from evaluation_cases import NAMES, results, scores

from evaluator.run_folder import INTERPRETER, RunError, RunFolder, read_json

data, evaluate = evaluation_cases.data, evaluation_cases.evaluate


def test_a_finished_run_is_not_repeated(evaluate, tmp_path: Path) -> None:
    evaluate()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "songs").iterdir()}
    first = scores(tmp_path / "run")
    assert evaluate().code == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "songs").iterdir()} == before
    assert scores(tmp_path / "run") == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time-limit-factor", "2"], "time_limit_factor was 60.0, is 2.0"),
        (["--memory-limit", "8GB"], "memory_limit was 16000000000, is 8000000000"),
        (["--enforce-limits"], "enforced was False, is True"),
        (["--accept-incomplete"], "accept_incomplete was False, is True"),
        (["--metrics", "global_sdr"], "metrics was global_sdr, museval_sdr, is global_sdr;"),
        (["--tracks", "c"], "songs.A"),
    ],
)
def test_other_settings_do_not_mix_into_a_run(
    evaluate, tmp_path: Path, options: list[str], message: str
) -> None:
    evaluate()
    result = evaluate(*options)
    assert result.code == 2
    assert "contains another run" in result.err
    assert message in result.err


def test_changed_code_or_data_does_not_mix_into_a_run(evaluate, data: Path, tmp_path: Path) -> None:
    evaluate()
    config = tmp_path / "works" / "my_submission" / "user_config.py"
    original = config.read_text("utf-8")
    config.write_text(original + "\n# changed\n", "utf-8")
    assert "submission_sha256 was" in evaluate().err
    config.write_text(original, "utf-8")
    path = data / "test" / "c" / "vocals.wav"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
        assert "songs.c was" in evaluate().err
    finally:
        path.write_bytes(content)
    assert evaluate().code == 0


def test_another_interpreter_does_not_mix_into_a_run(evaluate, tmp_path: Path) -> None:
    evaluate("--time-limit-factor", "60")
    run = tmp_path / "run" / "run.json"
    content = json.loads(run.read_text("utf-8"))
    assert content["interpreter_found"]["packages"]["numpy"] == np.__version__
    content["interpreter_found"]["packages"]["numpy"] = "1.0"
    run.write_text(json.dumps(content), "utf-8")
    (tmp_path / "run" / "songs" / f"{NAMES[2]}.json").unlink()
    result = evaluate("--time-limit-factor", "60")
    assert result.code == 2
    assert f"interpreter_found.packages.numpy was 1.0, is {np.__version__}" in result.err
    assert not (tmp_path / "run" / "songs" / f"{NAMES[2]}.json").exists()


def test_a_device_that_becomes_known_later_is_no_other_interpreter(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start({})
    unknown = {"version": "3.11", "device": None}
    for device, recorded in [(None, None), ("cpu", "cpu"), (None, "cpu")]:
        folder.record_interpreter({**unknown, "device": device})
        folder.add({"song": "a"})
        assert read_json(tmp_path / "run" / "run.json")[INTERPRETER]["device"] == recorded
    with pytest.raises(RunError, match="device was cpu, is cuda"):
        folder.record_interpreter({**unknown, "device": "cuda"})


def test_a_folder_with_other_files_is_refused(evaluate, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    result = evaluate()
    assert result.code == 2
    assert "contains other files (thesis.tex, …)" in result.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_that_failed_before_its_first_song_can_be_started_again(evaluate, tmp_path: Path) -> None:
    broken = submissions.write(tmp_path / "broken", "works", "raise ValueError('no weights')")
    result = evaluate("--submission", broken)
    assert result.code == 2
    assert "ValueError: no weights" in result.err
    assert evaluate().code == 0, "no song was done, so the folder may become another run"


def test_every_file_of_a_submission_is_part_of_its_identity(evaluate, tmp_path: Path) -> None:
    folder = submissions.write(tmp_path / "works", "works")
    (folder / "model.th").write_bytes(b"a" * 2_000_000)
    evaluate()
    (weight,) = results(tmp_path / "run")["run"]["weights"]
    assert weight["name"] == "model.th"
    assert not weight["known"]
    (folder / "model.th").write_bytes(b"b" * 2_000_000)
    assert "submission_sha256 was" in evaluate().err


def test_a_finished_run_does_not_check_its_data_again(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate()
    monkeypatch.setattr("evaluator.dataset.check", lambda *_: pytest.fail("the data were checked again"))
    assert evaluate().code == 0


def test_two_processes_do_not_write_to_one_run(evaluate, tmp_path: Path) -> None:
    evaluate()
    with RunFolder(tmp_path / "run").locked():
        result = evaluate()
    assert result.code == 2
    assert "another process is writing to" in result.err


def test_a_run_from_before_the_metrics_table_can_be_resumed(evaluate, tmp_path: Path) -> None:
    """Its run.json names neither metrics nor stems, and its records have their scores at the top."""
    evaluate()
    run = tmp_path / "run"
    identity = json.loads((run / "run.json").read_text("utf-8"))
    del identity["metrics"], identity["stems"]
    (run / "run.json").write_text(json.dumps(identity), "utf-8")
    first = scores(run)
    for path in (run / "songs").iterdir():
        record = json.loads(path.read_text("utf-8"))
        old = {key: record[key] for key in record.keys() - {"schema", "scores", "frames", "means", "stems"}}
        old |= {name: record["scores"][name] for name in ("global_sdr", "museval_sdr")}
        old |= {"museval_frames": record["frames"]["museval_sdr"], "network": "cut"}
        path.write_text(json.dumps(old), "utf-8")
    times = {path.name: path.stat().st_mtime_ns for path in (run / "songs").iterdir()}
    assert evaluate().code == 0
    assert {path.name: path.stat().st_mtime_ns for path in (run / "songs").iterdir()} == times
    assert scores(run) == first
