"""Which signals meet in a stem, and with what weights: a plan in which every stem is one flat sum.

Conventions
-----------
A sum is a *blend* for a stem if its terms are estimates of that stem, blends of such, or residuals. Blends
are written out: a signal's weight is the product along its path, and paths add up. Estimates
``NODE.SOURCE`` and residuals (sums of other sources too, of the mixture or of a normalized signal) are the
signals that meet in the stem. Each gets a node of its own, at the mixture's level.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from kmdx.challenge import MIXTURE, STEMS
from kmdx.errors import PlanError
from kmdx.nodes import Node, Sum
from kmdx.plan import Plan, node_of

MOST_TERMS = 100_000  # of a blend that is written out


class BlendTerm(NamedTuple):
    """A reference of the plan, and the normalized signal whose level it is to be brought back to."""

    reference: str
    denormalize: str | None


class Flat(NamedTuple):
    """A plan whose stems are flat sums of signals, and the nodes that are its stems as they were."""

    plan: Plan
    own: Mapping[str, str]


def flatten(plan: Plan, all_estimates: bool = False) -> Flat:
    """Write out the blends of a plan's stems.

    Parameters
    ----------
    plan : Plan
    all_estimates : bool
        Also take what any other network run of the plan says of the stem, with weight 0.

    Returns
    -------
    Flat
        In its plan each signal is a sum of its own, stems are sums of these with the published weights.
        Exact where the weights inside a denormalized blend sum to one; else its mean is off.

    Raises
    ------
    PlanError
        If no stem of the plan is one of :data:`~kmdx.challenge.STEMS`.
    """
    scored = [stem for stem in plan.stems if stem in STEMS]
    if not scored:
        raise PlanError(f"{plan.name}: its stems are {', '.join(plan.stems)}; expected {', '.join(STEMS)}")
    own: dict[str, str] = {}
    for stem in scored:
        own[stem] = _free(f"published_{stem}", {*plan.nodes, *own.values()})
    # What other nodes use of a stem is the stem as it was.
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
    nodes |= {stem: stems.get(stem) or nodes.pop(stem) for stem in plan.stems}
    return Flat(pruned(replace(plan, nodes=nodes), [*plan.stems, *own.values()]), own)


def pruned(plan: Plan, wanted: Collection[str]) -> Plan:
    """The plan without the nodes and networks that nothing wanted needs."""
    order = set(plan.order(wanted))
    nodes = {name: node for name, node in plan.nodes.items() if name in order}
    used = set(plan.networks_used(wanted))
    networks = {name: use for name, use in plan.networks.items() if name in used}
    return replace(plan, nodes=nodes, networks=networks)


def published(plan: Plan, stem: str, node: str | None = None) -> dict[BlendTerm, float]:
    """The signals that meet in a stem, and the weight that the plan gives each; by the node of its sum."""
    weights: dict[BlendTerm, float] = {}
    sources = _sources(plan)
    pending: list[tuple[str, float, str | None]] = [(node or stem, 1.0, None)]
    for _ in range(MOST_TERMS):
        if not pending:
            return weights
        reference, weight, back = pending.pop()
        value = plan.nodes.get(node_of(reference))
        if (
            isinstance(value, Sum)
            and _is_blend(plan, value, stem, sources)
            and None in (value.denormalize, back)
        ):
            terms = [*value.terms.items()][::-1]
            pending += ((term, weight * factor, value.denormalize or back) for term, factor in terms)
        else:
            signal = BlendTerm(reference, back)
            weights[signal] = weights.get(signal, 0.0) + weight
    raise PlanError(f"{plan.name}: {stem} is a blend of more than {MOST_TERMS} terms when it is written out")


def estimates(plan: Plan, source: str) -> Iterator[BlendTerm]:
    """Every estimate of a source by a network run, where its level can be told."""
    levels = _levels(plan)
    for name, node in plan.nodes.items():
        if node.network is not None and f"{name}.{source}" in node.outputs(name, plan.networks):
            (level, *others) = levels[node_of(node.inputs[0])]
            if not others:
                yield BlendTerm(f"{name}.{source}", level)


def runs(plan: Plan, wanted: Collection[str]) -> tuple[str, ...]:
    """Names of the network runs that signals need, in their order."""
    return tuple(plan.runs(wanted))


def source_of(plan: Plan, reference: str) -> str | None:
    """The one source that a signal estimates; ``None`` for mixtures, residuals and mixed sums."""
    return _source(reference, _sources(plan))


def _source(reference: str, sources: Mapping[str, str | None]) -> str | None:
    """The same, from what is known of nodes."""
    name, _, source = reference.partition(".")
    return source or sources[name]


def _sources(plan: Plan) -> dict[str, str | None]:
    """The one source that each node estimates."""
    sources: dict[str, str | None] = {MIXTURE: None}
    for name in plan.order(plan.nodes):
        node = plan.nodes[name]
        found = {_source(term, sources) for term in node.terms or [MIXTURE]}
        sources[name] = found.pop() if len(found) == 1 else None
    return sources


def _is_blend(plan: Plan, node: Sum, stem: str, sources: Mapping[str, str | None]) -> bool:
    for term in node.terms:
        source = _source(term, sources)
        residual = source is None and isinstance(plan.nodes.get(node_of(term)), Sum)
        if source != stem and not residual:
            return False
    return True


def _levels(plan: Plan) -> dict[str, set[str | None]]:
    """The normalized signals at whose level each node is; ``None`` among them is the mixture's own."""
    levels: dict[str, set[str | None]] = {MIXTURE: {None}}
    for name in plan.order(plan.nodes):
        node = plan.nodes[name]
        below = set().union(*(levels[node_of(taken)] for taken in node.inputs))
        levels[name] = node.level(name, below)
    return levels


def _node_name(signal: BlendTerm, plan: Plan, stems: Collection[str], taken: Collection[str]) -> str:
    """The node that is a signal at the mixture's level, where there is one but for stems; else a new name."""
    if signal.denormalize is None and isinstance(plan.nodes[node_of(signal.reference)], Sum):
        return signal.reference
    for name, node in plan.nodes.items():
        if node == Sum({signal.reference: 1}, signal.denormalize) and name not in stems:
            return name
    return _free(signal.reference.replace(".", "_"), taken)


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name
