"""The table of metrics: how close an estimate comes to the true stem, by many measures.

An entry of :data:`METRICS` is all that a metric needs to be computed and shown everywhere. Samples are
float32 ``(samples, channels)`` at full scale ±1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kmdx.errors import KmdxError, shown, suggest

DELTA = 1e-7
"""Added to both energies of global SDR, so that silence has a ratio."""

Samples = NDArray[np.float32]
Frames = dict[str, dict[str, list[float]]]
"""Values of frames by metric and stem."""


@dataclass(frozen=True)
class Metric:
    """A measure of a stem.

    Attributes
    ----------
    name : str
        What options, files and columns call it.
    title : str
        What people call it.
    unit : str
        ``dB``, or empty for a pure number.
    higher_is_better : bool
    function : callable, optional
        The value of ``(reference, estimate)``, or of ``(reference, estimate, rate)`` where ``uses_rate`` is
        set.
    uses_rate : bool
    together : callable, optional
        Instead of ``function``, for a metric that needs all stems of a song:
        ``(references, estimates, rate)``, both arrays by stem, to its values of frames by name and stem.
        Metrics with the same callable share one call. A metric with neither is found while files are read
        in blocks, see :mod:`evaluator.scoring`.
    frames : bool
        Whether it has a value for each second, of which a song's value is the median.
    over_songs : str
        The statistic over songs that people quote, and that a comparison decides by.
    source : str
        Where it is defined.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    function: Callable[..., float] | None = None
    uses_rate: bool = False
    together: Callable[..., Frames] | None = None
    frames: bool = False
    over_songs: Literal["mean", "median"] = "mean"
    source: str = ""

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def compute(self, reference: Samples, estimate: Samples, rate: int) -> float:
        """The value of one stem, from arrays ``(samples, channels)`` at ``rate`` Hz."""
        assert self.function is not None
        return float(self.function(reference, estimate, *([rate] if self.uses_rate else [])))


def global_sdr(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Global signal-to-distortion ratio in dB.

    Parameters
    ----------
    reference, estimate : array_like
        ``(samples, channels)``, full scale ±1; taken as float32, summed in float64.

    Raises
    ------
    ValueError
        If their shapes differ.

    References
    ----------
    Fabbro et al. 2023, "The Sound Demixing Challenge 2023: Music Demixing Track", arXiv 2308.06979.
    """
    truth = np.asarray(reference, np.float32)
    guess = np.asarray(estimate, np.float32)
    if truth.shape != guess.shape:
        raise ValueError(f"reference {truth.shape} and estimate {guess.shape} differ in shape")
    signal = np.sum(np.square(truth), dtype=np.float64)
    distortion = np.sum(np.square(truth - guess), dtype=np.float64)
    return energy_ratio(signal, distortion)


def energy_ratio(signal: float, distortion: float) -> float:
    """Global SDR in dB of two energies."""
    return float(10 * np.log10((signal + DELTA) / (distortion + DELTA)))


MUSEVAL = "BSSEval v4 as in museval: Stöter, Liutkus and Ito 2018, arXiv 1804.06267"

METRICS = {
    metric.name: metric
    for metric in (
        Metric("global_sdr", "global SDR", "dB", True, global_sdr, source="Fabbro et al. 2023"),
        Metric("museval_sdr", "museval SDR", "dB", True, frames=True, over_songs="median", source=MUSEVAL),
    )
}
"""Every metric, by name, in the order in which they are shown."""

DEFAULT = ("global_sdr", "museval_sdr")
"""What is computed if nothing else is asked for: cheap, and what people publish."""


def choose(text: str | None) -> tuple[Metric, ...]:
    """The metrics that an option names: names with commas between them, or ``all``.

    Raises
    ------
    KmdxError
        If one is unknown.
    """
    if text is None:
        return tuple(METRICS[name] for name in DEFAULT)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(METRICS.values())
    for name in names:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise KmdxError(f"unknown metric {shown(name)}; available: {known}, all{suggest(name, METRICS)}")
    if not names:
        raise KmdxError(f"--metrics names no metric; available: {', '.join(METRICS)}, or all")
    return tuple(METRICS[name] for name in dict.fromkeys(names))


def named(names: Iterable[str]) -> list[Metric]:
    """The metrics of a run, those that this version does not know under their plain names."""
    return [METRICS.get(name) or Metric(name, name, "", True) for name in names]


def show(metric: Metric, value: Any, digits: int = 3) -> str:
    """A value as text, with a true minus; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
