"""Finds the best weights of each stem from a collection, and decides whether to use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evaluator.blend_search.collection import Collection, StemProducts
from evaluator.blend_search.cross_validation import BlendProblem, Validation, check_folds, validate
from evaluator.blend_search.inner_products import Weights
from evaluator.blend_search.solving import Constraints, flat_ridge
from kmdx.errors import KmdxError, listed

DIGITS = 6  # of a weight in a plan
MIN_GAIN = 1e-6  # dB: smaller gains are rounding errors


@dataclass(frozen=True)
class SearchOptions:
    """How weights are found and accepted."""

    constraints: Constraints = field(default_factory=Constraints)
    prior: float | None = None
    """Strength of the pull toward the published weights, in dB at a distance of 1; ``None`` to choose it."""
    joint: bool = False
    """Choose one strength for all stems, and use the new weights of all stems or of none."""
    folds: int | None = None  # ``None`` for one per song
    anyway: bool = False  # use weights even if their cross-validated gain is not above 0 or is unknown


@dataclass(frozen=True)
class Solution:
    """Weights found for a stem. Scores are in dB, means over the songs that count."""

    stem: StemProducts
    problem: BlendProblem  # with the songs that count for the stem
    prior: float  # strength with which the weights were found
    weights: Weights  # ``(signals,)``, rounded to :data:`DIGITS` as in a plan
    validated: np.ndarray | None  # SDR of each song while it was held out; None: too few songs
    recommended: bool
    notes: tuple[str, ...]

    @property
    def published_sdr(self) -> np.ndarray:
        """SDR of each song with the published weights: ``(songs,)``."""
        return self.problem.products.sdr(self.stem.published)

    @property
    def fitted_sdr(self) -> np.ndarray:
        """SDR of each song with the weights found on all songs: ``(songs,)``."""
        return self.problem.products.sdr(self.weights)

    @property
    def gains(self) -> np.ndarray | None:
        """Gain of each song in dB while it was held out: ``(songs,)``."""
        return None if self.validated is None else self.validated - self.published_sdr

    @property
    def weights_to_use(self) -> Weights:
        """The new weights if they are recommended, else the published ones."""
        return self.weights if self.recommended else self.stem.published

    @property
    def expected(self) -> float | None:
        """The score to expect of :attr:`weights_to_use` on other songs like these."""
        if not self.recommended:
            return float(self.published_sdr.mean())
        return None if self.validated is None else float(self.validated.mean())


@dataclass(frozen=True)
class Result:
    """Weights found for all stems."""

    found: tuple[Solution, ...]
    folds: int
    options: SearchOptions
    silent: tuple[str, ...] = ()  # stems that are silent in every song, so no weights were searched

    @property
    def song_gains(self) -> np.ndarray:
        """Gain of each song in dB while it was held out: the mean over stems that count in it."""
        gains: dict[int, list[float]] = {}
        for each in self.found:
            if each.gains is not None:
                for song, gain in zip(each.problem.songs, each.gains, strict=True):
                    gains.setdefault(int(song), []).append(float(gain))
        return np.array([np.mean(gains[song]) for song in sorted(gains)])


def find_weights(collection: Collection, options: SearchOptions) -> Result:
    """Find the weights of all stems.

    Raises :class:`KmdxError` if only one song was collected and ``anyway`` is not set, if every song is
    silent, or if the number of folds is invalid.
    """
    songs = len(collection.songs)
    if songs < 2 and not options.anyway:
        raise KmdxError(
            f"{collection.folder} has one song, so weights found on it cannot be validated on another; "
            "collect more songs, or use --anyway"
        )
    folds = check_folds(options.folds, songs)
    stems = [stem for stem in collection.stems if len(stem.counted)]
    if not stems:
        raise KmdxError(f"{collection.folder}: every true stem is silent in all songs; collect other songs")
    problems = {
        stem.name: BlendProblem(stem.products.of_songs(stem.counted), stem.published, stem.counted)
        for stem in stems
    }
    groups = [list(problems)] if options.joint else [[name] for name in problems]
    found = []
    for group in groups:
        chosen = [problems[name] for name in group]
        validation = validate(chosen, folds, options.constraints, options.prior)
        for name, values in zip(group, validation.sdr, strict=True):
            stem = next(stem for stem in stems if stem.name == name)
            found.append(_found(stem, problems[name], validation, values, collection.songs, options))
    if options.joint:
        gains = [each.gains.mean() for each in found if each.gains is not None]
        together = options.anyway or (bool(gains) and float(np.mean(gains)) > MIN_GAIN)
        found = [
            replace(each, recommended=together and (options.anyway or each.gains is not None))
            for each in found
        ]
    silent = tuple(stem.name for stem in collection.stems if not len(stem.counted))
    return Result(tuple(found), folds, options, silent)


def weights_to_use(collection: Collection, result: Result) -> dict[str, dict[str, float]]:
    """The weights to use for each stem and signal."""
    weights = {each.stem.name: each.weights_to_use for each in result.found}
    return {
        stem.name: dict(zip(stem.signals, weights.get(stem.name, stem.published).tolist(), strict=True))
        for stem in collection.stems
    }


def _found(
    stem: StemProducts,
    problem: BlendProblem,
    validation: Validation,
    validated: np.ndarray | None,
    songs: Sequence[str],
    options: SearchOptions,
) -> Solution:
    weights = problem.weights(options.constraints, validation.prior)
    gain = None if validated is None else float((validated - problem.products.sdr(stem.published)).mean())
    notes = [*_notes(stem, problem, songs)]
    if validated is None:
        notes.append(f"{stem.name}: too few songs to hold one out, so its weights are not validated")
    if validation.unchosen:
        notes.append(f"{stem.name}: too few songs to choose the prior; using {validation.prior:g}")
    return Solution(
        stem=stem,
        problem=problem,
        prior=validation.prior,
        weights=np.round(weights, DIGITS) + 0.0,  # no -0
        validated=validated,
        recommended=options.anyway or (gain is not None and gain > MIN_GAIN),
        notes=tuple(notes),
    )


def _notes(stem: StemProducts, problem: BlendProblem, songs: Sequence[str]) -> Iterator[str]:
    silent = [songs[number] for number in stem.silent.tolist()]
    if silent:
        yield (
            f"{stem.name}: songs in which the true stem is silent are left out, because the metric rates any "
            f"sound there far below 0 dB: {listed(silent, most=3)}"
        )
    if flat_ridge(problem.products, problem.published) is not None:
        yield (
            f"{stem.name}: some signals are collinear, so several weights have the same score; those "
            "nearest to the published ones are used"
        )
