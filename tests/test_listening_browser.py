"""Listening pages in a real browser: what is heard, and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_cases
import soundfile
from conftest import noise
from test_report_browser import shades, wait_for

from kmdx import listening

browser = report_cases.browser

RATE = 44100
SECONDS = 14.0  # two segments and a part of the third
ODD = "<b>\"odd\" & 'loud' 歌"
RENDER = """async ([side, position, seconds, loop]) => {
  // Play into an offline context, whose clock stands still, and return its left channel.
  const context = new OfflineAudioContext(2, 44100 * seconds, 44100);
  context.resume = async () => {};
  window.AudioContext = function () { return context; };
  player.choose(side);
  player.transport.currentTime = position;
  if (loop) player.setLoop(...loop);
  await player.transport.play();
  clearInterval(player.transport.output.run.timer);
  return [...(await context.startRendering()).getChannelData(0)];
}"""
LEAD = 0.06  # seconds of silence before the sound


def heard(
    page: Any, side: str, position: float, seconds: float, loop: list[float] | None = None
) -> np.ndarray:
    """What a listener hears from a position on, as samples of the left channel."""
    page.reload()
    samples = np.array(page.evaluate(RENDER, [side, position, LEAD + seconds, loop]))
    assert not samples[: round(LEAD * RATE) - 1].any()
    return samples[round(LEAD * RATE) :]


def loss(truth: np.ndarray, found: np.ndarray) -> float:
    """The energy of the difference over that of the truth."""
    return float(np.square(truth - found).sum() / np.square(truth).sum())


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three stems, their sum, and its page."""
    folder = tmp_path_factory.mktemp("pages") / "a song #1"
    folder.mkdir()
    mixture = np.zeros((round(SECONDS * RATE), 2), np.float32)
    for number, name in enumerate(("vocals", "drums", ODD)):
        samples = _smooth(noise(len(mixture), seed=number, level=0.4))
        mixture += samples
        soundfile.write(folder / f"{name}.wav", samples, RATE)
    soundfile.write(folder / "mixture.wav", mixture, RATE)
    listening.make(folder)
    return folder


def _smooth(samples: np.ndarray) -> np.ndarray:
    """Noise below about 4 kHz, which an mp3 keeps well."""
    total = np.cumsum(np.pad(samples, ((6, 6), (0, 0))), axis=0)
    return (total[12:] - total[:-12]) / 6


@pytest.fixture
def page(browser: Any, song: Path) -> Iterator[Any]:
    """The song's page; it must not report errors or request anything else."""
    yield from opened(browser, song / listening.PAGE)


def opened(browser: Any, path: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url)
    )
    page.goto(path.as_uri())
    yield page
    page.close()
    assert wrong == []


def gains(page: Any) -> list[float]:
    """The gain of each track, as the audio graph has it after its short fades."""
    page.wait_for_timeout(200)
    return [round(gain, 2) for gain in page.evaluate("player.tracks.map((track) => track.node.gain.value)")]


def test_stems_and_original_play_in_step_to_the_sample_across_segments(page: Any, song: Path) -> None:
    mixture = soundfile.read(song / "mixture.wav")[0][:, 0]
    begin, length = round(4.5 * RATE), round(2.5 * RATE)
    for side in ("a", "b"):
        found = heard(page, side, 4.5, 2.5)[1000:length]  # 4.5 to 7 s: segments meet at 6 s
        lossy = loss(mixture[begin + 1000 : begin + length], found)
        assert lossy < 0.05  # of mp3
        assert loss(mixture[begin + 1002 : begin + length + 2], found) > 2 * lossy  # two samples are noticed
        joint = slice(round(1.49 * RATE) - 1000, round(1.52 * RATE) - 1000)
        there = mixture[begin + 1000 :][joint]
        assert loss(there, found[joint]) < 0.1


def test_a_loop_repeats_its_part_to_the_sample(page: Any, song: Path) -> None:
    mixture = soundfile.read(song / "mixture.wav")[0][:, 0]
    begin, period = round(5.8 * RATE), round(0.8 * RATE)
    found = heard(page, "b", 0.0, 2.0, [5.8, 6.6])
    for turn in (0, 1):
        part = found[turn * period + 1000 : (turn + 1) * period - 1000]
        assert loss(mixture[begin + 1000 : begin + period - 1000], part) < 0.05


def test_space_plays_and_the_position_moves(page: Any) -> None:
    page.keyboard.press("Space")
    wait_for(page, "player.transport.currentTime > 0.5")
    assert page.get_by_role("button", name="Pause").count() == 1
    page.keyboard.press("Space")
    at = page.evaluate("player.transport.currentTime")
    page.wait_for_timeout(300)
    assert page.evaluate("player.transport.currentTime") == at
    page.keyboard.press("ArrowRight")
    assert page.evaluate("player.transport.currentTime") == pytest.approx(at + 5)
    assert page.locator(".kp-time").inner_text().endswith("/ 0:14.0")
    page.locator(".kp-wave").first.click(position={"x": 5, "y": 20})
    assert page.evaluate("player.transport.currentTime") < 1
    page.evaluate("player.transport.currentTime = 13.8")
    page.keyboard.press("Space")
    wait_for(page, "player.transport.ended")
    assert page.get_by_role("button", name="Play").count() == 1


