"""Draws a plan in text: a line for each network that runs, and a tree of all signals."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rich.markup import escape as escape_markup
from rich.tree import Tree

from kmdx.challenge import MIXTURE
from kmdx.plan import Plan, node_of

DEEPEST = 25  # levels of a tree, so that it fits a line


def stages(plan: Plan, wanted: Collection[str]) -> Iterator[str]:
    """Say of each network that runs: stage, what it hears and gives, weights, licence, arithmetic, how."""
    used = plan.sources_used(plan.signals_of(wanted))
    for name in sorted(used, key=plan.stage):
        network = plan.runs([name])[name]
        (heard,) = plan.nodes[name].inputs
        use = plan.networks[network]
        gives = ", ".join(f"{name}.{source}" for source in used[name])
        cost = "arithmetic not stated" if use.gflops is None else f"{gflops(use.gflops)} GFLOP"
        yield (
            f"stage {plan.stage(name)}: {network} hears {heard}, gives {gives}; "
            f"weights {use.weight.name} ({use.weight.licence}); {cost}; {use.chunking}"
        )


def gflops(value: float | None) -> str:
    """Arithmetic rounded to two digits, or to whole GFLOP from 10 on."""
    if value is None:
        return "not stated"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def tree(plan: Plan, wanted: Collection[str]) -> Tree:
    """Draw the graph as a tree: each signal hangs below the last one that it waits for.

    What would be deeper than :data:`DEEPEST` is drawn at that depth, in order.
    """
    root = Tree(f"[bold]{MIXTURE}[/bold]")
    branches = {MIXTURE: (root, root, 0)}  # of each signal, with the branch that it hangs on, and its depth
    order = plan.order(plan.signals_of(wanted))
    depth = {MIXTURE: (0, 0)}
    for position, name in enumerate(order, 1):
        node = plan.nodes[name]
        last = max(map(node_of, node.inputs), key=lambda reference: depth[reference])
        depth[name] = (plan.stage(name), position)
        style = "bold cyan" if node.network else "bold green" if name in plan.stems else "none"
        label = f"[{style}]{escape_markup(name)}[/{style}] = {escape_markup(node.formula())}"
        branch, above, level = branches[last]
        parent = branch if level < DEEPEST else above
        branches[name] = (parent.add(label), parent, min(level + 1, DEEPEST))
    return root
