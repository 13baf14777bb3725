"""The web app's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_cases
import soundfile
import web_cases
from test_report_browser import shades, wait_for
from web_cases import Site, serving, sound

pytestmark = pytest.mark.slow

models, browser = web_cases.models, report_cases.browser
ODD = '<img src=x onerror=alert(1)> "R&D" 歌'
TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def site(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("jobs")) as made:
        yield made


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    """The page; it must not report errors or request anything from elsewhere."""
    yield from opened(browser, site.url, site.url)


def opened(browser: Any, base: str, address: str, *expected: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    wrong: list[str] = []

    def follow(page: Any) -> None:
        page.on(
            "console", lambda message: message.type in ("error", "warning") and wrong.append(message.text)
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith((base, "data:", "blob:")) or wrong.append(request.url),
        )

    context.on("page", follow)
    page = context.new_page()
    page.goto(address)
    page.wait_for_load_state("networkidle")
    yield page
    context.close()
    assert [line for line in wrong if not any(text in line for text in expected)] == []


def drop(page: Any, path: Path, name: str) -> None:
    """Drop a file on the page."""
    page.evaluate(
        """([name, data]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(data)], name));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [name, [*path.read_bytes()]],
    )


def test_a_song_is_dropped_separated_muted_soloed_and_downloaded(page: Any, tmp_path: Path) -> None:
    (tmp_path / "song.flac").write_bytes(sound(3, format="FLAC"))
    page.locator("input[value=small]").check()
    page.get_by_role("checkbox", name="other").uncheck()
    drop(page, tmp_path / "song.flac", f"{ODD}.flac")
    assert page.locator("#chosen").inner_text() == f"{ODD}.flac"
    page.get_by_role("button", name="Separate").click()
    row = page.locator(".job").first
    row.get_by_text("Done.").wait_for()
    assert row.get_by_role("heading").inner_text() == ODD
    assert row.get_by_role("link").all_inner_texts() == ["Listen", "bass", "drums", "vocals", "All (zip)"]

    with page.expect_popup() as popup:
        row.get_by_role("link", name="Listen").click()
    player = popup.value
    player.get_by_role("button", name="Mute drums").click()
    assert (
        player.get_by_role("group", name="drums", exact=True).get_attribute("class") == "kp-track kp-silent"
    )
    player.get_by_role("button", name="Solo vocals").click()
    assert player.locator(".kp-silent").count() == 3
    player.get_by_role("button", name="Play").click()
    player.get_by_role("button", name="Pause").wait_for()
    wait_for(player, "player.transport.currentTime > 0.3")
    player.close()

    for link, check in (
        ("vocals", lambda path: soundfile.info(path).frames == 3 * 44100),
        ("All (zip)", None),
    ):
        with page.expect_download() as download:
            row.get_by_role("link", name=f"Download {'all stems' if check is None else link}").click()
        path = tmp_path / "downloaded"
        download.value.save_as(path)
        assert check(str(path)) if check else path.read_bytes()[:2] == b"PK"
        assert "/" not in download.value.suggested_filename
    page.get_by_role("button", name="Delete").click()
    row.wait_for(state="detached")


def test_mistakes_are_explained_on_the_page(browser: Any, site: Site, tmp_path: Path) -> None:
    for page in opened(browser, site.url, site.url, "422"):
        _make_mistakes(page, tmp_path)


def _make_mistakes(page: Any, tmp_path: Path) -> None:
    before = page.locator(".job").count()
    page.get_by_role("button", name="Separate").click()
    assert page.get_by_role("alert").inner_text() == "Choose a song first."
    (tmp_path / "text").write_text("not music")
    drop(page, tmp_path / "text", "notes.mp3")
    page.locator("input[value=small]").check()
    page.get_by_role("button", name="Separate").click()
    page.get_by_text("notes.mp3: Notes: ").wait_for()
    assert page.locator(".job").count() == before


def test_everything_is_reached_with_the_keyboard(page: Any) -> None:
    page.get_by_role("button", name="Separate").wait_for()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.textContent"
            )
        )
    assert [name for name in dict.fromkeys(seen) if name][:5] == ["songs", "ensemble", "stem", "format", "go"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_the_page_fits_the_window(page: Any, site: Site, tmp_path: Path, width: int, scheme: str) -> None:
    if not site.queue.all():
        ids = [site.submit(sound(2), f"{name}.wav").json()["id"] for name in ("W" * 150, "short")]
        assert [site.finished(id)["state"] for id in ids] == ["done", "done"]
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    page.reload()
    page.get_by_text("Done.").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert shades(tmp_path / "page.png") > 20


def test_the_token_in_the_address_opens_the_page_and_is_taken_out_of_it(
    browser: Any, models: Path, tmp_path: Path
) -> None:
    with serving(tmp_path / "jobs", token=TOKEN) as site:
        for page in opened(browser, site.url, f"{site.url}/#token={TOKEN}"):
            page.get_by_role("button", name="Separate").wait_for()
            assert page.url == f"{site.url}/"
            page.reload()
            page.get_by_role("button", name="Separate").wait_for()
        for page in opened(browser, site.url, site.url, "401"):
            page.get_by_label("Token").fill("a wrong token of some length")
            page.get_by_role("button", name="Continue").click()
            page.get_by_text("This is not the server's token.").wait_for()
            page.get_by_label("Token").fill(TOKEN)
            page.get_by_label("Token").press("Enter")
            page.get_by_role("button", name="Separate").wait_for()


def test_the_documentation_of_the_interface_is_shown_without_a_network(browser: Any, site: Site) -> None:
    for page in opened(browser, site.url, f"{site.url}/docs"):
        page.get_by_text("Submit a song").wait_for()
