"""Draws a plan: a line of text per network, Mermaid text, and an SVG picture.

The picture shows the mixture on the left and the stems on the right. Each node is in a column to the right of
all its inputs. A signal that crosses a column has its own lane, so that no box hides a line. Lines from the
same node share a lane.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from html import escape

from kmdx.challenge import MIXTURE
from kmdx.plan import Plan, node_of

PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")  # valid Mermaid identifiers, except the keywords
KEYWORDS = re.compile(
    "call|class|classDef|click|end|flowchart|graph|href|interpolate|linkStyle|style|subgraph"
)
SHAPES = {"network": ("[[", "]]"), "sum": ("[", "]"), "stem": ("([", "])")}  # around a label

BOX_WIDTH = 240  # pixels, like all sizes below
COLUMN = 300  # distance between the left edges of adjacent columns
GAP = 20  # between boxes
LANE = 10  # height of the lane of a crossing line, including the gap
MARGIN = 24
COLORS = {"song": "#f2f2f2", "network": "#dbeafe", "sum": "#fef3c7", "stem": "#dcfce7"}
LINES = ("#64748b", "#0369a1", "#b45309", "#15803d", "#7e22ce", "#be123c", "#0f766e", "#a16207")

Lane = tuple[str, int]
"""A node, and the number of a column that contains it or that its signal crosses."""


@dataclass(frozen=True)
class Box:
    """A node in the picture: its kind and its lines of text. The first line is its name."""

    kind: str
    lines: tuple[str, ...]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return 12 + 16 * len(self.lines)


def stages(plan: Plan, wanted: Collection[str]) -> Iterator[str]:
    """Describe each network that runs: stage, input, outputs, weights, license, arithmetic, chunking."""
    used = plan.sources_used(plan.signals_of(wanted))
    for name in sorted(used, key=plan.stage):
        network = plan.runs([name])[name]
        (signal,) = plan.nodes[name].inputs
        use = plan.networks[network]
        outputs = ", ".join(f"{name}.{source}" for source in used[name])
        cost = "arithmetic not stated" if use.gflops is None else f"{gflops(use.gflops)} GFLOP"
        yield (
            f"stage {plan.stage(name)}: {network}({signal}) gives {outputs}; "
            f"weights {use.weight.name} ({use.weight.licence}); {cost}; {use.how()}"
        )


def gflops(value: float | None) -> str:
    """Arithmetic rounded to two digits, or to whole GFLOP from 10 on."""
    if value is None:
        return "not stated"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def mermaid(plan: Plan, wanted: Collection[str]) -> str:
    """Draw what the wanted stems need as Mermaid text: one line per node, after its inputs.

    A node whose name is not a valid Mermaid identifier is identified by its number; its label has the name.
    """
    order = plan.order(plan.signals_of(wanted))
    ids = {
        name: name if PLAIN.fullmatch(name) and not KEYWORDS.fullmatch(name) else str(number)
        for number, name in enumerate(order)
    }
    lines = ["graph LR"]
    for name in order:
        node = plan.nodes[name]
        inputs = dict.fromkeys(ids.get(node_of(reference), MIXTURE) for reference in node.inputs)
        start, end = SHAPES[_kind(plan, name)]
        label = escape(f"{name} = {node.formula()}")
        lines.append(f'    {" & ".join(inputs)} --> {ids[name]}{start}"{label}"{end}')
    return "\n".join(lines) + "\n"


def svg(plan: Plan, wanted: Collection[str]) -> str:
    """Draw what the wanted stems need as the text of an SVG file."""
    inputs = {MIXTURE: ()} | {
        name: tuple(dict.fromkeys(map(node_of, plan.nodes[name].inputs)))
        for name in plan.order(plan.signals_of(wanted))
    }
    columns = _columns(plan, inputs)
    boxes = {name: _box(plan, name) for name in inputs}
    middles = _places(boxes, columns, inputs)
    top = min(middles[name, columns[name]] - boxes[name].height / 2 for name in inputs) - MARGIN
    bottom = max(middles[name, columns[name]] + boxes[name].height / 2 for name in inputs) + MARGIN
    width, height = 2 * MARGIN + COLUMN * max(columns.values()) + BOX_WIDTH, bottom - top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 {top:.0f} {width} {height:.0f}" font-family="sans-serif">',
        f'<rect y="{top:.0f}" width="{width}" height="{height:.0f}" fill="white"/>',
        *_lines(columns, inputs, middles),
        *(_draw(boxes[name], columns[name], middles[name, columns[name]]) for name in inputs),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _columns(plan: Plan, inputs: Mapping[str, Collection[str]]) -> dict[str, int]:
    """The column of each node, after its inputs. Stems are last; sums that only stems use are just before."""
    rank: dict[str, int] = {}
    for name, sources in inputs.items():
        rank[name] = 1 + max((rank[source] for source in sources), default=-1)
    last = max(rank.values())
    stems = set(plan.stems)
    for name, users in _users(inputs).items():
        if not users:
            rank[name] = last
        elif name != MIXTURE and stems.issuperset(users) and plan.nodes[name].terms:
            rank[name] = last - 1
    numbers = {level: number for number, level in enumerate(sorted(set(rank.values())))}
    return {name: numbers[level] for name, level in rank.items()}


def _users(inputs: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """The nodes that use each node's signal."""
    users: dict[str, list[str]] = {name: [] for name in inputs}
    for user, sources in inputs.items():
        for source in sources:
            users[source].append(user)
    return users


