"""Read plans from YAML files and report errors in them; write plans as YAML.

``networks`` gives each network a name, its weights and a window (:mod:`kmdx.windows`), the way to pass a
signal of any length through it. ``signals`` is a graph of nodes (:mod:`kmdx.nodes`). ``stems`` are the
weighted sums that are the result::

    networks:
      first: {weights: htdemucs, overlap_add: {overlap: 0.25}}
    signals:
      x:     {normalize: mixture}                       # (mixture − mean) / std, of its mono sum
      V:     {network: first, hears: x}                 # estimates V.vocals, V.drums, … from x
      rest:  {sum: {x: 1, V.vocals: -1}}
    stems:
      vocals: {sum: {V.vocals: 1}, denormalize: x}      # · std + mean, of the same mixture

``mixture`` is the song itself. Loading a plan checks it completely. This module does not import torch.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml

from kmdx import documents, urls, weights
from kmdx.challenge import ACCOMPANIMENT, MIXTURE, RATE
from kmdx.documents import Number, YamlPart
from kmdx.errors import DocumentError, PlanError, WeightsError, listed, quoted, shown, suggest
from kmdx.file_names import is_reserved, key
from kmdx.networks import types
from kmdx.networks.architecture import MAX_NAME
from kmdx.nodes import Node, forms
from kmdx.plan import MAX_SHIFTS, NetworkUse, Plan, node_of
from kmdx.urls import Url
from kmdx.weights import Weight
from kmdx.windows import WINDOWS

RATES = (1000, 384_001)  # Hz
MAX_WINDOWS = 200  # windows of one network per second of audio; ten times as many for all networks
MAX_LOAD = 200.0  # passes of each sample through one network: an overlap of 0.995
MAX_HELD = 200  # signals in memory at once; leaderboard C needs 15


def names() -> list[str]:
    """Names of the ensembles that come with the package."""
    folder = resources.files("kmdx") / "plans"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def imported() -> list[str]:
    """Names of the ensembles in the models folder, which :func:`kmdx.msst.add` wrote."""
    found = (path for path in weights.models_folder().glob("*.yaml") if path.name != weights.TRAINED)
    return sorted(path.stem for path in found if "." not in path.stem)  # not NAME.config.yaml


def load(ensemble: str | Path) -> Plan:
    """Load an ensemble by its name, or from the path or the URL of a YAML file.

    An ensemble that comes with the package is preferred to one of the same name in the models folder. Raises
    :class:`PlanError` if it does not exist, or its file is not a valid plan; names the line and the key.
    """
    text = str(ensemble)
    if text in names():
        source = resources.files("kmdx") / "plans" / f"{text}.yaml"
        return parse(source.read_text("utf-8"), name=text, folder=None)
    path = urls.parse(text)
    if isinstance(path, Url):
        try:
            return parse(urls.read_text(path), name=path.location.stem, folder=path.parent)
        except DocumentError as error:
            raise PlanError(f"cannot read the ensemble {path}: {error}") from error
    if not text.endswith((".yaml", ".yml")):
        known = [*names(), *imported()]
        if text not in known:
            if text in weights.checkpoints():
                raise PlanError(
                    f"{text} is not imported yet; `kmdx models pull {text}` downloads and imports it"
                )
            if text in weights.published():
                raise PlanError(
                    f"{text} is a weight, not an ensemble; a plan (.yaml) can use it: docs/ensembles.md"
                )
            hint = suggest(text, [*known, *weights.checkpoints()])
            raise PlanError(
                f"unknown ensemble {quoted(text)}{hint}; available: {', '.join(known)}, or the path of a "
                ".yaml file"
            )
        path = weights.models_folder() / f"{text}.yaml"
    try:
        content = documents.read_text(path)
    except DocumentError as error:
        raise PlanError(f"cannot read the ensemble {shown(path)}: {error}") from error
    return parse(content, name=path.stem, folder=path.parent)


def parse(text: str, name: str, folder: Path | Url | None = None) -> Plan:
    """Check the text of a plan and return it as a :class:`Plan`.

    Raises :class:`PlanError` for the first error in the plan; names the line and the key.

    Parameters
    ----------
    text : str
        YAML.
    name : str
        Name of the plan, also used in messages.
    folder : Path or Url, optional
        Folder to which the paths of weight files in the plan are relative.
    """
    try:
        root = documents.parse(text)
        return root.read(_Reader(name, folder, root).plan, hashlib.sha256(text.encode()).hexdigest())
    except DocumentError as error:
        raise PlanError(f"{shown(name)}: {error}") from error


def dump(plan: Plan, folder: Path | None = None) -> str:
    """Return a plan as YAML, from which :func:`parse` makes the same plan, except its name and digest.

    Parameters
    ----------
    folder : Path, optional
        Folder in which the text will be stored. The paths of the user's own weight files are relative to
        it; by default, they are absolute.
    """

    def weight(use: NetworkUse) -> Any:
        path = use.weight.path
        source = use.weight.sources[0] if use.weight.sources else None
        if isinstance(source, weights.UrlSource):
            file = source.url
        elif path is None or use.weight.name != str(path):  # from the registry, or trained with this project
            return use.weight.name
        elif folder is None:
            file = str(path.resolve())
        else:
            file = os.path.relpath(path.resolve(), folder.resolve())
        facts = {"license": use.weight.licence, "trained_with": use.weight.trained_with}
        return {
            "file": file,
            **{key: fact for key, fact in facts.items() if fact not in (weights.OWN, None)},
            "architecture": json.loads(json.dumps(dict(use.weight.architecture))),
        }

    content = {
        "title": plan.title,
        "description": plan.description,
        **({"score": plan.score} if plan.score else {}),
        "sample_rate": plan.sample_rate,
        "networks": {name: {"weights": weight(use), **use.settings()} for name, use in plan.networks.items()},
        "signals": {name: node.settings() for name, node in plan.nodes.items() if name not in plan.stems},
        "stems": {name: plan.nodes[name].settings() for name in plan.stems},
    }
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


class _Reader:
    """Makes a plan from a document; every error names the line and the dotted key."""

    def __init__(self, name: str, folder: Path | Url | None, root: YamlPart) -> None:
        self.name = name
        self.folder = folder
        self.root = root
        self.known: dict[str, Weight] = {}  # weights by name, each looked up once

    def plan(
        self,
        digest: str,
        networks: YamlPart,
        signals: YamlPart,
        stems: YamlPart,
        title: str = "",
        description: str = "",
        score: str = "",
        sample_rate: Annotated[int, Number(*RATES)] = RATE,
    ) -> Plan:
        uses = {name: self.network(part, sample_rate) for name, part in networks.entries().items()}
        ends = stems.entries()
        if not ends:
            raise stems.error("a plan needs at least one stem")
        places = signals.entries()
        for name in ends:
            if name in places:
                raise ends[name].error("a signal has the same name; rename one of them")
        places |= ends
        _check_names(places, ends)
        nodes = {name: _node(part) for name, part in places.items()}
        for name, part in ends.items():
            if not nodes[name].can_be_stem:
                raise part.error("a stem must be a sum or combination of signals")
        _check_references(places, nodes, uses)
        _check_cycles(places, nodes)
        plan = Plan(
            name=self.name,
            title=_printable(title) or self.name,
            description=_printable(description),
            sample_rate=sample_rate,
            networks=uses,
            nodes=nodes,
            stems=tuple(ends),
            digest=digest,
            score=_printable(score),
        )
        windows, load = plan.windows_per_second(plan.stems), plan.load(plan.stems)
        if excess := _excess(windows, load, 10 * MAX_WINDOWS, 10 * MAX_LOAD):
            raise self.root.error(f"all networks together: {excess}")
        held = plan.held(plan.stems)
        if held > MAX_HELD:
            raise self.root.error(f"needs {held} signals in memory at once; at most {MAX_HELD} are allowed")
        return plan

    def network(self, part: YamlPart, rate: int) -> NetworkUse:
        entries = part.entries(("weights", *WINDOWS, "shifts", "tta"))
        if "weights" not in entries:
            raise part.error("the key 'weights' is missing")
        weight = self.weight(entries["weights"])
        windows = entries.keys() & WINDOWS.keys()
        if len(windows) != 1:
            raise part.error(f"expected one of {', '.join(WINDOWS)}")
        own_rate = types.read(weight.architecture).sample_rate
        if own_rate != rate:
            problem = f"{weight.name} needs {own_rate} Hz, but the plan's sample rate is {rate} Hz"
            raise entries["weights"].error(problem)
        (key,) = windows
        chunking = entries[key].read(WINDOWS[key].read, weight, rate)
        try:
            types.check_window(weight.architecture, chunking.length)
        except ValueError as error:
            raise part.error(str(error)) from error
        use = NetworkUse(
            weight,
            chunking,
            shifts=_value(entries, "shifts", Annotated[int, Number(1, MAX_SHIFTS + 1)], 1),
            tta=_value(entries, "tta", bool, False),
        )
        if excess := _excess(use.windows_per_second(rate), use.load, MAX_WINDOWS, MAX_LOAD):
            raise part.error(f"{use.how()}: {excess}")
        return use

    def weight(self, part: YamlPart) -> Weight:
        if isinstance(part.node, yaml.MappingNode):
            return part.read(self.own_weight)
        name = part.text()
        if name not in self.known:
            try:
                self.known[name] = weights.get(name)
            except WeightsError as error:
                raise part.error(str(error)) from error
        return self.known[name]

    def own_weight(
        self,
        file: str,
        architecture: dict[str, Any],
        license: str = weights.OWN,
        trained_with: str | None = None,
    ) -> Weight:
        place = urls.parse(file)
        if isinstance(place, Path):
            place = weights.check_path(str(place) if file else file)
            if isinstance(self.folder, Url) and not place.is_absolute():
                place = self.folder / place.as_posix()
            elif isinstance(self.folder, Path):
                place = self.folder / place
        path = place if isinstance(place, Path) else Path(place.location.name)
        weight = weights.own(path, architecture, license, trained_with)
        return weight if isinstance(place, Path) else weights.at_url(place.text, str(place), weight)


def _value(entries: Mapping[str, YamlPart], key: str, kind: Any, default: Any) -> Any:
    """The checked value of an optional key."""
    return documents.checked(kind, entries[key].plain(), entries[key]) if key in entries else default


def _node(part: YamlPart) -> Node:
    known = forms()
    entries = part.entries({key for form in known for key in form})
    for form, kind in known.items():
        if entries.keys() == set(form):
            return part.read(kind.read)
    *others, last = (f"{{{', '.join(form)}}}" for form in known)
    raise part.error(f"expected the keys {', '.join(others)} or {last}, not {{{listed(entries)}}}")


def _check_names(places: Mapping[str, YamlPart], stems: Collection[str]) -> None:
    """Check the names of nodes, and that the names of stems can be distinct file names on every system."""
    files: dict[str, str] = {key(name): name for name in (MIXTURE, ACCOMPANIMENT)}
    for name, part in places.items():
        if name in (MIXTURE, ACCOMPANIMENT):
            raise part.error(f"the name {name!r} is reserved; choose another")
        if not re.fullmatch(r"[\w-]+", name):
            raise part.error("a name may contain only letters, digits, '_' and '-'")
        if len(name.encode()) > MAX_NAME:
            raise part.error(f"a name may have at most {MAX_NAME} bytes")
        if name in stems:
            other = files.setdefault(key(name), name)
            if other != name:
                raise part.error(f"{other!r} would be the same file on systems that ignore case")
            if is_reserved(name):
                raise part.error("Windows does not allow this file name; choose another")


def _check_references(
    places: Mapping[str, YamlPart], nodes: Mapping[str, Node], networks: Mapping[str, NetworkUse]
) -> None:
    known = {MIXTURE: None}
    for name, node in nodes.items():
        if node.network is not None and node.network not in networks:
            hint = suggest(node.network, networks)
            raise places[name].error(f"unknown network {quoted(node.network)}{hint}", "network")
        known |= dict.fromkeys(node.outputs(name, networks))
    for name, node in nodes.items():
        for reference in node.inputs:
            if reference not in known:
                hint = suggest(reference, known)
                if reference in nodes:
                    hint = f"; name a source: {listed(nodes[reference].outputs(reference, networks))}"
                raise places[name].error(f"unknown signal {quoted(reference)}{hint}")
        if fault := node.fault(nodes):
            raise places[name].error(fault[1], fault[0])


def _check_cycles(places: Mapping[str, YamlPart], nodes: Mapping[str, Node]) -> None:
    graph = {name: map(node_of, node.inputs) for name, node in nodes.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][:0:-1]  # each node before its inputs
        position = {name: number for number, name in enumerate(nodes)}
        start = circle.index(min(circle, key=position.__getitem__))
        circle = [*circle[start:], *circle[: start + 1]]
        raise places[circle[0]].error(f"a cycle: {listed(circle, ' → ')}") from error


def _excess(windows: float, load: float, most_windows: float, most_load: float) -> str | None:
    """A message if a second of audio needs too many windows or passes; None if it does not."""
    if windows <= most_windows and load <= most_load:
        return None
    return (
        f"each second of audio needs {windows:.4g} windows and is processed {load:.4g} times; at most "
        f"{most_windows:g} windows and {most_load:g} times are allowed: overlap less, or use longer windows"
    )


def _printable(text: str) -> str:
    """A text on one line, without unprintable characters."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
