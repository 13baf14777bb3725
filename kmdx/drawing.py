"""Draws a plan: as rows of a table, as a tree for the terminal, as an SVG picture."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape

from rich.markup import escape as escape_markup
from rich.tree import Tree

from kmdx.plan import MIXTURE, Hear, Node, Normalize, Plan, Sum, node_of


def stages(plan: Plan, wanted: Collection[str]) -> Iterator[str]:
    """Say of each network that runs: stage, what it hears and gives, weights, licence, arithmetic, how."""
    used = plan.sources_used(plan.signals_of(wanted))
    for name in sorted(used, key=plan.stage):
        node = plan.nodes[name]
        assert isinstance(node, Hear)
        use = plan.networks[node.network]
        gives = ", ".join(f"{name}.{source}" for source in used[name])
        cost = "arithmetic not stated" if use.gflops is None else f"{use.gflops:.0f} GFLOP"
        yield (
            f"stage {plan.stage(name)}: {node.network} hears {node.signal}, gives {gives}; "
            f"weights {use.weight.name} ({use.weight.licence}); {cost}; {use.chunking}"
        )


def formula(node: Node) -> str:
    """A node as a formula: ``x − 0.8·V.vocals − 0.2·M.vocals``."""
    if isinstance(node, Hear):
        return f"{node.network}({node.signal})"
    if isinstance(node, Normalize):
        return f"({node.signal} − mean) / std"
    parts: list[str] = []
    for reference, weight in node.terms.items():
        sign = " − " if weight < 0 else " + " if parts else ""
        factor = "" if abs(weight) == 1 else f"{abs(weight):g}·"
        parts.append(f"{sign}{factor}{reference}")
    text = "".join(parts).strip()
    if node.denormalize is None:
        return text
    return f"{text if len(parts) == 1 else f'({text})'} · std + mean"


def tree(plan: Plan, wanted: Collection[str]) -> Tree:
    """Draw the graph as a tree: each signal hangs below the last one that it waits for."""
    root = Tree(f"[bold]{MIXTURE}[/bold]")
    branches = {MIXTURE: root}
    order = plan.order(plan.signals_of(wanted))
    depth = {MIXTURE: (0, 0)}
    for position, name in enumerate(order, 1):
        node = plan.nodes[name]
        last = max(map(node_of, node.inputs), key=lambda reference: depth[reference])
        depth[name] = (plan.stage(name), position)
        style = "bold cyan" if isinstance(node, Hear) else "bold green" if name in plan.stems else "none"
        label = f"[{style}]{escape_markup(name)}[/{style}] = {escape_markup(formula(node))}"
        branches[name] = branches[last].add(label)
    return root


@dataclass(frozen=True)
class _Box:
    """A box of the picture: its node, place in pixels and lines of text."""

    x: float
    y: float
    title: str
    lines: tuple[str, ...]
    kind: str

    @property
    def height(self) -> float:
        return 28 + 16 * len(self.lines)

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    def lowered(self, by: float) -> _Box:
        return replace(self, y=self.y + by)


WIDTH, COLUMN, GAP, MARGIN = (
    240,
    290,
    22,
    24,
)  # pixels: of a box, from column to column, between boxes, around
COLOURS = {"song": "#f2f2f2", "network": "#dbeafe", "rest": "#fef3c7", "stem": "#dcfce7"}


def svg(plan: Plan, wanted: Collection[str]) -> str:
    """Draw the graph as an SVG picture from the mixture at the left to the stems at the right."""
    order = [MIXTURE, *plan.order(plan.signals_of(wanted))]
    inputs = {name: _inputs(plan, name) for name in order}
    boxes: dict[str, _Box] = {}
    columns = _columns(plan, inputs)
    for number, members in enumerate(columns):
        # Each box as near as may be to those that it comes from, so that few arrows cross.
        members.sort(key=lambda name: _mean([boxes[source].middle for source in inputs[name]]))
        y = 0.0
        column = []
        for name in members:
            column.append(_box(plan, name, number, y))
            y += column[-1].height + GAP
        boxes.update({name: box.lowered((GAP - y) / 2) for name, box in zip(members, column, strict=True)})

    top = min(box.y for box in boxes.values()) - MARGIN
    height = max(box.y + box.height for box in boxes.values()) + MARGIN - top
    boxes = {name: box.lowered(-top) for name, box in boxes.items()}
    width = 2 * MARGIN + COLUMN * (len(columns) - 1) + WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height:.0f}" fill="white"/>',
        *(_arrow(boxes[source], boxes[name]) for name in order for source in inputs[name]),
        *map(_draw, boxes.values()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _inputs(plan: Plan, name: str) -> list[str]:
    """Nodes that a node comes from, each once."""
    return [] if name == MIXTURE else list(dict.fromkeys(map(node_of, plan.nodes[name].inputs)))


def _columns(plan: Plan, inputs: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Nodes from left to right: each behind all that it comes from, stems last, their halves before them."""
    rank: dict[str, int] = {}
    for name, sources in inputs.items():
        rank[name] = 1 + max((rank[source] for source in sources), default=-1)
    last = max(rank.values())
    for name in inputs:
        users = [user for user, sources in inputs.items() if name in sources]
        if not users:
            rank[name] = last
        elif all(user in plan.stems for user in users) and isinstance(plan.nodes.get(name), Sum):
            rank[name] = last - 1
    used = sorted(set(rank.values()))
    return [[name for name in inputs if rank[name] == level] for level in used]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _box(plan: Plan, name: str, column: int, y: float) -> _Box:
    x = MARGIN + COLUMN * column
    if name == MIXTURE:
        return _Box(x, y, "mixture", (), "song")
    node = plan.nodes[name]
    if isinstance(node, Hear):
        use = plan.networks[node.network]
        return _Box(x, y, name, (formula(node), use.weight.name, str(use.chunking)), "network")
    text = _wrapped(formula(node))
    return _Box(x, y, name, text, "stem" if name in plan.stems else "rest")


def _wrapped(text: str, width: int = 32) -> tuple[str, ...]:
    """Break a formula before its operators."""
    lines = [""]
    for word in text.replace(" + ", "\n+ ").replace(" − ", "\n− ").split("\n"):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return tuple(lines)


def _arrow(source: _Box, target: _Box) -> str:
    """A curve from the right side of a box to the left side of another."""
    x1, y1 = source.x + WIDTH, source.middle
    x2, y2 = target.x, target.middle
    bend = max((x2 - x1) / 2, 30)
    curve = f"M {x1:.0f} {y1:.0f} C {x1 + bend:.0f} {y1:.0f}, {x2 - bend:.0f} {y2:.0f}, {x2:.0f} {y2:.0f}"
    return (
        f'<path d="{curve}" fill="none" stroke="#94a3b8" stroke-width="1.2"/>'
        f'<circle cx="{x2:.0f}" cy="{y2:.0f}" r="3" fill="#64748b"/>'
    )


def _draw(box: _Box) -> str:
    """A box with its title and its lines of text."""
    title, plain = 'font-size="13" font-weight="bold"', 'font-size="11.5" fill="#334155"'
    texts = [(19, title, box.title), *((37 + 16 * row, plain, line) for row, line in enumerate(box.lines))]
    return (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{WIDTH}" height="{box.height:.0f}" rx="6" '
        f'fill="{COLOURS[box.kind]}" stroke="#64748b"/>'
    ) + "".join(
        f'<text x="{box.x + 10:.0f}" y="{box.y + down:.0f}" {style}>{escape(text)}</text>'
        for down, style, text in texts
    )
