"""The page of a comparison: its content, and its behavior in a real browser."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_cases
from report_cases import Text
from sisec2018 import VOCALS
from test_compare import of_values, record, sisec, system

from evaluator import comparison_page, published
from evaluator.comparison import Comparison, compare, p_text
from evaluator.systems import System

browser = report_cases.browser

NASTY = "<b>R&D</b> \"quoted\" </script><script>document.title='owned'</script> #1 100%"


def three() -> Comparison:
    """SiSEC's two methods and a published one, in two metrics."""
    first, second = (
        system(
            each.name,
            *(
                record(name, {"vocals": song.scores["museval_sdr"]["vocals"], "bass": 2.0}, "museval_sdr")
                for name, song in each.songs.items()
            ),
        )
        for each in sisec()
    )
    table, row = published.find("umx")
    known = System(row.name, "published:umx", "published", row=row, table=table)
    return compare([first, second, known])


def test_the_page_shows_the_results() -> None:
    text = Text(comparison_page.page(compare(sisec()))).text
    for words in (
        "TAK1 and UHL2",
        "UHL2 against TAK1",
        "TAK1 is better",
        "12 better, 37 worse",
        "6.699",
        "Wilcoxon",
    ):
        assert words in text
    assert "Holm" not in text
    assert "None" not in text


def test_a_single_stem_has_no_column_for_the_average() -> None:
    text = Text(comparison_page.page(compare(sisec()))).text
    assert "System vocals TAK1" in text
    assert "“Average”" not in text


def test_names_are_escaped_in_markup_and_in_data() -> None:
    page = comparison_page.page(compare([system(NASTY, record(NASTY, 1.0)), system("b", record(NASTY, 2.0))]))
    seen = Text(page)
    assert seen.scripts == 2  # the data and ours; none came in with a name
    assert "<b>R&D" not in page
    assert json.loads(seen.data)["songs"] == [NASTY]


def test_the_page_is_small_and_refers_to_no_host() -> None:
    page = comparison_page.page(three())
    assert len(page.encode()) < 200_000
    assert set(re.findall(r"""https?://[^\s"'<>)]+""", page)) <= {"http://www.w3.org/2000/svg"}


def test_published_results_alone_make_a_page() -> None:
    systems = [
        System(row.name, row.id, "published", row=row, table=table)
        for table, row in map(published.find, ("umx", "bs_roformer"))
    ]
    text = Text(comparison_page.page(compare(systems))).text
    assert "BS-RoFormer" in text
    assert "Song by song" not in text


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page of three systems; it must not report errors or request anything from elsewhere."""
    path = comparison_page.write(three(), tmp_path / "compare.html")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and wrong.append(request.url))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert not wrong


def names(page: Any) -> list[str]:
    return [row.split("\n")[0] for row in page.locator("#table tbody th").all_inner_texts()]


def test_clicking_a_column_header_sorts_by_it(page: Any) -> None:
    page.get_by_role("button", name="vocals").click()
    assert names(page) == ["TAK1", "Open-Unmix umx", "UHL2"]
    page.get_by_role("button", name="vocals").press("Enter")
    assert names(page) == ["UHL2", "Open-Unmix umx", "TAK1"]
    assert page.locator('th[data-key="vocals"]').get_attribute("aria-sort") == "ascending"


def test_the_stem_and_the_statistic_can_be_selected(page: Any) -> None:
    page.locator("#stem").select_option("vocals")
    assert "12 better, 37 worse" in page.locator("#pairs").inner_text()
    assert "vocals" in page.locator("#plot-lead").inner_text()
    page.locator("#statistic").select_option("mean")
    mean = f"{statistics.fmean(tak1 for tak1, _ in VOCALS.values()):.3f}"
    assert page.locator('#table td[data-column="vocals"]').first.inner_text() == mean


def test_song_names_appear_with_keyboard_and_mouse(page: Any) -> None:
    page.locator("#stem").select_option("vocals")
    dots = page.locator("#spread circle")
    assert dots.count() == len(VOCALS)
    page.locator('#spread circle[tabindex="0"]').focus()
    page.keyboard.press("Home")
    steps = sorted((uhl2 - tak1, song) for song, (tak1, uhl2) in VOCALS.items())
    assert steps[0][1] in page.locator("#tip").inner_text()
    page.keyboard.press("ArrowRight")
    assert steps[1][1] in page.locator("#tip").inner_text()
    dots.last.hover()
    assert steps[-1][1] in page.locator("#tip").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_table_that_scrolls_shows_a_hint(browser: Any, tmp_path: Path) -> None:
    stems = dict.fromkeys(("bass", "drums", "guitar", "other", "piano", "vocals"), 1.0)
    path = comparison_page.write(
        compare([system("a", record("x", stems)), system("b", record("x", stems))]), tmp_path / "page.html"
    )
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(path.as_uri())
    hint = page.locator(".scroll:has(#table) + .more")
    assert hint.is_visible()
    page.set_viewport_size({"width": 1280, "height": 844})
    hint.wait_for(state="hidden")
    page.close()


def test_many_songs_are_drawn(browser: Any, tmp_path: Path) -> None:
    found = compare([of_values("a", range(300)), of_values("b", [value + 0.1 for value in range(300)])])
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(comparison_page.write(found, tmp_path / "page.html").as_uri())
    assert page.locator("#spread circle").count() == 300
    page.close()


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (None, "–"),
        (1e-7, "< 0.0001"),
        (9.99e-5, "< 0.0001"),
        (0.0001, "0.0001"),
        (0.0316, "0.032"),
        (1.0, "1"),
    ],
)
def test_a_p_value_has_two_digits(p: float | None, text: str) -> None:
    assert p_text(p) == text
