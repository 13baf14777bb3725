"""Comparing systems: pairing, significance, warnings and the command."""

from __future__ import annotations

import json
import os
import statistics
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
from sisec2018 import VOCALS

from evaluator import comparison_command as comparing
from evaluator import metrics, published
from evaluator.comparison import Comparison, Difference, compare
from evaluator.records import SongRecord
from evaluator.systems import System, load
from kmdx.errors import KmdxError

STEMS = ("bass", "drums", "other", "vocals")
Scores = dict[str, float | None]


def record(song: str, scores: Scores | float, metric: str = "global_sdr", **more: Any) -> SongRecord:
    values = scores if isinstance(scores, dict) else dict.fromkeys(STEMS, scores)
    return SongRecord(song, "ok", duration=100.0, stems=tuple(values), scores={metric: values}, **more)


def system(name: str, *records: SongRecord, **known: Any) -> System:
    return System(
        name, f"runs/{name}", "run", {each.song: each for each in records}, planned=len(records), **known
    )


def of_values(name: str, values: Any, metric: str = "global_sdr") -> System:
    return system(name, *(record(str(number), float(value), metric) for number, value in enumerate(values)))


def row(comparison: Comparison, stem: str, metric: str = "global_sdr") -> Difference:
    (found,) = [each for each in comparison.differences if (each.stem, each.metric) == (stem, metric)]
    return found


def sisec() -> tuple[System, System]:
    methods = (
        system(name, *(record(song, {"vocals": pair[place]}, "museval_sdr") for song, pair in VOCALS.items()))
        for place, name in enumerate(("TAK1", "UHL2"))
    )
    first, second = methods
    return first, second


def test_tak1_is_better_than_uhl2_on_museval_vocals() -> None:
    found = compare(sisec())
    vocals = row(found, "vocals", "museval_sdr")
    assert vocals.better == "a"
    assert vocals.verdict(found.names) == "TAK1 is better"
    assert (vocals.losses, vocals.wins, vocals.ties) == (37, 12, 1)
    assert vocals.value_a == pytest.approx(6.69864)
    assert vocals.statistic == "median"


def test_mean_and_median_disagree_if_two_songs_are_outliers() -> None:
    values = {place: {song: pair[place] for song, pair in VOCALS.items()} for place in (0, 1)}
    a, b = (
        system(name, *(record(song, {"vocals": value}) for song, value in values[place].items()))
        for place, name in enumerate(("TAK1", "UHL2"))
    )
    vocals = row(compare([a, b]), "vocals")
    assert vocals.statistic == "mean"
    assert vocals.better is None
    assert vocals.signed_rank is not None
    assert vocals.signed_rank < 0.001 < 0.5 < (vocals.p or 0)


def test_songs_are_paired_by_name() -> None:
    a = system("a", record("x", 5.0), record("y", 1.0), record("z", 2.0), record("only a", 99.0))
    b = system("b", record("z", 1.0), record("x", 6.0), record("y", 1.004), record("only b", 50.0))
    result = compare([a, b])
    found = row(result, "bass")
    assert (len(found.songs), found.wins, found.losses, found.ties) == (3, 1, 1, 1)
    assert (found.value_a, found.value_b) == pytest.approx((8 / 3, 8.004 / 3))
    assert found.difference == pytest.approx(0.004 / 3)
    assert result.alone == {"a": ("only a",), "b": ("only b",)}


def test_names_match_despite_case_and_unicode_normalization() -> None:
    a = system("a", record("Zoë - Über", 1.0))
    b = system("b", record(unicodedata.normalize("NFD", "ZOË - über"), 2.0))
    found = compare([a, b])
    assert row(found, "song").difference == pytest.approx(1.0)
    assert found.songs == row(found, "song").songs == ("Zoë - Über",)
    twice = system("twice", record("Song", 1.0), record("song", 5.0))
    assert row(compare([twice, system("c", record("song", 6.0))]), "song").difference == pytest.approx(1.0)


@pytest.mark.parametrize("metric", ["global_sdr", "museval_sdr"])
def test_two_songs_are_never_proof(metric: str) -> None:
    found = compare([of_values("a", [1, 2], metric), of_values("b", [5, 6], metric)])
    difference = row(found, "song", metric)
    assert difference.better is None
    assert difference.verdict("AB") == "too few songs: 2, expected at least 6"
    six = compare([of_values("a", range(6), metric), of_values("b", np.arange(6) + 4.0, metric)])
    assert row(six, "song", metric).better == "b"