def _kind(plan: Plan, name: str) -> str:
    return "network" if plan.nodes[name].network else "stem" if name in plan.stems else "sum"


def _box(plan: Plan, name: str) -> Box:
    if name == MIXTURE:
        return Box("song", (MIXTURE,))
    node = plan.nodes[name]
    if node.network is not None:
        use = plan.networks[node.network]
        return Box("network", (name, node.formula(), use.weight.name, use.how()))
    return Box(_kind(plan, name), (name, *_wrapped(node.formula())))


def _wrapped(text: str) -> Iterator[str]:
    """Break a formula before its operators."""
    line = ""
    for word in text.replace(" + ", "\n+ ").replace(" − ", "\n− ").split("\n"):
        if line and len(line) + len(word) >= 32:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    yield line


def _places(
    boxes: Mapping[str, Box], columns: Mapping[str, int], inputs: Mapping[str, Collection[str]]
) -> dict[Lane, float]:
    """The vertical center of each box and lane, by node and column. Each column is centered at 0.

    Columns are filled from left to right. Each is sorted by the mean position of its inputs, so that
    few lines cross.
    """
    middles: dict[Lane, float] = {}
    users = _users(inputs)
    boxed: dict[int, list[str]] = {}
    passed: dict[int, list[str]] = {}
    for name, column in columns.items():
        boxed.setdefault(column, []).append(name)
        for between in range(column + 1, max((columns[user] for user in users[name]), default=0)):
            passed.setdefault(between, []).append(name)
    for column in range(max(columns.values()) + 1):
        members, passing = boxed.get(column, []), passed.get(column, [])
        origin = {name: [middles[source, column - 1] for source in inputs[name]] for name in members}
        origin |= {name: [middles[name, column - 1]] for name in passing}
        ordered = sorted(origin, key=lambda name: sum(origin[name]) / max(len(origin[name]), 1))
        heights = [boxes[name].height + GAP if columns[name] == column else LANE for name in ordered]
        y = -sum(heights) / 2
        for name, height in zip(ordered, heights, strict=True):
            middles[name, column] = y + height / 2
            y += height
    return middles


def _lines(
    columns: Mapping[str, int], inputs: Mapping[str, Collection[str]], middles: Mapping[Lane, float]
) -> Iterator[str]:
    """Lines from each node to its users, straight in lanes and curved between columns."""
    for number, (source, users) in enumerate(_users(inputs).items()):
        color = LINES[number % len(LINES)]
        style = f'fill="none" stroke="{color}" stroke-width="1.3"'
        end = max((columns[user] for user in users), default=-1)
        for column in range(columns[source] + 1, end):
            yield _curve(column, middles[source, column - 1], middles[source, column], style)
            left, y = MARGIN + COLUMN * column, middles[source, column]
            yield f'<path d="M {left} {y:.1f} H {left + BOX_WIDTH}" {style}/>'
        for user in users:
            column = columns[user]
            y = middles[user, column]
            yield _curve(column, middles[source, column - 1], y, style)
            yield f'<circle cx="{MARGIN + COLUMN * column}" cy="{y:.1f}" r="3" fill="{color}"/>'


def _curve(column: int, start: float, end: float, style: str) -> str:
    """A curve across the gap to the left of a column."""
    right = MARGIN + COLUMN * column
    left = right - (COLUMN - BOX_WIDTH)
    bend = (left + right) / 2
    return (
        f'<path d="M {left} {start:.1f} C {bend:.0f} {start:.1f}, {bend:.0f} {end:.1f}, {right} {end:.1f}" '
        f"{style}/>"
    )


def _draw(box: Box, column: int, middle: float) -> str:
    """A box with its lines of text."""
    x, y = MARGIN + COLUMN * column, middle - box.height / 2
    texts = (
        f'<text x="{x + 10}" y="{y + 19 + 16 * row:.1f}" '
        + ('font-size="13" font-weight="bold">' if row == 0 else 'font-size="11.5" fill="#334155">')
        + f"{escape(line)}</text>"
        for row, line in enumerate(box.lines)
    )
    return (
        f'<rect x="{x}" y="{y:.1f}" width="{BOX_WIDTH}" height="{box.height}" rx="6" '
        f'fill="{COLORS[box.kind]}" stroke="#64748b"/>'
    ) + "".join(texts)
