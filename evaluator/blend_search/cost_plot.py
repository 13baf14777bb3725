"""Draws scores against costs as an SVG picture: what an ensemble is without each of its members."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from evaluator.blend_search.ablation import Candidate

WIDTH, HEIGHT = 760, 460  # pixels, as all sizes here
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 24, 56  # margins; labels reach into the right one
LINE, TEXT, SET, MEMBER, WHOLE = "#cbd5e1", "#334155", "#94a3b8", "#0369a1", "#b45309"


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
    everyone = [whole, *without.values(), *others]
    costs = [each.real_time_factor for each in everyone] + ([] if budget is None else [budget])
    across = _Axis(0.0, max(costs) * 1.05, LEFT, WIDTH - RIGHT)
    scores = [each.score for each in everyone]
    span = max(max(scores) - min(scores), 0.1)
    up = _Axis(min(scores) - 0.1 * span, max(scores) + 0.1 * span, HEIGHT - BOTTOM, TOP)
    place = _Place(across, up)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_grid(across, up),
        *_budget(across, budget),
        *_front(place, everyone if others else []),
        *(place.dot(each, SET, 2.5) for each in others),
        *(place.dot(each, MEMBER, 4.5) for each in without.values()),
        place.dot(whole, WHOLE, 5.5),
        *_labels(place, {"all": whole} | {f"without {name}": each for name, each in without.items()}),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axis:
    """From values to pixels, with ticks at round values."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high = low, high
        self.first, self.last = first, last
        rough = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        self.tick = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Places in pixels, and what to write there."""
        digits = max(0, -math.floor(math.log10(self.tick)))
        for number in range(math.ceil(self.low / self.tick), math.floor(self.high / self.tick) + 1):
            yield self(number * self.tick), f"{number * self.tick:.{digits}f}"


class _Place:
    """Where an ensemble stands."""

    def __init__(self, across: _Axis, up: _Axis) -> None:
        self.across, self.up = across, up

    def __call__(self, candidate: Candidate) -> tuple[float, float]:
        return self.across(candidate.real_time_factor), self.up(candidate.score)

    def dot(self, candidate: Candidate, colour: str, radius: float) -> str:
        x, y = self(candidate)
        names = escape(", ".join(sorted(candidate.members)))
        title = f"{names}: {candidate.score:.3f} dB, {candidate.real_time_factor:.2f} ×"
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">'
        return f"{circle}<title>{title}</title></circle>"


def _grid(across: _Axis, up: _Axis) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for x, text in across.ticks():
        yield f'<path d="M {x:.1f} {TOP} V {bottom}" stroke="{LINE}" stroke-width="0.6"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
    for y, text in up.ticks():
        yield f'<path d="M {LEFT} {y:.1f} H {right}" stroke="{LINE}" stroke-width="0.6"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle:.0f}" y="{HEIGHT - 14}" text-anchor="middle">networks’ real-time factor</text>'
    yield (
        f'<text transform="translate(18 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "cross-validated global SDR, dB</text>"
    )


def _budget(across: _Axis, budget: float | None) -> Iterator[str]:
    if budget is not None:
        x = across(budget)
        yield f'<path d="M {x:.1f} {TOP} V {HEIGHT - BOTTOM}" stroke="{WHOLE}" stroke-dasharray="4 3"/>'
        yield f'<text x="{x + 4:.1f}" y="{TOP + 12}" fill="{WHOLE}">budget {budget:g} ×</text>'


def _front(place: _Place, candidates: Sequence[Candidate]) -> Iterator[str]:
    """A line of steps along the best score within each cost."""
    best = -math.inf
    points: list[tuple[float, float]] = []
    for each in sorted(candidates, key=lambda each: (each.real_time_factor, -each.score)):
        if each.score > best:
            points.append(place(each))
            best = each.score
    if points:
        steps = "".join(f" H {x:.1f} V {y:.1f}" for x, y in points[1:])
        yield (
            f'<path d="M {points[0][0]:.1f} {points[0][1]:.1f}{steps}" fill="none" stroke="{SET}" '
            'stroke-width="1.2"/>'
        )


def _labels(place: _Place, named: Mapping[str, Candidate]) -> Iterator[str]:
    """Names beside their dots, each below the last so that none hides another."""
    lowest = -math.inf
    for name, each in sorted(named.items(), key=lambda item: place(item[1])[1]):
        x, y = place(each)
        text_y = max(y, lowest + 14)
        lowest = text_y
        if text_y > y + 1:
            yield f'<path d="M {x:.1f} {y:.1f} L {x + 9:.1f} {text_y:.1f}" stroke="{LINE}"/>'
        halo = 'paint-order="stroke" stroke="white" stroke-width="4"'
        yield f'<text x="{x + 10:.1f}" y="{text_y + 4:.1f}" {halo}>{escape(name)}</text>'
