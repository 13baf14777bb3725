"""The band: MMA plays grooves from its library over a score's chords, as MIDI for each stem.

MMA's track names do not decide which stem a part belongs to: some grooves have no bass, and in some the
part named bass is a guitar. The part's channel, program and pitch decide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import mido
import numpy as np

from recipes.mini.synthesizer import requirements
from recipes.mini.synthesizer.requirements import LIBRARY
from recipes.mini.synthesizer.score import STEPS, Score

DRUM_CHANNEL = 9  # counted from 0; channel 10 in General MIDI
TICKS = 192  # per beat, as in MMA's files
LOW = 48  # the mean pitch of a bass part is below this
BASSES = range(32, 40)  # General MIDI programs, counted from 0

# Grooves that begin or end a song, or are not music.
NOT_A_GROOVE = re.compile(r"intro|end|fill|count|break|metronome|none|test|fermata|rit", re.IGNORECASE)
# Styles of rock and pop records are drawn more often.
MODERN = re.compile(
    r"rock|pop|metal|punk|funk|soul|disco|dance|house|techno|trance|hip|rnb|r\+b|rb|8beat|16beat|beat|ballad|"
    r"fus|shuffle|hrk|mtl|thr|trip|boneym|motown|dnb|highfive",
    re.IGNORECASE,
)
PREFERENCE = 5  # times as often
KICKS, SNARES = (35, 36), (38, 40)  # General MIDI's drum notes
DRIVING = re.compile(
    r"rock(?!ballad)|pop|metal|punk|funk|beat|hrk|mtl|thr|hip|dance|disco|rnb|highfive", re.IGNORECASE
)


@dataclass(frozen=True)
class Style:
    """A file of MMA's library: grooves that fit together in one song."""

    name: str  # MMA's name for it, such as "casio/rock1"
    beats: int  # in a bar
    grooves: tuple[str, ...]

    def groove(self, groove: str) -> str:
        """A groove's full name, unambiguous if another file has a groove of the same name."""
        return f"{self.name}:{groove}"


@dataclass(frozen=True)
class InstrumentPart:
    """A part that MMA plays. Its notes are ``(start, end, pitch, velocity)``, with times in ticks."""

    name: str
    channel: int
    program: int
    notes: tuple[tuple[int, int, int, int], ...]

    @property
    def stem(self) -> str:
        """The stem that the part belongs to."""
        if self.channel == DRUM_CHANNEL:
            return "drums"
        mean = np.mean([pitch for _, _, pitch, _ in self.notes])
        low = mean < LOW and self.name.lower().startswith(("bass", "walk"))
        return "bass" if low or (self.program in BASSES and mean < LOW + 12) else "other"


@cache
def library(folder: Path = LIBRARY) -> tuple[Style, ...]:
    """The styles of MMA's library that keep one meter, sorted by name."""
    styles = []
    for path in sorted(folder.glob("*/*.mma")):
        text = path.read_text(encoding="latin-1")
        meters = {int(beats) for beats in re.findall(r"(?im)^\s*time\s+(\d+)", text)}
        names = re.findall(r"(?im)^\s*defgroove\s+(\S+)", text)
        grooves = tuple(dict.fromkeys(name for name in names if not NOT_A_GROOVE.search(name)))
        if grooves and len(meters) == 1 and meters <= {3, 4, 6}:
            styles.append(Style(f"{path.parent.name}/{path.stem}", meters.pop(), grooves))
    return tuple(styles)


def choose_style(rng: np.random.Generator, styles: Sequence[Style]) -> Style:
    """Draw a style, preferring rock and pop."""
    weights = np.array([PREFERENCE if MODERN.search(style.name) else 1 for style in styles], float)
    return styles[rng.choice(len(styles), p=weights / weights.sum())]


def choose_drums(rng: np.random.Generator, styles: Sequence[Style], beats: int) -> Style | None:
    """Draw a style in this meter with a driving beat; None if there is none."""
    driving = [style for style in styles if style.beats == beats and DRIVING.search(style.name)]
    return driving[rng.integers(len(driving))] if driving else None


