"""The singer: Sinsy sings the syllables of a melody, WORLD sets the singer's pitch and timbre.

Sinsy's only voice is female, has a range of one octave and sings out of tune. So only its words are
kept: their spectral envelopes, and where they are voiced. The pitch comes from the score, with the
singer's vibrato and the small movements of Sinsy's pitch. The envelopes are stretched along frequency,
as a shorter or longer vocal tract would do.

References
----------
Morise, Yokomori and Ozawa 2016, "WORLD: a vocoder-based high-quality speech synthesis system".
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from scipy.ndimage import gaussian_filter1d

from kmdx import audio
from kmdx.challenge import RATE
from kmdx.errors import KmdxError
from recipes.mini.synthesizer.requirements import INSTALL_MODULES
from recipes.mini.synthesizer.score import STEPS, Note, Score

FRAME = 5e-3  # seconds between WORLD's frames
SUNG = (64, 74)  # range of MIDI pitches that Sinsy's voice was trained on
FLOOR, CEILING = 200.0, 750.0  # Hz; range of the pitch analysis
DRIFT = 0.08  # octaves; largest movement of the pitch away from the score
GLIDE = 5  # frames; smoothing of the pitch between notes
SHARPS = ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1), (6, 0))


@dataclass(frozen=True)
class Singer:
    """The parameters of a voice."""

    centre: int  # MIDI pitch around which it sings; this spelling is a key of song.yaml
    formants: float  # frequency factor of the spectral envelope; below 1 the vocal tract is longer
    breath: float  # share of noise in the voice at high frequencies, 0 to 1
    vibrato: float  # depth in semitones
    rate: float  # of the vibrato, in Hz
    delay: float  # seconds from the start of a note to the vibrato


@dataclass(frozen=True)
class Words:
    """Sinsy's singing as WORLD's analysis in frames of 5 ms."""

    pitch: np.ndarray  # ``(frames,)`` Hz, 0 where unvoiced
    envelope: np.ndarray  # ``(frames, bins)`` power
    rate: int  # Hz


def draw_singer(rng: np.random.Generator) -> Singer:
    """Draw a female or male singer, from soprano to bass."""
    low = rng.random() < 0.5
    position = rng.random()  # 0 for the lowest of their kind, 1 for the highest
    center = round(48 + 10 * position) if low else round(58 + 9 * position)
    formants = (0.76 + 0.12 * position if low else 0.94 + 0.14 * position) + rng.uniform(-0.03, 0.03)
    return Singer(
        centre=center,
        formants=round(float(formants), 3),
        breath=round(float(rng.uniform(0.15, 0.8)), 3),
        vibrato=round(float(rng.uniform(0.05, 0.5)), 3),
        rate=round(float(rng.uniform(4.8, 6.5)), 3),
        delay=round(float(rng.uniform(0.1, 0.5)), 3),
    )


def pronounce(score: Score, folder: Path) -> Words:
    """Let Sinsy sing a score's melody; ``folder`` is for temporary files.

    Raises :class:`KmdxError` if Sinsy rejects the score.
    """
    path = folder / "melody.xml"
    path.write_text(music_xml(score), encoding="utf-8")
    home = Path(_specification("pysinsy").origin).parent
    sinsy = _extension("pysinsy", "sinsy").Sinsy()
    ready = sinsy.setLanguages("j", str(home / "_dic")) and sinsy.loadVoices(
        str(home / "htsvoice" / "nitech_jp_song070_f001.htsvoice")
    )
    if not (ready and sinsy.loadScoreFromMusicXML(str(path))):
        raise KmdxError("pysinsy: cannot load its voice or the score; reinstall it")
    samples, rate = sinsy.synthesize()
    samples = np.ascontiguousarray(samples / 32768)

    world = _extension("pyworld", "pyworld")
    options = {"f0_floor": FLOOR, "f0_ceil": CEILING, "frame_period": 1000 * FRAME}
    pitch, times = world.dio(samples, rate, **options)
    return Words(pitch, world.cheaptrick(samples, pitch, times, rate, f0_floor=FLOOR), rate)


def sing(words: Words, score: Score, melody: Sequence[Note], singer: Singer, length: int) -> np.ndarray:
    """Synthesize a singer's voice with these words, at the score's tempo.

    The melody is the score's, or another with the same rhythm: a harmony. Returns float32 ``(length, 1)`` at
    :data:`~kmdx.challenge.RATE`.
    """
    pitch = _pitch(words, score, melody, singer)
    bins = words.envelope.shape[1]
    envelope = _stretched(words.envelope, singer.formants)
    # Noise replaces the harmonics above a few kHz, more so with more breath. This sounds as natural as
    # Sinsy's own excitation and saves analyzing it.
    frequency = np.linspace(0, words.rate / 2, bins)
    voiced = 1e-3 + singer.breath / (1 + np.exp((5000 - frequency) / 1200))
    noise = np.where(pitch[:, None] > 0, voiced, 1.0)
    world = _extension("pyworld", "pyworld")
    sound = world.synthesize(pitch, envelope, np.ascontiguousarray(noise), words.rate, 1000 * FRAME)
    return audio.resample(sound[:, None].astype(np.float32), words.rate, RATE, length)


def harmony(score: Score, degrees: int) -> tuple[Note, ...]:
    """The melody moved by scale degrees, up or down."""
    return tuple(
        Note(note.start, note.length, score.in_scale(note.pitch, degrees), note.syllable)
        for note in score.melody
    )


def music_xml(score: Score) -> str:
    """Write a score's melody as MusicXML, with full bars and within the range that Sinsy sings well.

    A bar of rest is added at the end, because Sinsy stops too early without it.
    """
    center = round(np.mean([note.pitch for note in score.melody])) if score.melody else 0
    shift = (SUNG[0] + SUNG[1]) // 2 - center
    count = len(score.chords) + 1
    bars: list[list[str]] = [[] for _ in range(count)]
    now = 0
    for note in (*score.melody, None):
        start = count * score.bar if note is None else note.start
        while now < start:  # a rest, split at bar lines
            length = min(start - now, score.bar - now % score.bar)
            bars[now // score.bar].append(f"<note><rest/><duration>{length}</duration></note>")
            now += length
        if note is not None:
            octave, within = divmod(int(np.clip(note.pitch + shift, *SUNG)), 12)
            step, sharp = SHARPS[within]
            bars[now // score.bar].append(
                f"<note><pitch><step>{'CDEFGAB'[step]}</step><alter>{sharp}</alter><octave>{octave - 1}"
                f"</octave></pitch><duration>{note.length}</duration>"
                f"<lyric><text>{escape(note.syllable)}</text></lyric></note>"
            )
            now = note.end
    head = (
        f"<attributes><divisions>{STEPS}</divisions><key><fifths>0</fifths></key><time>"
        f"<beats>{score.beats}</beats><beat-type>4</beat-type></time></attributes>"
        f'<direction><sound tempo="{score.tempo}"/></direction>'
    )
    measures = "".join(
        f'<measure number="{number}">{head if number == 1 else ""}{"".join(notes)}</measure>'
        for number, notes in enumerate(bars, 1)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><score-partwise version="2.0"><part-list>'
        '<score-part id="P1"><part-name>voice</part-name></score-part></part-list>'
        f'<part id="P1">{measures}</part></score-partwise>'
    )


def _pitch(words: Words, score: Score, melody: Sequence[Note], singer: Singer) -> np.ndarray:
    """Pitch in Hz for each frame, 0 where unvoiced."""
    frames = len(words.pitch)
    target = np.zeros(frames)  # octaves above 1 Hz
    movement = np.zeros(frames)
    vibrato = np.zeros(frames)
    logarithm = np.log2(np.maximum(words.pitch, FLOOR))
    bounds = [round(note.start * score.step / FRAME) for note in melody]
    # A note lasts until the next one starts; the first begins at frame 0.
    bounds = [0, *bounds[1:], frames]
    for note, first, end in zip(melody, bounds[:-1], bounds[1:], strict=True):
        target[first:end] = np.log2(440) + (note.pitch - 69) / 12
        sung = words.pitch[first:end] > 0
        if sung.any():
            own = logarithm[first:end]
            movement[first:end] = np.where(sung, own - np.median(own[sung]), 0)
        began = round(note.start * score.step / FRAME)
        seconds = np.maximum(np.arange(first, end) - began, 0) * FRAME
        depth = singer.vibrato / 12 * np.clip((seconds - singer.delay) / 0.3, 0, 1)
        vibrato[first:end] = depth * np.sin(2 * np.pi * singer.rate * seconds)
    octaves = gaussian_filter1d(target, GLIDE) + np.clip(movement, -DRIFT, DRIFT) + vibrato
    return np.where(words.pitch > 0, 2**octaves, 0.0)


def _stretched(envelope: np.ndarray, factor: float) -> np.ndarray:
    """Stretch envelopes ``(frames, bins)`` along frequency by a factor."""
    bins = envelope.shape[1]
    place = np.minimum(np.arange(bins) / factor, bins - 1)
    below = np.minimum(place.astype(int), bins - 2)
    part = place - below
    return np.ascontiguousarray(envelope[:, below] * (1 - part) + envelope[:, below + 1] * part)


def _specification(package: str) -> Any:
    """Find a package without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise KmdxError(f"Python package {package}: not installed; install with: {INSTALL_MODULES}")
    return found


@cache
def _extension(package: str, name: str) -> ModuleType:
    """Import only a package's compiled module.

    Both packages import ``pkg_resources`` to find their files; setuptools no longer has it.
    """
    places = _specification(package).submodule_search_locations
    found = importlib.machinery.PathFinder.find_spec(name, places)
    if found is None or found.loader is None:
        raise KmdxError(f"Python package {package}: no compiled {name}; reinstall it")
    specification = importlib.util.spec_from_file_location(f"{package}.{name}", found.origin)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
