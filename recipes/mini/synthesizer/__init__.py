"""Composes and renders four-stem songs in MUSDB18-HQ's layout.

``python -m recipes.mini.synthesizer OUT --songs 60``. A song is drawn as a score (:mod:`.score`). MMA
plays the accompaniment in one of its styles (:mod:`.accompaniment`) and FluidSynth renders it with General
MIDI soundfonts (:mod:`.fluidsynth`). Sinsy sings the melody, and WORLD sets the singer's register and
timbre (:mod:`.voice`). Effects and levels follow those of rock and pop records (:mod:`.effects`,
:mod:`.mixing`).

A song depends only on the seed, its split and its number, so songs can be made in any order and in
parallel (:mod:`.song_set`). With the same package versions, the same seed gives the same bytes.

References
----------
MMA, Musical MIDI Accompaniment: https://www.mellowood.ca/mma/
Sinsy, HMM-based singing voice synthesis: Oura et al. 2010; Python binding: pysinsy.
WORLD, a vocoder: Morise, Yokomori and Ozawa 2016; Python binding: pyworld.
"""
