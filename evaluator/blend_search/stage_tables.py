"""What a search of stages costs and found, in rows and lines."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from evaluator.blend_search.moves import Cost, Search, changes
from evaluator.blend_search.stages import Tuned
from evaluator.blend_search.tables import count, gain
from evaluator.bootstrap import COVERAGE
from kmdx.plan import Plan


def cost(search: Search, most: Cost) -> str:
    """What a search of stages takes, before it begins."""
    parts = [
        f"at most {count(most.runs, 'network run')} on {count(len(search.songs), 'song')}"
        + (f" and, for the result, {len(search.held_out)} held out" if search.held_out else ""),
        f"{most.audio:.0f} s of audio through networks",
    ]
    if most.gflop is not None:
        parts.append(f"{most.gflop:.0f} GFLOP")
    parts.append(f"{most.disk / 1e9:.2f} GB of disk")
    took = "time not known: give --collected" if most.seconds is None else f"about {_minutes(most.seconds)}"
    return "; ".join([*parts, took])


def weights(before: Plan, after: Plan) -> Table:
    """Weights that were changed."""
    table = Table(title="weights", title_justify="left", box=None, pad_edge=False)
    for heading in ("sum", "signal"):
        table.add_column(heading)
    for heading in ("published", "found"):
        table.add_column(heading, justify="right")
    for name, reference, old, new in changes(before, after):
        table.add_row(name, reference, f"{old:g}", f"{new:g}")
    return table


def scores(tuned: Tuned) -> Table:
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
                *gain(after - before),
            )
    return table


def origin(search: Search, before: Plan, after: Plan, tuned: Tuned) -> Iterator[str]:
    """Lines that say where a plan's stage weights came from and what they promise."""
    yield (
        f"Weights that later stages hear were found by evaluator.blend_search on "
        f"{count(len(search.songs), 'song')}, from {before.name} ({before.digest[:12]})."
    )
    yield "Songs: " + ", ".join(track.name for track in search.songs) + "."
    for name, reference, old, new in changes(before, after):
        yield f"{name}: {reference} {old:g}, now {new:g}."
    yield f"Global SDR on them: {tuned.before.mean():.3f} dB published, {tuned.after.mean():.3f} now."
    if len(tuned.gains):
        names = ", ".join(track.name for track in search.held_out)
        mean, ends = gain(tuned.gains)
        between = f" ({COVERAGE:.0%}: {ends})" if ends else ""
        yield (
            f"Held out: {names}: {tuned.held_out_before.mean():.3f} dB published, "
            f"{tuned.held_out_after.mean():.3f} now, gain {mean}{between}."
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
