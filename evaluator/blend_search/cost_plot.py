"""Draws scores against costs as an SVG picture: what an ensemble is without each of its members."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from evaluator import plots
from evaluator.blend_search.ablation import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SET = "#94a3b8"


def svg(
    whole: Candidate,
    without: Mapping[str, Candidate],
    others: Sequence[Candidate] = (),
    budget: float | None = None,
) -> str:
    """Draw ensembles by their cost, from left to right, and their score, upwards.

    Parameters
    ----------
    whole : Candidate
        All members.
    without : mapping of str to Candidate
        The ensemble without each.
    others : sequence of Candidate
        Further sets of members; a line leads along the best for their cost.
    budget : float, optional
        Real-time factor at which a line is drawn.

    Returns
    -------
    str
        The text of an SVG file.
    """
    draw = partial(_draw, whole=whole, without=without, others=others, budget=budget)
    return plots.svg(draw, 760, 460, "Scores of sets of members against their cost")


def _draw(
    figure: Figure,
    whole: Candidate,
    without: Mapping[str, Candidate],
    others: Sequence[Candidate],
    budget: float | None,
) -> None:
    figure.set_facecolor("white")
    axes = figure.add_axes((0.1, 0.12, 0.65, 0.83))  # names reach into the margin on the right
    everyone = [whole, *without.values(), *others]
    scores = [each.score for each in everyone]
    margin = 0.1 * max(max(scores) - min(scores), 0.1)
    axes.set(
        xlabel="networks’ real-time factor",
        ylabel="cross-validated global SDR, dB",
        xlim=(0, 1.05 * max([each.real_time_factor for each in everyone] + [budget or 0])),
        ylim=(min(scores) - margin, max(scores) + margin),
    )
    if budget is not None:
        axes.axvline(budget, color=plots.ORANGE, linestyle="--", linewidth=1, zorder=1)
        top = ((budget, 1), (4, -4), axes.get_xaxis_transform(), "offset points")
        axes.annotate(f"budget {budget:g} ×", *top, color=plots.ORANGE, va="top")
    if others:
        best = plots.front((each.real_time_factor, each.score) for each in everyone)
        axes.step(*zip(*best, strict=True), where="post", color=SET, linewidth=1.2, zorder=1)
    _dots(axes, others, SET, 5)
    _dots(axes, [*without.values()], plots.BLUE, 9)
    _dots(axes, [whole], plots.ORANGE, 11)
    _names(axes, {"all": whole} | {f"without {name}": each for name, each in without.items()})


def _dots(axes: Axes, candidates: Sequence[Candidate], color: str, size: float) -> None:
    for each in candidates:
        (dot,) = axes.plot(each.real_time_factor, each.score, "o", color=color, markersize=size, mew=0)
        names = ", ".join(sorted(each.members))
        plots.set_title(dot, f"{names}: {each.score:.3f} dB, {each.real_time_factor:.2f} ×")


def _names(axes: Axes, named: Mapping[str, Candidate]) -> None:
    """Names next to their dots, each below the one before so that none hides another."""
    lowest = math.inf  # pixels
    for name, each in sorted(named.items(), key=lambda item: -item[1].score):
        place = (each.real_time_factor, each.score)
        y = axes.transData.transform(place)[1]
        lowest = min(y, lowest - 14)
        axes.annotate(
            name,
            place,
            (10, lowest - y),
            textcoords="offset points",
            va="center",
            zorder=1.5,  # above the lines, below the dots
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": plots.LINE} if lowest < y - 1 else None,
        )