def test_lower_is_better_if_the_metric_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metrics.Metric("loss", "Loss", "", False, metrics.global_sdr)
    monkeypatch.setitem(metrics.METRICS, "loss", entry)
    found = row(
        compare([of_values("a", range(8), "loss"), of_values("b", np.arange(8) - 1.0, "loss")]),
        "song",
        "loss",
    )
    assert (found.difference, found.better, found.wins, found.losses) == (-1.0, "b", 8, 0)


def test_equal_systems_do_not_differ() -> None:
    found = row(compare([of_values("a", range(8)), of_values("b", range(8))]), "song")
    assert (found.better, found.verdict("AB"), found.ties) == (None, "no difference", 8)


def test_many_pairs_are_corrected_together() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(8, 3, 20)
    shifted = [base + rng.normal(0.42, 0.8, 20) for _ in range(3)]
    a, b, c, d = (of_values(name, values) for name, values in zip("abcd", (base, *shifted), strict=True))
    alone = row(compare([a, b]), "song")
    together = compare([a, b, c, d]).differences
    first = next(each for each in together if (each.stem, each.a, each.b) == ("song", 0, 1))
    assert alone.p == alone.corrected == first.p
    assert first.corrected is not None
    assert first.p is not None
    assert first.p < first.corrected <= 6 * first.p


@pytest.mark.parametrize("metric", ["global_sdr", "museval_sdr"])
@pytest.mark.parametrize(
    ("systems", "songs", "verdict"),
    [
        (2, 5, "too few songs: 5, expected at least 6"),
        (2, 6, "B is better"),
        (3, 5, "too few songs: 5, expected at least 6"),
        (3, 6, "too few songs for 3 pairs: 6, expected at least 7"),
        (3, 7, "B is better"),
        (5, 8, "too few songs for 10 pairs: 8, expected at least 9"),
        (5, 9, "B is better"),
    ],
)
def test_a_pair_needs_enough_songs_for_the_number_of_pairs(
    metric: str, systems: int, songs: int, verdict: str
) -> None:
    runs = [of_values(name, np.arange(songs) + 4.0 * place, metric) for place, name in enumerate("ABCDE")]
    first = compare(runs[:systems]).differences[0]
    assert first.verdict("ABCDE") == verdict


def test_random_sign_flips_are_enough_for_any_number_of_pairs() -> None:
    runs = [of_values(str(place), np.arange(16) + 4.0 * place) for place in range(12)]
    assert {each.verdict("A" * 12) for each in compare(runs, samples=1000).differences} == {"A is better"}


def test_a_pair_with_fewer_songs_needs_what_it_would_need_among_all_tested_pairs() -> None:
    runs = [of_values(name, np.arange(9) + 4.0 * place) for place, name in enumerate("AB")]
    found = [each for each in compare([*runs, of_values("C", [7, 8])]).differences if each.stem == "song"]
    assert [each.verdict("ABC") for each in found] == [
        "B is better",
        *(2 * ["too few songs for 2 pairs: 2, expected at least 7"]),
    ]


def test_songs_without_values_are_not_called_missing() -> None:
    values: list[Scores] = [{"bass": 1.0, "vocals": None}, {"bass": 1.0, "vocals": 2.0}]
    a, b = (
        system(name, *(record(str(number), values[number < few], "museval_sdr") for number in range(9)))
        for name, few in (("a", 9), ("b", 2))
    )
    of_two = row(compare([a, b]), "vocals", "museval_sdr")
    assert of_two.verdict("AB") == "too few songs with values: 2, expected at least 6"
    none = system("none", *(record(str(number), values[0], "museval_sdr") for number in range(9)))
    assert row(compare([a, none]), "vocals", "museval_sdr").verdict("AB") == "no song in common with values"
    other = system("other", record("x", 1.0, "museval_sdr"))
    verdicts = [each.verdict("ABC") for each in compare([a, b, other]).differences if each.b == 2]
    assert {*verdicts} == {"no song in common"}


