"""Finished stems with their records, without separating anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kmdx import audio, manifest

SETTINGS = manifest.StemSettings(
    ensemble="e",
    plan="0" * 64,
    weights={"w": "1" * 64},
    precision="fp32",
    engine="tuned",
    speed="leaderboard",
    start=0.0,
    duration=None,
    downmix=False,
    format="wav16",
)


def wanted(
    folder: Path, song: Path, *stems: str, overwrite: bool = False, **settings: Any
) -> manifest.Wanted:
    """These stems of a song, with some settings of their own."""
    made = replace(SETTINGS, **settings)
    extension = audio.FORMATS[made.format].extension
    names = {stem: f"{stem}{extension}" for stem in stems or ("vocals",)}
    known = ("bass", "drums", "vocals")
    return manifest.Wanted(song, folder, names, lambda stem: made if stem in known else None, overwrite)


def write(wanted: manifest.Wanted, level: float = 0.5) -> None:
    """Write the stems; what is in them follows from the level."""
    settings = wanted.settings("vocals")
    assert settings is not None
    files: Mapping[Path, np.ndarray] = {
        path: np.full((100, 1), level + 0.01 * number) for number, path in enumerate(wanted.paths.values())
    }
    with manifest.writing(wanted, manifest.identify(wanted.song)) as prepare:
        audio.write_all(files, 8000, settings.format, before_rename=prepare)


def finish(folder: Path, song: Path, *stems: str, **settings: Any) -> None:
    """Have finished stems of a song in a folder."""
    write(wanted(folder, song, *stems, **settings))
