"""Invented results, stems on disk, the text of a page, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from conftest import noise

from evaluator import results
from evaluator.records import SongRecord

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
    """The text of a page, and what its script reads."""

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
