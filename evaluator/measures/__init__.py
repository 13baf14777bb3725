"""Measures of a separated stem as functions of arrays, each with its formula and source.

:mod:`~evaluator.measures.bsseval` has the ratios that need all stems of a song,
:mod:`~evaluator.measures.waveform` SI-SDR and log-WMSE, :mod:`~evaluator.measures.spectral` the measures of
magnitude spectra. :data:`evaluator.metrics.METRICS` lists them all. This module imports none of them, and no
torch.
"""
