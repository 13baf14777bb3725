"""The report in a real browser."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_cases
from report_cases import NASTY, fake_results, fake_song, fifty, keep

from evaluator import report

browser = report_cases.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a report of fifty songs, the stems of one kept."""
    folder = tmp_path_factory.mktemp("evaluation")
    results = fifty()
    song = results["songs"][4]["song"] = "Kept & <played> #1"
    results["songs"][4] = fake_song(song, np.random.default_rng(2), duration=20.0)
    references = keep(folder / "run", folder / "data", song)
    report.write(results, folder / "run", folder / "run" / "predictions", {song: references})
    return folder / "run"


@pytest.fixture
def page(browser: Any, run: Path) -> Iterator[Any]:
    """The page of the run; it must not report errors or request anything from elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"{request.url}: {request.failure}"))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url)
    )
    page.goto((run / "report.html").as_uri())
    yield page
    page.close()
    assert not [line for line in wrong if "ERR_ABORTED" not in line]  # a player taken away stops its loading


def wait_for(page: Any, condition: str, seconds: float = 60) -> None:
    """Poll until the condition holds; playwright's own wait needs eval, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def column(page: Any, key: str) -> list[float]:
    """Values of a column from top to bottom, without missing ones."""
    cells = page.locator(f'#table td[data-column="{key}"]').all_inner_texts()
    return [float(text.replace("−", "-")) for text in cells if text != "–"]


