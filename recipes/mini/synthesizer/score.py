"""Composes a song at random: tempo, key, chords and melody.

Conventions
-----------
Time is counted in steps of a sixteenth note, :data:`STEPS` per beat, from the start of the song. Pitches
are MIDI note numbers: 60 is middle C, 69 is A at 440 Hz. Pitch classes are 0 for C to 11 for B.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 4  # per beat
SECTION = 4  # bars
PHRASE = 2  # bars that are sung in one breath, before a rest

NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}

# A section's four chords: semitones above the tonic, and the chord's quality.
PROGRESSIONS = {
    "major": (
        ((0, ""), (7, ""), (9, "m"), (5, "")),
        ((0, ""), (9, "m"), (5, ""), (7, "")),
        ((9, "m"), (5, ""), (0, ""), (7, "")),
        ((0, ""), (5, ""), (7, ""), (5, "")),
        ((0, ""), (0, ""), (5, ""), (7, "")),
        ((5, ""), (7, ""), (4, "m"), (9, "m")),
        ((2, "m"), (7, ""), (0, ""), (9, "m")),
        ((0, ""), (10, ""), (5, ""), (0, "")),
        ((0, ""), (4, "m"), (5, ""), (5, "m")),
        ((5, ""), (0, ""), (7, ""), (9, "m")),
    ),
    "minor": (
        ((0, "m"), (8, ""), (3, ""), (10, "")),
        ((0, "m"), (10, ""), (8, ""), (10, "")),
        ((0, "m"), (10, ""), (8, ""), (7, "")),
        ((0, "m"), (5, "m"), (0, "m"), (7, "")),
        ((0, "m"), (3, ""), (10, ""), (5, "")),
        ((8, ""), (10, ""), (0, "m"), (0, "m")),
        ((0, "m"), (0, "m"), (5, "m"), (10, "")),
        ((5, "m"), (0, "m"), (8, ""), (10, "")),
    ),
}
FORMS = ("AABB", "ABAB", "AAAB", "ABBB", "AABA", "ABAC")

TONES = {"": (0, 4, 7), "m": (0, 3, 7), "7": (0, 4, 7, 10), "m7": (0, 3, 7, 10), "M7": (0, 4, 7, 11)}

SYLLABLES = tuple(
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわ"
    "がぎぐげござじずぜぞだでどばびぶべぼぱぴぷぺぽ"
)
# Lengths of a sung note in steps, and their probabilities in slow and in fast songs.
LENGTHS = (1, 2, 3, 4, 6, 8)
SLOW, FAST = np.array((0.1, 0.45, 0.1, 0.25, 0.05, 0.05)), np.array((0.0, 0.15, 0.1, 0.45, 0.15, 0.15))
SLOW_TEMPO, FAST_TEMPO = 70, 160  # beats per minute


@dataclass(frozen=True)
class Chord:
    """A chord of one bar: the pitch class of its root, and a quality in :data:`TONES`."""

    root: int
    quality: str

    @property
    def name(self) -> str:
        """In MMA's notation, such as ``F#m7``."""
        return NAMES[self.root] + self.quality

    @property
    def tones(self) -> tuple[int, ...]:
        """Pitch classes, the root first."""
        return tuple((self.root + tone) % 12 for tone in TONES[self.quality])


@dataclass(frozen=True)
class Note:
    """A sung note: `start` and `length` in steps, a MIDI pitch and a syllable in kana."""

    start: int
    length: int
    pitch: int
    syllable: str

    @property
    def end(self) -> int:
        """The first step after the note."""
        return self.start + self.length


@dataclass(frozen=True)
class Score:
    """A composed song."""

    tempo: int  # beats per minute
    beats: int  # beats per bar
    key: int  # pitch class of the tonic
    mode: str  # ``major`` or ``minor``
    sections: tuple[str, ...]  # the section's letter for each bar
    chords: tuple[Chord, ...]  # one per bar
    melody: tuple[Note, ...]  # in order; notes neither overlap nor cross a bar line

    @property
    def seconds(self) -> float:
        """Length of all bars."""
        return len(self.chords) * self.beats * 60 / self.tempo

    @property
    def step(self) -> float:
        """Length of a step in seconds."""
        return 60 / self.tempo / STEPS

    @property
    def bar(self) -> int:
        """Steps per bar."""
        return self.beats * STEPS

    def in_scale(self, pitch: int, degrees: int) -> int:
        """The pitch `degrees` scale degrees above (or below) the scale's pitch nearest to this one."""
        pitches = [octave + self.key + tone for octave in range(0, 132, 12) for tone in SCALES[self.mode]]
        return pitches[int(np.argmin(np.abs(np.array(pitches) - pitch))) + degrees]


