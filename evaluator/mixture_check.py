"""Checks whether stems sum to their mixture, and why if they do not.

Differences within rounding are ignored. Otherwise a stem may be missing, or the mixture may have been
mastered: equalized, amplified or limited. Coherence distinguishes the two cases. A mastered mixture is the
stems' sum after a filter and a gain that follows the level. So one complex factor per frequency for a few
seconds, and one gain per moment, explain most of it. They do not explain the sound of a missing stem.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from evaluator import sources
from evaluator.sources import BLOCK
from kmdx import host
from kmdx.challenge import ACCOMPANIMENT, MIXTURE, STEMS
from kmdx.errors import AudioError, listed, shown

if TYPE_CHECKING:
    from evaluator.dataset import Track

Found = tuple[str | None, bool, str, str]
"""A song's name, whether the problem is fatal, the message, and what differs from song to song."""
NO_SUM = "the stems do not sum to the mixture"

KNOWN_SUMS = {"PR - Oh No"}
"""Songs of MUSDB18-HQ whose stems are known not to sum to the mixture."""
ROUNDING = 3 / 32768
"""RMS by which a mixture may differ from its stems' sum: five rounded and dithered 16-bit files."""

COMPLETE = ({*STEMS}, {"vocals", ACCOMPANIMENT})
"""Stems that are complete by definition, because ``other`` contains everything else."""
PAIRED = {"guitar", "piano"}
"""A data set that has one of these stems usually also has the other."""

WINDOW = 2048  # samples of a spectrum
FITS = 5  # alternating fits of factors and gains
EXAMINED = 24  # blocks of a song whose spectra are analyzed
MISSING_NAMED, MISSING_UNNAMED = -30.0, -15.0
"""From this level on, in dB relative to the mixture, unexplained sound means that a stem is missing.

The first value applies if the name of the missing stem is known, the second if not."""
MISSING_LOSSY = -12.0  # dB, in both cases, because lossy coding changes each file


def check(tracks: Sequence[Track], accept_incomplete: bool = False) -> list[Found]:
    """Compare stems with mixtures, and mixtures of the same length with each other.

    Parameters
    ----------
    tracks : sequence of Track
        Songs whose headers passed their check.
    accept_incomplete : bool
        Whether a missing stem is only a warning.
    """
    lengths = defaultdict(list)
    for track in tracks:
        lengths[track.samples, track.lossy].append(track)
    suspects = [track for group in lengths.values() if len(group) > 1 for track in group]
    everything = {stem: None for track in tracks for stem in track.stems}

    def compare(track: Track) -> Found | None:
        return _check_sum(track, _absent(track, [*everything]), accept_incomplete)

    # Reading and arithmetic both release the interpreter lock.
    with ThreadPoolExecutor(host.usable_cores()) as pool:
        problems = [problem for problem in pool.map(compare, tracks) if problem is not None]
        digests = list(pool.map(_mixture_digest, suspects))

    same: dict[str, list[Track]] = defaultdict(list)
    for track, digest in zip(suspects, digests, strict=True):
        same[digest].append(track)
    for first, *others in same.values():
        if others:
            names = listed([track.name for track in others])
            have = "has" if len(others) == 1 else "have"
            problems.append((None, False, f"{names} {have} the same mixture as {first.name}", ""))
    return problems


def file_digest(path: Path) -> str:
    """The sha256 of a file in hexadecimal; raise :class:`AudioError` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _absent(track: Track, everything: Sequence[str]) -> list[str]:
    """Stems that may be missing from a song: those of other songs, and the usual four."""
    if ACCOMPANIMENT in track.sources:
        return [] if "vocals" in track.sources else ["vocals"]
    usual = STEMS if any(stem in STEMS for stem in track.stems) else ()
    if track.stems == ("vocals",) and ACCOMPANIMENT in everything:
        return [ACCOMPANIMENT]
    declared = track.layout.declared if track.layout is not None else ()
    names = dict.fromkeys((*usual, *declared, *everything))
    return [stem for stem in names if stem not in track.sources and stem != ACCOMPANIMENT]


def _check_sum(track: Track, absent: Sequence[str], accept_incomplete: bool) -> Found | None:
    """Check whether the stems sum to the mixture, both clipped at full scale."""
    if any(part.stream is not None for part in track.sources_of(MIXTURE)):
        return None
    try:
        energy, difference = _difference(track)
        if not math.isfinite(energy + difference):
            return track.name, True, "NaN or infinity in its samples", ""
        if difference <= ROUNDING**2 * track.samples * track.channels:
            return None
        if not energy:
            return track.name, False, NO_SUM, "it is silent"
        unexplained = _unexplained(track)
    except AudioError as error:
        return track.name, True, str(error), ""
    level = 10 * math.log10(difference / energy)
    least = MISSING_NAMED if absent else MISSING_UNNAMED
    complete = not absent and set(track.summands) in COMPLETE
    if not complete and unexplained >= (MISSING_LOSSY if track.lossy else least):
        message, detail = _incomplete(track, absent, unexplained, accept_incomplete)
        return track.name, not accept_incomplete, message, detail
    if track.lossy:  # lossy coding changes each file, and a warning about the whole set reports it
        return None
    known = " (a known error of MUSDB18-HQ)" if track.name in KNOWN_SUMS else ""
    return (
        track.name,
        False,
        NO_SUM,
        f"the difference is {abs(level):.1f} dB {'below' if level < 0.05 else 'above'} it{known}",
    )


def _incomplete(track: Track, absent: Sequence[str], unexplained: float, accepted: bool) -> tuple[str, str]:
    """The message that a stem is missing, and its detail: which one, and what to do."""
    have = ", ".join(map(shown, track.summands))
    which = f"no {', '.join(map(shown, absent))} among its files" if absent else "a stem is missing"
    if not absent and len(PAIRED & track.sources.keys()) == 1:
        which += f", perhaps {next(iter(PAIRED - track.sources.keys()))}"
    found = f"the mixture contains sound that is not in {have}, {-unexplained:.1f} dB below the mixture"
    advice = "" if accepted else "; add the stem, or score the others with --accept-incomplete"
    return which, f"{found}{advice}"


def _difference(track: Track) -> tuple[float, float]:
    """Energies of the mixture and of its difference from the stems' sum; 0 without a mixture file."""
    energy = difference = 0.0
    for mixture, (total, *others) in _pairs(track, BLOCK):
        energy += float(np.square(mixture).sum(dtype=np.float64))
        for stem in others:
            total += stem
        error = np.clip(total, -1, 1, out=total)
        error -= np.clip(mixture, -1, 1, out=mixture)
        difference += float(np.square(error, out=error).sum(dtype=np.float64))
    return energy, difference


