"""The tool that measures what settings of an ensemble gain and cost."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import blend_cases
import in_process
import numpy as np
import pytest
from in_process import Result

from evaluator import dataset
from evaluator.tradeoff import command, measuring
from evaluator.tradeoff.curve import Curve, svg
from evaluator.tradeoff.measuring import LEVELS, Measured, Setting
from evaluator.tradeoff.variants import PUBLISHED, Changes, variants, with_overlap, without
from kmdx import Separator, benchmark, plan_file, precisions
from kmdx.errors import KmdxError
from kmdx.windows import FadeAndAdd, OverlapAdd, TrimAndJoin

pytestmark = pytest.mark.slow

data, plan_of_two = blend_cases.data, blend_cases.plan_of_two
HTDEMUCS = plan_file.load("htdemucs")


@pytest.fixture
def tradeoff(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, plan_of_two: Path, data: Path, tmp_path: Path
) -> Callable[..., Result]:  # fmt: skip
    """Run the command in this process into ``tmp_path / "run"``; a window takes a pretended time, in float32."""
    monkeypatch.setattr(benchmark.TimedNetwork, "seconds", lambda network: 0.01)
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: False)

    def run(*options: object, plan: object = plan_of_two, songs: object = data) -> Result:
        output = tmp_path / "run"
        small = ["--overlaps", "0.1,0.5", "--shifts", "2", "--no-tta", "--no-members", "--precision", "fp32"]
        arguments = [plan, songs, "-o", output, "--device", "cpu", *small, "--rounds", 1, *options]
        return in_process.run(capsys, command.main, "tradeoff", *arguments)

    return run


def measured(
    name: str, factor: float, score: float, precision: str = "fp32", kind: str = "overlap"
) -> Measured:
    setting = Setting(name, kind, precision, HTDEMUCS)
    return Measured(setting, precision, factor, {"drums": score - 1, "vocals": score + 1})


CURVE = Curve(
    [
        measured(PUBLISHED, 2.0, 8.0, kind=""), measured("overlap 0", 1.0, 7.0), measured("overlap 0.5", 4.0, 8.1),
        measured("tta", 6.0, 8.05, kind="tta"), measured("overlap 0", 0.5, 6.9, "bf16"),
    ]
)  # fmt: skip


def test_each_setting_is_changed_alone_and_settings_without_effect_are_left_out() -> None:
    found = variants(HTDEMUCS, Changes())
    assert [each.name for each in found] == [
        PUBLISHED, "overlap 0", "overlap 0.1", "overlap 0.5", "overlap 0.75", "overlap 0.85",
        "2 shifts", "4 shifts", "tta", "without D", "without B",
    ]  # fmt: skip
    loads = {each.name: each.plan.load(each.plan.stems) / 3 for each in found}
    assert loads[PUBLISHED] == pytest.approx(4 / 3, rel=1e-3), "an overlap of 0.25"
    assert loads["overlap 0.5"] == pytest.approx(2, rel=1e-3)
    assert loads["4 shifts"] == pytest.approx(4 * loads[PUBLISHED])
    assert loads["tta"] == pytest.approx(3 * loads[PUBLISHED])
    assert loads["without D"] == pytest.approx(loads[PUBLISHED] / 3), "B takes D's estimate as input"


def test_nothing_is_tried_that_was_not_asked_for() -> None:
    assert [each.name for each in variants(HTDEMUCS, Changes((), (), False, False))] == [PUBLISHED]


def test_overlaps_apply_to_every_kind_of_window_that_has_one() -> None:
    changed = with_overlap(plan_file.load("leaderboard_c"), 0.5).networks
    assert {use.chunking.overlap for use in changed.values() if isinstance(use.chunking, OverlapAdd)} == {0.5}
    published = plan_file.load("leaderboard_c").networks
    for name, use in published.items():
        if isinstance(use.chunking, TrimAndJoin):
            assert changed[name] == use
    chunks = plan_file.load("vocals")
    for overlap, expected in ((0.0, 2), (0.5, 2), (0.75, 4)):
        (use,) = with_overlap(chunks, overlap).networks.values()
        assert isinstance(use.chunking, FadeAndAdd)
        assert use.chunking.overlap == expected
    with pytest.raises(KmdxError, match="leaves no stride"):
        with_overlap(HTDEMUCS, 0.9999999)


def test_without_a_run_the_weights_of_the_others_keep_their_sum() -> None:
    left = without(HTDEMUCS, frozenset("B"))
    assert left is not None
    assert set(left.runs(left.stems)) == {"V", "D"}
    assert sum(left.nodes["bass"].terms.values()) == pytest.approx(1)
    assert len(left.nodes["bass"].terms) == 2, (
        "the mean of two estimates, because B was the only published one"
    )
    assert without(HTDEMUCS, frozenset("V")) is None, "nothing else estimates the vocals"


def test_leaving_out_nothing_gives_the_published_stems(plan_of_two: Path, data: Path) -> None:
    plan = plan_file.load(plan_of_two)
    same = without(plan, frozenset())
    assert same is not None
    (song, *_) = dataset.find_tracks(data)
    mixture = dataset.read(song, "mixture")
    first, second = (
        Separator(each, device="cpu", precision="fp32").separate(mixture.samples, mixture.rate)
        for each in (plan, same)
    )
    assert all(np.allclose(first[stem], second[stem], atol=1e-5) for stem in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"overlaps": [1.0]}, "from 0 to below 1"), ({"shifts": [1]}, "expected 2 to 100")],
)
def test_impossible_changes_are_refused(changes: dict[str, list[float]], message: str) -> None:
    with pytest.raises(KmdxError, match=message):
        Changes(**changes)


def test_the_front_leaves_out_what_something_faster_outscores() -> None:
    names = [each.name for each in CURVE.front]
    assert names == ["overlap 0, bf16", "overlap 0, fp32", f"{PUBLISHED}, fp32", "overlap 0.5, fp32"]


def test_the_knee_is_where_more_time_gains_least() -> None:
    assert CURVE.knee.name == f"{PUBLISHED}, fp32"
    assert Curve([measured(PUBLISHED, 1.0, 5.0)]).knee.name == f"{PUBLISHED}, fp32"
    assert math.isclose(CURVE.gain(CURVE.measured[2]), 0.1, rel_tol=1e-6)


def test_every_setting_is_drawn_with_its_gain_and_its_time() -> None:
    drawn = svg(CURVE, 1.57)
    root = xml.etree.ElementTree.fromstring(drawn)
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(CURVE.measured)
    assert "overlap 0, bf16: −1.100 dB, 0.50 ×" in titles
    texts = {"".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"as published, knee", "tta", "budget 1.57 ×", "fp32", "bf16"} <= texts
    assert svg(CURVE, 1.57) == drawn
    assert "budget" not in svg(CURVE)


def test_the_command_measures_every_setting_and_the_speed_levels(
    tradeoff: Callable[..., Result], plan_of_two: Path, tmp_path: Path
) -> None:
    result = tradeoff("--members", "--budget", 1)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    settings = {each["name"]: each for each in report["settings"]}
    assert list(settings) == [
        PUBLISHED, "overlap 0.5", "2 shifts", "without one", "without two", "without D", "without W",
        *(f"--speed {level}" for level in LEVELS),
    ]  # fmt: skip
    assert settings[PUBLISHED]["gain"] == 0
    assert settings["2 shifts"]["relative_time"] == pytest.approx(2)
    windows = plan_file.load(plan_of_two).networks["one"].chunking.windows(240 * 44100)
    assert settings[PUBLISHED]["real_time_factor"] == pytest.approx(3 * windows * 0.01 / 240)
    assert report["songs"] == ["a", "b, quiet", "c, no bass", "d"]
    assert (tmp_path / "run" / "results.svg").read_text("utf-8").startswith("<svg")
    assert "knee of the curve on" in result.out


def test_a_stem_that_is_silent_in_a_song_is_not_scored(
    tradeoff: Callable[..., Result], tmp_path: Path
) -> None:
    assert tradeoff("--overlaps", "", "--shifts", "").code == 0
    songs = {
        path.stem: json.loads(path.read_text("utf-8")) for path in (tmp_path / "run" / "songs").iterdir()
    }
    scored = {name: {stem for each in song["sdr"].values() for stem in each} for name, song in songs.items()}
    assert scored["c, no bass"] == {"drums", "other", "vocals"}
    assert scored["a"] == {"bass", "drums", "other", "vocals"}


def test_scores_are_kept_and_only_missing_ones_are_measured(
    tradeoff: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    score = measuring.score

    def noted(separator: Separator, track: dataset.Track, seconds: float | None) -> dict[str, float]:
        scored.append(track.name)
        return score(separator, track, seconds)

    monkeypatch.setattr(measuring, "score", noted)
    first = tradeoff("--overlaps", "0.5", "--shifts", "", "--tracks", "[ad]")
    assert sorted(scored) == ["a", "a", "d", "d"]
    assert tradeoff("--overlaps", "0.5", "--shifts", "", "--tracks", "[ad]").out == first.out
    assert len(scored) == 4
    tradeoff("--overlaps", "0.5", "--shifts", "2", "--tracks", "[ad]")
    assert len(scored) == 6
    refused = tradeoff("--seconds", 0.1, "--tracks", "[ad]")
    assert refused.code == 2
    assert "seconds was nothing, is 0.1" in refused.errors[0]
    assert len(scored) == 6


def test_songs_too_short_for_the_overlap_to_matter_are_reported(tradeoff: Callable[..., Result]) -> None:
    none = ("--overlaps", "", "--shifts", "", "--tracks", "a")
    expected = (
        "1 of 1 songs are shorter than two windows of 0.5 s, so their scores hardly depend on the overlap"
    )
    assert expected in tradeoff(*none).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shifts", "two"], "--shifts two: expected numbers such as 2,4"),
        (["--shifts", "1"], "1 shifts: expected 2 to 100"),
        (["--overlaps", "1"], "an overlap of 1: expected a number from 0 to below 1"),
        (["--seconds", "0"], "--seconds 0: expected a number above 0"),
        (["--seconds", "inf"], "--seconds inf: expected a number above 0"),
        (["--budget", "nan"], "--budget nan: expected a number above 0"),
        (["--budget", "-1"], "--budget -1: expected a number above 0"),
        (["--precision", ","], "--precision is empty; available: auto, fp32, fp16, bf16"),
        (["--precision", "int8"], "unknown precision 'int8'; available: auto, fp32, fp16, bf16"),
        (["--tracks", "z*"], "none of 4 songs is named 'z*'"),
    ],
)
def test_a_mistake_is_one_line(
    tradeoff: Callable[..., Result], tmp_path: Path, options: list[str], message: str
) -> None:
    result = tradeoff(*options)
    assert result.code == 2
    assert message in result.errors[0]
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_same_data_twice_is_refused(tradeoff: Callable[..., Result], data: Path) -> None:
    assert "two songs are named a" in tradeoff(data).errors[0]


def test_windows_are_timed_in_alternating_order_after_a_first_round(
    plan_of_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    separator = Separator(plan_of_two, device="cpu", precision="fp32")
    times = measuring.WindowTimes()
    keys = times.add(separator)
    assert times.add(separator) == keys
    order: list[int] = []
    took = iter([9.0, 9.0, 1.0, 2.0, 4.0, 3.0, 5.0, 6.0])

    def seconds(network: benchmark.TimedNetwork) -> float:
        order.append(id(network))
        return next(took)

    monkeypatch.setattr(benchmark.TimedNetwork, "seconds", seconds)
    found = times.measure(3)
    assert order[2:4] == order[4:6][::-1] == order[6:8]
    assert sorted(found.values()) == [3.0, 4.0]
