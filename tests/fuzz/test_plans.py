"""Plans of all kinds, including absurd ones: each is a valid plan or a one-line error."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import replace
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from kmdx import plan_file
from kmdx.challenge import MIXTURE
from kmdx.errors import PlanError
from kmdx.nodes import Estimate, Normalize, Sum
from kmdx.plan import NetworkUse, Plan, node_of
from kmdx.windows import OverlapAdd

SECONDS = 5  # far more than any plan needs
CHARACTERS = 700  # of a message

UNET = {"type": "tfc_tdf", "n_fft": 1024, "hop": 256, "bins": 128, "frames": 32, "layers": 5, "convolutions": 1,
        "growth": 4, "norm_groups": 2}  # fmt: skip
WEIGHTS = st.sampled_from(
    [
        ("htdemucs", ("drums", "bass", "other", "vocals")),
        ("mdx_bass", ("bass",)),
        ({"file": "a.pt", "architecture": {**UNET, "sources": ["vocals"]}}, ("vocals",)),
        (
            {"file": "b.th", "architecture": {"type": "hdemucs", "sources": ["a b", "é"], "segment": 7}},
            ("a b", "é"),
        ),
    ]
)
WEIGHT = st.floats(-10, 10) | st.integers(-3, 3)

ODD_VALUES = st.sampled_from(
    [None, True, "", "text", -1, 0, 1, 2, 3, 0.5, 0.99999, 1e-300, 1e300, math.inf, math.nan, 2**31, 2**63, 10**40,
     "a\nb", "\0", "../x", "CON", "x" * 1000, "é" * 200, [], {}, [[]], ["vocals", "vocals"], {"a": {"b": {}}}]
)  # fmt: skip
ODD_TEXTS = st.sampled_from(
    ["!!int ''", "!!bool abc", "!!float x", "!!null x", "!!timestamp 1", "!!binary '='", "!!set {a}", "!!omap [a: 1]",
     "!!python/name:os.system", "!!int [1]", "!!map []", "!!str {a: 1}", "&a [*a]", "*a", "{<<: 3}", "{<<: {a: 1}, a: 2}",
     "9" * 400, "9" * 5000, "0x" + "f" * 300, "0x_", "0b_", "010", "1:30", "1e400", "1.0e+400", ".inf", "-.inf", ".nan",
     "!!float 0x10", "!!float 0b1", "!!float -0x1", "!!float 0x_", "!!int 1.5", "!!int 0x1f", "!!bool 0b1", "!!null 0x1",
     "1e-3", "2026-01-01", "=", "~", "'", '"', '"\\ud800"', '"\\0"', "[" * 60 + "]" * 60, "[" * 2000, "{a: " * 60,
     "? a", "- a", "|\n a", "\t", "\0", "\ufeff", "\x85", "# a", "--- a", "...", "%YAML 9.9", "{a: 1, a: 1}"]
)  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """The content of a plan that is valid."""
    networks, sources = {}, {}
    for number in range(draw(st.integers(1, 3))):
        weights, sources[f"n{number}"] = draw(WEIGHTS)
        overlap = draw(st.sampled_from([0, 0.25, 0.85, 0.9]))
        networks[f"n{number}"] = {"weights": weights, "overlap_add": {"overlap": overlap}}
    signals: dict[str, Any] = {}
    known, levels = [MIXTURE], []
    for number in range(draw(st.integers(0, 8))):
        name = draw(st.sampled_from("sxé_")) + str(number)
        match draw(st.integers(0, 2)):
            case 0:
                network = draw(st.sampled_from(sorted(networks)))
                signals[name] = {"network": network, "hears": draw(st.sampled_from(known))}
                known += [f"{name}.{source}" for source in sources[network]]
            case 1:
                signals[name] = {"normalize": draw(st.sampled_from(known))}
                known.append(name)
                levels.append(name)
            case 2:
                signals[name] = draw(sums(known, levels))
                known.append(name)
    stems = draw(st.lists(st.sampled_from(["vocals", "drums", "été", "a-b"]), min_size=1, unique=True))
    order = draw(st.permutations(list(signals)))
    return {
        "title": draw(st.sampled_from(["", "A title", "1:30", "é"])),
        "sample_rate": 44100,
        "networks": networks,
        "signals": {name: signals[name] for name in order},
        "stems": {stem: draw(sums(known, levels)) for stem in stems},
    }


@st.composite
def sums(draw: st.DrawFn, known: list[str], levels: list[str]) -> dict[str, Any]:
    terms = draw(st.dictionaries(st.sampled_from(known), WEIGHT, min_size=1, max_size=4))
    back = draw(st.none() | st.sampled_from(levels)) if levels else None
    return {"sum": terms} if back is None else {"sum": terms, "denormalize": back}


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every place in a content, as a container and a key in it."""
    keys = (
        list(content)
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else []
    )
    return [place for key in keys for place in ((content, key), *places(content[key]))]


