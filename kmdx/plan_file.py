"""Reads a plan from its YAML file and says what is wrong with it; writes one as YAML.

``networks`` names each network with its weights and with how a signal of any length goes through it;
``signals`` is a graph of nodes; ``stems`` says which weighted sums are the result::

    networks:
      first: {weights: htdemucs, overlap_add: {overlap: 0.25}}
    signals:
      x:     {normalize: mixture}                       # (mixture − mean) / std, of its mono sum
      V:     {network: first, hears: x}                 # gives V.vocals, V.drums, …
      rest:  {sum: {x: 1, V.vocals: -1}}
    stems:
      vocals: {sum: {V.vocals: 1}, denormalize: x}      # · std + mean, of that same mixture

``mixture`` is the song itself. A plan is checked whole when it is loaded; nothing here needs torch.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from kmdx import documents, weights
from kmdx.challenge import ACCOMPANIMENT, MIXTURE
from kmdx.errors import DocumentError, PlanError, WeightsError, listed, quoted, shown, suggest
from kmdx.networks import architecture as architectures
from kmdx.nodes import KINDS, Node
from kmdx.plan import NetworkUse, Plan, node_of
from kmdx.weights import Weight
from kmdx.windows import WINDOWS

RATES = (1000, 384_001)  # Hz
MAX_KEY = 2 * architectures.MAX_NAME + 1  # bytes of NODE.SOURCE
MAX_WINDOWS = 200  # of one network for a second of audio, and ten times as many of all networks
MAX_LOAD = 200.0  # times that each sample goes through one network: an overlap of 0.995
MAX_HELD = 200  # signals in memory at once; leaderboard C holds 16

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]", re.IGNORECASE)


def names() -> list[str]:
    """Names of the ensembles that come with the package."""
    folder = resources.files("kmdx") / "plans"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load(ensemble: str | Path) -> Plan:
    """Load an ensemble by its name, or from the path of a YAML file.

    Raises
    ------
    PlanError
        If there is none, or its file is not a valid plan; names the line and the key.
    """
    text = str(ensemble)
    if text in names():
        source = resources.files("kmdx") / "plans" / f"{text}.yaml"
        return parse(source.read_text("utf-8"), name=text, folder=None)
    path = Path(ensemble)
    if not text.endswith((".yaml", ".yml")):
        raise PlanError(
            f"no ensemble {quoted(text)}; there are {', '.join(names())}, or give the path of a .yaml file"
        )
    try:
        content = documents.read_text(path)
    except DocumentError as error:
        raise PlanError(f"cannot read the ensemble {shown(path)}: {error}") from error
    return parse(content, name=path.stem, folder=path.parent)


def parse(text: str, name: str, folder: Path | None = None) -> Plan:
    """Check the text of a plan and make it a :class:`Plan`.

    Parameters
    ----------
    text : str
        YAML.
    name : str
        What to call the plan, in messages too.
    folder : Path, optional
        Where weight files that the plan names by path are looked for.

    Raises
    ------
    PlanError
        At the first thing that is wrong; names the line and the key.
    """
    try:
        root = documents.compose(text)
    except DocumentError as error:
        raise PlanError(f"{shown(name)}: {error}") from error
    if root is None:
        raise PlanError(f"{shown(name)}: the file is empty")
    return PlanReader(name, folder).plan(root, hashlib.sha256(text.encode()).hexdigest())


def dump(plan: Plan, folder: Path | None = None) -> str:
    """Return the text of a plan: :func:`parse` makes the same plan of it, but for its name and digest.

    Parameters
    ----------
    plan : Plan
    folder : Path, optional
        Where the text will lie: weight files of one's own are named relative to it. Without it, by
        their full paths.
    """

    def weight(use: NetworkUse) -> Any:
        path = use.weight.path
        if path is None or use.weight.name != str(path):  # the registry's, or trained here
            return use.weight.name
        file = path.resolve() if folder is None else Path(os.path.relpath(path.resolve(), folder.resolve()))
        return {"file": str(file), "architecture": json.loads(json.dumps(dict(use.weight.architecture)))}

    def network(use: NetworkUse) -> dict[str, Any]:
        return {"weights": weight(use), use.chunking.key: use.chunking.settings()}

    signals = {name: node.settings() for name, node in plan.nodes.items()}
    content = {
        "title": plan.title,
        "description": plan.description,
        "sample_rate": plan.sample_rate,
        "networks": {name: network(use) for name, use in plan.networks.items()},
        "signals": {name: node for name, node in signals.items() if name not in plan.stems},
        "stems": {name: signals[name] for name in plan.stems},
    }
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


class PlanReader:
    """Turns YAML nodes into a plan; every complaint carries the line and the dotted key."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name = name
        self.folder = folder
        self.known: dict[str, Weight] = {}  # weights by their names, each looked for once

    def fail(self, node: yaml.Node, key: str, message: str) -> PlanError:
        where = f"{key}: " if key else ""
        return PlanError(f"{shown(self.name)}: line {node.start_mark.line + 1}: {where}{message}")

    def plan(self, root: yaml.Node, digest: str) -> Plan:
        entries = self.mapping(
            root, "", {"title", "description", "sample_rate", "networks", "signals", "stems"}
        )
        for key in ("networks", "signals", "stems"):
            if key not in entries:
                raise self.fail(root, "", f"the key {key!r} is missing")
        rate_node = entries.get("sample_rate")
        rate = 44100 if rate_node is None else int(self.number(rate_node, "sample_rate", *RATES, whole=True))

        networks = {
            name: self.network(node, f"networks.{name}", rate)
            for name, node in self.mapping(entries["networks"], "networks").items()
        }
        signals = self.mapping(entries["signals"], "signals")
        stems = self.mapping(entries["stems"], "stems")
        if not stems:
            raise self.fail(entries["stems"], "stems", "a plan needs at least one stem")
        places = {
            **{name: (node, f"signals.{name}") for name, node in signals.items()},
            **{name: (node, f"stems.{name}") for name, node in stems.items()},
        }
        self.check_names(places, signals, stems)
        nodes = {name: self.node(node, key, networks) for name, (node, key) in places.items()}
        for name in stems:
            if nodes[name].terms is None:
                raise self.fail(stems[name], f"stems.{name}", "a stem must be a sum of signals")

        self.check_references(places, nodes, networks)
        self.check_cycles(places, nodes)
        plan = Plan(
            name=self.name,
            title=_printable(self.text(entries.get("title"), "title")) or self.name,
            description=_printable(self.text(entries.get("description"), "description")),
            sample_rate=rate,
            networks=networks,
            nodes=nodes,
            stems=tuple(stems),
            digest=digest,
        )
        self.check_cost(root, plan)
        return plan

    def network(self, node: yaml.Node, key: str, rate: int) -> NetworkUse:
        entries = self.mapping(node, key, {"weights", *WINDOWS})
        if "weights" not in entries:
            raise self.fail(node, key, "the key 'weights' is missing")
        weight = self.weight(entries["weights"], f"{key}.weights")
        if len(entries) != 2:
            raise self.fail(node, key, f"give either {' or '.join(map(repr, WINDOWS))}")
        ((way, settings),) = (entry for entry in entries.items() if entry[0] != "weights")
        chunking = WINDOWS[way].read(self, settings, f"{key}.{way}", weight, rate)
        try:
            architectures.check_window(weight.architecture, chunking.length)
        except ValueError as error:
            raise self.fail(node, key, str(error)) from error
        if cost := _excess(chunking.per_second(rate), chunking.load, MAX_WINDOWS, MAX_LOAD):
            raise self.fail(node, key, f"{chunking}: {cost}")
        return NetworkUse(weight, chunking)

    def weight(self, node: yaml.Node, key: str) -> Weight:
        if isinstance(node, yaml.ScalarNode):
            if node.value not in self.known:
                try:
                    self.known[node.value] = weights.get(node.value)
                except WeightsError as error:
                    raise self.fail(node, key, str(error)) from error
            return self.known[node.value]
        entries = self.mapping(node, key, {"file", "architecture"})
        if set(entries) != {"file", "architecture"}:
            raise self.fail(node, key, "weights of your own need the keys 'file' and 'architecture'")
        path = self.path(entries["file"], f"{key}.file")
        architecture = self.plain(entries["architecture"], f"{key}.architecture")
        try:
            return weights.own(path if self.folder is None else self.folder / path, architecture)
        except WeightsError as error:
            raise self.fail(entries["architecture"], f"{key}.architecture", str(error)) from error

    def node(self, node: yaml.Node, key: str, networks: Mapping[str, NetworkUse]) -> Node:
        forms = {frozenset(form): (form, kind) for kind in KINDS for form in kind.forms}
        entries = self.mapping(node, key, {name for form in forms for name in form})
        given = frozenset(entries)
        if given in forms:
            return forms[given][1].read(self, entries, key, networks)
        expected = [f"{{{', '.join(form)}}}" for form, _ in forms.values()]
        raise self.fail(
            node, key, f"expected {', '.join(expected[:-1])} or {expected[-1]}, not {{{listed(entries)}}}"
        )

    def check_names(
        self, places: Mapping[str, tuple[yaml.Node, str]], signals: Collection[str], stems: Collection[str]
    ) -> None:
        """Check names of nodes, and that stems can be files of their own wherever they are written."""
        files: dict[str, str] = {_file_name(name): name for name in (MIXTURE, ACCOMPANIMENT)}
        for name, (node, key) in places.items():
            if name in (MIXTURE, ACCOMPANIMENT):
                raise self.fail(node, key, f"the name {name!r} has its own meaning; choose another")
            if not re.fullmatch(r"[\w-]+", name):
                raise self.fail(node, key, "names are made of letters, digits, '_' and '-'")
            if len(name.encode()) > architectures.MAX_NAME:
                raise self.fail(node, key, f"names have {architectures.MAX_NAME} bytes at the most")
            if name in signals and name in stems:
                raise self.fail(node, key, "a signal of that name is defined too")
            if name in stems:
                other = files.setdefault(_file_name(name), name)
                if other != name:
                    raise self.fail(node, key, f"{other!r} would be the same file where case does not count")
                if _RESERVED.fullmatch(name):
                    raise self.fail(node, key, "no file can have that name on Windows; choose another")

    def check_references(
        self,
        places: Mapping[str, tuple[yaml.Node, str]],
        nodes: Mapping[str, Node],
        networks: Mapping[str, NetworkUse],
    ) -> None:
        known = {MIXTURE: None}
        for name, node in nodes.items():
            known.update(dict.fromkeys(node.outputs(name, networks)))
        for name, node in nodes.items():
            place, key = places[name]
            for reference in node.inputs:
                if reference not in known:
                    if owner := nodes.get(reference):
                        hint = f"; say which source: {listed(owner.outputs(reference, networks))}"
                    else:
                        hint = suggest(reference, known)
                    raise self.fail(place, key, f"no signal {quoted(reference)}{hint}")
            if fault := node.fault(nodes):
                raise self.fail(place, f"{key}.{fault[0]}", fault[1])

    def check_cycles(self, places: Mapping[str, tuple[yaml.Node, str]], nodes: Mapping[str, Node]) -> None:
        graph = {name: map(node_of, node.inputs) for name, node in nodes.items()}
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1][:0:-1]  # each one before what it needs
            position = {name: number for number, name in enumerate(nodes)}
            start = circle.index(min(circle, key=position.__getitem__))
            circle = [*circle[start:], *circle[: start + 1]]
            place, key = places[circle[0]]
            raise self.fail(place, key, f"a cycle: {listed(circle, ' → ')}") from error

    def check_cost(self, root: yaml.Node, plan: Plan) -> None:
        """Check what a second of audio costs, and what is held in memory for it."""
        if cost := _excess(
            plan.windows_per_second(plan.stems), plan.load(plan.stems), 10 * MAX_WINDOWS, 10 * MAX_LOAD
        ):
            raise self.fail(root, "", f"all networks together: {cost}")
        held = plan.held(plan.stems)
        if held > MAX_HELD:
            raise self.fail(root, "", f"{held} signals are held at once; the most is {MAX_HELD}")

    def mapping(self, node: yaml.Node, key: str, allowed: Collection[str] = ()) -> dict[str, yaml.Node]:
        """Entries of a mapping by key; refuses other nodes and unknown keys."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, key, "expected a mapping of names to values")
        entries: dict[str, yaml.Node] = {}
        for name_node, value in node.value:
            name = str(name_node.value)
            if not name.isprintable() or not 0 < len(name.encode()) <= MAX_KEY:
                raise self.fail(name_node, key, f"{quoted(name)} is no name of 1 to {MAX_KEY} bytes")
            if allowed and name not in allowed:
                raise self.fail(
                    name_node,
                    key,
                    f"unknown key {quoted(name)}{suggest(name, allowed)}; "
                    f"allowed: {', '.join(sorted(allowed))}",
                )
            entries[name] = value
        return entries

    def plain(self, node: yaml.Node, key: str) -> dict[str, Any]:
        """A mapping of plain values, as YAML reads them."""
        self.mapping(node, key)
        value: dict[str, Any] = self.value(node, key)
        return value

    def value(self, node: yaml.Node, key: str) -> Any:
        """A node's value, as YAML reads it."""
        try:
            return documents.value(node)
        except DocumentError as error:
            raise self.fail(node, key, f"cannot be read: {error.problem}") from error

    def text(self, node: yaml.Node | None, key: str) -> str:
        if node is None:
            return ""
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, key, "expected a text")
        return str(node.value).strip()

    def path(self, node: yaml.Node, key: str) -> Path:
        """The path of a file, which may be missing."""
        text = self.text(node, key)
        try:
            return weights.check_path(text)
        except WeightsError as error:
            raise self.fail(node, key, str(error)) from error

    def number(
        self,
        node: yaml.Node,
        key: str,
        low: float,
        high: float,
        whole: bool = False,
    ) -> float:
        """A finite number in ``[low, high)``."""
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, key, "expected a number, not a mapping or list")
        value = self.value(node, key)
        if isinstance(value, str) and not node.style and _EXPONENT.fullmatch(value):
            value = float(value)  # 1e-3, which is a text in YAML 1.1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.fail(node, key, f"expected a number, not {quoted(node.value)}")
        if not low <= value < high or (whole and value != int(value)):
            kind = f"a {'whole ' if whole else ''}number from {low:.9g} and below {high:.9g}"
            raise self.fail(node, key, f"expected {kind}, not {value:.9g}")
        return value


def _excess(windows: float, load: float, most_windows: float, most_load: float) -> str | None:
    """What is too much for a second of audio; None if nothing is."""
    if windows <= most_windows and load <= most_load:
        return None
    return (
        f"each second of audio takes {windows:.4g} windows and goes through {load:.4g} times; the most is "
        f"{most_windows:g} windows and {most_load:g} times: overlap less, or take longer windows"
    )


def _file_name(stem: str) -> str:
    """What tells files apart on macOS and Windows."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def _printable(text: str) -> str:
    """A text on one line, without what cannot be printed."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