def drives(parts: Sequence[InstrumentPart], score: Score) -> bool:
    """Whether the drum parts have a kick and a snare in at least three bars out of four."""
    bar = score.beats * TICKS
    struck = {(start // bar, pitch) for part in parts for start, _, pitch, _ in part.notes}
    return all(
        len({number for number, pitch in struck if pitch in drum}) >= 0.75 * len(score.chords)
        for drum in (KICKS, SNARES)
    )


def play(score: Score, style: Style, grooves: Sequence[str], seed: int, folder: Path) -> list[InstrumentPart]:
    """Let MMA play a score, with one groove of the style per bar.

    Returns the parts that have notes, in MMA's order. ``seed`` is for MMA's random numbers, ``folder`` for
    temporary files. Raises :class:`KmdxError` if MMA fails.
    """
    lines = [f"RndSeed {seed}", f"Tempo {score.tempo}"]
    for bar, (chord, groove) in enumerate(zip(score.chords, grooves, strict=True)):
        if bar == 0 or groove != grooves[bar - 1]:
            lines.append(f"Groove {style.groove(groove)}")
        lines.append(f"{bar + 1} {chord.name}")
    (folder / "song.mma").write_text("\n".join(lines) + "\n")
    # Otherwise Python's hashes are random, and the order of MMA's tracks can change.
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    requirements.run(["mma", "-w", "-f", "song.mid", "song.mma"], folder, environment)
    tracks = mido.MidiFile(folder / "song.mid", clip=True).tracks
    return [part for part in map(_part, tracks) if part.notes]


def pad(score: Score, program: int, center: int) -> InstrumentPart:
    """Sustained chords, one per bar."""
    notes = []
    for bar, chord in enumerate(score.chords):
        start = bar * score.beats * TICKS
        for tone in chord.tones:
            pitch = center + (tone - center) % 12
            notes.append((start, start + score.beats * TICKS - TICKS // 8, pitch, 76))
    return InstrumentPart("Pad", 0, program, tuple(notes))


def lead(rng: np.random.Generator, score: Score, program: int) -> InstrumentPart:
    """A lead instrument that plays where the voice rests, and sometimes along with it."""
    notes = []
    sung = {step for note in score.melody for step in range(note.start, note.end)}
    pitch = int(rng.integers(64, 80))
    step = 0
    while step < len(score.chords) * score.bar:
        length = int(rng.choice((1, 2, 2, 4, 6)))
        pitch = score.in_scale(pitch, int(rng.choice((-2, -1, 1, 2))))
        pitch = pitch - 12 if pitch > 84 else pitch + 12 if pitch < 58 else pitch
        if step not in sung or rng.random() < 0.1:
            ticks = TICKS // STEPS
            notes.append((step * ticks, (step + length) * ticks - 8, pitch, int(rng.integers(70, 110))))
        step += length
    return InstrumentPart("Lead", 0, program, tuple(notes))


def transposed(part: InstrumentPart, semitones: int) -> InstrumentPart:
    """Transpose a part, leaving out pitches that MIDI does not have."""
    notes = ((start, end, pitch + semitones, velocity) for start, end, pitch, velocity in part.notes)
    return replace(part, notes=tuple(note for note in notes if 0 <= note[2] < 128))


def grooves_by_bar(rng: np.random.Generator, score: Score, style: Style) -> list[str]:
    """Draw a groove for each section of the song, and return one groove per bar."""
    chosen = {letter: style.grooves[rng.integers(len(style.grooves))] for letter in "ABC"}
    if rng.random() < 0.4:
        chosen["B"] = chosen["A"]
    return [chosen[letter] for letter in score.sections]


def midi(parts: Sequence[tuple[InstrumentPart, int, int, int]], score: Score) -> mido.MidiFile:
    """Write parts to a MIDI file: ``(part, channel, volume, pan)``.

    Channels are counted from 0; volume and pan are from 0 to 127.
    """
    events = []
    for number, (part, channel, volume, position) in enumerate(parts):
        setting = {7: volume, 10: position}
        events += [
            (0, 0, number, mido.Message("control_change", channel=channel, control=control, value=value))
            for control, value in setting.items()
        ]
        events.append((0, 0, number, mido.Message("program_change", channel=channel, program=part.program)))
        for start, end, pitch, velocity in part.notes:
            for tick, order, loudness in ((start, 2, velocity), (end, 1, 0)):
                message = mido.Message("note_on", channel=channel, note=pitch, velocity=loudness)
                events.append((tick, order, number, message))
    events.sort(key=lambda event: event[:3])

    file = mido.MidiFile(type=0, ticks_per_beat=TICKS)
    track = file.add_track()
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(score.tempo)))
    now = 0
    for tick, _, _, message in events:
        track.append(message.copy(time=tick - now))
        now = tick
    return file


def _part(track: mido.MidiTrack) -> InstrumentPart:
    """Read a track's notes; a note that is struck again before its end is cut there."""
    now, channel, program = 0, 0, 0
    sounding: dict[int, tuple[int, int]] = {}
    notes = []
    for message in track:
        now += message.time
        if message.type == "program_change":
            program = message.program
        if message.type not in ("note_on", "note_off"):
            continue
        channel = message.channel
        if message.note in sounding:
            start, velocity = sounding.pop(message.note)
            notes.append((start, max(now, start + 1), message.note, velocity))
        if message.type == "note_on" and message.velocity:
            sounding[message.note] = (now, message.velocity)
    return InstrumentPart(track.name, channel, program, tuple(sorted(notes)))
