"""What was found, in rows and lines: for the terminal, for JSON and for the head of a plan's file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from evaluator import bootstrap
from evaluator.blend_search import stages
from evaluator.blend_search.collection import Collection
from evaluator.blend_search.members import Candidate, Ensemble
from evaluator.blend_search.search import NOTHING, Found, Options, Result
from evaluator.bootstrap import COVERAGE
from kmdx.plan import Plan


def scores(result: Result) -> Table:
    """Fitted and cross-validated scores side by side."""
    table = Table(title="global SDR (dB, mean over songs)", title_justify="left", box=None, pad_edge=False)
    table.add_column("stem")
    headings = ("songs", "published", "fitted", "gain", "cross-validated", "gain", f"{COVERAGE:.0%} interval")
    for heading in (*headings, "prior"):
        table.add_column(heading, justify="right")
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
            *_gain(each.gains),
            _prior(each.prior),
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
            _gain(gains)[1],
            "",
            "",
        )
    return table


def weights(result: Result) -> Table:
    """The weight of each signal, published and found."""
    table = Table(title="weights", title_justify="left", box=None, pad_edge=False)
    table.add_column("stem")
    table.add_column("signal")
    table.add_column("published", justify="right")
    table.add_column("found", justify="right")
    for each in result.found:
        rows = zip(each.stem.signals, each.stem.published, each.weights, strict=True)
        for number, (signal, published, found) in enumerate(rows):
            table.add_row("" if number else each.stem.name, signal, f"{published:.4f}", f"{found:.4f}")
    return table


def verdict(found: Found, options: Options) -> str:
    """Whether a stem's weights are taken, in words."""
    gains = found.gains
    if gains is None:
        return "taken anyway: not cross-validated" if found.recommended else "kept: not cross-validated"
    if not found.recommended:
        return "kept: the stems together gain nothing" if options.joint else "kept: no gain on songs held out"
    if gains.mean() <= NOTHING:
        return f"taken {'anyway' if options.anyway else 'with the others'}: no gain on songs held out"
    ends = bootstrap.interval(gains)
    chance = ends is not None and ends[0] <= 0
    return "taken; may be chance: the interval contains 0" if chance else "taken"


def origin(collection: Collection, result: Result) -> Iterator[str]:
    """Lines that say where a plan's weights came from and what they promise."""
    options = result.options
    names = [each.stem.name for each in result.found if each.recommended]
    yield (
        f"Weights of {', '.join(names)} were found by evaluator.blend_search on "
        f"{_count(len(collection.songs), 'song')}, from {collection.plan.name} "
        f"({collection.plan.digest[:12]})."
    )
    chosen = {
        "weights sum to one": options.constraints.sum_to_one,
        "none is negative": options.constraints.non_negative,
        "stems jointly": options.joint,
        "taken whatever was validated": options.anyway,
    }
    said = [text for text, yes in chosen.items() if yes]
    yield "; ".join([f"{result.folds} folds", *said]) + ". Songs: " + ", ".join(collection.songs) + "."
    for each in result.found:
        published, fitted = each.published_sdr.mean(), each.fitted_sdr.mean()
        line = "not cross-validated"
        if each.validated is not None:
            gain, ends = _gain(each.gains)
            line = f"cross-validated {each.validated.mean():.3f}, gain {gain} ({COVERAGE:.0%}: {ends})"
        yield (
            f"{each.stem.name}: global SDR {published:.3f} dB published, {fitted:.3f} fitted, {line}; "
            f"prior {_prior(each.prior)}; {verdict(each, options)}."
        )
    expected = [each.expected for each in result.found]
    known = [value for value in expected if value is not None]
    if known and len(known) == len(expected):
        yield f"Expected of this plan on songs like these: {np.mean(known):.3f} dB, the mean of its stems."


def as_json(collection: Collection, result: Result) -> dict[str, Any]:
    """All of it."""
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


