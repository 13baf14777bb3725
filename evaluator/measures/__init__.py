"""Measures of a separated stem as functions of arrays, each with its formula and source.

:mod:`~evaluator.measures.bsseval` has the ratios that need all stems of a song,
:mod:`~evaluator.measures.waveform` SI-SDR and log-WMSE, :mod:`~evaluator.measures.spectral` the measures of
magnitude spectra. :data:`FACTS` describes them all. This module imports none of them, and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What to know about a measure."""

    title: str
    unit: str
    typical: tuple[float, float]
    """A rough guide, not measured: values of a poor and of a good separator."""
    seconds: float
    """CPU time per minute of one stereo stem at 44.1 kHz on one core; bleedless and fullness together,
    and the BSSEval ratios of one stem of four together."""
    checked: str
    """The independent source, and the largest difference on excerpts of four songs. MUSDB: of the two of
    them whose stems are neither almost silent nor nearly dependent on each other."""
    higher_is_better: bool = True


FACTS = {
    "museval_isr": Facts("museval ISR", "dB", (5, 20), 2.7, "museval 0.4.1: 2e-7 dB per frame (MUSDB)"),
    "museval_sir": Facts("museval SIR", "dB", (5, 25), 2.7, "museval 0.4.1: 2e-8 dB per frame (MUSDB)"),
    "museval_sar": Facts("museval SAR", "dB", (3, 12), 2.7, "museval 0.4.1: 7e-7 dB per frame (MUSDB)"),
    "si_sdr": Facts(
        "SI-SDR",
        "dB",
        (0, 12),
        0.05,
        "torchmetrics 1.9.0: 3e-7 dB; MSST, which sums in float32: 9e-6 dB (MUSDB)",
    ),
    "log_wmse": Facts("log-WMSE", "", (5, 30), 0.5, "torch-log-wmse 0.3.1: 2e-6"),
    "l1_freq": Facts("L1 frequency", "%", (20, 60), 0.8, "MSST on torch 2.13.0: 3e-6"),
    "aura_stft": Facts("aura STFT", "%", (3, 15), 1.0, "auraloss 0.4.0: 1e-4"),
    "aura_mrstft": Facts("aura MR-STFT", "%", (5, 25), 5.3, "auraloss 0.4.0 with librosa 0.11.0: 4e-5"),
    "bleedless": Facts(
        "bleedless", "%", (10, 50), 2.2, "MSST with librosa 0.11.0 and torchaudio 2.11.0: 2e-4"
    ),
    "fullness": Facts("fullness", "%", (10, 40), 2.2, "MSST with librosa 0.11.0 and torchaudio 2.11.0: 3e-3"),
}
"""Facts of every measure of this package. The times were measured on 2026-11-27 on a loaded machine of two
cores."""
