"""The report: what its page contains."""

from __future__ import annotations

import copy
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_cases import NASTY, Text, failed_song, fake_results, fake_song, fifty, keep

from evaluator import report


def test_the_page_shows_what_was_measured() -> None:
    results = fifty()
    text = Text(report.page(results)).text
    for phrase in (
        "global SDR, mean over songs",
        "museval SDR, median over 1 s frames, median over songs",
        "9 November 2026, 14:03 UTC",
        "cuda:0 (Tesla T4)",
        "so the results cannot be compared directly.",
        "SAMI-ByteDance",
        "10.056",
        "a1" * 32,
        "unknown content",
        "b12997a0c0de",
        "measured, not enforced",
        *results["warnings"],
    ):
        assert phrase in text
    assert f"{results['summary']['scores']['global_sdr']['mean']['song']:.3f}" in text
    for song in results["songs"]:
        assert " ".join(song["song"].split()) in text


def test_the_published_rows_match_the_challenge() -> None:
    text = Text(report.page(fake_results([]))).text
    for row in (
        "SAMI-ByteDance 9.97 11.15 10.27 7.08 11.36",
        "9.181 10.056 9.465 6.804 10.398",
        "kuielab 8.971 9.716 9.433 6.721 10.012",
        "alina_porechina 8.63 9.92 9.29 6.23 9.07",
    ):
        assert row in text.replace("\N{FIGURE SPACE}", " ").replace("  ", " ")


def test_a_single_stem_has_no_mean_of_stems_and_repeated_facts_are_named_once() -> None:
    song = fake_song("One", np.random.default_rng(0))
    song["global_sdr"] = {"vocals": 5.0}
    results = fake_results([song])
    for part in (results["run"], *results["songs"]):
        part["stems"] = ["vocals"]
    results["run"] |= dict.fromkeys(("device", "precision", "engine"), "as the submission chooses")
    seen = Text(report.page(results))
    assert json.loads(seen.data)["columns"] == ["vocals"]
    assert "Song vocals Length" in seen.text
    assert "mean of a song’s stems" not in seen.text
    assert "as the submission chooses, " not in seen.text


def test_names_are_escaped_in_markup_and_in_data() -> None:
    page = report.page(fifty())
    seen = Text(page)
    assert seen.scripts == 2  # the data and ours; none came in with a name
    assert "<b>R&D" not in page
    assert html.escape(NASTY) in page.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")
    assert json.loads(seen.data)["songs"][3]["name"] == NASTY
    assert "<shape> & </td>" in seen.text


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    page = report.page(fifty())
    assert len(page.encode()) < 3_000_000
    addresses = re.findall(r"""https?://[^\s"'<>)]+""", page)
    name_spaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}  # not places
    assert set(addresses) <= name_spaces


def test_missing_numbers_are_shown_as_missing() -> None:
    results = fifty()
    results["songs"][0]["frames"]["museval_sdr"]["bass"][:3] = [float("nan"), float("inf"), None]
    results["summary"]["peak_memory"] = None
    seen = Text(report.page(results))
    songs = json.loads(seen.data)["songs"]
    assert songs[0]["frames"]["museval_sdr"]["bass"][:3] == [None] * 3
    assert songs[11]["scores"]["museval_sdr"]["song"] is None
    assert songs[13]["scores"]["global_sdr"]["song"] is None
    assert "NaN" not in seen.data
    assert "None" not in seen.text.replace("None of", "")


@pytest.mark.parametrize("number", [0, 1])
def test_a_page_without_scored_songs_reports_that(number: int) -> None:
    rng = np.random.default_rng(0)
    results = fake_results([fake_song("Only", rng)][:number] + [failed_song("Bad", "it raised")][number:])
    text = Text(report.page(results)).text
    assert ("No song was scored" in text) == (number == 0)
    empty = fake_results([])
    empty["run"] |= {
        "isolation": ["it could reach the network"],
        "load_seconds": None,
        "git_commit": None,
        "plan_sha256": None,
        "weights": [],
    }
    assert "No songs yet." in Text(report.page(empty)).text