def test_the_interval_is_a_bootstrap_interval() -> None:
    rng = np.random.default_rng(1)
    steps = rng.normal(0.3, 1.0, 50)
    base = rng.normal(8.0, 3.0, 50)  # songs differ far more than the runs
    a, b = of_values("a", base), of_values("b", base + steps)
    found = row(compare([a, b]), "song")
    error = statistics.stdev(steps) / 50**0.5  # by the normal approximation
    assert (found.low, found.high) == pytest.approx(
        (steps.mean() - 1.96 * error, steps.mean() + 1.96 * error), abs=0.15 * error
    )
    assert found == row(compare([a, b], seed=0), "song")
    assert found.low != row(compare([a, b], seed=1), "song").low


def test_a_song_is_the_mean_of_its_stems_and_missing_values_are_ignored() -> None:
    of_a: Scores = {"bass": 1.0, "drums": 2.0, "other": 3.0, "vocals": 6.0}
    a = system("a", record("x", of_a), record("y", of_a))
    b = system("b", record("x", {**of_a, "vocals": 10.0}), record("y", {**of_a, "vocals": None}))
    result = compare([a, b])
    assert row(result, "song").difference == pytest.approx(1.0)
    assert [len(row(result, stem).songs) for stem in ("song", *STEMS)] == [1, 2, 2, 2, 1]


def test_a_sum_of_other_stems_is_excluded_from_means() -> None:
    whole: Scores = {"bass": 1.0, "vocals": 3.0, "accompaniment": 50.0}
    assert compare([system("a", record("x", whole)), system("b", record("x", whole))]).mean_stems == (
        "bass",
        "vocals",
    )
    assert record("x", whole).mean("global_sdr") == 2.0
    two: Scores = {"vocals": 3.0, "accompaniment": 50.0}
    assert set(compare([system("a", record("x", two)), system("b", record("x", two))]).mean_stems) == set(two)


def test_a_single_stem_compares_with_four() -> None:
    result = compare([system("one", record("x", {"vocals": 1.0})), system("four", record("x", 2.0))])
    assert result.rows == ("vocals",)
    assert any("the stems differ: one has vocals" in line for line in result.warnings)


def test_published_results_are_shown_and_never_tested() -> None:
    table, entry = published.find("tak1")
    known = System(entry.name, "published:tak1", "published", row=entry, table=table)
    first, _ = sisec()
    result = compare([first, known])
    assert not result.differences
    assert result.values["museval_sdr"]["median"][1]["vocals"] == 6.6
    assert result.values["museval_sdr"]["mean"][1]["vocals"] is None
    assert result.warnings == ()


def test_published_results_on_other_songs_are_named() -> None:
    table, entry = published.find("tak1")
    known = System(entry.name, "published:tak1", "published", row=entry, table=table)
    few = system("few", *(record(song, {"vocals": 1.0}, "museval_sdr") for song in list(VOCALS)[:3]))
    other = system("other", record("x", {"vocals": 1.0}, "museval_sdr"))
    assert any("few has 3" in line for line in compare([few, known]).warnings)
    assert any("other was not" in line for line in compare([other, known]).warnings)


@pytest.mark.parametrize(
    ("key", "one", "two", "line"),
    [
        ("device", "cpu", "cuda:0", "the device differs: cpu in a, cuda:0 in b"),
        ("precision", "fp32", "fp16", "the precision differs: fp32 in a, fp16 in b"),
        ("engine", "tuned", "plain", "the engine differs: tuned in a, plain in b"),
        ("time_limit_factor", 1.57, 3, "the time limit differs: 1.57 in a, 3 in b"),
        ("enforced", True, False, "the enforcement of limits differs: True in a, False in b"),
        (
            "interpreter",
            {"device": "NVIDIA T4", "version": "3.9.1", "packages": {"torch": "1.13", "rich": "1"}},
            {"device": "NVIDIA A100", "version": "3.9.1", "packages": {"torch": "1.13", "rich": "2"}},
            "the submission's device differs: NVIDIA T4 in a, NVIDIA A100 in b",
        ),
        (
            "interpreter",
            {"device": "cpu", "packages": {"torch": "1.13"}},
            {"device": None, "packages": {"torch": "2.1"}},
            "the submission's version of torch differs: 1.13 in a, 2.1 in b",
        ),
    ],
)
def test_different_settings_give_a_warning(key: str, one: object, two: object, line: str) -> None:
    a = system("a", record("x", 1.0), run={key: one})
    b = system("b", record("x", 1.0), run={key: two})
    assert compare([a, b]).warnings == (line,)
    assert compare([a, replace(a, place="again")]).warnings == ()
    assert compare([a, system("old", record("x", 1.0))]).warnings == ()


