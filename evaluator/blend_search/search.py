"""From a collection to weights: the best ones of each stem, what they promise, and whether to take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evaluator.blend_search.collection import Collection, StemProducts
from evaluator.blend_search.cross_validation import BlendProblem, Validation, check_folds, validate
from evaluator.blend_search.inner_products import Weights
from evaluator.blend_search.solving import Constraints, flat_ridge
from kmdx.errors import KmdxError

DIGITS = 6  # of a weight in a plan
NOTHING = 1e-6  # dB: a gain that is not above it is none, but what rounding leaves


@dataclass(frozen=True)
class SearchOptions:
    """How weights are sought.

    Attributes
    ----------
    constraints : Constraints
    prior : float or None
        Strength of the pull to the published weights in dB for a distance of 1; ``None`` to choose it.
    joint : bool
        Choose one strength for all stems, and take the weights of all of them or of none. Each stem still
        has weights of its own: stems share no weight, and the score is a sum over them.
    folds : int or None
        ``None``: each song is one.
    anyway : bool
        Take weights whose cross-validated gain is not above 0, or is not known.
    """

    constraints: Constraints = field(default_factory=Constraints)
    prior: float | None = None
    joint: bool = False
    folds: int | None = None
    anyway: bool = False


@dataclass(frozen=True)
class Solution:
    """What was found for a stem. Scores are dB, means over the songs that count.

    Attributes
    ----------
    stem : StemProducts
    problem : BlendProblem
        Its songs that count.
    prior : float
        The strength with which the weights were found.
    weights : ndarray
        ``(signals,)``, as they stand in a plan: of :data:`DIGITS` digits.
    validated : ndarray or None
        SDR of each song while it was held out; ``None`` where there are too few songs.
    recommended : bool
    notes : tuple of str
    """

    stem: StemProducts
    problem: BlendProblem
    prior: float
    weights: Weights
    validated: np.ndarray | None
    recommended: bool
    notes: tuple[str, ...]

    @property
    def published_sdr(self) -> np.ndarray:
        """SDR of each song by the published weights: ``(songs,)``."""
        return self.problem.products.sdr(self.stem.published)

    @property
    def fitted_sdr(self) -> np.ndarray:
        """SDR of each song by the weights that were found with it: ``(songs,)``."""
        return self.problem.products.sdr(self.weights)

    @property
    def gains(self) -> np.ndarray | None:
        """What each song gained while it was held out, in dB: ``(songs,)``."""
        return None if self.validated is None else self.validated - self.published_sdr

    @property
    def taken(self) -> Weights:
        """The weights to use: those found where they are recommended, else the published ones."""
        return self.weights if self.recommended else self.stem.published

    @property
    def expected(self) -> float | None:
        """The score to expect of :attr:`taken` on other songs like these."""
        if not self.recommended:
            return float(self.published_sdr.mean())
        return None if self.validated is None else float(self.validated.mean())


@dataclass(frozen=True)
class Result:
    """What was found for all stems.

    Attributes
    ----------
    found : tuple of Solution
    folds : int
    options : SearchOptions
    silent : tuple of str
        Stems that are silent in every song, for which nothing is sought.
    """

    found: tuple[Solution, ...]
    folds: int
    options: SearchOptions
    silent: tuple[str, ...] = ()

    @property
    def song_gains(self) -> np.ndarray:
        """What each song gained while held out, in dB: the mean over stems that count in it."""
        gains: dict[int, list[float]] = {}
        for each in self.found:
            if each.gains is not None:
                for song, gain in zip(each.problem.songs, each.gains, strict=True):
                    gains.setdefault(int(song), []).append(float(gain))
        return np.array([np.mean(gains[song]) for song in sorted(gains)])


def search(collection: Collection, options: SearchOptions) -> Result:
    """Find the weights of all stems.

    Raises
    ------
    KmdxError
        If one song alone was collected and ``anyway`` is not set, or there cannot be so many folds.
    """
    songs = len(collection.songs)
    if songs < 2 and not options.anyway:
        raise KmdxError(
            f"{collection.folder} has one song: weights found on it cannot be tried on another; "
            "collect more, or take them with --anyway"
        )
    folds = check_folds(options.folds, songs)
    stems = [stem for stem in collection.stems if len(stem.counted)]
    if not stems:
        raise KmdxError(f"{collection.folder}: every true stem is silent in all of its songs")
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
        together = options.anyway or (bool(gains) and float(np.mean(gains)) > NOTHING)
        found = [
            replace(each, recommended=together and (options.anyway or each.gains is not None))
            for each in found
        ]
    silent = tuple(stem.name for stem in collection.stems if not len(stem.counted))
    return Result(tuple(found), folds, options, silent)


def taken_weights(collection: Collection, result: Result) -> dict[str, dict[str, float]]:
    """For each stem the weights of its signals to use."""
    taken = {each.stem.name: each.taken for each in result.found}
    return {
        stem.name: dict(zip(stem.signals, taken.get(stem.name, stem.published).tolist(), strict=True))
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
        notes.append(
            f"{stem.name}: too few songs to hold one out, so that nothing says how its weights do on others"
        )
    if validation.unchosen:
        notes.append(f"{stem.name}: too few songs to choose the prior by; it is {validation.prior:g}")
    return Solution(
        stem=stem,
        problem=problem,
        prior=validation.prior,
        weights=np.round(weights, DIGITS) + 0.0,  # no -0
        validated=validated,
        recommended=options.anyway or (gain is not None and gain > NOTHING),
        notes=tuple(notes),
    )


def _notes(stem: StemProducts, problem: BlendProblem, songs: Sequence[str]) -> Iterator[str]:
    silent = [songs[number] for number in stem.silent.tolist()]
    if silent:
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        yield (
            f"{stem.name}: left out, as the true stem is silent there, where the metric gives any sound "
            f"at all far less than 0 dB: {', '.join(silent[:3])}{more}"
        )
    if flat_ridge(problem.products, problem.published) is not None:
        yield (
            f"{stem.name}: some signals are collinear; of the weights with the same score, those nearest "
            "to the published ones are taken"
        )
