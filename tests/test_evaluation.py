"""The evaluator as a whole: the command, its run folder, what it survives and what it refuses."""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import soundfile
import submissions
from conftest import noise

from evaluator import command, metrics
from evaluator.comparison_command import compare, load
from evaluator.metrics import global_sdr
from evaluator.predictions import Predictions
from evaluator.process import Submission
from evaluator.protocol import Workspace
from evaluator.records import SongRecord
from evaluator.results import describe_weights
from evaluator.scoring import score_song
from kmdx import plan_file
from kmdx.errors import KmdxError

ROOT = Path(__file__).parents[1]
STEMS = ("bass", "drums", "other", "vocals")
NAMES = ("A – één", "b & <b>", "c")


class Result(NamedTuple):
    """What a run of the command came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three songs of a second in MUSDB18-HQ's layout, the second with a silent stem."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(NAMES):
        song = folder / "test" / name
        song.mkdir(parents=True)
        stems = {stem: noise(44_100 + 100 * seed, seed=10 * seed + index) for index, stem in enumerate(STEMS)}
        if seed == 1:
            stems["bass"][:] = 0
        stems = {stem: np.round(samples * 32767) / 32768 for stem, samples in stems.items()}
        for stem, samples in {**stems, "mixture": sum(stems.values())}.items():
            soundfile.write(song / f"{stem}.wav", samples, 44100)
    return folder


@pytest.fixture
def evaluate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> Callable[..., Result]:
    """Run the command in this process into ``tmp_path / "run"``, with a submission that does one thing."""

    def evaluate(
        *options: object, what: str = "works", output: Path = tmp_path / "run", data: Path = data
    ) -> Result:
        folder = tmp_path / what
        if not folder.exists():
            submissions.write(folder, what)
        arguments = [data, "-o", output, "--submission", folder, "--time-limit-factor", 60, *options]
        monkeypatch.setattr(sys, "argv", ["local_evaluation.py", *map(str, arguments)])
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return evaluate


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text("utf-8"))


def scores(run: Path) -> list[dict[str, Any]]:
    """Songs' records without what differs from run to run: times and peaks."""
    keys = (
        "song",
        "status",
        "reason",
        "scores",
        "means",
        "frames",
        "envelopes",
    )
    return [{key: record.get(key) for key in keys} for record in results(run)["songs"]]


def test_any_entrants_folder_is_scored_unchanged(evaluate, data: Path, tmp_path: Path) -> None:
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


def test_a_part_of_the_accompaniment_of_another_length_fails_the_song(
    evaluate, two_stems: Path, tmp_path: Path
) -> None:
    result = evaluate(data=two_stems, what="returns a wrong length")
    assert result.code == 1
    (record,) = results(tmp_path / "run")["songs"]
    assert "wrong length: other has 44099 samples" in record["reason"]


