"""Scores a song's stems from their files.

Global SDR and museval's SDR are computed while both files are read in blocks, so their memory does not grow
with a song's length. (museval's distortion filters split the error into parts without changing their sum, so
its SDR is a ratio of energies, too.) Other metrics get whole arrays: one stem at a time, or all stems if they
need them together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluator import metrics as metrics_table
from evaluator import song_warnings
from evaluator.metrics import Metric, energy_ratio
from kmdx import audio
from kmdx.audio import Form
from kmdx.errors import AudioError, KmdxError, first_line

BINS = 300  # values of an envelope
FRAME = 1.0  # seconds: length and hop of a frame, as in museval
FULL_SCALE = 32767 / 32768  # the largest sample of a 16-bit file
SIDES = ("reference", "estimate")
CLIPPED_SHARE = 1e-4
"""From this share of samples at full scale on, an estimate is reported as clipped."""


class MetricError(KmdxError):
    """A metric's function failed; the message names the metric and the stem."""


@dataclass(frozen=True)
class SongScore:
    """A song's scores; the keys of mappings are the scored stems, in order."""

    scores: dict[str, dict[str, float]]
    """Value of each metric and stem; for a metric with frames the median over frames that have a value. NaN
    if there is no value, infinite if museval's SDR is computed for a perfect estimate."""
    frames: dict[str, dict[str, list[float]]]
    """Values of each frame, for metrics that have frames."""
    silent_references: list[str]
    """Stems whose reference is digital silence."""
    envelopes: dict[str, dict[str, list[int]]]
    """``reference`` and ``estimate``: peaks of :data:`BINS` equal parts of the song, in % of full scale."""
    warnings: list[str]


def score_song(
    references: Mapping[str, Path],
    estimates: Mapping[str, Path],
    metrics: Sequence[Metric] | None = None,
    mixture: Path | None = None,
    block: float = 4.0,
) -> SongScore:
    """Score a song's stems from their files.

    Parameters
    ----------
    references, estimates : mapping of str to Path
        The true and the estimated wav or flac file of each stem. References without an estimate only count
        as possible interference.
    metrics : sequence of Metric, optional
        The metrics to compute; by default :data:`evaluator.metrics.DEFAULT`.
    mixture : Path, optional
        The song's mixture, for metrics that use it.
    block : float
        Seconds to read at a time, rounded to whole frames.

    Returns
    -------
    SongScore
        If a file is silent in a frame (its channels sum to zero throughout), no stem has a museval value in
        that frame. museval rejects a song if a whole file is silent. Here such a song has NaN in every frame,
        and a warning.

    Raises
    ------
    AudioError
        If a file cannot be read or contains NaN or infinity, or if rates, channels or lengths differ.
    MetricError
        If a metric cannot be computed.
    ValueError
        If an estimate has no reference.
    """
    if not references.keys() >= estimates.keys():
        raise ValueError(f"expected references of {sorted(estimates)}, found {sorted(references)}")
    metrics = metrics_table.choose(None) if metrics is None else metrics
    form = _same_form([*references.values(), *estimates.values()])
    tallies = {stem: _tally(references[stem], estimates[stem], form, block) for stem in estimates}
    silent = np.any([tally.silent for tally in tallies.values()], axis=(0, 1))  # (frames,)

    scores: dict[str, dict[str, float]] = {metric.name: {} for metric in metrics}
    frames: dict[str, dict[str, list[float]]] = {metric.name: {} for metric in metrics if metric.frames}
    _in_blocks(tallies, silent, metrics, scores, frames)
    _whole_stems(references, estimates, mixture, metrics, form.rate, scores)
    _whole_songs(references, estimates, metrics, form.rate, frames)
    for name, values in frames.items():
        scores[name] = {stem: median(series) for stem, series in values.items()}
    return SongScore(
        scores=scores,
        frames=frames,
        silent_references=[stem for stem, tally in tallies.items() if not tally.signal.any()],
        envelopes={
            stem: dict(zip(SIDES, _percent(tally.peaks), strict=True)) for stem, tally in tallies.items()
        },
        warnings=_warnings(tallies, silent, bool(frames)),
    )


