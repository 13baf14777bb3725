"""MIDI to sound, with FluidSynth and a soundfont."""

from __future__ import annotations

from pathlib import Path

import mido
import numpy as np

from kmdx import audio
from kmdx.challenge import RATE
from recipes.mini.synthesizer import requirements


def render(midi: mido.MidiFile, font: Path, length: int, folder: Path) -> np.ndarray:
    """The sound of a MIDI file, dry.

    Parameters
    ----------
    midi : MidiFile
    font : Path
        A soundfont, sf2.
    length : int
        Samples to return; the end is padded with zeros or cut.
    folder : Path
        For files that are needed on the way.

    Returns
    -------
    ndarray
        float32 ``(length, 2)`` at :data:`~kmdx.challenge.RATE`.

    Raises
    ------
    KmdxError
        If FluidSynth fails.
    """
    score, sound = folder / "score.mid", folder / "sound.wav"
    midi.save(score)
    # Its own reverb and chorus are off: effects are drawn for each song. No sound card, no shell.
    options = [
        "-n",
        "-i",
        "-q",
        "-R",
        "0",
        "-C",
        "0",
        "-g",
        "0.4",
        "-r",
        str(RATE),
        "-T",
        "wav",
        "-O",
        "float",
    ]
    options += [
        "-o",
        "synth.polyphony=512",
        "-o",
        "synth.cpu-cores=1",
        "-o",
        "synth.dynamic-sample-loading=1",
    ]
    requirements.run(["fluidsynth", *options, "-F", sound.name, str(font), score.name], folder)
    samples = audio.read(sound).samples[:length]
    return np.pad(samples, ((0, length - len(samples)), (0, 0)))