def _stem(found: Found, songs: Sequence[str], options: Options) -> dict[str, Any]:
    names = [songs[number] for number in found.problem.songs]

    def by_song(values: np.ndarray | None) -> Mapping[str, float] | None:
        return None if values is None else dict(zip(names, values.tolist(), strict=True))

    return {
        "signals": list(found.stem.signals),
        "published": found.stem.published.tolist(),
        "found": found.weights.tolist(),
        "prior": _prior(found.prior),
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


def _gain(gains: np.ndarray | None) -> tuple[str, str]:
    """Mean and interval."""
    if gains is None or not len(gains):
        return "–", ""
    ends = bootstrap.interval(gains)
    return f"{gains.mean():+.3f}", f"{ends[0]:+.3f} … {ends[1]:+.3f}" if ends else ""


def _prior(strength: float) -> str:
    return "∞" if math.isinf(strength) else f"{strength:g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def members(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> Table:
    """For each member the score lost by leaving it out and the compute saved."""
    whole = ensemble.whole
    title = "left out: cross-validated global SDR lost (dB), and what is saved"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("runs", *whole.sdr, "mean", "real-time factor", "GFLOP"):
        table.add_column(heading, justify="right")
    table.add_row(
        "nothing: the score",
        str(sum(map(len, ensemble.members.values()))),
        *(f"{sdr:.3f}" for sdr in whole.sdr.values()),
        f"{whole.score:.3f}",
        f"{whole.real_time_factor:.2f}",
        _gflops(whole.gflops),
    )
    for name, candidate in without.items():
        runs = str(len(ensemble.members[name]))
        if candidate is None:
            table.add_row(name, runs, *["–"] * len(whole.sdr), "needed", "", "")
            continue
        lost = [whole.sdr[stem] - candidate.sdr[stem] for stem in whole.sdr]
        both = None not in (whole.gflops, candidate.gflops)
        table.add_row(
            name,
            runs,
            *(f"{loss:+.3f}" for loss in lost),
            f"{whole.score - candidate.score:+.3f}",
            f"{whole.real_time_factor - candidate.real_time_factor:.2f}",
            _gflops((whole.gflops or 0) - (candidate.gflops or 0) if both else None),
        )
    return table


def chosen(ensemble: Ensemble, candidate: Candidate, budget: float) -> str:
    """A line on the set that was chosen for a budget."""
    lost = ensemble.whole.score - candidate.score
    return (
        f"Within {budget:g} × the duration: {', '.join(sorted(candidate.members))}; cross-validated "
        f"{candidate.score:.3f} dB, {lost:.3f} less than all members, at {candidate.real_time_factor:.2f} × "
        f"instead of {ensemble.whole.real_time_factor:.2f} ×."
    )


def members_origin(collection: Collection, ensemble: Ensemble, candidate: Candidate) -> Iterator[str]:
    """Lines that say where the plan of such a set came from."""
    yield (
        f"Found by evaluator.blend_search on {_count(len(collection.songs), 'song')}, from "
        f"{collection.plan.name} ({collection.plan.digest[:12]}); {ensemble.folds} folds. "
        f"Songs: {', '.join(collection.songs)}."
    )
    scores = ", ".join(f"{stem} {sdr:.3f} dB" for stem, sdr in candidate.sdr.items())
    yield f"Cross-validated global SDR: {scores}."


def members_as_json(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> dict[str, Any]:
    """The same, and which runs are whose."""
    return {
        "whole": _candidate(ensemble.whole),
        "members": {name: sorted(runs) for name, runs in ensemble.members.items()},
        "without": {name: each and _candidate(each) for name, each in without.items()},
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "members": sorted(candidate.members),
        "score": candidate.score,
        "sdr": dict(candidate.sdr),
        "real_time_factor": candidate.real_time_factor,
        "gflops": candidate.gflops,
    }


def _gflops(value: float | None) -> str:
    return "not stated" if value is None else f"{value:.0f}"


def cost(search: stages.Search, most: stages.Cost) -> str:
    """What a search of stages takes, before it begins."""
    parts = [
        f"at most {_count(most.runs, 'network run')} on {_count(len(search.songs), 'song')}"
        + (f" and, for the result, {len(search.held_out)} held out" if search.held_out else ""),
        f"{most.audio:.0f} s of audio through networks",
    ]
    if most.gflop is not None:
        parts.append(f"{most.gflop:.0f} GFLOP")
    took = "time not known: give --collected" if most.seconds is None else f"about {_minutes(most.seconds)}"
    return "; ".join([*parts, took])


def stage_weights(before: Plan, after: Plan) -> Table:
    """Weights that were changed."""
    table = Table(title="weights", title_justify="left", box=None, pad_edge=False)
    for heading in ("sum", "signal"):
        table.add_column(heading)
    for heading in ("published", "found"):
        table.add_column(heading, justify="right")
    for name, reference, old, new in stages.changes(before, after):
        table.add_row(name, reference, f"{old:g}", f"{new:g}")
    return table


def stage_scores(tuned: stages.Tuned) -> Table:
    """Scores of songs that were searched, and of those held out."""
    title = "global SDR (dB, mean over stems and songs)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("songs")
    for heading in ("", "published", "found", "gain", f"{COVERAGE:.0%} interval"):
        table.add_column(heading, justify="right")
    for name, before, after in (
        ("searched", tuned.before, tuned.after),
        ("held out", tuned.held_out_before, tuned.held_out_after),
    ):
        if len(before):
            table.add_row(
                name,
                str(len(before)),
                f"{before.mean():.3f}",
                f"{after.mean():.3f}",
                *_gain(after - before),
            )
    return table


def stage_origin(search: stages.Search, before: Plan, after: Plan, tuned: stages.Tuned) -> Iterator[str]:
    """Lines that say where a plan's stage weights came from and what they promise."""
    yield (
        f"Weights that later stages hear were found by evaluator.blend_search on "
        f"{_count(len(search.songs), 'song')}, from {before.name} ({before.digest[:12]})."
    )
    yield "Songs: " + ", ".join(track.name for track in search.songs) + "."
    for name, reference, old, new in stages.changes(before, after):
        yield f"{name}: {reference} {old:g}, now {new:g}."
    yield f"Global SDR on them: {tuned.before.mean():.3f} dB published, {tuned.after.mean():.3f} now."
    if len(tuned.gains):
        names = ", ".join(track.name for track in search.held_out)
        gain, ends = _gain(tuned.gains)
        between = f" ({COVERAGE:.0%}: {ends})" if ends else ""
        yield (
            f"Held out: {names}: {tuned.held_out_before.mean():.3f} dB published, "
            f"{tuned.held_out_after.mean():.3f} now, gain {gain}{between}."
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
