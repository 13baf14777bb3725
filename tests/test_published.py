"""Published results: the data, and which of them a report shows next to a run."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import Text, fake_results, fake_song
from sisec2018 import VOCALS

from evaluator import published, report
from evaluator.metrics import METRICS
from evaluator.published_section import published_next_to


def results_of(names: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return fake_results([fake_song(name, rng, duration=5.0) for name in names])


def text_of(results: dict[str, Any]) -> str:
    return Text(report.page(results)).text.replace("\N{FIGURE SPACE}", "")


def test_the_test_set_matches_sisec() -> None:
    table, row = published.find("tak1")
    assert row.scores == {"vocals": 6.6, "drums": 6.431, "bass": 5.156, "other": 4.152}
    assert table.shared(VOCALS) == len(table.songs) == 50
    assert table.shared([name.upper() for name in VOCALS]) == 50


@pytest.mark.parametrize(
    "row", [row for table in published.tables() for row in table.rows], ids=lambda row: row.id
)
def test_every_row_has_its_source_and_a_likely_average(row: published.Row) -> None:
    assert re.search(r"\b20\d\d\b.*(arXiv \d{4}\.\d{4,5}|JOSS \d{5})", row.source)
    assert row.tested
    if row.scores:
        assert row.average == pytest.approx(statistics.fmean(row.scores.values()), abs=0.01)


def test_names_in_the_readme_are_known_in_any_case() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    names = re.findall(r"published:(\w+)", readme)
    assert names
    for name in names:
        assert published.find(name.upper()) == published.find(name)


def test_every_table_is_of_a_metric_and_every_row_has_a_name_of_its_own() -> None:
    identifiers = [row.id for table in published.tables() for row in table.rows]
    assert len(identifiers) == len(set(identifiers))
    for table in published.tables():
        assert table.metric in METRICS
        assert METRICS[table.metric].over_songs == table.statistic


def test_a_run_on_the_same_songs_is_shown_next_to_the_published_ones() -> None:
    text = text_of(results_of(list(VOCALS)))
    assert "This run used the same songs." in text
    assert "This run, on the same songs leaderboard_c 50 of 50 songs" in text
    assert text.index("MUSDB18's test set") < text.index("Hidden set: leaderboard C")
    for words in (
        "TAK1 (MMDenseLSTM) trained with MUSDB18 5.585",
        "HT Demucs",
        "SCNet-large",
        "BS-RoFormer",
        "arXiv 2309.02612",
    ):
        assert words in text


def test_the_average_of_a_run_is_the_mean_of_its_stem_medians() -> None:
    results = results_of(list(VOCALS))
    (same, hidden) = published_next_to(results["summary"], results["run"], list(VOCALS))
    medians = results["summary"]["scores"]["museval_sdr"]["median"]
    stems = ("bass", "drums", "other", "vocals")
    assert same.own == pytest.approx(
        [statistics.fmean(medians[stem] for stem in stems), *(medians[stem] for stem in stems)]
    )
    assert hidden.own[0] == pytest.approx(results["summary"]["scores"]["global_sdr"]["mean"]["song"])


def test_a_run_on_some_of_the_songs_is_marked() -> None:
    text = text_of(results_of([*list(VOCALS)[:3], "mine"]))
    assert "This run used 3 of these 50 songs and 1 other song, so compare the results with caution." in text


def test_a_run_on_other_songs_is_not_compared() -> None:
    text = text_of(results_of(["mine"]))
    assert "on the same songs" not in text
    assert text.count("so the results cannot be compared directly.") == 2
    assert "1 of 1 song" in text
    assert "1 of 1 songs" not in text


def test_a_single_stem_is_shown_without_an_average() -> None:
    results = results_of(list(VOCALS))
    results["run"]["stems"] = ["vocals"]
    (same, _) = published_next_to(results["summary"], results["run"], list(VOCALS))
    assert same.columns == ("vocals",)
    assert "BS-RoFormer" not in [row.name for row in same.rows]
    assert [name for names in same.sources.values() for name in names] == [row.name for row in same.rows]
    assert "Lu, Wang, Kong" not in text_of(results)
    results["run"]["stems"] = ["piano"]
    assert published_next_to(results["summary"], results["run"], list(VOCALS)) == []


def test_published_names_are_case_insensitive() -> None:
    assert published.find("TAK1") == published.find("tak1")