def _warnings(tallies: Mapping[str, _Tally], silent: NDArray[np.bool_], has_frames: bool) -> list[str]:
    """Warnings about a song's files and scores."""
    found = []
    for stem, tally in tallies.items():
        reference, estimate = tally.silent
        if reference.all():
            found.append(song_warnings.SILENT_REFERENCE.of(stem=stem))
        if estimate.all():
            found.append(song_warnings.SILENT_ESTIMATE.of(stem=stem))
        elif has_frames and (count := int(np.count_nonzero(estimate & ~reference))):
            found.append(song_warnings.SILENT_FRAMES.of(stem=stem, count=count, total=len(estimate)))
        if tally.clipped >= CLIPPED_SHARE:
            found.append(song_warnings.CLIPPED.of(stem=stem, share=tally.clipped))
    if has_frames and silent.all():
        found.append(song_warnings.NO_FRAMES.of())
    return found


def _in_blocks(
    tallies: Mapping[str, _Tally],
    silent: NDArray[np.bool_],
    metrics: Sequence[Metric],
    scores: dict[str, dict[str, float]],
    frames: dict[str, dict[str, list[float]]],
) -> None:
    """Compute metrics from what was tallied while both files were read in blocks."""
    for metric in metrics:
        if metric.function is metrics_table.global_sdr:
            for stem, tally in tallies.items():
                scores[metric.name][stem] = energy_ratio(tally.signal.sum(), tally.distortion.sum())
        elif metric.name == metrics_table.BLOCKWISE:
            frames[metric.name] = {stem: _frame_sdr(tally, silent) for stem, tally in tallies.items()}


def _whole_stems(
    references: Mapping[str, Path],
    estimates: Mapping[str, Path],
    mixture: Path | None,
    metrics: Sequence[Metric],
    rate: int,
    scores: dict[str, dict[str, float]],
) -> None:
    """Compute metrics that need whole arrays of one stem."""
    chosen = [metric for metric in metrics if metric.function not in (None, metrics_table.global_sdr)]
    if not chosen:
        return
    whole = _read_whole(mixture) if mixture and any(metric.uses_mixture for metric in chosen) else None
    for stem, path in estimates.items():
        truth, guess = _read_whole(references[stem]), _read_whole(path)
        found: dict[Any, Any] = {}
        for metric in chosen:
            if whole is not None or not metric.uses_mixture:
                with _blamed([metric], [stem]):
                    scores[metric.name][stem] = metric.compute(truth, guess, whole, rate, found)


def _whole_songs(
    references: Mapping[str, Path],
    estimates: Mapping[str, Path],
    metrics: Sequence[Metric],
    rate: int,
    frames: dict[str, dict[str, list[float]]],
) -> None:
    """Compute metrics that need all stems together."""
    chosen = [metric for metric in metrics if metric.together is not None]
    if not chosen:
        return
    truths = {stem: _read_whole(path) for stem, path in references.items()}
    guesses = {stem: _read_whole(path) for stem, path in estimates.items()}
    for together in dict.fromkeys(metric.together for metric in chosen):
        assert together is not None
        group = [metric for metric in chosen if metric.together == together]
        with _blamed(group, list(estimates)):
            found = together(truths, guesses, rate)
            for metric in group:
                values = {stem: [float(value) for value in found[stem][metric.name]] for stem in estimates}
                frames[metric.name] = values


@contextmanager
def _blamed(metrics: Sequence[Metric], stems: Sequence[str]) -> Iterator[None]:
    """Turn any exception, even SystemExit, into a MetricError that names the metrics and stems."""
    try:
        yield
    except (Exception, SystemExit) as error:
        names, kind = ", ".join(metric.name for metric in metrics), type(error).__name__
        text = first_line(error)
        what = text if isinstance(error, KmdxError) or text == kind else f"{kind}: {text}"
        raise MetricError(f"{names} of {', '.join(stems)} cannot be computed: {what}") from error


def _same_form(paths: Sequence[Path]) -> Form:
    """The common form of files.

    Raises
    ------
    AudioError
        If a file cannot be read, or its form differs from the first.
    """
    first = audio.info(paths[0])
    for path in paths[1:]:
        if (form := audio.info(path)) != first:
            raise AudioError(f"{path}: {form}, but {paths[0]}: {first}")
    return first


