"""Songs from nothing: four-stem songs in MUSDB18-HQ's layout, rendered from packages by name.

``python -m recipes.mini.synthesizer OUT --songs 60``. A song is drawn as a score (:mod:`.score`); MMA plays
its accompaniment in one of its styles (:mod:`.accompaniment`), FluidSynth renders that with
General MIDI soundfonts (:mod:`.rendering`), Sinsy sings its melody and WORLD gives the singer's
register and timbre (:mod:`.voice`); effects and levels are those of a rock or pop record
(:mod:`.effects`, :mod:`.mixing`).

A song depends on the seed, its split and its number alone, so songs are made in any order and in
parallel (:mod:`.songs`). With the same versions of the packages it is the same to the byte.

References
----------
MMA, Musical MIDI Accompaniment: https://www.mellowood.ca/mma/
Sinsy, HMM-based singing voice synthesis: Oura et al. 2010; its Python binding: pysinsy.
WORLD, a vocoder: Morise, Yokomori and Ozawa 2016; its Python binding: pyworld.
"""