@st.composite
def odd_plans(draw: st.DrawFn) -> str:
    """The text of a plan with a few things changed: values, keys, tags, anchors, or any characters."""
    content = copy.deepcopy(draw(plans()))
    marks = {}
    for number in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(places(content)))
        change = draw(st.sampled_from(["value", "text", "key", "gone", "copy"]))
        if change == "text":
            container[key] = f"MARK{number}"
            marks[f"MARK{number}"] = draw(ODD_TEXTS)
        elif change == "copy":
            container[key] = content
            content = yaml.safe_load(yaml.safe_dump(content)) if draw(st.booleans()) else dict(content)
            break
        elif change == "value" or isinstance(container, list):
            container[key] = draw(ODD_VALUES)
        else:
            value = container.pop(key)
            if change == "key":
                container[draw(ODD_VALUES.filter(lambda odd: isinstance(odd, str)))] = value
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=draw(st.booleans()))
    for mark, odd in marks.items():
        text = text.replace(mark, odd)
    for _ in range(draw(st.integers(0, 2))):
        start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 20))
        text = text[:start] + draw(ODD_TEXTS | st.text(max_size=5)) + text[start + length :]
    return text


def check(text: str) -> Plan | None:
    """The plan of a text; ``None`` if it is refused correctly."""
    begun = time.process_time()
    try:
        return plan_file.parse(text, "plan")
    except PlanError as error:
        message = str(error)
        assert message.startswith("plan: ")
        assert message.isprintable()
        assert len(message) < CHARACTERS
        return None
    finally:
        assert time.process_time() - begun < SECONDS


@given(odd_plans())
def test_whatever_is_in_a_plan_it_is_read_or_refused_in_one_line(text: str) -> None:
    plan = check(text)
    if plan is not None:
        assert plan.order(plan.stems)[-1] in plan.stems


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda data: data.decode("latin-1")))
def test_whatever_text_is_given_as_a_plan_it_is_refused_in_one_line(text: str) -> None:
    assert check(text) is None


@given(plans())
def test_a_valid_plan_survives_being_written(content: dict[str, Any]) -> None:
    plan = plan_file.parse(json.dumps(content), "plan")  # JSON is YAML
    again = plan_file.parse(plan_file.dump(plan), "plan")
    assert again.nodes == plan.nodes
    assert again.stems == plan.stems
    assert {name: use.chunking for name, use in again.networks.items()} == {
        name: use.chunking for name, use in plan.networks.items()
    }
    for name, use in plan.networks.items():
        assert dict(again.networks[name].weight.architecture) == dict(use.weight.architecture)


# The order of nodes

USE = NetworkUse(plan_file.load("htdemucs").networks["htdemucs"].weight, OverlapAdd(0.25, 7.8, 343980))
EMPTY = replace(plan_file.load("htdemucs"), networks={"net": USE}, nodes={}, stems=())


@st.composite
def graphs(draw: st.DrawFn) -> Plan:
    """A plan of any graph without cycles, its nodes in any order."""
    nodes: dict[str, Any] = {}
    known = [MIXTURE]
    for number in range(draw(st.integers(1, 12))):
        name, taken = (
            f"s{number}",
            draw(st.lists(st.sampled_from(known), min_size=1, max_size=4, unique=True)),
        )
        kind = draw(st.sampled_from([Estimate, Normalize, Sum]))
        if kind is Estimate:
            nodes[name] = Estimate("net", taken[0])
            known += [f"{name}.{source}" for source in USE.sources]
        else:
            nodes[name] = Normalize(taken[0]) if kind is Normalize else Sum(dict.fromkeys(taken, 1.0))
            known.append(name)
    return replace(EMPTY, nodes={name: nodes[name] for name in draw(st.permutations(list(nodes)))})


def ordered(plan: Plan, wanted: list[str], known: list[str]) -> list[str]:
    """The order of nodes by its definition: what a node needs, each before its user, then the node."""
    result: list[str] = []
    for reference in wanted:
        name = node_of(reference)
        if name != MIXTURE and reference not in known and name not in result:
            needed = ordered(plan, list(plan.nodes[name].inputs), known)
            result += [other for other in (*needed, name) if other not in result]
    return result


@given(graphs(), st.data())
def test_nodes_come_in_the_order_of_the_definition(plan: Plan, data: st.DataObject) -> None:
    references = [MIXTURE, *plan.nodes]
    wanted = data.draw(st.lists(st.sampled_from(references), max_size=4))
    known = data.draw(st.lists(st.sampled_from(references), max_size=3))
    assert plan.order(wanted, known) == ordered(plan, wanted, known)
    depth = {MIXTURE: 0}
    for name in ordered(plan, list(plan.nodes), []):
        node = plan.nodes[name]
        depth[name] = max(depth[node_of(taken)] for taken in node.inputs) + isinstance(node, Estimate)
        assert plan.stage(name) == depth[name]


@given(graphs(), st.data())
def test_signals_held_at_once_are_counted_as_they_are_made_and_dropped(
    plan: Plan, data: st.DataObject
) -> None:
    wanted = data.draw(st.lists(st.sampled_from(list(plan.nodes)), min_size=1, max_size=3, unique=True))
    wanted = [name if not isinstance(plan.nodes[name], Estimate) else f"{name}.vocals" for name in wanted]
    order, used = plan.order(wanted), plan.sources_used(wanted)
    held, most = {MIXTURE}, 1
    for position, name in enumerate(order):
        held |= {f"{name}.{source}" for source in used[name]} if name in used else {name}
        most = max(most, len(held))
        later = {taken for other in order[position + 1 :] for taken in plan.nodes[other].inputs}
        held &= {*later, *wanted}
    assert plan.held(wanted) == most