@pytest.mark.parametrize(
    ("key", "true", "false", "line"),
    [
        (
            "lossy_estimates", True, False,
            "the estimates of a and b are in a lossy format; those of c and d are not",
        ),
        (
            "data", {"lossy": True}, {"lossy": False},
            "the true stems of a and b are in a lossy format; those of c and d are not",
        ),
    ],
)  # fmt: skip
def test_files_in_a_lossy_format_on_one_side_give_a_warning(
    key: str, true: object, false: object, line: str
) -> None:
    values = (true, true, false, false)
    systems = [
        system(name, record("x", 1.0), run={key: value}) for name, value in zip("abcd", values, strict=True)
    ]
    unknown = system("unknown", record("x", 1.0))
    assert compare([*systems, unknown]).warnings == (line,)
    assert compare([*systems[:2], unknown]).warnings == compare(systems[2:]).warnings == ()


def test_metrics_that_only_some_have_are_named_by_their_titles() -> None:
    a, b = (record("x", {"bass": 1.0}, metric) for metric in ("global_sdr", "museval_sdr"))
    both = replace(a, scores={**a.scores, **b.scores, "si_sdr": a.scores["global_sdr"]})
    (line,) = compare([system("one", a), system("all", both)]).warnings
    assert line == "the metrics differ: one has global SDR; all has global SDR, museval SDR and SI-SDR"


def test_a_setting_that_is_not_known_does_not_differ() -> None:
    stems = system("stems", record("x", 1.0), run={"device": "not known"})
    assert compare([stems, system("run", record("x", 1.0), run={"device": "cpu"})]).warnings == ()


def test_a_run_that_is_given_twice_is_reported() -> None:
    a = system("a", record("x", 1.0))
    assert compare([a, replace(a, name="a (2)")]).warnings == ("a and a (2) are the same run",)


def test_different_data_failed_songs_and_unfinished_runs_give_warnings() -> None:
    a = system("a", record("x", 1.0), record("y", 1.0), fingerprints={"x": "1", "y": "2"})
    b = System(
        "b", "b", "run", {each.song: each for each in (record("x", 1.0), record("y", 1.0))}, ("bad",), 5,
        {"x": "1", "y": "3"},
    )  # fmt: skip
    assert compare([a, b]).warnings == (
        "the data of 1 song differs, such as y: their scores cannot be compared",
        "b is unfinished: 3 of 5 songs",
        "1 song failed in b and is not included in any mean",
    )
    longer = system(
        "longer", SongRecord("x", "ok", duration=101.0, stems=STEMS, scores=record("x", 1.0).scores)
    )
    assert "such as x" in compare([a, longer]).warnings[0]


def test_runs_with_nothing_in_common_are_refused() -> None:
    a = of_values("a", [1.0])
    with pytest.raises(KmdxError, match="no two runs have a song in common: 1 in a, 1 in b"):
        compare([a, system("b", record("other", 1.0))])
    with pytest.raises(
        KmdxError, match=r"no two runs have a metric in common: a: global_sdr; b: museval_sdr"
    ):
        compare([a, of_values("b", [1.0], "museval_sdr")])
    with pytest.raises(KmdxError, match="no two runs have a stem in common"):
        compare([system("a", record("0", {"piano": 1.0})), system("b", record("0", {"guitar": 1.0}))])
    for samples in (0, 999, 100_001):
        with pytest.raises(KmdxError, match=f"--samples {samples}: expected 1000 to 100000"):
            compare([a, a], samples=samples)
    with pytest.raises(KmdxError, match="no two runs have the metric si_sdr; available: global_sdr"):
        compare([a, a], only=["si_sdr"])


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)

    return lambda *arguments: in_process.run(capsys, comparing.main, "compare", *arguments)


def write_run(folder: Path, values: dict[str, float]) -> Path:
    (folder / "songs").mkdir(parents=True)
    for name, value in values.items():
        content = json.dumps(record(name, value).to_json())
        (folder / "songs" / f"{name}.json").write_text(content, "utf-8")
    return folder


