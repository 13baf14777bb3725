"""How close an estimate comes to the true stem.

Conventions
-----------
Samples are float32 ``(samples, channels)`` at full scale ±1, their energies are summed in float64.
Files are read in blocks, so that the memory needed does not grow with a song's length.

Metrics
-------
global SDR
    The challenge's measure: one ratio of energies over all samples and both channels of a song.
museval SDR
    SDR of BSSEval v4 in frames of 1 s, as the package museval gives it. Its distortion filters split
    the error into parts and leave the sum of the parts alone, so this too is a ratio of energies, of
    which a song's is the median over frames.

References
----------
Fabbro et al. 2023, "The Sound Demixing Challenge 2023: Music Demixing Track", arXiv 2308.06979.
Stöter, Liutkus and Ito 2018, "The 2018 Signal Separation Evaluation Campaign", arXiv 1804.06267.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import ArrayLike, NDArray

from kmdx import decoding
from kmdx.errors import AudioError

DELTA = 1e-7
"""Added to both energies of global SDR, so that silence has a ratio."""

FRAME = 1.0  # seconds: museval's window, and its hop
BINS = 300  # of an envelope
FULL_SCALE = 32767 / 32768  # the largest sample of a 16-bit file
SIDES = ("reference", "estimate")
CLIPPED_SHARE = 1e-4  # of an estimate's samples at full scale, from which on it is told


@dataclass(frozen=True)
class SongScore:
    """A song's scores: mappings have the stems that were scored, in their order."""

    global_sdr: dict[str, float]
    """dB."""
    museval_frames: dict[str, list[float]]
    """dB of each frame: NaN where museval has none, infinite where the estimate is perfect."""
    silent_references: list[str]
    """Stems whose reference is digital silence."""
    envelopes: dict[str, dict[str, list[int]]]
    """``reference`` and ``estimate``: peaks of :data:`BINS` equal parts of the song, in % of full scale."""
    warnings: list[str]

    @property
    def museval_sdr(self) -> dict[str, float]:
        """Median over the frames that have a value, in dB; NaN where none has."""
        return {stem: _median(frames) for stem, frames in self.museval_frames.items()}


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
    """
    truth = np.asarray(reference, np.float32)
    guess = np.asarray(estimate, np.float32)
    if truth.shape != guess.shape:
        raise ValueError(f"reference {truth.shape} and estimate {guess.shape} differ in shape")
    signal = np.sum(np.square(truth), dtype=np.float64)
    distortion = np.sum(np.square(truth - guess), dtype=np.float64)
    return _global_sdr(signal, distortion)


def score_song(
    references: Mapping[str, Path], estimates: Mapping[str, Path], block: float = 4.0
) -> SongScore:
    """Score a song's stems from their files.

    Parameters
    ----------
    references, estimates : mapping of str to Path
        The true and the estimated file of each stem: wav or flac.
    block : float
        Seconds to read at a time; whole frames are read.

    Returns
    -------
    SongScore
        Where one file is silent in a frame (its channels add up to zero throughout), museval gives no
        stem a value there; of a song with a wholly silent file it refuses to give any. Here that is
        NaN in every frame, and a warning.

    Raises
    ------
    AudioError
        If a file cannot be read or holds NaN or infinity, or if rates, channels or lengths differ.
    ValueError
        If the two mappings have other stems.
    """
    if references.keys() != estimates.keys():
        raise ValueError(f"references of {sorted(references)} and estimates of {sorted(estimates)}")
    form = same_form([*references.values(), *estimates.values()])

    tallies = {stem: _tally(references[stem], estimates[stem], form, block) for stem in references}
    silent = np.any([tally.silent for tally in tallies.values()], axis=(0, 1))  # (frames,)
    warnings = []
    for stem, tally in tallies.items():
        for what, frames in zip(SIDES, tally.silent, strict=True):
            if frames.all():
                warnings.append(f"{stem}: the {what} is silent in every frame")
        if tally.clipped >= CLIPPED_SHARE:
            warnings.append(
                f"{stem}: {tally.clipped:.2%} of the estimate's samples are at full scale (clipped)"
            )
    if silent.all():
        warnings.append("museval has no SDR for any stem: in every frame one of the files is silent")
    return SongScore(
        global_sdr={
            stem: _global_sdr(tally.signal.sum(), tally.distortion.sum()) for stem, tally in tallies.items()
        },
        museval_frames={stem: _frame_sdr(tally, silent) for stem, tally in tallies.items()},
        silent_references=[stem for stem, tally in tallies.items() if not tally.signal.any()],
        envelopes={
            stem: dict(zip(SIDES, _percent(tally.peaks), strict=True)) for stem, tally in tallies.items()
        },
        warnings=warnings,
    )


@dataclass(frozen=True)
class Form:
    """What files must have in common to be compared."""

    samples: int
    rate: int  # Hz
    channels: int

    def __str__(self) -> str:
        return f"{self.samples} samples of {self.channels} channels at {self.rate} Hz"

    @property
    def frame(self) -> int:
        """Samples of a frame: a song shorter than one is its only frame, as in museval."""
        return min(int(FRAME * self.rate), self.samples)

    @property
    def frames(self) -> int:
        """Whole frames; museval leaves out what follows the last."""
        return self.samples // self.frame


def form_of(path: Path) -> Form:
    """Read the form of a sound file from its header.

    Raises
    ------
    AudioError
        If it cannot be read or holds no samples.
    """
    with _open(path) as sound:
        if sound.frames < 1:
            raise AudioError(f"{path}: no samples in it")
        return Form(sound.frames, sound.samplerate, sound.channels)


def same_form(paths: Sequence[Path]) -> Form:
    """Read the form that files have in common.

    Raises
    ------
    AudioError
        If one cannot be read, or differs from the first.
    """
    first = form_of(paths[0])
    for path in paths[1:]:
        if (form := form_of(path)) != first:
            raise AudioError(f"{path}: {form}, but {paths[0]}: {first}")
    return first


def read_together(paths: Sequence[Path], block: int) -> Iterator[list[NDArray[np.float32]]]:
    """Read files of one form side by side, ``block`` samples at a time.

    Each array ``(samples, channels)`` is overwritten by the next block.

    Raises
    ------
    AudioError
        If a file cannot be read, or ends before its header says.
    """
    with ExitStack() as stack:
        sounds = [stack.enter_context(_open(path)) for path in paths]
        buffers = [np.empty((min(block, sound.frames), sound.channels), np.float32) for sound in sounds]
        for begin in range(0, sounds[0].frames, block):
            expected = min(block, sounds[0].frames - begin)
            parts = []
            for path, sound, buffer in zip(paths, sounds, buffers, strict=True):
                try:
                    parts.append(sound.read(out=buffer[:expected]))
                except sf.SoundFileError as error:
                    raise AudioError(f"{path}: damaged after sample {begin}: {error}") from error
                if len(parts[-1]) < expected:
                    raise AudioError(f"{path}: ends after {begin + len(parts[-1])} of {sound.frames} samples")
            yield parts


def _open(path: Path) -> sf.SoundFile:
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    try:
        decoding.check_whole(path)
        return sf.SoundFile(path)
    except (OSError, sf.SoundFileError) as error:
        raise AudioError(f"{path}: cannot be read: {error}") from error
    except UnicodeEncodeError as error:
        raise AudioError(f"{path}: expected a name in UTF-8: rename it") from error


@dataclass(frozen=True)
class _Tally:
    """What one pass over a stem's two files adds up to; pairs are (reference, estimate)."""

    signal: NDArray[np.float64]  # (frames + 1,), energy of the reference in each frame and after the last
    distortion: NDArray[np.float64]  # (frames + 1,), energy of the difference
    silent: NDArray[np.bool_]  # (2, frames)
    peaks: NDArray[np.float32]  # (2, BINS)
    clipped: float  # share of the estimate's samples