def test_a_page_of_existing_stems_has_nothing_about_a_submission() -> None:
    rng = np.random.default_rng(0)
    timeless = dict.fromkeys(("seconds", "real_time_factor", "peak_memory"))
    results = fake_results([fake_song("one", rng) | timeless, failed_song("two", "no stem of this song")])
    about_submission = (
        "Real-time", "Memory, GB", "Loading the model", "Git commit", "Plan, sha256", "Isolation", "Limits",
        "Device, precision and engine", "host memory",
    )  # fmt: skip
    text = Text(report.page(results)).text
    assert all(words in text for words in about_submission)
    unknown = dict.fromkeys(
        ("submission", "plan_sha256", "git_commit", "time_limit_factor", "memory_limit", "enforced")
    )
    unknown |= dict.fromkeys(("device", "precision", "engine"), "not known")
    results["run"] |= {**unknown, "estimates": "stems/umx", "load_seconds": None, "weights": []}
    page = report.page(results)
    text = Text(page).text
    assert "stems/umx" in text
    assert not [words for words in (*about_submission, "not known", "submission") if words in text]
    body = page[page.index('<table id="table">') :]
    columns = body[: body.index("</thead>")].count("<th ")
    row = body[body.index("<tr data-index") :]
    assert row[: row.index("</tr>")].count("<td ") == columns - 1 == 6


def test_writing_a_page_leaves_the_results_unchanged() -> None:
    results = fifty()
    before = copy.deepcopy(results)
    report.page(results)
    assert results == before


@pytest.mark.parametrize(
    ("count", "limit", "shown"),
    [(6.5e9, 16 * 10**9, "6.50 of 16 GB"), (8 * 2**30, 16 * 2**30, "8.00 of 16 GiB")],
)
def test_memory_is_shown_in_the_unit_of_the_limit(count: float, limit: int, shown: str) -> None:
    results = fake_results([])
    results["run"]["memory_limit"] = limit
    results["summary"]["peak_memory"] = int(count)
    assert f"{shown} allowed" in Text(report.page(results)).text


def test_kept_stems_get_players_and_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    run, data = tmp_path / "run", tmp_path / "data #1"
    song = "A & B 100% #1?"
    results = fake_results([fake_song(name, rng, 20) for name in (song, "not kept", "../escape")])
    references = keep(run, data, song)
    keep(run, data, "../escape", 0.1)
    references["vocals"].unlink()
    (run / "predictions" / song / "drums.wav").write_bytes(b"damaged")
    path = report.write(results, run, run / "predictions", {song: references, "../escape": references})
    assert path == run / "report.html"
    assert not list(run.glob(".*"))

    kept, dropped, escape = json.loads(Text(path.read_text()).data)["songs"]
    assert not dropped["media"]
    assert not escape["media"]
    quoted = "A%20%26%20B%20100%25%20%231%3F"
    assert kept["media"]["bass"] == {
        "picture": f"media/{quoted}/bass.png",
        "estimate": f"predictions/{quoted}/bass.wav",
        "reference": f"../data%20%231/{quoted}/bass.wav",
    }
    assert kept["media"]["drums"]["picture"] is None
    assert kept["media"]["vocals"] == {
        **dict.fromkeys(("picture", "reference")),
        "estimate": f"predictions/{quoted}/vocals.wav",
    }

    picture = run / "media" / song / "bass.png"
    drawn = picture.stat().st_mtime_ns
    report.write(results, run, run / "predictions", {song: references})
    assert picture.stat().st_mtime_ns == drawn  # not drawn again


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    rng = np.random.default_rng(0)
    html = report.page(fake_results([fake_song("one", rng, duration=5.0)]))
    assert "<h3>museval SDR, median over 1\u00a0s frames, median over songs</h3>" in html