def test_more_stems_than_the_wanted_ones_matter_only_in_the_challenge(
    evaluate, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(submissions.BODIES, "adds a guitar", "stems['guitar'] = stems['bass']")
    assert evaluate(what="adds a guitar").code == 1
    (first, *_) = results(tmp_path / "run")["songs"]
    assert first["reason"] == "wrong stems: guitar is extra"
    assert evaluate("--stems", "vocals", what="adds a guitar", output=tmp_path / "vocals").code == 0


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


def test_a_plan_of_one_stem_is_scored_by_that_stem(evaluate, vocals_plan: Path, tmp_path: Path) -> None:
    options = ("--submission", ROOT, "--ensemble", vocals_plan, "--device", "cpu", "--tracks", NAMES[0])
    refused = evaluate(*options)
    assert refused.code == 2
    assert "vocals_only does not separate bass, drums, other; use --stems vocals" in refused.err
    result = evaluate(*options, "--stems", "vocals", output=tmp_path / "vocals")
    assert result.code == 0, result.err
    (record,) = results(tmp_path / "vocals")["songs"]
    assert list(record["scores"]["global_sdr"]) == ["vocals"]


def test_a_full_disk_fails_the_song_and_the_run_goes_on(evaluate, tmp_path: Path, monkeypatch) -> None:
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


def test_predictions_are_dropped_unless_kept(evaluate, tmp_path: Path) -> None:
    assert evaluate().code == 0
    assert not (tmp_path / "run" / "predictions").exists()


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
def test_songs_that_fail_are_recorded_and_the_run_goes_on(evaluate, tmp_path: Path, what: str) -> None:
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


def test_a_finished_run_is_not_done_again(evaluate, tmp_path: Path) -> None:
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


def test_other_code_and_other_data_do_not_mix_into_a_run(evaluate, data: Path, tmp_path: Path) -> None:
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


def test_a_folder_of_other_things_is_left_alone(evaluate, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    result = evaluate()
    assert result.code == 2
    assert "contains other files (thesis.tex, …)" in result.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


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
        (["--precision", "bf17"], "precision 'bf17': expected one of"),
        (["--engine", "plane"], "unknown engine 'plane'; available: tuned, plain"),
    ],
)
def test_mistakes_are_one_line(evaluate, options: list[str], message: str) -> None:
    result = evaluate(*options)
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_this_packages_own_submission_with_any_ensemble(
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


SLOW = "time.sleep(0.3)"


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that a process has started and that has not ended."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_five_kills_change_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    songs = tmp_path / "data"
    for number in range(6):
        shutil.copytree(data / "test" / NAMES[number % 3], songs / f"song {number}")
        if number >= 3:  # not the same content twice
            for path in (songs / f"song {number}").iterdir():
                samples, rate = soundfile.read(path)
                soundfile.write(path, samples[: -100 * number], rate)
    monkeypatch.setitem(submissions.BODIES, "is slow", SLOW)
    submission = submissions.write(tmp_path / "submission", "is slow")

    def start(run: str) -> subprocess.Popen[str]:
        arguments = [songs, "-o", tmp_path / run, "--submission", submission, "--time-limit-factor", "60"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "local_evaluation.py"), *map(str, arguments)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    whole = start("whole")
    began = time.monotonic()
    assert whole.wait(120) == 0
    takes = time.monotonic() - began
    whole.stderr.close()

    moments = random.Random(7)
    done = []
    started: list[psutil.Process] = []
    for _ in range(5):
        process = start("killed")
        time.sleep(moments.random() * takes)
        started += below(process)
        process.kill()
        process.wait()
        process.stderr.close()
        kept = list((tmp_path / "killed").glob("songs/*.json"))
        for path in kept:
            json.loads(path.read_text("utf-8"))
        done.append(len(kept))
    assert done == sorted(done), "a record was lost"
    assert started
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, "a process outlived the evaluator"
    last = start("killed")
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert [record["song"] for record in results(tmp_path / "killed")["songs"]] == [
        f"song {n}" for n in range(6)
    ]
    assert not list((tmp_path / "killed").glob(".work-*"))


def test_ctrl_c_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    submission = submissions.write(tmp_path / "submission", "sleeps")
    arguments = [data, "-o", tmp_path / "run", "--submission", submission]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "local_evaluation.py"), *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(started := below(process)) < 3:  # the launcher, the guard and the submission
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "stopped; repeat the command to resume the run"
    assert "Traceback" not in errors
    assert not psutil.wait_procs(started, timeout=60)[1]


def test_a_run_that_ended_before_it_began_can_be_started_again(evaluate, tmp_path: Path) -> None:
    broken = submissions.write(tmp_path / "broken", "works", "raise ValueError('no weights')")
    result = evaluate("--submission", broken)
    assert result.code == 2
    assert "ValueError: no weights" in result.err
    assert evaluate().code == 0, "no song was done, so the folder may become another run"


def test_songs_whose_data_are_bad_fail_and_the_others_are_scored(
    evaluate, data: Path, tmp_path: Path
) -> None:
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
    assert re.search(r"failed: caf\\udce9: .*\.wav: expected a name in UTF-8: rename it", result.out)
    records = {record["song"]: record["status"] for record in results(tmp_path / "run")["songs"]}
    assert records == {name: "failed", **dict.fromkeys(NAMES[1:], "ok")}


def test_nan_fails_a_song_and_does_not_end_a_strict_run(evaluate, tmp_path: Path) -> None:
    assert evaluate("--strict", what="returns NaN").code == 1
    records = results(tmp_path / "run")["songs"]
    assert [record["reason"] for record in records] == ["NaN in drums"] * 3


def test_weights_that_came_with_the_package_are_known() -> None:
    assert [weight["known"] for weight in describe_weights(plan_file.load("mini"))] == 4 * [True]


def test_a_reason_says_whose_file_it_is_and_not_where_it_lay(tmp_path: Path) -> None:
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


def test_any_file_of_an_entrants_folder_counts(evaluate, tmp_path: Path) -> None:
    folder = submissions.write(tmp_path / "works", "works")
    (folder / "model.th").write_bytes(b"a" * 2_000_000)
    evaluate()
    (weight,) = results(tmp_path / "run")["run"]["weights"]
    assert weight["name"] == "model.th"
    assert not weight["known"]
    (folder / "model.th").write_bytes(b"b" * 2_000_000)
    assert "submission_sha256 was" in evaluate().err


