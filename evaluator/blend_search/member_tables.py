"""What members are worth, in rows and lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from evaluator.blend_search.members import Candidate, Ensemble

CAVEAT = (
    "The set is the best of many, by scores whose priors were chosen by the same songs, a little too good. "
    "What follows was validated for it anew; published are its shares of the published weights."
)


def table(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> Table:
    """For each member the score lost by leaving it out and the compute saved."""
    whole = ensemble.whole
    title = "left out: cross-validated global SDR lost (dB), and what is saved"
    rows = Table(title=title, title_justify="left", box=None, pad_edge=False)
    rows.add_column("")
    for heading in ("runs", *whole.sdr, "mean", "real-time factor", "GFLOP"):
        rows.add_column(heading, justify="right")
    rows.add_row(
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
            rows.add_row(name, runs, *["–"] * len(whole.sdr), "needed", "", "")
            continue
        lost = [whole.sdr[stem] - candidate.sdr[stem] for stem in whole.sdr]
        both = None not in (whole.gflops, candidate.gflops)
        rows.add_row(
            name,
            runs,
            *(f"{loss:+.3f}" for loss in lost),
            f"{whole.score - candidate.score:+.3f}",
            f"{whole.real_time_factor - candidate.real_time_factor:.2f}",
            _gflops((whole.gflops or 0) - (candidate.gflops or 0) if both else None),
        )
    return rows


def chosen(ensemble: Ensemble, candidate: Candidate, budget: float) -> str:
    """A line on the set that was chosen for a budget."""
    lost = ensemble.whole.score - candidate.score
    return (
        f"Within {budget:g} × the duration: {', '.join(sorted(candidate.members))}; cross-validated "
        f"{candidate.score:.3f} dB, {lost:.3f} less than all members, at {candidate.real_time_factor:.2f} × "
        f"instead of {ensemble.whole.real_time_factor:.2f} ×."
    )


def as_json(ensemble: Ensemble, without: Mapping[str, Candidate | None]) -> dict[str, Any]:
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
