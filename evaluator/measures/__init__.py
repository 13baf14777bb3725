"""Measures of a separated stem: functions of arrays, each with its formula and source.

:mod:`~evaluator.measures.bsseval` contains the ratios that need all stems of a song,
:mod:`~evaluator.measures.waveform` SI-SDR and log-WMSE, and :mod:`~evaluator.measures.spectral` measures of
magnitude spectra. :data:`evaluator.metrics.METRICS` lists them all. This module imports none of them, so it
does not import torch.
"""
