"""The curve of scores against times: its front, its knee, and as a table, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.table import Table

from evaluator import plots
from evaluator.metrics import signed
from evaluator.tradeoff.measuring import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"": "o", "overlap": "o", "shifts": "s", "tta": "^", "members": "X"}
LABELS = {
    "overlap": "overlap of segments",
    "shifts": "shifts",
    "tta": "test-time augmentation",
    "members": "without a network or a run of one",
}
COLORS = (plots.BLUE, plots.ORANGE, "#047857", "#7c3aed")
FRONT = "#94a3b8"


@dataclass(frozen=True)
class Curve:
    """Measured settings; the first is the plan as published, with which the others are compared."""

    measured: Sequence[Measured]

    @property
    def published(self) -> Measured:
        """The plan as published."""
        return self.measured[0]

    def gain(self, each: Measured) -> float:
        """The difference of a setting's score from that of the published plan, in dB."""
        return each.score - self.published.score

    @property
    def front(self) -> list[Measured]:
        """The settings that no other one with the same or less time outscores, the fastest first."""
        found = {(each.factor, each.score): each for each in reversed(self.measured)}
        return [found[point] for point in plots.front(found)]

    @property
    def knee(self) -> Measured:
        """The setting after which more time gains least.

        Of the front, scaled to a square with the logarithm of the time, it is the point farthest above the
        diagonal from the fastest to the best one, as in Satopaa et al. 2011, "Finding a Kneedle in a
        Haystack".
        """
        front = self.front
        first, last = front[0], front[-1]
        width = math.log(last.factor / first.factor) or 1.0
        height = last.score - first.score or 1.0

        def above(each: Measured) -> float:
            return (each.score - first.score) / height - math.log(each.factor / first.factor) / width

        return max(front, key=above)


def table(curve: Curve) -> Table:
    """All settings: their time, and their scores compared with the published plan."""
    published, front, knee = curve.published, curve.front, curve.knee
    title = "real-time factor, and change of global SDR (dB, mean over songs)"
    rows = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("setting", "in"):
        rows.add_column(heading)
    for heading in ("factor", "relative", *published.sdr, "mean"):
        rows.add_column(heading, justify="right")
    rows.add_column("")
    for each in curve.measured:
        if each is published:
            scores = [signed(value).removeprefix("+") for value in (*each.sdr.values(), each.score)]
        else:
            gains = [each.sdr[stem] - published.sdr[stem] for stem in published.sdr]
            scores = [signed(value) for value in (*gains, curve.gain(each))]
        note = "knee" if each is knee else "front" if each in front else ""
        relative = f"{each.factor / published.factor:.2f}"
        rows.add_row(each.setting.name, each.precision, f"{each.factor:.2f}", relative, *scores, note)
    return rows


def as_json(curve: Curve) -> dict[str, Any]:
    """The content of :func:`table` for JSON."""
    front = curve.front
    return {
        "settings": [
            {
                "name": each.setting.name,
                "changes": each.setting.kind or None,
                "precision": each.precision,
                "real_time_factor": each.factor,
                "relative_time": each.factor / curve.published.factor,
                "sdr": dict(each.sdr),
                "score": each.score,
                "gain": curve.gain(each),
                "front": each in front,
            }
            for each in curve.measured
        ],
        "knee": curve.knee.name,
    }


def svg(curve: Curve, budget: float | None = None) -> str:
    """Draw the settings by time, from left to right, and score, upwards, as the text of an SVG file."""
    return plots.svg(partial(_draw, curve=curve, budget=budget), 860, 560, "Scores of settings against time")


def _draw(figure: Figure, curve: Curve, budget: float | None) -> None:
    figure.set_facecolor("white")
    axes = figure.add_axes((0.09, 0.11, 0.83, 0.85))  # names reach into the margin on the right
    axes.set(
        xlabel="real-time factor: seconds of work per second of song",
        ylabel=f"change of global SDR, dB (as published: {curve.published.score:.2f})",
        xscale="log",
    )
    axes.xaxis.set_major_locator(_ticks())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    if budget is not None:
        axes.axvline(budget, color=FRONT, linestyle="--", linewidth=1, zorder=1)
        bottom = ((budget, 0), (4, 4), axes.get_xaxis_transform(), "offset points")
        axes.annotate(f"budget {budget:g} ×", *bottom)
    front = [(each.factor, curve.gain(each)) for each in curve.front]
    axes.step(*zip(*front, strict=True), where="post", color=FRONT, linewidth=4, alpha=0.4, zorder=1)
    _settings(axes, curve)
    _legend(axes, curve)
    _names(axes, curve)


def _ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


def _settings(axes: Axes, curve: Curve) -> None:
    """One mark for each setting; those of the overlap are joined."""
    for precision, color in _colors(curve).items():
        of_precision = [each for each in curve.measured if each.precision == precision]
        overlaps = [each for each in of_precision if each.setting.kind in ("", "overlap")]
        places = sorted((each.factor, curve.gain(each)) for each in overlaps)
        if places:
            axes.plot(*zip(*places, strict=True), color=color, linewidth=1.2)
        for each in of_precision:
            if each.setting.kind in MARKERS:
                (mark,) = axes.plot(
                    each.factor,
                    curve.gain(each),
                    MARKERS[each.setting.kind],
                    color=color,
                    mew=0,
                    markersize=8,
                )
                plots.set_title(mark, f"{each.name}: {signed(curve.gain(each))} dB, {each.factor:.2f} ×")


def _legend(axes: Axes, curve: Curve) -> None:
    from matplotlib.lines import Line2D

    kinds = {each.setting.kind for each in curve.measured}
    lines = [Line2D([], [], color=color, label=name) for name, color in _colors(curve).items()]
    lines += [
        Line2D([], [], color=FRONT, linestyle="", marker=MARKERS[kind], label=label)
        for kind, label in LABELS.items()
        if kind in kinds
    ]
    lines.append(Line2D([], [], color=FRONT, linewidth=4, alpha=0.4, label="best for its time"))
    axes.legend(handles=lines, loc="lower right", frameon=False)


def _colors(curve: Curve) -> dict[str, str]:
    names = dict.fromkeys(each.precision for each in curve.measured)
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}


def _names(axes: Axes, curve: Curve) -> None:
    """Short names of all marks, with speed levels and the knee: the last precision's to the left, above."""
    places: dict[tuple[float, float], list[Measured]] = {}
    for each in curve.measured:
        place = (float(f"{each.factor:.4g}"), round(curve.gain(each), 4))
        places.setdefault(place, []).append(each)
    colors = _colors(curve)
    for place, there in places.items():
        precision = there[0].precision
        is_left = len(colors) > 1 and precision == [*colors][-1]
        notes = [each.setting.name.removeprefix("overlap ") for each in there[:1]]
        notes += [each.setting.name for each in there[1:] if each.setting.kind == "level"]
        axes.annotate(
            ", ".join([*notes, *(["knee"] if curve.knee in there else [])]),
            place,
            (-7, 6) if is_left else (7, -7),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="bottom" if is_left else "top",
            color=colors[precision],
            size=10,
        )
