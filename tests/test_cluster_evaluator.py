"""The evaluator and blend search on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import blend_cases
import evaluation_cases
import psutil
import pytest
from blend_cases import COLLECT
from evaluation_cases import NAMES, results, scores
from in_process import Result

pytest.importorskip("ray", reason="the cluster needs Ray")

from ray.cluster_utils import Cluster

from evaluator import cluster_run
from evaluator.blend_search.collection import load
from evaluator.dataset import Track
from evaluator.records import SongRecord
from evaluator.run_folder import RunFolder
from kmdx.cluster import ClusterError, Finished

pytestmark = pytest.mark.slow

data, evaluate = evaluation_cases.data, evaluation_cases.evaluate
collected, plan_of_two, run = blend_cases.collected, blend_cases.plan_of_two, blend_cases.run


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of two nodes with one core each; the head has no cores."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def test_songs_have_the_same_scores_as_on_one_machine(
    evaluate: Callable[..., Result], nodes: Cluster, tmp_path: Path
) -> None:
    assert evaluate(output=tmp_path / "here").code == 0
    done = evaluate("--cluster", nodes.address, "--keep-stems")
    assert (done.code, done.err.count("s of audio, on ")) == (0, len(NAMES))
    assert f"works on a cluster, {len(NAMES)} of {len(NAMES)} songs scored" in done.out + done.err
    assert scores(tmp_path / "run") == scores(tmp_path / "here")
    machines = [song["node"] for song in results(tmp_path / "run")["songs"]]
    assert all(machines)
    with (tmp_path / "run" / "results.csv").open(newline="") as table:
        assert [row["node"] for row in csv.DictReader(table)] == machines
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert all(f"<td>{machine}</td>" in page for machine in machines)
    assert "Machine</th>" not in (tmp_path / "here" / "report.html").read_text("utf-8")
    assert {path.name for path in (tmp_path / "run" / "predictions").iterdir()} == {*NAMES}
    assert not list(tmp_path.glob("run/.work-*"))
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "songs").iterdir()}
    again = evaluate("--cluster", nodes.address, "--keep-stems")
    assert (again.code, "s of audio" in again.err) == (0, False)
    assert records == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "songs").iterdir()}


def test_a_failed_song_names_its_log_and_the_others_are_scored(
    evaluate: Callable[..., Result], nodes: Cluster, tmp_path: Path
) -> None:
    done = evaluate("--cluster", nodes.address, "--tracks", "c", what="raises")
    assert done.code == 1
    (song,) = results(tmp_path / "run")["songs"]
    (log,) = tmp_path.glob("run/submission.*.log")
    assert "out of ideas" in song["reason"]
    assert log.name in song["reason"]
    assert "out of ideas" in log.read_text("utf-8")


def test_a_submission_that_cannot_be_loaded_ends_the_run_with_a_report(
    evaluate: Callable[..., Result], nodes: Cluster, tmp_path: Path
) -> None:
    submission = tmp_path / "works"
    evaluation_cases.submissions.write(submission, "works")
    (submission / "my_submission" / "user_config.py").write_text("raise ValueError('no model')\n")
    done = evaluate("--cluster", nodes.address, "--strict")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "no model" in done.errors[0]
    assert results(tmp_path / "run")["run"]["failure"]
    assert "no model" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_node_with_another_interpreter_ends_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start({})
    folder.record_interpreter({"version": "3.11.2", "device": "cpu", "packages": {}})
    folder.add(SongRecord("a", "failed").to_json())
    track = Track.__new__(Track)
    answer = cluster_run.Answer(
        SongRecord("b", "failed"), {}, {"version": "3.12.1", "device": "cpu", "packages": {}}
    )
    finished: Finished[Track, cluster_run.Answer] = Finished(0, "other", answer)
    with pytest.raises(ClusterError, match=r"other differs .*version was 3\.11\.2, is 3\.12\.1"):
        cluster_run.record_of(finished, track, folder, lambda process: None)


def test_a_collection_has_the_same_products_as_on_one_machine(
    run: Callable[..., Result],
    collected: Path,
    plan_of_two: Path,
    data: Path,
    nodes: Cluster,
    tmp_path: Path,
) -> None:
    arguments = ("collect", plan_of_two, data, "-o", tmp_path / "new", *COLLECT)
    done = run(*arguments, "--cluster", nodes.address, "--keep")
    assert done.code == 0, done.err
    here, there = load(collected), load(tmp_path / "new")
    assert there.songs == here.songs
    for one, other in zip(here.stems, there.stems, strict=True):
        assert other.products.gram == pytest.approx(one.products.gram, rel=1e-5, abs=1e-7)
    settings = [json.loads((path / "run.json").read_text()) for path in (collected, tmp_path / "new")]
    assert [each["device"] for each in settings] == ["cpu", "cpu"]
    again = run(*arguments, "--keep")
    assert (again.code, again.err.count("already collected")) == (0, len(NAMES))


def test_a_folder_with_the_name_of_an_ensemble_is_not_its_plan(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mini").mkdir()
    (error,) = run("collect", "mini", "no data", "-o", "mini", "--cluster", "auto").errors
    assert "no data" in error


def test_nothing_is_left_running_after_a_run(
    evaluate: Callable[..., Result], nodes: Cluster, tmp_path: Path
) -> None:
    assert evaluate("--cluster", nodes.address, "--tracks", "c").code == 0
    marks = (str(tmp_path / "works"), "evaluator.submission_worker")
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid()
        and any(mark in " ".join(process.info["cmdline"] or ()) for mark in marks)
    ]
    psutil.wait_procs(left, timeout=10)
    assert not [process for process in left if process.is_running()]