def _tally(reference: Path, estimate: Path, form: Form, block: float) -> _Tally:
    """Read both files once."""
    frame, frames = form.frame, form.frames
    signal, distortion = np.zeros((2, frames + 1))
    silent = np.zeros((2, frames), np.bool_)
    peaks = np.zeros((2, BINS), np.float32)
    clipped = 0

    step = max(1, round(block / FRAME)) * frame
    scratch = np.empty((min(step, form.samples), form.channels), np.float32)
    starts = np.arange(BINS) * form.samples // BINS  # the first sample of each bin
    begin = 0
    for truth, guess in read_together([reference, estimate], step):
        length = len(truth)
        work = scratch[:length]
        here = slice(begin // frame, (begin + length) // frame)  # frames; the song's rest is in none
        whole = (here.stop - here.start) * frame  # samples in them
        bins = slice(np.searchsorted(starts, begin, "right") - 1, np.searchsorted(starts, begin + length))
        edges = np.maximum(starts[bins] - begin, 0) * form.channels

        for side, samples in enumerate((truth, guess)):
            np.abs(samples, out=work)
            highs = np.maximum.reduceat(work.ravel(), edges)
            peaks[side, bins] = np.maximum(peaks[side, bins], highs)  # a bin may lie in two blocks
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
            raise AudioError(f"{path}: NaN or infinity in it")
    return _Tally(signal, distortion, silent, peaks, clipped / (form.samples * form.channels))


def _is_silent(frame: NDArray[np.float32]) -> bool:
    """Whether museval calls it silent: channels add up to zero throughout. A look at a few settles most."""
    return not (frame[::97].sum(axis=1).any() or frame.sum(axis=1).any())


def _global_sdr(signal: float, distortion: float) -> float:
    return float(10 * np.log10((signal + DELTA) / (distortion + DELTA)))


def _frame_sdr(tally: _Tally, silent: NDArray[np.bool_]) -> list[float]:
    """Ratios in dB, infinite where nothing differs; NaN in silent frames."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = 10 * np.log10(tally.signal[:-1] / tally.distortion[:-1])
    values: list[float] = np.where(silent, np.nan, ratios).tolist()
    return values


def _median(frames: Sequence[float]) -> float:
    present = [value for value in frames if not math.isnan(value)]
    return float(np.median(present)) if present else math.nan


def _percent(peaks: NDArray[np.float32]) -> list[list[int]]:
    values: list[list[int]] = np.clip(np.rint(100 * peaks), 0, 100).astype(int).tolist()
    return values