def test_tracks_are_muted_soloed_and_compared(page: Any) -> None:
    page.keyboard.press("Space")
    wait_for(page, "player.transport.currentTime > 0.2")
    assert gains(page) == [1, 1, 1, 0]
    page.get_by_role("button", name="Mute vocals").click()
    assert gains(page) == [0, 1, 1, 0]
    page.keyboard.press("Shift+Digit1")
    page.keyboard.press("2")
    assert gains(page) == [0, 1, 0, 0]
    assert page.get_by_role("button", name="Solo drums").get_attribute("aria-pressed") == "true"
    page.keyboard.press("o")
    assert gains(page) == [0, 0, 0, 1]
    page.get_by_role("button", name="Listen to: Stems").click()
    page.keyboard.press("2")
    page.get_by_role("slider", name="Level of vocals").fill("50")
    assert gains(page) == [0.5, 1, 1, 0]
    row = page.get_by_role("group", name=ODD, exact=True)
    assert row.get_by_role("heading").inner_text() == ODD


def test_a_loop_is_dragged_typed_and_cleared(page: Any) -> None:
    box = page.locator(".kp-overview").bounding_box()
    assert box is not None
    middle = box["y"] + 15
    page.mouse.move(box["x"] + 0.25 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], middle, steps=5)
    page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=5)
    page.mouse.up()
    loop = page.evaluate("player.transport.loop")
    assert loop["start"] == pytest.approx(0.25 * SECONDS, abs=0.3)
    assert loop["end"] == pytest.approx(0.5 * SECONDS, abs=0.3)
    page.get_by_label("Loop end").fill("0:05,5")
    page.get_by_label("Loop end").press("Enter")
    assert page.evaluate("player.transport.loop.end") == 5.5
    page.get_by_label("Loop start").fill("nonsense")
    page.get_by_label("Loop start").press("Enter")
    assert page.get_by_label("Loop start").input_value() != "nonsense"
    page.locator("h1").click()
    page.keyboard.press("l")
    assert page.evaluate("player.transport.loop") is None
    page.evaluate("player.transport.currentTime = 7")
    page.keyboard.press("[")
    assert page.evaluate("player.transport.loop") == {"start": 7, "end": SECONDS}


def test_brackets_work_on_keyboards_that_have_them_on_digits(page: Any) -> None:
    press = """(modifiers) => document.body.dispatchEvent(
        new KeyboardEvent("keydown", { key: "[", code: "Digit8", bubbles: true, ...modifiers }))"""
    page.evaluate("player.transport.currentTime = 7")
    for modifiers in ({"ctrlKey": True}, {"metaKey": True, "altKey": True}):
        page.evaluate(press, modifiers)
        assert page.evaluate("player.transport.loop") is None, "a shortcut of the browser"
    for modifiers in ({}, {"altKey": True}, {"ctrlKey": True, "altKey": True}):
        page.evaluate(press, modifiers)
        assert page.evaluate("player.transport.loop") == {"start": 7, "end": SECONDS}
        page.evaluate("player.transport.setLoop(null)")


def test_the_moving_time_is_not_announced(page: Any) -> None:
    assert page.get_by_role("timer").count() == 1
    assert page.locator("output").count() == 0  # browsers announce each change of one


def test_every_control_is_reached_with_the_keyboard_and_has_a_name(page: Any) -> None:
    names = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent")
        names.add(name)
    assert {
        "Play",
        "Loop",
        "Loop start",
        "Position",
        "Mute drums",
        "Solo drums",
        "Level of drums",
        "Keys",
    } <= names
    unnamed = "[...document.querySelectorAll('button, input')].filter((one) => !one.ariaLabel).length"
    assert page.evaluate(unnamed) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_the_page_fits_the_window(page: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("summary").click()
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert shades(tmp_path / "page.png") > 20
    canvas = page.locator(".kp-wave canvas").first.bounding_box()
    assert canvas is not None
    assert canvas["width"] > 200


def test_damaged_sound_is_reported_on_the_page(browser: Any, song: Path, tmp_path: Path) -> None:
    text = (song / listening.PAGE).read_text("utf-8")
    begin = text.index(">", text.index('id="track0-0"')) + 1
    (tmp_path / "page.html").write_text(
        f"{text[:begin]}AAAA{text[text.index('</script>', begin) :]}", "utf-8"
    )
    for page in opened(browser, tmp_path / "page.html"):
        page.keyboard.press("Space")
        status = page.get_by_role("status")
        status.filter(has_text="cannot be played").wait_for()
        assert page.evaluate("player.transport.paused")


def test_an_index_leads_to_the_pages(browser: Any, song: Path) -> None:
    other = song.parent / "another"
    other.mkdir(exist_ok=True)
    soundfile.write(other / "vocals.wav", noise(RATE, channels=1), RATE)
    listening.make(other)
    index = listening.write_index(song.parent)
    assert index is not None
    for page in opened(browser, index):
        assert page.locator(".songs a").all_inner_texts() == ["a song #1", "another"]
        page.get_by_role("link", name="a song #1").click()
        assert page.locator("h1").inner_text() == "a song #1"
        assert page.locator(".kp-track").count() == 4
        page.go_back()
        page.get_by_role("link", name="another").click()
        assert page.locator(".kp-sides").count() == 0  # nothing to compare with
