"""Makes one song from its seed, split and number: composes, plays, sings and mixes it."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kmdx.challenge import RATE, STEMS
from kmdx.errors import KmdxError
from recipes.mini.synthesizer import accompaniment, effects, mixing, requirements, voice
from recipes.mini.synthesizer.accompaniment import InstrumentPart
from recipes.mini.synthesizer.fluidsynth import render
from recipes.mini.synthesizer.requirements import BLACK_PEARL, FLUID, RED_ZEPPELIN, TIM
from recipes.mini.synthesizer.score import NAMES, Score, compose
from recipes.mini.synthesizer.song_set import SPLITS, SongSpec

ATTEMPTS = 20  # songs to draw until no stem is silent
TAIL = 2.0  # seconds after the last bar, for the reverb
SILENT = {"bass": 0.4, "drums": 0.4, "other": 0.3, "vocals": 0.5}  # largest silent share of a stem
REDRAWN = 0.9  # share of the songs with few kicks or snares that are drawn again
QUIETEST = -40.0  # dBFS; smallest RMS of a whole stem

# General MIDI programs, counted from 0.
BASS_PROGRAMS = (32, 33, 33, 33, 34, 34, 34, 35, 36, 37, 38, 39)
PALETTES = {
    "rock": (25, 26, 27, 28, 29, 29, 30, 30, 16, 18, 0),
    "pop": (0, 1, 4, 5, 25, 27, 48, 50, 88, 89, 90),
    "synth": (80, 81, 62, 63, 50, 51, 88, 90, 91, 95, 5),
    "soul": (4, 16, 17, 27, 61, 56, 65, 66, 48, 11, 28),
    "folk": (24, 25, 21, 22, 40, 73, 46, 105, 0, 42, 12),
}
PADS = (48, 49, 50, 51, 88, 89, 90, 91, 94, 16, 18, 52)
LEADS = (26, 29, 30, 65, 66, 56, 73, 80, 81, 40, 11, 87)
DRIVEN = (29, 30)
KITS = (0, 0, 8, 8, 16, 16, 16, 24, 25, 32)

KIT_FONTS = (BLACK_PEARL, RED_ZEPPELIN)


@dataclass(frozen=True)
class RenderedSong:
    """A finished song."""

    stems: dict[str, np.ndarray]  # int16 ``(samples, 2)``
    mixture: np.ndarray  # the sum of the stems
    description: dict[str, Any]  # what was drawn, for a human reader


def make(song: SongSpec) -> RenderedSong:
    """Render a song.

    Raises :class:`KmdxError` if a program fails, or if a stem was silent in every attempt.
    """
    with tempfile.TemporaryDirectory(prefix="synthetic-") as folder:
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((song.seed, SPLITS.index(song.split), song.number, attempt))
            record = _attempt(rng, song, Path(folder))
            if record is not None:
                return record
    raise KmdxError(f"{song.name}: a stem was silent in {ATTEMPTS} attempts; try another --seed or --seconds")


def _attempt(rng: np.random.Generator, song: SongSpec, folder: Path) -> RenderedSong | None:
    """Draw and render the song; None if a stem has too little to play."""
    singer = voice.draw_singer(rng)
    styles = accompaniment.library()
    style = accompaniment.choose_style(rng, styles)
    tempo = int(rng.integers(70, 161))
    if style.beats == 6:  # its beats are eighth notes
        tempo = min(round(1.5 * tempo), 220)
    score = compose(rng, tempo=tempo, beats=style.beats, seconds=song.seconds - TAIL, center=singer.centre)
    length = round((score.seconds + TAIL) * RATE)

    grooves = accompaniment.grooves_by_bar(rng, score, style)
    seed = int(rng.integers(2**31))
    parts = accompaniment.play(score, style, grooves, seed, folder)
    used = dict.fromkeys(style.groove(groove) for groove in grooves)
    driving = accompaniment.choose_drums(rng, styles, style.beats)
    if driving is not None and rng.random() < 0.5:
        beats = accompaniment.grooves_by_bar(rng, score, driving)
        played = accompaniment.play(score, driving, beats, seed, folder)
        parts = [part for part in parts if part.stem != "drums"]
        parts += [part for part in played if part.stem == "drums"]
        used |= dict.fromkeys(f"{driving.groove(groove)} (drums)" for groove in beats)
    by_stem = {stem: [part for part in parts if part.stem == stem] for stem in STEMS}
    if not by_stem["bass"] or not by_stem["drums"]:
        return None
    if not accompaniment.drives(by_stem["drums"], score) and rng.random() < REDRAWN:
        return None

    bass, bass_sound = _bass(rng, by_stem["bass"], score, length, folder)
    drums, drums_sound = _drums(rng, by_stem["drums"], score, length, folder)
    other, other_sound = _other(rng, by_stem["other"], score, length, folder)
    stems = {"bass": bass, "drums": drums, "other": other}
    if any(mixing.silence(stem) > SILENT[name] for name, stem in stems.items()):
        return None
    stems["vocals"], voices = _vocals(rng, score, singer, length, folder)
    if mixing.silence(stems["vocals"]) > SILENT["vocals"]:
        return None

    # Vocals are -3 to 6 dB above any other stem.
    vocals = float(rng.uniform(-22, -18))
    levels = {name: vocals - float(rng.uniform(-3, 6)) for name in ("bass", "drums", "other")}
    levels["vocals"] = vocals
    # As loud as commercial records: the limiter removes what exceeds full scale.
    loudness = float(rng.uniform(0, 6))
    levels = {name: round(value + loudness, 2) for name, value in levels.items()}
    ceiling = float(rng.uniform(0.8, 0.99))
    whole, mixture = mixing.quantize(mixing.master(mixing.balance(stems, levels), ceiling))
    for stem in whole.values():
        if 20 * np.log10(np.sqrt(np.mean(np.square(stem / 32768))) + 1e-9) < QUIETEST:
            return None
    description = {
        "tempo": score.tempo,
        "beats": score.beats,
        "key": f"{NAMES[score.key]} {score.mode}",
        "chords": " ".join(chord.name for chord in score.chords),
        "grooves": list(used),
        "mma_seed": seed,
        "bass": bass_sound,
        "drums": drums_sound,
        "other": other_sound,
        "vocals": {**asdict(singer), **voices},
        "levels": levels,
        "versions": requirements.versions(),
    }
    return RenderedSong(whole, mixture, description)


def _font(rng: np.random.Generator) -> Path:
    return (FLUID, TIM)[int(rng.random() < 0.4)]


def _bass(
    rng: np.random.Generator, parts: list[InstrumentPart], score: Score, length: int, folder: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """One instrument plays the bass parts of all grooves."""
    program, font = int(rng.choice(BASS_PROGRAMS)), _font(rng)
    pitches = [note[2] for part in parts for note in part.notes]
    # Into the lower octaves of a bass guitar, E1 to about E3.
    octaves = 12 * round((38 - float(np.median(pitches))) / 12)
    played = [
        (replace(accompaniment.transposed(part, octaves), program=program), number, 110, 64)
        for number, part in enumerate(parts[:9])
    ]
    sound = render(accompaniment.midi(played, score), font, length, folder)
    return effects.bass(rng, sound), {"program": program, "font": font.name}


def _drums(
    rng: np.random.Generator, parts: list[InstrumentPart], score: Score, length: int, folder: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """One drum kit, or two layered."""
    layers = []
    total = np.zeros((length, 2), np.float32)
    for _ in range(1 + int(rng.random() < 0.35)):
        if rng.random() < 0.5:
            font, kit, channel = KIT_FONTS[rng.integers(2)], 0, 0  # its only kit is a melodic instrument
        else:
            font, kit, channel = _font(rng), int(rng.choice(KITS)), accompaniment.DRUM_CHANNEL
        force = float(rng.uniform(1.0, 1.35))  # MMA's drums are quiet
        played = [(replace(_struck(part, force), program=kit), channel, 110, 64) for part in parts]
        layer = render(accompaniment.midi(played, score), font, length, folder)
        peak = float(np.abs(layer).max())
        if peak == 0:
            continue
        total += layer * np.float32(rng.uniform(0.4, 1) / peak)
        layers.append({"font": font.name, "kit": kit})
    if not layers:
        return total, {"layers": layers}
    return effects.drums(rng, total), {"layers": layers}


def _other(
    rng: np.random.Generator, parts: list[InstrumentPart], score: Score, length: int, folder: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """The accompaniment with instruments of one palette, sometimes with a pad and a lead."""
    palette = sorted(PALETTES)[rng.integers(len(PALETTES))]
    choices = PALETTES[palette]
    players = [
        replace(part, program=int(rng.choice(choices))) if rng.random() < 0.75 else part
        for part in parts[:12]
    ]
    if not players or rng.random() < 0.35:
        players.append(accompaniment.pad(score, int(rng.choice(PADS)), int(rng.integers(52, 64))))
    if rng.random() < 0.4:
        players.append(accompaniment.lead(rng, score, int(rng.choice(LEADS))))
    font = _font(rng)
    total = np.zeros((length, 2), np.float32)
    driven = [part for part in players if part.program in DRIVEN]
    for group in (driven, [part for part in players if part not in driven]):
        if not group:
            continue
        played = [
            (part, _channel(number), int(rng.integers(75, 128)), int(rng.integers(14, 115)))
            for number, part in enumerate(group)
        ]
        sound = render(accompaniment.midi(played, score), font, length, folder)
        if not sound.any():
            continue
        if group is driven:
            sound = effects.guitars(rng, sound)
        total += effects.other(rng, sound) * np.float32(rng.uniform(0.5, 1))
    programs = {f"{part.name} {number}": part.program for number, part in enumerate(players)}
    return total, {"palette": palette, "font": font.name, "programs": programs}


def _vocals(
    rng: np.random.Generator, score: Score, singer: voice.Singer, length: int, folder: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """The singer, sometimes doubled, sometimes with a harmony voice."""
    words = voice.pronounce(score, folder)
    alone = voice.sing(words, score, score.melody, singer, length)
    twice = bool(rng.random() < 0.35)
    total = effects.doubled(rng, alone) if twice else effects.placed(alone, float(rng.uniform(-0.1, 0.1)))
    degrees = 0
    if rng.random() < 0.4:
        degrees = int(rng.choice((-5, -3, -2, 2, 3)))
        second = voice.sing(words, score, voice.harmony(score, degrees), singer, length)
        late = int(rng.uniform(0, 0.02) * RATE)
        second = np.pad(second, ((late, 0), (0, 0)))[:length]
        total = total + effects.doubled(rng, second) * np.float32(rng.uniform(0.2, 0.6))
    beat = 60 / score.tempo
    return effects.vocals(rng, total, beat), {"doubled": twice, "harmony": degrees}


def _channel(number: int) -> int:
    """The MIDI channel of a part, skipping the drum channel."""
    return number + (number >= accompaniment.DRUM_CHANNEL)


def _struck(part: InstrumentPart, force: float) -> InstrumentPart:
    """The drum part, struck harder."""
    notes = tuple(
        (start, end, pitch, min(round(velocity * force), 127)) for start, end, pitch, velocity in part.notes
    )
    return replace(part, notes=notes)