def _pairs(track: Track, size: int) -> Iterator[tuple[NDArray[np.float32], list[NDArray[np.float32]]]]:
    """Blocks of a song's mixture, each with the blocks of the stems that sum to it."""
    stems = [sources.blocks(track.sources[name], track.form, size) for name in track.summands]
    if MIXTURE not in track.sources:  # nothing to compare, but reading finds damaged files
        for parts in zip(*stems, strict=True):
            yield np.sum(parts, axis=0), [*parts]
        return
    mixture = sources.blocks(track.sources[MIXTURE], track.form, size)
    for first, *rest in zip(mixture, *stems, strict=True):
        yield first, rest


def _unexplained(track: Track) -> float:
    """Energy of the mixture that slowly changing filters of the stems do not explain, in dB."""
    window = WINDOW
    while window > 64 and track.samples < 32 * window:
        window //= 2
    every = max(1, math.ceil(track.samples / BLOCK / EXAMINED))
    energy = left = 0.0
    for number, (mixture, stems) in enumerate(_pairs(track, BLOCK)):
        if number % every or len(mixture) < 2 * window:
            continue
        for channel in range(track.channels):
            whole, rest = _residual(
                _spectrum(mixture[:, channel], window),
                np.stack([_spectrum(stem[:, channel], window) for stem in stems]),
            )
            energy, left = energy + whole, left + rest
    return 10 * math.log10(left / energy) if left > 0 and energy > 0 else -math.inf


def _spectrum(samples: NDArray[np.float32], window: int) -> NDArray[np.complex128]:
    """Short-time Fourier transform ``(frames, bins)`` with Hann windows that overlap by half."""
    frames = sliding_window_view(samples, window)[:: window // 2]
    return np.fft.rfft(frames * np.hanning(window), axis=1)


def _residual(mixture: NDArray[np.complex128], stems: NDArray[np.complex128]) -> tuple[float, float]:
    """Energies of a mixture ``(frames, bins)``, and of its part that ``stems`` do not explain.

    The stems ``(stems, frames, bins)`` are fitted to the mixture by least squares. The fits alternate between
    a complex factor for each stem and bin, and a gain for each frame. A small constant is added to the
    energies, so that no factor amplifies a nearly silent bin.
    """
    energy = float(np.square(np.abs(mixture)).sum())
    gains = np.ones((len(mixture), 1))
    left = energy
    for _ in range(FITS):
        scaled = gains * stems
        products = np.einsum("stf,rtf->fsr", scaled.conj(), scaled, optimize=True)
        floor = 1e-6 * np.einsum("fss->f", products).real.mean() + 1e-20
        products += floor * np.eye(len(stems))
        targets = np.einsum("stf,tf->fs", scaled.conj(), mixture, optimize=True)
        factors = np.linalg.solve(products, targets[..., np.newaxis])[..., 0]
        filtered = np.einsum("fs,stf->tf", factors, stems, optimize=True)
        overlap = (filtered.conj() * mixture).real.sum(axis=1, keepdims=True)
        own = np.square(np.abs(filtered)).sum(axis=1, keepdims=True)
        gains = np.maximum(overlap / (own + 1e-20), 0)
        left = min(left, float(np.square(np.abs(mixture - gains * filtered)).sum()))
    return energy, left


def _mixture_digest(track: Track) -> str:
    """A digest that is equal for equal mixtures, whether wav or flac; for MUSDB18, for equal files."""
    parts = track.sources_of(MIXTURE)
    if parts[0].stream is not None:
        return file_digest(parts[0].path)
    digest = hashlib.sha256()
    try:
        for block in sources.blocks(parts, track.form):
            digest.update(np.ascontiguousarray(block).data)
    except AudioError:
        return str(parts[0].path)  # unique; the check of the sum reports the damage
    return digest.hexdigest()
