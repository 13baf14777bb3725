"""What can be compared is read: runs of every schema, museval's files, and published results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from evaluator.systems import load, load_all
from kmdx.errors import KmdxError

NAN = float("nan")


def museval(sdr: list[float | None], **more: list[float | None]) -> dict[str, Any]:
    """A target of museval's file; a frame without the key where the value is None."""
    frames = [
        {
            "time": float(place),
            "duration": 1.0,
            "metrics": {
                "SDR": value,
                **{key: values[place] for key, values in more.items() if values[place] is not None},
            },
        }
        for place, value in enumerate(sdr)
    ]
    return {"name": "vocals", "frames": frames}


def write(path: Path, *targets: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"targets": list(targets)}), "utf-8")
    return path


def test_a_songs_value_is_the_median_over_frames_that_have_one(tmp_path: Path) -> None:
    write(
        tmp_path / "TAK1" / "test" / "A & B - Zoë.json",
        museval([NAN, 1.0, 5.0, NAN, 2.0], SIR=[9.0, None, 7.0, NAN, 8.0]),
    )
    system = load(tmp_path / "TAK1")
    record = system.songs["A & B - Zoë"]
    assert (system.name, system.kind, record.duration) == ("TAK1", "museval", 5.0)
    assert record.scores == {"museval_sdr": {"vocals": 2.0}, "museval_sir": {"vocals": 8.0}}


def test_a_target_without_a_value_has_none(tmp_path: Path) -> None:
    write(tmp_path / "M" / "a.json", museval([NAN, NAN]))
    write(tmp_path / "M" / "b.json", museval([math.inf, math.inf]))
    write(tmp_path / "M" / "c.json")
    songs = load(tmp_path / "M").songs
    assert [songs[name].scores.get("museval_sdr") for name in "abc"] == [
        {"vocals": None},
        {"vocals": None},
        {},
    ]


@pytest.mark.parametrize("layout", ["M/test/s.json", "M/s.json", "M/train/s.json"])
def test_museval_files_are_found_in_every_layout(layout: str, tmp_path: Path) -> None:
    write(tmp_path / layout, museval([1.0]))
    system = load(tmp_path / "M")
    assert (system.name, list(system.songs)) == ("M", ["s"])
    assert load((tmp_path / layout).parent).name == "M"


def test_test_songs_are_used_if_there_are_train_and_test_songs(tmp_path: Path) -> None:
    write(tmp_path / "M" / "test" / "s.json", museval([1.0]))
    write(tmp_path / "M" / "train" / "t.json", museval([1.0]))
    system = load(tmp_path / "M")
    assert list(system.songs) == ["s"]
    assert "train are left out" in system.notes[0]


def test_a_folder_of_methods_is_an_error_that_lists_them(tmp_path: Path) -> None:
    for name in ("TAK1", "UHL2"):
        write(tmp_path / "submissions" / name / "test" / "s.json", museval([1.0]))
    with pytest.raises(KmdxError, match="or name one of its folders TAK1, UHL2"):
        load(tmp_path / "submissions")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"targets": 5}',
        '{"targets": [{"name": "vocals"}]}',
        '{"targets": [{"name": "vocals", "frames": [{"time": 0, "duration": 1, "metrics": {"SDR": "high"}}]}]}',
        '{"targets": [{"name": "vocals", "frames": [{"time": 0, "duration": 1, "metrics": []}]}]}',
    ],
)
def test_another_json_file_is_a_one_line_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(KmdxError, match=r"s\.json") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


OLD = {
    "song": "Zoë",
    "status": "ok",
    "duration": 100.0,
    "global_sdr": {"bass": 1.0, "vocals": 2.0},
    "museval_sdr": {"bass": 1.0, "vocals": None},
}


def write_run(folder: Path, records: list[dict[str, Any]], finished: bool = True) -> Path:
    (folder / "songs").mkdir(parents=True)
    identity = {"enforced": False, "songs": {each["song"]: "same" for each in records}}
    (folder / "run.json").write_text(json.dumps(identity))
    for number, each in enumerate(records):
        (folder / "songs" / f"{number}.json").write_text(json.dumps(each), "utf-8")
    if finished:
        (folder / "results.json").write_text(json.dumps({"run": {"device": "cpu"}, "songs": records}))
    return folder


def test_old_runs_can_be_read_whether_finished_or_not(tmp_path: Path) -> None:
    finished = load(write_run(tmp_path / "finished", [OLD, {**OLD, "song": "b", "status": "failed"}]))
    assert (list(finished.songs), finished.failed, finished.run) == (["Zoë"], ("b",), {"device": "cpu"})
    assert finished.songs["Zoë"].scores["museval_sdr"] == {"bass": 1.0, "vocals": None}
    unfinished = load(write_run(tmp_path / "unfinished", [OLD], finished=False))
    assert (list(unfinished.songs), unfinished.run["enforced"]) == (["Zoë"], False)
    assert load(tmp_path / "finished" / "results.json").songs.keys() == finished.songs.keys()


def test_a_results_file_alone_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"run": {}, "songs": [OLD]}))
    assert list(load(tmp_path).songs) == ["Zoë"]
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(KmdxError, match="damaged"):
        load(tmp_path)


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
def test_a_damaged_record_is_named_in_one_line(damage: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path / "run", [OLD, {**OLD, "song": "b", **damage}])
    with pytest.raises(KmdxError, match="record [12] of 2 is damaged"):
        load(tmp_path / "run")


def test_systems_with_the_same_name_get_numbers(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "M" / "s.json", museval([1.0]))
    names = [system.name for system in load_all([str(tmp_path / folder / "M") for folder in ("one", "two")])]
    assert names == ["M (1)", "M (2)"]


def test_published_results_are_found_by_name() -> None:
    system = load("published:umxhq")
    assert (system.kind, system.stems) == ("published", ("bass", "drums", "other", "vocals"))
    assert system.row is not None
    assert "2019" in system.row.source
    with pytest.raises(
        KmdxError, match="unknown published results umxq [(]did you mean 'umxhq'[?][)]; available: "
    ):
        load("published:umxq")
