"""Flattens a plan: every stem becomes one weighted sum of signals.

Conventions
-----------
A sum is a *blend* for a stem if its terms are estimates of that stem, blends of them, or residuals. Blends
are expanded: a signal's weight is the product of the weights along its path, and paths add up. The signals
of a stem are estimates ``NODE.SOURCE`` and residuals (sums that contain other sources, the mixture or a
normalized signal). Each signal gets a node of its own, at the mixture's level.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from kmdx.challenge import MIXTURE, STEMS
from kmdx.errors import PlanError
from kmdx.nodes import Node, Sum
from kmdx.plan import Plan, node_of

MAX_TERMS = 100_000  # of an expanded blend


class BlendTerm(NamedTuple):
    """A signal of the plan, and the normalized signal whose level it must get back, if any."""

    reference: str
    denormalize: str | None


class Flat(NamedTuple):
    """A flattened plan."""

    plan: Plan  # its stems are flat sums of signals
    own: Mapping[str, str]  # for each stem the node that computes it as in the original plan
    all_estimates: bool = False  # whether every network's estimate of a stem was added


def flatten(plan: Plan, all_estimates: bool = False) -> Flat:
    """Expand the blends of a plan's stems.

    In the flat plan each signal is a node, and each stem is a sum of signals with the published weights. This
    is exact if the weights inside a denormalized blend sum to one; otherwise the mean of the blend is wrong.
    ``all_estimates`` also adds every other network's estimate of each stem, with weight 0.
    """
    scored = scored_stems(plan)
    own: dict[str, str] = {}
    for stem in scored:
        own[stem] = _free(f"published_{stem}", {*plan.nodes, *own.values()})
    # Nodes that take a stem as input keep the original stem.
    nodes: dict[str, Node] = {own.get(name, name): node.renamed(own) for name, node in plan.nodes.items()}
    base = replace(plan, nodes=nodes)

    names: dict[BlendTerm, str] = {}
    stems = {}
    for stem in scored:
        weights = published(base, stem, own[stem])
        for signal in estimates(base, stem) if all_estimates else ():
            weights.setdefault(signal, 0.0)
        for signal in weights:
            if signal not in names:
                names[signal] = _node_name(signal, base, own.values(), {*nodes, *names.values(), *plan.stems})
        stems[stem] = Sum({names[signal]: weight for signal, weight in weights.items()})
    nodes |= {
        name: Sum({signal.reference: 1.0}, signal.denormalize)
        for signal, name in names.items()
        if name not in nodes
    }
    nodes |= {stem: stems[stem] for stem in plan.stems}
    return Flat(pruned(replace(plan, nodes=nodes), [*plan.stems, *own.values()]), own, all_estimates)


def scored_stems(plan: Plan) -> tuple[str, ...]:
    """The plan's stems, the challenge's first."""
    return tuple(sorted(plan.stems, key=lambda stem: (stem not in STEMS, stem)))


def indivisible(plan: Plan) -> list[str]:
    """Formulas of the combinations that are signals of a flat plan: their estimates have no weights."""
    nodes = [node for name, node in plan.nodes.items() if node.operands and not node.terms]
    return list(dict.fromkeys(node.formula() for node in nodes))


def pruned(plan: Plan, wanted: Collection[str]) -> Plan:
    """The plan with only the nodes and networks that the wanted signals need."""
    order = set(plan.order(wanted))
    nodes = {name: node for name, node in plan.nodes.items() if name in order}
    used = set(plan.networks_used(wanted))
    networks = {name: use for name, use in plan.networks.items() if name in used}
    return replace(plan, nodes=nodes, networks=networks)


def published(plan: Plan, stem: str, name: str | None = None) -> dict[BlendTerm, float]:
    """The signals of a stem, and the weight that the plan gives each.

    ``name`` is the stem's node; by default the node with the stem's name.
    """
    weights: dict[BlendTerm, float] = {}
    sources = _sources(plan)
    pending: list[tuple[str, float, str | None]] = [(name or stem, 1.0, None)]
    for _ in range(MAX_TERMS):
        if not pending:
            return weights
        reference, weight, back = pending.pop()
        node = plan.nodes[node_of(reference)]
        if _is_blend(plan, node, stem, sources) and None in (node.denormalize, back):
            terms = [*node.terms.items()][::-1]
            pending += ((term, weight * factor, node.denormalize or back) for term, factor in terms)
        else:
            signal = BlendTerm(reference, back)
            weights[signal] = weights.get(signal, 0.0) + weight
    raise PlanError(f"{plan.name}: {stem} expands to more than {MAX_TERMS} terms; simplify the plan")


def estimates(plan: Plan, source: str) -> Iterator[BlendTerm]:
    """Every network run's estimate of a source, if its level is known."""
    levels = _levels(plan)
    for name, node in plan.nodes.items():
        if node.network is not None and f"{name}.{source}" in node.outputs(name, plan.networks):
            (level, *others) = levels[node_of(node.inputs[0])]
            if not others:
                yield BlendTerm(f"{name}.{source}", level)


def source_of(plan: Plan, reference: str) -> str | None:
    """The one source that a signal estimates; ``None`` for mixtures, residuals and mixed sums."""
    return _source(reference, _sources(plan))


def _source(reference: str, sources: Mapping[str, str | None]) -> str | None:
    """The same, given the source of each node."""
    name, _, source = reference.partition(".")
    return source or sources[name]


def _sources(plan: Plan) -> dict[str, str | None]:
    """The one source that each node estimates."""
    sources: dict[str, str | None] = {MIXTURE: None}
    for name in plan.order(plan.nodes):
        node = plan.nodes[name]
        found = {_source(term, sources) for term in node.operands or [MIXTURE]}
        sources[name] = found.pop() if len(found) == 1 else None
    return sources


def _is_blend(plan: Plan, node: Node, stem: str, sources: Mapping[str, str | None]) -> bool:
    for term in node.terms:
        source = _source(term, sources)
        is_residual = source is None and term != MIXTURE and plan.nodes[term].terms
        if source != stem and not is_residual:
            return False
    return bool(node.terms)


def _levels(plan: Plan) -> dict[str, set[str | None]]:
    """For each node the normalized signals that determine its level; ``None`` means the mixture's level."""
    levels: dict[str, set[str | None]] = {MIXTURE: {None}}
    for name in plan.order(plan.nodes):
        node = plan.nodes[name]
        below = set().union(*(levels[node_of(taken)] for taken in node.inputs))
        levels[name] = node.level(name, below)
    return levels


def _node_name(signal: BlendTerm, plan: Plan, stems: Collection[str], taken: Collection[str]) -> str:
    """The node, other than a stem, that is this signal at the mixture's level; a new name if none is."""
    if signal.denormalize is None and plan.nodes[node_of(signal.reference)].operands:
        return signal.reference
    for name, node in plan.nodes.items():
        if node == Sum({signal.reference: 1}, signal.denormalize) and name not in stems:
            return name
    return _free(signal.reference.replace(".", "_"), taken)


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name
