"""A plan with other weights, and the text of its file, which says where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evaluator.blend_search.flat_plan import pruned
from evaluator.run_folder import write_text
from kmdx import plan_file
from kmdx.errors import KmdxError
from kmdx.nodes import Sum
from kmdx.plan import Plan

MARK = "Written by evaluator.blend_search."
"""The first line of its plans, by which it knows them."""


def reweighted(plan: Plan, weights: Mapping[str, Mapping[str, float]]) -> Plan:
    """A flat plan with other weights of some stems: weights of 0 go, and with them what nothing else needs.

    Parameters
    ----------
    plan : Plan
    weights : mapping of str to mapping
        Stems, and the weight of each of their signals.
    """
    nodes = dict(plan.nodes)
    for stem in plan.stems:
        node = nodes[stem]
        assert isinstance(node, Sum)
        terms = weights.get(stem, node.terms)
        heard = {name: weight for name, weight in terms.items() if weight}
        nodes[stem] = replace(node, terms=heard or terms)
    return pruned(replace(plan, nodes=nodes), plan.stems)


def write(path: Path, plan: Plan, origin: Sequence[str]) -> None:
    """Write a plan whole or not at all, with where it came from as comments above it.

    Raises
    ------
    KmdxError
        If the name does not end in ``.yaml``, or the file cannot be written.
    """
    _check_name(path)
    comments = "".join(f"# {' '.join(line.split())}\n" for line in [MARK, *origin])
    text = comments + plan_file.dump(plan, path.parent)
    plan_file.parse(text, path.stem, path.parent)  # what is written can be run
    write_text(path, text)


def check_plan(path: Path, digest: str, collection: Path | None = None, force: bool = False) -> None:
    """Raise if a plan is not to be written there, before any work.

    Parameters
    ----------
    path : Path
    digest : str
        Of the plan that the weights are for, whose own file is never written over.
    collection : Path, optional
        A folder whose plan is never written over.
    force : bool
        Write over other plans, also those that this command did not write.

    Raises
    ------
    KmdxError
    """
    _check_name(path)
    check(path, collection)
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KmdxError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() == digest:
        raise KmdxError(f"{path}: is the plan that the weights are for; choose another --output")
    if not (force or content.startswith(f"# {MARK}".encode())):
        raise KmdxError(f"{path}: is there, and not by this command; --force writes over it")


def check_report(path: Path, collection: Path) -> None:
    """Raise :class:`KmdxError` if a report or picture is not to be written there, before any work."""
    check(path, collection)
    if path.suffix in (".yaml", ".yml"):
        raise KmdxError(f"{path}: has the name of a plan; choose another for a report or a picture")


def check_distinct(*paths: Path | None) -> None:
    """Raise :class:`KmdxError` if two of these outputs are one file."""
    given = [path.resolve() for path in paths if path is not None]
    for path in given:
        if given.count(path) > 1:
            raise KmdxError(f"{path}: is given for two outputs")


def check(path: Path, collection: Path | None = None) -> None:
    """Raise :class:`KmdxError` if a file could not be written there, or in a collection; before any work."""
    if collection is not None and collection.resolve() in path.resolve().parents:
        raise KmdxError(f"{path}: lies in the collection, whose files are its own; choose another place")
    if not path.parent.is_dir():
        raise KmdxError(f"{path} cannot be written: no folder {path.parent}")
    if path.is_dir():
        raise KmdxError(f"{path}: is a folder, expected the name of a file to write")


def _check_name(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise KmdxError(f"{path}: expected a name that ends in .yaml, as plans do")
