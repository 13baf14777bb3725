"""The table of metrics, which measure how close an estimate is to the true stem.

One entry in :data:`METRICS` is all that is needed to compute and show a metric everywhere. Samples are
float32 ``(samples, channels)`` with full scale ±1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kmdx.errors import KmdxError, shown, suggest

DELTA = 1e-7
"""Added to both energies of global SDR, so that silence has a finite value."""

Samples = NDArray[np.float32]
Frames = dict[str, dict[str, list[float]]]
"""Values of each frame, by stem and metric."""

BLOCKWISE = "museval_sdr"
"""The metric that is computed while files are read in blocks, see :mod:`evaluator.scoring`."""


@dataclass(frozen=True)
class Metric:
    """A measure of a stem.

    Attributes
    ----------
    name : str
        Name in options, files and columns.
    title : str
        Name for readers.
    unit : str
        ``dB``, ``%``, or empty for a plain number.
    higher_is_better : bool
    function : callable, optional
        Computes the value from ``(reference, estimate)``, followed by the mixture if ``uses_mixture`` is set,
        and by the rate in Hz if ``uses_rate`` is set. A function that computes several metrics at once
        returns their values by name. Metrics with the same function share one call.
    uses_mixture, uses_rate : bool
    together : callable, optional
        Used instead of ``function`` for a metric that needs all stems of a song. Called with
        ``(references, estimates, rate)``, where both are arrays by stem; returns the values of frames by stem
        and name. Metrics with the same callable share one call. Only :data:`BLOCKWISE` has neither.
    frames : bool
        Whether it has a value for each second. A song's value is then the median of these.
    over_songs : str
        The statistic over songs that is usually quoted; comparisons test this statistic.
    source : str
        Reference for its definition.
    checked : str
        The independent implementation with which its values agree.

    Raises
    ------
    ValueError
        If its attributes contradict each other.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    function: Callable[..., float | Mapping[str, float]] | None = None
    uses_mixture: bool = False
    uses_rate: bool = False
    together: Callable[..., Frames] | None = None
    frames: bool = False
    over_songs: Literal["mean", "median"] = "mean"
    source: str = ""
    checked: str = ""

    def __post_init__(self) -> None:
        sources = [self.function is not None, self.together is not None, self.name == BLOCKWISE]
        if sources.count(True) != 1:
            raise ValueError(f"metric {self.name!r}: expected either function or together")
        if self.frames == (self.function is not None):
            raise ValueError(f"metric {self.name!r}: expected frames if and only if it has together")
        if self.function is None and (self.uses_mixture or self.uses_rate):
            raise ValueError(f"metric {self.name!r}: uses_mixture and uses_rate need function")
        if self.over_songs not in ("mean", "median"):
            raise ValueError(f"metric {self.name!r}: over_songs {self.over_songs!r}; expected mean or median")

    @property
    def label(self) -> str:
        """The title and the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def compute(
        self,
        reference: Samples,
        estimate: Samples,
        mixture: Samples | None,
        rate: int,
        found: dict[Any, Any] | None = None,
    ) -> float:
        """The value of one stem, from arrays ``(samples, channels)`` at ``rate`` Hz.

        ``found`` caches the results of functions for this stem, for metrics that share a function.
        """
        assert self.function is not None
        found = {} if found is None else found
        if self.function not in found:
            more = [*([mixture] if self.uses_mixture else []), *([rate] if self.uses_rate else [])]
            found[self.function] = self.function(reference, estimate, *more)
        value = found[self.function]
        return float(value[self.name] if isinstance(value, Mapping) else value)


@dataclass(frozen=True)
class LazyFunction:
    """A function whose module is imported at its first call, because some modules import torch."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> Any:
        return getattr(importlib.import_module(f"evaluator.measures.{self.module}"), self.name)(*arguments)


