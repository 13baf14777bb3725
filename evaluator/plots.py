"""Diagrams as SVG text, drawn by matplotlib: the same values give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

TEXT, LINE, BLUE, ORANGE = "#334155", "#cbd5e1", "#0369a1", "#b45309"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.0,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text
    "text.color": TEXT,
    "xtick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.color": LINE,
    "ytick.labelcolor": TEXT,
}
UNDATED = dict.fromkeys(("Creator", "Date", "Format", "Type"))
TITLE = "title: "


def svg(draw: Callable[[Figure], None], width: int, height: int, label: str) -> str:
    """Draw a diagram as one SVG element.

    Parameters
    ----------
    draw : callable
        Draws into an empty figure.
    width, height : int
        Size in pixels.
    label : str
        What the diagram shows, for screen readers.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {**STYLE, "svg.hashsalt": label}]):
        figure = Figure((width / 72, height / 72), dpi=72)  # one pixel is one unit of the SVG
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=UNDATED)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    drawn = drawn.replace(f'width="{width}pt" height="{height}pt"', f'width="{width}" height="{height}"', 1)
    return re.sub(r'<g id="([^"]*)">', _group, drawn)


def set_title(artist: Artist, title: str) -> None:
    """Show a title where a pointer rests on a part of a diagram."""
    artist.set_gid(TITLE + title)


def front(points: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The pairs ``(cost, score)`` that none of the same or lower cost outscores, by cost."""
    best = -math.inf
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if score > best:
            yield cost, score
            best = score


def _group(match: re.Match[str]) -> str:
    """A group without its identifier, of which a page may have one only, or with the title that this is."""
    name = match[1]
    return f"<g><title>{name.removeprefix(TITLE)}</title>" if name.startswith(TITLE) else "<g>"
