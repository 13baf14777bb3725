"""The singer: Sinsy sings a melody's syllables, WORLD gives it the singer's pitch and timbre.

The one voice that comes with Sinsy is a woman's, sings no more than an octave, and not in tune. So
only its words are kept: their spectral envelopes, and where they are voiced. The pitch is the
score's, with the singer's vibrato and the small movements of Sinsy's own; the envelopes are stretched
along frequency, as a shorter or longer vocal tract does it.

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
from recipes.mini.synthesizer.score import STEPS, Note, Score

FRAME = 5e-3  # seconds between WORLD's frames
SUNG = (64, 74)  # MIDI pitches that Sinsy's voice was trained on
FLOOR, CEILING = 200.0, 750.0  # Hz, between which its pitch is looked for
DRIFT = 0.08  # octaves that its own movements may take the pitch from the score's
GLIDE = 5  # frames that the pitch takes from a note to the next
SHARPS = ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1), (6, 0))


@dataclass(frozen=True)
class Singer:
    """How a voice differs from another.

    Attributes
    ----------
    centre : int
        MIDI pitch about which it sings.
    formants : float
        Factor of the frequencies of its spectral envelope; below 1 the vocal tract is longer.
    breath : float
        Part of noise in the voice at high frequencies, 0 to 1.
    vibrato, rate, delay : float
        Depth in semitones, Hz, and seconds from a note's beginning until it is there.
    """

    centre: int
    formants: float
    breath: float
    vibrato: float
    rate: float
    delay: float


@dataclass(frozen=True)
class Words:
    """What Sinsy sang, in WORLD's frames of 5 ms: all but the pitch.

    Attributes
    ----------
    pitch : ndarray
        ``(frames,)`` Hz, 0 where unvoiced.
    envelope : ndarray
        ``(frames, bins)`` power.
    rate : int
        Hz.
    """

    pitch: np.ndarray
    envelope: np.ndarray
    rate: int


def draw_singer(rng: np.random.Generator) -> Singer:
    """A woman or a man, from soprano to bass."""
    low = rng.random() < 0.5
    position = rng.random()  # 0 the lowest of its kind, 1 the highest
    centre = round(48 + 10 * position) if low else round(58 + 9 * position)
    formants = (0.76 + 0.12 * position if low else 0.94 + 0.14 * position) + rng.uniform(-0.03, 0.03)
    return Singer(
        centre=centre,
        formants=round(float(formants), 3),
        breath=round(float(rng.uniform(0.15, 0.8)), 3),
        vibrato=round(float(rng.uniform(0.05, 0.5)), 3),
        rate=round(float(rng.uniform(4.8, 6.5)), 3),
        delay=round(float(rng.uniform(0.1, 0.5)), 3),
    )


def pronounce(score: Score, folder: Path) -> Words:
    """Have Sinsy sing a score's melody.

    Parameters
    ----------
    score : Score
    folder : Path
        For files that are needed on the way.

    Raises
    ------
    KmdxError
        If Sinsy does not take the score.
    """
    path = folder / "melody.xml"
    path.write_text(music_xml(score), encoding="utf-8")
    home = Path(_specification("pysinsy").origin).parent
    sinsy = _extension("pysinsy", "sinsy").Sinsy()
    ready = sinsy.setLanguages("j", str(home / "_dic")) and sinsy.loadVoices(
        str(home / "htsvoice" / "nitech_jp_song070_f001.htsvoice")
    )
    if not (ready and sinsy.loadScoreFromMusicXML(str(path))):
        raise KmdxError("pysinsy: does not take its voice or the score; install it again")
    samples, rate = sinsy.synthesize()
    samples = np.ascontiguousarray(samples / 32768)

    world = _extension("pyworld", "pyworld")
    options = {"f0_floor": FLOOR, "f0_ceil": CEILING, "frame_period": 1000 * FRAME}
    pitch, times = world.dio(samples, rate, **options)
    return Words(pitch, world.cheaptrick(samples, pitch, times, rate, f0_floor=FLOOR), rate)


def sing(words: Words, score: Score, melody: Sequence[Note], singer: Singer, length: int) -> np.ndarray:
    """A singer's voice with these words.

    Parameters
    ----------
    words : Words
    score : Score
        Its tempo is taken.
    melody : sequence of Note
        The score's, or another with its rhythm: a harmony.
    singer : Singer
    length : int
        Samples to return.

    Returns
    -------
    ndarray
        float32 ``(length, 1)`` at :data:`~kmdx.challenge.RATE`.
    """
    pitch = _pitch(words, score, melody, singer)
    bins = words.envelope.shape[1]
    envelope = _stretched(words.envelope, singer.formants)
    # Sinsy's own excitation is a mixture that is no more natural than this, which takes WORLD's
    # analysis of it no time: noise takes over from the harmonics at a few kHz, the more the breath.
    frequency = np.linspace(0, words.rate / 2, bins)
    voiced = 1e-3 + singer.breath / (1 + np.exp((5000 - frequency) / 1200))
    noise = np.where(pitch[:, None] > 0, voiced, 1.0)
    world = _extension("pyworld", "pyworld")
    sound = world.synthesize(pitch, envelope, np.ascontiguousarray(noise), words.rate, 1000 * FRAME)
    return audio.resample(sound[:, None].astype(np.float32), words.rate, RATE, length)


def harmony(score: Score, degrees: int) -> tuple[Note, ...]:
    """The melody so many degrees of the scale above, or below."""
    return tuple(
        Note(note.start, note.length, score.in_scale(note.pitch, degrees), note.syllable)
        for note in score.melody
    )


def music_xml(score: Score) -> str:
    """A score's melody as MusicXML, every bar full, within the pitches that Sinsy sings well.

    One bar of rest follows, without which Sinsy ends too early.
    """
    centre = round(np.mean([note.pitch for note in score.melody])) if score.melody else 0
    shift = (SUNG[0] + SUNG[1]) // 2 - centre
    count = len(score.chords) + 1
    bars: list[list[str]] = [[] for _ in range(count)]
    now = 0
    for note in (*score.melody, None):
        start = count * score.bar if note is None else note.start
        while now < start:  # a rest, of which each bar gets its own
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
    """Hz in each frame, 0 where unvoiced."""
    frames = len(words.pitch)
    target = np.zeros(frames)  # octaves above 1 Hz
    movement = np.zeros(frames)
    vibrato = np.zeros(frames)
    logarithm = np.log2(np.maximum(words.pitch, FLOOR))
    bounds = [round(note.start * score.step / FRAME) for note in melody]
    # A consonant before its note, and what follows it into a rest, belong to the note nearest.
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
    """Envelopes ``(frames, bins)`` whose formants lie at their frequencies times a factor."""
    bins = envelope.shape[1]
    place = np.minimum(np.arange(bins) / factor, bins - 1)
    below = np.minimum(place.astype(int), bins - 2)
    part = place - below
    return np.ascontiguousarray(envelope[:, below] * (1 - part) + envelope[:, below + 1] * part)


def _specification(package: str) -> Any:
    """Where a package lies, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise KmdxError(
            f"Python's {package}: not installed; install with: pip install -r recipes/mini/requirements.txt"
        )
    return found


@cache
def _extension(package: str, name: str) -> ModuleType:
    """A package's compiled module alone.

    Both packages import ``pkg_resources``, which setuptools no longer has, to tell where they lie.
    """
    places = _specification(package).submodule_search_locations
    found = importlib.machinery.PathFinder.find_spec(name, places)
    if found is None or found.loader is None:
        raise KmdxError(f"Python's {package}: has no compiled {name}; install it again")
    specification = importlib.util.spec_from_file_location(f"{package}.{name}", found.origin)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