def test_the_command_shows_two_runs(command: Command, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a [x]", {"one": 1.0, "two": 2.0, "three": 7.0})
    b = write_run(tmp_path / "b", {"one": 2.0, "two": 3.25})
    code, out, err = command(a, b, "--json", "comparison.json")
    assert (code, err) == (0, "")
    assert "A: a [x], " in out
    assert "1 song of a [x] is not in all runs: three" in out
    (line,) = [line.split() for line in out.splitlines() if line.startswith("song")]
    assert line[:4] == ["song", "1.500", "2.625", "+1.125"]
    assert "+1.000 … +1.250" in out
    assert "too few songs: 2" in out
    written = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    assert written["differences"][0]["difference"] == pytest.approx(1.125)
    assert written["alone"] == {"a [x]": ["three"]}
    assert "a [x] and b" in (tmp_path / "compare.html").read_text("utf-8")


def test_the_command_shows_many_runs(command: Command, tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, {str(number): number + 2.0 * place for number in range(8)})
        for place, name in enumerate("pqr")
    ]
    code, out, _ = command(*runs, "published:kuielab", "--html", "page.html")
    assert code == 0
    assert "D kuielab" in out
    assert "A C, vocals" in out
    assert "C is better" in out
    assert "corrected for its number of pairs" in out
    assert not (tmp_path / "compare.html").exists()


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (["published:scnet"], ["A", "a", "1.500", "1.500"]),
        (["published:bs_roformer", "published:htdemucs_sparse"], ["B", "BS-RoFormer", "9.800"]),
    ],
)
def test_the_command_shows_a_run_next_to_published_results(
    others: list[str], line: list[str], command: Command, tmp_path: Path
) -> None:
    run = tmp_path / "a" / "songs"
    run.mkdir(parents=True)
    for name, value in (("one", 1.0), ("two", 2.0)):
        (run / f"{name}.json").write_text(json.dumps(record(name, value, "museval_sdr").to_json()))
    code, out, _ = command(run.parent, *others)
    assert code == 0
    assert line in [each.split()[: len(line)] for each in out.splitlines()]
    assert command(*others, "published:htdemucs")[0] == 0


@pytest.mark.parametrize("number", ["1" + 400 * "0", "1e999", "-Infinity", "NaN", "true", '"1"'])
def test_a_number_that_is_not_finite_is_not_a_score(tmp_path: Path, number: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(
        '{"songs": [{"schema": 2, "song": "a", "status": "ok", "stems": ["bass"], '
        f'"scores": {{"global_sdr": {{"bass": {number}}}}}}}]}}'
    )
    (tmp_path / "a.json").write_text(
        '{"targets": [{"name": "bass", "frames": '
        f'[{{"time": 0, "duration": 1, "metrics": {{"SDR": {number}}}}}]}}]}}'
    )
    for place, metric in ((run, "global_sdr"), (tmp_path, "museval_sdr")):
        if number in ("1e999", "-Infinity", "NaN"):
            assert load(place).songs["a"].scores == {metric: {"bass": None}}
        else:
            with pytest.raises(KmdxError, match="is damaged|is not a museval file"):
                load(place)


def test_mistakes_are_one_line_errors(command: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {"one": 1.0})
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((run,), "expected two or more runs"),
        ((run, "nowhere"), "nowhere does not exist"),
        ((run, tmp_path / "empty"), "contains neither a run nor museval"),
        ((run, "published:taak1"), "did you mean 'tak1'?"),
        ((run, run, "--html", "empty"), "cannot be written"),
    ):
        code, out, err = command(*arguments)
        assert (code, err.count("\n")) == (2, 1), arguments
        assert err.startswith("error: ")
        assert words in err, out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among its files")
@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_device_or_a_pipe_is_never_replaced_by_a_file(
    command: Command, tmp_path: Path, option: str
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    run = write_run(tmp_path / "a", {"one": 1.0})
    code, _, err = command(run, run, option, pipe)
    assert (code, err) == (2, f"error: {pipe} cannot be written: a device or a pipe, not a file\n")
    assert pipe.is_fifo()


def test_a_file_that_is_not_a_page_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {"one": 1.0})
    (tmp_path / "compare.html").write_text("mine")
    code, _, err = command(run, run)
    assert (code, (tmp_path / "compare.html").read_text()) == (2, "mine")
    assert "name another file with --html" in err
    (tmp_path / "compare.html").unlink()
    assert command(run, run)[0] == command(run, run)[0] == 0
