"""The report: what its page says, and how it behaves in a real browser."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from conftest import noise

from evaluator import pictures, report, results
from evaluator.records import SongRecord
from kmdx.errors import AudioError

STEMS = ("bass", "drums", "other", "vocals")
RATE = 44100
NASTY = "<b>R&D</b> \"quoted\" 'n' </script><script>document.title='owned'</script> – Ärger #1 100%"
FIRST = [
    "Arise",
    "Buitraker",
    "Moth House",
    "Detsky Sad",
    "Enda Reilly",
    "Girls Under Glass",
    "Little Tybee",
    "PR",
]
SECOND = ["Revo X", "Cur Alors Les Gars", "Night Owl", "Walkie Talkie", "Zeno", "Signs", "The Wind", "Oh No"]


def fake_song(
    name: str, rng: np.random.Generator, duration: float = 240.0, skill: float = 0.0
) -> dict[str, Any]:
    """A scored song with curves like a real one's."""
    centres = dict(zip(STEMS, (9.6, 9.2, 6.6, 9.9), strict=True))
    scores = {stem: float(centres[stem] + skill + rng.normal(0, 1.6)) for stem in STEMS}
    seconds = np.arange(int(duration))
    frames: dict[str, list[float | None]] = {}
    envelopes = {}
    for stem in STEMS:
        curve = scores[stem] + 3 * np.sin(seconds / rng.uniform(6, 20)) + rng.normal(0, 2.0, len(seconds))
        quiet = (seconds % 90 > 80) & (stem != "drums")
        frames[stem] = [None if still else float(value) for still, value in zip(quiet, curve, strict=True)]
        shape = 40 + 25 * np.sin(np.linspace(0, rng.uniform(8, 30), 300)) + rng.normal(0, 12, 300)
        level = {"bass": 0.6, "drums": 1.0, "other": 0.7, "vocals": 0.8}[stem]
        reference = np.clip(level * shape, 0, 100).astype(int)
        estimate = np.clip(reference + rng.normal(0, 3, 300), 0, 100).astype(int)
        envelopes[stem] = {"reference": reference.tolist(), "estimate": estimate.tolist()}
    medians = {
        stem: float(np.median([x for x in values if x is not None])) for stem, values in frames.items()
    }
    factor = float(rng.uniform(0.6, 1.1))
    return {
        "song": name, "status": "ok", "reason": None, "duration": duration, "seconds": factor * duration,
        "real_time_factor": factor, "peak_memory": int(rng.uniform(5.5e9, 7e9)), "peak_gpu_memory": None,
        "over_time": False, "over_memory": False, "warnings": [],
        "global_sdr": scores, "song_sdr": float(np.mean(list(scores.values()))), "museval_sdr": medians,
        "museval_frames": frames, "silent_references": [], "envelopes": envelopes,
    }  # fmt: skip


def failed_song(name: str, reason: str, **known: Any) -> dict[str, Any]:
    """A song that has no score."""
    return {
        "song": name, "status": "failed", "reason": reason, "duration": 0.0, "seconds": None,
        "real_time_factor": None, "peak_memory": None, "peak_gpu_memory": None, "over_time": False,
        "over_memory": False, "warnings": [], **known,
    }  # fmt: skip


