"""Formats results for the terminal, for JSON and for the comments in a plan's file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from evaluator import bootstrap
from evaluator.blend_search.collection import Collection
from evaluator.blend_search.search import MIN_GAIN, Result, SearchOptions, Solution
from evaluator.bootstrap import COVERAGE
from kmdx.errors import counted


def empty(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table without rows: its title, and the headings of columns of text and of numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def scores(result: Result, of: str = "mean over songs") -> Table:
    """Fitted and cross-validated scores side by side."""
    headings = ("songs", "published", "fitted", "gain", "cross-validated", "gain", f"{COVERAGE:.0%} interval")
    table = empty(f"global SDR (dB, {of})", ["stem"], [*headings, "prior"])
    table.add_column("")
    for each in result.found:
        published, fitted = each.published_sdr.mean(), each.fitted_sdr.mean()
        table.add_row(
            each.stem.name,
            str(len(each.published_sdr)),
            f"{published:.3f}",
            f"{fitted:.3f}",
            f"{fitted - published:+.3f}",
            "–" if each.validated is None else f"{each.validated.mean():.3f}",
            *gain(each.gains),
            prior(each.prior),
            verdict(each, result.options),
        )
    if len(result.found) > 1:
        published = float(np.mean([each.published_sdr.mean() for each in result.found]))
        fitted = float(np.mean([each.fitted_sdr.mean() for each in result.found]))
        validated = [each.validated.mean() for each in result.found if each.validated is not None]
        whole = len(validated) == len(result.found)
        gains = result.song_gains if whole else None
        table.add_row(
            "mean",
            "",
            f"{published:.3f}",
            f"{fitted:.3f}",
            f"{fitted - published:+.3f}",
            f"{np.mean(validated):.3f}" if whole else "–",
            f"{np.mean(validated) - published:+.3f}" if whole else "–",
            gain(gains)[1],
            "",
            "",
        )
    return table


def weights(result: Result) -> Table:
    """The weight of each signal, published and found."""
    table = empty("weights", ["stem", "signal"], ["published", "found"])
    for each in result.found:
        rows = zip(each.stem.signals, each.stem.published, each.weights, strict=True)
        for number, (signal, published, found) in enumerate(rows):
            shown = (f"{round(weight, 4) + 0.0:.4f}" for weight in (published, found))  # no -0
            table.add_row("" if number else each.stem.name, signal, *shown)
    return table


def verdict(found: Solution, options: SearchOptions) -> str:
    """Whether a stem's new weights are used, in words."""
    gains = found.gains
    if gains is None:
        return "new anyway: not cross-validated" if found.recommended else "published: not cross-validated"
    if not found.recommended:
        reason = "the stems together gain nothing" if options.joint else "no gain on held-out songs"
        return f"published: {reason}"
    if gains.mean() <= MIN_GAIN:
        return f"new {'anyway' if options.anyway else 'with the other stems'}: no gain on held-out songs"
    ends = bootstrap.interval(gains)
    chance = ends is not None and ends[0] <= 0
    return "new, may be chance: the interval contains 0" if chance else "new"


def origin(collection: Collection, result: Result) -> Iterator[str]:
    """Lines about the origin and the scores of a plan's weights, for its comments."""
    options = result.options
    names = [each.stem.name for each in result.found if each.recommended]
    yield (
        f"Weights of {', '.join(names) or 'no stem'} were found by evaluator.blend_search on "
        f"{counted(len(collection.songs), 'song')}, from {collection.plan.name} "
        f"({collection.plan.digest[:12]})."
    )
    chosen = {
        "weights sum to one": options.constraints.sum_to_one,
        "none is negative": options.constraints.non_negative,
        "stems jointly": options.joint,
        "used whatever the validation": options.anyway,
    }
    said = [text for text, yes in chosen.items() if yes]
    yield "; ".join([f"{result.folds} folds", *said]) + ". Songs: " + ", ".join(collection.songs) + "."
    for each in result.found:
        published, fitted = each.published_sdr.mean(), each.fitted_sdr.mean()
        line = "not cross-validated"
        if each.validated is not None:
            mean, ends = gain(each.gains)
            line = f"cross-validated {each.validated.mean():.3f}, gain {mean} ({COVERAGE:.0%}: {ends})"
        yield (
            f"{each.stem.name}: global SDR {published:.3f} dB published, {fitted:.3f} fitted, {line}; "
            f"prior {prior(each.prior)}; {verdict(each, options)}."
        )
    expected = [each.expected for each in result.found]
    known = [value for value in expected if value is not None]
    if known and len(known) == len(expected):
        silent = ", each over the songs in which it is not silent" if _some_silent(collection) else ""
        yield (
            f"Expected of this plan on songs like these: {np.mean(known):.3f} dB, the mean of its "
            f"{counted(len(known), 'stem')}{silent}."
        )


def _some_silent(collection: Collection) -> bool:
    return any(len(stem.silent) for stem in collection.stems)


def as_json(collection: Collection, result: Result) -> dict[str, Any]:
    """The collection's and the result's content for JSON."""
    return {
        "ensemble": collection.plan.name,
        "plan_sha256": collection.plan.digest,
        "songs": list(collection.songs),
        "left_out": dict(collection.failed),
        "folds": result.folds,
        "joint": result.options.joint,
        "sum_to_one": result.options.constraints.sum_to_one,
        "non_negative": result.options.constraints.non_negative,
        "song_gain": _mean_and_ends(result.song_gains),
        "silent": list(result.silent),
        "stems": {each.stem.name: _stem(each, collection.songs, result.options) for each in result.found},
    }


def _stem(found: Solution, songs: Sequence[str], options: SearchOptions) -> dict[str, Any]:
    names = [songs[number] for number in found.problem.songs]

    def by_song(values: np.ndarray | None) -> Mapping[str, float] | None:
        return None if values is None else dict(zip(names, values.tolist(), strict=True))

    return {
        "signals": list(found.stem.signals),
        "published": found.stem.published.tolist(),
        "found": found.weights.tolist(),
        "prior": "inf" if math.isinf(found.prior) else found.prior,
        "published_sdr": by_song(found.published_sdr),
        "fitted_sdr": by_song(found.fitted_sdr),
        "validated_sdr": by_song(found.validated),
        "gain": _mean_and_ends(found.gains),
        "recommended": found.recommended,
        "verdict": verdict(found, options),
        "notes": list(found.notes),
    }


def _mean_and_ends(values: np.ndarray | None) -> dict[str, float | None] | None:
    if values is None or not len(values):
        return None
    low, high = bootstrap.interval(values) or (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high}


def gain(gains: np.ndarray | None) -> tuple[str, str]:
    """The mean of gains and its interval, as texts."""
    if gains is None or not len(gains):
        return "–", ""
    ends = bootstrap.interval(gains)
    return f"{gains.mean():+.3f}", f"{ends[0]:+.3f} … {ends[1]:+.3f}" if ends else ""


def prior(strength: float) -> str:
    """The strength of a prior, as text."""
    return "∞" if math.isinf(strength) else f"{strength:g}"