def _read_whole(path: Path) -> NDArray[np.float32]:
    """A file as one array ``(samples, channels)``; errors as in :func:`kmdx.audio.read_together`."""
    ((samples,),) = audio.read_together([path], audio.info(path).samples)
    return samples


def median(values: Sequence[float]) -> float:
    """Median over the frames that have a value; NaN if none has."""
    present = [value for value in values if not math.isnan(value)]
    return float(np.median(present)) if present else math.nan


@dataclass(frozen=True)
class _Tally:
    """Sums and peaks from one pass over a stem's two files; axes of size 2 are (reference, estimate)."""

    signal: NDArray[np.float64]  # (frames + 1,), energy of the reference in each frame and after the last
    distortion: NDArray[np.float64]  # (frames + 1,), energy of the difference
    silent: NDArray[np.bool_]  # (2, frames)
    peaks: NDArray[np.float32]  # (2, BINS)
    clipped: float  # share of the estimate's samples


@np.errstate(over="ignore", invalid="ignore")  # reported at the end
def _tally(reference: Path, estimate: Path, form: Form, block: float) -> _Tally:
    """Read both files once."""
    frame = min(int(FRAME * form.rate), form.samples)  # a shorter song is its only frame, as in museval
    frames = form.samples // frame  # museval ignores the samples after the last whole frame
    signal, distortion = np.zeros((2, frames + 1))
    silent = np.zeros((2, frames), np.bool_)
    peaks = np.zeros((2, BINS), np.float32)
    clipped = 0

    step = max(1, round(block / FRAME)) * frame
    scratch = np.empty((min(step, form.samples), form.channels), np.float32)
    starts = np.arange(BINS) * form.samples // BINS  # the first sample of each bin
    begin = 0
    for truth, guess in audio.read_together([reference, estimate], step):
        length = len(truth)
        work = scratch[:length]
        here = slice(begin // frame, (begin + length) // frame)  # whole frames of the block
        whole = (here.stop - here.start) * frame  # samples in them
        bins = slice(np.searchsorted(starts, begin, "right") - 1, np.searchsorted(starts, begin + length))
        edges = np.maximum(starts[bins] - begin, 0) * form.channels

        for side, samples in enumerate((truth, guess)):
            np.abs(samples, out=work)
            highs = np.maximum.reduceat(work.ravel(), edges)
            peaks[side, bins] = np.maximum(peaks[side, bins], highs)  # a bin may be in two blocks
            if samples is guess and highs.max() >= FULL_SCALE:
                clipped += int(np.count_nonzero(work >= FULL_SCALE))
            silent[side, here] = [
                _is_silent(part) for part in samples[:whole].reshape(-1, frame, form.channels)
            ]

        for energies, samples in ((signal, truth), (distortion, np.subtract(truth, guess, out=guess))):
            np.square(samples, out=work)
            parts = work[:whole].reshape(-1, frame * form.channels)
            energies[here] = parts.sum(axis=1, dtype=np.float64)
            energies[here.stop] += work[whole:].sum(dtype=np.float64)
        begin += length

    for path, energies in ((reference, signal), (estimate, distortion)):
        if not np.isfinite(energies).all():
            raise AudioError(f"{path}: NaN or infinity in its samples, or samples too large to be squared")
    return _Tally(signal, distortion, silent, peaks, clipped / (form.samples * form.channels))


def _is_silent(frame: NDArray[np.float32]) -> bool:
    """Whether a frame is silent for museval: its channels sum to zero throughout."""
    # A few samples are enough to decide most frames.
    return not (frame[::97].sum(axis=1).any() or frame.sum(axis=1).any())


def _frame_sdr(tally: _Tally, silent: NDArray[np.bool_]) -> list[float]:
    """Ratios in dB: infinite if there is no difference, NaN in silent frames."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = 10 * np.log10(tally.signal[:-1] / tally.distortion[:-1])
    values: list[float] = np.where(silent, np.nan, ratios).tolist()
    return values


def _percent(peaks: NDArray[np.float32]) -> list[list[int]]:
    values: list[list[int]] = np.clip(np.rint(100 * peaks), 0, 100).astype(int).tolist()
    return values