def test_data_are_read_once(evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate()
    monkeypatch.setattr("evaluator.dataset.check", lambda *_: pytest.fail("the data were checked again"))
    assert evaluate().code == 0


def test_a_scoring_process_that_is_killed_is_started_again(data: Path) -> None:
    from evaluator.scoring_process import ScoringProcess

    files = {stem: data / "test" / "c" / f"{stem}.wav" for stem in STEMS}
    with ScoringProcess() as scorer:
        first = scorer.score(files, files, metrics.choose(None))
        (process,) = scorer._pool._processes.values()
        process.kill()
        process.join()
        assert scorer.score(files, files, metrics.choose(None)) == first


def test_a_scoring_that_takes_too_long_is_ended_and_the_next_is_not(data: Path) -> None:
    from evaluator.scoring_process import ScoringError, ScoringProcess

    files = {stem: data / "test" / "c" / f"{stem}.wav" for stem in STEMS}
    with ScoringProcess() as scorer:
        first = scorer.score(files, files, metrics.choose(None))
        (process,) = scorer._pool._processes.values()
        with pytest.raises(ScoringError, match="scoring took more than 0 s"):
            scorer.score(files, files, metrics.choose(None), limit=0)
        process.join()
        assert process.exitcode != 0
        assert scorer.score(files, files, metrics.choose(None)) == first


@pytest.mark.parametrize("times", [1, 2])
def test_predictions_that_resist_being_cleared_are_cleared_without_the_submission(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The second song's: a process of the submission may write while they are cleared."""
    clear, kill = Predictions.clear, Submission.kill
    calls: list[str] = []

    def resisted(predictions: Predictions) -> None:
        calls.append("clear")
        if 2 <= calls.count("clear") < 2 + times:
            raise OSError(39, "Directory not empty")
        clear(predictions)

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


@pytest.mark.parametrize(
    "record",
    [
        SongRecord("a", "failed", "x", duration=100.0, seconds=1.0),
        SongRecord("a", "ok", duration=100.0, stems=("bass",), scores={"global_sdr": {"bass": 1.0}}),
    ],
    ids=["played", "existing stems"],
)
def test_the_time_left_is_by_the_songs_that_were_done(
    record: SongRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.progress import Progress

    from evaluator.dataset import Track

    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    tracks = [Track(name, {}, None, (), False, 44100, 44100 * 100, 2) for name in "abcd"]
    bars = command._Bars(Progress(disable=True), tracks, metrics.METRICS["global_sdr"])
    bars.finished(tracks[0], record)
    assert bars.time_left() == "-:--:--", "a song that was done before tells no pace"
    bars.song(tracks[1])
    now[0] = 50.0
    assert bars.time_left() == "-:--:--"
    now[0] = 200.0
    bars.finished(tracks[1], record)
    assert bars.time_left() == "0:06:40"
    bars.song(tracks[2])
    now[0] = 250.0
    assert bars.time_left() == "0:05:50", "a song that tells nothing goes on at the same pace"
    bars.audio(50.0, 100.0)
    assert bars.time_left() == "0:04:10"


def test_the_time_left_is_only_shown_where_a_pace_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.progress import Progress

    from evaluator.dataset import Track

    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    tracks = [Track(name, {}, None, (), False, 44100, 44100 * 100, 2) for name in "abc"]
    bars = command._Bars(Progress(disable=True), tracks, metrics.METRICS["global_sdr"])
    unread = SongRecord("a", "failed", "no stem of it", duration=100.0)
    existing = SongRecord("b", "ok", duration=100.0)  # stems that exist take no seconds of a submission
    for track, record in zip(tracks, (unread, existing), strict=False):
        bars.song(track)
        now[0] += 7.0
        bars.finished(track, record)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("no stem of it (100 s of audio)")
    assert second.endswith("(100 s of audio, 0:00:07 left)")


def test_two_processes_do_not_write_to_one_run(evaluate, tmp_path: Path) -> None:
    from evaluator.run_folder import RunFolder

    evaluate()
    with RunFolder(tmp_path / "run").locked():
        result = evaluate()
    assert result.code == 2
    assert "another process is writing to" in result.err


def test_a_run_from_before_the_table_of_metrics_goes_on(evaluate, tmp_path: Path) -> None:
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