def compose(rng: np.random.Generator, *, tempo: int, beats: int, seconds: float, center: int) -> Score:
    """Compose a song of about ``seconds``, rounded to whole bars, with at least two phrases.

    ``tempo`` is in beats per minute, ``beats`` per bar. The melody moves around the pitch ``center``.
    """
    count = max(round(seconds * tempo / 60 / beats), 2 * PHRASE)
    mode = "major" if rng.random() < 0.55 else "minor"
    key = int(rng.integers(12))
    form = FORMS[rng.integers(len(FORMS))]
    sections = tuple(form[bar // SECTION % len(form)] for bar in range(count))
    sevenths = rng.random() < 0.3
    harmony = {letter: _progression(rng, key, mode, sevenths) for letter in "ABC"}
    chords = tuple(harmony[letter][bar % SECTION] for bar, letter in enumerate(sections))
    paper = Score(tempo, beats, key, mode, sections, chords, ())

    # A repeated section repeats its melody and words, like a chorus.
    sung = {
        letter: _sing(rng, paper, harmony[letter], center + lift)
        for letter, lift in zip("ABC", (0, 3, 1), strict=True)
    }
    intro = int(rng.integers(1, 3))  # bars without melody; Sinsy warns if a melody starts at once
    melody = tuple(
        Note(note.start + bar * paper.bar, note.length, note.pitch, note.syllable)
        for bar, letter in enumerate(sections)
        if bar >= intro
        for note in sung[letter][bar % SECTION]
    )
    return Score(tempo, beats, key, mode, sections, chords, melody)


def _progression(rng: np.random.Generator, key: int, mode: str, sevenths: bool) -> tuple[Chord, ...]:
    """Draw the chords of a section."""
    choices = PROGRESSIONS[mode]
    chords = []
    for interval, quality in choices[rng.integers(len(choices))]:
        if sevenths:
            dominant = interval in (7, 10) or (mode == "major" and interval == 2)
            quality = {"m": "m7", "": "7" if dominant else "M7"}[quality]
        chords.append(Chord((key + interval) % 12, quality))
    return tuple(chords)


def _sing(rng: np.random.Generator, score: Score, chords: tuple[Chord, ...], center: int) -> list[list[Note]]:
    """Draw a section's melody: the notes of each bar, counted from the bar's first step."""
    pace = np.clip((score.tempo - SLOW_TEMPO) / (FAST_TEMPO - SLOW_TEMPO), 0, 1)
    likely = SLOW + pace * (FAST - SLOW)
    bars: list[list[Note]] = [[] for _ in chords]
    pitch = center
    for first in range(0, len(chords), PHRASE):
        end = PHRASE * score.bar - int(rng.integers(2, score.bar // 2 + 1))  # the singer breathes after it
        step = int(rng.choice((0, 0, 2, 4)))
        while step < end:
            bar, within = divmod(step, score.bar)
            length = min(int(rng.choice(LENGTHS, p=likely)), score.bar - within, end - step)
            chord = chords[first + bar]
            pitch = _next_pitch(rng, score, chord, pitch, center, strong=within % (2 * STEPS) == 0)
            syllable = SYLLABLES[rng.integers(len(SYLLABLES))]
            bars[first + bar].append(Note(within, length, pitch, syllable))
            step += length
    return bars


def _next_pitch(
    rng: np.random.Generator, score: Score, chord: Chord, pitch: int, center: int, *, strong: bool
) -> int:
    """Move by a step or a leap, pulled back to the center; on a strong beat, to a chord tone."""
    drawn = score.in_scale(
        pitch, int(rng.choice((-3, -2, -1, 0, 1, 2, 3), p=(0.05, 0.12, 0.23, 0.2, 0.23, 0.12, 0.05)))
    )
    if abs(drawn - center) > 7:
        drawn = score.in_scale(drawn, -2 if drawn > center else 2)
    if not strong:
        return drawn
    return min(
        (note for note in range(drawn - 6, drawn + 7) if note % 12 in chord.tones),
        key=lambda note: abs(note - drawn),
    )