def test_the_table_sorts_both_ways(page: Any) -> None:
    head = page.locator('#table th[data-key="vocals"]')
    before = column(page, "vocals")
    for direction in ("descending", "ascending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = column(page, "vocals")
        assert values == sorted(before, reverse=direction == "descending")
        assert len(values) == 48
        last = page.locator("#table tbody tr").last
        assert "failed" in (last.get_attribute("class") or "")  # whatever the direction
    page.locator("#measure").select_option("museval_sdr")
    shown = column(page, "vocals")
    assert shown == sorted(shown)
    assert shown != sorted(before)


def test_the_table_works_with_the_keyboard(page: Any) -> None:
    page.locator('#table th[data-key="name"] button').focus()
    page.keyboard.press("Enter")
    assert page.locator('#table th[data-key="name"]').get_attribute("aria-sort") == "ascending"
    page.locator("#table tbody a").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#panel").is_visible()
    page.keyboard.press("n")
    assert page.locator("#place").inner_text() == "2 of 50"
    page.keyboard.press("Escape")
    assert not page.locator("#panel").is_visible()
    wait_for(page, "document.activeElement.closest('tr')?.rowIndex === 2")  # the event follows

    dots = page.locator("#spread g.drums circle")
    assert dots.count() == 48
    page.locator('#spread g.drums circle[tabindex="0"]').focus()
    page.keyboard.press("End")
    assert "dB" in page.locator("#tip").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#panel").is_visible()


def test_a_song_is_drawn_and_its_players_find_their_files(page: Any, run: Path) -> None:
    page.get_by_role("link", name="Kept & <played> #1", exact=True).click()
    assert page.locator("#panel-title").inner_text() == "Kept & <played> #1"
    assert "#song=Kept%20%26%20%3Cplayed%3E%20%231" in page.url
    tracks = page.locator(".kp-track")
    assert tracks.count() == 8
    for wave in page.locator(".kp-wave canvas").all():
        box = wave.bounding_box()
        assert box is not None
        assert box["width"] > 300
        assert box["height"] > 10
    assert page.locator(".plot.frames path").count() == 4
    for which, number in (("audio", 8), (".plot.picture img", 4)):
        found = page.locator(which)
        assert found.count() == number
        for address in found.evaluate_all("all => all.map(one => new URL(one.src, document.baseURI).href)"):
            assert Path(page.evaluate("a => decodeURIComponent(new URL(a).pathname)", address)).is_file()
    wait_for(page, "document.querySelector('audio').readyState > 0")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(20, abs=0.01)
    page.locator(".plot.picture img").first.scroll_into_view_if_needed()
    wait_for(page, "document.querySelector('.plot.picture img').naturalWidth > 0")
    assert page.evaluate("document.querySelector('.plot.picture img').naturalWidth") > 500

    page.locator(".kp-wave").first.click(position={"x": 200, "y": 20})
    assert "dB" in page.locator(".now").first.inner_text()
    page.locator("#next").click()
    assert page.locator("audio").count() == 0


def test_estimates_and_references_are_played_in_step(page: Any) -> None:
    page.get_by_role("link", name="Kept & <played> #1", exact=True).click()
    wait_for(page, "[...document.querySelectorAll('audio')].every((one) => one.readyState > 0)")
    page.keyboard.press("Space")
    wait_for(page, "document.querySelector('audio').currentTime > 1")
    times = "[...document.querySelectorAll('audio')].map((one) => one.currentTime)"
    wait_for(page, f"(({times})) && Math.max(...{times}) - Math.min(...{times}) < 0.1")
    heard = "[...document.querySelectorAll('audio')].map((one) => !one.muted)"
    assert page.evaluate(heard) == 4 * [True] + 4 * [False]
    page.keyboard.press("o")
    assert page.evaluate(heard) == 4 * [False] + 4 * [True]
    page.get_by_role("button", name="Solo drums, estimate").click()
    assert page.evaluate(heard) == [False, True] + 6 * [False]
    page.keyboard.press("o")
    assert page.evaluate(heard) == 5 * [False] + [True, False, False]  # the same stem
    page.keyboard.press("Escape")
    assert page.locator("audio").count() == 0


def test_a_link_opens_its_song(browser: Any, page: Any, run: Path) -> None:
    link = page.locator("#table tbody tr").nth(3).locator("a").get_attribute("href")
    other = browser.new_page()
    other.goto((run / "report.html").as_uri() + link)
    assert other.locator("#panel-title").inner_text() == NASTY
    assert other.title() != "owned"
    other.locator("#close").click()
    assert "#" not in other.url
    other.close()


def test_a_failed_song_shows_its_reason(page: Any) -> None:
    page.locator("tr.failed a").nth(1).click()
    assert "<shape> & </td> of bass" in page.locator("#content").inner_text()
    assert page.locator(".plot").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_overflows_the_window(page: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for name in ("page", "song"):
        if name == "song":
            page.get_by_role("link", name="Kept & <played> #1", exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
        path = tmp_path / f"{name}-{width}-{scheme}.png"
        page.screenshot(path=path, full_page=name == "page")
        assert shades(path) > 20


def test_each_table_that_scrolls_has_a_hint_until_its_end(page: Any) -> None:
    tables = page.locator(".scroll:has(> table)")
    hints = page.locator(".scroll:has(> table) + .more")
    page.locator("details > summary").first.click()
    assert tables.count() == hints.count() > 2
    page.set_viewport_size({"width": 390, "height": 844})
    for number in range(tables.count()):
        scroller, hint = tables.nth(number), hints.nth(number)
        wide = scroller.evaluate("it => it.scrollWidth > it.clientWidth + 8")
        hint.wait_for(state="visible" if wide else "hidden")
        scroller.evaluate("it => it.scrollTo(it.scrollWidth, 0)")
        hint.wait_for(state="hidden")
    assert page.evaluate("document.querySelector('#table').offsetWidth > 390")
    page.set_viewport_size({"width": 1280, "height": 844})
    page.locator(".scroll:has(#table) + .more").wait_for(state="hidden")


def shades(path: Path) -> int:
    """Number of different bytes in a PNG's filtered rows: of a blank picture there are few."""
    png, start, packed = path.read_bytes(), 8, b""
    while start < len(png):
        (length,) = struct.unpack(">I", png[start : start + 4])
        packed += png[start + 8 : start + 8 + length] if png[start + 4 : start + 8] == b"IDAT" else b""
        start += 12 + length
    return len(set(zlib.decompress(packed)))


def test_stems_whose_names_have_spaces_are_shown(browser: Any, tmp_path: Path) -> None:
    song = json.dumps(fake_results([fake_song("One", np.random.default_rng(0), 20)]))
    report.write(json.loads(song.replace('"vocals"', '"lead vocals + fx"')), tmp_path)
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    wait_for(page, "document.querySelectorAll('#spread svg').length > 0")
    page.locator("#table tbody a").first.click()
    assert page.locator("#panel-title").inner_text() == "One"
    page.locator("#measure").select_option(index=1)
    assert errors == []
    page.close()