def fake_results(songs: list[dict[str, Any]], warnings: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a results.json over these songs."""
    run = {
            "ensemble": "leaderboard_c", "title": "Leaderboard C of the Sound Demixing Challenge 2023",
            "submission": "/home/someone/kmdx-net", "plan_sha256": "3f" * 32,
            "weights": [
                {"name": "mdx_extra_a1d90b5c", "file": "demucstracktwo.ckpt", "sha256": "a1" * 32, "known": True},
                {"name": "mdx_vocals", "file": "TFC_TDF_UNet_MDX21/vocals.onnx", "sha256": "0c" * 32, "known": False},
            ],
            "versions": {"kmdx-net": "0.1.0", "torch": "2.9.0", "numpy": "2.4.6"}, "python": "3.11.7",
            "platform": "Linux-6.1-x86_64", "cpu": "Some Processor, 4 cores", "device": "cuda:0 (Tesla T4)",
            "precision": "float32", "git_commit": "b12997a0c0de", "stems": list(STEMS), "metrics": ["global_sdr", "museval_sdr"],
            "started": "2026-11-09T14:03:07+00:00",
            "engine": "tuned",
            "time_limit_factor": 1.57, "memory_limit": 16 * 10**9, "enforced": False,
            "load_seconds": 21.4,
            "data": {"path": "/data/musdb18hq", "songs": len(songs), "lossy": False, "split": "test", "warnings": []},
        }  # fmt: skip
    content = results.summarize(run, None, [SongRecord.from_json(song) for song in songs])
    return {**content, "warnings": list(warnings)}


def fifty(seed: int = 0) -> dict[str, Any]:
    """Fifty songs of four minutes, with everything remarkable among them."""
    rng = np.random.default_rng(seed)
    songs = [fake_song(f"{one} - {two}", rng, skill=rng.normal(0, 1.2)) for one in FIRST for two in SECOND][
        :50
    ]
    songs[3]["song"] = NASTY
    songs[5]["song"] = "Speak Softly - " + "a name that goes on and on, " * 5 + "and on"
    songs[7] |= {"over_time": True, "real_time_factor": 1.83, "seconds": 439.2}
    songs[9] |= {
        "over_memory": True,
        "peak_memory": int(17.2e9),
        "warnings": ["other.wav: 12 samples clipped at ±1"],
    }
    songs[11] |= {
        "silent_references": ["vocals"],
        "museval_sdr": {**songs[11]["museval_sdr"], "vocals": None},
        "museval_frames": {**songs[11]["museval_frames"], "vocals": [None] * 240},
        "global_sdr": {**songs[11]["global_sdr"], "vocals": -31.37},
    }
    reason = "killed after 376.8 s, the limit of 1.57 × 240.0 s (drums.wav and vocals.wav were not written)"
    songs[13] = failed_song(
        songs[13]["song"], reason, duration=240.0, seconds=376.8, real_time_factor=1.57, over_time=True
    )
    songs[17] = failed_song(
        songs[17]["song"], "RuntimeError: <shape> & </td> of bass: (10, 2), expected (20, 2)"
    )
    return fake_results(
        songs,
        warnings=(
            "mdx_extra_a1d90b5c was trained with MUSDB18's test songs: a score on them is optimistic",
            "weights of unknown content: mdx_vocals",
            "PR - Oh No: the stems do not sum to the mixture (known of this song)",
        ),
    )


class Text(HTMLParser):
    """What a page says, and what its script reads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []
        self.data = ""
        self.scripts = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style", "title"):
            self.open.append(tag)
        self.scripts += tag == "script"

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open == ["script"] and self.scripts == 1:
            self.data += data
        elif not self.open:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def test_the_page_says_what_was_measured() -> None:
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


def test_published_rows_are_the_challenges() -> None:
    text = Text(report.page(fake_results([]))).text
    for row in (
        "SAMI-ByteDance 9.97 11.15 10.27 7.08 11.36",
        "9.181 10.056 9.465 6.804 10.398",
        "kuielab 8.971 9.716 9.433 6.721 10.012",
        "alina_porechina 8.63 9.92 9.29 6.23 9.07",
    ):
        assert row in text.replace("\N{FIGURE SPACE}", " ").replace("  ", " ")


def test_names_are_escaped_in_markup_and_in_data() -> None:
    page = report.page(fifty())
    seen = Text(page)
    assert seen.scripts == 2  # the data and ours; none came in with a name
    assert "<b>R&D" not in page
    assert html.escape(NASTY) in page.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")
    assert json.loads(seen.data)["songs"][3]["name"] == NASTY
    assert "<shape> & </td>" in seen.text


def test_the_page_is_light_and_names_no_host() -> None:
    page = report.page(fifty())
    assert len(page.encode()) < 3_000_000
    addresses = re.findall(r"""https?://[^\s"'<>)]+""", page)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a name space, not a place


def test_numbers_that_do_not_exist() -> None:
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
def test_no_song_and_one_song(number: int) -> None:
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


def test_results_are_left_as_they_were() -> None:
    results = fifty()
    before = copy.deepcopy(results)
    report.page(results)
    assert results == before


@pytest.mark.parametrize(
    ("count", "limit", "shown"),
    [(6.5e9, 16 * 10**9, "6.50 of 16 GB"), (8 * 2**30, 16 * 2**30, "8.00 of 16 GiB")],
)
def test_memory_is_given_in_the_limits_unit(count: float, limit: int, shown: str) -> None:
    results = fake_results([])
    results["run"]["memory_limit"] = limit
    results["summary"]["peak_memory"] = int(count)
    assert f"{shown} allowed" in Text(report.page(results)).text


def pixels(png: bytes) -> np.ndarray:
    """Palette indices of a PNG as pictures.py writes it: 8 bits, no filters."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    start, packed = 8, b""
    while start < len(png):
        (length,) = struct.unpack(">I", png[start : start + 4])
        kind, body = png[start + 4 : start + 8], png[start + 8 : start + 8 + length]
        assert struct.unpack(">I", png[start + 8 + length : start + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        packed += body if kind == b"IDAT" else b""
        start += 12 + length
    return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, width + 1)[:, 1:]


def test_a_picture_shows_the_pitch_and_the_level(tmp_path: Path) -> None:
    moment = np.arange(6 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * moment)[:, None] * (moment < 3)[:, None] * [1, 1]
    sf.write(tmp_path / "reference.wav", tone, RATE)
    sf.write(tmp_path / "estimate.wav", tone / 10, RATE)
    picture = tmp_path / "media" / "picture.png"
    pictures.write(tmp_path / "reference.wav", tmp_path / "estimate.wav", picture)
    image = pixels(picture.read_bytes()).astype(float)
    assert image.shape == (2 * pictures.ROWS + pictures.GAP, pictures.COLUMNS)
    reference, estimate = image[: pictures.ROWS], image[pictures.ROWS + pictures.GAP :]
    row = int(pictures.height(1000) * pictures.ROWS)
    assert abs(int(reference[:, 200].argmax()) - row) <= 1
    assert reference.max() == 254
    assert estimate.max() == pytest.approx(255 * (1 - 20 / pictures.RANGE), abs=2)  # 20 dB less
    assert reference[:, 500:].max() == 0  # silent from the middle on
    assert [path.name for path in picture.parent.iterdir()] == ["picture.png"]


def test_pictures_of_short_silent_and_broken_sounds(tmp_path: Path) -> None:
    sf.write(tmp_path / "short.flac", noise(300, 1), 8000)
    sf.write(tmp_path / "silent.wav", np.zeros((3000, 2)), RATE)
    short, silent = (pictures.spectrogram(tmp_path / name) for name in ("short.flac", "silent.wav"))
    assert short.shape == (pictures.ROWS, 2)
    assert not pixels(pictures.draw(silent, silent))[: pictures.ROWS].any()
    (tmp_path / "broken.wav").write_bytes(b"RIFF of nothing")
    with pytest.raises(AudioError, match=r"broken\.wav: no spectrogram"):
        pictures.spectrogram(tmp_path / "broken.wav")


def keep(run: Path, data: Path, song: str, seconds: float = 20) -> dict[str, Path]:
    """Predictions and true stems of a song on disk, as an evaluation that keeps stems leaves them."""
    references = {}
    for number, stem in enumerate(STEMS):
        truth = noise(int(seconds * RATE), seed=number)
        for folder, sound in ((run / "predictions", 0.8 * truth), (data, truth)):
            (folder / song).mkdir(parents=True, exist_ok=True)
            sf.write(folder / song / f"{stem}.wav", sound, RATE)
        references[stem] = data / song / f"{stem}.wav"
    return references


def test_media_of_kept_stems(tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chromium or Chrome on the system")
    quiet = ("no-first-run", "background-networking", "component-update", "sync", "quic", "gpu")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet[1:])]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=flags)
        yield chromium
        chromium.close()


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
    """The page of the run, watched: it must not complain and must not ask for anything elsewhere."""
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


def column(page: Any, key: str) -> list[float]:
    """Values of a column from top to bottom; those that are missing left out."""
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
    waves = page.locator(".plot.wave path")
    assert waves.count() == 8
    for wave in waves.all():
        assert (wave.get_attribute("d") or "").count(",") > 500
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
    first = page.locator("audio").first
    first.scroll_into_view_if_needed()
    wait_for(page, "document.querySelector('audio').readyState > 0")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(20, abs=0.01)
    page.locator(".plot.picture img").first.scroll_into_view_if_needed()
    wait_for(page, "document.querySelector('.plot.picture img').naturalWidth > 0")
    assert page.evaluate("document.querySelector('.plot.picture img').naturalWidth") > 500

    page.locator(".plot.wave").first.click(position={"x": 200, "y": 20})
    assert "dB" in page.locator(".now").first.inner_text()
    page.locator("#next").click()
    assert page.locator("audio").count() == 0


def wait_for(page: Any, condition: str, seconds: float = 60) -> None:
    """Ask until it holds; playwright's own wait needs eval, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def test_a_link_opens_its_song(browser: Any, page: Any, run: Path) -> None:
    link = page.locator("#table tbody tr").nth(3).locator("a").get_attribute("href")
    other = browser.new_page()
    other.goto((run / "report.html").as_uri() + link)
    assert other.locator("#panel-title").inner_text() == NASTY
    assert other.title() != "owned"
    other.locator("#close").click()
    assert "#" not in other.url
    other.close()


def test_a_failed_song_says_why(page: Any) -> None:
    page.locator("tr.failed a").nth(1).click()
    assert "<shape> & </td> of bass" in page.locator("#content").inner_text()
    assert page.locator(".plot").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_screenshots(page: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for name in ("page", "song"):
        if name == "song":
            page.get_by_role("link", name="Kept & <played> #1", exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
        path = tmp_path / f"{name}-{width}-{scheme}.png"
        page.screenshot(path=path, full_page=name == "page")
        assert shades(path) > 20


def shades(path: Path) -> int:
    """Number of different bytes in a PNG's filtered rows: of a blank picture there are few."""
    png, start, packed = path.read_bytes(), 8, b""
    while start < len(png):
        (length,) = struct.unpack(">I", png[start : start + 4])
        packed += png[start + 8 : start + 8 + length] if png[start + 4 : start + 8] == b"IDAT" else b""
        start += 12 + length
    return len(set(zlib.decompress(packed)))


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    rng = np.random.default_rng(0)
    html = report.page(fake_results([fake_song("one", rng, duration=5.0)]))
    assert "<h3>museval SDR, median over 1\u00a0s frames, median over songs</h3>" in html
