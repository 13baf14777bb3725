"""Two runs side by side."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluator import compare as comparing
from evaluator.compare import Comparison, Difference, compare, load
from kmdx.errors import KmdxError

STEMS = ("bass", "drums", "other", "vocals")


def record(song: str, scores: dict[str, float | None] | float, **more: Any) -> dict[str, Any]:
    values = scores if isinstance(scores, dict) else dict.fromkeys(STEMS, scores)
    return {
        "song": song,
        "status": "ok",
        "duration": 100.0,
        "global_sdr": values,
        "museval_sdr": values,
        **more,
    }


def failed(song: str) -> dict[str, Any]:
    return {"song": song, "status": "failed", "duration": 100.0}


def run(*records: dict[str, Any], **known: Any) -> dict[str, Any]:
    return {"songs": list(records), **known}


def row(comparison: Comparison, stem: str, measure: str = "global_sdr") -> Difference:
    (found,) = [each for each in comparison.differences if (each.stem, each.measure) == (stem, measure)]
    return found


def test_songs_are_paired_by_name() -> None:
    a = run(record("x", 5.0), record("y", 1.0), record("z", 2.0), record("only a", 99.0), failed("broken"))
    b = run(record("z", 1.0), failed("only a"), record("x", 6.0), record("y", 1.004), record("broken", 50.0))
    result = compare(a, b)
    found = row(result, "bass")
    assert (found.pairs, found.wins, found.losses, found.ties) == (3, 1, 1, 1)
    assert found.a == pytest.approx(8 / 3)
    assert found.b == pytest.approx(8.004 / 3)
    assert found.mean == pytest.approx(0.004 / 3)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high
    assert found.verdict == "may be chance: the interval contains 0"
    assert (result.only_a, result.only_b) == (["only a"], ["broken"])
    assert result.warnings == [
        "1 songs failed in A and count in no mean",
        "1 songs failed in B and count in no mean",
    ]


def test_song_is_the_mean_of_its_stems_and_null_counts_in_none() -> None:
    of_a: dict[str, float | None] = {"bass": 1.0, "drums": 2.0, "other": 3.0, "vocals": 6.0}
    of_b = {**of_a, "vocals": 10.0}
    gone = {**of_b, "bass": None}
    a = run(record("x", of_a), record("y", of_a, museval_sdr=of_a))
    b = run(record("x", of_b), record("y", of_b, museval_sdr=gone))
    result = compare(a, b)
    assert row(result, "song").mean == pytest.approx(1.0)
    assert row(result, "song").a == pytest.approx(3.0)
    assert row(result, "vocals").mean == pytest.approx(4.0)
    assert [row(result, stem, "museval_sdr").pairs for stem in ("song", *STEMS)] == [1, 1, 2, 2, 2]
    nothing = row(
        compare(run(record("x", of_a, museval_sdr=gone)), run(record("x", of_b))), "bass", "museval_sdr"
    )
    assert (nothing.pairs, nothing.mean, nothing.verdict) == (0, None, "no pair")


def test_interval_is_the_bootstraps() -> None:
    rng = np.random.default_rng(1)
    steps = rng.normal(0.3, 1.0, 50)
    base = rng.normal(8.0, 3.0, 50)  # songs differ far more than the runs
    a = run(*(record(str(number), value) for number, value in enumerate(base)))
    b = run(*(record(str(number), value) for number, value in enumerate(base + steps)))
    found = row(compare(a, b), "song")
    assert found.low is not None
    assert found.high is not None
    error = statistics.stdev(steps) / 50**0.5  # what the normal approximation says
    assert found.low == pytest.approx(steps.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(steps.mean() + 1.96 * error, abs=0.15 * error)
    assert found == row(compare(a, b, seed=0), "song")
    assert found.low != row(compare(a, b, seed=1), "song").low
    assert found.low != row(compare(a, b, samples=100), "song").low

    clear = row(
        compare(a, run(*(record(each["song"], each["global_sdr"]["bass"] + 2) for each in b["songs"]))),
        "bass",
    )
    assert clear.verdict == "B is better"
    assert (
        row(compare(b, run(*(record(each["song"], -9.0) for each in a["songs"]))), "bass").verdict
        == "A is better"
    )


def test_one_song_has_no_interval() -> None:
    found = row(compare(run(record("x", 1.0)), run(record("x", 2.0))), "song")
    assert (found.mean, found.low, found.high) == (1.0, None, None)
    assert found.verdict == "one song: no interval"


def test_ties_are_below_half_a_hundredth() -> None:
    a = run(*(record(name, 0.0) for name in "wxyz"))
    b = run(record("w", 0.0049), record("x", -0.0049), record("y", 0.005), record("z", -0.005))
    found = row(compare(a, b), "bass")
    assert (found.wins, found.losses, found.ties) == (1, 1, 2)


def test_what_makes_runs_hard_to_compare_is_told() -> None:
    limits = {"time_limit_factor": 1.57, "memory_limit": 16, "enforced": True}
    a = run(record("x", 1.0), record("y", 1.0), run=limits, fingerprints={"x": "1", "y": "2"})
    assert compare(a, a).warnings == []
    assert compare(a, {**a, "fingerprints": {}}).warnings == []
    b = {
        **a,
        "run": {**limits, "enforced": False, "time_limit_factor": 3},
        "fingerprints": {"x": "1", "y": "3", "z": "4"},
    }
    assert compare(a, b).warnings == [
        "the data of 1 songs differ, as of y: these scores do not compare",
        "the time limit differs: 1.57 in A, 3 in B",
        "the enforcing of limits differs: True in A, False in B",
        "B is unfinished: 2 of 3 songs",
    ]
    longer = {**a, "songs": [record("x", 1.0, duration=101.0)]}
    assert "differ, as of x" in compare(a, longer).warnings[0]


def test_nothing_to_compare() -> None:
    with pytest.raises(KmdxError, match="no song has scores in both runs: 1 have in A, 0 in B"):
        compare(run(record("x", 1.0)), run(failed("x")))
    with pytest.raises(KmdxError, match="--samples 0"):
        compare(run(record("x", 1.0)), run(record("x", 1.0)), samples=0)


def write_run(folder: Path, records: list[dict[str, Any]], finished: bool = True) -> Path:
    (folder / "songs").mkdir(parents=True)
    identity = {"enforced": False, "songs": {each["song"]: "same" for each in records}}
    (folder / "run.json").write_text(json.dumps(identity))
    for each in records:
        (folder / "songs" / f"{each['song']}.json").write_text(json.dumps(each), "utf-8")
    if finished:
        (folder / "results.json").write_text(json.dumps({"run": {"enforced": False}, "songs": records}))
    return folder


def test_runs_are_read_from_their_folders(tmp_path: Path) -> None:
    records = [record("Zoë", 1.0), record("b", 2.0)]
    finished = load(write_run(tmp_path / "finished", records))
    unfinished = load(write_run(tmp_path / "unfinished", records, finished=False))
    assert {each["song"] for each in finished["songs"]} == {"Zoë", "b"}
    assert {each["song"] for each in unfinished["songs"]} == {"Zoë", "b"}
    assert compare(finished, unfinished).warnings == []

    alone = tmp_path / "results alone"
    alone.mkdir()
    (alone / "results.json").write_text(json.dumps({"run": {}, "songs": records}))
    assert load(alone)["songs"] == records

    (tmp_path / "empty").mkdir()
    with pytest.raises(KmdxError, match="empty: no run in it"):
        load(tmp_path / "empty")
    (alone / "results.json").write_text("{")
    with pytest.raises(KmdxError, match="damaged"):
        load(alone)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a [x]", [record("one", 1.0), record("two", 2.0), record("three", 7.0)])
    b = write_run(tmp_path / "b", [record("one", 2.0), record("two", 3.25)])

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        code = 0
        try:
            comparing.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, out, err = command(a, b, "--json", tmp_path / "comparison.json")
    assert (code, err) == (0, "")
    assert "a [x]" in out
    assert "scores only in A: three" in out
    (line,) = [line.split() for line in out.splitlines() if line.startswith("song")][:1]
    assert line[:4] == ["song", "1.500", "2.625", "+1.125"]
    assert "+1.000 … +1.250" in out
    assert "museval SDR, median over frames" in out
    written = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    assert written["differences"][0]["mean"] == pytest.approx(1.125)
    assert written["differences"][0]["verdict"] == "B is better"
    assert written["only_a"] == ["three"]

    code, out, err = command(a, tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    "damage",
    [
        {"song": 1},
        {"status": None},
        {"duration": None},
        {"global_sdr": []},
        {"museval_sdr": {"bass": "high"}},
    ],
)
def test_a_damaged_record_is_told_in_one_line(damage: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path, [record("a", 1.0), {**record("b", 1.0), **damage}])
    with pytest.raises(KmdxError, match="record [12] of 2 is damaged"):
        load(tmp_path)
