"""The evaluator's command: options, mistakes, this package's submission, and the time left."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import evaluation_cases
import pytest
import submissions
from evaluation_cases import NAMES, ROOT, results
from rich.progress import Progress

from evaluator import command, metrics, progress
from evaluator.dataset import Track
from evaluator.records import SongRecord
from evaluator.results import describe_weights
from kmdx import plan_file
from kmdx.errors import KmdxError

data, evaluate = evaluation_cases.data, evaluation_cases.evaluate


@pytest.fixture(scope="module")
def vocals_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "vocals_only.yaml"
    path.write_text(
        "sample_rate: 44100\n"
        "networks: {v: {weights: mini_vocals, trim_and_join: {chunk: 130048, trim: 2048}}}\n"
        "signals: {V: {network: v, hears: mixture}}\n"
        "stems: {vocals: {sum: {V.vocals: 1}}}\n"
    )
    return path


def test_a_plan_at_a_url_is_refused(evaluate) -> None:
    options = ("--submission", ROOT, "--ensemble", "https://me:secret@127.0.0.1/own.yaml")
    (error,) = evaluate(*options).errors
    assert "https://127.0.0.1/own.yaml: a submission cannot reach the network; download the plan" in error


def test_a_plan_of_one_stem_is_scored_by_that_stem(evaluate, vocals_plan: Path, tmp_path: Path) -> None:
    options = ("--submission", ROOT, "--ensemble", vocals_plan, "--device", "cpu", "--tracks", NAMES[0])
    refused = evaluate(*options)
    assert refused.code == 2
    assert "vocals_only does not separate bass, drums, other; use --stems vocals" in refused.err
    result = evaluate(*options, "--stems", "vocals", output=tmp_path / "vocals")
    assert result.code == 0, result.err
    (record,) = results(tmp_path / "vocals")["songs"]
    assert list(record["scores"]["global_sdr"]) == ["vocals"]


def test_the_other_of_a_plan_for_vocals_can_be_scored_as_the_accompaniment(
    evaluate, vocals_plan: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "two.yaml"
    other = "1}}, other: {sum: {mixture: 1, V.vocals: -1}}}"
    plan.write_text(vocals_plan.read_text().replace("1}}}", other))
    (error,) = evaluate("--submission", ROOT, "--ensemble", plan, "--device", "cpu").errors
    assert "does not separate bass, drums, other (its other is the accompaniment)" in error
    assert error.endswith("; use --stems vocals,accompaniment")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-limit", "lots"], "expected a size such as 16GB"),
        (["--memory-limit", "16"], "--memory-limit 16: expected a size such as 16GB"),
        (["--estimates", "stems"], "--submission has no effect with --estimates; use only one of them"),
        (["--time-limit-factor", "0"], "expected a number above 0"),
        (["--time-limit-factor", "inf"], "expected a number above 0"),
        (["--submission", "/nowhere"], "does not contain my_submission/aicrowd_wrapper.py"),
        (["--tracks", "nothing*"], "nothing*"),
        (["--ensemble", "htdemucs"], "has no ENSEMBLE"),
        (["--engine", "plain"], "has no ENGINE"),
        (["--precision", "BF16"], "has no PRECISION"),
    ],
)
def test_mistakes_in_options_are_one_line_errors(evaluate, options: list[str], message: str) -> None:
    result = evaluate(*options)
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(("option", "value"), [("--precision", "bf17"), ("--engine", "plane")])
def test_an_unknown_precision_or_engine_is_a_usage_error(evaluate, option: str, value: str) -> None:
    result = evaluate(option, value)
    assert result.code == 2
    assert f"unknown {option.removeprefix('--')} '{value}'" in result.err


def test_an_ensemble_that_is_computed_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_submission").mkdir()
    (tmp_path / "my_submission" / "user_config.py").write_text("ENSEMBLE = str(1)\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    with pytest.raises(KmdxError, match="use --ensemble"):
        command._plan(tmp_path, None)
    plan = command._plan(tmp_path, "mini")
    assert plan is not None
    assert plan.name == "mini"


def test_this_packages_own_submission_runs_any_ensemble(
    leaderboard: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    arguments = [data, "-o", tmp_path / "run", "--ensemble", leaderboard, "--device", "cpu", "--tracks", "c"]
    arguments += ["--engine", "plain"]
    monkeypatch.setattr(sys, "argv", ["local_evaluation.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert not stop.value.code, capsys.readouterr().err
    content = results(tmp_path / "run")
    run = content["run"]
    assert run["ensemble"] == "tiny"
    assert len(run["weights"]) == 10
    assert all(len(weight["sha256"]) == 64 and not weight["known"] for weight in run["weights"])
    assert any("weights of unknown content" in warning for warning in content["warnings"])
    assert run["device"] == "cpu"
    assert (run["precision"], run["engine"]) == ("fp32", "plain"), "as a CPU computes at this speed"
    assert run["versions"]["torch"]
    assert content["songs"][0]["status"] == "ok"


def test_weights_that_came_with_the_package_are_known() -> None:
    assert [weight["known"] for weight in describe_weights(plan_file.load("mini"))] == 4 * [True]


@pytest.mark.parametrize(
    "record",
    [
        SongRecord("a", "failed", "x", duration=100.0, seconds=1.0),
        SongRecord("a", "ok", duration=100.0, stems=("bass",), scores={"global_sdr": {"bass": 1.0}}),
    ],
    ids=["played", "existing stems"],
)
def test_the_time_left_follows_from_the_songs_done_in_this_run(
    record: SongRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tracks = [Track(name, {}, None, (), False, 44100, 44100 * 100, 2) for name in "abcd"]
    bars = progress.Bars(Progress(disable=True), tracks, metrics.METRICS["global_sdr"])
    bars.finished(tracks[0], record)
    assert bars.time_left() == "-:--:--", "the pace of a song that was done before is unknown"
    bars.song(tracks[1])
    now[0] = 50.0
    assert bars.time_left() == "-:--:--"
    now[0] = 200.0
    bars.finished(tracks[1], record)
    assert bars.time_left() == "0:06:40"
    bars.song(tracks[2])
    now[0] = 250.0
    assert bars.time_left() == "0:05:50", "a song without a result does not change the pace"
    bars.audio(50.0, 100.0)
    assert bars.time_left() == "0:04:10"


@pytest.mark.parametrize("done", [1e-300, 5e-324, 1e-9])
def test_absurd_progress_gives_no_estimate(monkeypatch: pytest.MonkeyPatch, done: float) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tracks = [Track(name, {}, None, (), False, 44100, 44100 * 100, 2) for name in "ab"]
    bars = progress.Bars(Progress(disable=True), tracks, metrics.METRICS["global_sdr"])
    bars.song(tracks[0])
    now[0] = 10.0
    bars.audio(done, 1.0)
    assert bars.time_left() == "-:--:--"


@pytest.mark.parametrize("what", ["interpreter", "link to it", "submission", "plan"])
def test_what_a_submission_needs_must_not_be_in_the_data_set(
    evaluate, data: Path, tmp_path: Path, vocals_plan: Path, what: str
) -> None:
    inside = tmp_path / "data"
    shutil.copytree(data, inside)
    (inside / "python").symlink_to(sys.executable)
    (tmp_path / "python").symlink_to(inside / "python")
    submissions.write(inside / "submission", "works")
    shutil.copy(vocals_plan, inside / "plan.yaml")
    option, path = {
        "interpreter": ("--python", inside / "python"),
        "link to it": ("--python", tmp_path / "python"),
        "submission": ("--submission", inside / "submission"),
        "plan": ("--ensemble", inside / "plan.yaml"),
    }[what]
    result = evaluate("--split", "test", "--tracks", NAMES[0], option, path, data=inside)
    assert result.code == 2
    assert "which a submission must not see" in result.err
    assert str(path) in result.err


def test_the_time_left_is_shown_only_if_the_speed_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tracks = [Track(name, {}, None, (), False, 44100, 44100 * 100, 2) for name in "abc"]
    bars = progress.Bars(Progress(disable=True), tracks, metrics.METRICS["global_sdr"])
    unread = SongRecord("a", "failed", "no stem of it", duration=100.0)
    existing = SongRecord("b", "ok", duration=100.0)  # stems that exist take no seconds of a submission
    for track, record in zip(tracks, (unread, existing), strict=False):
        bars.song(track)
        now[0] += 7.0
        bars.finished(track, record)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("no stem of it (100 s of audio)")
    assert second.endswith("(100 s of audio, 0:00:07 left)")