def global_sdr(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Global signal-to-distortion ratio in dB.

    Parameters
    ----------
    reference, estimate : array_like
        ``(samples, channels)``, full scale ±1; converted to float32, summed in float64.

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


MUSEVAL = "BSSEval v4: Stöter, Liutkus and Ito 2018, arXiv 1804.06267"
MSST = "Solovyev's Music-Source-Separation-Training, utils/metrics.py"
BSSEVAL = LazyFunction("bsseval", "bsseval")

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "global_sdr", "global SDR", "dB", True, global_sdr,
            source="Fabbro et al. 2023, arXiv 2308.06979", checked="the formula in integer arithmetic",
        ),
        Metric(
            BLOCKWISE, "museval SDR", "dB", True, frames=True, over_songs="median",
            source=MUSEVAL, checked="museval 0.4.1, each frame",
        ),
        *(
            Metric(
                f"museval_{ratio.lower()}", f"museval {ratio}", "dB", True, together=BSSEVAL, frames=True,
                over_songs="median", source=MUSEVAL, checked="museval 0.4.1, each frame",
            )
            for ratio in ("ISR", "SIR", "SAR")
        ),
        Metric(
            "si_sdr", "SI-SDR", "dB", True, LazyFunction("waveform", "si_sdr"),
            source="Le Roux et al. 2019, arXiv 1811.02508", checked="torchmetrics 1.9.0, MSST",
        ),
        Metric(
            "log_wmse", "log-WMSE", "", True, LazyFunction("waveform", "log_wmse"),
            uses_mixture=True, uses_rate=True,
            source="Jordal 2023, log-wmse-audio-quality", checked="torch-log-wmse 0.3.1",
        ),
        Metric(
            "l1_freq", "L1 frequency", "%", True, LazyFunction("spectral", "l1_freq"),
            source=MSST, checked="MSST's code",
        ),
        Metric(
            "aura_stft", "aura STFT", "%", True, LazyFunction("spectral", "aura_stft"),
            source=MSST, checked="auraloss 0.4.0",
        ),
        Metric(
            "aura_mrstft", "aura MR-STFT", "%", True, LazyFunction("spectral", "aura_mrstft"), uses_rate=True,
            source=MSST, checked="auraloss 0.4.0 with librosa 0.11.0",
        ),
        *(
            Metric(
                name, name, "%", True, LazyFunction("spectral", "bleedless_and_fullness"), uses_rate=True,
                source=MSST, checked="MSST's code with librosa 0.11.0",
            )
            for name in ("bleedless", "fullness")
        ),
    )
}  # fmt: skip
"""All metrics by name, in the order in which they are shown."""

DEFAULT = ("global_sdr", "museval_sdr")
"""The metrics that are computed by default: they are fast and usually published."""


def choose(text: str | None) -> tuple[Metric, ...]:
    """The metrics that an option names: comma-separated names, or ``all``.

    Raises
    ------
    KmdxError
        If a name is unknown, or there is none.
    """
    if text is None:
        return tuple(METRICS[name] for name in DEFAULT)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(METRICS.values())
    for name in names:
        if name not in METRICS:
            known = ", ".join(METRICS)
            hint = suggest(name, (*METRICS, "all"))
            raise KmdxError(f"unknown metric {shown(name)}{hint}; available: {known}, all")
    if not names:
        raise KmdxError(f"--metrics is empty; available: {', '.join(METRICS)}, all")
    return tuple(METRICS[name] for name in dict.fromkeys(names))


def named(names: Iterable[str]) -> list[Metric]:
    """The metrics with these names.

    One that this version does not know has its name as title, and cannot be computed.
    """
    return [METRICS.get(name) or Metric(name, name, "", True, _unknown) for name in names]


def _unknown(*_: Any) -> float:
    raise KmdxError("it is not in the table METRICS of evaluator/metrics.py")


def show(metric: Metric, value: Any, digits: int = 3) -> str:
    """A value as text, with a true minus sign; a dash if there is no value."""
    return signed(value, digits).removeprefix("+")


def signed(value: float | None, digits: int = 3) -> str:
    """A difference as text, with a plus or a true minus sign; a dash if there is no value."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # adding 0 removes the sign of -0.0
    return f"{rounded:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
