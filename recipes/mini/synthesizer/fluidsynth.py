"""MIDI to sound, with FluidSynth and a soundfont."""

from __future__ import annotations

from pathlib import Path

import mido
import numpy as np

from kmdx import audio
from kmdx.challenge import RATE
from recipes.mini.synthesizer import requirements

# No MIDI input, no shell, no reverb, no chorus: effects are drawn separately for each song.
OPTIONS = f"-n -i -q -R 0 -C 0 -g 0.4 -r {RATE} -T wav -O float".split()
SETTINGS = ("synth.polyphony=512", "synth.cpu-cores=1", "synth.dynamic-sample-loading=1")


def render(midi: mido.MidiFile, font: Path, length: int, folder: Path) -> np.ndarray:
    """Render a MIDI file with a soundfont (sf2) and without effects.

    Returns float32 ``(length, 2)`` at :data:`~kmdx.challenge.RATE`, cut or padded with zeros at the end.
    ``folder`` is for temporary files. Raises :class:`KmdxError` if FluidSynth fails.
    """
    score, sound = folder / "score.mid", folder / "sound.wav"
    midi.save(score)
    settings = [word for setting in SETTINGS for word in ("-o", setting)]
    requirements.run(["fluidsynth", *OPTIONS, *settings, "-F", sound.name, str(font), score.name], folder)
    samples = audio.read(sound).samples[:length]
    return np.pad(samples, ((0, length - len(samples)), (0, 0)))
